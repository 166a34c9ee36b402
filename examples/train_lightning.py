"""A net for 5,000 handwritten digits, trained in fixed point by Lightning, stopped and resumed in the middle, and its file.

    pip install -e '.[examples]'
    python examples/train_lightning.py --epochs 2 --out digits.onnx

Nothing here is special to fixed point but three lines in ``Digits``: a converted net is a module like any other. Its checkpoint loads before the
first batch, for the net was traced, so that all of its state is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
from digits import accuracy, make_net, options_of
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import linger
from linger.demo_data import images
from linger.verify import Report


class Digits(lightning.LightningModule):
    """A converted net, its loss and its optimizer."""

    def __init__(self, sample: Tensor) -> None:
        super().__init__()
        net = make_net()
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
    options = options_of(__doc__).parse_args(arguments)
    lightning.seed_everything(0, verbose=False)
    x, y, test_x, test_y = images("mnist")
    loader = DataLoader(TensorDataset(x[: options.limit], y[: options.limit]), 64, shuffle=True)
    model, checkpoint = Digits(x[:1]), options.out.with_suffix(".ckpt")
    first = trainer(1, options.out.parent)
    first.fit(model, loader)
    first.save_checkpoint(checkpoint)
    model = Digits(x[:1])
    trainer(options.epochs, options.out.parent).fit(model, loader, ckpt_path=checkpoint)
    print(f"fixed point: {accuracy(model, test_x, test_y):.2f} %")
    linger.onnx.export(model.net, (test_x[:1],), options.out, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    return linger.verify(model.net, options.out, test_x[:200])


if __name__ == "__main__":
    main()
