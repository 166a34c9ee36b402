"""The tutorial's tools: Dumper, wb_analyse and fix_dequant."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import linger
from linger.errors import LingerError


class Net(nn.Module):
    """What upstream's dumper missed (softmax, tanh, quant_tensor), a layer called twice, recurrent layers and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.rnn = nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = torch.tanh(self.conv(self.embedding(x).transpose(1, 2))).transpose(1, 2)
        x = self.norm(x + linger.quant_tensor(self, y, "y"))
        x = self.rnn(self.conv(x.transpose(1, 2)).transpose(1, 2))[0]
        return self.fc(x).softmax(-1)


def inputs() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 10, (2, 7), generator=g), torch.randn(2, 7, 8, generator=g)


@pytest.fixture(scope="module", name="net")
def _net() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    linger.trace_layers(net, net, inputs())
    linger.init(net, limits=False)
    net(*inputs())
    return net.eval()


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def read(path: Path) -> list[float]:
    return [float(line) for line in path.read_text().splitlines()]


def test_every_layer_and_call_as_the_file_has_it(net: nn.Module, tmp_path: Path) -> None:
    before = hooks(net)
    with linger.Dumper() as dumper:
        dumper.enable_dump_quanted(net, path=tmp_path / "dump")
        expected = net(*inputs())
    assert hooks(net) == before
    linger.onnx.export(net, inputs(), tmp_path / "net.onnx")
    model = linger.runtime.load(tmp_path / "net.onnx")
    assert model(*(t.numpy() for t in inputs())).tolist() == expected.tolist()
    found = {p.name.removeprefix("root."): read(p) for p in (tmp_path / "dump").iterdir()}
    outputs = [k for k in found if k.endswith(".q_outputs")]
    ops = {k.rsplit(".", 2)[1] for k in outputs}
    assert ops == {
        "Gather", "Conv1dInt", "iqTanh", "ScaledRoundLayer", "iqAdd", "LayerNormInt", "LSTMInt", "LinearInt", "SoftmaxInt"
    }  # fmt: skip
    for key in outputs:
        name = key.rsplit(".", 2)[0]
        array = model.tensors["y.quant" if name.endswith("quant_y") else name]
        assert found[key] == array.flatten().tolist(), key
    stored = {k: v.tolist() for k, v in model.constants.items()}
    parameters = [k for k in found if ".q_weight" in k or ".q_bias" in k]
    assert len(parameters) == 7 + 16 + 2
    for key in parameters:
        layer, _, kind = key.rsplit(".", 2)
        name = f"{layer}.{kind.removeprefix('q_').replace('weights', 'weight')}".replace("conv@1", "conv")
        wanted = "conv.bias_1" if layer == "conv@1" and kind == "q_bias" else name
        assert found[key] == np.array(stored[wanted]).flatten().tolist(), key
    assert found["conv.Conv1dInt.q_input"] == model.tensors["transpose_0"].flatten().tolist()
    assert (
        found["_linger_round_tensor_iqadd__default_index_1.iqAdd.q_input_1"]
        == model.tensors["y.quant"].flatten().tolist()
    )


def test_the_format_of_a_file(tmp_path: Path) -> None:
    net = linger.init(nn.Linear(2, 1, bias=False))
    net.weight.data.copy_(torch.tensor([[0.5, -1.0]]))
    net(torch.tensor([[1.0, 0.25]]))
    net.eval()
    with linger.Dumper() as dumper:
        dumper.enable_dump_quanted(net, str(tmp_path))
        dumper.enable_dump_model(net, tmp_path)
        net(torch.tensor([[1.0, 0.25]]))
    assert {p.name: p.read_text() for p in tmp_path.iterdir() if "q_w" in p.name or "float" in p.name} == {
        "root.LinearInt.q_weights": "32.000000\n-64.000000\n",
        "root_input_float": "1.000000\n0.250000\n",
        "root_output_float": "0.246094\n",
    }


def test_only_what_matches(net: nn.Module, tmp_path: Path) -> None:
    with linger.Dumper() as dumper:
        dumper.enable_dump_quanted(net, tmp_path, match_pattern=r"root\.(fc|norm)")
        net(*inputs())
        net(*inputs())
    assert {p.name.rsplit(".", 1)[0] for p in tmp_path.iterdir()} == {"root.fc.LinearInt", "root.norm.LayerNormInt"}


def test_floats_of_a_net_of_any_stage(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Flatten(), nn.Unflatten(1, (4, 3)), nn.GRU(3, 2)).eval()
    x, seen = torch.randn(1, 2, 4), []
    with linger.Dumper() as dumper:
        dumper.enable_dump_model(net, tmp_path)
        dumper.enable_dump_model(net, tmp_path, r"root\.0", hook_forward=lambda m, a, o: seen.append(type(m)))
        out = net(x)
    assert seen == [nn.Conv1d]
    assert len(list(tmp_path.iterdir())) == 8
    assert (tmp_path / "root.3_output_float").read_text() == "".join(f"{v:.6f}\n" for v in out[0].flatten().tolist())
    assert (tmp_path / "root.0_input_float").read_text() == "".join(f"{v:.6f}\n" for v in x.flatten().tolist())


