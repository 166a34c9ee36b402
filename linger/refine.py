"""What improves a net without training, besides its ranges: statistics, weights within their best range, biases.

clipped     w <- clamp(w, -T, T), T = B / s, s the power of two of least sum (w - q(w))^2             (1)
corrected   b <- b + E[y(x; w) - y(x; q(w))] per output channel, x the layer's input in float             (2)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from linger.batches import Forward, bar, length, modes_kept, observing, taken
from linger.errors import LingerError
from linger.floating import CLIPPED, CORRECTED, in_float, originals, put
from linger.histogram import summed
from linger.numerics import best_weight_scale, levels
from linger.ops._recurrent import RecurrentInt
from linger.ops._weighted import WeightedInt
from linger.ops.convbn import FUSED


def statistics(net: nn.Module) -> dict[nn.Module, _BatchNorm]:
    """The batch normalizations of the net that hold statistics, by the module that has to be in training mode for them.

    Raises:
        LingerError: there is none.
    """
    found: dict[nn.Module, _BatchNorm] = {m: m for m in net.modules() if isinstance(m, _BatchNorm)}
    found |= {m: m.bn for m in net.modules() if type(m) in FUSED.values()}  # type: ignore[misc]
    if not any(bn.running_mean is not None for bn in found.values()):
        raise LingerError(
            f"found {type(net).__name__} without a batch normalization, which init folds into convolutions; "
            "estimate statistics before init"
        )
    return {m: bn for m, bn in found.items() if bn.running_mean is not None}


def reestimate(
    net: nn.Module, loader: Iterable[Any], batches: int | None, forward: Forward, progress: bool = True
) -> None:
    """Statistics of every batch normalization anew: their plain average over the batches, the rest of the net in eval mode."""
    found = statistics(net)
    before = {bn: bn.momentum for bn in found.values()}
    try:
        with observing(net), bar(progress) as shown:
            for module, bn in found.items():
                module.training = bn.training = True
                bn.reset_running_stats()
                bn.momentum = None
            for batch in shown.track(
                taken(loader, net, batches), length(loader, batches), description="batch statistics"
            ):
                forward(net, batch)
            for bn in found.values():
                for statistic in (bn.running_mean, bn.running_var):
                    assert statistic is not None
                    statistic.copy_(summed(statistic.clone()) / summed(torch.ones_like(statistic)))
    finally:
        for bn, momentum in before.items():
            bn.momentum = momentum


@torch.no_grad()
def clip_weights(module: nn.Module) -> None:
    """Equation (1) for one layer; a weight that loses nothing by it stays as it is, bit for bit."""
    held: dict[str, tuple[Tensor, float]] = {}
    for name, weight in _scaled(module):
        bits: int = module.parameter_bits  # type: ignore[assignment]
        limit = float(levels(bits) / best_weight_scale(weight.float(), bits))
        before = weight.detach().clone()
        if not torch.equal(weight.clamp_(-limit, limit), before):
            held[name] = before, limit
    module.__dict__.update({CLIPPED: held} if held else {})


def _scaled(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a layer whose scales follow from their largest element."""
    recurrent = isinstance(module, RecurrentInt)
    if recurrent or (isinstance(module, WeightedInt) and module.learned("w") is None):
        for name, p in module._parameters.items():
            if p is not None and (name == "weight" or (recurrent and name.startswith("weight_"))):
                yield name, p


@contextmanager
def clipped(module: nn.Module) -> Iterator[None]:
    """The layer as ``calibrate`` would clip it at its width of now, for a while."""
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    held = module.__dict__.get(CLIPPED)
    try:
        put(module, {k: v for k, v in originals(module).items() if k.startswith("weight")})
        clip_weights(module)
        yield
    finally:
        put(module, before)
        module.__dict__.pop(CLIPPED, None)
        module.__dict__.update({} if held is None else {CLIPPED: held})


def undo(net: nn.Module) -> None:
    """Weights and biases as they were before an earlier calibration, where nothing has changed them since."""
    for module in net.modules():
        put(module, originals(module))
        module.__dict__.pop(CLIPPED, None)
        module.__dict__.pop(CORRECTED, None)


@torch.no_grad()
def correct_bias(
    net: nn.Module, loader: Iterable[Any], batches: int | None, forward: Forward, progress: bool = True
) -> None:
    """Equation (2) for every layer with a bias, all of them on the float net's own activations, with its own weights."""
    lost: dict[WeightedInt, Tensor] = {}
    for m in net.modules():
        if isinstance(m, WeightedInt) and m.bias is not None:
            rounded = m.grids(m.scale("x", m.data_bits))[0].float()
            lost[m] = originals(m).get("weight", m.weight).float() - rounded
    shifts = _shifts(net, lost, taken(loader, net, batches), length(loader, batches), forward, progress)
    for module, (total, count) in shifts.items():
        assert module.bias is not None
        before = module.bias.detach().clone()
        module.bias.add_((total / max(count, 1)).to(module.bias.dtype))
        module.__dict__[CORRECTED] = before, module.bias.detach().clone()


def _shifts(
    net: nn.Module,
    lost: dict[WeightedInt, Tensor],
    batches: Iterable[Any],
    total: int | None,
    forward: Forward,
    progress: bool,
) -> dict[WeightedInt, tuple[Tensor, int]]:
    """What the quantized weights take from every output channel: its sum, and over how many elements."""
    shifts: dict[WeightedInt, tuple[Tensor, int]] = {}

    def note(module: Any, args: Any, out: Tensor) -> None:
        weight = lost[module]
        missing = module.accumulate(args[0].float(), weight, None)
        axis = missing.dim() - (weight.dim() - 1) if weight.dim() > 2 else missing.dim() - 1
        rest = [d for d in range(missing.dim()) if d != axis]
        summed, count = shifts.get(module, (missing.new_zeros(missing.shape[axis], dtype=torch.float64), 0))
        shifts[module] = summed + missing.double().sum(rest), count + missing.numel() // missing.shape[axis]

    handles = [m.register_forward_hook(note) for m in lost]
    try:
        with modes_kept(net), in_float(net), bar(progress) as shown:
            net.eval()
            for batch in shown.track(batches, total, description="bias correction"):
                forward(net, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {m: (summed(total), int(summed(torch.tensor(n, device=total.device)))) for m, (total, n) in shifts.items()}
