"""What users do to a net while it trains: optimizers, autocast, copies, averaging, freezing, half, ranks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from attention_nets import ATTENTION_NETS
from nets import NETS
from ranks import RANKS, group
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import linger

SMALL = ("KeywordNet", "UNet")


class Mixed(nn.Module):
    """(N, 3, 8, 8) -> (N, 4): an unfused batch normalization, sites of every kind, a pool, a layer that is called twice."""

    how: bool | None = None  # use_reentrant of a checkpoint around the body, if any

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.body = Body()
        self.twice = nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body(x) if self.how is None else checkpoint(self.body, x, use_reentrant=self.how)
        y = torch.cat([self.twice(y + x), self.twice(x)], 1)
        return self.fc(F.relu6(y).mean((2, 3)))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(F.relu(self.norm(F.avg_pool2d(self.conv(x), 3, 1, 1))))
        return y * 0.5 + y


class Residual(Body):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


MAKERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **NETS, "Mixed": (Mixed, (3, 8, 8)), **{name: ATTENTION_NETS[name] for name in ("Tokens", "Conformer", "SpeechNet")},
}  # fmt: skip
TRAINED = (*SMALL, "Mixed")
EVERY = pytest.mark.parametrize("name", TRAINED)


def batches(shape: tuple[int, ...], seed: int, count: int, size: int = 4) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size, *shape, generator=g) * (1 + 0.3 * i) for i in range(count)]


def fixed(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The net in fixed point, never run."""
    make, shape = MAKERS[name]
    net = make()
    linger.trace_layers(net, net, torch.zeros(1, *shape), fuse_bn=name != "Mixed")
    return linger.init(net), shape


def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    loss = (net(x) - 1).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)


def trained(name: str, steps: int = 3) -> tuple[nn.Module, tuple[int, ...], torch.optim.Optimizer]:
    net, shape = fixed(name)
    optimizer = sgd(net)
    for x in batches(shape, 0, steps):
        step(net, optimizer, x)
    return net, shape, optimizer


def same_state(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@EVERY
def test_an_optimizer_made_before_conversion(name: str, kind: str) -> None:
    """Conversion keeps the parameter objects, so an optimizer and a scheduler made for the float net go on training it."""
    make, shape = MAKERS[name]
    net = make()
    before = {id(p) for p in net.parameters()}
    optimizer = sgd(net) if kind == "sgd" else torch.optim.Adam(net.parameters(), lr=0.01)
    (x,) = batches(shape, 1, 1)
    for _ in range(2):
        step(net, optimizer, x)
    linger.trace_layers(net, net, x)
    linger.normalize_layers(net)
    first = step(net.train(), optimizer, x)
    linger.init(net)
    assert {id(p) for p in net.parameters()} <= before
    old = {key: p.detach().clone() for key, p in net.named_parameters()}
    losses = [step(net.train(), optimizer, x) for _ in range(25)]
    assert min(losses[-5:]) < first / 2
    assert all(not torch.equal(p, old[key]) for key, p in net.named_parameters())


@pytest.mark.parametrize("name", MAKERS)
def test_eval_after_one_batch(name: str) -> None:
    """One batch in train mode, and eval gives exactly what that batch gave."""
    net, shape = fixed(name)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    (x,) = batches(shape, 2, 1)
    shared = name == "Mixed"  # its shared layer sees two ranges in one forward
    for _ in range(200 if shared else 1):
        found = net.train()(x)
    with torch.no_grad():
        assert torch.equal(net.eval()(x), found)
    with torch.inference_mode():
        assert torch.equal(net(x), found)
    step(net.train(), sgd(net), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EVERY
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """The fixed-point core runs in float32: the same integers and the same gradients inside and outside."""
    net, shape, optimizer = trained(name)
    optimizer.zero_grad()
    other = copy.deepcopy(net)
    (x,) = batches(shape, 3, 1)
    expected = net(x)
    with torch.autocast("cpu", dtype=dtype):
        found = other(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    for y in (expected, found):
        y.square().mean().backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)
    same_state(net, other)
    with torch.no_grad():
        expected = net.eval()(x)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(net(x), expected)
            assert torch.equal(net(x.to(dtype).float()), net(x.to(dtype)))


def reloaded(net: nn.Module, path: Path) -> nn.Module:
    torch.save(net, path)
    return torch.load(path, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "state_dict"])
@EVERY
def test_a_copy_goes_on_training(name: str, how: str, tmp_path: Path) -> None:
    """In the middle of training, and the copy shares nothing with the original."""
    net, shape, optimizer = trained(name)
    if how == "state_dict":
        other, _ = fixed(name)
        other.load_state_dict(net.state_dict())
    else:
        make: dict[str, Callable[[nn.Module], nn.Module]] = {
            "deepcopy": copy.deepcopy,
            "pickle": lambda m: pickle.loads(pickle.dumps(m)),
            "save": lambda m: reloaded(m, tmp_path / "net.pt"),
        }
        other = make[how](net)
    second = sgd(other)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x in batches(shape, 5, 3):
        assert step(net, optimizer, x) == step(other, second, x)
    same_state(net, other)
    frozen = {key: value.clone() for key, value in net.state_dict().items()}
    step(other, second, batches(shape, 6, 1)[0])
    assert all(torch.equal(value, frozen[key]) for key, value in net.state_dict().items())


@EVERY
def test_gradient_accumulation(name: str) -> None:
    """Backward after every small batch adds up what each of them gives."""
    net, shape, _ = trained(name)
    net.zero_grad()
    alone = copy.deepcopy(net)
    sums: dict[str, Tensor] = {}
    for x in batches(shape, 7, 3, size=2):
        net(x).square().mean().backward()
        alone.zero_grad()
        alone(x).square().mean().backward()
        for key, p in alone.named_parameters():
            assert p.grad is not None
            sums[key] = sums[key] + p.grad if key in sums else p.grad.clone()
    for key, p in net.named_parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, sums[key]), key


