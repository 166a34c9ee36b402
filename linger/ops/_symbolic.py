"""While ``torch.onnx.export(net, ..., dynamo=True)`` traces a net: every fixed-point module becomes the nodes it lowers to.

The tracer has no values, so grids come from the net's last eval forward: each module remembers what it was called with,
and lowers it with the very method that ``linger.onnx.export`` uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from linger.errors import LingerError
from linger.numerics import Grid, grid_of, set_grid
from linger.ops._constant import constant_of, leaves, set_constant
from linger.ops._lowered import Lowered, Operand
from linger.targets import Target

DTYPES = {8: torch.int8, 16: torch.int16, 32: torch.int32}


@dataclass
class Tracing:
    """One trace of one net: its chip, and how often each module was called so far."""

    target: Target
    turns: dict[int, int] = field(default_factory=dict)


FORWARD: ContextVar[int] = ContextVar("FORWARD", default=0)  # number of the converted net's forward that runs now
TRACING: ContextVar[Tracing | None] = ContextVar("TRACING", default=None)


@dataclass(frozen=True, kw_only=True)
class Spot:
    """A tensor without its values. ``scale`` is the 0-d tensor of its grid, None for a plain tensor."""

    scale: Tensor | None
    bits: int
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a module in eval: its arguments with every operand a Spot, and the parameters it had or was given.

    ``leaves``: the parameters and buffers that the given ones were computed from.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Spot
    parameters: dict[str, Any]
    buffers: dict[str, Any]
    leaves: tuple[Tensor, ...]
    versions: tuple[int, ...]


def exporting() -> bool:
    """Whether ``torch.onnx.export`` is tracing."""
    return torch.onnx.is_in_onnx_export() and torch.compiler.is_exporting()


def tracing() -> Tracing | None:
    """The trace that runs now; none does under ``torch.compile``, which cannot read a context variable.

    Nor can strict ``torch.export``, with which ``torch.onnx.export`` tries again what it could not trace: it stops here, and
    the first error is the one that is reported.
    """
    return TRACING.get() if torch.compiler.is_exporting() else None


def _spot(t: Tensor) -> Spot:
    grid = grid_of(t)
    return Spot(scale=None if grid is None else grid.scale, bits=0 if grid is None else grid.bits, shape=tuple(t.shape))


def _versions(module: Any, held: Sequence[Tensor]) -> tuple[int, ...]:
    own = (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
    return tuple(t._version for t in (*own, *held))


def _operands(module: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of a call without the parameters of the net among them (``IntModule.parameter_names``)."""
    rest = {k: v for k, v in kwargs.items() if k not in module.parameter_names}
    return [t for t in pytree.tree_leaves((args, rest)) if isinstance(t, Tensor)]


def seen(module: Any, args: Any, kwargs: Any, out: Tensor) -> Call:
    """What to remember of a call."""
    held = {k: _bare(v) for k, v in kwargs.items() if k in module.parameter_names}
    args, kwargs = pytree.tree_map_only(Tensor, _spot, (args, kwargs))
    behind = tuple(leaf for t in held.values() for leaf in leaves(t))
    return Call(
        args=args, kwargs=kwargs | held, out=_spot(out), parameters=dict(module._parameters),
        buffers=dict(module._buffers), leaves=behind, versions=_versions(module, behind),
    )  # fmt: skip


def _bare(x: Any) -> Any:
    """A parameter as it is; what is computed from some, without its history."""
    constant = constant_of(x)
    return x if constant is None or isinstance(x, nn.Parameter) else set_constant(x.detach(), constant)


@contextmanager
def _real(module: Any, call: Call) -> Iterator[None]:
    """The module with its own tensors, outside of the tracer."""
    parameters, buffers = module._parameters, module._buffers
    with _disable_current_modes(), torch.no_grad():
        module._parameters, module._buffers = call.parameters, call.buffers
        try:
            if _versions(module, call.leaves) != call.versions:
                raise LingerError("its parameters changed since the last eval forward; run the net once in eval mode")
            yield
        finally:
            module._parameters, module._buffers = parameters, buffers


def emit(module: Any, args: Any, kwargs: Any) -> Tensor:
    """The call of ``module`` on traced tensors as nodes of the file; the result is a traced integer tensor with a grid.

    Raises:
        LingerError: the net has not run in eval mode since it was trained, loaded or changed.
    """
    tracing = TRACING.get()
    if module.several:
        raise LingerError(
            f"torch.onnx.export of {type(module).__name__}, which returns several tensors; use linger.onnx.export, which takes "
            "the same arguments"
        )
    if tracing is None:
        raise LingerError(f"torch.onnx.export of a lone {type(module).__name__}; export the net that holds it")
    turn = tracing.turns.get(id(module), 0)
    tracing.turns[id(module)] = turn + 1
    calls: Sequence[Call] = module._calls
    if turn >= len(calls):
        raise LingerError("no eval forward to take the grids from; run the net once in eval mode, then export it")
    call = calls[turn]
    given = [s for s in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(s, Spot)]
    tensors = _operands(module, args, kwargs)
    with _real(module, call):
        out = _operand(call.out)
        bits = module.operand_bits([s.bits for s in given])
        operands = [
            replace(_taken(module, i, s, bits), dtype=t.dtype, dynamic=_dynamic(t))
            for i, (s, t) in enumerate(zip(given, tensors, strict=True))
        ]
        said = dict(enumerate(call.args)) | call.kwargs
        said = {k: v for k, v in said.items() if not any(isinstance(x, Spot) for x in pytree.tree_leaves(v))}
        steps = module.lower(tuple(operands), out, said)
    taken = [_entered(t, o, tracing.target) for t, o in zip(tensors, operands, strict=True)]
    shape = _traced_shape(module, args, kwargs)
    made: list[Tensor] = []
    for i, step in enumerate(steps):
        size = shape if i == len(steps) - 1 else _inner_shape(steps, i, taken, shape)
        made.append(_node(step, taken, made, size, tracing.target))
    result = made[-1] if made else taken[0]
    return set_grid(result, Grid(out.scale, out.bits))  # type: ignore[arg-type]


