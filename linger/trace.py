"""One forward written down: the tape, the graph it yields, and the table of calls that only move values."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from linger.errors import LingerError
from linger.numerics import grid_of, version
from linger.ops import BY_CALL, IntModule
from linger.ops.select import SELECTS

T: Any = Tensor

# Calls that only move values: the result carries the first operand's grid.
PASS: dict[Callable[..., Any], str] = {
    T.view: "view", T.reshape: "reshape", torch.reshape: "reshape", T.flatten: "flatten", torch.flatten: "flatten",
    T.permute: "permute", torch.permute: "permute", T.transpose: "transpose", torch.transpose: "transpose",
    T.squeeze: "squeeze", torch.squeeze: "squeeze", T.unsqueeze: "unsqueeze", torch.unsqueeze: "unsqueeze",
    T.__getitem__: "getitem", T.split: "split", torch.split: "split", T.chunk: "chunk", torch.chunk: "chunk",
    T.unbind: "unbind", torch.unbind: "unbind", T.flip: "flip", torch.flip: "flip", T.expand: "expand",
    T.expand_as: "expand", T.repeat: "repeat", T.tile: "repeat", torch.tile: "repeat", T.contiguous: "identity",
    T.clone: "identity", torch.clone: "identity", T.detach: "identity", torch.detach: "identity",
    T.view_as: "view", T.reshape_as: "view", T.narrow: "narrow", torch.narrow: "narrow", T.select: "select",
    torch.select: "select", T.unflatten: "view", torch.unflatten: "view", T.to: "identity", T.float: "identity",
    T.t: "transpose", torch.t: "transpose", T.movedim: "permute", torch.movedim: "permute", T.swapaxes: "transpose",
    torch.swapaxes: "transpose", T.swapdims: "transpose", torch.swapdims: "transpose", torch.movedim: "permute",
    T.moveaxis: "permute", torch.moveaxis: "permute", T.T.__get__: "transpose", T.mT.__get__: "transpose",
    T.data.__get__: "identity", T.cpu: "identity", T.cuda: "identity", T.ravel: "view", torch.ravel: "view",
    T.broadcast_to: "expand", torch.broadcast_to: "expand", T.tensor_split: "split", torch.tensor_split: "split",
    torch.max_pool1d: "max_pool", torch.max_pool2d: "max_pool",
    F.relu: "relu", torch.relu: "relu", T.relu: "relu", F.max_pool1d: "max_pool", F.max_pool2d: "max_pool",
}  # fmt: skip
# In-place forms of the above, and every in-place call: their target loses its grid unless named here.
PASS_INPLACE: dict[Callable[..., Any], str] = {T.relu_: "relu", torch.relu_: "relu", F.relu_: "relu"}
# Dropout scales what it keeps by 1 / (1 - p) in training; the others also shift it.
DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout}
ALPHA_DROPOUTS = {F.alpha_dropout, F.feature_alpha_dropout}
QUERIES = {T.dim, T.size, T.numel, T.stride, T.is_floating_point, T.data_ptr, T.is_contiguous, T.storage_offset,
    T.shape.__get__, T.dtype.__get__, T.device.__get__, T.ndim.__get__, T.requires_grad.__get__}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Value:
    """A tensor as it was at one moment: its number, shape, and grid (scale, bits) if it had one."""

    id: int
    shape: tuple[int, ...]
    scale: float | None
    bits: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, kw_only=True)
class Node:
    """One call. ``args`` and ``kwargs`` are those of the call with every tensor replaced by its Value."""

    name: str
    op: str
    module: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Value, ...]
    source: str = ""
    func: Callable[..., Any] | None = None

    def inputs(self) -> tuple[Value, ...]:
        """The tensors the call reads, in order."""
        return tuple(v for v in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(v, Value))


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A forward written down: its calls in order, what went in, what came out, and constants met on the way."""

    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    constants: dict[int, Tensor]
    results: dict[int, Tensor]


