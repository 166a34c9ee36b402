"""Softmax, softmin and log-softmax: golden vectors, rows of every length and grid, gradients, masks, losses, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_golden import CASES as GOLDEN_CASES
from test_golden import GOLDEN, without_input_quant
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.numerics import levels
from linger.ops import BY_NAME, IntModule, _softmax
from linger.targets import TARGETS
from linger.targets import Softmax as Variant
from linger.targets._softmax import EXP_OF_0, LN_TABLE, LOG2_SLOPES, LOG2_VALUES
from linger.verify import LEVELS, session

CHIPS = tuple(TARGETS)
LENGTHS = (1, 2, 3, 31, 256, 257, 1000, 2048)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "SoftmaxInt": lambda x: torch.softmax(x, -1),
    "LogSoftmaxInt": lambda x: torch.log_softmax(x, -1),
}


class Both(nn.Module):
    """Softmax and log-softmax of the same rows."""

    def __init__(self, bits: int = 8, dim: int = -1) -> None:
        super().__init__()
        self.bits, self.dim = bits, dim

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = linger.quant_tensor(self, x, "x", bits=self.bits)
        return torch.softmax(x, self.dim), torch.log_softmax(x, self.dim)


class Net(nn.Module):
    """A layer or a function behind an input on a grid."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.op = made if isinstance(made, nn.Module) else None
        self.function = made if self.op is None else None

    def forward(self, x: Tensor) -> Tensor:
        return (self.op or self.function)(linger.quant_tensor(self, x, "x"))


def converted(made: Callable[[Tensor], Tensor], chip: str = "venus") -> nn.Module:
    return linger.init(Net(made), target=chip)


def grids(net: nn.Module, q_x: int, bits: int, probability: float = 1.0, log: float = 12.0) -> nn.Module:
    """The net in eval mode with an input grid of 2^q_x and these output ranges."""
    for name, module in net.named_modules():
        if isinstance(module, IntModule):
            kind = name.rpartition(".")[2]
            if "iq_tensor_quant" in kind:
                module.running("x").fill_(levels(bits) / 2.0**q_x)
            else:
                module.running("o").fill_(log if "LogSoftmax" in kind else probability)
    return net.eval()


def both(chip: str, q_x: int, bits: int = 8, **ranges: float) -> nn.Module:
    net = linger.init(Both(bits), target=chip)
    net(torch.randn(2, 5))
    return grids(net, q_x, bits, **ranges)


