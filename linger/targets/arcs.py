"""The table of arcs (``engine`` 4)."""

from __future__ import annotations

from linger.targets._base import Target
from linger.targets._pwl import SIGMOID_Q27, TANH_Q27
from linger.targets._softmax import Softmax

ARCS = Target(name="arcs", platform="arcs", data_bits=(8, 32), parameter_bits=(4, 8),
    functions={"iqSigmoid": SIGMOID_Q27, "iqTanh": TANH_Q27},
    softmax=Softmax(exp_rounds=False, newton=False, log_of_sum=False),
    weight_bits={"LayerNormInt": 8},
    time_swapped=True,
)  # fmt: skip
