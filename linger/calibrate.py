"""calibrate: choose every range of a fixed-point net from data, without training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from linger import observe, refine
from linger.batches import Forward, bar, feed, kept, length, modes_kept, observing, plain, taken
from linger.equalize import equalize as equalization
from linger.errors import LingerError, during
from linger.histogram import Histogram, by_max, method_of
from linger.numerics import NOTHING
from linger.ops import IntModule
from linger.ops._base import dry
from linger.ops._state import is_range
from linger.refine import clip_weights, reestimate
from linger.swap import require_net

Key = tuple[IntModule, str]


class Collector:
    """``observe.Watcher``: ranges follow the true maximum, and histograms fill beside them."""

    def __init__(self) -> None:
        self.seen: dict[Key, Histogram] = {}
        self.fixed: set[int] = set()

    def follow(self, running: Tensor, value: Tensor) -> None:
        if id(running) not in self.fixed:
            seen = value.clamp_min(NOTHING)
            running.copy_(torch.where(value < 0, running, torch.maximum(running, seen)))

    def see(self, module: Any, name: str, x: Tensor, ahead_relu: bool, bound: float | None) -> None:
        if id(module.running(name)) in self.fixed:
            return
        peak = float(observe.peak(x, ahead_relu, bound))
        if not 0 <= peak < float("inf"):
            return  # an empty tensor, or one that ``observe.update`` refuses
        x = x.detach().clamp_min(0) if ahead_relu else x.detach()
        self.seen.setdefault((module, name), Histogram()).add(x if bound is None else x.clamp(-bound, bound), peak)


def calibrate(
    net: nn.Module,
    loader: Iterable[Any],
    method: str | Mapping[str, str] = "mse",
    *,
    percentile: float = 99.99,
    batches: int | None = None,
    forward: Forward = feed,
    weights: str | None = "mse",
    batchnorm: bool = False,
    equalize: bool = False,
    correct_bias: bool = True,
    hold: bool = True,
    progress: bool = True,
) -> nn.Module:
    """Choose the range of every activation of a fixed-point net from the batches of a loader, in place, without training.

    It prepares the parameters too, in the order of the options below; ``batchnorm`` and ``equalize`` also do so for a net
    before ``init``, which has no ranges. A second calibration takes back what an earlier one did to weights and biases,
    unless they were trained or loaded since.

    Args:
        net: a net after ``init``, in any mode; it comes back in the same.
        loader: an iterable of batches; labels in them are not used.
        method: "max", "percentile", "mse" (least squared error) or "kl" (least relative entropy), or a mapping of
            patterns of dotted layer names to them, of which the first that fits counts; layers without a fit get "mse".
        percentile: percent of the values that method "percentile" does not clip, above 0 and up to 100.
        batches: how many batches are used at most.
        forward: how a batch enters the net; by default a tensor or the first of a tuple is the input, and a mapping holds
            keyword arguments.
        weights: "mse" clips every layer's weights to the range of least squared error, which few weights leave and mostly
            of 4 bits; None leaves them as they are.
        batchnorm: estimate the statistics of all batch normalizations anew.
        equalize: bring the ranges of channels together across layers; the float function stays the same to the bit.
        correct_bias: add to every bias what the layer's outputs lose on average by the clipping and rounding of its
            weights; for a net that was not trained in fixed point.
        hold: whether the ranges stay as they are in the training that may follow (until ``linger.hold_ranges(net, False)``).
        progress: show a progress bar.

    Returns:
        ``net``.

    Raises:
        LingerError: the net has no fixed-point layer, the loader has no batch, a method does not exist, a pattern fits no
            layer, or a range is not finite. The ranges are then as they were before, weights and biases as before any
            calibration.
    """
    require_net("calibrate", net)
    with during("calibrate"):
        if not 0 < percentile <= 100:
            raise LingerError(
                f"percentile is {percentile!r}, allowed are numbers above 0 up to 100; 99.99 is the default"
            )
        if weights not in (None, "mse"):
            raise LingerError(f"weights is {weights!r}, allowed are None and 'mse'; choose one of them")
        net, loader = plain(net), kept(loader, batches)
        converted = any(isinstance(m, IntModule) for m in net.modules())
        refine.undo(net)
        if batchnorm:
            with ranges_kept_on_error(net):
                _prepare(net, next(taken(loader, net, batches)), forward)
                reestimate(net, loader, batches, forward, progress)
        if equalize:
            _equalize(net, next(taken(loader, net, batches)), forward)
        if converted or not (batchnorm or equalize):
            with ranges_kept_on_error(net):
                for module in net.modules() if weights else ():
                    clip_weights(module)
                collect(net, loader, method, percentile, batches, forward, progress)
                if correct_bias:
                    refine.correct_bias(net, loader, batches, forward, progress)
                    collect(net, loader, method, percentile, batches, forward, progress)
            for module in layers(net).values():
                module.still = hold
                module.warm_up(module.learned_names())
                module.forget()
    return net


def collect(
    net: nn.Module, loader: Iterable[Any], method: str | Mapping[str, str], percentile: float, batches: int | None,
    forward: Forward, progress: bool,
) -> None:  # fmt: skip
    """Choose every range from the batches."""
    first = next(taken(loader, net, batches))
    _prepare(net, first, forward)
    rows = methods(net, method)
    collector = Collector()
    with watching(net, collector), bar(progress) as shown:
        for batch in shown.track(taken(loader, net, batches), length(loader, batches), description="calibrate"):
            forward(net, batch)
    choose(collector, rows, percentile)
    settle(net, first, forward, collector)


def _equalize(net: nn.Module, batch: Any, forward: Forward) -> None:
    """Equalize on what reaches the net of a batch, and say so where there is nothing to equalize."""
    calls: list[tuple[Any, Any]] = []
    with modes_kept(net), dry(), torch.no_grad():
        net.eval()
        handle = net.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        try:
            forward(net, batch)
        finally:
            handle.remove()
    if not equalization(net, *calls[0]):
        raise LingerError(
            f"found no two layers of {type(net).__name__} between which channels can be scaled, allowed are Conv1d, Conv2d "
            "and Linear with nothing but relu, pooling and dropout between them and without bounds; leave equalize out"
        )


def layers(net: nn.Module) -> dict[str, IntModule]:
    """The fixed-point layers and sites by their dotted names.

    Raises:
        LingerError: there is none.
    """
    found = {name: m for name, m in net.named_modules() if isinstance(m, IntModule)}
    if not found:
        raise LingerError(f"found {type(net).__name__} without a fixed-point layer; call init first")
    return found


def methods(net: nn.Module, method: str | Mapping[str, str]) -> dict[IntModule, str]:
    """The method of every layer and site."""
    rows = method.items() if isinstance(method, Mapping) else [("*", method)]
    names = layers(net)
    for pattern, row in rows:
        method_of(row)
        if not any(fnmatchcase(name, pattern) for name in names):
            raise LingerError(f"the pattern {pattern!r} fits no layer, allowed are those of {', '.join(names)}")
    return {m: next((row for p, row in rows if fnmatchcase(name, p)), "mse") for name, m in names.items()}


def ranges(net: nn.Module) -> dict[Key, Tensor]:
    """Every range of the net."""
    return {
        (m, name.removeprefix("running_")): buffer
        for m in net.modules()
        if isinstance(m, IntModule)
        for name, buffer in m._buffers.items()
        if buffer is not None and is_range(name)
    }


@contextmanager
def ranges_kept_on_error(net: nn.Module) -> Iterator[None]:
    """All ranges as they were, and parameters as before any calibration, if something is raised inside."""
    before = {key: t.clone() for key, t in ranges(net).items()}
    warm = {m: m.warm() for m, _ in before}
    try:
        yield
    except BaseException:
        for (module, name), value in before.items():
            module.running(name).copy_(value)
            module.set_warm(warm[module])
            module.forget()
        refine.undo(net)
        raise


@torch.no_grad()
def _prepare(net: nn.Module, batch: Any, forward: Forward) -> None:
    """Sites exist from the first forward on; every range starts anew."""
    with modes_kept(net), dry():
        net.eval()
        forward(net, batch)
    for (module, _), running in ranges(net).items():
        running.zero_()
        module.set_warm(module.warm() & {"w"})


@contextmanager
def watching(net: nn.Module, collector: observe.Watcher) -> Iterator[None]:
    """Layers show what they observe to the collector."""
    token = observe.WATCHER.set(collector)
    try:
        with observing(net):
            yield
    finally:
        observe.WATCHER.reset(token)


@torch.no_grad()
def choose(collector: Collector, rows: Mapping[IntModule, str], percentile: float) -> None:
    """Put the range of each histogram in the place of the maximum."""
    for (module, name), seen in collector.seen.items():
        running = module.running(name)
        seen.merge(running.device)
        chosen = method_of(rows[module])
        if chosen is not by_max and float(running) > NOTHING:
            bits = module.out_bits if name == "o" else module.data_bits
            running.fill_(max(chosen(seen, float(running), bits, percentile), NOTHING))
        collector.fixed.add(id(running))


def settle(net: nn.Module, batch: Any, forward: Forward, collector: Collector) -> None:
    """What follows from the chosen ranges: the input grids that layers keep for the state dict."""
    with watching(net, collector):
        forward(net, batch)