def rows(length: int, bits: int, seed: int = 0) -> np.ndarray:
    """Integer rows: constant (lowest, 0, highest), one-hot at both limits, random in wide and narrow ranges; int64."""
    low, high = -(2 ** (bits - 1)), levels(bits)
    rng = np.random.default_rng(1000 * bits + length + seed)
    constant = [np.full(length, v) for v in (low, 0, high)]
    hot = np.full((4, length), (low,))
    hot[0, length // 2], hot[1, -1], hot[2, 0], hot[3, ::2] = high, 0, low + 1, high
    spread = [rng.integers(-(2**k), 2**k, length) for k in (2, bits - 2, bits - 1)]
    near = high - rng.integers(0, 3, length)
    return np.stack([*constant, *hot, *spread, near])


# --- golden vectors


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


# --- every length and grid: PyTorch == run == ONNX Runtime


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("q_x", [-9, -6, -1, *range(16)])
def test_rows_of_8_bits(chip: str, q_x: int, tmp_path: Path) -> None:
    """Output grids from saturation to the finest one."""
    net = both(chip, q_x, probability=2.0 ** -(q_x % 9), log=2.0 ** (4 - q_x % 6))
    compare(net, q_x, 8, LENGTHS, tmp_path, ("thinker", "standard"), tuple(LEVELS))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("q_x", [0, 8, 11, 15, 27])
def test_rows_of_16_bits(chip: str, q_x: int, tmp_path: Path) -> None:
    net = both(chip, q_x, 16, log=2.0 ** (3 - q_x % 5))
    compare(net, q_x, 16, LENGTHS, tmp_path, ("thinker",), ("disable", "all"))


def compare(
    net: nn.Module,
    q_x: int,
    bits: int,
    lengths: tuple[int, ...],
    path: Path,
    dialects: tuple[str, ...],
    at: tuple[str, ...],
) -> None:
    inputs = [torch.tensor(rows(n, bits) / 2.0**q_x, dtype=torch.float32) for n in lengths]
    with torch.no_grad():
        expected = [[t.numpy() for t in net(x)] for x in inputs]
    for dialect in dialects:
        axes = {"x": {0: "rows", 1: "length"}}
        proto = linger.onnx.export(net, (inputs[-1],), path / "net.onnx", dynamic_axes=axes, dialect=dialect)
        sessions = [session(proto, level) for level in at]
        runners = [lambda v, s=s: s.run(None, {"x": v}) for s in sessions]
        if dialect == "thinker":
            runners.append(linger.runtime.load(path / "net.onnx"))
        for x, wanted in zip(inputs, expected, strict=True):
            for run in runners:
                assert all(np.array_equal(f, w) for f, w in zip(run(x.numpy()), wanted, strict=True))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("chip", CHIPS)
def test_large_tensors_take_the_tables(chip: str, bits: int) -> None:
    """A tensor larger than the tables is looked up, a smaller one is computed: the same integers."""
    net = both(chip, 4 + bits // 4, bits)
    x = torch.randn(3 * 2 ** max(bits, 15) // 1000, 1000) * 3
    with torch.no_grad():
        whole, parts = net(x), [net(part) for part in x.split(1 if bits == 8 else 16)]
    assert all(torch.equal(w, torch.cat([p[i] for p in parts])) for i, w in enumerate(whole))


@pytest.mark.parametrize("opset", [12, 13, 17, 18, 23, 26])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_every_opset_and_axis(opset: int, dim: int, tmp_path: Path) -> None:
    for chip in CHIPS:
        net = linger.init(Both(dim=dim), target=chip)
        net(torch.randn(3, 5, 4) * 3)
        axes = {"x": {i: f"axis{i}" for i in range(3)}}
        for dialect in ("thinker", "standard"):
            x = torch.randn(2, 4, 6) * 3
            linger.onnx.export(
                net.eval(), (x,), tmp_path / "n.onnx", opset_version=opset, dynamic_axes=axes, dialect=dialect
            )
            assert linger.verify(net, tmp_path / "n.onnx", torch.randn(3, 7, 2) * 3, quiet=True).equal


@pytest.mark.parametrize("opset", [12, 17])
def test_dialect_qdq(opset: int) -> None:
    """On floats between pairs of QuantizeLinear: within one level of the probabilities' and of the logarithms' grid."""
    net = linger.init(Both(dim=1), target="venusa")
    net(torch.randn(3, 5, 4) * 3)
    x = torch.randn(3, 5, 4)
    proto = linger.onnx.export(net.eval(), (x,), None, opset_version=opset, dialect="qdq")
    with torch.no_grad():
        for found, y in zip(session(proto, "all").run(None, {"x": x.numpy()}), net(x), strict=True):
            assert (np.abs(found - y.numpy()) * float(y.grid.scale)).max() <= 1


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_rows_and_no_rows(chip: str, shape: tuple[int, int], tmp_path: Path) -> None:
    net = both(chip, 4)
    linger.onnx.export(net, (torch.randn(2, 5),), tmp_path / "n.onnx", dynamic_axes={"x": {0: "rows", 1: "length"}})
    with torch.no_grad():
        assert all(y.shape == shape for y in net(torch.zeros(shape)))
    assert linger.verify(net, tmp_path / "n.onnx", torch.zeros(shape), quiet=True).equal


# --- spellings, names, types

X = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1)) * 2
SPELLINGS: dict[str, tuple[Callable[..., Callable[[Tensor], Tensor]], tuple[str, int]]] = {
    "torch.softmax": (lambda: lambda x: torch.softmax(x, 1), ("SoftmaxInt_0", 1)),
    "torch.softmax-dtype": (lambda: lambda x: torch.softmax(x, 1, torch.float32), ("SoftmaxInt_0", 1)),
    "Tensor.softmax": (lambda: lambda x: x.softmax(dim=-1), ("SoftmaxInt_0", -1)),
    "F.softmax": (lambda: lambda x: F.softmax(input=x, dim=0), ("SoftmaxInt_0", 0)),
    "F.softmax-none": (lambda: lambda x: F.softmax(x), ("SoftmaxInt_0", 0)),
    "special.softmax": (lambda: lambda x: torch.special.softmax(x, 2), ("SoftmaxInt_0", 2)),
    "nn.Softmax": (lambda: nn.Softmax(1), ("op.SoftmaxInt_0", 1)),
    "nn.Softmax2d": (lambda: nn.Softmax2d(), ("op.SoftmaxInt_0", 0)),
    "F.log_softmax": (lambda: lambda x: F.log_softmax(x, -2), ("LogSoftmaxInt_0", -2)),
    "torch.log_softmax": (lambda: lambda x: torch.log_softmax(x, dim=1), ("LogSoftmaxInt_0", 1)),
    "Tensor.log_softmax": (lambda: lambda x: x.log_softmax(1), ("LogSoftmaxInt_0", 1)),
    "special.log_softmax": (lambda: lambda x: torch.special.log_softmax(x, 1), ("LogSoftmaxInt_0", 1)),
    "nn.LogSoftmax": (lambda: nn.LogSoftmax(dim=2), ("op.LogSoftmaxInt_0", 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    """Each goes to its site, under its key, over its dimension."""
    make, (key, dim) = SPELLINGS[name]
    net = converted(make())
    y = net(X)
    owner, _, site = key.rpartition(".")
    keys = [k for k in net.state_dict() if "oftmax" in k]
    stem = f"{owner}._linger_round_tensor_{site}".lstrip(".")
    assert keys == [f"{stem}.running_o", f"{stem}.scale_o"]
    assert y.grid.bits == 8
    total = y.exp() if "Log" in key else y
    assert (total.sum(dim) - 1).abs().max() < 0.2  # each element is within a level
    assert (total.sum((dim + 1) % 3) - 1).abs().max() > 0.5
