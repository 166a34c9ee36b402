"""Products, functional layers and attention under torch.compile and in plain torch.onnx.export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import Calls, export, samples, trained
from test_attention import Encoder, heads, itself
from test_interop import described, plain_export
from torch import nn
from torch.nn import functional as F

import linger

pytestmark = [
    pytest.mark.filterwarnings("ignore:export. in float:linger.LingerWarning"),
    pytest.mark.filterwarnings("ignore:init. left in float:linger.LingerWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # Dynamo's own
]
X = ((2, 5, 16),)
Q = ((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8))

NETS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "products": (lambda: Calls(lambda n, x: torch.bmm(x, n.w0 @ x.transpose(1, 2) @ x), (5, 5)), ((2, 5, 5),)),
    "einsum": (lambda: Calls(lambda n, x: torch.einsum("bij,bkj->bik", x, x)), X),
    "linear": (lambda: Calls(lambda n, x: F.linear(x, n.w0 + n.w1 @ n.w2, n.w3), (6, 16), (6, 2), (2, 16), (6,)), X),
    "conv": (lambda: Calls(lambda n, x: F.conv1d(x, n.w0, n.w1, padding="same"), (6, 5, 3), (6,)), X),
    "buffer": (lambda: Calls(lambda n, x: x @ n.table, table=torch.randn(16, 4)), X),
    "masked": (lambda: Calls(lambda n, x: x.masked_fill(n.table > 0, -1e9), table=torch.randn(5, 16)), X),
    "function": (lambda: Calls(lambda n, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)), Q),
    "function-mask": (lambda: Calls(lambda n, q, k, v: F.scaled_dot_product_attention(q, k, v, n.table), table=torch.randn(5, 6)), Q),
    "multihead": (lambda: heads(itself(attn_mask=None, need_weights=False), batch_first=True), X),
    "encoder": (lambda: Encoder(dropout=0.0), ((2, 7, 10),)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_compiled_equals_eager(name: str) -> None:
    """fullgraph, in training with gradients and in eval."""
    make, shapes = NETS[name]
    inputs = samples(shapes)
    net = trained(make(), inputs)
    with torch.no_grad():
        wanted = net(*inputs)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(*inputs), wanted)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    results = []
    for compiled in (False, True):
        net.load_state_dict(state)
        net.train().zero_grad()
        torch._dynamo.reset()
        out = (torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net)(*inputs)
        if out.requires_grad:
            out.square().sum().backward()
        results.append((out.detach(), [p.grad for p in net.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("name", NETS)
def test_both_exporters_write_the_same(name: str, tmp_path: Path) -> None:
    make, shapes = NETS[name]
    inputs = samples(shapes)
    net = trained(make(), inputs)
    with torch.no_grad():
        wanted = net(*inputs)
    theirs = plain_export(net, inputs, tmp_path / "theirs.onnx")
    ours = export(net, inputs, tmp_path / "ours.onnx")
    assert described(theirs) == described(ours)
    assert len(described(ours)) > 1
    if name != "encoder":  # its last op may be a function in float
        assert np.array_equal(
            linger.runtime.load(tmp_path / "theirs.onnx")(*(t.numpy() for t in inputs)), wanted.numpy()
        )


def test_plain_export_after_a_weight_changed(tmp_path: Path) -> None:
    net = trained(NETS["linear"][0](), samples(X))
    with torch.no_grad():
        net(*samples(X))
        net.w1.mul_(2.0)
    with pytest.raises(Exception, match="changed since the last eval forward"):
        plain_export(net, samples(X), tmp_path / "net.onnx")


def test_a_grid_hidden_from_the_compiler() -> None:
    """torch.compile does not show properties of tensors to a function mode: the grid of x.mT is lost, which is an error."""
    net = trained(Calls(lambda n, x: x @ x.mT), samples(X))
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"an operand lost its grid, for torch\.compile does not see"):
        torch.compile(net, fullgraph=True, backend="aot_eager")(*samples(X))
