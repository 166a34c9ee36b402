"""Every rule of rounding in its three texts, and every op on a chip that rounds to even."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from harness import choose_shifts, converted, tied_inputs
from hypothesis import assume, example, given
from hypothesis import strategies as st
from onnx import parser
from torch import Tensor, nn

import linger
from linger.errors import LingerError
from linger.numerics import fake_quant, quantize_array, shift_round
from linger.ops import HALF_UP_ONLY, MODULES, Case, IntModule
from linger.rounding import HALF_EVEN, HALF_UP, ROUNDINGS
from linger.verify import LEVELS, session

TOY = Path(__file__).parent / "toy.toml"
EXACT: dict[str, Callable[[Fraction], int]] = {  # the definitions, on rational numbers
    HALF_UP: lambda v: floor(v + Fraction(1, 2)),
    HALF_EVEN: lambda v: round(v),
}
rules = pytest.mark.parametrize("rule", ROUNDINGS)


# --- the rows


def test_every_row_has_its_definition() -> None:
    assert set(EXACT) == set(ROUNDINGS)
    ties = [Fraction(n, 2) for n in (-5, -3, -1, 1, 3, 5)]
    assert [EXACT[HALF_UP](v) for v in ties] == [-2, -1, 0, 1, 2, 3]
    assert [EXACT[HALF_EVEN](v) for v in ties] == [-2, -2, 0, 0, 2, 2]


@rules
@example(v=2**62, n=63, tie=False)
@example(v=2**61 + 1, n=63, tie=False)
@example(v=2**61 + 1, n=62, tie=False)
@given(v=st.integers(-(2**62), 2**62), n=st.integers(1, 70), tie=st.booleans())
def test_a_shift(rule: str, v: int, n: int, tie: bool) -> None:
    v = v >> min(n, 61) << min(n, 61) | 1 << (min(n, 61) - 1) if tie else v
    assume(abs(v) <= 2**62)
    assert shift_round(np.array([v, v]), n, rule).tolist() == [EXACT[rule](Fraction(v, 2**n))] * 2


@rules
@given(n=st.integers(-(2**40), 2**40), d=st.integers(1, 5000), tie=st.booleans())
def test_a_quotient(rule: str, n: int, d: int, tie: bool) -> None:
    n, d = (n * d + d // 2, d + d % 2) if tie else (n, d)
    want = EXACT[rule](Fraction(n, d))
    assert ROUNDINGS[rule].divided(n, d) == want
    assert ROUNDINGS[rule].divided(np.array([n]), d).tolist() == [want]
    assert ROUNDINGS[rule].quotient(torch.tensor([n], dtype=torch.float64), d).tolist() == [want]


@rules
@given(k=st.integers(-300, 300), exponent=st.integers(-20, 20))
def test_what_enters(rule: str, k: int, exponent: int) -> None:
    """Halves of every grid, in PyTorch and NumPy."""
    scale, x = 2.0**exponent, k / 2 / 2.0**exponent
    want = min(max(EXACT[rule](Fraction(k, 2)), -128), 127)
    assert fake_quant(torch.tensor([x]), torch.tensor(scale), 8, rounding=rule).tolist() == [want / scale]
    assert quantize_array(np.array([x], np.float32), scale, 8, rule).tolist() == [want]
    tie = Fraction(k, 2) - floor(Fraction(k, 2)) != 0
    assert ROUNDINGS[rule].settled(EXACT[HALF_UP](Fraction(k, 2)), tie) == EXACT[rule](Fraction(k, 2))


@rules
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["float", "double"])
def test_the_text_in_onnx_runtime(rule: str, level: str, kind: str) -> None:
    halves = np.arange(-601, 602).astype(np.float32 if kind == "float" else np.float64) / 2
    text = ROUNDINGS[rule].text("X", "Y", kind)
    model = parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 17]> g ({kind}[n] X) => ({kind}[n] Y) {{\n{text}}}'
    )
    want = [EXACT[rule](Fraction(float(v))) for v in halves]
    assert session(model, level).run(None, {"X": halves})[0].tolist() == want


# --- every op on a chip that rounds to even

REFUSED = {module for module in MODULES if any(op.half_up for op in module.OPS)}
ROUND = [module for module in MODULES if module not in REFUSED and getattr(module, "CASES", ())]
NOTHING_TO_ROUND = {  # sums of products on the operands' own grid, moves, and clamps
    "quant", "clamp", "elementary", "sign", "shuffle", "triangle", "unfold",
}  # fmt: skip


def name_of(module: Any) -> str:
    return str(module.__name__).rpartition(".")[2]


@pytest.fixture
def even(tmp_path: Path) -> str:
    """Like venus, with all of its widths."""
    (tmp_path / "even.toml").write_text('name = "even"\nlike = "venus"\nrounding = "half_even"\n')
    return str(tmp_path / "even.toml")


def changed(net: nn.Module, x: tuple[Tensor, ...]) -> int:
    """Elements that would be others with ties rounded up."""
    with torch.no_grad():
        before = net(*x)
        for module in net.modules():
            if isinstance(module, IntModule):
                module.follow_chip("venus")
        return int((net(*x) != before).sum())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("module", ROUND, ids=name_of)
def test_every_op_is_equal_everywhere(module: Any, even: str, tmp_path: Path) -> None:
    """PyTorch eval == linger.runtime == ONNX Runtime on many ties, and they are not what half up gives."""
    other = 0
    for case in module.CASES:
        for bits in case.bits:
            net = converted(case, bits, target=even)
            j, densities = choose_shifts(net)
            x = tied_inputs(case, 9, 1, j, densities)
            linger.onnx.export(net, x, tmp_path / "case.onnx")
            report = linger.verify(net, tmp_path / "case.onnx", x, quiet=True)
            assert report.equal, f"{case.name}: {report}"
            other += changed(net, x)
    assert (other > 0) is (name_of(module) not in NOTHING_TO_ROUND)


@pytest.mark.parametrize(
    "case", [case for m in MODULES if m in REFUSED for case in getattr(m, "CASES", ())], ids=lambda c: c.name
)
def test_an_op_that_rounds_half_up_is_refused(case: Case, even: str) -> None:
    with pytest.raises(LingerError, match=r"rounds half up, allowed (half_even|on even is half_even)"):
        converted(case, target=even)


class Mixed(nn.Module):
    """Two layers that round half up only, and a third op that does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.lstm, self.fc = nn.LayerNorm(6), nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(self.norm(x))[0]).softmax(-1)


