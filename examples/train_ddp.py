"""A net for 5,000 handwritten digits, trained in fixed point by several processes, and its file.

    torchrun --nproc_per_node 2 examples/train_ddp.py --epochs 2 --out digits.onnx

Every process sees its part of the images; ranges are shared, so that all of them hold the same grids and would write the same file.
After every epoch the first one writes ``digits.pt``; a run that is started again with the same command goes on from there.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from digits import make_net, options_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import linger
from linger.demo_data import images
from linger.verify import Report

BATCH = 32  # of every process


def train_epoch(net: nn.Module, loader: DataLoader[tuple[Tensor, ...]], optimizer: torch.optim.Optimizer) -> float:
    """One pass of this process over its part; the mean loss."""
    net.train()
    losses = []
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return sum(losses) / max(1, len(losses))


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent right over all processes, each of which takes every ``world``-th image."""
    rank, world = dist.get_rank(), dist.get_world_size()
    right = (net.eval()(x[rank::world]).argmax(1) == y[rank::world]).sum()
    dist.all_reduce(right)
    return 100 * int(right) / len(y)


def resumed(net: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> int:
    """The epoch to begin with: 0, or where the checkpoint stands, which is loaded."""
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["epoch"])


def save(net: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, path: Path) -> None:
    """Write the checkpoint beside its place first: a process that dies leaves the old one."""
    part = path.with_suffix(".part")
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, part)
    os.replace(part, path)


def run(options: argparse.Namespace) -> Report | None:
    """What every process does; the first one compares the file with the net."""
    torch.manual_seed(0)
    x, y, test_x, test_y = images("mnist")
    net = make_net()
    linger.trace_layers(net, net, x[:1])
    net = linger.init(net)
    parallel = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    data = TensorDataset(x[: options.limit], y[: options.limit])
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(data, shuffle=True, seed=0)
    loader = DataLoader(data, BATCH, sampler=sampler, drop_last=True)
    checkpoint, first = options.out.with_suffix(".pt"), dist.get_rank() == 0
    for epoch in range(resumed(net, optimizer, checkpoint), options.epochs):
        sampler.set_epoch(epoch)
        loss = train_epoch(parallel, loader, optimizer)
        right = accuracy(net, test_x, test_y)
        if first:
            save(net, optimizer, epoch + 1, checkpoint)
            print(f"epoch {epoch + 1}: loss {loss:.3f}, {right:.2f} % right")
        dist.barrier()
    if not first:
        return None
    linger.onnx.export(net.eval(), (test_x[:1],), options.out, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    return linger.verify(net, options.out, test_x[:200])


def main(arguments: Sequence[str] | None = None) -> Report | None:
    """Join the other processes, and run."""
    options = options_of(__doc__).parse_args(arguments)
    dist.init_process_group("gloo")  # "nccl", and net.cuda(rank), where there are GPUs
    try:
        return run(options)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
