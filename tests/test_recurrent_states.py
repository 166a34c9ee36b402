"""Recurrent layers in use: bad input, checkpoints of every stage, copies, compilers, bounds, plain exports."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recurrent import CELLS, LAYERS, D, H, Net, equal, first_states, fixed
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import linger

BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "features": (lambda m: m(torch.randn(4, 2, D + 1)), r"rnn: found 7 features in an input of shape \(4, 2, 7\), allowed is input_size 6"),
    "axes": (lambda m: m(torch.randn(4, 2, 3, D)), r"rnn: found an input of 4 axes.*allowed are 2 and, with a batch axis, 3"),
    "no step": (lambda m: m(torch.randn(0, 2, D)), r"rnn: found an input of shape \(0, 2, 6\), which has no step"),
    "no tensor": (lambda m: m([1.0]), r"rnn: found an input of type list, allowed are a tensor and a PackedSequence"),
    "one state": (lambda m: m.rnn(torch.randn(4, 2, D), torch.zeros(1, 2, H)), r"^found a Tensor as hx, allowed is a tuple of tensors \(h_0, c_0\)"),
    "three states": (lambda m: m(torch.randn(4, 2, D), *[torch.zeros(1, 2, H)] * 3), r"rnn: found 3 values as hx, allowed is a tuple"),
    "hidden size": (
        lambda m: m(torch.randn(4, 2, D), torch.zeros(1, 2, H + 1), torch.zeros(1, 2, H)),
        r"rnn: found h_0 of shape \(1, 2, 11\), allowed is \(1, 2, 10\); pass that",
    ),
    "batch of a state": (
        lambda m: m(torch.randn(4, 2, D), torch.zeros(1, 2, H), torch.zeros(1, 3, H)), r"rnn: found c_0 of shape \(1, 3, 10\), allowed is \(1, 2, 10\)",
    ),
    "layers of a state": (lambda m: m(torch.randn(4, 2, D), *[torch.zeros(2, 2, H)] * 2), r"rnn: found h_0 of shape \(2, 2, 10\)"),
    "packed features": (
        lambda m: m.rnn(pack_padded_sequence(torch.randn(4, 2, 5), [4, 2])), r"^found packed data of shape \(6, 5\), allowed are \(rows, input_size 6\)",
    ),
    "packed rows": (
        lambda m: m.rnn(PackedSequence(torch.randn(5, D), torch.tensor([2, 2]))), r"^found 5 rows and batch_sizes \[2, 2\], allowed are sizes on the CPU",
    ),
    "packed sizes that grow": (
        lambda m: m.rnn(PackedSequence(torch.randn(4, D), torch.tensor([1, 3]))), r"^found 4 rows and batch_sizes \[1, 3\], allowed are sizes .* never grow",
    ),
    "packed sizes that are no integers": (
        lambda m: m.rnn(PackedSequence(torch.randn(4, D), torch.tensor([2.0, 2.0]))), r"^found 4 rows and batch_sizes \[2\.0, 2\.0\], allowed are sizes .* int64",
    ),
    "nan": (lambda m: m(torch.full((4, 2, D), torch.nan)), r"^rnn: found NaN in a sum, allowed are finite numbers"),
    "hidden_bits": (lambda m: linger.init(Net(nn.LSTM(2, 3)), hidden_bits=12), r"^init: hidden_bits is 12, allowed are 8, 16; choose one"),
    "hidden_bits of a module": (lambda m: linger.quant_module(nn.LSTM(2, 3), hidden_bits=32), r"^quant_module: hidden_bits is 32, allowed are 8, 16"),
}  # fmt: skip


@pytest.fixture(scope="module")
def net() -> Any:
    torch.manual_seed(1)
    return fixed(Net(nn.LSTM(D, H)), (torch.randn(4, 2, D),))


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, net: Any) -> None:
    call, match = BAD[name]
    with pytest.raises(linger.LingerError, match=match):
        call(net)


@pytest.mark.parametrize("kind", CELLS)
def test_bad_input_of_cells(kind: str) -> None:
    cell = fixed(Net(CELLS[kind](D, H)), (torch.randn(2, D),))
    with pytest.raises(linger.LingerError, match=r"rnn: found h_0 of shape \(2, 9\), allowed is \(2, 10\)"):
        cell(torch.randn(2, D), *[torch.zeros(2, 9)] * (2 if kind == "lstm" else 1))
    with pytest.raises(linger.LingerError, match=r"rnn: found an input of 3 axes"):
        cell(torch.randn(2, 2, D))


def test_lengths_that_do_not_fit() -> None:
    """PyTorch's own words, where packing fails."""
    net = fixed(Net(nn.GRU(D, H), True), (torch.randn(5, 2, D), torch.tensor([5, 3])))
    with pytest.raises(RuntimeError, match="Expected `len"):
        net(torch.randn(5, 2, D), torch.tensor([5, 3, 1]))
    with pytest.raises(RuntimeError, match="greater than 0"):
        net(torch.randn(5, 2, D), torch.tensor([5, 0]))


