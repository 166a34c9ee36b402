"""``linger.fit``: what it makes computes the same float function and fits; what has no such form stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nets import NETS
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.errors import LingerError
from linger.fit._parts import parts_of


class Net(nn.Module):
    """One layer, and something behind it that fits."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x))


class First(nn.Module):
    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        return x[0]


def whole(net: nn.Module) -> nn.Module:
    """Parameters and statistics that are small integers: every sum is exact in any order."""
    with torch.no_grad():
        for t in (*net.parameters(), *net.buffers()):
            if t.dtype.is_floating_point:
                t.copy_(torch.randint(-3, 4, t.shape))
        for m in net.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_var.fill_(4.0)  # type: ignore[union-attr,operator]
                m.eps = 0.0
    return net


Make = Callable[[], tuple[nn.Module, tuple[int, ...]]]
REWRITTEN: dict[str, tuple[str, Make]] = {
    "kernel 7": ("venus", lambda: (Net(nn.Conv2d(3, 4, 7, padding=3)), (2, 3, 12, 11))),
    "kernel 7, stride 2": ("arcs", lambda: (Net(nn.Conv2d(3, 4, (7, 3), (1, 2), padding=(3, 1))), (1, 3, 12, 11))),
    "the first layer of a ResNet": ("venus", lambda: (Net(nn.Conv2d(3, 4, 7, 2, 3, bias=False)), (1, 3, 16, 17))),
    "kernel 9, stride 2": ("venus", lambda: (Net(nn.Conv2d(2, 4, (9, 1), (2, 1), (3, 0))), (1, 2, 14, 6))),
    "kernel 9 without bias or pads": ("venusa", lambda: (Net(nn.Conv2d(2, 4, 9, bias=False)), (1, 2, 12, 16))),
    "kernel 11 of groups": ("venus", lambda: (Net(nn.Conv2d(4, 8, (1, 11), padding=(0, 3), groups=2)), (1, 4, 6, 16))),
    "stride beyond the kernel": ("venus", lambda: (Net(nn.Conv2d(3, 4, 1, stride=2)), (2, 3, 9, 12))),
    "stride beyond a padded kernel": ("arcs", lambda: (Net(nn.Conv2d(4, 4, 2, stride=4, padding=1, groups=2)), (1, 4, 12, 13))),
    "rows": ("venusa", lambda: (Net(nn.Linear(6, 4)), (1, 5, 6))),
    "rows, no bias": ("venusa", lambda: (Net(nn.Linear(6, 4, bias=False)), (5, 6))),
    "linear of 4 dimensions": ("venus", lambda: (Net(nn.Linear(6, 4)), (1, 2, 3, 6))),
    "linear and batch norm": ("venus", lambda: (Net(nn.Linear(6, 4), nn.BatchNorm1d(4)), (5, 6))),
    "conv1d": ("venusa", lambda: (Net(nn.Conv1d(4, 6, 3, 2, padding=1)), (1, 4, 12))),
    "conv1d dilated": ("arcs", lambda: (Net(nn.Conv1d(4, 6, 3, padding="same", dilation=2)), (1, 4, 20))),
    "conv1d depthwise, batch norm": ("venus", lambda: (Net(nn.Conv1d(4, 4, 3, groups=4), nn.BatchNorm1d(4)), (1, 4, 9))),
    "deconvolution of a sequence": ("arcs", lambda: (Net(nn.ConvTranspose1d(4, 6, 3, 2, 1, 1)), (1, 4, 9))),
    "linear and batch norm of another axis": ("venus", lambda: (Net(nn.Linear(6, 5), nn.BatchNorm1d(5)), (1, 5, 6))),
    "batch norm of rows": ("venus", lambda: (Net(nn.BatchNorm1d(6)), (3, 6))),
    "batch norm of a sequence": ("arcs", lambda: (Net(nn.BatchNorm1d(6)), (1, 6, 9))),
    "max pool of a sequence": ("venus", lambda: (Net(nn.MaxPool1d(3, 2, 1)), (1, 4, 12))),
    "average pool of a sequence": ("venus", lambda: (Net(nn.AvgPool1d(4)), (1, 4, 12))),
    "adaptive pool of a sequence": ("venus", lambda: (Net(nn.AdaptiveAvgPool1d(2)), (1, 4, 8))),
    "deconvolution in groups": ("venus", lambda: (Net(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)), (1, 4, 5, 5))),
    "max pool": ("small", lambda: (Net(nn.Conv2d(3, 3, 1), nn.MaxPool2d((8, 6))), (1, 3, 16, 12))),
    "adaptive pool of an image": ("small", lambda: (Net(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(2)), (1, 3, 16, 16))),
    "average pool": ("small", lambda: (Net(nn.Conv2d(3, 3, 1), nn.AvgPool2d(8)), (1, 3, 16, 16))),
}  # fmt: skip
SMALL = 'name = "small"\nlike = "venus"\n[limits]\nMaxPool = [{of = "kernel", high = 4}]\nAvgPool2dInt = [{of = "kernel", high = 4}]\n'


@pytest.fixture(name="chip_of")
def _chip_of(tmp_path: Path) -> Callable[[str], str]:
    def path(chip: str) -> str:
        (tmp_path / "small.toml").write_text(SMALL)
        return str(tmp_path / "small.toml") if chip == "small" else chip

    return path


