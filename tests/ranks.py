"""Two processes of a test, on one thread each, over gloo or, with a GPU for each, over nccl."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

RANKS = 2


@contextmanager
def group(rank: int, folder: str, store: str = "store", backend: str = "gloo") -> Iterator[None]:
    """The process group of one rank, which leaves together with the others; ``store``: a file, one for every attempt."""
    if any(interface == "lo" for _, interface in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"file://{folder}/{store}", rank=rank, world_size=RANKS)
    yield
    dist.barrier()
    dist.destroy_process_group()