@pytest.mark.parametrize(
    ("lengths", "match"), [([5, 3, 1], r"found lengths \[5, 3, 1\] of 2 sequences of 5 steps"), ([6, 1], r"found lengths \[6, 1\]"), ([5, 0], "allowed are 1 to 5")]
)  # fmt: skip
def test_lengths_that_do_not_fit_in_the_runtime(lengths: list[int], match: str, tmp_path: Path) -> None:
    x = torch.randn(5, 2, D)
    net = fixed(Net(nn.GRU(D, H), True), (x, torch.tensor([5, 3])))
    linger.onnx.export(net, (x, torch.tensor([5, 3])), tmp_path / "net.onnx", input_names=["x", "lengths"])
    model = linger.runtime.load(tmp_path / "net.onnx")
    model.declared[1] = linger.runtime.Input(name="lengths", dtype=np.dtype(np.int64), shape=None)
    with pytest.raises(linger.LingerError, match=match):
        model(x.numpy(), np.array(lengths))


@pytest.mark.parametrize("kind", [*LAYERS, "cell"])
def test_a_batch_without_sequences(kind: str) -> None:
    """As in PyTorch: results of no sequence, gradients of 0, and ranges that stay."""
    layer = nn.LSTMCell(D, H) if kind == "cell" else LAYERS[kind](D, H, num_layers=2, bidirectional=True)
    shape = (D,) if kind == "cell" else (4, D)
    want = layer(torch.randn(*shape[:-1], 0, D))
    net = linger.init(Net(layer))
    net(torch.randn(*shape[:-1], 3, D))
    before = [b.clone() for b in net.buffers()]
    for training in (True, False):
        found = net.train(training)(torch.randn(*shape[:-1], 0, D))
        leaves = [torch.utils._pytree.tree_leaves(t) for t in (found, want)]
        assert [t.shape for t in leaves[0]] == [t.shape for t in leaves[1]]
        leaves[0][0].sum().backward()
    assert equal(list(net.buffers()), before)
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_evaluation_before_training() -> None:
    net = linger.init(Net(nn.LSTM(D, H, num_layers=2))).eval()
    with pytest.raises(linger.LingerError, match=r"rnn: running_i is 0, so no batch has been seen"):
        net(torch.randn(4, 2, D))


def test_packed_rows_are_for_recurrent_layers(tmp_path: Path) -> None:
    class Squared(Net):
        def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> Any:
            packed = pack_padded_sequence(x, rest[0])
            return self.rnn(packed._replace(data=packed.data * packed.data))[1]

    x, lengths = torch.randn(5, 2, D), torch.tensor([5, 3])
    net = fixed(Squared(nn.GRU(D, H)), (x, lengths))
    with pytest.raises(
        linger.LingerError, match=r"mul_0: found mul on the data of a PackedSequence, allowed in a file are"
    ):
        linger.onnx.export(net, (x, lengths), tmp_path / "net.onnx")


