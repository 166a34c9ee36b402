"""``linger.check`` before training: every violation by name, and what every layer costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import linger


class Small(nn.Module):
    """Fits every chip: (1, 8, 16, 16) -> (1, 10)"""

    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, kernel, padding=1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = F.avg_pool2d(x + x, x.shape[-1])
        return self.fc(x.flatten(1))


@pytest.mark.parametrize("chip", ["venus", "arcs", "venusa", "mars"])
def test_a_net_that_fits(chip: str) -> None:
    report = linger.check(Small(), torch.randn(1, 8, 16, 16), target=chip, quiet=True)
    assert report.ok
    costs = {layer.name: layer.cost for layer in report.layers}
    assert costs["conv"].macs == 16 * 16 * 16 * 8 * 9
    assert costs["conv"].weights == 16 * 8 * 9 + 4 * 16
    assert costs["fc"].macs == 160


def test_a_kernel_of_7(capsys: pytest.CaptureFixture[str]) -> None:
    net = Small(7)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    report = linger.check(net, torch.randn(1, 8, 16, 16), target="venus")
    assert not report.ok
    (violation,) = (v for v in report.violations if v.kind == "error")
    assert (violation.layer, violation.found, violation.allowed) == ("conv", "kernel 7", "1 to 5")
    assert "kernel 7" in capsys.readouterr().out
    assert type(net.conv) is nn.Conv2d
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
