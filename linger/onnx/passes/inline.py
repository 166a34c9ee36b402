"""Dialect "standard": every function body in place of its node, no custom domain left."""

from __future__ import annotations

import onnx
from onnx import inliner


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same computation in standard ONNX ops only."""
    out = inliner.inline_local_functions(model)
    del out.functions[:]
    kept = [i for i in out.opset_import if i.domain != "thinker"]
    del out.opset_import[:]
    out.opset_import.extend(kept)
    return out
