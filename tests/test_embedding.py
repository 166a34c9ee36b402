"""Embedding: a table on its own grid, with every option of ``torch.nn.Embedding``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from test_interop import plain_export
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.numerics import grid_of
from linger.verify import LEVELS, session

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 3},
    "max-norm": {"max_norm": 1.5},
    "max-norm-1": {"max_norm": 4.0, "norm_type": 1.0},
    "by-frequency": {"scale_grad_by_freq": True},
    "sparse": {"sparse": True},
    "sparse-max-norm": {"sparse": True, "max_norm": 1.5},
}


class Tagger(nn.Module):
    """Words to scores: an embedding, a layer, and the table once more as a layer's operand."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6, **options)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.words(x))


class Looked(nn.Module):
    """The rows alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.words(x)


def made(cls: Any = Looked, bound: float | None = None, bits: int = 8, parameter_bits: int = 8, **options: Any) -> Any:
    net = cls(**options)
    if bound is not None:
        linger.normalize_layers(net, normalize_weight_value=bound, normalize_output_value=bound / 2)
    linger.init(net, parameter_bits=parameter_bits, data_bits=bits, out_bits=bits)
    return net


def table(weight: Tensor, bits: int = 8) -> np.ndarray:
    """The integers of a weight, written independently."""
    w = weight.detach().double().numpy()
    scale = 2.0 ** np.floor(np.log2((2 ** (bits - 1) - 1) / np.abs(w).max()))
    return np.floor(w * scale + 0.5) / scale


@pytest.mark.parametrize("dialect", ["thinker", "standard"])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equal_everywhere(options: dict[str, Any], kind: torch.dtype, dialect: str, tmp_path: Path) -> None:
    for bits, parameter_bits in ((8, 8), (8, 4), (16, 16), (16, 8)):
        net = made(Tagger, bits=bits, parameter_bits=parameter_bits, **options)
        x = torch.randint(0, 20, (3, 5), dtype=kind)
        net(x)
        net.eval()
        path = tmp_path / "net.onnx"
        linger.onnx.export(net, (x,), path, input_names=["x"], dynamic_axes={"x": {0: "n", 1: "t"}}, dialect=dialect)
        for shape in ((1, 1), (7, 3), (0, 4)):
            report = linger.verify(net, path, torch.randint(0, 20, shape, dtype=kind), quiet=True)
            assert report.equal, report
            assert set(LEVELS) <= set(report.differing)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_forward_is_the_table(options: dict[str, Any]) -> None:
    """Rows of the rounded weight, in training as in eval; with ``max_norm`` of the weight that torch's layer would have."""
    net = made(**options)
    x = torch.arange(20).view(4, 5)
    reference = nn.Embedding(20, 6, _weight=net.words.weight.detach().clone(), **options)
    with torch.no_grad():
        reference(x)
    trained = net(x)
    assert np.array_equal(trained.detach().double().numpy(), table(reference.weight)[x.numpy()])
    assert torch.equal(net.words.weight, reference.weight)
    with torch.no_grad():
        assert torch.equal(net.eval()(x), trained)
    grid = grid_of(net.words(x))
    assert grid is not None
    assert grid.bits == 8


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradient_is_that_of_the_float_layer(options: dict[str, Any]) -> None:
    net = made(**options)
    x = torch.tensor([[3, 1, 1], [0, 3, 1]])
    reference = nn.Embedding(20, 6, _weight=net.words.weight.detach().clone(), **options)
    g = torch.randn(2, 3, 6)
    net(x).backward(g)
    reference(x).backward(g)
    found, wanted = net.words.weight.grad, reference.weight.grad
    assert found.is_sparse == wanted.is_sparse
    assert torch.equal(found.to_dense(), wanted.to_dense())
    assert found.to_dense()[4:].abs().sum() == 0


def test_bounds() -> None:
    """The weight is clamped, pulled back outside, and rows beyond ``normalize_data`` get no gradient."""
    net = made(bound=1.0)
    with torch.no_grad():
        net.words.weight.copy_(torch.linspace(-1.5, 1.5, 120).view(20, 6))
    x = torch.arange(20)
    y = net(x)
    assert y.abs().max() <= 1
    y.sum().backward()
    w, g = net.words.weight, net.words.weight.grad
    assert torch.equal(g[w > 1], torch.full_like(g[w > 1], 0.01))
    assert torch.equal(g[w < -1], torch.full_like(g[w < -1], -0.01))
    assert torch.equal(g[w.abs() <= 0.49], torch.ones_like(g[w.abs() <= 0.49]))
    assert g[(w.abs() > 0.51) & (w.abs() < 1)].abs().sum() == 0


def test_normalized_stage() -> None:
    net = Looked(padding_idx=0)
    linger.normalize_layers(net, normalize_weight_value=0.5, normalize_output_value=0.25)
    assert type(net.words) is linger.NormalizeEmbedding
    assert repr(net.words) == "NormalizeEmbedding(20, 6, padding_idx=0,normalize_data:0.25,normalize_weight:0.5)"
    x = torch.tensor([0, 4])
    assert torch.equal(net(x), net.words.weight.detach()[x].clamp(-0.5, 0.5).clamp(-0.25, 0.25))


def test_keys() -> None:
    """Upstream's keys, and its checkpoint comes back."""
    net = made()
    net(torch.arange(4))
    keys = {k.removeprefix("words.") for k in net.state_dict()}
    assert keys == {"weight", "running_x", "running_w", "running_o", "scale_x", "scale_w", "scale_o"}
    state = net.state_dict()
    assert state["words.running_o"] == state["words.running_w"]
    assert state["words.scale_o"] == state["words.scale_w"] == grid_of(net.words(torch.arange(4))).scale  # type: ignore[union-attr]
    other = made()
    other.load_state_dict(state)
    assert torch.equal(other.eval()(torch.arange(20)), net.eval()(torch.arange(20)))


