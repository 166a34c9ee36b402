"""The fixed-point net and the same net in float on the same batch, compared at every layer and call.

A batch goes through twice. First in fixed point: every result is kept, and the layer's own float function runs on the very
inputs that the layer has. Then in float: the layers compute in float with the parameters as they were before calibration, and
the calls with PyTorch's own functions; results are tagged with the grids they have in fixed point, though their values are not
on them, so that calls go the same ways, and are compared with what was kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from linger.batches import Forward, modes_kept
from linger.floating import FLOATS, float_forward, originals, put
from linger.numerics import Grid, grid_of, set_grid
from linger.ops import SITES, IntModule
from linger.ops.mask import MaskSite
from linger.ops.quant import ScaledRoundLayer
from linger.report._meter import Meter
from linger.sites import WITNESSES
from linger.trace import tensors_of

Key = tuple[str, int]  # dotted name, and the number of the call in one forward
CALLS = {op.integer for op in SITES.values()} - FLOATS.keys() - {ScaledRoundLayer}  # what only a route reaches
NO_ERROR = (MaskSite,)  # moves all scores by a constant, which softmax does not see


def relued(module: Any, x: Tensor) -> Tensor:
    """What counts of a layer's result: the rest is cut off behind it."""
    return x.clamp_min(0) if getattr(module, "ahead_relu", False) else x


class Pass:
    """One forward over the net: which calls come by, and their meters."""

    def __init__(self, net: nn.Module, meters: dict[Key, Meter]) -> None:
        self.names = {m: name or type(m).__name__ for name, m in net.named_modules() if isinstance(m, IntModule)}
        self.meters, self.turns = meters, dict.fromkeys(self.names.values(), 0)

    def key(self, module: Any) -> Key | None:
        """The name of this call; None of a module that is not the net's."""
        name = self.names.get(module)
        if name is None:
            return None
        self.turns[name] += 1
        return name, self.turns[name] - 1

    def results(self, out: Any) -> list[Tensor]:
        """The tensors of a result that are numbers."""
        return [t for t in tensors_of(out) if t.is_floating_point()]


class FixedPass(Pass):
    """The forward in fixed point. ``kept``: results and their grids."""

    def __init__(self, net: nn.Module, meters: dict[Key, Meter]) -> None:
        super().__init__(net, meters)
        self.kept: dict[Key, list[tuple[Tensor, Grid | None]]] = {}

    def run(self, site: Any, plain: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """A call beside the same call in float on the same operands."""
        wanted = plain()
        out = site(*args, **kwargs)
        self.note(site, wanted, out)
        return out

    def layer(self, module: Any, args: Any, kwargs: Any, out: Any) -> None:
        """A forward hook of a layer."""
        fitted = {name: p.detach().clone() for name, p in module._parameters.items() if p is not None}
        before = originals(module)
        try:
            put(module, before)
            wanted = float_forward(module)(*args, **kwargs)
        finally:
            put(module, {name: fitted[name] for name in before})
        self.note(module, wanted, out)

    def note(self, module: Any, wanted: Any, out: Any) -> None:
        """Keep the result, and count what the layer alone gets wrong."""
        key = self.key(module)
        if key is None:
            return
        results = self.results(out)
        self.kept[key] = [(t.detach().clone(), grid_of(t)) for t in results]
        if not results:
            return
        found, grid = self.kept[key][0]
        meter = self.meters.setdefault(key, Meter())
        meter.grid = grid
        meter.add_fixed(found)
        first = next(iter(self.results(wanted)), None)
        if first is not None and first.shape == found.shape and not isinstance(module, NO_ERROR):
            meter.add_own(relued(module, first), relued(module, found))


class FloatPass(Pass):
    """The forward in float, after the one in fixed point."""

    def __init__(self, net: nn.Module, before: FixedPass) -> None:
        super().__init__(net, before.meters)
        self.kept = before.kept

    def run(self, site: Any, plain: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """A call in float."""
        out = plain()
        self.note(site, out)
        return out

    def layer(self, module: Any, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of a layer in float."""
        out = plain(*args, **kwargs)
        out = out.view_as(out) if isinstance(out, Tensor) else out  # what came in has no grid of ours
        self.note(module, out)
        return out

    def note(self, module: Any, out: Any) -> None:
        """Tag the result, and count how far the fixed-point one is from it."""
        key = self.key(module)
        kept = [] if key is None else self.kept.pop(key, [])
        for i, (t, (found, grid)) in enumerate(zip(self.results(out), kept, strict=False)):
            if not i and key is not None and t.shape == found.shape and not isinstance(module, NO_ERROR):
                self.meters[key].add_total(relued(module, t), relued(module, found))
                self.meters[key].add_float(t)
            set_grid(t, grid)


@contextmanager
def _fixed(noting: FixedPass) -> Iterator[None]:
    with ExitStack() as stack:
        for module in noting.names:
            if type(module) not in CALLS:
                handle = module.register_forward_hook(noting.layer, with_kwargs=True)
                stack.callback(handle.remove)
        WITNESSES.append(noting)
        stack.callback(WITNESSES.remove, noting)
        yield


@contextmanager
def _float(noting: FloatPass) -> Iterator[None]:
    with ExitStack() as stack:
        for module in noting.names:
            plain = float_forward(module)
            if plain is None:
                continue
            fitted = {k: module._parameters[k].detach().clone() for k in originals(module)}  # type: ignore[union-attr]
            put(module, originals(module))
            stack.callback(put, module, fitted)
            module.__dict__["forward"] = functools.partial(noting.layer, module, plain)
            stack.callback(module.__dict__.pop, "forward", None)
        WITNESSES.append(noting)
        stack.callback(WITNESSES.remove, noting)
        yield


@torch.no_grad()
def both(net: nn.Module, batch: Any, forward: Forward, meters: dict[Key, Meter]) -> tuple[Any, Any]:
    """One batch through both.

    Args:
        net: a fixed-point net whose ranges are known; comes back as it was.
        batch: what the loader yields.
        forward: how it enters the net.
        meters: counted into, one for every call.

    Returns:
        The outputs in fixed point and in float.
    """
    with modes_kept(net):
        net.eval()
        fixed = FixedPass(net, meters)
        try:
            with _fixed(fixed):
                found = forward(net, batch)
            with _float(FloatPass(net, fixed)):
                wanted = forward(net, batch)
        finally:
            for module in fixed.names:
                module.forget()
    return found, wanted
