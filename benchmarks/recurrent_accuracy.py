"""LSTM and GRU that read real digits row by row: accuracy of the float net and of the net trained on in fixed point.

``python -m benchmarks.recurrent_accuracy`` takes scikit-learn's 1,797 digits of 8 x 8, every fourth of them for testing.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from benchmarks._common import show

SEEDS, UNITS, EPOCHS, TUNING, BATCH = (0, 1, 2), 48, 40, 12, 48
LAYERS: dict[str, type[nn.RNNBase]] = {"LSTM": nn.LSTM, "GRU": nn.GRU}
CHIPS = ("venus", "arcs", "venusa")
Data = tuple[Tensor, Tensor, Tensor, Tensor]


class Reader(nn.Module):
    """Eight rows of eight pixels, then the last hidden state says which digit."""

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = layer(8, UNITS, batch_first=True), nn.Linear(UNITS, 10)

    def forward(self, x: Tensor) -> Tensor:
        _, last = self.rnn(x)
        h = last[0] if isinstance(last, tuple) else last
        return self.head(h[-1])


def data() -> Data:
    """Rows (N, 8, 8) in [-0.5, 0.5] and digits, for training and for testing."""
    images, digits = load_digits(return_X_y=True)
    x = torch.from_numpy((images / 16 - 0.5).astype(np.float32)).view(-1, 8, 8)
    y, test = torch.from_numpy(digits), torch.arange(len(digits)) % 4 == 0
    return x[~test], y[~test], x[test], y[test]


def trained(net: nn.Module, given: Data, epochs: int, rate: float) -> float:
    """Accuracy in percent after Adam with a cosine schedule."""
    x, y, x_test, y_test = given
    optimizer = torch.optim.Adam(net.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net.train()(x[index]), y[index]).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float((net.eval()(x_test).argmax(1) == y_test).float().mean() * 100)


def row(name: str, seed: int, given: Data) -> tuple[str, ...]:
    """One layer and seed: float, trained as long as every fixed-point net, and those."""
    torch.manual_seed(seed)
    net = Reader(LAYERS[name])
    trained(net, given, EPOCHS, 5e-3)
    nets = {"float": copy.deepcopy(net)} | {c: linger.init(copy.deepcopy(net), target=c) for c in CHIPS}
    return f"{name}, seed {seed}", *(f"{trained(n, given, TUNING, 1e-3):.2f}" for n in nets.values())


def main() -> None:
    """Print one row per layer and seed, and the mean loss of accuracy."""
    given = data()
    for name in LAYERS:
        rows = [row(name, seed, given) for seed in SEEDS]
        numbers = np.array([[float(v) for v in r[1:]] for r in rows])
        rows.append(("mean", *(f"{v:.2f}" for v in numbers.mean(0))))
        show(f"accuracy of {name} on digits, percent", ("net", "float", *CHIPS), rows)


if __name__ == "__main__":
    main()
