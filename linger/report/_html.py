"""A report as one page that needs nothing but itself: words, numbers, styles, scripts and pictures are all inside."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from linger.report import _format as say
from linger.report._data import Certificate, Data, Layer
from linger.report._graph import Drawing, Edge, drawing
from linger.report._words import ASSETS, LANGUAGES, known, word, words
from linger.targets._words import bytes_text

ROW, LANE = 30, 16  # pixels of the drawing
POOR, CLIPS = 20.0, 0.01  # below so many dB, or above this share, a row needs a look


def page(data: Data, language: str) -> str:
    """The page as text, the same for the same data.

    Raises:
        LingerError: there is no such language.
    """
    known(language)

    def text(key: str, **values: object) -> Markup:
        """A word in the language of the page; the script changes it to the other one."""
        said = Markup(' data-v="{}"').format(json.dumps(values)) if values else ""
        return Markup('<span data-t="{}"{}>{}</span>').format(key, said, word(key, language, **values))

    env = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    drawn = drawing(data.layers)
    looks = {i for i, layer in enumerate(data.layers) if needs_a_look(layer, data)}
    return env.get_template("report.html").render(
        s=data.summary, layers=data.layers, worst=data.worst, inputs=data.inputs, t=text, say=say, bytes=bytes_text,
        word=lambda key, **values: word(key, language, **values), language=language, drawing=drawn, row=ROW, lane=LANE,
        curve=curve, parts=parts, certificate=certificate_words, looks=looks, style=script("report.css"), code=script("report.js"),
        libraries=[script("d3.min.js"), script("plot.umd.min.js")], data=embedded(payload(data, drawn, looks)), outputs=data.outputs,
        columns=COLUMNS,
    )  # fmt: skip


COLUMNS = ("layer", "op", "grid", "used", "clipped", "sqnr", "own", "sum", "macs", "bytes", "island")


def needs_a_look(layer: Layer, data: Data) -> bool:
    """Whether a row is far from float, clips, is in float itself, or does not run on the chip."""
    far = layer.sqnr is not None and layer.sqnr < POOR
    bad = any(v.layer == layer.name and v.kind in ("error", "wrong") for v in data.summary.violations)
    return far or bad or layer.island > 0 or (layer.clipped or 0) > CLIPS


def certificate_words(c: Certificate) -> str:
    """Runners by name, with the number of differing integers where there are some."""
    if c.equal:
        levels = ", ".join(k for k in c.differing if k != "runtime")
        return ", ".join(
            [*(["NumPy"] if "runtime" in c.differing else []), *([f"ONNX Runtime ({levels})"] if levels else [])]
        )
    return ", ".join(f"{'NumPy' if k == 'runtime' else k} {n}" for k, n in c.differing.items())


def curve(edge: Edge) -> str:
    """The path of an edge: down its own lane, then over to that of its target."""
    x0, x1 = (LANE / 2 + lane * LANE for lane in (edge.lane, edge.to))
    y0, y1 = (ROW / 2 + (i + 1) * ROW for i in (edge.source, edge.target))
    if x0 == x1:
        return f"M{x0:g} {y0:g}V{y1:g}"
    bend = y1 - ROW
    return f"M{x0:g} {y0:g}V{bend:g}C{x0:g} {bend + ROW / 2:g} {x1:g} {bend + ROW / 2:g} {x1:g} {y1:g}"


def parts(name: str) -> tuple[str, str]:
    """A dotted name as what may be cut off and what may not: ``encoder.layers.0.`` and ``norm``."""
    head, dot, leaf = name.rpartition(".")
    return head + dot, leaf


def script(name: str) -> Markup:
    """A file of ours, put into the page as it is."""
    return Markup((ASSETS / name).read_text("utf-8").replace("</script", "<\\/script"))


def payload(data: Data, drawn: Drawing, looks: set[int]) -> dict[str, Any]:
    """What the script needs: rows with their histograms, and the words of both languages."""
    rows = [asdict(layer) | {"lane": drawn.lanes[i], "look": i in looks} for i, layer in enumerate(data.layers)]
    said = [asdict(v) for v in data.summary.violations]
    texts = {language: {name: text[language] for name, text in words().items()} for language in LANGUAGES}
    return {"layers": rows, "violations": said, "words": texts, "inputs": data.inputs, "outputs": data.outputs}


def finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def embedded(value: Any) -> Markup:
    """JSON in which nothing looks like HTML."""
    text = json.dumps(finite(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)
