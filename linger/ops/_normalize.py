"""What every range-constrained float twin shares: bounds on weight, bias and output."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from linger.errors import LingerError
from linger.numerics import bound_parameter


class Normalized(nn.Module):
    """Mixed in before the torch class. Bounds are None or > 0; see ``upstream`` 4.0 for the gradient outside."""

    normalize_data: float | None
    normalize_weight: float | None
    normalize_bias: float | None
    ahead_relu: bool

    def start(
        self,
        *,
        normalize_data: float | None = None,
        normalize_weight: float | None = None,
        normalize_bias: float | None = None,
        ahead_relu: bool = False,
    ) -> None:
        for name, value in (("data", normalize_data), ("weight", normalize_weight), ("bias", normalize_bias)):
            if value is not None and not value > 0:
                raise LingerError(
                    f"normalize_{name} is {value}, allowed are None or a number above 0; give one of them"
                )
            setattr(self, f"normalize_{name}", value)
        self.ahead_relu = ahead_relu

    def bounded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias within their bounds."""
        bias: Any = self.bias
        weight = bound_parameter(self.weight, self.normalize_weight)  # type: ignore[arg-type]
        return weight, None if bias is None else bound_parameter(bias, self.normalize_bias)

    def bound_output(self, y: Tensor) -> Tensor:
        """clamp to +-normalize_data, with the clamp's own gradient (zero outside)."""
        return y if self.normalize_data is None else y.clamp(-self.normalize_data, self.normalize_data)

    def bounds_repr(self) -> str:
        return (
            f"normalize_data:{self.normalize_data},normalize_weight:{self.normalize_weight},"
            f"normalize_bias:{self.normalize_bias},ahead_relu:{self.ahead_relu}"
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()},{self.bounds_repr()}"