def test_no_batch_is_needed(tmp_path: Path) -> None:
    """The grid is the weight's: eval and export work at once."""
    net = made().eval()
    with torch.no_grad():
        y = net(torch.arange(3))
    assert np.array_equal(y.double().numpy(), table(net.words.weight)[:3])
    linger.onnx.export(net, (torch.arange(3),), tmp_path / "net.onnx")
    assert linger.verify(net, tmp_path / "net.onnx", torch.arange(3), quiet=True).equal


def test_shared_weight(tmp_path: Path) -> None:
    """A table that is also the output layer's weight stays one parameter."""
    net = Tagger()
    net.fc = nn.Linear(6, 20, bias=False)
    net.fc.weight = net.words.weight
    linger.init(net)
    assert net.fc.weight is net.words.weight
    x = torch.arange(6).view(2, 3)
    net(x)
    linger.onnx.export(net.eval(), (x,), tmp_path / "net.onnx")
    assert linger.verify(net, tmp_path / "net.onnx", x, quiet=True).equal


def test_qdq_and_plain_export(tmp_path: Path) -> None:
    net = made(Tagger)
    x = torch.arange(6).view(2, 3)
    net(x)
    with torch.no_grad():
        wanted = net.eval()(x).numpy()
    linger.onnx.export(net, (x,), tmp_path / "qdq.onnx", dialect="qdq", opset_version=21)
    found = session(onnx.load(tmp_path / "qdq.onnx"), "disable").run(None, {"x": x.numpy()})[0]
    assert np.abs(found - wanted).max() <= 2 / float(net.state_dict()["fc.scale_o"])
    plain_export(net, (x,), tmp_path / "plain.onnx")
    assert np.array_equal(linger.runtime.load(tmp_path / "plain.onnx")(x), wanted)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_compiled() -> None:
    torch._dynamo.reset()
    net = made(Tagger)
    x = torch.arange(6).view(2, 3)
    eager = net(x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    net.eval()
    with torch.no_grad():
        assert torch.equal(compiled(x), net(x))
    assert eager.shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.tensor([0, 20]), r"words: found index 20, allowed are 0 to 19; raise num_embeddings"),
        (torch.tensor([-1, 2]), r"words: found index -1, allowed are 0 to 19"),
        (torch.rand(3), r"words: found indices of type float32, allowed are int64 and int32; pass x.long\(\)"),
        (torch.tensor([True]), r"words: found indices of type bool"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_bad_indices(x: Tensor, said: str, training: bool) -> None:
    net = made().train(training)
    with pytest.raises(linger.LingerError, match=said):
        net(x)


def test_bad_index_in_a_file(tmp_path: Path) -> None:
    net = made().eval()
    linger.onnx.export(net, (torch.arange(3),), tmp_path / "net.onnx", input_names=["x"])
    model = linger.runtime.load(tmp_path / "net.onnx")
    for index in (-1, 20):
        with pytest.raises(linger.LingerError, match=rf"found index {index}, allowed are 0 to 19"):
            model(np.array([0, index, 1]))


# --- calls


class Called(nn.Module):
    """``F.embedding`` with a table that is a parameter, or computed from one."""

    def __init__(self, scaled: bool = False, **options: Any) -> None:
        super().__init__()
        self.table, self.fc = nn.Parameter(torch.randn(20, 6)), nn.Linear(6, 4)
        self.scaled, self.options = scaled, options

    def forward(self, x: Tensor) -> Tensor:
        table = self.table * 6**0.5 if self.scaled else self.table
        return self.fc(F.embedding(x, table, **self.options))


class Derived(nn.Embedding):
    """A subclass of the user's, whose forward makes the call."""


@pytest.mark.parametrize("parameter_bits", [4, 8, 16])
@pytest.mark.parametrize(
    "make",
    [Called, lambda: Called(padding_idx=3, scale_grad_by_freq=True), lambda: Called(scaled=True),
     lambda: nn.Sequential(Derived(20, 6, padding_idx=3), nn.Linear(6, 4))],
    ids=["parameter", "options", "computed", "subclass"],
)  # fmt: skip
def test_calls(make: Callable[[], nn.Module], parameter_bits: int, tmp_path: Path) -> None:
    net = make()
    reference = copy.deepcopy(net)
    linger.init(net, parameter_bits=parameter_bits, data_bits=8, out_bits=8)
    x = torch.randint(0, 20, (3, 7))
    net(x).square().sum().backward()
    reference(x).square().sum().backward()
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad.abs().sum(-1) == 0, q.grad.abs().sum(-1) == 0)
    net.eval()
    model = linger.onnx.export(net, (x,), tmp_path / "net.onnx", input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    assert [n.op_type for n in model.graph.node if n.op_type != "Requant"] == ["Gather", "LinearInt", "Dequant"]
    assert linger.verify(net, tmp_path / "net.onnx", torch.randint(0, 20, (5, 7)), quiet=True).equal
    with pytest.raises(linger.LingerError, match=r"iqembedding_0: found index 20, allowed are 0 to 19"):
        net(torch.tensor([[20]]))


def test_a_call_that_renorms_stays_in_float() -> None:
    net = linger.init(Called(max_norm=1.0))
    x = torch.randint(0, 20, (3, 7))
    net(x)
    assert not any("iqembedding" in key for key in net.state_dict())
    assert next(m for m in net.modules() if isinstance(m, linger.LinearInt)).running_x > 0
