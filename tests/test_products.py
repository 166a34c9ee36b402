"""Matrix products in every spelling, and layers called as functions: the ops in the file, the integers, the gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import DIALECTS, Calls, assert_equal, export, islands, ops, samples, stored, trained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import linger
from linger.numerics import quantize, scale_from_weight

B3 = ((2, 5, 8), (2, 8, 6))
B4 = ((2, 3, 5, 8), (2, 3, 8, 6))


def imatmul(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x @= y
    return x


# name: (function of the net and its inputs, shapes of inputs, shapes of parameters, ops that compute in the file)
SPELLINGS: dict[str, tuple[Callable[..., Any], Any, Any, list[str]]] = {
    "bmm": (lambda n, x, y: torch.bmm(x, y), B3, (), ["BmmInt"]),
    "bmm-keyword": (lambda n, x, y: torch.bmm(input=x, mat2=y), B3, (), ["BmmInt"]),
    "Tensor.bmm": (lambda n, x, y: x.bmm(y), B3, (), ["BmmInt"]),
    "matmul": (lambda n, x, y: torch.matmul(x, y), B4, (), ["BmmInt"]),
    "Tensor.matmul": (lambda n, x, y: x.matmul(other=y), B3, (), ["BmmInt"]),
    "@": (lambda n, x, y: x @ y, B4, (), ["BmmInt"]),
    "@=": (imatmul, B3, (), ["BmmInt"]),
    "__rmatmul__": (lambda n, x, y: y.__rmatmul__(x), B3, (), ["BmmInt"]),
    "linalg.matmul": (lambda n, x, y: torch.linalg.matmul(x, y), B3, (), ["BmmInt"]),
    "mm": (lambda n, x, y: torch.mm(x.sum(0), y.sum(0)), B3, (), ["iqSum", "iqSum", "BmmInt"]),
    "mv": (lambda n, x, y: torch.mv(x, y.sum(0)), ((2, 8), (2, 8)), (), ["iqSum", "BmmInt"]),
    "dot": (lambda n, x, y: torch.dot(x.sum(0), y.sum(0)), ((2, 8), (2, 8)), (), ["iqSum", "iqSum", "BmmInt"]),
    "vecdot": (lambda n, x, y: torch.linalg.vecdot(x, y), ((2, 3, 8), (2, 3, 8)), (), ["BmmInt"]),
    "inner": (lambda n, x: torch.inner(x, n.w0), ((2, 3, 8),), ((5, 8),), ["LinearInt"]),
    "outer": (lambda n, x, y: torch.outer(x[:, 0], y.sum(0)), ((2, 4), (2, 6)), (), ["iqSum", "iqMul"]),
    "multi_dot": (lambda n, x: torch.linalg.multi_dot([x, n.w0, n.w1]), ((2, 8),), ((8, 6), (6, 3)), ["LinearInt"] * 2),
    "addmm": (lambda n, x: torch.addmm(n.w0, x, n.w1), ((2, 8),), ((5,), (8, 5)), ["LinearInt"]),
    "addmm-factors": (lambda n, x: torch.addmm(n.w0, x, n.w1, beta=2, alpha=0.3), ((2, 8),), ((5,), (8, 5)), ["LinearInt"]),
    "addmm-two": (lambda n, b, x: torch.addmm(b, x, n.w0), ((2, 5), (2, 8)), ((8, 5),), ["LinearInt", "iqAdd"]),
    "baddbmm": (lambda n, b, x, y: torch.baddbmm(b, x, y, alpha=0.5), ((2, 5, 6), *B3), (), ["BmmInt", "iqMul", "iqAdd"]),
    "baddbmm-beta-0": (lambda n, b, x, y: b.baddbmm(x, y, beta=0), ((2, 5, 6), *B3), (), ["BmmInt"]),
    "einsum": (lambda n, x, y: torch.einsum("bij,bjk->bik", x, y), B3, (), ["BmmInt"]),
    "einsum-transposed": (lambda n, x, y: torch.einsum("b i j, b j k -> k b i", [x, y]), B3, (), ["BmmInt"]),
    "einsum-implicit": (lambda n, x: torch.einsum("bj,jk", x, n.w0), ((2, 8),), ((8, 4),), ["LinearInt"]),
    "einsum-two-summed": (lambda n, x: torch.einsum("bij,ijk->bk", x, n.w0), ((2, 3, 8),), ((3, 8, 4),), ["LinearInt"]),
    "einsum-parameter-first": (lambda n, x: torch.einsum("kj,bj->bk", n.w0, x), ((2, 8),), ((4, 8),), ["LinearInt"]),
    "einsum-ellipsis": (lambda n, x, y: torch.einsum("...ij,...jk->...ik", x, y), B4, (), ["BmmInt"]),
    "einsum-elements": (lambda n, x, y: torch.einsum("bij,bji->bij", x, y), ((2, 3, 4), (2, 4, 3)), (), ["iqMul"]),
    "einsum-one": (lambda n, x: torch.einsum("bij->jb", x), ((2, 3, 4),), (), ["iqSum"]),
    "einsum-turned": (lambda n, x: torch.einsum("bij->bji", x), ((2, 3, 4),), (), []),
    "tensordot": (lambda n, x: torch.tensordot(x, n.w0, dims=([1, 2], [1, 0])), ((2, 3, 8),), ((8, 3, 5),), ["LinearInt"]),
    "tensordot-number": (lambda n, x: torch.tensordot(x, n.w0, 1), ((2, 3, 8),), ((8, 5),), ["LinearInt"]),
    "x @ w": (lambda n, x: x @ n.w0, ((2, 3, 8),), ((8, 5),), ["LinearInt"]),
    "w @ x": (lambda n, x: n.w0 @ x, ((2, 8, 3),), ((5, 8),), ["BmmInt"]),
    "x @ w, w 3-d": (lambda n, x: x @ n.w0, ((2, 3, 4, 8),), ((3, 8, 5),), ["BmmInt"]),
    "x @ part of w": (lambda n, x: x @ n.w0[2:10, 1::2], ((2, 3, 8),), ((12, 9),), ["LinearInt"]),
    "x @ w.t()": (lambda n, x: x @ n.w0.t(), ((2, 3, 8),), ((5, 8),), ["LinearInt"]),
    "linear": (lambda n, x: F.linear(x, n.w0, n.w1), ((2, 3, 8),), ((5, 8), (5,)), ["LinearInt"]),
    "linear-keywords": (lambda n, x: F.linear(bias=n.w1, input=x, weight=n.w0), ((2, 8),), ((5, 8), (5,)), ["LinearInt"]),
    "linear-low-rank": (lambda n, x: F.linear(x, n.w0 + n.w1 @ n.w2), ((2, 8),), ((5, 8), (5, 2), (2, 8)), ["LinearInt"]),
    "linear-two": (lambda n, x, y: F.linear(x, y.sum(0)), ((2, 8), (2, 4, 8)), (), ["iqSum", "BmmInt"]),
    "linear-bias-of-input": (lambda n, x: F.linear(x, n.w0, x.sum(0)[:5]), ((2, 8),), ((5, 8),), ["iqSum", "LinearInt", "iqAdd"]),
    "linear-vector": (lambda n, x: F.linear(x, n.w0), ((2, 8),), ((8,),), ["LinearInt"]),
    "conv1d": (lambda n, x: F.conv1d(x, n.w0, n.w1, 2, 1, 1, 2), ((2, 4, 9),), ((6, 2, 3), (6,)), ["Conv1dInt"]),
    "conv2d": (lambda n, x: F.conv2d(x, n.w0, padding="same"), ((2, 3, 6, 5),), ((4, 3, 2, 3),), ["Conv2dInt"]),
    "conv2d-torch": (lambda n, x: torch.conv2d(x, n.w0, None, dilation=(1, 2)), ((2, 3, 6, 5),), ((4, 3, 2, 2),), ["Conv2dInt"]),
    "conv2d-bias-of-input": (lambda n, x: F.conv2d(x, n.w0, x.sum((0, 2, 3))), ((2, 3, 6, 5),), ((3, 3, 2, 2),), ["iqSum", "Conv2dInt", "iqAdd"]),
    "conv_transpose1d": (lambda n, x: F.conv_transpose1d(x, n.w0, n.w1, stride=2), ((2, 4, 6),), ((4, 3, 3), (3,)), ["ConvTranspose1dInt"]),
    "conv_transpose2d": (lambda n, x: F.conv_transpose2d(x, n.w0, None, 2, 1, 1), ((2, 4, 4, 3),), ((4, 3, 3, 3),), ["ConvTranspose2dInt"]),
}  # fmt: skip


def spelled(name: str, bits: int = 8) -> tuple[nn.Module, tuple[Tensor, ...], list[str]]:
    function, shapes, parameters, wanted = SPELLINGS[name]
    inputs = samples(shapes)
    return trained(Calls(function, *parameters, bits=bits), inputs, data_bits=bits, out_bits=bits), inputs, wanted


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name: str, dialect: str, tmp_path: Path) -> None:
    """Every spelling is the op it should be, without a float island, equal everywhere, for other batches too."""
    for bits in (8, 16):
        net, inputs, wanted = spelled(name, bits)
        model = export(net, inputs, tmp_path / "net.onnx", dialect=dialect)
        if dialect == "thinker":
            assert ops(model) == wanted
        for batch in (2, 5):
            more = samples(tuple((batch, *s[1:]) for s in SPELLINGS[name][1]), seed=batch)
            assert assert_equal(net, more, tmp_path / "net.onnx") > 0


@pytest.mark.parametrize("name", ["matmul", "linear", "conv1d", "addmm", "einsum", "w @ x"])
def test_result_is_near_the_float_function(name: str) -> None:
    function, shapes, parameters, _ = SPELLINGS[name]
    inputs = samples(shapes)
    net = Calls(function, *parameters)
    wanted = function(net, *inputs)
    got = trained(net, inputs)(*inputs)
    assert (got - wanted).square().mean() < 0.1 * wanted.square().mean()


# --- what is a weight, and where it is stored


def test_weights_are_stored_under_their_keys(tmp_path: Path) -> None:
    net = Calls(lambda n, x: F.linear(F.linear(x, n.w0, n.w1) @ n.w2, n.w3), (6, 8), (6,), (6, 5), (4, 5))
    net = trained(net, samples(((2, 8),)))
    held = stored(export(net, samples(((2, 8),)), tmp_path / "net.onnx"))
    assert {"w0", "w1", "w2", "w3"} <= set(held)
    for name, turned in (("w0", False), ("w2", True), ("w3", False)):
        weight = getattr(net, name)
        integers = quantize(weight, scale_from_weight(weight, 8), 8)
        assert held[name].dtype == np.int8
        assert np.array_equal(held[name], integers.T if turned else integers)
    assert held["w1"].dtype == np.int32


def test_one_weight_in_two_calls(tmp_path: Path) -> None:
    """A tied embedding: the table as it is, and turned; both are written once."""
    net = trained(Calls(lambda n, x: (x @ n.w0) @ n.w0.t(), (8, 5)), samples(((2, 8),)))
    held = stored(export(net, samples(((2, 8),)), tmp_path / "net.onnx"))
    integers = quantize(net.w0, scale_from_weight(net.w0, 8), 8)
    found = sorted((v for k, v in held.items() if v.dtype == np.int8), key=lambda v: v.shape)
    assert [v.shape for v in found] == [(5, 8), (8, 5)]
    assert np.array_equal(found[0], integers.T)
    assert np.array_equal(found[1], integers)


def test_buffer_is_a_weight_next_to_a_grid(tmp_path: Path) -> None:
    net = trained(Calls(lambda n, x: x @ n.table, table=torch.randn(8, 5)), samples(((2, 8),)))
    model = export(net, samples(((2, 8),)), tmp_path / "net.onnx")
    assert ops(model) == ["LinearInt"]
    assert "table" in stored(model)


def test_a_weight_that_an_input_took_part_in_is_an_activation(tmp_path: Path) -> None:
    inputs = samples(((2, 8),))
    net = trained(Calls(lambda n, x: F.linear(x, n.w0 * torch.sin(x)[:1]), (5, 8)), inputs)
    assert ops(export(net, inputs, tmp_path / "net.onnx", batch=False))[-1] == "BmmInt"
    assert_equal(net, samples(((2, 8),), seed=1), tmp_path / "net.onnx")


def test_plain_input(tmp_path: Path) -> None:
    """A linear function with a parameter is a layer; other products start where something has a grid."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(8, 8))

        def forward(self, a: Tensor) -> Tensor:
            return F.linear(a @ self.v, self.w)

    inputs = samples(((2, 8),))
    net = trained(Plain(), inputs)
    assert islands(net, inputs, tmp_path / "net.onnx") == ["matmul"]
    assert set(net.state_dict()) == {"w", "v"} | {
        f"_linger_round_tensor_linear_0.{k}_{n}" for k in ("running", "scale") for n in "xo"
    }


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * 0.5


