"""A small transformer on real data: the rows of 5,000 digits as sequences, float against fixed point, several seeds."""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from benchmarks._common import show
from linger.demo_data import Split, images

BATCH = 100
STAGES = {"float": (16, 2e-3), "normalized": (5, 1e-3), "fixed point": (5, 5e-4)}  # epochs, peak learning rate


class RowTransformer(nn.Module):
    """(N, steps, features) -> (N, classes): learned positions, 2 layers of 4 heads with GELU, the mean over the steps."""

    def __init__(self, steps: int = 28, features: int = 28, classes: int = 10) -> None:
        super().__init__()
        self.into = nn.Linear(features, 48)
        self.positions = nn.Parameter(torch.randn(1, steps, 48) * 0.02)
        layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.1, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.out = nn.LayerNorm(48), nn.Linear(48, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.encoder(self.into(x) + self.positions)).mean(1))


def train(net: nn.Module, data: Split, stage: str, seed: int) -> float:
    """Train in place; the test accuracy in percent."""
    x, y, test_x, test_y = data
    epochs, rate = STAGES[stage]
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * (len(x) // BATCH))
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator).view(-1, BATCH):
            loss = F.cross_entropy(net(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        return 100 * float((net(test_x).argmax(1) == test_y).float().mean())


def one_seed(data: Split, seed: int, target: str) -> tuple[dict[str, float], int, int]:
    """Accuracy of every stage, differing integers over all runners, and how many outputs were compared in each."""
    torch.manual_seed(seed)
    net = RowTransformer()
    found = {"float": train(net, data, "float", seed)}
    net.train()  # PyTorch's fast path in eval hides the layers
    linger.trace_layers(net, net, data[2][:1])
    linger.normalize_layers(net, normalize_weight_value=8, normalize_bias_value=8, normalize_output_value=16)
    found["normalized"] = train(net, data, "normalized", seed)
    fixed = linger.init(copy.deepcopy(net), target=target)
    found["fixed point"] = train(fixed, data, "fixed point", seed)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error", linger.LingerWarning)  # a float island would be a lie in the table
        path = Path(folder) / "net.onnx"
        linger.onnx.export(fixed, (data[2][:1],), path, dynamic_axes={"x": {0: "batch"}})
        report = linger.verify(fixed, path, data[2], quiet=True)
    return found, sum(report.differing.values()), report.elements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--target", default="venus")
    options = parser.parse_args()
    x, y, test_x, test_y = images("mnist")
    data = (x.squeeze(1), y, test_x.squeeze(1), test_y)
    rows, losses = [], []
    for seed in range(options.seeds):
        found, differing, elements = one_seed(data, seed, options.target)
        losses.append(found["float"] - found["fixed point"])
        cells = tuple(f"{found[stage]:.2f} %" for stage in STAGES)
        rows.append((str(seed), *cells, f"{losses[-1]:+.2f}", f"{differing} of 5 x {elements}"))
    rows.append(("mean", "", "", "", f"{statistics.mean(losses):+.2f}", ""))
    title = f"rows of MNIST-5k, 4,000 train, 1,000 test, target {options.target}"
    show(title, ("seed", *STAGES, "points lost", "differing integers"), rows)


if __name__ == "__main__":
    main()
