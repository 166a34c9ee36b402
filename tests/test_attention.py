"""Attention: nn.MultiheadAttention, F.scaled_dot_product_attention, hand-written attention, and the containers of nn.Transformer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from calls import DIALECTS, Calls, assert_equal, export, islands, ops, samples, stored, trained
from torch import Tensor, nn
from torch.nn import functional as F

import linger

pytestmark = [
    pytest.mark.filterwarnings("ignore:export. in float:linger.LingerWarning"),
    pytest.mark.filterwarnings("ignore:init. left in float:linger.LingerWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
HIDDEN = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
PADDING = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]).bool()
ALIBI = -0.3 * (torch.arange(5.0).reshape(5, 1) - torch.arange(5.0)).abs()


def heads(call: Callable[..., Any], **options: Any) -> Calls:
    """A net around one nn.MultiheadAttention; the weights it returns are put on a grid, so that all results are integers."""

    def function(net: Any, *inputs: Tensor) -> Any:
        out, weights = call(net, *inputs)
        return out if weights is None else (out, linger.quant_tensor(net, weights, "weights"))

    net = Calls(function, causal=CAUSAL, hidden=HIDDEN, alibi=ALIBI, padding=PADDING.float() * -1e9)
    net.attn = nn.MultiheadAttention(16, 4, **options)
    for p in net.attn.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def itself(**call: Any) -> Callable[..., Any]:
    return lambda net, x: net.attn(x, x, x, **call)


X = (5, 3, 16)
# name: (call, shapes or inputs, options of the layer)
MULTIHEAD: dict[str, tuple[Callable[..., Any], Any, dict[str, Any]]] = {
    "self": (itself(), (X,), {}),
    "no-weights": (itself(need_weights=False), (X,), {}),
    "per-head": (itself(average_attn_weights=False), (X,), {}),
    "no-bias": (itself(), (X,), {"bias": False}),
    "bias_kv": (itself(), (X,), {"add_bias_kv": True}),
    "zero_attn": (itself(), (X,), {"add_zero_attn": True}),
    "one-sample": (itself(), ((5, 16),), {}),
    "dropout": (itself(), (X,), {"dropout": 0.2}),
    "causal": (lambda n, x: n.attn(x, x, x, attn_mask=n.causal), (X,), {}),
    "causal-hint": (lambda n, x: n.attn(x, x, x, attn_mask=n.causal, is_causal=True, need_weights=False), (X,), {}),
    "bool": (lambda n, x: n.attn(x, x, x, attn_mask=n.hidden), (X,), {}),
    "added": (lambda n, x: n.attn(x, x, x, attn_mask=n.alibi), (X,), {}),
    "mask-per-head": (lambda n, x, m: n.attn(x, x, x, attn_mask=m), (X, (torch.arange(300) % 5 < 2).reshape(12, 5, 5)), {}),
    "padding": (lambda n, x, p: n.attn(x, x, x, key_padding_mask=p), (X, PADDING), {}),
    "padding-added": (lambda n, x: n.attn(x, x, x, key_padding_mask=n.padding), (X,), {}),
    "padding-and-bool": (lambda n, x, p: n.attn(x, x, x, p, attn_mask=n.hidden), (X, PADDING), {}),
    "padding-and-added": (lambda n, x: n.attn(x, x, x, n.padding, attn_mask=n.alibi), (X,), {}),
    "everything": (lambda n, x, p: n.attn(x, x, x, p, attn_mask=n.hidden), (X, PADDING), {"add_bias_kv": True, "add_zero_attn": True}),
    "cross": (lambda n, x, y: n.attn(x, y, y), (X, (7, 3, 16)), {}),
    "three": (lambda n, x, y, z: n.attn(x, y, z), (X, (7, 3, 8), (7, 3, 12)), {"kdim": 8, "vdim": 12}),
}  # fmt: skip


def given(shapes: Any, batch_first: bool) -> tuple[Tensor, ...]:
    made = [s if isinstance(s, Tensor) else samples((s,), seed=len(s) + s[0])[0] for s in shapes]
    turn = batch_first and made[0].dim() == 3
    return tuple(t.transpose(0, 1).contiguous() if turn and t.is_floating_point() else t for t in made)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", MULTIHEAD)
def test_multihead(name: str, batch_first: bool, tmp_path: Path) -> None:
    """Every option: near the float layer, no float island but softmax's, no differing integer, a gradient everywhere."""
    call, shapes, options = MULTIHEAD[name]
    net = heads(call, batch_first=batch_first, **options)
    inputs = given(shapes, batch_first)
    wanted = call(net.eval(), *inputs)[0]
    net = trained(net.train(), inputs)
    assert islands(net, inputs, tmp_path / "net.onnx", batch=False) == []
    assert_equal(net, inputs, tmp_path / "net.onnx")
    out = net(*inputs)
    got = out[0] if isinstance(out, tuple) else out
    assert (got - wanted).square().mean() < 0.05 * wanted.square().mean()
    assert all(t.isfinite().all() for t in ((got,) if got is out else out))
    net.train()
    out = net(*inputs)
    (out if isinstance(out, Tensor) else out[0]).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_multihead_of_any_batch(dialect: str, tmp_path: Path) -> None:
    net = trained(heads(itself(need_weights=False), batch_first=True), samples(((3, 5, 16),)))
    model = export(net, samples(((3, 5, 16),)), tmp_path / "net.onnx", dialect=dialect)
    if dialect == "thinker":
        assert [op for op in ops(model) if op != "Softmax" and not op.endswith("SoftmaxInt")] == [
            *["LinearInt"] * 3, "BmmInt", "BmmInt", "LinearInt"
        ]  # fmt: skip
    for batch in (1, 4):
        assert_equal(net, samples(((batch, 5, 16),), seed=batch), tmp_path / "net.onnx")


