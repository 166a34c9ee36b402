"""``linger.check``: whether a net fits a chip, and what it costs there, before it is trained."""

from __future__ import annotations

import copy
import os
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from linger import runtime
from linger.check._cost import cost_of, cycles_of
from linger.check._file import File, Node, facts_of
from linger.check._memory import usage
from linger.check._net import Origin, built, exported, follow
from linger.check._report import Layer, Report, Space
from linger.check._rules import Violation, is_float, violations
from linger.check._words import op_name, readable
from linger.errors import LingerError, during
from linger.swap import require_net
from linger.targets import Target, half_up
from linger.targets import target as find_target
from linger.targets._words import bytes_text
from linger.trace import tensors_of

__all__ = [
    "Layer",
    "Node",
    "Origin",
    "Report",
    "Space",
    "Violation",
    "check",
    "described",
    "of_proto",
    "op_name",
    "readable",
]


def check(
    net: nn.Module | str | os.PathLike[str] | onnx.ModelProto,
    *args: Any,
    target: str | os.PathLike[str] | None = None,
    kwargs: dict[str, Any] | None = None,
    data_bits: int = 8,
    parameter_bits: int = 8,
    out_bits: int = 8,
    quiet: bool = False,
) -> Report:
    """Compare a net of any stage, or an exported file, with a chip's table. The net stays as it is.

    Args:
        net: a float, traced, normalized or fixed-point net, or the path of an exported file.
        args: inputs of its forward, one sample; of a file with dynamic axes, arrays that say their sizes.
        target: the chip, or the path of a .toml file; by default that of the net or the file, else venus.
        kwargs: keyword inputs of the forward.
        data_bits: width of layer inputs, as for ``init``; without effect on a net that is converted.
        parameter_bits: width of weights.
        out_bits: width of layer outputs.
        quiet: do not print the report.

    Returns:
        Every violation with its way out, every layer's cost, and the sums.

    Raises:
        LingerError: the forward does not run on these inputs, or there is no such chip.
    """
    with during("check"):
        bits = {"data_bits": data_bits, "parameter_bits": parameter_bits, "out_bits": out_bits}
        report = _report(net, args, target, kwargs or {}, bits)
    if not quiet:
        print(report)
    return report


def _report(
    net: Any, args: tuple[Any, ...], target: str | os.PathLike[str] | None, kwargs: dict[str, Any], bits: dict[str, int]
) -> Report:
    if isinstance(net, nn.Module):
        chip = find_target(target or net.__dict__.get("_linger_target"))
        proto, origins, left = exported(net, args, kwargs, half_up(chip), bits)
        return of_file(facts_of(proto, origins=origins, inputs=arrays(args, kwargs)), chip, left)
    if not isinstance(net, (str, os.PathLike, onnx.ModelProto)):
        require_net("check", net)
    proto = net if isinstance(net, onnx.ModelProto) else runtime.read(net)
    return of_proto(proto, _given(proto, args), target)[1]


def _given(proto: onnx.ModelProto, args: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
    """The inputs of a file, each of the shape that it declares."""
    stored = {i.name for i in proto.graph.initializer}
    inputs = [runtime.declared(v) for v in proto.graph.input if v.name not in stored]
    if len(args) > len(inputs):
        raise LingerError(f"found {len(args)} inputs, allowed are {', '.join(i.name for i in inputs)}; pass those")
    values = [a.detach().cpu() if isinstance(a, torch.Tensor) else a for a in args]
    sizes: dict[str, int] = {}
    return tuple(i.shaped(i.read(v), sizes) for i, v in zip(inputs, values, strict=False))


def described(
    net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], target: str | os.PathLike[str] | None
) -> tuple[onnx.ModelProto, dict[str, Origin], File, Report]:
    """A fixed-point net as it is, with the ranges it has: its file, where the nodes come from, the facts and the report."""
    chip = find_target(target or net.__dict__.get("_linger_target"))
    shown = half_up(chip)
    proto, origins = built(follow(copy.deepcopy(net), shown), args, kwargs, shown)
    file = facts_of(proto, origins=origins, inputs=arrays(args, kwargs))
    return proto, origins, file, of_file(file, chip, [])


def of_proto(
    proto: onnx.ModelProto, args: tuple[Any, ...], target: str | os.PathLike[str] | None
) -> tuple[File, Report]:
    """The facts of a file and the report."""
    if not proto.graph.node:
        raise LingerError("found a file without nodes, so it is truncated or empty; export it again")
    named = next((m.value for m in proto.metadata_props if m.key == "target"), None)
    file = facts_of(proto, _sizes(proto, args), inputs=[np.asarray(a) for a in args])
    return file, of_file(file, find_target(target or named), [])


def arrays(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[np.ndarray]:
    """The inputs as a file takes them: it has no floats but float32."""
    tensors = [t.detach().cpu() for t in tensors_of((args, kwargs))]
    return [(t.float() if t.is_floating_point() else t).numpy() for t in tensors]


def of_file(file: File, chip: Target, left: list[str]) -> Report:
    """The report of a file whose facts are known."""
    layers = tuple(
        Layer(
            name=n.layer, op=n.called if n.unknown else n.op, source=n.source, input=n.inputs[0].shape if n.inputs else (),
            output=n.outputs[0].shape, peak=file.accumulators.get(n.layer, 0), in_float=is_float(n), cost=cost_of(n),
            cycles=cycles_of(n, chip.latency),
        )
        for n in file.nodes
        if n.op not in ("Quant", "Dequant")
    )  # fmt: skip
    return Report(
        target=chip.name, violations=tuple(violations(file, chip)), layers=layers, memory=spaces(file, chip), left=tuple(left)
    )  # fmt: skip


def spaces(file: File, chip: Target) -> tuple[Space, ...]:
    """What every memory of the chip holds."""
    used, there = usage(file, chip), chip.memory
    buffers = bytes_text(sum(used.prefetch))
    share = f"activations, {bytes_text(used.workspace)} of workspace, {buffers} of prefetch buffers"
    psram = "parameters" + (
        f", {bytes_text(used.outside)} of activations larger than share memory" if used.outside else ""
    )
    found = [
        Space(name="share memory", what=share, used=used.activations, size=there.share),
        Space(name="PSRAM", what=psram, used=used.parameters + used.outside, size=there.psram),
        Space(name="flash", what="parameters", used=used.parameters, size=there.flash),
    ]
    return tuple(found)


def _sizes(proto: onnx.ModelProto, args: tuple[Any, ...]) -> dict[str, int]:
    """Named axes -> their sizes in the arrays given; one sample where the first axis of an input has only a name."""
    leading = [value.type.tensor_type.shape.dim[:1] for value in proto.graph.input]
    found = {d.dim_param: 1 for first in leading for d in first if d.dim_param}
    for value, given in zip(proto.graph.input, args, strict=False):
        for d, size in zip(value.type.tensor_type.shape.dim, given.shape, strict=False):
            if d.dim_param:
                found[d.dim_param] = int(size)
    return found
