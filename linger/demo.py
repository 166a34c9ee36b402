"""``linger demo``: a residual network on real images, float -> normalized -> fixed point -> ONNX, compared everywhere."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from linger import onnx
from linger.convert import init
from linger.demo_data import Split, images
from linger.errors import LingerError
from linger.fuse import trace_layers
from linger.normalize import normalize_layers
from linger.targets import target as find_target
from linger.verify import LEVELS, Report, verify
from linger.weights import write_weights

BATCH = 100
IMAGES = 28_000  # seen in the float stage by default: 7 epochs of MNIST-5k
LEARNING_RATES = {"float": 3e-3, "normalized": 1e-3, "fixed point": 5e-4}
WEIGHT_BITS = (8, 4)
GOLDEN = 2  # test images that the files hold, with their logits


class Residual(nn.Module):
    """Two convolutions and the way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class ResidualNet(nn.Module):
    """Images (N, 1, 28, 28) to 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 12, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.block1 = Residual(12)
        self.down = nn.Conv2d(12, 24, 3, stride=2, padding=1, bias=False)
        self.down_bn = nn.BatchNorm2d(24)
        self.block2 = Residual(24)
        self.fc = nn.Linear(24 * 7 * 7, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(F.relu(self.bn(self.conv(x))))
        x = self.block2(F.relu(self.down_bn(self.down(x))))
        n, c, h, w = x.shape
        return self.fc(x.view((n, c * h * w)))


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the table: accuracies of the three stages in percent, and the file."""

    weight_bits: int
    accuracy: dict[str, float]
    path: Path
    report: Report


def train(net: nn.Module, data: Split, epochs: int, stage: str, progress: Progress) -> float:
    """Train ``net`` in place and return its test accuracy in percent."""
    x, y, test_x, test_y = data
    steps = epochs * (len(x) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATES[stage], weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATES[stage], total_steps=max(steps, 2))
    task = progress.add_task(stage, total=steps)
    generator = torch.Generator().manual_seed(0)
    net.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator)[: len(x) // BATCH * BATCH].view(-1, BATCH):
            loss = F.cross_entropy(net(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.advance(task)
    net.eval()
    with torch.no_grad():
        right = sum(
            int((net(a).argmax(1) == b).sum()) for a, b in zip(test_x.split(500), test_y.split(500), strict=True)
        )
    return 100 * right / len(test_y)


def run(data: str, epochs: int | None, out: Path, target: str, console: Console) -> list[Result]:
    """Train the three stages, export with 8- and 4-bit weights, compare over the whole test set, print the table.

    Args:
        data: "mnist", "fashion" or a directory of idx files.
        epochs: passes over the training images of the float stage, by default as many as ``IMAGES`` asks for; the other
            stages take half as many.
        out: directory for ``model.onnx`` (8-bit weights) and ``model-4bit.onnx``, which verify themselves, and the
            checkpoints beside them.
        target: the chip, see ``linger.targets``.
        console: where to print.

    Raises:
        LingerError: the data or the target does not exist, or the directory cannot be made.
    """
    find_target(target)
    split = images(data)
    epochs = epochs or max(1, round(IMAGES / len(split[0])))
    test_x = split[2]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LingerError(f"demo: cannot make the directory {str(out)!r} ({error.strerror}); name another") from None
    torch.manual_seed(0)
    net = ResidualNet()
    later = max(1, epochs // 2)
    accuracy: dict[str, float] = {}
    results: list[Result] = []
    columns = (
        TextColumn("{task.description:>22}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        accuracy["float"] = train(net, split, epochs, "float", progress)
        trace_layers(net, net, test_x[:1])
        normalize_layers(net, normalize_weight_value=8, normalize_bias_value=8, normalize_output_value=8)
        accuracy["normalized"] = train(net, split, later, "normalized", progress)
        for bits in WEIGHT_BITS:
            fixed = init(copy.deepcopy(net), parameter_bits=bits, target=target)
            fixed_accuracy = train(fixed, split, later, "fixed point", progress)
            path = out / ("model.onnx" if bits == 8 else f"model-{bits}bit.onnx")
            onnx.export(
                fixed, (test_x[:1],), path, input_names=["image"], output_names=["logits"], target=target,
                dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}}, golden=(test_x[:GOLDEN],),
            )  # fmt: skip
            write_weights(fixed, path.with_suffix(".safetensors"))
            task = progress.add_task(f"verify, {bits}-bit weights", total=1)
            report = verify(fixed, path, test_x, quiet=True)
            progress.advance(task)
            results.append(
                Result(weight_bits=bits, accuracy=accuracy | {"fixed point": fixed_accuracy}, path=path, report=report)
            )
    console.print(table(results, data, target))
    console.print(
        f"Integers compared: {results[0].report.elements:,} outputs on {len(test_x):,} test images. Files: {out}"
    )
    return results


def table(results: list[Result], data: str, target: str) -> Table:
    """What the demo prints."""
    made = Table(title=f"{data}, target {target}")
    made.add_column("")
    for r in results:
        made.add_column(f"{r.weight_bits}-bit weights", justify="right")
    for stage in LEARNING_RATES:
        made.add_row(f"accuracy, {stage}", *(f"{r.accuracy[stage]:.2f} %" for r in results))
    made.add_row("file size", *(f"{r.path.stat().st_size / 1024:.1f} KiB" for r in results), end_section=True)
    for name in ("runtime", *LEVELS):
        runner = "linger.runtime" if name == "runtime" else f"ONNX Runtime, {name}"
        made.add_row(f"differing integers, {runner}", *(str(r.report.differing[name]) for r in results))
    return made
