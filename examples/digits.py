"""What every example has: a small net for digits, its accuracy, and the options of a script. How it is trained is in the examples."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn


def make_net() -> nn.Module:
    """(N, 1, 28, 28) -> (N, 10), in float."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 7 * 7, 10),
    )  # fmt: skip


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent right of images (N, 1, 28, 28) and labels (N,), in eval mode, in which the net stays."""
    return 100 * float((net.eval()(x).argmax(1) == y).float().mean())


def options_of(doc: str | None) -> argparse.ArgumentParser:
    """``--epochs``, ``--limit`` and ``--out``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2, help="passes over the images, in every stage")
    parser.add_argument("--limit", type=int, help="images to train on")
    parser.add_argument("--out", type=Path, default=Path("digits.onnx"))
    return parser
