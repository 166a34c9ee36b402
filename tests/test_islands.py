"""What has no fixed-point form is computed in float, in training and in the file, and is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from islands import ISLANDS
from spellings import MAP
from test_spellings import Spelled, batch, tensors
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.onnx.export import OPSETS
from linger.verify import LEVELS, session

ROWS = {f"{op}-{i}" if i else op: (op, row) for op, rows in ISLANDS.items() for i, row in enumerate(rows)}
ROUNDED = 2e-5  # exp, tanh and sums of other libraries differ in the last digits
NEWEST = OPSETS[-1]


class Called(nn.Module):
    """A module of the user's whose forward is one call."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def in_float(function: Any) -> nn.Module:
    """The call in a converted net, inside a module that is kept in float: what has a fixed-point form has none there."""
    held = Called(function)
    linger.disable_quant(held)
    return linger.init(Spelled(held))


# Truth values, and values that are picked, lose nothing: they are not named.
EXACT = {
    "gt", "ge", "lt", "le", "eq", "ne", "logical_and", "isfinite", "any", "all", "amax", "amin", "max", "min", "argmax",
    "argmin", "topk", "sort", "adaptive_max_pool2d",
}  # fmt: skip


def written(net: nn.Module, inputs: tuple[Tensor, ...], op: str, **options: Any) -> onnx.ModelProto:
    """The exported file; the warning names the op, and there is none where nothing is lost."""
    names = [f"x{i}" for i in range(len(inputs))]
    axes = {n: {0: "batch"} for n in names}
    if op in EXACT:
        return linger.onnx.export(net, inputs, None, input_names=names, dynamic_axes=axes, **options)
    with pytest.warns(linger.LingerWarning, match=rf"export: in float: .*\({op}\)"):
        return linger.onnx.export(net, inputs, None, input_names=names, dynamic_axes=axes, **options)


def near(found: np.ndarray, expected: Tensor) -> bool:
    wanted = expected.numpy()
    return found.dtype == wanted.dtype and bool(np.allclose(found, wanted, ROUNDED, ROUNDED / 4, equal_nan=True))


@pytest.mark.parametrize("opset", [OPSETS[0], 17, NEWEST])
@pytest.mark.parametrize("name", ROWS)
def test_is_computed_in_float_everywhere(name: str, opset: int) -> None:
    op, (function, shapes) = ROWS[name]
    net = in_float(function)
    inputs = batch(shapes, 3)
    net(*inputs)
    model = written(net.eval(), inputs, op, opset_version=opset)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    run = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run
    for size in (1, 5):
        x = batch(shapes, size)
        with torch.no_grad():
            expected = tensors(net(*x))
        feed = {f"x{i}": t.numpy() for i, t in enumerate(x)}
        inside = linger.runtime.from_proto(model)(feed)
        for got in (run(None, feed), inside if isinstance(inside, tuple) else (inside,)):
            assert all(near(a, b) for a, b in zip(got, expected, strict=True))


