"""The running maximum: how it starts, what it follows, what it refuses, and that train and eval use the same grids."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import linger
from linger.numerics import NOTHING, scale_from_running
from linger.observe import EMPTY, MOMENTUM, peak, update

X = [-3.0, 0.0, 2.0]


# --- what a batch says


@pytest.mark.parametrize(
    ("x", "options", "want"),
    [
        (X, {}, 3),
        (X, {"ahead_relu": True}, 2),
        (X, {"bound": 2.5}, 2.5),
        (X, {"ahead_relu": True, "bound": 1.5}, 1.5),
        (X, {"ahead_relu": True, "bound": 8}, 2),
        ([-3.0, -1.0], {"ahead_relu": True}, 0),
        ([0.0, 0.0], {}, 0),
        ([], {}, EMPTY),
        ([], {"ahead_relu": True, "bound": 8}, EMPTY),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_peak(x: list[float], options: dict[str, float], want: float, dtype: torch.dtype) -> None:
    found = peak(torch.tensor(x, dtype=dtype), **options)  # type: ignore[arg-type]
    assert (found.item(), found.dtype, found.shape) == (want, torch.float32, ())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "options", [{}, {"ahead_relu": True}, {"bound": 8.0}, {"ahead_relu": True, "bound": 8.0}], ids=str
)
def test_no_option_hides_what_is_not_finite(bad: float, options: dict[str, float]) -> None:
    """-inf is no positive value and inf is beyond every bound, but both say that the training diverged."""
    assert not peak(torch.tensor([1.0, bad, -1.0]), **options).isfinite()  # type: ignore[arg-type]


# --- what the running maximum makes of it


def followed(*values: float) -> float:
    running = torch.zeros(())
    for value in values:
        update(running, torch.tensor(value), "running_x")
    return running.item()


def test_starts_from_the_first_batch() -> None:
    assert followed(3.0) == 3.0


def test_follows_with_momentum() -> None:
    """0.9 running + 0.1 value: 2 -> 12 is 3, then -> 3 stays, then -> 13 is 4."""
    assert MOMENTUM == 0.1
    assert followed(2.0, 12.0) == 3.0
    assert followed(2.0, 12.0, 3.0, 13.0) == 4.0


def test_zeros_are_seen_but_do_not_start_it() -> None:
    """After nothing but zeros the scale is 1 and eval may run; the first other batch counts as the first."""
    assert followed(0.0) == followed(0.0, 0.0) == torch.tensor(NOTHING).item()
    assert scale_from_running(torch.tensor(followed(0.0)), 8).item() == 1.0
    assert followed(0.0, 3.0) == 3.0
    assert followed(3.0, 0.0) == pytest.approx(2.7, rel=1e-6)


def test_empty_batches_say_nothing() -> None:
    assert followed(EMPTY) == 0.0
    assert followed(3.0, EMPTY) == 3.0
    assert followed(EMPTY, 3.0) == 3.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_running_maximum_stays_finite(bad: float) -> None:
    running = torch.tensor(2.0)
    with pytest.raises(linger.LingerError, match=f"the range of running_x is {bad}, allowed are finite values"):
        update(running, torch.tensor(bad), "running_x")
    assert running.item() == 2.0


# --- in a net


class Net(nn.Module):
    """A plain input, a site, and a layer followed by a relu."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv1d(2, 3, 1), nn.ReLU())
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x).mean(-1)
        return self.fc(y) + 1.5


def converted() -> nn.Module:
    net = Net()
    linger.trace_layers(net, net, torch.randn(2, 2, 5))
    return linger.init(linger.normalize_layers(net))


def running(net: nn.Module) -> dict[str, float]:
    return {k: v.item() for k, v in net.state_dict().items() if "running_" in k}


