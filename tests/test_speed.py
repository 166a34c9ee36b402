"""What speed rests on, counted and not timed: kernels and full-size tensors per layer, saved bytes, work per layer of a net.

One loose bound on a ratio of times guards against what no count sees.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import linger
from linger import eager

SIZE, CHANNELS = 24, 16
OURS = (str(Path(linger.__file__).parent), torch.nn.modules.module.__file__)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Plain(nn.Module):
    """``depth`` convolutions with batch normalization and relu; with ``add``, each with a sum behind it."""

    def __init__(self, depth: int, add: bool = False, channels: int = CHANNELS) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(depth))
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = torch.relu(norm(conv(x)))
            x = y + x if self.add else y
        return x


def sample(batch: int = 4, channels: int = CHANNELS) -> Tensor:
    return torch.randn(batch, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def converted(net: nn.Module, x: Tensor) -> nn.Module:
    linger.trace_layers(net, net, x)
    linger.init(net)
    for _ in range(3):
        net(x)
    return net


class Kernels(TorchDispatchMode):
    """Counts the kernels that run, and the tensors of ``full`` float elements that they make anew."""

    def __init__(self, full: int) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()
        self.full, self.made = full, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ran[str(func)] += 1
        given = {t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)}
        for t in out if isinstance(out, (tuple, list)) else (out,):
            new = isinstance(t, Tensor) and t.numel() == self.full and t.untyped_storage().data_ptr() not in given
            self.made += new and t.is_floating_point()
        return out


def counts(net: nn.Module, x: Tensor, train: bool) -> tuple[int, int]:
    """(kernels, full-size float tensors made) of a training step's forward and backward, or of an eval forward."""
    with torch.no_grad():
        net.train(train)(x)  # eval forwards but the first find weights on their grids
    with Kernels(x.numel()) as seen, torch.set_grad_enabled(train):
        out = net(x)
        if train:
            out.backward(torch.ones_like(out))
    return sum(seen.ran.values()), seen.made


def per_layer(make: Callable[[int], nn.Module], train: bool, convert: bool) -> tuple[float, float]:
    """What one more layer costs: the difference of nets of 6 and 4."""
    x, found = sample(), []
    for depth in (4, 6):
        torch.manual_seed(0)
        net = make(depth)
        found.append(counts(converted(net, x) if convert else net, x, train))
    (kernels, made), (more, larger) = found
    return (more - kernels) / 2, (larger - made) / 2


STAGES = pytest.mark.parametrize(("add", "train"), [(False, True), (False, False), (True, True), (True, False)])
KERNELS = {(False, True): 66, (False, False): 15, (True, True): 113, (True, False): 32}
MADE = {(False, True): 5, (False, False): 2, (True, True): 9, (True, False): 3}


@STAGES
def test_kernels_per_layer(add: bool, train: bool) -> None:
    kernels, _ = per_layer(lambda depth: Plain(depth, add), train, convert=True)
    assert kernels <= KERNELS[add, train]


