"""A file that verifies itself: golden inputs and outputs, a hash of every part, and a name for every kind of damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import linger
from linger.errors import LingerError
from linger.onnx.golden import damaged, stored


class Net(nn.Module):
    """Two inputs, one of them by name, and two outputs: a float and an integer one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor, *, y: Tensor) -> tuple[Tensor, Tensor]:
        out = self.fc(torch.relu(self.conv(x) + y).flatten(1))
        return out.softmax(-1), out.argmax(-1)


X, Y = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(1)), torch.ones(3, 4, 6)


@pytest.fixture(scope="module", name="net")
def _net() -> nn.Module:
    torch.manual_seed(0)
    net = linger.init(Net(), target="arcs")
    net(X, y=Y)
    return net.eval()


def exported(net: nn.Module, path: Path, **options: object) -> onnx.ModelProto:
    return linger.onnx.export(net, (X,), path, kwargs={"y": Y}, golden=True, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module", name="file")
def _file(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "net.onnx"
    exported(net, path)
    return path


def test_a_file_alone(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = linger.verify(file)
    assert report.equal
    assert report.elements == 3 * 5 + 3
    assert report.differing == dict.fromkeys(("runtime", "disable", "basic", "extended", "all"), 0)
    assert capsys.readouterr().out == (
        "equal: 18 elements in the golden outputs, linger.runtime, ONNX Runtime (disable, basic, extended, all)\n"
    )


def test_what_it_holds_is_what_pytorch_says(net: nn.Module, file: Path) -> None:
    golden = stored(onnx.load(file))
    assert golden is not None
    with torch.no_grad():
        out = net(X, y=Y)
    assert [a.tolist() for a in golden.inputs.values()] == [X.tolist(), Y.tolist()]
    assert [a.tolist() for a in golden.outputs.values()] == [t.tolist() for t in out]
    assert [(n, a.dtype) for n, a in golden.outputs.items()] == [("output_0", np.float32), ("output_1", np.int64)]
    assert linger.verify(net, file, (X,), kwargs={"y": Y}, quiet=True).equal


def test_the_same_bytes_every_time(net: nn.Module, file: Path, tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    exported(net, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == file.read_bytes()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_other_inputs_a_dynamic_batch_and_the_standard_dialect(net: nn.Module, tmp_path: Path) -> None:
    axes = {"x": {0: "batch"}, "y": {0: "batch"}}
    few = (torch.randn(1, 2, 6), {"y": torch.zeros(1, 4, 6)})
    for dialect in ("thinker", "standard"):
        path = tmp_path / f"{dialect}.onnx"
        linger.onnx.export(net, (X,), path, kwargs={"y": Y}, golden=few, dynamic_axes=axes, dialect=dialect)
        report = linger.verify(path, quiet=True)
        assert (report.equal, report.elements) == (True, 6)
        assert ("runtime" in report.differing) is (dialect == "thinker")


def test_no_golden_inputs_change_nothing(net: nn.Module) -> None:
    made = linger.onnx.export(net, (X,), kwargs={"y": Y})
    assert not {"golden", "hashes"} & {p.key for p in made.metadata_props}
    assert damaged(made) == ()


@pytest.mark.parametrize("bit", range(0, 120 * 8, 47))
def test_a_flipped_bit_of_a_weight_is_named(file: Path, tmp_path: Path, bit: int) -> None:
    """One bit of the bytes on disk, anywhere in ``fc.weight``."""
    (weight,) = (i for i in onnx.load(file).graph.initializer if i.name == "fc.weight")
    data = bytearray(file.read_bytes())
    data[data.index(weight.raw_data) + bit // 8] ^= 1 << bit % 8
    path = tmp_path / "flipped.onnx"
    path.write_bytes(data)
    report = linger.verify(path, quiet=True)
    assert not report.equal
    assert report.damaged == ("initializer fc.weight",)
    assert str(report).startswith("damaged since export: initializer fc.weight")


def _props(proto: onnx.ModelProto) -> dict[str, onnx.StringStringEntryProto]:
    return {p.key: p for p in proto.metadata_props}


def _scale(proto: onnx.ModelProto) -> None:
    node = next(n for n in proto.graph.node if n.op_type == "LinearInt")
    next(a for a in node.attribute if a.name == "scale_o").f *= 2


def _body(proto: onnx.ModelProto) -> None:
    del next(f for f in proto.functions if f.name == "LinearInt").node[-1]


def _input(proto: onnx.ModelProto) -> None:
    said = json.loads(_props(proto)["golden"].value)
    said["inputs"][0]["data"] = said["inputs"][0]["data"].replace("A", "B", 1)
    _props(proto)["golden"].value = json.dumps(said, sort_keys=True)


def _nonsense(proto: onnx.ModelProto) -> None:
    _props(proto)["golden"].value = "{"


def _hashes(proto: onnx.ModelProto) -> None:
    _props(proto)["hashes"].value = "[]"


def _opset(proto: onnx.ModelProto) -> None:
    next(i for i in proto.opset_import if i.domain == "").version = 16


def _dropped(proto: onnx.ModelProto) -> None:
    kept = [i for i in proto.graph.initializer if i.name != "fc.bias"]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)


DAMAGE: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "a scale": (_scale, "node fc"),
    "a function body": (_body, "function LinearInt"),
    "a golden input": (_input, "golden"),
    "no JSON": (_nonsense, "golden"),
    "the hashes": (_hashes, "hashes"),
    "the opset": (_opset, "signature"),
    "a missing bias": (_dropped, "initializer fc.bias (missing)"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_every_kind_of_damage_has_a_name(name: str, file: Path, tmp_path: Path) -> None:
    proto = onnx.load(file)
    change, part = DAMAGE[name]
    change(proto)
    onnx.save(proto, tmp_path / "damaged.onnx")
    report = linger.verify(tmp_path / "damaged.onnx", quiet=True)
    assert report.damaged == (part,)
    assert not report.equal


def test_a_file_without(net: nn.Module, tmp_path: Path) -> None:
    linger.onnx.export(net, (X,), tmp_path / "net.onnx", kwargs={"y": Y})
    with pytest.raises(
        LingerError, match=r"^verify: '.*net.onnx' holds no golden inputs, allowed alone is a file exported"
    ):
        linger.verify(tmp_path / "net.onnx")


WRONG = {
    "a shape": (
        (X[:1], {"y": Y[:1]}),
        {},
        r"^export: golden: x has shape \(1, 2, 6\), allowed in this file is \(3, 2, 6\)",
    ),
    "a dialect": (True, {"dialect": "qdq"}, r"^export: found golden inputs for dialect 'qdq', which is not exact"),
    "too few": ((X,), {}, r"^export: the forward of Net does not run on inputs of shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_golden_inputs(name: str, net: nn.Module, tmp_path: Path) -> None:
    golden, options, match = WRONG[name]
    with pytest.raises(LingerError, match=match):
        linger.onnx.export(net, (X,), tmp_path / "net.onnx", kwargs={"y": Y}, golden=golden, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
