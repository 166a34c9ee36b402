"""The op table. A new op is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from linger.ops import (
    activations,
    attention,
    batchnorm,
    bmm,
    cat,
    clamp,
    conv,
    conv_transpose,
    convbn,
    cumsum,
    divide,
    einsum,
    elementary,
    elementwise,
    embedding,
    glu,
    groupnorm,
    gru,
    layernorm,
    linear,
    lstm,
    mask,
    matmul,
    pad,
    pool,
    prelu,
    quant,
    reduce,
    resize,
    rmsnorm,
    rnn,
    shuffle,
    sign,
    softmax,
    standard,
    transformer,
    triangle,
    unfold,
    variance,
    where,
)
from linger.ops._base import IntModule, Op
from linger.ops._case import Case
from linger.ops._composed import Composed
from linger.ops._lowered import Lowered, Operand
from linger.ops._weighted import WeightedInt

MODULES = (
    quant,
    conv,
    conv_transpose,
    convbn,
    linear,
    bmm,
    matmul,
    einsum,
    mask,
    attention,
    transformer,
    embedding,
    lstm,
    gru,
    rnn,
    batchnorm,
    layernorm,
    groupnorm,
    rmsnorm,
    clamp,
    prelu,
    pool,
    elementwise,
    divide,
    reduce,
    variance,
    cat,
    pad,
    activations,
    elementary,
    sign,
    glu,
    softmax,
    resize,
    shuffle,
    where,
    cumsum,
    triangle,
    unfold,
    standard,
)
ROWS: tuple[Op, ...] = tuple(op for module in MODULES for op in module.OPS)

CASES: tuple[Case, ...] = tuple(case for module in MODULES for case in getattr(module, "CASES", ()))

BY_NAME: dict[str, Op] = {name: op for op in ROWS for name in (op.name, *op.aliases)}
BY_FLOAT: dict[type[nn.Module], Op] = {}
for _op in ROWS:
    for _cls in (*_op.floats, *((_op.normalized,) if _op.normalized else ())):
        if _cls in BY_FLOAT:
            raise ImportError(f"{_cls.__name__} belongs to {BY_FLOAT[_cls].name} and to {_op.name}")
        BY_FLOAT[_cls] = _op
LAYERS: frozenset[type[nn.Module]] = frozenset(  # whose product is also a call of its own: F.linear, a convolution
    cls for op in ROWS for cls in op.floats if op.integer is not None and issubclass(op.integer, WeightedInt)
)
HALF_UP_ONLY = frozenset(op.integer for op in ROWS if op.half_up and op.integer is not None)
SITES: dict[str, Op] = {op.site: op for op in ROWS if op.site}
FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {**attention.FORWARDS, **transformer.FORWARDS}
CONTAINERS: frozenset[type[nn.Module]] = frozenset((*FORWARDS, *transformer.CONTAINERS))
ROUTED: frozenset[type[nn.Module]] = CONTAINERS.union(t for op in ROWS for t in op.modules)
BY_CALL: dict[Callable[..., Any], Op] = {call: op for op in ROWS for call in op.calls}
COMPOSED: dict[Callable[..., Any], Composed] = {
    call: made for module in MODULES for call, made in getattr(module, "COMPOSED", {}).items()
}

__all__ = [
    "BY_CALL",
    "BY_FLOAT",
    "BY_NAME",
    "CASES",
    "COMPOSED",
    "CONTAINERS",
    "FORWARDS",
    "HALF_UP_ONLY",
    "LAYERS",
    "ROUTED",
    "ROWS",
    "SITES",
    "Case",
    "Composed",
    "IntModule",
    "Lowered",
    "Op",
    "Operand",
]