def test_stands_between_dequant_and_quant(tmp_path: Path) -> None:
    """The integers before it are exact, and the float result enters fixed point again."""
    layers = (nn.Conv2d(4, 4, 1), nn.Hardshrink(0.25), nn.Conv2d(4, 2, 1))
    net = nn.Sequential(*layers)
    with pytest.warns(linger.LingerWarning, match=r"init: left in float: 1 \(Hardshrink has no fixed-point form\)"):
        linger.init(net)
    x = torch.randn(2, 4, 5, 5)
    net(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    with pytest.warns(linger.LingerWarning, match=r"in float: 1.hardshrink_0 \(hardshrink\)"):
        model = linger.onnx.export(net.eval(), x, tmp_path / "net.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert kinds[:3] == ["Quant", "Conv2dInt", "Dequant"]
    assert kinds[-3:] == ["Quant", "Conv2dInt", "Dequant"]
    assert kinds[3:-3]
    assert not any(node.domain for node in model.graph.node[3:-3])
    assert '"1.hardshrink_0 (hardshrink)"' in {p.key: p.value for p in model.metadata_props}["float_islands"]
    assert linger.verify(net, tmp_path / "net.onnx", torch.randn(2, 4, 5, 5), quiet=True).equal


def test_no_form_in_the_file() -> None:
    net = in_float(lambda x: torch.kthvalue(x, 2, 1)[0])
    x = torch.randn(2, 4)
    net(x)
    with pytest.raises(
        linger.LingerError, match=r"export: layer.kthvalue_0: found kthvalue at test_islands.py:\d+, which has no form"
    ):
        linger.onnx.export(net.eval(), x)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda x: F.avg_pool2d(x, 3, 2, 1, True, True, 5), "avg_pool with divisor_override and ceil_mode"),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), "interpolate with mode 'bicubic'"),
        (lambda x: x.int() & 3, "and of integers"),
        (lambda x: x[x > 0], "found a mask as an index"),
        (lambda x: x[:, torch.tensor([0]), torch.tensor([1])], "found an index of several tensors"),
        (lambda x: x + torch.rand(8), "rand_0: found rand, random in eval"),
        (lambda x: F.dropout(x, 0.5), "dropout that is active in eval"),
        (lambda x: torch.cumsum(x, 1, out=torch.empty(0)), "cumsum with arguments that have no form"),
    ],
)  # fmt: skip
def test_what_a_form_does_not_cover(function: Callable[..., Any], match: str) -> None:
    net = in_float(function)
    x = torch.randn(2, 4, 6, 8)
    net(x)
    with pytest.raises(linger.LingerError, match=rf"^export: .*{re.escape(match)}"):
        linger.onnx.export(net.eval(), x)


# --- layers left in float


class Derived(nn.BatchNorm2d):
    """A subclass of the user's."""


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a subclass": (lambda: Derived(4), r"layer \(Derived, a subclass of BatchNorm2d\)"),
    "no statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), r"track_running_stats=False leaves no"),
    "uneven pool": (lambda: nn.AvgPool2d(3, ceil_mode=True), r"AvgPool2d, ceil_mode has no integer form"),
    "no twin": (lambda: nn.LocalResponseNorm(2), r"layer \(LocalResponseNorm has no fixed-point form\)"),
}


@pytest.mark.parametrize("name", LEFT)
def test_layers_left_in_float_are_named(name: str) -> None:
    make, match = LEFT[name]
    net = Spelled(make())
    with pytest.warns(linger.LingerWarning, match=match):
        linger.init(net)
    x = batch(MAP, 2)
    net(*x)
    with pytest.warns(linger.LingerWarning, match=r"in float: layer"):
        model = linger.onnx.export(net.eval(), x)
    with torch.no_grad():
        assert near(session(model, "all").run(None, {"inputs_0": x[0].numpy()})[0], net(*x))
    silent = Spelled(make())
    linger.disable_quant(silent.layer)
    linger.init(silent)


def test_a_pool_that_does_not_divide_says_what_to_do() -> None:
    net = linger.init(nn.Sequential(nn.AdaptiveAvgPool2d((4, 3))))
    with pytest.raises(linger.LingerError, match=r"0: output_size \(4, 3\) does not divide .* disable_quant"):
        net(torch.randn(2, 4, 6, 8))
    kept = nn.Sequential(nn.AdaptiveAvgPool2d((4, 3)))
    linger.disable_quant(kept)
    linger.init(kept)
    x = torch.randn(2, 4, 6, 8)
    with pytest.warns(linger.LingerWarning, match="adaptive_avg_pool2d"):
        model = linger.onnx.export(kept.eval(), x)
    assert near(session(model, "all").run(None, {"input": x.numpy()})[0], kept(x))


class Computed(nn.Module):
    """Constants computed from parameters and buffers, for which the file needs no node."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.mix = nn.Parameter(torch.randn(4))
        self.register_buffer("window", torch.hann_window(8))

    def forward(self, x: Tensor) -> Tensor:
        weights = F.softmax(self.mix.abs(), 0).view(1, 4, 1, 1)
        return self.conv(x) * weights + self.get_buffer("window").flip(0)


def test_constants_are_computed_at_export(tmp_path: Path) -> None:
    net = linger.init(Computed())
    x = torch.randn(2, 4, 6, 8)
    net(x)
    model = linger.onnx.export(net.eval(), x, tmp_path / "net.onnx", dynamic_axes={"x": {0: "batch"}})
    assert [n.op_type for n in model.graph.node] == [
        "Quant",
        "Conv2dInt",
        "Quant",
        "iqMul",
        "Quant",
        "iqAdd",
        "Dequant",
    ]
    assert linger.verify(net, tmp_path / "net.onnx", torch.randn(5, 4, 6, 8), quiet=True).equal


# --- sizes that change


class Sized(nn.Module):
    """A convolution over (batch, 4, time) and a function of its result and the input."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.conv(x), x)


