"""linger: float PyTorch networks into fixed point, trained, exported and run with the same integers everywhere."""

from linger import onnx, runtime, settings
from linger._version import VERSION as __version__
from linger.accumulators import limit_accumulators
from linger.analysis import wb_analyse
from linger.calibrate import calibrate
from linger.check import check
from linger.convert import (
    DefaultQuantIntXOP,
    disable_quant,
    init,
    quant_module,
    quant_module_by_type,
    quant_tensor,
)
from linger.dumper import Dumper, fix_dequant
from linger.errors import LingerError, LingerWarning
from linger.fit import fit
from linger.fuse import trace_layers
from linger.log import log
from linger.normalize import DefaultNormalizeIntXModule, disable_normalize, normalize_layers, normalize_module
from linger.ops.activations import SigmoidSite as iqSigmoidLayer
from linger.ops.activations import TanhSite as iqTanhLayer
from linger.ops.batchnorm import BatchNorm1dInt, BatchNorm2dInt, NormalizeBatchNorm1d, NormalizeBatchNorm2d
from linger.ops.cat import CatSite as iqCatLayer
from linger.ops.clamp import ClampSite as iqClampLayer
from linger.ops.clamp import ReLU6Int
from linger.ops.conv import Conv1dInt, Conv2dInt, NormalizeConv1d, NormalizeConv2d
from linger.ops.conv_transpose import (
    ConvTranspose1dInt,
    ConvTranspose2dInt,
    NormalizeConvTranspose1d,
    NormalizeConvTranspose2d,
)
from linger.ops.convbn import (
    EmptyBatchNorm,
    NormalizeConvBN1d,
    NormalizeConvBN2d,
    NormalizeConvTransposeBN1d,
    NormalizeConvTransposeBN2d,
)
from linger.ops.divide import DivSite as iqDivLayer
from linger.ops.elementwise import AddSite as iqAddLayer
from linger.ops.elementwise import MulSite as iqMulLayer
from linger.ops.elementwise import SubSite as iqSubLayer
from linger.ops.embedding import EmbeddingInt, NormalizeEmbedding
from linger.ops.groupnorm import (
    GroupNormInt,
    InstanceNorm1dInt,
    InstanceNorm2dInt,
    InstanceNorm3dInt,
    NormalizeGroupNorm,
    NormalizeInstanceNorm1d,
    NormalizeInstanceNorm2d,
    NormalizeInstanceNorm3d,
)
from linger.ops.layernorm import LayerNormInt, NormalizeLayerNorm
from linger.ops.linear import LinearInt, NormalizeLinear
from linger.ops.pool import AdaptiveAvgPool1dInt, AdaptiveAvgPool2dInt, AvgPool1dInt, AvgPool2dInt
from linger.ops.prelu import NormalizePReLU, PReLUInt
from linger.ops.quant import ScaledRoundLayer
from linger.ops.reduce import SumSite as iqSumLayer
from linger.ops.rmsnorm import NormalizeRMSNorm, RMSNormInt
from linger.ops.shuffle import channel_shuffle
from linger.ops.variance import VarSite as iqVarLayer
from linger.report import report
from linger.retarget import retarget
from linger.schedule import Schedule, freeze_batchnorm, freeze_thresholds, hold_ranges
from linger.search import search
from linger.sensitivity import sensitivity
from linger.settings import (
    PlatFormQuant,
    QuantMode,
    SetBnMomentumUpdate,
    SetFunctionBmmQuant,
    SetFunctionChannelShuffleQuant,
    SetIQTensorAdd,
    SetIQTensorCat,
    SetIQTensorClamp,
    SetIQTensorDiv,
    SetIQTensorLogSoftmax,
    SetIQTensorMul,
    SetIQTensorSigmoid,
    SetIQTensorSoftmax,
    SetIQTensorSum,
    SetIQTensorTanh,
    SetIQTensorVar,
    SetPlatFormQuant,
    config,
)
from linger.training import param_groups
from linger.verify import verify
from linger.why import why

BatchNormInt = BatchNorm2dInt

__all__ = [
    "AdaptiveAvgPool1dInt",
    "AdaptiveAvgPool2dInt",
    "AvgPool1dInt",
    "AvgPool2dInt",
    "BatchNorm1dInt",
    "BatchNorm2dInt",
    "BatchNormInt",
    "Conv1dInt",
    "Conv2dInt",
    "ConvTranspose1dInt",
    "ConvTranspose2dInt",
    "DefaultNormalizeIntXModule",
    "DefaultQuantIntXOP",
    "Dumper",
    "EmbeddingInt",
    "EmptyBatchNorm",
    "GroupNormInt",
    "InstanceNorm1dInt",
    "InstanceNorm2dInt",
    "InstanceNorm3dInt",
    "LayerNormInt",
    "LinearInt",
    "LingerError",
    "LingerWarning",
    "NormalizeBatchNorm1d",
    "NormalizeBatchNorm2d",
    "NormalizeConv1d",
    "NormalizeConv2d",
    "NormalizeConvBN1d",
    "NormalizeConvBN2d",
    "NormalizeConvTranspose1d",
    "NormalizeConvTranspose2d",
    "NormalizeConvTransposeBN1d",
    "NormalizeConvTransposeBN2d",
    "NormalizeEmbedding",
    "NormalizeGroupNorm",
    "NormalizeInstanceNorm1d",
    "NormalizeInstanceNorm2d",
    "NormalizeInstanceNorm3d",
    "NormalizeLayerNorm",
    "NormalizeLinear",
    "NormalizePReLU",
    "NormalizeRMSNorm",
    "PReLUInt",
    "PlatFormQuant",
    "QuantMode",
    "RMSNormInt",
    "ReLU6Int",
    "ScaledRoundLayer",
    "Schedule",
    "SetBnMomentumUpdate",
    "SetFunctionBmmQuant",
    "SetFunctionChannelShuffleQuant",
    "SetIQTensorAdd",
    "SetIQTensorCat",
    "SetIQTensorClamp",
    "SetIQTensorDiv",
    "SetIQTensorLogSoftmax",
    "SetIQTensorMul",
    "SetIQTensorSigmoid",
    "SetIQTensorSoftmax",
    "SetIQTensorSum",
    "SetIQTensorTanh",
    "SetIQTensorVar",
    "SetPlatFormQuant",
    "__version__",
    "calibrate",
    "channel_shuffle",
    "check",
    "config",
    "disable_normalize",
    "disable_quant",
    "fit",
    "fix_dequant",
    "freeze_batchnorm",
    "freeze_thresholds",
    "hold_ranges",
    "init",
    "iqAddLayer",
    "iqCatLayer",
    "iqClampLayer",
    "iqDivLayer",
    "iqMulLayer",
    "iqSigmoidLayer",
    "iqSubLayer",
    "iqSumLayer",
    "iqTanhLayer",
    "iqVarLayer",
    "limit_accumulators",
    "log",
    "normalize_layers",
    "normalize_module",
    "onnx",
    "param_groups",
    "quant_module",
    "quant_module_by_type",
    "quant_tensor",
    "report",
    "retarget",
    "runtime",
    "search",
    "sensitivity",
    "settings",
    "trace_layers",
    "verify",
    "wb_analyse",
    "why",
]
