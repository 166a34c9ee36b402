"""Fixed-point arithmetic: grids, rounding by exact name, saturation, and fake quantization.

real = integer / scale, scale = 2^n, one scale per tensor, zero point 0, B(b) = 2^(b-1) - 1.

    quantize      q = clamp(floor(x * scale + 0.5), -B(b) - 1, B(b))                                   (1)
    shift_round   floor(v / 2^n + 0.5) for n > 0, v * 2^-n for n <= 0                                  (2)

The floor of (1) and (2) is the rounding half up of the LUNA chips; another is a row of ``rounding.ROUNDINGS``.

Because the scale is a power of two, ``x * scale`` and ``q / scale`` are exact in floating point, and fake quantization
*is* the integer computation as long as every partial sum stays below 2^24 (float32) or 2^53 (float64) in LSB.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from linger.eager import LEAST, at_hand, blocks, power, power_below, power_near, small, widest
from linger.errors import LingerError
from linger.masks import passed, saturated
from linger.products import FLOAT32_EXACT as FLOAT32_EXACT
from linger.products import exact_matmul as exact_matmul
from linger.rounding import HALF_UP, ROUNDINGS
from linger.steps import replaceable

WIDEST = 25  # bits that a 32-bit activation uses, so that float32 holds it: its limits are -2^24 and 2^24 - 1
FINEST, COARSEST = 2.0**60, 2.0**-60  # scales stay between them, and products of two within float32
NOTHING = 1e-30  # the running maximum a batch of zeros leaves behind; 0 means that no batch was seen
SEEN = float(np.float32(NOTHING))  # a running maximum beyond it has seen something


class Grid(NamedTuple):
    """The values a tensor may take: k / scale with k an integer of ``bits`` bits. ``scale`` is a 0-d float32 power of two."""

    scale: Tensor
    bits: int


def levels(bits: int) -> int:
    """B(b): the largest integer of ``bits`` bits, 127 for 8."""
    return 2 ** (bits - 1) - 1


def highest(bits: int) -> int:
    """The saturation limit: B(b), but 2^31 - 128 for 32 bits, the largest int32 that float32 holds."""
    return levels(bits) if bits < 32 else 2**31 - 128


def reach(bits: int) -> int:
    """The largest magnitude of an activation of ``bits`` bits, 128 for 8 and 2^24 for 32 (``WIDEST``)."""
    return int(2 ** (min(bits, WIDEST) - 1))


def version(x: Tensor) -> int:
    """PyTorch's count of in-place changes, shared by a tensor and its views; -1 where nothing is counted."""
    if torch.compiler.is_compiling():
        return -1
    with torch._C.DisableTorchFunction():
        return -1 if x.is_inference() else x._version


def grid_of(x: Any) -> Grid | None:
    """The grid a fixed-point module put on this tensor; None for a plain tensor, or one changed in place since."""
    tag: tuple[Grid, int] | None = getattr(x, "_linger_grid", None)
    if tag is None:
        base = _handed_on(x)
        return None if base is None else grid_of(base)
    return None if tag[1] != version(x) else tag[0]