def test_removed_after_an_error(net: nn.Module, tmp_path: Path) -> None:
    before = hooks(net)
    dumper = linger.Dumper()
    dumper.enable_dump_quanted(net, tmp_path)
    dumper.analyse_layer_output(net)
    assert hooks(net) > before
    with pytest.raises(LingerError), dumper:
        dumper.enable_dump_model(net, tmp_path, "nothing")
    assert hooks(net) == before


def test_layer_outputs(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Identity(), nn.ReLU())
    x = torch.arange(-100.0, 100.0)
    with linger.Dumper() as dumper:
        dumper.analyse_layer_output(net)
        net(x)
        net(x * 1000)
        made = dumper.save_out_analyse_log(tmp_path / "log.txt")
    first, second = made.rows
    assert (first.layer, first.max, second.layer, second.max) == ("0", 100_000.0, "1", 99_000.0)
    a = torch.cat([x, x * 1000]).relu().sort().values
    assert (second.mean, second.dynamic) == (float(a.double().mean()), float(a[99 * 400 // 100 - 1]))
    assert (tmp_path / "log.txt").read_text() == f"{made}\n"


def test_weights_and_their_outliers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weight = torch.full((1000,), -0.5)
    weight[3] = 8.0
    state = {
        "upscale_1.weight": torch.ones(2), "fc.weight": weight, "fc.bias": torch.tensor([0.25]), "fc.running_x": torch.ones(()), "empty": torch.zeros(0),
        "steps": torch.ones(3, dtype=torch.int64), "zeros": torch.zeros(4), "spike": torch.tensor([0.0] * 199 + [1.0]),
    }  # fmt: skip
    made = linger.wb_analyse(state)
    assert [r.layer for r in made.rows] == ["upscale_1.weight", "fc.weight", "fc.bias", "zeros", "spike"]
    row = made.rows[1]
    assert (row.mean, row.max, row.dynamic) == (0.5 * 0.999 + 0.008, 8.0, 0.5)
    assert (row.versu, row.outliers, made.rows[2].outliers, made.rows[4].versu) == (16.0, True, False, math.inf)
    text = Path("wb_analyse.log").read_text()
    assert text == f"{made}\n"
    assert "| fc.weight        | 0.5075         | 8.0000         | 15.7635" in text
    assert text.count("!" * 14) == 12
    torch.save(state, "state.pt")
    assert linger.wb_analyse("state.pt", None) == made
    assert linger.wb_analyse(nn.Linear(2, 2), None).rows[0].layer == "weight"


def test_nothing_to_fix(net: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.onnx"
    linger.onnx.export(net, inputs(), path, golden=True)
    data = path.read_bytes()
    assert linger.fix_dequant(path, True) == str(path)
    out = capsys.readouterr().out
    assert "nothing to fix in" in out
    assert "equal: 70 elements in the golden outputs" in out
    assert (path.read_bytes(), len(list(tmp_path.iterdir()))) == (data, 1)


def _train(net: nn.Module, tmp_path: Path) -> None:
    linger.Dumper().enable_dump_quanted(nn.Linear(2, 2), tmp_path)


def _pattern(net: nn.Module, tmp_path: Path) -> None:
    linger.Dumper().enable_dump_quanted(net, tmp_path, "fc")


def _expression(net: nn.Module, tmp_path: Path) -> None:
    linger.Dumper().enable_dump_model(net, tmp_path, "(")


def _float(net: nn.Module, tmp_path: Path) -> None:
    linger.Dumper().enable_dump_quanted(nn.Linear(2, 2).eval(), tmp_path)


def _directory(net: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    linger.Dumper().enable_dump_quanted(net, tmp_path / "file")


def _nothing(net: nn.Module, tmp_path: Path) -> None:
    linger.Dumper().save_out_analyse_log(tmp_path / "log")


def _nan(net: nn.Module, tmp_path: Path) -> None:
    linger.wb_analyse({"w": torch.tensor([1.0, math.nan])}, None)


def _no_file(net: nn.Module, tmp_path: Path) -> None:
    linger.wb_analyse(tmp_path / "none.pt", None)


def _no_dict(net: nn.Module, tmp_path: Path) -> None:
    linger.wb_analyse(5, None)  # type: ignore[arg-type]


def _no_onnx(net: nn.Module, tmp_path: Path) -> None:
    linger.fix_dequant(tmp_path / "none.onnx")


WRONG = {
    r"^Dumper: found a net in train mode, allowed is eval mode; call model.eval\(\)": _train,
    r"^Dumper: match_pattern 'fc' fits no layer, allowed are names such as root.embedding": _pattern,
    r"^Dumper: match_pattern is '\(', allowed are regular expressions": _expression,
    r"^Dumper: match_pattern '\.\*' fits no layer, allowed are names such as none; call linger.init": _float,
    r"^Dumper: cannot make the directory '.*file' \(File exists\)": _directory,
    r"^Dumper: found no layer output, allowed after a forward": _nothing,
    r"^wb_analyse: w holds NaN or infinity": _nan,
    r"^wb_analyse: there is no file '.*none.pt'": _no_file,
    r"^wb_analyse: found int, allowed are a path, a state dict and a net": _no_dict,
    r"^fix_dequant: there is no file '.*none.onnx'": _no_onnx,
}


@pytest.mark.parametrize("match", WRONG)
def test_mistakes(match: str, net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(LingerError, match=match):
        WRONG[match](net, tmp_path)
