"""The words of a report: what ops and numbers are called, and the ways out."""

from __future__ import annotations

import re

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
    "op": "use another op",
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
    "groups": FINE,
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
    "batch_first": "make it with batch_first=False and transpose around it",
    "backwards": "flip its input",
    "layers": "use one layer after another",
    "prefetch": "pack it with --dma_prefetch False",
    "share": "pack with -m params:share-mem",
    "divisor": "multiply by a constant instead",
    "row_bytes": "use fewer channels, a smaller kernel or a narrower input",
    "input_bytes": "use fewer channels or a smaller input",
    "kernel_bytes": FINE,
    "output_bytes": FINE,
    "weight_bytes": FINE,
    "left_bytes": "use fewer rows at a time, or a 1x1 Conv2d",
    "right_bytes": "divide the product along the columns of its right side",
    "matrix_bytes": "transpose smaller parts",
}


def op_name(op: str) -> str:
    """What a user calls an op of the file."""
    return OPS.get(op, op.removeprefix("iq").removesuffix("Int"))


def readable(name: str) -> str:
    """The name of a call without what only the state dict needs: ``block.add_0``."""
    return re.sub(r"_linger_round_tensor_(?:iq_)?(?:iq)?", "", name).replace("__default_index_", "_")


def python_path(name: str) -> str:
    """A dotted name as Python reads it: ``net.features[3].conv``."""
    return "net" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split(".") if part)
