"""Float calls element by element and over axes, as standard ONNX: one row per call."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from linger.onnx.emit import Emit, Row, axes_of


def unary(op_type: str, **attrs: Any) -> Row:
    """One node on the input."""
    return lambda o, input: getattr(o, op_type)(input, **attrs)


def binary(op_type: str) -> Row:
    """One node on two operands, either of which may be a number."""
    return lambda o, input, other: getattr(o, op_type)(input, other)


def swapped(op_type: str) -> Row:
    """The same for the spelling with the operands reversed: ``2 ** x``."""
    return lambda o, input, other: getattr(o, op_type)(other, input)


def logical(op_type: str) -> Row:
    """One node on two operands as truth values."""
    return lambda o, input, other: getattr(o, op_type)(o.truth(input), o.truth(other))


def bitwise(op_type: str) -> Row:
    """The same for ``&``, ``|`` and ``^``, which mean bits where they are not on truth values."""

    def row(o: Emit, input: Any, other: Any) -> ir.Value:
        if o.node.outputs[0].dtype != torch.bool:
            raise o.refuse(f"{o.node.op} of integers", "use it on truth values only")
        return logical(op_type)(o, input, other)

    return row


def inverted(o: Emit, input: Any) -> ir.Value:
    if o.node.outputs[0].dtype != torch.bool:
        raise o.refuse(f"{o.node.op} of integers", "use it on truth values only")
    return o.Not(o.truth(input))


def add(o: Emit, input: Any, other: Any, alpha: Any = 1) -> ir.Value:
    return o.Add(input, other if alpha == 1 else o.Mul(other, alpha))


def sub(o: Emit, input: Any, other: Any, alpha: Any = 1) -> ir.Value:
    return o.Sub(input, other if alpha == 1 else o.Mul(other, alpha))


def rsub(o: Emit, input: Any, other: Any, alpha: Any = 1) -> ir.Value:
    return o.Sub(other, input if alpha == 1 else o.Mul(input, alpha))


def trunc(o: Emit, input: Any) -> ir.Value:
    return o.Mul(o.Sign(input), o.Floor(o.Abs(input)))


def div(o: Emit, input: Any, other: Any, rounding_mode: str | None = None) -> ir.Value:
    if rounding_mode is None:
        return o.Div(input, other)
    if rounding_mode == "trunc":
        return trunc(o, o.Div(input, other))
    x, y = o.operand(input), o.operand(other)
    rest = o.Mod(x, y, fmod=1)
    whole = o.Div(o.Sub(x, rest), y)  # an integer but for the error of the division
    return o.Round(o.Sub(whole, o.Cast(_opposite(o, rest, y), to=int(ir.DataType.FLOAT))))


def _opposite(o: Emit, rest: ir.Value, y: Any) -> ir.Value:
    """Where a remainder that is not 0 has another sign than the divisor."""
    return o.Less(o.Mul(o.Sign(rest), o.Sign(y)), 0.0)


def remainder(o: Emit, input: Any, other: Any) -> ir.Value:
    """With the sign of the divisor, as PyTorch computes it."""
    x, y = o.operand(input), o.operand(other)
    rest = o.Mod(x, y, fmod=1)
    return o.Where(_opposite(o, rest, y), o.Add(rest, y), rest)


def fmod(o: Emit, input: Any, other: Any) -> ir.Value:
    return o.Mod(input, other, fmod=1)


def lerp(o: Emit, input: Any, end: Any, weight: Any) -> ir.Value:
    return o.Add(input, o.Mul(weight, o.Sub(end, input)))


def addcmul(o: Emit, input: Any, tensor1: Any, tensor2: Any, value: Any = 1) -> ir.Value:
    return o.Add(input, o.Mul(o.Mul(tensor1, tensor2), value))


def addcdiv(o: Emit, input: Any, tensor1: Any, tensor2: Any, value: Any = 1) -> ir.Value:
    return o.Add(input, o.Mul(o.Div(tensor1, tensor2), value))


def round_(o: Emit, input: Any, decimals: int = 0) -> ir.Value:
    return o.Div(o.Round(o.Mul(input, 10.0**decimals)), 10.0**decimals) if decimals else o.Round(input)


def clamp(o: Emit, input: Any, min: Any = None, max: Any = None) -> ir.Value:
    """Bounds may be tensors, which Clip does not take."""
    x = input
    x = x if min is None else o.Max(x, min)
    return o.Identity(x) if max is None and min is None else x if max is None else o.Min(x, max)


def hardtanh(o: Emit, input: Any, min_val: Any = -1.0, max_val: Any = 1.0) -> ir.Value:
    return clamp(o, input, min_val, max_val)


def where(o: Emit, condition: Any, input: Any, other: Any) -> ir.Value:
    return o.Where(o.truth(condition), o.operand(input), other)


def masked_fill(o: Emit, input: Any, mask: Any, value: Any) -> ir.Value:
    return o.Where(o.truth(mask), o.operand(value), input)


def fill(o: Emit, input: Any, value: Any = 0.0) -> ir.Value:
    return o.expanded(o.operand(value), input.shape)


def copy(o: Emit, input: Any, src: Any, non_blocking: bool = False) -> ir.Value:
    return o.expanded(o.operand(src), input.shape, o.shape_of(src))


def isfinite(o: Emit, input: Any) -> ir.Value:
    return o.Not(o.Or(o.IsNaN(input), o.IsInf(input)))


def log_base(base: float) -> Row:
    return lambda o, input: o.Div(o.Log(input), math.log(base))


# --- over axes


def reduce(op_type: str) -> Row:
    """One reduction; ``dim`` names an axis, several, or all."""

    def row(o: Emit, input: Any, dim: Any = None, keepdim: bool = False) -> ir.Value:
        return o.reduced(op_type, input, axes_of(dim, len(input.shape)), keepdim)

    return row


def extreme(op_type: str) -> Row:
    """max and min: of all, of two tensors, or over one axis with the indices."""

    def row(o: Emit, input: Any, dim: Any = None, keepdim: bool = False, other: Any = None) -> Any:
        if other is None and not isinstance(dim, int) and dim is not None:
            other = dim
        if other is not None:
            return getattr(o, op_type)(input, other)
        reduced = o.reduced(f"Reduce{op_type}", input, axes_of(dim, len(input.shape)), keepdim)
        if dim is None:
            return reduced
        return reduced, getattr(o, f"Arg{op_type}")(input, axis=dim % len(input.shape), keepdims=int(keepdim))

    return row


def arg(op_type: str) -> Row:
    """The index of the largest or smallest, along one axis or in all of the tensor."""

    def row(o: Emit, input: Any, dim: Any = None, keepdim: bool = False) -> ir.Value:
        rank = len(input.shape)
        if dim is None:
            flat = getattr(o, op_type)(o.Reshape(input, o.ints([-1])), axis=0, keepdims=0)
            return o.reshaped(flat, (1,) * rank, ()) if keepdim else flat
        return getattr(o, op_type)(input, axis=dim % rank, keepdims=int(keepdim))

    return row


def variance(root: bool) -> Row:
    """var and std with their correction of the count."""

    def row(
        o: Emit, input: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, correction: Any = None
    ) -> ir.Value:
        if isinstance(dim, bool):
            dim, unbiased = None, dim
        axes = axes_of(dim, len(input.shape))
        less = correction if correction is not None else 0 if unbiased is False else 1
        off = o.Sub(input, o.reduced("ReduceMean", input, axes, True))
        total = o.reduced("ReduceSum", o.Mul(off, off), axes, keepdim)
        count = 1
        for axis in axes:
            if hasattr(input.shape[axis], "values"):
                raise o.refuse("a variance along a dynamic axis", "fix that axis")
            count *= int(input.shape[axis])
        spread = o.Div(total, float(max(count - less, 0)))
        return o.Sqrt(spread) if root else spread

    return row


def norm(o: Emit, input: Any, p: Any = 2, dim: Any = None, keepdim: bool = False) -> ir.Value:
    axes = axes_of(dim, len(input.shape))
    if p in (2, "fro", None):
        return o.Sqrt(o.reduced("ReduceSum", o.Mul(input, input), axes, keepdim))
    if p == 1:
        return o.reduced("ReduceSum", o.Abs(input), axes, keepdim)
    if p in (float("inf"), "inf"):
        return o.reduced("ReduceMax", o.Abs(input), axes, keepdim)
    return o.Pow(o.reduced("ReduceSum", o.Pow(o.Abs(input), float(p)), axes, keepdim), 1.0 / p)


def vector_norm(o: Emit, input: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False) -> ir.Value:
    return norm(o, input, ord, dim, keepdim)


def truth_of(op_type: str) -> Row:
    """any and all."""

    def row(o: Emit, input: Any, dim: Any = None, keepdim: bool = False) -> ir.Value:
        number = o.Cast(o.truth(input), to=int(ir.DataType.FLOAT))
        return o.Greater(o.reduced(op_type, number, axes_of(dim, len(input.shape)), keepdim), 0.5)

    return row


def cumsum(o: Emit, input: Any, dim: int) -> ir.Value:
    return o.CumSum(input, np.array(dim % len(input.shape), np.int64))


def topk(o: Emit, input: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> list[ir.Value]:
    attrs = {"axis": dim % len(input.shape), "largest": int(largest), "sorted": 1}
    values, indices = o.nodes("TopK", [input, o.ints([k])], attrs, 2)
    indices.dtype = ir.DataType.INT64
    return [values, indices]


def sort(o: Emit, input: Any, dim: int = -1, descending: bool = False, stable: bool = False) -> list[ir.Value]:
    size = input.shape[dim]
    if hasattr(size, "values"):
        raise o.refuse("a sort along a dynamic axis", "fix that axis")
    return topk(o, input, int(size), dim, descending)


def scatter(o: Emit, input: Any, dim: int, index: Any, src: Any) -> ir.Value:
    return o.ScatterElements(o.raw(input), o.index(index), o.raw(src), axis=dim % len(input.shape))


SIMPLE = (
    "Sigmoid", "Tanh", "Exp", "Log", "Sqrt", "Abs", "Neg", "Sign", "Floor", "Ceil", "Reciprocal", "Erf", "Sin", "Cos",
    "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh", "Softsign", "IsNaN", "IsInf",
)  # fmt: skip

MATH: dict[str, Row] = {name.lower(): unary(name) for name in SIMPLE} | {
    "add": add, "sub": sub, "subtract": sub, "rsub": rsub, "mul": binary("Mul"), "multiply": binary("Mul"), "div": div,
    "divide": div, "true_divide": binary("Div"), "rdiv": lambda o, input, other: o.Mul(o.Reciprocal(input), other),
    "floor_divide": lambda o, input, other: div(o, input, other, "floor"),
    "floordiv": lambda o, input, other: div(o, input, other, "floor"),
    "rfloordiv": lambda o, input, other: div(o, other, input, "floor"),
    "remainder": remainder, "mod": remainder, "rmod": lambda o, input, other: remainder(o, other, input), "fmod": fmod,
    "pow": lambda o, input, exponent: o.Pow(input, o.operand(exponent)), "rpow": swapped("Pow"),
    "float_power": lambda o, input, exponent: o.Pow(input, o.operand(exponent)),
    "maximum": binary("Max"), "minimum": binary("Min"), "fmax": binary("Max"), "fmin": binary("Min"),
    "negative": unary("Neg"), "absolute": unary("Abs"), "expit": unary("Sigmoid"),
    "square": lambda o, input: o.Mul(input, input), "rsqrt": lambda o, input: o.Reciprocal(o.Sqrt(input)),
    "exp2": lambda o, input: o.Pow(2.0, input), "expm1": lambda o, input: o.Sub(o.Exp(input), 1.0),
    "log1p": lambda o, input: o.Log(o.Add(input, 1.0)), "log2": log_base(2), "log10": log_base(10),
    "trunc": trunc, "fix": trunc, "frac": lambda o, input: o.Sub(input, trunc(o, input)), "round": round_,
    "lerp": lerp, "addcmul": addcmul, "addcdiv": addcdiv, "clamp": clamp, "clip": clamp, "hardtanh": hardtanh,
    "clamp_min": lambda o, input, min: o.Max(input, min), "clamp_max": lambda o, input, max: o.Min(input, max),
    "relu6": lambda o, input: clamp(o, input, 0.0, 6.0), "where": where, "masked_fill": masked_fill, "fill": fill,
    "zero": fill, "copy": copy,
    "gt": binary("Greater"), "greater": binary("Greater"), "lt": binary("Less"), "less": binary("Less"),
    "ge": binary("GreaterOrEqual"), "greater_equal": binary("GreaterOrEqual"), "le": binary("LessOrEqual"),
    "less_equal": binary("LessOrEqual"), "eq": binary("Equal"),
    "ne": lambda o, input, other: o.Not(o.Equal(input, other)),
    "not_equal": lambda o, input, other: o.Not(o.Equal(input, other)),
    "logical_and": logical("And"), "logical_or": logical("Or"), "logical_xor": logical("Xor"), "and": bitwise("And"),
    "or": bitwise("Or"), "xor": bitwise("Xor"), "bitwise_and": bitwise("And"), "bitwise_or": bitwise("Or"),
    "bitwise_xor": bitwise("Xor"), "logical_not": lambda o, input: o.Not(o.truth(input)), "invert": inverted,
    "bitwise_not": inverted, "isfinite": isfinite,
    "sum": reduce("ReduceSum"), "mean": reduce("ReduceMean"), "amax": reduce("ReduceMax"), "amin": reduce("ReduceMin"),
    "prod": reduce("ReduceProd"), "logsumexp": reduce("ReduceLogSumExp"), "max": extreme("Max"), "min": extreme("Min"),
    "argmax": arg("ArgMax"), "argmin": arg("ArgMin"), "var": variance(False), "std": variance(True), "norm": norm,
    "linalg_vector_norm": vector_norm, "vector_norm": vector_norm, "any": truth_of("ReduceMax"),
    "all": truth_of("ReduceMin"), "cumsum": cumsum, "topk": topk, "sort": sort, "scatter": scatter,
}  # fmt: skip
