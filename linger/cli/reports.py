"""The command that writes reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from linger.cli._app import Args, Bits, Inputs, Json, TargetName, Weights, What, app, console, reported
from linger.cli.nets import Batch, Data
from linger.errors import LingerError


@app.command()
def report(
    what: What,
    data: Data = [],  # noqa: B006
    input: Inputs = [],  # noqa: B006
    args: Args = None,
    weights: Weights = None,
    html: Annotated[Path | None, typer.Option(help="where to write the page")] = None,
    csv: Annotated[Path | None, typer.Option(help="where to write the table of layers")] = None,
    language: Annotated[str, typer.Option(help="of the page, en or zh")] = "en",
    batch_axis: Annotated[int, typer.Option(help="the axis of the inputs that counts samples")] = 0,
    target: TargetName = None,
    weight_bits: Bits = 8,
    batch: Batch = 32,
    json: Json = False,
) -> None:
    """What does every layer of a file, or of a fixed-point net beside float, compute? On --data, or on --input as one batch."""
    from linger import report as look
    from linger.batches import feed

    def spread(net: Any, given: Any) -> Any:
        return net(*given)

    with reported(json):
        found, batches = _given(what, data, input, args, weights, target, weight_bits, batch)
        made = look(
            found, batches, html=html, forward=feed if data else spread, target=target, batch_axis=batch_axis,
            language=language, progress=not json,
        )  # fmt: skip
        if csv is not None:
            made.csv(csv)
    if json:
        typer.echo(made.json())
    else:
        made.show(console())


def _given(
    what: str, data: list[str], input: list[str], args: str | None, weights: str | None, target: str | None,
    weight_bits: int, batch: int,
) -> tuple[Any, list[Any]]:  # fmt: skip
    from linger.arguments import batches_of, fixed_point, inputs_of, net_or_file, sample_of

    if not data and not input:
        raise LingerError("report: found no --input and no --data, needed is one of them; name files or shapes")
    batches: list[Any] = batches_of(data, batch) if data else [inputs_of(input)]
    found = net_or_file(what, args)
    if not isinstance(found, str):
        inputs = inputs_of(input) if input else sample_of(found, batches)
        found = fixed_point(found, inputs, weights, target, weight_bits)
    return found, batches
