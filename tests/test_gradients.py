"""Gradients: the float layer's at the values on their grids, exactly zero where something saturates or leaves its bound.

The reference is float64 text of its own. On grids, and with -1, 0 and 1 coming in from behind, every gradient of a sum
of products is an integer below 2^24 in LSB, so float32 holds it exactly and equality is demanded. Where the float
derivative divides or takes a root, float32 rounds each of a few operations by 2^-24: ``NEAR`` of the largest gradient.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import STEP, CaseNet, converted, inputs, spread_outputs
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.numerics import grid_of
from linger.ops import CASES, Case
from linger.ops._case import Holder
from linger.ops._normalize import Normalized
from linger.ops.where import PickSite

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
NEAR = 2.0**-19
PULL = float(torch.tensor(0.01))
ROUNDED = (  # float derivatives with a division, a root, or a number that is no float32
    "div", "mean", "avg", "adaptive", "bn", "elu", "celu", "glu", "log", "sqrt", "rsqrt", "reciprocal", "pow", "layernorm",
    "groupnorm", "instancenorm", "rmsnorm", "var", "std", "softmax", "softmin", "call-linear-computed",
)  # fmt: skip
CANCELLING = ("softmax-2d",)  # p * (g - sum of p * g), where the two are equal or nearly
# Numbers in a call become 8-bit integers; where that changes them, the reference has what they become.
REFERENCES: dict[str, Callable[..., Tensor]] = {
    "mul-scalar": lambda x: x * (77 / 256),
    "softmin": lambda x: F.softmax(torch.where(x > -4, -x, (x + 8 - STEP).detach()), 1),  # 4 is none of its levels
}
EXTREMES = ("max", "min")  # their operands tie on the result's grid, not on their own
PARTS = [  # calls made of several, whose results in between are on grids
    case for case in CASES
    if case.name in ("call-linear-two", "matmul-2d-right", "matmul-vector", "matmul-vector-left", "matmul-dynamic-K")
]  # fmt: skip
WIDE_PARAMETERS = ("matmul-parameter-left", "matmul-parameter-3d")  # as wide as the activation
SUMS = {"add": 1, "add-broadcast": 1, "sub": -1}
NORMS = [case for case in CASES if case.name.startswith("bn")]
PLAIN = [case for case in CASES if case not in NORMS and case not in PARTS]
WEIGHTED = [
    case for case in CASES if case.name.startswith(("conv", "transposed", "linear")) and "gamma-0" not in case.name
]
ONE_RESULT = [case for case in PLAIN if case.name.startswith(("mul", "div", "sum")) and case.name != "mul-by-0"]
SATURATING = [*WEIGHTED, *NORMS, *ONE_RESULT, *(case for case in CASES if case.name in SUMS)]
FLOATS = [case for case in WEIGHTED if "bn" not in case.name]


def over(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def power_below(v: float) -> float:
    """The largest power of two that is not above v."""
    return 2.0 ** (math.frexp(v)[1] - 1)


def weight_scale(w: Tensor) -> float:
    peak = float(w.detach().abs().max())
    return power_below(127 / peak) if peak else 256.0


def integers(v: Tensor, scale: float) -> Tensor:
    return torch.floor(v.detach().double() * scale + 0.5)


def on_grid(v: Tensor, scale: float, bits: int = 8) -> Tensor:
    return integers(v, scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) / scale


def representable(v: Tensor, scale: float, bits: int = 8) -> Tensor:
    """Where rounding alone brings v to an integer of ``bits`` bits."""
    return on_grid(v, scale, bits) * scale == integers(v, scale)


def through(v: Tensor, scale: float, bits: int = 8) -> Tensor:
    """v on its grid; the gradient goes straight through where v is representable."""
    kept = torch.where(representable(v, scale, bits), v, v.detach())
    return kept + (on_grid(v, scale, bits) - v).detach()


def signs(shape: Any, seed: int) -> Tensor:
    return torch.randint(-1, 2, tuple(shape), generator=torch.Generator().manual_seed(seed)).double()


def layer_of(net: CaseNet) -> Any:
    """The layer with parameters; None where there is none."""
    layer = net.op[0] if isinstance(net.op, nn.Sequential) else net.op
    return layer if getattr(layer, "weight", None) is not None else None


def float_layer(layer: Any, step: float) -> nn.Module:
    """torch's own layer in float64 with the weight and bias that the fixed-point one computes with."""
    new = copy.deepcopy(layer)
    new.__class__ = next(c for c in type(layer).__mro__ if c.__module__.startswith("torch.nn.modules"))
    bound = math.inf if layer.normalize_weight is None else layer.normalize_weight
    weight = layer.weight.detach().clamp(-bound, bound)
    new.weight = nn.Parameter(on_grid(weight, weight_scale(weight)))
    if getattr(layer, "bias", None) is not None:
        bound = math.inf if layer.normalize_bias is None else layer.normalize_bias
        new.bias = nn.Parameter(on_grid(layer.bias.clamp(-bound, bound), weight_scale(weight) / step, 32))
    return new


