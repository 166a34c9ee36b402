"""One direction of one recurrent layer as an operator of PyTorch: the loops over the steps are opaque to its compilers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linger.errors import LingerError
from linger.ops._cells import arithmetic
from linger.ops._recurrent_gru import gru_backward, gru_forward
from linger.ops._recurrent_lstm import lstm_backward, lstm_forward
from linger.ops._recurrent_rnn import rnn_backward, rnn_forward
from linger.ops._recurrent_rows import Rows
from linger.ops._recurrent_step import Setting


def _setting(scale: Tensor, s_w: Tensor, chip: str, bits: int, wide: bool, relu: bool, train: bool) -> Setting:
    how = arithmetic(chip, bits)
    return Setting(how=how, scale=scale, weight_scale=s_w, bits=bits, wide=wide, relu=relu, train=train)


def _rows(sizes: Tensor, reverse: bool) -> Rows:
    return Rows(sizes.tolist(), reverse)


def _first(h0: Tensor, c0: Tensor, s: Setting) -> tuple[Tensor, Tensor]:
    """First states in LSB."""
    dtype = s.tables.dtype
    return h0.to(dtype) * s.scale.to(dtype), c0.to(dtype) * 2.0**s.how.fraction


@torch.library.custom_op("linger::recurrent", mutates_args=())
def recurrent(
    kind: str, acc: Tensor, w: Tensor, b: Tensor | None, w_hr: Tensor | None, h0: Tensor, c0: Tensor, scale: Tensor,
    s_w: Tensor, sizes: Tensor, reverse: bool, chip: str, bits: int, wide: bool, relu: bool, train: bool,
) -> list[Tensor]:  # fmt: skip
    """All steps of one direction.

    Args:
        kind: "lstm", "gru" or "rnn".
        acc: W_ih x + b_ih (rows, gates), real values; gates in the order of ``_recurrent_step``.
        w: W_hh (gates, H or P) on its grid; likewise ``b`` (gates,) and ``w_hr`` (P, H).
        h0: first hidden state (N, H or P) on the grid of ``scale``; ``c0``: first cell state (N, H).
        scale: of the hidden state, 0-d; ``s_w``: of w.
        sizes: how many sequences have step t, int64 on the CPU.
        reverse: from the last step to the first.
        chip: whose arithmetic.
        bits: width of the hidden state.
        wide: products of a state need float64.
        relu: the function of an RNN.
        train: a gradient is wanted.

    Returns:
        h of every row, the last h and the last c as float32, and what backward needs.
    """
    return _forward(kind, acc, w, b, w_hr, h0, c0, scale, s_w, sizes, reverse, chip, bits, wide, relu, train)


def _forward(
    kind: str, acc: Tensor, w: Tensor, b: Tensor | None, w_hr: Tensor | None, h0: Tensor, c0: Tensor, scale: Tensor,
    s_w: Tensor, sizes: Tensor, reverse: bool, chip: str, bits: int, wide: bool, relu: bool, train: bool, own: bool = False,
) -> list[Tensor]:  # fmt: skip
    """``own``: nothing else reads ``acc``, so that factors for backward may take its place."""
    s, rows = _setting(scale, s_w, chip, bits, wide, relu, train), _rows(sizes, reverse)
    h, c = _first(h0, c0, s)
    factors = acc.detach() if own and acc.dtype == torch.float32 else torch.empty_like(acc, dtype=torch.float32)
    factors = factors[: len(acc) * train]
    if kind == "lstm":
        last, saved = lstm_forward(acc, w, b, w_hr, h, c, rows, s, factors)
        c_last = last.mul_(2.0**-s.how.fraction).float()
    else:
        forward = gru_forward if kind == "gru" else rnn_forward
        saved, c_last = forward(acc, w, b, h, rows, s, factors), acc.new_zeros(0)
    hs = saved[0]
    return [(hs / scale.to(hs.dtype)).float(), (rows.last(hs) / scale.to(hs.dtype)).float(), c_last, *saved]


@recurrent.register_fake
def _(
    kind: str, acc: Tensor, w: Tensor, b: Tensor | None, w_hr: Tensor | None, h0: Tensor, c0: Tensor, scale: Tensor,
    s_w: Tensor, sizes: Tensor, reverse: bool, chip: str, bits: int, wide: bool, relu: bool, train: bool,
) -> list[Tensor]:  # fmt: skip
    n, size, out = acc.shape[0], c0.shape[1], h0.shape[1]
    dtype, single = torch.float32 if arithmetic(chip, bits).narrow else torch.float64, torch.float32
    wanted = n if train else 0
    made = [acc.new_empty(n, out, dtype=single), h0.new_empty(h0.shape, dtype=single)]
    made += [
        c0.new_empty(c0.shape, dtype=single) if kind == "lstm" else acc.new_empty(0),
        acc.new_empty(n, out, dtype=dtype),
    ]
    if kind == "rnn":
        return [*made, acc.new_empty(wanted, out, dtype=single)]
    if kind == "lstm":
        projected = 0 if w_hr is None else n
        made.append(acc.new_empty(projected, size, dtype=dtype))
        made.append(acc.new_empty(min(projected, wanted), out, dtype=single))
    made.append(acc.new_empty(wanted, acc.shape[1], dtype=single))
    return made + [acc.new_empty(wanted, size, dtype=single) for _ in range(2)]


@torch.library.custom_op("linger::recurrent_backward", mutates_args=())
def recurrent_backward(
    kind: str, g_rows: Tensor, g_h: Tensor, g_c: Tensor, saved: list[Tensor], w: Tensor, w_hr: Tensor | None, h0: Tensor,
    c0: Tensor, scale: Tensor, s_w: Tensor, sizes: Tensor, reverse: bool, chip: str, bits: int, wide: bool, relu: bool, train: bool, biased: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of acc, w, b, w_hr, h0 and c0; empty where there is no such tensor."""
    s, rows = _setting(scale, s_w, chip, bits, wide, relu, train), _rows(sizes, reverse)
    d_bias, d_hr, d_c = (g_rows.new_zeros(0) for _ in range(3))  # results of an operator share no memory
    if kind == "lstm":
        d_b, d_h, d_c, given = lstm_backward((g_rows, g_h, g_c), saved, w, w_hr, rows, 2.0**-s.how.fraction)
        d_hr = d_hr if given is None else given
    elif kind == "gru":
        d_b, d_n, d_h = gru_backward((g_rows, g_h), saved, w, rows)
    else:
        d_b, d_h = rnn_backward((g_rows, g_h), saved, w, rows)
    hs = saved[0]
    h_first = _first(h0, c0, s)[0]
    d_bias = d_b.sum(0) if biased else d_bias
    d_w = rows.weight_gradient(d_b, hs, h_first).div_(scale.to(d_b.dtype))
    if kind == "gru":
        d_b[:, -d_n.shape[1] :] = d_n  # the input's gradient, in the place of the state's
    return [d_b, d_w, d_bias, d_hr, d_h.clone(), d_c.clone()]


