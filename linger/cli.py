"""The command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from linger.errors import LingerError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Fixed-point training and bit-exact export of PyTorch networks."""


@app.command()
def demo(
    data: Annotated[str, typer.Option(help="mnist, fashion, or a directory of idx files")] = "mnist",
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="passes over the training images in the float stage; by default about 28,000 images"),
    ] = None,
    out: Annotated[Path, typer.Option(help="directory for the exported files")] = Path("linger-demo"),
    target: Annotated[str, typer.Option(help="venus, arcs or venusa")] = "venus",
) -> None:
    """Train a small network on real images in three stages, export it, and count differing integers everywhere."""
    from linger import demo as example

    console = Console()
    try:
        results = example.run(data, epochs, out, target, console)
    except LingerError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(2) from None
    if not all(r.report.equal for r in results):
        raise typer.Exit(1)
