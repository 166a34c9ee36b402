"""The examples run, and what they define is right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import train_qat
from torch import nn
from torch.nn import functional as F

import linger


def test_train_qat_from_float_to_equal_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for distill in ("0", "0.9"):
        path = tmp_path / f"digits-{distill}.onnx"
        report = train_qat.main(["--distill", distill, "--epochs", "1", "--limit", "500", "--out", str(path)])
        assert report.equal
        said = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines()[:3])
        figures = {stage: float(text.strip(" %")) for stage, text in said.items()}
        assert figures.keys() == {"float", "calibrated", "fixed point"}
        assert min(figures.values()) > 50, "it has learned something in every stage"
        outputs.append(linger.runtime.load(str(path))(torch.zeros(1, 1, 28, 28).numpy()))
    assert (outputs[0] != outputs[1]).any(), "the teacher changes the student"


def test_distillation_is_its_equation() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    x, y, out = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]), torch.randn(5, 3, requires_grad=True)
    hard, soft = (train_qat.distillation(teacher, weight)(x, out, y) for weight in (0.0, 1.0))
    assert torch.equal(hard, F.cross_entropy(out, y))
    t = train_qat.TEMPERATURE
    p, q = (torch.softmax(v / t, 1) for v in (teacher(x), out))
    torch.testing.assert_close(soft, t**2 * (p * (p / q).log()).sum(1).mean())
    torch.testing.assert_close(train_qat.distillation(teacher, 0.25)(x, out, y), 0.75 * hard + 0.25 * soft)
    soft.backward()
    assert out.grad is not None
    torch.testing.assert_close(out.grad, t * (q - p).detach() / 5)
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