SIZED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "n, c, t = shape": lambda y, x: (lambda n, c, t: y.view((n, c * t)))(*y.shape),
    "merge": lambda y, x: y.transpose(1, 2).reshape(y.shape[0] * y.shape[2], 6),
    "merge and back": lambda y, x: y.transpose(1, 2).reshape(-1, 6).view(y.shape[0], y.shape[2], 6),
    "slice to n - 1": lambda y, x: y[:, :, 1 : y.shape[2] - 1],
    "last": lambda y, x: y[:, :, y.shape[2] - 1],
    "position": lambda y, x: y + torch.linspace(-1, 1, 100)[: x.shape[2]],
    "narrow": lambda y, x: y + torch.linspace(-1, 1, 100).narrow(0, 0, x.shape[2]),
    "flip": lambda y, x: y.flip(2),
    "expand": lambda y, x: y.mean(1, keepdim=True).expand(-1, 6, x.shape[2]),
    "chunk": lambda y, x: y.chunk(2, 1),
    "pool": lambda y, x: F.max_pool1d(F.avg_pool1d(y, 2), 2),
    "sum": lambda y, x: y.sum(2),
    "pad": lambda y, x: F.pad(F.pad(y, (1, 2), mode="circular"), (1, 2)),
    "tile": lambda y, x: y.repeat(1, 2, 2),
}
SIZED_ISLANDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "zeros": lambda y, x: torch.cat([y, torch.zeros(x.shape[0], 1, x.shape[2])], 1),
    "full": lambda y, x: torch.cat([y, x.new_full((x.shape[0], 1, x.shape[2]), 0.5)], 1),
    "arange": lambda y, x: y + torch.arange(x.shape[2]),
    "mean": lambda y, x: y.sinh().sum(2) / x.shape[2],
    "assignment": lambda y, x: [y.clone().__setitem__((slice(None), 0), 1.0), y][1],
    "global pool": lambda y, x: F.adaptive_avg_pool1d(y.sinh(), 1),
    "upsample": lambda y, x: F.interpolate(y.sinh(), scale_factor=2),
}
UNSIZED: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "mean": (lambda y, x: y.mean(2), r"iqMean of the call at test_islands.py:\d+ changes with dynamic axis 'time'"),
    "number": (lambda y, x: y * x.shape[2], r"scale_y of the call at .* changes with dynamic axis 'time'"),
    "float": (lambda y, x: y.sinh() * (1.0 / x.shape[2]), r"mul_0: 0.083\d+ changes with a dynamic axis"),
    "half": (
        lambda y, x: y[:, :, : y.shape[2] // 2],
        r"a size of 6 changes with a dynamic axis but is no input's size",
    ),
    "split": (lambda y, x: y.split(3, 2), r"split_0: the forward makes different calls for different sizes"),
    "path": (
        lambda y, x: torch.stack([y[:, :, i] for i in range(x.shape[2])], 2),
        r"takes another path when a dynamic",
    ),
    "choice": (
        lambda y, x: (lambda a: a + (x if x.shape[2] > 12 else a)[:, :1])(y.sinh()),
        r"reads other tensors when a dynamic axis changes",
    ),
    "window": (
        lambda y, x: F.avg_pool1d(y.sinh(), x.shape[2]),
        r"an argument of avg_pool1d changes with a dynamic axis",
    ),
    "amount": (lambda y, x: F.pad(y, (0, 20 - x.shape[2])), r"the amount of padding changes with a dynamic axis"),
    "rank": (
        lambda y, x: y[:, :1, : 13 - x.shape[2] + 11].squeeze(2) if x.shape[2] == 24 else y[:, :1],
        "dynamic axis",
    ),
}


