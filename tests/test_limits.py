"""The largest number that every limit allows and the smallest that it refuses, through ``linger.check`` on a small net."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import linger
from linger.check._words import WAYS
from linger.targets import TARGETS, known
from linger.targets._limits import KINDS
from linger.targets._measures import CONDITIONS, MEASURES
from linger.targets._words import SAID

Made = tuple[nn.Module, tuple[int, ...]]
Make = Callable[[int], Made]


def conv(channels: int = 8, size: int = 16, outputs: int = 4, batch: int = 1, kernel: Any = 3, **options: Any) -> Made:
    return nn.Conv2d(channels, outputs, kernel, **options), (batch, channels, size, size)


def conv1d(
    channels: int = 8, length: int = 16, outputs: int = 4, batch: int = 1, kernel: int = 3, **options: Any
) -> Made:
    return nn.Conv1d(channels, outputs, kernel, **options), (batch, channels, length)


def deconv(kernel: int = 3, batch: int = 1, **options: Any) -> Made:
    return nn.ConvTranspose2d(8, 4, kernel, **options), (batch, 8, 12, 12)


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any], bits: int = 8) -> None:
        super().__init__()
        self.function, self.bits = function, bits

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(linger.quant_tensor(self, x, "x", bits=self.bits))


def call(function: Callable[..., Any], *shape: int, bits: int = 8) -> Made:
    return Call(function, bits), shape


def pool(rank: int) -> Made:
    pools = {3: lambda x: F.max_pool1d(x, 2), 4: lambda x: F.max_pool2d(x, 2)}
    return call(pools[rank], *(1, 8, 16, 16)[:rank])


ALL, SECOND = ("venus", "arcs", "venusa"), ("arcs", "venusa")
ROWS: tuple[tuple[str, tuple[str, ...], Make, int, int, str], ...] = (
    # what, chips, net of a number, the largest that passes, the smallest that fails, kind: the figures of engine 4
    ("conv kernel", ALL, lambda n: conv(kernel=n), 5, 6, "error"),
    ("conv kernel height", ALL, lambda n: conv(kernel=(n, 1)), 5, 6, "error"),
    ("dilated conv kernel", SECOND, lambda n: conv(kernel=n, dilation=2, size=32), 12, 13, "error"),
    ("conv stride", ALL, lambda n: conv(kernel=5, stride=n), 2, 3, "error"),
    ("conv stride, large", ALL, lambda n: conv(kernel=5, stride=n), 4, 5, "error"),
    ("conv pad", ("venus",), lambda n: conv(kernel=5, padding=n), 4, 5, "error"),
    ("conv pad", SECOND, lambda n: conv(kernel=12, dilation=2, padding=n, size=32), 11, 12, "error"),
    ("conv pad over kernel", ALL, lambda n: conv(kernel=3, padding=n), 3, 4, "error"),
    ("conv dilation", ("venus",), lambda n: conv(dilation=n), 1, 2, "error"),
    ("conv dilation", SECOND, lambda n: conv(dilation=n, size=40), 8, 9, "error"),
    ("conv dilation between", SECOND, lambda n: conv(dilation=n), 2, 3, "error"),
    ("conv kernel under stride", ALL, lambda n: conv(kernel=2, stride=n), 2, 4, "error"),
    ("conv batch", SECOND, lambda n: conv(batch=n), 1, 2, "wrong"),
    ("conv groups", ALL, lambda n: conv(groups=n), 1, 2, "split"),
    ("conv rows", ("venus",), lambda n: conv(channels=8 * n, size=64, kernel=(4, 1)), 32, 33, "error"),
    ("conv rows", ("arcs",), lambda n: conv(channels=8 * n, size=64, kernel=(4, 1)), 8, 9, "error"),
    ("conv rows", ("venusa",), lambda n: conv(channels=8 * n, size=64, kernel=(4, 1)), 32, 33, "error"),
    ("depthwise rows", ("venusa",), lambda n: conv(4 * n, 64, 4 * n, kernel=(4, 1), groups=4 * n), 32, 33, "error"),
    ("conv weights", ("venus",), lambda n: conv(64, 4, n, kernel=1), 512, 513, "split"),
    ("depthwise weights", ("venus",), lambda n: conv(16 * n, 5, 16 * n, kernel=5, groups=16 * n), 81, 82, "error"),
    ("depthwise weights", ("arcs",), lambda n: conv(8 * n, 5, 8 * n, kernel=(5, 1), groups=8 * n), 204, 205, "error"),
    ("weights and input", ("venus",), lambda n: conv(64, n, 2048, kernel=1), 32, 33, "error"),
    ("conv1d kernel", ("venus",), lambda n: conv1d(kernel=n), 5, 6, "error"),
    ("conv1d kernel", ("arcs",), lambda n: conv1d(kernel=n), 12, 13, "error"),
    ("conv1d pad", ("venus",), lambda n: conv1d(kernel=5, padding=n), 4, 5, "error"),
    ("conv1d pad", ("arcs",), lambda n: conv1d(kernel=12, padding=n), 11, 12, "error"),
    ("conv1d depthwise", ("arcs", "venus"), lambda n: conv1d(outputs=8, groups=n), 1, 8, "wrong"),
    ("deconv kernel", ("venus",), lambda n: deconv(n), 5, 6, "error"),
    ("deconv kernel", SECOND, lambda n: deconv(n), 12, 13, "error"),
    ("deconv stride", ALL, lambda n: deconv(5, stride=n), 4, 5, "error"),
    ("deconv dilation", ALL, lambda n: deconv(dilation=n), 1, 2, "error"),
    ("deconv groups", ALL, lambda n: deconv(groups=n), 1, 2, "error"),
    ("linear left matrix", ALL, lambda n: (nn.Linear(1024, 4), (1, n, 1024)), 64, 65, "error"),
    ("linear dimensions", ALL, lambda n: (nn.Linear(8, 4), (1,) * (n - 1) + (8,)), 3, 4, "error"),
    ("linear rows", ("venusa",), lambda n: (nn.Linear(8, 4), (n, 8)), 1, 2, "wrong"),
    ("bmm right matrix", ("venus",), lambda n: call(lambda x: x @ x.transpose(1, 2), 1, 128, 8 * n), 32, 33, "error"),
    ("softmax axis", ALL, lambda n: call(lambda x: x.softmax(-1), 1, n), 2048, 2049, "error"),
    ("softmax axis, flat", ALL, lambda n: call(lambda x: x.softmax(-1), 1, n), 256, 257, "warning"),
    ("log_softmax axis", ("arcs",), lambda n: call(lambda x: x.log_softmax(-1), 1, n), 1024, 1025, "wrong"),
    ("pool dimensions", ALL, lambda n: pool(n), 4, 3, "error"),
    ("pool bits", ALL, lambda n: call(lambda x: F.max_pool2d(x, 2), 1, 8, 8, 8, bits=n), 8, 16, "error"),
    ("pool stride", ALL, lambda n: call(lambda x: F.max_pool2d(x, 2, n), 1, 8, 8, 8), 2, 3, "error"),
    ("transpose", ALL, lambda n: call(lambda x: x.transpose(1, 2), 1, 256, n), 256, 257, "error"),
    ("add bits", ("venus",), lambda n: call(lambda x: x + x, 1, 8, bits=n), 8, 16, "error"),
    ("layernorm", ALL, lambda n: (nn.LayerNorm(n), (1, 4, n)), 362, 363, "wrong"),
    ("slice", ALL, lambda n: call(lambda x: x[:, ::n], 1, 8, 8), 1, 2, "wrong"),
    ("pad", ("venus",), lambda n: call(lambda x: F.pad(x, (1, 1), "constant" if n else "reflect"), 1, 8, 8), 1, 0, "wrong"),
    ("reversed axes", ALL, lambda n: call(lambda x: x.permute((0, 3, 2, 1) if n else (3, 2, 1, 0)), 1, 4, 5, 6), 1, 0, "error"),
    ("swapped rows", ("venusa",), lambda n: call(lambda x: x.permute((0, 2, 3, 1) if n else (0, 2, 1, 3)), 1, 4, 5, 6), 1, 0, "wrong"),
    ("add of a column", ALL, lambda n: call(lambda x: x + x[:, :, :n], 1, 4, 5), 5, 1, "wrong"),
    ("mul of a column", ALL, lambda n: call(lambda x: x * x[:, :, :n], 1, 4, 5), 5, 1, "wrong"),
    ("mul bits", ("arcs",), lambda n: call(lambda x: x * x, 1, 8, bits=n), 8, 32, "error"),
    ("bmm bits", ("venus", "arcs"), lambda n: call(lambda x: x @ x, 1, 8, 8, bits=n), 8, 32, "error"),
    ("layernorm eps", ALL, lambda n: (nn.LayerNorm(8, eps=n * 1e-5), (1, 4, 8)), 1, 2, "wrong"),
    ("lstm sequences", ALL, lambda n: (nn.LSTM(8, 4, batch_first=True), (n, 5, 8)), 1, 2, "error"),
    ("lstm sequences, time first", ALL, lambda n: (nn.LSTM(8, 4), (5, n, 8)), 1, 2, "error"),
    ("lstm time first", SECOND, lambda n: (nn.LSTM(8, 4, batch_first=bool(n)), (1, 5, 8) if n else (5, 1, 8)), 1, 0, "wrong"),
    ("argmax axis", ALL, lambda n: call(lambda x: x.argmax(n), 1, 8, 8), 2, 1, "error"),
)  # fmt: skip
EACH = [(what, chip, *rest) for what, chips, *rest in ROWS for chip in chips]


def broken(made: Made, chip: str) -> set[tuple[str, str]]:
    """Kind and limit of everything that is beyond one."""
    net, shape = made
    report = linger.check(nn.Sequential(net), torch.randn(shape), target=chip, quiet=True)
    return {(v.kind, v.allowed) for v in report.violations}


@pytest.mark.parametrize(("what", "chip", "make", "most", "least", "kind"), EACH, ids=[f"{w}-{c}" for w, c, *_ in EACH])
def test_both_sides_of_every_limit(what: str, chip: str, make: Make, most: int, least: int, kind: str) -> None:
    passes, fails = broken(make(most), chip), broken(make(least), chip)
    assert kind in {k for k, _ in fails - passes}, what


@pytest.mark.parametrize("chip", [*TARGETS, "mars"])
def test_tables_name_what_there_is(chip: str) -> None:
    for limit in known(chip).limits:
        assert limit.of in MEASURES
        assert limit.when in CONDITIONS
        assert limit.kind in KINDS
        assert limit.op in known(chip).ops
        assert limit.of in SAID
        assert limit.way or limit.of in WAYS
        assert (limit.low, limit.high, limit.among) != (None, None, ())


@pytest.mark.parametrize("chip", ALL)
def test_a_product_with_a_number_or_a_gate_on_either_side(chip: str, tmp_path: Path) -> None:
    for function in (
        lambda x: 3 * x,
        lambda x: x * 3,
        lambda x: F.avg_pool2d(x, 4) * x,
        lambda x: x * F.avg_pool2d(x, 4),
    ):
        net, shape = call(function, 1, 3, 4, 4)
        assert not [k for k, _ in broken((net, shape), chip) if k in ("error", "wrong")]
        net, x = linger.init(net, target=chip), torch.randn(shape)
        net(x)
        linger.onnx.export(net.eval(), (x,), tmp_path / "net.onnx")
        assert linger.verify(net, tmp_path / "net.onnx", x, quiet=True).equal


@pytest.mark.parametrize("chip", SECOND)
def test_a_time_first_lstm_is_told_to_be_batch_first(chip: str) -> None:
    report = linger.check(nn.Sequential(nn.LSTM(8, 4)), torch.randn(5, 1, 8), target=chip, quiet=True)
    said = {(v.found, v.allowed, v.way) for v in report.violations if v.op == "LSTMInt" and v.kind == "wrong"}
    assert said == {("batch_first=False", "batch_first=True", "make it with batch_first=True")}


@pytest.mark.parametrize("chip", ALL)
def test_a_sum_with_a_number_fits(chip: str) -> None:
    for function in (lambda x: x + 0.5, lambda x: -3 + x, lambda x: x - 100, lambda x: 1 - x):
        assert not [k for k, _ in broken(call(function, 1, 3, 4, 4), chip) if k in ("error", "wrong")]


STATUS_ROWS = {
    ("venus", "ConvTranspose2dInt"): (lambda: deconv(), "warning", "pack with -m params:share-mem"),
    ("venusa", "Conv1dInt"): (lambda: conv1d(), "wrong", "use a repaired build of the engine, or another op"),
    ("venus", "SoftmaxInt"): (
        lambda: call(lambda x: x.softmax(-1), 1, 8),
        "warning",
        "compare the chip's first results",
    ),
    ("venusa", "iqSigmoid"): (lambda: call(torch.sigmoid, 1, 8), "wrong", "use a repaired build of the engine"),
    ("arcs", "iqTanh"): (lambda: call(torch.tanh, 1, 8), "error", "use 2 * torch.sigmoid(2 * x) - 1"),
    ("arcs", "GluInt"): (lambda: call(F.glu, 1, 8), "error", "use a * torch.sigmoid(b)"),
    ("venusa", "iqTanh"): (lambda: call(torch.tanh, 1, 8), "error", "compute it outside of the chip"),
    ("arcs", "LogSoftmaxInt"): (lambda: call(lambda x: x.log_softmax(-1), 1, 8), "wrong", "use a repaired build"),
    ("arcs", "iqSub"): (lambda: call(lambda x: x - x.abs(), 1, 8), "wrong", "use a repaired build"),
}


@pytest.mark.parametrize("row", STATUS_ROWS, ids="-".join)
def test_what_the_engine_makes_of_an_op(row: tuple[str, str]) -> None:
    make, kind, way = STATUS_ROWS[row]
    net, shape = make()
    report = linger.check(nn.Sequential(net), torch.randn(shape), target=row[0], quiet=True)
    found = {v.op: (v.kind, v.way) for v in report.violations if v.of in ("op", "status")}
    assert found[row[1]][0] == kind
    assert found[row[1]][1].startswith(way)
