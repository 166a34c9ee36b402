"""Recurrent layers: PyTorch eval, the NumPy runtime and ONNX Runtime at every level give the same integers."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper, parser
from recurrent import CELLS, CHIPS, LAYERS, D, H, Net, first_states, fixed
from test_golden import CASES as GOLDEN_CASES
from test_golden import GOLDEN, UNDEFINED, without_input_quant
from torch import nn

import linger
from linger.numerics import grid_of
from linger.ops import BY_NAME
from linger.ops._cells import applied, arithmetic
from linger.ops._recurrent_body import Form
from linger.ops._recurrent_tables import functions, rises
from linger.targets import TARGETS
from linger.verify import LEVELS, session

T = 1000  # of every sixth case, the others have 40 steps
FULL = list(itertools.product(LAYERS, (1, 2), (False, True), (False, True), (False, True), (8, 16)))


def verified(net: Any, path: Path, inputs: tuple[torch.Tensor, ...], **options: Any) -> None:
    linger.onnx.export(net, inputs, path, **options)
    report = linger.verify(net, path, inputs, quiet=True)
    assert set(report.differing) == {"runtime", *LEVELS}
    assert report.equal, str(report)


@pytest.mark.parametrize(
    ("kind", "layers", "both", "states", "packed", "bits"), FULL, ids=lambda v: str(v).replace("False", "no").replace("True", "yes")
)  # fmt: skip
def test_all_options(kind: str, layers: int, both: bool, states: bool, packed: bool, bits: int, tmp_path: Path) -> None:
    """All three chips in turn, one per case: every two values of two options meet, the chip and ``batch_first`` among them."""
    number = FULL.index((kind, layers, both, states, packed, bits))
    steps = T if number % 6 == 1 + number // 48 else 40
    chip = CHIPS[(number + number // 3) % 3]
    torch.manual_seed(number)
    layer = LAYERS[kind](D, H, num_layers=layers, bidirectional=both, batch_first=number.bit_count() % 2 == 0)
    x = torch.randn(*((3, steps) if layer.batch_first else (steps, 3)), D)
    rest = [torch.tensor([steps, steps - 20, 7])] if packed else []
    rest += first_states(layer, 3) if states else []
    net = fixed(Net(layer, packed), (x, *rest), chip, bits)
    verified(net, tmp_path / "net.onnx", (x * 1.3, *rest))


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("kind", "layers", "both", "states", "packed", "bits"), FULL, ids=lambda v: str(v).replace("False", "no").replace("True", "yes")
)  # fmt: skip
def test_all_options_over_a_thousand_steps(
    kind: str, layers: int, both: bool, states: bool, packed: bool, bits: int, chip: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    layer = LAYERS[kind](D, H, num_layers=layers, bidirectional=both, batch_first=True)
    x = torch.randn(3, T, D)
    rest = [torch.tensor([T, T - 20, 7])] if packed else []
    rest += first_states(layer, 3) if states else []
    verified(fixed(Net(layer, packed), (x, *rest), chip, bits), tmp_path / "net.onnx", (x * 1.3, *rest))


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm-projected": ("lstm", {"proj_size": 5, "bidirectional": True, "num_layers": 2}),
    "lstm-without-bias": ("lstm", {"proj_size": 4, "bias": False}),
    "gru-without-bias": ("gru", {"bias": False, "num_layers": 2}),
    "rnn-relu": ("rnn", {"nonlinearity": "relu", "bidirectional": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("states", [False, True], ids=["none", "states"])
@pytest.mark.parametrize("batch", [None, 4])
def test_variants(name: str, chip: str, bits: int, states: bool, batch: int | None, tmp_path: Path) -> None:
    torch.manual_seed(3)
    kind, options = VARIANTS[name]
    layer = LAYERS[kind](D, H, **options)
    x = torch.randn(9, *(() if batch is None else (batch,)), D)
    rest = first_states(layer, batch) if states else []
    verified(fixed(Net(layer), (x, *rest), chip, bits), tmp_path / "net.onnx", (x * 1.5, *rest))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("states", [False, True], ids=["none", "states"])
@pytest.mark.parametrize("batch", [None, 4])
def test_cells(kind: str, chip: str, bits: int, states: bool, batch: int | None, tmp_path: Path) -> None:
    torch.manual_seed(4)
    cell = CELLS[kind](D, H, bias=bits == 8)
    x = torch.randn(*(() if batch is None else (batch,)), D)
    rest = first_states(cell, batch) if states else []
    verified(fixed(Net(cell), (x, *rest), chip, bits), tmp_path / "net.onnx", (x * 1.5, *rest))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("first", [False, True], ids=["steps", "batch"])
@pytest.mark.parametrize("enforce", [False, True], ids=["any-order", "sorted"])
def test_other_lengths_and_batches_than_exported(kind: str, first: bool, enforce: bool, tmp_path: Path) -> None:
    torch.manual_seed(5)
    layer = LAYERS[kind](D, H, num_layers=2, bidirectional=True, batch_first=first)
    x = torch.randn(*((4, 8) if first else (8, 4)), D)
    lengths = torch.tensor([8, 5, 5, 2]) if enforce else torch.tensor([5, 2, 8, 5])
    states = first_states(layer, 4)
    net = fixed(Net(layer, True, enforce), (x, lengths, *states))
    names = ["x", "lengths", "h", "c"][: 2 + len(states)]
    axes = {"x": {0 if first else 1: "n"}, "lengths": {0: "n"}, **{name: {1: "n"} for name in names[2:]}}
    path = tmp_path / "net.onnx"
    verified(net, path, (x, lengths, *states), input_names=names, dynamic_axes=axes)
    shorter = torch.tensor([6, 5, 5, 1]) if enforce else torch.tensor([4, 6, 1, 6])
    assert linger.verify(net, path, (x, shorter, *states), quiet=True).equal
    more = torch.arange(8, 0, -1) if enforce else torch.tensor([3, 8, 1, 2, 7, 4, 6, 5])
    larger = torch.cat([x, -x], 0 if first else 1)
    assert linger.verify(net, path, (larger, more, *(torch.cat([s, s], 1) for s in states)), quiet=True).equal


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("chip", CHIPS)
def test_sums_beyond_float32(kind: str, chip: str, tmp_path: Path) -> None:
    """1,200 features and 600 units: both products are rounded where they are still exact."""
    torch.manual_seed(11)
    layer, x = LAYERS[kind](1200, 600), 3 * torch.randn(4, 2, 1200)
    verified(fixed(Net(layer), (x,), chip), tmp_path / "net.onnx", (x,))


class Classifier(nn.Module):
    """What people build: features, a recurrent layer, a head on its last state and on its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.gru = (
            nn.Linear(5, D),
            nn.LSTM(D, H, batch_first=True),
            nn.GRU(H, 7, batch_first=True),
        )
        self.head, self.all = nn.Linear(7, 3), nn.Linear(H, 2)

    def forward(self, x: torch.Tensor) -> Any:
        y, _ = self.lstm(torch.relu(self.embed(x)))
        _, h = self.gru(y)
        return self.head(h[-1]), self.all(y)