@pytest.mark.parametrize("name", REWRITTEN)
def test_the_same_function_and_it_fits(name: str, chip_of: Callable[[str], str], tmp_path: Path) -> None:
    chip, make = REWRITTEN[name]
    net, shape = make()
    before = whole(net).eval()
    x = torch.randint(-3, 4, shape).float()
    sample = x[:1] if not isinstance(before.body[0], (nn.Linear, nn.BatchNorm1d)) else x  # type: ignore[index]
    assert not linger.check(before, sample, target=chip_of(chip), quiet=True).ok
    after = linger.fit(copy.deepcopy(before), chip_of(chip), sample, quiet=True)
    assert torch.equal(after(x), before(x))
    report = linger.check(after, sample, target=chip_of(chip), quiet=True)
    assert not [v for v in report.violations if v.kind == "error"], str(report)
    assert report.ok or {v.of for v in report.violations if v.kind == "wrong"} <= {"rows"}
    trained = after.train()
    linger.trace_layers(trained, trained, x)
    trained = linger.init(trained, target=chip_of(chip))
    trained(x.clone().requires_grad_()).sum().backward()
    linger.onnx.export(trained.eval(), (x,), tmp_path / "net.onnx")
    assert linger.verify(trained, tmp_path / "net.onnx", x, quiet=True).equal


def test_a_batch_normalization_follows_its_convolution_into_one_layer(capsys: pytest.CaptureFixture[str]) -> None:
    net = linger.fit(Net(nn.Linear(6, 4), nn.BatchNorm1d(4)), "venus", torch.randn(5, 6))
    assert capsys.readouterr().out == "fit: body.0: Linear is now RowsAsImage of Conv2d, BatchNorm2d (BatchNorm1d)\n"
    linger.trace_layers(net, net, torch.randn(5, 6))
    assert "NormalizeConvBN2d" in str(net)


def test_a_net_that_is_such_a_layer() -> None:
    net = linger.fit(nn.MaxPool1d(2), "venus", torch.randn(1, 4, 8), quiet=True)
    x = torch.randn(2, 4, 8)
    assert torch.equal(net(x), F.max_pool1d(x, 2))


KEPT: dict[str, Make] = {
    "a kernel with other padding": lambda: (Net(nn.Conv2d(3, 4, 7, padding=3, padding_mode="reflect")), (1, 3, 9, 9)),
    "a dilation that no layer has": lambda: (Net(nn.Conv1d(3, 4, 3, dilation=2)), (1, 3, 9)),
    "a dilated kernel": lambda: (Net(nn.Conv2d(3, 4, 7, dilation=2)), (1, 3, 16, 16)),
    "a stride beyond every kernel": lambda: (Net(nn.Conv2d(3, 4, 1, stride=8)), (1, 3, 16, 16)),
    "pads beyond every part": lambda: (Net(nn.Conv2d(3, 4, 7, padding=6)), (1, 3, 16, 16)),
    "a pool of what is in float": lambda: (Net(nn.MaxPool2d(2)), (1, 3, 8, 8)),
    "maxima with their places": lambda: (Net(nn.MaxPool1d(2, return_indices=True), First()), (1, 4, 8)),
    "a sequence without a batch": lambda: (Net(nn.MaxPool1d(2)), (4, 8)),
    "a depthwise sequence without a batch": lambda: (Net(nn.Conv1d(4, 4, 3, groups=4)), (4, 8)),
    "an image without a batch": lambda: (Net(nn.ConvTranspose2d(4, 4, 3, groups=2)), (4, 5, 5)),
    "a layer that fits": lambda: (Net(nn.Conv2d(3, 4, 3)), (1, 3, 9, 9)),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_has_no_such_form_stays(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    net, shape = KEPT[name]()
    layer = net.body[0]  # type: ignore[index]
    assert linger.fit(net, "venus", torch.randn(shape)).body[0] is layer  # type: ignore[index]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("features", [(6, 4), (6, 5)], ids=str)
def test_batch_statistics_are_those_of_the_net_before(features: tuple[int, int]) -> None:
    """A Linear's features are the channels of its batch normalization only where it reads rows."""
    shape = (8, 6) if features[1] == 4 else (8, 5, 6)
    before = Net(nn.Linear(*features), nn.BatchNorm1d(features[1])).double().train()
    x = torch.randn(shape).double()
    after = linger.fit(copy.deepcopy(before), "venus", x, quiet=True)
    torch.testing.assert_close(after(x), before(x))


def test_what_is_frozen_stays_frozen() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2).requires_grad_(False)
    after = linger.fit(Net(layer), "venus", torch.randn(1, 4, 5, 5), quiet=True)
    assert [p.requires_grad for p in after.parameters()] == [False] * 4


def test_parts_cover_the_kernel_once() -> None:
    for kernel in range(6, 16):
        for stride in (1, 2):
            for pad in range(5):
                parts = parts_of(kernel, stride, pad, 5, 4)
                if parts is not None:
                    taps = [t for p in parts for t in range(p.offset, p.offset + p.size)]
                    assert taps == list(range(kernel))


def test_a_net_that_was_converted() -> None:
    net = linger.init(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(LingerError, match=r"^fit: found a net that was traced or converted, allowed is a float net"):
        linger.fit(net, "venus", torch.randn(1, 2))


@pytest.mark.parametrize("chip", ["venus", "arcs", "venusa"])
def test_a_residual_network_fits_afterwards(chip: str) -> None:
    make, shape = NETS["ResNet20"]
    net, x = make(), torch.randn(1, *shape)
    before = linger.check(net, x, target=chip, quiet=True)
    assert {(v.layer, v.of) for v in before.violations if v.kind == "error"} == {
        ("blocks.3.shortcut.0", "kernel_over_stride"),
        ("blocks.6.shortcut.0", "kernel_over_stride"),
    }
    assert before.macs == 40_813_184
    assert linger.check(linger.fit(net, chip, x, quiet=True), x, target=chip, quiet=True).ok
