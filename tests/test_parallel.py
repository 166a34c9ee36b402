"""The ranges of several processes, whatever their shares, are those of one; scaled gradients in half precision."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from ranks import RANKS, group
from test_training import batches, fixed, sgd
from torch import Tensor, nn

import linger

STEPS = 6
DDP = nn.parallel.DistributedDataParallel


def shard(x: Tensor, rank: int, sizes: tuple[int, int]) -> Tensor:
    return x.split(list(sizes))[rank]


def loader(shape: tuple[int, ...], count: int = STEPS) -> list[Tensor]:
    return batches(shape, 13, count, size=8)


def ranges(net: nn.Module) -> dict[str, float]:
    return {key: float(b) for key, b in net.named_buffers() if "running_" in key}


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
    """One rank: its share of every batch, and the ranges that come of it."""
    with group(rank, folder):
        torch.manual_seed(0)
        torch.save(every_share(rank, folder, name), f"{folder}/{rank}.pt")


def every_share(rank: int, folder: str, name: str) -> list[list[dict[str, float]]]:
    """Halves, with parameters that stay and that move, then 3 and 5 of 8, then all on one rank; each of it exported."""
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
    return found


def test_ranges_are_those_of_one_process_with_all_the_data(tmp_path: Path) -> None:
    """Equal where the parameters are; where they move, gradients are summed in another order, and so are the last bits."""
    name = "KeywordNet"
    mp.spawn(sharded, (str(tmp_path), name), nprocs=RANKS)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
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
