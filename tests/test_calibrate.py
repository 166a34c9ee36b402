"""Calibration: what each method chooses, that the ranges are those of the data, and that the file computes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.histogram import BINS, METHODS, Histogram, by_kl, by_mse, by_percentile
from linger.numerics import fake_quant, levels, scale_from_running
from linger.ops import IntModule

LIMITS = {"max": 30, "percentile": 25, "mse": 30, "kl": 25}  # dB of the net below that every method must keep


class Net(nn.Module):
    """Convolutions, a sum, a concatenation, batch normalization alone, dropout, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2, self.drop, self.fc = nn.BatchNorm2d(16), nn.Dropout(0.5), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = torch.cat((x, x + self.conv2(x)), 1)
        return self.fc(self.drop(F.relu(self.bn2(x)).mean((2, 3))))


def batches(n: int = 3) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 8, 8, generator=generator), 0) for _ in range(n)]


def float_net() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    for x, _ in batches(8):
        net(x)
    return net.eval()


def fixed(traced: bool = True, **options: Any) -> nn.Module:
    net = float_net()
    if traced:
        linger.trace_layers(net, net, batches()[0][0])
    return linger.init(net, **options)


def calibrated(method: Any = "mse", data: Any = None, **options: Any) -> nn.Module:
    return linger.calibrate(fixed(), data or batches(), method, progress=False, **options)


def ranges(net: nn.Module) -> dict[str, float]:
    return {k: float(v) for k, v in net.state_dict().items() if k.rpartition("_")[2] in "xyo" and ".running_" in k}


def decibel(net: nn.Module) -> float:
    x = torch.cat([x for x, _ in batches()])
    with torch.no_grad():
        want, found = float_net()(x), net.eval()(x)
    return 10 * math.log10(want.pow(2).sum() / (want - found).pow(2).sum())


# --- the whole net


@pytest.mark.parametrize("method", METHODS)
def test_a_calibrated_net_is_close_to_float_and_its_file_is_equal(method: str, tmp_path: Path) -> None:
    net, x = calibrated(method), batches()[0][0]
    assert decibel(net) > LIMITS[method]
    linger.onnx.export(net, (x,), tmp_path / "net.onnx")
    assert linger.verify(net, tmp_path / "net.onnx", x, quiet=True).equal


def test_the_maximum_is_that_of_all_batches() -> None:
    data = [batches()[0], (batches()[1][0] * 3, 0), batches()[2]]
    assert ranges(calibrated("max", data))["conv1.running_x"] == max(float(x.abs().max()) for x, _ in data)


def test_a_second_calibration_starts_anew() -> None:
    loud = [(x * 100, y) for x, y in batches()]
    net = linger.calibrate(calibrated("mse", loud), batches(), progress=False)
    assert ranges(net) == ranges(calibrated())


def test_a_second_calibration_takes_back_the_first() -> None:
    def tensors(net: nn.Module) -> list[Tensor]:
        return list(net.state_dict().values())

    once = linger.calibrate(fixed(parameter_bits=4), batches(), progress=False)
    twice = linger.calibrate(fixed(parameter_bits=4), batches(1), "kl", progress=False)
    assert not all(map(torch.equal, tensors(once), tensors(twice)))
    linger.calibrate(twice, batches(), progress=False)
    assert all(map(torch.equal, tensors(once), tensors(twice)))
    with torch.no_grad():
        twice.fc.bias += 1
    trained = twice.fc.bias.clone()
    linger.calibrate(twice, batches(), correct_bias=False, progress=False)
    assert torch.equal(twice.fc.bias, trained)


def test_nothing_but_ranges_changes() -> None:
    before = {k: v.clone() for k, v in fixed().state_dict().items() if ".scale_" not in k}
    net = calibrated(weights=None, correct_bias=False)
    after = net.state_dict()
    assert [k for k, v in before.items() if not torch.equal(after[k], v) and k not in ranges(net)] == []


def test_every_range_is_chosen_and_agrees_with_its_neighbours() -> None:
    found = ranges(calibrated())
    assert min(found.values()) > 0
    assert found["fc.running_o"] > 0
    scale = scale_from_running(torch.tensor(found["conv1.running_o"]), 8)
    assert found["conv2.running_x"] == levels(8) / scale


@pytest.mark.parametrize("training", [False, True])
def test_modes_come_back(training: bool) -> None:
    net = fixed(traced=False).train(training)
    net.fc.train(not training)
    linger.calibrate(net, batches(), progress=False)
    assert net.training is net.conv1.training is training
    assert net.fc.training is not training
    assert all(m.training is training for name, m in net.named_modules() if "_linger_round" in name)


