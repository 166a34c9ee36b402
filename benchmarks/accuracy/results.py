"""What was measured, one line of JSON per cell, and the tables made of it: means over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.accuracy.ways import Bits
from linger.errors import LingerError
from linger.files import whole

BASE, FLOAT = "float", (32, 32)
AIMS = (  # what a row is to reach: its points below float, at which widths, of which of the ways (prefix, recommended)
    ("PTQ", "PTQ, calibrate's defaults", (8, 8), 0.5),
    ("QAT", "QAT, learned thresholds", (8, 8), 0.1),
    ("QAT", "QAT, learned thresholds", (4, 8), 0.5),
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way on one task; ``accuracy`` in percent, None where ``why`` says that it was not run."""

    task: str
    seed: int
    way: str
    bits: Bits
    accuracy: float | None
    seconds: float
    why: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return self.task, self.seed, self.way, self.bits


@dataclass
class Results:
    """The cells of a file, which grows with every cell so that a run that was stopped goes on where it was."""

    path: Path
    settings: Mapping[str, Any]
    cells: dict[tuple[Any, ...], Cell] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lines = self._lines()
        if not lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.settings) + "\n", "utf-8")
        elif json.loads(lines[0]) != self.settings:
            raise LingerError(
                f"accuracy: {self.path} was measured with {lines[0]}, allowed are the same settings; give another --results"
            )
        for line in lines[1:]:
            said = json.loads(line)
            cell = Cell(**said | {"bits": tuple(said["bits"])})
            self.cells[cell.key] = cell

    def _lines(self) -> list[str]:
        """The lines of the file; a last one that was begun when the run stopped is taken off."""
        text = self.path.read_text("utf-8") if self.path.is_file() else ""
        kept = text[: text.rfind("\n") + 1]
        if kept != text:
            with whole(self.path) as out:
                out.write(kept.encode())
        return kept.splitlines()

    def add(self, cell: Cell) -> None:
        """Keep a cell, here and in the file."""
        self.cells[cell.key] = cell
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(cell)) + "\n")

    def of(self, task: str, way: str, bits: Bits) -> list[Cell]:
        """The cell of every seed."""
        return [c for c in self.cells.values() if (c.task, c.way, c.bits) == (task, way, bits)]

    def losses(self, task: str, way: str, bits: Bits) -> list[float]:
        """Points above the float net of the same seed, negative below."""
        base = {c.seed: c.accuracy for c in self.of(task, BASE, FLOAT)}
        return [c.accuracy - base[c.seed] for c in self.of(task, way, bits) if c.accuracy is not None]  # type: ignore[operator]

    def seconds(self) -> float:
        return sum(c.seconds for c in self.cells.values())


def text_of(results: Results, task: str, way: str, bits: Bits) -> str:
    """Mean accuracy, and in brackets the mean distance from float and its standard deviation; how many seeds, if not all."""
    found = [c.accuracy for c in results.of(task, way, bits) if c.accuracy is not None]
    if not found:
        return "-"
    lost = results.losses(task, way, bits)
    spread = f" ± {statistics.stdev(lost):.2f}" if len(lost) > 1 else ""
    if len(found) < len(results.of(task, BASE, FLOAT)):
        spread += f"; {_seeds(len(found))}"
    return f"{statistics.mean(found):.2f} ({statistics.mean(lost):+.2f}{spread})"


def table(results: Results, task: str, about: str, ways: Iterable[str], widths: list[Bits]) -> str:
    """One task as a Markdown table."""
    floats = [c for c in results.of(task, BASE, FLOAT) if c.accuracy is not None]
    values = [c.accuracy for c in floats if c.accuracy is not None]
    mean = f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
    lines = [f"### {task}", "", f"{about} Float: {mean} %, {_seeds(len(values))}.", ""]
    lines += ["| | " + " | ".join(f"W{w}A{a}" for w, a in widths) + " |", "|---|" + "---:|" * len(widths)]
    for way in ways:
        if way.startswith("float,") and results.of(task, way, FLOAT):
            lines.append(f"| {way} | {text_of(results, task, way, FLOAT)} |" + " |" * (len(widths) - 1))
        elif any(results.of(task, way, bits) for bits in widths):
            lines.append(f"| {way} | " + " | ".join(text_of(results, task, way, bits) for bits in widths) + " |")
    return "\n".join([*lines, *_reasons(results, task)]) + "\n"


def _seeds(n: int) -> str:
    return f"{n} seed" + "s" * (n != 1)


def _reasons(results: Results, task: str) -> list[str]:
    """Why cells are empty, each way once."""
    why = {(c.way, c.why): None for c in results.cells.values() if c.task == task and c.why}
    return ["", *(f"- {way}: {said}" for way, said in why)] if why else []


def aims(results: Results, tasks: Iterable[str]) -> str:
    """What the recommended way loses against float, and the best, next to what was aimed at."""
    heads = [f"{kind} W{b[0]}A{b[1]}, at most {most}" for kind, _, b, most in AIMS]
    lines = ["| points below float | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for task in tasks:
        lines.append(f"| {task} | " + " | ".join(_aim(results, task, *aim) for aim in AIMS) + " |")
    return "\n".join(lines) + "\n"


def _aim(results: Results, task: str, kind: str, way: str, bits: Bits, most: float) -> str:
    ways = {c.way for c in results.cells.values() if c.way.startswith(kind) and c.task == task}
    ways = {w for w in ways if ", after" not in w and "mixed" not in w}  # more training first, and more bits
    lost = {w: -statistics.mean(found) for w in ways if (found := results.losses(task, w, bits))}
    if way not in lost:
        return "-"
    best = min(sorted(lost), key=lambda w: lost[w])
    met = "met" if lost[way] <= most else "missed"
    return f"{met}: {lost[way]:.2f}; best {lost[best]:.2f} ({best.partition(', ')[2] or best})"
