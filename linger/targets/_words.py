"""How a limit is said: what was found, and what is allowed."""

from __future__ import annotations

from linger.targets._limits import Limit

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
    "own_eps": ("an eps of its own", "eps=1e-5"),
    "step": ("a slice of step {n}", "step {limit}"),
    "reversed_axes": ("all four axes reversed", "an order that keeps the first axis"),
    "swapped_rows": ("axes in the order 0, 2, 1, 3 or 0, 3, 2, 1", "another order: the stock engine mixes these up"),
    "pads_with_values": ("padding by reflection or repetition", "padding with a constant"),
    "sequences": ("{n} sequences at once", "{limit}"),
    "sequences_in_rows": ("{n} sequences at once", "{limit}"),
    "time_first": ("batch_first=False", "batch_first=True"),
    "backwards": ("the direction backwards", "forwards"),
    "layers": ("{n} layers", "{limit}"),
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


def bytes_text(n: int) -> str:
    """A size as a reader says it: 512 B, 6.3 KB, 64 KB, 2.1 MB."""
    if n < 1024:
        return f"{n} B"
    value, unit = (n / 1024, "KB") if n < 1024 * 1024 else (n / 1024**2, "MB")
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"


def words(limit: Limit, number: int) -> dict[str, object]:
    """The number and the limit as the sentences name them, sizes in bytes as sizes."""
    if not limit.of.endswith("_bytes"):
        return {"n": number, "limit": limit}
    return {"n": bytes_text(number), "limit": limit.text(bytes_text)}


def said(limit: Limit, number: int) -> tuple[str, str]:
    """What was found, and what is allowed."""
    found, allowed = (text.format(**words(limit, number)) for text in SAID[limit.of])
    return found, allowed
