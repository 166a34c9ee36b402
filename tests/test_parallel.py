"""Several processes: the same ranges as one process, files equal byte for byte, a rank that dies, sharded parameters."""

from __future__ import annotations

import copy
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_training import MAKERS, batches, fixed, sgd, step
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import linger

RANKS, STEPS, SAVED = 2, 6, 3
DDP = nn.parallel.DistributedDataParallel


def begin(rank: int, folder: str, attempt: str) -> None:
    """Join the others; the store is a file, one for every attempt."""
    if any(interface == "lo" for _, interface in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{attempt}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)


def shard(x: Tensor, rank: int, sizes: tuple[int, int]) -> Tensor:
    return x.split(list(sizes))[rank]


def loader(shape: tuple[int, ...], count: int = STEPS) -> list[Tensor]:
    return batches(shape, 13, count, size=8)


def ranges(net: nn.Module) -> dict[str, float]:
    return {key: float(b) for key, b in net.named_buffers() if "running_" in key}


def rank_main(rank: int, folder: str, name: str, work: Callable[[int, str, str], None]) -> None:
    begin(rank, folder, f"store-{work.__name__}-{name}")
    try:
        work(rank, folder, name)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run(work: Callable[[int, str, str], None], folder: Path, name: str) -> list[Any]:
    """``work`` in two processes; what each of them saved."""
    mp.spawn(rank_main, (str(folder), name, work), nprocs=RANKS)
    return [torch.load(folder / f"{work.__name__}-{rank}.pt") for rank in range(RANKS)]


def saved(found: Any, rank: int, folder: str, work: Callable[..., None]) -> None:
    torch.save(found, f"{folder}/{work.__name__}-{rank}.pt")


# --- the ranges of one process


