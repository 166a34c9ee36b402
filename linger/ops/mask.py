"""Masked scores of attention: what must not be attended to goes to the lowest level of the grid, where softmax gives 0.

    hidden = a bool mask is true, or m = -2^15, or j > i for a causal one,   m = sat16(floor(mask * s_o + 1/2))     (1)
    out = -2^(b-1) where hidden, else min(max(rsh(x, log2(s_x / s_o)) + sum of m + c, low), 2^(b-1) - 1)           (2)
    s_o = min(s_x, 2^floor(log2(2^(b-1) / (R + D)))),  D = b ln 2 + 1,  R the running maximum of |x|             (3)
    low = -2^(b-1) + ceil(D * s_o) with bool and causal masks alone, -2^(b-1) with an additive one                 (4)
    in attention:  s_o = min(s_x, 2^floor(log2((2^b - 1) / (2 R + D)))),  c = min(2^(b-1) - 1, 63 s_o) - ceil(R s_o) (5)

A float mask of -inf (or -1e9) has no level. (3) keeps at least D between the lowest level and everything that was observed,
and (4) holds it for what was not. A hidden entry's weight is then at most exp(-D) = 2^-b / e of the largest one of its row,
which is less than half a level of any grid of b bits that holds the largest: it is exactly 0, as long as one entry of its
row is not hidden. A row that is hidden as a whole becomes the uniform distribution (PyTorch gives NaN or 0 there). Scores
have 8 or 16 bits; wider ones are narrowed to 16.

The room D costs up to two bits of the scores. Softmax does not see a constant c, so attention moves all scores up until
only the lower end has that room (5), which gives one bit back; 63 because a chip's softmax saturates its input at 64.

No chip has this op.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from linger.numerics import Grid, exponent, grid_of, levels, pow2_floor, saturate, set_grid, shift_round
from linger.ops._base import ONNX_INT, Op, constants
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand
from linger.ops._site import Site

WIDEST_SCORE = 16
MOST_MASKS = 8
LOWEST = -(2.0**15)


def masked(x: Tensor, *masks: Tensor, causal: bool = False, kept: bool = False, moved: bool = False) -> Tensor:
    """Scores x (..., L, S) with masks that broadcast to them: float ones are added, bool ones hide.

    Args:
        x: the scores.
        masks: bool or float tensors.
        causal: hide the entries j > i.
        kept: bool masks are true where an entry stays.
        moved: only softmax reads the result, so that a constant may be added.
    """
    for mask in masks:
        hides = mask.dtype == torch.bool
        x = x.masked_fill(~mask if kept else mask, -math.inf) if hides else x + mask
    return x.masked_fill(later(x), -math.inf) if causal else x


def shown(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A call of a function of ours as a function mode sees those of torch."""
    return (
        handle_torch_function(func, (x,), x, *args, **kwargs) if has_torch_function((x,)) else func(x, *args, **kwargs)
    )


def later(x: Tensor) -> Tensor:
    """(L, S), true where j > i."""
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape[-2:])
    return columns > rows.unsqueeze(1)