@pytest.mark.parametrize("chip", CHIPS)
def test_integers_go_through_a_whole_net(chip: str, tmp_path: Path) -> None:
    """States of one layer are on a grid: nothing in between is float."""
    torch.manual_seed(6)
    net, x = Classifier(), torch.randn(4, 12, 5)
    linger.trace_layers(net, net, (x,))
    net = fixed(net, (x,), chip)
    path = tmp_path / "net.onnx"
    verified(net, path, (x,), dynamic_axes={"x": {0: "n", 1: "t"}})
    assert linger.verify(net, path, torch.randn(2, 31, 5), quiet=True).equal
    ops = [n.op_type for n in onnx.load(path).graph.node]
    assert [op for op in ops if op in ("Quant", "Dequant")] == ["Quant", "Dequant", "Dequant"]
    assert {"LSTMInt", "GRUInt"} <= set(ops)


def test_nodes_are_those_of_the_engine(tmp_path: Path) -> None:
    """Inputs, their order and the attributes of ``engine`` 2 and ``upstream`` 7.4."""
    torch.manual_seed(7)
    layer = nn.LSTM(D, H, bidirectional=True)
    x, lengths, states = torch.randn(5, 2, D), torch.tensor([5, 3]), first_states(layer, 2)
    net = fixed(Net(layer, True), (x, lengths, *states))
    linger.onnx.export(net, (x, lengths, *states), tmp_path / "net.onnx")
    nodes = [n for n in onnx.load(tmp_path / "net.onnx").graph.node if n.op_type == "LSTMInt"]
    parameters = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    for direction, node in enumerate(nodes):
        end = "_reverse" * direction
        assert list(node.input)[4:] == [f"rnn.{p}{end}" for p in parameters]
        assert len(node.input) == 8
        said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert said["go_forward"] == 1 - direction
        assert said["scale_h"] == said["scale_o"]
        assert {"input_size", "hidden_size", "num_layers", "batch_first", "scale_i", "scale_iw", "scale_hw"} <= set(
            said
        )
    assert len({node.input[2] for node in nodes}) == 2  # each direction has its own state
    gru = fixed(Net(nn.GRU(D, H), True), (x, lengths, states[0][:1]))
    linger.onnx.export(gru, (x, lengths, states[0][:1]), tmp_path / "gru.onnx")
    assert "GRUInt_Is8_Is64_If32" in [n.op_type for n in onnx.load(tmp_path / "gru.onnx").graph.node]


