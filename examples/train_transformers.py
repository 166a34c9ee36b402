"""A net for 5,000 handwritten digits, trained in fixed point by the Trainer of ``transformers``, stopped and resumed, and its file.

    pip install transformers accelerate
    python examples/train_transformers.py --epochs 2 --out digits.onnx

The Trainer wants a model that returns its loss: ``WithLoss`` wraps the converted net. Checkpoints are the Trainer's own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

import linger
from linger.demo_data import images
from linger.verify import Report


class WithLoss(nn.Module):
    """A converted net as the Trainer calls it."""

    def __init__(self, sample: Tensor) -> None:
        super().__init__()
        net: nn.Module = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * 7 * 7, 10),
        )  # fmt: skip
        linger.trace_layers(net, net, sample)
        self.net = linger.init(net)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(pixels)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Digits(Dataset[dict[str, Tensor]]):
    """Images and labels under the names of ``WithLoss.forward``."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixels": self.pixels[i], "labels": self.labels[i]}


def trainer(sample: Tensor, data: Digits, folder: str, epochs: int) -> Trainer:
    """A new model and a new Trainer that saves after every epoch."""
    arguments = TrainingArguments(
        output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=64, learning_rate=1e-2, save_strategy="epoch",
        report_to=[], disable_tqdm=True, logging_strategy="no", use_cpu=True, dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    return Trainer(model=WithLoss(sample), args=arguments, train_dataset=data)


def main(arguments: Sequence[str] | None = None) -> Report:
    """Train an epoch, and let a new Trainer go on from its checkpoint; the comparison of net and file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--limit", type=int, help="images to train on")
    parser.add_argument("--out", type=Path, default=Path("digits.onnx"))
    options = parser.parse_args(arguments)
    set_seed(0)
    x, y, test_x, test_y = images("mnist")
    data = Digits(x[: options.limit], y[: options.limit])
    with tempfile.TemporaryDirectory() as folder:
        trainer(x[:1], data, folder, 1).train()
        last = trainer(x[:1], data, folder, options.epochs)
        last.train(resume_from_checkpoint=True)
    net = last.model.net.eval()
    with torch.no_grad():
        right = 100 * float((net(test_x).argmax(1) == test_y).float().mean())
    print(f"fixed point: {right:.2f} %")
    linger.onnx.export(net, (test_x[:1],), options.out, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    return linger.verify(net, options.out, test_x[:200])


if __name__ == "__main__":
    main()
