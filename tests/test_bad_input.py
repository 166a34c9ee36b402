"""What a user may get wrong: every row is a LingerError that says what was found and what to do, and nothing has changed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.onnx.export import OPSETS


class Net(nn.Module):
    """A pair to fuse, a layer, a sum and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(144, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        return self.fc((y * y + y).flatten(1))


def batch(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 8, 8)


def traced(net: nn.Module) -> nn.Module:
    return linger.trace_layers(net, net, batch())


def fixed(net: nn.Module | None = None, **options: Any) -> nn.Module:
    """Converted, after one batch."""
    net = linger.init(traced(net or Net()), **options)
    net(batch())
    return net


def described(net: nn.Module) -> tuple[Any, ...]:
    """All that a conversion could change: the tree, which objects, their values, and what the net computes."""
    net.eval()
    with torch.no_grad():
        out = net(batch())
    parameters = {name: (id(p), p.detach().clone().flatten().tolist()) for name, p in net.named_parameters()}
    return repr(net), [(n, id(m), type(m)) for n, m in net.named_modules()], parameters, out.tolist()


# --- conversion

BITS = [
    (key, bits) for key in ("data_bits", "parameter_bits", "out_bits") for bits in (0, 3, 12, 64, True, 8.0, "8", None)
]
CONVERSIONS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    **{
        f"init {key}={bits!r}": (
            lambda net, key=key, bits=bits: linger.init(net, **{key: bits}), rf"^init: {key} is {bits!r}, allowed are .*; choose one",
        ) for key, bits in BITS
    },
    "init a type without a twin": (lambda net: linger.init(net, quant_modules=nn.Bilinear), r"^init: found Bilinear, allowed are .*Conv2d"),
    "init a string": (lambda net: linger.init(net, quant_modules="conv"), r"^init: found 'conv', allowed are"),
    "init a layer for a type": (lambda net: linger.init(net, quant_modules=net.conv), r"^init: found Conv2d\(3, 4.*allowed are"),
    "init a mode": (lambda net: linger.init(net, mode="max"), r"^init: mode is 'max', allowed is QuantMode.QValue"),
    "init a target": (lambda net: linger.init(net, target="pluto"), r"^init: target is 'pluto', allowed are venus, arcs, venusa, mars"),
    "init a target's widths": (lambda net: linger.init(net, target="arcs", data_bits=16), r"^init: data_bits is 16, arcs allows 8, 32"),
    "init, one layer without statistics": (
        lambda net: [traced(net), setattr(net.conv.bn, "running_var", None), linger.init(net)][2],
        r"^init: conv: found a batch normalization without running statistics.*fuse_bn=False",
    ),
    "init a class": (lambda net: linger.init(nn.Conv2d), r"^init: found the class Conv2d, allowed are instances of torch.nn.Module"),
    "init nothing": (lambda net: linger.init(None), r"^init: found an object of type NoneType, allowed are instances"),
    "quant_module bits": (lambda net: linger.quant_module(net, data_bits=3), r"^quant_module: data_bits is 3, allowed are 8, 16, 32"),
    "quant_module type": (lambda net: linger.quant_module(net, nn.ReLU), r"^quant_module: found ReLU, allowed are"),
    "quant_module mode": (lambda net: linger.quant_module(net, mode=None), r"^quant_module: mode is None, allowed is"),
    "quant_tensor bits": (lambda net: linger.quant_tensor(net, batch(), bits=4), r"^quant_tensor: data_bits is 4, allowed are 8, 16, 32"),
    "quant_tensor number": (lambda net: linger.quant_tensor(net, 1.0, "x"), r"^quant_tensor: found float .*allowed are a tensor"),
    "quant_tensor name": (lambda net: linger.quant_tensor(net, batch(), "a.b"), r"^quant_tensor: .*'a.b', allowed are .* without dots"),
    "normalize 0": (lambda net: linger.normalize_layers(net, normalize_weight_value=0), r"^normalize_layers: normalize_weight is 0, allowed"),
    "normalize text": (lambda net: linger.normalize_layers(net, normalize_output_value="8"), r"^normalize_layers: normalize_data is '8', all"),
    "normalize inf": (lambda net: linger.normalize_layers(net, normalize_bias_value=float("inf")), r"normalize_bias is inf, allowed are"),
    "normalize type": (lambda net: linger.normalize_layers(net, normalize_modules=(nn.ReLU,)), r"^normalize_layers: found ReLU, allowed"),
    "normalize_module": (lambda net: linger.normalize_module(net, normalize_weight_value=-1), r"^normalize_module: normalize_weight is -1"),
    "disable_quant": (lambda net: linger.disable_quant("conv"), r"^disable_quant: found an object of type str, allowed are instances"),
    "trace another net": (lambda net: linger.trace_layers(net, Net(), batch()), r"^trace_layers: target_model is not part of root_model"),
    "trace nothing": (lambda net: linger.trace_layers(None, net, batch()), r"^trace_layers: found an object of type NoneType"),
    "trace a wrong shape": (
        lambda net: linger.trace_layers(net, net, torch.randn(1, 5, 8, 8)),
        r"^trace_layers: the forward of Net does not run on inputs of shape \[\(1, 5, 8, 8\)\]: RuntimeError: .*5 channels instead; pass",
    ),
    "trace without input": (lambda net: linger.trace_layers(net, net), r"^trace_layers: .* of shape \[\]: TypeError: .* missing 1 required"),
    "trace too many": (lambda net: linger.trace_layers(net, net, batch(), batch()), r"TypeError: .* takes 2 positional arguments"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversion(name: str) -> None:
    """All or nothing: after the error the net is what it was."""
    convert, match = CONVERSIONS[name]
    net = Net()
    torch.manual_seed(1)
    before = described(net)
    with pytest.raises(linger.LingerError, match=match):
        convert(net)
    if "without statistics" not in name:
        torch.manual_seed(1)
        assert described(net) == before
        fixed(net.train())


class Fails(nn.Module):
    """A forward that raises what is not a RuntimeError."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    "error", [KeyError("k"), AssertionError(), AttributeError("no foo"), ZeroDivisionError("by 0")], ids=repr
)
def test_tracing_a_forward_that_raises(error: Exception) -> None:
    net = Fails(error)
    with pytest.raises(
        linger.LingerError, match=rf"does not run on inputs of shape \[\(2, 3, 8, 8\)\]: {type(error).__name__}"
    ) as caught:
        linger.trace_layers(net, net, batch())
    assert caught.value.__cause__ is not None
    assert net.training


ORDERS: dict[str, tuple[Callable[[], Any], str]] = {
    "init twice": (lambda: linger.init(fixed()), r"^init: found Net converted before; call init once"),
    "init twice with other bits": (lambda: linger.init(fixed(), data_bits=16), r"^init: conv: found .*'data_bits': 8.* asked for .*16"),
    "init a part again": (lambda: linger.init(fixed(nn.Sequential(Net()))[0]), r"^init: found Net converted as a part of a larger net"),
    "trace twice": (lambda: traced(traced(Net())), r"^trace_layers: conv: found NormalizeConvBN2d, allowed is a float net"),
    "trace a normalized net": (lambda: traced(linger.normalize_layers(Net())), r"^trace_layers: conv: found NormalizeConv2d, allowed is"),
    "trace a converted net": (lambda: traced(fixed()), r"^trace_layers: conv: found Conv2dInt, allowed is a float net"),
    "normalize twice": (lambda: linger.normalize_layers(linger.normalize_layers(Net())), r"^normalize_layers: conv: found NormalizeConv2d"),
    "normalize a fused pair twice": (
        lambda: linger.normalize_layers(linger.normalize_layers(traced(Net()), normalize_modules=nn.Linear), normalize_modules=nn.Conv2d),
        r"^normalize_layers: conv: found bounds, allowed is a layer without",
    ),
    "normalize a converted net": (lambda: linger.normalize_layers(fixed()), r"^normalize_layers: conv: found Conv2dInt, allowed are float"),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_calls(name: str) -> None:
    call, match = ORDERS[name]
    with pytest.raises(linger.LingerError, match=match):
        call()


def test_more_types_in_a_second_call() -> None:
    net = linger.init(Net(), quant_modules=nn.Conv2d)
    assert type(linger.init(net, quant_modules=nn.Linear).fc) is linger.LinearInt


class Gridded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(linger.quant_tensor(self, x, "x"))


def test_quant_tensor_before_normalizing() -> None:
    """Tracing makes its child, which is no converted layer."""
    net = linger.normalize_layers(traced(Gridded()))
    linger.init(net)(batch())


@pytest.mark.parametrize("error", [KeyError("k"), TypeError("t"), RuntimeError("r")], ids=repr)
def test_a_net_changed_after_tracing(error: Exception) -> None:
    """Its functional calls get their state at the first forward; the conversion is complete all the same."""
    net = traced(Net())
    net.relu = Fails(error)
    net.forward = lambda x: net.relu(x)  # type: ignore[method-assign]
    linger.init(net)
    del net.__dict__["forward"]
    assert type(net.conv) is linger.Conv2dInt
    assert type(net.fc) is linger.LinearInt


@pytest.mark.parametrize("convert", [lambda net: linger.init(traced(net)), linger.init], ids=["traced", "not traced"])
def test_conversion_in_inference_mode(convert: Callable[[nn.Module], nn.Module]) -> None:
    net = Net()
    with torch.inference_mode():
        convert(net)
        net(batch())
    net(batch()).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


# --- export


@dataclasses.dataclass
class Hidden:
    """A tensor where nobody looks for one."""

    tensor: Tensor


class Opened(nn.Module):
    def __init__(self, wrap: bool) -> None:
        super().__init__()
        self.conv, self.wrap = nn.Conv2d(3, 4, 3), wrap

    def forward(self, x: Any) -> Any:
        y = self.conv(x.tensor if isinstance(x, Hidden) else x)
        return Hidden(y) if self.wrap else y


EXPORTS: dict[str, tuple[dict[str, Any], str]] = {
    "opset 11": ({"opset_version": OPSETS[0] - 1}, rf"opset_version is 11, allowed are 12 to {OPSETS[-1]}"),
    "opset 99": ({"opset_version": 99}, r"opset_version is 99, allowed are 12 to"),
    "opset text": ({"opset_version": "17"}, r"opset_version is '17', allowed are 12 to"),
    "dialect": ({"dialect": "chip"}, r"dialect is 'chip', allowed are thinker, standard, qdq"),
    "target": ({"target": "pluto"}, r"target is 'pluto', allowed are venus"),
    "argument": ({"colour": 1}, r"found argument colour, allowed are those of torch.onnx.export"),
    "axes of a stranger": ({"dynamic_axes": {"z": {0: "b"}}}, r"dynamic axes of z, allowed are the inputs x and the outputs"),
    "axis 7": ({"dynamic_axes": {"x": {7: "b"}}}, r"found dynamic axis 7 of x, which has 4 axes"),
    "axis that is fixed": ({"dynamic_axes": {"x": {2: "h"}}}, r"dynamic axis 'h': the forward does not run with it doubled: .*; give axes"),
    "one name twice": ({"input_names": ["a"], "output_names": ["a"]}, r"found the name a more than once"),
    "too many outputs": ({"output_names": ["a", "b"]}, r"found the output names a, b, the net returns 1 tensors"),
    "too many inputs": ({"input_names": ["a", "b"]}, r"found the input names a, b, the net takes 1 tensors"),
    "names as text": ({"input_names": "x"}, r"input_names and output_names are lists"),
    "wrong shape": ({"args": torch.randn(1, 2, 8, 8)}, r"the forward of Net does not run on inputs of shape \[\(1, 2, 8, 8\)\]"),
    "no inputs": ({"args": ()}, r"found no tensor among the inputs"),
    "a hidden tensor": ({"args": (Hidden(torch.zeros(1)),)}, r"found an input of type Hidden, allowed are tensors, numbers"),
    "no directory": ({"f": "nowhere/at/all/net.onnx"}, r"cannot write 'nowhere/at/all/net.onnx', allowed is a file in a directory"),
    "no net": ({"model": None}, r"found an object of type NoneType, allowed are instances of torch.nn.Module"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTS)
def test_export(name: str) -> None:
    options, match = EXPORTS[name]
    call = {"model": fixed().eval(), "args": batch()} | options
    with pytest.raises(linger.LingerError, match=rf"^export: {match}"):
        linger.onnx.export(**call)


@pytest.mark.parametrize(
    ("net", "args", "match"),
    [
        (lambda: linger.init(Net()), batch(), r"^export: conv: running_x is 0, so no batch has been seen; run at least one batch"),
        (lambda: fixed(Opened(True)), batch(), r"^export: found an output of type Hidden, allowed are tensors"),
        (lambda: fixed(nn.Conv2d(3, 4, 3)), torch.randn(3, 8, 8), r"^export: Conv2dInt: found an input of shape \(3, 8, 8\), allowed.*unsqueeze"),
        (lambda: fixed(nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2))), torch.randn(3, 8, 8), r"max_pool without a batch axis"),
        (lambda: fixed(nn.Sequential(nn.MaxPool2d((2, 1), (2, 1), (1, 0), (3, 1), ceil_mode=True), nn.ReLU())), torch.randn(1, 3, 9, 4),
         r"max_pool with ceil_mode and dilation reaches 2 places beyond the input, allowed are fewer than the kernel's"),
        (lambda: fixed(nn.Sequential(nn.AvgPool2d(2))), torch.randn(3, 8, 8), r"^export: 0: found an input of shape \(3, 8, 8\)"),
    ],
    ids=["never run", "hidden output", "unbatched layer", "unbatched max pool", "padding as wide as the window", "unbatched average"],
)  # fmt: skip
def test_nets_that_have_no_file(net: Callable[[], nn.Module], args: Tensor, match: str) -> None:
    made = net().eval()
    with pytest.raises(linger.LingerError, match=match):
        linger.onnx.export(made, args)


@pytest.mark.parametrize("function", [torch.tanh, torch.sigmoid, torch.exp, F.gelu, F.silu, torch.sin])
def test_a_function_of_nan_is_nan_in_eval(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A table has no entry for it; nothing looks at ranges in eval, so the output must show it."""

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(linger.quant_tensor(self, x, "x"))

    net, x = linger.init(Net()), torch.randn(4, 3)
    net(x)
    x[1, 2] = math.nan
    with torch.no_grad():
        assert net.eval()(x).isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["weight", "bias"])
def test_exporting_what_diverged(key: str, bad: float) -> None:
    net = fixed().eval()
    with torch.no_grad():
        getattr(net.fc, key).fill_(bad)
    with pytest.raises(linger.LingerError, match=r"^export: fc: found NaN or infinity, allowed are finite numbers"):
        linger.onnx.export(net, batch())


def test_a_failed_export_leaves_the_old_file(tmp_path: Path) -> None:
    path, net = tmp_path / "net.onnx", fixed().eval()
    linger.onnx.export(net, batch(), path)
    before = path.read_bytes()
    with pytest.raises(linger.LingerError):
        linger.onnx.export(net, torch.randn(1, 2, 8, 8), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


# --- verify


def _file(kind: str, path: Path, net: nn.Module) -> Path:
    """A file that is not the net's."""
    linger.onnx.export(net, batch(), path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif kind == "text":
        path.write_text("hello")
    elif kind == "missing":
        path.unlink()
    elif kind == "two outputs":
        model = onnx.load(path)
        model.graph.output.append(onnx.helper.make_tensor_value_info("conv", onnx.TensorProto.INT8, None))
        onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("kind", "inputs", "match"),
    [
        ("truncated", batch(), r"is truncated or not an ONNX file"),
        ("text", batch(), r"is truncated or not an ONNX file"),
        ("missing", batch(), r"there is no file .*net.onnx"),
        ("two outputs", batch(), r"the net returns 1 tensors, the file 2; compare a net with its own file"),
        ("its own", (batch(), batch()), r"found 2 inputs, the file takes x; pass those of forward"),
        ("its own", torch.randn(1, 2, 8, 8), r"the forward of Net does not run on inputs of shape \[\(1, 2, 8, 8\)\]"),
        (
            "its own",
            batch(3),
            r"input x has shape \(3, 3, 8, 8\), allowed is \(2, 3, 8, 8\); pass that, or export with dynamic_axes",
        ),
    ],
)
def test_verify(kind: str, inputs: Any, match: str, tmp_path: Path) -> None:
    net = fixed().eval()
    path = _file(kind, tmp_path / "net.onnx", net)
    with pytest.raises(linger.LingerError, match=f"^verify: .*{match}"):
        linger.verify(net, path, inputs)


def test_verify_in_onnx_runtime_only(tmp_path: Path) -> None:
    net, path = fixed().eval(), tmp_path / "net.onnx"
    linger.onnx.export(net, batch(), path, dialect="standard")
    with pytest.raises(linger.LingerError, match=r"^verify: ONNX Runtime \(disable\) does not run .* on these inputs"):
        linger.verify(net, path, batch(3))
    with pytest.raises(
        linger.LingerError, match=r"^verify: found an object of type str, allowed are instances of torch.nn"
    ):
        linger.verify("net", path, batch())  # type: ignore[arg-type]
