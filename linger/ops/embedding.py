"""Embedding: rows of a weight table on its own grid. No arithmetic and no output range.

    w' = N(renorm(w)),   q_w = quantize(w', s_w),   out[i] = q_w[x[i]] on the grid of the weight       (1)

N bounds (``normalize_weight``), renorm is that of ``max_norm``. Training renorms the rows that are looked up in place, as
``torch.nn.Embedding`` does; the table is what a renorm of every row gives, so that a row has one value everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linger.errors import LingerError
from linger.numerics import Grid, bound_parameter, fake_quant, levels, quantize, scale_from_weight, set_grid
from linger.ops._base import IntModule, Op
from linger.ops._composed import Composed, Router
from linger.ops._constant import constant_of
from linger.ops._lowered import Lowered, Operand
from linger.ops._normalize import Normalized
from linger.ops._site import Site

OPTIONS = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
INDEX_TYPES = (torch.int64, torch.int32)


def _check_indices(size: int, x: Tensor) -> None:
    """Raise for indices of another type or, on the CPU, outside of the table."""
    if x.dtype not in INDEX_TYPES:
        raise LingerError(
            f"found indices of type {str(x.dtype).removeprefix('torch.')}, allowed are int64 and int32; pass x.long()"
        )
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not x.numel():
        return
    low, high = (int(v) for v in torch.aminmax(x))
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise LingerError(
            f"found index {wrong}, allowed are 0 to {size - 1}; raise num_embeddings or check the vocabulary"
        )


class _Renorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, p: float, max_norm: float) -> Tensor:
        return torch.renorm(w, p, 0, max_norm)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def _table(m: Any) -> Tensor:
    """w' of equation (1) for every row, shape (num_embeddings, embedding_dim); the gradient of a renorm is the identity."""
    w = m.weight.float()
    if m.max_norm is not None:
        w = _Renorm.apply(w, m.norm_type, m.max_norm)
    return bound_parameter(w, m.normalize_weight)


def _rows(m: Any, x: Tensor) -> Tensor:
    """The rows of w' at ``x``, shape (*x.shape, embedding_dim), with the gradient of ``F.embedding``.

    A sparse gradient reaches the parameter only where nothing stands between, so its rows are bounded after the lookup.
    """
    if m.max_norm is not None and m.training:
        with torch.no_grad():
            torch.embedding_renorm_(m.weight.detach(), x.contiguous(), m.max_norm, m.norm_type)
    own = (m.padding_idx, None, m.norm_type, m.scale_grad_by_freq, m.sparse)
    if not m.sparse:
        return F.embedding(x, _table(m), *own)
    rows = F.embedding(x, m.weight, *own).float()
    if m.max_norm is not None:
        rows = _Renorm.apply(rows.reshape(-1, rows.shape[-1]), m.norm_type, m.max_norm).view(rows.shape)
    return bound_parameter(rows, m.normalize_weight)


def table_bits(parameter_bits: int) -> int:
    """Stored width of a table of weights."""
    return 8 if parameter_bits <= 8 else 16


def lookup(table: Tensor, out: Operand, bits: int) -> tuple[Lowered, ...]:
    """The node that looks up rows of the table, which has ``bits`` bits."""
    integers = quantize(table, torch.tensor(out.scale, device=table.device), bits)
    attrs = {"axis": 0, "parameter_bits": bits, "o_bits": out.bits, "scale_w": out.scale, "scale_o": out.scale}
    return (Lowered(op_type="Gather", inputs=("weight", 0), attrs=attrs, params={"weight": integers}, bits=out.bits),)


