"""A fixed-point net and a loader into the data of a report."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from linger._version import VERSION
from linger.batches import Forward, bar, kept, length, modes_kept, plain, taken
from linger.calibrate import layers
from linger.check import Report as Fit
from linger.check import described, op_name
from linger.errors import LingerError
from linger.floating import originals
from linger.onnx.export import DEFAULT_OPSET, build, write
from linger.onnx.inputs import given
from linger.ops import IntModule
from linger.report._beside import Key, both
from linger.report._data import Certificate, Data, Metric, Summary, Worst
from linger.report._meter import Meter, Noise
from linger.report._rows import Source, rows
from linger.report._worst import MOST, worst_of
from linger.sites import PREFIX
from linger.trace import tensors_of
from linger.verify import verify

CERTIFIED = 8  # samples whose integers are compared

Measure = Callable[[Any, Any], Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of ``report`` that every part reads."""

    metric: Measure | None
    batches: int | None
    forward: Forward
    target: str | os.PathLike[str] | None
    batch_axis: int
    exact: bool
    progress: bool


@dataclass
class Tally:
    """What is counted over the batches."""

    meters: dict[Key, Meter] = field(default_factory=dict)
    noise: Noise = field(default_factory=Noise)
    metrics: list[tuple[float, float]] = field(default_factory=list)
    worst: list[Worst] = field(default_factory=list)
    batches: int = 0
    samples: int = 0

    def add(self, batch: Any, found: Any, wanted: Any, options: Options) -> None:
        """The outputs of a batch in fixed point and in float, None where there is no float net."""
        source, axis = first_input(batch), options.batch_axis
        if wanted is not None:
            f, w = ([t for t in tensors_of(out) if t.is_floating_point()] for out in (found, wanted))
            for a, b in zip(w, f, strict=True):
                self.noise.add(a, b)
            found_worst = worst_of(self.batches, source, axis, f, w)
            self.worst = sorted([*self.worst, *found_worst], key=lambda r: r.sqnr)[:MOST]
        if options.metric is not None:
            reference = math.nan if wanted is None else float(options.metric(wanted, batch))
            self.metrics.append((reference, float(options.metric(found, batch))))
        self.batches += 1
        self.samples += source.shape[axis] if source is not None and source.dim() > axis else 1

    def metric(self, measure: Measure | None) -> Metric | None:
        """The means of what the user measures."""
        if measure is None:
            return None
        reference, fixed = (sum(column) / len(column) for column in zip(*self.metrics, strict=True))
        name = getattr(measure, "__name__", type(measure).__name__).replace("_", " ")
        return Metric(
            name="metric" if name == "<lambda>" else name,
            reference=None if math.isnan(reference) else reference,
            fixed=fixed,
        )


def of_net(net: nn.Module, loader: Iterable[Any], options: Options) -> Data:
    """The report of a net after ``init`` whose ranges are known."""
    net = plain(net)
    layers(net)
    loader = kept(loader, options.batches)
    first = next(taken(loader, net, options.batches))
    args, kwargs = inputs_of(net, first, options.forward)
    tally = Tally()
    with bar(options.progress) as shown:
        total = length(loader, options.batches)
        for batch in shown.track(taken(loader, net, options.batches), total, description="report"):
            _count(net, batch, options, tally)
    one, many = (sampled(args, kwargs, options.batch_axis, n) for n in (1, CERTIFIED))
    with modes_kept(net):
        net.eval()
        proto, origins, file, fit = described(net, *one, options.target)
        source = Source(
            proto=proto, nodes=file.nodes, report=fit, origins=origins, meters=by_row(net, tally.meters), originals=floats(net),
            widths={name: m.parameter_bits for name, m in net.named_modules() if isinstance(m, IntModule) and m.weighted},
        )  # fmt: skip
        made, outputs = rows(source)
        certificate = certified(net, *many) if options.exact else Certificate(elements=0, differing={})
    return Data(
        summary=_summary(net, tally, fit, certificate, options), layers=made, inputs=tuple(t.name for t in file.inputs),
        outputs=outputs, worst=tuple(tally.worst),
    )  # fmt: skip


