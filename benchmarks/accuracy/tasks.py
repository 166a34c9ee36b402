"""The tasks: a net, its data, and how long it trains in float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.transformer_accuracy import RowTransformer
from linger.demo import ResidualNet
from linger.demo_data import FASHION, Split, images


class Separable(nn.Module):
    """Depthwise 3x3 and pointwise 1x1, each with its batch normalization."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.depth_bn = nn.BatchNorm2d(inputs)
        self.point = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.point_bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.point_bn(self.point(F.relu(self.depth_bn(self.depth(x))))))


class MobileNet(nn.Module):
    """(N, 1, 28, 28) -> (N, 10): MobileNetV1 in small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        shapes = ((16, 24, 1), (24, 32, 2), (32, 48, 1), (48, 64, 2))
        self.blocks = nn.Sequential(*(Separable(*shape) for shape in shapes))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem_bn(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class SeriesNet(nn.Module):
    """(N, 28, 28) -> (N, 10): a DS-CNN over 28 time steps of 28 channels."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv1d(28, 48, 5, padding=2, bias=False), nn.BatchNorm1d(48), nn.ReLU()]
        for stride in (2, 1, 2):
            layers += [nn.Conv1d(48, 48, 5, stride, 2, groups=48, bias=False), nn.BatchNorm1d(48), nn.ReLU()]
            layers += [nn.Conv1d(48, 48, 1, bias=False), nn.BatchNorm1d(48), nn.ReLU()]
        self.layers, self.fc = nn.Sequential(*layers), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean(2))


@dataclass(frozen=True, kw_only=True)
class Task:
    """``epochs`` are those of the float net at the peak learning rate ``rate``; ``bound``: of outputs in the normalized stage."""

    name: str
    make: Callable[[], nn.Module]
    epochs: int
    rate: float
    rows: bool = False
    bound: float = 8


TASKS = {
    t.name: t
    for t in (
        Task(name="residual", make=ResidualNet, epochs=10, rate=3e-3),
        Task(name="mobilenet", make=MobileNet, epochs=16, rate=6e-3),
        Task(name="series", make=SeriesNet, epochs=16, rate=5e-3, rows=True),
        Task(name="transformer", make=RowTransformer, epochs=16, rate=2e-3, rows=True, bound=16),
    )
}


def data_of(task: Task, data: str, limit: int | None) -> Split:
    """The task's images, or their rows as series; at most ``limit`` to train on."""
    x, y, test_x, test_y = images(data)
    if task.rows:
        x, test_x = x.squeeze(1), test_x.squeeze(1)
    return x[:limit], y[:limit], test_x, test_y


def batches(data: Split, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """One epoch of training batches in an order of its own."""
    x, y = data[:2]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return [(x[i], y[i]) for i in order[: len(x) // size * size].view(-1, size)]


def accuracy(net: nn.Module, data: Split) -> float:
    """Percent right on the test set."""
    net.eval()
    with torch.no_grad():
        right = sum(
            int((net(a).argmax(1) == b).sum()) for a, b in zip(data[2].split(500), data[3].split(500), strict=True)
        )
    return 100 * right / len(data[3])


def fashion_is_there() -> bool:
    """Whether the larger set of images is installed."""
    return FASHION.is_dir()