class Renamed(nn.Conv1d):
    pass


@pytest.mark.parametrize(
    ("make", "shape", "wanted"),
    [
        (lambda: Scaled(8, 5), (2, 8), ["LinearInt", "iqMul"]),
        (lambda: Renamed(3, 5, 3), (2, 3, 9), ["Conv1dInt"]),
        (lambda: weight_norm(nn.Linear(8, 5)), (2, 8), ["LinearInt"]),
        (lambda: weight_norm(nn.Conv1d(3, 5, 3)), (2, 3, 9), ["Conv1dInt"]),
        (lambda: spectral_norm(nn.Linear(8, 5)), (2, 8), ["LinearInt"]),
    ],
    ids=["subclass", "renamed", "weight_norm", "weight_norm-conv", "spectral_norm"],
)
def test_layers_whose_forward_calls_the_function(
    make: Callable[[], nn.Module], shape: Any, wanted: list[str], tmp_path: Path
) -> None:
    """A subclass is no twin, and a parametrization computes its weight: the call they make has a fixed-point form."""
    inputs = samples((shape,))
    net = trained(nn.Sequential(make(), nn.Identity()), inputs)
    assert ops(export(net, inputs, tmp_path / "net.onnx")) == wanted
    assert_equal(net, samples(((5, *shape[1:]),), seed=1), tmp_path / "net.onnx")
    net.train()(*inputs).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_layer_left_in_float_stays_there(tmp_path: Path) -> None:
    """Its own forward calls F.linear with a parameter, and must not be routed."""
    net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Linear(7, 5))
    inputs = samples(((2, 3, 9),))
    net = trained(net, inputs, quant_modules=(nn.Conv1d,))
    assert islands(net, inputs, tmp_path / "net.onnx") == ["linear"]
    assert not any("linear" in key for key in net.state_dict())


