"""Working memory that the engine's packer reserves for one node, in bytes, on 8-bit tensors in share memory.

Read from the packer's source (version 3.0.4), which takes the maximum over all nodes. An op that is not here takes none.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from linger.targets._measures import Facts, aligned

KB64 = 64 * 1024
Workspace = Callable[[Facts], int]


def _input(f: Facts) -> int:
    return math.prod(f.x) * max(f.bits[0], 8) // 8


def _output(f: Facts) -> int:
    return math.prod(f.out) * max(f.out_bits, 8) // 8


def _image(f: Facts) -> int:
    """ALIGN8(C) * H * ALIGN(W), the whole input as the chip holds it."""
    return aligned(f.x[1], 8) * f.x[2] * aligned(f.x[3], 8 * f.ints("strides", 1)[-1])


def average(two_bytes: bool) -> Workspace:
    """Average pooling; ``two_bytes``: window sums of a power of two take two bytes instead of four."""

    def bytes_of(f: Facts) -> int:
        kernel, pads = f.ints("kernel_shape", 1), f.ints("pads", 0)
        even = math.prod(kernel) & (math.prod(kernel) - 1) == 0
        whole = kernel == (f.x[2] + pads[0] + pads[-2], f.x[3] + pads[1] + pads[-1])
        held = aligned(f.x[1], 8) * f.x[2] * f.x[3] if whole else _image(f)
        sums = (f.x[1] if held <= KB64 else 8) * math.prod(f.out[2:])
        if whole:
            return max(f.x[2] * f.x[3], sums * 4) + (0 if even else sums * 4)
        return sums * ((2 if two_bytes else 4) if even else 8)

    return bytes_of


def softmax(per_element: int) -> Workspace:
    """``per_element`` bytes for every element and four for every one from the axis on, 64 KB at most."""

    def bytes_of(f: Facts) -> int:
        return min(math.prod(f.x) * per_element + 4 * math.prod(f.x[f.axis() :]), KB64)

    return bytes_of


def _add(f: Facts) -> int:
    """A copy of an operand where both have another scale than the result."""
    return _input(f) if f.attrs["scale_o"] not in (f.attrs["scale_x"], f.attrs["scale_y"]) else 0


def _gate(f: Facts) -> int:
    """A product with one number per channel."""
    gate = len(f.x) == 4 and f.w[:2] == f.x[:2] and f.w[2:] == (1, 1) and math.prod(f.x[2:]) > 1
    return math.prod(f.x[1:]) + math.prod(f.x[2:]) if gate else 0


def _max_pool(f: Facts) -> int:
    return max(60 * 1024, _output(f)) if _image(f) > KB64 else 0


def _rows(f: Facts) -> int:
    """The input, or the result where that is more and large."""
    large = aligned(math.prod(f.x[:-1]), 4) * aligned(f.w[-1], 8) > KB64
    return max(_input(f), _output(f)) if large else _input(f)


def _recurrent(f: Facts) -> int:
    return 32 * int(f.attrs["hidden_size"])


def _recurrent_with_weights(f: Facts) -> int:
    return _recurrent(f) + sum(math.prod(s) * (1 if len(s) == 2 else 4) for s in f.shapes[1:] if 0 < len(s) <= 2)


EVERY: dict[str, Workspace] = {
    "BatchNorm2dInt": lambda f: 4 * math.prod(f.x[2:]),
    "LayerNormInt": lambda f: max(4 * math.prod(f.w), 2 * math.prod(f.w) + 8),
    "iqAdd": _add,
    "iqMul": _gate,
}
WORKSPACES: dict[str, dict[str, Workspace]] = {
    "venus": EVERY | {
        "AvgPool2dInt": average(two_bytes=True), "MaxPool": _max_pool, "LSTMInt": _recurrent,
        "LinearInt": lambda f: 4 * _output(f) if len(f.shapes) > 2 else 0,
        "SoftmaxInt": lambda f: 2 * f.x[f.axis()],
    },
    "arcs": EVERY | {
        "AvgPool2dInt": average(two_bytes=False), "LSTMInt": _recurrent_with_weights, "SoftmaxInt": softmax(4),
        "LinearInt": lambda f: _input(f) + _output(f), "iqSigmoid": lambda f: 4 * _input(f),
    },
    "venusa": EVERY | {
        "AvgPool2dInt": average(two_bytes=False), "LSTMInt": _recurrent_with_weights, "SoftmaxInt": softmax(6),
        "LinearInt": _rows, "iqAdd": lambda f: min(_add(f), KB64), "iqSigmoid": lambda f: 4 * _input(f),
    },
}  # fmt: skip
