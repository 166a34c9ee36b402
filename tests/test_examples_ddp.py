"""The examples of several processes and of other training libraries, started as their users start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def torchrun(out: Path, epochs: int) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--standalone", str(ROOT / "examples" / "train_ddp.py")]
    command += ["--epochs", str(epochs), "--limit", "512", "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchrun_trains_goes_on_and_exports(tmp_path: Path) -> None:
    out = tmp_path / "digits.onnx"
    said = torchrun(out, 1)
    assert said.count("epoch 1: loss") == 1
    assert "equal: 2000 elements" in said
    assert torch.load(tmp_path / "digits.pt", weights_only=True)["epoch"] == 1
    first = out.read_bytes()
    said = torchrun(out, 2)
    assert "epoch 1:" not in said
    assert "epoch 2: loss" in said
    assert out.read_bytes() != first


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_lightning", "train_transformers"])
def test_training_libraries_train_resume_and_export(name: str, tmp_path: Path) -> None:
    """They need what ``pip install -e .[examples]`` brings."""
    command = [
        sys.executable,
        str(ROOT / "examples" / f"{name}.py"),
        "--limit",
        "1024",
        "--out",
        str(tmp_path / "x.onnx"),
    ]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "equal: 2000 elements" in done.stdout
