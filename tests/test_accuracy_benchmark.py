"""The accuracy benchmark: a cell is measured and compared with its file, a run goes on, tables are means over seeds."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import peers
from benchmarks.accuracy.results import BASE, FLOAT, Cell, Results, aims, table
from benchmarks.accuracy.tasks import MobileNet, Task
from linger.demo_data import Split
from linger.errors import LingerError

SETTINGS = {"data": "mnist", "limit": None}


def filled(path: Path) -> Results:
    """Two seeds: float 90 and 92, one way 0.5 and 0.1 below."""
    results = Results(path, SETTINGS)
    for seed, base, lost in ((0, 90.0, 0.5), (1, 92.0, 0.1)):
        results.add(Cell(task="t", seed=seed, way=BASE, bits=FLOAT, accuracy=base, seconds=1))
        way = "PTQ, calibrate's defaults"
        results.add(Cell(task="t", seed=seed, way=way, bits=(8, 8), accuracy=base - lost, seconds=1))
    results.add(Cell(task="t", seed=0, way="Slow", bits=(8, 8), accuracy=91.0, seconds=1))
    results.add(Cell(task="t", seed=0, way="Peer", bits=(8, 8), accuracy=None, seconds=0, why="not installed"))
    return results


def test_tables_are_means_over_seeds(tmp_path: Path) -> None:
    results = filled(tmp_path / "r.jsonl")
    text = table(
        results, "t", "A net.", [BASE, "PTQ, calibrate's defaults", "Slow", "Peer", "never run"], [(8, 8), (4, 8)]
    )
    assert "A net. Float: 91.00 ± 1.41 %, 2 seeds." in text
    assert "| PTQ, calibrate's defaults | 90.70 (-0.30 ± 0.28) | - |" in text
    assert "| Slow | 91.00 (+1.00; 1 seed) | - |" in text
    assert "| Peer | - | - |" in text
    assert "- Peer: not installed" in text
    assert "never run" not in text
    assert "| t | met: 0.30; best 0.30 (calibrate's defaults) | - | - |" in aims(results, ["t"])


def test_a_run_goes_on_and_keeps_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.jsonl"
    cells = filled(path).cells
    assert len(cells) == 6
    assert Results(path, SETTINGS).cells == cells
    with pytest.raises(
        LingerError, match=r"was measured with .*, allowed are the same settings; give another --results"
    ):
        Results(path, {"data": "fashion", "limit": 5})


def test_a_line_that_was_begun_when_the_run_stopped_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    results = filled(path)
    lines = path.read_text("utf-8")
    path.write_text(lines[:-20], "utf-8")
    last = list(results.cells.values())[-1]
    again = Results(path, SETTINGS)
    assert list(again.cells.values()) == list(results.cells.values())[:-1]
    again.add(last)
    assert path.read_text("utf-8") == lines


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--bits", "8"], "argument --bits: invalid width value: '8'"), (["--write", "gone.md"], "found no file gone.md")],
)
def test_what_cannot_be_measured_is_said_at_once(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert said in capsys.readouterr().err


def test_one_task_is_measured_once(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 10
    x = torch.randn(10, 1, 28, 28, generator=generator)[y] + 0.1 * torch.randn(400, 1, 28, 28, generator=generator)
    split: Split = (x[:200], y[:200], x[200:], y[200:])
    task = Task(name="small", about="", make=MobileNet, data=lambda _: split, epochs=20, rate=1e-2)
    ways = ["PTQ, calibrate's defaults", "Brevitas, PTQ", "torchao PT2E, QAT"]
    options = Namespace(data="mnist", limit=None, ways=ways, peers=True)
    results = Results(tmp_path / "r.jsonl", SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "PACKAGES", dict.fromkeys(peers.PACKAGES, "no such package"))
        command.measure(task, 0, [(8, 8)], results, options)
    found = {c.way: c for c in results.cells.values()}
    assert found.keys() == {BASE, *ways}
    base, fixed = found[BASE].accuracy, found[ways[0]].accuracy
    assert base is not None
    assert fixed is not None
    assert base > 90, "it has learned something"
    assert abs(base - fixed) <= 10
    assert found["Brevitas, PTQ"].why == found["torchao PT2E, QAT"].why == "not run, no such package is not installed"
    lines = (tmp_path / "r.jsonl").read_text("utf-8")
    command.measure(task, 0, [(8, 8)], results, options)
    assert (tmp_path / "r.jsonl").read_text("utf-8") == lines


def test_integers_that_differ_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(name="small", about="", make=MobileNet, data=lambda _: None, epochs=1, rate=1e-3)  # type: ignore[arg-type,return-value]
    split: Split = (*(torch.zeros(0),) * 2, torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.long))
    job = command.Job(task=task, net=MobileNet(), data=split, bits=(8, 8), seed=0)
    monkeypatch.setattr(command, "differing", lambda net, data: 3)
    with pytest.raises(SystemExit, match=r"small, PTQ, max, \(8, 8\): 3 integers differ"):
        command.cell("PTQ, max", lambda job: job.net, job)