def held(net: CaseNet, case: Case, bits: int, step: float) -> nn.Module:
    """The function with parameters in float64: weights on their grids, a bias (fewer axes than another one) on the sum's."""
    assert isinstance(net.op, Holder)
    new = Holder(net.op.function, *(p.shape for p in net.op.parameters()))
    for mine, theirs in zip(new.parameters(), net.op.parameters(), strict=True):
        mine.data = theirs.detach().clone()
    parameters = list(new.parameters())
    weight = max(parameters, key=Tensor.dim)
    if case.name == "call-linear-computed":
        scale = weight_scale(torch.cat([weight, weight * 2])[1:])
        new.double().function = lambda x, w, b: F.linear(
            x, through(torch.cat([w, w * 2])[1:], scale), through(b.exp(), scale / step, 32)
        )
        return new
    scale = weight_scale(weight) * (2.0 ** (bits - 8) if case.name in WIDE_PARAMETERS else 1)
    for p in parameters:
        is_weight = p.dim() == weight.dim()
        width = (bits if case.name in WIDE_PARAMETERS else 8) if is_weight else 32
        p.data = on_grid(p.detach(), scale if is_weight else scale / step, width)
    return new


def reference(
    net: CaseNet, case: Case, step: float = STEP, bits: int = 8
) -> tuple[Callable[..., Tensor], nn.Module | None]:
    """The float computation, and its layer where it has parameters."""
    layer = layer_of(net)
    if isinstance(net.op, Holder):
        made = held(net, case, bits, step)
        return made, made
    if case.name.startswith(EXTREMES):
        site = next(m for m in net.children() if isinstance(m, PickSite))
        return lambda x, y: case.make()(*(through(v, float(site.scale("o", bits)), bits) for v in (x, y))), None
    if layer is not None:
        made = float_layer(layer, step)
        return made, made
    return REFERENCES.get(case.name, case.make()), None


def norm(bn: Any, x: Tensor, training: bool, quantized: bool = False, pull: list[Tensor] | None = None) -> Tensor:
    """x * alpha + beta', alpha = gamma / sqrt(var + eps), beta' = beta - mean * alpha, of the batch in training.

    ``quantized``: both on their grids. ``pull``: takes what bounds alpha to +-normalize_weight, a term of the loss.
    """
    dims = [d for d in range(x.dim()) if d != 1]
    mean, var = (x.mean(dims), x.var(dims, correction=0)) if training else (bn.running_mean, bn.running_var)
    alpha = (1.0 if bn.weight is None else bn.weight) / (var + bn.eps).sqrt()
    beta = (0.0 if bn.bias is None else bn.bias) - mean * alpha
    if pull is not None:
        outside = alpha.detach().abs() > bn.normalize_weight
        pull.append((PULL * alpha.detach().sign() * alpha)[outside].sum())
        alpha = torch.where(outside, alpha.detach().clamp(-bn.normalize_weight, bn.normalize_weight), alpha)
    if quantized:
        scale = weight_scale(alpha)
        alpha, beta = through(alpha, scale), through(beta, scale / STEP, 32)
    shape = 1, -1, *[1] * (x.dim() - 2)
    return x * alpha.reshape(shape) + beta.reshape(shape)


def gradients(net: nn.Module, x: tuple[Tensor, ...], g: Tensor) -> tuple[Tensor, ...]:
    """Those of sum(net(x) * g) to every input; those to the parameters are in ``.grad``."""
    leaves = tuple(t.clone().requires_grad_() for t in x)
    net.zero_grad()
    (net(*leaves) * g).sum().backward()
    return tuple(t.grad for t in leaves)  # type: ignore[misc]


