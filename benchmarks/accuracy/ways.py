"""The ways of quantizing that are compared. Each takes a float net and gives one in fixed point."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from benchmarks.accuracy.tasks import Task, batches
from linger.demo_data import Split

BATCH = 100
CALIBRATION = 8  # batches
MIXED = 5  # bits of a weight on average, where they are mixed
LATER = 6  # epochs of every kind of training after the float stage; the two stages share them
RATES = {4: 3e-3, 8: 3e-4}  # peak learning rates of that, by the width of weights: few levels want larger steps
Bits = tuple[int, int]  # of weights, of activations


@dataclass(frozen=True, kw_only=True)
class Job:
    """A trained float net, what it was trained on, and the widths asked for."""

    task: Task
    net: nn.Module
    data: Split
    bits: Bits
    seed: int
    shared: dict[str, Any] = field(default_factory=dict)  # trained in float, the same for all widths

    @property
    def rate(self) -> float:
        """The peak learning rate of training in fixed point."""
        return RATES.get(self.bits[0], RATES[8])

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.net).train()  # PyTorch's fast path for transformers in eval hides the layers

    def traced(self) -> nn.Module:
        net = self.copy()
        return linger.trace_layers(net, net, self.data[2][:1])

    def longer(self) -> nn.Module:
        """Half the later epochs more in float, traced."""
        if "longer" not in self.shared:
            self.shared["longer"] = train(self.traced(), self.data, LATER // 2, RATES[8], self.seed)
        return copy.deepcopy(self.shared["longer"]).train()

    def normalized(self) -> nn.Module:
        """The same with bounds."""
        if "normalized" not in self.shared:
            net, bound = self.traced(), self.task.bound
            linger.normalize_layers(net, normalize_weight_value=8, normalize_bias_value=8, normalize_output_value=bound)
            self.shared["normalized"] = train(net, self.data, LATER // 2, RATES[8], self.seed)
        return copy.deepcopy(self.shared["normalized"]).train()

    def fixed(self, net: nn.Module, **options: Any) -> nn.Module:
        weights, data = self.bits
        return linger.init(net, parameter_bits=weights, data_bits=data, out_bits=data, **options)

    def calibrated(self, net: nn.Module, *args: Any, **options: Any) -> nn.Module:
        loader = batches(self.data, BATCH, 12345)[:CALIBRATION]
        return linger.calibrate(net, loader, *args, progress=False, **options)


def train(
    net: nn.Module,
    data: Split,
    epochs: int,
    rate: float,
    seed: int,
    groups: Any = None,
    stops: linger.Schedule | None = None,
) -> nn.Module:
    """AdamW on one cycle, in place; ``stops`` says when what freezes."""
    groups = groups or [{"params": list(net.parameters()), "lr": rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-2)
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peaks, total_steps=max(2, epochs * (len(data[0]) // BATCH))
    )
    for epoch in range(epochs):
        net.train()
        if stops is not None:
            stops.begin(net, epoch)
        for x, y in batches(data, BATCH, 1000 * seed + epoch):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            schedule.step()
    return net


Start = Callable[[Job], nn.Module]


def as_it_is(job: Job) -> nn.Module:
    """The float net."""
    return job.net


def trained_on(job: Job) -> nn.Module:
    """In float for as many epochs as every net in fixed point: what is due to training alone."""
    return train(job.copy(), job.data, LATER, job.rate, job.seed)


def plain(method: str, start: Start = Job.traced) -> Start:
    """Ranges alone: weights and biases as they are."""
    return lambda job: job.calibrated(job.fixed(start(job)), method, weights=None, correct_bias=False)


def defaults(start: Start = Job.traced) -> Start:
    """trace_layers, init, calibrate as they come."""
    return lambda job: job.calibrated(job.fixed(start(job)))


def equalized(job: Job) -> nn.Module:
    """The same with equalization, where the net has pairs for it."""
    return job.calibrated(job.fixed(job.traced()), equalize=True)


def from_float(job: Job) -> nn.Module:
    """Ranges follow the maximum, from the first batch on."""
    return train(job.fixed(job.traced()), job.data, LATER, job.rate, job.seed)


def two_stages(job: Job) -> nn.Module:
    """Half the epochs with bounds in float, half in fixed point."""
    return train(job.fixed(job.normalized()), job.data, LATER - LATER // 2, job.rate, job.seed)


def held(job: Job) -> nn.Module:
    """Training from the calibrated net, its ranges held."""
    return train(defaults()(job), job.data, LATER, job.rate, job.seed)


def learned(kind: str) -> Start:
    """Training from the calibrated net, its ranges learned."""

    def way(job: Job) -> nn.Module:
        return tuned(job, job.calibrated(job.fixed(job.traced(), observe=kind)))

    return way


def tuned(job: Job, net: nn.Module) -> nn.Module:
    """Training of weights and learned ranges."""
    groups, stops = linger.param_groups(net, lr=job.rate), linger.Schedule(epochs=LATER)
    return train(net, job.data, LATER, job.rate, job.seed, groups, stops)


def mixed(train_too: bool) -> Start:
    """4 or 8 bits for the weights of each layer, as ``search`` chooses within MIXED on average."""

    def loss(out: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(out, batch[1])

    def way(job: Job) -> nn.Module:
        if "recipe" not in job.shared:
            net, loader = job.calibrated(job.fixed(job.traced())), batches(job.data, BATCH, 12345)[:CALIBRATION]
            shapes = [p.shape for p in job.net.parameters()]
            budget = sum(MIXED * s.numel() // 8 if len(s) > 1 else 4 * s.numel() for s in shapes)
            job.shared["recipe"] = linger.search(net, loader, budget, metric=loss, bits=(4, 8), progress=False)
        options = {"observe": "learned"} if train_too else {}
        net = job.calibrated(job.fixed(job.traced(), recipe=job.shared["recipe"], **options))
        return tuned(job, net) if train_too else net

    return way


FLOAT: dict[str, Start] = {"float": as_it_is, "float, 6 more epochs": trained_on}
WAYS: dict[str, Start] = {
    "PTQ, max": plain("max"),
    "PTQ, percentile": plain("percentile"),
    "PTQ, mse": plain("mse"),
    "PTQ, kl": plain("kl"),
    "PTQ, calibrate's defaults": defaults(),
    "PTQ, defaults + equalization": equalized,
    "PTQ, max, after 3 more epochs of float": plain("max", Job.longer),
    "PTQ, max, after 3 epochs normalized": plain("max", Job.normalized),
    "PTQ, defaults, after 3 more epochs of float": defaults(Job.longer),
    "PTQ, defaults, after 3 epochs normalized": defaults(Job.normalized),
    "PTQ, 4 and 8 bits mixed": mixed(False),
    "QAT from float": from_float,
    "QAT, two stages": two_stages,
    "QAT, calibrated and held": held,
    "QAT, learned thresholds": learned("learned"),
    "QAT, learned steps": learned("lsq"),
    "QAT, 4 and 8 bits mixed": mixed(True),
}
WIDE = {
    n for n in WAYS if n.startswith(("PTQ, max", "PTQ, calibrate's", "PTQ, defaults"))
}  # tried with wide activations
