"""Five nets for ``linger why``, their files, and runs of them in which single nodes compute something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger import runtime

Arrays = dict[str, np.ndarray]


# --- five nets


class Image(nn.Module):
    """conv-bn-relu twice, a residual sum, flattened into a linear layer: (N, 3, 10, 10)"""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 5 * 5, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(x + self.bn2(self.conv2(x))), 2)
        return self.fc(x.flatten(1))


class Mobile(nn.Module):
    """depthwise and pointwise, channels joined, a strided convolution: (N, 4, 12, 12)"""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.bn = nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1)
        self.down = nn.Conv2d(12, 16, 3, stride=2, padding=1)
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.deep(x)))
        y = torch.cat([self.point(y), x], 1)
        return self.fc(F.avg_pool2d(F.relu(self.down(y)), 2).mean((2, 3)))


class Sound(nn.Module):
    """a gated convolution over time and a linear layer: (N, 6, 40)"""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv1d(6, 12, 5, padding=2), nn.Conv1d(6, 12, 5, padding=2)
        self.norm = nn.BatchNorm1d(12)
        self.fc = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.tanh(self.conv(x)) * torch.sigmoid(self.gate(x)))
        return self.fc(y.transpose(1, 2))


class Words(nn.Module):
    """attention by hand, a normalization and a GELU: (N, 9, 16)"""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.LayerNorm(16)
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        x = self.norm(x + scores.softmax(-1) @ self.value(x))
        return self.fc(F.gelu(x))


class Wide(nn.Module):
    """16-bit activations, sums of one sign that int32 does not hold: (N, 2500)"""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(2500, 24), nn.Linear(24, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.relu(self.two(torch.relu(self.one(x)))))


NETS: dict[str, tuple[type[nn.Module], tuple[int, ...], str]] = {
    "image": (Image, (3, 3, 10, 10), "venus"),
    "mobile": (Mobile, (2, 4, 12, 12), "arcs"),
    "sound": (Sound, (3, 6, 40), "venus"),
    "words": (Words, (3, 9, 16), "venusa"),
    "wide": (Wide, (6, 2500), "venusa"),
}


NORMALIZED = ("image", "mobile", "sound")  # by batch statistics


@dataclass(frozen=True, kw_only=True)
class Made:
    """A net, its file, an input and the tensors of the right run."""

    name: str
    net: nn.Module
    proto: onnx.ModelProto
    x: Tensor
    right: Arrays


@cache
def made(name: str, eps: float = 1e-5) -> Made:
    """The net trained on nothing but random numbers, with statistics that make an eps matter."""
    cls, shape, chip = NETS[name]
    g = torch.Generator().manual_seed(7)
    torch.manual_seed(3)
    net = cls()
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.eps = eps
            m.running_var.copy_(10 ** (-3.5 * torch.rand(m.num_features, generator=g)))
            m.weight.data.copy_(m.running_var.sqrt() * (0.5 + torch.rand(m.num_features, generator=g)))
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            m.bias.data.copy_(torch.randn(m.bias.shape, generator=g) * 0.3)
    x = torch.randn(shape, generator=g)
    if name == "wide":
        x = 1 - x.abs() / 8
        net.one.weight.data.copy_(1 - torch.rand(net.one.weight.shape, generator=g) / 2)
        net.one.weight.data[::2] *= -0.3
    linger.trace_layers(net, net, x)
    bits = 16 if name == "wide" else 8
    linger.init(net, target=chip, limits=False, data_bits=bits, out_bits=bits)
    statistics = {k: v.clone() for k, v in net.state_dict().items() if "running_mean" in k or "running_var" in k}
    net(x)
    net.load_state_dict(statistics, strict=False)
    for key, value in net.state_dict(keep_vars=True).items():
        if key.endswith("running_o"):
            value.mul_(0.6)  # some results saturate
    if eps != 1e-5:  # the ranges of the net with the right eps
        right = made(name).net.state_dict()
        for key, value in net.state_dict(keep_vars=True).items():
            if key.rpartition(".")[2] in ("running_x", "running_o", "running_y"):
                value.copy_(right[key])
    proto = linger.onnx.export(net.eval(), (x,))
    return Made(name=name, net=net, proto=proto, x=x, right=run(proto, x))


def run(proto: onnx.ModelProto, x: Tensor, replaced: dict[str, Callable[..., Any]] | None = None) -> Arrays:
    """Every tensor of a file's run, with other functions for some nodes."""
    model = runtime.from_proto(proto)
    model.steps = [(node, (replaced or {}).get(node.output[0], step)) for node, step in model.steps]
    model(x.numpy())
    stored = {i.name for i in proto.graph.initializer}
    return {k: v for k, v in model.tensors.items() if k not in stored}
