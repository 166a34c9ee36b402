"""Tanh: the chip's piecewise-linear function, out at 2^(bits - 1).

    z = sat(rsh(x, log2 s_x - x_fraction)),  o = pwl(z),  out = sat(rsh(o, y_fraction - (bits - 1)))   (1)

``targets/_pwl`` holds the segments. Saturating z first is what keeps tanh(20) at 127/128 (``engine`` 9).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linger.ops._base import Op, real_text
from linger.ops._case import Case
from linger.ops._unary import UnarySite, runner, table_body


class TanhSite(UnarySite):
    """``torch.tanh``"""

    op_type = "iqTanh"
    fixed = True

    @staticmethod
    def value(v: Tensor) -> Tensor:  # type: ignore[override]
        return torch.tanh(v)

    @staticmethod
    def slope(v: Tensor) -> Tensor:  # type: ignore[override]
        y = torch.tanh(v)
        return 1 - y * y


def value(v: np.ndarray) -> np.ndarray:
    """tanh(v)"""
    return np.tanh(v)


run = runner("iqTanh", value)

CASES = (
    Case(name="tanh", make=lambda: torch.tanh, shapes=((2, 60),)),
    Case(name="tanh-module", make=lambda: nn.Tanh(), shapes=((2, 3, 20),)),
)

OPS = (
    Op(name="iqTanh", run=run, body=table_body(run), real=real_text("Y = Tanh (X)"), integer=TanhSite,
       site="iqtanh", calls=(torch.tanh, Tensor.tanh, F.tanh, torch.tanh_, Tensor.tanh_),
       aliases=("QTanh",), modules=(nn.Tanh,)),
)  # fmt: skip
