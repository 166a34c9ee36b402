"""``linger.check`` before training: every violation by name, and what every layer costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import linger
from linger.errors import LingerError


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


class Misfit(nn.Module):
    """Everything that can be wrong at once: (N, 3, 16, 16) -> (N, 5)"""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 7, padding=3)
        self.bn = nn.BatchNorm2d(8)
        self.fast = nn.Conv2d(8, 8, 3, stride=3)
        self.features = nn.ModuleList([nn.GroupNorm(2, 8)])
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.wide(x)))
        x = self.features[0](self.fast(x))
        x = torch.linalg.vector_norm(torch.fft.rfft(x.mean((2, 3))).abs(), dim=-1, keepdim=True) + x.mean((2, 3))
        return self.fc(torch.round(x))


def test_every_violation_at_once() -> None:
    report = linger.check(Misfit(), torch.randn(1, 3, 16, 16), target="arcs", quiet=True)
    found = {(v.layer, v.kind, v.found) for v in report.violations}
    assert found >= {
        ("wide", "error", "kernel 7"),
        ("fast", "error", "stride 3"),
        ("features.0", "error", "GroupNorm"),
        ("fft_rfft_0", "error", "fft_rfft, which has no form in a file"),
        ("round_0", "error", "round in float"),
        ("mean_0", "warning", "a mean over the whole input"),
    }
    (norm,) = (v for v in report.violations if v.layer == "features.0")
    assert norm.allowed == "the engine has no group or instance normalization"
    assert norm.way.startswith("use nn.BatchNorm2d or nn.LayerNorm, or linger.disable_quant(net.features[0]) and")
    assert norm.way.endswith("or linger.disable_quant(net.features[0]) and compute it outside of the chip")
    rounded = next(v for v in report.violations if v.layer == "round_0")
    assert rounded.source.startswith("test_check.py:")
    assert report.summary.startswith("arcs: does not fit (")


def test_the_share_of_work_in_float() -> None:
    net = Small()
    linger.disable_quant(net.conv)
    report = linger.check(net, torch.randn(1, 8, 16, 16), quiet=True)
    conv, fc = 16 * 16 * 16 * 8 * 9, 160
    assert report.macs == conv + fc
    assert report.float_share == conv / (conv + fc)
    assert "100% of them in float" in str(report)
    assert {v.of for v in report.violations if v.layer == "conv"} == {"float"}


def stages(x: Tensor, path: str) -> dict[str, object]:
    """The same net at every stage, and its file."""
    torch.manual_seed(0)
    made: dict[str, object] = {"float": Small(7)}
    for name in ("traced", "normalized", "fixed"):
        net = Small(7)
        net.load_state_dict(made["float"].state_dict())  # type: ignore[attr-defined]
        linger.trace_layers(net, net, x)
        if name == "normalized":
            linger.normalize_layers(net)
        made[name] = net if name != "fixed" else linger.init(net)
    made["fixed"](x)  # type: ignore[operator]
    linger.onnx.export(made["fixed"].eval(), (x,), path)  # type: ignore[attr-defined]
    return made


def test_every_stage_and_the_file_say_the_same(tmp_path: Path) -> None:
    x = torch.randn(1, 8, 16, 16)
    made = stages(x, str(tmp_path / "net.onnx"))
    reports = {name: linger.check(net, x, target="venus", quiet=True) for name, net in made.items()}  # type: ignore[arg-type]
    reports["file"] = linger.check(tmp_path / "net.onnx", target="venus", quiet=True)
    expected = reports["float"]
    for name, report in reports.items():
        assert [(v.layer, v.found) for v in report.violations] == [(v.layer, v.found) for v in expected.violations], (
            name
        )
        assert [layer.cost for layer in report.layers] == [layer.cost for layer in expected.layers], name
        assert report.memory == expected.memory, name


def test_nothing_of_the_net_changes() -> None:
    net = Misfit().train()
    net.bn.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    tree, modes, draw = str(net), [m.training for m in net.modules()], torch.get_rng_state()
    linger.check(net, torch.zeros(1, 3, 16, 16), quiet=True)
    assert (str(net), [m.training for m in net.modules()]) == (tree, modes)
    assert torch.equal(torch.get_rng_state(), draw)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not [k for k in net.__dict__ if k.startswith("_linger")]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
        return self.fc(x) + self.fc(y)


def test_several_inputs_by_name_and_a_layer_called_twice() -> None:
    x = torch.randn(1, 4)
    report = linger.check(Two(), x, kwargs={"y": x}, target="arcs", quiet=True)
    assert report.ok
    assert [layer.name for layer in report.layers] == ["fc", "fc@1", "add_0"]


def test_one_value_per_channel() -> None:
    """A training forward is not possible; ranges are not needed for the shapes."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    report = linger.check(net, torch.randn(1, 4), target="venus", quiet=True)
    assert [(v.layer, v.found) for v in report.violations] == [("1", "BatchNorm1d")]


