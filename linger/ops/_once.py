"""Weights on their grids, kept for as long as they are certainly those of the weights that a module has.

Within one forward of the whole net, weights are quantized once, however often it calls their module. From one eval forward to
the next on the CPU, they are kept too. In training weights change at every step, and nothing is kept.

On the CPU they are kept together with a copy of what they were made from, and compared: that reads two tensors, which is much
less than quantizing one, and sees changes that leave no other trace (``.data``). Elsewhere they have to be those of the same
tensors, in the same memory and not changed in place.

What is kept are values: each call has its own step of autograd, so that its gradients are what they would be without.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from linger.eager import at_hand, same
from linger.numerics import version

PLAIN = (Tensor, nn.Parameter)


class Given(NamedTuple):
    """What weights on grids are made from: weight and bias, the scale of the input, and settings that decide their scale."""

    weight: Tensor
    bias: Tensor | None
    s_x: Tensor
    settings: tuple[Any, ...]

    def alike(self, other: Given) -> bool:
        """Whether everything but weight and bias is equal."""
        return self.settings == other.settings and (self.s_x is other.s_x or same(self.s_x, other.s_x))


class Kept(NamedTuple):
    """Weight and bias in real units on their grids, the weight's scale, and what they were made from."""

    given: Given
    traces: tuple[int, ...]
    weight: Tensor
    bias: Tensor | None
    scale: Tensor


# Of the converted net whose forward runs, whatever module it began with: what was kept, by id of a module.
FORWARD: ContextVar[dict[int, Kept | None] | None] = ContextVar("FORWARD", default=None)
EVAL: WeakKeyDictionary[Any, Kept] = WeakKeyDictionary()  # by module


def recall(module: Any, given: Given) -> Kept | None:
    """What was kept for this module, if it is that of ``given``."""
    if torch.compiler.is_compiling():
        return None
    kept = _of_this_forward(module, given)
    return kept if kept is not None or module.training else _of_eval(module, given)


def _of_this_forward(module: Any, given: Given) -> Kept | None:
    seen = FORWARD.get()
    if seen is None:
        return None
    if id(module) not in seen:
        seen[id(module)] = None
        return None
    module.repeats = True
    kept = seen[id(module)]
    return kept if kept is not None and kept.given.alike(given) and _unchanged(kept, given) else None


def _of_eval(module: Any, given: Given) -> Kept | None:
    kept = EVAL.get(module)
    if kept is None or not at_hand(given.weight) or not kept.given.alike(given):
        return None
    return kept if _unchanged(kept, given) else None


def _unchanged(kept: Kept, given: Given) -> bool:
    """Whether weight and bias are those that something was kept of."""
    if at_hand(given.weight):
        return _equal(kept.given.weight, given.weight) and _equal(kept.given.bias, given.bias)
    itself = kept.given.weight is given.weight and kept.given.bias is given.bias
    return itself and kept.traces == _traces(given)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors hold the same numbers; what has a NaN is equal to nothing."""
    if a is None or b is None:
        return a is b
    return type(b) in PLAIN and torch.equal(a, b)


def keep(module: Any, given: Given, weight: Tensor, bias: Tensor | None, scale: Tensor) -> None:
    """Keep what became of ``given`` for later calls of the module."""
    if torch.compiler.is_compiling():
        return
    seen = FORWARD.get() if module.repeats else None
    for_eval = not module.training and _serves_eval(module, given)
    if seen is None and not for_eval:
        return
    source = given._replace(weight=_copy(given.weight), bias=_copy(given.bias)) if at_hand(given.weight) else given
    made = Kept(source, _traces(given), weight.detach(), None if bias is None else bias.detach(), scale)
    if seen is not None:
        seen[id(module)] = made
    if for_eval:
        EVAL[module] = made


def _serves_eval(module: Any, given: Given) -> bool:
    """Whether the next eval forward may find it: of several calls in a forward one is kept, or they would displace each other."""
    if not at_hand(given.weight) or torch.is_inference_mode_enabled():
        return False
    old = EVAL.get(module)
    return old is None or not module.repeats or old.given.alike(given)


def _copy(x: Tensor | None) -> Any:
    return None if x is None else x.detach().clone()


def _traces(given: Given) -> tuple[int, ...]:
    """What in-place changes and assignments to ``.data`` leave behind, off the CPU, where nothing is compared."""
    found = [t for t in given[:2] if t is not None and not at_hand(t)]
    return tuple(n for t in found for n in (version(t), _address(t)))


def _address(x: Tensor) -> int:
    """Where a tensor lies; those of ``torch.func`` lie nowhere."""
    return 0 if torch._C._functorch.is_functorch_wrapped_tensor(x) else x.data_ptr()
