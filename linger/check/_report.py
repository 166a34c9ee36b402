"""What ``check`` found: the numbers, as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from linger.check._cost import Cost
from linger.check._rules import RANK, Violation
from linger.check._words import op_name
from linger.numerics import FLOAT32_EXACT
from linger.plain import text_of
from linger.targets._words import bytes_text

WORDS = {"error": "does not run", "wrong": "other integers", "split": "engine splits it", "warning": "look at it"}
STYLES = {"error": "red", "wrong": "red", "split": "green", "warning": "yellow"}
REGISTER = 32  # bits of an accumulator of the chips
NAMED = 3  # layers that one row of the violations names


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One row of the table.

    Attributes:
        peak: the largest |sum| in its accumulators that any input can make with these weights, in LSB; 0 where it has none.
        cycles: None if unknown.
    """

    name: str
    op: str
    source: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    peak: int
    in_float: bool
    cost: Cost
    cycles: int | None = None

    @property
    def accumulator(self) -> int:
        """Bits that its sums need, 0 where it has none."""
        return self.peak.bit_length() + 1 if self.peak else 0


@dataclass(frozen=True, kw_only=True)
class Space:
    """One memory: bytes used and there are, None where no figure is known."""

    name: str
    what: str
    used: int
    size: int | None

    @property
    def fits(self) -> bool:
        """Whether it is large enough, as far as is known."""
        return self.size is None or self.used <= self.size

    def __str__(self) -> str:
        said = f"{self.name}: {bytes_text(self.used)}"
        said += "" if self.size is None else f" of {bytes_text(self.size)}"
        return f"{said} ({self.what})" + ("" if self.fits else ", too much")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Violations, errors first; layers in the order of the file; what every memory holds; what ``init`` left in float."""

    target: str
    violations: tuple[Violation, ...]
    layers: tuple[Layer, ...]
    memory: tuple[Space, ...]
    left: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the chip runs the net, with these integers, in its memory."""
        return not any(v.kind in ("error", "wrong") for v in self.violations) and all(s.fits for s in self.memory)

    @property
    def macs(self) -> int:
        """Multiplications of one forward."""
        return sum(layer.cost.macs for layer in self.layers)

    @property
    def float_share(self) -> float:
        """The part of them that is in float, 0 to 1."""
        return sum(layer.cost.macs for layer in self.layers if layer.in_float) / max(self.macs, 1)

    @property
    def cycles(self) -> int | None:
        """An estimate of one forward; None where the target's table has no figures."""
        known = [layer.cycles for layer in self.layers if layer.cycles is not None]
        return sum(known) if len(known) == len(self.layers) else None

    @property
    def summary(self) -> str:
        """One line: does it fit, and why not."""
        counted = {kind: sum(v.kind == kind for v in self.violations) for kind in RANK}
        why = [f"{n} {WORDS[kind]}" for kind, n in counted.items() if n and kind in ("error", "wrong")]
        why += [f"too little {s.name}" for s in self.memory if not s.fits]
        return f"{self.target}: " + (f"does not fit ({', '.join(why)})" if why else "fits")

    @property
    def proof(self) -> tuple[str, ...]:
        """What the bounds of the sums prove, a sentence each on accumulators and on evaluation in float32."""
        sums = [layer for layer in self.layers if layer.peak]
        if not sums:
            return ()
        beyond = _named([x for x in sums if x.accumulator > REGISTER])
        inside = max((x.peak for x in sums if x.accumulator <= REGISTER), default=0)
        held = f"sums: for any input at most {inside:,} ({inside.bit_length() + 1} bits) with these weights, "
        held += f"so no accumulator of {REGISTER} bits can overflow"
        wide = _named([x for x in sums if x.peak >= FLOAT32_EXACT])
        exact = "float32: holds every partial sum exactly"
        return held + (f", except in {beyond}" if beyond else ""), exact + (f", except in {wide}" if wide else "")

    def json(self) -> str:
        """All of it."""
        sums = {"ok": self.ok, "macs": self.macs, "float_share": self.float_share, "cycles": self.cycles}
        return json.dumps({**asdict(self), **sums}, indent=2)

    def __str__(self) -> str:
        """The report as plain text."""
        return text_of(self.show)

    def show(self, console: Console) -> None:
        """Print it on a rich console."""
        if self.violations:
            console.print(_violations(self.violations))
        console.print(_layers(self.layers, self.cycles is not None))
        lines = [*self.left, *self.proof, *map(str, self.memory), self._work()]
        for line in (*lines, self.summary):
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _work(self) -> str:
        said = f"work: {self.macs:,} MACs"
        said += f", {self.float_share:.0%} of them in float" if self.float_share else ""
        return said + (f", about {self.cycles:,} cycles" if self.cycles is not None else "")


def _violations(found: tuple[Violation, ...]) -> Table:
    """One row for every kind of violation: layers that differ in nothing else share it."""
    rows: dict[tuple[str, ...], list[Violation]] = {}
    for v in found:
        way = v.way.partition(", or linger.disable_quant(")[0]
        rows.setdefault((v.kind, v.op, v.found, v.allowed, way), []).append(v)
    table = Table("layer", "op", "on the chip", "found", "allowed", "way out")
    for (kind, op, said, allowed, _), each in rows.items():
        table.add_row(
            _names(each), op_name(op), f"[{STYLES[kind]}]{WORDS[kind]}[/]", said, allowed, _plain(each[0].way)
        )  # fmt: skip
    return table


def _named(layers: list[Layer]) -> str:
    return ", ".join(f"{x.name} ({x.accumulator} bits)" for x in layers)


def _names(each: list[Violation]) -> str:
    named = [_plain(v.layer + (f" ({v.source})" if v.source else "")) for v in each]
    more = f", {len(named) - NAMED} more" if len(named) > NAMED else ""
    return ", ".join(named[:NAMED]) + more


def _plain(text: str) -> str:
    """Square brackets mean a style to rich."""
    return text.replace("[", "\\[")


def _layers(layers: tuple[Layer, ...], cycles: bool) -> Table:
    table = Table("layer", "op", "input", "output")
    for name in ("MACs", "weights", "activations", "largest sum", "of", *(["cycles"] if cycles else [])):
        table.add_column(name, justify="right")
    for x in layers:
        table.add_row(
            _plain(x.name), op_name(x.op) + (" (float)" if x.in_float else ""), _shape(x.input), _shape(x.output),
            f"{x.cost.macs:,}" if x.cost.macs else "", bytes_text(x.cost.weights) if x.cost.weights else "",
            bytes_text(x.cost.activations), *((f"{x.peak:,}", f"{x.accumulator} bits") if x.peak else ("", "")),
            *([f"{x.cycles:,}"] if cycles else []),
        )  # fmt: skip
    return table


def _shape(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