def test_a_net_that_is_one_layer() -> None:
    report = linger.check(nn.Conv2d(3, 4, 7), torch.randn(1, 3, 9, 9), target="venus", quiet=True)
    assert [(v.layer, v.found) for v in report.violations] == [("Conv2d", "kernel 7")]


class Sequences(nn.Module):
    """(T, N, 6) and lengths -> (T, N, 3)"""

    def __init__(self, layer: nn.Module, states: int) -> None:
        super().__init__()
        self.layer, self.fc = layer, nn.Linear(states, 3)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is None:
            return self.fc(self.layer(x)[0])
        return self.fc(pad_packed_sequence(self.layer(pack_padded_sequence(x, lengths))[0])[0])


@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 2])])
@pytest.mark.parametrize(
    ("layer", "states", "gates"),
    [
        (lambda: nn.LSTM(6, 5, 2, bidirectional=True), 10, 4), (lambda: nn.LSTM(6, 5, proj_size=2), 2, 4),
        (lambda: nn.GRU(6, 5), 5, 3), (lambda: nn.RNN(6, 5, batch_first=False), 5, 1),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_recurrent_layers_and_what_comes_after(
    layer: Callable[[], nn.RNNBase], states: int, gates: int, lengths: Tensor | None
) -> None:
    made = layer()
    given = [torch.randn(4, 2, 6), *([] if lengths is None else [lengths])]
    report = linger.check(Sequences(made, states), *given, target="venus", quiet=True)
    weights = sum(p.numel() for n, p in made.named_parameters() if n.startswith("weight"))
    assert sum(x.cost.macs for x in report.layers if x.name == "layer") == 4 * 2 * weights
    assert next(x for x in report.layers if x.name == "fc").input == (4, 2, states)
    assert gates * 5 * 6 <= weights


def test_layers_that_refuse_their_input_are_said_with_everything_else() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 7), nn.AdaptiveAvgPool2d(3), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(2))
    report = linger.check(net, torch.randn(1, 4, 16, 16), target="venus", quiet=True)
    assert [line.partition(";")[0] for line in report.left] == [
        "1: output_size (3, 3) does not divide the input (10, 10)",
        "3: output_size (2, 2) does not divide the input (3, 3)",
    ]
    assert ("0", "kernel 7") in {(v.layer, v.found) for v in report.violations}
    assert {v.layer for v in report.violations if v.of == "float"} == {"1", "3"}
    assert all(type(m) in (nn.Conv2d, nn.AdaptiveAvgPool2d) for m in net), "the net stays as it is"


def test_a_batch_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(5)])
    linger.check(net, torch.randn(8, 4, 9, 9), target="arcs")
    out = capsys.readouterr().out
    assert out.count("batch 8") == 1
    assert "0, 1, 2, 2 more" in out
    assert "check one sample, x[:1]" in out


def test_widths_are_those_of_init() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    wide = linger.check(net, torch.randn(1, 4, 9, 9), target="venus", data_bits=16, out_bits=16, quiet=True)
    assert {(v.layer, v.found) for v in wide.violations} >= {("0", "16-bit input"), ("1", "16-bit output")}
    narrow = linger.check(net, torch.randn(1, 4, 9, 9), target="arcs", parameter_bits=4, quiet=True)
    assert {v.found for v in narrow.violations} == {"4-bit weight"}
    assert narrow.layers[0].cost.weights == 4 * 4 * 9 // 2 + 16


def test_a_file_with_dynamic_axes(tmp_path: Path) -> None:
    """Without an input, one sample; any other axis has to be given."""
    net, x, path = linger.init(Small()), torch.randn(2, 8, 16, 16), tmp_path / "net.onnx"
    net(x)
    linger.onnx.export(net.eval(), (x,), path, dynamic_axes={"x": {0: "batch"}})
    assert linger.check(path, target="venus", quiet=True).layers == linger.check(path, x[:1], quiet=True).layers
    assert linger.check(path, x, target="venus", quiet=True).layers[0].output[0] == 2
    assert linger.check(path, x[:1].numpy(), target="arcs", quiet=True).ok
    rows = linger.init(nn.Sequential(nn.Conv1d(4, 4, 3)))
    rows(torch.randn(1, 4, 9))
    linger.onnx.export(rows.eval(), (torch.randn(1, 4, 9),), path, dynamic_axes={"input": {2: "length"}})
    with pytest.raises(
        LingerError, match=r"^check: found the dynamic axis 'length', allowed are fixed sizes; pass an input"
    ):
        linger.check(path, quiet=True)
    assert linger.check(path, torch.randn(1, 4, 20), quiet=True).layers[0].output == (1, 4, 18)


