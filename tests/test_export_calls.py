"""How nets are called and what they return; every opset and dialect; what an export leaves behind."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from test_spellings import tensors
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.numerics import grid_of
from linger.onnx.export import OPSETS
from linger.verify import LEVELS, session

Two = namedtuple("Two", "first second")


class Called(nn.Module):
    """Two convolutions and a function of them and of the inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def image(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 6, 6)


def ready(net: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    net = linger.init(net)
    net(*args, **kwargs)
    return net.eval()


RESULTS: dict[str, tuple[Callable[..., Any], int]] = {
    "dict, list and tuple": (lambda m, x: {"b": m.a(x), "a": [m.b(x), (m.a(x) + 1, {"z": m.b(x)})]}, 4),
    "named tuple": (lambda m, x: Two(m.a(x), m.b(x)), 2),
    "with None and numbers": (lambda m, x: (m.a(x), None, 3, "text"), 1),
    "one tensor four times": (lambda m, x: (lambda y: (y, y, y.view(-1), y[:, :2]))(m.a(x)), 4),
    "the input": (lambda m, x: (x, m.a(x), x), 3),
    "a constant": (lambda m, x: (m.a(x), torch.ones(3), m.a.weight), 3),
    "an index": (lambda m, x: (lambda y: (y, y.argmax(1), y > 0))(m.a(x)), 3),
}


@pytest.mark.filterwarnings("ignore:export. in float")
@pytest.mark.parametrize("name", RESULTS)
def test_results(name: str, tmp_path: Path) -> None:
    function, count = RESULTS[name]
    net = ready(Called(function), image())
    model = linger.onnx.export(net, image(), tmp_path / "net.onnx", input_names=["x"], dynamic_axes={"x": {0: "n"}})
    assert len(model.graph.output) == count
    x = image(5)
    with torch.no_grad():
        expected = tensors(net(x))
    found = session(model, "all").run(None, {"x": x.numpy()})
    assert [v.dtype for v in found] == [t.detach().numpy().dtype for t in expected]
    report = linger.verify(net, tmp_path / "net.onnx", x, quiet=True)
    assert report.equal, str(report)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Any, pair: Any = None, *rest: Any, scale: Any = None, flag: bool = True) -> Tensor:
        given = [v for v in tensors((x, pair, rest)) if v.dim() == 4]
        y = self.conv(given[0])
        for v in given[1:]:
            y = y + self.conv(v)
        return y * scale if scale is not None and flag else y


SCALE = torch.tensor(2.0)
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], list[str]]] = {
    "one": ((image(),), {}, ["x"]),
    "a tuple": ((image(), (image(), image())), {}, ["x", "pair_0", "pair_1"]),
    "a list": (([image(), image()],), {}, ["x_0", "x_1"]),
    "a named tuple": ((Two(image(), image()),), {}, ["x_0", "x_1"]),
    "a dict of its own": (({"u": image(), "v": [image()]},), {}, ["x_0", "x_1"]),
    "None between": ((image(), None, image()), {}, ["x", "rest_0"]),
    "any number": ((image(), image(), image(), image()), {}, ["x", "pair", "rest_0", "rest_1"]),
    "keywords": ((image(),), {"scale": SCALE, "flag": True}, ["x", "scale"]),
    "keywords only": ((), {"pair": (image(), image()), "x": image()}, ["pair_0", "pair_1", "x"]),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str, tmp_path: Path) -> None:
    args, kwargs, names = CALLS[name]
    net = ready(Named(), *args, **kwargs)
    model = linger.onnx.export(net, args, tmp_path / "net.onnx", kwargs=kwargs)
    assert [i.name for i in model.graph.input] == names
    args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t * 0.9, (args, kwargs))
    assert linger.verify(net, tmp_path / "net.onnx", args, kwargs=kwargs, quiet=True).equal


def test_a_dict_at_the_end_holds_keywords(tmp_path: Path) -> None:
    """As in torch.onnx.export, where forward has parameters of these names."""
    net = ready(Named(), image(), scale=SCALE)
    model = linger.onnx.export(net, (image(), {"scale": SCALE}), tmp_path / "net.onnx")
    assert [i.name for i in model.graph.input] == ["x", "scale"]


LONE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 6, 6)), "linear": (lambda: nn.Linear(6, 4), (2, 6)),
    "bn": (lambda: nn.BatchNorm2d(3), (2, 3, 6, 6)), "relu6": (nn.ReLU6, (2, 3, 6, 6)),
    "pool": (lambda: nn.AvgPool2d(2), (2, 3, 6, 6)), "reflecting conv": (lambda: nn.Conv1d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", LONE)
def test_a_lone_layer_is_a_net(name: str, tmp_path: Path) -> None:
    """Its initializers have the names of its state dict, its node that of its type."""
    make, shape = LONE[name]
    net = ready(make(), torch.randn(shape))
    model = linger.onnx.export(
        net, torch.randn(shape), tmp_path / "net.onnx", input_names=["x"], dynamic_axes={"x": {0: "n"}}
    )
    assert linger.verify(net, tmp_path / "net.onnx", torch.randn(5, *shape[1:]), quiet=True).equal
    assert type(net).__name__ in {node.name for node in model.graph.node}
    assert {"weight", "bias"} & set(net.state_dict()) <= {i.name for i in model.graph.initializer}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_nets_of_other_floats(dtype: torch.dtype, tmp_path: Path) -> None:
    net = ready(Named().to(dtype), image().to(dtype))
    linger.onnx.export(net, image().to(dtype), tmp_path / "net.onnx")
    assert linger.verify(net, tmp_path / "net.onnx", image().to(dtype), quiet=True).equal


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)) + x * 0.5


