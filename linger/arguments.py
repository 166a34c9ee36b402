"""What the command line takes: a file or a net by name, its weights, and inputs as files or shapes."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linger import runtime
from linger.convert import init
from linger.errors import LingerError
from linger.files import READERS, read_arrays
from linger.fuse import trace_layers
from linger.ops import IntModule
from linger.weights import load_into

SHAPE = re.compile(r"\d+([,x]\d+)*")


def net_or_file(what: str, args: str | None = None) -> nn.Module | str:
    """``net.onnx``, or ``package.module:name`` of a net, its class, or a function that makes it.

    Args:
        what: the name.
        args: what the function or class is called with, in JSON: an object (by name), a list, or one value.

    Raises:
        LingerError: there is no such thing, or the function raises.
    """
    if what.endswith(".onnx"):
        return what
    return net_of(what, args, "a .onnx file or ")


def net_of(what: str, args: str | None = None, or_else: str = "") -> nn.Module:
    """``net_or_file`` where only a net will do; ``or_else`` says what else is allowed."""
    module, colon, name = what.partition(":")
    if not colon or not re.fullmatch(r"\w+(\.\w+)*", module) or not name.isidentifier():
        raise LingerError(f"found {what!r}, allowed is {or_else}package.module:name of a net; write it so")
    with _current_directory():
        try:
            found: Any = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise LingerError(f"found {what!r}, which cannot be imported ({error}); run in its directory") from None
        except Exception as error:
            raise LingerError(f"importing {module} raises {_said(error)}; repair it") from error
        net = found if isinstance(found, nn.Module) else _made(what, found, args) if callable(found) else None
    if not isinstance(net, nn.Module):
        raise LingerError(
            f"{what} is no net, allowed are a torch.nn.Module, its class, or a function that makes it; name one"
        )
    return net


@contextmanager
def _current_directory() -> Iterator[None]:
    """Modules of the current directory can be imported, as with ``python -m``."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _made(what: str, factory: Any, args: str | None) -> Any:
    try:
        given = json.loads(args) if args is not None else []
    except ValueError as error:
        raise LingerError(
            f"--args is {args!r}, allowed is JSON such as '{{\"width\": 32}}' ({error}); quote it"
        ) from None
    try:
        return (
            factory(**given) if isinstance(given, dict) else factory(*(given if isinstance(given, list) else [given]))
        )
    except Exception as error:
        raise LingerError(f"{what} raises {_said(error)}; pass what it takes with --args") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def fixed_point(
    net: nn.Module, inputs: tuple[Tensor, ...], weights: str | None, target: str | None, parameter_bits: int = 8
) -> nn.Module:
    """The net after ``trace_layers`` and ``init`` (unless it comes so), with the weights of a file of any stage.

    Raises:
        LingerError: the forward does not run on the inputs, or the weights do not fit.
    """
    if not any(isinstance(m, IntModule) for m in net.modules()):
        if not inputs:
            raise LingerError("found no input, allowed are those of forward; pass --input with a file or a shape")
        trace_layers(net, net, inputs)
        init(net, parameter_bits=parameter_bits, target=target)
    if weights is not None:
        load_into(net, weights)
    return net


def net_of_file(
    net: nn.Module, inputs: tuple[Tensor, ...], weights: str | None, target: str | None, parameter_bits: int,
    file: str | os.PathLike[str],
) -> nn.Module:  # fmt: skip
    """``fixed_point`` for the chip that an exported file is for, where no other is given."""
    chip = next((p.value for p in runtime.read(file).metadata_props if p.key == "target"), None)
    return fixed_point(net, inputs, weights, target or chip, parameter_bits)


# --- inputs


def inputs_of(given: list[str]) -> tuple[Tensor, ...]:
    """Each a file of arrays, or a shape such as 1,3,32,32 for random numbers, the same in every run.

    Raises:
        LingerError: one is neither, or damaged.
    """
    return tuple(torch.from_numpy(np.ascontiguousarray(a)) for _, a in named_inputs(given))


def named_inputs(given: list[str]) -> list[tuple[str, np.ndarray]]:
    """The same as arrays with the names that an .npz file or ``name=`` gives them, "" where there is none."""
    random = torch.Generator().manual_seed(0)
    found: list[tuple[str, np.ndarray]] = []
    for text in given:
        named = re.fullmatch(r"([A-Za-z_][\w.]*)=(.+)", text)
        name, source = named.groups() if named else ("", text)
        found += [(name or own, array) for own, array in _read(source, random).items()]
    return found


def _read(text: str, random: torch.Generator) -> dict[str, np.ndarray]:
    if SHAPE.fullmatch(text):
        return {"": _random(text, random)}
    if Path(text).suffix.lower() not in READERS:
        raise LingerError(
            f"found the input {text!r}, allowed are a {', '.join(READERS)} file and a shape such as 1,3,32,32; give one of them"
        )
    return read_arrays(text)


def _random(shape: str, random: torch.Generator) -> np.ndarray:
    try:
        made: np.ndarray = torch.randn([int(n) for n in re.split("[,x]", shape)], generator=random).numpy()
    except (RuntimeError, ValueError, TypeError):  # which of them depends on how far beyond memory it is
        raise LingerError(f"the shape {shape} does not fit in memory, allowed is a smaller one; check it") from None
    return made


def batches_of(given: list[str], size: int) -> list[Any]:
    """Batches of ``size`` for ``calibrate``: a file of one array is the input, several arrays are keyword arguments.

    Raises:
        LingerError: a file cannot be read, or its arrays have different first axes.
    """
    batches: list[Any] = []
    for text in given:
        arrays = {k: torch.from_numpy(np.ascontiguousarray(a)) for k, a in named_inputs([text])}
        counts = {len(t) if t.dim() else 0 for t in arrays.values()}
        if len(counts) != 1 or 0 in counts:
            raise LingerError(f"{text!r} holds arrays of {sorted(counts)} samples, allowed is one number; check axis 0")
        for i in range(0, counts.pop(), size):
            part = {k: t[i : i + size] for k, t in arrays.items()}
            batches.append(next(iter(part.values())) if len(part) == 1 else part)
    return batches


def sample_of(net: nn.Module, batches: list[Any]) -> tuple[Tensor, ...]:
    """The first sample of the batches as what forward takes; several arrays go to its parameters of those names.

    Raises:
        LingerError: there is no batch, or forward has no such parameter.
    """
    if not batches:
        raise LingerError("found no sample, allowed are files of at least one; pass --data")
    first = batches[0]
    if not isinstance(first, dict):
        return (first[:1],)
    known = [name for name in inspect.signature(type(net).forward).parameters if name != "self"]
    strange = [name for name in first if name not in known]
    if strange:
        raise LingerError(
            f"found the array {strange[0]!r}, the forward of {type(net).__name__} takes {', '.join(known)}; name arrays so"
        )
    return tuple(first[name][:1] for name in known if name in first)
