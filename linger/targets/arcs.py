"""The table of arcs (``engine`` 2, 4)."""

from __future__ import annotations

from dataclasses import replace

from linger.targets._base import Target
from linger.targets._engine import statuses
from linger.targets._limits import Limit, Memory
from linger.targets._luna2 import KB, SECOND
from linger.targets._pwl import SIGMOID_Q27, TANH_Q27
from linger.targets._softmax import Softmax
from linger.targets._workspace import WORKSPACES

LIMITS = (
    *SECOND,
    Limit(op="Conv2dInt", of="row_bytes", high=16 * KB, align=(8, 4)),
    Limit(op="Conv1dInt", of="row_bytes", high=16 * KB, align=(8, 4)),
    Limit(op="Conv2dInt", of="kernel_bytes", high=640 * KB, align=(2, 8), when="not depthwise", kind="split"),
    Limit(op="Conv2dInt", of="kernel_bytes", high=8 * KB, align=(8,), when="depthwise"),
    Limit(op="Conv1dInt", of="kernel_bytes", high=640 * KB, align=(2, 8), when="not depthwise", kind="split"),
    Limit(op="Conv2dInt", of="output_bytes", high=640 * KB, kind="split"),
    Limit(op="LinearInt", of="weight_bytes", high=640 * KB, kind="split"),
    Limit(op="BmmInt", of="input_bits", among=(8,)),
    Limit(op="BmmInt", of="output_bits", among=(8, 32)),
    Limit(op="iqAdd", of="input_bits", among=(8, 32)),
    Limit(op="iqMul", of="input_bits", among=(8,)),
    Limit(op="Relu", of="input_bits", among=(8, 32)),
    Limit(op="iqCat", of="input_bits", among=(8, 32)),
    Limit(op="LogSoftmaxInt", of="length", high=1024, kind="wrong"),
)

ARCS = Target(name="arcs", platform="arcs", data_bits=(8, 32), parameter_bits=(4, 8),
    functions={"iqSigmoid": SIGMOID_Q27, "iqTanh": TANH_Q27},
    softmax=Softmax(exp_rounds=False, newton=False, log_of_sum=False),
    weight_bits={"LayerNormInt": 8},
    time_swapped=True,
    ops=statuses("arcs"), limits=LIMITS, workspaces=WORKSPACES["arcs"],
    memory=Memory(share=384 * KB, psram=8192 * KB),
)  # fmt: skip
MARS = replace(ARCS, name="mars", platform="mars")
