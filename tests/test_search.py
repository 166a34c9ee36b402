"""Sensitivity, recipes and the search under a budget: what they measure, refuse and promise."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.recipe import Recipe
from linger.search import bytes_of, knapsack, size_of


class Net(nn.Module):
    """Three layers behind an encoder's names, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.encoder(x))
        return self.head((x + x).mean((2, 3)))


X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 5
DATA = [(X[:4], Y[:4]), (X[4:], Y[4:])]
LAYERS = ("encoder.0", "encoder.3", "head")


def float_net() -> nn.Module:
    torch.manual_seed(1)
    net = Net().eval()
    return linger.trace_layers(net, net, X)


def fixed(**options: Any) -> nn.Module:
    return linger.calibrate(linger.init(float_net(), **options), DATA, correct_bias=False, progress=False)


def loss(out: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(out, batch[1])


def widths(net: nn.Module, key: str = "parameter_bits") -> list[Any]:
    return [getattr(net.get_submodule(name), key, None) for name in LAYERS]


# --- sensitivity


def test_the_layer_with_few_bits_hurts_most_and_the_net_stays() -> None:
    net = fixed(recipe={"encoder.3": {"parameter_bits": 4}})
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = linger.sensitivity(net, DATA, progress=False)
    assert [r.layer for r in found.rows][:2] == ["all layers", "encoder.3"]
    assert {r.layer for r in found.rows[1:]} == set(LAYERS)
    assert [r.noise for r in found.rows[1:]] == sorted((r.noise for r in found.rows[1:]), reverse=True)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    row = found.rows[1]
    assert (row.kind, row.parameters, row.bits, row.increase) == ("Conv2dInt", 8 * 8 * 9 + 8, (4, 8, 8), None)


def test_the_row_of_the_whole_net_is_what_it_loses() -> None:
    net, want = fixed(), float_net()(X).detach().double()
    row = linger.sensitivity(net, DATA, metric=loss, progress=False).rows[0]
    got = net.eval()(X).detach().double()
    assert row.noise == pytest.approx(float((want - got).pow(2).sum() / want.pow(2).sum()), rel=1e-3)
    assert row.sqnr == pytest.approx(-10 * math.log10(row.noise))
    increase = (
        sum(float(loss(got[i : i + 4], b) - loss(want[i : i + 4], b)) for i, b in zip((0, 4), DATA, strict=True)) / 2
    )
    assert row.increase == pytest.approx(increase, abs=1e-5)


def test_the_table() -> None:
    lines = str(linger.sensitivity(fixed(), DATA, metric=loss, progress=False)).splitlines()
    assert lines[0].split() == ["layer", "type", "parameters", "weights/in/out", "SQNR", "dB", "metric"]
    assert lines[1].startswith("all layers")
    assert len(lines) == 5


# --- recipes

TEXT = """
[layers]
"*" = { parameter_bits = 4 }
"encoder.*" = { parameter_bits = 8, data_bits = 16 }
"encoder.3" = { out_bits = 16 }
"""


def test_a_recipe_file_gives_every_layer_its_widths(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(TEXT)
    net = fixed(recipe=tmp_path / "recipe.toml")
    assert widths(net) == [8, 8, 4]
    assert widths(net, "data_bits") == [16, 16, 8]
    assert widths(net, "out_bits") == [8, 16, 8]
    linger.onnx.export(net, (X,), tmp_path / "net.onnx")
    assert linger.verify(net, tmp_path / "net.onnx", X, quiet=True).equal


def test_a_layer_left_in_float() -> None:
    assert widths(linger.init(float_net(), recipe={"head": {"quant": False}})) == [8, 8, None]


def test_widths_of_quant_module_stay_where_a_recipe_says_nothing() -> None:
    net = float_net()
    linger.quant_module(net.head, data_bits=16)
    linger.init(net, recipe={"*": {"parameter_bits": 4}})
    assert widths(net) == [4, 4, 4]
    assert widths(net, "data_bits") == [8, 8, 16]


def test_a_saved_recipe_is_read_back(tmp_path: Path) -> None:
    made = Recipe(layers={'a"b\\c*': {"parameter_bits": 4}, "x": {"quant": False}}, notes=("why",))
    made.save(tmp_path / "r.toml")
    assert (tmp_path / "r.toml").read_text().startswith("# why\n[layers]\n")
    assert dict(linger.recipe.recipe_of(tmp_path / "r.toml").layers) == made.layers


WRONG: dict[str, tuple[Any, str]] = {
    "name": (
        {"encoder.33": {"parameter_bits": 4}},
        r"'encoder.33' fits no layer .* allowed are encoder.0, encoder.3, head",
    ),
    "nearest": ({"haed": {"parameter_bits": 4}}, "did you mean 'head'"),
    "no layer of that kind": ({"encoder": {"parameter_bits": 4}}, "'encoder' fits no layer that can be converted"),
    "key": ({"head": {"parameter_bit": 4}}, "has the key 'parameter_bit', allowed are .*did you mean 'parameter_bits'"),
    "width": ({"head": {"parameter_bits": 5}}, "'head': parameter_bits is 5, allowed are 4, 8, 16"),
    "quant": ({"head": {"quant": 0}}, "has quant = 0, allowed are true and false"),
    "settings": ({"head": 4}, "'head' is 4, allowed are settings like"),
    "no file": ("nowhere.toml", "recipe 'nowhere.toml': .*No such file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_of_recipes(name: str) -> None:
    recipe, text = WRONG[name]
    net = float_net()
    with pytest.raises(linger.LingerError, match=text):
        linger.init(net, recipe=recipe)
    assert not any("_linger_quant" in m.__dict__ for m in net.modules())


@pytest.mark.parametrize(
    ("text", "said"), [("x = 1", "holds x, allowed is one table"), ("[layers", "pass the path of a TOML")]
)
def test_errors_of_recipe_files(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(linger.LingerError, match=said):
        linger.init(float_net(), recipe=tmp_path / "r.toml")


def test_a_target_refuses_a_recipes_width() -> None:
    with pytest.raises(linger.LingerError, match="recipe: head: parameter_bits is 16, venus allows"):
        linger.init(float_net(), recipe={"head": {"parameter_bits": 16}}, target="venus")


# --- search


def searched(budget: Any, **options: Any) -> Recipe:
    return linger.search(fixed(), DATA, budget, progress=False, **options)


def used(recipe: Recipe) -> int:
    net = fixed(recipe=recipe)
    return sum(bytes_of(m, m.parameter_bits) for m in map(net.get_submodule, LAYERS))


LEAST = (8 * 27 + 8 * 72 + 40) // 2 + 4 * 21


@pytest.mark.parametrize("metric", [None, loss])
@pytest.mark.parametrize("budget", [LEAST, LEAST + 100, 700, 1000, 1300, 10_000])
def test_the_budget_is_kept_and_used(budget: int, metric: Any) -> None:
    recipe = searched(budget, metric=metric)
    assert used(recipe) <= budget
    assert recipe.notes == (f"weights and biases: {used(recipe):,} of {budget:,} bytes",)
    assert set(recipe.layers) == set(LAYERS)
    if budget == LEAST:
        assert {s["parameter_bits"] for s in recipe.layers.values()} == {4}
    if budget == 10_000 and metric is None:
        assert {s["parameter_bits"] for s in recipe.layers.values()} <= {8, 16}


def test_a_target_has_only_its_own_widths() -> None:
    assert {s["parameter_bits"] for s in searched(10_000, target="venus").layers.values()} == {8}


def test_more_bytes_never_hurt_more() -> None:
    def noise(budget: int) -> float:
        return linger.sensitivity(fixed(recipe=searched(budget)), DATA, progress=False).rows[0].noise

    assert max(noise(10_000), noise(700)) < noise(LEAST) / 2


def test_knapsack_is_the_best_of_all_choices() -> None:
    rng = random.Random(0)
    for _ in range(50):
        sizes = {str(i): sorted(rng.sample(range(1, 60), 3)) for i in range(4)}
        costs = {name: [rng.random() for _ in range(3)] for name in sizes}
        limit = rng.randint(sum(s[0] for s in sizes.values()), 200)
        picks = knapsack(sizes, costs, limit)
        every = [dict(zip(sizes, p, strict=True)) for p in itertools.product(range(3), repeat=4)]
        fits = [p for p in every if sum(sizes[n][i] for n, i in p.items()) <= limit]
        assert picks in fits
        assert sum(costs[n][i] for n, i in picks.items()) == min(sum(costs[n][i] for n, i in p.items()) for p in fits)


@pytest.mark.parametrize(
    ("budget", "want"), [(96, 96), ("96", 96), ("96 kB", 96_000), ("1.5KiB", 1536), ("2 MiB", 2**21), ("7 B", 7)]
)
def test_sizes(budget: Any, want: int) -> None:
    assert size_of(budget) == want


FALSE: dict[str, tuple[Callable[[], Any], str]] = {
    "text": (lambda: searched("96 kb"), "the budget is '96 kb', allowed are bytes and texts such as '96 kB'"),
    "zero": (lambda: searched(0), "the budget is 0"),
    "small": (
        lambda: searched(LEAST - 1),
        f"the budget is {LEAST - 1} bytes, 4-bit weights and the biases take {LEAST}",
    ),
    "bits": (lambda: searched(999, bits=(2, 8)), "bits are 2, 8, allowed are 4, 8, 16"),
    "float": (lambda: linger.search(Net(), DATA, 999), "found Net without a fixed-point layer"),
    "sensitivity": (lambda: linger.sensitivity(Net(), DATA), "found Net without a fixed-point layer; call init first"),
    "unseen": (
        lambda: linger.sensitivity(linger.init(float_net()), DATA, progress=False),
        "running_x is 0, so no batch",
    ),
}


@pytest.mark.parametrize("name", FALSE)
def test_errors(name: str) -> None:
    make, text = FALSE[name]
    with pytest.raises(linger.LingerError, match=text):
        make()
