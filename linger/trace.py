"""One forward written down: the tape, the recorder that fills it, and the graph it yields."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from linger.calls import QUERIES, first_positional, plain_name
from linger.errors import LingerError
from linger.numerics import grid_of, version
from linger.ops import CONTAINERS, IntModule
from linger.ops._constant import constant_of, set_constant


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
    """A forward written down: its calls in order, what went in, what came out.

    ``constants``: parameters, buffers and other tensors that were there before. ``results``: what calls made of nothing
    but such tensors and numbers.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    constants: dict[int, Tensor]
    results: dict[int, Tensor]


@dataclass
class Tape:
    """The recorder's notebook. A tensor object changed in place becomes a new value.

    ``lenient``: a tensor that was changed through another name, or made out of sight, is a new value of unknown origin;
    otherwise it is an error, for the graph would be wrong.
    """

    lenient: bool = False
    nodes: list[Node] = field(default_factory=list)
    values: dict[int, Value] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)
    constants: dict[int, Tensor] = field(default_factory=dict)
    results: dict[int, Tensor] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    changes: dict[int, int] = field(default_factory=dict)
    made: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    owners: list[str] = field(default_factory=lambda: [""])
    paused: int = 0

    def fresh(self, t: Tensor) -> Value:
        """A new value for what ``t`` holds now."""
        grid = grid_of(t)
        new = Value(
            id=len(self.alive), shape=tuple(t.shape), scale=None if grid is None else float(grid.scale),
            bits=32 if grid is None else grid.bits, dtype=t.dtype,
        )  # fmt: skip
        self.values[id(t)], self.versions[id(t)] = new, version(t)
        self.alive.append(t)
        return new

    def value(self, t: Tensor) -> Value:
        """The value of an operand."""
        known = id(t) in self.values
        if known and self.versions[id(t)] == version(t):
            found, constant = self.values[id(t)], constant_of(t)
            if constant is not None and found.id in self.results:
                set_constant(self.results[found.id], constant)  # it may have got a name since
            return found
        if self.lenient:
            return self.fresh(t)
        if known:
            raise LingerError(
                f"{user_line()}: a tensor is read after it was changed in place through a view or another name of it; "
                "make one of them a clone()"
            )
        if t in self.made:
            raise LingerError(
                f"{user_line()}: a tensor of shape {tuple(t.shape)} comes from a call that cannot be seen (in a hook, in "
                "a layer's own forward, or outside of PyTorch); make the call in the forward of the net"
            )
        new = self.fresh(t)
        self.constants[new.id] = t
        return new

    def replaced(self, target: Tensor, by: Tensor) -> None:
        """``target`` was overwritten in place with the value of ``by``."""
        self.values[id(target)], self.versions[id(target)] = self.values[id(by)], version(target)

    def stands_for(self, copy: Tensor, original: Tensor) -> None:
        """``copy`` has the value of ``original``, which may change from now on."""
        self.values[id(copy)], self.versions[id(copy)] = self.value(original), version(copy)
        self.alive.append(copy)

    def changed(self, t: Tensor, before: int) -> None:
        """A call wrote into ``t`` itself, whose version was ``before``."""
        self.changes[id(t)] = self.changes.get(id(t), 0) + version(t) - before

    def before_assignment(self, target: Tensor, index: Any, value: Any) -> Value:
        """The value of ``target`` before ``target[index] = value``.

        ``t[i] += x`` reads a view of t, changes it in place, and assigns it: the change is where it is assigned to.
        """
        stale = id(target) in self.values and self.versions[id(target)] != version(target)
        if stale and isinstance(value, Tensor):
            own = self.versions[id(target)] + self.changes.get(id(value), 0) == version(target)
            place, there = value, target[index]
            same = place.data_ptr() == there.data_ptr() and place.stride() == there.stride()
            if own and same and place.shape == there.shape:
                return self.values[id(target)]
        return self.value(target)

    def encode(self, tree: Any) -> Any:
        """The tree with every tensor replaced by its value, a packed sequence by a tuple."""

        def leaf(x: Any) -> Any:
            if isinstance(x, PackedSequence):  # could not be made of values
                return self.encode(tuple(x))
            return self.value(x) if isinstance(x, Tensor) else x

        return pytree.tree_map(leaf, tree, is_leaf=lambda x: isinstance(x, PackedSequence))

    def add(self, name: str, op: str, module: str | None, args: Any, kwargs: Any, out: Any, func: Any = None) -> None:
        """Write a call down; one that returns no tensor leaves no trace."""
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
        owner, op = self.owners[-1], plain_name(func)
        stem = f"{owner}.{op}".lstrip(".")
        n = self.names.get(stem, 0)
        self.names[stem] = n + 1
        self.add(f"{stem}_{n}", op, None, args, kwargs, out, func)
        node = self.nodes[-1]
        if all(v.id in self.constants or v.id in self.results for v in node.inputs()):
            self.results.update({v.id: _kept(t) for v, t in zip(node.outputs, tensors_of(out), strict=True)})


