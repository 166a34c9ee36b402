"""Accumulators of a given width that cannot overflow, whatever the input: a budget for sum|w| of every output channel.

    sum|q_w| <= (2^(width-1) - 1 - |q_b|) / 2^(data_bits-1)                                             (1)
    w <- sign(w) max(|w| - t, 0) where (1) does not hold, t >= 0 the least for which it does                (2)

(Colbert et al., arXiv 2308.13504, as a projection.) At width 25 every partial sum is an exact float32 too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linger.errors import LingerError, during
from linger.numerics import fake_quant, reach
from linger.ops._weighted import WeightedInt
from linger.swap import named, require_net

HALVINGS = 40
WIDTHS = range(9, 33)


@dataclass(frozen=True)
class Proof:
    """For every layer the largest |accumulator| that any input can make, in LSB, and the limit that none exceeds."""

    peaks: Mapping[str, int]
    width: int
    changed: tuple[str, ...]

    def __str__(self) -> str:
        limit = 2 ** (self.width - 1) - 1
        size = max(map(len, self.peaks))
        lines = [f"{'layer':{size}}  {'largest sum':>12}  of {limit:,} ({self.width} bits)"]
        return "\n".join([*lines, *(f"{name:{size}}  {peak:>12,}" for name, peak in self.peaks.items())])


@torch.no_grad()
def limit_accumulators(net: nn.Module, width: int) -> Proof:
    """Shrink weights so that no accumulator of a layer leaves ``width`` bits, in place; call it after optimizer steps.

    A layer that has to be changed keeps the scale of its weights from then on (a parameter ``log2_w`` that is not trained):
    with a scale that follows the largest weight, smaller weights would only be stored finer.

    Args:
        net: a calibrated or trained fixed-point net.
        width: bits of the accumulator, 9 to 32.

    Returns:
        The proof; print it.

    Raises:
        LingerError: there is no such layer, the width is not allowed, or a bias alone leaves it.
    """
    require_net("limit_accumulators", net)
    with during("limit_accumulators"):
        if width not in WIDTHS:
            raise LingerError(f"width is {width!r}, allowed are {WIDTHS[0]} to {WIDTHS[-1]}; choose one of them")
        layers = {name: m for m, name in named(net).items() if isinstance(m, WeightedInt)}
        if not layers:
            raise LingerError(f"found {type(net).__name__} without a fixed-point layer with weights; call init first")
        changed, peaks = [], {}
        for name, module in layers.items():
            with during("limit_accumulators", name):
                module.require_range("x")
                changed += [name] if _limit(module, 2 ** (width - 1) - 1) else []
                peaks[name] = int(module.accumulator_peak(module.scale("x", module.data_bits)))
    return Proof(peaks=peaks, width=width, changed=tuple(changed))


def _limit(module: WeightedInt, limit: int) -> bool:
    """Equation (2) on one layer; whether something had to change."""
    s_x = module.scale("x", module.data_bits)
    if module.accumulator_peak(s_x) <= limit:
        return False
    w, b, s_w = module.grids(s_x)
    _keep_scale(module, s_w)
    q_b = torch.zeros((), dtype=torch.float64) if b is None else b.double().abs() * s_x * s_w
    room = (limit - q_b) / reach(module.data_bits)
    if bool((room < 0).any()):
        raise LingerError(f"a bias is {int(q_b.max()):,} LSB, allowed are {limit:,}; take a wider accumulator")
    weight, sums = module.weight.float(), _sums(module, w)
    low, high = torch.zeros_like(sums), torch.full_like(sums, float(w.abs().amax()) + 1)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = _sums(module, fake_quant(_shrunk(module, weight, middle), s_w, module.parameter_bits)) * s_w <= room
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    over = sums * s_w > room
    module.weight.copy_(_shrunk(module, weight, torch.where(over, high, 0.0)))
    return True


def _keep_scale(module: WeightedInt, s_w: Tensor) -> None:
    """From now on the weight's scale is this one."""
    if module.learned("w") is None:
        module.register_parameter("log2_w", nn.Parameter(torch.zeros_like(s_w), requires_grad=False))
        module.__dict__.setdefault("_warm", set())
    learned = module.learned("w")
    assert learned is not None
    learned.requires_grad_(False)
    module.start_from("w", s_w)


def _sums(module: WeightedInt, weight: Tensor) -> Tensor:
    """sum|w| of every output channel, shape (out,)."""
    return module.product().absolute_sum(weight.double())


def _shrunk(module: WeightedInt, weight: Tensor, t: Tensor) -> Tensor:
    """sign(w) max(|w| - t, 0) with one t per output channel."""
    product = module.product()
    shape = [-1, *[1] * (weight.dim() - 1)]
    if product.transposed:
        rows = t.view(product.groups, -1).repeat_interleave(weight.shape[0] // product.groups, 0)
        t, shape = rows, [weight.shape[0], weight.shape[1], *[1] * (weight.dim() - 2)]
    return weight.sign() * (weight.abs() - t.reshape(shape).to(weight.dtype)).clamp_min(0)
