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

# measure -> what was found, what is allowed; {n} is the number, {limit} the limit, both as sizes where they are bytes
SAID = {
    "kernel": ("kernel {n}", "{limit}"),
    "stride": ("stride {n}", "{limit}"),
    "pad": ("pad {n}", "{limit}"),
    "dilation": ("dilation {n}", "{limit}"),
    "kernel_over_stride": ("stride larger than the kernel", "at most the kernel"),
    "kernel_over_pad": ("pad larger than the kernel", "at most the kernel"),
    "whole_input": ("a mean over the whole input", "the packer reserves too little working memory for it"),
    "batch": ("batch {n}", "{limit}"),
    "groups": ("{n} groups", "one group"),
    "rank": ("input of {n} dimensions", "{limit}"),
    "rows": ("{n} rows", "{limit}"),
    "length": ("axis of length {n}", "{limit}"),
    "axis_from_end": ("an axis that is not the last", "the last axis"),
    "elements": ("{n} normalized elements", "{limit}"),
    "input_bits": ("{n}-bit input", "{limit} bits"),
    "output_bits": ("{n}-bit output", "{limit} bits"),
    "weight_bits": ("{n}-bit weight", "{limit} bits"),
    "shift": ("an output scale finer than the sum's", "a coarser one: shifts go right only"),
    "product_shift": ("an output scale finer than the product's", "a coarser one: shifts go right only"),
    "finer_output": ("output and input scales 2^{n} apart", "no finer output (sums), the same (pooling by 2^k)"),
    "finer_input": ("an input scale finer than the output's", "inputs as coarse as the output"),
    "scale_o": ("output scale 2^{n}", "2^{limit}"),
    "scale_x": ("input scale 2^{n}", "2^n with n {limit}"),
    "stretched": ("operands of different shapes", "one shape"),
    "divisor": ("a divisor that is not one constant number", "one constant number"),
    "row_bytes": ("{n} of input rows under one kernel", "{limit}"),
    "input_bytes": ("input of {n}", "{limit}"),
    "kernel_bytes": ("weights of {n}", "{limit}"),
    "output_bytes": ("output of {n}", "{limit}"),
    "weight_bytes": ("weights of {n}", "{limit}"),
    "left_bytes": ("left matrix of {n}", "{limit}"),
    "right_bytes": ("right matrix of {n}", "{limit}"),
    "matrix_bytes": ("matrix of {n}", "{limit}"),
}

FINE = "nothing to do: the integers stay the same"
TRAIN = "train with linger.init(net, target={target!r})"
WAYS = {
    "op": "use another op",
    "float": "use a call with a fixed-point form, or run this part outside of the chip",
    "move": "put its input on a grid first, with linger.quant_tensor(self, x, 'x')",
    "repair": "use a repaired build of the engine, or another op",
    "workspace": "raise the packer's workspace for it",
    "unverified": "compare the chip's first results with linger.runtime",
    "kernel": "use a kernel of {limit}, or linger.fit where that is exact",
    "stride": "use stride {limit}",
    "pad": "pad by {limit}, and the rest with F.pad before it",
    "dilation": "use dilation {limit}",
    "kernel_over_stride": "use a larger kernel, or slice the input",
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
    "stretched": "expand the smaller operand to the shape of the result",
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


def bytes_text(n: int) -> str:
    """A size as a reader says it: 512 B, 6.3 KB, 64 KB, 2.1 MB."""
    if n < 1024:
        return f"{n} B"
    value, unit = (n / 1024, "KB") if n < 1024 * 1024 else (n / 1024**2, "MB")
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"


def readable(name: str) -> str:
    """The name of a call without what only the state dict needs: ``block.add_0``."""
    return re.sub(r"_linger_round_tensor_(?:iq_)?(?:iq)?", "", name).replace("__default_index_", "_")


def python_path(name: str) -> str:
    """A dotted name as Python reads it: ``net.features[3].conv``."""
    return "net" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split(".") if part)
