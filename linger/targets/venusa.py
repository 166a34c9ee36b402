"""The table of venusA (``engine`` 4)."""

from __future__ import annotations

from linger.targets._base import Target
from linger.targets._pwl import GELU_Q54, SIGMOID_Q58, SILU_Q54, TANH_Q58
from linger.targets._softmax import Softmax

VENUSA = Target(name="venusa", platform="venusA", data_bits=(8, 16, 32), parameter_bits=(4, 8),
    functions={"iqSigmoid": SIGMOID_Q58, "iqTanh": TANH_Q58, "iqGelu": GELU_Q54, "iqSilu": SILU_Q54},
    softmax=Softmax(exp_rounds=True, newton=False, log_of_sum=True),
    weight_bits={"LayerNormInt": 8},
    time_swapped=True,
)  # fmt: skip
