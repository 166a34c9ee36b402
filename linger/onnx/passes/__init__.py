"""Passes over the finished file; a dialect is a function from model to model."""

from __future__ import annotations

from collections.abc import Callable

import onnx

from linger.onnx.passes.inline import inlined


def unchanged(model: onnx.ModelProto) -> onnx.ModelProto:
    """The chip's dialect is what the writer makes."""
    return model


DIALECTS: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {"thinker": unchanged, "standard": inlined}
