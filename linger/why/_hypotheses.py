"""The causes that ``why`` knows, simplest first: a row says what it is called and how to compute a node under it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from linger.numerics import levels, shift_round
from linger.rounding import HALF_EVEN
from linger.targets import TARGETS
from linger.why import _layout
from linger.why._arithmetic import CUTS, NARROW, SATURATIONS, TIES, WIDE, Step, twice
from linger.why._case import View

Variant = tuple[str, np.ndarray | None]
Recompute = Callable[[View], Iterator[Variant]]
FAR = 8  # exponents that a stale grid may be away
FAR_BIAS = 16
EPS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-12, 0.0)
WITH_TABLES = (
    "iqSigmoid", "iqTanh", "iqGelu", "iqGeluTanh", "iqSilu", "SoftmaxInt", "LogSoftmaxInt", "iqHardsigmoid", "iqSoftsign", "iqHardswish",
)  # fmt: skip
EXACT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "iqSigmoid": lambda v: 1 / (1 + np.exp(-v)),
    "iqTanh": np.tanh,
    "iqSilu": lambda v: v / (1 + np.exp(-v)),
    "iqGelu": lambda v: v * 0.5 * (1 + np.vectorize(math.erf)(v / math.sqrt(2))),
}
ALIKE = {
    "iqGelu": "iqGeluTanh", "iqGeluTanh": "iqGelu", "iqSigmoid": "iqHardsigmoid", "iqHardsigmoid": "iqSigmoid",
    "iqTanh": "iqSoftsign", "iqSoftsign": "iqTanh", "iqSilu": "iqHardswish", "iqHardswish": "iqSilu",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """``recompute(view)`` yields every form of the cause: what it is, and the target under it (None: not possible here)."""

    name: str
    what: str
    recompute: Recompute


def _ties(view: View) -> str:
    """How the file rounds them: a mean over no power of two has the chip's own rule."""
    if view.attrs.get("rounding") == HALF_EVEN:
        return "to even"
    return "as the chip's reciprocal makes them" if "Pool" in view.op or view.op == "iqMean" else "up"


def tie(view: View) -> Iterator[Variant]:
    for name, steps in TIES.items():
        yield f"exact ties are rounded {name}, the file rounds them {_ties(view)}", view.again(steps=steps)


def double_rounding(view: View) -> Iterator[Variant]:
    for tied in ("", "to even"):
        said = " and ties to even" if tied else ""
        for first in range(1, view.shift):
            text = f"the sum is rounded after {first} of {view.shift} bits and again at the end{said}"
            yield text, view.again(steps=twice(first, tied))


def truncation(view: View) -> Iterator[Variant]:
    for name, steps in CUTS.items():
        yield f"bits are cut off ({name}) instead of rounded", view.again(steps=steps)


def saturation(view: View) -> Iterator[Variant]:
    for name, steps in SATURATIONS.items():
        yield f"beyond the limits, {name}", view.again(steps=steps)


def overflow(forms: Mapping[str, Mapping[str, Step]]) -> Recompute:
    def recompute(view: View) -> Iterator[Variant]:
        for name, steps in forms.items():
            yield f"the accumulator overflows: {name}", view.again(steps=steps)

    return recompute


def _scales(view: View, steps: range) -> Iterator[Variant]:
    for n in sorted(steps, key=lambda n: (abs(n), n)):
        for name, value in view.attrs.items():
            if name.startswith("scale_") and isinstance(value, float) and n and view.op != "Dequant":
                text = f"{name} is {value * 2.0**n:g} instead of {value:g} (2^{n:+d})"
                yield text, view.again(attrs={name: value * 2.0**n})


def off_by_one(view: View) -> Iterator[Variant]:
    yield from _scales(view, range(-1, 2))


def stale(view: View) -> Iterator[Variant]:
    for text, array in _scales(view, range(-FAR, FAR + 1)):
        if "(2^+1)" not in text and "(2^-1)" not in text:
            yield text, array


def bias(view: View) -> Iterator[Variant]:
    if not view.weighted or len(view.inputs) < 3 or view.inputs[2] is None:
        return
    b = view.inputs[2].astype(np.int64)
    yield "the bias is missing", view.with_input(2, np.zeros_like(b))
    yield "the bias is subtracted", view.with_input(2, -b)
    for n in sorted((n for n in range(-FAR_BIAS, FAR_BIAS + 1) if n), key=abs):
        scaled = np.clip(shift_round(b, -n), -(2**40), 2**40)
        yield f"the bias has another scale than scale_x * scale_w: 2^{n:+d} of it", view.with_input(2, scaled)
        if n < 0:
            yield (
                f"the bias has another scale than scale_x * scale_w: 2^{n:+d} of it, cut off",
                view.with_input(2, b >> -n),
            )


