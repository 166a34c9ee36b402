"""Functions as users write them: every spelling, layers, gradients, ranges, and definitions over all inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from functions import CHIP, CHIPS, OWN, Variant, every_level, peak_of, site
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.numerics import Grid, grid_of, levels, set_grid
from linger.ops import BY_CALL, activations, clamp, elementary, glu, sign
from linger.ops._unary import WIDEST_TABLE, integer_table

T: Any = Tensor
ALL = (*CHIP, *OWN)
variants = pytest.mark.parametrize("v", ALL, ids=lambda v: v.name)
FILES = (activations, elementary, clamp, sign, glu)
OPS = [op for file in FILES for op in file.OPS]
ARGUMENTS: dict[str, tuple[Any, ...]] = {"iqthreshold": (0.1, 0.2), "iqpow": (2,), "iqclamp": (-0.5,)}
SPELLINGS = [*((op.site, call) for op in OPS for call in op.calls), ("iqpow", T.__pow__), ("iqpow", T.__ipow__)]
LAYERS: dict[type[nn.Module], tuple[Any, ...]] = {nn.Threshold: (0.1, 0.2)}


class Call(nn.Module):
    """One call on a gridded tensor, in place or not, behind a layer with parameters."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.call, self.arguments = call, arguments

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        z = self.call(y, *self.arguments)
        self.same, self.grid = z is y, grid_of(z)
        return z


def name_of(p: Any) -> str:
    return p if isinstance(p, str) else getattr(p, "__qualname__", getattr(p, "__name__", str(p)))


@pytest.mark.parametrize(("tag", "call"), SPELLINGS, ids=name_of)
def test_every_spelling(tag: str, call: Callable[..., Any]) -> None:
    """It goes to the site of its op, keeps the result on a grid, and trains; in-place spellings change their operand."""
    net = linger.init(Call(call, *ARGUMENTS.get(tag, ())))
    net(torch.randn(8, 6)).square().sum().backward()
    inplace = call is T.__ipow__ or (call.__name__.endswith("_") and not call.__name__.endswith("__"))
    assert net.same is inplace
    assert net.grid is not None
    assert [n for n in dict(net.named_children()) if "round" in n] == [f"_linger_round_tensor_{tag}_0"]
    assert net.fc.weight.grad.isfinite().all()
    arguments = (None, -0.5) if "clamp_max" in call.__name__ else ARGUMENTS.get(tag, ())
    first = Call(next(op.calls[0] for op in OPS if op.site == tag), *arguments)
    other = linger.init(first).eval()
    other.load_state_dict(net.state_dict())
    x = torch.randn(8, 6)
    with torch.no_grad():
        assert torch.equal(net.eval()(x), other(x))


@pytest.mark.parametrize("layer", [m for op in OPS for m in op.modules], ids=lambda m: m.__name__)
@pytest.mark.parametrize("inplace", [False, True])
def test_every_layer(layer: type[nn.Module], inplace: bool) -> None:
    """Torch's own layers keep their type, hold the site, and compute what the function computes."""
    try:
        made = layer(*LAYERS.get(layer, ()), **({"inplace": True} if inplace else {}))
    except TypeError:
        assert inplace, "a layer without the argument"
        return
    net = linger.init(nn.Sequential(nn.Linear(6, 6), made))
    net(torch.randn(8, 6)).square().sum().backward()
    assert type(net[1]) is layer
    assert len(list(net[1].children())) == 1
    assert net[0].weight.grad.isfinite().all()