def test_packed_weights_have_a_grid_each(tmp_path: Path) -> None:
    """q, k and v of different sizes; the float net's keys stay, and name the parts in the file."""
    net = heads(itself(need_weights=False))
    with torch.no_grad():
        net.attn.in_proj_weight[:16] *= 8
        net.attn.in_proj_weight[32:] /= 8
    keys = set(net.state_dict())
    net = trained(net, samples((X,)))
    assert keys <= set(net.state_dict())
    held = stored(export(net, samples((X,)), tmp_path / "net.onnx", batch=False))
    parts = {name: held[f"attn.in_proj_weight.{name}"] for name in "qkv"}
    assert {f"attn.in_proj_bias.{name}" for name in "qkv"} <= set(held)
    assert {"attn.out_proj.weight", "attn.out_proj.bias"} <= set(held)
    assert all(v.dtype.name == "int8" and v.shape == (16, 16) and abs(v.astype(int)).max() > 63 for v in parts.values())
    model = onnx.load(tmp_path / "net.onnx")
    scales = [a.f for n in model.graph.node if n.op_type == "LinearInt" for a in n.attribute if a.name == "scale_w"]
    assert scales[0] < scales[1] < scales[2]


def test_float_checkpoint_loads() -> None:
    source = heads(itself())
    net = trained(heads(itself()), samples((X,)))
    missing = net.load_state_dict(source.state_dict(), strict=True)
    assert not missing.unexpected_keys
    assert torch.equal(net.attn.in_proj_weight, source.attn.in_proj_weight)


def test_states_are_made_by_the_trace() -> None:
    net = heads(lambda n, x, p: n.attn(x, x, x, p))
    linger.trace_layers(net, net, (samples((X,))[0], PADDING))
    linger.init(net)
    before = set(net.state_dict())
    assert sum("_linger_round_tensor_linear" in key for key in before) == 3 * 4
    net(samples((X,))[0], PADDING)
    assert set(net.state_dict()) == before


# --- masks


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", ["bool", "-inf", "-1e9", "causal"])
@pytest.mark.parametrize("size", [0.01, 0.3, 3.0, 30.0])
def test_hidden_entries_get_exactly_0(kind: str, size: float, bits: int, tmp_path: Path) -> None:
    """Whatever the scores are; and a row that is hidden as a whole is finite."""

    def function(net: Any, q: Tensor, v: Tensor) -> Tensor:
        if kind == "causal":
            p = F.scaled_dot_product_attention(q, q, v, is_causal=True)
        else:
            mask = net.hidden.logical_not() if kind == "bool" else net.hidden.float() * 0
            mask = mask if kind == "bool" else mask.masked_fill(net.hidden, float(kind))
            p = F.scaled_dot_product_attention(q, q, v, attn_mask=mask)
        return p

    hidden = HIDDEN.clone()
    hidden[4] = kind == "causal"
    net = Calls(function, bits=bits, hidden=hidden)
    q, v = samples(((2, 5, 4), (2, 5, 5)))
    v = torch.eye(5).expand(2, 5, 5).contiguous()
    net = trained(net, (q * size, v), data_bits=bits, out_bits=bits)
    p = net(q * size, v)
    assert p.isfinite().all()
    assert (p[:, HIDDEN] == 0).all()
    assert (p[:, 0, 0] > 0.98).all()
    export(net, (q * size, v), tmp_path / "net.onnx")
    assert_equal(net, (q * size * 1.3, v), tmp_path / "net.onnx")


