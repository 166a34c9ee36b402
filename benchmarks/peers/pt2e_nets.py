"""torchao's PT2E flow with its XNNPACK quantizer: symmetric, one scale per tensor, made a power of two by observers of ours.

It has no such constraint itself. A step of an activation is rounded to the nearest power of two, as linger's, a step of a weight up,
so that nothing is clipped. Sums and layers are quantized; means, normalizations, GELU, softmax and attention stay in float.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import allow_exported_model_train_eval
from torchao.quantization.pt2e.fake_quantize import FakeQuantize
from torchao.quantization.pt2e.observer import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationSpec
from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer
from torchao.testing.pt2e._xnnpack_quantizer_utils import QuantizationConfig

from benchmarks.peers import NotRun


class _Nearest:
    """The step as the nearest power of two."""

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        step, zero = super().calculate_qparams()  # type: ignore[misc]
        return step.log2().round().exp2(), zero


class _Above:
    """The step as a power of two that clips nothing."""

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        step, zero = super().calculate_qparams()  # type: ignore[misc]
        return step.log2().ceil().exp2(), zero


class Histogram(_Nearest, HistogramObserver):
    """Of activations, without training: least squared error."""


class Following(_Nearest, MovingAverageMinMaxObserver):
    """Of activations in training."""


class Weight(_Above, MinMaxObserver):
    """The weight of now."""


def _spec(observer: Any, bits: int) -> QuantizationSpec:
    limit = 2 ** (bits - 1)
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=-limit,
        quant_max=limit - 1,
        qscheme=torch.per_tensor_symmetric,
        observer_or_fake_quant_ctr=observer,
    )


def prepared(net: nn.Module, x: Tensor, weights: int, data: int, qat: bool) -> nn.Module:
    """``net`` as it is exported on ``x`` (N, ...), with observers, or with fake quantization."""
    batch = {0: torch.export.Dim("batch", min=2, max=4096)}
    exported = torch.export.export(net, (x,), dynamic_shapes=(batch,)).module()
    activation = FakeQuantize.with_args(observer=Following) if qat else Histogram
    weight = FakeQuantize.with_args(observer=Weight) if qat else Weight
    config = QuantizationConfig(_spec(activation, data), _spec(activation, data), _spec(weight, weights), None, qat)
    quantizer = XNNPACKQuantizer().set_global(config)
    made = prepare_qat_pt2e(exported, quantizer) if qat else prepare_pt2e(exported, quantizer)
    return allow_exported_model_train_eval(made)


def trainable(net: nn.Module, x: Tensor) -> nn.Module:
    """W8A8, batch normalizations trained beside their convolutions.

    Raises:
        NotRun: a recurrent layer would stay in float.
    """
    for m in net.modules():
        if isinstance(m, nn.RNNBase):
            raise NotRun(f"not run, its quantizer leaves the {type(m).__name__} in float")
    made = prepared(copy.deepcopy(net).train(), x, 8, 8, qat=True)
    made.train()
    return made