def test_the_first_batch_is_enough() -> None:
    """Ranges are those of the batch, of its positive half before a relu, and eval works."""
    net, x = converted(), torch.randn(7, 2, 5)
    net(x)
    conv = net.block[0]
    accumulator = nn.functional.conv1d(
        (x * conv.scale("x", 8) + 0.5).floor().clamp(-128, 127) / conv.scale("x", 8),
        *conv.grids(conv.scale("x", 8))[:2],
    )
    found = running(net)
    assert conv.ahead_relu
    assert found["block.0.running_x"] == x.abs().max().item()
    assert found["block.0.running_o"] == accumulator.max().item()
    with torch.no_grad():
        net.eval()(x)


def test_eval_before_any_batch() -> None:
    with pytest.raises(
        linger.LingerError, match=r"block\.0: running_x is 0, so no batch has been seen; run at least one"
    ):
        converted().eval()(torch.randn(1, 2, 5))


def test_an_empty_batch_changes_no_range() -> None:
    net = converted()
    net(torch.randn(4, 2, 5))
    before = running(net)
    assert net(torch.randn(0, 2, 5)).shape == (0, 4)
    assert running(net) == before


def test_a_first_batch_of_zeros() -> None:
    """Inputs of zeros give a grid of scale 1, and the next batch starts the range."""
    net, x = converted(), torch.randn(4, 2, 5)
    net(torch.zeros(4, 2, 5))
    with torch.no_grad():
        assert net.eval()(torch.zeros(1, 2, 5)).isfinite().all()
    net.train()(x)
    assert running(net)["block.0.running_x"] == x.abs().max().item()


def test_train_and_eval_use_the_same_grids() -> None:
    """Batches of very different size: after each, the eval output is the training output."""
    net = converted()
    for factor in (1.0, 100.0, 0.01, 7.0):
        x = torch.randn(4, 2, 5) * factor
        trained = net.train()(x)
        ranges = running(net)
        with torch.no_grad():
            assert torch.equal(net.eval()(x), trained)
            net(x * 50)
        assert running(net) == ranges


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_divergence_names_the_layer(bad: float) -> None:
    """In the input, in the weights of a layer that is followed by a relu, and in a checkpoint."""
    x = torch.randn(4, 2, 5)
    net = converted()
    net(x)
    spoiled = x.clone()
    spoiled[1, 1, 1] = bad
    with pytest.raises(
        linger.LingerError, match=r"block\.0: the range of running_x is (nan|inf), allowed are finite values"
    ):
        net(spoiled)
    net.fc.bias.data[0] = bad
    with pytest.raises(linger.LingerError, match=r"fc: the range of running_o is (nan|inf), allowed are finite values"):
        net(x)
    net = converted()
    net(x)
    net.load_state_dict(net.state_dict() | {"fc.running_o": torch.tensor(bad)})
    with pytest.raises(linger.LingerError, match=f"fc: running_o is {bad}, allowed are finite values"):
        net.eval()(x)


# --- parameters as operands


class Placed(nn.Module):
    """Learned positions and a gain, which have no range to follow."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.gain = nn.Parameter(torch.tensor([2.43, -1.7, 0.01])), nn.Parameter(torch.tensor(-1.37))

    def forward(self, x: Tensor) -> Tensor:
        return (linger.quant_tensor(self, x, "x") + self.positions) * (1 + self.gain)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_parameter_as_operand_has_the_scale_of_a_weight(bits: int, tmp_path: Path) -> None:
    """It follows every step of the optimizer at once, and no value of it saturates: 2^round could, by sqrt(2)."""
    net = linger.init(Placed(), data_bits=bits, out_bits=bits)
    x = torch.randn(4, 3)
    net(x)
    with torch.no_grad():
        net.positions.mul_(3.0)
    net(x)
    sums = net.get_submodule("_linger_round_tensor_iqadd__default_index_0")
    held = 8 if bits == 8 else 16
    top = 2 ** (held - 1) - 1
    scale = float(scale_from_running(sums.running_y, held))
    assert scale == 2.0 ** math.floor(math.log2(top / 7.29))
    for _ in range(60):  # the range of the sum follows
        out = net(x)
    out.sum().backward()
    assert (net.positions.grad != 0).all()
    linger.onnx.export(net.eval(), (x,), tmp_path / "net.onnx")
    assert linger.verify(net, tmp_path / "net.onnx", x, quiet=True).equal


# --- on several ranks


def rank(i: int, path: str, values: list[list[float]]) -> None:
    """One process: its own tensor, and what every rank must agree on."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=i, world_size=2)
    found = [peak(torch.tensor(v), bound=100.0).item() for v in values[i::2]]
    Path(f"{path}.{i}").write_text(repr(found))
    dist.destroy_process_group()


