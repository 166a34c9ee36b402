"""Softmax against the engine's own vectors, its parts in PyTorch and in NumPy against each other, and the chips' limits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_golden import CASES as GOLDEN_CASES
from test_golden import GOLDEN, without_input_quant
from test_softmax import CHIPS, FUNCTIONS, Both, both, rows

import linger
from linger.ops import BY_NAME, _softmax
from linger.ops.softmax import saturating_rows
from linger.targets import TARGETS
from linger.targets import Softmax as Variant
from linger.targets._softmax import EXP_OF_0, LN_TABLE, LOG2_SLOPES, LOG2_VALUES
from linger.verify import LEVELS, session


@pytest.mark.parametrize("chip", ["arcs", "venusa"])
def test_exponential_and_softmax_of_the_engine(chip: str) -> None:
    tables, variant = np.load(GOLDEN / chip / "tables" / "softmax.npz"), TARGETS[chip].softmax
    d = tables["exp_in"].astype(np.int64)
    assert np.array_equal(_softmax.exp(d, variant), tables["exp_out"])
    assert np.array_equal(_softmax.torch_exp(torch.tensor(d), variant).numpy()[d <= 0], tables["exp_out"][d <= 0])
    assert int(_softmax.exp(np.zeros(1, np.int64), variant)[0]) == EXP_OF_0
    for n in (4, 10, 100):
        z = tables[f"in_{n}"].astype(np.int64)
        assert np.array_equal(_softmax.probability(z, -1, variant), tables[f"softmax_{n}"])


@pytest.mark.parametrize("chip", ["arcs", "venusa"])
def test_log_softmax_from_the_sum(chip: str) -> None:
    """Both libraries have the routine; the op of arcs uses the other one."""
    tables, own = np.load(GOLDEN / chip / "tables" / "softmax.npz"), TARGETS[chip].softmax
    variant = Variant(exp_rounds=own.exp_rounds, newton=False, log_of_sum=True)
    for n in (4, 10, 100):
        found = _softmax.log_probability(tables[f"in_{n}"].astype(np.int64), -1, variant)
        assert np.array_equal(found, tables[f"log_softmax_{n}"])


def test_logarithm_tables() -> None:
    assert np.array_equal(np.load(GOLDEN / "venusa" / "tables" / "softmax.npz")["ln_table"], LN_TABLE)
    pairs = np.load(GOLDEN / "arcs" / "tables" / "softmax.npz")["log2_table"].reshape(-1, 2)
    assert np.array_equal(pairs[:, 0], LOG2_VALUES)
    assert np.array_equal(pairs[:, 1], LOG2_SLOPES)


def test_venus_values() -> None:
    """What upstream's compiled extension returned for [0, 1, 2]; ln 1 = 254 and the deviation of all 2^15 logarithms."""
    variant, z = TARGETS["venus"].softmax, np.array([0, 1, 2]) << 25
    assert _softmax.probability(z, -1, variant).tolist() == [2950, 8019, 21798]
    assert _softmax.log_probability(z, -1, variant).tolist() == [-80787229, -47232515, -13677911]
    assert _softmax.ln_probability(np.array([0, 2**15])).tolist() == [-(2**31), 254]
    p = np.arange(1, 2**15 + 1)
    deviation = _softmax.ln_probability(p) - 2.0**25 * np.log(p / 2**15)
    assert (round(deviation.min(), 1), round(deviation.max())) == (-1.2, 255)
    assert np.array_equal(_softmax.torch_ln_probability(torch.tensor(p)).numpy(), _softmax.ln_probability(p))


def test_logarithm_of_sums() -> None:
    """PyTorch's text of it, where the bits below the table's index carry."""
    rng = np.random.default_rng(0)
    edges = np.array([[2**n - 129, 2**n - 128, 2**n - 127, 2**n] for n in range(24, 38)]).ravel()
    s = np.concatenate([edges, rng.integers(EXP_OF_0, 2**34, 5000), (np.arange(512, 1024) << 21) - 100, [2**40]])
    assert np.array_equal(_softmax.torch_ln_sum(torch.tensor(s)).numpy(), _softmax.ln_sum(s))


