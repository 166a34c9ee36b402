"""``linger.runtime``: the exported file on integers, what it keeps, what it is given, and files that are not ours."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, parser
from torch import Tensor, nn

import linger
from linger.ops import BY_NAME

TORCH = str(Path(torch.__file__).parent)


class Net(nn.Module):
    """Two inputs and two outputs; layers, sites, moves and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.relu(self.norm(self.conv(x)))
        a = torch.cat([a, a + self.conv(y)], 1)[:, 2:6]
        return self.fc(nn.functional.avg_pool2d(a, 6).flatten(1)), a * a


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    made = linger.init(Net())
    made(torch.randn(4, 3, 6, 6), torch.randn(4, 3, 6, 6))
    return made.eval()


@pytest.fixture(scope="module")
def path(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("runtime") / "net.onnx"
    args = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    linger.onnx.export(net, args, file, dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}})
    return file


@pytest.fixture
def model(path: Path) -> linger.runtime.Model:
    return linger.runtime.load(path)


def inputs(batch: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(seed)
    return g.standard_normal((batch, 3, 6, 6), np.float32), g.standard_normal((batch, 3, 6, 6), np.float32) * 4


def evaluated(net: nn.Module, *args: np.ndarray) -> list[list[float]]:
    with torch.no_grad():
        return [t.tolist() for t in net(*map(torch.from_numpy, args))]


def listed(out: Any) -> list[Any]:
    return [o.tolist() for o in out]


# --- running


@pytest.mark.parametrize("batch", [0, 1, 2, 7])
def test_equals_eval(net: nn.Module, path: Path, batch: int) -> None:
    args = inputs(batch, batch)
    assert listed(linger.runtime.load(str(path))(*args)) == evaluated(net, *args)


WAYS: dict[str, Callable[..., Any]] = {
    "positions": lambda m, x, y: m(x, y),
    "names": lambda m, x, y: m(y=y, x=x),
    "both": lambda m, x, y: m(x, y=y),
    "a mapping": lambda m, x, y: m({"y": y, "x": x}),
    "a mapping and a name": lambda m, x, y: m({"y": y}, x=x),
    "tensors": lambda m, x, y: m(torch.from_numpy(x), torch.from_numpy(y)),
    "not contiguous": lambda m, x, y: m(np.asfortranarray(x), y[::-1][::-1]),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_pass_inputs(net: nn.Module, model: linger.runtime.Model, way: str) -> None:
    assert (model.inputs, model.outputs) == (["x", "y"], ["output_0", "output_1"])
    assert listed(WAYS[way](model, *inputs())) == evaluated(net, *inputs())


def test_every_tensor_of_the_last_call_is_kept(net: nn.Module, model: linger.runtime.Model) -> None:
    """Inputs, parameters and every result by name: integers where the file has integers, and those of the net."""
    assert model.tensors == {}
    for seed in (1, 2):
        x, y = inputs(3, seed)
        out = model(x, y)
        names = {n for node in model.proto.graph.node for n in node.output} | {
            i.name for i in model.proto.graph.initializer
        }
        assert model.tensors.keys() == names | {"x", "y"}
        assert all(np.array_equal(model.tensors[name], value) for name, value in zip(model.outputs, out, strict=True))
        with torch.no_grad():
            first = net.conv(torch.from_numpy(x))
            assert model.tensors["conv"].dtype == model.tensors["norm"].dtype == np.int8
            assert model.tensors["conv"].tolist() == (first * first.grid.scale).tolist()
    assert (model.tensors["conv.weight"].dtype, model.tensors["conv.bias"].dtype) == (np.int8, np.int32)


class Number(nn.Module):
    def __init__(self, number: float, product: bool) -> None:
        super().__init__()
        self.conv, self.number, self.product = nn.Conv1d(2, 3, 1), number, product

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.number if self.product else self.conv(x) + self.number


@pytest.mark.parametrize("number", [1e-320, 1e-39, -1e-12, 1e12, -1e30, 1e300])
@pytest.mark.parametrize("product", [True, False])
def test_numbers_beyond_every_grid(number: float, product: bool, tmp_path: Path) -> None:
    """They saturate or vanish, the same everywhere: shifts reach far beyond the width of an integer."""
    made, x = linger.init(Number(number, product)), torch.randn(4, 2, 5)
    made(x)
    linger.onnx.export(made.eval(), x, tmp_path / "net.onnx")
    assert linger.verify(made, tmp_path / "net.onnx", x * 3, quiet=True).equal


def torch_calls(action: Callable[[], object]) -> set[str]:
    """Every function of PyTorch, in Python or C++, that runs while ``action`` does."""
    seen: set[str] = set()

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(TORCH):
            seen.add(frame.f_code.co_name)
        elif event == "c_call":
            owner = getattr(arg, "__module__", None) or type(getattr(arg, "__self__", None)).__module__
            if str(owner).startswith("torch"):
                seen.add(arg.__name__)

    sys.setprofile(watch)
    try:
        action()
    finally:
        sys.setprofile(None)
    return seen


def test_runs_without_torch(model: linger.runtime.Model) -> None:
    """Not one function of PyTorch is called. That the watch sees them: a tensor given as input, a tensor added."""
    x, y = inputs()
    assert torch_calls(lambda: model(x, y)) == set()
    assert "__array__" in torch_calls(lambda: model(torch.from_numpy(x), y))
    assert torch_calls(lambda: torch.ones(1).add_(1)) >= {"ones", "add_"}


@pytest.mark.parametrize("axis", range(-3, 4))
@pytest.mark.parametrize("shape", [(2, 3, 4), (0, 3, 4), (2, 3, 0)])
def test_flatten(shape: tuple[int, ...], axis: int) -> None:
    """As the ONNX operator says it, empty batches included."""
    node = f"z = thinker.Quant <scale_x: float = 8.0, data_bits: int = 8> (x) y = Flatten <axis: int = {axis}> (z)"
    text = f"<ir_version: 9, opset_import: ['' : 17, 'thinker' : 1]> agraph (float[n, 3, m] x) => (int8[a, b] y) {{ {node} }}"
    x, split = np.zeros(shape, np.float32), axis % 3 if axis < 0 else axis
    found = linger.runtime.from_proto(parser.parse_model(text.replace("'", '"')))(x)
    assert found.shape == (int(np.prod(shape[:split])), int(np.prod(shape[split:])))


# --- inputs that do not fit

X, Y = inputs()
SHAPE = r"allowed is \({}, 3, 6, 6\); pass that, or export with dynamic_axes"
MISFITS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "none": ((), {}, "found inputs none, allowed are x, y; pass exactly those"),
    "one": ((X,), {}, "found inputs x, allowed are x, y"),
    "three": ((X, Y, X), {}, "found inputs x, y, input 2, allowed are x, y"),
    "another name": ((X,), {"z": Y}, "found inputs x, z, allowed are x, y"),
    "twice": ((X, Y), {"x": X}, "found inputs x, y, x, allowed are x, y"),
    "another name in a mapping": (({"x": X, "z": Y},), {}, "found inputs x, z, allowed are x, y"),
    "float64": ((X.astype(np.float64), Y), {}, r"input x is float64, allowed is float32; convert it with astype\(np\.float32\)"),
    "float16": ((X, Y.astype(np.float16)), {}, "input y is float16, allowed is float32"),
    "integers": ((X, Y.astype(np.int8)), {}, "input y is int8, allowed is float32"),
    "a list": ((X.tolist(), Y), {}, "input x is float64, allowed is float32"),
    "a string": (("x", Y), {}, "input x is <U1, allowed is float32"),
    "nothing": ((None, Y), {}, "input x is object, allowed is float32"),
    "ragged": (([[1.0], [1.0, 2.0]], Y), {}, "input x is no array: .*; pass a NumPy array or a CPU tensor"),
    "gradient": ((torch.from_numpy(X).requires_grad_(), Y), {}, "input x is no array: Can't call numpy"),
    "channels": ((X[:, :2], Y), {}, r"input x has shape \(2, 2, 6, 6\), " + SHAPE.format("batch")),
    "rank": ((X[0], Y), {}, r"input x has shape \(3, 6, 6\), " + SHAPE.format("batch")),
    "two batch sizes": ((X, Y[:1]), {}, r"input y has shape \(1, 3, 6, 6\), " + SHAPE.format("2")),
    "NaN": ((X * np.float32("nan"), Y), {}, r"x\.quant: found NaN or infinity, allowed are finite numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_inputs_that_do_not_fit(model: linger.runtime.Model, name: str) -> None:
    args, named, match = MISFITS[name]
    with pytest.raises(linger.LingerError, match=f"^runtime: {match}"):
        model(*args, **named)


# --- the engine's newer spelling

NEWER = {"data_bits": "x_bits", "parameter_bits": "w_bits", "strides": "stride"}
QNAMES = """
QConv1d:Conv1dInt QConv2d:Conv2dInt QConvBN2d:Conv2dInt QConvTranspose2d:ConvTranspose2dInt QLinear:LinearInt
QBatchNorm2d:BatchNorm2dInt QAvgPool2d:AvgPool2dInt QCat:iqCat QAdd:iqAdd QMul:iqMul
"""


@pytest.mark.parametrize("names", QNAMES.split())
def test_other_names_mean_the_same(names: str) -> None:
    other, name = names.split(":")
    assert BY_NAME[other] is BY_NAME[name]


@pytest.mark.parametrize("domain", ["linger", "", "thinker"])
def test_newer_spelling(net: nn.Module, path: Path, tmp_path: Path, domain: str) -> None:
    proto = onnx.load(path)
    renamed = 0
    for node in proto.graph.node:
        op = BY_NAME.get(node.op_type)
        if node.domain == "thinker" and op is not None and op.aliases:
            node.op_type, node.domain, renamed = op.aliases[0], domain, renamed + 1
            for attribute in node.attribute:
                attribute.name = NEWER.get(attribute.name, attribute.name)
    assert renamed >= 6
    del proto.functions[:]
    onnx.save(proto, tmp_path / "newer.onnx")
    assert listed(linger.runtime.load(tmp_path / "newer.onnx")(*inputs())) == evaluated(net, *inputs())


# --- files that are not ours, or no longer

PLAIN = """<ir_version: 9, opset_import: ["" : 17{more}]> agraph (float[2] x) => (float[2] y) {{ {node} }}"""


def plain(node: str, more: str = "") -> bytes:
    return bytes(parser.parse_model(PLAIN.format(node=node, more=more)).SerializeToString())


def without(path: Path, change: Callable[[onnx.ModelProto], object]) -> bytes:
    proto = onnx.load(path)
    change(proto)
    return bytes(proto.SerializeToString())


def first(proto: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if node.op_type == op_type)


def set_scale(value: float) -> Callable[[onnx.ModelProto], object]:
    def change(proto: onnx.ModelProto) -> None:
        node = first(proto, "Conv2dInt")
        next(a for a in node.attribute if a.name == "scale_w").f = value

    return change


FOREIGN: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "empty": (lambda p: b"", "is truncated or empty: it has no nodes or no opset; export it again"),
    "text": (lambda p: b"not a model\n" * 9, "is truncated or not an ONNX file .*; export it again"),
    "a float net": (lambda p: plain("y = Relu (x)"), "has no fixed-point node; load a file that linger exported"),
    "an unknown op": (
        lambda p: plain("z = thinker.Quant <scale_x: float = 8.0, data_bits: int = 8> (x) y = other.Op (z)", ', "thinker" : 1, "other" : 1'),
        "found other::Op, which linger does not know; load a file that linger exported",
    ),
    "an unknown standard op": (
        lambda p: plain("z = thinker.Quant <scale_x: float = 8.0, data_bits: int = 8> (x) y = NoSuchOp (z)", ', "thinker" : 1'),
        "is damaged .*NoSuchOp.*; export it again",
    ),
    "no opset": (lambda p: without(p, lambda m: m.ClearField("opset_import")), "it has no nodes or no opset"),
    "no nodes": (lambda p: without(p, lambda m: m.graph.ClearField("node")), "it has no nodes or no opset"),
    "no outputs": (lambda p: without(p, lambda m: m.graph.ClearField("output")), "it has no nodes or no opset"),
    "a node is missing": (lambda p: without(p, lambda m: m.graph.node.pop(1)), "reads '.*', which nothing before it makes; export it again"),
    "the last node is missing": (lambda p: without(p, lambda m: m.graph.node.pop()), "nothing makes the output 'output_1'; export it again"),
    "weights are missing": (lambda p: without(p, lambda m: m.graph.initializer.pop(0)), "which nothing before it makes; export it again"),
    "short weights": (lambda p: without(p, lambda m: setattr(m.graph.initializer[0], "raw_data", b"1")), "is damaged .*; export it again"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_files_that_are_not_ours(path: Path, tmp_path: Path, name: str) -> None:
    make, match = FOREIGN[name]
    (tmp_path / "file.onnx").write_bytes(make(path))
    with pytest.raises(linger.LingerError, match=f"^load: .*{match}"):
        linger.runtime.load(tmp_path / "file.onnx")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(
        linger.LingerError, match=r"load: there is no file '.*none\.onnx'; pass the path given to linger.onnx"
    ):
        linger.runtime.load(tmp_path / "none.onnx")
    with pytest.raises(linger.LingerError, match=r"load: '.*' cannot be read .*; pass the path given to linger.onnx"):
        linger.runtime.load(tmp_path)


@pytest.mark.parametrize("dialect", ["standard", "qdq"])
def test_dialects_for_other_tools(net: nn.Module, tmp_path: Path, dialect: str) -> None:
    linger.onnx.export(net, tuple(map(torch.from_numpy, inputs())), tmp_path / "file.onnx", dialect=dialect)
    with pytest.raises(linger.LingerError, match='run in ONNX Runtime; export with dialect="thinker"'):
        linger.runtime.load(tmp_path / "file.onnx")


@pytest.mark.parametrize("value", [3.0, 0.0, -8.0, 8.000001, float("inf"), float("nan")])
def test_scales_that_are_no_powers_of_two(path: Path, tmp_path: Path, value: float) -> None:
    (tmp_path / "file.onnx").write_bytes(without(path, set_scale(value)))
    with pytest.raises(
        linger.LingerError, match=r"load: .*conv: scale_w is .*, allowed are powers of two; export the net again"
    ):
        linger.runtime.load(tmp_path / "file.onnx")


def test_a_node_that_cannot_run_is_named(path: Path, tmp_path: Path) -> None:
    """The file loads, but the weights of fc have another shape."""

    def change(proto: onnx.ModelProto) -> None:
        weight = next(i for i in proto.graph.initializer if i.name == "fc.weight")
        weight.CopyFrom(helper.make_tensor("fc.weight", TensorProto.INT8, (4, 5), bytes(20), raw=True))

    (tmp_path / "file.onnx").write_bytes(without(path, change))
    with pytest.raises(
        linger.LingerError, match=r"runtime: fc: LinearInt does not run on inputs of shape \(2, 4\), \(4, 5\), \(5,\)"
    ):
        linger.runtime.load(tmp_path / "file.onnx")(*inputs())


def outcome(data: bytes, folder: Path) -> list[Any] | None:
    """What the file computes; None where linger refuses it. Any other error fails the test."""
    (folder / "file.onnx").write_bytes(data)
    try:
        return listed(linger.runtime.load(folder / "file.onnx")(*inputs()))
    except linger.LingerError:
        return None


def test_truncated_files(net: nn.Module, path: Path, tmp_path: Path) -> None:
    """Cut anywhere, a file is refused, unless nothing that runs was lost."""
    data, whole = path.read_bytes(), evaluated(net, *inputs())
    found = [outcome(data[:cut], tmp_path) for cut in range(0, len(data), 23)]
    assert all(out in (None, whole) for out in found)
    assert found.count(None) > len(found) / 2
    assert outcome(data, tmp_path) == whole


@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_files(path: Path, tmp_path_factory: pytest.TempPathFactory, hits: list[tuple[float, int]]) -> None:
    """Bytes overwritten anywhere: the file still runs, or the error is ours."""
    data = bytearray(path.read_bytes())
    for where, byte in hits:
        data[int(where * len(data))] = byte
    outcome(bytes(data), tmp_path_factory.getbasetemp())
