"""Functional calls of a converted net: the mode that sends each to its site. ``forwards`` turns it on.

While a converted net's forward runs, ``Route`` looks at every functional call made in its own code (leaf modules run
with it off). A call with a gridded operand goes to the named child that stands for it, its *site*; a call that only
moves values keeps the grid; after anything else the result is a plain tensor: a float island, listed by name.

Some calls are made of others, in ``composed`` with the mode off, in ``ops`` (``COMPOSED``) as PyTorch code that the mode sees
in its turn. A plain tensor that depends on parameters and buffers alone is tagged as such (``constants``): in a product it
is a weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from linger.calls import (
    ASSIGN,
    BATCHED,
    CASTS,
    DROPOUTS,
    JOINS,
    QUERIES,
    UNPACK,
    asked_length,
    cast_to,
    dropout_rate,
    first_positional,
    is_inplace,
    keeps_grid,
    plain_name,
    straight,
    unshared,
)
from linger.composed import MADE_OF
from linger.constants import Constants
from linger.eager import recorded
from linger.errors import LingerError
from linger.numerics import Grid, fake_quant, grid_of, set_grid, version
from linger.ops import BY_CALL, COMPOSED, SITES, Composed, _symbolic
from linger.ops._constant import constant_of, has_parameter
from linger.selects import stable
from linger.sites import SHARED, WITNESSES, children, make_site, refuse_checkpointed, refuse_other, site_name
from linger.trace import Tape, running_tape, tensors_of

SITE_INPLACE = frozenset(func for func in BY_CALL if is_inplace(func, {}))  # PyTorch's compiler does not trace a name


class Route(TorchFunctionMode):
    """Active while one module's own forward code runs; ``path`` is its dotted name, for messages."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner
        self.count: dict[str, int] = {}
        self.off: frozenset[str] = owner.__dict__.get("_linger_off", frozenset())
        self.constants = Constants(owner)
        self.recorded = recorded()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            if func in QUERIES:
                return func(*args, **(kwargs or {}))
            func = torch.unflatten if func is Tensor.unflatten else func  # a method that the compiler cannot call here
            args, kwargs = first_positional(func, args, kwargs)
            made = COMPOSED.get(func)
            fixed = made is not None and self.composes(made, args, kwargs)
            if made is None or not (fixed or (made.opaque and running_tape() is not None)):
                return self.call(func, args, kwargs)
            if kwargs.pop("out", None) is not None:
                raise LingerError(
                    f"{func.__name__} with out= has no fixed-point form; assign the result instead", self.path()
                )
            args, kwargs = self.constants.tagged(args), {k: self.constants.tagged(v) for k, v in kwargs.items()}
        if fixed:
            with self:
                return made.function(self.send, *args, **kwargs)
        return self.in_float(made, args, kwargs)

    def in_float(self, made: Composed, args: Any, kwargs: Any) -> Any:
        """A call that is in float, made of others because a file has no op for it."""
        off, self.off = self.off, frozenset(SITES)
        try:
            with self:
                return made.function(self.send, *args, **kwargs)
        finally:
            self.off = off

    def send(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """The call ``func`` that a composed one is made of, to its site."""
        with torch._C.DisableTorchFunction():
            return self.call(func, args, kwargs)

    def composes(self, made: Composed, args: Any, kwargs: Any) -> bool:
        """Whether the calls that this one is made of are made instead."""
        if made.tag in self.off:
            return False
        if _any_grid(args) or _any_grid(kwargs):
            return True
        held = (*args[1:], *kwargs.values()) if made.layer else ()
        return any(has_parameter(constant_of(t)) for t in held if isinstance(t, Tensor))

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One functional call with torch functions off: to its site, or as it is."""
        first = args[0] if args else None
        gridded = grid_of(first) is not None if isinstance(first, Tensor) else _any_grid(first)
        if gridded and recorded() != self.recorded:
            refuse_checkpointed(plain_name(func), type(self.owner).forward)
        seen = gridded or running_tape() is not None or _symbolic.tracing() is not None
        if seen and func in MADE_OF:
            return MADE_OF[func](self, *args, **kwargs)
        called, operands = straight(func, args, kwargs)
        op = BY_CALL.get(called)
        layer = func in COMPOSED and COMPOSED[func].layer
        if op is not None and op.site not in self.off and (gridded or layer or _any_grid(args) or _any_grid(kwargs)):
            normal = self.normal(called, op.site, operands, dict(kwargs))
            if _batched(func, first) and op.integer.takes(*normal[0], **normal[1]):  # type: ignore[union-attr,operator]
                plain = functools.partial(func, *unshared(func, args, kwargs), **kwargs) if WITNESSES else None
                return self.site(called, op.site, *normal, plain=plain)
        if seen:
            return self.plain(func, args, kwargs, gridded)
        out = func(*args, **kwargs)
        if isinstance(first, Tensor) and is_inplace(func, kwargs):
            set_grid(first, None)
        self.constants.mark(out, func, args, kwargs)
        return out

    def plain(self, func: Any, args: Any, kwargs: Any, gridded: bool) -> Any:
        """A call without a site: the result keeps the first operand's grid where values only move, else it has none."""
        if _symbolic.tracing() is not None:
            if gridded and func in CASTS and cast_to(func, args, kwargs) in (None, torch.float32):
                return args[0]  # integers stand for float32
            args, kwargs = _traced(func, args, kwargs, gridded)
        first: Any = args[0] if args else None
        tape = running_tape()
        encoded = _encoded(tape, func, args, kwargs) if tape else None
        grid = grid_of(first) if isinstance(first, Tensor) else None
        inplace = isinstance(first, Tensor) and is_inplace(func, kwargs)
        before = version(first) if inplace else 0
        out = (func if grid is None else stable(func))(*args, **kwargs)
        if isinstance(out, (tuple, list)) and torch.compiler.is_compiling():
            out = tuple(t.view(t.shape) for t in out)  # only results of their own can be tagged there
        if not gridded:
            self.constants.mark(out, func, args, kwargs)
        if inplace:
            set_grid(first, None)
            if tape is not None:
                tape.changed(first, before)
        if grid is not None and keeps_grid(func, args, kwargs):
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, Tensor):  # ``x.type()`` is a string
                    set_grid(t, grid if t.dtype == first.dtype else None)
        elif grid is not None and func in DROPOUTS:
            out = _dropped(out, grid, dropout_rate(args, kwargs))
        if tape is not None and encoded is not None:
            made = first if func is ASSIGN else out
            if tensors_of(made):
                tape.call(func, *encoded, made)
        return out

    def site(self, func: Any, tag: str, args: Any, kwargs: Any, plain: Callable[[], Any] | None = None) -> Any:
        """Send the call to the child that stands for it, made here at the first forward of a net never traced.

        ``plain``: the same call in float, for the witness that looks at both.
        """
        counter = "" if tag in SHARED else tag
        n = self.count.get(counter, 0)
        self.count[counter] = n + 1
        name = site_name(tag, n)
        child = children(self.owner).get(name)
        if child is None:
            refuse_other(self.owner, tag, n, name)
            child = make_site(self.owner, tag, name)
        inplace = func in SITE_INPLACE or bool(kwargs.get("inplace"))
        kwargs.pop("inplace", None)
        run: Any = child if plain is None else functools.partial(WITNESSES[-1].run, child, plain)
        if not inplace:
            return run(*args, **kwargs)
        return _overwritten(args[0], run(_kept(args[0]), *args[1:], **kwargs))

    def normal(self, func: Any, tag: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The call in the order and spelling of the site's forward; ``alpha`` becomes a product before."""
        other = kwargs.pop("other", None)
        if other is not None and len(args) < 2:
            args = (*args, other)
        if "axis" in kwargs:
            kwargs["dim"] = kwargs.pop("axis")
        if kwargs.get("rounding_mode", "") is None:
            del kwargs["rounding_mode"]
        if kwargs.pop("out", None) is not None:
            raise LingerError(f"{tag} with out= has no fixed-point form; assign the result instead", self.path())
        names = BY_CALL[func].names.get(func)
        if names is not None:
            args, kwargs = args[:1], dict(zip(names, args[1:], strict=False)) | kwargs
        if func in JOINS:
            args = (_joined(args[0]), *args[1:])
        return self.scaled(tag, args, kwargs)

    def scaled(self, tag: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The call without ``alpha``, which becomes a product before."""
        alpha = kwargs.pop("alpha", 1) if tag in ("iqadd", "iqsub") else 1
        if len(args) == 3 and tag in ("iqadd", "iqsub"):
            alpha, args = args[2], args[:2]
        if alpha != 1:
            scaled = self.call(torch.mul, (args[1], alpha), {}) if isinstance(args[1], Tensor) else args[1] * alpha
            args = (args[0], scaled)
        return args, kwargs

    def path(self) -> str:
        return type(self.owner).__name__


def _traced(func: Any, args: Any, kwargs: Any, gridded: bool) -> tuple[Any, Any]:
    """The operands of a call that ``torch.onnx.export`` traces: integers where values only move, else floats."""
    cast = gridded and func in CASTS and cast_to(func, args, kwargs) is not None
    if keeps_grid(func, args, kwargs) and not cast:
        return args, kwargs
    if gridded and is_inplace(func, kwargs):
        raise LingerError(
            f"found {plain_name(func)} on a fixed-point tensor in place, allowed in torch.onnx.export are calls that "
            "return a new one; use linger.onnx.export, or a call without the underscore"
        )
    return _symbolic.dequantized((args, kwargs))  # type: ignore[no-any-return]


def _encoded(tape: Tape, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The operands of a call as the tape's values."""
    if func is ASSIGN:
        return (tape.before_assignment(*args), *tape.encode(args[1:])), {}
    if func is UNPACK:
        args = (*args[:4], asked_length(args[4]))
    return tape.encode(args), tape.encode(kwargs)


def _kept(target: Tensor) -> Tensor:
    """What an in-place call reads: a copy, since autograd needs it after ``target`` is overwritten."""
    if not torch.is_grad_enabled():
        return target
    return set_grid(target.clone(), grid_of(target))


def _overwritten(target: Tensor, out: Tensor) -> Tensor:
    """The end of an in-place call: ``target`` holds ``out`` and is on its grid."""
    before, tape = version(target), running_tape()
    target.copy_(out)
    set_grid(target, grid_of(out) if target.dtype == out.dtype else None)
    if tape is not None:
        tape.changed(target, before)
        tape.replaced(target, by=out)
    return target


def _joined(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The operands of torch.cat, without the empty ``torch.tensor([])`` that a loop may start with."""
    ranked = [t for t in tensors if t.dim() != 1 or t.numel()]
    return ranked or list(tensors)


def _batched(func: Any, first: Any) -> bool:
    return func not in BATCHED or first.dim() == BATCHED[func]


def _any_grid(tree: Any) -> bool:
    if isinstance(tree, Tensor):
        return grid_of(tree) is not None
    if isinstance(tree, (tuple, list)):
        return any(_any_grid(t) for t in tree)
    return isinstance(tree, dict) and any(_any_grid(t) for t in tree.values())


def _dropped(out: Tensor, grid: Grid, p: float) -> Tensor:
    """Dropout's output scaled by 1 / (1 - p), on a grid coarse enough to hold it. Training only."""
    factor = 1.0
    while factor * (1 - p) < 1 and factor < 2**16:
        factor *= 2
    scale = grid.scale / factor
    return set_grid(fake_quant(out, scale, grid.bits), Grid(scale, grid.bits))