def test_long_file_loads_in_seconds(tmp_path: Path) -> None:
    net = fixed(Net(nn.LSTM(D, H)), (torch.randn(T, 1, D),))
    linger.onnx.export(net, (torch.randn(T, 1, D),), tmp_path / "net.onnx")
    start = time.perf_counter()
    session(onnx.load(tmp_path / "net.onnx"), "all")
    assert time.perf_counter() - start < 5
    assert (tmp_path / "net.onnx").stat().st_size < 100_000


# --- the chip's arithmetic


@pytest.mark.parametrize("case", [c for c in GOLDEN_CASES if "LSTM" in c.name or "GRU" in c.name], ids=str)
def test_engine_vectors_in_onnx_runtime(case: Path) -> None:
    """Our bodies on the engine's own files. A GRU there counts half of its state, which ours never does: run says what."""
    model = without_input_quant(onnx.load(GOLDEN / case / "model.onnx"))
    node = model.graph.node[0]
    said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    chip, kind = case.parts[0], "lstm" if "LSTM" in node.op_type else "gru"
    x = np.load(GOLDEN / case / "in_0.npy")
    stored = [numpy_helper.to_array(i) for name in node.input[1:] for i in model.graph.initializer if i.name == name]
    options = {k: v.decode() if isinstance(v, bytes) else v for k, v in said.items()}
    options["scale_x"] = options.pop("scale_i", options.get("scale_x"))
    if kind == "gru":
        options["state_shift"] = int(np.log2(said["scale_o"])) - 7
    wanted = BY_NAME[node.op_type].run(x, *stored, **options)
    words = {"batch_first": bool(said["batch_first"]) != TARGETS[chip].time_swapped, "reverse": not said["go_forward"]}
    form = Form(kind=kind, platform=chip, bits=8, words=frozenset(w for w, on in words.items() if on))
    made = with_body(model, form, said)
    for level in LEVELS:
        found = session(made, level).run(None, {made.graph.input[0].name: x})
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            assert np.array_equal(a, b)
            if kind == "lstm" and UNDEFINED.get((chip, "LSTM")) != i:
                assert np.array_equal(a, np.load(GOLDEN / case / f"out_{i}.npy"))


def with_body(model: onnx.ModelProto, form: Form, said: dict[str, Any]) -> onnx.ModelProto:
    """The model's one node with our body."""
    node = model.graph.node[0]
    op = BY_NAME[node.op_type]
    inputs, text = op.body(form.text, 17)
    if "scale_i" not in said:
        node.attribute.append(helper.make_attribute("scale_i", said["scale_x"]))
    node.domain = "thinker"
    head = f'<domain: "thinker", opset_import: ["" : 17]>\n{node.op_type} <{", ".join(sorted({*said, "scale_i"}))}>'
    model.functions.append(parser.parse_function(f"{head} ({inputs}) => ({op.outputs}) {{\n{text}}}"))
    model.ir_version = 9
    del model.opset_import[:], model.graph.output[:], model.graph.value_info[:]
    model.opset_import.extend([helper.make_opsetid("", 17), helper.make_opsetid("thinker", 1)])
    results = node.output[: len(op.outputs.split(", "))]
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in results)
    return model


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("which", [0, 1], ids=["sigmoid", "tanh"])
def test_functions_of_the_cells(chip: str, bits: int, which: int) -> None:
    """Arguments at both limits, around every band edge, near 0, and at random."""
    how = arithmetic(chip, bits)
    table, top = (how.sigmoid, how.tanh)[which], 2 ** (how.width - 1)
    edges = np.array(table.bands)[:, None] + np.arange(-5000, 5000, 7 if how.width == 32 else 1)
    rng = np.random.default_rng(0)
    normal = (rng.normal(size=20000) * 2**how.argument * 2).astype(np.int64)
    z = np.concatenate([edges.ravel(), -edges.ravel(), normal, np.arange(-9000, 9000), [-top, top - 1]]).clip(
        -top, top - 1
    )
    arguments = torch.tensor(z[:, None], dtype=torch.float32 if how.narrow else torch.float64)
    for reach in (top, 2 * top):
        look = functions(how, torch.device("cpu")).look(1 - which, 1, reach)
        for fraction in (0, 0.75):  # of a sum that nobody rounded
            found, row = torch.empty_like(arguments), torch.empty_like(arguments, dtype=torch.int32)
            look(look.first + (arguments + fraction) * look.unit, row, found, row.view(-1), found.view(-1))
            assert np.array_equal(found[:, 0].numpy(), applied(z, table, how.fraction))


