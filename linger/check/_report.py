"""What ``check`` found, as text."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from linger.check._cost import Cost
from linger.check._rules import Violation
from linger.check._words import bytes_text, op_name

WORDS = {
    "error": "does not run",
    "wrong": "engine computes it wrong",
    "split": "engine splits it",
    "warning": "look at it",
}
STYLES = {"error": "red", "wrong": "red", "split": "green", "warning": "yellow"}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One row of the table. ``accumulator``: bits that its sums need, 0 where it has none."""

    name: str
    op: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    accumulator: int
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Report:
    """Violations, errors first, and layers in the order of the file."""

    target: str
    violations: tuple[Violation, ...]
    layers: tuple[Layer, ...]

    @property
    def ok(self) -> bool:
        """Whether the chip runs the net and computes its integers."""
        return not any(v.kind in ("error", "wrong") for v in self.violations)

    @property
    def macs(self) -> int:
        """Multiplications of one forward."""
        return sum(layer.cost.macs for layer in self.layers)

    def __str__(self) -> str:
        """The report as plain text."""
        console = Console(file=io.StringIO(), width=150, no_color=True)
        self.show(console)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined,no-any-return]

    def show(self, console: Console) -> None:
        """Print it on a rich console."""
        if self.violations:
            console.print(_violations(self.violations))
        console.print(_layers(self.layers))
        console.print(f"{self.target}: {'fits' if self.ok else 'does not fit'}, {self.macs:,} MACs", highlight=False)


def _violations(found: tuple[Violation, ...]) -> Table:
    table = Table("layer", "op", "", "found", "allowed", "way out")
    for v in found:
        table.add_row(v.layer, op_name(v.op), f"[{STYLES[v.kind]}]{WORDS[v.kind]}", v.found, v.allowed, v.way)
    return table


def _layers(layers: tuple[Layer, ...]) -> Table:
    table = Table("layer", "op", "input", "output")
    for name in ("MACs", "weights", "activations", "accumulator"):
        table.add_column(name, justify="right")
    for x in layers:
        table.add_row(
            x.name, op_name(x.op), _shape(x.input), _shape(x.output), f"{x.cost.macs:,}" if x.cost.macs else "",
            bytes_text(x.cost.weights) if x.cost.weights else "", bytes_text(x.cost.activations),
            f"{x.accumulator} bits" if x.accumulator else "",
        )  # fmt: skip
    return table


def _shape(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
