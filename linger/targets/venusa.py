"""The table of venusA (``engine`` 2, 4)."""

from __future__ import annotations

from linger.targets._base import Target
from linger.targets._engine import statuses
from linger.targets._limits import Limit, Memory
from linger.targets._luna2 import KB, SECOND
from linger.targets._pwl import GELU_Q54, SIGMOID_Q58, SILU_Q54, TANH_Q58
from linger.targets._softmax import Softmax
from linger.targets._workspace import WORKSPACES

LIMITS = (
    *SECOND,
    Limit(op="Conv2dInt", of="row_bytes", high=64 * KB, align=(8, 8), when="not depthwise"),
    Limit(op="Conv2dInt", of="row_bytes", high=32 * KB, align=(4, 8), when="depthwise"),
    Limit(op="Conv1dInt", of="row_bytes", high=64 * KB, align=(8, 8)),
    Limit(op="Conv2dInt", of="kernel_bytes", high=640 * KB, align=(4, 8), when="not depthwise", kind="split"),
    Limit(op="Conv2dInt", of="kernel_bytes", high=640 * KB, align=(8, 1, 2), when="depthwise"),
    Limit(op="Conv1dInt", of="kernel_bytes", high=640 * KB, align=(4, 8), when="not depthwise", kind="split"),
    Limit(op="Conv2dInt", of="output_bytes", high=640 * KB, kind="split"),
    Limit(op="LinearInt", of="weight_bytes", high=640 * KB, kind="split"),
    Limit(op="LinearInt", of="rows", high=1, kind="wrong"),
    Limit(op="BmmInt", of="input_bits", among=(8, 16)),
    Limit(op="BmmInt", of="output_bits", among=(8, 16, 32)),
    Limit(op="iqAdd", of="input_bits", among=(8, 16, 32)),
    Limit(op="iqMul", of="input_bits", among=(8, 16, 32)),
    Limit(op="Transpose", of="swapped_rows", high=0, kind="wrong"),
    Limit(op="iqCat", of="input_bits", among=(8, 32)),
    Limit(op="iqCat", of="finer_input", high=0, kind="wrong"),
    Limit(op="LogSoftmaxInt", of="length", high=1024),
    Limit(op="GluInt", of="axis_from_end", among=(0,), kind="wrong"),
)

VENUSA = Target(name="venusa", platform="venusA", data_bits=(8, 16, 32), parameter_bits=(4, 8),
    functions={"iqSigmoid": SIGMOID_Q58, "iqTanh": TANH_Q58, "iqGelu": GELU_Q54, "iqSilu": SILU_Q54},
    softmax=Softmax(exp_rounds=True, newton=False, log_of_sum=True),
    time_swapped=True,
    weight_bits={"LayerNormInt": 8}, cat_requants=True,
    ops=statuses("venusa"), limits=LIMITS, workspaces=WORKSPACES["venusa"],
    memory=Memory(share=384 * KB, psram=8192 * KB),
)  # fmt: skip