class Outer(nn.Module):
    """Calls a part twice, another of its methods, and has a layer around."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.conv = Inner(), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.inner(self.conv(x)))
        return y + self.conv(self.inner(y))


@pytest.mark.parametrize("parts_first", [False, True])
def test_a_converted_net_inside_another(parts_first: bool, tmp_path: Path) -> None:
    net = Outer()
    if parts_first:
        linger.init(net.inner)
    net = ready(net, image())
    linger.onnx.export(net, image(), tmp_path / "net.onnx")
    assert linger.verify(net, tmp_path / "net.onnx", image(), quiet=True).equal
    kinds = [n.op_type for n in onnx.load(tmp_path / "net.onnx").graph.node]
    assert kinds.count("Conv2dInt") == 5
    assert "Dequant" not in kinds[:-1]


# --- opsets and dialects


class Everything(nn.Module):
    """Layers, sites and moves whose nodes differ between opsets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(8), nn.ReLU())
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(F.max_pool2d(self.conv(x), 3, 2, 1, ceil_mode=True))
        up = self.up(y)[:, :, :6, :6].unsqueeze(1).squeeze(1)
        halves = torch.stack(up.split(2, 1), 1).mean(1)
        y = F.relu6(y + F.pad(y[..., 1:], (1, 0, 0, 0), mode="replicate")) / 3 - y.sum(1, keepdim=True) * 0.1
        return self.fc(F.adaptive_avg_pool2d(y, 1).flatten(1)), torch.cat([halves, x], 1).permute(0, 2, 3, 1)


@pytest.fixture(scope="module", params=[(8, 8), (16, 16), (32, 8)], ids=str)
def everything(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    net = Everything()
    linger.trace_layers(net, net, image())
    linger.init(net, data_bits=request.param[0], parameter_bits=request.param[1], out_bits=request.param[0])
    for _ in range(2):
        net(image(4))
    return net.eval()


@pytest.mark.parametrize("dialect", ["thinker", "standard"])
@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset(everything: nn.Module, opset: int, dialect: str, tmp_path: Path) -> None:
    """Equal everywhere, the same bytes twice, and the net is left as it was."""
    before = {k: v.clone() for k, v in everything.state_dict().items()}
    modes = [m.training for m in everything.modules()]
    path = tmp_path / "net.onnx"
    options: dict[str, Any] = {"opset_version": opset, "dialect": dialect, "dynamic_axes": {"x": {0: "batch"}}}
    linger.onnx.export(everything, image(), path, **options)
    written = path.read_bytes()
    linger.onnx.export(everything, image(3), path, **options)
    assert path.read_bytes() == written
    after = everything.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in after.items())
    assert [m.training for m in everything.modules()] == modes
    for size in (1, 5):
        report = linger.verify(everything, path, image(size), quiet=True)
        assert report.equal, str(report)
        assert set(LEVELS) <= set(report.differing)


@pytest.mark.parametrize("opset", [OPSETS[0], 17, 21, OPSETS[-1]])
def test_qdq(everything: nn.Module, opset: int) -> None:
    """Not exact on ties, so near: 16 bits need opset 21, and 32 bits stay in float."""
    bits = everything.fc.data_bits
    if bits == 16 and opset < 21:
        with pytest.raises(linger.LingerError, match="found 16-bit values, allowed in dialect 'qdq' at opset"):
            linger.onnx.export(everything, image(), opset_version=opset, dialect="qdq")
        return
    x = image()
    model = linger.onnx.export(everything, x, opset_version=opset, dialect="qdq")
    with torch.no_grad():
        expected = everything(x)
    for level in LEVELS:
        for found, wanted in zip(session(model, level).run(None, {"x": x.numpy()}), expected, strict=True):
            grid = grid_of(wanted)
            assert grid is not None
            away = np.abs(found - wanted.numpy())
            near = 4 / float(grid.scale) if bits < 32 else 1e-3 * float(wanted.abs().max())
            assert away.max() <= near


def test_qdq_of_a_net_that_returns_integers() -> None:
    net = linger.init(nn.Sequential(nn.Linear(4, 3)))
    net.forward = lambda x: nn.Sequential.forward(net, x).argmax(-1)  # type: ignore[method-assign]
    x = torch.randn(5, 4)
    net(x)
    model = linger.onnx.export(net.eval(), (x,), dialect="qdq")
    assert session(model, "all").run(None, {model.graph.input[0].name: x.numpy()})[0].dtype == np.int64