def agree(case: Case, found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None
    assert expected is not None
    if case.name.startswith(ROUNDED):
        assert (found - expected).abs().max() <= NEAR * expected.abs().max()
        assert case.name in CANCELLING or torch.equal(found == 0, expected == 0)
    else:
        assert torch.equal(found.double(), expected.float().double())


def compare(
    case: Case,
    net: CaseNet,
    x: tuple[Tensor, ...],
    g: Tensor,
    loss: Callable[..., Tensor],
    ours: Any = None,
    bits: int = 8,
) -> None:
    """The gradients of sum(net(x) * g) against those of loss(x on its grid) and of the parameters of ``ours``."""
    step = STEP * 2.0 ** (8 - bits)
    found = gradients(net, x, g)
    leaves = [on_grid(t, 1 / step, bits).requires_grad_() for t in x]
    loss(*leaves).backward()
    assert bits > 8 or any(not representable(t, 1 / step, bits).all() for t in x)
    for t, leaf, gradient in zip(x, leaves, found, strict=True):
        assert leaf.grad is not None
        agree(case, gradient, torch.where(representable(t, 1 / step, bits), leaf.grad, 0.0))
    for name, parameter in () if ours is None else ours.named_parameters():
        assert net.op is not None
        agree(case, (layer_of(net) or net.op).get_parameter(name).grad, parameter.grad)


@torch.no_grad()
def next_forward(net: CaseNet, x: tuple[Tensor, ...]) -> tuple[Tensor, float]:
    """The result of the net's next forward, which this one is not, and its scale."""
    out = copy.deepcopy(net)(*x)
    grid = grid_of(out)
    assert grid is not None
    return out, float(grid.scale)


@MODES
@over(PLAIN)
def test_inside_the_range(case: Case, training: bool) -> None:
    """Where no result saturates: the float gradient at the inputs and weights on their grids, zero where an input saturates."""
    for bits in (b for b in case.bits if b <= 16):
        net = converted(case, bits).train(training)
        spread_outputs(net, 2.0**5)
        x = inputs(case, bits, 3, 3)
        function, ours = reference(net, case, STEP * 2.0 ** (8 - bits), bits)
        g = signs(next_forward(net, x)[0].shape, 1)
        compare(case, net, x, g, lambda *v: (function(*v) * g).sum(), ours, bits)  # noqa: B023


@MODES
@over(PARTS)
def test_calls_made_of_calls(case: Case, training: bool) -> None:
    """Integers so small that every result in between is exact; the last one's grid is coarse."""
    net = converted(case).train(training)
    *between, last = (m for m in net.children() if "running_o" in m._buffers)
    for site, value in [*((m, 2.0**-20) for m in between), (last, 2.0**12)]:
        site.running("o").fill_(value)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(3)
    x = tuple(torch.randint(-3, 4, (3, *s[1:]), generator=generator) * STEP for s in case.shapes)
    g = signs(next_forward(net, x)[0].shape, 1)
    found = gradients(net, x, g)
    leaves = [t.double().requires_grad_() for t in x]
    (case.make()(*leaves) * g).sum().backward()
    for leaf, gradient in zip(leaves, found, strict=True):
        agree(case, gradient, leaf.grad)


@MODES
@over(SATURATING)
def test_zero_where_results_saturate(case: Case, training: bool) -> None:
    """Nothing at all comes back from results that are far out of range, also through a batch's statistics."""
    net = converted(case).train(training)
    spread_outputs(net, 2.0**-5)
    x = inputs(case, 8, 3, 3)
    out, scale = next_forward(net, x)
    on = [on_grid(t, 1 / STEP) for t in x]
    with torch.no_grad():
        ideal = norm(net.op, on[0], training) if case in NORMS else reference(net, case)[0](*on)
    far = ((out == 127 / scale) & (ideal * scale > 140)) | ((out == -128 / scale) & (ideal * scale < -140))
    assert far.any()
    assert all((t == 0).all() for t in gradients(net, x, far.double()))
    assert all((p.grad == 0).all() for p in net.parameters() if p.grad is not None)


@MODES
@over([*WEIGHTED, *ONE_RESULT])
def test_results_partly_saturated(case: Case, training: bool) -> None:
    """Every result that saturates lets nothing through, every other one all."""
    net = converted(case).train(training)
    spread_outputs(net, 2.0**-2)
    x = inputs(case, 8, 3, 3)
    function, ours = reference(net, case)
    out, scale = next_forward(net, x)
    g = signs(out.shape, 1)
    kept = representable(function(*(on_grid(t, 1 / STEP) for t in x)), scale)
    assert 0 < int(kept.sum()) < kept.numel()
    compare(case, net, x, g, lambda *v: (through(function(*v), scale) * g).sum(), ours)


@over([case for case in CASES if case.name in SUMS])
def test_operands_saturate_before_they_are_added(case: Case) -> None:
    net, sign = converted(case), SUMS[case.name]
    spread_outputs(net, 2.0**-2)
    x = inputs(case, 8, 3, 3)
    out, scale = next_forward(net, x)
    g = signs(out.shape, 1)
    compare(case, net, x, g, lambda a, b: (through(through(a, scale) + sign * through(b, scale), scale) * g).sum())


@MODES
@over(WEIGHTED)
def test_zero_outside_normalize_data(case: Case, training: bool) -> None:
    net = converted(case).train(training)
    x = inputs(case, 8, 3, 3)
    function, ours = reference(net, case)
    with torch.no_grad():
        y = function(*(on_grid(t, 1 / STEP) for t in x))
    layer_of(net).normalize_data = bound = float(y.abs().median())
    spread_outputs(net, 2.0**5)
    inside, g = y.abs() <= bound, signs(y.shape, 1)
    compare(case, net, x, g, lambda *v: (function(*v) * torch.where(inside, g, 0.0)).sum(), ours)
    assert all((t == 0).all() for t in gradients(net, x, (~inside).double()))
    assert (layer_of(net).weight.grad == 0).all()


@MODES
@over(WEIGHTED)
def test_parameters_are_pulled_back(case: Case, training: bool) -> None:
    """Outside its bound a parameter's gradient is +-0.01, whatever comes in; inside it is that of the clamped layer."""
    net = converted(case).train(training)
    spread_outputs(net, 2.0**5)
    layer = layer_of(net)
    layer.normalize_weight = float(layer.weight.detach().abs().quantile(0.8)) if layer.weight.numel() < 2**20 else 0.01
    layer.normalize_bias = None if layer.bias is None else float(layer.bias.detach().abs().median())
    x = inputs(case, 8, 3, 3)
    _, ours = reference(net, case)
    g = signs(next_forward(net, x)[0].shape, 1)
    gradients(net, x, g)
    assert ours is not None
    (ours(*(on_grid(t, 1 / STEP) for t in x)) * g).sum().backward()
    for name, bound in (("weight", layer.normalize_weight), ("bias", layer.normalize_bias)):
        if bound is not None:
            value, expected = layer.get_parameter(name), ours.get_parameter(name).grad
            outside = value.detach().abs() > bound
            assert outside.any()
            assert not outside.all()
            agree(case, value.grad, torch.where(outside, value.detach().sign() * PULL, expected))


@over(FLOATS)
def test_normalized_layers(case: Case) -> None:
    """The range-constrained float twin: clamped parameters pulled back by +-0.01, and a clamp's own gradient behind it."""
    net = nn.Sequential(case.make())
    source = copy.deepcopy(net[0]).double()
    with torch.no_grad():
        for p in (*net.parameters(), *source.parameters()):
            p.copy_(on_grid(p, 2.0**9, 12))
    bound = float(on_grid(source.weight.abs().flatten()[:1000].quantile(0.7), 2.0**9, 12))
    x = tuple(on_grid(t, 1 / STEP) for t in inputs(case, 8, 3, 3))
    with torch.no_grad():
        limit = float(on_grid(source(*x).abs().median(), 2.0**6, 24))
    linger.normalize_layers(net, normalize_weight_value=bound, normalize_bias_value=bound, normalize_output_value=limit)
    assert isinstance(net[0], Normalized)
    g = signs(net(*(t.float() for t in x)).shape, 1)
    found = gradients(net, tuple(t.float() for t in x), g)
    outside = {n: p.detach().abs() > bound for n, p in source.named_parameters()}
    pulls = {n: p.detach().sign() * PULL for n, p in source.named_parameters()}
    with torch.no_grad():
        for p in source.parameters():
            p.clamp_(-bound, bound)
    leaves = [t.clone().requires_grad_() for t in x]
    y = source(*leaves)
    (y * torch.where(y.detach().abs() <= limit, g, 0.0)).sum().backward()
    for leaf, gradient in zip(leaves, found, strict=True):
        agree(case, gradient, leaf.grad)
    for name, p in source.named_parameters():
        assert p.grad is not None
        agree(case, net[0].get_parameter(name).grad, torch.where(outside[name], pulls[name], p.grad))


def test_relu6_at_its_bounds() -> None:
    """At 0 and at 6, where values on a grid often are, nothing comes back: as in the float layer."""
    net = linger.init(nn.Sequential(nn.ReLU6()))
    x = torch.tensor([-1.0, 0.0, 0.0625, 3.0, 5.9375, 6.0, 7.0])
    net[0].running("x").fill_(8.0)
    found = gradients(net.eval(), (x,), torch.ones(7))
    assert found[0].tolist() == [0, 0, 1, 1, 1, 0, 0]