@STAGES
def test_full_size_tensors_per_layer(add: bool, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantizer makes no full-size tensor in forward and at most one in backward: float makes 6, 3, 8 and 4."""
    monkeypatch.setattr(eager, "BLOCK", 2**10)
    _, made = per_layer(lambda depth: Plain(depth, add), train, convert=True)
    assert made <= MADE[add, train]


# --- one more step of a recurrent layer

STEP_KERNELS = {  # of forward and backward together, and of a forward without a gradient
    ("LSTM", "venus"): (17, 12), ("GRU", "venus"): (19, 14), ("RNN", "venus"): (8, 6),
    ("LSTM", "arcs"): (26, 21), ("GRU", "arcs"): (28, 23), ("RNN", "arcs"): (13, 11),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "chip"), STEP_KERNELS)
def test_kernels_per_time_step(kind: str, chip: str) -> None:
    """What does not need the state before it, and what backward multiplies with, is made for many steps at once."""
    torch.manual_seed(0)
    net = linger.init(nn.Sequential(getattr(nn, kind)(5, 8)), target=chip)
    net(torch.randn(20, 4, 5))
    net.eval()
    ran = {}
    for _, count, wanted in itertools.product(range(2), (10, 20), (True, False)):  # the first time, tables are made
        net.zero_grad()
        with Kernels(0) as seen, torch.set_grad_enabled(wanted):
            out = net(torch.ones(count, 4, 5))[0]
            if wanted:
                out.sum().backward()
        ran[count, wanted] = seen.ran.total()
    found = tuple((ran[20, wanted] - ran[10, wanted]) / 10 for wanted in (True, False))
    assert found == STEP_KERNELS[kind, chip]


# --- memory


def saved(net: nn.Module, x: Tensor) -> int:
    """Bytes that a forward keeps for backward, the net's own parameters aside."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in net.parameters()} | {x.untyped_storage().data_ptr()}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = net.train()(x)
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("add", [False, True])
def test_saved_bytes(add: bool) -> None:
    """Fixed point keeps less for backward than float with its batch normalizations does, although every mask is kept here."""
    x = sample()
    plain, fixed = Plain(6, add), converted(Plain(6, add), x)
    assert saved(fixed, x) <= 1.1 * saved(plain, x)


# --- the size of the net


def steps(work: Callable[[], object]) -> int:
    """Calls of functions of linger while ``work`` runs: a count that no other load on the machine changes."""
    made = 0

    def seen(frame: Any, event: str, arg: Any) -> None:
        nonlocal made
        made += event == "call" and frame.f_code.co_filename.startswith(OURS)

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return made


def life(depth: int, folder: Path) -> dict[str, int]:
    """Calls that each stage of a net of this depth takes."""
    x, net = sample(1, 2), Plain(depth, add=True, channels=2)
    path = folder / "net.onnx"
    found = {"trace": steps(lambda: linger.trace_layers(net, net, x)), "init": steps(lambda: linger.init(net))}
    found["train"] = steps(lambda: net(x))
    net.eval()
    found["eval"] = steps(lambda: net(x))
    found["export"] = steps(lambda: linger.onnx.export(net, (x,), path))
    found["load"] = steps(lambda: linger.runtime.load(path))
    return found


def test_every_stage_is_linear_in_layers(tmp_path: Path) -> None:
    """Ten, then twenty layers more: twice the calls. The first net also pays for what happens once."""
    life(2, tmp_path)
    short, middle, long = (life(depth, tmp_path) for depth in (5, 15, 35))
    grown = {key: (long[key] - middle[key]) / (middle[key] - short[key]) for key in short}
    assert {key: ratio for key, ratio in grown.items() if not 1.9 <= ratio <= 2.1} == {}


@pytest.mark.slow
def test_300_layers(tmp_path: Path) -> None:
    """Seconds of the processor, which other programs do not take."""
    x, net = sample(1, 8), Plain(300, add=True, channels=8)
    start = time.process_time()
    linger.trace_layers(net, net, x)
    linger.init(net)
    made = time.process_time()
    net(x)
    net.eval()
    begun = time.process_time()
    linger.onnx.export(net, (x,), tmp_path / "net.onnx")
    assert made - start < 2
    assert time.process_time() - begun < 10


# --- one loose bound


def test_a_training_step_is_not_far_from_float() -> None:
    """Ratios of interleaved steps on one thread: measured 1.1 to 1.3; a full-size pass too many is not what this finds."""
    x = sample(16)
    nets, ratios = [Plain(4), converted(Plain(4), x)], []
    for _ in range(12):
        times = []
        for net in nets:
            start = time.process_time()
            net.train()(x).square().mean().backward()
            times.append(time.process_time() - start)
        ratios.append(times[1] / times[0])
    assert statistics.median(ratios) < 2.5
