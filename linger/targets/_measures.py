"""What limits count: numbers of one node, from its shapes and attributes.

A size in bytes is the product of factors rounded up to multiples, ALIGNn(v) = n * ceil(v / n); every measure names its
factors in the order of ``Limit.align`` (1 where a limit names none).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from linger.targets._limits import Limit

Numbers = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One node as limits see it: its op type, attributes, and the shapes, widths and kind of its operands.

    ``bits`` is 0 for an operand that is not on a grid; ``constant`` says which operands are stored in the file, ``values``
    holds those of them that are a few sizes or indices.
    """

    op: str
    shapes: tuple[Numbers, ...]
    out: Numbers
    attrs: Mapping[str, Any]
    bits: Numbers = (8,)
    constant: tuple[bool, ...] = ()
    out_bits: int = 8
    values: tuple[Numbers, ...] = ()

    @property
    def x(self) -> Numbers:
        """Shape of the first operand."""
        return self.shapes[0] if self.shapes else ()

    @property
    def w(self) -> Numbers:
        """Shape of the second operand: the weight of a layer."""
        return self.shapes[1] if len(self.shapes) > 1 else ()

    def ints(self, name: str, default: int) -> Numbers:
        """An attribute with one number per axis."""
        value = self.attrs.get(name)
        if value is None:
            return (default,)
        return tuple(int(v) for v in value) if isinstance(value, (tuple, list)) else (int(value),)

    def exponent(self, name: str) -> int:
        """log2 of a scale."""
        return math.frexp(float(self.attrs[name]))[1] - 1

    def axis(self) -> int:
        """The axis of a softmax and its like, not negative."""
        return int(self.attrs.get("axis", self.attrs.get("dim", -1))) % max(len(self.x), 1)


