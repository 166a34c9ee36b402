"""What the engine of the LUNA chips does with every op (``engine`` 2), and the limits its chips share (``engine`` 4)."""

from __future__ import annotations

from collections.abc import Mapping

from linger.targets._limits import Limit

CHIPS = ("venus", "arcs", "venusa")
LETTERS = {"S": "runs", "F": "repair", "W": "workspace", "P": "prefetch", "M": "share", "~": "unverified", "-": "none"}

# op type, then a letter for venus, arcs and venusA:
# S the stock engine computes these integers, F only a repaired build does, W its working memory is too small, P it
# crashes with prefetch, M its weights have to lie in share memory, ~ it runs and nobody has compared, - it cannot.
STATUS = """
Quant S S S
Dequant S S S
Requant S S S
Conv1dInt S S F
Conv2dInt S S S
ConvTranspose2dInt M S S
LinearInt S S S
BmmInt S S S
BatchNorm2dInt S S S
AvgPool2dInt S S S
MaxPool S S S
Relu S S S
iqAdd S S S
iqSub F F F
iqMul S S S
iqDiv S S S
iqCat S S S
iqSigmoid S S F
iqTanh S - -
SoftmaxInt ~ S S
LogSoftmaxInt ~ F S
LayerNormInt S S S
GluInt - - S
LSTMInt W P P
GRUInt S - -
Transpose S S S
Reshape S S S
Flatten S S S
Squeeze S S S
Unsqueeze S S S
Identity S S S
Slice S S S
Split S S S
Gather S S S
Tile S S S
Expand S S S
ShuffleChannel S - -
ArgMax S S S
iqPad S F F
iqVar ~ ~ ~
"""


def statuses(chip: str) -> Mapping[str, str]:
    """Op type -> what one of ``CHIPS`` does with it, a word of ``LETTERS``. An op that is not here cannot run."""
    rows = (line.split() for line in STATUS.strip().splitlines())
    return {op: LETTERS[letters[CHIPS.index(chip)]] for op, *letters in rows}


def window(op: str, kernel: int, pad: int, dilations: tuple[int, ...] = (1,)) -> tuple[Limit, ...]:
    """Kernel, strides, pads and dilations of a convolution."""
    return (
        Limit(op=op, of="kernel", low=1, high=kernel, when="not dilated"),
        Limit(op=op, of="stride", among=(1, 2, 4)),
        Limit(op=op, of="pad", low=0, high=pad),
        Limit(op=op, of="dilation", among=dilations),
        Limit(op=op, of="kernel_over_stride", low=0),
        Limit(op=op, of="kernel_over_pad", low=0),
        Limit(op=op, of="input_bits", among=(8,)),
    )


SHIFTS = (
    *(Limit(op=op, of="shift", low=0, when="8-bit output")
      for op in ("Conv1dInt", "Conv2dInt", "ConvTranspose2dInt", "LinearInt", "BatchNorm2dInt")),
    *(Limit(op=op, of="product_shift", low=0) for op in ("iqMul", "BmmInt")),
    *(Limit(op=op, of="finer_output", high=0) for op in ("iqAdd", "iqSub")),
    Limit(op="AvgPool2dInt", of="finer_output", among=(0,), when="power of two"),
    Limit(op="AvgPool2dInt", of="finer_output", low=0, when="not a power of two"),
)  # fmt: skip

COMMON = (
    *SHIFTS,
    Limit(op="Conv2dInt", of="output_bits", among=(8,), kind="wrong"),
    Limit(op="Conv2dInt", of="groups", among=(1,), when="grouped", kind="split"),
    Limit(op="Conv1dInt", of="groups", among=(1,), when="grouped", kind="split"),
    Limit(
        op="Conv1dInt",
        of="groups",
        among=(1,),
        when="depthwise",
        kind="wrong",
        way="use nn.Conv2d on an image of width 1, which linger.fit makes of it, or a repaired build of the engine",
    ),
    Limit(op="ConvTranspose2dInt", of="groups", among=(1,), way="use linger.fit, which makes one per group"),
    Limit(op="LinearInt", of="rank", low=2, high=3),
    Limit(op="LinearInt", of="input_bits", among=(8,)),
    Limit(op="LinearInt", of="left_bytes", high=64 * 1024, align=(4, 8)),
    Limit(op="BmmInt", of="rank", low=2, high=3),
    Limit(op="BatchNorm2dInt", of="rank", among=(4,)),
    Limit(op="BatchNorm2dInt", of="input_bits", among=(8,)),
    Limit(op="AvgPool2dInt", of="rank", among=(4,)),
    Limit(op="AvgPool2dInt", of="input_bits", among=(8,)),
    *(
        Limit(op=op, of=of, low=0)
        for op in ("AvgPool2dInt", "MaxPool")
        for of in ("kernel_over_stride", "kernel_over_pad")
    ),
    Limit(
        op="MaxPool",
        of="rank",
        among=(4,),
        way="use linger.fit, which pools an image of width 1, or unsqueeze its input",
    ),
    Limit(op="MaxPool", of="input_bits", among=(8,)),
    Limit(op="iqAdd", of="stretched", among=(0,), kind="wrong"),
    Limit(op="iqSub", of="stretched", among=(0,), kind="wrong"),
    Limit(op="iqMul", of="stretched", among=(0,), kind="wrong"),
    Limit(op="iqDiv", of="divisor", among=(0,)),
    Limit(op="SoftmaxInt", of="length", high=2048),
    Limit(op="SoftmaxInt", of="length", high=256, kind="warning"),
    Limit(op="LogSoftmaxInt", of="length", high=2048),
    Limit(op="SoftmaxInt", of="input_bits", among=(8,)),
    Limit(op="LogSoftmaxInt", of="input_bits", among=(8,)),
    Limit(op="LayerNormInt", of="input_bits", among=(8,)),
    Limit(op="LayerNormInt", of="own_eps", high=0, kind="wrong"),
    Limit(op="LayerNormInt", of="elements", high=362, kind="wrong"),
    Limit(op="Transpose", of="rank", low=2, high=4),
    Limit(op="Transpose", of="matrix_bytes", high=64 * 1024),
    Limit(op="Transpose", of="reversed_axes", high=0),
    Limit(op="Slice", of="step", among=(1,), kind="wrong"),
    Limit(op="iqPad", of="pads_with_values", high=0, kind="wrong"),
    *(Limit(op=op, of="layers", high=1) for op in ("LSTMInt", "GRUInt")),
    *(Limit(op=op, of="rank", among=(3,)) for op in ("LSTMInt", "GRUInt")),
    Limit(op="GRUInt", of="backwards", high=0, kind="wrong"),
    Limit(op="ArgMax", of="axis_from_end", among=(0,)),
    Limit(op="Requant", of="input_bits", among=(8,)),
    Limit(op="Dequant", of="input_bits", among=(8,), kind="wrong"),
)
