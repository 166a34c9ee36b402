"""The words of a report: what ops and numbers are called, and the ways out."""

from __future__ import annotations

import re
from collections.abc import Mapping

OPS = {
    "Conv1dInt": "Conv1d", "Conv2dInt": "Conv2d", "ConvTranspose1dInt": "ConvTranspose1d", "ConvTranspose2dInt": "ConvTranspose2d",
    "LinearInt": "Linear", "BmmInt": "matmul", "BatchNorm1dInt": "BatchNorm1d", "BatchNorm2dInt": "BatchNorm2d",
    "LayerNormInt": "LayerNorm", "GroupNormInt": "GroupNorm", "RMSNormInt": "RMSNorm", "AvgPool1dInt": "AvgPool1d",
    "AvgPool2dInt": "AvgPool2d", "PReLUInt": "PReLU", "SoftmaxInt": "softmax", "LogSoftmaxInt": "log_softmax", "GluInt": "GLU",
    "LSTMInt": "LSTM", "GRUInt": "GRU", "iqAdd": "add", "iqSub": "subtract", "iqMul": "multiply", "iqDiv": "divide",
    "iqCat": "cat", "Clip": "clamp", "iqMask": "masked scores", "Gather": "embedding or index", "Relu": "ReLU",
}  # fmt: skip

FINE = "nothing to do: the integers stay the same"
TRAIN = "train with linger.init(net, target={target!r})"
WAYS = {
    "op": "compute it outside of the chip",
    "float": "put its input on a grid with linger.quant_tensor(self, x, 'x'), use a call with a fixed-point form, or run this part outside of the chip",
    "move": "put its input on a grid first, with linger.quant_tensor(self, x, 'x')",
    "repair": "use a repaired build of the engine, or another op",
    "workspace": "raise the packer's workspace for it",
    "unverified": "compare the chip's first results with linger.runtime",
    "kernel": "use a kernel of {limit}, or linger.fit where that is exact",
    "stride": "use stride {limit}",
    "pad": "pad by {limit}, and the rest with F.pad before it",
    "dilation": "use dilation {limit}",
    "kernel_over_stride": "use a larger kernel, or linger.fit",
    "kernel_over_pad": "use a larger kernel, or F.pad before it",
    "whole_input": "raise the packer's workspace for it",
    "batch": "check one sample, x[:1]: the chip takes one at a time",
    "groups": "use one group",
    "rank": "reshape or unsqueeze its input",
    "rows": "use a 1x1 Conv2d on the rows as an image, (1, features, rows, 1)",
    "length": "use a shorter axis",
    "axis_from_end": "move the axis to the end with transpose",
    "elements": "normalize over fewer elements",
    "input_bits": "use {limit} bits: data_bits of init or quant_module",
    "output_bits": "use {limit} bits: out_bits of init or quant_module",
    "weight_bits": "use {limit} bits: parameter_bits of init or quant_module",
    "shift": TRAIN,
    "product_shift": TRAIN,
    "finer_output": TRAIN,
    "finer_input": TRAIN,
    "scale_o": TRAIN,
    "scale_x": "let its input reach further: the scale is coarser then",
    "stretched": "expand the smaller operand to the shape of the result; put a number into the bias of the layer before",
    "own_eps": "use eps=1e-5",
    "step": "reshape and slice with step 1, or use a convolution or a pool of that stride",
    "reversed_axes": "transpose in two steps",
    "swapped_rows": "use a repaired build of the engine, or reshape to three dimensions and transpose those",
    "pads_with_values": "pad with a constant",
    "sequences": "check one sequence, x[:1]: the chip takes one at a time",
    "sequences_in_rows": "check one sequence, x[:1]: the chip takes one at a time",
    "time_first": "make it with batch_first=True",
    "backwards": "flip its input",
    "layers": "use one layer after another",
    "prefetch": "pack it with --dma_prefetch False",
    "share": "pack with -m params:share-mem",
    "divisor": "multiply by a constant instead",
    "row_bytes": "use fewer channels, a smaller kernel or a narrower input",
    "input_bytes": "use fewer channels or a smaller input",
    "kernel_bytes": "use fewer channels or a smaller kernel",
    "output_bytes": "use fewer channels or a smaller output",
    "weight_bytes": "use fewer features",
    "left_bytes": "use fewer rows at a time, or a 1x1 Conv2d",
    "right_bytes": "divide the product along the columns of its right side",
    "matrix_bytes": "transpose smaller parts",
}


