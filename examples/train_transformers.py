"""A net for 5,000 handwritten digits, trained in fixed point by the Trainer of ``transformers``, stopped and resumed, and its file.

    pip install -e '.[examples]'
    python examples/train_transformers.py --epochs 2 --out digits.onnx

The Trainer wants a model that returns its loss: ``WithLoss`` wraps the converted net. Checkpoints are the Trainer's own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

from digits import accuracy, make_net, options_of
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
        net = make_net()
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
    options = options_of(__doc__).parse_args(arguments)
    set_seed(0)
    x, y, test_x, test_y = images("mnist")
    data = Digits(x[: options.limit], y[: options.limit])
    with tempfile.TemporaryDirectory() as folder:
        trainer(x[:1], data, folder, 1).train()
        last = trainer(x[:1], data, folder, options.epochs)
        last.train(resume_from_checkpoint=True)
    net = last.model.net
    print(f"fixed point: {accuracy(net, test_x, test_y):.2f} %")
    linger.onnx.export(net, (test_x[:1],), options.out, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    return linger.verify(net, options.out, test_x[:200])


if __name__ == "__main__":
    main()
