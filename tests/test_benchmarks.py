"""The benchmarks run, and write what they print."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import export, peers, runtime, scaling, train_step

COMMANDS: dict[str, tuple[Callable[[list[str]], None], list[str], set[str]]] = {
    "runtime": (runtime.main, ["--images", "100", "--rounds", "1"], {"net", "way", "ms_per_100", "over_float", "differing"}),
    "export": (export.main, ["KeywordNet"], {"net", "convert_s", "export_s", "eval", "onnx", "runtime"}),
    "train_step": (train_step.main, ["KeywordNet", "--seconds", "0", "--threads", "1"], {"net", "eager", "memory", "kernels", "eval"}),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.filterwarnings("ignore")  # of PyTorch's exporter and profiler about themselves
def test_a_benchmark_writes_its_rows(name: str, tmp_path: Path) -> None:
    main, arguments, keys = COMMANDS[name]
    threads = torch.get_num_threads()
    try:
        main([*arguments, "--json", str(tmp_path / "rows.json")])
    finally:
        torch.set_num_threads(threads)
    said = json.loads((tmp_path / "rows.json").read_text("utf-8"))
    assert "torch" in said["machine"]
    assert said["rows"]
    for row in said["rows"]:
        assert keys <= row.keys()
    if name == "runtime":
        assert {row["differing"] for row in said["rows"] if "fixed" in row["way"]} == {0}
        ops = next(row["ops"] for row in said["rows"] if "ops" in row)
        assert {"Quant", "Conv2dInt", "Relu", "iqAdd", "LinearInt"} <= ops.keys()
        assert sum(ops.values()) > 0


class Refusing:
    """A peer's module that has no fixed point for any net."""

    @staticmethod
    def trainable(net: nn.Module, x: Tensor) -> nn.Module:
        raise ValueError("no such layer\nand more")


@pytest.mark.filterwarnings("ignore")  # of PyTorch's profiler about itself
def test_peers_stand_beside_linger(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that converts, one that refuses, one that is not installed: a number, or why there is none."""
    monkeypatch.setattr(peers, "PACKAGES", {"refusing": "torch", "absent": "no such package"})
    monkeypatch.setitem(sys.modules, "benchmarks.peers.refusing", Refusing)
    ways = {
        "Copy": lambda net, x: copy.deepcopy(net),
        "Refusing": peers.trainable("refusing"),
        "Absent": peers.trainable("absent"),
    }
    monkeypatch.setattr(train_step, "TRAINABLE", ways)
    found = train_step.beside_peers("KeywordNet", False, 0.0)
    assert found["over_float"].keys() == {"linger", "Copy"}
    assert min(v for way in found["over_float"].values() for v in way.values()) > 0
    assert 0.5 < found["over_float"]["Copy"]["memory"] < 1.5
    assert found["why"] == {
        "Refusing": "not run, ValueError: no such layer", "Absent": "not run, no such package is not installed",
    }  # fmt: skip
    train_step.show_peers([found])
    said = capsys.readouterr().out
    assert f"{found['over_float']['Copy']['time']:.2f}" in said
    assert (
        "KeywordNet, Refusing: not run, ValueError: no such layer\nKeywordNet, Absent: not run, no such package" in said
    )


def test_a_row_of_the_growing_nets() -> None:
    found: dict[str, Any] = scaling.row("width", 16, 0.0)
    assert found["size"] == "width 16"
    assert min(found["float_ms"], found["time"], found["memory"], found["kernels"]) > 0


def test_a_row_of_one_process() -> None:
    found = scaling.parallel(1, 1, 0.0)
    assert (found["depth"], found["ranks"]) == (1, 1)
    assert min(found["float_ms"], found["fixed_ms"], found["time"]) > 0
