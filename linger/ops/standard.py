"""Standard ONNX ops on integers that the chip reads as they are, and their form where a runtime lacks the width.

Relu out = max(x, 0);   MaxPool out = max of the window, padding is the lowest integer;   Clip is in ``clamp``
"""

from __future__ import annotations

from typing import Any

import numpy as np

from linger.ops._base import ONNX_INT, Op, real_text
from linger.ops._windows import pooled


def run_relu(x: np.ndarray, **_: Any) -> np.ndarray:
    """Any shape and width."""
    return np.maximum(x, np.zeros((), x.dtype))


def run_max_pool(
    x: np.ndarray,
    *,
    kernel_shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    pads: tuple[int, ...] | None = None,
    dilations: tuple[int, ...] | None = None,
    ceil_mode: int = 0,
    **_: Any,
) -> np.ndarray:
    """x (N, C, *space) of any width."""
    rank = len(kernel_shape)
    strides, pads, dilations = strides or (1,) * rank, pads or (0,) * 2 * rank, dilations or (1,) * rank
    reach = [d * (k - 1) + 1 for k, d in zip(kernel_shape, dilations, strict=True)]
    size = []
    for n, r, s, front, back in zip(x.shape[2:], reach, strides, pads[:rank], pads[rank:], strict=True):
        span = n + front + back - r
        out = -(-span // s) + 1 if ceil_mode else span // s + 1
        size.append(out - 1 if ceil_mode and (out - 1) * s >= n + front else out)
    need = [(o - 1) * s + r for o, s, r in zip(size, strides, reach, strict=True)]
    extra = [max(0, m - n - f) for m, n, f in zip(need, x.shape[2:], pads[:rank], strict=True)]
    low = np.iinfo(x.dtype).min if np.issubdtype(x.dtype, np.integer) else -np.inf
    padded = np.pad(x, ((0, 0), (0, 0), *zip(pads[:rank], extra, strict=True)), constant_values=low)
    return pooled(padded, np.maximum, kernel_shape, strides, dilations, size, x.dtype)


def body_relu(form: str, opset: int) -> tuple[str, str]:
    return "X", f"F = Cast <to: int = 11> (X)\nR = Relu (F)\nY = Cast <to: int = {ONNX_INT[int(form)]}> (R)\n"


POOL_ATTRS = (
    "kernel_shape: ints = @kernel_shape, strides: ints = @strides, pads: ints = @pads, "
    "dilations: ints = @dilations, ceil_mode: int = @ceil_mode"
)


def body_max_pool(form: str, opset: int) -> tuple[str, str]:
    return (
        "X",
        f"F = Cast <to: int = 11> (X)\nR = MaxPool <{POOL_ATTRS}> (F)\nY = Cast <to: int = {ONNX_INT[int(form)]}> (R)\n",
    )


def body_squeeze(op: str) -> Any:
    """``Squeeze`` and ``Unsqueeze`` with the ``axes`` attribute that the chip reads."""

    def body(form: str, opset: int) -> tuple[str, str]:
        if opset < 13:
            return "X", f"Y = {op} <axes: ints = @axes> (X)\n"
        return "X", f"a = Constant <value_ints: ints = @axes> ()\nY = {op} (X, a)\n"

    return body


def run_squeeze(x: np.ndarray, *, axes: tuple[int, ...], **_: Any) -> np.ndarray:
    """x without the axes, each of size 1."""
    return np.squeeze(x, tuple(axes))


def run_unsqueeze(x: np.ndarray, *, axes: tuple[int, ...], **_: Any) -> np.ndarray:
    """x with new axes of size 1 at these positions of the result."""
    return np.expand_dims(x, tuple(axes))


OPS = (
    Op(name="Relu", run=run_relu, body=body_relu, real=real_text("Y = Relu (X)")),
    Op(name="MaxPool", run=run_max_pool, body=body_max_pool, real=real_text(f"Y = MaxPool <{POOL_ATTRS}> (X)")),
    Op(
        name="Squeeze",
        run=run_squeeze,
        body=body_squeeze("Squeeze"),
        real=lambda form, opset: body_squeeze("Squeeze")(form, opset)[1],
    ),
    Op(
        name="Unsqueeze",
        run=run_unsqueeze,
        body=body_squeeze("Unsqueeze"),
        real=lambda form, opset: body_squeeze("Unsqueeze")(form, opset)[1],
    ),
)