def test_additive_mask_is_added() -> None:
    """A learned bias shifts the scores, and learns."""
    net = Calls(lambda n, q, v: F.scaled_dot_product_attention(q, q, v, n.w0), (5, 5))
    with torch.no_grad():
        net.w0.zero_()[:, 2] = 3.0
    q, v = samples(((2, 5, 4), (2, 5, 5)))
    q, v = q / 4, torch.eye(5).expand(2, 5, 5).contiguous()
    net = trained(net, (q, v))
    assert (net(q, v)[:, :, 2] > 0.7).all()
    net.train()(q, v)[0, 0, 2].backward()
    assert net.w0.grad.abs().sum() > 0


def test_mask_with_a_grid_is_a_sum(tmp_path: Path) -> None:
    net = Calls(lambda n, q, b: F.scaled_dot_product_attention(q, q, q, b))
    inputs = samples(((2, 5, 4), (2, 5, 5)))
    net = trained(net, inputs)
    assert "iqAdd" in ops(export(net, inputs, tmp_path / "net.onnx"))
    assert_equal(net, samples(((3, 5, 4), (3, 5, 5)), seed=1), tmp_path / "net.onnx")


# --- the function, and attention by hand

Q = (2, 4, 5, 8)
K, V = (2, 4, 6, 8), (2, 4, 6, 12)


def sdpa(**call: Any) -> Callable[..., Any]:
    return lambda net, q, k, v: F.scaled_dot_product_attention(q, k, v, **call)


def by_hand(value: float, inplace: bool = False) -> Callable[..., Any]:
    def function(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill_(net.table == 0, value) if inplace else scores.masked_fill(net.table == 0, value)
        return F.softmax(scores, dim=-1) @ v

    return function


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "plain": sdpa(),
    "causal": sdpa(is_causal=True),
    "scale": sdpa(scale=0.3),
    "scale-1": sdpa(scale=1.0),
    "3-d": lambda n, q, k, v: F.scaled_dot_product_attention(q[:, 0], k[:, 1], v[:, 2]),
    "grouped": lambda n, q, k, v: F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True),
    "dropout": lambda n, q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 * n.training),
    "kept": lambda n, q, k, v: F.scaled_dot_product_attention(q, k, v, n.table > 0),
    "part-of-a-buffer": lambda n, q, k, v: F.scaled_dot_product_attention(q, k, v, n.larger[None, None, :5, :6]),
    "added": lambda n, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=n.table),
    "masked_fill--inf": by_hand(-math.inf),
    "masked_fill--1e9": by_hand(-1e9, inplace=True),
    "einsum": lambda n, q, k, v: torch.einsum("bhij,bhjd->bihd", F.softmax(torch.einsum("bhid,bhjd->bhij", q, k), -1), v),
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str, dialect: str, tmp_path: Path) -> None:
    table = torch.tril(torch.ones(5, 6))
    larger = torch.rand(9, 9, generator=torch.Generator().manual_seed(0)) > 0.3
    larger[:, 0] = True
    net = Calls(FUNCTIONS[name], table=table, larger=larger)
    inputs = samples((Q, K, V))
    wanted = net.function(net.eval(), *(t.clone() for t in inputs))
    net = trained(net.train(), inputs)
    assert islands(net, inputs, tmp_path / "net.onnx", dialect=dialect) == []
    for batch in (1, 3):
        more = samples(tuple((batch, *s[1:]) for s in (Q, K, V)), seed=batch)
        assert_equal(net, more, tmp_path / "net.onnx")
    assert (net(*inputs) - wanted).square().mean() < 0.05 * wanted.square().mean()


def test_causal_of_any_length(tmp_path: Path) -> None:
    """The mask is made from the shape inside the file, and the inner product is exact for every length."""
    net = trained(Calls(lambda n, q: F.scaled_dot_product_attention(q, q, q, is_causal=True)), samples(((2, 5, 8),)))
    axes = {"a": {0: "batch", 1: "time"}}
    linger.onnx.export(net, samples(((2, 5, 8),)), tmp_path / "net.onnx", dynamic_axes=axes)
    for length in (1, 4, 40):
        assert_equal(net, samples(((3, length, 8),), seed=length), tmp_path / "net.onnx")


