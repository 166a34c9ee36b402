"""What a target decides while a net is trained and exported, so that its file never breaks a rule of the chip."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.errors import LingerError
from linger.retarget import INHERITED
from linger.targets import TARGETS, difference, known

CHIPS = [*TARGETS]


class Rules(nn.Module):
    """Sums, a mean, a product, and a cat of ranges far apart: (N, 4, 8, 8) twice -> (N, 6)"""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 6, 3, padding=1)
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = linger.quant_tensor(self, x, "x")
        y = linger.quant_tensor(self, y, "y")
        z = self.conv(torch.cat([x + y, y * 0.01 + x], 1))
        z = nn.functional.avg_pool2d(z, 2)
        z = torch.cat([z, z * z], 2).mean((2, 3))
        return self.fc(z)


def trained(chip: str, factor: float) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    inputs = torch.randn(2, 4, 8, 8) * factor, torch.randn(2, 4, 8, 8)
    net = linger.init(Rules(), target=chip)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        net(*inputs).square().mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net.eval(), inputs


@pytest.mark.parametrize("factor", [2.0**-9, 1.0, 2.0**9])
@pytest.mark.parametrize("chip", CHIPS)
def test_no_scale_rule_is_broken_by_training(chip: str, factor: float, tmp_path: Path) -> None:
    net, inputs = trained(chip, factor)
    linger.onnx.export(net, inputs, tmp_path / "net.onnx")
    report = linger.check(str(tmp_path / "net.onnx"), quiet=True)
    assert report.target == chip
    assert not [v for v in report.violations if "scale" in v.found]
    assert linger.verify(net, tmp_path / "net.onnx", inputs, quiet=True).equal


def test_a_chip_that_cannot_shift_in_a_cat_gets_requants(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for chip, shifts in (("venus", True), ("arcs", True), ("venusa", False)):
        net, inputs = trained(chip, 2.0**9)
        ops = [n.op_type for n in linger.onnx.export(net, inputs, tmp_path / "net.onnx").graph.node]
        assert ("Requant" in ops) is not shifts, chip
        cats = [n for n in linger.onnx.export(net, inputs).graph.node if n.op_type == "iqCat"]
        scales = [{a.name: a.f for a in n.attribute if a.name.startswith("scale")} for n in cats]
        finer = [s for s in scales if any(v > s["scale_o"] for v in s.values())]
        assert bool(finer) is shifts, chip


class Chip(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(linger.quant_tensor(self, x, "x"))  # type: ignore[operator,no-any-return]


DIFFER = {
    "sigmoid": (torch.sigmoid, "another table of sigmoid"),
    "softmax": (lambda x: x.softmax(-1), "another exponential or reciprocal"),
    "log_softmax": (lambda x: x.log_softmax(-1), "another exponential, reciprocal or logarithm"),
    "glu": (lambda x: nn.functional.glu(x), "another table of sigmoid"),
    "layer_norm": (
        lambda x: nn.functional.layer_norm(x, (8,)),
        "another width of the normalized value or of the weight",
    ),
}


@pytest.mark.parametrize("name", DIFFER)
def test_a_net_is_exported_for_the_chip_that_it_follows(name: str, tmp_path: Path) -> None:
    function, why = DIFFER[name]
    net, x = linger.init(Chip(function), target="venus"), torch.randn(2, 8)
    net(x)
    net.eval()
    with pytest.raises(LingerError, match=rf"^export: .*follows venus exported for venusa, which has {why}"):
        linger.onnx.export(net, (x,), tmp_path / "net.onnx", target="venusa")
    linger.onnx.export(net, (x,), tmp_path / "net.onnx")
    changes = linger.retarget(net, "venus", "venusa", x, quiet=True)
    assert {c.why for c in changes.tensors} <= {
        difference(c.op, known("venus"), known("venusa")) or INHERITED for c in changes.tensors
    }


def test_a_net_without_such_an_op_is_exported_for_any_chip(tmp_path: Path) -> None:
    net, x = linger.init(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), target="venus"), torch.randn(2, 8)
    net(x)
    for chip in CHIPS:
        linger.onnx.export(net.eval(), (x,), tmp_path / "net.onnx", target=chip)
        assert linger.verify(net, tmp_path / "net.onnx", x, quiet=True).equal


def test_mars_is_arcs_under_another_name(tmp_path: Path) -> None:
    arcs, mars = known("arcs"), known("mars")
    assert (mars.limits, mars.memory, mars.functions, mars.ops) == (arcs.limits, arcs.memory, arcs.functions, arcs.ops)
    net, x = linger.init(Chip(lambda x: x.sigmoid().softmax(-1)), target="mars"), torch.randn(2, 8)
    net(x)
    model = linger.onnx.export(net.eval(), (x,), tmp_path / "net.onnx")
    assert {a.s for n in model.graph.node for a in n.attribute if a.name == "platform"} == {b"mars"}
    assert linger.verify(net, tmp_path / "net.onnx", x, quiet=True).equal


def test_check_of_a_net_that_follows_another_chip() -> None:
    net, x = linger.init(Chip(torch.sigmoid), target="venus"), torch.randn(1, 8)
    net(x)
    assert linger.check(net, x, target="arcs", quiet=True).ok
    assert linger.check(net, x, quiet=True).target == "venus"


class Beyond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 4, 7, padding=3)
        self.fast = nn.Conv1d(4, 4, 3, stride=3)
        self.up = nn.ConvTranspose2d(4, 4, 6, groups=2)
        self.fine = nn.Conv2d(4, 4, 3)


def test_init_refuses_every_layer_beyond_a_limit_at_once() -> None:
    net = Beyond()
    match = (
        r"^init: venus does not run wide \(kernel 7, allowed 1 to 5\), fast \(stride 3, allowed 1, 2, 4\), "
        r"up \(2 groups, allowed one group; kernel 6, allowed 1 to 5\); change them"
    )
    with pytest.raises(LingerError, match=match):
        linger.init(net, target="venus")
    assert type(net.wide) is nn.Conv2d, "all or nothing"
    linger.disable_quant(net.wide)
    with pytest.raises(LingerError, match=r"^init: venus does not run fast"):
        linger.init(net, target="venus")


def test_init_refuses_an_average_pool_beyond_a_limit() -> None:
    for x in (None, torch.randn(4, 3, 12, 12)):
        net = nn.Sequential(nn.AvgPool2d(2, 2), nn.AvgPool2d(2, 3))
        if x is not None:
            linger.trace_layers(net, net, x)
        with pytest.raises(
            LingerError, match=r"^init: venus does not run 1 \(stride larger than the kernel, allowed at most"
        ):
            linger.init(net, target="venus")


def test_init_accepts_them_where_no_target_or_no_limits_are_meant() -> None:
    assert isinstance(linger.init(Beyond()).wide, linger.Conv2dInt)
    assert isinstance(linger.init(Beyond(), target="venus", limits=False).wide, linger.Conv2dInt)


def test_init_sees_convolutions_with_their_batch_normalization() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 7), nn.BatchNorm2d(4))
    linger.trace_layers(net, net, torch.randn(1, 3, 9, 9))
    with pytest.raises(LingerError, match=r"^init: arcs does not run 0 \(kernel 7, allowed 1 to 5\)"):
        linger.init(net, target="arcs")


class Large(nn.Module):
    """(N, 64, 20, W) -> (N, 16, W - 4, 4)"""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.last(F.relu(self.bn(self.conv(x)))).permute(0, 2, 3, 1))


def test_a_traced_net_is_refused_for_the_shapes_too_all_at_once() -> None:
    """One sample of the batch that was traced counts; without a trace there are no shapes to look at."""
    linger.init(Large(), target="venus")
    messages = []
    for width, batch, said in ((150, 16, False), (400, 1, True), (400, 16, True)):
        net = Large()
        linger.trace_layers(net, net, torch.randn(batch, 64, 20, width))
        with pytest.raises(LingerError, match=r"^init: venus does not run .*fc \(input of 4 dimensions") as error:
            linger.init(net, target="venus")
        rows = r"(conv|last) \([\d.]+ KB of input rows under one kernel, allowed at most 64 KB"
        assert re.findall(rows, str(error.value)) == (["conv", "last"] if said else [])
        messages.append(str(error.value))
        assert linger.init(net, target="venus", limits=False)
    assert messages[1] == messages[2], "a chip takes one sample at a time, whatever the training takes"
