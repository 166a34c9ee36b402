"""Dialects: which bodies the functions get, and the pass over the finished file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx

from linger.onnx.passes.inline import inlined
from linger.onnx.passes.qdq import qdq


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """``real``: function bodies compute on floats (``Op.real``) instead of integers; ``finish`` is the last pass."""

    finish: Callable[[onnx.ModelProto], onnx.ModelProto]
    real: bool = False


def _unchanged(model: onnx.ModelProto) -> onnx.ModelProto:
    return model


DIALECTS: dict[str, Dialect] = {
    "thinker": Dialect(finish=_unchanged),
    "standard": Dialect(finish=inlined),
    "qdq": Dialect(finish=qdq, real=True),
}