def test_init_refuses_all_such_layers_at_once_whatever_the_limits() -> None:
    for limits in (True, False):
        with pytest.raises(LingerError, match=r"norm \(rounds half up.*lstm \(rounds half up") as error:
            linger.init(Mixed(), target=TOY, limits=limits)
        assert "fc" not in str(error.value)


def test_check_lists_them_with_a_way_out() -> None:
    report = linger.check(Mixed(), torch.randn(1, 5, 6), target=TOY, quiet=True)
    rows = {v.layer: (v.kind, v.found, v.allowed, v.way) for v in report.violations if v.allowed.startswith("rounding")}
    kind, found, allowed, way = rows["norm"]
    assert (kind, found, allowed) == ("error", "LayerNorm, which rounds half up", "rounding half_even")
    assert way == "compute it outside of the chip: linger.disable_quant(net.norm)"
    assert {"norm", "lstm"} <= set(rows)
    assert "fc" not in rows


def test_reference_and_body_take_the_rule_together() -> None:
    """And an op that rounds half up, whatever the target says, takes none."""
    takes = {
        (module, op.name): ["rounding" in inspect.signature(f).parameters for f in (op.run, op.body)]
        for module in MODULES for op in module.OPS
    }  # fmt: skip
    assert [key for key, (run, body) in takes.items() if run != body] == []
    assert [op.name for m in MODULES for op in m.OPS if op.half_up and any(takes[m, op.name])] == []


def test_every_op_that_rounds_half_up_has_a_twin_that_is_refused() -> None:
    refused = {op.integer for m in MODULES for op in m.OPS if op.half_up}
    assert refused == HALF_UP_ONLY
    assert {"LSTMInt", "SoftmaxSite", "LayerNormInt", "DivSite"} <= {cls.__name__ for cls in refused if cls}


# --- files


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(x) + x)


@pytest.fixture
def exported(tmp_path: Path, even: str) -> tuple[nn.Module, Path, Tensor]:
    net, x = linger.init(Small(), target=even), torch.randint(-255, 256, (400, 8)) / 2**6
    net(x)
    net.eval()
    linger.onnx.export(net, (x,), tmp_path / "net.onnx")
    return net, tmp_path / "net.onnx", x


def test_a_file_says_how_it_rounds(exported: tuple[nn.Module, Path, Tensor]) -> None:
    """Every node with a scale does, so that the file means the same where the target's file is missing."""
    nodes = [n for n in onnx.load(exported[1]).graph.node if any(a.name.startswith("scale_") for a in n.attribute)]
    said = [{a.name: a.s.decode() for a in n.attribute if a.name in ("platform", "rounding")} for n in nodes]
    assert said == [{"platform": "venus", "rounding": "half_even"}] * len(nodes)
    assert [n.op_type for n in nodes] == ["Quant", "LinearInt", "iqAdd", "Requant", "iqSigmoid", "Dequant"]
    plain = linger.init(Small())
    plain(exported[2])
    proto = linger.onnx.export(plain.eval(), (exported[2],), exported[1].with_name("venus.onnx"))
    assert not [a for n in proto.graph.node for a in n.attribute if a.name == "rounding"]


def test_a_file_for_another_rounding_is_refused(exported: tuple[nn.Module, Path, Tensor], tmp_path: Path) -> None:
    net, _, x = exported
    with pytest.raises(LingerError, match=r"fc: found a net that follows even exported for venus.* another rounding"):
        linger.onnx.export(net, (x,), tmp_path / "other.onnx", target="venus")


def test_retarget_shows_what_rounding_changes(exported: tuple[nn.Module, Path, Tensor], even: str) -> None:
    net, path, x = exported
    for what in (net, path):
        changes = linger.retarget(what, even, "venus", x, quiet=True)
        assert changes.tensors
        assert [c.tensor for c in changes.tensors][:2] == ["x.quant", "fc"]
        assert [c.most for c in changes.tensors][:1] == [1.0]
        assert "another rounding, half_up for half_even" in {c.why for c in changes.tensors}
        assert linger.retarget(what, even, even, x, quiet=True).equal


@pytest.mark.parametrize(
    ("op", "found", "words"),
    [("LinearInt", "nearest", "allowed are half_up, half_even"), ("SoftmaxInt", "half_even", "allowed are half_up;")],
)
def test_a_rounding_that_the_runtime_does_not_know(
    exported: tuple[nn.Module, Path, Tensor], op: str, found: str, words: str
) -> None:
    proto = onnx.load(exported[1])
    node = next(n for n in proto.graph.node if n.op_type == "LinearInt")
    node.op_type = op
    next(a for a in node.attribute if a.name == "rounding").s = found.encode()
    with pytest.raises(LingerError, match=f"rounding is '{found}', {words}"):
        linger.runtime.from_proto(proto)
