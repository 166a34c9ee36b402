"""Layer, group, instance and root-mean-square normalization: one integer everywhere, the chips' for LayerNorm."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.numerics import levels
from linger.ops import layernorm
from linger.ops._norm import Rows, eps_integer, factor, normalized, reciprocals, run_rows
from linger.targets import TARGETS

GOLDEN = Path(__file__).parent / "golden"
VECTORS = sorted(p.relative_to(GOLDEN) for p in GOLDEN.glob("*/*LayerNorm*"))
LENGTHS = (1, 2, 3, 31, 256, 257, 1000, 2048)
CHIP_BITS = [(chip, bits) for chip in TARGETS for bits in (8, 16) if bits in TARGETS[chip].data_bits]
STEP = 2.0**-4


class Gridded(nn.Module):
    """A layer behind an input on a grid of ``bits`` bits and step ``STEP`` * 2^(8 - bits)."""

    def __init__(self, layer: nn.Module, bits: int) -> None:
        super().__init__()
        self.layer, self.bits = layer, bits

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(linger.quant_tensor(self, x, "in", bits=self.bits))


def gridded(layer: nn.Module, x: Tensor, bits: int, chip: str) -> Gridded:
    """The layer in fixed point with weights that use their grid, after training forwards on ``x``, in eval."""
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) + 0.5)
    net = linger.init(Gridded(layer, bits), data_bits=bits, out_bits=bits, target=chip)
    net(x)
    net._modules["_linger_round_tensor_iq_tensor_quant_in"].running("x").fill_(levels(bits) * step(bits))
    net(x)
    return net.eval()


def step(bits: int) -> float:
    return STEP * 2.0 ** (8 - bits)


def hard_rows(length: int, bits: int) -> np.ndarray:
    """Integer rows: constant at every kind of value, one-hot, the limits mixed, two neighbours, a ramp, noise."""
    top = 2 ** (bits - 1)
    rng = np.random.default_rng(length)
    rows = [np.full(length, v) for v in (0, 1, -1, 5, top - 1, -top)]
    for value in (1, -1, top - 1, -top):
        for rest in (0, -top, top - 1):
            row = np.full(length, rest)
            row[length // 2] = value
            rows.append(row)
    rows.append(np.where(np.arange(length) % 2, top - 1, -top))
    rows.append(np.arange(length) % 2 + 3)
    rows.append(np.linspace(-top, top - 1, length).round())
    rows += [rng.integers(-top, top, length) for _ in range(3)]
    rows += [rng.integers(-3, 4, length) for _ in range(3)]
    return np.stack(rows).astype(np.int64)


def check_file(net: nn.Module, x: Tensor, path: Path, dialect: str = "thinker", opset: int = 17) -> int:
    """Every integer of PyTorch eval equals the NumPy runtime's and ONNX Runtime's; returns how many."""
    axes = {"x": {0: "batch"}} if len(x) > 1 else {}
    linger.onnx.export(net, (x[:2],), path, input_names=["x"], dynamic_axes=axes, dialect=dialect, opset_version=opset)
    report = linger.verify(net, path, x, quiet=True)
    assert report.equal, str(report)
    assert len(report.differing) == (5 if dialect == "thinker" else 4)
    return report.elements


# --- the reciprocal square root


@pytest.mark.parametrize("platform", ["venus", "arcs", "venusa"])
def test_table_of_the_chips(platform: str) -> None:
    table = np.load(GOLDEN / platform / "tables" / "rsqrt_table_256_1023.npy")
    assert np.array_equal(reciprocals(), table)


def exact_factor(d: int) -> Fraction:
    """Equations (3), (4) in Python's integers."""
    h = (d.bit_length() + 1) // 2
    m = max(d * 4 ** max(5 - h, 0) // 4 ** max(h - 5, 0), 256)
    assert m < 1024
    return Fraction(min(math.isqrt(2**38 // m), 32767), 2 ** (h + 4))


def test_factor_is_exact_for_every_magnitude() -> None:
    """Every m with every h, the last and the first number of each power of four, 0, and 2^63 - 1."""
    d = [m * 4**k for m in range(256, 1024) for k in range(27)]
    d += [m * 4**k + 4**k - 1 for m in range(256, 1024, 7) for k in range(27)]
    d += [4**k + e for k in range(1, 32) for e in (-1, 0, 1)] + list(range(300)) + [2**63 - 1]
    found = factor(torch.tensor(d)).tolist()
    assert all(Fraction(f) == exact_factor(v) for f, v in zip(found, d, strict=True))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("centred", [True, False])
def test_rows_in_python_integers(length: int, bits: int, centred: bool) -> None:
    """PyTorch's and NumPy's y against equations (1) to (5) in integers of any size."""
    q = hard_rows(length, bits)
    rows = Rows(length=length, eps=1e-5, cut=q.shape, affine=(length,), keep=1, centred=centred)
    scale = 1 / step(bits)
    wanted = np.array([exact_row([int(v) for v in row], scale, centred) for row in q])
    x = torch.tensor(q / scale, dtype=torch.float32)
    assert np.array_equal(normalized(x, torch.tensor(scale), rows, 32).numpy(), wanted)
    assert np.array_equal(run_rows(q, scale_x=scale, eps=1e-5, centred=centred, bits=32), wanted)
    narrow = np.clip(wanted, -(2**15), 2**15 - 1)
    assert np.array_equal(normalized(x, torch.tensor(scale), rows, 16).numpy(), narrow)
    assert np.array_equal(run_rows(q, scale_x=scale, eps=1e-5, centred=centred, bits=16), narrow)


def exact_row(q: list[int], scale: float, centred: bool) -> list[int]:
    total = sum(q) if centred else 0
    e = math.floor(float(np.float32(1e-5) * np.float32(len(q) ** 2) * np.float32(scale**2)) + 0.5)
    d = len(q) * sum(v * v for v in q) - total**2 + e
    return [math.floor((len(q) * v - total) * exact_factor(d) + Fraction(1, 2)) for v in q]


def test_eps_does_not_depend_on_the_order_of_the_products() -> None:
    """Where the engine cannot wrap: float32 in any order, and float64, give the same E, so the chip's order is no matter."""
    f = np.float32
    for length in range(1, 363):
        for q in range(-8, 8):
            one_by_one = f(f(f(1e-5) * f(length)) * f(length)) * f(4.0**q)
            double = 1e-5 * length**2 * 4.0**q
            wanted = math.floor(double + 0.5)
            assert eps_integer(1e-5, length, 2.0**q) == wanted == math.floor(float(one_by_one) + 0.5)


def test_longest_rows_do_not_overflow() -> None:
    """T * 2^(b-1) = 2^31: the largest D and n that are let in."""
    q = np.where(np.arange(2**16) % 2, 2**15 - 1, -(2**15))[None]
    rows = Rows(length=2**16, eps=1e-5, cut=q.shape, affine=(2**16,), keep=1)
    wanted = exact_row([int(v) for v in q[0]], 2.0, True)
    assert normalized(torch.tensor(q / 2.0), torch.tensor(2.0), rows, 32)[0].tolist() == wanted
    assert run_rows(q, scale_x=2.0, eps=1e-5, centred=True, bits=32)[0].tolist() == wanted


# --- the engine's vectors


@pytest.mark.parametrize("vector", VECTORS, ids=str)
def test_engine_vectors_in_pytorch_and_in_the_file(vector: Path, tmp_path: Path) -> None:
    """A layer with the engine's weights: 16-bit weights, so that no integer of the vector is lost on another grid."""
    folder = GOLDEN / vector
    model = onnx.load(folder / "model.onnx")
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    node = next(n for n in model.graph.node if n.op_type == "LayerNormInt")
    attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    q, wanted = np.load(folder / "in_0.npy"), np.load(folder / "out_0.npy")
    w, b = (stored[name] / attrs["scale_w"] for name in node.input[1:])
    shape = next(q.shape[-k:] for k in range(1, q.ndim + 1) if math.prod(q.shape[-k:]) == w.size)
    layer = nn.LayerNorm(shape)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(w).view(shape))
        layer.bias.copy_(torch.from_numpy(b / 2**10).view(shape))
    linger.quant_module(layer, nn.LayerNorm, parameter_bits=16, data_bits=8, out_bits=8)
    net = linger.init(nn.Sequential(layer), target=vector.parts[0])
    x = torch.from_numpy(q / attrs["scale_x"]).float()
    net(x)
    net[0].running("x").fill_(127 / attrs["scale_x"])
    net[0].running("o").fill_(127 / attrs["scale_o"])
    net.eval()
    with torch.no_grad():
        assert np.array_equal(net(x).numpy() * attrs["scale_o"], wanted)
    assert check_file(net, x, tmp_path / "net.onnx") == wanted.size
    assert np.array_equal(linger.runtime.load(tmp_path / "net.onnx")(x) * attrs["scale_o"], wanted)


def test_every_vector_is_here() -> None:
    assert [v.parts[0] for v in VECTORS].count("venus") == 5
    assert len(VECTORS) == 15


# --- layers on hard rows, everywhere


@pytest.mark.parametrize("dialect", ["thinker", "standard"])
@pytest.mark.parametrize(("chip", "bits"), CHIP_BITS)
@pytest.mark.parametrize("length", LENGTHS)
def test_layernorm_everywhere(length: int, chip: str, bits: int, dialect: str, tmp_path: Path) -> None:
    q = hard_rows(length, bits)
    x = torch.tensor(q * step(bits), dtype=torch.float32)
    net = gridded(nn.LayerNorm(length), x, bits, chip)
    assert check_file(net, x, tmp_path / "net.onnx", dialect) == q.size


OTHERS = {
    "rms": lambda n: (nn.RMSNorm(n), (-1, n)),
    "group": lambda n: (nn.GroupNorm(2, 6), (-1, 6, -(-n // 3))),
    "instance": lambda n: (nn.InstanceNorm1d(3, affine=True), (-1, 3, max(n, 2))),
}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_others_everywhere(length: int, kind: str, bits: int, tmp_path: Path) -> None:
    """Rows of ``length`` elements, hard ones, group by group."""
    layer, shape = OTHERS[kind](length)
    row = {"rms": length, "group": 3 * -(-length // 3), "instance": max(length, 2)}[kind]
    q = hard_rows(row, bits)
    q = np.concatenate([q, q[: -len(q) % 6]])
    x = torch.tensor(q * step(bits), dtype=torch.float32).reshape(shape)
    net = gridded(layer, x, bits, "venus")
    assert check_file(net, x, tmp_path / "net.onnx") == q.size


@pytest.mark.parametrize("opset", [12, 13, 18, 26])
@pytest.mark.parametrize("kind", OTHERS)
def test_every_opset(kind: str, opset: int, tmp_path: Path) -> None:
    layer, shape = OTHERS[kind](31)
    x = torch.randn(2 * 6 * 33 * 31).reshape(shape) if kind != "instance" else torch.randn(4, 3, 31)
    net = gridded(layer, x, 8, "venus")
    assert check_file(net, x, tmp_path / "net.onnx", opset=opset) == x.numel()


def test_venus_saturates_what_the_others_do_not(tmp_path: Path) -> None:
    """One element of 2048 is 45 standard deviations away: 16 bits at 2^10 end at 32."""
    q = np.zeros((1, 2048), np.int64)
    q[0, 7] = 100
    one, zero = np.full(2048, 64, np.int8), np.zeros(2048, np.int32)
    top = {
        chip: int(
            layernorm.run(q, one, zero, scale_x=16.0, scale_w=64.0, scale_o=1024.0, o_bits=32, platform=chip).max()
        )
        for chip in TARGETS
    }
    exact = max(exact_row(q[0].tolist(), 16.0, True))
    assert exact > 45 * 2**10
    assert top == {"venus": 2**15 - 1, "arcs": exact, "venusa": exact}
    for chip in TARGETS:
        net = linger.init(nn.Sequential(nn.LayerNorm(2048)), target=chip)
        x = torch.tensor(q / 16.0, dtype=torch.float32)
        net(x)
        net[0].running("o").fill_(100.0)
        assert check_file(net.eval(), x, tmp_path / "net.onnx") == 2048
        with torch.no_grad():
            assert net(x).max() == (32 if chip == "venus" else 45)


def test_products_saturate_at_32_bits(tmp_path: Path) -> None:
    """90 standard deviations times a 16-bit weight: equation (6) clamps the product before it adds the bias."""
    layer = nn.LayerNorm(8192)
    linger.quant_module(layer, nn.LayerNorm, parameter_bits=16, data_bits=8, out_bits=16)
    with torch.no_grad():
        layer.weight.fill_(32767 / 2**15)
        layer.bias.fill_(-32.0)
    net = linger.init(nn.Sequential(layer), target="venusa")
    q = np.zeros((2, 8192), np.int64)
    q[0, 5], q[1, 9] = 127, -128
    x = torch.tensor(q * STEP, dtype=torch.float32)
    net(x)
    with torch.no_grad():
        found = net.eval()(x)
    assert found.max() == 2**31 / 2**25 - 32  # (2^31 - 1 at 2^25) - 32 on the output's grid
    assert found.min() == -(2**31) / 2**25 - 32
    assert check_file(net, x, tmp_path / "net.onnx") == q.size


def test_engine_rows_that_cannot_wrap() -> None:
    """The largest sums of an int8 row, T * sum x^2 = 2^14 * T^2, fit 31 bits up to the length in the targets."""
    for chip in TARGETS.values():
        length = chip.longest_row["LayerNormInt"]
        assert 2**14 * length**2 < 2**31 <= 2**14 * (length + 1) ** 2


def test_a_very_fine_input_is_made_coarser(tmp_path: Path) -> None:
    """Below 2^-28 or so eps would leave 63 bits; eval, the file and the float layer still agree."""
    x = torch.randn(5, 300) * 2.0**-36
    layer = nn.LayerNorm(300)
    net = linger.init(nn.Sequential(nn.Identity(), Gridded(layer, 8)), data_bits=8)
    net(x)
    net.eval()
    found = check_file(net, x, tmp_path / "net.onnx")
    kinds = [n.op_type for n in onnx.load(tmp_path / "net.onnx").graph.node]
    assert found == x.numel()
    assert kinds == ["Quant", "Requant", "LayerNormInt", "Dequant"]
    with torch.no_grad():
        assert net(x).abs().max() <= 2.0**-9  # 2^-36 / sqrt(1e-5) is below half an LSB of 2^-10


# --- eps


def float_layer(kind: str, x: Tensor, w: Tensor, b: Tensor | None, eps: float) -> Tensor:
    """PyTorch's own function in float64."""
    x, w, b = x.double(), w.double(), None if b is None else b.double()
    if kind == "rms":
        return F.rms_norm(x, (60,), w, eps)
    if kind == "layer":
        return F.layer_norm(x, (60,), w, b, eps)
    return F.group_norm(x, 2, w, b, eps) if kind == "group" else F.instance_norm(x, None, None, w, b, eps=eps)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3, 0.5, 30.0])
@pytest.mark.parametrize("kind", ["layer", *OTHERS])
def test_a_layer_keeps_its_own_eps(kind: str, eps: float, tmp_path: Path) -> None:
    """Within one LSB of the output and the 2^-9 of the table of the float layer; with 1e-5 it would be far outside."""
    layer, shape = (nn.LayerNorm(60), (-1, 60)) if kind == "layer" else OTHERS[kind](60)
    layer.eps = eps
    x = (torch.randint(-32, 32, (180 * 24,)) * STEP).reshape(shape)
    net = gridded(layer, x, 8, "arcs")
    with torch.no_grad():
        module = net.layer
        found, scale = net(x), float(module.scale("o", 8))
        w, b, _ = module.on_grids(*module.given(), module.norm(x.shape, 8).rows)
        flat = (w.reshape(-1), None if b is None else b.reshape(-1))
        wanted = float_layer(kind, x, *flat, eps)
    inside = wanted.abs() < 127 / scale
    assert (found - wanted)[inside].abs().max() <= 1 / scale + wanted.abs().max() * 2.0**-9
    model = linger.onnx.export(net, (x,), tmp_path / "net.onnx")
    node = next(n for n in model.graph.node if n.op_type.endswith("NormInt"))
    assert {a.name: a.f for a in node.attribute}["epsilon"] == np.float32(eps)
    assert check_file(net, x, tmp_path / "net.onnx") == x.numel()


def test_the_engines_eps_is_not_written(tmp_path: Path) -> None:
    """With 1e-5 the node has the attributes of the engine's own vectors and no other."""
    x = torch.randn(4, 20)
    model = linger.onnx.export(gridded(nn.LayerNorm(20), x, 8, "venus"), (x,), tmp_path / "net.onnx")
    node = next(n for n in model.graph.node if n.op_type == "LayerNormInt")
    vector = onnx.load(GOLDEN / "venus/p6_LayerNorm_last/model.onnx").graph.node[1]
    assert {a.name for a in node.attribute} == {a.name for a in vector.attribute} | {"quant_mode"}
    stored = {i.name: i for i in model.graph.initializer}
    kinds = [(stored[n].data_type, list(stored[n].dims)) for n in node.input[1:]]
    assert kinds == [(onnx.TensorProto.INT16, [20]), (onnx.TensorProto.INT32, [20])]
