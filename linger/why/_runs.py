"""A run as tensors by the names of the file: an .npz file, a folder of text dumps, a runner, arrays, or a net."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from linger.contents import grids
from linger.errors import LingerError
from linger.execute import of_onnxruntime, of_runtime
from linger.files import read_arrays
from linger.numerics import grid_of
from linger.ops import IntModule
from linger.swap import named
from linger.trace import tensors_of
from linger.verify import LEVELS

Arrays = dict[str, np.ndarray]
DUMPED = re.compile(r"root\.?(?P<layer>.*)\.(?P<op>\w+)\.(?P<kind>q_outputs|outputs)")
TEXT = {"", ".txt", ".log", ".dump", ".csv"}


def read_run(run: Any, proto: onnx.ModelProto, feed: Mapping[str, np.ndarray] | None) -> Arrays:
    """The tensors of a run, integers where the file has integers; names that the file does not know are left out.

    Raises:
        LingerError: it cannot be read or run, or has nothing in common with the file.
    """
    found = {**(feed or {}), **_raw(run, proto, feed)}
    kinds, grid = _kinds(proto), grids(proto)
    made = {name: _typed(name, array, kinds[name], grid) for name, array in found.items() if name in kinds}
    if not set(made) - set(feed or {}):
        known = ", ".join(list(kinds)[:5])
        raise LingerError(
            f"{_described(run)} holds no tensor of the file, allowed are names such as {known}; write it with linger run --all "
            "or linger.Dumper"
        )
    return made


def _described(run: Any) -> str:
    return repr(os.fspath(run)) if isinstance(run, (str, os.PathLike)) else f"a run of type {type(run).__name__}"


def _raw(run: Any, proto: onnx.ModelProto, feed: Mapping[str, np.ndarray] | None) -> Arrays:
    if isinstance(run, Mapping):
        return {str(k): np.asarray(v) for k, v in run.items()}
    if isinstance(run, nn.Module):
        return of_net(run, feed)
    if not isinstance(run, (str, os.PathLike)):
        raise LingerError(
            f"found a run of type {type(run).__name__}, allowed are a path, runtime, onnxruntime, arrays by name and a net; "
            "pass one of them"
        )
    name, _, level = str(run).partition(":")
    if name in ("runtime", "onnxruntime"):
        if feed is None:
            raise LingerError(
                f"found no inputs to run {name} on, allowed are --input or a file exported with golden=; give them"
            )
        if level and level not in LEVELS:
            raise LingerError(f"the level is {level!r}, allowed are {', '.join(LEVELS)}; choose one of them")
        return (
            of_runtime(proto, feed, True) if name == "runtime" else of_onnxruntime(proto, feed, True, level or "basic")
        )
    return dict(_folder(Path(run))) if Path(run).is_dir() else read_arrays(run)


@torch.no_grad()
def of_net(net: nn.Module, feed: Mapping[str, np.ndarray] | None) -> Arrays:
    """What every fixed-point layer and call of a net makes of its eval forward, as integers.

    Raises:
        LingerError: there are no inputs.
    """
    found: Arrays = {}
    turns: dict[str, int] = {}
    names: dict[nn.Module, str] = {m: name for m, name in named(net).items() if isinstance(m, IntModule)}

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        n = turns[names[module]] = turns.get(names[module], -1) + 1
        first = next(iter(tensors_of(out)), None)
        grid = None if first is None else grid_of(first)
        if first is not None and grid is not None:
            key = names[module] + (f"@{n}" if n else "")
            found[key] = (first.double() * grid.scale.double()).cpu().numpy()

    if feed is None:
        raise LingerError("found no inputs to run the net on, allowed are those of its forward; pass inputs")
    handles = [m.register_forward_hook(hook) for m in names]
    modes = {m: m.training for m in net.modules()}
    try:
        net.eval()
        net(*(torch.from_numpy(x) for x in feed.values()))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return found


def _folder(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """One tensor per file: of ``linger.Dumper``, or any text or .npy file under the tensor's own name.

    A file of integers (``q_outputs``) comes after the one of floats, and so takes its place.
    """
    for file in sorted(path.iterdir(), key=lambda p: (".q_" in p.name, p.name)):
        match = DUMPED.fullmatch(file.name)
        if match:
            yield match["layer"] or match["op"], _text(file)
        elif file.suffix == ".npy":
            yield file.name.removesuffix(".npy"), read_arrays(file)[""]
        elif file.is_file() and not file.name.startswith("root"):
            yield (file.name.removesuffix(file.suffix) if file.suffix in TEXT else file.name), _text(file)


def _text(file: Path) -> np.ndarray:
    """Numbers between spaces, commas or line ends."""
    try:
        return np.array(file.read_text("ascii").replace(",", " ").split(), np.float64)
    except (OSError, ValueError) as error:
        raise LingerError(f"{os.fspath(file)!r} is no text file of numbers ({error}); write it again") from None


def _kinds(proto: onnx.ModelProto) -> dict[str, np.dtype[Any] | None]:
    """The type of every tensor of the graph that is not stored, None where the file does not say."""
    stored = {i.name for i in proto.graph.initializer}
    declared = {}
    for v in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        kind = v.type.tensor_type.elem_type
        declared[v.name] = onnx.helper.tensor_dtype_to_np_dtype(kind) if kind else None
    names = [*(i.name for i in proto.graph.input), *(n for node in proto.graph.node for n in node.output if n)]
    return {name: declared.get(name) for name in names if name not in stored}


def _typed(
    name: str, array: np.ndarray, kind: np.dtype[Any] | None, grid: Mapping[str, tuple[float, int]]
) -> np.ndarray:
    """Floats that stand for integers as those integers: as they are where whole, else times the tensor's scale."""
    if kind is None or array.dtype.kind != "f" or kind.kind == "f":
        return array
    whole = bool((np.mod(array, 1) == 0).all())
    scale = grid[name][0] if not whole and name in grid else 1.0
    return np.rint(array.astype(np.float64) * scale).astype(np.int64)
