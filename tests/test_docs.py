"""Every Python block of the documentation runs, in order, in one namespace per file; both READMEs show the same code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [p for p in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]) if BLOCK.search(p.read_text("utf-8"))]


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text("utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for i, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {i + 1}", "exec"), namespace)


def test_both_readmes_show_the_same() -> None:
    """The same code up to comments, the same commands, the same number of table rows and headings."""
    english, chinese = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh.md"))

    def shape(text: str) -> tuple[object, ...]:
        code = [re.sub(r"\s*#.*", "", line) for block in BLOCK.findall(text) for line in block.splitlines()]
        commands = [re.sub(r"\s*#.*", "", line) for line in text.splitlines() if line.startswith("    ")]
        return code, commands, text.count("\n| "), text.count("\n## ")

    assert shape(english) == shape(chinese)
    assert "pip install linger-qat" in english


def test_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