@pytest.mark.parametrize("use_buffers", [True, False])
@EVERY
def test_averaged_model(name: str, use_buffers: bool, tmp_path: Path) -> None:
    """An average of the parameters, with averaged ranges or the net's own, evaluates and exports; the net does not notice."""
    net, shape = fixed(name)
    optimizer = sgd(net)
    mean = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    for x in batches(shape, 8, 4):
        step(net, optimizer, x)
        mean.update_parameters(net)
    (x,) = batches(shape, 9, 1)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    module: Any = mean.module.eval()
    linger.onnx.export(module, (x,), tmp_path / "net.onnx")
    assert linger.verify(module, tmp_path / "net.onnx", x, quiet=True).equal
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with torch.no_grad():
        assert not torch.equal(module(x), net.eval()(x))


@EVERY
def test_frozen_parameters(name: str) -> None:
    """A frozen parameter gets no gradient and stays; what the others get is what they got before."""
    net, shape, optimizer = trained(name)
    optimizer.zero_grad()
    other = copy.deepcopy(net)
    frozen = [key for i, (key, _) in enumerate(other.named_parameters()) if i % 2 == 0]
    for key, p in other.named_parameters():
        p.requires_grad_(key not in frozen)
    (x,) = batches(shape, 10, 1)
    for model in (net, other):
        model(x).square().mean().backward()
    for key, p in net.named_parameters():
        found = other.get_parameter(key).grad
        assert p.grad is not None
        assert found is None if key in frozen else found is not None and torch.equal(found, p.grad)


@EVERY
def test_everything_frozen(name: str) -> None:
    """With no gradient to compute, a train-mode forward still follows ranges."""
    net, shape, _ = trained(name)
    net.requires_grad_(False)
    before = [b.clone() for b in net.buffers()]
    assert not net(batches(shape, 10, 1)[0] * 3).requires_grad
    assert any(not torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))


@EVERY
def test_double(name: str) -> None:
    """The same values in float64 parameters give the same integers, in float32 as always."""
    net, shape, _ = trained(name)
    (x,) = batches(shape, 11, 1)
    with torch.no_grad():
        expected = net.eval()(x)
        found = net.double()(x.double())
    assert found.dtype == torch.float32
    if name != "Mixed":  # there, gamma / sqrt(var + eps) is rounded differently
        assert torch.equal(found, expected)
    assert all(b.dtype == torch.float32 for key, b in net.named_buffers() if key.endswith(("running_x", "running_o")))
    with torch.no_grad():
        assert torch.equal(net.float()(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@EVERY
def test_other_parameter_types(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A net in half precision trains, and what it evaluates to is what it exports."""
    net, shape, _ = trained(name)
    net.to(dtype)
    (x,) = batches(shape, 12, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    step(net.train(), optimizer, x.to(dtype))
    assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {dtype}
    linger.onnx.export(net.eval(), (x,), tmp_path / "net.onnx")
    assert linger.verify(net, tmp_path / "net.onnx", x, quiet=True).equal


# --- two processes


def rank_main(rank: int, folder: str, name: str) -> None:
    """One of two ranks: train on its own data, save the state and the exported file."""
    with group(rank, folder):
        torch.manual_seed(rank)  # DistributedDataParallel takes the parameters of rank 0
        net, shape = fixed(name)
        parallel = nn.parallel.DistributedDataParallel(net, find_unused_parameters=False)
        optimizer = sgd(parallel)
        losses = [step(parallel, optimizer, x * (1 + rank)) for x in batches(shape, 13 + rank, 4)]
        torch.save((net.state_dict(), losses), f"{folder}/{rank}.pt")
        (x,) = batches(shape, 20, 1)
        linger.onnx.export(net.eval(), (x,), f"{folder}/{rank}.onnx")
        assert linger.verify(net, f"{folder}/{rank}.onnx", x, quiet=True).equal


@EVERY
def test_two_ranks_end_equal(name: str, tmp_path: Path) -> None:
    """Ranks that saw other data hold the same parameters, statistics and grids, and write the same file."""
    mp.spawn(rank_main, (str(tmp_path), name), nprocs=RANKS)
    (first, losses), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    assert losses != others
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()
