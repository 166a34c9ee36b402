"""Which layer hurts: each layer alone in fixed point, the rest of the net in float, measured at the net's outputs.

SQNR = 10 log10(sum y^2 / sum (y - y')^2)   over all outputs of all batches, in dB                     (1)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linger.batches import Forward, bar, feed, kept, modes_kept, plain, taken
from linger.calibrate import layers
from linger.errors import LingerError, during
from linger.floating import FLOATS, in_float
from linger.ops import IntModule
from linger.refine import clipped
from linger.swap import require_net
from linger.trace import tensors_of

Metric = Callable[[Any, Any], Any]
ALL = "all layers"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layer alone in fixed point. ``noise``: sum (y - y')^2 / sum y^2; ``increase``: of the metric, None without one."""

    layer: str
    kind: str
    parameters: int
    bits: tuple[int, int, int]  # parameter_bits, data_bits, out_bits
    noise: float
    increase: float | None

    @property
    def sqnr(self) -> float:
        """Equation (1); infinite where nothing differs."""
        return math.inf if self.noise == 0 else -10 * math.log10(self.noise)


@dataclass(frozen=True)
class Sensitivity:
    """The rows, the layer that hurts most first, after one for the whole net; printed as a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        width = max(len(r.layer) for r in self.rows)
        lines = [f"{'layer':{width}}  {'type':>18}  {'parameters':>10}  weights/in/out  SQNR dB  metric"]
        for r in self.rows:
            bits = "/".join(map(str, r.bits)) if any(r.bits) else ""
            metric = "" if r.increase is None else f"{r.increase:+.4g}"
            lines.append(
                f"{r.layer:{width}}  {r.kind:>18}  {r.parameters:>10}  {bits:>14}  {r.sqnr:>7.2f}  {metric:>6}".rstrip()
            )
        return "\n".join(lines)


class Bench:
    """The float net's outputs on the batches, and what the net loses where some layers are in fixed point."""

    def __init__(self, net: nn.Module, loader: Iterable[Any], forward: Forward, metric: Metric | None) -> None:
        self.net, self.forward, self.metric = net, forward, metric
        self.batches = list(loader)
        self.wanted: list[list[Tensor]] = []
        self.called: set[nn.Module] = set()
        with self._eval(), in_float(net), self._noting():
            outs = [forward(net, batch) for batch in self.batches]
            self.wanted = [[t.double() for t in tensors_of(out) if t.is_floating_point()] for out in outs]
            self.base = self._mean(outs)
        self.power = sum(float(t.pow(2).sum()) for ts in self.wanted for t in ts)

    @contextmanager
    def _eval(self) -> Iterator[None]:
        with modes_kept(self.net), torch.no_grad():
            self.net.eval()
            yield

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Note the layers that are called; of some, as in attention, only the weights are read."""
        handles = [m.register_forward_hook(lambda m, *_: self.called.add(m)) for m in self.net.modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _mean(self, outs: list[Any]) -> float:
        if self.metric is None:
            return 0.0
        return sum(float(self.metric(out, batch)) for out, batch in zip(outs, self.batches, strict=True)) / len(outs)

    def loss(self, fixed: Collection[nn.Module] | None) -> tuple[float, float | None]:
        """(noise, increase of the metric) with these layers in fixed point; with None, the whole net."""
        with self._eval():
            if fixed is None:
                outs = [self.forward(self.net, batch) for batch in self.batches]
            else:
                with in_float(self.net, but=fixed):
                    outs = [self.forward(self.net, batch) for batch in self.batches]
        error = 0.0
        for wanted, out in zip(self.wanted, outs, strict=True):
            found = [t for t in tensors_of(out) if t.is_floating_point()]
            error += sum(float((a - b).pow(2).sum()) for a, b in zip(wanted, found, strict=True))
        return error / max(self.power, 1e-300), None if self.metric is None else self._mean(outs) - self.base


def sensitivity(
    net: nn.Module,
    loader: Iterable[Any],
    *,
    metric: Metric | None = None,
    batches: int | None = None,
    forward: Forward = feed,
    progress: bool = True,
) -> Sensitivity:
    """Measure every layer of a calibrated or trained fixed-point net alone in fixed point; the net does not change.

    Args:
        net: a fixed-point net whose ranges are known.
        loader: an iterable of batches; their outputs are held in memory.
        metric: ``metric(output, batch)``, a number that is better when it is smaller, such as the loss.
        batches: how many batches are used at most.
        forward: how a batch enters the net, as for ``calibrate``.
        progress: show a progress bar.

    Returns:
        A table, ``print`` it; its ``rows`` are sorted by the metric's increase, without one by the noise.

    Raises:
        LingerError: the net is not converted, a range is unknown, or the loader is empty.
    """
    require_net("sensitivity", net)
    with during("sensitivity"):
        net = plain(net)
        names = measurable(net)
        bench = Bench(net, taken(kept(loader, batches), net, batches), forward, metric)
        noise, increase = bench.loss(None)
        total = sum(p.numel() for p in net.parameters())
        whole = Row(
            layer=ALL, kind=type(net).__name__, parameters=total, bits=(0, 0, 0), noise=noise, increase=increase
        )
        rows = []
        with bar(progress) as shown:
            called = {name: m for name, m in names.items() if m in bench.called}
            for name, module in shown.track(called.items(), description="sensitivity"):
                rows.append(_row(name, module, *bench.loss([module])))
    rows.sort(key=lambda r: r.noise if r.increase is None else r.increase, reverse=True)
    return Sensitivity((whole, *rows))


def _row(name: str, module: IntModule, noise: float, increase: float | None) -> Row:
    return Row(
        layer=name, kind=type(module).__name__, parameters=sum(p.numel() for p in module.parameters()),
        bits=(module.parameter_bits, module.data_bits, module.out_bits), noise=noise, increase=increase,
    )  # fmt: skip


def measurable(net: nn.Module) -> dict[str, IntModule]:
    """The layers that can be in fixed point alone, under their first names."""
    found = {name: m for name, m in layers(net).items() if type(m) in FLOATS}
    if not found:
        raise LingerError(f"found {type(net).__name__} without a fixed-point layer; call init first")
    return found


@contextmanager
def at_bits(module: IntModule, bits: int) -> Iterator[None]:
    """The layer with weights of so many bits, clipped to their best range as ``calibrate`` does."""
    before = module.parameter_bits
    module.parameter_bits = bits
    try:
        with clipped(module):
            yield
    finally:
        module.parameter_bits = before
