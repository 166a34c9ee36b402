"""The largest number that every limit allows and the smallest that it refuses, through ``linger.check`` on a small net or file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from limit_files import FILES
from limit_nets import ALL, NETS, SECOND, Made, call, conv1d, deconv
from torch import nn
from torch.nn import functional as F

import linger
from linger.check import Violation
from linger.check._words import WAYS
from linger.targets import TARGETS, Limit, known
from linger.targets._limits import KINDS
from linger.targets._measures import CONDITIONS, MEASURES
from linger.targets._words import SAID, said

EACH = [(chip, (op, of, when, kind), *rest) for op, of, when, kind, chips, *rest in (*NETS, *FILES) for chip in chips]
Key = tuple[str, str, str, str]


def key_of(limit: Limit) -> Key:
    return limit.op, limit.of, limit.when, limit.kind


def beyond(made: Any, chip: str) -> set[Violation]:
    """Everything that is beyond a limit in a net or a file."""
    if isinstance(made, onnx.ModelProto):
        return set(linger.check(made, target=chip, quiet=True).violations)
    net, shape = made
    return set(linger.check(nn.Sequential(net), torch.randn(shape), target=chip, quiet=True).violations)


def broken(made: Made, chip: str) -> set[tuple[str, str]]:
    """Kind and limit of everything that is beyond one."""
    return {(v.kind, v.allowed) for v in beyond(made, chip)}


@pytest.mark.parametrize(("chip", "key", "make", "most", "least"), EACH, ids=["-".join((c, *k)) for c, k, *_ in EACH])
def test_both_sides_of_every_limit(chip: str, key: Key, make: Any, most: int, least: int) -> None:
    allowed = {said(limit, least)[1] for limit in known(chip).limits if key_of(limit) == key}
    assert allowed, "a row of no limit"
    passes, fails = (
        {v.allowed for v in beyond(make(n), chip) if (v.op, v.of, v.kind) == (key[0], key[1], key[3])}
        for n in (most, least)
    )
    assert allowed & fails - passes, (passes, fails)


@pytest.mark.parametrize("chip", ALL)
def test_every_limit_has_a_row(chip: str) -> None:
    """But for those of ops that the chip has not."""
    rows = {key for name, key, *_ in EACH if name == chip}
    limits = {key_of(limit) for limit in known(chip).limits if known(chip).ops[limit.op] != "none"}
    assert limits - rows == set()


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


@pytest.mark.parametrize("chip", [*TARGETS, "mars"])
def test_nothing_is_to_do_only_where_the_engine_splits(chip: str) -> None:
    """Depthwise weights that are too large do not run: there is something to do."""
    refused = [limit for limit in known(chip).limits if limit.kind != "split"]
    assert len(refused) > 50
    assert not [limit for limit in refused if "nothing to do" in (limit.way or WAYS[limit.of])]
