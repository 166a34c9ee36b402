"""Two real processes over gloo: ranges, statistics, uneven data, a rank that dies, sharded parameters."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import RANKS, group
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import linger
from linger.ops import CASES, IntModule

KILLED = 7  # exit code of the rank that dies


class Net(nn.Module):
    """(N, 3, 8, 8) -> (N, 4), without batch normalization: what a rank computes does not depend on the others' data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv1(x))
        y = y + torch.relu(self.conv2(y))
        return self.fc(y.mean((2, 3)))


class WithNorms(nn.Module):
    """(N, 3, 8, 8) -> (N, 4): one batch normalization behind a convolution, one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.alone, self.fc = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.BatchNorm2d(8),
            nn.Linear(8, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        return self.fc(self.alone(y * y).mean((2, 3)))


def fixed(make: Callable[[], nn.Module] = Net, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = make()
    linger.trace_layers(net, net, torch.randn(2, 3, 8, 8))
    return linger.init(net, **options)


def data(steps: int, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, 3, 8, 8, generator=generator) * (1 + i) for i in range(steps)]


def half(x: Tensor, rank: int) -> Tensor:
    return x.chunk(RANKS)[rank]


def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


# --- what a rank does; two processes go through all of it, since starting them takes longer than that


def first_batch(rank: int, folder: Path) -> Any:
    """Ranges after half of a batch on each rank."""
    net = fixed()
    net(half(data(1)[0], rank))
    return net.state_dict()


def halves(rank: int, folder: Path) -> Any:
    """Three steps on half of the data each, and a file."""
    net = fixed()
    parallel = DistributedDataParallel(net, find_unused_parameters=False)
    optimizer = sgd(parallel)
    for x in data(3):
        step(parallel, optimizer, half(x, rank))
    linger.onnx.export(net.eval(), (data(1)[0],), folder / f"{rank}.onnx")
    return net.state_dict()


def synced(rank: int, folder: Path) -> Any:
    """The same with batch normalization over all ranks."""
    net = fixed(lambda: nn.SyncBatchNorm.convert_sync_batchnorm(WithNorms()))
    parallel = DistributedDataParallel(net)
    optimizer = sgd(parallel)
    for x in data(3):
        step(parallel, optimizer, half(x, rank))
    return net.state_dict()


def learned(rank: int, folder: Path) -> Any:
    """Three steps with learned thresholds that the first batch starts, in groups of their own; and a file."""
    net = fixed(observe="learned")
    net(half(data(1)[0], rank))
    parallel = DistributedDataParallel(net, find_unused_parameters=False)
    optimizer = torch.optim.SGD(linger.param_groups(net, lr=0.05), momentum=0.9)
    for x in data(3):
        step(parallel, optimizer, half(x, rank))
    linger.onnx.export(net.eval(), (data(1)[0],), folder / f"learned{rank}.onnx")
    return net.state_dict()


def uneven(rank: int, folder: Path, held: bool) -> Any:
    """Rank 1 has two batches more than rank 0: (steps taken, the error, the state)."""
    net = fixed()
    net(data(1)[0])
    if held:
        linger.hold_ranges(net)
    parallel = DistributedDataParallel(net)
    optimizer, taken, said = sgd(parallel), 0, ""
    try:
        with parallel.join(throw_on_early_termination=not held):
            for x in data(2 + 2 * rank):
                step(parallel, optimizer, half(x, rank))
                taken += 1
    except RuntimeError as error:
        said = str(error)
    return taken, said, net.state_dict()


def sharded(rank: int, folder: Path) -> Any:
    """Three steps with parameters in shards: (the gathered state, a result, the result after loading that state)."""
    net: Any = fixed()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in (net.conv1, net.conv2, net.fc, net):
        fully_shard(layer, mesh=mesh)
    optimizer = sgd(net)
    for x in data(3):
        step(net, optimizer, half(x, rank))
    state = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    net.eval()
    with torch.no_grad():
        before = net(data(1)[0]).clone()  # a tensor without its grid
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(net, dict(state), options=options)
        return state, before, net(data(1)[0]).clone()


SCENARIOS: dict[str, Callable[[int, Path], Any]] = {
    "first batch": first_batch,
    "halves": halves,
    "synced": synced,
    "learned": learned,
    "held": functools.partial(uneven, held=True),
    "sharded": sharded,
    "following": functools.partial(uneven, held=False),
}


def everything(rank: int, folder: str) -> None:
    """One rank: all scenarios, and what they give."""
    with group(rank, folder):
        found = {name: scenario(rank, Path(folder)) for name, scenario in SCENARIOS.items()}
        torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Scenario -> what each rank gave, and the folder."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(everything, (str(folder),), nprocs=RANKS)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(RANKS))
    return {name: (first[name], second[name]) for name in first} | {"folder": folder}


def trained_alone(make: Callable[[], nn.Module]) -> nn.Module:
    """One process that takes three steps on whole batches."""
    net = fixed(make)
    optimizer = sgd(net)
    for x in data(3):
        step(net, optimizer, x)
    return net


# --- half a batch on each of two ranks is the batch


def test_the_first_batch_gives_the_same_maxima_to_the_bit(found: Any) -> None:
    net = fixed()
    net(data(1)[0])
    for state in found["first batch"]:
        assert_equal(state, net.state_dict())


def test_two_halves_train_like_one_batch(found: Any) -> None:
    """The same grids, parameters that differ by the order of a sum only, and two files of the same bytes."""
    first, second = found["halves"]
    assert_equal(first, second)
    alone = trained_alone(Net).state_dict()
    scales = [key for key in alone if "scale_" in key]
    assert len(scales) > 8
    assert_equal({k: alone[k] for k in scales}, {k: first[k] for k in scales})
    for key, value in alone.items():
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-6)
    files = [(found["folder"] / f"{rank}.onnx").read_bytes() for rank in range(RANKS)]
    assert files[0] == files[1]


def test_sync_batchnorm_is_batchnorm_of_the_whole_batch(found: Any) -> None:
    first, second = found["synced"]
    assert_equal(first, second)
    for key, value in trained_alone(WithNorms).state_dict().items():
        torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_sync_batchnorm_folds_normalizes_and_exports(tmp_path: Path) -> None:
    """On one rank it is a batch normalization in every stage, and the file says so."""
    nets = {}
    kinds = {"plain": WithNorms, "sync": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(WithNorms())}
    for name, make in kinds.items():
        torch.manual_seed(0)
        net, x = make(), data(1)[0]
        linger.trace_layers(net, net, x)
        linger.normalize_layers(net)
        net(x).sum().backward()
        net = linger.init(net)
        net(x)
        linger.onnx.export(net.eval(), (x,), tmp_path / f"{name}.onnx")
        assert linger.verify(net, tmp_path / f"{name}.onnx", x, quiet=True).equal
        nets[name] = net
    assert type(nets["sync"].alone) is linger.SyncBatchNormInt
    assert_equal(nets["plain"].state_dict(), nets["sync"].state_dict())
    assert (tmp_path / "plain.onnx").read_bytes() == (tmp_path / "sync.onnx").read_bytes()


def test_learned_thresholds_are_the_same_on_every_rank(found: Any) -> None:
    """They start from the batches of all ranks, move with the averaged gradients, and give two files of the same bytes."""
    first, second = found["learned"]
    assert_equal(first, second)
    start = fixed(observe="learned")
    start(data(1)[0])
    moved = [k for k, v in start.state_dict().items() if ".log2_" in k and not torch.equal(v, first[k])]
    assert len(moved) >= 6
    files = [(found["folder"] / f"learned{rank}.onnx").read_bytes() for rank in range(RANKS)]
    assert files[0] == files[1]


# --- ranks with more data than others


def test_uneven_data_with_held_ranges(found: Any) -> None:
    """The rank with more batches takes all of them, and both end with the same parameters."""
    (taken, said, first), (others, _, second) = found["held"]
    assert (taken, others, said) == (2, 4, "")
    assert_equal(first, second)


def test_uneven_data_with_ranges_that_follow_stops_on_every_rank(found: Any) -> None:
    """Nothing waits for a rank that is done, if the user asks PyTorch for that."""
    for taken, said, _ in found["following"]:
        assert taken == 2
        assert "exhausted" in said


# --- parameters in shards


def test_fully_sharded_parameters(found: Any, tmp_path: Path) -> None:
    """A net in shards trains as DistributedDataParallel does, and its gathered state is a checkpoint like any other."""
    (state, before, after), (_, other, _) = found["sharded"]
    assert torch.equal(before, after)
    assert torch.equal(before, other)
    assert_equal(state, found["halves"][0])
    net, x = fixed(), data(1)[0]
    net.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert torch.equal(net.eval()(x), before)
    linger.onnx.export(net, (x,), tmp_path / "net.onnx")
    assert linger.verify(net, tmp_path / "net.onnx", x, quiet=True).equal


# --- a rank that dies


def resumable(rank: int, folder: str, steps: int, dies_at: int, start: int) -> None:
    """Train to ``steps``, saving after each; rank 1 dies in the middle of step ``dies_at``."""
    with group(rank, folder, f"store{start}"):
        net = fixed()
        optimizer = sgd(net)
        if start:
            saved = torch.load(f"{folder}/checkpoint{start}.pt")
            net.load_state_dict(saved["net"])
            optimizer.load_state_dict(saved["optimizer"])
        parallel = DistributedDataParallel(net)
        for i, x in enumerate(data(steps)[start:], start):
            if i == dies_at and rank == 1:
                os._exit(KILLED)
            step(parallel, optimizer, half(x, rank))
            if rank == 0:
                torch.save(
                    {"net": net.state_dict(), "optimizer": optimizer.state_dict()}, f"{folder}/checkpoint{i + 1}.pt"
                )
            dist.barrier()
        torch.save(net.state_dict(), f"{folder}/{rank}.pt")


def test_a_killed_rank_is_resumed_from_a_checkpoint(found: Any, tmp_path: Path) -> None:
    """Both start again from the last checkpoint, and end where a run ends that nothing happened to."""
    with pytest.raises(mp.ProcessExitedException) as error:
        mp.spawn(resumable, (str(tmp_path), 3, 2, 0), nprocs=RANKS)
    assert error.value.exit_code == KILLED
    assert (tmp_path / "checkpoint2.pt").exists()
    assert not (tmp_path / "checkpoint3.pt").exists()
    mp.spawn(resumable, (str(tmp_path), 3, -1, 2), nprocs=RANKS)
    for rank in range(RANKS):
        assert_equal(torch.load(tmp_path / f"{rank}.pt"), found["halves"][0])


def test_every_key_of_a_state_dict_is_an_attribute_with_memory_of_its_own() -> None:
    """Savers of shards look them up on the modules."""
    makes = [nn.Sequential(case.make()) for case in CASES if isinstance(case.make(), nn.Module)]
    makes += [nn.Sequential(make(4, 4, num_layers=3, bidirectional=True)) for make in (nn.LSTM, nn.GRU, nn.RNN)]
    looked = 0
    for net in makes:
        for module in linger.init(net).modules():
            if isinstance(module, IntModule):
                for key, value in module.state_dict().items():
                    if "." not in key:
                        assert torch.equal(getattr(module, key).detach(), value), key
                        looked += 1
        memory = [v.data_ptr() for v in net.state_dict().values() if v.numel()]
        assert len(memory) == len(set(memory)), "safetensors takes no two names of one memory"
    assert looked > 300
    with pytest.raises(AttributeError, match="scale_iw"):
        fixed().conv1.scale_iw  # noqa: B018
