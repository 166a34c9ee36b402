"""What changes while a net trains in fixed point, as plain functions and one object that says when.

Weights of 4 bits swing between two levels late in training; damping pulls each towards the level it is on:

    loss += factor(epoch) * sum over layers of sum (q(w) - clip(w))^2                                     (1)

(Nagel et al., arXiv 2203.11086), q without a gradient, factor rising from 0 along half a cosine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from linger.errors import LingerError
from linger.numerics import levels
from linger.ops import IntModule
from linger.ops._weighted import WeightedInt
from linger.swap import device_of, require_net
from linger.training import thresholds

FEW_BITS = 4  # weights of at most so many are damped


def hold_ranges(net: nn.Module, on: bool = True) -> None:
    """Keep every range of a fixed-point net as it is in training (or, with False, let them follow the data again).

    Learned ranges are not meant: ``freeze_thresholds`` stops those.
    """
    require_net("hold_ranges", net)
    for module in net.modules():
        if isinstance(module, IntModule):
            module.still = on


def freeze_thresholds(net: nn.Module, on: bool = True) -> None:
    """Stop learned ranges: they get no gradient any more (or, with False, get one again)."""
    require_net("freeze_thresholds", net)
    for _, p in thresholds(net):
        p.requires_grad_(not on)
        p.grad = None if on else p.grad


def freeze_batchnorm(net: nn.Module) -> None:
    """Put every batch normalization into eval mode: training goes on with the running statistics, as the folded layer will.

    ``net.train()`` takes it back; call this after it, in every epoch.
    """
    require_net("freeze_batchnorm", net)
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def oscillation(net: nn.Module, bits: int = FEW_BITS) -> Tensor:
    """The sum of equation (1) over layers whose weights have at most ``bits`` bits, 0-d; its gradient reaches the weights."""
    total = torch.zeros((), device=device_of(net))
    for module in net.modules():
        if isinstance(module, WeightedInt) and module.parameter_bits <= bits:
            with torch.no_grad():
                q, _, s_w = module.grids(module.scale("x", module.data_bits))
            top = levels(module.parameter_bits)
            w = torch.clamp(module.weight.float(), (-top - 1) / s_w, top / s_w)
            total = total + (q - w).pow(2).sum()
    return total


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When what freezes, in epochs counted from 0. The training loop stays the user's.

        schedule = linger.Schedule(epochs=20, normalize=8)
        for epoch in range(20):
            if schedule.converts(epoch):
                linger.init(net)
            net.train()
            schedule.begin(net, epoch)
            for x, y in loader:
                loss = criterion(net(x), y) + schedule.damping(net, epoch)

    What is True of an epoch follows from its number alone, so that training can go on from any checkpoint.

    Attributes:
        epochs: of all stages together.
        normalize: how many of them come before ``init``, with bounds in float.
        ranges: from which part of the rest on, 0 to 1, ranges that follow the data are held; None for never.
        batchnorm: from which part of the rest on batch normalizations use their running statistics.
        thresholds: from which part of the rest on learned ranges stop.
        damp: the largest factor of equation (1); 0 for no damping.
    """

    epochs: int
    normalize: int = 0
    ranges: float | None = 0.5
    batchnorm: float | None = 0.5
    thresholds: float | None = 0.75
    damp: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.normalize < self.epochs:
            raise LingerError(
                f"Schedule: normalize is {self.normalize}, allowed are 0 to {self.epochs - 1} of {self.epochs} epochs; "
                "leave some for fixed point"
            )
        for name in ("ranges", "batchnorm", "thresholds"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise LingerError(
                    f"Schedule: {name} is {value}, allowed are None and parts from 0 to 1; choose one of them"
                )
        if self.damp < 0:
            raise LingerError(f"Schedule: damp is {self.damp}, allowed are 0 and above; leave it out for no damping")

    def converts(self, epoch: int) -> bool:
        """Whether ``init`` is to be called before this epoch."""
        return epoch == self.normalize

    def part(self, epoch: int) -> float:
        """How much of the fixed-point stage lies before this epoch, 0 to 1; negative before it."""
        return (epoch - self.normalize) / (self.epochs - self.normalize)

    def reached(self, name: str, epoch: int) -> bool:
        """Whether "ranges", "batchnorm" or "thresholds" are frozen in this epoch."""
        start = getattr(self, name)
        return start is not None and epoch >= self.normalize and self.part(epoch) >= start

    def begin(self, net: nn.Module, epoch: int) -> None:
        """Freeze what is to be frozen in this epoch; call it after ``net.train()``."""
        if self.reached("ranges", epoch):
            hold_ranges(net)
        if self.reached("batchnorm", epoch):
            freeze_batchnorm(net)
        if self.thresholds is not None:
            freeze_thresholds(net, self.reached("thresholds", epoch))

    def damping(self, net: nn.Module, epoch: int) -> Tensor | float:
        """What to add to the loss in this epoch, equation (1); 0.0 without damping."""
        if self.damp == 0 or self.part(epoch) <= 0:
            return 0.0
        return self.damp * (1 - math.cos(math.pi * self.part(epoch))) / 2 * oscillation(net)