def test_an_operand_changed_in_place_is_not_what_autograd_keeps() -> None:
    """x *= y, x /= y and friends save their operand for backward before it is overwritten."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            a *= b
            a /= b.exp()
            return F.relu6(a, True).abs_()

    net = linger.init(Net())
    net(torch.randn(8, 4)).sum().backward()
    assert net.a.weight.grad.abs().sum() > 0


# --- gradients and ranges


@pytest.mark.parametrize("chip", ["venus", "venusa"])
@variants
def test_gradient_is_that_of_the_float_function(v: Variant, chip: str) -> None:
    """At every level; 0 where f is infinite or the result saturates an observed range or the chip's argument ends."""
    for n in (0, 2, 4, 7):
        x = every_level(n)
        ideal = x.double().requires_grad_()
        f = v.torch(ideal)
        (expected,) = torch.autograd.grad(f.sum(), ideal)
        for factor in (1.0, 0.25):
            made = site(v.tag, chip, peak=factor * peak_of(f.detach().float()))
            given = set_grid(x.clone().requires_grad_(), grid_of(x))
            y = made(given, **v.call)
            (found,) = torch.autograd.grad(y.sum(), given)
            kept = expected.isfinite() & f.detach().isfinite()
            if made.observed:
                scale = float(grid_of(y).scale)  # type: ignore[union-attr]
                wide = integer_table(v.function, 2.0**n, scale, 8, 16, chip, v.said)
                kept &= torch.from_numpy((wide >= -128) & (wide <= 127))
            if made.pwl(v.function) is not None:
                kept &= x.abs() < 16
            assert found.isfinite().all()
            assert torch.allclose(found, torch.where(kept, expected, 0.0).float(), rtol=1e-6, atol=1e-9)  # float32


def test_infinite_values_and_the_edge_of_the_domain() -> None:
    """log(0) is the lowest level, 1/0 and 1/sqrt(0) the highest; negative numbers do as 0 does; gradients are 0 there."""
    x = every_level(3)
    wanted = {"iqlog": -128, "iqlog2": -128, "iqsqrt": 0, "iqrsqrt": 127}
    for tag, level in wanted.items():
        given = set_grid(x.clone().requires_grad_(), grid_of(x))
        y = site(tag, peak=2.0)(given)
        below = (y.detach() * grid_of(y).scale)[: 128 + 1]  # type: ignore[union-attr]
        assert (below == level).all(), tag
        (grad,) = torch.autograd.grad(y.sum(), given)
        assert (grad[: 128 + 1] == 0).all()
    y = site("iqreciprocal", peak=2.0)(x)
    assert (y * grid_of(y).scale)[126:131].tolist() == [-128, -128, 127, 127, 127]  # type: ignore[union-attr]


def test_range_is_that_of_the_levels_seen() -> None:
    """The running maximum is that of |f| between the lowest and the highest level; at a pole, of the levels themselves."""

    def running(tag: str, values: list[float], **call: Any) -> float:
        made = site(tag).train()
        made(set_grid(torch.tensor(values), Grid(torch.tensor(16.0), 8)), **call)
        return float(made.running("o"))

    assert running("iqsquare", [-1.5, 0.5]) == 2.25
    assert running("iqsilu", [-4.0, 0.0]) == pytest.approx(0.2785, abs=1e-3)  # the minimum is between the two
    assert running("iqreciprocal", [-2.0, 4.0]) == 0.5
    assert running("iqlog", [0.0, 4.0]) == pytest.approx(np.log(16))
    assert running("iqelu", [-1.0, 0.25], alpha=2) == pytest.approx(2 - 2 / np.e)


def test_an_empty_batch_leaves_the_range_alone() -> None:
    made = site("iqexp", peak=3.0).train()
    y = made(set_grid(torch.zeros(0, 4), Grid(torch.tensor(16.0), 8)))
    assert y.shape == (0, 4)
    assert 0 < float(made.running("o")) <= 3


def test_wide_inputs_are_narrowed_and_exact_ops_are_not() -> None:
    x = torch.tensor([-1.0, 0.5, 0.25 + 2.0**-20])
    wide = set_grid(x, Grid(torch.tensor(2.0**22), 32))
    made = site("iqsilu").train()
    assert grid_of(made(wide)).bits == WIDEST_TABLE  # type: ignore[union-attr]
    for tag in ("iqabs", "iqneg", "iqclamp"):
        y = site(tag)(set_grid(x.clone(), Grid(torch.tensor(2.0**22), 32)), **({"min": -2} if tag == "iqclamp" else {}))
        assert grid_of(y).bits == 32  # type: ignore[union-attr]
        assert torch.equal(y.abs(), x.abs())


# --- clamps, signs, GLU, PReLU: definitions over all inputs