def padding(view: View) -> Iterator[Variant]:
    pads = view.attrs.get("pads", ())
    if not view.weighted or not any(pads) or "Transpose" in view.op:
        return
    x = view.inputs[0]
    rank = x.ndim - 2
    around = ((0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True))
    none = {"pads": (0,) * len(pads)}
    bits = 8 * x.dtype.itemsize
    for value in _pad_values(bits):
        padded = np.pad(x.astype(np.int64), around, constant_values=value)
        yield (
            f"pixels beyond the border are {value} instead of 0",
            view.again(attrs=none, inputs=[padded, *view.inputs[1:]]),
        )


def _pad_values(bits: int) -> Iterator[int]:
    top = levels(bits)
    yield from (-top - 1, top, 1, -1, top + 1)
    for n in range(2, 33):
        yield from (n, -n)


def eps(view: View) -> Iterator[Variant]:
    for name in ("epsilon", "eps"):
        if name in view.attrs:
            for value in EPS:
                yield f"{name} is {value:g} instead of {view.attrs[name]:g}", view.again(attrs={name: value})


def table(view: View) -> Iterator[Variant]:
    if view.op not in WITH_TABLES:
        return
    for chip in sorted({t.platform for t in TARGETS.values()}):
        yield f"the table is that of {chip}", view.again(attrs={"platform": chip})
    if view.op in EXACT:
        yield "the exact function is rounded, not the chip's table", _exact(view)
    if view.op in ALIKE:
        yield f"the table is that of {ALIKE[view.op]}", view.again(op_type=ALIKE[view.op])
    x = view.inputs[0]
    if view.op in EXACT:
        limits = np.iinfo(x.dtype)
        for n in (1, -1):
            moved = np.clip(x.astype(np.int64) + n, limits.min, limits.max).astype(x.dtype)
            yield f"the table is read {n:+d} entry away", view.with_input(0, moved)
        yield "the table is indexed with unsigned integers", view.with_input(0, x ^ x.dtype.type(limits.min))


def _exact(view: View) -> np.ndarray | None:
    """The float function at the input's value, rounded half up to the output's grid."""
    if not view.last:
        return None
    bits = 8 * view.out.dtype.itemsize
    scale = 2.0 ** (bits - 1) if view.op in ("iqSigmoid", "iqTanh") else view.attrs["scale_o"]
    y = np.floor(EXACT[view.op](view.inputs[0].astype(np.float64) / view.attrs["scale_x"]) * scale + 0.5)
    made: np.ndarray = np.clip(y, -levels(bits) - 1, levels(bits)).astype(view.out.dtype)
    return made


def layout(view: View) -> Iterator[Variant]:
    for part in (_layout.outputs, _layout.inputs, _layout.weights, _layout.right_hand):
        yield from part(view)


HYPOTHESES = (
    Hypothesis(name="tie", what="an exact tie is rounded the other way", recompute=tie),
    Hypothesis(name="truncation", what="bits are cut off instead of rounded", recompute=truncation),
    Hypothesis(name="double rounding", what="rounded twice on the way to the grid", recompute=double_rounding),
    Hypothesis(name="accumulator overflow", what="the sum does not fit int32 or float32", recompute=overflow(WIDE)),
    Hypothesis(name="saturation", what="no saturation, or at other limits", recompute=saturation),
    Hypothesis(name="off by one exponent", what="a scale is twice or half of what it should be", recompute=off_by_one),
    Hypothesis(name="accumulator overflow", what="the sum does not fit 16 or 24 bits", recompute=overflow(NARROW)),
    Hypothesis(name="bias scale", what="the bias is missing or on another grid", recompute=bias),
    Hypothesis(name="padding value", what="what lies beyond the border is not 0", recompute=padding),
    Hypothesis(name="layout", what="an array is read or written in another order", recompute=layout),
    Hypothesis(name="wrong table", what="the table of another chip or function", recompute=table),
    Hypothesis(name="normalization eps", what="another eps in a normalization", recompute=eps),
    Hypothesis(name="stale grid", what="a scale of another time or tensor", recompute=stale),
)