def _operand(s: Spot) -> Operand:
    assert s.scale is not None
    return Operand(scale=float(s.scale), bits=s.bits, shape=s.shape)


def _taken(module: Any, position: int, s: Spot, bits: int) -> Operand:
    if position in module.raw:
        return Operand(scale=1.0, bits=0, shape=s.shape)
    return module.taken(position, None if s.scale is None else float(s.scale), s.bits, bits, s.shape)  # type: ignore[no-any-return]


def _dynamic(t: Tensor) -> frozenset[int]:
    """The axes whose size is a symbol of the tracer."""
    return frozenset(i for i, size in enumerate(t.shape) if not isinstance(size, int))


def _entered(t: Tensor, wanted: Operand, target: Target) -> Tensor:
    """The traced tensor as integers on the grid of ``wanted``; one Quant per tensor and grid."""
    grid = grid_of(t)
    if not wanted.bits or (grid is not None and grid.bits == wanted.bits):
        return t
    made: dict[tuple[float, int], Tensor] = t.__dict__.setdefault("quantized", {})
    key = (wanted.scale, wanted.bits)
    if key not in made:
        attrs: dict[str, Any] = {"scale_x": wanted.scale, "data_bits": wanted.bits}
        if grid is not None:
            attrs = {"scale_x": grid.scale, "scale_o": wanted.scale, "data_bits": grid.bits, "o_bits": wanted.bits}
        made[key] = symbol("Quant" if grid is None else "Requant", [t], attrs, wanted.bits, t.shape, target)
    return made[key]


def dequantized(tree: Any) -> Any:
    """Every traced integer tensor of the tree as floats, where the grid is dropped."""
    tracing = TRACING.get()

    def plain(t: Tensor) -> Tensor:
        grid = grid_of(t)
        if grid is None or tracing is None:
            return t
        attrs = {"scale_o": grid.scale, "data_bits": grid.bits}
        return symbol("Dequant", [t], attrs, 0, t.shape, tracing.target)

    return pytree.tree_map_only(Tensor, plain, tree)


def symbol(
    op_type: str, inputs: Sequence[Tensor], attrs: Mapping[str, Any], bits: int, shape: Any, target: Target
) -> Tensor:
    """A node of domain ``thinker`` in the traced graph; 0 bits stand for float32."""
    said = {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(target.attributes(attrs).items())}
    dtype = DTYPES.get(bits, torch.float32)
    return torch.onnx.ops.symbolic(f"thinker::{op_type}", inputs, said, dtype=dtype, shape=shape, version=1)  # type: ignore[arg-type]


def _node(step: Lowered, operands: Sequence[Tensor], made: Sequence[Tensor], shape: Any, target: Target) -> Tensor:
    inputs = []
    for i in step.inputs:
        if isinstance(i, int):
            inputs.append(operands[i])
        elif i.startswith("%"):
            inputs.append(made[int(i[1:])])
        else:
            inputs.append(torch.from_numpy(np.array(step.params[i])))
    return symbol(step.op_type, inputs, step.attrs, step.bits, shape, target)


def _traced_shape(module: Any, args: Any, kwargs: Any) -> Any:
    """The shape of the result with the tracer's symbolic sizes, from the module's own forward, which leaves no nodes."""

    def stand_in(t: Tensor) -> Tensor:
        grid = grid_of(t)
        if grid is None and not t.is_floating_point():
            return t  # an index or a condition
        return set_grid(
            t.to(torch.float32, copy=True), Grid(t.new_ones((), dtype=torch.float32), grid.bits if grid else 8)
        )

    with disable_proxy_modes_tracing():
        args, kwargs = pytree.tree_map_only(Tensor, stand_in, (args, kwargs))
        return module.forward(*args, **kwargs).shape


def _inner_shape(steps: Sequence[Lowered], i: int, operands: Sequence[Tensor], shape: Any) -> Any:
    """The shape between two nodes of one module: before a Squeeze, behind a Pad, else that of the operand."""
    if steps[i + 1].op_type == "Squeeze":
        sizes = list(shape)
        for axis in steps[i + 1].attrs["axes"]:
            sizes.insert(axis, 1)
        return sizes
    if "pads" not in steps[i].params:
        return operands[0].shape
    pads = steps[i].params["pads"].tolist()
    rank = len(pads) // 2
    return [size + pads[a] + pads[rank + a] for a, size in enumerate(operands[0].shape)]