@pytest.mark.parametrize(
    "bounds", [(-0.3, 0.7), (0, 6), (None, 0.1), (-2.55, None), (0.2, 0.1), (-1e9, 1e9), (3, float("inf"))]
)
def test_clamp_is_correctly_rounded(bounds: tuple[float | None, float | None]) -> None:
    """On the input's own grid, whether the bounds are on it or not; the gradient is 1 on the bounds too."""
    low, high = (None if b is None else float(np.float32(b)) for b in bounds)
    for n in range(-2, 12):
        x = set_grid(every_level(n).requires_grad_(), grid_of(every_level(n)))
        y = site("iqclamp")(x, min=low, max=high)
        ideal = x.detach().double().requires_grad_()
        exact = torch.clamp(ideal, low, high)
        assert torch.equal(y.double() * 2.0**n, (exact * 2.0**n + 0.5).floor().clamp(-128, 127))
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0].double(), torch.autograd.grad(exact.sum(), ideal)[0])


@pytest.mark.parametrize(("tag", "function"), [("iqrelu6", F.relu6), ("iqhardtanh", F.hardtanh)])
def test_gradient_of_hardtanh_is_0_on_the_bounds(tag: str, function: Callable[[Tensor], Tensor]) -> None:
    for n in (0, 3):
        x = set_grid(every_level(n).requires_grad_(), grid_of(every_level(n)))
        ideal = x.detach().clone().requires_grad_()
        found, expected = (torch.autograd.grad(f(t).sum(), t)[0] for f, t in ((site(tag), x), (function, ideal)))
        assert torch.equal(found, expected)


def test_signs_are_exact() -> None:
    for n in range(16):
        x = every_level(n)
        q = (x * 2.0**n).long()
        assert torch.equal((site("iqabs")(x) * 2.0**n).long(), q.abs().clamp(max=127))
        assert torch.equal((site("iqneg")(x) * 2.0**n).long(), (-q).clamp(max=127))
        assert torch.equal(site("iqsign")(x), q.sign().float())
    x = set_grid(every_level(5).requires_grad_(), grid_of(every_level(5)))
    assert torch.equal(torch.autograd.grad(site("iqabs")(x).sum(), x)[0], x.detach().sign())


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("chip", CHIPS)
def test_glu(chip: str, bits: int) -> None:
    """Every gate against its reference, and the gradient of the float function."""
    for n in (0, 4, 7, 12):
        b = every_level(n, bits)
        a = b[torch.randperm(len(b))]
        x = set_grid(torch.stack([a, b], 1).requires_grad_(), Grid(torch.tensor(2.0**n), bits))
        made = site("iqglu", chip, peak=peak_of(F.glu(x).detach()) / 2)
        y = made(x)
        s_o = float(grid_of(y).scale)  # type: ignore[union-attr]
        q = (x.detach() * 2.0**n).numpy().astype(f"int{bits}")
        ours = glu.run(q, dim=1, scale_x=2.0**n, scale_o=s_o, platform=chip, o_bits=bits)
        assert np.array_equal(ours, (y.detach() * s_o).numpy())
        ideal = x.detach().clone().requires_grad_()
        exact = F.glu(ideal)
        inside = (y.detach() * s_o).abs() < levels(bits)
        found = torch.autograd.grad(y[inside].sum(), x)[0]
        assert torch.equal(found, torch.autograd.grad(exact[inside].sum(), ideal)[0])


@pytest.mark.parametrize(("data_bits", "parameter_bits"), [(8, 8), (8, 4), (16, 8), (16, 16), (8, 16), (32, 8)])
@pytest.mark.parametrize("slopes", [(0.25,), (-0.5, 0.0, 1e-6), (3.0, 100.0, 500.0)])
def test_prelu(slopes: tuple[float, ...], data_bits: int, parameter_bits: int, tmp_path: Path) -> None:
    """Per tensor and per channel, from slopes that vanish to slopes that saturate, at every width."""
    layer = nn.PReLU(len(slopes))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(slopes))
    net = linger.init(nn.Sequential(layer), data_bits=data_bits, out_bits=data_bits, parameter_bits=parameter_bits)  # fmt: skip
    x = torch.randn(5, 3, 4, 2) * 3
    net(x).square().sum().backward()
    assert net[0].weight.grad.isfinite().all()
    assert set(net.state_dict()) == {f"0.{k}" for k in ("weight", "running_x", "running_o", "running_w", "scale_x", "scale_o", "scale_w")}  # fmt: skip
    linger.onnx.export(net.eval(), (x,), tmp_path / "net.onnx", dynamic_axes={"input": {0: "batch"}})
    assert linger.verify(net, tmp_path / "net.onnx", torch.randn(2, 3, 4, 2) * 5, quiet=True).equal