def train(net: nn.Module, forward: nn.Module, data: list[Tensor], lr: float) -> list[dict[str, float]]:
    """The ranges after every step."""
    optimizer, found = torch.optim.SGD(net.parameters(), lr=lr), []
    for x in data:
        (forward(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(ranges(net))
    return found


def sharded(rank: int, folder: str, name: str) -> None:
    """Halves of every batch, then 3 and 5 of 8; each with parameters that stay and that move. All of it exported."""
    found, (net, shape) = [], fixed(name)
    for sizes, lr in (((4, 4), 0.0), ((4, 4), 0.01), ((3, 5), 0.0), ((0, 8), 0.0)):
        part = copy.deepcopy(net)
        data = [shard(x, rank, sizes) for x in loader(shape)]
        if 0 in sizes:  # no mean of nothing: forwards alone
            with torch.no_grad():
                found.append([(part(x), ranges(part))[1] for x in data])
        else:
            found.append(train(part, DDP(part), data, lr))
        linger.onnx.export(part.eval(), (loader(shape, 1)[0],), f"{folder}/{len(found)}-{rank}.onnx")
    saved(found, rank, folder, sharded)


def test_ranges_are_those_of_one_process_with_all_the_data(tmp_path: Path) -> None:
    """Equal where the parameters are; where they move, gradients are summed in another order, and so are the last bits."""
    name = "KeywordNet"
    found = run(sharded, tmp_path, name)
    assert found[0] == found[1]
    torch.manual_seed(0)
    net, shape = fixed(name)
    still, moved, uneven, empty = found[0]
    want = train(other := copy.deepcopy(net), other, loader(shape), 0.0)
    assert still == uneven == want
    with torch.no_grad():
        assert empty == [(net(x), ranges(net))[1] for x in loader(shape)]
    torch.manual_seed(0)
    net, _ = fixed(name)
    for a, b in zip(moved, train(net, net, loader(shape), 0.01), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for i in range(1, 5):
        assert (tmp_path / f"{i}-0.onnx").read_bytes() == (tmp_path / f"{i}-1.onnx").read_bytes()


# --- a rank that dies


def attempt(rank: int, folder: str, name: str) -> None:
    """Train from the checkpoint if there is one, save one on the way; where a file says so, rank 1 dies after that."""
    net, shape = fixed(name)
    optimizer, first, path = sgd(net), 0, f"{folder}/checkpoint.pt"
    if os.path.exists(path):
        held = torch.load(path)
        net.load_state_dict(held["net"])
        optimizer.load_state_dict(held["optimizer"])
        first = held["step"]
    parallel = DDP(net)
    for i, x in list(enumerate(loader(shape)))[first:]:
        if i == SAVED and os.path.exists(f"{folder}/die"):
            if rank == 0:
                torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": i}, path)
            dist.barrier()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        step(parallel, optimizer, shard(x, rank, (4, 4)))
    saved(net.state_dict(), rank, folder, attempt)
    linger.onnx.export(net.eval(), (loader(shape, 1)[0],), f"{folder}/net-{rank}.onnx")


@pytest.mark.slow
def test_a_rank_killed_and_resumed(tmp_path: Path) -> None:
    """The run that goes on from the checkpoint ends where the run without an accident does, file included."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    want = run(attempt, whole, "Mixed")
    (broken / "die").touch()
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        run(attempt, broken, "Mixed")
    (broken / "die").unlink()
    next(broken.glob("store-*")).unlink()
    found = run(attempt, broken, "Mixed")
    for state in (want[1], *found):
        assert all(torch.equal(value, want[0][key]) for key, value in state.items())
    files = {path.read_bytes() for folder in (whole, broken) for path in folder.glob("net-*.onnx")}
    assert len(files) == 1


# --- sharded parameters


def fully(rank: int, folder: str, name: str) -> None:
    """The parameters of the net sharded (FSDP2), some steps, then whole for export."""
    net, shape = fixed(name)
    whole, _ = fixed(name)
    whole.load_state_dict(net.state_dict())
    fully_shard(net)
    found = train(net, net, [shard(x, rank, (4, 4)) for x in loader(shape)], 0.01)
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in net.state_dict().items()}
    whole.load_state_dict(state)
    linger.onnx.export(whole.eval(), (loader(shape, 1)[0],), f"{folder}/net-{rank}.onnx")
    saved(found, rank, folder, fully)


@pytest.mark.slow
def test_fully_sharded(tmp_path: Path) -> None:
    found = run(fully, tmp_path, "KeywordNet")
    assert found[0] == found[1]
    torch.manual_seed(0)
    net, shape = fixed("KeywordNet")
    for a, b in zip(found[0], train(net, net, loader(shape), 0.01), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert (tmp_path / "net-0.onnx").read_bytes() == (tmp_path / "net-1.onnx").read_bytes()


# --- one process


@pytest.mark.parametrize("name", ["KeywordNet", "Mixed"])
def test_gradient_scaler(name: str) -> None:
    """float16 autocast with a scaled loss that is too large at first: those steps are skipped, and training goes on."""
    net, shape = fixed(name)
    optimizer, scaler = sgd(net), torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before, skipped = {k: p.detach().clone() for k, p in net.named_parameters()}, 0
    for i, x in enumerate(loader(shape) * 3):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = (net(x) - 1).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss * 1e9 if i < 3 else loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < scale
    assert skipped > 0
    assert all(p.isfinite().all() and not torch.equal(p, before[k]) for k, p in net.named_parameters())


def test_synchronized_batch_normalization_before_conversion(tmp_path: Path) -> None:
    """``SyncBatchNorm`` behind a convolution is folded like the layer that it came from."""
    make, shape = MAKERS["KeywordNet"]
    plain, (x,) = make(), batches(shape, 1, 1)
    plain(x)
    nets = [plain, nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))]
    assert any(isinstance(m, nn.SyncBatchNorm) for m in nets[1].modules())
    for i, net in enumerate(nets):
        linger.trace_layers(net, net, x)
        linger.init(net)(x)
        linger.onnx.export(net.eval(), (x,), tmp_path / f"{i}.onnx")
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in nets[1].modules())
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()