class _Passed(torch.autograd.Function):
    """integers / scale with the gradient of ``x`` where ``keep``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, integers: Tensor, scale: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(keep)
        return integers / scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0] * ctx.saved_tensors[0], None, None, None


class MaskSite(Site):
    """The masks of attention"""

    op_type = "iqMask"
    raw: ClassVar[frozenset[int]] = frozenset(range(1, 1 + MOST_MASKS))

    @classmethod
    def takes(cls, x: Any, *masks: Any, **call: Any) -> bool:
        return grid_of(x) is not None and len(masks) <= MOST_MASKS

    def operand_bits(self, bits: Sequence[int]) -> int:
        return min(max(bits[0], 8), WIDEST_SCORE)

    def forward(
        self, x: Tensor, *masks: Tensor, causal: bool = False, kept: bool = False, moved: bool = False
    ) -> Tensor:
        bits = self.out_bits = self.operand_bits([g.bits for g in [grid_of(x)] if g is not None])
        x, s_x = self.operand(x, "x", bits)
        bools = [~m if kept else m for m in masks if m.dtype == torch.bool] + ([later(x)] if causal else [])
        floats = [m.float() for m in masks if m.dtype != torch.bool]
        self.observe("o", self.attended(x, bools, floats))
        scale = torch.minimum(s_x, self.room(bits, moved))
        q, ideal = torch.floor(x.detach() * scale + 0.5), x
        for m in floats:
            level = torch.floor(m.detach() * scale + 0.5).clamp(LOWEST, -LOWEST - 1)
            bools = [*bools, level == LOWEST]
            q, ideal = q + level, ideal + m.clamp_min(-torch.finfo(m.dtype).max)
        low, offset = self.limits(scale, bits, bool(floats), moved)
        q = q + offset
        y = torch.maximum(q, low).clamp_max(levels(bits))
        keep = y == q
        for hidden in bools:
            y, keep = torch.where(hidden, -(2.0 ** (bits - 1)), y), keep & ~hidden
        return set_grid(_Passed.apply(ideal, y, scale, keep), Grid(scale, bits))

    def room(self, bits: int, moved: bool) -> Tensor:
        """The finest scale of equation (3), or (5)."""
        peak = self.running("o")
        if moved:
            return pow2_floor((2.0**bits - 1) / (2 * peak + margin(bits)))
        return pow2_floor(2.0 ** (bits - 1) / (peak + margin(bits)))

    def limits(self, scale: Tensor, bits: int, added: bool, moved: bool) -> tuple[Tensor, Tensor]:
        """``low`` of equation (4) and c of equation (5), in levels."""
        least = -(2.0 ** (bits - 1))
        low = scale.new_full((), least) if added else (torch.ceil(scale.double() * margin(bits)) + least).float()
        offset = (63 * scale).clamp_max(levels(bits)).floor() - torch.ceil(self.running("o") * scale)
        return low, offset.clamp_min(0) if moved else torch.zeros_like(offset)

    def attended(self, x: Tensor, bools: Sequence[Tensor], floats: Sequence[Tensor]) -> Tensor:
        """What the grid must hold: no hidden entries, and no negative mask, which only moves towards them."""
        if not self.training:
            return x
        with torch.no_grad():
            for m in floats:
                x = x + m.clamp_min(0)
            for hidden in bools:
                x = torch.where(hidden, 0.0, x)
        return x

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        x, bits, kept = operands[0], out.bits, bool(call.get("kept", False))
        kinds = "".join("f" if o.dtype != torch.bool else "k" if kept else "b" for o in operands[1:])
        scale = torch.tensor(out.scale, device=self.running("o").device)
        low, offset = self.limits(scale, bits, "f" in kinds, bool(call.get("moved", False)))
        attrs = {
            "scale_x": x.scale, "scale_o": out.scale, "data_bits": x.bits, "o_bits": bits, "low": int(low),
            "offset": int(offset), "masks": kinds, "causal": int(bool(call.get("causal", False))),
        }  # fmt: skip
        form = f"{bits} {kinds or '-'} {'causal' if attrs['causal'] else ''}".strip()
        inputs = tuple(range(len(operands)))
        return (Lowered(op_type=self.op_type, inputs=inputs, attrs=attrs, bits=bits, form=form),)


def margin(bits: int) -> float:
    """D of equation (3)."""
    return bits * math.log(2) + 1


def run(
    x: np.ndarray, *given: np.ndarray, scale_x: float, scale_o: float, low: int, offset: int = 0, masks: str = "",
    causal: int = 0, o_bits: int = 0, **_: Any,
) -> np.ndarray:  # fmt: skip
    """x (..., L, S) integers, masks bool or float32 -> the same shape; equations (1), (2)."""
    bits = o_bits or 8 * x.dtype.itemsize
    q = shift_round(x, exponent(scale_x) - exponent(scale_o)) + offset
    hidden = np.zeros(x.shape, bool)
    for mask, kind in zip(given, masks, strict=True):
        if kind == "f":
            with np.errstate(over="ignore"):
                m = np.floor(mask.astype(np.float32) * np.float32(scale_o) + np.float32(0.5))
            m = np.clip(m, LOWEST, -LOWEST - 1).astype(np.int64)
            q, hidden = q + m, hidden | (m == LOWEST)
        else:
            hidden = hidden | (~mask if kind == "k" else mask)
    if causal:
        hidden = hidden | (np.arange(x.shape[-1]) > np.arange(x.shape[-2])[:, None])
    return saturate(np.where(hidden, -(2 ** (bits - 1)), np.maximum(q, low)), bits)


def body(form: str, opset: int) -> tuple[str, str]:
    size, kinds, *causal = form.split(" ")
    bits, kinds = int(size), kinds.strip("-")
    text = "".join(
        f"{n}i = Constant <value_int: int = @{n}> ()\n{n} = Cast <to: int = 1> ({n}i)\n" for n in ("low", "offset")
    )
    text += constants(
        sx="@scale_x", so="@scale_o", half="float {0.5}", top=f"float {{{levels(bits)}}}",
        hid=f"float {{{-(2 ** (bits - 1))}}}", ml=f"float {{{LOWEST}}}", mh=f"float {{{-LOWEST - 1}}}",
    )  # fmt: skip
    text += "M = Div (so, sx)\nXf = Cast <to: int = 1> (X)\nXm = Mul (Xf, M)\nXh = Add (Xm, half)\n"
    text += "xq = Floor (Xh)\nq = Add (xq, offset)\n"
    total, hidden = "q", []
    for i, kind in enumerate(kinds):
        if kind == "f":
            text += f"a{i} = Mul (M{i}, so)\nh{i} = Add (a{i}, half)\nf{i} = Floor (h{i})\nm{i} = Clip (f{i}, ml, mh)\n"
            text += f"H{i} = Equal (m{i}, ml)\nt{i} = Add ({total}, m{i})\n"
            total = f"t{i}"
        elif kind == "k":
            text += f"H{i} = Not (M{i})\n"
        hidden.append(f"M{i}" if kind == "b" else f"H{i}")
    if causal:
        text += later_text()
        hidden.append("Hc")
    text += f"c = Clip ({total}, low, top)\n"
    for i, name in enumerate(hidden):
        text += f"w{i} = Where ({name}, hid, {'c' if not i else f'w{i - 1}'})\n"
    last = f"w{len(hidden) - 1}" if hidden else "c"
    names = ", ".join(["X", *(f"M{i}" for i in range(len(kinds)))])
    return names, text + f"Y = Cast <to: int = {ONNX_INT[bits]}> ({last})\n"


def later_text() -> str:
    """Statements for ``Hc``, true where j > i, from the shape of X."""
    text = constants(zero="int64 {0}", one="int64 {1}", i0="int64 {-2}", i1="int64 {-1}", col="int64[2] {-1, 1}")
    text += "sh = Shape (X)\nrows = Gather (sh, i0)\ncols = Gather (sh, i1)\nr = Range (zero, rows, one)\n"
    return text + "j = Range (zero, cols, one)\ni = Reshape (r, col)\nHc = Greater (j, i)\n"


def real(form: str, opset: int) -> str:
    """On floats, hidden entries at the lowest level."""
    size, kinds, *causal = form.split(" ")
    text = constants(so="@scale_o", hidden=f"float {{{-(2.0 ** (int(size) - 1))}}}", ml="float {-1e4}")
    text += "hid = Div (hidden, so)\noffi = Constant <value_int: int = @offset> ()\noff = Cast <to: int = 1> (offi)\n"
    text += "by = Div (off, so)\nv = Add (X, by)\n" + (later_text() if causal else "")
    total = "v"
    for i, kind in enumerate(kinds.strip("-")):
        if kind == "f":
            text += f"g{i} = Max (M{i}, ml)\nv{i} = Add ({total}, g{i})\n"
        else:
            text += f"H{i} = Not (M{i})\n" if kind == "k" else f"H{i} = Identity (M{i})\n"
            text += f"v{i} = Where (H{i}, hid, {total})\n"
        total = f"v{i}"
    return text + (f"Y = Where (Hc, hid, {total})\n" if causal else f"Y = Identity ({total})\n")


CASES = (
    Case(
        name="masked",
        make=lambda: lambda x: shown(masked, x, torch.arange(6) % 3 == 1, causal=True),
        shapes=((2, 4, 6),),
    ),
    Case(
        name="masked-moved",
        make=lambda: lambda x: shown(masked, x, torch.linspace(-8, 2, 6), moved=True),
        shapes=((2, 4, 6),),
    ),
)

OPS = (
    Op(name="iqMask", run=run, body=body, real=real, half_up=True, integer=MaskSite, site="iqmask", calls=(masked,)),
)