_SMOOTH = (("Relu", "use nn.ReLU"),)
_GATE = (("iqSigmoid", "use torch.sigmoid"),)
_FIT = (("Reshape", "use linger.fit, which computes it on an image of width 1"),)
_PRODUCT = (("iqMul", "use x * x"),)
_MASK = (("iqMul", "multiply by a mask of 0 and 1"),)
INSTEAD: dict[str, tuple[tuple[str, str], ...]] = {  # op -> (op that the chip needs for it, what to do), best first
    **dict.fromkeys(("iqHardswish", "iqSilu", "iqMish", "iqGelu", "iqGeluTanh", "iqElu", "iqCelu", "iqSelu", "iqSoftplus",
                     "iqLeakyRelu", "iqThreshold", "PReLUInt"), _SMOOTH),
    **dict.fromkeys(("iqHardsigmoid", "iqSoftsign", "iqLogsigmoid", "iqErf"), _GATE),
    **dict.fromkeys(("ConvTranspose1dInt", "BatchNorm1dInt", "AvgPool1dInt"), _FIT),
    **dict.fromkeys(("iqTril", "iqTriu", "iqWhere", "iqMask"), _MASK),
    "iqTanh": (("iqSigmoid", "use 2 * torch.sigmoid(2 * x) - 1"),),
    "iqSquare": _PRODUCT,
    "iqCube": _PRODUCT,
    "iqpow": _PRODUCT,
    "iqMean": (("AvgPool2dInt", "average an image, x.mean((2, 3)) of 4 dimensions, which is a pool; else nn.Linear with 1/n as weights"),),
    "iqSum": (("LinearInt", "use nn.Linear with ones as weights"),),
    "iqCumSum": (("BmmInt", "use x @ a triangle of ones"),),
    "iqMax": (("Relu", "use y + torch.relu(x - y)"),),
    "iqMin": (("Relu", "use y - torch.relu(y - x)"),),
    "iqNeg": (("iqMul", "let the layer before have the opposite weights"),),
    "Resize": (("ConvTranspose2dInt", "use nn.ConvTranspose2d with kernel and stride of the factor"),),
    "GluInt": (("iqSigmoid", "use a * torch.sigmoid(b) on a, b = x.chunk(2, dim)"),),
    "ShuffleChannel": (("Reshape", "use reshape and transpose"),),
    "GRUInt": (("LSTMInt", "use nn.LSTM"),),
    "RNNInt": (("LSTMInt", "use nn.LSTM"),),
    "GroupNormInt": (("LayerNormInt", "use nn.BatchNorm2d or nn.LayerNorm"),),
    "RMSNormInt": (("LayerNormInt", "use nn.LayerNorm"),),
    "iqStd": (("iqVar", "use the variance"),),
}  # fmt: skip


def instead(op: str, ops: Mapping[str, str]) -> str:
    """What to use for an op that a chip lacks, of what ``ops``, its table, has."""
    there = (way for needed, way in INSTEAD.get(op, ()) if ops.get(needed, "none") not in ("none", "repair"))
    return next(there, WAYS["op"])


def op_name(op: str) -> str:
    """What a user calls an op of the file."""
    return OPS.get(op, op.removeprefix("iq").removesuffix("Int"))


def readable(name: str) -> str:
    """The name of a call without what only the state dict needs: ``block.add_0``."""
    return re.sub(r"_linger_round_tensor_(?:iq_)?(?:iq)?", "", name).replace("__default_index_", "_")


def python_path(name: str) -> str:
    """A dotted name as Python reads it: ``net.features[3].conv``."""
    return "net" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split(".") if part)
