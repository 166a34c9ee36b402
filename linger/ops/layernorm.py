"""Layer normalization over the trailing axes, with the chips' integer reciprocal square root: equations of ``_norm``.

The engine's node has no eps: it always adds 1e-5. A layer with another eps keeps it (attribute ``epsilon``, which the
file's function body and ``run`` read); a chip computes such a layer with 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linger.ops._base import Op
from linger.ops._case import Case
from linger.ops._norm import CHIP_EPS, NORMAL, body, real, run_affine, run_rows
from linger.ops._norm_module import Norm, NormalizedNorm, NormInt, NormSite, layer_rows
from linger.targets import known


def layer_norm(shape: Sequence[int], normalized_shape: Sequence[int], eps: float, bits: int) -> Norm:
    """``F.layer_norm`` of a tensor of this shape."""
    rows = layer_rows(shape, normalized_shape, eps, bits, centred=True)
    return Norm(rows=rows, ideal=lambda x, w, b: F.layer_norm(x, rows.affine, w, b, eps))


class LayerNormInt(NormInt, nn.LayerNorm):
    """``torch.nn.LayerNorm`` in fixed point."""

    op_type = "LayerNormInt"

    @property
    def normal_length(self) -> int:  # type: ignore[override]
        return math.prod(self.normalized_shape)

    def norm(self, shape: Sequence[int], bits: int) -> Norm:
        return layer_norm(shape, self.normalized_shape, self.eps, bits)

    def derived(self) -> dict[str, Tensor]:
        o = self.running("o")
        return super().derived() | {"running_normal": torch.zeros_like(o), "scale_normal": torch.full_like(o, NORMAL)}


class NormalizeLayerNorm(NormalizedNorm, nn.LayerNorm):
    """``torch.nn.LayerNorm`` whose weight, bias and output stay within bounds."""

    def norm(self, shape: Sequence[int], bits: int) -> Norm:
        return layer_norm(shape, self.normalized_shape, self.eps, bits)


class LayerNormSite(NormSite):
    """``F.layer_norm`` with parameters of the net or without."""

    op_type = "LayerNormInt"

    @classmethod
    def norm(cls, shape: Sequence[int], bits: int, **call: Any) -> Norm:
        return layer_norm(shape, call["normalized_shape"], call.get("eps", 1e-5), bits)


def run(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, *, scale_x: float, scale_w: float, scale_o: float,
    epsilon: float = CHIP_EPS, platform: str = "venus", o_bits: int = 8, **_: Any,
) -> np.ndarray:  # fmt: skip
    """x normalized over its last w.size elements, of any leading shape; w, b of one shape, b int32 at 2^10 * scale_w."""
    rows = x.reshape(x.size // w.size, w.size)
    bits = known(platform.lower()).normal_bits
    y = run_rows(rows, scale_x=scale_x, eps=epsilon, centred=True, bits=bits)
    return run_affine(y, w.reshape(-1), b.reshape(-1), scale_w, scale_o, o_bits).reshape(x.shape)


NAMES = ("normalized_shape", "weight", "bias", "eps", "cudnn_enable")
CHIPS = ("venus", "arcs", "venusa")

CASES = (
    Case(name="layernorm", make=lambda: nn.LayerNorm(20), shapes=((2, 3, 20),), targets=CHIPS),
    Case(name="layernorm-2-axes", make=lambda: nn.LayerNorm((3, 7), eps=1e-3), shapes=((4, 2, 3, 7),)),
    Case(name="layernorm-3-axes", make=lambda: nn.LayerNorm((2, 3, 4), bias=False), shapes=((5, 2, 3, 4),)),
    Case(name="layernorm-plain", make=lambda: nn.LayerNorm(1030, elementwise_affine=False), shapes=((2, 1030),), targets=CHIPS),
    Case(name="layernorm-function", make=lambda: lambda x: F.layer_norm(x, (12,), eps=0.5), shapes=((2, 5, 12),)),
)  # fmt: skip

OPS = (
    Op(name="LayerNormInt", run=run, body=body, real=real, half_up=True, integer=LayerNormInt, floats=(nn.LayerNorm,),
       normalized=NormalizeLayerNorm, aliases=("QLayerNorm2d",), bias_at=NORMAL),
    Op(name="layer_norm", run=run, body=body, real=real, half_up=True, integer=LayerNormSite, site="iqlayernorm",
       calls=(F.layer_norm, torch.layer_norm), names={F.layer_norm: NAMES, torch.layer_norm: NAMES}),
)  # fmt: skip
