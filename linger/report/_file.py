"""An exported file and a loader into the data of a report: its integers, and beside them a float net where one is given."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linger import runtime
from linger._version import VERSION
from linger.batches import bar, length, modes_kept, moved, taken
from linger.check import Node, of_proto
from linger.errors import LingerError
from linger.numerics import Grid
from linger.report._data import Certificate, Data, Summary
from linger.report._gather import CERTIFIED, Options, Tally, fitted
from linger.report._meter import Meter
from linger.report._rows import BOUNDARY, Source, rows
from linger.verify import LEVELS, session

BITS = {"int8": 8, "int16": 16, "int32": 32}


def of_file(path: str | os.PathLike[str], loader: Iterable[Any], reference: nn.Module | None, options: Options) -> Data:
    """The report of a file."""
    proto = runtime.read(path)
    model = runtime.from_proto(proto, os.fspath(path))
    tally, meters = Tally(), dict[str, Meter]()
    nodes: tuple[Node, ...] = ()
    feed: dict[str, np.ndarray] = {}
    with bar(options.progress) as shown:
        batches = taken(loader, nn.Identity(), options.batches)
        for batch in shown.track(batches, length(loader, options.batches), description="report"):
            batch = pytree.tree_map_only(np.ndarray, torch.from_numpy, batch)
            given = inputs_of(model, batch)
            if not nodes:
                file, fit = of_proto(
                    proto, tuple(cut(x, options.batch_axis, 1) for x in given.values()), options.target
                )
                nodes, feed = file.nodes, given
            found = model(given)
            for node in nodes:
                measure(node, model.tensors, meters)
            wanted = None if reference is None else in_float(reference, batch, options)
            tally.add(batch, tensors(found), wanted, options)
    source = Source(proto=proto, nodes=nodes, report=fit, origins={}, meters=meters, originals={}, widths={})
    made, outputs = rows(source)
    if dynamic(model, options.batch_axis):
        feed = {name: cut(x, options.batch_axis, CERTIFIED) for name, x in feed.items()}
    certificate = certified(proto, model, feed) if options.exact else Certificate(elements=0, differing={})
    stored = {t.name: t for n in nodes for t in n.inputs if t.stored and t.dtype != "int64"}
    parameters = sum(t.elements for t in stored.values())
    summary = Summary(
        net=os.path.basename(os.fspath(path)), target=fit.target, version=VERSION, batches=tally.batches,
        samples=tally.samples, metric=tally.metric(options.metric), sqnr=tally.noise.sqnr, parameters=parameters,
        float_bytes=4 * parameters, certificate=certificate, **fitted(fit),
    )  # fmt: skip
    return Data(summary=summary, layers=made, inputs=tuple(model.inputs), outputs=outputs, worst=tuple(tally.worst))


def inputs_of(model: runtime.Model, batch: Any) -> dict[str, np.ndarray]:
    """What the file takes of a batch: as many of its tensors as it has inputs, or those of these names."""
    if isinstance(batch, Mapping):
        return {name: batch[name].detach().cpu().numpy() for name in model.inputs if name in batch}
    values = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    values = values[: len(model.inputs)]
    if not all(isinstance(x, Tensor) for x in values):
        raise LingerError(
            f"the loader yields {', '.join(type(x).__name__ for x in values)}, allowed are tensors and arrays; pass such a loader"
        )
    return {name: x.detach().cpu().numpy() for name, x in zip(model.inputs, values, strict=False)}


def cut(x: np.ndarray, axis: int, count: int) -> np.ndarray:
    """The first samples."""
    return x.take(range(min(count, x.shape[axis])), axis) if x.ndim > axis else x


def dynamic(model: runtime.Model, axis: int) -> bool:
    """Whether the file takes any number of samples, which ``axis`` counts."""
    return all(isinstance(n, str) for i in model.declared for n in (i.shape or ())[axis : axis + 1])


def tensors(out: Any) -> Any:
    """The file's output, or several, as tensors."""
    return tuple(map(tensors, out)) if isinstance(out, tuple) else torch.from_numpy(np.array(out))


def in_float(reference: nn.Module, batch: Any, options: Options) -> Any:
    """The float net's outputs."""
    with modes_kept(reference), torch.no_grad():
        reference.eval()
        return options.forward(reference, moved(batch, reference))


def measure(node: Node, values: Mapping[str, np.ndarray], meters: dict[str, Meter]) -> None:
    """Count the result of a node that is on a grid."""
    name, scale = node.outputs[0].name, node.attrs.get("scale_o")
    x = values.get(name)
    if node.op in BOUNDARY or x is None or scale is None or str(x.dtype) not in BITS:
        return
    meter = meters.setdefault(node.name, Meter(grid=Grid(torch.tensor(float(scale)), BITS[str(x.dtype)])))
    meter.add_fixed(torch.from_numpy(x.astype(np.float32)) / float(scale))


def certified(proto: onnx.ModelProto, model: runtime.Model, feed: dict[str, np.ndarray]) -> Certificate:
    """ONNX Runtime at every level beside the NumPy runtime."""
    expected = arrays(model(feed))
    differing = {}
    for level in LEVELS if proto.functions else ():
        try:
            found = session(proto, level).run(None, feed)
        except Exception as error:  # ONNX Runtime's own classes have no common base
            return Certificate(elements=0, differing={}, why=f"ONNX Runtime ({level}) does not run it: {error}")
        differing[level] = sum(int((e != f).sum()) for e, f in zip(expected, found, strict=True))
    why = "" if differing else "the file has no function bodies, without which ONNX Runtime does not run it"
    return Certificate(elements=sum(x.size for x in expected) if differing else 0, differing=differing, why=why)


def arrays(out: Any) -> list[np.ndarray]:
    """The outputs of a file."""
    return list(out) if isinstance(out, tuple) else [out]
