"""Padding with existing values (reflect, replicate, circular) or zeros: no arithmetic, the grid stays. With another number:

    out = sat(rsh(x, log2(s_x/s_o))) surrounded by sat(floor(value * s_o + 1/2)),  s_o <= s_x          (1)

where the output grid reaches the number (``where`` says what a fill of -inf does). The engine pads with constants only (``engine`` 2): ``check`` reports the other modes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linger import observe
from linger.numerics import Grid, fake_quant, set_grid
from linger.ops._base import Op, output_bits
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand, requant_node
from linger.ops._site import Site
from linger.ops.where import check_number, fill_peak, filled, filled_integer

NUMPY_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def lowered(mode: str, front: tuple[int, ...], pads: tuple[int, ...], bits: int) -> Lowered:
    """An ``iqPad`` node. ``pads``: (begins, ends) of the last axes; ``front`` zeros for the axes before them."""
    half = len(pads) // 2
    full = np.array((*front, *pads[:half], *front, *pads[half:]), np.int64)
    params = {"pads": full}
    form = mode + "".join(f"_{v}" for v in full) if mode == "circular" else mode
    form += "_o16" if bits == 16 else ""
    return Lowered(op_type="iqPad", inputs=(0, "pads"), attrs={"mode": mode}, params=params, bits=bits, form=form)


class PadSite(Site):
    """``F.pad`` with a number that is not 0."""

    op_type = "iqPad"

    @classmethod
    def takes(cls, x: Any = None, pad: Any = None, mode: str = "constant", value: Any = None) -> bool:
        return mode == "constant" and bool(value)

    def forward(self, x: Tensor, pad: Any, mode: str = "constant", value: float = 0.0) -> Tensor:
        check_number(value)
        self.out_bits = bits = self.width(x)
        x, s_x = self.operand(x, "x", bits)
        if self.training:
            with torch.no_grad():
                peak = observe.peak(x)
                fill = fill_peak(peak.new_full((), value, dtype=torch.float64))
                self.follow("o", torch.maximum(peak, fill))
        else:
            self.require_range("o")
        scale = torch.minimum(self.scale("o", bits), s_x)
        inner = F.pad(torch.ones_like(x, dtype=torch.bool), pad)
        out = torch.where(
            inner, F.pad(fake_quant(x, scale, bits, rounding=self.rounding), pad), filled(value, scale, bits)
        )
        return set_grid(out, Grid(scale, bits))

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        x, pad = operands[0], call["pad"]
        n = len(pad) // 2
        pads = (*(pad[2 * (n - 1 - i)] for i in range(n)), *(pad[2 * (n - 1 - i) + 1] for i in range(n)))
        node = lowered("constant", (0,) * (len(out.shape) - n), pads, out.bits)
        same = (x.scale, x.bits) == (out.scale, out.bits)
        padded = Lowered(
            op_type=self.op_type,
            inputs=(0 if same else "%0", "pads", "value"),
            attrs=node.attrs,
            params={**node.params, "value": filled_integer(float(call["value"]), out.scale, out.bits)},
            bits=out.bits,
            form=node.form.replace("constant", "value"),
        )
        return (padded,) if same else (requant_node(x, out), padded)


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
    if mode == "value":
        if bits == 16:
            text = "Xi = Cast <to: int = 6> (X)\nVi = Cast <to: int = 6> (V)\nYi = Pad (Xi, P, Vi)\n"
            return "X, P, V", text + "Y = Cast <to: int = 5> (Yi)\n"
        return "X, P, V", "Y = Pad (X, P, V)\n"
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


def _pad(*args: Any, **kwargs: Any) -> Any:
    return lambda: lambda x: F.pad(x, *args, **kwargs)


CASES = (
    Case(name="pad-number", make=_pad((1, 2), value=0.7), shapes=((2, 3, 20),)),
    Case(name="pad-number-2d", make=lambda: nn.ConstantPad2d((1, 0, 2, 1), -30.0), shapes=((2, 3, 4, 5),)),
    Case(name="pad-inf", make=_pad((2, 1), "constant", float("-inf")), shapes=((2, 3, 20),)),
    Case(name="pad-crop", make=_pad((-1, 2), value=2.0), shapes=((2, 3, 20),)),
    Case(name="pad-reflect", make=lambda: nn.ReflectionPad2d(1), shapes=((2, 3, 4, 5),)),
    Case(name="pad-replicate", make=lambda: nn.ReplicationPad1d((2, 1)), shapes=((2, 3, 9),)),
    Case(name="pad-circular", make=lambda: nn.CircularPad2d((1, 2, 0, 1)), shapes=((2, 3, 4, 5),)),
    Case(name="pad-zero", make=lambda: nn.ConstantPad1d(2, 0.0), shapes=((2, 3, 9),)),
)

OPS = (
    Op(name="iqPad", run=run, body=body, real=real, integer=PadSite,
       site="pad", modules=(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), calls=(F.pad, torch.constant_pad_nd),
       names={F.pad: ("pad", "mode", "value"), torch.constant_pad_nd: ("pad", "value")}),
)  # fmt: skip
