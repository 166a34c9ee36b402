"""What a report holds: plain numbers and words, the same for every way it is written."""

from __future__ import annotations

from dataclasses import dataclass

from linger.check import Space, Violation


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts in bins of equal width from ``low`` to ``high``. ``reference``: of the float net, () where there is none."""

    low: float
    high: float
    fixed: tuple[int, ...]
    reference: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The grid of a tensor: real value = integer / scale. ``lowest``, ``highest``: its ends as real values."""

    scale: float
    bits: int
    lowest: float
    highest: float


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A stored weight. ``sqnr`` and ``clipped`` against its float values, None where those are not known."""

    name: str
    shape: tuple[int, ...]
    grid: Scale
    used: float
    sqnr: float | None
    clipped: float | None
    histogram: Histogram


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One row: a layer, a call, or a move of values.

    Attributes:
        name: dotted name of the layer, or of the call.
        op: what a user calls it.
        kind: "fixed", "move" (values only move) or "float".
        island: the number of the float island that it is part of, from 1; 0 in fixed point.
        source: file and line of a call, "" of a layer.
        inputs: positions of the rows whose results it reads; -1 for the inputs of the net.
        input: shape of its first input, one sample.
        output: shape of its result, one sample.
        grid: of the result, None of a float one.
        low: the lowest value that was seen.
        high: the highest.
        used: how far the values reach, as a share of the grid.
        clipped: share of values that lose at least one step to the end of the grid.
        sqnr: of its result against the float net, in dB; 200 where nothing differs.
        own_sqnr: what it adds itself: against the layer in float on the same inputs.
        accumulator: bits that its sums need, 0 where it has none.
        macs: multiplications.
        weight_bytes: what the file stores for it.
        activation_bytes: its results.
        cycles: an estimate, None where the target's table has no figures.
        histogram: of its result.
        weights: its stored weights.
    """

    name: str
    op: str
    kind: str
    island: int
    source: str
    inputs: tuple[int, ...]
    input: tuple[int, ...]
    output: tuple[int, ...]
    grid: Scale | None = None
    low: float | None = None
    high: float | None = None
    used: float | None = None
    clipped: float | None = None
    sqnr: float | None = None
    own_sqnr: float | None = None
    accumulator: int = 0
    macs: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    cycles: int | None = None
    histogram: Histogram | None = None
    weights: tuple[Weight, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Whether the file's integers are the net's. ``differing``: of ``elements``, per runner; ``why``: it was not compared."""

    elements: int
    differing: dict[str, int]
    why: str = ""

    @property
    def equal(self) -> bool:
        """Whether it was compared and nothing differs."""
        return bool(self.differing) and not any(self.differing.values())


@dataclass(frozen=True, kw_only=True)
class Worst:
    """An input on which fixed point is furthest from float.

    Attributes:
        batch: position of its batch in the loader.
        item: position in the batch; -1 for the batch as a whole.
        sqnr: of the outputs, in dB.
        reference: the largest output of a row of scores in float, -1 where the outputs are no such row.
        fixed: the same in fixed point.
        picture: the input as a PNG in a data URI, "" where it is no image.
        series: the input as a few numbers, () where it is no series.
    """

    batch: int
    item: int
    sqnr: float
    reference: int = -1
    fixed: int = -1
    picture: str = ""
    series: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The mean over batches of what the user measures. ``reference``: in float, None where there is no float net."""

    name: str
    reference: float | None
    fixed: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The net as a whole; sizes are those of one sample."""

    net: str
    target: str
    version: str
    batches: int
    samples: int
    metric: Metric | None
    sqnr: float | None
    parameters: int
    float_bytes: int
    weight_bytes: int
    macs: int
    float_share: float
    cycles: int | None
    accumulator: int
    fits: bool
    violations: tuple[Violation, ...]
    memory: tuple[Space, ...]
    left: tuple[str, ...]
    certificate: Certificate


@dataclass(frozen=True, kw_only=True)
class Data:
    """Everything. ``outputs``: positions of the rows whose results are the net's."""

    summary: Summary
    layers: tuple[Layer, ...]
    inputs: tuple[str, ...]
    outputs: tuple[int, ...]
    worst: tuple[Worst, ...]
