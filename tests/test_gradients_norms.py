"""Gradients of batch normalization, alone and fused: through the statistics of a batch, and where bounds pull back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from harness import converted, inputs, spread_outputs
from test_gradients import (
    MODES,
    NORMS,
    agree,
    compare,
    gradients,
    next_forward,
    norm,
    over,
    signs,
)
from torch import Tensor, nn

import linger
from linger.ops import CASES, Case

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def spread_statistics(bn: Any) -> None:
    with torch.no_grad():
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2.0)
        if bn.weight is not None:
            bn.weight.normal_()
            bn.bias.normal_()


@pytest.mark.parametrize("bound", [None, 0.7])
@MODES
@over(NORMS)
def test_batch_norm(case: Case, training: bool, bound: float | None) -> None:
    """The gradient at alpha and beta' on their grids; in training it also goes through mean and variance."""
    net = converted(case).train(training)
    spread_statistics(net.op)
    spread_outputs(net, 2.0**5)
    net.op.normalize_weight = bound
    x = inputs(case, 8, 5, 3)
    bn = copy.deepcopy(net.op).double()
    g = signs(next_forward(net, x)[0].shape, 1)
    pull: list[Tensor] | None = None if bound is None else []

    def loss(v: Tensor) -> Tensor:
        y = norm(bn, v, training, True, pull)
        return (y * g).sum() + sum(pull or ())

    compare(case, net, x, g, loss, bn)


@pytest.mark.parametrize("bound", [None, 0.7])
@MODES
@over(NORMS)
def test_normalized_batch_norm(case: Case, training: bool, bound: float | None) -> None:
    """The range-constrained float twin, with its own clamp on the result."""
    net = nn.Sequential(case.make())
    spread_statistics(net[0])
    linger.normalize_layers(net, normalize_weight_value=bound, normalize_output_value=1.0)
    net.train(training)
    (x,) = inputs(case, 8, 5, 3)
    bn = copy.deepcopy(net[0]).double()
    g = signs(x.shape, 1)
    (found,) = gradients(net, (x,), g)
    leaf, pull = x.double().requires_grad_(), None if bound is None else []
    y = norm(bn, leaf, training, False, pull)
    ((y * torch.where(y.detach().abs() <= 1, g, 0.0)).sum() + sum(pull or ())).backward()
    agree(case, found, leaf.grad)
    for name, parameter in bn.named_parameters():
        agree(case, net[0].get_parameter(name).grad, parameter.grad)


FUSED = [case for case in CASES if "-bn" in case.name and "gamma" not in case.name]


def folded(conv: Any, bn: Any) -> tuple[Tensor, Tensor]:
    """W' = W * alpha and b' = (b - mean) * alpha + beta with alpha = gamma / sqrt(var + eps)."""
    ones = [1] * (conv.weight.dim() - 2)
    alpha = (1.0 if bn.weight is None else bn.weight) / (bn.running_var + bn.eps).sqrt()
    bias = ((0.0 if conv.bias is None else conv.bias) - bn.running_mean) * alpha
    bias = bias if bn.bias is None else bias + bn.bias
    if not conv.transposed:
        return conv.weight * alpha.reshape(-1, 1, *ones), bias
    parts = zip(conv.weight.chunk(conv.groups), alpha.chunk(conv.groups), strict=True)
    return torch.cat([w * a.reshape(1, -1, *ones) for w, a in parts]), bias


@over(FUSED)
def test_fused_layers_are_pulled_back(case: Case) -> None:
    """In training conv + bn computes as if apart; +-0.01 joins the gradients wherever W' or b' is outside (``upstream`` 6.3)."""
    layers = case.make().double()  # in float32, gradients that cancel would hide the pull
    x = inputs(case, 8, 5, 3)[0].double()
    net = nn.Sequential(copy.deepcopy(layers))
    linger.trace_layers(net, net, x)
    conv, bn = layers.double().train()
    leaf = x.clone().requires_grad_()
    y = bn(conv(leaf))
    g = signs(y.shape, 1)
    loss = (y * g).sum()
    bounds = []
    for v in folded(conv, bn):
        bounds.append(1.001 * float(v.detach().abs().median()))
        outside = v.detach().abs() > bounds[-1]
        assert outside.any()
        loss = loss + (0.01 * v.detach().sign() * v)[outside].sum()
    loss.backward()
    linger.normalize_layers(
        net, normalize_weight_value=bounds[0], normalize_bias_value=bounds[1], normalize_output_value=None
    )
    net.train()
    assert torch.equal(copy.deepcopy(net)(x), y)
    pairs = [(gradients(net, (x,), g)[0], leaf.grad)]
    pairs += [(p.grad, conv.get_parameter(key).grad) for key, p in net[0][0].conv.named_parameters()]
    pairs += [(p.grad, bn.get_parameter(key).grad) for key, p in net[0][0].bn.named_parameters()]
    assert len(pairs) > 1
    for found, expected in pairs:
        assert found is not None
        assert expected is not None
        assert (found - expected).abs().max() <= 1e-12
