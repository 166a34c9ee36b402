"""The tasks: a net, its data, and how long it trains in float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy.data import frames, speech, watch
from benchmarks.transformer_accuracy import RowTransformer
from linger.demo import ResidualNet
from linger.demo_data import Split, images


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


class SpeechNet(nn.Module):
    """(N, 40 bands, 39 frames) -> (N, 5): a DS-CNN of Conv1d."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv1d(40, 48, 5, 2, 2, bias=False), nn.BatchNorm1d(48), nn.ReLU()]
        for stride in (1, 2, 1):
            layers += [nn.Conv1d(48, 48, 5, stride, 2, groups=48, bias=False), nn.BatchNorm1d(48), nn.ReLU()]
            layers += [nn.Conv1d(48, 48, 1, bias=False), nn.BatchNorm1d(48), nn.ReLU()]
        self.layers, self.fc = nn.Sequential(*layers), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean(2))


class WatchNet(nn.Module):
    """(N, 64 steps, 6 axes) -> (N, 7): an LSTM of 32 units, and what it says at the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(6, 32, batch_first=True), nn.Linear(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])


class SpeechTransformer(RowTransformer):
    """(N, 39 frames, 40 bands) -> (N, 5): 2 layers of 4 heads of 12 with GELU, learned positions, the mean over frames."""

    def __init__(self) -> None:
        super().__init__(steps=39, features=40, classes=5)


@dataclass(frozen=True, kw_only=True)
class Task:
    """``data`` is given what the user chose; ``epochs`` are those of the float net at the peak learning rate ``rate``.

    ``bound`` is that of outputs in the normalized stage.
    """

    name: str
    about: str
    make: Callable[[], nn.Module]
    data: Callable[[str], Split]
    epochs: int
    rate: float
    bound: float = 8


SPEECH = "seconds of telephone prompts (Debian's asterisk-core-sounds-*-gsm) in five languages, one speaker each"
WATCH = "seven exercises from the sensors of a watch (seglearn); the last quarter of every recording is for testing"
TASKS = {
    t.name: t
    for t in (
        Task(name="residual", about="images", make=ResidualNet, data=images, epochs=12, rate=3e-3),
        Task(name="mobilenet", about="images", make=MobileNet, data=images, epochs=12, rate=6e-3),
        Task(name="speech", about=SPEECH, make=SpeechNet, data=lambda _: speech(), epochs=14, rate=5e-3),
        Task(name="watch", about=WATCH, make=WatchNet, data=lambda _: watch(), epochs=20, rate=5e-3),
        Task(
            name="transformer",
            about=SPEECH,
            make=SpeechTransformer,
            data=lambda _: frames(),
            epochs=12,
            rate=2e-3,
            bound=16,
        ),
    )
}


def data_of(task: Task, data: str, limit: int | None) -> Split:
    """The task's data, at most ``limit`` of it to train on."""
    x, y, test_x, test_y = task.data(data)
    if limit is not None and limit < len(x):  # speech and watch are in the order of their classes
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:limit]
        x, y = x[chosen], y[chosen]
    return x, y, test_x, test_y


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
