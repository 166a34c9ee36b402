"""Upsampling by whole factors, on the grid of the input.

    nearest    out[o] = x[floor(o / f)]                                                                (1)
    linear     n = 2 o + 1 - f,  i = floor(n / 2f),  w = n - 2f i
               acc[o] = (2f - w) x[i] + w x[i + 1], indices clamped to the axis; axis by axis          (2)
               out = floor(acc / d + 1/2),  d = product of 2f over the axes                            (3)

Linear means half-pixel centres (``align_corners=False``) and factors that are powers of two, so that d is one too. A
weighted mean needs no saturation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from linger.numerics import Grid, int_dtype, rounded, set_grid, straight_through
from linger.ops._base import Op, constants, output_bits, requant_text
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand
from linger.ops._site import Site
from linger.rounding import HALF_UP, ROUNDINGS

NEAREST = ("nearest", "nearest-exact")
LINEAR = {"linear": 3, "bilinear": 4}  # and the rank they need


def factors(shape: Sequence[int], size: Any = None, scale_factor: Any = None) -> tuple[int, ...] | None:
    """The factor of every axis behind the channels, None where one is not whole."""
    space = tuple(shape[2:])
    if size is not None:
        wanted = tuple(size) if isinstance(size, (tuple, list)) else (size,) * len(space)
        if len(wanted) != len(space) or any(not s or w % s or w < s for w, s in zip(wanted, space, strict=True)):
            return None
        return tuple(int(w // s) for w, s in zip(wanted, space, strict=True))
    given = tuple(scale_factor) if isinstance(scale_factor, (tuple, list)) else (scale_factor,) * len(space)
    if len(given) != len(space) or any(f is None or f < 1 or f != int(f) for f in given):
        return None
    return tuple(int(f) for f in given)


class ResizeSite(Site):
    """``F.interpolate`` to a whole multiple of the size."""

    observed = ()
    op_type = "Resize"

    @classmethod
    def takes(
        cls, x: Any = None, size: Any = None, scale_factor: Any = None, mode: str = "nearest", **call: Any
    ) -> bool:
        by = factors(x.shape, size, scale_factor) if x.dim() > 2 else None
        if by is None or call.get("antialias"):
            return False
        if mode in NEAREST:
            return True
        whole = all(f & (f - 1) == 0 for f in by)
        return LINEAR.get(mode) == x.dim() and not call.get("align_corners") and whole

    def forward(
        self, x: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", **call: Any
    ) -> Tensor:
        bits = self.width(x)
        x, scale = self.operand(x, "x", bits)
        by = factors(x.shape, size, scale_factor)
        assert by is not None
        if mode in NEAREST:
            for axis, f in enumerate(by):
                x = x if f == 1 else x.repeat_interleave(f, dim=axis + 2)
            return set_grid(x, Grid(scale, bits))
        wanted = [n * f for n, f in zip(x.shape[2:], by, strict=True)]
        mean = F.interpolate(x.double(), size=wanted, mode=mode)  # exact: the weights are multiples of 1 / d
        q = rounded(mean.detach(), scale.double(), 1 / scale.double(), self.rounding)
        return set_grid(straight_through(mean, q, scale.double(), bits).float(), Grid(scale, bits))

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        x = operands[0]
        by = factors(x.shape, call.get("size"), call.get("scale_factor"))
        assert by is not None
        mode = "nearest" if call.get("mode", "nearest") in NEAREST else "linear"
        attrs = {
            "mode": mode, "factors": by, "scale_x": x.scale, "scale_o": out.scale, "data_bits": x.bits, "o_bits": out.bits,
        }  # fmt: skip
        form = f"{mode}_{'x'.join(map(str, by))}" + ("" if out.bits == 8 else f"_o{out.bits}")
        return (Lowered(op_type=self.op_type, inputs=(0,), attrs=attrs, bits=out.bits, form=form),)


def run(
    x: np.ndarray, *, mode: str, factors: tuple[int, ...], o_bits: int = 8, rounding: str = HALF_UP, **_: Any
) -> np.ndarray:
    """x (N, C, *space); equation (1), or (2) and (3)."""
    y = x if mode == "nearest" else x.astype(np.int64)
    for axis, f in enumerate(factors, 2):
        y = np.repeat(y, f, axis) if mode == "nearest" else _between(y, axis, f)
    if mode == "linear":
        y = ROUNDINGS[rounding].divided(y, int(np.prod([2 * f for f in factors])))
    return y.astype(int_dtype(o_bits))


def _between(x: np.ndarray, axis: int, f: int) -> np.ndarray:
    """Equation (2) along one axis of int64."""
    n = 2 * np.arange(f * x.shape[axis]) + 1 - f
    i = n // (2 * f)
    w = (n - 2 * f * i).reshape(-1, *[1] * (x.ndim - 1 - axis))
    before, after = (x.take(k, axis, mode="clip") for k in (i, i + 1))
    before *= 2 * f - w
    after *= w
    before += after
    return before


def _unsqueeze(source: str, result: str, axis: int, opset: int) -> str:
    if opset < 13:
        return f"{result} = Unsqueeze <axes: ints = [{axis}]> ({source})\n"
    return f"{result}_at = Constant <value = int64[1] {{{axis}}}> ()\n{result} = Unsqueeze ({source}, {result}_at)\n"


def _interleaved(parts: Sequence[str], like: str, result: str, axis: int, rank: int, opset: int) -> str:
    """``parts`` of the shape of ``like``, element by element in turn along ``axis``."""
    text = "".join(_unsqueeze(part, f"{result}u{i}", axis + 1, opset) for i, part in enumerate(parts))
    times = ", ".join(str(len(parts) if a == axis else 1) for a in range(rank))
    text += f"{result}c = Concat <axis: int = {axis + 1}> ({', '.join(f'{result}u{i}' for i in range(len(parts)))})\n"
    text += f"{result}s = Shape ({like})\n{result}t = Constant <value = int64[{rank}] {{{times}}}> ()\n"
    return text + f"{result}n = Mul ({result}s, {result}t)\n{result} = Reshape ({result}c, {result}n)\n"


def _neighbours(x: str, p: str, axis: int) -> str:
    """``{p}b`` and ``{p}a``: the value before and the value after, the outermost repeated."""
    numbers = {"z": 0, "o": 1, "m": -1, "e": 2**31, "x": axis}
    text = "".join(f"{p}{k} = Constant <value = int64[1] {{{v}}}> ()\n" for k, v in numbers.items())
    text += f"{p}first = Slice ({x}, {p}z, {p}o, {p}x)\n{p}head = Slice ({x}, {p}z, {p}m, {p}x)\n"
    text += f"{p}tail = Slice ({x}, {p}o, {p}e, {p}x)\n{p}last = Slice ({x}, {p}m, {p}e, {p}x)\n"
    text += f"{p}b = Concat <axis: int = {axis}> ({p}first, {p}head)\n"
    return text + f"{p}a = Concat <axis: int = {axis}> ({p}tail, {p}last)\n"


def _phases(x: str, p: str, axis: int, f: int) -> tuple[str, list[str]]:
    """Statements for equation (2): the f outputs that belong to each input."""
    text, names = _neighbours(x, p, axis), []
    for k in range(f):
        n = 2 * k + 1 - f
        name, other, w = f"{p}p{k}", f"{p}b" if n < 0 else f"{p}a", abs(n)
        text += constants(**{f"{name}v": f"double {{{2 * f - w}}}", f"{name}w": f"double {{{w}}}"})
        text += f"{name}c = Mul ({x}, {name}v)\n{name}d = Mul ({other}, {name}w)\n{name} = Add ({name}c, {name}d)\n"
        names.append(name)
    return text, names


def _resized(form: str, opset: int, source: str) -> tuple[str, str]:
    """Statements on ``source`` (integers of any type for nearest, double for linear), and the name of their result."""
    mode, by = output_bits(form)[0].split("_")
    each = [int(f) for f in by.split("x")]
    text = ""
    for axis, f in enumerate(each, 2):
        if mode == "nearest" and f == 1:
            continue
        result = f"y{axis}"
        more, parts = ("", [source] * f) if mode == "nearest" else _phases(source, f"a{axis}", axis, f)
        text += more + _interleaved(parts, source, result, axis, len(each) + 2, opset)
        source = result
    return text, source


def _divisor(form: str) -> int:
    return int(np.prod([2 * int(f) for f in output_bits(form)[0].split("_")[1].split("x")]))


def body(form: str, opset: int, rounding: str = HALF_UP) -> tuple[str, str]:
    bits = output_bits(form)[1]
    if form.startswith("nearest"):
        text, result = _resized(form, opset, "X")
        return "X", text + f"Y = Identity ({result})\n"
    text, result = _resized(form, opset, "Xd")
    text = "Xd = Cast <to: int = 11> (X)\n" + text + constants(m=f"double {{{1 / _divisor(form)!r}}}")
    return "X", text + requant_text(result, "m", "Y", bits, double=True, rounding=rounding)


def real(form: str, opset: int) -> str:
    if form.startswith("nearest"):
        return body(form, opset)[1]
    text, result = _resized(form, opset, "Xd")
    text = "Xd = Cast <to: int = 11> (X)\n" + text + constants(m=f"double {{{1 / _divisor(form)!r}}}")
    return text + f"D = Mul ({result}, m)\nY = Cast <to: int = 1> (D)\n"


def _up(**call: Any) -> Any:
    return lambda: lambda x: F.interpolate(x, **call)


_IMAGE = ((2, 3, 4, 5),)

CASES = (
    Case(name="nearest", make=lambda: nn.Upsample(scale_factor=2), shapes=_IMAGE),
    Case(name="nearest-3x1", make=_up(scale_factor=(3, 1)), shapes=_IMAGE),
    Case(name="nearest-size", make=_up(size=(8, 15), mode="nearest-exact"), shapes=_IMAGE),
    Case(name="nearest-1d", make=_up(scale_factor=49.0), shapes=((2, 3, 5),)),
    Case(name="bilinear", make=lambda: nn.Upsample(scale_factor=2, mode="bilinear"), shapes=_IMAGE),
    Case(name="bilinear-4x1", make=_up(scale_factor=(4, 1), mode="bilinear", align_corners=False), shapes=_IMAGE),
    Case(name="bilinear-size", make=_up(size=(8, 2), mode="bilinear"), shapes=((2, 3, 4, 1),)),
    Case(name="upsample-linear", make=_up(scale_factor=2, mode="linear"), shapes=((2, 3, 9),)),
)

_NAMES = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")

OPS = (
    Op(name="Resize", run=run, body=body, real=real, integer=ResizeSite, site="interpolate", calls=(F.interpolate,),
       names={F.interpolate: _NAMES}, modules=(nn.Upsample, nn.UpsamplingNearest2d)),
)  # fmt: skip