def _kept(t: Tensor) -> Tensor:
    """A copy that says what it was computed from."""
    copy, constant = t.detach().clone(), constant_of(t)
    return copy if constant is None else set_constant(copy, constant)


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and dicts, in order."""
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


def is_leaf(module: nn.Module) -> bool:
    """A module recorded as one node: a twin, or a layer of torch or linger.ops without children of the user's."""
    return isinstance(module, IntModule) or (
        type(module).__module__.startswith(("torch.nn", "linger.ops."))
        and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        and type(module) not in CONTAINERS
    )


@contextmanager
def _hooked(net: nn.Module, tape: Tape, leaf: Callable[[nn.Module], bool]) -> Iterator[None]:
    names: dict[nn.Module, str] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        names.setdefault(module, name)
    handles: list[Any] = []
    running: list[nn.Module] = []
    encoded: list[Any] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        running.append(module)
        tape.owners.append(names[module])
        if leaf(module):
            encoded.append(None)
            tape.paused += 1
            if tape.paused == 1:
                encoded[-1] = tape.encode((args, kwargs))

    def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if not running or running[-1] is not module:
            return  # called after a hook of the user's failed, before ours ran
        running.pop()
        tape.owners.pop()
        if leaf(module):
            tape.paused -= 1
            seen = encoded.pop()
            if not tape.paused and seen is not None:
                name = names[module] or type(module).__name__
                n = tape.names.get(name, 0)
                tape.names[name] = n + 1
                given, named = seen
                tape.add(name if not n else f"{name}@{n}", type(module).__name__, names[module], given, named, out)

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
        tape = running_tape()
        if tape is None or func in QUERIES:
            return func(*args, **(kwargs or {}))
        args, kwargs = first_positional(func, args, kwargs)
        encoded = tape.encode(args), tape.encode(kwargs)
        out = func(*args, **kwargs)
        if tensors_of(out):
            tape.call(func, *encoded, out)
        return out


class _Made(TorchDispatchMode):
    """Notes every tensor that is made while the tape runs: one that no call on the tape made must not pass for a constant."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(t) for t in tensors_of((args, kwargs))}
        for t in tensors_of(out):
            if id(t) not in given:
                self.tape.made[t] = None
        return out


@torch.no_grad()
def record(
    net: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    leaf: Callable[[nn.Module], bool] = is_leaf,
    lenient: bool = False,
) -> tuple[Graph, Any]:
    """Run the net once in eval mode, without touching its state, and write the forward down.

    Returns:
        The graph, and what the forward returned.
    """
    kwargs = kwargs or {}
    tape = Tape(lenient=lenient)
    modes = {m: m.training for m in net.modules()}
    inputs = tuple(tape.fresh(t) for t in tensors_of((args, kwargs)))
    _TAPES.append(tape)
    try:
        for module in modes:
            module.training = False
        with torch.inference_mode(False), torch.no_grad(), _hooked(net, tape, leaf), _Spy(), _Made(tape):
            out = net(*args, **kwargs)
        outputs = tuple(tape.value(t) for t in tensors_of(out))
    finally:
        _TAPES.pop()
        for module in net.modules():  # more than before where the forward made sites
            module.training = modes.get(module, modes[net])
    graph = Graph(
        nodes=tuple(tape.nodes), inputs=inputs, outputs=outputs, constants=tape.constants, results=tape.results
    )
    return graph, out


def recorded(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, **options: Any) -> Any:
    """``record``, with what a forward raises as an error of the user's input.

    Raises:
        LingerError: the forward does not run on these inputs.
    """
    try:
        return record(net, args, kwargs, **options)
    except LingerError:
        raise
    except Exception as error:
        shapes = [tuple(t.shape) for t in tensors_of((args, kwargs))]
        said = f"{type(error).__name__}: {error}".rstrip(": ")
        raise LingerError(
            f"the forward of {type(net).__name__} does not run on inputs of shape {shapes}: {said}; "
            "pass inputs that it accepts"
        ) from error
