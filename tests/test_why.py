"""``linger.why`` names seeded faults, and does not name what is none of them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import schema
import torch
from torch import nn
from typer.testing import CliRunner
from why_faults import ARITHMETIC, Fault, seeded, shift_of, sums
from why_nets import NETS, Made, made

import linger
from linger.cli import app
from linger.errors import LingerError
from linger.files import write_arrays
from linger.why import HYPOTHESES, Why, why

PAGE = Path(__file__).parents[1] / "docs" / "why.md"


def explained(fault: Fault) -> Why:
    m = made(fault.net)
    found = why(m.proto, m.right, fault.wrong, quiet=True)
    assert (found.tensor, found.wrong) == (fault.node, "second")
    return found


@pytest.mark.parametrize("name", NETS)
def test_a_sample_of_the_faults(name: str) -> None:
    named = [(f.kind, explained(f).cause) for f in seeded(name, every=9)]
    assert len(named) >= 10
    assert [(kind, cause) for kind, cause in named if kind != cause] == []


# --- the confusion table of the documentation


def confusion() -> list[str]:
    """Rows of a table: what was seeded, how often, and what was named."""
    counts: dict[str, Counter[str]] = {}
    for name in NETS:
        for fault in seeded(name):
            counts.setdefault(fault.kind, Counter())[explained(fault).cause] += 1
    rows = []
    for kind, named in sorted(counts.items()):
        others = ", ".join(f"{cause} {n}" for cause, n in sorted(named.items()) if cause != kind)
        rows.append(f"| {kind} | {sum(named.values())} | {named[kind]} | {others} |")
    total, right = (sum(map(f, counts.items())) for f in (lambda kv: sum(kv[1].values()), lambda kv: kv[1][kv[0]]))
    return [*rows, f"| all | {total} | {right} ({100 * right / total:.1f} %) | |"]


@pytest.mark.slow
def test_the_confusion_table_is_the_one_of_the_documentation() -> None:
    rows = confusion()
    assert len(rows) - 1 >= 12
    assert float(re.findall(r"\(([\d.]+) %\)", rows[-1])[0]) >= 95
    assert "\n".join(rows) in PAGE.read_text("utf-8")


def test_the_documentation_lists_every_hypothesis() -> None:
    text = PAGE.read_text("utf-8")
    for name in {h.name for h in HYPOTHESES} | {"stored weight", "unknown"}:
        assert f"| {name} |" in text
    said = re.findall(r"\| all \| \d+ \| \d+ \(([\d.]+) %\)", text)
    assert float(said[0]) >= 95


# --- what it says


@pytest.fixture(scope="module", name="image")
def _image() -> Made:
    return made("image")


def fault_of(m: Made, kind: str, form: str) -> Fault:
    return next(f for f in seeded(m.name) if (f.kind, f.form) == (kind, form))


def test_the_place_the_cause_and_the_evidence(image: Made, capsys: pytest.CaptureFixture[str]) -> None:
    fault = fault_of(image, "tie", "even")
    found = linger.why(image.proto, image.right, fault.wrong)
    right, wrong = image.right[found.tensor], fault.wrong[found.tensor]
    assert found.differing == found.explained == (right != wrong).sum()
    assert found.index == tuple(np.argwhere(right != wrong)[0])
    assert (found.first, found.second, found.expected) == (right[found.index], wrong[found.index], right[found.index])
    assert (found.cause, found.certain, found.op) == ("tie", True, "Conv2dInt")
    said = found.evidence[0]
    value, n = re.fullmatch(r"there the exact sum is ([-\d,]+) = \S+ \* 2\^(\d+) before rounding", said).groups()  # type: ignore[union-attr]
    assert (2 * int(value.replace(",", ""))) % 2 ** (int(n) + 1) == 2 ** int(n), "half a step"
    assert capsys.readouterr().out == f"{found}\n"
    assert "exact ties are rounded to even, the file rounds them up" in str(found)


def test_equal_runs(image: Made) -> None:
    found = why(image.proto, image.right, dict(image.right), quiet=True)
    assert (found.equal, found.compared) == (True, len(image.right) - 1)
    assert str(found).startswith("equal: all")


@pytest.mark.parametrize("form", ["one", "few", "noise", "zeros", "constant"])
@pytest.mark.parametrize("name", NETS)
def test_what_is_no_known_cause_is_unknown(name: str, form: str) -> None:
    m, g = made(name), np.random.default_rng(0)
    for node in m.proto.graph.node:
        y = m.right[node.output[0]]
        if node.op_type not in ("Conv2dInt", "LinearInt", "Conv1dInt", "iqAdd", "LayerNormInt", "iqTanh"):
            continue
        wrong = y.copy()
        if form == "one":
            wrong.reshape(-1)[5] ^= 3
        elif form == "few":
            wrong.reshape(-1)[2:14] ^= 1
        elif form == "noise":
            wrong = np.clip(y.astype(int) + g.integers(-1, 2, y.shape), -128, 127).astype(y.dtype)
        elif form == "zeros":
            wrong[:, ::2] = 0
        else:
            wrong[:] = 77
        found = why(m.proto, m.right, {**m.right, node.output[0]: wrong}, quiet=True)
        assert (found.tensor, found.cause, found.explained) == (node.output[0], "unknown", 0)
        assert "cause: unknown" in str(found)


# --- every kind of run


def test_two_faults_the_first_counts(image: Made) -> None:
    """What differs further down is no cause."""
    fault = fault_of(image, "bias scale", "4 times")
    assert fault.node == "conv1"
    assert (fault.wrong["conv2"] != image.right["conv2"]).any()
    assert explained(fault).tensor == "conv1"


def test_a_mutated_file_against_the_net(image: Made, tmp_path: Path) -> None:
    """The file is wrong, not the run: PyTorch and the runtime part."""
    fault = fault_of(image, "layout", "turned kernel")
    assert fault.mutated is not None
    onnx.save(fault.mutated, tmp_path / "net.onnx")
    found = why(tmp_path / "net.onnx", image.net, "runtime", inputs=image.x, quiet=True)
    assert (found.cause, found.wrong, found.tensor) == ("layout", "first", "conv1")
    assert why(image.proto, image.net, "onnxruntime:all", inputs=(image.x,), quiet=True).equal


def test_folders_of_text(image: Made, tmp_path: Path) -> None:
    """What Dumper writes has the layers only: nodes between them may be wrong too."""
    image.net.eval()
    with linger.Dumper() as dumper:
        dumper.enable_dump_quanted(image.net, tmp_path / "right")
        image.net(image.x)
    assert why(image.proto, tmp_path / "right", "runtime", inputs=image.x, quiet=True).equal
    fault = fault_of(image, "truncation", "floor")
    (tmp_path / "wrong").mkdir()
    for name in ("conv1", "conv2"):
        text = "\n".join(map(str, fault.wrong[name].flatten()))
        (tmp_path / "wrong" / f"{name}.txt").write_text(text)
    found = why(image.proto, tmp_path / "right", tmp_path / "wrong", inputs=image.x, quiet=True)
    assert (found.tensor, found.cause, found.node) == (fault.node, "truncation", fault.node)


def test_floats_of_a_dump_become_integers(tmp_path: Path) -> None:
    m = made("words")
    (tmp_path / "float").mkdir()
    with linger.Dumper() as dumper:
        dumper.enable_dump_quanted(m.net.eval(), tmp_path / "dump")
        m.net(m.x)
    for file in (tmp_path / "dump").glob("*.outputs"):
        file.rename(tmp_path / "float" / file.name)
    assert why(m.proto, tmp_path / "float", "runtime", inputs=m.x, quiet=True).equal


def test_only_outputs(image: Made) -> None:
    """The cause is searched in every node of the file."""
    fault = fault_of(image, "padding value", "-128")
    names = [o.name for o in image.proto.graph.output]
    runs = [{name: run[name] for name in names} for run in (image.right, fault.wrong)]
    found = why(image.proto, *runs, inputs=image.x, quiet=True)
    assert (found.tensor, found.node, found.cause) == (names[0], fault.node, "padding value")


# --- the command


def test_the_command(image: Made, tmp_path: Path) -> None:
    fault = fault_of(image, "double rounding", "half")
    onnx.save(image.proto, tmp_path / "net.onnx")
    for name, arrays in (("a.npz", image.right), ("b.npz", fault.wrong)):
        write_arrays(tmp_path / name, arrays)
    paths = [str(tmp_path / name) for name in ("net.onnx", "a.npz", "b.npz")]
    result = CliRunner().invoke(app, ["why", *paths, "--json"])
    said = schema.check("why", result.stdout)
    assert (result.exit_code, said["equal"], said["cause"]) == (1, False, "double rounding")
    result = CliRunner().invoke(app, ["why", *paths])
    assert "cause: double rounding: the sum is rounded after" in result.stdout
    result = CliRunner().invoke(app, ["why", *paths[:2], "--json"])
    assert result.exit_code == 2, "golden inputs or --input are needed"
    np.save(tmp_path / "x.npy", image.x.numpy())
    result = CliRunner().invoke(app, ["why", *paths[:2], "--json", "--input", str(tmp_path / "x.npy")])
    assert (result.exit_code, schema.check("why", result.stdout)["equal"]) == (0, True)


# --- mistakes


def test_mistakes(image: Made, tmp_path: Path) -> None:
    proto, right = image.proto, image.right
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "conv1.txt").write_text("one two")
    (tmp_path / "text.npz").write_text("no arrays")
    inner = {k: right[k] for k in ("conv2", "output_0")}
    cases: dict[str, tuple[object, object]] = {
        r"^why: a run of type dict holds no tensor of the file, allowed are names such as x, x.quant": ({"other": right["x"]}, right),
        r"^why: the two runs have no tensor in common": ({"conv1": right["conv1"]}, {"conv2": right["conv2"]}),
        r"^why: found no inputs to run runtime on, allowed are --input": (right, "runtime"),
        r"^why: found no inputs to run the net on": (image.net, right),
        r"^why: there is no file 'none.npz'": ("none.npz", right),
        r"^why: '.*text.npz' is truncated or no .npz file": (tmp_path / "text.npz", right),
        r"^why: '.*conv1.txt' is no text file of numbers": (tmp_path / "words", right),
        r"^why: found a run of type int, allowed are a path": (5, right),
        r"^why: conv2 has 3 and 3 elements, the file makes": (right | {"conv2": np.zeros(3)}, right | {"conv2": np.ones(3)}),
        r"^why: the input 'x' is in neither run": (inner, inner | {"conv2": inner["conv2"] ^ 1}),
    }  # fmt: skip
    for match, runs in cases.items():
        with pytest.raises(LingerError, match=match):
            why(proto, *runs, quiet=True)
    with pytest.raises(LingerError, match=r"^why: the level is 'most', allowed are disable, basic"):
        why(proto, right, "onnxruntime:most", inputs=image.x, quiet=True)
    with pytest.raises(LingerError, match=r"^why: found 2 inputs, the file takes x"):
        why(proto, right, right, inputs=(image.x, image.x), quiet=True)
    with pytest.raises(LingerError, match=r"^why: there is no file 'none.onnx'"):
        why("none.onnx", right, right)


def test_the_reference_is_itself_again() -> None:
    """What hypotheses put in its place is gone, after errors too."""
    m = made("sound")
    for kind in ARITHMETIC:
        fault = next(f for f in seeded("sound") if f.kind == kind)
        explained(fault)
    model = linger.runtime.from_proto(m.proto)
    model(m.x.numpy())
    assert all(np.array_equal(model.tensors[k], v) for k, v in m.right.items())


def test_a_chip_that_rounds_ties_to_even(tmp_path: Path) -> None:
    """Half up is the other way there, and all other causes are computed with ties to even."""
    (tmp_path / "even.toml").write_text('name = "even"\nlike = "arcs"\nrounding = "half_even"\n')
    torch.manual_seed(0)
    net, x = linger.init(nn.Sequential(nn.Linear(40, 12)), target=str(tmp_path / "even.toml")), torch.randn(60, 40)
    net(x)
    net[0].running_o.mul_(0.5)  # some results saturate
    proto = linger.onnx.export(net.eval(), (x,))
    model = linger.runtime.from_proto(proto)
    model(x.numpy())
    node = next(n for n in proto.graph.node if n.op_type == "LinearInt")
    v, n = sums(node, [model.tensors[name] for name in node.input]), shift_of(node)
    right = model.tensors[node.output[0]]
    assert right.tolist() == np.clip(np.rint(v / 2.0**n), -128, 127).tolist()
    forms = {
        "tie": np.clip(np.floor(v / 2.0**n + 0.5), -128, 127),
        "double rounding": np.clip(np.rint(np.rint(v / 8) / 2.0 ** (n - 3)), -128, 127),
        "saturation": (np.rint(v / 2.0**n) + 128) % 256 - 128,
        "off by one exponent": np.clip(np.rint(v / 2.0 ** (n - 1)), -128, 127),
    }
    for cause, wrong in forms.items():
        found = why(proto, {**model.tensors}, {**model.tensors, node.output[0]: wrong.astype(np.int8)}, quiet=True)
        assert (found.cause, found.certain) == (cause, True)
    assert "up, the file rounds them to even" in str(
        why(proto, dict(model.tensors), {**model.tensors, "0": forms["tie"]}, quiet=True)
    )


def test_a_recurrent_net() -> None:
    """A scale of a cell, found although its sums are not the node's result."""
    torch.manual_seed(0)
    net = linger.init(nn.GRU(4, 5, batch_first=True), target="venusa", limits=False)
    x = torch.randn(3, 6, 4)
    net(x)
    proto = linger.onnx.export(net.eval(), (x,))
    model = linger.runtime.from_proto(proto)
    model(x.numpy())
    wrong = {k: v for k, v in model.tensors.items() if k not in model.constants}
    right = dict(wrong)
    node = next(n for n in proto.graph.node if n.op_type == "GRUInt")
    altered = onnx.NodeProto()
    altered.CopyFrom(node)
    next(a for a in altered.attribute if a.name == "scale_o").f *= 2
    out = model.step(altered)(*(model.tensors[n] if n else None for n in node.input))
    wrong[node.output[0]] = out[0]
    found = why(proto, right, wrong, quiet=True)
    assert (found.tensor, found.cause) == (node.output[0], "off by one exponent")
