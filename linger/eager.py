"""On the CPU without a compiler, values are at hand: scales are found in Python, and tensors run through the cache in blocks.

A 0-d tensor costs about a microsecond per operation and a number a tenth of it; a pass over a block that is in the cache costs
a tenth of one over the memory. What is computed is the same to the last bit as on a device or in a compiled net, where nothing
here is used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

LOOKS = True  # False makes the CPU compute like any other device
BLOCK = 2**17  # elements per thread: two tensors of that size fit the cache of a core
# Of a float32 ratio r = m * 2^n, 1 <= m < 2: the least m in float64 that rounds to the square root of 2, and to 2.
ROOT_TWO, TWO = 1 + (0x3504F3 + 0.5) / 2**23, 2 - 2.0**-24
LEAST = 2.0**-100  # below it, 1 / reach is no float32
FARTHEST = 60  # scales are 2^-60 to 2^60


def at_hand(x: Tensor) -> bool:
    """Whether a value of this tensor can be read without waiting for a device."""
    return LOOKS and x.is_cpu and not torch.compiler.is_compiling()


@functools.cache
def power(n: int) -> Tensor:
    """2^n as a 0-d float32 tensor, one for all: never written to."""
    with torch.inference_mode(False):
        return torch.tensor(2.0**n)


def power_near(top: int, reach: float) -> int:
    """n of 2^round(log2(top / reach)) as ``numerics.pow2_round`` finds it, for a finite float32 ``reach`` from ``LEAST``."""
    return _exponent(top, reach, ROOT_TWO)


def power_below(top: int, reach: float) -> int:
    """n of 2^floor(log2(top / reach)) as ``numerics.pow2_floor`` finds it, for a finite float32 ``reach`` from ``LEAST``."""
    return _exponent(top, reach, TWO)


def _exponent(top: int, reach: float, carried: float) -> int:
    """PyTorch divides a number by a tensor as number * (1 / tensor), which rounds twice."""
    mantissa, n = math.frexp(top * float(np.float32(1 / reach)))
    return min(max(n - 1 + (2 * mantissa >= carried), -FARTHEST), FARTHEST)


def small(x: Tensor) -> bool:
    """Whether the second pass over a tensor finds it in the cache, as it does over a block of a larger one."""
    return x.numel() <= BLOCK


def same(scale: Tensor, other: Tensor) -> bool:
    """Whether two scales are known to be equal, so that what is on one grid is on the other."""
    return at_hand(scale) and at_hand(other) and scale.item() == other.item()


def extremes(x: Tensor) -> tuple[float, float]:
    """The lowest and the highest value of a tensor that has one; NaN where one is."""
    low, high = torch.aminmax(x.detach())
    return low.item(), high.item()


def widest(x: Tensor) -> float:
    """max|x| of a tensor that has an element; NaN or infinity where there is one."""
    low, high = extremes(x)
    return max(-low, high) if low == low else low


def saved_elsewhere() -> bool:
    """Whether what is saved for backward goes through a hook: gradient checkpointing wants the same tensors each time."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def recorded() -> tuple[object, bool]:
    """The hook that saves tensors for backward, and whether gradients are wanted: gradient checkpointing changes one of them.

    The same all the time in a compiled net.
    """
    if torch.compiler.is_compiling():
        return None, True
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks and hooks[0], torch.is_grad_enabled()


def blocks(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape in parts that fit the cache, the same elements of each in one part.

    The whole tensors where they are small or do not lie alike in memory.
    """
    size = BLOCK * torch.get_num_threads()
    tensors = (first, *others)
    if first.numel() <= size or not _alike(tensors):
        yield tensors
        return
    flat = [t.as_strided((t.numel(),), (1,)) for t in tensors]
    yield from zip(*(t.split(size) for t in flat), strict=True)


def _alike(tensors: tuple[Tensor, ...]) -> bool:
    """Whether all are one piece of memory without gaps, in the same order."""
    first = tensors[0]
    dense = first.is_contiguous() or (first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last))
    return dense and all(t.shape == first.shape and t.stride() == first.stride() for t in tensors)
