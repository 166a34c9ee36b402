"""Softmax, softmin and log-softmax: golden vectors, rows of every length and grid, gradients, masks, losses, errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_interop import described, plain_export
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.numerics import grid_of, levels
from linger.ops import BY_NAME, IntModule
from linger.targets import TARGETS
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


@pytest.mark.parametrize(
    ("chip", "q_x", "row"),
    [
        ("arcs", 8, [16384, 16277, 16064, 13716, 15312, 15858, 13885, 13729, 14669, 13644]),
        ("arcs", 4, [1024, 1000, 801, 779, 765, 920, 1011, 953, 972]),
        ("venusa", 8, [16384, 16260, 16058, 13962, 13986, 16154]),
        ("venusa", 4, [1024, 1010, 937, 780, 982, 974, 755, 865, 774, 890, 946, 956]),
    ],
)
def test_maximum_of_2_to_31_minus_1(chip: str, q_x: int, row: list[int]) -> None:
    """Rows in which the one that the saturation takes from 64.0 changes a probability."""
    net, x = both(chip, q_x, 16), torch.tensor([row]) / 2.0**q_x
    with torch.no_grad():
        wanted = net(x)[0].numpy()
    run = BY_NAME["SoftmaxInt"].run
    q = np.array([row], np.int16)
    found = run(q, scale_x=2.0**q_x, scale_o=2.0**15, platform=TARGETS[chip].platform)
    assert np.array_equal(found, wanted * 2**15)
    assert not np.array_equal(found, run(q - 1, scale_x=2.0**q_x, scale_o=2.0**15, platform=TARGETS[chip].platform))
    proto = linger.onnx.export(net, (x,), None)
    assert np.array_equal(session(proto, "all").run(None, {"x": x.numpy()})[0], wanted)


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


@pytest.mark.parametrize("chip", CHIPS)
def test_softmin_is_softmax_of_the_negative(chip: str, tmp_path: Path) -> None:
    net, other = converted(nn.Softmin(1), chip), converted(lambda x: torch.softmax(x, 1), chip)
    for n in (net, other):
        n(X)
        grids(n, 4, 8)
    lowest = X.clone()
    lowest[:, 2], lowest[:, 3] = -9.0, -7.0  # -9 is -128 at 2^4, whose negative is 127
    with torch.no_grad():
        assert torch.equal(net(lowest), other(-lowest))
    linger.onnx.export(net, (X,), tmp_path / "n.onnx")
    assert linger.verify(net, tmp_path / "n.onnx", X, quiet=True).equal


def test_softmin_through_plain_export(tmp_path: Path) -> None:
    net = converted(nn.Softmin(1))
    net(X)
    with torch.no_grad():
        net.eval()(X)
    theirs = plain_export(net, (X,), tmp_path / "n.onnx")
    ours = linger.onnx.export(net, (X,), None, dynamic_axes={"x": {0: "batch"}})
    assert described(theirs) == described(ours)


@pytest.mark.parametrize("name", ["softmax", "softmin", "log_softmax"])
def test_other_types_are_float_islands(name: str) -> None:
    net = converted(lambda x: getattr(F, name)(x, -1, dtype=torch.float64).float())
    assert grid_of(net(X)) is None
    with pytest.warns(linger.LingerWarning, match=r"in float: (softmin|softmax|log_softmax)_0"):
        proto = linger.onnx.export(net.eval(), (X,), None)
    with torch.no_grad():
        assert np.allclose(session(proto, "all").run(None, {"x": X.numpy()})[0], net(X), atol=1e-6)


@pytest.mark.parametrize("switch", ["SetIQTensorSoftmax", "SetIQTensorLogSoftmax"])
def test_switched_off(switch: str) -> None:
    getattr(linger, switch)(False)
    try:
        net = linger.init(Both())
    finally:
        getattr(linger, switch)(True)
    soft, log = net(X)
    off, on = (soft, log) if switch == "SetIQTensorSoftmax" else (log, soft)
    assert grid_of(off) is None
    assert grid_of(on) is not None


@pytest.mark.parametrize("function", ["softmax", "log_softmax", "softmin"])
def test_bad_dimensions(function: str) -> None:
    net = converted(lambda x: getattr(F, function)(x, 3))
    with pytest.raises(linger.LingerError, match=r"_0: dim is 3, allowed are -3 to 2 for 3 dimensions"):
        net(X)
    net = converted(lambda x: getattr(F, function)(x.sum(), 0))
    with pytest.raises(linger.LingerError, match=r"found a tensor without dimensions.*reshape\(1\)"):
        net(X)


def test_checkpoint_of_upstream() -> None:
    """Its keys make the sites of a net that has not run; what they derive from other values is left out."""
    net = linger.init(Both())
    wanted = net(X)
    upstream = dict(net.state_dict())
    for site in ("SoftmaxInt_0", "LogSoftmaxInt_1"):
        for key in ("running_x", "scale_x", "scale_local_o"):
            upstream[f"_linger_round_tensor_{site}.{key}"] = torch.ones(1)
    fresh = linger.init(Both())
    fresh.load_state_dict(upstream)
    assert set(net.state_dict()) <= set(fresh.state_dict()) <= set(upstream)
    assert not any("local" in k for k in fresh.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fresh.eval()(X), wanted, strict=True))


# --- gradients, training


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_is_the_float_functions(chip: str, name: str) -> None:
    """In float32 at the fake-quantized input, against float64; zero where the output saturates."""
    net = linger.init(Both(), target=chip)
    net(torch.randn(4, 9))
    grids(net, 5, 8, probability=0.3, log=3.0)
    x = (torch.randint(-90, 90, (4, 9)) / 2.0**5).requires_grad_()
    weight = torch.randn(4, 9)
    y = net(x)[list(FUNCTIONS).index(name)]
    (y * weight).sum().backward()
    inside = (y * y.grid.scale > -128) & (y * y.grid.scale < 127)
    assert 0 < int(inside.sum()) < inside.numel()
    wide = x.detach().double().requires_grad_()
    (FUNCTIONS[name](wide) * weight.double() * inside).sum().backward()
    assert torch.allclose(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)  # float32 sums of 9 terms


def test_losses_stay_in_float() -> None:
    """A loss outside of the net sees plain numbers; one inside of it is not routed either."""

    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.loss = nn.Linear(6, 5), nn.CrossEntropyLoss()

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            z = self.fc(x)
            return z, self.loss(z, y)

    net = Trained()
    linger.disable_quant(net.loss)
    linger.init(net)
    x, y = torch.randn(7, 6), torch.arange(7) % 5
    z, inner = net(x, y)
    values = z.detach()
    assert z.grid is not None
    assert torch.equal(F.cross_entropy(z, y), F.cross_entropy(values, y))
    assert torch.equal(inner, F.cross_entropy(values, y))
    outside = F.log_softmax(z, -1)
    assert torch.equal(outside, F.log_softmax(values, -1))
    assert not any("oftmax" in k for k in net.state_dict())
    F.nll_loss(outside, y).backward()
    assert net.fc.weight.grad.abs().sum() > 0


def test_training_through_log_softmax_and_nll() -> None:
    net = linger.init(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3), nn.LogSoftmax(-1)), target="venus")
    x = torch.randn(64, 4)
    y = x[:, :3].argmax(1)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(F.nll_loss(net(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 3
    with torch.no_grad():
        assert (net.eval()(x).argmax(1) == y).float().mean() > 0.9


@pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.* should not be instantiated"
)  # by PyTorch's own tracer
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("train", [True, False])
def test_compiled_is_eager(chip: str, train: bool) -> None:
    net = linger.init(Both(), target=chip)
    net(X)
    net.train(train)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    state = {k: v.clone() for k, v in net.state_dict().items()}
    found = compiled(X)
    net.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(found, net(X), strict=True))
