"""Other libraries on the same float nets, data, epochs and constraint: power-of-two scales, one per tensor.

What they compute is a simulation in float: no file of theirs is compared. A library that is not installed is named as not run.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import nn

from benchmarks.accuracy.ways import Job, Start
from benchmarks.peers import NotRun, require

PACKAGES = {"brevitas_peer": "brevitas", "pt2e_peer": "torchao"}


def _peer(name: str, job: Job) -> ModuleType:
    """The peer's module, where it has something to do on the task."""
    require(PACKAGES[name])
    if name == "pt2e_peer" and job.task.name == "watch":
        raise NotRun("not run, its quantizer leaves the LSTM in float")
    if name == "pt2e_peer" and job.bits[1] > 8:
        raise NotRun("not run, its observers know no activations of 16 bits")
    return importlib.import_module(f"benchmarks.accuracy.{name}")


def calibrated(name: str) -> Start:
    """The peer's calibration alone."""

    def way(job: Job) -> nn.Module:
        return _peer(name, job).calibrated(job)

    return way


def trained(name: str) -> Start:
    """The peer's training."""

    def way(job: Job) -> nn.Module:
        return _peer(name, job).trained(job)

    return way


PEERS: dict[str, Start] = {
    "Brevitas, PTQ": calibrated("brevitas_peer"),
    "Brevitas, QAT": trained("brevitas_peer"),
    "torchao PT2E, PTQ": calibrated("pt2e_peer"),
    "torchao PT2E, QAT": trained("pt2e_peer"),
}