def inputs_of(net: nn.Module, batch: Any, forward: Forward) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What reaches the net of a batch."""
    calls: list[tuple[Any, Any]] = []
    handle = net.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        with modes_kept(net), torch.no_grad():
            net.eval()
            forward(net, batch)
    finally:
        handle.remove()
    if not calls:
        raise LingerError("forward did not call the net it was given; call it")
    return given(net, *calls[0])


def sampled(
    args: tuple[Any, ...], kwargs: dict[str, Any], axis: int, count: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first samples of a batch; all of it where its tensors do not agree on how many there are."""
    tensors = tensors_of((args, kwargs))
    packed = any(isinstance(x, PackedSequence) for x in (*args, *kwargs.values()))
    sizes = {t.shape[axis] if t.dim() > axis else None for t in tensors}
    if packed or len(sizes) != 1 or None in sizes:
        return args, kwargs
    cut: Any = pytree.tree_map_only(Tensor, lambda t: t.narrow(axis, 0, min(count, t.shape[axis])), (args, kwargs))
    return cut[0], cut[1]


def _count(net: nn.Module, batch: Any, options: Options, tally: Tally) -> None:
    """One batch in fixed point and in float."""
    found, wanted = both(net, batch, options.forward, tally.meters)
    tally.add(batch, found, wanted, options)


def first_input(batch: Any) -> Tensor | None:
    """The first tensor of a batch."""
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    return next(iter(tensors_of(values)), None)


def by_row(net: nn.Module, meters: Mapping[Key, Meter]) -> dict[str, Meter]:
    """Meters under the keys of rows: the name of the call; a call that is all of a layer has the layer's."""
    found = {f"{name}@{n}" if n else name: meter for (name, n), meter in meters.items()}
    for (name, n), meter in meters.items():
        owner, _, own = name.rpartition(".")
        if own.startswith(PREFIX) and owner:
            found.setdefault(f"{owner}@{n}" if n else owner, meter)
    if isinstance(net, IntModule) and (type(net).__name__, 0) in meters:
        found[op_name(type(net).__name__)] = meters[type(net).__name__, 0]
    return found


def floats(net: nn.Module) -> dict[str, Tensor]:
    """Parameters as they were before calibration fitted them to their grids."""
    found: dict[str, Tensor] = dict(net.named_parameters())
    for name, module in net.named_modules():
        found |= {f"{name}.{key}".lstrip("."): value for key, value in originals(module).items()}
    return found


def certified(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Certificate:
    """The net beside its file, in the NumPy runtime and in ONNX Runtime at every level."""
    try:
        proto = exported(net, args, kwargs)
        with TemporaryDirectory() as place:
            path = Path(place) / "net.onnx"
            write(proto, path)
            report = verify(net, path, args, kwargs=kwargs, quiet=True)
    except LingerError as error:
        return Certificate(elements=0, differing={}, why=str(error))
    return Certificate(elements=report.elements, differing=report.differing)


def exported(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> onnx.ModelProto:
    """The file in memory; float islands are rows of the report, and no warning here."""
    return build(net, args, kwargs, None, None, DEFAULT_OPSET, {}, "thinker", net.__dict__.get("_linger_target"))[0]


def _summary(net: nn.Module, tally: Tally, fit: Fit, certificate: Certificate, options: Options) -> Summary:
    parameters = sum(p.numel() for p in net.parameters())
    return Summary(
        net=type(net).__name__, target=fit.target, version=VERSION, batches=tally.batches, samples=tally.samples,
        metric=tally.metric(options.metric), sqnr=tally.noise.sqnr, parameters=parameters, float_bytes=4 * parameters,
        certificate=certificate, **fitted(fit),
    )  # fmt: skip


def fitted(fit: Fit) -> dict[str, Any]:
    """The fields of the summary that ``check`` knows."""
    return {
        "weight_bytes": sum(x.cost.weights for x in fit.layers), "macs": fit.macs, "float_share": fit.float_share,
        "cycles": fit.cycles, "accumulator": max((x.accumulator for x in fit.layers), default=0), "fits": fit.ok,
        "violations": fit.violations, "memory": fit.memory, "left": fit.left,
    }  # fmt: skip