@pytest.mark.parametrize("case", [c for c in GOLDEN_CASES if "oftmax" in str(c)], ids=str)
def test_engine_cases_in_pytorch_and_onnx_runtime(case: Path) -> None:
    """The engine's single-op files: our forward on their input, and our body in ONNX Runtime."""
    meta = json.loads((GOLDEN / case / "meta.json").read_text())
    x, wanted = np.load(GOLDEN / case / "in_0.npy"), np.load(GOLDEN / case / "out_0.npy")
    model = without_input_quant(onnx.load(GOLDEN / case / "model.onnx"))
    op = BY_NAME[model.graph.node[0].op_type]
    q_x, q_o = (int(meta[k][0]["scale_exp"]) for k in ("inputs", "outputs"))
    ranges = {"probability" if op.name == "SoftmaxInt" else "log": 127 / 2.0**q_o}
    net = both(str(case.parent), q_x, **ranges)
    real = torch.tensor(x / 2.0**q_x, dtype=torch.float32)
    index = list(FUNCTIONS).index(op.name)
    with torch.no_grad():
        assert np.array_equal(net(real)[index].numpy() * 2**q_o, wanted)
    proto = linger.onnx.export(net, (real,), None)
    for level in LEVELS:
        assert np.array_equal(session(proto, level).run(None, {"x": real.numpy()})[index] * 2**q_o, wanted)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("q_x", [-9, -6, -1, 0, 1, 7, 25, 27])
def test_distances_to_the_maximum(q_x: int, bits: int) -> None:
    """Exact in Q25, also where the row's maximum saturates to 2^31 - 1 and where the grid is finer than Q25."""
    q = np.concatenate([rows(64, bits), rows(64, bits) // 2, rows(64, 8)])
    z = _softmax.argument(q, 2.0**q_x)
    k, scale = _softmax.distances(torch.tensor(q / 2.0**q_x, dtype=torch.float32), torch.tensor(2.0**q_x), -1, bits)
    d = _softmax.arguments(scale, bits)[k.long()].numpy()
    assert np.array_equal(d, np.maximum(z - z.max(-1, keepdims=True), -(2**31)))


# --- limits of the chip


@pytest.mark.parametrize("chip", CHIPS)
def test_sum_saturates_at_256(chip: str) -> None:
    """255 equal scores are right, more come out as 1/256 each; log-softmax from the sum stays right."""
    net = both(chip, 4, probability=2.0**-8, log=8.0)
    for length in (255, 256, 257, 1000):
        soft, log = (float(y[0, 0]) for y in net(torch.zeros(1, length)))
        wrong = length > 255
        assert saturating_rows(np.zeros((1, length), np.int8), 16.0, platform=chip).tolist() == [wrong]
        assert abs(soft - 1 / min(length, 256)) < 2.0**-14
        assert abs(log + math.log(length if TARGETS[chip].softmax.log_of_sum else min(length, 256))) <= 2.0**-5


@pytest.mark.parametrize("chip", CHIPS)
def test_rows_with_masked_scores(chip: str) -> None:
    """Minus infinity is the lowest level; a row that saturates throughout is uniform, at either end."""
    net = both(chip, 3)
    x = torch.tensor([[1.0, 2.0, -math.inf, -1e9], [-math.inf] * 4, [1e30] * 4, [3.0, -1e30, -1e30, -1e30]])
    soft, log = net(x)
    assert soft[0, 2:].tolist() == [0, 0]
    assert torch.equal(soft[1:3], torch.full((2, 4), 0.25))
    assert torch.equal(log[1:3], torch.full((2, 4), -1.375))  # ln 4 = 1.386 at 2^3
    assert soft[3].tolist() == [127 / 128, 0, 0, 0]


@pytest.mark.parametrize("chip", CHIPS)
def test_logarithm_of_0_does_not_stretch_the_range(chip: str) -> None:
    """What a chip can only say as -64 saturates on a grid that holds ln 2^-15; from the sum, -30 is a value."""
    net = linger.init(Both(), target=chip)
    x = torch.tensor([[30.0, 0.0, 28.0]])
    log = net(x)[1]
    if TARGETS[chip].softmax.log_of_sum:
        assert log.grid.scale == 4
        assert log[0, 1] in (-30, -30.25)  # -30.127
    else:
        assert log.grid.scale == 16
        assert log[0, 1] == -8
    assert abs(float(log[0, 2]) + 2.127) < 0.5 / float(log.grid.scale) + 2.0**-8


def test_output_grid_follows_the_largest_probability() -> None:
    """Never finer than the probabilities themselves, 2^15."""
    for peak, scale in ((6.0, 2.0**7), (0.0, 2.0**15)):
        net = linger.init(Both())
        x = torch.zeros(2, 250)
        x[0, 0] = 2 * peak
        assert net(x)[0].grid.scale == scale
    deep = linger.init(Both(16))
    assert deep(torch.zeros(2, 250))[0].grid.scale == 2.0**15
    assert next(v for k, v in deep.state_dict().items() if k.endswith("_SoftmaxInt_0.scale_o")) == 2.0**15
