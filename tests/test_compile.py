"""``torch.compile(net, fullgraph=True)``: the same integers, the same gradients, one graph for all steps.

Back end ``aot_eager`` needs no C++ compiler; the nets that take long to trace and ``inductor`` are marked slow, but for one test
of every function that runs wherever there is a compiler.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_exactness import converted, grow
from test_training import MAKERS, batches, fixed, same_state, sgd, step, trained
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger import eager

pytestmark = pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning"  # PyTorch's tracer does
)
SLOW = ("ResNet20", "MobileNetV2", "UNet", "Conformer")
REORDERED = ("Conformer",)  # whose bias gradients are summed from strided tensors
WIDE = ("KeywordNet", "ResNet20", "MobileNetV2")  # with layers whose bias joins a float32 sum if it can be looked at
EVERY = pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MAKERS])


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled(net: nn.Module, backend: str = "aot_eager", **options: Any) -> Any:
    return torch.compile(net, fullgraph=True, backend=backend, **options)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def check_training(name: str, backend: str, bit_for_bit: bool = True) -> None:
    net, shape, optimizer = trained(name, steps=1)
    optimizer.zero_grad()
    other = copy.deepcopy(net)
    fast = compiled(other, backend)
    optimizers, before = (sgd(net), sgd(other)), graphs()
    for x in batches(shape, 1, 4):
        torch.manual_seed(5)  # MobileNetV2 has a dropout
        expected = step(net, optimizers[0], x)
        torch.manual_seed(5)
        found = step(fast, optimizers[1], x)
        assert found == pytest.approx(expected, rel=0 if bit_for_bit else 1e-2)
        assert graphs() == before + 1
        if bit_for_bit:
            same_state(net, other)
            for (key, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
                assert p.grad is not None
                assert q.grad is not None
                assert torch.equal(p.grad, q.grad), key


@EVERY
def test_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradients, ranges and parameters of several steps are equal, and no step compiles again.

    A compiler sees no value; where that leaves a bias to float64, its gradient is summed there, so that eager has to look away too.
    """
    if name in WIDE:
        monkeypatch.setattr(eager, "LOOKS", False)
    check_one_step(name) if name in REORDERED else check_training(name, "aot_eager")


def check_one_step(name: str) -> None:
    """Loss and ranges are equal; gradients differ by the order of PyTorch's sums, 2^-20 of the largest at most."""
    net, shape, optimizer = trained(name, steps=1)
    optimizer.zero_grad()
    other, (x,) = copy.deepcopy(net), batches(shape, 1, 1)
    losses = []
    for module in (net, compiled(other)):
        torch.manual_seed(5)
        loss = module.train()(x).square().mean()
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    same_state(net, other)
    grads = [(p.grad, q.grad) for p, q in zip(net.parameters(), other.parameters(), strict=True)]
    assert len(grads) > 20
    for p, q in grads:
        assert torch.allclose(p, q, rtol=0, atol=float(p.abs().max()) * 2.0**-20)


@EVERY
def test_eval(name: str) -> None:
    """Equal integers before and after more training."""
    net, shape, optimizer = trained(name)
    fast = compiled(net)
    for expected_graphs in (1, 2):  # train() makes a graph of its own, eval() finds its own again
        for x in batches(shape, 3, 2):
            with torch.no_grad():
                expected = net.eval()(x)
                assert torch.equal(fast.eval()(x), expected)
        assert graphs() == expected_graphs
        step(fast.train(), optimizer, batches(shape, 4, 1)[0])


def test_batch_sizes() -> None:
    """Another batch size compiles once more, for any size from then on."""
    net, shape, _ = trained("Mixed")
    fast = compiled(net.eval())
    with torch.no_grad():
        for size in (4, 3, 7, 5):
            (x,) = batches(shape, 5, 1, size)
            assert torch.equal(fast(x), net(x))
    assert graphs() == 2


def test_before_any_forward() -> None:
    """A traced net can be compiled before it has run once; in eval it asks for a batch as always."""
    net, shape = fixed("Mixed")
    other = copy.deepcopy(net)
    fast = compiled(other)
    (x,) = batches(shape, 6, 1)
    with pytest.raises(RuntimeError, match="running_x is 0, so no batch has been seen; run at least one batch"):
        fast.eval()(x)
    assert torch.equal(fast.train()(x), net.train()(x))
    same_state(net, other)
    with torch.no_grad():
        assert torch.equal(fast.eval()(x), net.eval()(x))


def test_autocast() -> None:
    net, shape, _ = trained("Mixed")
    fast = compiled(net.eval())
    (x,) = batches(shape, 7, 1)
    with torch.no_grad():
        expected = net(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(fast(x), expected)


@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed-groups"])
def test_weights_that_grow_after_compiling(name: str) -> None:
    """Compiled code looks at no weight, and is as exact as eager code, whatever the weights were at first."""
    net, layer, x = converted(name)
    fast = compiled(net)
    with torch.no_grad():
        fast(x)
        grow(layer, x)
        assert torch.equal(fast(x), net(x))
        other = copy.deepcopy(net)
        assert torch.equal(fast.train()(x), other.train()(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
@pytest.mark.parametrize("name", MAKERS)
def test_inductor(name: str) -> None:
    """The default back end: equal integers in eval; in training its fused float gradients differ in the last bits."""
    net, shape, _ = trained(name)
    fast = compiled(net.eval(), "inductor")
    with torch.no_grad():
        for x in batches(shape, 8, 3):
            assert torch.equal(fast(x), net(x))
    check_training(name, "inductor", bit_for_bit=False)


class Functions(nn.Module):
    """(N, 8, 24) -> every kind of arithmetic that is more than a sum, each on the result of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.groups = nn.Linear(24, 24), nn.LayerNorm(24), nn.GroupNorm(2, 8)
        self.rms, self.prelu = nn.RMSNorm(24), nn.PReLU()

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.into(x)
        tables = [f(y) for f in (torch.tanh, torch.sigmoid, F.silu, F.gelu, torch.exp, F.softplus, torch.sin, F.glu)]
        rows = [f(y) for f in (self.norm, self.groups, self.rms, lambda v: v.softmax(-1), lambda v: v.log_softmax(-1))]
        clamps = [F.hardtanh(y, -0.3, 0.7), y.clamp(min=0.1), y.abs(), y.sign(), self.prelu(y), y.cumsum(1), y / 3]
        spread = [
            y.mean(1),
            y.sum(1),
            y.var(1),
            torch.where(y > 0, y, -1.0),
            torch.maximum(y, x),
            y @ y.transpose(1, 2),
        ]
        return [*tables, *rows, *clamps, *spread, F.avg_pool1d(y, 3), F.scaled_dot_product_attention(y, y, y)]


COMPILER = [] if shutil.which("g++") or shutil.which("clang++") else [pytest.mark.slow]  # where it would be an error


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
@pytest.mark.parametrize("chip", [pytest.param(c, marks=COMPILER) for c in ("venus", "venusa")])
def test_every_function_in_the_default_back_end(chip: str) -> None:
    """The loops that inductor writes give the integers of eager, each function by itself."""
    net = linger.init(Functions(), target=chip, limits=False)
    for x in torch.randn(2, 3, 8, 24):
        net(x)
    fast = compiled(net.eval(), "inductor")
    with torch.no_grad():
        for x in torch.randn(2, 3, 8, 24) * 2:
            unlike = [i for i, (a, b) in enumerate(zip(fast(x), net(x), strict=True)) if not torch.equal(a, b)]
            assert not unlike
