"""One forward, seen: the mode that routes functional calls to sites, and the tape that writes a forward down.

While a converted net's forward runs, ``Route`` looks at every functional call made in its own code (leaf modules run
with it off). A call with a gridded operand goes to the named child that stands for it, its *site*; a call that only
moves values keeps the grid; after anything else the result is a plain tensor: a float island, listed by name.
"""

from __future__ import annotations

import functools
import inspect
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
from linger.numerics import Grid, fake_quant, grid_of, set_grid
from linger.ops import BY_CALL, SITES, IntModule, _symbolic
from linger.targets import target as find_target

T = Tensor

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
    torch.swapaxes: "transpose",
    F.relu: "relu", torch.relu: "relu", T.relu: "relu", F.max_pool1d: "max_pool", F.max_pool2d: "max_pool",
}  # fmt: skip
# In-place forms of the above, and every in-place call: their target loses its grid unless named here.
PASS_INPLACE: dict[Callable[..., Any], str] = {T.relu_: "relu", torch.relu_: "relu", F.relu_: "relu"}
SITE_INPLACE = {T.add_, T.sub_, T.mul_, T.div_}
REVERSED = {T.__rsub__, torch.rsub, T.__rdiv__}
CASTS = {T.to, T.float}  # of values on a grid: nothing to do for integers
QUERIES = {T.dim, T.size, T.numel, T.stride, T.is_floating_point, T.data_ptr, T.is_contiguous, T.storage_offset}


