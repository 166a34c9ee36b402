"""The table of venus (``engine`` 2, 4)."""

from __future__ import annotations

from linger.targets._base import Target
from linger.targets._engine import COMMON, statuses, window
from linger.targets._limits import Limit, Memory
from linger.targets._pwl import SIGMOID_Q11, TANH_Q11
from linger.targets._softmax import Softmax
from linger.targets._workspace import WORKSPACES

KB = 1024

LIMITS = (
    *COMMON,
    *(row for op in ("Conv1dInt", "Conv2dInt", "ConvTranspose2dInt") for row in window(op, kernel=5, pad=4)),
    *(Limit(op=op, of="row_bytes", high=64 * KB, align=(8, 8)) for op in ("Conv1dInt", "Conv2dInt")),
    Limit(op="Conv2dInt", of="kernel_bytes", high=32 * KB, align=(2, 8), when="not depthwise", kind="split"),
    Limit(op="Conv2dInt", of="kernel_bytes", high=32 * KB, align=(16,), when="depthwise"),
    Limit(op="Conv2dInt", of="input_bytes", high=64 * KB, align=(8, 8), when="weights over 32 KB"),
    Limit(op="Conv1dInt", of="input_bytes", high=64 * KB, align=(8, 8)),
    Limit(op="Conv1dInt", of="kernel_bytes", high=32 * KB, align=(2, 8), when="not depthwise", kind="split"),
    Limit(op="Conv2dInt", of="output_bytes", high=640 * KB, kind="split"),
    Limit(op="LinearInt", of="weight_bytes", high=640 * KB, kind="split"),
    Limit(op="LinearInt", of="output_bits", among=(8, 16, 32)),
    *(Limit(op=op, of="sequences", high=1) for op in ("LSTMInt", "GRUInt")),
    Limit(op="BmmInt", of="right_bytes", high=32 * KB, align=(8, 4)),
    Limit(op="BmmInt", of="input_bits", among=(8,)),
    Limit(op="BmmInt", of="output_bits", among=(8,)),
    Limit(op="iqAdd", of="input_bits", among=(8,)),
    Limit(op="iqMul", of="input_bits", among=(8, 16, 32)),
    Limit(op="iqCat", of="input_bits", among=(8, 16, 32)),
    Limit(op="iqSigmoid", of="input_bits", among=(16,)),
    Limit(op="iqTanh", of="input_bits", among=(16,)),
    Limit(op="iqSigmoid", of="scale_x", low=11),
    Limit(op="iqTanh", of="scale_x", low=11),
)

VENUS = Target(name="venus", platform="venus", data_bits=(8, 16, 32), parameter_bits=(8,),
    functions={"iqSigmoid": SIGMOID_Q11, "iqTanh": TANH_Q11},
    softmax=Softmax(exp_rounds=False, newton=True, log_of_sum=False),
    weight_bits={"LayerNormInt": 16}, normal_bits=16,
    ops=statuses("venus"), limits=LIMITS, workspaces=WORKSPACES["venus"],
    memory=Memory(share=640 * KB, psram=8192 * KB, flash=8192 * KB),
)  # fmt: skip
