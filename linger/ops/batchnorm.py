"""Batch normalization standing alone: one multiplication and one addition per channel.

    alpha = gamma / sqrt(var + eps),   beta' = beta - mean * alpha                                     (1)
    acc = q_x * q_alpha + q_beta',   out = saturate(shift_round(acc, log2(s_x * s_w / s_o)))           (2)

Training normalizes with the batch's mean and biased variance, which are also what the running statistics follow; those of
``nn.SyncBatchNorm`` with the mean and variance of the batches of all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from linger import observe
from linger.numerics import (
    FLOAT32_EXACT,
    bound_parameter,
    levels,
    quantize,
    reach,
)
from linger.observe import recomputing
from linger.ops._base import IntModule, Op, output_bits
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand
from linger.ops._normalize import Normalized
from linger.ops._ranks import averaged, joint
from linger.ops._weighted import NARROW_BIAS, WIDE_BIAS, on_grids, requantize, room_for_sum
from linger.ops._weighted_text import result_text
from linger.rounding import HALF_UP

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


def _statistics(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance: of the batch in training (the running ones follow), else the running ones."""
    training = m.training and observe.watcher() is None
    if not (training or m.running_mean is None):
        return m.running_mean, m.running_var
    dims = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x, dims, correction=0)
    if m.synced and m.training:
        mean, var = joint(mean, var, x.numel() // x.shape[1], m.process_group)
    if training and m.track_running_stats and not recomputing():
        _follow(m, *averaged(mean.detach(), var.detach()) if isinstance(m, IntModule) and not m.synced else (mean, var))
    return mean, var


@torch.no_grad()
def _follow(m: Any, mean: Tensor, var: Tensor) -> None:
    m.num_batches_tracked.add_(1)
    momentum = 1.0 / m.num_batches_tracked.to(mean.dtype) if m.momentum is None else m.momentum
    m.running_mean.copy_(torch.lerp(m.running_mean.to(mean.dtype), mean, momentum))
    m.running_var.copy_(torch.lerp(m.running_var.to(var.dtype), var, momentum))


def _affine(m: Any, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Equation (1) within the bounds."""
    alpha = torch.rsqrt(var + m.eps) if m.weight is None else m.weight * torch.rsqrt(var + m.eps)
    beta = -mean * alpha if m.bias is None else m.bias - mean * alpha
    return bound_parameter(alpha, m.normalize_weight), bound_parameter(beta, m.normalize_bias)


def _channels(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(1, -1, *[1] * (x.dim() - 2))


class _BatchNormInt(IntModule):
    weighted = True
    learns = ("o",)
    op_type = "BatchNorm2dInt"
    synced: ClassVar[bool] = False

    @classmethod
    def refuses(cls, source: Any) -> str:
        return "" if source.running_mean is not None else "track_running_stats=False leaves no statistics to store"

    def forward(self, x: Tensor) -> Tensor:
        x, s_x = self.enter(x)
        w, b, s_w = self.grids(*self.factors(*_statistics(self, x)), s_x)
        finest = s_x * s_w
        if self.out_bits == 32:
            finest = room_for_sum(
                finest, (w.detach().abs() * s_w * reach(self.data_bits) + b.detach().abs() * finest).amax()
            )
        if self.bias_limit() == WIDE_BIAS:
            x, w, b = x.double(), w.double(), b.double()
        return self.leave(torch.addcmul(_channels(b, x), x, _channels(w, x)), finest)

    def bias_limit(self) -> int:
        """How large |q_beta'| may get, in LSB: less where product and bias then always fit a float32."""
        product = reach(self.data_bits) * reach(self.parameter_bits)
        return NARROW_BIAS if self.out_bits == 8 and product + NARROW_BIAS < FLOAT32_EXACT else WIDE_BIAS

    def grids(self, alpha: Tensor, beta: Tensor, s_x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha and beta' on their grids for an input of scale ``s_x``, and the scale of alpha."""
        w, b, s_w = on_grids(alpha, beta, s_x, self.parameter_bits, self.bias_limit())
        assert b is not None
        return w, b, s_w

    @torch.no_grad()
    def derived(self) -> dict[str, Tensor]:
        if self.running_mean is None:
            return super().derived()
        s_w = self.grids(*self.frozen(), self.scale("x", self.data_bits))[2]
        return super().derived() | {"scale_w": s_w, "running_w": levels(self.parameter_bits) / s_w}

    def factors(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Equation (1) in float32, whatever the type of the parameters and statistics."""
        alpha, beta = _affine(self, mean.float(), var.float())
        return alpha.float(), beta.float()

    def frozen(self) -> tuple[Tensor, Tensor]:
        """Equation (1) on the running statistics."""
        return self.factors(self.running_mean, self.running_var)  # type: ignore[arg-type]

    @torch.no_grad()
    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        x = operands[0]
        alpha, beta = self.frozen()
        s_x = torch.tensor(x.scale, device=alpha.device)
        w, b, s_w = self.grids(alpha, beta, s_x)
        params = {"weight": quantize(w, s_w, self.parameter_bits), "bias": quantize(b, s_w * s_x, 32)}
        attrs = {
            "data_bits": x.bits, "parameter_bits": self.parameter_bits, "o_bits": out.bits,
            "scale_x": x.scale, "scale_w": float(s_w), "scale_o": out.scale,
        }  # fmt: skip
        peak = np.abs(params["weight"].astype(np.float64)) * reach(x.bits) + np.abs(params["bias"].astype(np.float64))
        form = f"{'f32' if peak.max() < FLOAT32_EXACT else 'f64'}r{len(out.shape)}"
        form += "" if out.bits == 8 else f"_o{out.bits}"
        op_type = self.op_type or f"BatchNorm{1 if len(out.shape) < 4 else 2}dInt"
        return (
            Lowered(
                op_type=op_type, inputs=(0, "weight", "bias"), attrs=attrs, params=params, bits=out.bits, form=form
            ),
        )


class BatchNorm2dInt(_BatchNormInt, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` in fixed point."""


class BatchNorm1dInt(_BatchNormInt, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` in fixed point."""

    op_type = "BatchNorm1dInt"


class SyncBatchNormInt(_BatchNormInt, _BatchNorm):
    """``torch.nn.SyncBatchNorm`` in fixed point, with inputs of any rank. No subclass of it: that one needs a GPU."""

    op_type = ""
    synced = True


class _NormalizeBatchNorm(Normalized):
    synced: ClassVar[bool] = False

    def forward(self, x: Tensor) -> Tensor:
        alpha, beta = _affine(self, *_statistics(self, x))
        return self.bound_output(x * _channels(alpha, x) + _channels(beta, x))

    def extra_repr(self) -> str:
        return self.bounds_repr()


class NormalizeBatchNorm2d(_NormalizeBatchNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` whose factors and output stay within bounds."""


class NormalizeBatchNorm1d(_NormalizeBatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` whose factors and output stay within bounds."""


class NormalizeSyncBatchNorm(_NormalizeBatchNorm, _BatchNorm):
    """``torch.nn.SyncBatchNorm`` whose factors and output stay within bounds, on every device."""

    synced = True


def run(
    x: np.ndarray,
    w: np.ndarray,
    b: np.ndarray,
    *,
    scale_x: float,
    scale_w: float,
    scale_o: float,
    o_bits: int = 8,
    rounding: str = HALF_UP,
    **_: Any,
) -> np.ndarray:
    """x (N, C, *), w (C), b (C) int32; equation (2)."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    acc = x.astype(np.int64) * w.astype(np.int64).reshape(shape) + b.astype(np.int64).reshape(shape)
    return requantize(acc, scale_x, scale_w, scale_o, o_bits, rounding)


def _channel_shape(rank: int) -> str:
    shape = ", ".join(["1", "-1"] + ["1"] * (rank - 2))
    return f"s = Constant <value = int64[{rank}] {{{shape}}}> ()\n"


def body(form: str, opset: int, rounding: str = HALF_UP) -> tuple[str, str]:
    base, bits = output_bits(form)
    kind, rank = base.split("r")
    double = kind == "f64"
    to = 11 if double else 1
    text = _channel_shape(int(rank))
    text += "".join(f"{n}f = Cast <to: int = {to}> ({n})\n" for n in ("X", "W", "B"))
    text += "Wr = Reshape (Wf, s)\nBr = Reshape (Bf, s)\nP = Mul (Xf, Wr)\n"
    return "X, W, B", text + result_text("Add (P, Br)", double, bits, rounding=rounding)


def real(form: str, opset: int) -> str:
    text = _channel_shape(int(output_bits(form)[0].partition("r")[2]))
    return text + "Wr = Reshape (W, s)\nBr = Reshape (B, s)\nP = Mul (X, Wr)\nY = Add (P, Br)\n"


CASES = (
    Case(name="bn1d", make=lambda: nn.BatchNorm1d(6), shapes=((3, 6, 15),)),
    Case(name="bn1d-2d-input", make=lambda: nn.BatchNorm1d(6), shapes=((9, 6),)),
    Case(name="bn2d", make=lambda: nn.BatchNorm2d(5, eps=1e-2, momentum=0.3), shapes=((2, 5, 7, 6),)),
    Case(name="bn2d-plain", make=lambda: nn.BatchNorm2d(4, affine=False), shapes=((2, 4, 6, 6),)),
)

OPS = (
    Op(name="BatchNorm2dInt", run=run, body=body, real=real, integer=BatchNorm2dInt, floats=(nn.BatchNorm2d,),
       normalized=NormalizeBatchNorm2d, aliases=("QBatchNorm2d",)),
    Op(name="BatchNorm1dInt", run=run, body=body, real=real, integer=BatchNorm1dInt, floats=(nn.BatchNorm1d,),
       normalized=NormalizeBatchNorm1d),
    Op(name="SyncBatchNormInt", run=run, body=body, real=real, integer=SyncBatchNormInt, floats=(nn.SyncBatchNorm,),
       normalized=NormalizeSyncBatchNorm),
)  # fmt: skip
