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
from linger.floating import in_float
from linger.numerics import fake_quant, levels, scale_from_weight
from linger.ops._weighted import WeightedInt
from linger.ops.convbn import FUSED

FINER = 4  # how many times the weights' scale is doubled in the search of (1)


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
    finally:
        for bn, momentum in before.items():
            bn.momentum = momentum


def best_weight_scale(weight: Tensor, bits: int) -> Tensor:
    """The power of two of least squared error, between that without saturation and 2^``FINER`` of it."""
    coarsest = scale_from_weight(weight, bits)
    scales = [coarsest * 2.0**n for n in range(FINER + 1)]
    errors = torch.stack([(fake_quant(weight, s, bits) - weight).double().pow(2).sum() for s in scales])
    return torch.stack(scales)[errors.argmin()]


@torch.no_grad()
def clip_weights(module: nn.Module) -> None:
    """Equation (1) for one layer; a weight that loses nothing by it stays as it is, bit for bit."""
    if isinstance(module, WeightedInt) and isinstance(module._parameters.get("weight"), Tensor):
        weight: Tensor = module.weight
        limit = float(levels(module.parameter_bits) / best_weight_scale(weight.float(), module.parameter_bits))
        weight.clamp_(-limit, limit)


@contextmanager
def clipped(module: nn.Module) -> Iterator[None]:
    """The layer with clipped weights, for a while."""
    before = {p: p.detach().clone() for p in module.parameters()}
    try:
        clip_weights(module)
        yield
    finally:
        with torch.no_grad():
            for p, value in before.items():
                p.copy_(value)


def correct_bias(
    net: nn.Module, loader: Iterable[Any], batches: int | None, forward: Forward, progress: bool = True
) -> None:
    """Equation (2) for every layer with a bias, all of them on the float net's own activations."""
    shifts: dict[WeightedInt, tuple[Tensor, int]] = {}
    layers = [m for m in net.modules() if isinstance(m, WeightedInt) and m.bias is not None]
    with modes_kept(net), torch.no_grad(), bar(progress) as shown:
        net.eval()
        with in_float(net), _hooked(layers, shifts):
            for batch in shown.track(
                taken(loader, net, batches), length(loader, batches), description="bias correction"
            ):
                forward(net, batch)
        for module, (total, count) in shifts.items():
            assert module.bias is not None
            module.bias.add_((total / max(count, 1)).to(module.bias.dtype))


@contextmanager
def _hooked(layers: Iterable[WeightedInt], shifts: dict[WeightedInt, tuple[Tensor, int]]) -> Iterator[None]:
    """Sum up what the quantized weights take from every output channel."""

    def note(module: Any, args: Any, out: Tensor) -> None:
        weight = module.weight.float()
        lost = weight - module.grids(module.scale("x", module.data_bits))[0].float()
        missing = module.accumulate(args[0].float(), lost, None)
        axis = 1 if missing.dim() > weight.dim() - 1 and weight.dim() > 2 else missing.dim() - 1
        rest = [d for d in range(missing.dim()) if d != axis]
        total, count = shifts.get(module, (missing.new_zeros(missing.shape[axis], dtype=torch.float64), 0))
        shifts[module] = total + missing.double().sum(rest), count + missing.numel() // missing.shape[axis]

    handles = [m.register_forward_hook(note) for m in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