@dataclass(frozen=True, kw_only=True)
class Value:
    """A tensor as it was at one moment: its number, shape, and grid (scale, bits) if it had one."""

    id: int
    shape: tuple[int, ...]
    scale: float | None
    bits: int


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
    stale: set[int] = field(default_factory=set)
    owners: list[str] = field(default_factory=lambda: [""])
    paused: int = 0

    def fresh(self, t: Tensor) -> Value:
        grid = grid_of(t)
        new = Value(
            id=len(self.alive), shape=tuple(t.shape), scale=None if grid is None else float(grid.scale),
            bits=32 if grid is None else grid.bits,
        )  # fmt: skip
        self.values[id(t)] = new
        self.alive.append(t)
        if self.keep_results:
            self.results[new.id] = t.detach().clone()
        return new

    def value(self, t: Tensor) -> Value:
        if id(t) in self.stale:
            raise LingerError(
                f"{_user_line()}: a tensor is read after one of its views was changed in place; make the view a clone()"
            )
        if id(t) not in self.values:
            self.constants[self.fresh(t).id] = t
        return self.values[id(t)]

    def changed(self, target: Tensor) -> None:
        """``target`` was changed in place: what it is a view of no longer holds what was written down."""
        if target._is_view() and target._base is not None:
            self.stale.add(id(target._base))

    def encode(self, tree: Any) -> Any:
        return pytree.tree_map_only(Tensor, self.value, tree)

    def add(self, name: str, op: str, module: str | None, args: Any, kwargs: Any, out: Any, func: Any = None) -> None:
        outputs = _tensors(out)
        if outputs:
            self.nodes.append(
                Node(
                    name=name,
                    op=op,
                    module=module,
                    args=args,
                    kwargs=kwargs,
                    outputs=tuple(self.fresh(t) for t in outputs),
                    source=_user_line(),
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
            self.results.update({v.id: t.detach().clone() for v, t in zip(node.outputs, _tensors(out), strict=True)})


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


_TAPES: list[Tape] = []


def _tape() -> Tape | None:
    """The tape that is running now, if any: none inside a leaf."""
    return _TAPES[-1] if _TAPES and not _TAPES[-1].paused else None


def _user_line() -> str:
    """``file.py:12`` of the user's code that made the call being recorded."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("torch", "linger"):
            return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _plain_name(func: Callable[..., Any]) -> str:
    name = BY_CALL[func].site if func in BY_CALL else PASS.get(func) or PASS_INPLACE.get(func)
    if name:
        return name
    raw = getattr(func, "__name__", str(func))
    return raw if raw != "fn" else "pool"


def _is_inplace(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.startswith("__")) or name == "__setitem__"


class Route(TorchFunctionMode):
    """Active while one module's own forward code runs; ``path`` is its dotted name, for messages."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner
        self.count: dict[str, int] = {}
        self.off: frozenset[str] = owner.__dict__.get("_linger_off", frozenset())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in QUERIES or not args:
            return func(*args, **kwargs)
        first = args[0]
        gridded = grid_of(first) is not None if isinstance(first, Tensor) else _any_grid(first)
        if func in BY_CALL and (gridded or _any_grid(args) or _any_grid(kwargs)) and BY_CALL[func].site not in self.off:
            return self.site(func, args, kwargs)
        if _tape() is None and not gridded:
            with torch._C.DisableTorchFunction():
                out = func(*args, **kwargs)
            if _is_inplace(func) and isinstance(first, Tensor):
                set_grid(first, None)
            return out
        return self.plain(func, args, kwargs, gridded)

    def plain(self, func: Any, args: Any, kwargs: Any, gridded: bool) -> Any:
        if _symbolic.TRACING.get() is not None:
            if func in CASTS and gridded:
                return args[0]
            if not _keeps_grid(func, args, kwargs):
                args, kwargs = _symbolic.dequantized((args, kwargs))
        first = args[0]
        tape = _tape()
        encoded = (tape.encode(args), tape.encode(kwargs)) if tape else None
        grid = grid_of(first) if isinstance(first, Tensor) else None
        with torch._C.DisableTorchFunction():
            out = func(*args, **kwargs)
            if grid is not None and func is F.dropout and self.owner.training:
                out = _dropped(out, grid, kwargs.get("p", args[1] if len(args) > 1 else 0.5))
            elif grid is not None and _keeps_grid(func, args, kwargs):
                for t in out if isinstance(out, (tuple, list)) else (out,):
                    set_grid(t, grid if t.dtype == first.dtype else None)
            elif _is_inplace(func) and isinstance(first, Tensor):
                set_grid(first, None)
        if tape is not None and encoded is not None:
            if _is_inplace(func) and isinstance(first, Tensor):
                if not _tensors(out):
                    raise LingerError(
                        f"{_user_line()}: assignment into a tensor cannot be exported; use torch.cat or torch.where"
                    )
                tape.changed(first)
            if _tensors(out):
                tape.call(func, *encoded, out)
        return out

    def site(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Send the call to the child that stands for it, made here at the first forward of a net never traced."""
        tag = BY_CALL[func].site
        if func is torch.stack:
            tensors, dim = _stacked(*args, **kwargs)
            args, kwargs = ([self.__torch_function__(torch.unsqueeze, (), (t, dim)) for t in tensors], dim), {}
        shared = tag in ("iqadd", "iqmul", "iqdiv", "iqsum", "iqcat")
        counter = "" if shared else tag
        n = self.count.get(counter, 0)
        self.count[counter] = n + 1
        name = site_name(tag, n)
        child = self.owner._modules.get(name)
        if child is None:
            child = make_site(self.owner, tag, name)
        args, kwargs = self.normal(func, tag, args, dict(kwargs))
        out = child(*args) if not kwargs else child(*args, **kwargs)
        if func in SITE_INPLACE:
            grid = grid_of(out)
            with torch._C.DisableTorchFunction():
                args[0].copy_(out)
            set_grid(args[0], grid)
            tape = _tape()
            if tape is not None:
                tape.changed(args[0])
                tape.values[id(args[0])] = tape.values[id(out)]
            return args[0]
        return out

    def normal(self, func: Any, tag: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The call in the order and spelling of the site's forward; ``alpha`` becomes a product before."""
        if func in REVERSED:
            args = (args[1], args[0], *args[2:])
        for name in ("input", "tensors"):
            if name in kwargs:
                args = (kwargs.pop(name), *args)
        if "other" in kwargs:
            args = (*args, kwargs.pop("other"))
        if "axis" in kwargs:
            kwargs["dim"] = kwargs.pop("axis")
        if kwargs.pop("out", None) is not None:
            raise LingerError(f"{tag} with out= has no fixed-point form; assign the result instead", self.path())
        names = BY_CALL[func].names.get(func)
        if names is not None:
            args, kwargs = args[:1], dict(zip(names, args[1:], strict=False)) | kwargs
        alpha = kwargs.pop("alpha", 1)
        if len(args) == 3 and tag in ("iqadd", "iqsub"):
            alpha, args = args[2], args[:2]
        if alpha != 1:
            args = (args[0], self.__torch_function__(torch.mul, (), (args[1], alpha), {}))
        return args, kwargs

    def path(self) -> str:
        return type(self.owner).__name__


def _stacked(tensors: Any, dim: int = 0) -> tuple[Any, int]:
    return tensors, dim


def _any_grid(tree: Any) -> bool:
    if isinstance(tree, Tensor):
        return grid_of(tree) is not None
    if isinstance(tree, (tuple, list)):
        return any(_any_grid(t) for t in tree)
    return isinstance(tree, dict) and any(_any_grid(t) for t in tree.values())


def _keeps_grid(func: Any, args: Any, kwargs: Any) -> bool:
    return func in PASS or func in PASS_INPLACE or func is F.dropout or _pads_zero(func, args, kwargs)


def _pads_zero(func: Any, args: Any, kwargs: Any) -> bool:
    if func is not F.pad:
        return False
    mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
    value = kwargs.get("value", args[3] if len(args) > 3 else 0)
    return mode != "constant" or not value


def _dropped(out: Tensor, grid: Grid, p: float) -> Tensor:
    """Dropout's output scaled by 1 / (1 - p), on a grid coarse enough to hold it. Training only."""
    factor = 1.0
    while factor * (1 - p) < 1 and factor < 2**16:
        factor *= 2
    scale = grid.scale / factor
    return set_grid(fake_quant(out, scale, grid.bits), Grid(scale, grid.bits))


def site_name(tag: str, n: int) -> str:
    """Upstream's key of the n-th functional call of a module (``upstream`` 3.1)."""
    default = "_default_index_" if tag in ("iqadd", "iqmul", "iqdiv", "iqsum") else ""
    return f"_linger_round_tensor_{tag}_{default}{n}"


def make_site(owner: nn.Module, tag: str, name: str) -> nn.Module:
    """Create the child that stands for a functional call; deterministic names, so two nets agree."""
    if torch.compiler.is_compiling():
        raise LingerError(
            "this net has not run yet, so its functional ops have no state; run one batch before compiling"
        )
    device = next((t.device for t in owner.parameters()), torch.device("cpu"))
    device = next((t.device for t in owner.buffers()), device)
    made: nn.Module = SITES[tag].integer(device)  # type: ignore[misc]
    made.train(owner.training)
    owner.add_module(name, made)
    return made


def routed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a converted net and of every container in it; errors get the dotted name of their layer."""
    if torch.compiler.is_compiling() and not _symbolic.exporting():
        with Route(module):
            return type(module).forward(module, *args, **kwargs)
    root = "_linger_routed" in module.__dict__
    try:
        if root and torch.compiler.is_compiling():
            return _exported(module, args, kwargs)
        if root and not module.training:
            _symbolic.FORWARD.set(_symbolic.FORWARD.get() + 1)
        with Route(module):
            out = type(module).forward(module, *args, **kwargs)
        if "_linger_unchecked" in module.__dict__:
            _check_sites(module)
        return out
    except LingerError as error:
        error.layer = next((name for name, m in module.named_modules() if m is error.module), error.layer)
        raise


def _exported(net: nn.Module, args: Any, kwargs: Any) -> Any:
    """The forward of a converted net that ``torch.onnx.export`` traces: integer tensors inside, floats at the outputs."""
    token = _symbolic.TRACING.set(_symbolic.Tracing(target=find_target(net.__dict__.get("_linger_target"))))
    try:
        with Route(net):
            out = type(net).forward(net, *args, **kwargs)
        return _symbolic.dequantized(out)
    finally:
        _symbolic.TRACING.reset(token)


def _check_sites(net: nn.Module) -> None:
    """Raise if a site made from a checkpoint's keys was not used by the forward that has just run."""
    made = net.__dict__.pop("_linger_unchecked")
    idle = [name for name, m in net.named_modules() if any(m is s for s in made) and not m.used]
    if idle:
        raise LingerError(
            f"the checkpoint holds {', '.join(idle)}, which this forward does not use; "
            "load a checkpoint of this net, or leave those keys out"
        )


def route(net: nn.Module, off: frozenset[str] = frozenset()) -> None:
    """``off``: tags of sites that stay in float. Give the net and its containers their routed forward. Leaves (torch's own layers, twins) keep theirs."""
    for module in net.modules():
        own = not isinstance(module, IntModule) and (
            module is net or not type(module).__module__.startswith("torch.nn")
        )
        if own and "forward" not in module.__dict__:
            forward = functools.partial(routed, module)
            forward.__signature__ = _bare_signature(type(module).forward)  # type: ignore[attr-defined]
            module.forward = forward  # type: ignore[method-assign]
            module._linger_off = off  # type: ignore[assignment]


def _bare_signature(forward: Callable[..., Any]) -> inspect.Signature:
    """The user's parameters without ``self`` and annotations: what tools that bind inputs by name look at."""
    given = list(inspect.signature(forward).parameters.values())[1:]
    return inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in given])


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
        kwargs, tape = kwargs or {}, _tape()
        if tape is None or func in QUERIES:
            return func(*args, **kwargs)
        encoded = tape.encode(args), tape.encode(kwargs)
        out = func(*args, **kwargs)
        if _tensors(out):
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
        for module, mode in modes.items():
            module.training = mode
    graph = Graph(
        nodes=tuple(tape.nodes), inputs=inputs, outputs=outputs, constants=tape.constants, results=tape.results
    )
    return graph, out