def aligned(value: int, multiple: int) -> int:
    """ALIGNn(v)."""
    return -(-value // multiple) * multiple


def _product(factors: tuple[int, ...], align: Numbers) -> Numbers:
    multiples = (*align, *[1] * len(factors))
    return (math.prod(aligned(v, n) for v, n in zip(factors, multiples, strict=False)),)


def _width(f: Facts) -> int:
    return f.x[-1] if f.x else 0


def _rows(f: Facts) -> int:
    """M of a product: the rows of the left matrix, those of a Linear of any number of dimensions together."""
    return math.prod(f.x[-2:-1] if f.op == "BmmInt" else f.x[:-1])


def row_bytes(f: Facts, align: Numbers) -> Numbers:
    """ALIGN(C) * kh * ALIGN(W): the input rows that one output row needs; the multiple of W counts strides.

    The engine holds a sequence as an image of width 1.
    """
    kernel, stride = f.ints("kernel_shape", 1), f.ints("strides", 1)
    by_channel, by_width = (*align, 1, 1)[:2]
    width = f.x[3] if len(kernel) > 1 else 1
    return _product((f.x[1], kernel[0], width), (by_channel, 1, by_width * stride[-1]))


def input_bytes(f: Facts, align: Numbers) -> Numbers:
    """ALIGN(C) * H * ALIGN(W): the whole input of a convolution."""
    by_channel, by_width = (*align, 1, 1)[:2]
    width = f.x[3] if len(f.x) > 3 else 1
    return _product(
        (f.w[1], f.x[2], width), (by_channel, 1, by_width * f.ints("strides", 1)[-1] if len(f.x) > 3 else by_width)
    )


def kernel_bytes(f: Facts, align: Numbers) -> Numbers:
    """ALIGN(O) * ALIGN(I / g) * ALIGN(kh) * kw"""
    kernel = f.ints("kernel_shape", 1)
    return _product((f.w[0], f.w[1], *kernel), align)


def _strides_over(f: Facts, align: Numbers) -> Numbers:
    kernel, stride = f.ints("kernel_shape", 1), f.ints("strides", 1)
    return tuple(k - s for k, s in zip(kernel, stride * len(kernel), strict=False))


def _pads_over(f: Facts, align: Numbers) -> Numbers:
    kernel, pads = f.ints("kernel_shape", 1), f.ints("pads", 0)
    return tuple(kernel[i % len(kernel)] - p for i, p in enumerate(pads))


def _stretched(f: Facts, align: Numbers) -> Numbers:
    """Operands that are not of the result's shape; the second of a product may be a number, or one per channel."""
    unlike = [i for i, s in enumerate(f.shapes) if s != f.out]
    if f.op == "iqMul" and unlike == [1]:
        per_channel = len(f.out) == 4 and f.w in ((1, f.out[1], 1, 1), (*f.out[:2], 1, 1))
        return (int(not per_channel and not (f.w == () and f.constant[1])),)
    return (len(unlike),)


MEASURES: dict[str, Callable[[Facts, Numbers], Numbers]] = {
    "kernel": lambda f, _: f.ints("kernel_shape", 1),
    "stride": lambda f, _: f.ints("strides", 1),
    "pad": lambda f, _: f.ints("pads", 0),
    "dilation": lambda f, _: f.ints("dilations", 1),
    "kernel_over_stride": _strides_over,
    "kernel_over_pad": _pads_over,
    "whole_input": lambda f, _: (int(f.ints("kernel_shape", 1) == f.x[2:]),),
    "batch": lambda f, _: f.x[:1],
    "groups": lambda f, _: f.ints("group", 1),
    "rank": lambda f, _: (len(f.x),),
    "rows": lambda f, _: (_rows(f),),
    "length": lambda f, _: (f.x[f.axis()],),
    "axis_from_end": lambda f, _: (len(f.x) - 1 - f.axis(),),
    "elements": lambda f, _: (math.prod(f.w),),
    "input_bits": lambda f, _: f.bits[:1],
    "output_bits": lambda f, _: (f.out_bits,),
    "weight_bits": lambda f, _: f.ints("parameter_bits", 8),
    "shift": lambda f, _: (f.exponent("scale_x") + f.exponent("scale_w") - f.exponent("scale_o"),),
    "product_shift": lambda f, _: (f.exponent("scale_x") + f.exponent("scale_y") - f.exponent("scale_o"),),
    "finer_output": lambda f, _: tuple(f.exponent("scale_o") - f.exponent(k) for k in ("scale_x", "scale_y") if k in f.attrs),
    "finer_input": lambda f, _: tuple(
        f.exponent(k) - f.exponent("scale_o") for k in sorted(f.attrs) if k.startswith("scale_x_")
    ),
    "scale_o": lambda f, _: (f.exponent("scale_o"),),
    "scale_x": lambda f, _: (f.exponent("scale_x"),),
    "stretched": _stretched,
    "own_eps": lambda f, _: (int("epsilon" in f.attrs),),
    "step": lambda f, _: f.values[4],
    "reversed_axes": lambda f, _: (int(len(f.x) == 4 and f.ints("perm", 0) == (3, 2, 1, 0)),),
    "swapped_rows": lambda f, _: (int(f.ints("perm", 0) in ((0, 2, 1, 3), (0, 3, 2, 1))),),
    "pads_with_values": lambda f, _: (int(f.attrs.get("mode", "constant") != "constant"),),
    "sequences": lambda f, _: (f.x[0 if f.attrs.get("batch_first") else 1],),
    "sequences_in_rows": lambda f, _: (f.x[1 if f.attrs.get("batch_first") else 0],),  # ``Target.time_swapped``
    "time_first": lambda f, _: (int(f.attrs.get("batch_first", 0)),),  # the same
    "backwards": lambda f, _: (int(not f.attrs.get("go_forward", 1)),),
    "layers": lambda f, _: (int(f.attrs.get("num_layers", 1)),),
    "divisor": lambda f, _: (int(not (len(f.constant) > 1 and f.constant[1] and f.w == ())),),
    "row_bytes": row_bytes,
    "input_bytes": input_bytes,
    "kernel_bytes": kernel_bytes,
    "output_bytes": lambda f, _: (math.prod(f.out) * f.out_bits // 8,),
    "weight_bytes": lambda f, a: _product(f.w[:2], a),
    "left_bytes": lambda f, a: _product((_rows(f), _width(f)), a),
    "right_bytes": lambda f, a: _product(f.w[-2:], a),
    "matrix_bytes": lambda f, _: (math.prod(f.x[-2:]),),
}  # fmt: skip


ALIGNED = {
    "row_bytes": 2, "input_bytes": 2, "kernel_bytes": 4, "weight_bytes": 2, "left_bytes": 2, "right_bytes": 2,
}  # measure -> how many of its factors are rounded up to multiples  # fmt: skip


def depthwise(f: Facts) -> bool:
    """One filter per channel."""
    return f.ints("group", 1)[0] > 1 and f.ints("group", 1)[0] == f.x[1]


def _area(f: Facts) -> int:
    return math.prod(f.ints("kernel_shape", 1))


CONDITIONS: dict[str, Callable[[Facts], bool]] = {
    "": lambda f: True,
    "depthwise": depthwise,
    "not depthwise": lambda f: not depthwise(f),
    "grouped": lambda f: f.ints("group", 1)[0] > 1 and not depthwise(f),
    "dilated": lambda f: max(f.ints("dilations", 1)) > 1,
    "not dilated": lambda f: max(f.ints("dilations", 1)) == 1,
    "stride 2": lambda f: 2 in f.ints("strides", 1),
    "stride 4": lambda f: 4 in f.ints("strides", 1),
    "weights over 32 KB": lambda f: not depthwise(f) and kernel_bytes(f, (2, 8))[0] > 32 * 1024,
    "8-bit output": lambda f: f.out_bits == 8,
    "power of two": lambda f: _area(f) & (_area(f) - 1) == 0,
    "not a power of two": lambda f: _area(f) & (_area(f) - 1) != 0,
    "kernel or pads": lambda f: set(f.ints("kernel_shape", 1)) != {1} or any(f.ints("pads", 0)),
}


def beyond_limit(f: Facts, limit: Limit) -> list[int]:
    """The numbers of this node that a limit does not allow; none where the node lacks what the limit counts."""
    try:
        counted = MEASURES[limit.of](f, limit.align) if CONDITIONS[limit.when](f) else ()
    except (KeyError, IndexError):
        return []
    return [n for n in counted if not limit.allows(n)]
