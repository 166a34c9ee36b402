"""Learned ranges: gradients against closed forms and numbers, their start, their checkpoints, and the grids they make."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.numerics import best_weight_scale, fake_quant, levels, scale_from_running
from linger.ops import IntModule
from linger.ops._learned import KINDS, _LearnedQuant
from linger.training import thresholds

KIND = {"learned": "log2_", "lsq": "step_"}


class Net(nn.Module):
    """A weighted layer, a sum, a product, batch normalization alone, a matrix product, a normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.norm, self.fc = nn.LayerNorm(36), nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        y = self.bn(y + y * 0.3).flatten(2)
        return self.fc(self.norm(y) + (y @ y.transpose(1, 2)) @ y)


X = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))
LEARNED = {
    "conv.o", "conv.w", "bn.o", "norm.o", "fc.o", "fc.w", "function_bmm_0.o", "function_bmm_1.o",
    "iqmul__default_index_0.o", "iqadd__default_index_1.o", "iqadd__default_index_2.o",
}  # fmt: skip


def fixed(observe: str = "learned", calibrated: bool = True, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    linger.trace_layers(net, net, X)
    linger.init(net, observe=observe, **options)
    return linger.calibrate(net, [X], progress=False) if calibrated else net


def learned(net: nn.Module) -> dict[str, float]:
    return {name: p.item() for name, p in thresholds(net)}


# --- gradients


def reference(x: Tensor, range_: Tensor, step: Tensor, bits: int) -> Tensor:
    """Quantization as the papers write it: rounding straight through, clamped in units of the step."""
    v = x / step
    rounded = v + (torch.floor(v + 0.5) - v).detach()
    return torch.clamp(rounded, -levels(bits) - 1, levels(bits)) * step


def gradients(kind: str, x: Tensor, scale: float, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(to x, to the range) of ours and of ``reference`` in float64."""
    weight = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view_as(x)
    s = torch.tensor(scale, dtype=torch.float64)
    ours, p = x.clone().requires_grad_(), torch.zeros((), requires_grad=True)
    (_LearnedQuant.apply(ours, p, s, s, bits, None, kind == "tqt") * weight).sum().backward()
    theirs = x.clone().requires_grad_()
    q = torch.tensor(-math.log2(scale) if kind == "tqt" else 1 / scale, dtype=torch.float64, requires_grad=True)
    step = 2**q if kind == "tqt" else q
    (reference(theirs, q, step, bits) * weight).sum().backward()
    g = 1.0 if kind == "tqt" else 1 / math.sqrt(x.numel() * levels(bits))
    return ours.grad, p.grad, theirs.grad, q.grad * g  # type: ignore[return-value, operator]


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("reach", [0.3, 1.0, 5.0], ids=["inside", "full", "saturated"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_papers(kind: str, reach: float, bits: int) -> None:
    scale = 2.0 ** (bits - 3)
    x = torch.linspace(-1, 1, 999, dtype=torch.float64) * reach * 4
    to_x, to_range, want_x, want_range = gradients(kind, x, scale, bits)
    assert torch.equal(to_x, want_x)
    torch.testing.assert_close(to_range.double(), want_range, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_what_saturates_is_the_numerical_one(kind: str) -> None:
    """Where everything saturates, the output is smooth in the range: n times the step."""
    x = torch.tensor([-9.0, 7.0, 8.0, -20.0], dtype=torch.float64)
    weight = torch.linspace(-1, 2, 4, dtype=torch.float64)

    def loss(p: float) -> float:
        step = 2.0**p if kind == "tqt" else p
        return float((x.sign().clamp_min(0) * 7 - (x < 0) * 8.0).mul(step).mul(weight).sum())

    p, h = (-3.0, 1e-6) if kind == "tqt" else (0.125, 1e-7)
    numerical = (loss(p + h) - loss(p - h)) / (2 * h) * (1.0 if kind == "tqt" else 1 / math.sqrt(4 * 7))
    assert float(gradients(kind, x, 8.0, 4)[1]) == pytest.approx(numerical, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_form(kind: str) -> None:
    """step 1/4: 0.3 is 1.2 steps and rounds to 1; 9 saturates at 7, -9 at -8 of 4 bits."""
    x = torch.tensor([0.3, 9.0, -9.0], dtype=torch.float64)
    weight = torch.linspace(-1, 2, 3, dtype=torch.float64)
    total = float((torch.tensor([1 - 1.2, 7.0, -8.0], dtype=torch.float64) * weight).sum())
    want = total * math.log(2) / 4 if kind == "tqt" else total / math.sqrt(3 * 7)
    assert float(gradients(kind, x, 4.0, 4)[1]) == pytest.approx(want, rel=1e-6)


def test_no_gradient_where_something_else_decides_the_grid() -> None:
    p = torch.zeros((), requires_grad=True)
    x = torch.randn(9, requires_grad=True)
    _LearnedQuant.apply(x, p, torch.tensor(4.0), torch.tensor(8.0), 8, None, True).sum().backward()
    assert p.grad == 0
    assert torch.equal(x.grad, torch.ones(9))  # type: ignore[arg-type]


# --- in a net


@pytest.mark.parametrize("observe", KIND)
def test_which_ranges_are_learned_and_that_each_gets_a_gradient(observe: str) -> None:
    net = fixed(observe).train()
    names = {name.replace("_linger_round_tensor_", "").replace(KIND[observe], "") for name in learned(net)}
    assert names == LEARNED
    net(X).pow(2).sum().backward()
    assert [name for name, p in thresholds(net) if p.grad is None or p.grad == 0 or not p.grad.isfinite()] == []


@pytest.mark.parametrize("observe", KIND)
def test_learned_ranges_start_where_calibration_put_them(observe: str) -> None:
    net, plain = fixed(observe), fixed("running")
    with torch.no_grad():
        assert torch.equal(net.eval()(X), plain.eval()(X))
    for name, module in net.named_modules():
        if isinstance(module, IntModule) and "o" in module.learned_names():
            other: Any = plain.get_submodule(name)
            assert module.scale("o", module.out_bits) == other.scale("o", module.out_bits)
    assert 2 ** learned(fixed())["conv.log2_w"] == pytest.approx(
        float(levels(8) / best_weight_scale(plain.conv.weight.detach(), 8))
    )


@pytest.mark.parametrize("observe", KIND)
def test_training_forward_equals_eval(observe: str) -> None:
    net = fixed(observe)
    net.bn.momentum = 1.0
    train = net.train()(X).detach()
    net.bn.momentum = 0.0
    net.eval()
    # the running variance is the biased one, which the batch was normalized with
    assert torch.equal(net(X).detach(), train)


def test_a_second_calibration_starts_anew_and_a_failed_one_changes_nothing() -> None:
    net, want = fixed(), learned(fixed())
    linger.calibrate(net, [X * 100], progress=False)
    loud = learned(net)
    assert loud["conv.log2_o"] > want["conv.log2_o"] + 5
    with pytest.raises(linger.LingerError, match="is nan"):
        linger.calibrate(net, [X, X * torch.nan], progress=False)
    assert learned(net) == loud
    net.bn.momentum = 0.0
    net.train()(X)
    assert learned(net) == loud
    linger.calibrate(net, [X], progress=False)
    assert learned(net) == want


def test_without_calibration_the_first_batch_is_the_start() -> None:
    net, plain = fixed(calibrated=False), fixed("running", calibrated=False)
    with pytest.raises(linger.LingerError, match="param_groups: conv: the learned range 'o' has no value yet"):
        linger.param_groups(net)
    net.train()(X)
    plain.train()(X)
    assert net.conv.scale("o", 8) == plain.conv.scale("o", 8)
    before = learned(net)
    net(X * 50)
    assert learned(net) == before, "data move nothing any more"


@pytest.mark.parametrize("observe", KIND)
def test_an_optimizer_moves_them_and_eval_follows(observe: str, tmp_path: Path) -> None:
    net = fixed(observe, parameter_bits=4).train()
    before = learned(net)
    groups = linger.param_groups(net, lr=1e-3, threshold_lr=0.5, weight_decay=0.1)
    assert groups[0]["weight_decay"] == 0.1
    assert {g["weight_decay"] for g in groups[1:]} == {0.0}
    assert sum(len(g["params"]) for g in groups) == len(list(net.parameters()))
    optimizer = torch.optim.Adam(groups)
    for _ in range(3):
        optimizer.zero_grad()
        net(X).pow(2).mean().backward()
        optimizer.step()
    assert all(value != before[name] for name, value in learned(net).items())
    net.eval()
    for module in net.modules():
        if isinstance(module, IntModule) and "o" in module.learned_names():
            assert module.scale("o", module.out_bits) == scale_from_running(module.range_of("o"), module.out_bits)
    linger.onnx.export(net, (X,), tmp_path / "net.onnx")
    assert linger.verify(net, tmp_path / "net.onnx", X, quiet=True).equal


def test_a_weight_beyond_its_learned_range_saturates() -> None:
    net = fixed(parameter_bits=4)
    conv: Any = net.conv
    with torch.no_grad():
        conv.log2_w.fill_(-2.0)
        conv.weight.copy_(torch.linspace(-1, 1, conv.weight.numel()).view_as(conv.weight))
    w, _, s_w = (t.detach() for t in conv.grids(conv.scale("x", 8)))
    assert float(s_w) == float(scale_from_running(torch.tensor(0.25), 4))
    assert torch.equal(w, fake_quant(conv.weight, s_w, 4))
    assert float(w.max() * s_w) == 7


# --- checkpoints


@pytest.mark.parametrize("observe", KIND)
def test_checkpoints(observe: str) -> None:
    net = fixed(observe)
    with torch.no_grad():
        for _, p in thresholds(net):
            p.mul_(1.5)
    net.eval()
    state = net.state_dict()
    again = fixed(observe, calibrated=False)
    again.load_state_dict(state)
    assert torch.equal(again.eval()(X), net(X))
    assert learned(again) == learned(net)
    plain = fixed("running")
    plain.load_state_dict(state)
    assert torch.equal(plain.eval()(X), net(X)), "a net that does not learn ranges keeps the loaded ones"
    assert not any(p.requires_grad for _, p in thresholds(plain))
    copied = copy.deepcopy(net)
    assert torch.equal(copied(X), net(X))


@pytest.mark.parametrize("observe", KIND)
def test_a_checkpoint_without_learned_ranges_starts_them(observe: str) -> None:
    plain, net = fixed("running"), fixed(observe, calibrated=False)
    net.load_state_dict(plain.state_dict())
    assert torch.equal(net.eval()(X), plain.eval()(X))
    linger.param_groups(net)


@pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning"  # PyTorch's tracer does
)
@pytest.mark.parametrize("observe", KIND)
def test_compiled_in_one_graph(observe: str) -> None:
    eager = fixed(observe).train()
    eager.bn.momentum = 0.0
    net = copy.deepcopy(eager)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for which in (eager, compiled):
        which(X).pow(2).mean().backward()
    assert torch.equal(compiled(X), eager(X))
    for (name, a), (_, b) in zip(thresholds(eager), thresholds(net), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_attention_reads_a_layers_weight_without_calling_it() -> None:
    """Such a layer has no range of its own to learn, to measure or to search for."""
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 8)
    linger.trace_layers(net, net, x)
    linger.calibrate(linger.init(net, observe="learned"), [x], progress=False)
    linger.param_groups(net)
    net.train()(x).pow(2).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    assert len(learned(net)) > 8
    rows = linger.sensitivity(net, [x], progress=False).rows
    assert {r.layer for r in rows} == {"all layers", "linear1", "linear2", "norm1", "norm2"}
    assert "self_attn.out_proj" not in linger.search(net, [x], 10_000, progress=False).layers


def test_keys_of_other_nets_do_not_change() -> None:
    assert [k for k in fixed("running").state_dict() if "log2_" in k or "step_" in k] == []


def test_the_option() -> None:
    with pytest.raises(linger.LingerError, match="init: observe is 'max', allowed are running, learned, lsq"):
        fixed("max")
    assert len(linger.param_groups(fixed("running"))) == 1