def sized(function: Callable[[Tensor, Tensor], Any]) -> tuple[nn.Module, dict[str, Any]]:
    net = linger.init(Sized(function))
    net(torch.randn(2, 4, 12))
    return net.eval(), {"dynamic_axes": {"x": {0: "batch", 2: "time"}}}


@pytest.mark.parametrize("name", SIZED)
def test_sizes_that_change(name: str, tmp_path: Path) -> None:
    net, axes = sized(SIZED[name])
    linger.onnx.export(net, torch.randn(2, 4, 12), tmp_path / "net.onnx", **axes)
    for n, t in ((1, 9), (5, 20)):
        report = linger.verify(net, tmp_path / "net.onnx", torch.randn(n, 4, t), quiet=True)
        assert report.equal, str(report)


@pytest.mark.parametrize("name", SIZED_ISLANDS)
def test_sizes_that_change_in_float(name: str) -> None:
    net, axes = sized(SIZED_ISLANDS[name])
    if name == "assignment":
        net.train()(torch.randn(2, 4, 12))
        net.eval()
    with pytest.warns(linger.LingerWarning, match="in float"):
        model = linger.onnx.export(net, torch.randn(2, 4, 12), **axes)
    for n, t in ((1, 9), (5, 20)):
        x = torch.randn(n, 4, t)
        with torch.no_grad():
            expected = net(x)
        for level in LEVELS:
            assert near(session(model, level).run(None, {"x": x.numpy()})[0], expected)


@pytest.mark.parametrize("name", UNSIZED)
def test_sizes_that_may_not_change(name: str) -> None:
    function, match = UNSIZED[name]
    net, axes = sized(function)
    with pytest.raises(linger.LingerError, match=match):
        linger.onnx.export(net, torch.randn(2, 4, 12), **axes)


# --- what is out of sight


def _with_hook(net: nn.Module, register: str, hook: Callable[..., Any]) -> nn.Module:
    getattr(net.get_submodule("layer.1"), register)(hook)
    return net


@pytest.mark.parametrize(
    ("register", "hook", "match"),
    [
        (
            "register_forward_pre_hook",
            lambda m, args: (args[0] * 2,),
            r"layer.1: .*a tensor of shape .* cannot be seen",
        ),
        (
            "register_forward_hook",
            lambda m, args, out: out * 2,
            r"layer.1: found a result without a grid, so a forward hook",
        ),
    ],
)
def test_hooks_that_change_tensors(register: str, hook: Callable[..., Any], match: str) -> None:
    """They work in training, and are refused at export instead of becoming constants."""
    net = linger.init(Spelled(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))))
    _with_hook(net, register, hook)
    x = torch.randn(2, 4, 6, 8)
    net(x).sum().backward()
    net.eval()(x)
    with pytest.raises(linger.LingerError, match=match):
        linger.onnx.export(net, x)


def test_hooks_that_look(tmp_path: Path) -> None:
    seen: list[torch.Size] = []
    net = linger.init(Spelled(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))))
    _with_hook(net, "register_forward_hook", lambda m, args, out: seen.append(out.shape))
    x = torch.randn(2, 4, 6, 8)
    net(x)
    linger.onnx.export(net.eval(), x, tmp_path / "net.onnx")
    assert linger.verify(net, tmp_path / "net.onnx", torch.randn(2, 4, 6, 8), quiet=True).equal
    assert set(seen) == {torch.Size([2, 4, 6, 8])}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [x.view(-1), x.mul_(2), x][0] + 1,
        lambda x: [x.clone(), x[:, :1].add_(1), x][2] * 2,
    ],
    ids=["a view of what is overwritten", "what is overwritten through a view"],
)  # fmt: skip
def test_another_name_of_an_overwritten_tensor(function: Callable[[Tensor], Any]) -> None:
    """Correct in training, with gradients off and in inference mode; an error at export, never a wrong file."""
    net = in_float(lambda x: function(x * 1.0))
    x = torch.randn(2, 4, 6)
    net(x)
    net.eval()
    with torch.no_grad():
        expected = net(x)
    with torch.inference_mode():
        assert torch.equal(net(x), expected)
    with pytest.raises(linger.LingerError, match=r"a tensor is read after it was changed in place .* clone\(\)"):
        linger.onnx.export(net, x)
