"""Limits of the chips: for each a small net of a number, the largest number that it allows and the smallest that it refuses.

A row: op, measure, condition and kind of the limit, its chips, the net, the two numbers: the figures of ``engine`` 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import linger

Made = tuple[nn.Module, tuple[int, ...]]
Row = tuple[str, str, str, str, tuple[str, ...], Callable[[int], Any], int, int]  # Any: a net and a shape, or a file


def conv(channels: int = 8, size: int = 16, outputs: int = 4, batch: int = 1, kernel: Any = 3, **options: Any) -> Made:
    return nn.Conv2d(channels, outputs, kernel, **options), (batch, channels, size, size)


def conv1d(
    channels: int = 8, length: int = 16, outputs: int = 4, batch: int = 1, kernel: int = 3, **options: Any
) -> Made:
    return nn.Conv1d(channels, outputs, kernel, **options), (batch, channels, length)


def deconv(kernel: int = 3, batch: int = 1, **options: Any) -> Made:
    return nn.ConvTranspose2d(8, 4, kernel, **options), (batch, 8, 12, 12)


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any], bits: int = 8) -> None:
        super().__init__()
        self.function, self.bits = function, bits

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(linger.quant_tensor(self, x, "x", bits=self.bits))


def call(function: Callable[..., Any], *shape: int, bits: int = 8) -> Made:
    return Call(function, bits), shape


def pool(rank: int) -> Made:
    pools = {3: lambda x: F.max_pool1d(x, 2), 4: lambda x: F.max_pool2d(x, 2)}
    return call(pools[rank], *(1, 8, 16, 16)[:rank])


ALL, SECOND = ("venus", "arcs", "venusa"), ("arcs", "venusa")
NETS: tuple[Row, ...] = (
    ("Conv2dInt", "kernel", "not dilated", "error", ALL, lambda n: conv(kernel=n), 5, 6),
    ("Conv2dInt", "kernel", "not dilated", "error", ALL, lambda n: conv(kernel=(n, 1)), 5, 6),
    ("Conv2dInt", "kernel", "dilated", "error", SECOND, lambda n: conv(kernel=n, dilation=2, size=32), 12, 13),
    ("Conv2dInt", "stride", "", "error", ALL, lambda n: conv(kernel=5, stride=n), 2, 3),
    ("Conv2dInt", "stride", "", "error", ALL, lambda n: conv(kernel=5, stride=n), 4, 5),
    ("Conv2dInt", "pad", "", "error", ("venus",), lambda n: conv(kernel=5, padding=n), 4, 5),
    ("Conv2dInt", "pad", "", "error", SECOND, lambda n: conv(kernel=12, dilation=2, padding=n, size=32), 11, 12),
    ("Conv2dInt", "kernel_over_pad", "", "error", ALL, lambda n: conv(kernel=3, padding=n), 3, 4),
    ("Conv2dInt", "dilation", "", "error", ("venus",), lambda n: conv(dilation=n), 1, 2),
    ("Conv2dInt", "dilation", "", "error", SECOND, lambda n: conv(dilation=n, size=40), 8, 9),
    ("Conv2dInt", "dilation", "", "error", SECOND, lambda n: conv(dilation=n), 2, 3),
    ("Conv2dInt", "kernel_over_stride", "", "error", ALL, lambda n: conv(kernel=2, stride=n), 2, 4),
    ("Conv2dInt", "batch", "", "wrong", SECOND, lambda n: conv(batch=n), 1, 2),
    ("Conv2dInt", "groups", "grouped", "split", ALL, lambda n: conv(groups=n), 1, 2),
    ("Conv2dInt", "row_bytes", "", "error", ("venus",), lambda n: conv(channels=8 * n, size=64, kernel=(4, 1)), 32, 33),
    ("Conv2dInt", "row_bytes", "", "error", ("arcs",), lambda n: conv(channels=8 * n, size=64, kernel=(4, 1)), 8, 9),
    ("Conv2dInt", "row_bytes", "not depthwise", "error", ("venusa",), lambda n: conv(channels=8 * n, size=64, kernel=(4, 1)), 32, 33),
    ("Conv2dInt", "row_bytes", "depthwise", "error", ("venusa",), lambda n: conv(4 * n, 64, 4 * n, kernel=(4, 1), groups=4 * n), 32, 33),
    ("Conv2dInt", "kernel_bytes", "not depthwise", "split", ("venus",), lambda n: conv(64, 4, n, kernel=1), 512, 513),
    ("Conv2dInt", "kernel_bytes", "depthwise", "error", ("venus",), lambda n: conv(16 * n, 5, 16 * n, kernel=5, groups=16 * n), 81, 82),
    ("Conv2dInt", "kernel_bytes", "depthwise", "error", ("arcs",), lambda n: conv(8 * n, 5, 8 * n, kernel=(5, 1), groups=8 * n), 204, 205),
    ("Conv2dInt", "input_bytes", "weights over 32 KB", "error", ("venus",), lambda n: conv(64, n, 2048, kernel=1), 32, 33),
    ("Conv1dInt", "kernel", "not dilated", "error", ("venus",), lambda n: conv1d(kernel=n), 5, 6),
    ("Conv1dInt", "kernel", "not dilated", "error", ("arcs",), lambda n: conv1d(kernel=n), 12, 13),
    ("Conv1dInt", "pad", "", "error", ("venus",), lambda n: conv1d(kernel=5, padding=n), 4, 5),
    ("Conv1dInt", "pad", "", "error", ("arcs",), lambda n: conv1d(kernel=12, padding=n), 11, 12),
    ("Conv1dInt", "groups", "depthwise", "wrong", ("arcs", "venus"), lambda n: conv1d(outputs=8, groups=n), 1, 8),
    ("ConvTranspose2dInt", "kernel", "not dilated", "error", ("venus",), lambda n: deconv(n), 5, 6),
    ("ConvTranspose2dInt", "kernel", "not dilated", "error", SECOND, lambda n: deconv(n), 12, 13),
    ("ConvTranspose2dInt", "stride", "", "error", ALL, lambda n: deconv(5, stride=n), 4, 5),
    ("ConvTranspose2dInt", "dilation", "", "error", ALL, lambda n: deconv(dilation=n), 1, 2),
    ("ConvTranspose2dInt", "groups", "", "error", ALL, lambda n: deconv(groups=n), 1, 2),
    ("LinearInt", "left_bytes", "", "error", ALL, lambda n: (nn.Linear(1024, 4), (1, n, 1024)), 64, 65),
    ("LinearInt", "rank", "", "error", ALL, lambda n: (nn.Linear(8, 4), (1,) * (n - 1) + (8,)), 3, 4),
    ("LinearInt", "rows", "", "wrong", ("venusa",), lambda n: (nn.Linear(8, 4), (n, 8)), 1, 2),
    ("BmmInt", "right_bytes", "", "error", ("venus",), lambda n: call(lambda x: x @ x.transpose(1, 2), 1, 128, 8 * n), 32, 33),
    ("SoftmaxInt", "length", "", "error", ALL, lambda n: call(lambda x: x.softmax(-1), 1, n), 2048, 2049),
    ("SoftmaxInt", "length", "", "warning", ALL, lambda n: call(lambda x: x.softmax(-1), 1, n), 256, 257),
    ("LogSoftmaxInt", "length", "", "wrong", ("arcs",), lambda n: call(lambda x: x.log_softmax(-1), 1, n), 1024, 1025),
    ("MaxPool", "rank", "", "error", ALL, lambda n: pool(n), 4, 3),
    ("MaxPool", "input_bits", "", "error", ALL, lambda n: call(lambda x: F.max_pool2d(x, 2), 1, 8, 8, 8, bits=n), 8, 16),
    ("MaxPool", "kernel_over_stride", "", "error", ALL, lambda n: call(lambda x: F.max_pool2d(x, 2, n), 1, 8, 8, 8), 2, 3),
    ("Transpose", "matrix_bytes", "", "error", ALL, lambda n: call(lambda x: x.transpose(1, 2), 1, 256, n), 256, 257),
    ("iqAdd", "input_bits", "", "error", ("venus",), lambda n: call(lambda x: x + x, 1, 8, bits=n), 8, 16),
    ("LayerNormInt", "elements", "", "wrong", ALL, lambda n: (nn.LayerNorm(n), (1, 4, n)), 362, 363),
    ("Slice", "step", "", "wrong", ALL, lambda n: call(lambda x: x[:, ::n], 1, 8, 8), 1, 2),
    ("iqPad", "pads_with_values", "", "wrong", ("venus",), lambda n: call(lambda x: F.pad(x, (1, 1), "constant" if n else "reflect"), 1, 8, 8), 1, 0),
    ("Transpose", "reversed_axes", "", "error", ALL, lambda n: call(lambda x: x.permute((0, 3, 2, 1) if n else (3, 2, 1, 0)), 1, 4, 5, 6), 1, 0),
    ("Transpose", "swapped_rows", "", "wrong", ("venusa",), lambda n: call(lambda x: x.permute((0, 2, 3, 1) if n else (0, 2, 1, 3)), 1, 4, 5, 6), 1, 0),
    ("iqAdd", "stretched", "", "wrong", ALL, lambda n: call(lambda x: x + x[:, :, :n], 1, 4, 5), 5, 1),
    ("iqMul", "stretched", "", "wrong", ALL, lambda n: call(lambda x: x * x[:, :, :n], 1, 4, 5), 5, 1),
    ("iqMul", "input_bits", "", "error", ("arcs",), lambda n: call(lambda x: x * x, 1, 8, bits=n), 8, 32),
    ("BmmInt", "input_bits", "", "error", ("venus", "arcs"), lambda n: call(lambda x: x @ x, 1, 8, 8, bits=n), 8, 32),
    ("LayerNormInt", "own_eps", "", "wrong", ALL, lambda n: (nn.LayerNorm(8, eps=n * 1e-5), (1, 4, 8)), 1, 2),
    ("LSTMInt", "sequences", "", "error", ("venus",), lambda n: (nn.LSTM(8, 4, batch_first=True), (n, 5, 8)), 1, 2),
    ("LSTMInt", "sequences_in_rows", "", "error", SECOND, lambda n: (nn.LSTM(8, 4, batch_first=True), (n, 5, 8)), 1, 2),
    ("LSTMInt", "sequences", "", "error", ("venus",), lambda n: (nn.LSTM(8, 4), (5, n, 8)), 1, 2),
    ("LSTMInt", "sequences_in_rows", "", "error", SECOND, lambda n: (nn.LSTM(8, 4), (5, n, 8)), 1, 2),
    ("LSTMInt", "time_first", "", "wrong", SECOND, lambda n: (nn.LSTM(8, 4, batch_first=bool(n)), (1, 5, 8) if n else (5, 1, 8)), 1, 0),
    ("ArgMax", "axis_from_end", "", "error", ALL, lambda n: call(lambda x: x.argmax(n), 1, 8, 8), 2, 1),
)  # fmt: skip
