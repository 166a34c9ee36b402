"""Every op x case x property. Integers are compared for equality, never within a tolerance."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from harness import CaseNet, converted, inputs, spread_outputs
from torch import Tensor

import linger
from linger.ops import CASES, Case
from linger.verify import LEVELS

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
IDS = [case.name for case in CASES]
FACTORS = (2.0**-6, 2.0**-1, 1.0, 2.0**3, 2.0**7)  # from saturation of nearly everything to a far shift
COUNTED: dict[str, int] = {}


def check(net: CaseNet, case: Case, bits: int, path: Path, dialect: str, batches: tuple[int, ...], seed: int) -> int:
    """Export, and compare every batch size everywhere; returns the number of elements compared per runner."""
    names = [f"x{i}" for i in range(len(case.shapes))]
    axes = {n: {0: "batch"} for n in names}
    sample = inputs(case, bits, max(2, case.shapes[0][0]), seed)
    linger.onnx.export(net, sample, path, input_names=names, dynamic_axes=axes, dialect=dialect)
    compared = 0
    for batch in batches:
        report = linger.verify(net, path, inputs(case, bits, batch, seed + batch), quiet=True)
        assert report.equal, f"{case.name}, batch {batch}: {report}"
        assert set(LEVELS) <= set(report.differing)
        compared += report.elements
    return compared


@pytest.mark.parametrize("dialect", ["thinker", "standard"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_equal_everywhere(case: Case, dialect: str, tmp_path: Path) -> None:
    """PyTorch eval == linger.runtime == ONNX Runtime at its four levels, from saturation to far shifts."""
    for bits, target in itertools.product(case.bits, case.targets):
        for i, factor in enumerate(FACTORS):
            net = converted(case, bits, target=target)
            spread_outputs(net, factor)
            assert check(net, case, bits, tmp_path / "case.onnx", dialect, (1, 7), 100 * i) > 0


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_empty_batch(case: Case, tmp_path: Path) -> None:
    net = converted(case)
    empty = inputs(case, 8, 0, 0)
    with torch.no_grad():
        assert net(*empty).shape[0] == 0 or net(*empty).numel() == 0
    check(net, case, 8, tmp_path / "case.onnx", "thinker", (0,), 0)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_training_forward_is_the_eval_forward(case: Case) -> None:
    """On the statistics that the training forward leaves behind, eval gives the same values."""
    net = converted(case)
    x = inputs(case, 8, 3, 1)
    net.train()
    for _ in range(3):
        trained: Tensor = net(*x)
    frozen = [b.clone() for b in net.buffers()]
    trained = net(*x)
    if all(torch.equal(a, b) for a, b in zip(frozen, net.buffers(), strict=True)):
        with torch.no_grad():
            assert torch.equal(net.eval()(*x), trained)


@pytest.mark.parametrize("bits", [32])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_32_bit_results(case: Case, bits: int, tmp_path: Path) -> None:
    """32-bit activations: no integer is lost to float32, and nothing is shifted out."""
    net = converted(case, bits)
    check(net, case, bits, tmp_path / "case.onnx", "thinker", (1, 7), 5)
