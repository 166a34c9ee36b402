"""Float calls left in a net: the table of all that have a form in the file."""

from __future__ import annotations

import torch

from linger.onnx.emit import Row
from linger.onnx.float_math import MATH
from linger.onnx.float_nn import NN
from linger.onnx.float_tensor import TENSOR

FLOAT_OPS: dict[str, Row] = MATH | NN | TENSOR
# Same names, other parameters.
OTHER = {torch.batch_norm, torch.instance_norm}
RANDOM = ("rand", "normal", "bernoulli", "multinomial", "poisson", "uniform", "exponential")
# Calls whose numbers may be sizes that change with a dynamic axis.
SIZED = {
    "add", "sub", "rsub", "mul", "multiply", "div", "divide", "true_divide", "rdiv", "zeros", "ones", "empty", "full",
    "new_zeros", "new_ones", "new_empty", "new_full", "arange",
}  # fmt: skip
