"""Commands that make something of a net: calibrate its ranges, export it, say which layer hurts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from linger.cli._app import Args, Bits, Inputs, Json, TargetName, Weights, answer, app, reported

Net = Annotated[str, typer.Argument(help="package.module:name of a net, its class, or a function that makes it")]
Data = Annotated[
    list[str], typer.Option("--data", help=".npy, .npz, .wav or .png files whose first axis counts samples; many times")
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="samples of a batch")]


@app.command()
def calibrate(
    net: Net,
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="a .safetensors or .pt file for the weights and ranges")],
    input: Inputs = [],  # noqa: B006
    args: Args = None,
    weights: Weights = None,
    method: Annotated[str, typer.Option(help="max, percentile, mse or kl")] = "mse",
    target: TargetName = None,
    weight_bits: Bits = 8,
    batch: Batch = 32,
    json: Json = False,
) -> None:
    """Convert a net, choose its ranges from data without training, and save the fixed-point checkpoint.

    Without --input, the net is traced with the first sample of --data.
    """
    from linger.weights import write_weights

    with reported(json):
        made, batches = _calibrated(net, args, weights, input, data, method, target, weight_bits, batch)
        write_weights(made, out)
    ranges = _ranges(made)
    said = {"out": str(out), "batches": len(batches), "method": method, "ranges": ranges}
    answer(said, json, f"{len(ranges)} ranges from {len(batches)} batches with {method}: {out}")


def _calibrated(
    net: str, args: str | None, weights: str | None, input: list[str], data: list[str], method: str, target: str | None,
    weight_bits: int, batch: int,
) -> tuple[Any, list[Any]]:  # fmt: skip
    from linger import calibrate as choose
    from linger.arguments import batches_of, fixed_point, inputs_of, net_of, sample_of
    from linger.histogram import method_of

    method_of(method)  # before any work
    batches = batches_of(data, batch)
    found = net_of(net, args)
    inputs = inputs_of(input) if input else sample_of(found, batches)
    made = fixed_point(found, inputs, weights, target, weight_bits)
    return choose(made, batches, method=method), batches


def _ranges(net: Any) -> dict[str, float]:
    """Every range that was chosen, by its key in the state dict."""
    return {
        k: float(v) for k, v in net.state_dict().items() if k.rpartition(".")[2].startswith("running_") and v.dim() == 0
    }


@app.command()
def export(
    net: Net,
    out: Annotated[Path, typer.Option("--out", "-o", help="the .onnx file")],
    input: Inputs = [],  # noqa: B006
    args: Args = None,
    weights: Weights = None,
    data: Data = [],  # noqa: B006
    method: Annotated[str, typer.Option(help="how --data chooses the ranges: max, percentile, mse or kl")] = "mse",
    target: TargetName = None,
    weight_bits: Bits = 8,
    dialect: Annotated[str, typer.Option(help="thinker, standard or qdq")] = "thinker",
    opset: Annotated[int | None, typer.Option(help="version of the standard ops; 17 by default")] = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="axis 0 of inputs may have any size")] = False,
    golden: Annotated[
        bool,
        typer.Option("--golden/--no-golden", help="store inputs, outputs and hashes in the file for linger verify"),
    ] = True,
    batch: Batch = 32,
    json: Json = False,
) -> None:
    """Write a net as an ONNX file: a fixed-point checkpoint, or any checkpoint and --data to choose the ranges from."""
    import warnings

    from linger import onnx
    from linger.contents import contents

    with reported(json):
        made, inputs = _for_export(net, args, weights, input, data, method, target, weight_bits, batch)
        with warnings.catch_warnings(record=True):  # what stays in float is in the answer
            warnings.simplefilter("always")
            onnx.export(
                made, inputs, out, dialect=dialect, opset_version=opset, target=target,
                golden=True if golden and dialect != "qdq" else None,
                dynamic_shapes=tuple({0: "batch"} for _ in inputs) if dynamic_batch else None,
            )  # fmt: skip
        found = contents(out)
    islands = f"; in float: {', '.join(found.float_islands)}" if found.float_islands else ""
    text = f"{out}: {len(found.operations)} nodes, {found.parameter_bytes:,} bytes of parameters{islands}"
    said = {
        "out": str(out), "bytes": out.stat().st_size, "target": found.target, "dialect": found.dialect, "ops": dict(found.ops),
        "parameter_bytes": found.parameter_bytes, "float_islands": list(found.float_islands), "golden": found.golden is not None,
    }  # fmt: skip
    answer(said, json, text)


def _for_export(
    net: str, args: str | None, weights: str | None, input: list[str], data: list[str], method: str, target: str | None,
    weight_bits: int, batch: int,
) -> tuple[Any, Any]:  # fmt: skip
    from linger.arguments import fixed_point, inputs_of, net_of, sample_of

    if data:
        made, batches = _calibrated(net, args, weights, input, data, method, target, weight_bits, batch)
        return made, inputs_of(input) if input else sample_of(made, batches)
    inputs = inputs_of(input)
    return fixed_point(net_of(net, args), inputs, weights, target, weight_bits), inputs


@app.command()
def analyse(
    what: Annotated[str, typer.Argument(help="a file of weights, or package.module:name of a net, with --data")],
    data: Data = [],  # noqa: B006
    input: Inputs = [],  # noqa: B006
    args: Args = None,
    weights: Weights = None,
    method: Annotated[str, typer.Option(help="how ranges are chosen: max, percentile, mse or kl")] = "mse",
    target: TargetName = None,
    weight_bits: Bits = 8,
    batch: Batch = 32,
    json: Json = False,
) -> None:
    """Which layer hurts: of a net and data, each layer alone in fixed point; of weights, how spread out they are."""
    with reported(json):
        if data:
            made, batches = _calibrated(what, args, weights, input, data, method, target, weight_bits, batch)
            said, text = _sensitivity(made, batches)
        else:
            said, text = _spread(what, args, weights)
    answer(said, json, text)


def _sensitivity(net: Any, batches: list[Any]) -> tuple[dict[str, Any], str]:
    from linger import sensitivity

    found = sensitivity(net, batches)
    rows = [
        {"layer": r.layer, "kind": r.kind, "parameters": r.parameters, "bits": list(r.bits), "noise": r.noise}
        for r in found.rows
    ]
    return {"kind": "sensitivity", "rows": rows}, str(found)


def _spread(what: str, args: str | None, weights: str | None) -> tuple[dict[str, Any], str]:
    from linger.analysis import wb_analyse
    from linger.arguments import net_of
    from linger.weights import load_into

    source: Any = what
    if ":" in what:
        source = net_of(what, args)
        if weights is not None:
            load_into(source, weights)
    found = wb_analyse(source, None)
    rows = [
        {"layer": r.layer, "mean": r.mean, "max": r.max, "dynamic": r.dynamic, "outliers": r.outliers,
         "multiple": r.multiple, "versu": r.versu if math.isfinite(r.versu) else None}
        for r in found.rows
    ]  # fmt: skip
    return {"kind": "spread", "rows": rows}, str(found)