class EmbeddingInt(IntModule, nn.Embedding):
    """``torch.nn.Embedding`` in fixed point. The result is as wide as the table: 8 bits, or 16 for 16-bit parameters."""

    observed: ClassVar[tuple[str, ...]] = ("x", "o")
    raw: ClassVar[frozenset[int]] = frozenset({0})
    op_type = "Gather"

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x int64 or int32 of any shape -> (*x.shape, embedding_dim) on the grid of the weight.

        Raises:
            LingerError: an index is not an integer, or is outside of the table.
        """
        _check_indices(self.num_embeddings, x)
        rows = _rows(self, x)
        scale = scale_from_weight(_table(self), self.parameter_bits)
        if self.training:
            self.running("o").copy_(levels(self.parameter_bits) / scale)
        out = fake_quant(rows, scale, self.parameter_bits, self.normalize_data)
        return set_grid(out, Grid(scale, table_bits(self.parameter_bits)))

    def require_ranges(self) -> None:
        """The grid is that of the weight, so no batch need be seen."""

    @torch.no_grad()
    def derived(self) -> dict[str, Tensor]:
        s_w = scale_from_weight(_table(self), self.parameter_bits)
        running = levels(self.parameter_bits) / s_w
        return super().derived() | {"scale_w": s_w, "running_w": running, "scale_o": s_w, "running_o": running}

    @torch.no_grad()
    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        return lookup(_table(self), out, self.parameter_bits)


class EmbeddingSite(Site):
    """``F.embedding`` with a table that is a parameter of the net or computed from some. Widths are those given to ``init``."""

    op_type = "Gather"
    parameter_names: ClassVar[tuple[str, ...]] = ("weight",)
    raw: ClassVar[frozenset[int]] = frozenset({0})
    observed: ClassVar[tuple[str, ...]] = ("o",)

    @classmethod
    def takes(cls, x: Any, weight: Any = None, **call: Any) -> bool:
        return constant_of(weight) is not None and call.get("max_norm") is None

    def forward(self, x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        """x int64 or int32 of any shape, weight (V, D) -> (*x.shape, D) on the grid of the weight."""
        _check_indices(len(weight), x)
        bits = self.out_bits = table_bits(self.parameter_bits)
        table = bound_parameter(weight.float(), self.normalize_weight)
        scale = scale_from_weight(table, self.parameter_bits)
        if self.training:
            self.running("o").copy_(levels(self.parameter_bits) / scale)
        rows = fake_quant(F.embedding(x, table, **options), scale, self.parameter_bits)
        return set_grid(rows, Grid(scale, bits))

    def require_ranges(self) -> None:
        """The grid is that of the weight, so no batch need be seen."""

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        return lookup(call["weight"].detach().float(), out, self.parameter_bits)


def embedding(
    route: Router, x: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    """``F.embedding``; a table that the forward computes from its inputs, or renorms, is looked up where it is."""
    options = {"padding_idx": padding_idx, "scale_grad_by_freq": scale_grad_by_freq}
    if max_norm is None and constant_of(weight) is not None:
        return route(F.embedding, x, weight, **options)  # type: ignore[no-any-return]
    return route(F.embedding, x, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)  # type: ignore[no-any-return]


class NormalizeEmbedding(Normalized, nn.Embedding):
    """``torch.nn.Embedding`` whose weight and output stay within bounds."""

    bias = None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        _check_indices(self.num_embeddings, x)
        return self.bound_output(_rows(self, x))

    def bounds_repr(self) -> str:
        return f"normalize_data:{self.normalize_data},normalize_weight:{self.normalize_weight}"


def run(table: np.ndarray, x: np.ndarray, *, axis: int = 0, **_: Any) -> np.ndarray:
    """table (V, *), x integers of any shape: the slices of ``table`` at ``x`` along ``axis``.

    Raises:
        LingerError: an index is outside of the table.
    """
    if x.size and (x.min() < 0 or x.max() >= table.shape[axis]):
        wrong = int(x.min()) if x.min() < 0 else int(x.max())
        raise LingerError(f"found index {wrong}, allowed are 0 to {table.shape[axis] - 1}; check the input")
    return np.take(table, x, axis=axis)


def body(form: str, opset: int) -> tuple[str, str]:
    return "W, X", "Y = Gather <axis: int = @axis> (W, X)\n"


OPS = (
    Op(name="Gather", run=run, body=body, real=lambda form, opset: body(form, opset)[1], integer=EmbeddingInt,
       floats=(nn.Embedding,), normalized=NormalizeEmbedding),
    Op(name="embedding", run=run, body=body, real=lambda form, opset: body(form, opset)[1], integer=EmbeddingSite,
       site="iqembedding", calls=(F.embedding,), names={F.embedding: ("weight", *OPTIONS)}),
)  # fmt: skip
COMPOSED = {F.embedding: Composed(function=embedding, tag="iqembedding", layer=True)}
