"""Root-mean-square normalization: layer normalization without the mean (``_norm`` with S1 = 0). No chip has a kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from linger.ops._base import Op
from linger.ops._case import Case
from linger.ops._norm import CHIP_EPS, NORMAL, body, real, run_affine, run_rows
from linger.ops._norm_module import Norm, NormalizedNorm, NormInt, NormSite, layer_rows


def rms_norm(shape: Sequence[int], normalized_shape: Sequence[int], eps: float | None, bits: int) -> Norm:
    """``F.rms_norm`` of a tensor of this shape; without an eps, PyTorch takes that of float32."""
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    rows = layer_rows(shape, normalized_shape, eps, bits, centred=False)
    return Norm(rows=rows, ideal=lambda x, w, _: F.rms_norm(x, rows.affine, w, eps))


class RMSNormInt(NormInt, nn.RMSNorm):
    """``torch.nn.RMSNorm`` in fixed point."""

    op_type = "RMSNormInt"

    @property
    def normal_length(self) -> int:  # type: ignore[override]
        return math.prod(self.normalized_shape)

    def norm(self, shape: Sequence[int], bits: int) -> Norm:
        return rms_norm(shape, self.normalized_shape, self.eps, bits)


class NormalizeRMSNorm(NormalizedNorm, nn.RMSNorm):
    """``torch.nn.RMSNorm`` whose weight and output stay within bounds."""

    def norm(self, shape: Sequence[int], bits: int) -> Norm:
        return rms_norm(shape, self.normalized_shape, self.eps, bits)


class RMSNormSite(NormSite):
    """``F.rms_norm`` with a parameter of the net or without."""

    op_type = "RMSNormInt"

    @classmethod
    def norm(cls, shape: Sequence[int], bits: int, **call: Any) -> Norm:
        return rms_norm(shape, call["normalized_shape"], call.get("eps"), bits)


def run(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, *, scale_x: float, scale_w: float, scale_o: float,
    epsilon: float = CHIP_EPS, o_bits: int = 8, **_: Any,
) -> np.ndarray:  # fmt: skip
    """As ``layernorm.run``."""
    rows = x.reshape(x.size // w.size, w.size)
    y = run_rows(rows, scale_x=scale_x, eps=epsilon, centred=False, bits=32)
    return run_affine(y, w, b, scale_w, scale_o, o_bits).reshape(x.shape)


NAMES = ("normalized_shape", "weight", "eps")

CASES = (
    Case(name="rmsnorm", make=lambda: nn.RMSNorm(20), shapes=((2, 3, 20),)),
    Case(name="rmsnorm-2-axes", make=lambda: nn.RMSNorm((3, 7), eps=1e-2), shapes=((4, 2, 3, 7),)),
    Case(name="rmsnorm-function", make=lambda: lambda x: F.rms_norm(x, (12,)), shapes=((2, 5, 12),)),
)

OPS = (
    Op(name="RMSNormInt", run=run, body=body, real=real, half_up=True, integer=RMSNormInt, floats=(nn.RMSNorm,),
       normalized=NormalizeRMSNorm, bias_at=NORMAL),
    Op(name="rms_norm", run=run, body=body, real=real, half_up=True, integer=RMSNormSite, site="iqrmsnorm",
       calls=(F.rms_norm, torch.rms_norm), names={F.rms_norm: NAMES, torch.rms_norm: NAMES}),
)  # fmt: skip