def test_four_bit_parameters(tmp_path: Path) -> None:
    net = trained(Calls(lambda n, x: n.w1 @ F.linear(x, n.w0), (5, 8), (3, 2)), samples(((2, 8),)), parameter_bits=4)
    held = stored(export(net, samples(((2, 8),)), tmp_path / "net.onnx", batch=False, target="arcs"))
    for name in ("w0", "w1"):
        assert 3 < np.abs(held[name]).max() <= 8
    assert_equal(net, samples(((2, 8),), seed=1), tmp_path / "net.onnx")


# --- float islands, switches, errors


@pytest.mark.parametrize(
    ("function", "shapes", "parameters", "wanted"),
    [
        (lambda n, x: torch.einsum("bj,jk,kl->bl", x, n.w0, n.w1), ((2, 8),), ((8, 6), (6, 3)), ["einsum"]),
        (lambda n, x: torch.einsum("bii->bi", x), ((2, 4, 4),), (), ["einsum"]),
        (lambda n, x, y: torch.einsum("bij,bk->bk", x, y), ((2, 4, 4), (2, 3)), (), ["einsum"]),
        (lambda n, x, y: F.conv1d(x, y), ((2, 3, 9), (2, 3, 3)), (), ["conv1d"]),
        (
            lambda n, x, y: F.conv_transpose1d(x, y.mean(0, keepdim=True)),
            ((2, 1, 9), (2, 3, 3)),
            (),
            ["conv_transpose1d"],
        ),
    ],
)
def test_forms_that_are_no_product_are_named(
    function: Any, shapes: Any, parameters: Any, wanted: list[str], tmp_path: Path
) -> None:
    inputs = samples(shapes)
    net = trained(Calls(function, *parameters), inputs)
    assert islands(net, inputs, tmp_path / "net.onnx", batch=False) == wanted
    loaded = linger.runtime.load(tmp_path / "net.onnx")
    assert np.allclose(loaded(*(t.numpy() for t in inputs)), net(*inputs).detach().numpy(), atol=1e-4)


