"""``linger.onnx.export``: a converted net into a file whose integers are those of its eval forward."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from linger._version import VERSION
from linger.errors import LingerError, LingerWarning, during
from linger.files import whole
from linger.onnx.builder import Builder
from linger.onnx.golden import embed
from linger.onnx.inputs import (
    array,
    axes_of,
    given,
    input_names_of,
    output_names_of,
    refuse_strange,
    require_leaves,
    symbols_of,
)
from linger.onnx.passes import DIALECTS
from linger.onnx.sizes import record_all
from linger.onnx.writer import UNKNOWN, Writer
from linger.ops import IntModule
from linger.swap import require_net
from linger.targets import target as find_target
from linger.trace import Graph, recorded, tensors_of

DEFAULT_OPSET = 17  # the newest that the chip's packer was proven to read unchanged
OPSETS = range(12, 1 + min(onnx.defs.onnx_opset_version(), 27))  # ONNX Runtime 1.32 has no QuantizeLinear of opset 28
IGNORED = {
    "verbose", "dynamo", "export_params", "do_constant_folding", "training", "operator_export_type", "keep_initializers_as_inputs",
    "report", "optimize", "verify", "profile", "fallback", "artifacts_dir", "autograd_inlining", "is_update_dequant",
    "external_data", "verify_export",
}  # fmt: skip
UNSUPPORTED = {"custom_translation_table", "custom_opsets", "dump_exported_program", "export_modules_as_functions"}


def export(
    model: nn.Module,
    args: Tensor | tuple[Any, ...] = (),
    f: str | os.PathLike[str] | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int | None = None,
    dynamic_axes: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    dialect: str = "thinker",
    target: str | os.PathLike[str] | None = None,
    golden: Any = None,
    **options: Any,
) -> onnx.ModelProto:
    """Write a converted net to ``f``. Accepts the call of ``torch.onnx.export`` and leaves the live net as it is.

    Args:
        model: a net after ``init`` that has seen at least one batch. A copy's eval forward is exported.
        args: inputs of its forward, one tensor or a tuple.
        f: path of the file, written whole or not at all; None to get the model only.
        kwargs: keyword inputs of the forward.
        input_names: names of the inputs; by default those of forward's parameters.
        output_names: names of the outputs; by default ``output_0`` ...
        opset_version: 12 to the newest known one; 17 by default, which the chip's packer reads.
        dynamic_axes: ``{"x": {0: "batch"}}`` or ``{"x": [0]}``.
        dynamic_shapes: the other spelling, ``{"x": {0: torch.export.Dim("batch")}}`` or a tuple of those.
        dialect: "thinker" (the chip's, with function bodies), "standard" (no custom op) or "qdq" (not exact on ties).
        target: the chip or the path of a .toml file, by default the one given to ``init``.
        golden: inputs that the file shall hold together with the outputs that PyTorch makes of them and a hash of every
            part, so that ``linger.verify("net.onnx")`` needs nothing else; True for ``args``. The bytes stay the same.
        options: other arguments of ``torch.onnx.export`` that change nothing here are accepted.

    Returns:
        The model as it was written.

    Raises:
        LingerError: the net was never run, an op has no form in the file, or a size that must be fixed is dynamic.
    """
    with during("export"):
        unknown = sorted(k for k, v in options.items() if k not in IGNORED and (v or k not in UNSUPPORTED))
        if unknown:
            raise LingerError(
                f"found argument {', '.join(unknown)}, allowed are those of torch.onnx.export that apply here; leave it out"
            )
        if dialect not in DIALECTS:
            raise LingerError(f"dialect is {dialect!r}, allowed are {', '.join(DIALECTS)}; choose one of them")
        if golden is not None and DIALECTS[dialect].real:
            raise LingerError(
                f"found golden inputs for dialect {dialect!r}, which is not exact, allowed are the others; leave them out"
            )
        opset = DEFAULT_OPSET if opset_version is None else opset_version
        if opset not in OPSETS:
            raise LingerError(
                f"opset_version is {opset!r}, allowed are {OPSETS[0]} to {OPSETS[-1]}; choose one of them"
            )
        require_net("export", model)
        inputs, kwargs = given(model, args, kwargs)
        proto, islands = build(
            model, inputs, kwargs, input_names, output_names, opset, axes_of(dynamic_axes, dynamic_shapes), dialect,
            target or model.__dict__.get("_linger_target"),
        )  # fmt: skip
        if golden is not None:
            _embed(proto, model, *((inputs, kwargs) if golden is True else given(model, golden, None)))
        if f is not None:
            write(proto, f)
    if islands:
        warnings.warn(f"export: in float: {', '.join(islands)}", LingerWarning, stacklevel=2)
    return proto


def _embed(proto: onnx.ModelProto, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Golden inputs, and what the eval forward makes of them, into the metadata."""
    inputs = [array(t).copy() for t in tensors_of((args, kwargs))]
    out = recorded(model, args, kwargs, leaf=lambda m: isinstance(m, IntModule))[1]
    embed(proto, inputs, [array(t) for t in tensors_of(out)])


def build(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], input_names: Sequence[str] | None,
    output_names: Sequence[str] | None, opset: int, axes: Mapping[Any, Any], dialect: str, target: str | os.PathLike[str] | None,
    writer: Callable[[nn.Module, Graph, Builder], Writer] = Writer,
) -> tuple[onnx.ModelProto, list[str]]:  # fmt: skip
    """The checked model, and the names of what is in float. ``writer`` turns the recorded calls into nodes."""
    chip = find_target(target)
    tensors = tensors_of((args, kwargs))
    names = input_names_of(model, args, kwargs, input_names, output_names)
    refuse_strange(axes, names, output_names)
    by_input = [symbols_of(name, i, axes, t) for i, (name, t) in enumerate(zip(names, tensors, strict=True))]
    graph, out, symbols = record_all(model, args, kwargs, by_input, leaf=lambda m: isinstance(m, IntModule))
    require_leaves("output", out)
    if not graph.outputs:
        raise LingerError(
            f"the forward of {type(model).__name__} returns no tensor; return what the file is to compute"
        )
    b = Builder(opset, chip, symbols)
    w = writer(model, graph, b)
    outputs = output_names_of(len(graph.outputs), output_names)
    b.names.update(names, outputs)
    for value, name, by_axis, tensor in zip(graph.inputs, names, by_input, tensors, strict=False):
        shape = ir.Shape([by_axis.get(i, int(s)) for i, s in enumerate(value.shape)])
        made = ir.Value(name=name, type=ir.TensorType(_dtype(tensor)), shape=shape)
        b.inputs.append((made, value.shape))
        w.floats[value.id] = made
    w.write()
    results = [_output(w, v, name) for v, name in zip(graph.outputs, outputs, strict=True)]
    b.prune(results)
    functions, ir_version = b.functions(DIALECTS[dialect].real)
    imports = {"": opset} | ({"thinker": 1} if functions else {}) | ({} if w.complete else {UNKNOWN: 1})
    made_graph = ir.Graph(
        [v for v, _ in b.inputs], results, nodes=b.nodes, initializers=list(b.initializers.values()), opset_imports=imports,
        name="linger",
    )  # fmt: skip
    finished = ir.Model(
        made_graph, ir_version=ir_version, producer_name="linger", producer_version=VERSION, functions=functions,
        metadata_props=_metadata(w, chip.name, dialect),
    )  # fmt: skip
    proto = DIALECTS[dialect].finish(ir.to_proto(finished))
    if w.complete:
        _check(proto)
    return proto, w.islands


