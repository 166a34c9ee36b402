"""Targets in TOML files: nets train and verify on them, and every mistake is an error with its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.errors import LingerError
from linger.targets import known

TOY = Path(__file__).parent / "toy.toml"


class Net(nn.Module):
    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.relu(self.bn(self.conv(x))), 2)
        return self.fc(torch.sigmoid(x + 0.5).flatten(1))


def test_a_net_trains_and_verifies_on_a_target_of_the_user(tmp_path: Path) -> None:
    assert len(TOY.read_text().splitlines()) <= 40
    net, x = Net(), torch.randn(4, 3, 8, 8)
    linger.trace_layers(net, net, x)
    net = linger.init(net, target=TOY)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    model = linger.onnx.export(net.eval(), (x,), tmp_path / "net.onnx")
    assert {m.key: m.value for m in model.metadata_props}["target"] == "toy"
    assert {a.s for n in model.graph.node for a in n.attribute if a.name == "rounding"} == {b"half_even"}
    assert linger.verify(net, tmp_path / "net.onnx", x, quiet=True).equal


def test_it_is_like_another_but_for_what_it_says() -> None:
    toy, arcs = known(str(TOY)), known("arcs")
    assert (toy.functions, toy.softmax, toy.ops["iqSigmoid"]) == (arcs.functions, arcs.softmax, arcs.ops["iqSigmoid"])
    assert (toy.ops["SoftmaxInt"], arcs.ops["SoftmaxInt"]) == ("none", "runs")
    assert (toy.memory.share, toy.memory.align, toy.platform) == (65536, 8, "arcs")
    assert [x.high for x in toy.limits if (x.op, x.of) == ("Conv2dInt", "kernel")] == [3]
    assert [x for x in toy.limits if (x.op, x.of) == ("Conv2dInt", "stride")]


def test_its_limits_hold_and_its_figures_make_cycles() -> None:
    report = linger.check(Net(5), torch.randn(1, 3, 8, 8), target=TOY, quiet=True)
    assert ("conv", "kernel 5", "1 to 3") in {(v.layer, v.found, v.allowed) for v in report.violations}
    assert report.cycles == sum(layer.cycles or 0 for layer in report.layers) > 0
    assert "cycles" in str(report)
    assert linger.check(Net(), torch.randn(1, 3, 8, 8), target="arcs", quiet=True).cycles is None


HEAD = 'name = "mine"\nlike = "arcs"\n'
ROWS = HEAD + '[limits]\nConv2dInt = [\n{of = "kernel", high = 5},\n'
WRONG = {
    "a rounding": (
        HEAD + 'rounding = "even"\n',
        r"mine.toml:3: found rounding = 'even', allowed are half_up, half_even; choose",
    ),
    "a typo": (HEAD + "\ndata_bit = [8]\n", r"mine.toml:4: found the key 'data_bit', allowed are name, like"),
    "a typo in a table": (HEAD + "[memory]\nshare = 1\npsrem = 2\n", r":5: found the key 'psrem', allowed are share"),
    "a typo in a limit": (
        HEAD + '[limits]\nLinearInt = [{of = "rank", high = 3}]\nConv2dInt = [\n{of = "kernel", hihg = 5}]\n',
        r":6: found the key 'hihg', allowed are of, low, high",
    ),
    "an impossible limit": (
        HEAD + '[limits]\nConv2dInt = [{of = "kernel", low = 5, high = 1}]\n',
        r":4: found an impossible limit on kernel",
    ),
    "a limit without numbers": (HEAD + '[limits]\nConv2dInt = [{of = "kernel"}]\n', r":4: found an impossible limit"),
    "a limit on nothing": (HEAD + '[limits]\nConv2dInt = [{of = "colour", high = 1}]\n', r":4: found of = 'colour'"),
    "a limit of text": (HEAD + '[limits]\nConv2dInt = [{of = "kernel", high = "5"}]\n', r":4: found high = '5'"),
    "a kind that is none": (
        HEAD + '[limits]\nConv2dInt = [{of = "kernel", high = 5, kind = "bad"}]\n',
        r":4: found kind = 'bad'",
    ),
    "limits that are no list": (HEAD + "[limits]\nConv2dInt = 5\n", r":4: found Conv2dInt = 5, allowed is a list"),
    "an op that is none": (HEAD + '[ops]\nConv3dInt = "runs"\n', r":4: found the op 'Conv3dInt', allowed are Quant"),
    "a status that is none": (HEAD + '[ops]\niqTanh = "yes"\n', r":4: found iqTanh = 'yes', allowed are runs"),
    "an arithmetic of its own": (HEAD + '[functions]\niqTanh = "x"\n', r":3: found the key 'functions'"),
    "no table to be like": ('name = "mine"\n', r":1: found like = None, allowed is a string"),
    "a table that is missing": ('name = "mine"\nlike = "pluto"\n', r":2: target is 'pluto', allowed are venus, arcs"),
    "a name taken": ('name = "venus"\nlike = "arcs"\n', r":1: found the name 'venus'"),
    "a name of two words": ('name = "my chip"\nlike = "arcs"\n', r":1: found name = 'my chip'"),
    "a width": ('name = "mine"\nlike = "arcs"\ndata_bits = [12]\n', r":3: found data_bits = \[12\]"),
    "a negative memory": (HEAD + "[memory]\nshare = -1\n", r":4: found share = -1, allowed is a whole number"),
    "no speed": (HEAD + "[latency]\nmacs_per_cycle = 0\n", r":4: found macs_per_cycle = 0, allowed is a positive"),
    "a table that is none": (HEAD + "memory = 5\n", r":3: found memory = 5, allowed is a table"),
    "no TOML": (HEAD + "data_bits = [8,\nparameter_bits = [8]\n", r"mine.toml:4: this is no TOML"),
    "no TOML at its end": (HEAD + "data_bits = [8\n\n\n", r"mine.toml:3: this is no TOML"),
    "a comment with the key": ("# data_bits = [8]\n" + HEAD + "data_bits = [9]\n", r":4: found data_bits = \[9\]"),
    "a name taken, below": ('# a chip\nlike = "arcs"\nname = "venus"\n', r":3: found the name 'venus'"),
    "the second of two limits": (ROWS + '{of = "colour", high = 5},\n]\n', r":6: found of = 'colour'"),
    "the third of three limits": (
        ROWS + '{of = "pad", way = "{}", high = 4},\n{of = "pad", low = 7, high = 5},\n]\n',
        r":7: found an impossible limit on pad",
    ),
    "a limit of its own table": (
        HEAD + '[[limits.Conv2dInt]]\nof = "pad"\nhigh = 5\n[[limits.Conv2dInt]]\nof = "pad"\nhihg = 5\n',
        r":8: found the key 'hihg'",
    ),
    "a limit on what is not said": (ROWS + "{high = 5},\n]\n", r":6: found a limit without of"),
    "a limit on a list": (
        HEAD + '[limits]\nConv2dInt = [{of = ["kernel"], high = 5}]\n',
        r":4: found of = \['kernel'\]",
    ),
    "a condition that is a list": (
        HEAD + '[limits]\nConv2dInt = [{of = "kernel", high = 5, when = ["dilated"]}]\n',
        r":4: found when = \['dilated'\]",
    ),
    "a rounding that is a list": (HEAD + 'rounding = ["half_up"]\n', r":3: found rounding = \['half_up'\]"),
    "a way out that is no text": (
        HEAD + '[limits]\nLinearInt = [{of = "rank", high = 1, way = 5}]\n',
        r":4: found way = 5",
    ),
    "no number of cycles": (HEAD + "[latency]\nmacs_per_cycle = nan\n", r":4: found macs_per_cycle = nan"),
    "endless cycles": (HEAD + "[latency]\ncycles_per_op = inf\n", r":4: found cycles_per_op = inf"),
    "more multiples than factors": (
        HEAD + '[limits]\nLinearInt = [{of = "weight_bytes", high = 1, align = [1, 2, 3]}]\n',
        r":4: found align of 3 factors of weight_bytes, allowed are 2",
    ),
    "numbers that exclude each other": (
        HEAD + '[limits]\nLinearInt = [{of = "rank", high = 1, among = [7]}]\n',
        r":4: found an impossible limit on rank",
    ),
}


@pytest.mark.parametrize("text", WRONG)
def test_mistakes_are_errors_with_their_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(WRONG[text][0])
    with pytest.raises(LingerError, match=WRONG[text][1]) as caught:
        linger.init(nn.Sequential(nn.Linear(2, 2)), target=str(path))
    assert str(caught.value).startswith("init: ")
    assert not re.search(r"\n", str(caught.value))


def test_a_way_out_is_said_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(HEAD + '[limits]\nLinearInt = [{of = "weight_bytes", low = 2048, way = "see {page} 5"}]\n')
    (violation,) = linger.check(nn.Linear(2, 2), torch.randn(1, 2), target=path, quiet=True).violations
    assert (violation.found, violation.allowed, violation.way) == ("weights of 4 B", "at least 2 KB", "see {page} 5")


def test_two_files_of_one_name(tmp_path: Path) -> None:
    """A net finds its chip by the name: another table under it would be followed without a word."""
    for folder, high in (("a", 3), ("b", 3), ("c", 5)):
        (tmp_path / folder).mkdir()
        text = f'name = "twice"\nlike = "arcs"\n[limits]\nConv2dInt = [{{of = "kernel", high = {high}}}]\n'
        (tmp_path / folder / "chip.toml").write_text(text)
    assert known(str(tmp_path / "a" / "chip.toml")) == known(str(tmp_path / "b" / "chip.toml"))
    with pytest.raises(
        LingerError, match=r"c.chip.toml: found the name 'twice', which '.*a.chip.toml' has with another"
    ):
        known(str(tmp_path / "c" / "chip.toml"))
    (tmp_path / "a" / "chip.toml").write_text('name = "twice"\nlike = "venus"\n')
    assert known(str(tmp_path / "a" / "chip.toml")).like == "venus"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LingerError, match=r"^check: the target's file .*none.toml' cannot be read"):
        linger.check(nn.Linear(2, 2), torch.randn(1, 2), target=str(tmp_path / "none.toml"))
