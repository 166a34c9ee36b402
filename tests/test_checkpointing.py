"""Gradient checkpointing, ``torch.utils.checkpoint``: forwards that are repeated in the middle of backward."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from test_training import Residual, batches, fixed, same_state, sgd, step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import linger
from linger import LingerError

HOW = pytest.mark.parametrize("how", [True, False], ids=["reentrant", "saved-tensors"])


@HOW
def test_gradient_checkpointing(how: bool) -> None:
    """A forward that is repeated in backward sees the grids of the first one, and moves no range a second time."""
    plain, shape = fixed("Mixed")
    repeating = copy.deepcopy(plain)
    repeating.how = how
    optimizers = [sgd(plain), sgd(repeating)]
    for x in batches(shape, 4, 4):
        losses = [step(net, o, x) for net, o in zip((plain, repeating), optimizers, strict=True)]
        assert losses[0] == losses[1]
        for (key, p), q in zip(plain.named_parameters(), repeating.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert torch.equal(p.grad, q.grad), key
        same_state(plain, repeating)


def test_checkpointing_that_drops_grids_says_so() -> None:
    """``use_reentrant=True`` hands bare tensors to the repeated forward: a sum cannot know the grid its operand had."""
    net, shape = fixed("Mixed")
    net.body.__class__ = Residual
    net(batches(shape, 4, 1)[0])
    net.how = True
    loss = net(batches(shape, 4, 1)[0]).square().mean()
    with pytest.raises(LingerError, match=r"an operand lost its grid.*pass use_reentrant=False"):
        loss.backward()
    net.how = False
    net(batches(shape, 4, 1)[0]).square().mean().backward()


class Stages(nn.Module):
    """(N, 3, 8, 8) -> (N, 4) through a plain ``nn.Sequential``; ``how`` and ``what`` say what is checkpointed."""

    how: bool | None = None
    what = "body"

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        inner = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 1, 1))
        self.body = nn.Sequential(inner, nn.Conv2d(6, 6, 1), nn.Sigmoid(), nn.Dropout(0.0), nn.Conv2d(6, 6, 1))
        self.relu = nn.ReLU()
        self.fc = nn.Linear(6, 4)

    def method(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mean = self.stem(x).relu().mean()
        given: dict[str, Callable[..., Tensor]] = {
            "body": self.body, "method": self.method, "relu": self.relu, "lambda": lambda t: self.body(F.relu(t)),
        }  # fmt: skip
        x, function = self.stem(x) - mean, given[self.what]
        y = function(x) if self.how is None else checkpoint(function, x, use_reentrant=self.how)
        return self.fc(y.mean((2, 3)))


@HOW
@pytest.mark.parametrize("whole", [False, True])
def test_checkpointing_a_sequential(how: bool, whole: bool) -> None:
    """Its layers hand on grids when it is repeated alone, outside of any forward."""
    plain = linger.init(Stages())
    x = batches((3, 8, 8), 4, 1)[0]
    plain(x)
    repeating = copy.deepcopy(plain)
    if whole:
        loss = checkpoint(repeating, x.requires_grad_(), use_reentrant=how).square().mean()
    else:
        repeating.how = how
        loss = repeating(x).square().mean()
    other = plain(x).square().mean()
    for value in (loss, other):
        value.backward()
    assert torch.equal(loss, other)
    for (key, p), q in zip(plain.named_parameters(), repeating.named_parameters(), strict=True):
        assert torch.equal(p.grad, q[1].grad), key  # type: ignore[arg-type]
    same_state(plain, repeating)


def gradients(net: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Of the input and of every parameter."""
    net.zero_grad()
    x = batches((3, 8, 8), 4, 1)[0].requires_grad_()
    run(x).square().mean().backward()
    return [t.grad for t in (x, *net.parameters()) if t.grad is not None]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) > 2 and all(map(torch.equal, found, expected))


@HOW
@pytest.mark.parametrize("part", ["net", "body"])
def test_checkpointing_a_sequential_in_eval(how: bool, part: str) -> None:
    """As a part that is frozen is trained through."""
    net = linger.init(Stages())
    gradients(net, net)
    net.get_submodule("" if part == "net" else part).eval()
    copy_ = copy.deepcopy(net)
    copy_.how = how
    assert equal(gradients(copy_, copy_), gradients(net, net))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_checkpointing_inside_of_something_that_hooks(nested: bool, train: bool) -> None:
    """It hands tensors with grids to functions of its own, which are no calls of the net's."""
    plain = linger.init(Stages())
    gradients(plain, plain)
    repeating = copy.deepcopy(plain.train(train))
    repeating.how = True

    def run(x: Tensor) -> Tensor:
        if nested:
            return checkpoint(repeating, x, use_reentrant=False)
        with torch.autograd.graph.save_on_cpu():
            return repeating(x)

    assert equal(gradients(repeating, run), gradients(plain, plain))


@HOW
@pytest.mark.parametrize(("what", "found"), [("method", "tanh"), ("lambda", "relu"), ("relu", "relu")])
def test_checkpointing_a_function_is_refused(how: bool, what: str, found: str) -> None:
    """Repeated outside of the forward, its calls would be float ones: other gradients, and with ``use_reentrant`` no word of it."""
    net = linger.init(Stages())
    net.what = what
    x = batches((3, 8, 8), 4, 1)[0]
    net(x)
    net.how = how
    with pytest.raises(
        LingerError, match=rf"found {found} in a function given to torch.utils.checkpoint, allowed are modules"
    ):
        net(x)
