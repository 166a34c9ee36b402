"""The report as a page, without a browser: what is in it, that it needs nothing else, its words, its size; text, CSV, JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from string import Formatter
from typing import Any

import pytest
import torch
from report_nets import NETS, accuracy, ready
from torch import nn
from typer.testing import CliRunner

import linger
from linger.cli import app
from linger.report import Report, _format
from linger.report._data import Scale
from linger.report._html import finite
from linger.report._words import ASSETS, words

VOID = {"meta", "link", "input", "img", "br", "path", "circle", "rect", "polyline"}
TOO_LARGE = 5_000_000


@pytest.fixture(scope="module", params=NETS)
def report(request: pytest.FixtureRequest) -> Report:
    net, batches = ready(request.param)
    return linger.report(net, batches, metric=accuracy, progress=False)


class Page(HTMLParser):
    """Elements by their tags, the texts of scripts, and whether everything that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: dict[int, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        at = len(self.found) - 1
        self.texts[at] = self.texts.get(at, "") + data

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        return [a for t, a in self.found if t == tag and all(a.get(k.rstrip("_")) == v for k, v in wanted.items())]

    def data(self) -> Any:
        at = next(i for i, (t, a) in enumerate(self.found) if t == "script" and a.get("id") == "data")
        return json.loads(self.texts[at])


def page(report: Report, tmp_path: Path, language: str = "en") -> tuple[str, Page]:
    text = report.html(tmp_path / "report.html", language).read_text("utf-8")
    return text, Page(text)


# --- alone


def test_the_page_needs_nothing_but_itself(report: Report, tmp_path: Path) -> None:
    text, parsed = page(report, tmp_path)
    assert not parsed.open
    for tag, attrs in parsed.found:
        for name in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
            if name in attrs:
                assert attrs[name].startswith(("data:", "#")), f"{tag} {name}={attrs[name]}"
        assert not [name for name in attrs if name.startswith("on") and attrs[name] != "return false"]
    style = (ASSETS / "report.css").read_text("utf-8")
    assert not re.findall(r"url\(|@import", style)
    ours = (ASSETS / "report.js").read_text("utf-8")
    assert not re.findall(r"https?:|fetch|XMLHttpRequest|import\(|WebSocket|innerHTML", ours)
    (policy,) = [a["content"] for a in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "connect-src" not in policy
    assert len(text.encode()) < TOO_LARGE / 5


def test_the_same_data_make_the_same_page(report: Report, tmp_path: Path) -> None:
    assert page(report, tmp_path)[0] == page(Report(report.data), tmp_path)[0]


def test_a_net_of_a_hundred_layers_stays_small(tmp_path: Path) -> None:
    net, batches = ready("conv")
    data = linger.report(net, batches, progress=False).data
    layers = [replace(data.layers[0], name=f"block{i}.first", inputs=(i - 1,)) for i in range(100)]
    text, parsed = page(Report(replace(data, layers=tuple(layers), outputs=(99,))), tmp_path)
    assert len(parsed.all("tr")) == 101
    assert len(text.encode()) < TOO_LARGE / 3


# --- contents


def test_the_script_finds_what_it_asks_the_page_for(report: Report, tmp_path: Path) -> None:
    """Ids and classes of the script's queries, and the columns it sorts by; what it does is tested in a browser."""
    code = (ASSETS / "report.js").read_text("utf-8")
    asked = " ".join(re.findall(r"""\b(?:one|all|closest)\(\s*"([^"]*)\"""", code))
    _, parsed = page(report, tmp_path)
    there = {"#" + a["id"] for _, a in parsed.found if "id" in a}
    there |= {"." + name for _, a in parsed.found for name in a.get("class", "").split()}
    wanted = set(re.findall(r"[#.][\w-]+", asked))
    assert len(wanted) > 8
    assert wanted <= there
    assert [a["data-c"] for t, a in parsed.found if t == "button" and "data-c" in a] == [str(i) for i in range(11)]
    kinds = {a.get("value") for t, a in parsed.found if t == "option"}
    assert {x.kind for x in report.data.layers} <= kinds


def test_every_row_is_in_the_table_in_the_graph_and_in_the_data(report: Report, tmp_path: Path) -> None:
    _, parsed = page(report, tmp_path)
    layers = report.data.layers
    assert [a["data-i"] for a in parsed.all("button", class_="pick")] == [str(i) for i in range(len(layers))]
    nodes = [a for t, a in parsed.found if t == "button" and a.get("class", "").startswith("node")]
    assert len(nodes) == len(parsed.all("circle")) - 1 == len(layers)  # one is the sign on a button
    assert len(parsed.all("path", class_="out")) == len(report.data.outputs)
    said = parsed.data()
    assert [x["name"] for x in said["layers"]] == [x.name for x in layers]
    assert [x["inputs"] for x in said["layers"]] == [list(x.inputs) for x in layers]
    for x, layer in zip(said["layers"], layers, strict=True):
        assert x["sqnr"] == layer.sqnr
        assert (x["histogram"] is None) is (layer.histogram is None)


def test_cells_hold_what_they_are_sorted_by(report: Report, tmp_path: Path) -> None:
    _, parsed = page(report, tmp_path)
    rows, row = [], []
    for tag, attrs in parsed.found:
        if tag == "tr" and "data-i" in attrs:
            rows.append(row := [])
        if tag in ("td", "th") and "data-s" in attrs:
            row.append(attrs["data-s"])
    for cells, layer in zip(rows, report.data.layers, strict=True):
        assert len(cells) == 11
        assert cells[1] == layer.op
        assert cells[5] == ("" if layer.sqnr is None else str(layer.sqnr))
        assert cells[8] == (str(layer.macs) if layer.macs else "")


def test_what_a_net_is_called_cannot_leave_its_place(tmp_path: Path) -> None:
    evil = type("</script><img src=x onerror=alert(1)>", (nn.Sequential,), {})
    net = evil(nn.Linear(3, 2))
    linger.init(net)
    x = torch.randn(4, 3)
    net(x)
    report = linger.report(net.eval(), [x], progress=False)
    layer = replace(report.data.layers[0], name="</script><script>alert(1)</script>")
    text, parsed = page(Report(replace(report.data, layers=(layer,))), tmp_path)
    assert len(parsed.all("script")) == 4
    assert not parsed.all("img", src="x")
    assert "<script>alert" not in text


def test_a_chip_of_a_file_that_rounds_otherwise_and_lacks_a_memory(tmp_path: Path) -> None:
    x = torch.randn(6, 1, 8, 8)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    linger.trace_layers(net, net, x)
    linger.init(net, target=Path(__file__).with_name("toy.toml"))
    net(x)
    report = linger.report(net.eval(), [x], progress=False)
    assert report.data.summary.target == "toy"
    assert report.data.summary.certificate.equal
    assert [m.size for m in report.data.summary.memory][1] == 0
    assert page(report, tmp_path)[1].all("table", id="table")


# --- words


def test_both_languages_say_everything_with_the_same_values() -> None:
    for name, text in words().items():
        assert set(text) == {"en", "zh"}, name
        values = [{f for _, f, _, _ in Formatter().parse(t) if f} for t in text.values()]
        assert values[0] == values[1], name
        assert all(text.values()), name


def test_every_word_is_used_and_exists(report: Report, tmp_path: Path) -> None:
    code = "".join(p.read_text("utf-8") for p in (*ASSETS.glob("report.*"), *ASSETS.parent.glob("*.py")))
    quoted = set(re.findall(r"""["']([a-z_]+)["']""", code))
    assert not {name for name in words() if name not in quoted and not name.startswith("kind_")}, (
        "words that nobody says"
    )
    said = set(re.findall(r"""\bsay\("([a-z_]+)"[,)]""", code))
    assert said
    assert said <= words().keys()
    for _, attrs in page(report, tmp_path)[1].found:
        for name in ("data-t", "data-t-label", "data-t-placeholder", "data-t-alt"):
            assert name not in attrs or attrs[name] in words()
        if "data-v" in attrs:
            assert isinstance(json.loads(attrs["data-v"]), dict)


def test_the_page_opens_in_the_language_asked_for(report: Report, tmp_path: Path) -> None:
    english, chinese = (page(report, tmp_path, language) for language in ("en", "zh"))
    assert english[1].all("html", lang="en")
    assert chinese[1].all("html", lang="zh-Hans")
    assert "Error along the net" in english[0].partition('id="data"')[0]
    assert "误差沿网络的变化" in chinese[0].partition('id="data"')[0]


# --- colours


def rgb(value: str) -> list[float]:
    digits = value.lstrip("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    return [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]


def luminance(value: str) -> float:
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb(value)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_in_light_and_dark() -> None:
    """WCAG AA: 4.5 to 1 for text, 3 to 1 for what is drawn."""
    style = (ASSETS / "report.css").read_text("utf-8")
    themes = [
        dict(re.findall(r"--(\w+):(#\w+)", block)) for block in re.findall(r":root[^{]*\{([^}]*--paper[^}]*)\}", style)
    ]
    assert len(themes) == 4, "light, dark by the system, dark by choice, print"
    assert themes[1] == themes[2]
    for theme in themes:
        for ground in ("paper", "raised", "hover", "tint"):
            for text in ("ink", "soft", "accent", "warm", "good"):
                assert contrast(theme[text], theme[ground]) >= 4.5, f"{text} on {ground}: {theme}"
        assert contrast(theme["shade"], theme["paper"]) >= 3


# --- the other ways


def test_json_is_the_data(report: Report) -> None:
    assert json.loads(report.json()) == json.loads(json.dumps(finite(asdict(report.data))))
    assert finite({"a": (float("nan"), [float("-inf"), 1.5])}) == {"a": [None, [None, 1.5]]}


def test_csv_has_a_line_per_row_with_plain_numbers(report: Report, tmp_path: Path) -> None:
    lines = list(csv.DictReader(io.StringIO(report.csv(tmp_path / "layers.csv").read_text("utf-8"))))
    assert [x["name"] for x in lines] == [x.name for x in report.data.layers]
    for line, layer in zip(lines, report.data.layers, strict=True):
        assert int(line["macs"]) == layer.macs
        assert line["sqnr"] == ("" if layer.sqnr is None else str(layer.sqnr))
        assert line["scale"] == ("" if layer.grid is None else str(layer.grid.scale))


def test_text_names_every_row_and_the_sums(report: Report) -> None:
    text = str(report)
    assert all(x.name in text for x in report.data.layers)
    s = report.data.summary
    assert f"work: {s.macs:,} MACs" in text
    assert f"widest sum: {s.accumulator} bits" in text
    assert "exact: " in text


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (_format.count(950), "950"), (_format.count(12_345), "12.3 k"), (_format.count(4.56e6), "4.56 M"),
        (_format.count(1.2e9), "1.2 G"), (_format.share(None), ""), (_format.share(0.0), "0 %"),
        (_format.share(0.00001), "< 0.01 %"), (_format.share(0.0123), "1.23 %"), (_format.share(0.987), "99 %"),
        (_format.decibels(200.0), "exact"), (_format.decibels(31.27), "31.3"), (_format.number(0.123456), "0.1235"),
        (_format.step(Scale(scale=32.0, bits=8, lowest=-4, highest=4)), "1/32"),
        (_format.step(Scale(scale=0.25, bits=8, lowest=-512, highest=508)), "4"),
        (_format.step(Scale(scale=1.0, bits=8, lowest=-128, highest=127)), "1"), (_format.shape((1, 3, 8)), "1x3x8"),
    ],
)  # fmt: skip
def test_numbers_as_a_reader_says_them(said: str, wanted: str) -> None:
    assert said == wanted


def test_libraries_come_with_their_licences() -> None:
    text = (ASSETS / "LICENSES.txt").read_text("utf-8")
    for script in ASSETS.glob("*.min.js"):
        head = script.read_text("utf-8")[:200]
        version = re.findall(r"v(\d+\.\d+\.\d+)", head)[0]
        assert f"{script.name}: " in text
        assert version in text
    assert text.count("Permission to use, copy, modify, and/or distribute") == 2


# --- the command


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    net, batches = ready("lstm")
    linger.onnx.export(net, (batches[0][0],), tmp_path / "lstm.onnx", dynamic_axes={"x": {0: "batch"}})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_writes_what_it_is_asked_for(exported: Path) -> None:
    asked = ["report", "lstm.onnx", "--input", "3,9,8", "--html", "lstm.html", "--csv", "lstm.csv", "--language", "zh"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    assert "widest sum" in shown.stdout
    assert 'lang="zh-Hans"' in (exported / "lstm.html").read_text("utf-8")
    assert (exported / "lstm.csv").read_text("utf-8").startswith("name,op,")
    told = json.loads(CliRunner().invoke(app, [*asked[:4], "--json"]).stdout)
    assert (told["summary"]["samples"], told["summary"]["net"]) == (3, "lstm.onnx")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lstm.onnx"], "found no --input and no --data"), (["gone.onnx", "-i", "1,9,8"], "there is no file"),
        (["lstm.onnx", "-i", "1,9,7"], "allowed is (batch, 9, 8)"), (["lstm.onnx", "-i", "1,9,8", "--html", "x.html", "--language", "fr"], "en, zh"),
    ],
)  # fmt: skip
def test_the_command_says_what_is_wrong(exported: Path, arguments: list[str], said: str) -> None:
    shown = CliRunner().invoke(app, ["report", *arguments])
    assert shown.exit_code == 2
    assert said in shown.stderr
    assert [p.name for p in exported.iterdir()] == ["lstm.onnx"]
