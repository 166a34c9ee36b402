"""Gradients of recurrent layers: against autograd of cells written with the same fake quantization, and against numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recurrent import CHIPS, LAYERS, D, H, Net, first_states
from torch import Tensor

import linger
from linger.numerics import fake_quant
from linger.ops._cells import Arithmetic, arithmetic
from linger.ops._pwl import torch_values
from linger.ops._recurrent_lstm import lstm_backward
from linger.ops._recurrent_rows import Rows


class Straight(torch.autograd.Function):
    """``exact`` with the gradient of ``ideal``."""

    @staticmethod
    def forward(ctx: Any, ideal: Tensor, exact: Tensor) -> Tensor:
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def on_grid(v: Tensor, fraction: int, bits: int) -> Tensor:
    """Fake quantization in float64: gradient 0 where it saturates."""
    scale, top = 2.0**fraction, 2.0 ** (bits - 1)
    q = torch.floor(v.detach() * scale + 0.5)
    kept = q.clamp(-top, top - 1)
    return Straight.apply(torch.where(q == kept, v, v.detach()), kept / scale)


def rounded(v: Tensor, fraction: int, bits: int) -> Tensor:
    """The same of an argument: straight through its saturation, where the function is flat."""
    scale, top = 2.0**fraction, 2.0 ** (bits - 1)
    return Straight.apply(v, torch.floor(v.detach() * scale + 0.5).clamp(-top, top - 1) / scale)


class Cell:
    """One direction in float64 on real values, every rounding of ``_cells`` in the place where the chip rounds."""

    def __init__(self, kind: str, how: Arithmetic, bits: int, q_h: int, relu: bool) -> None:
        self.kind, self.how, self.bits, self.q_h, self.relu = kind, how, bits, q_h, relu
        self.f, self.w, self.g = how.argument, how.width, how.fraction

    def gate(self, acc: Tensor) -> Tensor:
        return rounded(acc, self.f, self.w)

    def function(self, z: Tensor, name: str) -> Tensor:
        """The chip's function, with the derivative of the real one at the same argument."""
        table, ideal = (self.how.sigmoid, torch.sigmoid(z)) if name == "sigmoid" else (self.how.tanh, torch.tanh(z))
        levels = torch.round(z.detach() * 2.0**self.f)
        raw = torch_values(levels.flatten(), torch.tensor(2.0**self.f), table).view(z.shape) * 2.0**-table.y_fraction
        q = torch.floor(raw * 2.0**self.g + 0.5)
        return Straight.apply(ideal, (q.clamp(-128, 127) if self.g == 7 else q) * 2.0**-self.g)

    def lstm(self, a: Tensor, b: Tensor, h: Tensor, c: Tensor, w_hr: Tensor | None) -> tuple[Tensor, Tensor]:
        i, f, n, o = rounded(a + b, self.f, self.w).chunk(4, -1)
        i, f, o = (self.function(v, "sigmoid") for v in (i, f, o))
        kept = f * c if self.g == 7 else on_grid(f * c, 2 * self.g, 32)
        total = kept + i * self.function(n, "tanh")
        k = rounded(total, self.f, self.w)
        after = on_grid(k if self.w == 32 else total, self.g, 16 if self.g == 7 else 32)
        out = o * self.function(k, "tanh")
        if w_hr is not None:
            out = on_grid(out, self.g, self.g + 1) @ w_hr.t()
        return on_grid(out, self.q_h, self.bits), after

    def gru(self, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
        (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, -1), b.chunk(3, -1)
        r, z = (self.function(rounded(v, self.f, self.w), "sigmoid") for v in (a_r + b_r, a_z + b_z))
        n = self.function(rounded(a_n + rounded(r * b_n, self.f, 60), self.f, self.w), "tanh")
        kept = on_grid(z * rounded(h, self.g, 60), 2 * self.g, 2 * self.g + 2)
        return on_grid(kept + (1 - z) * n, self.q_h, self.bits)

    def rnn(self, a: Tensor, b: Tensor) -> Tensor:
        z = (on_grid if self.relu else rounded)(a + b, self.f, self.w)
        return on_grid(torch.relu(z) if self.relu else self.function(z, "tanh"), self.q_h, self.bits)

    def run(self, x: Tensor, p: dict[str, Tensor], h: Tensor, c: Tensor | None, reverse: bool) -> Tensor:
        outs = []
        for t in reversed(range(len(x))) if reverse else range(len(x)):
            a = self.gate(torch.nn.functional.linear(x[t], p["w_ih"], p.get("b_ih")))
            b = self.gate(torch.nn.functional.linear(h, p["w_hh"], p.get("b_hh")))
            if self.kind == "lstm":
                assert c is not None
                h, c = self.lstm(a, b, h, c, p.get("w_hr"))
            else:
                h = self.gru(a, b, h) if self.kind == "gru" else self.rnn(a, b)
            outs.append(h)
        return torch.stack(outs[::-1] if reverse else outs)


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("lstm", {}), "gru": ("gru", {}), "rnn": ("rnn", {}), "relu": ("rnn", {"nonlinearity": "relu"}),
    "projected": ("lstm", {"proj_size": 4}), "lstm-no-bias": ("lstm", {"bias": False}),
    "gru-no-bias": ("gru", {"bias": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("bits", [8, 16])
def test_true_straight_through_gradients(name: str, chip: str, bits: int) -> None:
    """Same outputs; the gradients of every parameter, input and state are those of autograd, W_hh's path through h included."""
    torch.manual_seed(1)
    kind, options = OPTIONS[name]
    layer = LAYERS[kind](D, H, bidirectional=True, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2.5)  # gates that saturate here and there
    net = linger.init(Net(layer), target=chip, hidden_bits=bits)
    x, states = torch.randn(12, 3, D), first_states(layer, 3)
    net(x, *states)
    net.rnn.running("h").mul_(0.25)
    net.eval()
    given = [t.clone().requires_grad_() for t in (x, *states)]
    out = net(*given)[0]
    top = 2 ** (bits - 1)
    assert (out.detach() * net.rnn.hidden_scale(0) == top - 1).any(), "some hidden states saturate too"
    weights = torch.randn(out.shape)
    (out * weights).sum().backward()
    found = {n: p.grad for n, p in net.rnn.named_parameters()} | {f"input {i}": t.grad for i, t in enumerate(given)}

    again = [t.clone().requires_grad_() for t in (x, *states)]
    net.zero_grad()
    reference = reference_of(net.rnn, again, arithmetic(chip, bits))
    assert torch.equal(reference.float(), out)
    (reference * weights).sum().backward()
    wanted = {n: p.grad for n, p in net.rnn.named_parameters()} | {f"input {i}": t.grad for i, t in enumerate(again)}
    for key, grad in wanted.items():
        torch.testing.assert_close(found[key], grad, rtol=2e-4, atol=2e-5 * float(grad.abs().max()), msg=key)


def reference_of(layer: Any, given: list[Tensor], how: Arithmetic) -> Tensor:
    """The layer, both directions, in float64 with parameters of the layer's own fake quantization."""
    s_i, s_h, bits = layer.scale("i", 8), layer.hidden_scale(0), layer.hidden_bits
    x = fake_quant(given[0], s_i, 8).double()
    q_h = int(torch.log2(s_h))
    outs = []
    for d in range(2):
        u = layer.unit(0, d, s_i, s_h)
        named = {"w_ih": u.w_ih, "w_hh": u.w_hh, "b_ih": u.b_ih, "b_hh": u.b_hh, "w_hr": u.w_hr}
        p = {n: t.double() for n, t in named.items() if t is not None}
        h = fake_quant(given[1][d], s_h, bits).double()
        c = None
        if layer.kind == "lstm":
            c = fake_quant(given[2][d], torch.tensor(2.0**how.fraction), 16 if how.narrow else 25).double()
        outs.append(Cell(layer.kind, how, bits, q_h, layer.relu).run(x, p, h, c, d == 1))
    return torch.cat(outs, -1)


# --- the loops backwards, against numbers in float64


def lstm_float(a: Tensor, w: Tensor, h: Tensor, c: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """A real LSTM on rows, gates o, i, f, g: h of all rows, last h, last c, and the factors of ``lstm_backward``."""
    hs, cs, made, parts = (
        torch.zeros(len(a), h.shape[1]).double(),
        torch.zeros(len(a), h.shape[1]).double(),
        [],
        rows.split(a),
    )
    h0, c0, at = h, c, rows.split(torch.arange(len(a)))
    for a_t, index in zip(parts, at, strict=True):
        h, c = rows.before(h, h0, len(a_t)), rows.before(c, c0, len(a_t))
        z = (a_t + h @ w.t()).view(len(a_t), 4, -1)
        (o, i, f), g = torch.sigmoid(z[:, :3]).unbind(1), torch.tanh(z[:, 3])
        before, c = c, f * c + i * g
        tanh = torch.tanh(c)
        h = o * tanh
        slopes = torch.stack([tanh * o * (1 - o), g * i * (1 - i), before * f * (1 - f), i * (1 - g * g)], 1)
        made.append((index, slopes, o * (1 - tanh * tanh), f))
        hs, cs = hs.index_put((index,), h), cs.index_put((index,), c)
    order = torch.cat([m[0] for m in made])
    saved = [torch.cat([m[k] for m in made])[order.argsort()] for k in (1, 2, 3)]
    return hs, rows.last(hs), rows.last(cs), saved


SIZES = {"even": [3, 3, 3], "packed": [4, 3, 3, 1]}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_loop_against_numerical_gradients(sizes: str, reverse: bool) -> None:
    """What ``lstm_backward`` makes of exact factors, against central differences."""
    torch.manual_seed(2)
    rows, n = Rows(SIZES[sizes], reverse), SIZES[sizes][0]
    a, w = torch.randn(sum(rows.sizes), 8).double(), torch.randn(8, 2).double()
    h, c = torch.randn(n, 2).double(), torch.randn(n, 2).double()
    hs, h_last, c_last, saved = lstm_float(a, w, h, c, rows)
    weights = [torch.randn(t.shape).double() for t in (hs, h_last, c_last)]

    def loss(*given: Tensor) -> float:
        return float(sum((v * t).sum() for v, t in zip(weights, lstm_float(*given, rows)[:3], strict=True)))

    d_a, d_h, d_c, _ = lstm_backward(weights, [hs, hs[:0], hs[:0], saved[0].flatten(1), *saved[1:]], w, None, rows, 1.0)
    d_w = rows.weight_gradient(d_a, hs, h)
    for k, found in enumerate((d_a, d_w, d_h, d_c)):
        numbers = numerical(loss, [a, w, h, c], k)
        torch.testing.assert_close(found, numbers, rtol=1e-6, atol=1e-8)


def numerical(loss: Callable[..., float], given: list[Tensor], k: int, eps: float = 1e-6) -> Tensor:
    """Central differences of ``loss`` in its argument k."""
    out = torch.zeros_like(given[k])
    for at in range(given[k].numel()):
        values = []
        for sign in (1, -1):
            moved = [t.clone() for t in given]
            moved[k].view(-1)[at] += sign * eps
            values.append(loss(*moved))
        out.view(-1)[at] = (values[0] - values[1]) / (2 * eps)
    return out


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_gradients_are_those_of_each_sequence(kind: str) -> None:
    torch.manual_seed(3)
    layer = LAYERS[kind](D, H, num_layers=2, bidirectional=True, batch_first=True)
    lengths, x = torch.tensor([7, 5, 5, 2]), torch.randn(4, 7, D)
    net = linger.init(Net(layer, True))
    net(x, lengths)
    net.eval()
    net(x, lengths)[0].square().sum().backward()
    found = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    for row, length in zip(x, lengths.tolist(), strict=True):
        net.rnn(row[None, :length])[0].square().sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()))


def test_dropout_between_layers() -> None:
    """Only in training, and only between: the last layer's output is not dropped."""
    torch.manual_seed(4)
    net = linger.init(Net(torch.nn.LSTM(D, H, num_layers=2, dropout=0.5)))
    x = torch.randn(20, 8, D)
    first, second = net(x)[0], net(x)[0]
    assert not torch.equal(first, second)
    assert (first != 0).float().mean() > 0.9
    first.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    net.eval()
    assert torch.equal(net(x)[0], net(x)[0])


@pytest.mark.parametrize("chip", CHIPS[:2])
@pytest.mark.parametrize("kind", ["lstm", "projected", "gru", "rnn"])
def test_backward_twice(kind: str, chip: str) -> None:
    """With ``retain_graph``: the first backward leaves what the second reads."""
    torch.manual_seed(4)
    layer = torch.nn.LSTM(D, H, proj_size=3) if kind == "projected" else LAYERS[kind](D, H)
    net: Any = linger.init(Net(layer), target=chip)
    x = torch.randn(5, 3, D, requires_grad=True)
    loss = net(x)[0].square().sum()
    wanted = (x, *net.parameters())
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