def test_prelu_gradients() -> None:
    """Those of the float layer at the fake-quantized input and slope."""
    layer = linger.init(nn.Sequential(nn.PReLU(2)))[0]
    x = torch.randint(-100, 100, (6, 2, 5)) / 32
    layer.running("x").fill_(127 / 32)
    layer.running("o").fill_(127 / 32)
    layer.eval()
    given, ideal = (x.clone().requires_grad_() for _ in range(2))
    weight = layer.weight.detach().clone().requires_grad_()
    factor = torch.randn_like(x)
    found = torch.autograd.grad((layer(given) * factor).sum(), (given, layer.weight))
    expected = torch.autograd.grad((F.prelu(ideal, weight) * factor).sum(), (ideal, weight))
    assert torch.equal(found[0], expected[0])
    assert torch.allclose(found[1], expected[1], rtol=1e-5)  # sums of floats in another order


def test_normalized_prelu() -> None:
    net = linger.normalize_layers(
        nn.Sequential(nn.PReLU(init=3.0)), normalize_weight_value=0.5, normalize_output_value=2
    )
    assert type(net[0]) is linger.NormalizePReLU
    assert net(torch.tensor([[-1.0, 9.0]])).tolist() == [[-0.5, 2.0]]
    net = linger.init(net)
    assert type(net[0]) is linger.PReLUInt
    assert net[0].normalize_weight == 0.5


NAMES = {  # site: what PyTorch calls the function
    "iqsigmoid": "sigmoid expit", "iqtanh": "tanh", "iqhardsigmoid": "hardsigmoid", "iqsoftsign": "softsign",
    "iqleakyrelu": "leaky_relu", "iqthreshold": "threshold", "iqhardswish": "hardswish", "iqelu": "elu", "iqcelu": "celu",
    "iqselu": "selu", "iqsilu": "silu", "iqgelu": "gelu", "iqmish": "mish", "iqsoftplus": "softplus",
    "iqlogsigmoid": "logsigmoid", "iqexp": "exp", "iqlog": "log", "iqlog2": "log2", "iqerf": "erf", "iqsin": "sin",
    "iqcos": "cos", "iqsquare": "square", "iqsqrt": "sqrt", "iqrsqrt": "rsqrt", "iqreciprocal": "reciprocal", "iqpow": "pow",
    "iqrelu6": "relu6", "iqhardtanh": "hardtanh", "iqclamp": "clamp clip clamp_min clamp_max", "iqabs": "abs absolute",
    "iqneg": "neg negative", "iqsign": "sign", "iqglu": "glu",
}  # fmt: skip
ROUTED_LAYERS = """Sigmoid Tanh Hardsigmoid Softsign LeakyReLU Threshold Hardswish ELU CELU SELU SiLU GELU Mish Softplus
LogSigmoid Hardtanh GLU"""


def test_no_spelling_is_missing() -> None:
    """Every function of torch, Tensor, torch.nn.functional and torch.special by these names, in place or not."""
    assert {op.site for op in OPS if op.site} == NAMES.keys()
    for tag, names in NAMES.items():
        for name in (f"{n}{end}" for n in names.split() for end in ("", "_")):
            for place in (torch, T, F, torch.special):
                call = getattr(place, name, None)
                assert call is None or BY_CALL[call].site == tag, f"{place.__name__}.{name}"
    assert {getattr(nn, name) for name in ROUTED_LAYERS.split()} == {m for op in OPS for m in op.modules}


def test_rows_are_complete() -> None:
    """Every function has a variant in these tests."""
    tables = {f.op_type for op in OPS for f in getattr(op.integer, "functions", {}).values()}
    assert {v.function.op_type for v in ALL} == tables
