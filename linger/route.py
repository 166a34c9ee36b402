"""Functional calls of a converted net: the mode that sends each to its site, and the forward that turns the mode on.

While a converted net's forward runs, ``Route`` looks at every functional call made in its own code (leaf modules run
with it off). A call with a gridded operand goes to the named child that stands for it, its *site*; a call that only
moves values keeps the grid; after anything else the result is a plain tensor: a float island, listed by name.

Some calls are made of others, in ``composed`` with the mode off, in ``ops`` (``COMPOSED``) as PyTorch code that the mode sees
in its turn. A plain tensor that depends on parameters and buffers alone is tagged as such (``constants``): in a product it
is a weight.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

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
)
from linger.composed import MADE_OF
from linger.constants import Constants
from linger.errors import LingerError
from linger.numerics import Grid, fake_quant, grid_of, set_grid, version
from linger.ops import BY_CALL, COMPOSED, FORWARDS, ROUTED, SITES, Composed, IntModule, _symbolic
from linger.ops._constant import constant_of, has_parameter
from linger.selects import stable
from linger.sites import PREFIX, SHARED, children, make_site, refuse_other, site_name
from linger.targets import target as find_target
from linger.trace import Tape, running_tape, tensors_of

_INSIDE: ContextVar[bool] = ContextVar(
    "_INSIDE", default=False
)  # a converted net's forward runs: what it holds is no root
# Layers whose function PyTorch's compiler shows to no mode; in a forward of the user's own, it stays in float there.
UNSEEN = {nn.Hardswish: F.hardswish, nn.Hardsigmoid: F.hardsigmoid}
SITE_INPLACE = frozenset(func for func in BY_CALL if is_inplace(func, {}))  # PyTorch's compiler does not trace a name


class Route(TorchFunctionMode):
    """Active while one module's own forward code runs; ``path`` is its dotted name, for messages."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner
        self.count: dict[str, int] = {}
        self.off: frozenset[str] = owner.__dict__.get("_linger_off", frozenset())
        self.constants = Constants(owner)

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
        seen = gridded or running_tape() is not None or _symbolic.tracing() is not None
        if seen and func in MADE_OF:
            return MADE_OF[func](self, *args, **kwargs)
        called, operands = straight(func, args, kwargs)
        op = BY_CALL.get(called)
        layer = func in COMPOSED and COMPOSED[func].layer
        if op is not None and op.site not in self.off and (gridded or layer or _any_grid(args) or _any_grid(kwargs)):
            normal = self.normal(called, op.site, operands, dict(kwargs))
            if _batched(func, first) and op.integer.takes(*normal[0], **normal[1]):  # type: ignore[union-attr,operator]
                return self.site(called, op.site, *normal)
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

    def site(self, func: Any, tag: str, args: Any, kwargs: Any) -> Any:
        """Send the call to the child that stands for it, made here at the first forward of a net never traced."""
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
        if not inplace:
            return child(*args, **kwargs)
        return _overwritten(args[0], child(_kept(args[0]), *args[1:], **kwargs))

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


def _forward(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """The user's own forward. A Sequential that iterates over itself sees its layers and not its sites."""
    own = FORWARDS.get(type(module))
    if own is not None:
        mode = Route(module)
        with mode:
            return own(mode.send, module, *args, **kwargs)
    unseen = UNSEEN.get(type(module))
    if unseen is not None:
        return Route(module).__torch_function__(unseen, (), args, kwargs | {"inplace": module.inplace})
    if not isinstance(module, nn.Sequential) or "_linger_children" in module.__dict__:
        with Route(module):
            return type(module).forward(module, *args, **kwargs)
    everything = module._modules
    module.__dict__["_linger_children"] = everything
    module.__dict__["_modules"] = {k: v for k, v in everything.items() if not k.startswith(PREFIX)}
    try:
        with Route(module):
            return type(module).forward(module, *args, **kwargs)
    finally:
        module.__dict__["_modules"] = module.__dict__.pop("_linger_children")


def routed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a converted net and of every container in it; errors get the dotted name of their layer."""
    if torch.compiler.is_compiling() and not _symbolic.exporting():
        return _forward(module, args, kwargs)
    root = "_linger_routed" in module.__dict__ and not _INSIDE.get()
    if root and torch.is_inference_mode_enabled():
        return _without_inference_mode(module, args, kwargs)
    token = _INSIDE.set(True)
    try:
        if root and torch.compiler.is_compiling():
            return _exported(module, args, kwargs)
        if root and not module.training:
            _symbolic.FORWARD.set(_symbolic.FORWARD.get() + 1)
        out = _forward(module, args, kwargs)
        if "_linger_unchecked" in module.__dict__:
            _check_sites(module)
        return out
    except LingerError as error:
        error.layer = next((name for name, m in module.named_modules() if m is error.module), error.layer)
        raise
    finally:
        _INSIDE.reset(token)


def _without_inference_mode(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """The same without gradients but with counted changes: only they tell a grid that an in-place call made stale."""
    with torch.inference_mode(False), torch.no_grad():
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, (args, kwargs))
        return routed(module, *args, **kwargs)


def _exported(net: nn.Module, args: Any, kwargs: Any) -> Any:
    """The forward of a converted net that ``torch.onnx.export`` traces: integer tensors inside, floats at the outputs."""
    token = _symbolic.TRACING.set(_symbolic.Tracing(target=find_target(net.__dict__.get("_linger_target"))))
    try:
        out = _forward(net, args, kwargs)
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


def route(
    net: nn.Module, off: frozenset[str], floats: Collection[nn.Module], chip: str, bits: Mapping[str, int]
) -> None:
    """Give the net and its containers their routed forward; torch's own layers and twins keep theirs.

    Args:
        net: the converted net.
        off: tags of sites that stay in float everywhere.
        floats: modules in which all of them do: those that were left in float.
        chip: name of the target whose arithmetic its modules follow.
        bits: widths of the calls that are layers (``F.linear``), and of parameters in other calls.
    """
    for module in net.modules():
        own = not isinstance(module, IntModule) and (
            module is net
            or module in floats
            or type(module) in ROUTED
            or not type(module).__module__.startswith("torch.nn")
        )
        if own and "forward" not in module.__dict__:
            forward = functools.partial(routed, module)
            forward.__signature__ = _bare_signature(type(module).forward)  # type: ignore[attr-defined]
            module.forward = forward  # type: ignore[method-assign]
        if own:
            module._linger_off = frozenset(SITES) if module in floats else off  # type: ignore[assignment]
            module._linger_chip = chip  # type: ignore[assignment]
            module._linger_bits = dict(bits)  # type: ignore[assignment]
        if isinstance(module, IntModule):
            module.follow_chip(chip)


def _bare_signature(forward: Callable[..., Any]) -> inspect.Signature:
    """The user's parameters without ``self`` and annotations: what tools that bind inputs by name look at."""
    given = list(inspect.signature(forward).parameters.values())[1:]
    return inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in given])