def test_switch(tmp_path: Path) -> None:
    linger.SetFunctionBmmQuant(False)
    try:
        net, inputs, _ = spelled("bmm")
        assert islands(net, inputs, tmp_path / "net.onnx") == ["bmm"]
    finally:
        linger.SetFunctionBmmQuant(True)


def test_out_is_refused() -> None:
    net = linger.init(Calls(lambda n, x, y: torch.bmm(x, y, out=torch.empty(2, 5, 6))))
    with pytest.raises(linger.LingerError, match="bmm with out= has no fixed-point form; assign the result instead"):
        net(*samples(B3))


def test_a_weight_that_a_dynamic_axis_changes(tmp_path: Path) -> None:
    inputs = samples(((2, 8, 3),))
    net = trained(Calls(lambda n, x: n.w0.expand(x.shape[0], -1, -1) @ x, (4, 8)), inputs)
    with pytest.raises(
        linger.LingerError, match=r"left is a weight whose values depend on a dynamic axis; fix that axis, or"
    ):
        export(net, inputs, tmp_path / "net.onnx")
    export(net, inputs, tmp_path / "net.onnx", batch=False)
    assert_equal(net, samples(((2, 8, 3),), seed=1), tmp_path / "net.onnx")


# --- state


def test_keys_and_loading(tmp_path: Path) -> None:
    """Upstream's keys for a product; a checkpoint makes the sites of a net that was never traced."""
    net, inputs, _ = spelled("bmm")
    site = "_linger_round_tensor_function_bmm_0"
    assert {k for k in net.state_dict() if k.startswith(site)} == {f"{site}.running_o", f"{site}.scale_o"}
    fresh = linger.init(Calls(SPELLINGS["bmm"][0]))
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh.eval()(*inputs), net(*inputs))


def test_operands_without_a_grid_have_ranges(tmp_path: Path) -> None:
    """running_y of upstream: a plain tensor next to one with a grid is quantized by the site, and observed there."""

    class Mixed(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return linger.quant_tensor(self, a, "a") @ b

    net = trained(Mixed(), samples(B3))
    keys = {k.rpartition(".")[2] for k in net.state_dict() if "function_bmm_0" in k}
    assert keys == {"running_o", "scale_o", "running_y"}
    export(net, samples(B3), tmp_path / "net.onnx")
    assert_equal(net, samples(B3, seed=1), tmp_path / "net.onnx")


def test_dialect_qdq(tmp_path: Path) -> None:
    for name in ("bmm", "w @ x", "linear"):
        net, inputs, _ = spelled(name)
        model = export(net, inputs, tmp_path / "net.onnx", dialect="qdq")
        from linger.verify import session

        feed = dict(zip("abc", (t.numpy() for t in inputs), strict=False))
        got = session(model, "all").run(None, feed)[0]
        assert np.abs(got - net(*inputs).detach().numpy()).max() <= 1.01 / float(net(*inputs).grid.scale)