def test_other_dialects(tmp_path: Path, net: Any) -> None:
    x = torch.randn(4, 2, D)
    linger.onnx.export(net, (x,), tmp_path / "net.onnx", dialect="standard")
    assert linger.verify(net, tmp_path / "net.onnx", x, quiet=True).equal
    with pytest.raises(
        linger.LingerError, match=r"found LSTM, which has no form in dialect 'qdq', allowed are the other"
    ):
        linger.onnx.export(net, (x,), tmp_path / "net.onnx", dialect="qdq")


@pytest.mark.parametrize("opset", [12, 13, 18, 21])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_opset(kind: str, opset: int, tmp_path: Path) -> None:
    torch.manual_seed(2)
    layer = LAYERS[kind](D, H, num_layers=2, bidirectional=True)
    x, lengths, states = torch.randn(5, 2, D), torch.tensor([5, 3]), first_states(layer, 2)
    net = fixed(Net(layer, True), (x, lengths, *states))
    linger.onnx.export(net, (x, lengths, *states), tmp_path / "net.onnx", opset_version=opset)
    assert linger.verify(net, tmp_path / "net.onnx", (x, lengths, *states), quiet=True).equal


@pytest.mark.filterwarnings("ignore")  # of PyTorch's exporter
def test_plain_torch_export_says_which_one_to_use(tmp_path: Path, net: Any) -> None:
    with pytest.raises(Exception, match=r"which returns several tensors; use linger.onnx.export"):
        torch.onnx.export(net, (torch.randn(4, 2, D),), tmp_path / "net.onnx", dynamo=True)


# --- stages and checkpoints


def staged(stage: str, layer: Any) -> Any:
    net = Net(layer)
    if stage in ("normalized", "both"):
        net = linger.normalize_layers(net, normalize_weight_value=2, normalize_bias_value=2, normalize_output_value=4)
    return linger.init(net) if stage in ("fixed", "both") else net