def test_every_rank_has_the_maximum(tmp_path: Path) -> None:
    """Also where one rank has an empty batch (it must not leave the others waiting), or a NaN."""
    pairs = [([1.0], [-5.0]), ([], [3.0]), ([], []), ([math.nan], [2.0]), ([4.0], [math.inf])]
    flat = [side for pair in pairs for side in pair]
    path = str(tmp_path / "rendezvous")
    torch.multiprocessing.spawn(rank, (path, flat), nprocs=2)
    texts = [Path(f"{path}.{i}").read_text() for i in range(2)]
    assert texts == [repr([5.0, 3.0, EMPTY, math.inf, math.inf])] * 2


class Again(nn.Module):
    """A layer that takes the input, and then its own result; ``first`` says which comes first in a forward."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.stem, self.fc, self.first = nn.Linear(8, 8), nn.Linear(8, 8), first

    def forward(self, x: Tensor) -> Tensor:
        if self.first == "plain":
            return self.fc(torch.tanh(self.fc(x)))
        return self.fc(torch.tanh(self.stem(x))) + self.fc(x)


@pytest.mark.parametrize("first", ["plain", "gridded"])
def test_an_input_without_a_grid_keeps_its_range(first: str) -> None:
    """Also where the layer takes a tensor with a grid in the same forward, whose scale says nothing about the input."""
    net, x = linger.init(Again(first)), 20 * torch.randn(64, 8)
    for _ in range(60):
        net(x)
    assert float(net.fc.running_x) == pytest.approx(float(x.abs().max()), rel=0.01)


def trained(net: nn.Module, seeds: range, forward: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """``net`` after a step of training for each seed."""
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    for seed in seeds:
        x = 20 * torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        (net if forward is None else forward)(x).square().mean().backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("first", ["plain", "gridded"])
def test_training_goes_on_from_a_checkpoint_with_the_range_of_the_input(first: str) -> None:
    net = trained(linger.init(Again(first)), range(4))
    other = linger.init(Again(first))
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    found, expected = (trained(n, range(4, 7)).state_dict() for n in (other, net))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
@pytest.mark.parametrize("first", ["plain", "gridded"])
def test_a_compiled_net_that_was_traced_keeps_the_range_of_the_input(first: str) -> None:
    net, x = Again(first), torch.randn(16, 8)
    linger.trace_layers(net, net, (x,))
    linger.init(net)
    other = copy.deepcopy(net)
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    trained(net, range(3))
    trained(other, range(3), compiled)
    assert float(other.fc.running_x) == float(net.fc.running_x) > 20


class Widths(nn.Module):
    """A layer that takes a tensor of 16 bits, and one of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.narrow(x)) + self.fc(self.wide(20 * x))


def test_an_input_that_is_requantized_keeps_its_range() -> None:
    """As one without a grid does: of 16 bits, the layer sees 8."""
    net, x = Widths(), torch.randn(64, 8)
    linger.init(net, recipe={"wide": {"out_bits": 16}})
    for _ in range(60):
        net(x)
    assert float(net.fc.running_x) == pytest.approx(float(net.wide(20 * x).detach().abs().max()), rel=0.01)
