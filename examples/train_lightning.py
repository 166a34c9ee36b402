"""A net for 5,000 handwritten digits, trained in fixed point by Lightning, stopped and resumed in the middle, and its file.

    pip install lightning
    python examples/train_lightning.py --epochs 2 --out digits.onnx

Nothing here is special to fixed point but three lines in ``Digits``: a converted net is a module like any other. Its checkpoint loads before the
first batch, for the net was traced, so that all of its state is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import linger
from linger.demo_data import images
from linger.verify import Report


class Digits(lightning.LightningModule):
    """A converted net, its loss and its optimizer."""

    def __init__(self, sample: Tensor) -> None:
        super().__init__()
        net: nn.Module = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * 7 * 7, 10),
        )  # fmt: skip
        linger.trace_layers(net, net, sample)
        self.net = linger.init(net)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def trainer(epochs: int, folder: Path) -> lightning.Trainer:
    """On the CPU, quiet, and with no files but those that are asked for."""
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> Report:
    """Train an epoch, save, and let a new model and a new trainer go on; the comparison of net and file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--limit", type=int, help="images to train on")
    parser.add_argument("--out", type=Path, default=Path("digits.onnx"))
    options = parser.parse_args(arguments)
    lightning.seed_everything(0, verbose=False)
    x, y, test_x, test_y = images("mnist")
    loader = DataLoader(TensorDataset(x[: options.limit], y[: options.limit]), 64, shuffle=True)
    model, checkpoint = Digits(x[:1]), options.out.with_suffix(".ckpt")
    first = trainer(1, options.out.parent)
    first.fit(model, loader)
    first.save_checkpoint(checkpoint)
    model = Digits(x[:1])
    trainer(options.epochs, options.out.parent).fit(model, loader, ckpt_path=checkpoint)
    with torch.no_grad():
        right = 100 * float((model.eval()(test_x).argmax(1) == test_y).float().mean())
    print(f"fixed point: {right:.2f} %")
    linger.onnx.export(model.net, (test_x[:1],), options.out, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    return linger.verify(model.net, options.out, test_x[:200])


if __name__ == "__main__":
    main()
