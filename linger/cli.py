"""The command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from linger.errors import LingerError

Inputs = Annotated[list[str], typer.Option("--input", help="a .npy file, or a shape such as 1,3,32,32; once per input")]
What = Annotated[str, typer.Argument(help="a .onnx file, or module:name of a net")]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@contextmanager
def _reported(console: Console) -> Iterator[None]:
    """An error of the user's input as one line, and exit code 2."""
    try:
        yield
    except LingerError as error:
        console.print("[red]error:[/red] ", end="")
        console.print(str(error), highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from None


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
    with _reported(console):
        results = example.run(data, epochs, out, target, console)
    if not all(r.report.equal for r in results):
        raise typer.Exit(1)


@app.command()
def check(
    what: What,
    target: Annotated[str | None, typer.Option(help="venus, arcs, venusa, mars, or a .toml file")] = None,
    input: Inputs = [],  # noqa: B006
    json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
) -> None:
    """Does a net or a file fit a chip, and what does it cost there? Exit code 0 if it fits, 1 if not, 2 for an error."""
    from linger import check as compare
    from linger.arguments import inputs_of, net_or_file

    console = Console(width=None if sys.stdout.isatty() else 160)
    with _reported(console):
        report = compare(net_or_file(what), *inputs_of(input), target=target, quiet=True)
    if json:
        typer.echo(report.json())
    else:
        report.show(console)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def retarget(source: str, target: str, what: What, input: Inputs = []) -> None:  # noqa: B006
    """Which integers change between two chips? Exit code 0 if no output does, 1 if one does, 2 for an error."""
    from linger import retarget as compare
    from linger.arguments import inputs_of, net_or_file

    with _reported(Console()):
        changes = compare(net_or_file(what), source, target, *inputs_of(input))
    raise typer.Exit(0 if changes.equal else 1)