@pytest.mark.parametrize("saved", ["float", "normalized", "fixed", "both"])
@pytest.mark.parametrize("loaded", ["float", "normalized", "fixed", "both"])
@pytest.mark.parametrize("kind", LAYERS)
def test_checkpoints_of_every_stage(saved: str, loaded: str, kind: str) -> None:
    """Strict, except that a float net has no place for the ranges of fixed point."""
    torch.manual_seed(3)
    x = torch.randn(5, 3, D)
    source = staged(saved, LAYERS[kind](D, H, num_layers=2, bidirectional=True))
    source(x)
    to_float = saved in ("fixed", "both") and loaded in ("float", "normalized")
    net = staged(loaded, LAYERS[kind](D, H, num_layers=2, bidirectional=True))
    net.load_state_dict(source.state_dict(), strict=not to_float)
    for (name, p), (_, q) in zip(source.named_parameters(), net.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    if saved == loaded:
        assert equal(net.eval()(x), source.eval()(x))


@pytest.mark.parametrize("both", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_upstream_checkpoints(kind: str, both: bool) -> None:
    """Version 1.1.1 has running and scale of i, h, iw, hw, io, ho and o, and those of a second direction that it never fills."""
    torch.manual_seed(4)
    layer = LAYERS[kind](D, H, bidirectional=both)
    state = {f"rnn.{n}": p.clone() for n, p in layer.named_parameters()}
    for end in ("", "_reverse")[: 1 + both]:
        for name in ("i", "h", "iw", "hw", "io", "ho", "o"):
            state[f"rnn.running_{name}{end}"] = torch.tensor(0.0 if end else {"i": 3.0, "h": 0.9}.get(name, 1.0))
            state[f"rnn.scale_{name}{end}"] = torch.tensor(0.0)
    net = linger.init(Net(LAYERS[kind](D, H, bidirectional=both)))
    assert not any(net.load_state_dict(state))
    net.eval()(torch.randn(4, 2, D))
    assert float(net.rnn.scale("i", 8)) == 32
    assert float(net.rnn.hidden_scale(0)) == 128
    ours = {k.removeprefix("rnn.") for k in net.state_dict()}
    assert {"running_i", "scale_i", "running_h", "scale_h", "running_iw", "scale_iw", "running_hw", "scale_hw", "running_o", "scale_o"} <= ours  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
def test_normalized_layers_bound_parameters_and_output(kind: str) -> None:
    torch.manual_seed(5)
    options = {"nonlinearity": "relu"} if kind == "rnn" else {}
    layer = LAYERS[kind](D, H, num_layers=2, bidirectional=True, **options)
    plain = copy.deepcopy(layer)
    net = linger.normalize_layers(
        Net(layer), normalize_weight_value=0.1, normalize_bias_value=0.05, normalize_output_value=0.2
    )
    x = torch.randn(5, 3, D)
    y, _ = net(x)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.clamp_(*((-0.1, 0.1) if "weight" in name else (-0.05, 0.05)))
    assert torch.equal(y, plain(x)[0].clamp(-0.2, 0.2))
    y.sum().backward()
    outside = layer.weight_hh_l0.detach().abs() > 0.1
    assert (net.rnn.weight_hh_l0.grad[outside].abs() == 0.01).all()
    made = linger.init(net)
    made(x)
    assert float(made.eval()(x)[0].detach().abs().max()) <= 0.25
    packed = pack_padded_sequence(x, [5, 3, 1])
    assert isinstance(linger.normalize_layers(Net(LAYERS[kind](D, H))).rnn(packed)[0], PackedSequence)


@pytest.mark.parametrize("kind", [*LAYERS, "cell"])
def test_copies(kind: str) -> None:
    torch.manual_seed(6)
    layer = nn.LSTMCell(D, H) if kind == "cell" else LAYERS[kind](D, H, num_layers=2)
    x = torch.randn(*((3,) if kind == "cell" else (5, 3)), D)
    net = fixed(Net(layer), (x,))
    wanted = net(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), copy.deepcopy(net).double().float()):
        assert equal(other(x), wanted)
    assert [id(p) for p in net.rnn.parameters()] == [id(p) for p in layer.parameters()]


@pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning"  # PyTorch's tracer does
)
@pytest.mark.parametrize("kind", LAYERS)
def test_compiled(kind: str) -> None:
    """One graph, the same integers and gradients; PyTorch's compiler takes recurrent layers where it is told to."""
    torch.manual_seed(7)
    net = linger.init(Net(LAYERS[kind](D, H, num_layers=2, bidirectional=True)))
    x = torch.randn(5, 3, D)
    net(x)
    other = copy.deepcopy(net)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        found, wanted = compiled(x)[0], net(x)[0]
        found.square().sum().backward()
    wanted.square().sum().backward()
    assert torch.equal(found, wanted)
    for (name, p), (_, q) in zip(net.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert equal(list(net.buffers()), list(other.buffers()))


@pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning"  # PyTorch's tracer does
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # it does this too
@pytest.mark.parametrize("kind", LAYERS)
def test_compiled_around_a_layer_without_bias(kind: str) -> None:
    """As PyTorch's compiler does by default: graphs for parts of the layer, here for any shape."""
    torch.manual_seed(9)
    net = linger.init(Net(LAYERS[kind](D, H, bias=False)))
    x = torch.randn(4, 3, D)
    net(x)
    wanted = net.eval()(x)[0]
    gradients = torch.autograd.grad(wanted.square().sum(), [*net.parameters()])
    torch._dynamo.reset()
    found = torch.compile(net, dynamic=True, backend="aot_eager")(x)[0]
    assert torch.equal(found, wanted)
    assert equal(torch.autograd.grad(found.square().sum(), [*net.parameters()]), gradients)


def test_training_learns_through_the_state() -> None:
    """The first element of a sequence is asked for at its end."""
    torch.manual_seed(8)

    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.fc = nn.LSTM(2, 16, batch_first=True), nn.Linear(16, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.lstm(x)[1][0][-1])

    net = linger.init(Memory())
    optimizer = torch.optim.Adam(net.parameters(), 0.005)
    for _ in range(250):
        x = torch.randn(64, 8, 2)
        loss = nn.functional.binary_cross_entropy_with_logits(net(x)[:, 0], (x[:, 0, 0] > 0).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(500, 8, 2)
    right = (net.eval()(x)[:, 0] > 0) == (x[:, 0, 0] > 0)
    assert right.float().mean() > 0.9
