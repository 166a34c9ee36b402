"""Range-constrained float twins of recurrent layers: PyTorch's own layers on bounded parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from linger.numerics import bound_parameter
from linger.ops._normalize import Normalized


class NormalizedRecurrent(Normalized):
    """Every weight and bias of every layer and direction within its bound, and the output; states are those of the layer."""

    def bounded_parameters(self) -> dict[str, Tensor]:
        """Name -> parameter within its bound."""
        bounds = {"weight": self.normalize_weight, "bias": self.normalize_bias}
        held = self._parameters.items()
        return {n: bound_parameter(p, bounds[n.partition("_")[0]]) for n, p in held if p is not None}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        held, flat = self._parameters, self.__dict__.get("_flat_weights")
        bounded = self.bounded_parameters()
        try:
            self._parameters = {n: bounded.get(n) for n in held}  # type: ignore[assignment]
            if flat is not None:
                self.__dict__["_flat_weights"] = [bounded[n] for n in self._flat_weights_names]  # type: ignore[union-attr]
            return self._bound(super().forward(*args, **kwargs))
        finally:
            self._parameters = held
            if flat is not None:
                self.__dict__["_flat_weights"] = flat

    def _bound(self, out: Any) -> Any:
        """The output of a layer or the hidden state of a cell within its bound."""
        if isinstance(out, Tensor):
            return self.bound_output(out)
        first, rest = out
        if isinstance(first, PackedSequence):
            return first._replace(data=self.bound_output(first.data)), rest
        return self.bound_output(first), rest

    def _weights_have_changed(self) -> bool:
        """The flat weights are put in place above; PyTorch's own check would look at the bare parameters."""
        return False
