"""Gradients at any point of the grid, for any gradient from behind: those of the float function in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.targets import TARGETS

STEP, ROWS, SIZE = 2.0**-5, 2, 6
# name: (function, the most that a result changes per change of the input)
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "sigmoid": (torch.sigmoid, 1.0),
    "tanh": (torch.tanh, 1.0),
    "silu": (F.silu, 2.0),
    "gelu": (F.gelu, 2.0),
    "gelu-tanh": (lambda x: F.gelu(x, approximate="tanh"), 2.0),
    "mish": (F.mish, 2.0),
    "softplus": (F.softplus, 1.0),
    "elu": (F.elu, 1.0),
    "hardswish": (F.hardswish, 2.0),
    "glu": (F.glu, 4.0),
    "softmax": (lambda x: x.softmax(-1), 1.0),
    "log_softmax": (lambda x: x.log_softmax(-1), 2.0),
    "layer_norm": (lambda x: F.layer_norm(x, (SIZE,)), 320.0),  # 1 / sqrt(eps) on a constant row
    "rms_norm": (lambda x: F.rms_norm(x, (SIZE,), eps=1e-5), 320.0),
    "var": (lambda x: x.var(-1), 8.0),
}
NEAR = 2.0**-18  # float32 rounds each of a few operations by 2^-24


class Net(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(linger.quant_tensor(self, x, "x"))


@functools.cache
def net_of(name: str, chip: str) -> nn.Module:
    """The function in fixed point behind a grid of ``STEP``, with a range of results that nothing saturates."""
    net = linger.init(Net(FUNCTIONS[name][0]), target=chip)
    net(torch.randn(ROWS, SIZE))
    for site in net.children():
        for key, value in (("running_x", 127 * STEP), ("running_o", 2.0**9)):
            if key in site._buffers:
                site.get_buffer(key).fill_(value)
    return net.eval()


INTEGERS = st.lists(st.integers(-128, 127), min_size=ROWS * SIZE, max_size=ROWS * SIZE)
BEHIND = st.lists(
    st.integers(-256, 256), min_size=ROWS * SIZE, max_size=ROWS * SIZE
)  # in 2^-6: float32 has no smaller than 2^-149


@pytest.mark.parametrize("chip", TARGETS)
@pytest.mark.parametrize("name", FUNCTIONS)
@given(integers=INTEGERS, behind=BEHIND)
@settings(max_examples=25, deadline=None)
def test_anywhere(name: str, chip: str, integers: list[int], behind: list[int]) -> None:
    function, steepest = FUNCTIONS[name]
    x = torch.tensor(integers).reshape(ROWS, SIZE) * STEP
    ours, ideal = x.clone().requires_grad_(), x.double().requires_grad_()
    y, wanted = net_of(name, chip)(ours), function(ideal)
    g = torch.tensor(behind)[: y.numel()].reshape(y.shape) / 2**6
    (y * g).sum().backward()
    (wanted * g.double()).sum().backward()
    assert ours.grad is not None
    assert ideal.grad is not None
    assert y.grid is not None, "the call is in fixed point"  # type: ignore[attr-defined]
    most = max(float(ideal.grad.abs().max()), steepest * float(g.abs().max()))
    assert (ours.grad - ideal.grad).abs().max() <= NEAR * most
