"""The words of a report: names of ops and of what is counted, and the ways out."""

from __future__ import annotations

OPS = {
    "Conv1dInt": "Conv1d", "Conv2dInt": "Conv2d", "ConvTranspose1dInt": "ConvTranspose1d", "ConvTranspose2dInt": "ConvTranspose2d",
    "LinearInt": "Linear", "BmmInt": "matrix product", "BatchNorm1dInt": "BatchNorm1d", "BatchNorm2dInt": "BatchNorm2d",
    "LayerNormInt": "LayerNorm", "GroupNormInt": "GroupNorm", "RMSNormInt": "RMSNorm", "AvgPool1dInt": "AvgPool1d",
    "AvgPool2dInt": "AvgPool2d", "PReLUInt": "PReLU", "SoftmaxInt": "softmax", "LogSoftmaxInt": "log-softmax", "GluInt": "GLU",
    "LSTMInt": "LSTM", "GRUInt": "GRU", "iqAdd": "add", "iqSub": "subtract", "iqMul": "multiply", "iqDiv": "divide",
    "iqCat": "cat", "Clip": "ReLU6 or clamp",
}  # fmt: skip

NAMES = {
    "kernel": "kernel", "stride": "stride", "pad": "pad", "dilation": "dilation", "kernel_over_stride": "kernel minus stride",
    "kernel_over_pad": "kernel minus pad", "batch": "batch", "groups": "groups", "rank": "number of dimensions", "rows": "rows",
    "length": "length of the axis", "axis_from_end": "distance of the axis from the last one", "elements": "normalized elements",
    "input_bits": "input bits", "output_bits": "output bits", "weight_bits": "weight bits",
    "shift": "shift right", "product_shift": "shift right", "finer_output": "log2 of output scale over input scale",
    "finer_input": "log2 of input scale over output scale", "scale_o": "log2 of the output scale",
    "scale_x": "log2 of the input scale", "stretched": "operands of another shape than the result",
    "divisor": "divisors that are no constant number", "row_bytes": "input rows under one kernel",
    "kernel_bytes": "weights", "output_bytes": "output", "weight_bytes": "weights",
    "left_bytes": "left matrix", "right_bytes": "right matrix", "matrix_bytes": "matrix to transpose",
}  # fmt: skip

KEEP = "or keep it in float with disable_quant(net.{layer}) and compute it outside of the chip"
FINE = "nothing to do: the integers stay the same"
WAYS = {
    "op": "use another op, " + KEEP,
    "repair": "use a repaired build of the engine, or another op",
    "workspace": "raise the packer's workspace, or use another op",
    "unverified": "compare the first results of the chip with linger.runtime",
    "kernel": "use a kernel within {limit}, or linger.fit",
    "stride": "use stride 1, 2 or 4",
    "pad": "pad less, or use F.pad before it",
    "dilation": "use dilation {limit}",
    "kernel_over_stride": "use a kernel at least as large as the stride",
    "kernel_over_pad": "use a pad no larger than the kernel",
    "batch": "pass one sample: x[:1]",
    "groups": FINE,
    "rank": "reshape the input before it",
    "rows": "use a 1x1 Conv2d on (N, C, T, 1) instead of Linear",
    "length": "use a shorter axis",
    "axis_from_end": "move the axis to the end with transpose",
    "elements": "normalize over fewer elements",
    "input_bits": "use bits {limit} with quant_module(net.{layer}, data_bits=...)",
    "output_bits": "use bits {limit} with quant_module(net.{layer}, out_bits=...)",
    "weight_bits": "use bits {limit} with quant_module(net.{layer}, parameter_bits=...)",
    "shift": "train with target={target!r}, or use a coarser output range",
    "product_shift": "train with target={target!r}, or use a coarser output range",
    "finer_output": "train with target={target!r}",
    "finer_input": "train with target={target!r}",
    "scale_o": "leave the output's range to linger",
    "scale_x": "use a smaller input range",
    "stretched": "expand the operand to the shape of the result",
    "divisor": "multiply by a constant",
    "row_bytes": "use fewer channels, a smaller kernel or a narrower input",
    "kernel_bytes": FINE,
    "output_bytes": FINE,
    "weight_bytes": FINE,
    "left_bytes": "split the rows, or use a 1x1 Conv2d instead of Linear",
    "right_bytes": "split the product along the columns of its right side",
    "matrix_bytes": "transpose in parts, or another axis order",
}


def op_name(op: str) -> str:
    """What a user calls an op of the file."""
    return OPS.get(op, op.removeprefix("iq"))


def bytes_text(n: int) -> str:
    """A size as a reader says it: 512 B, 6.3 KB, 64 KB, 2.1 MB."""
    if n < 1024:
        return f"{n} B"
    value, unit = (n / 1024, "KB") if n < 1024 * 1024 else (n / 1024**2, "MB")
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"
