"""The inputs on which fixed point is furthest from float, each with a small picture of it where it is one."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from linger.report._data import Worst
from linger.report._meter import BEST

MOST = 12
LARGEST = 96  # pixels on a side
SMALLEST = 4
POINTS = 128  # of a series


def worst_of(
    batch: int, source: Tensor | None, axis: int, found: Sequence[Tensor], wanted: Sequence[Tensor]
) -> list[Worst]:  # fmt: skip
    """One row for every item of a batch, or one for the batch where outputs do not tell items apart.

    Args:
        batch: its position in the loader.
        source: the first input, whose axis ``axis`` counts items.
        axis: see ``source``.
        found: the net's outputs in fixed point.
        wanted: the same in float.
    """
    count = 0 if source is None or source.dim() <= axis else source.shape[axis]
    axes = [next((a for a in (axis, 0) if t.dim() > a and t.shape[a] == count), None) for t in wanted]
    if not count or None in axes:
        error, signal = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for f, w in zip(found, wanted, strict=True):
            error += (f.double() - w.double()).pow(2).sum().cpu()
            signal += w.double().pow(2).sum().cpu()
        return [Worst(batch=batch, item=-1, sqnr=decibels(float(signal), float(error)))]
    items = [(a, f.movedim(a, 0), w.movedim(a, 0)) for a, f, w in zip(axes, found, wanted, strict=True) if a is not None]
    errors = sum((f.double() - w.double()).flatten(1).pow(2).sum(1) if f.dim() > 1 else (f - w).double().pow(2) for _, f, w in items)
    signals = sum(w.double().flatten(1).pow(2).sum(1) if w.dim() > 1 else w.double().pow(2) for _, _, w in items)
    assert isinstance(errors, Tensor) and isinstance(signals, Tensor) and source is not None
    ranked = sorted(
        (decibels(s, e), i) for i, (s, e) in enumerate(zip(signals.tolist(), errors.tolist(), strict=True))
    )
    return [shown(batch, i, sqnr, source.movedim(axis, 0)[i], items[0][1], items[0][2]) for sqnr, i in ranked[:MOST]]


def decibels(signal: float, error: float) -> float:
    """SQNR, at most ``BEST``."""
    return BEST if error <= signal * 10 ** (-BEST / 10) else 10 * math.log10(max(signal, 1e-300) / error)


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
