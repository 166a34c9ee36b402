"""Commands that read an exported file: what is in it, does it verify, run it, compare two."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from linger.cli._app import DIFFERENT, FINE, Args, Bits, Inputs, Json, Weights, answer, app, console, reported
from linger.errors import LingerError

File = Annotated[Path, typer.Argument(help="a .onnx file that linger exported")]
FileTarget = Annotated[str | None, typer.Option("--target", help="the chip of the net; by default that of the file")]


@app.command()
def inspect(file: File, json: Json = False) -> None:
    """What is in a file: inputs and outputs, ops and grids, the certificate of its accumulators, golden inputs."""
    from linger.contents import contents

    with reported(json):
        found = contents(file)
    if json:
        answer(found, json)
    else:
        console().print(found.rendered(), highlight=False)


@app.command()
def diff(first: File, second: File, json: Json = False) -> None:
    """What differs between two files? Exit code 0 if nothing does, 1 if something does, 2 for an error."""
    from linger.differ import difference_of

    with reported(json):
        found = difference_of(first, second)
    answer(found, json)
    raise typer.Exit(FINE if found.equal else DIFFERENT)


@app.command()
def verify(
    file: File,
    net: Annotated[str | None, typer.Option(help="package.module:name of the net that was exported")] = None,
    args: Args = None,
    weights: Weights = None,
    input: Inputs = [],  # noqa: B006
    target: FileTarget = None,
    weight_bits: Bits = 8,
    json: Json = False,
) -> None:
    """Is a file what it was at export, and equal to its net? Alone, a file needs the golden inputs of ``export --golden``.

    Exit code 0 if everything is equal, 1 if not, 2 for an error.
    """
    from linger import verify as compare
    from linger.arguments import inputs_of, net_of, net_of_file

    with reported(json):
        if net is not None:
            inputs = inputs_of(input)
            made = net_of_file(net_of(net, args), inputs, weights, target, weight_bits, file)
            report = compare(made, file, inputs, quiet=True)
        elif input or weights is not None or args is not None:
            raise LingerError(
                "verify: found --input, --weights or --args without --net, allowed alone is a file with golden inputs; add --net"
            )
        else:
            report = compare(str(file), quiet=True)
    answer(report, json)
    raise typer.Exit(FINE if report.equal else DIFFERENT)


@app.command()
def run(
    file: File,
    input: Inputs = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option("--out", "-o", help="an .npz file for the results")] = None,
    every: Annotated[bool, typer.Option("--all", help="every tensor of the file, not only its outputs")] = False,
    runner: Annotated[
        str, typer.Option(help="runtime (NumPy, integers), or a level of ONNX Runtime: disable, basic, extended, all")
    ] = "runtime",
    json: Json = False,
) -> None:
    """Run a file on inputs and write the results, or print a summary of them. Without inputs, on its golden ones."""
    from linger.execute import execute
    from linger.files import write_arrays

    with reported(json):
        found = execute(file, input, runner, every)
        if out is not None:
            write_arrays(out, found)
    tensors: list[dict[str, Any]] = [
        {"name": k, "type": a.dtype.name, "shape": list(a.shape), "min": _extreme(a, min), "max": _extreme(a, max)}
        for k, a in found.items()
    ]
    answer({"out": None if out is None else str(out), "tensors": tensors}, json, "\n".join(map(_line, tensors)))


def _line(tensor: dict[str, Any]) -> str:
    low, high = ("?" if tensor[k] is None else tensor[k] for k in ("min", "max"))
    values = f"{low} to {high}" if math.prod(tensor["shape"]) else "empty"
    return f"{tensor['name']} {tensor['type']} {'x'.join(map(str, tensor['shape']))}: {values}"


def _extreme(array: Any, which: Any) -> Any:
    """The least or the largest element as a Python number; None of no elements, or where one is NaN or infinite."""
    value = which(array.min().item(), array.max().item()) if array.size else None
    return None if value is None or not math.isfinite(value) else value
