"""A report on the console and as CSV."""

from __future__ import annotations

import csv
import io

from rich.console import Console
from rich.table import Table

from linger.report import _format as say
from linger.report._data import Data, Layer, Summary
from linger.report._meter import BEST
from linger.targets._words import bytes_text

COLUMNS = (
    "name", "op", "kind", "island", "source", "input", "output", "scale", "bits", "lowest", "highest", "low", "high", "used",
    "clipped", "sqnr", "own_sqnr", "accumulator", "macs", "weight_bytes", "activation_bytes", "cycles",
)  # fmt: skip


def lines_of(summary: Summary) -> list[str]:
    """The summary as lines."""
    s, c = summary, summary.certificate
    found = [f"{s.net} on {s.target}: {s.samples} samples in {s.batches} batches"]
    if s.metric is not None:
        found.append(f"{s.metric.name}: {say.number(s.metric.fixed)}" + _beside(s.metric.reference))
    if s.sqnr is not None:
        said = "exact" if s.sqnr >= BEST else f"SQNR {say.decibels(s.sqnr)} dB"
        found.append(f"outputs: {said} against float")
    found.append(f"weights: {bytes_text(s.weight_bytes)}, {bytes_text(s.float_bytes)} in float")
    work = f"work: {s.macs:,} MACs" + (f", {s.float_share:.0%} of them in float" if s.float_share else "")
    found.append(work + ("" if s.cycles is None else f", about {s.cycles:,} cycles"))
    found += [str(space) for space in s.memory]
    found.append(f"widest sum: {s.accumulator} bits, proven from the weights")
    found.append(f"{s.target}: {'fits' if s.fits else 'does not fit'}, {len(s.violations)} remarks")
    differing = ", ".join(f"{name} {n}" for name, n in c.differing.items())
    exact = (
        f"exact: {c.elements:,} outputs compared, differing in {differing}"
        if c.differing
        else f"not compared: {c.why}".rstrip(": ")
    )
    return [*found, exact]


def _beside(reference: float | None) -> str:
    return "" if reference is None else f", {say.number(reference)} in float"


def show(data: Data, console: Console) -> None:
    """The table of layers, then the summary."""
    names = ("layer", "op", "grid", "used", "clipped", "SQNR dB", "own dB", "sum", "MACs", "bytes", "island")
    table = Table(*names[:3])
    for name in names[3:]:
        table.add_column(name, justify="right")
    for x in data.layers:
        table.add_row(*_cells(x))
    console.print(table)
    for line in lines_of(data.summary):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _cells(x: Layer) -> tuple[str, ...]:
    grid = "" if x.grid is None else f"{x.grid.bits} bits, step {say.step(x.grid)}"
    return (
        x.name.replace("[", "\\["), x.op, grid, say.share(x.used), say.share(x.clipped), say.decibels(x.sqnr),
        say.decibels(x.own_sqnr), str(x.accumulator or ""), f"{x.macs:,}" if x.macs else "",
        bytes_text(x.weight_bytes) if x.weight_bytes else "", str(x.island or ""),
    )  # fmt: skip


def csv_of(data: Data) -> str:
    """One line per layer, with plain numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for x in data.layers:
        said = {"input": say.shape(x.input), "output": say.shape(x.output)}
        for name in ("scale", "bits", "lowest", "highest"):
            said[name] = "" if x.grid is None else getattr(x.grid, name)
        writer.writerow([said[c] if c in said else _plain(getattr(x, c)) for c in COLUMNS])
    return out.getvalue()


def _plain(value: object) -> object:
    return "" if value is None else value
