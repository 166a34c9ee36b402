"""The public surface: its names, signatures and docstrings, and that importing it changes nothing."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import linger
from linger.onnx.export import IGNORED, UNSUPPORTED

ROOT = Path(__file__).parents[1]

LISTED = """
AdaptiveAvgPool1dInt AdaptiveAvgPool2dInt AvgPool1dInt AvgPool2dInt BatchNorm1dInt BatchNorm2dInt BatchNormInt
Conv1dInt Conv2dInt ConvTranspose1dInt ConvTranspose2dInt DefaultNormalizeIntXModule DefaultQuantIntXOP Dumper EmbeddingInt
EmptyBatchNorm GroupNormInt InstanceNorm1dInt InstanceNorm2dInt InstanceNorm3dInt LayerNormInt LinearInt LingerError
LingerWarning NormalizeBatchNorm1d NormalizeBatchNorm2d NormalizeConv1d NormalizeConv2d NormalizeConvBN1d
NormalizeConvBN2d NormalizeConvTranspose1d NormalizeConvTranspose2d NormalizeConvTransposeBN1d
NormalizeConvTransposeBN2d NormalizeEmbedding NormalizeGroupNorm NormalizeInstanceNorm1d NormalizeInstanceNorm2d
NormalizeInstanceNorm3d NormalizeLayerNorm NormalizeLinear NormalizePReLU NormalizeRMSNorm PReLUInt PlatFormQuant
QuantMode RMSNormInt ReLU6Int ScaledRoundLayer Schedule SetBnMomentumUpdate SetFunctionBmmQuant SetFunctionChannelShuffleQuant
SetIQTensorAdd SetIQTensorCat SetIQTensorClamp SetIQTensorDiv SetIQTensorLogSoftmax SetIQTensorMul SetIQTensorSigmoid
SetIQTensorSoftmax SetIQTensorSum SetIQTensorTanh SetIQTensorVar SetPlatFormQuant __version__ calibrate
channel_shuffle check config disable_normalize disable_quant fit fix_dequant freeze_batchnorm freeze_thresholds hold_ranges
init iqAddLayer iqCatLayer iqClampLayer iqDivLayer iqMulLayer iqSigmoidLayer iqSubLayer iqSumLayer iqTanhLayer
iqVarLayer limit_accumulators log normalize_layers normalize_module onnx param_groups quant_module quant_module_by_type
quant_tensor report retarget runtime search sensitivity settings trace_layers verify wb_analyse why
"""
NAMES = LISTED.split()

# Every parameter and default; a tuple of types is written as the name under which linger exports it.
AHEAD = "ahead_conv_relu=True, ahead_bn_relu=True, ahead_linear_relu=True, ahead_conv_sigmoid=True, ahead_linear_sigmoid=True"
SIGNATURES = {
    "trace_layers": f"root_model, target_model, *args, fuse_bn=True, {AHEAD}",
    "channel_shuffle": "x, groups",
    "disable_normalize": "module",
    "normalize_module": "module, type_modules=DefaultNormalizeIntXModule, normalize_weight_value=8, "
    "normalize_bias_value=8, normalize_output_value=None",
    "normalize_layers": "net, *, normalize_modules=DefaultNormalizeIntXModule, normalize_weight_value=8, "
    "normalize_bias_value=None, normalize_output_value=8",
    "disable_quant": "module",
    "quant_module": "module, type_modules=DefaultQuantIntXOP, mode=QuantMode.QValue, data_bits=8, parameter_bits=8, "
    "out_bits=None, hidden_bits=None",
    "quant_module_by_type": "module, type_modules=DefaultQuantIntXOP, mode=QuantMode.QValue, data_bits=8, "
    "parameter_bits=8, out_bits=None, hidden_bits=None",
    "quant_tensor": "module, x, name='_default_layername', bits=8",
    "init": "net, *, quant_modules=DefaultQuantIntXOP, parameter_bits=8, mode=QuantMode.QValue, data_bits=8, "
    "out_bits=8, hidden_bits=None, target=None, limits=True, recipe=None, observe='running'",
    "check": "net, *args, target=None, kwargs=None, data_bits=8, parameter_bits=8, out_bits=8, quiet=False",
    "fit": "net, target, *args, quiet=False",
    "retarget": "net, source, target, *args, quiet=False",
    "calibrate": "net, loader, method='mse', *, percentile=99.99, batches=None, forward=<feed>, weights='mse', "
    "batchnorm=False, equalize=False, correct_bias=True, hold=True, progress=True",
    "report": "net, loader, *, html=None, metric=None, reference=None, batches=None, forward=<feed>, target=None, batch_axis=0, "
    "exact=True, language='en', progress=True",
    "log": "writer, net, step, batch=None, *, forward=<feed>, histograms=False",
    "sensitivity": "net, loader, *, metric=None, batches=None, forward=<feed>, progress=True",
    "search": "net, loader, budget, *, metric=None, bits=(4, 8, 16), target=None, batches=None, forward=<feed>, progress=True",
    "param_groups": "net, *, threshold_lr=0.01, **options",
    "hold_ranges": "net, on=True",
    "freeze_batchnorm": "net",
    "freeze_thresholds": "net, on=True",
    "limit_accumulators": "net, width",
    "verify": "net, path=None, inputs=None, *, kwargs=None, quiet=False",
    "onnx.export": "model, args=(), f=None, *, kwargs=None, input_names=None, output_names=None, opset_version=None, "
    "dynamic_axes=None, dynamic_shapes=None, dialect='thinker', target=None, golden=None, **options",
    "runtime.load": "path",
    "why": "file, first, second='runtime', *, inputs=None, progress=False, quiet=False",
    "wb_analyse": "path_or_state_dict, save_log_path='wb_analyse.log'",
    "fix_dequant": "model_name, is_check=False",
    "Dumper.enable_dump_quanted": "self, model, path='./dump', match_pattern='.*'",
    "Dumper.enable_dump_model": "self, model, path='./dump', match_pattern='.*', hook_forward=None",
    "Dumper.analyse_layer_output": "self, model, match_pattern='.*'",
    "Dumper.save_out_analyse_log": "self, save_log_path='Analyse_layer_output.log'",
    "SetPlatFormQuant": "platform_quant=PlatFormQuant.luna_quant",
    "SetBnMomentumUpdate": "disable=True",
} | {name: "enable=True" for name in NAMES if name.startswith(("SetIQ", "SetFunction"))}


def found(name: str) -> Any:
    value: Any = linger
    for part in name.split("."):
        value = getattr(value, part)
    return value


def written(p: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(p.kind, "")
    if p.default is inspect.Parameter.empty:
        return stars + p.name
    if inspect.isfunction(p.default):
        return f"{p.name}=<{p.default.__name__}>"
    named = [n for n in ("DefaultQuantIntXOP", "DefaultNormalizeIntXModule") if p.default is getattr(linger, n)]
    return f"{p.name}={named[0] if named else p.default if hasattr(p.default, 'value') else repr(p.default)}"


def signature(name: str) -> str:
    parts: list[str] = []
    parameters = inspect.signature(found(name)).parameters.values()
    for i, p in enumerate(parameters):
        starred = any(q.kind in (q.VAR_POSITIONAL, q.KEYWORD_ONLY) for q in list(parameters)[:i])
        parts += ["*"] * (p.kind is p.KEYWORD_ONLY and not starred) + [written(p)]
    return ", ".join(parts)


def test_names() -> None:
    assert linger.__all__ == NAMES
    assert all(hasattr(linger, name) for name in NAMES)


def test_no_other_name_looks_public() -> None:
    modules = {p.stem for p in (ROOT / "linger").iterdir()}
    others = {name for name in vars(linger) if not name.startswith("_")} - set(NAMES) - modules
    assert not others


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    assert signature(name) == SIGNATURES[name]


def test_every_function_has_a_row() -> None:
    functions = {name for name in NAMES if inspect.isfunction(getattr(linger, name))}
    assert functions == {name for name in SIGNATURES if "." not in name}


# --- docstrings

MODULES = sorted(p.stem for p in (ROOT / "linger").glob("*.py") if not p.stem.startswith("_"))
MODULES += ["onnx", "onnx.export", "ops._base", "targets"]


def documented(module: Any) -> dict[str, Any]:
    """The module, and the public functions and classes of linger that it holds."""
    rows: dict[str, Any] = {module.__name__: module}
    for name, value in vars(module).items():
        if name.startswith("_") or not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        if value.__module__.startswith("linger"):
            rows[f"{module.__name__}.{name}"] = value
    return rows


@pytest.mark.parametrize("module", MODULES)
def test_docstrings(module: str) -> None:
    rows = documented(importlib.import_module(f"linger.{module}"))
    bare = [name for name, value in rows.items() if not (value.__doc__ or "").strip() or value.__doc__ == dict.__doc__]
    assert not bare
    # a dataclass without a docstring gets its signature as one
    assert not [name for name, value in rows.items() if (value.__doc__ or "").startswith(f"{name.rpartition('.')[2]}(")]


def test_public_methods_of_what_users_hold() -> None:
    for cls in (linger.runtime.Model, importlib.import_module("linger.verify").Report):
        methods = [
            m
            for n, m in vars(cls).items()
            if not n.startswith("_") and (inspect.isfunction(m) or isinstance(m, property))
        ]
        assert all(m.__doc__ for m in methods)
    assert linger.runtime.Model.__call__.__doc__


# --- the call of torch.onnx.export


def test_every_argument_of_torchs_exporter_is_known() -> None:
    """Each is a parameter here, accepted because it changes nothing, or refused by name once it asks for something."""
    theirs = set(inspect.signature(torch.onnx.export).parameters)
    ours = set(inspect.signature(linger.onnx.export).parameters) - {"options"}
    assert theirs <= ours | IGNORED | UNSUPPORTED
    assert not IGNORED & UNSUPPORTED
    assert not ours & (IGNORED | UNSUPPORTED)


def net() -> nn.Module:
    made = linger.init(nn.Sequential(nn.Conv2d(1, 2, 3)))
    made(torch.randn(2, 1, 5, 5))
    return made.eval()


def test_its_call_with_all_defaults_written_out(tmp_path: Path) -> None:
    parameters = inspect.signature(torch.onnx.export).parameters.values()
    given = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    x, path = torch.randn(2, 1, 5, 5), tmp_path / "net.onnx"
    model = net()
    linger.onnx.export(model, (x,), path, **given)
    assert linger.verify(model, path, x, quiet=True).equal


@pytest.mark.parametrize("name", [*sorted(UNSUPPORTED), "no_such_argument"])
def test_what_it_cannot_do_is_refused_by_name(name: str) -> None:
    with pytest.raises(
        linger.LingerError, match=f"export: found argument {name}, allowed are those of torch.onnx.export"
    ):
        linger.onnx.export(net(), torch.randn(2, 1, 5, 5), **{name: {"x": 1}})  # type: ignore[arg-type]


# --- importing

WATCH = """
import json, logging, sys, warnings
import onnx_ir, onnxruntime, torch  # what they do is theirs
PLACES = torch, torch.Tensor, torch.nn, torch.nn.functional, torch.nn.Module, torch.onnx, torch.autograd, torch.optim
WRITES = ("socket.", "subprocess.", "os.mkdir", "os.rename", "os.remove", "os.system", "os.putenv", "shutil.", "tempfile.")
seen = []

