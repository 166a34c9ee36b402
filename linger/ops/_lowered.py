"""What a fixed-point module says to an exporter: its operands, and the nodes that compute the same integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from linger.errors import LingerError


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """One node of the exported file. ``inputs``: an int is an operand, a str a key of ``params`` or of an earlier node.

    ``"%1"`` is the first output of node 1, ``"%1.2"`` its third. ``bits``: of the first output, 0 for float32; ``more``: of the
    others. ``results``, of the last node: what the module returns, in order; its own first output where it is empty.
    ``peak``: bound of |accumulator| in LSB, 0 where the node has none. ``domain`` "": a standard op.
    """

    op_type: str
    inputs: tuple[int | str, ...]
    attrs: Mapping[str, Any]
    params: Mapping[str, np.ndarray] = field(default_factory=dict)
    bits: int = 8
    form: str = ""
    peak: float = 0.0
    more: tuple[int, ...] = ()
    domain: str = "thinker"
    results: tuple[int | str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Operand:
    """A tensor that enters or leaves a node: its scale (a power of two), bits and shape.

    0 bits: it enters as it is, of ``dtype`` and without a grid. ``dynamic``: the axes whose size may change from run to run.
    """

    scale: float
    bits: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    dynamic: frozenset[int] = frozenset()


def require_batch(x: Operand, rank: int) -> None:
    """Raise unless the operand has ``rank`` axes behind batch and channels: a file knows no other convolution or pool."""
    if len(x.shape) != rank + 2:
        raise LingerError(
            f"found an input of shape {tuple(map(int, x.shape))}, allowed in a file are batch, channels and {rank} more axes; "
            "add the batch axis with unsqueeze(0)"
        )


def requant_node(x: Operand, out: Operand) -> Lowered:
    """The node that brings the first operand of a call, ``x``, to the grid of ``out``."""
    attrs = {"scale_x": x.scale, "scale_o": out.scale, "data_bits": x.bits, "o_bits": out.bits}
    return Lowered(op_type="Requant", inputs=(0,), attrs=attrs, bits=out.bits, form=str(out.bits))
