"""Layers on rows and sequences as the same layers on images, for a chip that has only those.

    (N, C, T) -> (N, C, T, 1),   (N, C) -> (N, C, 1, 1),   rows (..., F) -> (1, F, rows, 1)            (1)

Every sum has the same terms, so that the float function stays what it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linger.convert import quant_tensor


class Rewritten(nn.Sequential):
    """Layers in the place of one, under the keys "0", "1", ..."""

    def layers(self) -> list[nn.Module]:
        """The layers, without what keeps the grid of the input."""
        return [layer for key, layer in self._modules.items() if key.isdigit() and layer is not None]

    def on_grid(self, x: Tensor) -> Tensor:
        """In a converted net, what is moved before its first layer goes on a grid first: a chip moves integers only."""
        bits = self.__dict__.get("_linger_bits")
        return x if bits is None else quant_tensor(self, x, "input", bits["data_bits"])


class AsImage(Rewritten):
    """Layers that take an image, on (N, C, T) or (N, C); the result has the rank of the input."""

    def forward(self, x: Tensor) -> Tensor:
        x, axes = self.on_grid(x), 4 - x.dim()
        for _ in range(axes):
            x = x.unsqueeze(-1)
        for layer in self.layers():
            x = layer(x)
        for _ in range(axes):
            x = x.squeeze(-1)
        return x


class RowsAsImage(Rewritten):
    """Layers that take an image, on rows of features (..., F): the rows are the image's height."""

    def forward(self, x: Tensor) -> Tensor:
        x, leading = self.on_grid(x), x.shape[:-1]
        x = x.reshape(-1, x.shape[-1]).transpose(0, 1)
        x = x.reshape(1, x.shape[0], x.shape[1], 1)
        for layer in self.layers():
            x = layer(x)
        x = x.reshape(x.shape[1], x.shape[2]).transpose(0, 1)
        return x.reshape(*leading, x.shape[-1])


def convolution(weight: Tensor, bias: Tensor | None, **options: Any) -> nn.Conv2d:
    """A Conv2d with these parameters; ``options``: stride, padding, dilation, groups, padding_mode."""
    groups = options.get("groups", 1)
    made = nn.Conv2d(
        weight.shape[1] * groups, weight.shape[0], (weight.shape[2], weight.shape[3]), bias=bias is not None,
        device=weight.device, dtype=weight.dtype, **options,
    )  # fmt: skip
    made.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return made


def linear(layer: nn.Linear, bn: nn.BatchNorm1d | None = None) -> nn.Module:
    """Linear, and the batch normalization that alone reads it, as a 1x1 convolution of the rows."""
    conv = convolution(layer.weight[:, :, None, None], layer.bias)
    conv.weight.requires_grad_(layer.weight.requires_grad)
    return RowsAsImage(conv) if bn is None else RowsAsImage(conv, batchnorm(bn))


def conv1d(layer: nn.Conv1d, bn: nn.BatchNorm1d | None = None) -> AsImage:
    """Conv1d, and the batch normalization that alone reads it, with a kernel of width 1."""
    padding: Any = layer.padding if isinstance(layer.padding, str) else (*layer.padding, 0)
    conv = convolution(
        layer.weight[..., None], layer.bias, stride=(*layer.stride, 1), padding=padding, dilation=(*layer.dilation, 1),
        groups=layer.groups, padding_mode=layer.padding_mode,
    )  # fmt: skip
    conv.weight.requires_grad_(layer.weight.requires_grad)
    return AsImage(conv) if bn is None else AsImage(conv, batchnorm(bn))


def conv_transpose1d(layer: nn.ConvTranspose1d) -> AsImage:
    """ConvTranspose1d with a kernel of width 1."""
    options: dict[str, Any] = {n: (*getattr(layer, n), 1) for n in ("kernel_size", "stride", "dilation")}
    options |= {n: (*getattr(layer, n), 0) for n in ("padding", "output_padding")}
    made = nn.ConvTranspose2d(
        layer.in_channels, layer.out_channels, groups=layer.groups, bias=layer.bias is not None, device=layer.weight.device,
        dtype=layer.weight.dtype, **options,
    )  # fmt: skip
    made.weight = nn.Parameter(layer.weight.detach().unsqueeze(-1).clone(), layer.weight.requires_grad)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    return AsImage(made)


def batchnorm(layer: nn.BatchNorm1d) -> nn.BatchNorm2d:
    """A BatchNorm2d with the same parameters and statistics (the same objects)."""
    made = nn.BatchNorm2d(
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
    )  # fmt: skip
    made._parameters, made._buffers = dict(layer._parameters), dict(layer._buffers)
    return made.train(layer.training)


def _one(value: Any) -> int:
    return int(value[0] if isinstance(value, (tuple, list)) else value)


def pool1d(layer: nn.Module) -> nn.Module | None:
    """A pool of a sequence with a window of width 1; None for one that returns where its maxima were."""
    p: Any = layer
    if getattr(p, "return_indices", False):
        return None
    stride = _one(p.kernel_size if p.stride is None else p.stride)
    window = {"kernel_size": (_one(p.kernel_size), 1), "stride": (stride, 1), "padding": (_one(p.padding), 0)}
    if isinstance(layer, nn.MaxPool1d):
        return AsImage(nn.MaxPool2d(**window, dilation=(_one(p.dilation), 1), ceil_mode=p.ceil_mode))  # type: ignore[arg-type]
    return AsImage(nn.AvgPool2d(**window, ceil_mode=p.ceil_mode, count_include_pad=p.count_include_pad))  # type: ignore[arg-type]


def adaptive(layer: nn.Module, sizes: torch.Size) -> nn.Module | None:
    """An adaptive average pool of inputs of these sizes as one with equal windows; None where they are not equal."""
    a: Any = layer
    wanted = a.output_size if isinstance(a.output_size, (tuple, list)) else (a.output_size,) * len(sizes)
    outputs = [size if o is None else int(o) for o, size in zip(wanted, sizes, strict=True)]
    if any(size % o for size, o in zip(sizes, outputs, strict=True)):
        return None
    window = (*(size // o for size, o in zip(sizes, outputs, strict=True)), 1)
    return nn.AvgPool2d((window[0], window[1])) if len(sizes) == 2 else AsImage(nn.AvgPool2d((window[0], 1)))
