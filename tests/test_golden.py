"""Vectors of the chips' own engine, run in the NumPy reference and in ONNX Runtime on our bodies: equal, or named here.

``golden/`` holds single-op files, inputs and outputs taken from the engine on three platforms.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from linger import runtime
from linger.ops import BY_NAME

INTEGERS = {8: TensorProto.INT8, 16: TensorProto.INT16, 32: TensorProto.INT32}
GOLDEN = Path(__file__).parent / "golden"
# Outputs that the engine leaves undefined: 32-bit cell states that hold 16 bits, a last state that nothing writes.
UNDEFINED = {("venus", "LSTM"): 2, ("venus", "GRU"): 1}
CASES = sorted(p.parent.relative_to(GOLDEN) for p in GOLDEN.glob("*/*/model.onnx"))


def without_input_quant(model: onnx.ModelProto) -> onnx.ModelProto:
    """The engine folds the Quant at a graph input: the input is the integer tensor."""
    names = {i.name for i in model.graph.input}
    folded = [n for n in model.graph.node if n.op_type == "Quant" and n.input[0] in names]
    renamed = {n.output[0]: n.input[0] for n in folded}
    bits = {n.input[0]: next(a.i for a in n.attribute if a.name in ("data_bits", "x_bits")) for n in folded}
    for graph_input in model.graph.input:
        if graph_input.name in bits:
            graph_input.type.tensor_type.elem_type = INTEGERS[bits[graph_input.name]]
    for node in folded:
        model.graph.node.remove(node)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    return model


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_to_the_engine(case: Path) -> None:
    folder = GOLDEN / case
    meta = json.loads((folder / "meta.json").read_text())
    model = onnx.load(folder / "model.onnx")
    integers = [np.load(folder / f"in_{i}.npy") for i in range(len(meta["inputs"]))]
    if any(np.issubdtype(x.dtype, np.integer) for x in integers) and len(model.graph.node) > 1:
        model = without_input_quant(model)
    elif len(model.graph.node) == 1 and model.graph.node[0].op_type == "Quant":
        assert integers[0].dtype == np.float32
    loaded = runtime.Model(model)
    out = loaded(*integers)
    results = out if isinstance(out, tuple) else (out,)
    for i, found in enumerate(results):
        wanted = np.load(folder / f"out_{i}.npy")
        if any(platform == case.parts[0] and name in case.name and n == i for (platform, name), n in UNDEFINED.items()):
            continue
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        assert np.array_equal(found, wanted)


def test_every_platform_is_here() -> None:
    """The vectors are part of the project; none of them may vanish unnoticed."""
    per_platform = {name: sum(c.parts[0] == name for c in CASES) for name in ("venus", "arcs", "venusa")}
    assert per_platform == {"venus": 115, "arcs": 152, "venusa": 156}


def test_average_pooling_ties() -> None:
    """The direction of every exact tie, for all even window areas the engine was asked about."""
    from linger.ops.pool import ties_away

    rule = json.loads((GOLDEN / "avgpool_tie_rule.json").read_text())
    assert len(rule["half_away"]) + len(rule["half_toward_zero"]) == 120
    assert all(ties_away(area) for area in rule["half_away"])
    assert not any(ties_away(area) for area in rule["half_toward_zero"])


def test_known_names_cover_the_files() -> None:
    for case in CASES:
        for node in onnx.load(GOLDEN / case / "model.onnx").graph.node:
            ours = node.op_type.endswith("Int") or node.op_type.startswith(("iq", "Q"))
            assert not ours or node.op_type in BY_NAME
