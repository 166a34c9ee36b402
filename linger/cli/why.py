"""The command that explains a difference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from linger.cli._app import DIFFERENT, FINE, Args, Bits, Inputs, Json, Weights, answer, app, reported
from linger.cli.files import File, FileTarget

Run = Annotated[
    str,
    typer.Argument(
        help="an .npz file of linger run --all, a folder of text dumps, runtime, onnxruntime, or package.module:name of the net"
    ),
]


@app.command()
def why(
    file: File,
    first: Run,
    second: Run = "runtime",
    input: Inputs = [],  # noqa: B006
    args: Args = None,
    weights: Weights = None,
    target: FileTarget = None,
    weight_bits: Bits = 8,
    json: Json = False,
) -> None:
    """Where do two runs of a file part, and which mistake makes exactly that difference?

    Inputs are taken from the runs, from --input, or from the golden ones of the file. Exit code 0 if nothing differs, 1 if
    something does, 2 for an error.
    """
    from linger.why import why as explain

    with reported(json):
        runs = [_run(text, file, input, args, weights, target, weight_bits) for text in (first, second)]
        found = explain(file, *runs, inputs=input or None, progress=not json, quiet=True)
    answer(found, json)
    raise typer.Exit(FINE if found.equal else DIFFERENT)


def _run(
    text: str, file: Path, input: list[str], args: str | None, weights: str | None, target: str | None, weight_bits: int
) -> Any:
    """A net by name, anything else as it is."""
    from linger.arguments import inputs_of, net_of, net_of_file

    if ":" not in text or text.startswith("onnxruntime:") or Path(text).exists():
        return text
    return net_of_file(net_of(text, args), inputs_of(input), weights, target, weight_bits, file)