@dataclass
class Tape:
    """The recorder's notebook. A tensor object changed in place becomes a new value."""

    keep_results: bool = False
    nodes: list[Node] = field(default_factory=list)
    values: dict[int, Value] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)
    constants: dict[int, Tensor] = field(default_factory=dict)
    results: dict[int, Tensor] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    owners: list[str] = field(default_factory=lambda: [""])
    paused: int = 0

    def fresh(self, t: Tensor) -> Value:
        grid = grid_of(t)
        new = Value(
            id=len(self.alive), shape=tuple(t.shape), scale=None if grid is None else float(grid.scale),
            bits=32 if grid is None else grid.bits, dtype=t.dtype,
        )  # fmt: skip
        self.values[id(t)], self.versions[id(t)] = new, version(t)
        self.alive.append(t)
        if self.keep_results:
            self.results[new.id] = t.detach().clone()
        return new

    def value(self, t: Tensor) -> Value:
        if id(t) not in self.values:
            self.constants[self.fresh(t).id] = t
        elif self.versions[id(t)] != version(t):
            raise LingerError(
                f"{user_line()}: a tensor is read after it was changed in place through a view or another name of it; "
                "make one of them a clone()"
            )
        return self.values[id(t)]

    def replaced(self, target: Tensor, by: Tensor) -> None:
        """``target`` was overwritten in place with the value of ``by``."""
        self.values[id(target)], self.versions[id(target)] = self.values[id(by)], version(target)

    def encode(self, tree: Any) -> Any:
        return pytree.tree_map_only(Tensor, self.value, tree)

    def add(self, name: str, op: str, module: str | None, args: Any, kwargs: Any, out: Any, func: Any = None) -> None:
        outputs = tensors_of(out)
        if outputs:
            self.nodes.append(
                Node(
                    name=name,
                    op=op,
                    module=module,
                    args=args,
                    kwargs=kwargs,
                    outputs=tuple(self.fresh(t) for t in outputs),
                    source=user_line(),
                    func=func,
                )
            )

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        """Write a functional call down, named ``owner.op_ordinal``."""
        owner, op = self.owners[-1], _plain_name(func)
        stem = f"{owner}.{op}".lstrip(".")
        n = self.names.get(stem, 0)
        self.names[stem] = n + 1
        self.add(f"{stem}_{n}", op, None, args, kwargs, out, func)
        node = self.nodes[-1]
        if not node.inputs():
            self.results.update({v.id: t.detach().clone() for v, t in zip(node.outputs, tensors_of(out), strict=True)})


def first_positional(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The call with its first operand given by position, as ``torch.add(input=x, other=y)`` may not have it."""
    for name in ("input", "tensors", "self"):
        if not args and name in kwargs:
            return (kwargs[name],), {k: v for k, v in kwargs.items() if k != name}
    return args, kwargs


def tensors_of(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


_TAPES: list[Tape] = []


def running_tape() -> Tape | None:
    """The tape that is running now, if any: none inside a leaf."""
    return _TAPES[-1] if _TAPES and not _TAPES[-1].paused else None


def user_line() -> str:
    """``file.py:12`` of the user's code that made the call being recorded."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("torch", "linger"):
            return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _plain_name(func: Callable[..., Any]) -> str:
    name = SELECTS.get(func) or (BY_CALL[func].site if func in BY_CALL else PASS.get(func) or PASS_INPLACE.get(func))
    if func in DROPOUTS or func in ALPHA_DROPOUTS:
        return "dropout"
    if name:
        return name
    raw = getattr(func, "__name__", str(func))
    return raw if raw != "fn" else "pool"


def is_leaf(module: nn.Module) -> bool:
    """A module recorded as one node: a twin, or a layer of torch or linger without children of the user's."""
    return isinstance(module, IntModule) or (
        type(module).__module__.startswith(("torch.nn", "linger."))
        and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    )


@contextmanager
def _hooked(net: nn.Module, tape: Tape, leaf: Callable[[nn.Module], bool]) -> Iterator[None]:
    names: dict[nn.Module, str] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        names.setdefault(module, name)
    handles, encoded = [], []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        tape.owners.append(names[module])
        if leaf(module):
            encoded.append(None if tape.paused else (tape.encode(args), tape.encode(kwargs)))
            tape.paused += 1

    def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        tape.owners.pop()
        if leaf(module):
            tape.paused -= 1
            seen = encoded.pop()
            if not tape.paused and seen is not None:
                name, n = names[module], tape.names.get(names[module], 0)
                tape.names[name] = n + 1
                tape.add(name if not n else f"{name}@{n}", type(module).__name__, name, *seen, out)

    for module in names:
        if module is not net or leaf(module):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Spy(TorchFunctionMode):
    """Writes the functional calls of a net that is not converted on the tape."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, tape = kwargs or {}, running_tape()
        if tape is None or func in QUERIES:
            return func(*args, **kwargs)
        args, kwargs = first_positional(args, kwargs)
        encoded = tape.encode(args), tape.encode(kwargs)
        out = func(*args, **kwargs)
        if tensors_of(out):
            tape.call(func, *encoded, out)
        return out


@torch.no_grad()
def record(
    net: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    keep_results: bool = False,
    leaf: Callable[[nn.Module], bool] = is_leaf,
) -> tuple[Graph, Any]:
    """Run the net once in eval mode, without touching its state, and write the forward down.

    Returns:
        The graph, and what the forward returned.
    """
    kwargs = kwargs or {}
    tape = Tape(keep_results=keep_results)
    modes = {m: m.training for m in net.modules()}
    inputs = tuple(tape.fresh(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    _TAPES.append(tape)
    try:
        for module in modes:
            module.training = False
        with _hooked(net, tape, leaf), _Spy():
            out = net(*args, **kwargs)
        outputs = tuple(tape.value(t) for t in pytree.tree_leaves(out) if isinstance(t, Tensor))
    finally:
        _TAPES.pop()
        for module in net.modules():  # more than before where the forward made sites
            module.training = modes.get(module, modes[net])
    graph = Graph(
        nodes=tuple(tape.nodes), inputs=inputs, outputs=outputs, constants=tape.constants, results=tape.results
    )
    return graph, out
