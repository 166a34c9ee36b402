"""``linger.retarget`` and the command line of targets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import linger
from linger.cli import app
from linger.errors import LingerError

run = CliRunner()


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).log_softmax(-1).abs()


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, str]:
    torch.manual_seed(0)
    net, x = linger.init(Rows(), target="venus"), torch.randn(64, 16) * 3
    net(x)
    path = str(tmp_path_factory.mktemp("file") / "net.onnx")
    linger.onnx.export(net.eval(), (x,), path)
    return net, x, path


def test_what_changes_and_why(made: tuple[nn.Module, Tensor, str]) -> None:
    net, x, path = made
    state = {k: v.clone() for k, v in net.state_dict().items()}
    changes = linger.retarget(net, "venus", "venusa", x, quiet=True)
    why = {c.op: c.why for c in changes.tensors}
    assert why["LogSoftmaxInt"] == "another exponential, reciprocal or logarithm"
    assert why["iqAbs"] == why["Dequant"] == "what it reads changed"
    assert "LinearInt" not in why
    assert not changes.equal
    (output,) = changes.outputs
    assert 0 < output.changed < output.elements == changes.elements == x.numel()
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    of_file = linger.retarget(path, "venus", "venusa", x.numpy(), quiet=True)
    assert of_file.tensors == changes.tensors


def test_the_counts_are_those_of_nets_that_follow_the_chips(made: tuple[nn.Module, Tensor, str]) -> None:
    net, x, _ = made
    outputs = []
    for chip in ("venus", "venusa"):
        other = linger.init(Rows(), target=chip)
        other(x)
        other.load_state_dict(net.state_dict())
        outputs.append(other.eval()(x))
    changes = linger.retarget(net, "venus", "venusa", x, quiet=True)
    assert int((outputs[0] != outputs[1]).sum()) == changes.outputs[0].changed


def test_nothing_changes(made: tuple[nn.Module, Tensor, str], capsys: pytest.CaptureFixture[str]) -> None:
    net, x, _ = made
    assert linger.retarget(net, "arcs", "mars", x).equal
    assert capsys.readouterr().out == "arcs -> mars: 0 of 1024 output elements change\n"


def test_scales_that_differ_are_said() -> None:
    """venus reads the weight of a layer normalization in 16 bits, arcs in 8."""
    net, x = linger.init(nn.Sequential(nn.LayerNorm(8)), target="venus"), torch.arange(512.0).sin().reshape(64, 8)
    net[0].weight.data.copy_(torch.linspace(0.3, 1.3, 8))
    net(x)
    (norm,) = (c for c in linger.retarget(net.eval(), "venus", "arcs", x, quiet=True).tensors if c.op == "LayerNormInt")
    assert norm.why == ("another width of the normalized value or of the weight, scale_w 2^6 instead of 2^14")


@pytest.mark.parametrize("given", [(), (5,), (torch.randn(64, 16), torch.randn(64, 16)), (torch.randn(64, 9),)])
def test_inputs_that_the_file_does_not_take(made: tuple[nn.Module, Tensor, str], given: tuple[object, ...]) -> None:
    with pytest.raises(
        LingerError, match=r"^retarget: runtime: (found inputs .*, allowed are x|input x is int64|input x has)"
    ):
        linger.retarget(made[2], "venus", "arcs", *given, quiet=True)


def test_a_requant_in_front_of_a_cat_is_no_change(made: tuple[nn.Module, Tensor, str]) -> None:
    """venusA has a Requant where the others shift inside of the cat."""

    class Far(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = linger.quant_tensor(self, x * 100, "y")
            return torch.cat([linger.quant_tensor(self, x, "x"), y], 1)

    net, x = linger.init(Far(), target="venus"), made[1]
    net(x)
    changes = linger.retarget(net, "venus", "venusa", x, quiet=True)
    assert changes.equal, "the same integers"
    assert not changes.tensors


def test_a_float_net() -> None:
    with pytest.raises(
        LingerError, match=r"^retarget: found a float net, allowed is a converted one; call linger.init"
    ):
        linger.retarget(Rows(), "venus", "arcs", torch.randn(1, 16))


# --- the command line


def test_check_of_a_file(made: tuple[nn.Module, Tensor, str]) -> None:
    result = run.invoke(app, ["check", made[2], "--target", "arcs"])
    assert result.exit_code == 1
    assert "log_softmax" in result.output
    assert "arcs: does not fit" in result.output


def test_check_as_json(tmp_path: Path) -> None:
    net, x = linger.init(nn.Sequential(nn.Linear(8, 4)), target="venus"), torch.randn(1, 8)
    net(x)
    linger.onnx.export(net.eval(), (x,), tmp_path / "net.onnx")
    result = run.invoke(app, ["check", str(tmp_path / "net.onnx"), "--json"])
    said = json.loads(result.output)
    assert result.exit_code == 0
    assert (said["ok"], said["target"], said["macs"], said["violations"]) == (True, "venus", 32, [])
    assert [layer["name"] for layer in said["layers"]] == ["0"]


NET = """
import torch

weights = torch.arange(588.0).sin().reshape(4, 3, 7, 7)  # of every net the same, so that the sums are
number = 5


def Net():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 7, bias=False))
    net[0].weight.data.copy_(weights)
    return net
"""


def test_check_of_a_net_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mynet.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    result = run.invoke(app, ["check", "mynet:Net", "--target", "venus", "--input", "1,3,9,9"])
    assert result.exit_code == 1
    assert "kernel 7" in result.output
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 9, 9), np.float32))
    assert (
        run.invoke(app, ["check", "mynet:Net", "--input", "x.npy"]).output
        == run.invoke(app, ["check", "mynet:Net", "--input", "1x3x9x9"]).output
    )


def test_retarget_of_a_file(made: tuple[nn.Module, Tensor, str], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", made[1].numpy())
    result = run.invoke(app, ["retarget", "venus", "venusa", made[2], "--input", str(tmp_path / "x.npy")])
    assert result.exit_code == 1
    assert "another exponential, reciprocal or logarithm" in result.output
    assert run.invoke(app, ["retarget", "arcs", "mars", made[2], "--input", "64,16"]).exit_code == 0


WRONG = {
    "nothing": (["check", "net"], r"found 'net', allowed is a .onnx file or package.module:name"),
    "no such module": (["check", "nowhere:Net"], r"'nowhere:Net', which cannot be imported"),
    "no such name": (["check", "mynet:Other"], r"'mynet:Other', which cannot be imported"),
    "no net": (["check", "mynet:number"], r"mynet:number is no net"),
    "no file": (["check", "none.onnx"], r"check: there is no file 'none.onnx'"),
    "no input": (["check", "mynet:Net", "--input", "none.npy"], r"there is no file 'none.npy'"),
    "no chip": (["check", "mynet:Net", "--target", "pluto"], r"check: target is 'pluto', allowed are venus"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_on_the_command_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mynet.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    result = run.invoke(app, WRONG[name][0])
    assert result.exit_code == 2
    assert "error: " in result.output
    assert WRONG[name][1] in result.output
