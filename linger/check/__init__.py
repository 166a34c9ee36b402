"""``linger.check``: whether a net fits a chip, and what it costs there, before it is trained."""

from __future__ import annotations

import os
from typing import Any

import onnx
from torch import nn

from linger import runtime
from linger.check._cost import cost_of
from linger.check._file import facts_of
from linger.check._net import exported
from linger.check._report import Layer, Report
from linger.check._rules import Violation, violations
from linger.errors import during
from linger.swap import require_net
from linger.targets import Target
from linger.targets import target as find_target

__all__ = ["Layer", "Report", "Violation", "check"]


def check(
    net: nn.Module | str | os.PathLike[str] | onnx.ModelProto,
    *args: Any,
    target: str | None = None,
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
    net: Any, args: tuple[Any, ...], target: str | None, kwargs: dict[str, Any], bits: dict[str, int]
) -> Report:
    if isinstance(net, nn.Module):
        chip = find_target(target or net.__dict__.get("_linger_target"))
        proto, left = exported(net, args, kwargs, chip, bits)
        return _of_file(proto, chip, left)
    if not isinstance(net, (str, os.PathLike, onnx.ModelProto)):
        require_net("check", net)
    proto = net if isinstance(net, onnx.ModelProto) else runtime.read(net)  # type: ignore[arg-type]
    named = next((m.value for m in proto.metadata_props if m.key == "target"), None)
    return _of_file(proto, find_target(target or named), [], args)


def _of_file(proto: onnx.ModelProto, chip: Target, left: list[str], args: tuple[Any, ...] = ()) -> Report:
    file = facts_of(proto, _sizes(proto, args))
    layers = tuple(
        Layer(
            name=n.layer, op=n.op, input=n.inputs[0].shape if n.inputs else (), output=n.outputs[0].shape,
            accumulator=file.accumulators.get(n.layer, 0), cost=cost_of(n),
        )
        for n in file.nodes
    )  # fmt: skip
    return Report(target=chip.name, violations=tuple(violations(file, chip)), layers=layers)


def _sizes(proto: onnx.ModelProto, args: tuple[Any, ...]) -> dict[str, int]:
    """Named axes -> their sizes in the arrays given."""
    found: dict[str, int] = {}
    for value, given in zip(proto.graph.input, args, strict=False):
        for d, size in zip(value.type.tensor_type.shape.dim, given.shape, strict=False):
            if d.dim_param:
                found[d.dim_param] = int(size)
    return found
