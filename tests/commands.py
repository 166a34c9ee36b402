"""Nets, weights, data and files for tests of the command line, some of them damaged."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from linger.cli import app

NETS = """
import time
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.Linear(width, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


class Wide(Net):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 7, padding=3)


class Gated(Net):
    # chips differ in the tables of functions

    def forward(self, x):
        return super().forward(x).log_softmax(-1).abs()


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, y):
        return self.fc(x) + self.fc(y)


class Slow(Net):
    def forward(self, x):
        print("running", flush=True)
        time.sleep(60)
        return super().forward(x)


def broken():
    raise ValueError("no width was given")


number = 5
"""
run = CliRunner()


def fill(folder: Path) -> None:
    """Nets, weights, data and files that commands made of them."""
    (folder / "cli_nets.py").write_text(NETS)
    g = np.random.default_rng(0)
    np.save(folder / "data.npy", g.standard_normal((20, 1, 8, 8), np.float32))
    np.savez(folder / "two.npz", x=g.standard_normal((10, 4), np.float32), y=g.standard_normal((10, 4), np.float32))
    torch.manual_seed(0)
    state = {"conv.weight": torch.randn(4, 1, 3, 3), "conv.bias": torch.randn(4), "fc.weight": torch.randn(4, 4)}
    state |= {"fc.bias": torch.randn(4), "bn.weight": torch.ones(4), "bn.bias": torch.zeros(4)}
    state |= {"bn.running_mean": torch.zeros(4), "bn.running_var": torch.ones(4)}
    state |= {"bn.num_batches_tracked": torch.tensor(0)}
    save_file(state, folder / "float.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, folder / "float.pt")
    torch.save(nn.Linear(2, 2), folder / "pickled.pt")
    (folder / "text.safetensors").write_text("no weights")
    (folder / "pickle.pt").write_bytes(pickle.dumps(os.getcwd))
    (folder / "text.npy").write_text("no array")
    (folder / "text.wav").write_text("no sound")
    np.savez(folder / "none.npz")
    damage(folder)
    before = os.getcwd()
    os.chdir(folder)
    try:
        say("export cli_nets:Net --weights float.safetensors --data data.npy -o net.onnx")
        say("export cli_nets:Net --weights float.safetensors --data data.npy -o narrow.onnx --weight-bits 4")
        say("calibrate cli_nets:Net --weights float.safetensors --data data.npy -o ready.safetensors")
    finally:
        os.chdir(before)
    data = (folder / "net.onnx").read_bytes()
    (folder / "short.onnx").write_bytes(data[: len(data) // 2])


def damage(folder: Path) -> None:
    """Files that other libraries' readers stumble over in their own ways."""
    np.savez_compressed(folder / "damaged.npz", x=np.arange(1000) % 7)
    data = bytearray((folder / "damaged.npz").read_bytes())
    data[40:60] = b"\xff" * 20
    (folder / "damaged.npz").write_bytes(data)
    torch.save({"weight": torch.ones(30)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    data = bytearray((folder / "old.pt").read_bytes())
    (folder / "old.pt").write_bytes(data[: data.index(b"weight") - 1])


def say(line: str, code: int = 0) -> str:
    """Standard output of a command that ends with ``code``."""
    result = run.invoke(app, line.split())
    assert result.exit_code == code, result.output
    return result.stdout
