"""A case of the op table as a net whose grids the test chooses, and inputs full of ties and limits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import linger
from linger.numerics import levels
from linger.ops import Case, IntModule

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
        return (self.op or self.function)(*gridded)


def converted(
    case: Case, bits: int = 8, parameter_bits: int = 8, out_bits: int | None = None, target: str = "venus"
) -> CaseNet:
    """The case in fixed point, weights spread over their range, after one training forward.

    Where the chip has no layers of ``bits`` bits, only the inputs are of that width.
    """
    net = CaseNet(case, bits)
    sample = tuple(torch.randn(s) for s in case.shapes)
    linger.trace_layers(net, net, sample)
    data_bits = bits if bits in linger.targets.target(target).data_bits else 8
    linger.init(net, parameter_bits=parameter_bits, data_bits=data_bits, out_bits=out_bits or data_bits, target=target)
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
