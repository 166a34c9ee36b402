"""Layers that are too large as sums, concatenations and chains of smaller ones.

A kernel of k taps is the sum of kernels of k_b taps at offsets o. For an input padded by p, the part reads it padded by
p - o in front and p - (k - o - k_b) behind; padded alike on both sides it makes outputs too many, which are cut off.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linger.fit._images import Rewritten, convolution

MOST_PARTS = 4  # of one axis: 16 convolutions in the place of one are no way out


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of one axis of a kernel.

    ``offset`` and ``size`` of its taps; ``cut`` elements of the input are skipped, then ``pad`` are added on both sides,
    and the first ``lead`` outputs are dropped.
    """

    offset: int
    size: int
    cut: int
    pad: int
    lead: int


def parts_of(kernel: int, stride: int, pad: int, largest: int, most_pad: int) -> list[Part] | None:
    """The fewest pieces of one axis, as equal as can be; None where the pads of all of them would be too large."""
    fewest = -(-kernel // max(largest, 1))
    if fewest > MOST_PARTS:
        return None
    for count in (fewest, fewest + 1):
        sizes = [s for s in itertools.product(range(1, largest + 1), repeat=count) if sum(s) == kernel]
        for each in sorted(sizes, key=lambda s: (max(s) - min(s), s[::-1])):
            made = [_part(sum(each[:i]), size, kernel, stride, pad) for i, size in enumerate(each)]
            if all(p.pad <= min(p.size, most_pad) and p.size >= stride for p in made):
                return made
    return None


def _part(offset: int, size: int, kernel: int, stride: int, pad: int) -> Part:
    """The piece at ``offset``, with as many outputs to drop as its pads make too many."""
    front, behind = pad - offset, pad - (kernel - offset - size)
    begin = max(front, 0)
    lead = -(-max(behind - begin, 0) // stride)
    return Part(offset=offset, size=size, cut=max(-front, 0), pad=begin + lead * stride, lead=lead)


class KernelParts(Rewritten):
    """A convolution as the sum of convolutions with parts of its kernel."""

    def __init__(self, layer: nn.Conv2d, rows: list[Part], columns: list[Part]) -> None:
        super().__init__()
        self.stride, self.padding, self.kernel = layer.stride, _pair(layer.padding), layer.kernel_size
        self.parts = [(r, c) for r in rows for c in columns]
        for i, (r, c) in enumerate(self.parts):
            weight = layer.weight[:, :, r.offset : r.offset + r.size, c.offset : c.offset + c.size]
            bias = layer.bias if i == 0 else None
            conv = convolution(weight, bias, stride=layer.stride, padding=(r.pad, c.pad), groups=layer.groups)
            conv.weight.requires_grad_(layer.weight.requires_grad)
            self.append(conv)

    def forward(self, x: Tensor) -> Tensor:
        height, width = (
            (size + 2 * p - k) // s + 1
            for size, p, k, s in zip(x.shape[2:], self.padding, self.kernel, self.stride, strict=True)
        )
        x = self.on_grid(x)
        total: Any = None
        for conv, (r, c) in zip(self.layers(), self.parts, strict=True):
            part = conv(x[:, :, r.cut :, c.cut :])[:, :, r.lead : r.lead + height, c.lead : c.lead + width]
            total = part if total is None else total + part
        return total


def kernel_parts(layer: nn.Conv2d, largest: int, most_pad: int) -> nn.Module | None:
    """A convolution whose kernel is too large as a sum; None where the chip could not run the parts either."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or set(layer.dilation) != {1}:
        return None
    axes = [
        parts_of(k, s, int(p), largest, most_pad)
        for k, s, p in zip(layer.kernel_size, layer.stride, layer.padding, strict=True)
    ]
    return KernelParts(layer, axes[0], axes[1]) if axes[0] and axes[1] else None


def widened(layer: nn.Conv2d, largest: int, most_pad: int) -> nn.Module | None:
    """A convolution whose stride is larger than its kernel, with zeros around the kernel; None where that is too large.

    The zeros are weights like all others: training may use them.
    """
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or set(layer.dilation) != {1}:
        return None
    rings = [-(-max(s - k, 0) // 2) for s, k in zip(layer.stride, layer.kernel_size, strict=True)]
    kernel = [k + 2 * r for k, r in zip(layer.kernel_size, rings, strict=True)]
    pads = [p + r for p, r in zip(_pair(layer.padding), rings, strict=True)]
    if max(kernel) > largest or any(p > min(k, most_pad) for p, k in zip(pads, kernel, strict=True)):
        return None
    weight = F.pad(layer.weight.detach(), (rings[1], rings[1], rings[0], rings[0]))
    made = convolution(weight, layer.bias, stride=layer.stride, padding=tuple(pads), groups=layer.groups)
    made.weight.requires_grad_(layer.weight.requires_grad)
    return made


class GroupParts(Rewritten):
    """A transposed convolution in groups as one per group, on its part of the channels."""

    def __init__(self, layer: nn.ConvTranspose2d) -> None:
        super().__init__()
        outputs = layer.out_channels // layer.groups
        for i, weight in enumerate(layer.weight.chunk(layer.groups)):
            options: dict[str, Any] = {
                n: getattr(layer, n) for n in ("stride", "padding", "output_padding", "dilation")
            }
            made = nn.ConvTranspose2d(
                weight.shape[0], outputs, layer.kernel_size, bias=layer.bias is not None, device=weight.device,  # type: ignore[arg-type]
                dtype=weight.dtype, **options,
            )  # fmt: skip
            made.weight = nn.Parameter(weight.detach().clone(), layer.weight.requires_grad)
            if layer.bias is not None:
                bias = layer.bias.detach()[i * outputs : (i + 1) * outputs].clone()
                made.bias = nn.Parameter(bias, layer.bias.requires_grad)
            self.append(made)

    def forward(self, x: Tensor) -> Tensor:
        layers = self.layers()
        parts = self.on_grid(x).chunk(len(layers), 1)
        return torch.cat([conv(part) for conv, part in zip(layers, parts, strict=True)], 1)


def two_pools(layer: nn.Module, allowed: Any) -> nn.Module | None:
    """A pool over windows side by side as one of a part of the window and one of the rest; None where no two are allowed."""
    p: Any = layer
    if getattr(p, "return_indices", False) or getattr(p, "divisor_override", None):
        return None
    kernel, stride, padding = (_pair(v) for v in (p.kernel_size, p.stride or p.kernel_size, p.padding))
    if kernel != stride or any(padding) or p.ceil_mode or _pair(getattr(p, "dilation", 1)) != (1, 1):
        return None
    first = [next((d for d in range(k, 0, -1) if k % d == 0 and allowed(d) and allowed(k // d)), 0) for k in kernel]
    if not all(first):
        return None
    rest = tuple(k // d for k, d in zip(kernel, first, strict=True))
    return nn.Sequential(type(layer)(tuple(first)), type(layer)(rest))


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, (tuple, list)) else (int(value), int(value))
