"""Padding with existing values: reflect, replicate, circular. No arithmetic: the grid stays.

The engine pads with constants only (``engine`` 2): ``check`` reports the other modes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from linger.ops._base import Op, output_bits
from linger.ops._lowered import Lowered

NUMPY_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def lowered(mode: str, front: tuple[int, ...], pads: tuple[int, ...], bits: int) -> Lowered:
    """An ``iqPad`` node. ``pads``: (begins, ends) of the last axes; ``front`` zeros for the axes before them."""
    half = len(pads) // 2
    full = np.array((*front, *pads[:half], *front, *pads[half:]), np.int64)
    params = {"pads": full}
    form = mode + "".join(f"_{v}" for v in full) if mode == "circular" else mode
    form += "_o16" if bits == 16 else ""
    return Lowered(op_type="iqPad", inputs=(0, "pads"), attrs={"mode": mode}, params=params, bits=bits, form=form)


def run(
    x: np.ndarray, pads: np.ndarray, value: np.ndarray | None = None, *, mode: str = "constant", **_: Any
) -> np.ndarray:
    """x any shape, pads int64 (2 * rank: begins, ends); a negative one crops."""
    width = list(zip(pads[: x.ndim].tolist(), pads[x.ndim :].tolist(), strict=True))
    x = x[tuple(slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(width, x.shape, strict=True))]
    width = [(max(a, 0), max(b, 0)) for a, b in width]
    if mode == "constant":
        return np.pad(x, width, constant_values=0 if value is None else value.item())
    return np.pad(x, width, mode=NUMPY_MODES[mode])  # type: ignore[call-overload,no-any-return]


def body(form: str, opset: int) -> tuple[str, str]:
    base, bits = output_bits(form)
    mode, *widths = base.split("_")
    if mode != "circular":
        pad = f'Pad <mode: string = "{NUMPY_MODES[mode]}">'
        if bits == 16:  # ONNX Runtime has no Pad of int16
            return "X, P", f"Xi = Cast <to: int = 6> (X)\nYi = {pad} (Xi, P)\nY = Cast <to: int = 5> (Yi)\n"
        return "X, P", f"Y = {pad} (X, P)\n"
    n = len(widths) // 2
    text, source = "", "X"
    for axis in range(n):
        begin, end = int(widths[axis]), int(widths[n + axis])
        if not begin and not end:
            continue
        p = f"a{axis}"
        parts = []
        text += f"{p}ax = Constant <value = int64[1] {{{axis}}}> ()\n"
        if begin:
            text += f"{p}s = Constant <value = int64[1] {{{-begin}}}> ()\n"
            text += (
                f"{p}e = Constant <value = int64[1] {{{2**31}}}> ()\n{p}front = Slice ({source}, {p}s, {p}e, {p}ax)\n"
            )
            parts.append(f"{p}front")
        parts.append(source)
        if end:
            text += f"{p}z = Constant <value = int64[1] {{0}}> ()\n"
            text += f"{p}n = Constant <value = int64[1] {{{end}}}> ()\n{p}back = Slice ({source}, {p}z, {p}n, {p}ax)\n"
            parts.append(f"{p}back")
        text += f"{p} = Concat <axis: int = {axis}> ({', '.join(parts)})\n"
        source = p
    return "X, P", text + f"Y = Identity ({source})\n"


def real(form: str, opset: int) -> str:
    base = output_bits(form)[0]
    if (
        base.startswith("circular") and opset >= 19
    ):  # ONNX Runtime cannot move the pairs of dialect "qdq" into the slices
        return 'Y = Pad <mode: string = "wrap"> (X, P)\n'
    return body(base, opset)[1]


OPS = (Op(name="iqPad", run=run, body=body, real=real),)
