"""Commands that compare a net or a file with a chip."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from linger.cli._app import (
    DIFFERENT,
    FINE,
    Args,
    Bits,
    Inputs,
    Json,
    TargetName,
    Weights,
    What,
    answer,
    app,
    console,
    reported,
)

Chip = Annotated[str, typer.Argument(help="venus, arcs, venusa, mars, or a .toml file")]


@app.command()
def check(
    what: What,
    target: TargetName = None,
    input: Inputs = [],  # noqa: B006
    args: Args = None,
    weights: Weights = None,
    json: Json = False,
) -> None:
    """Does a net or a file fit a chip, and what does it cost there? Exit code 0 if it fits, 1 if not, 2 for an error."""
    from linger import check as compare
    from linger.arguments import inputs_of

    with reported(json):
        report = compare(_given(what, args, weights), *inputs_of(input), target=target, quiet=True)
    if json:
        typer.echo(report.json())
    else:
        report.show(console())
    raise typer.Exit(FINE if report.ok else DIFFERENT)


@app.command()
def retarget(
    source: Chip,
    target: Chip,
    what: What,
    input: Inputs = [],  # noqa: B006
    args: Args = None,
    weights: Weights = None,
    weight_bits: Bits = 8,
    json: Json = False,
) -> None:
    """Which integers change between two chips? Exit code 0 if no output does, 1 if one does, 2 for an error."""
    from linger import retarget as compare
    from linger.arguments import fixed_point, inputs_of, net_or_file

    with reported(json):
        inputs = inputs_of(input)
        found: Any = net_or_file(what, args)
        if not isinstance(found, str):
            found = fixed_point(found, inputs, weights, source, weight_bits)
        changes = compare(found, source, target, *inputs, quiet=True)
    answer(changes, json)
    raise typer.Exit(FINE if changes.equal else DIFFERENT)


def _given(what: str, args: str | None, weights: str | None) -> Any:
    """The file, or the net with its weights."""
    from linger.arguments import net_or_file
    from linger.weights import load_into

    found = net_or_file(what, args)
    if weights is not None and not isinstance(found, str):
        load_into(found, weights)
    return found
