"""Functional calls of a converted net: the mode that sends each to its site, and the forward that turns the mode on.

While a converted net's forward runs, ``Route`` looks at every functional call made in its own code (leaf modules run
with it off). A call with a gridded operand goes to the named child that stands for it, its *site*; a call that only
moves values keeps the grid; after anything else the result is a plain tensor: a float island, listed by name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from linger.errors import LingerError
from linger.numerics import Grid, fake_quant, grid_of, set_grid
from linger.ops import BY_CALL, ROUTED, SITES, IntModule, _symbolic
from linger.ops.select import selects, stable
from linger.targets import target as find_target
from linger.trace import (
    ALPHA_DROPOUTS,
    DROPOUTS,
    PASS,
    PASS_INPLACE,
    QUERIES,
    T,
    first_positional,
    running_tape,
    tensors_of,
    user_line,
)

REVERSED = {T.__rsub__, torch.rsub, T.__rdiv__}
PREFIX = "_linger_round_tensor_"
CASTS = {T.to, T.float}  # of values on a grid: nothing to do for integers


def _is_inplace(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if torch.compiler.is_compiling():  # which knows fewer methods of str
        return bool(kwargs.get("inplace")) or (name[-1:] == "_" and name[:2] != "__") or name == "__setitem__"
    return bool(kwargs.get("inplace")) or (name.endswith("_") and not name.startswith("__")) or name == "__setitem__"


class Route(TorchFunctionMode):
    """Active while one module's own forward code runs; ``path`` is its dotted name, for messages."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner
        self.count: dict[str, int] = {}
        self.off: frozenset[str] = owner.__dict__.get("_linger_off", frozenset())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            if func in QUERIES:
                return func(*args, **(kwargs or {}))
            return self.call(func, *first_positional(args, kwargs or {}))

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One functional call with torch functions off: to its site, or as it is."""
        first = args[0] if args else None
        gridded = grid_of(first) is not None if isinstance(first, Tensor) else _any_grid(first)
        op = BY_CALL.get(func)
        if op is not None and (gridded or _any_grid(args) or _any_grid(kwargs)) and op.site not in self.off:
            normal = self.normal(func, op.site, args, dict(kwargs))
            if op.integer.takes(*normal[0], **normal[1]):  # type: ignore[union-attr,operator]
                return self.site(func, op.site, *normal)
        if gridded or running_tape() is not None or _symbolic.tracing() is not None:
            return self.plain(func, args, kwargs, gridded)
        out = func(*args, **kwargs)
        if isinstance(first, Tensor) and _is_inplace(func, kwargs):
            set_grid(first, None)
        return out

    def plain(self, func: Any, args: Any, kwargs: Any, gridded: bool) -> Any:
        """A call without a site: the result keeps the first operand's grid where values only move, else it has none."""
        if _symbolic.tracing() is not None:
            if func in CASTS and gridded:
                return args[0]
            if not _keeps_grid(func, args, kwargs):
                args, kwargs = _symbolic.dequantized((args, kwargs))
        first: Any = args[0] if args else None
        tape = running_tape()
        encoded = (tape.encode(args), tape.encode(kwargs)) if tape else None
        grid = grid_of(first) if isinstance(first, Tensor) else None
        out = (func if grid is None else stable(func))(*args, **kwargs)
        if isinstance(first, Tensor) and _is_inplace(func, kwargs):
            set_grid(first, None)
            if tape is not None and not tensors_of(out):
                raise LingerError(
                    f"{user_line()}: assignment into a tensor cannot be exported; use torch.cat or torch.where"
                )
        if grid is not None and _keeps_grid(func, args, kwargs):
            for t in out if isinstance(out, (tuple, list)) else (out,):
                set_grid(t, grid if t.dtype == first.dtype else None)
        elif grid is not None and func in DROPOUTS:
            out = _dropped(out, grid, _dropout_rate(args, kwargs))
        if tape is not None and encoded is not None and tensors_of(out):
            tape.call(func, *encoded, out)
        return out

    def site(self, func: Any, tag: str, args: Any, kwargs: Any) -> Any:
        """Send the call to the child that stands for it, made here at the first forward of a net never traced."""
        shared = tag in ("iqadd", "iqmul", "iqdiv", "iqsum", "iqcat")
        counter = "" if shared else tag
        n = self.count.get(counter, 0)
        self.count[counter] = n + 1
        name = site_name(tag, n)
        child = children(self.owner).get(name)
        if child is None:
            child = make_site(self.owner, tag, name)
        inplace = _is_inplace(func, kwargs)
        kwargs.pop("inplace", None)
        out = child(*args) if not kwargs else child(*args, **kwargs)
        if inplace:
            grid = grid_of(out)
            args[0].copy_(out)
            set_grid(args[0], grid)
            tape = running_tape()
            if tape is not None:
                tape.replaced(args[0], by=out)
            return args[0]
        return out

    def normal(self, func: Any, tag: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The call in the order and spelling of the site's forward; ``alpha`` becomes a product before."""
        if func in REVERSED:
            args = (args[1], args[0], *args[2:])
        if "other" in kwargs:
            args = (*args, kwargs.pop("other"))
        if "axis" in kwargs:
            kwargs["dim"] = kwargs.pop("axis")
        if kwargs.pop("out", None) is not None:
            raise LingerError(f"{tag} with out= has no fixed-point form; assign the result instead", self.path())
        names = BY_CALL[func].names.get(func)
        if names is not None:
            args, kwargs = args[:1], dict(zip(names, args[1:], strict=False)) | kwargs
        if func is torch.stack:
            tensors, dim = args[0], kwargs.pop("dim", args[1] if len(args) > 1 else 0)
            args = [self.call(torch.unsqueeze, (t, dim), {}) for t in tensors], dim
        alpha = kwargs.pop("alpha", 1)
        if len(args) == 3 and tag in ("iqadd", "iqsub"):
            alpha, args = args[2], args[:2]
        if alpha != 1:
            scaled = self.call(torch.mul, (args[1], alpha), {}) if isinstance(args[1], Tensor) else args[1] * alpha
            args = (args[0], scaled)
        return args, kwargs

    def path(self) -> str:
        return type(self.owner).__name__


def _any_grid(tree: Any) -> bool:
    if isinstance(tree, Tensor):
        return grid_of(tree) is not None
    if isinstance(tree, (tuple, list)):
        return any(_any_grid(t) for t in tree)
    return isinstance(tree, dict) and any(_any_grid(t) for t in tree.values())


def _keeps_grid(func: Any, args: Any, kwargs: Any) -> bool:
    if func in PASS or func in PASS_INPLACE or _pads_zero(func, args, kwargs) or selects(func, args, kwargs):
        return True
    return (func in DROPOUTS or func in ALPHA_DROPOUTS) and not _dropout_rate(args, kwargs)


def _dropout_rate(args: Any, kwargs: Any) -> float:
    """p of a dropout that is active, 0 of one that is not."""
    given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    return float(given.get("p", 0.5)) if given.get("training", True) else 0.0


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
    return f"{PREFIX}{tag}_{default}{n}"


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
    made.chip = owner.__dict__.get("_linger_chip", "venus")  # type: ignore[assignment]
    children(owner)[name] = made
    return made


def children(owner: nn.Module) -> dict[str, Any]:
    """Everything below ``owner``, sites included, also while its forward iterates over its layers."""
    return owner.__dict__.get("_linger_children") or owner._modules  # type: ignore[no-any-return]


def _forward(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """The user's own forward. A Sequential that iterates over itself sees its layers and not its sites."""
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
    root = "_linger_routed" in module.__dict__
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


def route(net: nn.Module, off: frozenset[str], floats: Collection[nn.Module], chip: str) -> None:
    """Give the net and its containers their routed forward; torch's own layers and twins keep theirs.

    Args:
        net: the converted net.
        off: tags of sites that stay in float everywhere.
        floats: modules in which all of them do: those that were left in float.
        chip: name of the target whose arithmetic its modules follow.
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
        if isinstance(module, IntModule):
            module.chip = chip


def _bare_signature(forward: Callable[..., Any]) -> inspect.Signature:
    """The user's parameters without ``self`` and annotations: what tools that bind inputs by name look at."""
    given = list(inspect.signature(forward).parameters.values())[1:]
    return inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in given])