def test_no_dropout_and_no_batch_statistics() -> None:
    assert ranges(calibrated()) == ranges(calibrated())
    net = fixed()
    mean = net.bn2.running_mean.clone()
    linger.calibrate(net, batches(), progress=False)
    assert torch.equal(net.bn2.running_mean, mean)


@pytest.mark.parametrize("hold", [True, False])
def test_training_afterwards(hold: bool) -> None:
    net = calibrated(hold=hold).train()
    net.drop.p = 0.0  # its factor would move the grid behind it
    before = ranges(net)
    net(batches()[0][0] * 9).sum().backward()
    assert (ranges(net) == before) is hold
    assert all(p.grad is not None for p in net.parameters())


def test_a_method_for_each_layer() -> None:
    mixed = ranges(calibrated({"conv?": "max", "*": "mse"}))
    assert mixed["conv1.running_x"] == ranges(calibrated("max"))["conv1.running_x"]
    for key in ("bn2.running_o", "fc.running_o"):
        assert mixed[key] in [levels(8) / 2.0**n for n in range(-9, 9)], "no maximum of data"


FEEDS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x, "list": lambda x: [x, 1], "mapping": lambda x: {"x": x}, "iterator": lambda x: (x, 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", FEEDS)
def test_kinds_of_loaders(kind: str) -> None:
    data: Any = [FEEDS[kind](x) for x, _ in batches()]
    assert ranges(calibrated("mse", iter(data) if kind == "iterator" else data)) == ranges(calibrated())


def test_only_some_batches() -> None:
    loud = [*batches(2), (torch.full((4, 3, 8, 8), 1e3), 0)]
    assert ranges(calibrated("max", loud, batches=2)) == ranges(calibrated("max", batches(2)))
    assert ranges(calibrated("max", iter(loud), batches=2)) == ranges(calibrated("max", batches(2)))


def test_the_callers_own_forward() -> None:
    data: Any = [[{"image": x}] for x, _ in batches()]
    net = calibrated("mse", data, forward=lambda net, batch: net(batch[0]["image"]))
    assert ranges(net) == ranges(calibrated())


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "method": (lambda: calibrated("best"), "method is 'best', allowed are max, percentile, mse, kl"),
    "pattern": (lambda: calibrated({"cov*": "max"}), r"the pattern 'cov\*' fits no layer, allowed are those of conv1"),
    "float": (lambda: linger.calibrate(float_net(), batches()), "found Net without a fixed-point layer; call init"),
    "empty": (lambda: calibrated(data=iter(())), "found an empty loader"),
    "percentile": (lambda: calibrated(percentile=0), "percentile is 0, allowed are numbers above 0 up to 100"),
    "batches": (lambda: calibrated(batches=0), "batches is 0, allowed are None and numbers from 1"),
    "batch": (lambda: calibrated(data=["x"]), "the loader yields str, allowed are a tensor"),
    "nan": (lambda: calibrated(data=[torch.full((1, 3, 8, 8), torch.nan)]), "the range of running_x is nan"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name: str) -> None:
    make, text = BAD[name]
    with pytest.raises(linger.LingerError, match=text):
        make()


def test_an_error_leaves_the_ranges_alone() -> None:
    net = calibrated()
    before = ranges(net)
    with pytest.raises(linger.LingerError, match="is nan"):
        linger.calibrate(net, [*batches(), (torch.full((1, 3, 8, 8), torch.nan), 0)], progress=False)
    assert ranges(net) == before
    assert not any(m.training for m in net.modules() if isinstance(m, IntModule))


def test_an_error_leaves_the_weights_alone() -> None:
    net = fixed(parameter_bits=4)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(linger.LingerError, match="is nan"):
        linger.calibrate(net, [torch.full((1, 3, 8, 8), torch.nan)], progress=False)
    assert all(map(torch.equal, before, net.parameters()))
    linger.calibrate(net, batches(), progress=False)
    assert not all(map(torch.equal, before, net.parameters()))


# --- more than one process


def rank(i: int, path: str) -> None:
    """One process of the test below; its half of the batches."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=i, world_size=2)
    net = linger.calibrate(fixed(), batches(4)[i::2], batchnorm=True, progress=False)
    torch.save(net.state_dict(), f"{path}.{i}")
    dist.destroy_process_group()


def test_every_rank_ends_with_the_same_net(tmp_path: Path) -> None:
    path = str(tmp_path / "rendezvous")
    torch.multiprocessing.spawn(rank, (path,), nprocs=2)
    first, second = (torch.load(f"{path}.{i}") for i in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(v, second[k]) for k, v in first.items() if "num_batches" not in k)
    alone = linger.calibrate(fixed(), batches(4), batchnorm=True, progress=False).state_dict()
    assert first["conv1.running_o"] == alone["conv1.running_o"]
    torch.testing.assert_close(first["conv1.bias"], alone["conv1.bias"])
    torch.testing.assert_close(first["bn2.running_mean"], alone["bn2.running_mean"], rtol=1e-3, atol=1e-4)


# --- what a histogram says


def seen(x: Tensor, parts: int = 1) -> Histogram:
    made = Histogram()
    for part in x.chunk(parts):
        made.add(part, float(part.abs().max()))
    return made


def test_counts_do_not_depend_on_the_order_of_sizes() -> None:
    x = torch.randn(4096).sort().values
    once, grown = seen(x), seen(x.abs().sort().values, 16)
    assert once.top == grown.top >= float(x.abs().max())
    assert torch.equal(once.counts, grown.counts)
    assert once.counts.sum() + once.zeros == x.numel()


def test_percentile() -> None:
    x = torch.linspace(0, 1, 1001)
    for percent in (50, 90, 99):
        assert by_percentile(seen(x), 1.0, 8, percent) == pytest.approx(percent / 100, abs=2 / BINS)
    assert by_percentile(seen(x), 1.0, 8, 100) == 1.0


def heavy(n: int = 50_000) -> Tensor:
    """Mostly small values and a few large ones."""
    torch.manual_seed(3)
    return torch.cat((torch.randn(n), torch.tensor([40.0])))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("x", [torch.linspace(-3, 3, 20001), heavy(), heavy(500)], ids=["even", "heavy", "few"])
def test_mse_is_the_best_power_of_two(x: Tensor, bits: int) -> None:
    peak = float(x.abs().max())
    scale = levels(bits) / by_mse(seen(x), peak, bits, 0)
    errors = {
        2.0**n: float((fake_quant(x.double(), torch.tensor(2.0**n), bits) - x).pow(2).sum()) for n in range(-4, 20)
    }
    assert errors[scale] <= 1.02 * min(errors.values())


def test_kl_clips_a_lonely_value_and_not_an_even_distribution() -> None:
    assert by_kl(seen(heavy()), 40.0, 8, 0) < 20
    assert 2.9 < by_kl(seen(torch.linspace(-3, 3, 20001)), 3.0, 8, 0) < 6


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_zeros(method: str) -> None:
    net = linger.init(nn.Sequential(nn.Linear(3, 3, bias=False)))
    linger.calibrate(net, [torch.zeros(2, 3)], method, progress=False)
    assert torch.equal(net.eval()(torch.zeros(1, 3)), torch.zeros(1, 3))


# --- ranges of calls that follow a function


class Call(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(linger.quant_tensor(self, x, "into"))


CALLS = {  # the site whose range is calibrated, and the call
    "a table": ("iqexp", torch.exp),
    "a table with a pole": ("iqreciprocal", lambda x: torch.reciprocal(x.abs() + 0.125)),
    "a gate": ("iqglu", lambda x: F.glu(x, 1)),
    "probabilities": ("SoftmaxInt", lambda x: torch.softmax(x * 4, 1)),
    "a quotient": ("iqdiv", lambda x: x / (x.abs() * 0.125 + 0.5)),
    "a spread": ("iqvar", lambda x: x.var(1)),
    "an input": ("tensor_quant", F.relu),
}


def tailed() -> list[Tensor]:
    """Values near 0, and a few far away."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(64, 32, generator=generator) * 0.25 for _ in range(2)]
    made[1][0, :8] = 3.0
    return made


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_calibrated_by_the_method(name: str, tmp_path: Path) -> None:
    data, found = tailed(), {}
    site, call = CALLS[name]
    want = [call(x) for x in data]
    for method in METHODS:
        net = linger.init(Call(call))
        linger.calibrate(net, data, {f"*{site}*": method, "*": "max"}, percentile=90, progress=False)
        error = sum(float((net.eval()(x) - y).pow(2).sum()) for x, y in zip(data, want, strict=True))
        found[method] = next(v for k, v in ranges(net).items() if site in k), error
        linger.onnx.export(net, (data[1],), tmp_path / "net.onnx")
        assert linger.verify(net, tmp_path / "net.onnx", data[1], quiet=True).equal
    assert found["percentile"][0] < found["max"][0]
    assert found["mse"][1] <= found["max"][1]