def _output(w: Writer, v: Any, name: str) -> ir.Value:
    """A result under its own name: floats, or the integers and truth values that the net itself returns."""
    source = w.plain(v) if v.dtype.is_floating_point else w.as_is(v)
    producer = source.producer()
    shared = (
        producer is None
        or any(n is not producer and source in n.inputs for n in w.build.nodes)
        or source.name in _taken(w)
    )
    if shared:
        w.build.names.discard(name)
        dtype = source.dtype
        assert dtype is not None
        source = w.build.one(name, "Identity", [source], {}, dtype, v.shape)
    else:
        source.name = name
    w.__dict__.setdefault("taken", set()).add(name)
    return source


def _taken(w: Writer) -> set[str]:
    return w.__dict__.get("taken", set())


def _dtype(t: Tensor) -> ir.DataType:
    return (
        ir.DataType.FLOAT
        if t.dtype.is_floating_point
        else ir.DataType.from_numpy(torch.empty(0, dtype=t.dtype).numpy().dtype)
    )


def _metadata(w: Writer, target: str, dialect: str) -> dict[str, str]:
    """Sorted, without anything that changes between runs."""
    certificate = {
        name: {"peak": int(peak), "bits": int(peak).bit_length() + 1} for name, peak in sorted(w.peaks.items())
    }  # fmt: skip
    props = {
        "linger_version": VERSION,
        "target": target,
        "dialect": dialect,
        "accumulators": json.dumps(certificate, sort_keys=True),
    }
    if w.islands:
        props["float_islands"] = json.dumps(w.islands)
    return dict(sorted(props.items()))


def _check(proto: onnx.ModelProto) -> None:
    """The ONNX checker with full checks and strict shape inference; a failure is ours."""
    try:
        onnx.checker.check_model(proto, full_check=True)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise LingerError(
            f"the file would not be valid ONNX: {error}; this is a bug of linger, please report it"
        ) from error


def write(proto: onnx.ModelProto, f: str | os.PathLike[str]) -> None:
    """Write the bytes of the model to ``f``, whole or not at all."""
    with whole(f) as out:
        out.write(proto.SerializeToString(deterministic=True))