@recurrent_backward.register_fake
def _(
    kind: str, g_rows: Tensor, g_h: Tensor, g_c: Tensor, saved: list[Tensor], w: Tensor, w_hr: Tensor | None, h0: Tensor,
    c0: Tensor, scale: Tensor, s_w: Tensor, sizes: Tensor, reverse: bool, chip: str, bits: int, wide: bool, relu: bool, train: bool, biased: bool,
) -> list[Tensor]:  # fmt: skip
    acc, none = g_rows.new_empty(g_rows.shape[0], w.shape[0]), g_rows.new_empty(0)
    return [
        acc, torch.empty_like(w), w.new_empty(w.shape[0]) if biased else none,
        none.clone() if w_hr is None else torch.empty_like(w_hr), torch.empty_like(g_h),
        torch.empty_like(g_c) if kind == "lstm" else none.clone(),
    ]  # fmt: skip


def _keep(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    kind, _, w, b, w_hr, h0, c0, scale, s_w, sizes, *rest = inputs
    ctx.set_materialize_grads(False)
    held = [w, h0, c0, scale, s_w, sizes, *output[3:], *([] if w_hr is None else [w_hr])]
    ctx.save_for_backward(*held)
    ctx.kind, ctx.rest, ctx.biased, ctx.projected = kind, rest, b is not None, w_hr is not None


def _gradient(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    w, h0, c0, scale, s_w, sizes, *saved = ctx.saved_tensors
    w_hr = saved.pop() if ctx.projected else None
    rows = saved[0].shape[0]
    g_rows = w.new_zeros(rows, h0.shape[1]) if grads[0] is None else grads[0].contiguous()
    g_h = torch.zeros_like(h0) if grads[1] is None else grads[1].contiguous()
    g_c = torch.zeros_like(c0) if grads[2] is None else grads[2].contiguous()
    function = recurrent_backward if torch.compiler.is_compiling() else recurrent_backward._init_fn
    d_a, d_w, d_b, d_hr, d_h, d_c = function(
        ctx.kind, g_rows, g_h, g_c, saved, w, w_hr, h0, c0, scale, s_w, sizes, *ctx.rest, ctx.biased
    )
    d_c = d_c if ctx.kind == "lstm" else None
    given = d_a, d_w, d_b if ctx.biased else None, d_hr if ctx.projected else None, d_h, d_c
    return (None, *given, *[None] * 9)


recurrent.register_autograd(_gradient, setup_context=_keep)


class _Eager(torch.autograd.Function):
    """The operator without its dispatcher, which costs more than a few steps."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _forward(*inputs, own=True)
        _keep(ctx, inputs, output)
        return tuple(output[:3])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return _gradient(ctx, list(grads))


def layer(*inputs: Any) -> Sequence[Tensor]:
    """``recurrent``: an operator where a compiler looks, else its loops; h of every row, the last h and the last c.

    Raises:
        LingerError: a NaN, which is no row of a table.
    """
    if torch.compiler.is_compiling():
        return recurrent(*inputs)[:3]
    try:
        return _Eager.apply(*inputs)  # type: ignore[no-any-return]
    except IndexError:
        raise LingerError(
            "found NaN in a sum, allowed are finite numbers; the training diverged or the input is bad"
        ) from None


@torch.library.custom_op("linger::recurrent_ideal", mutates_args=())
def ideal_rows(
    kind: str, x: Tensor, parameters: list[Tensor], h0: Tensor, c0: Tensor, sizes: Tensor, biased: bool, both: bool,
    relu: bool,
) -> Tensor:  # fmt: skip
    """``ideal`` as an operator."""
    if len(parameters) > (4 if biased else 2) * (2 if both else 1):  # a projection, which oneDNN lacks and warns of
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            return _ideal(kind, x, parameters, h0, c0, sizes, biased, both, relu)
        finally:
            torch._C._set_mkldnn_enabled(before)
    return _ideal(kind, x, parameters, h0, c0, sizes, biased, both, relu)


def _ideal(
    kind: str, x: Tensor, parameters: list[Tensor], h0: Tensor, c0: Tensor, sizes: Tensor, biased: bool, both: bool,
    relu: bool,
) -> Tensor:  # fmt: skip
    hx = (h0, c0) if kind == "lstm" else h0
    function = {"lstm": torch.lstm, "gru": torch.gru, "rnn": torch.rnn_relu if relu else torch.rnn_tanh}[kind]
    counts = sizes.tolist()
    if counts[0] != counts[-1]:
        made = function(x, sizes, hx, parameters, biased, 1, 0.0, False, both)[0]
        return made.clone()
    steps = x.view(len(counts), counts[0], x.shape[1])
    return function(steps, hx, parameters, biased, 1, 0.0, False, both, False)[0].flatten(0, 1).clone()


@ideal_rows.register_fake
def _(
    kind: str, x: Tensor, parameters: list[Tensor], h0: Tensor, c0: Tensor, sizes: Tensor, biased: bool, both: bool,
    relu: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], h0.shape[2] * (2 if both else 1))


def ideal(*inputs: Any) -> Tensor:
    """Outputs of a layer on real values, all rows: how far its hidden state reaches. ``h0``, ``c0`` (directions, N, H)."""
    return ideal_rows(*inputs) if torch.compiler.is_compiling() else ideal_rows._init_fn(*inputs)
