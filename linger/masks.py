"""Where gradients pass: masks of one byte per element, made and applied by arithmetic.

On CPUs a bool costs more than all the rest. PyTorch compares slowly; and inductor's loops store bools one by one, at 6 ns each, in
whatever form they were asked for: of a byte and of ``byte != 0``, the partitioner of AOTAutograd may keep either for
backward. So a compiled net on a CPU has no comparison here at all: 1 - byte, as an integer, and bits that are cleared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linger.eager import at_hand, blocks

SAME_SIZE = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def in_bytes(x: Tensor) -> bool:
    """Whether loops over this tensor are inductor's for CPUs."""
    return x.is_cpu and not at_hand(x)


def saturated(v: Tensor, q: Tensor) -> Tensor:
    """1 where v and q = clamp(v) differ, for integers in floats: one byte per element; ``v`` may be overwritten."""
    if at_hand(v):
        return v.ne_(q).to(torch.int8)
    return (v - q).abs().clamp(max=1).to(torch.int8) if in_bytes(v) else v != q


def passed(gradient: Tensor, outside: Tensor) -> Tensor:
    """The gradient, exactly zero where ``outside``, a result of ``saturated``."""
    if in_bytes(gradient):
        return cleared(gradient, outside - 1)
    if not at_hand(gradient):
        return torch.where(outside != 0, 0, gradient)
    out = torch.empty_like(gradient)
    for g, mask, result in blocks(gradient, outside, out):
        torch.ops.aten.hardtanh_backward(g, mask.to(g.dtype), -0.5, 0.5, grad_input=result)
    return out


def cleared(gradient: Tensor, bits: Tensor) -> Tensor:
    """The gradient where the signed bytes ``bits`` are -1, and zero where they are 0, infinite gradients too."""
    kind = SAME_SIZE[gradient.dtype]
    return (gradient.view(kind) & bits.to(kind)).view(gradient.dtype)


def between(x: Tensor, low: float, high: float) -> Tensor:
    """1 where low < x < high, else 0: signed bytes, without a comparison."""
    return ((x - low).sign().clamp(min=0) * (high - x).sign().clamp(min=0)).to(torch.int8)


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = F.relu(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return cleared(grads[0], -ctx.saved_tensors[0].sign().to(torch.int8))


def relu(x: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu``; in a net compiled for the CPU with a gradient that needs no bool."""
    if not (in_bytes(x) and x.requires_grad and torch.is_grad_enabled()):
        return F.relu(x, inplace)
    out: Tensor = _Relu.apply(x)  # type: ignore[no-untyped-call]
    return x.copy_(out) if inplace else out


def relu_(x: Tensor) -> Tensor:
    """``torch.relu_``, as ``relu``."""
    return relu(x, inplace=True)