WRONG_INPUTS = {
    "another size": (
        [torch.randn(2, 9)],
        r"^check: input x has shape \(2, 9\), allowed is \(2, 4\); pass that, or export",
    ),
    "a list of another size": ([[1.0]], r"^check: input x has shape \(1,\), allowed is \(2, 4\)"),
    "text": (["a"], r"^check: input x has shape \(\), allowed is \(2, 4\)"),
    "one too many": ([torch.randn(2, 4)] * 2, r"^check: found 2 inputs, allowed are x; pass those"),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_inputs_that_the_file_does_not_take(name: str, tmp_path: Path) -> None:
    given, match = WRONG_INPUTS[name]
    net, x = linger.init(nn.Linear(4, 3)), torch.randn(2, 4)
    net(x)
    linger.onnx.export(net.eval(), (x,), tmp_path / "net.onnx", input_names=["x"])
    assert linger.check(tmp_path / "net.onnx", x.tolist(), quiet=True).layers
    with pytest.raises(LingerError, match=match):
        linger.check(tmp_path / "net.onnx", *given, quiet=True)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Conv2d(3, 4, 3), (3, 9, 9)), (nn.ConvTranspose2d(3, 4, 3), (3, 9, 9))]
)
def test_a_layer_without_a_batch_is_said_to_have_no_form(layer: nn.Module, shape: tuple[int, ...]) -> None:
    report = linger.check(nn.Sequential(layer), torch.randn(shape), target="venus", quiet=True)
    assert [(v.layer, v.found.partition(",")[2]) for v in report.violations] == [("0", " which has no form in a file")]


WRONG = {
    "a shape": (
        lambda: (Small(), torch.randn(1, 9, 16, 16)),
        r"^check: trace_layers: the forward of Small does not run",
    ),
    "no net": (
        lambda: (5, torch.randn(1)),
        r"^check: found an object of type int, allowed are instances of torch.nn.Mod",
    ),
    "no file": (lambda: ("none.onnx",), r"^check: there is no file 'none.onnx'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    make, match = WRONG[name]
    with pytest.raises(LingerError, match=match):
        linger.check(*make())  # type: ignore[arg-type]


def test_the_printed_report(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    linger.check(
        nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8, bias=False), nn.GroupNorm(2, 8)),
        torch.randn(1, 64),
        target="venus",
    )
    assert capsys.readouterr().out == PRINTED


PRINTED = """\
┏━━━━━━━┳━━━━━━━━━━━┳━━━━━━━━━━━━━━┳━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┓
┃ layer ┃ op        ┃ on the chip  ┃ found     ┃ allowed                                           ┃ way out                                                   ┃
┡━━━━━━━╇━━━━━━━━━━━╇━━━━━━━━━━━━━━╇━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┩
│ 3     │ GroupNorm │ does not run │ GroupNorm │ the engine has no group or instance normalization │ use nn.BatchNorm2d or nn.LayerNorm, or                    │
│       │           │              │           │                                                   │ linger.disable_quant(net[3]) and compute it outside of    │
│       │           │              │           │                                                   │ the chip                                                  │
└───────┴───────────┴──────────────┴───────────┴───────────────────────────────────────────────────┴───────────────────────────────────────────────────────────┘
┏━━━━━━━┳━━━━━━━━━━━┳━━━━━━━┳━━━━━━━━┳━━━━━━━┳━━━━━━━━━┳━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━┳━━━━━━━━━┓
┃ layer ┃ op        ┃ input ┃ output ┃  MACs ┃ weights ┃ activations ┃   largest sum ┃      of ┃
┡━━━━━━━╇━━━━━━━━━━━╇━━━━━━━╇━━━━━━━━╇━━━━━━━╇━━━━━━━━━╇━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━╇━━━━━━━━━┩
│ 0     │ Linear    │ 1x64  │ 1x32   │ 2,048 │  2.1 KB │        32 B │       317,561 │ 20 bits │
│ 1     │ ReLU      │ 1x32  │ 1x32   │       │         │        32 B │               │         │
│ 2     │ Linear    │ 1x32  │ 1x8    │   256 │   288 B │         8 B │       214,272 │ 19 bits │
│ 3     │ GroupNorm │ 1x8   │ 1x8    │       │    40 B │         8 B │ 2,147,483,648 │ 33 bits │
└───────┴───────────┴───────┴────────┴───────┴─────────┴─────────────┴───────────────┴─────────┘
sums: for any input at most 317,561 (20 bits) with these weights, so no accumulator of 32 bits can overflow, except in 3 (33 bits)
float32: holds every partial sum exactly, except in 3 (33 bits)
share memory: 2.6 KB of 640 KB (activations, 128 B of workspace, 2.4 KB of prefetch buffers)
PSRAM: 2.4 KB of 8 MB (parameters)
flash: 2.4 KB of 8 MB (parameters)
work: 2,304 MACs
venus: does not fit (1 does not run)
"""
