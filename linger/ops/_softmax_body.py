"""Softmax and log-softmax in standard ONNX, in int64 throughout: exact for every value at every optimisation level.

The exponentials of a row are looked up by the distance to its maximum, as in the PyTorch forward; the reciprocals and
logarithms (``ops/_softmax``) are computed once per row. A form is "platform q_x q_o bits out_bits axis", axis negative.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from linger.numerics import levels, saturate, shift_round
from linger.ops import _softmax as chip_math
from linger.ops._base import ONNX_INT
from linger.targets import Softmax, known
from linger.targets._softmax import EXP_OF_0, HIGHEST, LN2_Q16, LN_TABLE, NEWTON_START

OFFSET = 2**56  # a multiple of every divisor: adding it makes a negative dividend positive, so that Div floors


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a body depends on, read from its text form."""

    chip: Softmax
    q_x: int
    q_o: int
    bits: int
    out_bits: int
    axis: int

    @property
    def q(self) -> int:
        """The exponent of a level's scale: neither finer than Q25 nor coarser than the saturation limit."""
        return min(max(self.q_x, -chip_math.INTEGER), chip_math.FINEST)

    @property
    def step(self) -> int:
        """A level in Q25."""
        return int(2 ** (chip_math.FINEST - self.q))

    @staticmethod
    def parse(form: str) -> Form:
        platform, *numbers = form.split(" ")
        q_x, q_o, bits, out_bits, axis = map(int, numbers)
        chip = known(platform.lower()).softmax
        return Form(chip=chip, q_x=q_x, q_o=q_o, bits=bits, out_bits=out_bits, axis=axis)


class Text:
    """Statements under construction; numbers become constants once."""

    def __init__(self, opset: int, axis: int) -> None:
        self.opset, self.axis = opset, axis
        self.lines: list[str] = []
        self.known: dict[str, str] = {}

    def number(self, value: int) -> str:
        return self.constant("c", f"int64 {{{value}}}")

    def vector(self, name: str, values: Iterable[int], kind: str = "int64") -> str:
        text = [str(int(v)) for v in values]
        return self.constant(name, f"{kind}[{len(text)}] {{{', '.join(text)}}}")

    def constant(self, stem: str, text: str) -> str:
        if text not in self.known:
            self.known[text] = f"{stem}{len(self.known)}"
            self.lines.append(f"{self.known[text]} = Constant <value = {text}> ()")
        return self.known[text]

    def op(self, op_type: str, *inputs: str | int, attrs: str = "") -> str:
        given = ", ".join(self.number(i) if isinstance(i, int) else i for i in inputs)
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {op_type} {attrs}({given})")
        return name

    def cast(self, x: str, bits: int = 64) -> str:
        return self.op("Cast", x, attrs=f"<to: int = {ONNX_INT.get(bits, 7)}> ")

    def reduce(self, op_type: str, x: str) -> str:
        """Over the rows' axis, which stays as 1; the axes became an input at opset 13 (sum) and 18 (maximum)."""
        if self.opset < (13 if op_type == "ReduceSum" else 18):
            return self.op(op_type, x, attrs=f"<axes: ints = [{self.axis}], keepdims: int = 1> ")
        return self.op(op_type, x, self.vector("axes", [self.axis]), attrs="<keepdims: int = 1> ")

    def rounded_shift(self, v: str, n: int, negative: bool = False) -> str:
        """floor(v / 2^n + 1/2); ``negative``: where v may be below 0."""
        if n <= 0:
            return self.op("Mul", v, 2**-n) if n else v
        half = self.op("Add", v, 2 ** (n - 1) + (OFFSET if negative else 0))
        floor = self.op("Div", half, 2**n)
        return self.op("Sub", floor, OFFSET >> n) if negative else floor

    def highest_bit(self, v: str, lowest: int, top: int) -> str:
        """How many of the bits ``lowest`` to ``top`` are at or below the highest bit that is set in ``v``."""
        values = [2**i for i in range(lowest, top + 1)]
        sizes = ", ".join(map(str, [len(values), *[1] * (-self.axis - 1)]))
        bounds = self.constant("bounds", f"int64[{sizes}] {{{', '.join(map(str, values))}}}")
        return self.reduce("ReduceSum", self.cast(self.op("GreaterOrEqual", v, bounds)))

    def power(self, first: int, count: int, index: str) -> str:
        """2^(first + index)"""
        return self.op("Gather", self.vector("powers", (2 ** (first + i) for i in range(count))), index)

    def finished(self, y: str, bits: int) -> str:
        """Saturate, and store as Y."""
        y = self.op("Min", self.op("Max", y, -levels(bits) - 1), levels(bits))
        self.lines.append(f"Y = Cast <to: int = {ONNX_INT[bits]}> ({y})")
        return "\n".join(self.lines) + "\n"


def rows(t: Text, form: Form) -> tuple[str, str | None]:
    """Levels below the row's maximum; and 1 in a row whose maximum saturates, 0 in others, None where none can."""
    v = t.rounded_shift(t.cast("X"), max(form.q_x - form.q, 0), negative=True)
    top = 2 ** (form.q + chip_math.INTEGER)
    if top >= 2 ** (form.bits - 1):
        return t.op("Sub", t.reduce("ReduceMax", v), v), None
    v = t.op("Max", t.op("Min", v, top), -top)
    peak = t.reduce("ReduceMax", v)
    return t.op("Sub", peak, v), t.cast(t.op("Equal", peak, top))


