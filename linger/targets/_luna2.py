"""Limits that arcs and venusA share (``engine`` 2, 4)."""

from __future__ import annotations

from linger.targets._engine import COMMON, window
from linger.targets._limits import Limit

KB = 1024
DILATIONS = (1, 2, 4, 8)

SECOND = (
    *COMMON,
    *window("Conv2dInt", kernel=5, pad=11, dilations=DILATIONS),
    Limit(op="Conv2dInt", of="kernel", low=1, high=12, when="dilated"),
    *(row for op in ("Conv1dInt", "ConvTranspose2dInt") for row in window(op, kernel=12, pad=11)),
    *(Limit(op=op, of="batch", high=1, kind="wrong") for op in ("Conv1dInt", "Conv2dInt", "ConvTranspose2dInt")),
    Limit(op="Conv2dInt", of="weight_bits", among=(8,), kind="wrong"),
    Limit(op="Conv1dInt", of="weight_bits", among=(8,), kind="wrong"),
    Limit(op="ConvTranspose2dInt", of="weight_bits", among=(8,), kind="wrong"),
    Limit(op="LinearInt", of="weight_bits", among=(8,), kind="wrong"),
    Limit(op="LinearInt", of="output_bits", among=(8, 32)),
    Limit(op="iqSigmoid", of="input_bits", among=(8,)),
    Limit(op="iqSigmoid", of="scale_o", among=(7,), kind="wrong"),
    Limit(op="AvgPool2dInt", of="whole_input", high=0, kind="warning"),
    Limit(op="LSTMInt", of="sequences_in_rows", high=1),
    Limit(op="LSTMInt", of="time_first", high=0, kind="wrong"),
    Limit(op="GluInt", of="left_bytes", high=32 * KB, align=(8, 2)),
)
