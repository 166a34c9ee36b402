"""Parts of a report on their own: worst inputs, pictures, the drawing of the graph."""

from __future__ import annotations

import base64
import math
import zlib
from pathlib import Path

import pytest
import torch
from harness import converted, inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import linger
from linger.floating import in_float
from linger.ops import CASES, Case
from linger.report import Layer, both
from linger.report._graph import drawing
from linger.report._worst import picture, series, worst_of
from linger.trace import tensors_of

# --- worst inputs


def test_the_worst_inputs_come_first() -> None:
    wanted = torch.ones(4, 3)
    found = wanted + torch.tensor([0.1, 0.3, 0.0, 0.2]).unsqueeze(1)
    rows = worst_of(7, torch.randn(4, 1, 8, 8), 0, [found], [wanted])
    assert [r.item for r in rows] == [1, 3, 0, 2]
    assert rows[0].sqnr == pytest.approx(10 * math.log10(1 / 0.09), abs=1e-4)
    assert (rows[-1].sqnr, rows[0].batch, rows[0].reference, rows[0].fixed) == (200, 7, 0, 0)
    assert rows[0].picture.startswith("data:image/png;base64,")
    whole = worst_of(0, torch.randn(4, 2), 0, [torch.ones(5)], [torch.ones(5)])
    assert [r.item for r in whole] == [-1]


def test_a_worst_input_is_judged_by_what_is_finite_in_float() -> None:
    """As the net's SQNR: a score of -inf, which no grid holds, is no error."""
    wanted = torch.tensor([[1.0, -math.inf], [1.0, 2.0], [math.nan, 4.0]])
    found = torch.tensor([[1.5, -8.0], [1.0, 2.0], [0.0, 4.4]])
    rows = worst_of(0, torch.randn(3, 2), 0, [found], [wanted])
    assert [r.item for r in rows] == [0, 2, 1]
    assert [r.sqnr for r in rows] == pytest.approx([10 * math.log10(4), 20, 200], abs=1e-5)


def test_pictures_are_pngs_of_the_input() -> None:
    x = torch.linspace(0, 1, 40).reshape(1, 5, 8)
    data = base64.b64decode(picture(x).partition(",")[2])
    at = data.index(b"IDAT")
    pixels = zlib.decompress(data[at + 4 : -16])
    lines = [pixels[1 + i * 9 : 9 + i * 9] for i in range(5)]
    assert b"".join(lines) == bytes((x * 255 + 0.5).to(torch.uint8).flatten().tolist())
    assert picture(torch.randn(3, 200, 300)).startswith("data:")
    assert (
        picture(torch.randn(2, 8, 8))
        == picture(torch.zeros(1, 8, 8, dtype=torch.int64))
        == picture(torch.randn(5))
        == ""
    )
    assert series(torch.arange(6.0)) == (0, 1, 2, 3, 4, 5)
    assert len(series(torch.randn(1, 1000))) == 125
    assert series(torch.randn(2, 9)) == ()


# --- files


def test_a_file_of_a_fixed_batch_and_any_number_of_steps(tmp_path: Path) -> None:
    x, net = torch.randn(10, 3, 20), nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU())
    linger.trace_layers(net, net, x)
    linger.init(net)
    net(x)
    linger.onnx.export(net.eval(), (x,), tmp_path / "steps.onnx", input_names=["x"], dynamic_axes={"x": {2: "time"}})
    certificate = linger.report(tmp_path / "steps.onnx", [x], progress=False).data.summary.certificate
    assert certificate.equal
    assert certificate.elements == 10 * 4 * 18


# --- the drawing


@st.composite
def graphs(draw: st.DrawFn) -> list[Layer]:
    count = draw(st.integers(1, 14))
    reads = [draw(st.sets(st.integers(-1, i - 1), min_size=1, max_size=3)) for i in range(count)]
    return [
        Layer(name=str(i), op="", kind="fixed", island=0, source="", inputs=tuple(sorted(r)), input=(), output=())
        for i, r in enumerate(reads)
    ]


@given(graphs())
def test_no_line_of_the_graph_passes_through_another_row(layers: list[Layer]) -> None:
    drawn = drawing(layers)
    assert {(e.source, e.target) for e in drawn.edges} == {(j, i) for i, x in enumerate(layers) for j in x.inputs}
    for edge in drawn.edges:
        assert edge.to == drawn.lanes[edge.target]
        between = drawn.lanes[edge.source + 1 : edge.target]
        assert edge.lane not in between
    assert max(drawn.lanes) < drawn.width


def test_a_chain_is_one_straight_line() -> None:
    layers = [
        Layer(name=str(i), op="", kind="fixed", island=0, source="", inputs=(i - 1,), input=(), output=())
        for i in range(9)
    ]
    assert set(drawing(layers).lanes) == {0}


# --- both forwards, of every op


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_both_forwards_of_every_op(case: Case) -> None:
    """Fixed point is the net's own, float is what ``in_float`` makes, and every call comes by in both."""
    net, x = converted(case), inputs(case, 8, 2, 0)
    found, wanted = both(net, x, lambda net, batch: net(*batch), meters := {})
    assert meters
    assert not [key for key, m in meters.items() if not m.total.seen and "mask" not in key[0]]
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(found), tensors_of(net(*x)), strict=True))
        with in_float(net):
            torch.testing.assert_close(wanted, net(*x), rtol=1e-4, atol=1e-4)
