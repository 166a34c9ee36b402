"""Arrays in another order: NCHW and NHWC, transposed and turned weights, the order of a flattened input."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from linger.why._case import View

Variant = tuple[str, np.ndarray | None]


def outputs(view: View) -> Iterator[Variant]:
    """The result written in another order."""
    expected = view.segment.expected
    if view.last and expected.ndim >= 3:
        order = (0, *range(2, expected.ndim), 1)
        yield "the result is written channels last (NHWC)", expected.transpose(order).reshape(expected.shape)
        yield "the last two axes of the result are swapped", expected.swapaxes(-1, -2).reshape(expected.shape)
    if view.last and expected.ndim == 2:
        yield "the result is written transposed", expected.T.reshape(expected.shape)


def inputs(view: View) -> Iterator[Variant]:
    """The first input read in another order."""
    x = view.inputs[0] if view.inputs else None
    if x is None or not isinstance(x, np.ndarray):
        return
    if x.ndim >= 3:
        channels, space = x.shape[1], x.shape[2:]
        last = x.transpose(0, *range(2, x.ndim), 1)
        yield (
            "the input is read channels first, but lies channels last (NHWC)",
            view.with_input(0, last.reshape(x.shape)),
        )
        first = np.moveaxis(x.reshape(x.shape[0], *space, channels), -1, 1)
        yield "the input is read channels last (NHWC)", view.with_input(0, first)
    for shape in _unflattened(view):
        last = x.reshape(shape).transpose(0, *range(2, len(shape)), 1).reshape(x.shape)
        yield "the input was flattened channels last (NHWC)", view.with_input(0, last)


def _unflattened(view: View) -> Iterator[tuple[int, ...]]:
    """The shapes of at least three axes that the input had before it was reshaped."""
    name = view.node.input[0]
    makers = {out: node for node in view.segment.model.proto.graph.node for out in node.output}
    while name in makers and makers[name].op_type in ("Reshape", "Flatten"):
        name = makers[name].input[0]
        source = view.segment.tensors.get(name)
        if isinstance(source, np.ndarray) and source.ndim >= 3 and source.size == view.inputs[0].size:
            yield source.shape


def weights(view: View) -> Iterator[Variant]:
    """The weight read in another order."""
    if not view.weighted:
        return
    w = view.inputs[1]
    for said, array in _orders(w):
        if array.shape == w.shape and not np.array_equal(array, w):
            yield said, view.with_input(1, array)


def _orders(w: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    if w.ndim == 2:
        yield "the weight is read transposed", w.T.reshape(w.shape)
        yield "the weight is stored transposed", w.reshape(w.shape[::-1]).T
    if w.ndim >= 3:
        space = tuple(range(2, w.ndim))
        yield "the kernel is turned around (a true convolution)", np.flip(w, space)
        yield "the kernel's axes are swapped", w.swapaxes(-1, -2).reshape(w.shape)
        yield "input and output channels of the weight are swapped", w.swapaxes(0, 1).reshape(w.shape)
        yield "the weight lies as OHWI but is read as OIHW", w.transpose(0, *space, 1).reshape(w.shape)
        back = w.reshape(w.shape[0], *w.shape[2:], w.shape[1])
        yield "the weight lies as OIHW but is read as OHWI", np.moveaxis(back, -1, 1)
        yield "the weight lies as HWIO but is read as OIHW", w.transpose(*space, 1, 0).reshape(w.shape)
        back = w.reshape(*w.shape[2:], w.shape[1], w.shape[0])
        yield "the weight lies as OIHW but is read as HWIO", back.transpose(w.ndim - 1, w.ndim - 2, *range(w.ndim - 2))


def right_hand(view: View) -> Iterator[Variant]:
    """The second factor of a matrix product transposed."""
    if view.op in ("BmmInt", "QBmm") and len(view.inputs) == 2:
        y = view.inputs[1]
        yield "the second matrix is transposed", view.with_input(1, y.swapaxes(-1, -2).reshape(y.shape))
