"""The command that writes reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linger.cli._app import Inputs, Json, TargetName, What, app, console, reported
from linger.errors import LingerError


@app.command()
def report(
    what: What,
    input: Inputs = [],  # noqa: B006
    html: Annotated[Path | None, typer.Option(help="where to write the page")] = None,
    csv: Annotated[Path | None, typer.Option(help="where to write the table of layers")] = None,
    language: Annotated[str, typer.Option(help="of the page, en or zh")] = "en",
    batch_axis: Annotated[int, typer.Option(help="the axis of the inputs that counts samples")] = 0,
    target: TargetName = None,
    json: Json = False,
) -> None:
    """What does every layer of a file, or of a fixed-point net beside float, compute? On the inputs given, as one batch."""
    from linger import report as look
    from linger.arguments import inputs_of, net_or_file

    with reported(json):
        if not input:
            raise LingerError("report: found no --input, needed is one per input of the net; name files or shapes")
        found = look(
            net_or_file(what), [inputs_of(input)], html=html, forward=lambda net, batch: net(*batch), target=target,
            batch_axis=batch_axis, language=language, progress=False,
        )  # fmt: skip
        if csv is not None:
            found.csv(csv)
    if json:
        typer.echo(found.json())
    else:
        found.show(console())
