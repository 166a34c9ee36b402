"""``linger.log``: what a writer is told of a net in training."""

from __future__ import annotations

import ast
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from report_nets import NETS
from torch import Tensor, nn

import linger
from linger import LingerError
from linger.batches import feed
from linger.log import Writer
from linger.report import both


class Stub:
    """A writer that remembers."""

    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}
        self.histograms: dict[str, Tensor] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert isinstance(value, float)
        assert math.isfinite(value)
        assert tag not in self.scalars
        self.scalars[tag] = value, step

    def add_histogram(self, tag: str, values: Tensor, step: int) -> None:
        assert values.isfinite().all()
        assert values.numel()
        self.histograms[tag] = values


def logged(net: nn.Module, *args: Any, **options: Any) -> dict[str, float]:
    writer = Stub()
    linger.log(writer, net, 7, *args, **options)
    assert {step for _, step in writer.scalars.values()} <= {7}
    return {tag: value for tag, (value, _) in writer.scalars.items()}


@pytest.mark.parametrize("name", NETS)
def test_a_net_in_training_is_logged_and_left_alone(name: str) -> None:
    make, shape = NETS[name]
    torch.manual_seed(0)
    net, x = make(), torch.randn(3, *shape)
    linger.trace_layers(net, net, x)
    linger.init(net)
    assert not logged(net), "no range yet"
    net(x).sum().backward()
    state, grads = {k: v.clone() for k, v in net.state_dict().items()}, [p.grad for p in net.parameters()]
    without, found = logged(net), logged(net, (x, None))
    assert without.items() <= found.items()
    assert net.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(a is b.grad for a, b in zip(grads, net.parameters(), strict=True))
    kinds = {tag.split("/")[1] for tag in found}
    assert kinds == {"range", "scale", "weight sqnr", "weight clipped", "sqnr", "own sqnr", "clipped"}
    assert {tag.split("/")[1] for tag in without} == {"range", "scale", "weight sqnr", "weight clipped"}
    both(net, x, feed, meters := {})
    assert sorted(v for t, v in found.items() if t.startswith("linger/sqnr/")) == pytest.approx(
        sorted(m.total.sqnr for m in meters.values() if m.total.sqnr is not None)
    )


def test_scalars_are_those_of_the_layer() -> None:
    net = linger.init(nn.Sequential(nn.Linear(8, 4)), parameter_bits=4, observe="learned")
    x = torch.randn(16, 8)
    net(x)
    fc: Any = net[0]
    with torch.no_grad():
        fc.log2_w.sub_(1.0)  # half the range: weights beyond it are clipped
    found = logged(net)
    assert found["linger/range/0.o"] == float(fc.running_o)
    assert found["linger/scale/0.o"] == math.log2(float(fc.scale("o", 8)))
    w, _, scale = (t.detach() for t in fc.grids(fc.scale("x", 8)))
    wanted = fc.weight.detach().double()
    noise = wanted.pow(2).sum() / (wanted - w).pow(2).sum()
    assert found["linger/weight sqnr/0"] == pytest.approx(10 * math.log10(noise))
    lost = (wanted * scale >= 8) | (wanted * scale <= -9)
    assert found["linger/weight clipped/0"] == pytest.approx(100 * float(lost.float().mean()))
    assert lost.any()


def test_hidden_states_have_their_own_width_and_histograms_are_of_weights() -> None:
    torch.manual_seed(0)
    net = linger.init(nn.Sequential(nn.LSTM(4, 4, 2)), hidden_bits=16)
    net(torch.randn(5, 2, 4))
    writer = Stub()
    linger.log(writer, net, 0, histograms=True)
    lstm: Any = net[0]
    assert writer.scalars["linger/scale/0.h"][0] == math.log2(float(lstm.hidden_scale(0)))
    assert writer.scalars["linger/scale/0.h_l1"][0] == math.log2(float(lstm.hidden_scale(1)))
    assert set(writer.histograms) == {f"linger/weights/0.weight_{k}_l{i}" for k in ("ih", "hh") for i in (0, 1)}
    for tag, value in writer.histograms.items():
        torch.testing.assert_close(
            value, lstm._parameters[tag.removeprefix("linger/weights/0.")].data, atol=0.01, rtol=0
        )


def test_learned_ranges_are_logged_as_they_are() -> None:
    net = linger.init(nn.Sequential(nn.Linear(4, 4)), observe="learned")
    net(torch.randn(8, 4))
    fc: Any = net[0]
    with torch.no_grad():
        fc.log2_o.add_(1.0)
    net(torch.randn(8, 4))
    assert logged(net)["linger/range/0.o"] == pytest.approx(2 ** float(fc.log2_o.detach()))


@pytest.mark.parametrize(
    ("writer", "net", "options", "match"),
    [
        (Stub(), nn.Linear(2, 2), {}, "log: found Linear without a fixed-point layer; call init first"),
        (object(), linger.init(nn.Linear(2, 2)), {}, "log: found a writer without add_scalar"),
        (
            type("W", (), {"add_scalar": print})(),
            linger.init(nn.Linear(2, 2)),
            {"histograms": True},
            "without add_histogram",
        ),
        (Stub(), 3, {}, "log: found an object of type int"),
    ],
)
def test_refused(writer: Any, net: Any, options: Any, match: str) -> None:
    with pytest.raises(LingerError, match=match):
        linger.log(writer, net, 0, **options)


def test_a_writer_is_what_tensorboards_is() -> None:
    """Read from PyTorch's text, for its module imports tensorboard: our parameters are the first ones, under the same names."""
    origin = Path(torch.__file__).parent / "utils" / "tensorboard" / "writer.py"
    (theirs,) = (
        node for node in ast.parse(origin.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "SummaryWriter"
    )  # fmt: skip
    methods = {f.name: [a.arg for a in f.args.args] for f in theirs.body if isinstance(f, ast.FunctionDef)}
    for function in (Writer.add_scalar, Writer.add_histogram):
        ours = list(inspect.signature(function).parameters)
        assert len(ours) == 4
        assert methods[function.__name__][:4] == ours


@pytest.mark.browser
def test_a_writer_of_tensorboards_takes_it(tmp_path: Any) -> None:
    """Needs the package tensorboard, which linger does not."""
    from torch.utils.tensorboard import SummaryWriter

    net = linger.init(nn.Sequential(nn.Linear(4, 4)))
    net(torch.randn(8, 4))
    with SummaryWriter(tmp_path) as writer:
        linger.log(writer, net, 0, torch.randn(8, 4), histograms=True)
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) > 500