def test_packed_function(tmp_path: Path) -> None:
    """F.multi_head_attention_forward with parameters of the net, on a plain input too."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(48, 16) / 4), nn.Parameter(torch.randn(48))
            self.o, self.c = nn.Parameter(torch.randn(16, 16) / 4), nn.Parameter(torch.randn(16))

        def forward(self, a: Tensor) -> Tensor:
            return F.multi_head_attention_forward(
                a, a, a, 16, 4, self.w, self.b, None, None, False, 0.0, self.o, self.c, need_weights=False
            )[0]

    net = trained(Packed(), samples((X,)))
    model = export(net, samples((X,)), tmp_path / "net.onnx", batch=False)
    assert ops(model).count("LinearInt") == 4
    assert {"w.q", "w.k", "w.v", "b.q", "o", "c"} <= set(stored(model))
    assert_equal(net, samples((X,), seed=1), tmp_path / "net.onnx")


def test_left_in_float_it_is_exported_in_float(tmp_path: Path) -> None:
    net = heads(itself(need_weights=False), batch_first=True)
    linger.disable_quant(net.attn)
    inputs = samples(((2, 5, 16),))
    net = trained(net, inputs)
    assert not any("attn._linger" in key for key in net.state_dict())
    found = islands(net, inputs, tmp_path / "net.onnx")
    assert {"linear", "softmax", "matmul"} <= set(found)
    loaded = linger.runtime.load(tmp_path / "net.onnx")
    assert torch.allclose(torch.from_numpy(loaded(*(t.numpy() for t in inputs))), net(*inputs), atol=1e-4)


def test_causal_without_a_mask() -> None:
    net = linger.init(heads(itself(is_causal=True, need_weights=False)))
    with pytest.raises(
        linger.LingerError, match="is_causal without attn_mask, allowed is both or neither; pass the mask"
    ):
        net(*samples((X,)))


# --- transformers


class Encoder(nn.Module):
    """(N, T, 10) -> (N, T, 6), two layers of four heads."""

    def __init__(self, batch_first: bool = True, final: bool = False, **options: Any) -> None:
        super().__init__()
        self.into = nn.Linear(10, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32) if final else None)
        self.out = nn.Linear(32, 6)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(7))

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        mask = None if b is None else self.mask < 0
        return self.out(self.encoder(self.into(a), mask=mask, src_key_padding_mask=b))


PAD = torch.arange(7).expand(3, 7) >= torch.tensor([[7], [5], [3]])
ENCODERS: dict[str, dict[str, Any]] = {
    "relu": {},
    "gelu": {"activation": "gelu"},
    "norm-first": {"norm_first": True, "final": True},
    "time-first": {"batch_first": False},
    "no-bias": {"bias": False},
}


def no_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(name: str) -> Callable[..., Any]:
        def taken(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"torch.{name} was called")

        return taken

    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention", "_nested_tensor_from_mask"):
        monkeypatch.setattr(torch, name, never(name))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder(name: str, masked: bool, dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A standard encoder: trained, exported, no differing integer, no float island in attention and feed-forward."""
    net = Encoder(dropout=0.1, **ENCODERS[name])
    x = samples(((3, 7, 10),))[0]
    x = x if ENCODERS[name].get("batch_first", True) else x.transpose(0, 1).contiguous()
    inputs = (x, PAD) if masked else (x,)
    wanted = net.eval()(*inputs)
    no_fast_path(monkeypatch)
    net = trained(net.train(), inputs)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        net.train()(*inputs).square().mean().backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
    net.eval()
    with torch.no_grad():
        assert (net(*inputs) - wanted).square().mean() < 0.3 * wanted.square().mean()
    assert islands(net, inputs, tmp_path / "net.onnx", dialect=dialect, batch=False) == []
    assert_equal(net, inputs, tmp_path / "net.onnx")
    if dialect == "thinker":
        found = ops(onnx.load(tmp_path / "net.onnx"))
        assert (found.count("LinearInt"), found.count("BmmInt"), found.count("iqMask")) == (14, 4, 2 * masked)
        assert not {"MatMul", "Gemm"} & set(found)


class Translator(nn.Module):
    """nn.Transformer, and a decoder of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(6, 16)
        self.net = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        out = self.net(self.into(a), self.into(b), tgt_mask=self.mask, tgt_is_causal=True)
        return self.into(out[..., :6])


def test_transformer(tmp_path: Path) -> None:
    inputs = samples(((2, 7, 6), (2, 5, 6)))
    net = trained(Translator(), inputs)
    assert islands(net, inputs, tmp_path / "net.onnx") == []
    assert_equal(net, samples(((3, 7, 6), (3, 5, 6)), seed=1), tmp_path / "net.onnx")
    found = ops(onnx.load(tmp_path / "net.onnx"))
    assert (found.count("BmmInt"), found.count("iqMask")) == (6, 1)
