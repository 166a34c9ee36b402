"""What goes into an export: the inputs of forward, their names, and which of their axes are dynamic."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linger.errors import LingerError
from linger.trace import tensors_of

Axes = Mapping[Any, Any]
# What nested tuples, lists and dicts may hold: anything else could hide a tensor, which would become a constant.
LEAVES = (Tensor, int, float, str, bytes, complex, type(None), torch.dtype, torch.device, np.generic, slice, range)


def given(model: nn.Module, args: Any, kwargs: dict[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword inputs of forward.

    As in ``torch.onnx.export``, a dict at the end of ``args`` holds keyword inputs; it is an input itself where forward
    has no parameters of those names.

    Raises:
        LingerError: an input is of a type that may hide tensors.
    """
    inputs = args if type(args) is tuple else (args,)
    if inputs and type(inputs[-1]) is dict and not kwargs and _are_keywords(model, inputs):
        inputs, kwargs = inputs[:-1], inputs[-1]
    require_leaves("input", (inputs, kwargs))
    return inputs, dict(kwargs or {})


def _are_keywords(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    parameters = list(_parameters(model).values())
    free = {p.name for p in parameters[len(inputs) - 1 :]}
    return all(key in free for key in inputs[-1]) or any(p.kind is p.VAR_KEYWORD for p in parameters)


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    parameters = inspect.signature(type(model).forward).parameters
    return dict(list(parameters.items())[1:])


def require_leaves(what: str, tree: Any) -> None:
    """Raise LingerError for a leaf in which tensors may hide."""
    for leaf in pytree.tree_leaves(tree):
        if not isinstance(leaf, LEAVES):
            raise LingerError(
                f"found an {what} of type {type(leaf).__name__}, allowed are tensors, numbers, strings, None, and tuples, "
                "lists and dicts of them; register it with torch.utils._pytree, or pass its tensors"
            )


def input_names_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> list[str]:  # fmt: skip
    """One name per input tensor: those that are wanted, and forward's own for the rest.

    Raises:
        LingerError: a name is given twice, or there are more names than tensors.
    """
    if isinstance(wanted, str) or isinstance(output_names, str):
        raise LingerError("input_names and output_names are lists; put a single name into a list")
    names = list(wanted or ())
    own = _parameter_names(model, args, kwargs)
    if len(names) > len(own):
        raise LingerError(
            f"found the input names {', '.join(names)}, the net takes {len(own)} tensors; leave the others out"
        )
    names += own[len(names) :]
    if not names:
        raise LingerError("found no tensor among the inputs, allowed are the inputs of forward; pass at least one")
    everything = [*names, *(output_names or ())]
    twice = sorted({n for n in everything if everything.count(n) > 1})
    if twice:
        raise LingerError(f"found the name {', '.join(twice)} more than once; give every input and output its own")
    return names


def output_names_of(count: int, wanted: Sequence[str] | None) -> list[str]:
    """One name per output.

    Raises:
        LingerError: there are more names than outputs.
    """
    names = list(wanted or ())
    if len(names) > count:
        raise LingerError(
            f"found the output names {', '.join(names)}, the net returns {count} tensors; leave the others out"
        )
    return names + [f"output_{i}" for i in range(len(names), count)]


def _parameter_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Names of forward's parameters, numbered where one holds several tensors."""
    names: list[str] = []
    positional = [p for p in _parameters(model).values() if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
    for i, value in enumerate(args):
        p = positional[min(i, len(positional) - 1)]
        names += _numbered(f"{p.name}_{i - positional.index(p)}" if p.kind is p.VAR_POSITIONAL else p.name, value)
    for key, value in kwargs.items():
        names += _numbered(key, value)
    return names


def _numbered(name: str, value: Any) -> list[str]:
    count = len(tensors_of(value))
    return [name] if count == 1 else [f"{name}_{i}" for i in range(count)]


def axes_of(dynamic_axes: Axes | None, dynamic_shapes: Any) -> dict[Any, Any]:
    """Input name or position -> axes, from either spelling."""
    found: dict[Any, Any] = dict(dynamic_axes or {})
    items = dynamic_shapes.items() if isinstance(dynamic_shapes, Mapping) else enumerate(dynamic_shapes or ())
    for key, axes in items:
        if axes:
            pairs = axes.items() if isinstance(axes, Mapping) else enumerate(axes)
            found[key] = {a: getattr(d, "__name__", str(d)) for a, d in pairs if d is not None}
    return found


def symbols_of(name: str, position: int, axes: Axes, tensor: Tensor) -> dict[int, str]:
    """Axis -> symbol of one input.

    Raises:
        LingerError: the tensor has no such axis.
    """
    wanted = axes.get(name, axes.get(position, {}))
    pairs = dict(wanted) if isinstance(wanted, Mapping) else {a: f"{name}_dim_{a}" for a in wanted}
    rank = tensor.dim()
    beyond = [a for a in pairs if not -rank <= a < rank]
    if beyond:
        raise LingerError(f"found dynamic axis {beyond[0]} of {name}, which has {rank} axes; name one of them")
    return {a % rank: str(symbol) for a, symbol in pairs.items()}


def refuse_strange(axes: Axes, names: Sequence[str], output_names: Sequence[str] | None) -> None:
    """Raise LingerError for dynamic axes of what is neither an input nor an output."""
    known = {*names, *(output_names or ())}
    strange = [k for k in axes if isinstance(k, str) and k not in known and not k.startswith("output_")]
    if strange:
        raise LingerError(
            f"dynamic axes of {', '.join(strange)}, allowed are the inputs {', '.join(names)} and the outputs; use those "
            "names or pass input_names"
        )


def array(t: Tensor) -> np.ndarray:
    """A tensor of any device and type as an array; half floats as float32, since a file has no others."""
    t = t.detach().cpu()
    found: np.ndarray = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t).numpy()
    return found
