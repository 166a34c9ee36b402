"""Fake quantization as training sees it: gradients, no value read on the host, one graph, and the grid's tag."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linger import eager, observe
from linger.numerics import (
    Grid,
    bound_parameter,
    fake_quant,
    grid_of,
    nearest_integer,
    scale_from_running,
    scale_from_weight,
    set_grid,
    straight_through,
)
from linger.ops._weighted import room_for_bias, room_for_sum
from linger.rounding import divided_half_up

# --- gradients


def gradient(f: Callable[[Tensor], Tensor], x: list[float], incoming: float = 3.0) -> list[float]:
    v = torch.tensor(x, requires_grad=True)
    f(v).backward(torch.full((len(x),), incoming))
    assert v.grad is not None
    return v.grad.tolist()


def test_gradient_of_fake_quant() -> None:
    """Straight through where the integer is representable: 127.4 rounds to 127, 127.5 to 128."""
    x = [-129.0, -128.6, -128.5, -128.0, 0.3, 127.0, 127.4, 127.5, 200.0]
    want = [0, 0, 3, 3, 3, 3, 3, 0, 0]
    assert gradient(lambda v: fake_quant(v, torch.tensor(1.0), 8), x) == want
    assert gradient(lambda v: fake_quant(v * 2.0**-4, torch.tensor(2.0**4), 8) * 2.0**4, x) == want
    inside = gradient(lambda v: fake_quant(v, torch.tensor(1.0), 8, 5.0), [-5.1, -5.0, 4.0, 5.0, 5.1, 300.0])
    assert inside == [0, 3, 3, 3, 0, 0]


@pytest.mark.parametrize("incoming", [math.inf, math.nan])
def test_no_gradient_leaks_from_outside(incoming: float) -> None:
    assert gradient(lambda v: fake_quant(v, torch.tensor(1.0), 8), [500.0, -500.0], incoming) == [0, 0]
    assert gradient(lambda v: straight_through(v, v.detach(), torch.tensor(1.0), 8), [500.0, -500.0], incoming) == [
        0,
        0,
    ]


def test_straight_through() -> None:
    """The value comes from the integers, saturated; the gradient from ``ideal``, zero where they saturate."""
    integers, scale = torch.tensor([-129.0, -128.0, 5.0, 127.0, 128.0]), torch.tensor(4.0)
    out = straight_through(torch.zeros(5), integers, scale, 8)
    assert out.tolist() == [-32.0, -32.0, 1.25, 31.75, 31.75]
    assert gradient(lambda v: straight_through(v, integers, scale, 8), [0.0] * 5) == [0, 3, 3, 3, 0]


def test_bound_parameter() -> None:
    """Clamped; outside, the gradient is the constant that pulls back, whatever comes in."""
    x, pull = [-9.0, -8.0, 0.0, 8.0, 9.0], 0.009999999776482582
    for incoming in (3.0, -1e6, math.nan):
        got = gradient(lambda v: bound_parameter(v, 8), x, incoming)
        assert (got[0], got[-1]) == (-pull, pull)
    assert gradient(lambda v: bound_parameter(v, 8), x) == [-pull, 3, 3, 3, pull]
    assert bound_parameter(torch.tensor(x), 8).tolist() == [-8, -8, 0, 8, 8]
    v = torch.tensor(x)
    assert bound_parameter(v, None) is v


# --- in the training path: no host synchronisation, no branch on values


class NoSync(TorchDispatchMode):
    """Whatever brings a value of a tensor to the host (``item``, ``bool``, ``nonzero`` ...) is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert torch.Tag.data_dependent_output not in func.tags, f"{func} reads a value"
        assert torch.Tag.dynamic_output_shape not in func.tags, f"{func} has a shape that depends on values"
        return func(*args, **(kwargs or {}))


def training_path(x: Tensor, running: Tensor) -> Tensor:
    """Everything that numerics and observe do in a training step."""
    peak = observe.peak(x, True, 8.0)
    s_x, s_w = scale_from_running(running, 8), scale_from_weight(x, 4)
    s_w = room_for_bias(s_w, s_x, x)
    y = fake_quant(bound_parameter(x, 2.0), s_x, 8, 1.5) + fake_quant(x, s_w, 16) + fake_quant(x, s_x, 32)
    y = y + straight_through(x, divided_half_up(nearest_integer(x.double()), 3), s_x, 8)
    return y * room_for_sum(s_x, peak)


def test_no_value_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device and in a compiled net, where no value is at hand."""
    monkeypatch.setattr(eager, "LOOKS", False)
    x = torch.randn(4, 5, requires_grad=True)
    with NoSync():
        training_path(x, torch.tensor(1.5)).sum().backward()
    with NoSync(), pytest.raises(AssertionError, match="reads a value"):
        x.sum().item()


def test_no_value_is_needed() -> None:
    """Tensors without values: nothing can depend on them."""
    x = torch.randn(4, 5, device="meta", requires_grad=True)
    running = torch.ones((), device="meta")
    training_path(x, running).sum().backward()
    observe.update(running, observe.peak(x), "running_x")
    assert x.grad is not None
    assert (x.grad.shape, running.shape) == ((4, 5), ())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own
def test_compiled_is_eager() -> None:
    """One graph, the same values and gradients."""
    x, results = torch.randn(4, 5) * 3, []
    torch.compiler.reset()
    for f in (training_path, torch.compile(training_path, fullgraph=True, backend="eager")):
        v = x.clone().requires_grad_()
        y = f(v, torch.tensor(1.5))
        y.sum().backward()
        results.append((y.detach(), v.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- the tag


def test_a_grid_is_never_stale() -> None:
    """A change in place, through any view, loses the grid; None takes it off."""
    x, grid = torch.zeros(4), Grid(torch.tensor(8.0), 8)
    assert grid_of(x) is grid_of(3) is None
    assert grid_of(set_grid(x, grid)) == x.grid == grid  # type: ignore[attr-defined]
    x[1:].add_(1)
    assert grid_of(x) is None
    assert grid_of(set_grid(x, None)) is None
    with torch.inference_mode():
        assert grid_of(set_grid(torch.zeros(2), grid)) == grid


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_types_are_kept(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.ones(*shape, 2, dtype=dtype)[..., 0]  # not contiguous
    y = fake_quant(x, torch.tensor(4.0), 8)
    assert (y.shape, y.dtype) == (shape, dtype)
    assert torch.equal(y, x)
