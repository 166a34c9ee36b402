"""``linger.report``: what a fixed-point net computes, layer by layer beside float, as text, CSV, JSON and one HTML page."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from linger.batches import Forward, feed
from linger.errors import LingerError, during
from linger.files import whole
from linger.plain import text_of
from linger.report import _text
from linger.report._beside import Key, both
from linger.report._data import Certificate, Data, Layer, Summary, Worst
from linger.report._file import of_file
from linger.report._gather import Measure, Options, of_net
from linger.report._html import finite, page
from linger.report._meter import Meter
from linger.report._words import known

__all__ = ["Certificate", "Data", "Key", "Layer", "Meter", "Report", "Summary", "Worst", "both", "report"]


class Report:
    """What was measured (``data``), and the ways to write it; files are written whole or not at all."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __str__(self) -> str:
        """The report as plain text."""
        return text_of(self.show)

    def show(self, console: Console | None = None) -> None:
        """Print it."""
        _text.show(self.data, console or Console())

    def json(self) -> str:
        """All of it, histograms included."""
        return json.dumps(finite(asdict(self.data)), indent=2, allow_nan=False)

    def csv(self, path: str | os.PathLike[str]) -> Path:
        """Write the table of layers."""
        return _written(path, _text.csv_of(self.data))

    def html(self, path: str | os.PathLike[str], language: str = "en") -> Path:
        """Write the page. ``language``: "en" or "zh", what it is in when it is opened; a button changes it."""
        with during("report"):
            return _written(path, page(self.data, language))


def _written(path: str | os.PathLike[str], text: str) -> Path:
    with during("report"), whole(path) as out:
        out.write(text.encode())
    return Path(path)


def report(
    net: nn.Module | str | os.PathLike[str],
    loader: Iterable[Any],
    *,
    html: str | os.PathLike[str] | None = None,
    metric: Measure | None = None,
    reference: nn.Module | None = None,
    batches: int | None = None,
    forward: Forward = feed,
    target: str | os.PathLike[str] | None = None,
    batch_axis: int = 0,
    exact: bool = True,
    language: str = "en",
    progress: bool = True,
) -> Report:
    """Run a fixed-point net and the same net in float on the same batches, and say what differs where. The net stays as it is.

    Args:
        net: a net after ``init`` that is calibrated or trained, or the path of an exported file.
        loader: an iterable of batches; of a file, of arrays or CPU tensors in the order of its inputs.
        html: where to write the page; None for no page.
        metric: ``metric(output, batch)``, a number such as the accuracy of a batch; its mean over batches is shown for both.
        reference: a float net that a file is compared with; a net is compared with itself in float.
        batches: how many batches are used at most.
        forward: how a batch enters the net, as for ``calibrate``.
        target: the chip, by default that of the net or the file.
        batch_axis: the axis of inputs that counts samples: costs are those of one, and the worst ones are listed.
        exact: compare the file's integers with the net's, on 8 samples at most.
        language: of the page, "en" or "zh".
        progress: show a progress bar.

    Returns:
        The report: ``show()``, ``json()``, ``csv(path)``, ``html(path)``, and the numbers in ``data``.

    Raises:
        LingerError: the net is not converted, a range is unknown, the loader is empty, there is no such language, or a file
            cannot be written.
    """
    with during("report"):
        known(language)  # before the work, and where there is no page too
        options = Options(
            metric=metric, batches=batches, forward=forward, target=target, batch_axis=batch_axis, exact=exact,
            progress=progress,
        )  # fmt: skip
        if isinstance(net, nn.Module):
            if reference is not None:
                raise LingerError(
                    "found a reference beside a net, which is compared with itself in float; leave it out"
                )
            made = Report(of_net(net, loader, options))
        elif isinstance(net, (str, os.PathLike)):
            made = Report(of_file(net, loader, reference, options))
        else:
            raise LingerError(
                f"found an object of type {type(net).__name__}, allowed are a net and a path; pass one of them"
            )
    if html is not None:
        made.html(html, language)
    return made
