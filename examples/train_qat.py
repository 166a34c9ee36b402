"""A net for 5,000 handwritten digits from float to fixed point in a training loop of one's own, and its file.

    python examples/train_qat.py --weights 4 --distill 0.5 --out digits.onnx

With ``--distill a`` the float net teaches the net in fixed point (self-distillation), at temperature T:

    loss = (1 - a) cross_entropy(student, labels) + a T^2 KL(softmax(teacher / T) || softmax(student / T))      (1)
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence

import torch
from digits import accuracy, make_net, options_of
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.demo_data import Split, images
from linger.verify import Report

BATCH, TEMPERATURE = 50, 2.0
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of inputs, outputs and labels


def labels_alone(x: Tensor, out: Tensor, y: Tensor) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(out, y)


def distillation(teacher: nn.Module, weight: float) -> Loss:
    """Equation (1) with a = ``weight``; the teacher gets no gradient and keeps its statistics."""
    teacher.eval()

    def loss(x: Tensor, out: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = F.log_softmax(teacher(x) / TEMPERATURE, 1)
        soft = F.kl_div(F.log_softmax(out / TEMPERATURE, 1), wanted, reduction="batchmean", log_target=True)
        return (1 - weight) * F.cross_entropy(out, y) + weight * TEMPERATURE**2 * soft

    return loss


def train(net: nn.Module, data: Split, epochs: int, rate: float, loss: Loss, schedule: linger.Schedule | None) -> None:
    """AdamW on one cycle; learned ranges have a rate of their own, and stop when ``schedule`` says so."""
    x, y = data[:2]
    fixed = schedule is not None
    groups = linger.param_groups(net, lr=rate) if fixed else [{"params": list(net.parameters()), "lr": rate}]
    optimizer = torch.optim.AdamW(groups)
    rates = [group["lr"] for group in groups]
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=max(2, epochs * len(x.split(BATCH))))
    for epoch in range(epochs):
        net.train()
        if schedule is not None:
            schedule.begin(net, epoch)
        for chosen in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            loss(x[chosen], net(x[chosen]), y[chosen]).backward()
            optimizer.step()
            cycle.step()


def fixed_point(teacher: nn.Module, data: Split, options: argparse.Namespace) -> nn.Module:
    """A copy of the float net: converted, calibrated, and trained on with learned ranges."""
    net = copy.deepcopy(teacher)
    linger.trace_layers(net, net, data[0][:1])
    net = linger.init(net, parameter_bits=options.weights, observe="learned")
    linger.calibrate(net, data[0][:500].split(BATCH), progress=False)
    print(f"calibrated:  {accuracy(net, *data[2:]):.2f} %")
    loss = distillation(teacher, options.distill) if options.distill else labels_alone
    train(net, data, options.epochs, options.rate, loss, linger.Schedule(epochs=options.epochs))
    return net


def main(arguments: Sequence[str] | None = None) -> Report:
    """Train, export, compare; the comparison."""
    parser = options_of(__doc__)
    parser.add_argument("--weights", type=int, default=4, choices=[4, 8], help="bits")
    parser.add_argument("--distill", type=float, default=0.0, help="weight of the float net's opinion, 0 to 1")
    parser.set_defaults(epochs=6)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate in fixed point")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    x, y, test_x, test_y = images("mnist")
    data = (x[: options.limit], y[: options.limit], test_x, test_y)
    teacher = make_net()
    train(teacher, data, options.epochs, 5e-3, labels_alone, None)
    print(f"float:       {accuracy(teacher, *data[2:]):.2f} %")
    net = fixed_point(teacher, data, options)
    print(f"fixed point: {accuracy(net, *data[2:]):.2f} %")
    linger.onnx.export(net, (test_x[:1],), options.out, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    return linger.verify(net, options.out, test_x[:200])


if __name__ == "__main__":
    main()
