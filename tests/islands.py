"""Calls without a fixed-point form: the op that is named for them -> functions of gridded tensors with their shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from spellings import MAP, PAIR, ROW, SEQ, Spelling, changed
from torch import Tensor, nn
from torch.nn import functional as F


def assigned(index: Any, value: Callable[[Tensor], Any]) -> Spelling:
    """``x[index] = value(x)``, read afterwards."""

    def function(x: Tensor) -> Tensor:
        y = x.clone()
        y[index] = value(x)
        return y

    return function, MAP


def added_in_part(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1:] += 1
    return x * 2


def masked(x: Tensor) -> Tensor:
    x = x.clone()
    x[x < 0] = 0.25
    return x


def on_maps(layer: nn.Module) -> Spelling:
    """A float layer of torch on a map."""
    return layer, MAP


def weighted(x: Tensor) -> Tensor:
    """Attention without an added mask, with one of truth values, and with a causal one."""
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(x, x, x) + F.scaled_dot_product_attention(x, x, x, mask, is_causal=False)


# fmt: off
ISLANDS: dict[str, list[Spelling]] = {
    "neg": [(lambda x: -x, MAP), (torch.neg, MAP)], "abs": [(abs, MAP), (lambda x: F.pad(x.abs(), (1, 2), mode="circular"), SEQ), (lambda x: x.abs(), MAP), (changed(lambda x: x.abs_()), MAP)],
    "square": [(torch.square, MAP)], "sqrt": [(lambda x: (x * x + 1).sqrt(), MAP)], "rsqrt": [(lambda x: (x * x + 1).rsqrt(), MAP)],
    "exp": [(torch.exp, MAP), (changed(lambda x: x.exp_()), MAP)], "expm1": [(torch.expm1, MAP)], "exp2": [(torch.exp2, MAP)],
    "log": [(lambda x: torch.log(x * x + 1), MAP)], "log1p": [(lambda x: torch.log1p(x * x), MAP)], "log2": [(lambda x: torch.log2(x * x + 1), MAP)],
    "log10": [(lambda x: (x * x + 1).log10(), MAP)], "sin": [(torch.sin, MAP)], "cos": [(torch.cos, MAP)], "atan": [(torch.atan, MAP)],
    "sinh": [(torch.sinh, MAP)], "erf": [(torch.erf, MAP)], "reciprocal": [(lambda x: (x * x + 1).reciprocal(), MAP)],
    "floor": [(torch.floor, MAP)], "ceil": [(torch.ceil, MAP)], "round": [(torch.round, MAP), (lambda x: torch.round(x, decimals=2), MAP)],
    "trunc": [(torch.trunc, MAP)], "frac": [(torch.frac, MAP)], "sign": [(torch.sign, MAP)],
    "pow": [(lambda x: x**2, MAP), (lambda x: torch.pow(x.abs(), 0.5), MAP)], "rpow": [(lambda x: 2**x, MAP)],
    "floordiv": [(lambda x: x // 0.3, MAP)], "rfloordiv": [(lambda x: 2 // (x * x + 1), MAP)], "floor_divide": [(lambda x: torch.floor_divide(x, 0.3), MAP)],
    "remainder": [(lambda x: x % 0.7, MAP)], "fmod": [(lambda x: torch.fmod(x, 0.7), MAP)],
    "div": [(lambda x: torch.div(x, 0.3, rounding_mode="floor"), MAP), (lambda x: x.div(0.3, rounding_mode="trunc"), MAP)],
    "maximum": [(torch.maximum, PAIR)], "minimum": [(torch.minimum, PAIR)], "lerp": [(lambda x, y: torch.lerp(x, y, 0.3), PAIR)],
    "addcmul": [(lambda x, y: torch.addcmul(x, x, y, value=2), PAIR)], "addcdiv": [(lambda x, y: torch.addcdiv(x, x, y * y + 1), PAIR)],
    "clamp": [(lambda x: x.clamp(-1, 1), MAP), (lambda x: torch.clamp(x, min=0), MAP), (lambda x, y: x.clamp(max=y), PAIR), (changed(lambda x: x.clamp_(-1, 1)), MAP)],
    "clamp_min": [(lambda x: x.clamp_min(0), MAP)], "clip": [(lambda x: torch.clip(x, 0, 6), MAP)],
    "where": [(lambda x: torch.where(x > 0, x, x * 0.5), MAP), (lambda x: torch.where(condition=x > 0, input=x, other=0.5), MAP)],
    "masked_fill": [(lambda x: x.masked_fill(x < 0, 0.5), MAP)], "gt": [(lambda x: x > 0, MAP)], "le": [(lambda x: x <= 0.5, MAP)], "ne": [(lambda x: x != 0, MAP)],
    "eq": [(lambda x: (x == 0) & (x < 1) | ~(x > 2), MAP)], "logical_and": [(lambda x: torch.logical_and(x > 0, x < 1), MAP)], "isfinite": [(torch.isfinite, MAP)],
    "setitem": [
        assigned((slice(None), 0), lambda x: 1.5), assigned((slice(None), slice(1, 3)), lambda x: x[:, :2] * 2), assigned((slice(None), -1), lambda x: x[:, 0]),
        assigned((..., slice(2, 4), slice(None, -1)), lambda x: x[..., :2, 1:]), assigned((slice(None), 1, 2), lambda x: x[:, 0, 0]), assigned(slice(None), lambda x: x + 1),
        assigned((slice(None), slice(None), 0), lambda x: torch.arange(8.0)), (added_in_part, MAP), (masked, MAP),
    ],
    "fill": [(lambda x: x + x.clone().fill_(0.5), MAP)], "zero": [(lambda x: x + x.clone().zero_(), MAP)], "copy": [(lambda x, y: x.clone().copy_(y), PAIR)],
    "zeros_like": [(lambda x: torch.cat([x, torch.zeros_like(x)], 1), MAP)], "ones_like": [(lambda x: x + torch.ones_like(x), MAP)],
    "full_like": [(lambda x: x * torch.full_like(x, 0.5), MAP)], "new_zeros": [(lambda x: torch.cat([x, x.new_zeros(x.shape[0], 1, 6, 8)], 1), MAP)],
    "new_full": [(lambda x: torch.cat([x, x.new_full((x.shape[0], 1, 6, 8), 0.5)], 1), MAP)],
    "sum": [(lambda x: x.sum(1, dtype=torch.float64).float(), MAP)], "mean": [(lambda x: x.abs().mean((2, 3)), MAP)], "amax": [(lambda x: x.amax(1), MAP), (lambda x: x.amax((2, 3), True), MAP)],
    "amin": [(lambda x: torch.amin(x, 1), MAP)], "max": [(lambda x: x.max(1), MAP), (lambda x: torch.max(x, dim=-1, keepdim=True).values, MAP), (torch.max, PAIR)],
    "min": [(lambda x: x.min(dim=1)[0], MAP), (torch.min, PAIR)], "argmax": [(lambda x: x.argmax(1), MAP), (lambda x: torch.argmax(x, dim=-1, keepdim=True), MAP)], "argmin": [(lambda x: x.argmin(1), MAP)],
    "prod": [(lambda x: x.prod(1), MAP)], "logsumexp": [(lambda x: torch.logsumexp(x, 1), MAP)], "cumsum": [(lambda x: x.cumsum(1), MAP)], "topk": [(lambda x: x.topk(2, 1)[0], MAP)],
    "sort": [(lambda x: x.sort(1, descending=True)[0], MAP)], "var": [(lambda x: x.var(1), MAP), (lambda x: torch.var(x, (2, 3), correction=0, keepdim=True), MAP)],
    "std": [(lambda x: x.std(1, unbiased=False), MAP)], "norm": [(lambda x: x.norm(dim=1), MAP), (lambda x: torch.norm(x, p=1, dim=1, keepdim=True), MAP)],
    "any": [(lambda x: (x > 1).any(1), MAP)], "all": [(lambda x: (x > -1).all(1), MAP)],
    "identity": [(lambda x: x.int(), MAP), (lambda x: x.half().float(), MAP), (lambda x: x.to(torch.int64).float(), MAP)],
    "matmul": [(lambda x, y: x @ y.transpose(1, 2), PAIR)], "bmm": [(lambda x, y: torch.bmm(x, y.transpose(1, 2)), PAIR)], "einsum": [(lambda x, y: torch.einsum("bij,bkj->bik", x, y), PAIR)],
    "linear": [(lambda x: F.linear(x, torch.ones(3, 12), torch.ones(3)), ROW)], "conv1d": [(lambda x: F.conv1d(x, torch.ones(3, 4, 3), padding="same"), SEQ)],
    "conv2d": [(lambda x: F.conv2d(x, torch.ones(6, 2, 2, 2), torch.ones(6), stride=2, groups=2), MAP)], "conv_transpose2d": [(lambda x: F.conv_transpose2d(x, torch.ones(4, 3, 2, 2), stride=2), MAP)],
    "scaled_dot_product_attention": [(weighted, MAP), (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3), MAP)],
    "embedding": [(lambda x: F.embedding((x[:, 0] > 0).long(), torch.arange(8.0).view(2, 4)), SEQ)], "one_hot": [(lambda x: F.one_hot((x[:, 0] > 0).long(), 3), SEQ)],
    "sigmoid": [(torch.sigmoid, MAP), on_maps(nn.Sigmoid()), (changed(lambda x: x.sigmoid_()), MAP)], "tanh": [on_maps(nn.Tanh())], "softmax": [on_maps(nn.Softmax(1)), (lambda x: F.softmax(x, -1), MAP), (lambda x: x.softmax(dim=2), MAP)],
    "log_softmax": [on_maps(nn.LogSoftmax(1))], "softmin": [on_maps(nn.Softmin(1))], "gelu": [on_maps(nn.GELU()), on_maps(nn.GELU("tanh"))], "silu": [on_maps(nn.SiLU())], "mish": [on_maps(nn.Mish())],
    "hardswish": [on_maps(nn.Hardswish())], "hardsigmoid": [on_maps(nn.Hardsigmoid())], "hardtanh": [on_maps(nn.Hardtanh(-2, 2, inplace=True))], "leaky_relu": [on_maps(nn.LeakyReLU(0.2))], "elu": [on_maps(nn.ELU(0.7))],
    "selu": [on_maps(nn.SELU())], "celu": [on_maps(nn.CELU(0.7))], "prelu": [on_maps(nn.PReLU()), on_maps(nn.PReLU(4, 0.1))], "softplus": [on_maps(nn.Softplus()), on_maps(nn.Softplus(2, 1))], "softsign": [on_maps(nn.Softsign())],
    "glu": [on_maps(nn.GLU(1))], "tanhshrink": [on_maps(nn.Tanhshrink())], "hardshrink": [on_maps(nn.Hardshrink())], "softshrink": [on_maps(nn.Softshrink())], "threshold": [on_maps(nn.Threshold(0.1, 0.2))],
    "log_sigmoid": [on_maps(nn.LogSigmoid())], "rrelu": [on_maps(nn.RReLU())], "layer_norm": [on_maps(nn.LayerNorm(8)), on_maps(nn.LayerNorm((6, 8), elementwise_affine=False))], "group_norm": [on_maps(nn.GroupNorm(2, 4))],
    "instance_norm": [on_maps(nn.InstanceNorm2d(4, affine=True))], "rms_norm": [on_maps(nn.RMSNorm(8))], "local_response_norm": [on_maps(nn.LocalResponseNorm(3)), on_maps(nn.LocalResponseNorm(2, 0.3, 0.5, 2.0))], "normalize": [(lambda x: F.normalize(x, dim=1), MAP)],
    "avg_pool2d": [on_maps(nn.AvgPool2d(3, 2, 1, ceil_mode=True)), on_maps(nn.AvgPool2d(3, 2, 1, count_include_pad=False)), on_maps(nn.AvgPool2d(2, divisor_override=3))], "avg_pool1d": [(nn.AvgPool1d(3, 2, ceil_mode=True), SEQ)],
    "adaptive_avg_pool2d": [(lambda x: F.adaptive_avg_pool2d(x, (4, 5)), MAP)], "adaptive_avg_pool1d": [(lambda x: F.adaptive_avg_pool1d(x, 3), SEQ)], "adaptive_max_pool2d": [on_maps(nn.AdaptiveMaxPool2d((3, 2)))],
    "max_pool2d_with_indices": [on_maps(nn.MaxPool2d(2, return_indices=True))], "interpolate": [on_maps(nn.Upsample(scale_factor=2)), on_maps(nn.Upsample(scale_factor=2, mode="bilinear")), (lambda x: F.interpolate(x, (9, 12)), MAP)],
    "unfold": [on_maps(nn.Unfold(2))], "channel_shuffle": [on_maps(nn.ChannelShuffle(2))], "pad": [(lambda x: F.pad(x, (1, -2), value=1.0), MAP)],
    "tril": [(lambda x: x.tril(), MAP)], "triu": [(lambda x: torch.triu(x, 1), MAP)],
}
# fmt: on