@pytest.mark.parametrize("chip", ["arcs", "venusa"])
@pytest.mark.parametrize("which", [0, 1], ids=["sigmoid", "tanh"])
def test_a_32_bit_function_rises_once_while_the_upper_bits_stay(chip: str, which: int) -> None:
    """What the table of these chips rests on: within a segment the slope says so; every argument around an edge is tried."""
    how = arithmetic(chip, 8)
    table = (how.sigmoid, how.tanh)[which]
    assert max(table.positive[0] + table.negative[0]) * 2**12 <= 2**43
    near = {j + k for b in table.bands for s in (b, -b) for j in [s >> 12] for k in (-1, 0, 1)} | {-1, 0}
    z = (np.array(sorted(near))[:, None] << 12) + np.arange(2**12)
    y = applied(z, table, 15)
    assert (np.diff(y, axis=1) >= 0).all()
    assert (y[:, -1] - y[:, 0] <= 1).all()
    e = rises(table, 15)[np.array(sorted(near)) + 2**19]
    assert np.array_equal(np.floor(e[:, None] + np.arange(2**12) / 2**12), y)


# --- grids


def test_hidden_state_has_a_grid_of_its_own() -> None:
    """Neither that of the input nor that of another layer; states of several layers are plain."""
    torch.manual_seed(8)
    layer = nn.LSTM(D, H, num_layers=2)
    with torch.no_grad():
        layer.weight_ih_l1.mul_(0.05)
        layer.weight_hh_l1.mul_(0.05)
        layer.bias_ih_l1.mul_(0.05)
        layer.bias_hh_l1.mul_(0.05)
    net = fixed(Net(layer), (30 * torch.randn(20, 4, D),))
    y, (h, c) = net(30 * torch.randn(20, 4, D))
    first, second = (float(net.rnn.hidden_scale(i)) for i in range(2))
    assert float(net.rnn.scale("i", 8)) == 1
    assert first == 128 < second
    assert float(y.grid.scale) == second
    assert grid_of(h) is None
    assert float(c.grid.scale) == 128
    one = fixed(Net(nn.GRU(D, H)), (torch.randn(20, 4, D),))
    out, last = one(torch.randn(20, 4, D))
    assert last.grid == out.grid == (one.rnn.hidden_scale(0), 8)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bits", [8, 16])
def test_close_to_float(kind: str, chip: str, bits: int) -> None:
    """PyTorch's definition, within what 8-bit weights leave."""
    torch.manual_seed(9)
    layer = LAYERS[kind](16, 24)
    x = torch.randn(30, 8, 16)
    wanted = layer(x)[0].detach()
    found = fixed(Net(layer), (x,), chip, bits)(x)[0]
    assert (found - wanted).abs().mean() < (0.02 if bits == 8 else 0.01)


def test_training_forward_is_eval_on_the_same_ranges() -> None:
    torch.manual_seed(10)
    for kind, layer in LAYERS.items():
        net = linger.init(Net(layer(D, H, num_layers=2, bidirectional=True)))
        x = torch.randn(7, 3, D)
        trained = net(x)[0].detach()
        assert torch.equal(net.eval()(x)[0], trained), kind
