"""Functional calls of a converted net: the mode that sends each to its site, and the forward that turns the mode on.

While a converted net's forward runs, ``Route`` looks at every functional call made in its own code (leaf modules run
with it off). A call with a gridded operand goes to the named child that stands for it, its *site*; a call that only
moves values keeps the grid; after anything else the result is a plain tensor: a float island, listed by name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from linger.errors import LingerError
from linger.numerics import Grid, fake_quant, grid_of, set_grid
from linger.ops import BY_CALL, SITES, IntModule, _symbolic
from linger.targets import target as find_target
from linger.trace import PASS, PASS_INPLACE, QUERIES, T, running_tape, tensors_of, user_line

SITE_INPLACE = {T.add_, T.sub_, T.mul_, T.div_}
REVERSED = {T.__rsub__, torch.rsub, T.__rdiv__}
CASTS = {T.to, T.float}  # of values on a grid: nothing to do for integers


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
        if running_tape() is None and not gridded:
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
        tape = running_tape()
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
                if not tensors_of(out):
                    raise LingerError(
                        f"{user_line()}: assignment into a tensor cannot be exported; use torch.cat or torch.where"
                    )
                tape.changed(first)
            if tensors_of(out):
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
            tape = running_tape()
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
