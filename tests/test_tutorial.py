"""The tutorial, sections 1 to 3, as written: the trees it prints, the state dicts of every stage, the exported file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import linger

TRACED = """Net(
  (conv): NormalizeConvBN2d(
    normalize_data:None,normalize_weight:None,normalize_bias:None,ahead_relu:True
    (conv): Conv2d(10, 10, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    (bn): BatchNorm2d(10, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
  )
  (bn): EmptyBatchNorm()
  (relu): ReLU()
  (fc): Linear(in_features=25000, out_features=100, bias=True)
)"""
NORMALIZED = TRACED.replace(
    "normalize_data:None,normalize_weight:None,normalize_bias:None",
    "normalize_data:8,normalize_weight:8,normalize_bias:8",
)
FIXED = """Net(
  (conv): Conv2dInt(10, 10, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
  (bn): EmptyBatchNorm()
  (relu): ReLU()
  (fc): LinearInt(in_features=25000, out_features=100, bias=True)
)"""
FIXED_FLOAT_FC = FIXED.replace("LinearInt", "Linear")

CONV, NORM = ("weight", "bias"), ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
GRIDS = ("running_x", "running_w", "running_o", "scale_x", "scale_w", "scale_o")
FC = {"fc.weight", "fc.bias"}
FLOAT_KEYS = {f"conv.{k}" for k in CONV} | {f"bn.{k}" for k in NORM} | FC
FUSED_KEYS = {f"conv.conv.{k}" for k in CONV} | {f"conv.bn.{k}" for k in NORM} | FC
FIXED_KEYS = {f"conv.{k}" for k in (*CONV, *GRIDS)} | FC


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(10, 10, kernel_size=3, stride=1, padding=1, bias=True)
        self.bn = nn.BatchNorm2d(10)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(25000, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        n, c, h, w = x.shape
        x = x.view((n, c * h * w))
        return self.fc(x)


@pytest.fixture
def aa() -> Tensor:
    return torch.randn(1, 10, 50, 50)


def float_checkpoint(aa: Tensor, path: Path) -> Net:
    """A float net with statistics that are not those of a new one."""
    net = Net()
    for _ in range(3):
        net(aa * 2 + 1)
    assert set(net.state_dict()) == FLOAT_KEYS
    torch.save(net.state_dict(), path)
    return net


def close_to(net: nn.Module, source: nn.Module, x: Tensor) -> None:
    """Fixed point after loading is the float net up to quantization."""
    source.eval()
    with torch.no_grad():
        net.train()(x)
        got, wanted = net.eval()(x), source(x)
    assert (got - wanted).abs().max() < 0.2 * wanted.abs().max()


def fine_tune(net: nn.Module, aa: Tensor) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    before = [p.clone() for p in net.parameters()]
    loss = net.train()(aa).square().mean()
    loss.backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def exported_equal(net: nn.Module, aa: Tensor, path: Path) -> None:
    linger.onnx.export(net.eval(), (aa,), path, dynamic_axes={"x": {0: "batch"}})
    assert linger.verify(net, path, torch.cat([aa, -aa, aa * 0.3]), quiet=True).equal


@pytest.mark.parametrize("choose_types", [True, False])
def test_section_1_straight_to_fixed_point(aa: Tensor, tmp_path: Path, choose_types: bool) -> None:
    source = float_checkpoint(aa, tmp_path / "convbn_quant.pt")
    net: nn.Module = Net()
    linger.trace_layers(net, net, aa, fuse_bn=True)
    assert str(net) == TRACED
    assert set(net.state_dict()) == FUSED_KEYS
    if choose_types:
        replace_tuple = (nn.Conv2d, linger.NormalizeConvBN2d, nn.Linear)
        net = linger.init(net, quant_modules=replace_tuple)
    else:
        net = linger.init(net)
    assert str(net) == FIXED
    assert set(net.state_dict()) == FIXED_KEYS | {f"fc.{k}" for k in GRIDS}
    net.load_state_dict(torch.load(tmp_path / "convbn_quant.pt", weights_only=True))
    close_to(net, source, aa)
    fine_tune(net, aa)
    exported_equal(net, aa, tmp_path / "net.onnx")


def test_section_1_as_written_chosen_types_then_defaults(aa: Tensor) -> None:
    net: nn.Module = Net()
    linger.trace_layers(net, net, aa, fuse_bn=True)
    replace_tuple = (nn.Conv2d, linger.NormalizeConvBN2d, nn.Linear)
    net = linger.init(net, quant_modules=replace_tuple)
    net = linger.init(net)
    assert str(net) == FIXED


def normalized(aa: Tensor) -> nn.Module:
    net: nn.Module = Net()
    linger.disable_normalize(net.fc)
    linger.trace_layers(net, net, aa)
    normalize_modules = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, linger.NormalizeConvBN2d)
    return linger.normalize_layers(
        net,
        normalize_modules=normalize_modules,
        normalize_weight_value=8,
        normalize_bias_value=8,
        normalize_output_value=8,
    )


def test_section_2_normalize_then_fixed_point(aa: Tensor, tmp_path: Path) -> None:
    source = float_checkpoint(aa, tmp_path / "convbn_float.pt")
    net = normalized(aa)
    net.load_state_dict(torch.load(tmp_path / "convbn_float.pt", weights_only=True))
    assert str(net) == NORMALIZED
    assert set(net.state_dict()) == FUSED_KEYS
    with torch.no_grad():
        assert torch.allclose(net.eval()(aa), source.eval()(aa).clamp(-1e9, 1e9), atol=1e-4)
    fine_tune(net, aa)
    torch.save(net.state_dict(), tmp_path / "convbn_normalize.pt")

    second = normalized(aa)
    linger.disable_quant(second.fc)
    second = linger.init(second)
    assert str(second) == FIXED_FLOAT_FC
    assert set(second.state_dict()) == FIXED_KEYS
    second.load_state_dict(torch.load(tmp_path / "convbn_normalize.pt", weights_only=True))
    assert (second.conv.normalize_data, second.conv.normalize_weight, second.conv.normalize_bias) == (8, 8, 8)
    assert (second.conv.clamp_data, second.conv.clamp_weight, second.conv.clamp_bias) == (8, 8, 8)
    close_to(second, net, aa)
    with pytest.warns(linger.LingerWarning, match="fc"):
        exported_equal_with_float_fc(second, aa, tmp_path / "net.onnx")


def exported_equal_with_float_fc(net: nn.Module, aa: Tensor, path: Path) -> None:
    """fc stays in float: everything up to it is compared exactly, the float product as floats are."""
    linger.onnx.export(net.eval(), (aa,), path)
    model = linger.runtime.load(path)
    got = model(aa.numpy())
    with torch.no_grad():
        conv = net.conv(aa)
    assert (model.tensors["conv"] == (conv * conv.grid.scale).numpy()).all()
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(got), net(aa), atol=1e-3)


@pytest.mark.parametrize("stage", ["float", "normalized"])
def test_section_3_normalize_without_training(aa: Tensor, tmp_path: Path, stage: str) -> None:
    source = float_checkpoint(aa, tmp_path / "float.pt")
    torch.save(source.state_dict(), tmp_path / "checkpoint.pt")
    if stage == "normalized":
        first = normalized(aa)
        first.load_state_dict(source.state_dict())
        torch.save(first.state_dict(), tmp_path / "checkpoint.pt")
    net: nn.Module = Net()
    linger.disable_normalize(net.fc)
    linger.trace_layers(net, net, aa)
    normalize_modules = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    net = linger.normalize_layers(
        net,
        normalize_modules=normalize_modules,
        normalize_weight_value=8,
        normalize_bias_value=8,
        normalize_output_value=8,
    )
    assert str(net) == NORMALIZED
    linger.disable_quant(net.fc)
    net = linger.init(net)
    assert str(net) == FIXED_FLOAT_FC
    net.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert net.conv.normalize_data == 8
    close_to(net, source, aa)
