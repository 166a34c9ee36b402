"""The benchmarks run, and write what they print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import export, runtime, scaling, train_step

COMMANDS: dict[str, tuple[Callable[[list[str]], None], list[str], set[str]]] = {
    "runtime": (runtime.main, ["--images", "100", "--rounds", "1"], {"way", "ms_per_100", "over_float", "differing"}),
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


def test_a_row_of_the_growing_nets() -> None:
    found: dict[str, Any] = scaling.row("width", 16, 0.0)
    assert found["size"] == "width 16"
    assert min(found["float_ms"], found["time"], found["memory"], found["kernels"]) > 0


def test_a_row_of_one_process() -> None:
    found = scaling.parallel(1, 1, 0.0)
    assert (found["depth"], found["ranks"]) == (1, 1)
    assert min(found["float_ms"], found["fixed_ms"], found["time"]) > 0
