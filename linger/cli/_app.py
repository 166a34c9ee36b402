"""What every command shares: the application, how an error is printed, the options that several commands have."""

from __future__ import annotations

import json as js
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Annotated, Any

import typer
from rich.console import Console

from linger._version import VERSION
from linger.errors import LingerError

FINE, DIFFERENT, MISTAKEN, STOPPED = 0, 1, 2, 130  # exit codes, said in ``EPILOG``
EPILOG = "Exit codes: 0 fine, 1 the answer is no, 2 an error in what was given, 130 stopped by Ctrl-C."

What = Annotated[str, typer.Argument(help="a .onnx file, or package.module:name of a net or a function that makes it")]
Inputs = Annotated[
    list[str],
    typer.Option("--input", "-i", help="a .npy, .npz, .wav or .png file, or a shape such as 1,3,32,32; once per input"),
]
Json = Annotated[bool, typer.Option("--json", help="print everything as JSON")]
Args = Annotated[str | None, typer.Option("--args", help="what the factory takes, in JSON, such as '{\"width\": 32}'")]
Weights = Annotated[
    str | None, typer.Option("--weights", help="a .safetensors file, or a file of torch.save that holds only tensors")
]
Bits = Annotated[int, typer.Option("--weight-bits", help="4, 8 or 16, where the net is not converted yet")]
TargetName = Annotated[str | None, typer.Option("--target", help="venus, arcs, venusa, mars, or a .toml file")]

app = typer.Typer(
    add_completion=True, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich", epilog=EPILOG
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(VERSION)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Fixed-point training and bit-exact export of PyTorch networks."""


def console() -> Console:
    """Where a command prints: as wide as the terminal, 160 columns where there is none."""
    return Console(width=None if sys.stdout.isatty() else 160)


@contextmanager
def reported(json: bool = False) -> Iterator[None]:
    """An error of the user's input as one line (on stderr; as JSON on stdout) and exit code 2; Ctrl-C ends with 130."""
    try:
        yield
    except LingerError as error:
        if json:
            typer.echo(js.dumps({"error": str(error)}))
        else:
            out = Console(stderr=True)
            out.print("[red]error:[/red] ", end="")
            out.print(str(error), highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(MISTAKEN) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; no file was left half written")
        raise typer.Exit(STOPPED) from None


def answer(found: Any, json: bool, text: str | None = None) -> None:
    """Print a result: a dataclass or a dict as JSON, or its text."""
    if json:
        plain = asdict(found) if is_dataclass(found) and not isinstance(found, type) else found
        plain = {"equal": found.equal, **plain} if hasattr(found, "equal") else plain
        typer.echo(js.dumps(plain, indent=2, allow_nan=False))
    else:
        console().print(str(found) if text is None else text, highlight=False, markup=False, soft_wrap=True)
