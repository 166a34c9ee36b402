"""The inputs on which fixed point is furthest from float, each with a small picture of it where it is one."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from linger.report._data import Worst
from linger.report._meter import ratio, squares

MOST = 12
LARGEST = 96  # pixels on a side
SMALLEST = 4
POINTS = 128  # of a series


def worst_of(
    batch: int, source: Tensor | None, axis: int, found: Sequence[Tensor], wanted: Sequence[Tensor]
) -> list[Worst]:
    """One row for every item of a batch, or one for the batch where outputs do not tell items apart.

    Args:
        batch: its position in the loader.
        source: the first input, whose axis ``axis`` counts items.
        axis: see ``source``.
        found: the net's outputs in fixed point.
        wanted: the same in float.
    """
    count = 0 if source is None or source.dim() <= axis else source.shape[axis]
    axes = [next((a for a in (axis, 0) if t.dim() > a and t.shape[a] == count), -1) for t in wanted]
    if source is None or not count or not wanted or -1 in axes:
        whole = [(f.reshape(1, -1), w.reshape(1, -1)) for f, w in zip(found, wanted, strict=True)]
        return [Worst(batch=batch, item=-1, sqnr=_by_item(whole, 1)[0])]
    items = [(f.movedim(a, 0), w.movedim(a, 0)) for a, f, w in zip(axes, found, wanted, strict=True)]
    ranked = sorted((sqnr, i) for i, sqnr in enumerate(_by_item(items, count)))
    inputs = source.movedim(axis, 0)
    return [shown(batch, i, sqnr, inputs[i], *items[0]) for sqnr, i in ranked[:MOST]]


def _by_item(pairs: Sequence[tuple[Tensor, Tensor]], count: int) -> list[float]:
    """SQNR of every item; axis 0 of all tensors counts them."""
    sums = torch.zeros(2, count, dtype=torch.float64)
    for found, wanted in pairs:
        f, w = (t.reshape(count, -1).cpu() for t in (found, wanted))
        sums += torch.stack([x.sum(1) for x in squares(w, f)])
    return [ratio(signal, error) for signal, error in sums.T.tolist()]


def shown(batch: int, item: int, sqnr: float, source: Tensor, found: Tensor, wanted: Tensor) -> Worst:
    """A row with what can be shown of the input and of the outputs."""
    scores = wanted.dim() == 2 and wanted.shape[1] > 1
    return Worst(
        batch=batch, item=item, sqnr=sqnr, picture=picture(source), series=series(source),
        reference=int(wanted[item].argmax()) if scores else -1, fixed=int(found[item].argmax()) if scores else -1,
    )  # fmt: skip


def picture(x: Tensor) -> str:
    """(1 or 3, H, W) or (H, W) floats as a PNG in a data URI, from the least value to the largest; else ""."""
    x = x.unsqueeze(0) if x.dim() == 2 else x
    if x.dim() != 3 or x.shape[0] not in (1, 3) or min(x.shape[1:]) < SMALLEST or not x.is_floating_point():
        return ""
    step = -(-max(x.shape[1:]) // LARGEST)
    x = x[:, ::step, ::step].detach().float().cpu()
    low, high = x.amin(), x.amax()
    pixels = ((x - low) / (high - low).clamp_min(1e-12) * 255 + 0.5).nan_to_num().clamp(0, 255).to(torch.uint8)
    return "data:image/png;base64," + base64.b64encode(png(pixels.permute(1, 2, 0))).decode()


def png(pixels: Tensor) -> bytes:
    """(H, W, 1 or 3) bytes as a file."""
    height, width, channels = pixels.shape
    lines = b"".join(b"\0" + bytes(pixels[i].reshape(-1).tolist()) for i in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


def series(x: Tensor) -> tuple[float, ...]:
    """(T,) or (1, T) floats as a few points; else ()."""
    x = x.squeeze(0) if x.dim() == 2 and x.shape[0] == 1 else x
    if x.dim() != 1 or len(x) < SMALLEST or not x.is_floating_point():
        return ()
    points = x.detach().float().cpu()[:: -(-len(x) // POINTS)].nan_to_num()
    return tuple(float(f"{v:.4g}") for v in points.tolist())
