"""What the CPU computes block by block and in Python is what a device and a compiled net compute, to the last bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import linger
from linger import eager, observe
from linger.numerics import NOTHING, Grid, fake_quant, grid_of, scale_from_running, scale_from_weight, set_grid
from linger.observe import fits
from linger.ops._weighted import NARROW_BIAS, WIDE_BIAS, room_for_bias
from linger.rounding import ROUNDINGS

ROOT = 0x3504F3  # the mantissa of the square root of 2, rounded down


def elsewhere(f: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What ``f`` returns where no value is at hand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "LOOKS", False)
        return f(*args, **options)


def float32(bits: int) -> float:
    return float(np.array(bits, np.uint32).view(np.float32))


reaches = st.one_of(
    st.floats(0, math.inf, width=32),
    # around the numbers at which a scale changes, top / sqrt(2) and top / 2^n, a few units in the last place away
    st.builds(
        lambda top, mantissa, n, ulp: float32(
            int(np.array(top / np.float32(float32(127 << 23 | mantissa)), np.float32).view(np.uint32)) + (n << 23) + ulp
        ),
        st.sampled_from([7, 127, 32767]), st.sampled_from([0, ROOT, ROOT + 1, 2**23 - 1]), st.integers(-90, 90), st.integers(-4, 4),
    ),
)  # fmt: skip


@given(reaches, st.sampled_from([4, 8, 16, 32]))
def test_scales(reach: float, bits: int) -> None:
    """Of every running maximum and of every weight, zeros and what is not finite included."""
    running = torch.tensor(reach)
    for scale in (scale_from_running, scale_from_weight):
        found, want = scale(running, bits), elsewhere(scale, running, bits)
        assert torch.equal(found, want) or (found.isnan() and want.isnan())
        assert (found.shape, found.dtype) == ((), torch.float32)


@given(reaches, st.integers(-40, 40), st.integers(-60, 60), st.sampled_from([NARROW_BIAS, WIDE_BIAS]))
def test_room_for_a_bias(reach: float, n_x: int, n_w: int, limit: int) -> None:
    given = (torch.tensor(2.0**n_w), torch.tensor(2.0**n_x), torch.tensor([-reach, 0.0]), limit)
    found, want = room_for_bias(*given), elsewhere(room_for_bias, *given)
    assert torch.equal(found, want) or (found.isnan() and want.isnan())


@given(st.lists(st.one_of(reaches, st.sampled_from([0.0, NOTHING, observe.EMPTY])), max_size=4))
def test_the_running_maximum(values: list[float]) -> None:
    here, there = torch.zeros(()), torch.zeros(())
    for value in filter(math.isfinite, values):
        observe.update(here, torch.tensor(value), "running_x")
        elsewhere(observe.update, there, torch.tensor(value), "running_x")
        assert torch.equal(here, there)


def test_nothing_of_the_table_is_handed_out() -> None:
    """Scales in a state dict can be written to, as averages of checkpoints do."""
    net = linger.init(nn.Sequential(nn.Conv1d(2, 3, 1)))
    net(torch.randn(2, 2, 4))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for value in net.state_dict().values():
        if value.dim() == 0:
            value.mul_(0).add_(3) if not value.requires_grad else None
    net.load_state_dict(before)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert eager.power(3).item() == 8.0


# --- blocks


SHAPES: dict[str, Callable[[], Tensor]] = {
    "small": lambda: torch.randn(3, 5),
    "large": lambda: torch.randn(7, 11, 13),
    "channels-last": lambda: torch.randn(2, 6, 9, 5).contiguous(memory_format=torch.channels_last),
    "not-contiguous": lambda: torch.randn(40, 30).t()[::2],
    "expanded": lambda: torch.randn(1, 30).expand(40, 30),
    "empty": lambda: torch.randn(0, 3),
    "number": lambda: torch.randn(()),
}
EVERY = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "BLOCK", 64)


def result(x: Tensor, gradient: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    y = fake_quant(leaf * 1, torch.tensor(32.0), *options)
    y.backward(gradient)
    assert leaf.grad is not None
    return y.detach(), leaf.grad


@EVERY
@pytest.mark.parametrize("bound", [None, 1.5])
@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_blocks_of_fake_quant(shape: str, bound: float | None, bits: int, rounding: str) -> None:
    x = (SHAPES[shape]() * 192).round() / 64  # many ties
    gradients = (torch.randn(x.shape), torch.randn(()).expand(x.shape), torch.full(x.shape, math.nan))
    for g in gradients:
        want = elsewhere(result, x, g, bits, bound, False, False, rounding)
        for fresh in (False, True):
            found = result(x, g, bits, bound, False, fresh, rounding)
            assert all(torch.equal(a.nan_to_num(99), b.nan_to_num(99)) for a, b in zip(found, want, strict=True))
            assert found[0].stride() == torch.empty_like(x * 1).stride()


@EVERY
@pytest.mark.parametrize("fresh", [False, True])
def test_a_tensor_that_fits_has_the_gradient_of_the_identity(shape: str, fresh: bool) -> None:
    x = SHAPES[shape]().clamp(-3.9, 3.9)
    g = torch.randn(x.shape)
    spread = (float(x.min()), float(x.max())) if x.numel() else None
    assert fits(spread, torch.tensor(32.0), 8) is bool(x.numel())
    found, want = result(x, g, 8, None, True, fresh), elsewhere(result, x, g, 8, None)
    assert torch.equal(found[0], want[0])
    assert torch.equal(found[1], g)
    assert torch.equal(want[1], g)


@pytest.mark.parametrize(
    ("spread", "bound", "want"),
    [
        ((-4.0, 3.96875), None, True),
        ((-4.01, 3.0), None, False),
        ((-4.0, 3.97), None, False),
        ((math.nan, 1.0), None, False),
        ((-math.inf, 1.0), None, False),
        (None, None, False),
        ((-1.0, 1.5), 1.5, True),
        ((-1.6, 1.0), 1.5, False),
    ],
    ids=str,
)
def test_fits(spread: Any, bound: float | None, want: bool) -> None:
    assert fits(spread, torch.tensor(32.0), 8, bound) is want


def test_what_is_not_fresh_stays() -> None:
    x = torch.randn(200, requires_grad=True)
    before = x.detach().clone()
    for inside in (False, True):
        fake_quant(x, torch.tensor(32.0), 8, None, inside).sum().backward()
        assert torch.equal(x, before)
    view = (x * 1).view(10, 20)
    y = fake_quant(view, torch.tensor(2.0), 8, None, False, True)
    assert not torch.equal(y, view)


def test_an_infinite_and_a_missing_number_stay() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.3])
    assert fake_quant(x, torch.tensor(4.0), 8).tolist()[1:] == [31.75, -32.0, 0.25]
    assert fake_quant(x, torch.tensor(4.0), 8)[0].isnan()


# --- sums


class Pair(nn.Module):
    sign = 1

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = linger.quant_tensor(self, x, "x"), linger.quant_tensor(self, y, "y")
        return x + y if self.sign > 0 else x - y


def summed(net: nn.Module, x: Tensor, y: Tensor, g: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, y)]
    out = net(*leaves)
    out.backward(g)
    site: Any = next(m for name, m in net.named_modules() if "iqadd" in name or "iqsub" in name)
    assert grid_of(out) is not None
    return [out.detach(), *(t.grad for t in leaves if t.grad is not None), site.running_o.clone(), grid_of(out).scale]  # type: ignore[union-attr]


@EVERY
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("factors", [(1.0, 1.0), (1.0, 30.0), (25.0, 0.1)], ids=str)
def test_blocks_of_sums(shape: str, sign: int, factors: tuple[float, float]) -> None:
    """Values, both gradients, and the range that follows three batches, of which the last saturates."""
    torch.manual_seed(3)
    a, b = (linger.init(Pair()) for _ in range(2))
    a.sign = b.sign = sign
    for net in (a, b):
        net(torch.zeros(2), torch.zeros(2))  # makes the sites
    for grown in (1.0, 1.0, 4.0):
        x, y = (SHAPES[shape]() * f * grown for f in factors)
        g = torch.randn(x.shape)
        for found, want in zip(summed(a, x, y, g), elsewhere(summed, b, x, y, g), strict=True):
            assert torch.equal(found, want)


def test_nan_in_one_block_of_a_sum() -> None:
    """Every block is looked at."""
    net = linger.init(Pair())
    site_input = set_grid(torch.zeros(500), Grid(torch.tensor(8.0), 8))
    net(torch.randn(500), torch.randn(500))
    bad = torch.zeros(500)
    bad[70] = math.nan
    site: Any = net.get_submodule("_linger_round_tensor_iqadd__default_index_0")
    with pytest.raises(linger.LingerError, match="the range of running_o is nan"):
        site(set_grid(bad, Grid(torch.tensor(8.0), 8)), site_input)


WIDE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(768, 12), (16, 768)),
    "conv2d": (lambda: nn.Conv2d(64, 6, 3), (2, 64, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose1d(500, 6, 2), (2, 500, 9)),
}


@pytest.mark.parametrize("name", WIDE)
def test_a_bias_that_joins_the_sum(name: str) -> None:
    """Equal integers; gradients that are summed in another type differ by 2^-20 of the largest at most."""
    make, shape = WIDE[name]
    net, x = linger.init(nn.Sequential(make())), torch.randn(shape)
    net(x)
    linger.hold_ranges(net)

    def step() -> tuple[Tensor, list[Tensor]]:
        source = x.clone().requires_grad_()
        net.zero_grad()
        out = net(source)
        out.square().sum().backward()
        return out.detach(), [source.grad, *(p.grad.clone() for p in net.parameters())]  # type: ignore[list-item, union-attr]

    (found, grads), (expected, others) = step(), elsewhere(step)
    assert torch.equal(found, expected)
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=float(b.abs().max()) * 2.0**-20)
