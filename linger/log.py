"""Ranges, scales, saturation and SQNR of a net that is being trained, to a writer such as TensorBoard's.

SQNR and saturation are those of a report (``report``). Names of scalars, for a layer ``block.conv``:

    linger/range/block.conv.o           the range of its result (x: of its input)
    linger/scale/block.conv.o           log2 of the scale that follows from it
    linger/weight sqnr/block.conv       of its weights, in dB
    linger/weight clipped/block.conv    share of its weights that the grid clips, in percent
    linger/sqnr/block.conv              of its result against the float net, in dB; with a batch
    linger/own sqnr/block.conv          what it adds itself; with a batch
    linger/clipped/block.conv           share of its result that the grid clips, in percent; with a batch
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from linger.batches import Forward, feed, moved, plain
from linger.calibrate import layers
from linger.check import readable
from linger.errors import LingerError, during
from linger.numerics import NOTHING, Grid
from linger.ops import IntModule
from linger.ops._recurrent import RecurrentInt
from linger.ops._state import is_range
from linger.ops._weighted import WeightedInt
from linger.report import Key, Meter, both
from linger.swap import require_net


class Writer(Protocol):
    """What ``torch.utils.tensorboard.SummaryWriter`` and its like have."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """A number at a step."""

    def add_histogram(self, tag: str, values: Any, global_step: int) -> Any:
        """Many numbers at a step."""


@torch.no_grad()
def log(
    writer: Writer, net: nn.Module, step: int, batch: Any = None, *, forward: Forward = feed, histograms: bool = False
) -> None:
    """Write what the grids of a net are and what they cost. The net stays as it is; training does not slow down between calls.

    Args:
        writer: anything with ``add_scalar(name, value, step)``, such as a ``SummaryWriter``.
        net: a net after ``init``, in any mode. What has no range yet is left out.
        step: the number of the step.
        batch: a batch of inputs, as a loader yields it, on which results are compared with float, in eval mode; None for
            ranges, scales and weights alone.
        forward: how a batch enters the net, as for ``calibrate``.
        histograms: also ``add_histogram`` the weights on their grids.

    Raises:
        LingerError: the net is not converted, or the writer has no such function.
    """
    with during("log"):
        require_net("log", net)
        needed = ["add_scalar", *(["add_histogram"] if histograms else [])]
        missing = [name for name in needed if not callable(getattr(writer, name, None))]
        if missing:
            raise LingerError(f"found a writer without {missing[0]}, allowed are writers like TensorBoard's; pass one")
        net = plain(net)
        for name, module in layers(net).items():
            _ranges(writer, readable(name), module, step)
            for part, weight, meter in weights(module):
                tag = readable(f"{name}.{part}".strip(".")) if part else readable(name)
                _scalars(writer, tag, {"weight sqnr": meter.own.sqnr, "weight clipped": _percent(meter)}, step)
                if histograms:
                    writer.add_histogram(f"linger/weights/{tag}", weight, step)
        if batch is not None:
            _results(writer, net, moved(batch, net), forward, step)


def _scalars(writer: Writer, name: str, values: dict[str, float | None], step: int) -> None:
    for kind, value in values.items():
        if value is not None:
            writer.add_scalar(f"linger/{kind}/{name}", value, step)


def _ranges(writer: Writer, name: str, module: IntModule, step: int) -> None:
    for key, running in module._buffers.items():
        if running is None or not is_range(key) or float(running) <= NOTHING:
            continue
        part = key.removeprefix("running_")
        hidden = isinstance(module, RecurrentInt) and part.startswith("h")
        bits: Any = module.hidden_bits if hidden else module.bits_of(part)
        scale = float(module.scale(part, bits).log2())
        _scalars(writer, f"{name}.{part}", {"range": float(running), "scale": scale}, step)


def weights(module: IntModule) -> Iterator[tuple[str, Tensor, Meter]]:
    """The weights of a layer on their grids: "" (of the only one) or the name, the values, and what the grid costs."""
    if isinstance(module, WeightedInt) and float(module.running("x")) > NOTHING:
        on_grid, _, scale = module.grids(module.scale("x", module.data_bits))
        yield "", on_grid, _meter(module.weight, on_grid, scale, module.parameter_bits)
    if isinstance(module, RecurrentInt) and float(module.running("i")) > NOTHING:
        for k in range(module.num_layers * module.directions):
            layer, direction = divmod(k, module.directions)
            s_x = module.scale("i", module.data_bits) if not layer else module.hidden_scale(layer - 1)
            unit, suffix = (
                module.unit(layer, direction, s_x, module.hidden_scale(layer)),
                module.suffix(layer, direction),
            )
            for part, on_grid, scale in (("weight_ih", unit.w_ih, unit.s_ih), ("weight_hh", unit.w_hh, unit.s_hh)):
                wanted: Any = module._parameters[part + suffix]
                yield part + suffix, on_grid, _meter(wanted, on_grid, scale, module.parameter_bits)


def _meter(wanted: Tensor, on_grid: Tensor, scale: Tensor, bits: int) -> Meter:
    meter = Meter(grid=Grid(scale, bits))
    meter.add_own(wanted.detach().float(), on_grid)
    return meter


def _percent(meter: Meter) -> float | None:
    return None if meter.share_clipped is None else 100 * meter.share_clipped


def _results(writer: Writer, net: nn.Module, batch: Any, forward: Forward, step: int) -> None:
    meters: dict[Key, Meter] = {}
    both(net, batch, forward, meters)
    for (name, turn), meter in meters.items():
        tag = readable(name) + (f"@{turn}" if turn else "")
        found = {"sqnr": meter.total.sqnr, "own sqnr": meter.own.sqnr, "clipped": _percent(meter)}
        _scalars(writer, tag, found, step)