def watch(event, args):
    if event.startswith(WRITES) or event == "open" and set(str(args[1])) & set("wax+"):
        seen.append([event, str(args)])

def state():
    found = {f"{p.__name__}.{n}": id(v) for p in PLACES for n, v in vars(p).items()}
    found |= {f"stack {i}": n for i, n in enumerate((torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()))}
    found |= {"grad": torch.is_grad_enabled(), "dtype": str(torch.get_default_dtype()), "threads": torch.get_num_threads()}
    found |= {"seed": torch.initial_seed(), "filters": len(warnings.filters), "path": list(sys.path)}
    return found | {"handlers": len(logging.getLogger().handlers), "hooks": id(sys.excepthook)}

before = state()
sys.addaudithook(watch)
import linger
after = state()
print(json.dumps([seen, [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)]]))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "120", "NO_COLOR": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=True)


def test_import_does_no_work() -> None:
    """No file written, no process, no network; nothing of torch replaced, added or switched; no mode left on."""
    done = run("-c", WATCH)
    assert json.loads(done.stdout) == [[], []]
    assert not done.stderr


def test_the_module_runs() -> None:
    done = run("-m", "linger", "--help")
    assert "Usage: linger" in done.stdout
    assert "demo" in done.stdout
    assert not done.stderr


# --- version


def test_one_version() -> None:
    """Said in one place, which the package's metadata and every exported file read."""
    said = (ROOT / "pyproject.toml").read_text("utf-8")
    assert 'dynamic = ["version"]' in said.splitlines()
    place = re.search(r'^\[tool\.hatch\.version\]\npath = "(.+)"$', said, re.MULTILINE)
    assert place is not None
    source = ROOT / place[1]
    assert f'VERSION = "{linger.__version__}"' in source.read_text("utf-8").splitlines()
    assert metadata.version("linger-qat") == linger.__version__
    model = linger.onnx.export(net(), torch.randn(2, 1, 5, 5))
    assert model.producer_version == linger.__version__
    assert {p.key: p.value for p in model.metadata_props}["linger_version"] == linger.__version__
    others = [p for p in (ROOT / "linger").rglob("*.py") if p != source and linger.__version__ in p.read_text("utf-8")]
    assert not others
