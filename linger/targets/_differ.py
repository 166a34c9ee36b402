"""Where two chips compute other integers from the same file."""

from __future__ import annotations

from linger.targets._base import Target

LOOKS_UP = {"GluInt": ("iqSigmoid",), "LSTMInt": ("iqSigmoid", "iqTanh"), "GRUInt": ("iqSigmoid", "iqTanh")}


def difference(op: str, a: Target, b: Target) -> str:
    """Why an op computes other integers on ``b`` than on ``a``; "" where it does not."""
    if a.rounding != b.rounding:
        return f"another rounding, {b.rounding} for {a.rounding}"
    found = [f for f in LOOKS_UP.get(op, (op,)) if a.functions.get(f) != b.functions.get(f)]
    if found:
        return f"another table of {', '.join(f.removeprefix('iq').lower() for f in found)}"
    if op == "SoftmaxInt" and (a.softmax.exp_rounds, a.softmax.newton) != (b.softmax.exp_rounds, b.softmax.newton):
        return "another exponential or reciprocal"
    if op == "LogSoftmaxInt" and a.softmax != b.softmax:
        return "another exponential, reciprocal or logarithm"
    if op == "LayerNormInt" and (a.normal_bits, a.weight_bits.get(op)) != (b.normal_bits, b.weight_bits.get(op)):
        return "another width of the normalized value or of the weight"
    return ""
