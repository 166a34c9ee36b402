"""Commands that train: the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from linger.cli._app import DIFFERENT, Json, answer, app, reported


@app.command()
def demo(
    data: Annotated[str, typer.Option(help="mnist, fashion, or a directory of idx files")] = "mnist",
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="passes over the training images in the float stage; by default about 28,000 images"),
    ] = None,
    out: Annotated[Path, typer.Option(help="directory for the exported files")] = Path("linger-demo"),
    target: Annotated[str, typer.Option(help="venus, arcs or venusa")] = "venus",
    json: Json = False,
) -> None:
    """Train a small network on real images in three stages, export it, and count differing integers everywhere."""
    from linger import demo as example

    with reported(json):
        results = example.run(data, epochs, out, target, Console(stderr=json))
    if json:
        rows = [
            {
                "weight_bits": r.weight_bits, "accuracy": r.accuracy, "path": str(r.path), "bytes": r.path.stat().st_size,
                "elements": r.report.elements, "differing": r.report.differing,
            }
            for r in results
        ]  # fmt: skip
        answer({"data": data, "target": target, "files": rows}, json)
    if not all(r.report.equal for r in results):
        raise typer.Exit(DIFFERENT)
