"""Commands that compare a net or a file with a chip."""

from __future__ import annotations

import typer

from linger.cli._app import DIFFERENT, FINE, Inputs, Json, TargetName, What, answer, app, console, reported


@app.command()
def check(what: What, target: TargetName = None, input: Inputs = [], json: Json = False) -> None:  # noqa: B006
    """Does a net or a file fit a chip, and what does it cost there? Exit code 0 if it fits, 1 if not, 2 for an error."""
    from linger import check as compare
    from linger.arguments import inputs_of, net_or_file

    with reported(json):
        report = compare(net_or_file(what), *inputs_of(input), target=target, quiet=True)
    if json:
        typer.echo(report.json())
    else:
        report.show(console())
    raise typer.Exit(FINE if report.ok else DIFFERENT)


@app.command()
def retarget(source: str, target: str, what: What, input: Inputs = [], json: Json = False) -> None:  # noqa: B006
    """Which integers change between two chips? Exit code 0 if no output does, 1 if one does, 2 for an error."""
    from linger import retarget as compare
    from linger.arguments import inputs_of, net_or_file

    with reported(json):
        changes = compare(net_or_file(what), source, target, *inputs_of(input), quiet=True)
    answer(changes, json)
    raise typer.Exit(FINE if changes.equal else DIFFERENT)
