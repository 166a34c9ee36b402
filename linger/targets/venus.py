"""The table of venus (``engine`` 4)."""

from __future__ import annotations

from linger.targets._base import Target
from linger.targets._pwl import SIGMOID_Q11, TANH_Q11
from linger.targets._softmax import Softmax

VENUS = Target(name="venus", platform="venus", data_bits=(8, 16, 32), parameter_bits=(8,),
    functions={"iqSigmoid": SIGMOID_Q11, "iqTanh": TANH_Q11},
    softmax=Softmax(exp_rounds=False, newton=True, log_of_sum=False),
    weight_bits={"LayerNormInt": 16}, normal_bits=16,
)  # fmt: skip
