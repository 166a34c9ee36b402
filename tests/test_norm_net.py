"""Normalization layers and calls through everything that handles a whole net: checkpoints, targets, compilers, copies."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_interop import described, plain_export, quiet
from test_norm_layers import LAYERS, Behind, Call, spread, trained
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.ops import _symbolic
from linger.targets import TARGETS
from linger.verify import session


def test_keys_are_upstreams() -> None:
    net = trained(nn.Sequential(nn.LayerNorm(5)), (2, 5))
    names = ("x", "w", "o", "normal")
    keys = {f"0.{kind}_{n}" for kind in ("running", "scale") for n in names} | {"0.weight", "0.bias"}
    state = net.state_dict()
    assert set(state) == keys
    assert float(state["0.scale_normal"]) == 1024
    assert float(state["0.running_normal"]) == 0
    upstream = {k: v.reshape(1) if v.dim() == 0 else v for k, v in state.items()}  # its buffers have one element
    upstream["0.scale_normal"] = torch.zeros(1)
    fresh = linger.init(nn.Sequential(nn.LayerNorm(5)))
    fresh.load_state_dict(upstream)
    x = torch.randn(4, 5)
    assert torch.equal(fresh.eval()(x), net.eval()(x))


@pytest.mark.parametrize("name", LAYERS)
def test_a_float_checkpoint_loads(name: str) -> None:
    make = LAYERS[name][0]
    plain, net = make(), linger.init(nn.Sequential(make()))
    spread(plain)
    net.load_state_dict({f"0.{k}": v for k, v in plain.state_dict().items()})
    assert all(torch.equal(net[0]._parameters[k], v) for k, v in plain.state_dict().items())


def test_the_weight_has_the_chips_width(tmp_path: Path) -> None:
    """16 bits on venus, whatever was asked for; a layer alone follows its target too."""
    for chip, kind in (
        ("venus", onnx.TensorProto.INT16),
        ("arcs", onnx.TensorProto.INT8),
        ("venusa", onnx.TensorProto.INT8),
    ):
        for parameter_bits in (4, 8):
            if parameter_bits not in TARGETS[chip].parameter_bits and chip != "venus":
                continue
            net = linger.init(nn.LayerNorm(5), target=chip, parameter_bits=parameter_bits)
            net(torch.randn(2, 5))
            model = linger.onnx.export(net.eval(), (torch.randn(2, 5),), tmp_path / "n.onnx", target=chip)
            weight = next(i for i in model.graph.initializer if i.name.endswith("weight"))
            assert weight.data_type == kind, chip
    assert linger.init(nn.GroupNorm(1, 4), target="venus").gamma_bits() == 8


def test_what_no_chip_has_exports_and_is_listed(tmp_path: Path) -> None:
    for chip in TARGETS.values():
        assert {"GroupNormInt", "RMSNormInt", "iqStd"} <= set(chip.lacks)
        assert "LayerNormInt" not in chip.lacks
        net = trained(nn.Sequential(nn.RMSNorm(6), nn.GroupNorm(1, 4)), (2, 4, 6), target=chip.name).eval()
        linger.onnx.export(net, (torch.randn(2, 4, 6),), tmp_path / "n.onnx")
        assert linger.verify(net, tmp_path / "n.onnx", torch.randn(2, 4, 6), quiet=True).equal


class Mixed(nn.Module):
    """Every normalization as a layer and as a call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.ln, self.gn = nn.Linear(16, 16), nn.LayerNorm(16, eps=1e-3), nn.GroupNorm(2, 4)
        self.inst, self.rms = nn.InstanceNorm1d(4, affine=True), nn.RMSNorm(16)
        self.w, self.b, self.c = (
            nn.Parameter(torch.rand(16)),
            nn.Parameter(torch.randn(16)),
            nn.Parameter(torch.rand(4)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(self.fc(x), (16,), self.w, self.b)
        y = self.inst(self.gn(self.ln(y))) + F.instance_norm(y, weight=self.c)
        y = F.rms_norm(self.rms(F.group_norm(y, 2, self.c, eps=0.1)), [16], self.w)
        var, mean = torch.var_mean(y, -1, keepdim=True)
        return torch.cat([y, var, mean, torch.std(y, -1, keepdim=True)], -1)


def mixed() -> nn.Module:
    return trained(Mixed(), (3, 4, 16))


@pytest.mark.parametrize("training", [True, False])
def test_compiled(training: bool) -> None:
    net = mixed().train(training)
    other = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 16)
    with quiet():  # PyTorch's compiler warns about itself
        found, wanted = compiled(x), other(x)
    assert torch.equal(found, wanted)
    if training:
        found.square().sum().backward()
        wanted.square().sum().backward()
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


def test_plain_torch_export(tmp_path: Path) -> None:
    net, x = mixed().eval(), torch.randn(3, 4, 16)
    with torch.no_grad():
        net(x)
    theirs = plain_export(net, (x,), tmp_path / "theirs.onnx")
    ours = linger.onnx.export(net, (x,), tmp_path / "ours.onnx", dynamic_axes={"x": {0: "batch"}})
    assert described(theirs) == described(ours)
    assert linger.verify(net, tmp_path / "ours.onnx", torch.randn(5, 4, 16), quiet=True).equal
    report = linger.verify(net, tmp_path / "theirs.onnx", torch.randn(5, 4, 16), quiet=True)
    assert report.differing == {"runtime": 0}


def test_a_changed_parameter_of_a_call_is_seen() -> None:
    """The exporter's tracer has no values: what it stores must be what the remembered eval forward used."""
    net, x = trained(Call("layer"), (3, 12, 12)).eval(), torch.randn(3, 12, 12)
    with torch.no_grad():
        net(x)
        site = net._linger_round_tensor_iqlayernorm_0
        with _symbolic._real(site, site._calls[0]):
            pass
        net.w.mul_(2)
    with (
        pytest.raises(linger.LingerError, match="changed since the last eval forward"),
        _symbolic._real(site, site._calls[0]),
    ):
        pass


def test_copies_compute_the_same(tmp_path: Path) -> None:
    net, x = mixed().eval(), torch.randn(3, 4, 16)
    with torch.no_grad():
        wanted = net(x)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(other(x), wanted)
            other.w.add_(1)
            assert torch.equal(net(x), wanted)


@pytest.mark.parametrize("name", LAYERS)
def test_qdq_is_close(name: str, tmp_path: Path) -> None:
    """Floats between the same grids. The reciprocal square root is exact there, the chip's is 2^-9 too large at most."""
    make, shape = LAYERS[name]
    layer = make()
    net = trained(Behind(layer), shape, target="arcs")
    spread(net)
    net.layer.running("o").fill_(4.0)
    x = torch.randn(shape)
    linger.onnx.export(net.eval(), (x,), tmp_path / "n.onnx", dialect="qdq", input_names=["x"])
    found = session(onnx.load(tmp_path / "n.onnx"), "disable").run(None, {"x": x.numpy()})[0]
    assert np.abs(found - net(x).detach().numpy()).max() <= 2 / 32
