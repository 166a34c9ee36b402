"""Accumulators of a given width: the bound holds for the worst input, nothing changes where it held, and it stays in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import linger
from linger.ops._weighted import WeightedInt

X = torch.randn(8, 4, 9, generator=torch.Generator().manual_seed(0))


def make(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(4, 16, 3), nn.ReLU(), nn.Conv1d(16, 16, 3, groups=4), nn.ConvTranspose1d(16, 6, 3, groups=2),
        nn.Flatten(), nn.Linear(42, 5),
    )  # fmt: skip
    return linger.calibrate(linger.init(net, **options), [X], progress=False)


def worst(layer: Any) -> int:
    """The largest |accumulator| over all inputs, from the integers: every input at the limit with the weight's sign."""
    s_x = layer.scale("x", layer.data_bits)
    w, b, s_w = layer.grids(s_x)
    q = (w.detach().double() * s_w).abs()
    rows = q.flatten(1).sum(1) if not layer.product().transposed else q.view(2, 8, 3, 3).sum((1, 3)).flatten()
    return int((rows * 128 + (b.detach().double() * s_x * s_w).abs()).max())


@pytest.mark.parametrize("observe", ["running", "learned"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [15, 16, 18, 20])
def test_the_bound_holds_and_is_used(width: int, bits: int, observe: str) -> None:
    net = make(parameter_bits=bits, observe=observe)
    before = {name: worst(m) for name, m in net.named_modules() if isinstance(m, WeightedInt)}
    proof = linger.limit_accumulators(net, width)
    limit = 2 ** (width - 1) - 1
    assert proof.peaks == {name: worst(m) for name, m in net.named_modules() if isinstance(m, WeightedInt)}
    assert max(proof.peaks.values()) <= limit
    assert set(proof.changed) == {name for name, peak in before.items() if peak > limit}
    assert all(proof.peaks[name] > 0.7 * limit for name in proof.changed), "no more is taken than has to be"
    assert linger.limit_accumulators(net, width).changed == ()


def test_layers_that_fit_stay_as_they_are() -> None:
    net = make()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert linger.limit_accumulators(net, 32).changed == ()
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_file_holds_it_and_training_goes_on(tmp_path: Path) -> None:
    net = make()
    proof = linger.limit_accumulators(net, 16)
    linger.onnx.export(net.eval(), (X,), tmp_path / "net.onnx")
    assert linger.verify(net, tmp_path / "net.onnx", X, quiet=True).equal
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net.train()(X).pow(2).mean().backward()
    optimizer.step()
    assert max(linger.limit_accumulators(net, 16).peaks.values()) < 2**15
    again = make()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(X), net.eval()(X))
    assert str(proof).splitlines()[0].endswith("of 32,767 (16 bits)")


BAD = [
    (lambda: linger.limit_accumulators(make(), 8), "width is 8, allowed are 9 to 32"),
    (lambda: linger.limit_accumulators(nn.Sequential(nn.ReLU()), 16), "without a fixed-point layer with weights"),
    (lambda: linger.limit_accumulators(make(), 9), "limit_accumulators: 0: a bias is .* LSB, allowed are 255"),
]


@pytest.mark.parametrize(("make_it", "text"), BAD)
def test_errors(make_it: Any, text: str) -> None:
    with pytest.raises(linger.LingerError, match=text):
        make_it()


@pytest.mark.parametrize("width", [16, 20])
def test_check_prints_the_proof(width: int) -> None:
    net = make()
    peaks = linger.limit_accumulators(net, width).peaks
    report = linger.check(net.eval(), X[:1], quiet=True)
    assert {layer.name: layer.peak for layer in report.layers if layer.peak} == peaks
    worst, bits = max(peaks.values()), max(peaks.values()).bit_length() + 1
    assert bits <= width
    accumulators, evaluation = report.proof
    assert (
        accumulators == f"sums: for any input at most {worst:,} ({bits} bits) with these weights, so no accumulator of "
        "32 bits can overflow"
    )
    assert evaluation == "float32: holds every partial sum exactly"
    assert "\n".join(report.proof) in str(report)
    assert f"{worst:,} │ {bits} bits" in str(report)


def test_the_proof_names_the_layers_that_it_leaves_out() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(4, 16, 3), nn.Conv1d(16, 4, 3), nn.ReLU())
    report = linger.check(net, X[:1], data_bits=16, quiet=True)
    first, second = (layer.accumulator for layer in report.layers if layer.peak)
    assert 25 < min(first, second) <= max(first, second) <= 32, "more than float32 holds, less than a register"
    accumulators, evaluation = report.proof
    assert accumulators.endswith("32 bits can overflow")
    assert evaluation.endswith(f"exactly, except in 0 ({first} bits), 1 ({second} bits)")
    norm = linger.check(nn.Sequential(nn.Conv1d(4, 4, 3), nn.GroupNorm(2, 4)), X[:1], quiet=True)
    assert norm.proof[0].endswith("so no accumulator of 32 bits can overflow, except in 1 (33 bits)")


def test_no_sums_no_proof() -> None:
    report = linger.check(nn.Sequential(nn.ReLU()), X[:1], quiet=True)
    assert report.proof == ()
    assert "sums:" not in str(report)
