"""Exactness of sums at the edge of float32, the bound of the accumulator, and gradients of products and functional layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calls import Calls, assert_equal, samples, trained
from torch import Tensor
from torch.nn import functional as F

import linger


def products_of(total: int, terms: int) -> tuple[Tensor, Tensor]:
    """Two int8 vectors whose dot product is exactly ``total``."""
    x, y = torch.zeros(terms), torch.zeros(terms)
    full = total // 2**14
    x[:full], y[:full] = -128, -128
    rest = total - full * 2**14
    for i in range(full, terms):
        x[i] = min(127, rest)
        y[i] = min(127, rest // max(int(x[i]), 1))
        rest -= int(x[i] * y[i])
    assert rest == 0
    return x, y


def tie(terms: int, shift: int) -> tuple[Tensor, Tensor, int]:
    """Vectors whose sum is one below a tie of a shift by ``shift``, and the result, one less than a float32 would say."""
    wanted = terms * 2**14 // 2**shift - 2
    x, y = products_of(wanted * 2**shift + 2 ** (shift - 1) - 1, terms)
    return x, y, wanted


@pytest.mark.parametrize(("terms", "dynamic"), [(4608, False), (4608, True), (1023, False), (1024, False)])
def test_sums_beyond_float32_are_exact(terms: int, dynamic: bool, tmp_path: Path) -> None:
    """One below a tie of more than 2^24: float32 rounds it up; in a file whose inner axis is open too."""
    shift = 20 if terms > 4000 else 18
    x, y, wanted = tie(terms, shift)
    x, y = x.reshape(1, 1, terms), y.reshape(1, terms, 1)
    net = trained(Calls(lambda n, x, y: x @ y), (x, y))
    for name, module in net.named_modules():
        if name.endswith(("in0", "in1")):
            module.running("x").fill_(127.0)
        elif name.endswith("function_bmm_0"):
            module.running("o").fill_(127.0 * 2**shift)
    net.train().eval()
    axes = {"a": {2: "k"}, "b": {1: "k"}} if dynamic else None
    sample = (x[:, :, :4], y[:, :4]) if dynamic else (x, y)
    linger.onnx.export(net, sample, tmp_path / "net.onnx", input_names=["a", "b"], dynamic_axes=axes)
    assert_equal(net, (x, y), tmp_path / "net.onnx")
    out = net(x, y)
    assert out.item() * out.grid.scale.item() == wanted


def test_float32_only_below_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """1023 products of 8 bits are multiplied in float32, 1024 in float64, whatever the values are."""
    kinds = []
    real = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda x, y: kinds.append(x.dtype) or real(x, y))
    for terms in (1023, 1024):
        trained(Calls(lambda n, x, y: torch.bmm(x, y)), samples(((1, 2, terms), (1, terms, 2))), traced=False)
    assert kinds == [torch.float32] * 3 + [torch.float64] * 3


def test_accumulator_beyond_31_bits() -> None:
    net = linger.init(Calls(lambda n, x, y: x @ y))
    with pytest.raises(linger.LingerError) as raised:
        net(torch.ones(1, 2**17), torch.ones(2**17, 1))
    assert "_linger_round_tensor_function_bmm_0: a sum of 131072 products of 8 x 8 bits may reach 2147483648" in str(
        raised.value
    )
    assert "31 bits (2147483647); cut the inner dimension" in str(raised.value)
    net(torch.ones(1, 2**17 - 1), torch.ones(2**17 - 1, 1))


# --- gradients

GRADIENTS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "bmm": (lambda x, y: torch.bmm(x, y), ((2, 5, 8), (2, 8, 6))),
    "broadcast": (lambda x, y: x @ y, ((2, 1, 5, 8), (3, 8, 6))),
    "vector": (lambda x, y: x @ y, ((2, 5, 8), (8,))),
    "K2000": (lambda x, y: x @ y, ((3, 2000), (2000, 2))),
    "einsum": (lambda x, y: torch.einsum("bij,kj->bki", x, y), ((2, 5, 8), (6, 8))),
    "linear": (lambda x, y: F.linear(x, y), ((2, 5, 8), (6, 8))),
    "conv2d": (lambda x, y: F.conv2d(x, y, stride=2, padding=1), ((2, 3, 7, 7), (4, 3, 3, 3))),
    "conv_transpose1d": (lambda x, y: F.conv_transpose1d(x, y, stride=2), ((2, 3, 7), (3, 4, 3))),
}


@pytest.mark.parametrize("parameter", [False, True])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient_is_that_of_the_float_function(name: str, parameter: bool) -> None:
    """Autograd in float64 at the fake-quantized operands, where nothing saturates; the numbers are exact."""
    function, shapes = GRADIENTS[name]
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randint(-127, 128, s, generator=g) / 32 for s in shapes)
    x[(0,) * x.dim()] = y[(0,) * y.dim()] = 127 / 32
    if name.startswith("conv") and not parameter:
        return
    net = linger.init(Calls(lambda n, a, *b: function(a, *(b or (n.w0,))), *([shapes[1]] if parameter else [])))
    if parameter:
        net.w0.data.copy_(y)
    given = [t.clone().requires_grad_() for t in ((x,) if parameter else (x, y))]
    out = net(*given)
    up = torch.randint(-8, 9, out.shape, generator=g).float()
    out.backward(up)
    wide = [t.double().requires_grad_() for t in (x, y)]
    wanted = function(*wide)
    inside = (wanted * out.grid.scale).add(0.5).floor().abs() <= 127
    wanted.backward(up.double() * inside)
    second = net.w0.grad if parameter else given[1].grad
    assert torch.equal(given[0].grad.double(), wide[0].grad)
    assert torch.equal(second.double(), wide[1].grad)
