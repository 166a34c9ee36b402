"""Export to ONNX."""

from linger.onnx.export import export

__all__ = ["export"]
