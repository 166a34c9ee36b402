"""The page in Chromium: nothing is asked of the network, nothing is wrong, and everything can be used. See docs/report.md."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_nets import NETS, accuracy, ready

import linger

pytestmark = pytest.mark.browser
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTHS = (390, 1440)
SCREENSHOTS = os.environ.get("LINGER_SCREENSHOTS")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    installed = next((p for p in map(shutil.which, BROWSERS) if p), None)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=installed, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module", params=NETS)
def page_of_net(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    net, batches = ready(request.param, parameter_bits=4)
    path = tmp_path_factory.mktemp("report") / f"{request.param}.html"
    linger.report(net, batches, html=path, metric=accuracy, progress=False)
    return request.param, path


class Watched:
    """A page that is open, and everything that went wrong in it."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str = "light", fragment: str = "") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda m: self.wrong.append(f"{m.type}: {m.text}"))
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("request", self.requested)
        self.page.goto(path.as_uri() + fragment)

    def requested(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            self.wrong.append(f"request: {request.url}")

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.context.close()
        if kind is None:
            assert not self.wrong

    def texts(self, query: str) -> list[str]:
        return self.page.eval_on_selector_all(query, "list => list.map(e => e.textContent.trim())")  # type: ignore[no-any-return]


ROWS = "#table tbody tr:not([hidden])"


def test_sorting(browser: Any, page_of_net: tuple[str, Path]) -> None:
    with Watched(browser, page_of_net[1], 1440) as w:
        macs = "#table thead button[data-c='8']"
        before = w.texts(f"{ROWS} th")
        numbers = []
        for order in ("ascending", "descending"):
            w.page.click(macs)
            assert w.page.get_attribute("#table thead th:nth-child(9)", "aria-sort") == order
            column = w.texts(f"{ROWS} td:nth-child(9)")
            known = [c for c in column if c]
            assert column == known + [""] * (len(column) - len(known)), "rows without a number are last"
            numbers.append([int(c.replace(",", "")) for c in known])
        assert numbers[0] == sorted(numbers[0])
        assert numbers[1] == numbers[0][::-1]
        w.page.click("#table thead button[data-c='0']")
        assert w.texts(f"{ROWS} th") == before, "by layer is the order of the net"
        assert w.page.get_attribute("#table thead th:nth-child(9)", "aria-sort") is None


def test_filtering(browser: Any, page_of_net: tuple[str, Path]) -> None:
    with Watched(browser, page_of_net[1], 1440) as w:
        total = len(w.texts(ROWS))
        w.page.fill("#search", "linear")
        found = w.texts(ROWS)
        assert 0 < len(found) < total
        assert all("linear" in row.lower() for row in found)
        assert w.texts("#shown") == [f"{len(found)} of {total} rows"]
        w.page.fill("#search", "")
        w.page.select_option("#kind", "fixed")
        assert set(w.page.eval_on_selector_all(ROWS, "list => list.map(e => e.dataset.kind)")) == {"fixed"}
        w.page.fill("#search", "nothing is called this")
        assert not w.texts(ROWS)


def test_choosing_a_layer(browser: Any, page_of_net: tuple[str, Path]) -> None:
    with Watched(browser, page_of_net[1], 1440) as w:
        names = w.texts("#table tbody th")
        w.page.click(f".node[data-i='{len(names) - 1}']")
        assert w.texts("#detail h2") == [names[-1]]
        assert w.texts("#table tr.on th") == [names[-1]]
        assert w.page.locator("#detail svg[role=img]").count() >= 1
        w.page.click("#table .pick[data-i='0']")
        assert w.texts("#detail h2") == [names[0]]
        assert w.page.locator(".node[aria-current=true]").count() == 1
        w.page.click("#detail .step:not([disabled])")
        assert w.texts("#detail h2") == [names[1]]
        w.page.click("#detail .links .link >> nth=0")
        assert w.texts("#detail h2") != [names[1]]
        w.page.click("circle[data-i='2']", force=True)
        assert w.texts("#detail h2") == [names[2]]
        chart = w.page.locator("#growth svg").first
        box = chart.bounding_box()
        assert box is not None
        chart.hover(position={"x": box["width"] - 20, "y": 60})
        chart.click(position={"x": box["width"] - 20, "y": 60})
        assert w.texts("#detail h2") == [names[-1]]
        assert "layer=" in w.page.url


def test_the_keyboard_alone(browser: Any, page_of_net: tuple[str, Path]) -> None:
    with Watched(browser, page_of_net[1], 1440) as w:
        focused: list[str] = []
        for _ in range(12 + len(w.texts("#table thead th"))):
            w.page.keyboard.press("Tab")
            focused.append(w.page.evaluate("document.activeElement.id || document.activeElement.className"))
        assert focused[:3] == ["skip", "language", "theme"]
        assert {"search", "kind", "scroll"} <= set(focused)
        assert sum("node" in f for f in focused) == 1, "the graph is one stop"
        names = w.texts("#table tbody th")
        w.page.focus(".node[data-i='0']")
        w.page.keyboard.press("ArrowDown")
        assert w.texts("#detail h2") == [names[1]]
        w.page.keyboard.press("End")
        assert w.texts("#detail h2") == [names[-1]]
        w.page.keyboard.press("Home")
        w.page.keyboard.press("ArrowUp")
        assert w.texts("#detail h2") == [names[0]]
        w.page.focus("#table thead button[data-c='8']")
        w.page.keyboard.press("Enter")
        assert w.page.get_attribute("#table thead th:nth-child(9)", "aria-sort") == "ascending"
        outline = w.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", "what has the focus is seen"


def test_both_languages(browser: Any, page_of_net: tuple[str, Path]) -> None:
    with Watched(browser, page_of_net[1], 1440) as w:
        english = w.page.inner_text("main")
        w.page.click("#language")
        assert w.page.get_attribute("html", "lang") == "zh-Hans"
        assert w.texts("#h-layers") == ["逐层"]
        assert w.page.get_attribute("#search", "placeholder") == "查找层或算子"
        chinese = w.page.inner_text("main")
        assert sum(c > "\u4e00" for c in chinese) > 200
        assert not [c for c in english if "\u4e00" < c < "\u9fff"]
        w.page.click("#language")
        assert w.page.inner_text("main") == english
    with Watched(browser, page_of_net[1], 1440, fragment="#lang=zh") as w:
        assert w.page.inner_text("main") == chinese


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_width_and_scheme(
    browser: Any, page_of_net: tuple[str, Path], width: int, scheme: str, language: str
) -> None:
    name, path = page_of_net
    with Watched(browser, path, width, scheme, f"#lang={language}") as w:
        assert w.page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
        ground = "getComputedStyle(document.body).backgroundColor"
        before = w.page.evaluate(ground)
        assert (sum(int(v) for v in before[4:-1].split(",")) > 384) is (scheme == "light")
        w.page.click("#theme")
        assert w.page.evaluate(ground) != before
        w.page.click("#theme")
        apart = w.page.evaluate(
            "[...document.querySelectorAll('.rail circle')].map(c => { const a = c.getBoundingClientRect(),"
            " b = document.querySelector(`.node[data-i='${c.dataset.i}']`).getBoundingClientRect();"
            " return Math.abs(a.top + a.bottom - b.top - b.bottom) / 2; })"
        )
        assert max(apart) <= 1, "every point stands beside its name"
        small = w.page.evaluate(
            "[...document.querySelectorAll('button, select, input')].map(e => e.getBoundingClientRect().height)"
        )
        assert min(h for h in small if h) >= 20
        if SCREENSHOTS:
            w.page.screenshot(path=f"{SCREENSHOTS}/{name}-{width}-{scheme}-{language}.png", full_page=True)


def test_print(browser: Any, page_of_net: tuple[str, Path], tmp_path: Path) -> None:
    with Watched(browser, page_of_net[1], 1440, "dark") as w:
        w.page.emulate_media(media="print", color_scheme="dark")
        assert w.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not w.page.is_visible("#theme")
        assert w.page.is_visible("#table tbody tr:last-child")
        assert len(w.page.pdf(format="A4")) > 10_000
