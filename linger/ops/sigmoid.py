"""Sigmoid: the chip's piecewise-linear function, out at 2^(bits - 1).

    z = sat(rsh(x, log2 s_x - x_fraction)),  o = pwl(z),  out = sat(rsh(o, y_fraction - (bits - 1)))   (1)

``targets/_pwl`` holds the segments. Saturating z first is what keeps sigmoid(20) at 127/128 (``engine`` 9).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linger.ops._base import Op, real_text
from linger.ops._case import Case
from linger.ops._unary import UnarySite, runner, table_body


class SigmoidSite(UnarySite):
    """``torch.sigmoid``"""

    op_type = "iqSigmoid"
    fixed = True

    @staticmethod
    def value(v: Tensor) -> Tensor:  # type: ignore[override]
        return torch.sigmoid(v)

    @staticmethod
    def slope(v: Tensor) -> Tensor:  # type: ignore[override]
        y = torch.sigmoid(v)
        return y * (1 - y)


def value(v: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-v))"""
    return 1 / (1 + np.exp(-v))


run = runner("iqSigmoid", value)

CASES = (
    Case(name="sigmoid", make=lambda: torch.sigmoid, shapes=((2, 60),)),
    Case(name="sigmoid-module", make=lambda: nn.Sigmoid(), shapes=((2, 3, 20),)),
)

OPS = (
    Op(name="iqSigmoid", run=run, body=table_body(run), real=real_text("Y = Sigmoid (X)"), integer=SigmoidSite,
       site="iqsigmoid", calls=(torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.special.expit, torch.sigmoid_, Tensor.sigmoid_),
       aliases=("QSigmoid",), modules=(nn.Sigmoid,)),
)  # fmt: skip