def _handed_on(x: Any) -> Tensor | None:
    """What a Python autograd function was given where ``x`` is its result and shares the memory: sharding puts one in front of layers."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return None
    with torch._C.DisableTorchFunction():
        base = x._base
        if base is None or not isinstance(x.grad_fn, BackwardCFunction) or base.dtype != x.dtype:
            return None
        return base


def set_grid(x: Tensor, grid: Grid | None) -> Tensor:
    """Tag (or, with None, untag) a plain tensor with its grid. Tags are only read and written by these two functions."""
    x.grid = grid  # type: ignore[attr-defined]
    x._linger_grid = None if grid is None else (grid, version(x))  # type: ignore[attr-defined]
    return x


# --- powers of two, exactly and without leaving the device: only the exponent bits of an IEEE float32 are kept


def pow2_floor(v: Tensor) -> Tensor:
    """2^floor(log2 v) for positive normal float32 ``v``."""
    return (v.view(torch.int32) & 0x7F800000).view(torch.float32)


def pow2_round(v: Tensor) -> Tensor:
    """2^round(log2 v) for positive normal float32 ``v``: carries into the exponent where the mantissa is >= sqrt(2)."""
    return ((v.view(torch.int32) + 0x4AFB0C) & 0x7F800000).view(torch.float32)


def scale_from_running(running: Tensor, bits: int) -> Tensor:
    """Activation scale 2^round(log2(B / running)); 1.0 where nothing but zeros was seen (``upstream`` 4.0)."""
    if at_hand(running) and running.dim() == 0 and SEEN < (value := running.item()) < math.inf:
        return power(power_near(levels(min(bits, WIDEST - 1)), value))
    scale = pow2_round((levels(min(bits, WIDEST - 1)) / running).clamp(COARSEST, FINEST))
    return torch.where(running <= NOTHING, torch.ones_like(scale), scale)


def scale_from_weight(weight: Tensor, bits: int) -> Tensor:
    """Weight scale 2^floor(log2(B / max|w|)), so that no weight saturates; 2^bits for an all-zero weight.

    NaN where a weight is NaN or infinite, so that the output shows it and the check of its range names the layer.
    """
    if at_hand(weight) and weight.dtype != torch.float64 and LEAST < (reached := widest(weight)) < math.inf:
        return power(power_below(levels(bits), reached))
    peak = weight.detach().abs().amax().float()
    scale = pow2_floor((levels(bits) / peak).clamp(COARSEST, FINEST))
    return torch.where(peak == 0, torch.full_like(scale, 2.0**bits), scale) + (peak - peak)


FINER = 4  # how many times a weight's scale is doubled in the search for the best


def best_weight_scale(weight: Tensor, bits: int) -> Tensor:
    """The power of two of least sum (w - q(w))^2, from the scale at which nothing saturates to 2^``FINER`` of it."""
    coarsest = scale_from_weight(weight, bits)
    scales = [coarsest * 2.0**n for n in range(FINER + 1)]
    errors = torch.stack([(fake_quant(weight, s, bits) - weight).double().pow(2).sum() for s in scales])
    return torch.stack(scales)[errors.argmin()]


# --- fake quantization: one autograd function, no host synchronisation, no branch on values of a device


def rounded(x: Tensor, scale: Tensor, step: Tensor, rounding: str = HALF_UP, out: Tensor | None = None) -> Tensor:
    """The integers nearest to x * scale, a new tensor or in ``out``; ``step`` is 1 / scale."""
    return ROUNDINGS[rounding].scaled(x, scale, step, out)


def snapped(x: Tensor, scale: Tensor, bits: int, rounding: str = HALF_UP) -> Tensor:
    """Equation (1), divided by the scale again: a new tensor, in whole passes."""
    v = x.double() if bits > 16 else x  # adding a half needs more than float32 has
    scale = scale.to(v.dtype)
    step = scale.reciprocal()
    return rounded(v, scale, step, rounding).clamp_(-levels(bits) - 1, highest(bits)).mul_(step).to(x.dtype)


def _snap(
    x: Tensor, scale: Tensor, bits: int, out: Tensor, outside: Tensor | None, bound: float | None, rounding: str
) -> None:
    """Equation (1) / scale, written to ``out``, which may be ``x``; ``outside`` gets ones where the gradient is zero.

    Every pass over a block but the first finds it in the cache.
    """
    step = scale.reciprocal()
    low, high = -levels(bits) - 1, highest(bits)
    for block in blocks(x, out) if outside is None else blocks(x, out, outside):
        source, result = block[:2]
        if outside is None:
            rounded(source, scale, step, rounding, result).clamp_(low, high).mul_(step)
            continue
        far = None if bound is None else source.abs().gt_(bound)
        v = rounded(source, scale, step, rounding)
        v.ne_(torch.clamp(v, low, high, out=result))
        block[2].copy_(v if far is None else v.add_(far))
        result.mul_(step)


class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, bits: int, bound: float | None, inside: bool, fresh: bool,
        rounding: str,
    ) -> Tensor:  # fmt: skip
        if at_hand(x) and bits <= 16:
            if fresh:
                ctx.mark_dirty(x)
            outside = None if inside else torch.empty_like(x, dtype=torch.int8)
            out = x if fresh else torch.empty_like(x)
            _snap(x, scale, bits, out, outside, bound, rounding)
        else:
            out, outside = _FakeQuant.whole(x, scale, bits, bound, inside, rounding)
        ctx.save_for_backward(*(() if outside is None else (outside,)))
        return out

    @staticmethod
    def whole(
        x: Tensor, scale: Tensor, bits: int, bound: float | None, inside: bool, rounding: str
    ) -> tuple[Tensor, Tensor | None]:
        if inside:
            return snapped(x, scale, bits, rounding), None
        step = scale.reciprocal()
        v = rounded(x.double() if bits > 16 else x, scale, step, rounding)
        q = v.clamp(-levels(bits) - 1, highest(bits))
        outside = saturated(v, q)
        if bound is not None:
            outside = outside | x.abs().gt_(bound).to(outside.dtype)
        return q.mul_(step).to(x.dtype), outside

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        return passed(grads[0], saved[0]) if saved else grads[0], None, None, None, None, None, None


def _changed(x: Tensor, scale: Tensor, bits: int, rounding: str) -> Tensor:
    """``x`` with other values in it: its gradient passes straight through, without a step of autograd for that."""
    values = x.detach()
    _snap(values, scale, bits, values, None, None, rounding)
    return x


def fake_quant(
    x: Tensor, scale: Tensor, bits: int, bound: float | None = None, inside: bool = False, fresh: bool = False,
    rounding: str = HALF_UP,
) -> Tensor:  # fmt: skip
    """Equation (1), divided by the scale again. Straight-through gradient, zero outside the representable range.

    Args:
        x: any shape, float32 or float64.
        scale: 0-d power of two.
        bits: width of the integer.
        bound: gradients are zero where ``|x| > bound`` too (``normalize_data``).
        inside: it is known that nothing saturates or leaves ``bound`` (``observe.fits``), so that no mask is kept.
        fresh: ``x`` is a result that nothing else reads, and may be overwritten.
        rounding: a row of ``ROUNDINGS``; the floor of (1) is that of half_up.
    """
    scale = scale.to(torch.float64 if bits > 16 else x.dtype)  # adding a half needs more than float32 has
    fresh = fresh and at_hand(x) and bits <= 16 and not x._is_view()
    if x.requires_grad and torch.is_grad_enabled():
        if inside and (fresh or (at_hand(x) and small(x))) and bits <= 16:
            return _changed(x if fresh else x.clone(), scale, bits, rounding)
        return _FakeQuant.apply(x, scale, bits, bound, inside, fresh, rounding)  # type: ignore[no-any-return]
    if at_hand(x) and bits <= 16:
        out = x if fresh else torch.empty_like(x)
        _snap(x, scale, bits, out, None, None, rounding)
        return out
    return snapped(x, scale, bits, rounding)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ideal: Tensor, integers: Tensor, scale: Tensor, bits: int) -> Tensor:
        q = integers.clamp(-levels(bits) - 1, highest(bits))
        ctx.save_for_backward(saturated(integers.clone(), q))
        return (q / scale).to(ideal.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return passed(grads[0], ctx.saved_tensors[0]), None, None, None


def straight_through(ideal: Tensor, integers: Tensor, scale: Tensor, bits: int) -> Tensor:
    """saturate(integers) / scale with the gradient of ``ideal``, zero where it saturates; shapes are equal."""
    return _Straight.apply(ideal, integers, scale, bits)  # type: ignore[no-any-return]


def quantize(x: Tensor, scale: Tensor, bits: int) -> np.ndarray:
    """The integer twin of ``fake_quant``: int8, int16 or int32 array of the same integers.

    Raises:
        LingerError: there is a NaN.
    """
    value = (fake_quant(x.detach(), scale, bits).double() * scale.double()).cpu().numpy()
    _refuse_nan(value)
    return value.astype(int_dtype(bits))  # type: ignore[no-any-return]


def _refuse_nan(x: np.ndarray) -> None:
    if np.isnan(x).any():
        raise LingerError(
            "found NaN or infinity, allowed are finite numbers; the training diverged or the input is bad"
        )


def int_dtype(bits: int) -> type[np.signedinteger[Any]]:
    """Storage type of a ``bits``-bit integer: int8 up to 8 bits (4-bit weights too), int16, int32."""
    return np.int8 if bits <= 8 else np.int16 if bits <= 16 else np.int32


def nearest_integer(v: Tensor) -> Tensor:
    """The integers that ``v`` holds but for the error of a float division; that error is small, so there are no ties."""
    return torch.round(v)


class _Bound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward((v > bound).to(v.dtype) - (v < -bound).to(v.dtype))
        return v.clamp(-bound, bound) + (v - v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (outside,) = ctx.saved_tensors
        return torch.where(outside == 0, grads[0], outside * 0.01), None


def bound_parameter(v: Tensor, bound: float | None) -> Tensor:
    """clamp(v, -bound, bound); outside, the gradient is the constant +-0.01 that pulls ``v`` back (``upstream`` 4.0).

    A parameter that is infinite becomes NaN and not the bound: training has diverged, and the output must show it.
    """
    return v if bound is None else _Bound.apply(v, float(bound))  # type: ignore[no-any-return]


# --- the executable specification: NumPy int64, independent of the torch text above


def exponent(scale: float) -> int:
    """n of scale = 2^n.

    Raises:
        ValueError: ``scale`` is not a positive power of two.
    """
    mantissa, n = np.frexp(scale)
    if mantissa != 0.5:
        raise ValueError(f"scale {scale} is not a power of two")
    return int(n) - 1


def quantize_number(value: float, scale: float, bits: int = 8) -> int:
    """Equation (1) on one Python number."""
    return int(min(max(math.floor(value * scale + 0.5), -levels(bits) - 1), levels(bits)))


@replaceable
def quantize_array(x: np.ndarray, scale: float, bits: int, rounding: str = HALF_UP) -> np.ndarray:
    """Equation (1) as the chip's Quant computes it: up to 16 bits the sum is rounded to float32 (``engine`` 3).

    Args:
        x: float32 of any shape.
        scale: a power of two.
        bits: 8, 16 or 32; 32 saturates at -2^24 and 2^24 - 1 (``WIDEST``).

    Raises:
        LingerError: there is a NaN.
    """
    _refuse_nan(x)
    top = reach(bits)
    v = ROUNDINGS[rounding].entering(np.clip(x.astype(np.float64) * scale, -2 * top, 2 * top), bits <= 16)
    return np.clip(v, -top, top - 1).astype(int_dtype(bits))


@replaceable
def shift_round(v: np.ndarray, n: int, rounding: str = HALF_UP) -> np.ndarray:
    """Equation (2) on int64, half up: 2.5 -> 3, -2.5 -> -2. A negative ``n`` shifts left and stops at +-2^62."""
    bits, wide = 8 * v.dtype.itemsize, v.astype(np.int64, copy=False)
    if n > 0:
        return ROUNDINGS[rounding].shifted(wide, n)
    left = min(-n, 62)
    if bits + left > 63:
        wide = np.clip(wide, -(2**62 >> left), 2**62 >> left)
    return wide << left if left else wide


@replaceable
def saturate(v: np.ndarray, bits: int) -> np.ndarray:
    """Clamp to ``bits`` bits and store in the type of that width."""
    return np.clip(v, -levels(bits) - 1, levels(bits)).astype(int_dtype(bits))


@replaceable
def rounded_mean(total: np.ndarray, k: int, away: bool, rounding: str = HALF_UP) -> np.ndarray:
    """total / k, int64: half up where k is a power of two, else to the nearest, ties away from zero or toward it; or by another rule."""
    if rounding != HALF_UP or k & (k - 1) == 0:
        return ROUNDINGS[rounding].divided(total, k)  # type: ignore[no-any-return]
    return np.sign(total) * ((2 * np.abs(total) + k - (0 if away else 1)) // (2 * k))  # type: ignore[no-any-return]
