"""Three small nets after calibration, each with two batches: what reports are tested on."""

from __future__ import annotations

from typing import Any

import torch
from attention_nets import Encoder
from torch import Tensor, nn
from torch.nn import functional as F

import linger

Batches = list[tuple[Tensor, Tensor]]


class Conv(nn.Module):
    """(N, 1, 12, 12) -> (N, 4): a way around, a pool, a call in float between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.first(x)))
        x = F.max_pool2d(x + F.relu(self.body(x)), 2)
        return self.fc(torch.atan(x).flatten(1))


class Lstm(nn.Module):
    """(N, 9, 8) -> (N, 4)"""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(8, 8, bidirectional=True, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0].mean(1))


NETS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "conv": (Conv, (1, 12, 12)), "lstm": (Lstm, (9, 8)), "transformer": (Encoder, (24, 28)),
}  # fmt: skip


def ready(name: str, **bits: Any) -> tuple[nn.Module, Batches]:
    """The net in fixed point, calibrated, in eval mode, and its batches of inputs and labels."""
    torch.manual_seed(0)
    make, shape = NETS[name]
    net = make()
    batches = [(torch.randn(5, *shape), torch.randint(4, (5,))) for _ in range(2)]
    linger.trace_layers(net, net, batches[0][0])
    linger.init(net, **bits)
    linger.calibrate(net, batches, progress=False)
    return net.eval(), batches


def accuracy(out: Tensor, batch: tuple[Tensor, Tensor]) -> float:
    """Percent right."""
    return 100 * float((out.argmax(1) == batch[1]).float().mean())
