"""How spread out the values of weights and layer outputs are: a tensor whose few largest values stand alone loses precision.

For a tensor v, a = |v| sorted, n = its length:
    Mean = mean(a)    Max = a[n-1]    Dynamic 0.99 = a[floor(0.99 n) - 1]                                  (1)
    Multiple = Max / Mean             Versu = Max / Dynamic                                               (2)
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from linger.errors import LingerError, during
from linger.files import whole
from linger.plain import text_of
from linger.weights import read_weights

COLUMNS = ("Layer_name", "Mean", "Max", "Multiple(Max/Mean)", "Dynamic 0.99", "Versu(Max/Dynamic)")
OUTLIERS = 10.0  # a Versu above it gets a row of exclamation marks
MARK = "!" * 14
SKIPPED = ("running_", "scale_")  # how the names of what training keeps beside the weights begin


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One row: equations (1) and (2) of one tensor."""

    layer: str
    mean: float
    max: float
    dynamic: float

    @property
    def multiple(self) -> float:
        """Max / Mean; 1 of nothing but zeros."""
        return self.max / self.mean if self.mean else 1.0

    @property
    def versu(self) -> float:
        """Max / Dynamic; infinite where 99 % of the values are 0 and not all."""
        return self.max / self.dynamic if self.dynamic else (math.inf if self.max else 1.0)

    @property
    def outliers(self) -> bool:
        """Whether the largest values stand alone."""
        return self.versu > OUTLIERS


@dataclass(frozen=True)
class Analysis:
    """The rows, in the order of the layers; ``print`` it."""

    rows: tuple[Spread, ...]

    def __str__(self) -> str:
        table = Table(*COLUMNS, box=box.ASCII2)
        for r in self.rows:
            table.add_row(
                r.layer.replace("[", "\\["), *(f"{v:.4f}" for v in (r.mean, r.max, r.multiple, r.dynamic, r.versu))
            )
            if r.outliers:
                table.add_row(*[MARK] * len(COLUMNS))
        width = 150 + max((len(r.layer) for r in self.rows), default=0)
        return text_of(lambda console: console.print(table), width)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a text file."""
        with whole(path) as out:
            out.write(f"{self}\n".encode())


def spread(layer: str, tensors: Iterable[Tensor]) -> Spread | None:
    """The row of some tensors taken together; None where they hold no number.

    Raises:
        LingerError: a value is NaN or infinite.
    """
    parts = [t.detach().abs().float().flatten() for t in tensors if t.numel()]
    if not parts:
        return None
    a = torch.cat(parts).sort().values
    if not bool(a[-1].isfinite()):
        raise LingerError(f"{layer} holds NaN or infinity, allowed are finite values; the training diverged")
    n = len(a)
    return Spread(
        layer=layer, mean=float(a.double().mean()), max=float(a[-1]), dynamic=float(a[max(99 * n // 100 - 1, 0)])
    )


def wb_analyse(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module,
    save_log_path: str | os.PathLike[str] | None = "wb_analyse.log",
) -> Analysis:
    """A table of the weights and biases of a checkpoint: ``Versu`` above 10 means that few values spoil the scale of all.

    Args:
        path_or_state_dict: a file of weights (no pickled code is run), a state dict, or a net.
        save_log_path: where the table is written; None for nowhere.

    Returns:
        The rows; ``print`` them.

    Raises:
        LingerError: the file cannot be read, holds no tensors, or a value is NaN or infinite.
    """
    with during("wb_analyse"):
        given = path_or_state_dict.state_dict() if isinstance(path_or_state_dict, nn.Module) else path_or_state_dict
        state = read_weights(given) if isinstance(given, (str, os.PathLike)) else given
        if not isinstance(state, Mapping):
            raise LingerError(
                f"found {type(state).__name__}, allowed are a path, a state dict and a net; pass one of them"
            )
        wanted = {
            str(k): t
            for k, t in state.items()
            if isinstance(t, Tensor) and t.is_floating_point() and not str(k).rpartition(".")[2].startswith(SKIPPED)
        }
        rows = [spread(k, [t]) for k, t in wanted.items()]
        made = Analysis(tuple(r for r in rows if r is not None))
        if save_log_path is not None:
            made.save(save_log_path)
    return made