def exponentials(t: Text, form: Form) -> tuple[str, str]:
    """e^d of every element in Q23, and how many levels it lies below its row's maximum."""
    k, saturated = rows(t, form)
    d = np.maximum(-np.arange(2**form.bits) * form.step, -(2**31))
    tables = [chip_math.exp(v, form.chip) for v in ([d] if saturated is None else [d, np.minimum(d + 1, 0)])]
    size = min(int(np.flatnonzero(tables[-1])[-1]) + 2, 2**form.bits)  # all that follows is 0
    index = t.op("Min", k, size - 1)
    if saturated is not None:
        index = t.op("Add", index, t.op("Mul", saturated, size))
    table = t.cast(t.vector("exp", (v for table in tables for v in table[:size]), "int32"))
    return t.op("Gather", table, index), k


def probabilities(t: Text, form: Form) -> str:
    """p in Q15: e * r / 2^k with the chip's reciprocal of the saturated sum."""
    e, _ = exponentials(t, form)
    s = t.op("Min", t.op("Max", t.reduce("ReduceSum", e), EXP_OF_0), HIGHEST)  # never 0, in empty rows neither
    if not form.chip.newton:
        r = t.op("Mul", t.op("Div", 2**52, s), 2)
        return t.rounded_shift(t.op("Mul", e, r), 38)
    b = t.highest_bit(s, 24, 30)
    x = t.op("Div", s, t.power(1, 8, b))
    y = t.op("Sub", NEWTON_START, x)
    for _ in range(2):
        error = t.op("Sub", 2**22, t.rounded_shift(t.op("Mul", x, y), 23))
        step = t.op("Mul", t.op("Mul", y, error), 2)
        y = t.op("Add", y, t.rounded_shift(step, 23, negative=True))
    r = t.op("Div", y, t.power(0, 8, b))
    return t.rounded_shift(t.op("Mul", e, r), 31)


def log_of_sums(t: Text, form: Form) -> str:
    """d - ln of the sum, in Q15."""
    e, k = exponentials(t, form)
    d = t.op("Mul", k, -form.step)  # a maximum that saturated adds 1, which the shift by 10 rounds away
    d = t.rounded_shift(t.op("Max", d, -(2**31)), 10, negative=True)
    s = t.op("Min", t.rounded_shift(t.reduce("ReduceSum", e), 8), HIGHEST)
    b = t.highest_bit(s, 16, 30)
    index = t.op("Mod", t.op("Div", s, t.power(6, 16, b)), 512)
    ln = t.op("Add", t.op("Mul", b, LN2_Q16), t.op("Gather", t.vector("ln", LN_TABLE), index))
    return t.op("Sub", d, t.op("Div", ln, 2))


def body_softmax(form: str, opset: int) -> tuple[str, str]:
    parsed = Form.parse(form)
    t = Text(opset, parsed.axis)
    y = t.rounded_shift(probabilities(t, parsed), min(15 - parsed.q_o, 40))
    return "X", t.finished(y, parsed.out_bits)


def body_log(form: str, opset: int) -> tuple[str, str]:
    parsed = Form.parse(form)
    t = Text(opset, parsed.axis)
    shift = min(parsed.chip.log_fraction - parsed.q_o, 40)
    if parsed.chip.log_of_sum:
        return "X", t.finished(t.rounded_shift(log_of_sums(t, parsed), shift, negative=True), parsed.out_bits)
    ln = saturate(shift_round(chip_math.ln_probability(np.arange(2**15 + 1)), shift), parsed.out_bits)
    table = t.vector("ln", ln.tolist(), f"int{parsed.out_bits}")
    t.lines.append(f"Y = Gather ({table}, {probabilities(t, parsed)})")
    return "X", "\n".join(t.lines) + "\n"


def real_softmax(form: str, opset: int) -> str:
    """The float function; before opset 13 Softmax itself only works over the last axis."""
    t = Text(opset, Form.parse(form).axis)
    if opset >= 13 or t.axis == -1:
        return f"Y = Softmax <axis: int = {t.axis}> (X)\n"
    e = t.op("Exp", t.op("Sub", "X", t.reduce("ReduceMax", "X")))
    s = t.reduce("ReduceSum", e)
    return "\n".join([*t.lines, f"Y = Div ({e}, {s})"]) + "\n"


def real_log(form: str, opset: int) -> str:
    """Its logarithm."""
    t = Text(opset, Form.parse(form).axis)
    if opset >= 13 or t.axis == -1:
        return f"Y = LogSoftmax <axis: int = {t.axis}> (X)\n"
    d = t.op("Sub", "X", t.reduce("ReduceMax", "X"))
    ln = t.op("Log", t.reduce("ReduceSum", t.op("Exp", d)))
    return "\n".join([*t.lines, f"Y = Sub ({d}, {ln})"]) + "\n"
