"""Learned ranges: a threshold per tensor that gradient descent moves, on the grids that everything else uses.

    tqt   range T = 2^l, l learned:     d q(x)/dl = ln 2 * step * (q - x / step inside, q where it saturates)      (1)
    lsq   step D learned, T = B * D:    d q(x)/dD = (q - x / D inside, q where it saturates) / sqrt(N B)           (2)

step = 1 / scale is a power of two either way, scale = 2^round(log2(B / T)), straight through its rounding; N elements.
TQT: Jain et al., arXiv 1903.08066. LSQ: Esser et al., arXiv 1902.08153, snapped to powers of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from linger.masks import passed, saturated
from linger.numerics import (
    WIDEST,
    best_weight_scale,
    fake_quant,
    levels,
    rounded,
    scale_from_running,
)
from linger.rounding import HALF_UP

PREFIX = {"tqt": "log2_", "lsq": "step_"}
KINDS = tuple(PREFIX)
NAMES = tuple(PREFIX.values())
LEAST_STEP = 2.0**-80


class _LearnedQuant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, learned: Tensor, scale: Tensor, own: Tensor, bits: int, bound: float | None, tqt: bool,
        rounding: str = HALF_UP,
    ) -> Tensor:  # fmt: skip
        step = scale.reciprocal()
        v = rounded(x.double() if bits > 16 else x, scale, step, rounding)
        q = v.clamp(-levels(bits) - 1, levels(bits))
        outside = saturated(v, q)
        error = torch.where(outside.bool(), q, torch.addcmul(q, x.to(q.dtype), scale.to(q.dtype), value=-1))
        if bound is not None:
            outside = outside | x.abs().gt_(bound).to(outside.dtype)
        factor = math.log(2) * step if tqt else step.new_full((), (max(x.numel(), 1) * levels(bits)) ** -0.5)
        ctx.save_for_backward(outside, error.to(x.dtype), factor * (scale == own))
        return q.mul_(step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        outside, error, factor = ctx.saved_tensors
        learned = ((grads[0] * error).sum() * factor).float() if ctx.needs_input_grad[1] else None
        return passed(grads[0], outside) if ctx.needs_input_grad[0] else None, learned, *[None] * 6


class Learned(nn.Module):
    """A module whose ranges may be parameters ``log2_<name>`` or ``step_<name>``; without them it is as it was before.

    ``running_<name>`` follows the parameter at every training forward and at every ``train()`` and ``eval()``, so that
    whatever reads a range reads that. ``learns`` are the names of the ranges that can be learned, "w" the weight's.
    """

    learns: ClassVar[tuple[str, ...]] = ()
    rounding: str
    _warm: set[str]

    def learn(self, kind: str) -> None:
        """Register the parameters; those of activations start with the first batch or with calibration."""
        self.__dict__.setdefault("_warm", set())
        device = next((b.device for b in self._buffers.values() if b is not None), None)
        for name in self.learns:
            if self.learned(name) is None:
                self.register_parameter(PREFIX[kind] + name, nn.Parameter(torch.zeros((), device=device)))
        self.warm_up(self.learned_names())

    def learned(self, name: str) -> Tensor | None:
        """The parameter of a range; None where it is not learned."""
        parameters = self._parameters
        found = parameters.get("log2_" + name)
        return parameters.get("step_" + name) if found is None else found

    def learned_names(self) -> list[str]:
        return [name for name in self.learns if self.learned(name) is not None]

    def bits_of(self, name: str) -> int:
        """The width at which a range is used."""
        bits: dict[str, Any] = {"w": "parameter_bits", "o": "out_bits"}
        return min(int(getattr(self, bits.get(name, "data_bits"))), WIDEST - 1)

    @torch.no_grad()
    def warm_up(self, names: list[str]) -> None:
        """Start these parameters from the range as it is: the weight's best one, and what was observed."""
        for name in names:
            bits = self.bits_of(name)
            if name == "w":
                scale = best_weight_scale(self._parameters["weight"].detach().float(), bits)  # type: ignore[union-attr]
            else:
                running = self._buffers[f"running_{name}"]
                if not running > 0:  # type: ignore[operator]
                    self._warm.discard(name)
                    continue
                scale = scale_from_running(running, bits)  # type: ignore[arg-type]
            self.start_from(name, scale)

    @torch.no_grad()
    def start_from(self, name: str, scale: Tensor) -> None:
        """Put the parameter in the middle of what gives this scale."""
        learned, bits = self.learned(name), self.bits_of(name)
        assert learned is not None
        learned.copy_((levels(bits) / scale).log2() if f"log2_{name}" in self._parameters else 1 / scale)
        self._warm.add(name)

    def take_names(self, keys: Iterable[str]) -> None:
        """Make the learned ranges that a checkpoint holds and this net does not learn: they stay as they are."""
        for key in keys:
            prefix, name = key[:5], key[5:]
            if prefix in NAMES and name in self.learns and self.learned(name) is None:
                device = next((t.device for t in self.parameters(recurse=False)), None)
                self.register_parameter(key, nn.Parameter(torch.zeros((), device=device), requires_grad=False))

    def loaded(self, held: set[str]) -> None:
        """A checkpoint was loaded that holds these learned ranges; the others start from what it holds instead."""
        self.warm_up([name for name in self.learned_names() if name not in held])
        seen = {name for name in held if name == "w" or bool(self._buffers[f"running_{name}"] > 0)}  # type: ignore[operator]
        self.__dict__.setdefault("_warm", set()).update(seen)
        self.take_learned()

    def range_of(self, name: str) -> Tensor:
        """The range that the parameter says, detached."""
        learned = self.learned(name)
        assert learned is not None
        learned = learned.detach()
        if f"log2_{name}" in self._parameters:
            return learned.exp2()
        return learned.clamp_min(LEAST_STEP) * levels(self.bits_of(name))

    def warm(self) -> frozenset[str]:
        """The learned ranges that have a value."""
        return frozenset(self.__dict__.get("_warm", ()))

    def set_warm(self, names: Iterable[str]) -> None:
        self.__dict__["_warm"] = set(names)

    def is_warm(self, name: str) -> bool:
        return name in self.__dict__.get("_warm", ())

    def take_learned(self) -> None:
        """Bring the ranges up to the parameters."""
        with torch.no_grad():
            for name in self.__dict__.get("_warm", ()):
                if name != "w":
                    self._buffers[f"running_{name}"].copy_(self.range_of(name))  # type: ignore[union-attr]

    def snapped(
        self, x: Tensor, name: str, scale: Tensor, own: Tensor, bits: int, bound: float | None = None,
        inside: bool = False, fresh: bool = False,
    ) -> Tensor:  # fmt: skip
        """``fake_quant`` to ``scale``; where the range is learned and alone decides it (``own``), with its gradient."""
        learned, rounding = self.learned(name), HALF_UP if name == "w" else self.rounding
        if learned is None or not torch.is_grad_enabled() or bits > WIDEST:
            return fake_quant(x, scale, bits, bound, inside, fresh, rounding)
        return _LearnedQuant.apply(  # type: ignore[no-any-return]
            x, learned, scale, own, bits, bound, f"log2_{name}" in self._parameters, rounding
        )
