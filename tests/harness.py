"""A case of the op table as a net whose grids the test chooses, and inputs full of ties and limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import linger
from linger.numerics import levels, scale_from_weight
from linger.ops import Case, IntModule, _weighted, bmm, cat, divide, elementwise, pool, reduce
from linger.ops._case import Holder
from linger.ops._site import Site
from linger.targets import known

STEP = 2.0**-5  # of the inputs' grid at 8 bits: they reach +-4


class CaseNet(nn.Module):
    """The case behind inputs that ``quant_tensor`` puts on a grid."""

    def __init__(self, case: Case, bits: int) -> None:
        super().__init__()
        made = case.make()
        self.op = made if isinstance(made, nn.Module) else None
        self.function = made if self.op is None else None
        self.bits = bits

    def forward(self, *inputs: Tensor) -> Any:
        gridded = [linger.quant_tensor(self, x, f"in{i}", bits=self.bits) for i, x in enumerate(inputs)]
        return (self.function if self.op is None else self.op)(*gridded)


def converted(
    case: Case, bits: int = 8, parameter_bits: int = 8, out_bits: int | None = None, target: str = "venus"
) -> CaseNet:
    """The case in fixed point, weights spread over their range, after one training forward."""
    net = CaseNet(case, bits)
    sample = tuple(torch.randn(s) for s in case.shapes)
    linger.trace_layers(net, net, sample)
    width = bits if bits in known(target).data_bits else 8  # of layers; a call has the width of its operands
    linger.init(
        net, parameter_bits=parameter_bits, data_bits=width, out_bits=out_bits or width, target=target, limits=False
    )
    net(*(torch.randn(s) for s in case.shapes))
    place_inputs(net, bits)
    return net.eval()


def place_inputs(net: nn.Module, bits: int) -> None:
    """Input grids of step ``STEP`` at 8 bits and as much finer as there are more bits."""
    for name, module in net.named_children():
        if "iq_tensor_quant" in name:
            module.running("x").fill_(levels(min(bits, 24)) * STEP * 2.0 ** (8 - bits))
            module.forget()


def spread_outputs(net: nn.Module, factor: float) -> list[Tensor]:
    """Scale every output range that was observed; a small factor saturates, a large one shifts far."""
    found = []
    for module in net.modules():
        if isinstance(module, IntModule) and "running_o" in module._buffers:
            module.running("o").mul_(factor)
            module.forget()
            found.append(module.running("o"))
    return found


def keep_batch_statistics(net: nn.Module) -> None:
    """From now on, what a batch normalization stores is exactly what it normalized the last batch with."""
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 1.0


def inputs(case: Case, bits: int, batch: int, seed: int) -> tuple[Tensor, ...]:
    """Values on the grid, half a step off it (exact ties of the input's own rounding), at both limits and beyond."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for i, shape in enumerate(case.shapes):
        size = (batch, *shape[1:])
        top = 2 ** (min(bits, 16) - 1)
        q = torch.randint(-top - 2, top + 2, size, generator=g).double()
        coarse = 2 ** torch.randint(0, min(bits, 16) - 1, size, generator=g)
        q = torch.where(torch.rand(size, generator=g) < 0.5, (q / coarse).round() * coarse, q)
        q = q + torch.randint(0, 2, size, generator=g) / 2
        if case.divisor and i == len(case.shapes) - 1:
            q = torch.where(q.abs() < 1, 3.0, q)
        made.append((q * STEP * 2.0 ** (8 - bits) if bits <= 16 else q * STEP * 2.0**-8).float())
    return tuple(made)


def parameters_of(net: nn.Module, module: Any) -> tuple[Any, Any]:
    """Weight and bias of a layer, or of the case's function whose one weighted call this is."""
    if not isinstance(module, Site):
        return module.weight, getattr(module, "bias", None)
    (holder,) = (m for m in net.modules() if isinstance(m, Holder))
    weight = max(holder.parameters(), key=Tensor.dim)
    return weight, next((p for p in holder.parameters() if p is not weight), None)


@torch.no_grad()
def choose_shifts(net: nn.Module) -> tuple[int, tuple[float, ...]]:
    """Output grids (and biases and means) behind which many accumulators are ties.

    Returns:
        j and densities for ``tied_inputs``.
    """
    j, densities = 0, (0.75, 0.5)
    for module in net.modules():
        if isinstance(module, IntModule) and "running_o" in module._buffers:
            scale = 0.5 / STEP  # of sums and joins: a shift by one
            if isinstance(module, (elementwise.MulSite, divide.DivSite, bmm.BmmSite)):
                j, scale = (0 if isinstance(module, divide.DivSite) else 3), 2.0**3
                densities = (0.4, 0.2) if isinstance(module, bmm.BmmSite) else densities
            elif module.weighted:
                weight, bias = parameters_of(net, module)
                terms = math.prod(weight.shape[1:]) if weight is not None else 1
                j, densities = 5, (min(1.0, 4 / terms), min(1.0, 2 / terms))
                if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                    module.running_mean.zero_()
                called = isinstance(module, Site)
                lsb = float(scale_from_weight(weight, 8) if called else module.derived()["scale_w"]) / STEP
                if bias is not None:
                    bias.copy_((bias * lsb / 2**6).round() * 2**6 / lsb)
                scale = lsb / 2**6
            module.running("o").fill_(levels(8) / scale)
            module.forget()
    return j, densities


def tied_inputs(case: Case, batch: int, seed: int, j: int, densities: tuple[float, ...]) -> tuple[Tensor, ...]:
    """8-bit values on the grid, zero but for such a part of them: of most samples odd multiples of 2^j.

    A divisor is a power of two, there 2^(j + 4).
    """
    g = torch.Generator().manual_seed(seed)
    chosen = torch.rand(batch, generator=g) < 0.75
    made = []
    for i, shape in enumerate(case.shapes):
        size, flat = (batch, *shape[1:]), (batch, *[1] * (len(shape) - 1))
        forced, divisor = chosen.reshape(flat), case.divisor and i == len(case.shapes) - 1
        power = torch.where(forced, j + 4 * divisor, torch.randint(0, 7, flat, generator=g))
        q = torch.randint(-128, 128, size, generator=g) >> power | forced
        kept = torch.tensor(densities)[torch.randint(0, len(densities), flat, generator=g)]
        q = torch.where(torch.rand(size, generator=g) < kept, q, 0) << power
        made.append(torch.where(q < 0, -1, 1) * 2.0**power * STEP if divisor else q * STEP)
    return tuple(made)


class Ties:
    """How many roundings of the runtime (of PyTorch, for pools and means) had a tie that did not saturate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for module in (_weighted, elementwise, reduce, cat):
            monkeypatch.setattr(module, "shift_round", self.watch(module.shift_round, self.of_shift))
        monkeypatch.setattr(divide, "divide_half_up", self.watch(divide.divide_half_up, self.of_quotient))
        for module in (pool, reduce):
            monkeypatch.setattr(module, "divided", self.watch(module.divided, self.of_quotient))

    def watch(self, function: Callable[..., Any], tied: Callable[[Any, Any], Any]) -> Callable[..., Any]:
        def watched(v: Any, n: Any, *more: Any) -> Any:
            out = function(v, n, *more)
            self.count += int((tied(v, n) & (out >= -128) & (out <= 127)).sum())
            return out

        return watched

    @staticmethod
    def of_shift(v: np.ndarray, n: int) -> Any:
        return v.astype(np.int64) & ((1 << n) - 1) == 1 << (n - 1) if n > 0 else np.zeros(v.shape, bool)

    @staticmethod
    def of_quotient(v: Any, d: Any) -> Any:
        return (2 * v) % (2 * d) == d
