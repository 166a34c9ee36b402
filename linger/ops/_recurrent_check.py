"""What a recurrent layer accepts, asked before anything is observed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from linger.errors import LingerError


def check_input(x: Any, input_size: int, ranks: tuple[int, int], time_axis: int | None) -> None:
    """Raise unless ``x`` has one of two ranks (without and with a batch axis), the layer's features, and a step.

    Args:
        x: what was passed.
        input_size: the layer's.
        ranks: allowed numbers of axes.
        time_axis: of a batched input; None for a cell.
    """
    if not isinstance(x, Tensor):
        allowed = "a tensor" if time_axis is None else "a tensor and a PackedSequence"
        raise LingerError(f"found an input of type {type(x).__name__}, allowed are {allowed}; pass one of them")
    shape = tuple(x.shape)
    if x.dim() != ranks[0] and x.dim() != ranks[1]:  # with dynamic=True, Dynamo finds no number in a tuple
        raise LingerError(
            f"found an input of {x.dim()} axes, shape {shape}, allowed are {ranks[0]} and, with a batch axis, {ranks[1]}; "
            "reshape it"
        )
    if shape[-1] != input_size:
        raise LingerError(
            f"found {shape[-1]} features in an input of shape {shape}, allowed is input_size {input_size}; change one of them"
        )
    if time_axis is not None and not shape[time_axis if x.dim() == ranks[1] else 0]:
        raise LingerError(
            f"found an input of shape {shape}, which has no step, allowed are sequences of at least 1; leave the empty ones out"
        )


def check_packed(packed: PackedSequence, input_size: int) -> None:
    """Raise unless the rows of a packed sequence are those that its batch sizes count, the longest sequence first."""
    data, sizes = packed.data, packed.batch_sizes
    if data.dim() != 2 or data.shape[1] != input_size:
        raise LingerError(
            f"found packed data of shape {tuple(data.shape)}, allowed are (rows, input_size {input_size}); change one of them"
        )
    if torch.compiler.is_compiling():
        return
    fit = sizes.device.type == "cpu" and sizes.dtype == torch.int64 and int(sizes.sum()) == data.shape[0]
    if not fit or not sizes.numel() or int(sizes[-1]) < 1 or bool((sizes.diff() > 0).any()):
        raise LingerError(
            f"found {data.shape[0]} rows and batch_sizes {sizes.tolist()}, allowed are sizes on the CPU, int64, that never grow "
            "and add up to the rows; use pack_padded_sequence"
        )


def check_states(given: Any, wanted: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[Tensor, ...]:
    """The states as a tuple.

    Args:
        given: hx, not None.
        wanted: name and shape of every state, those of h alone for a layer whose hx is one tensor.

    Raises:
        LingerError: there are others, or of other shapes.
    """
    names = ", ".join(name for name, _ in wanted)
    states = tuple(given) if isinstance(given, (tuple, list)) and len(wanted) > 1 else (given,)
    if len(states) != len(wanted) or not all(isinstance(s, Tensor) for s in states):
        found = f"{len(given)} values" if isinstance(given, (tuple, list)) else f"a {type(given).__name__}"
        allowed = f"a tuple of tensors ({names})" if len(wanted) > 1 else f"one tensor, {names}"
        raise LingerError(f"found {found} as hx, allowed is {allowed}; pass that or None")
    for state, (name, shape) in zip(states, wanted, strict=True):
        if tuple(state.shape) != shape:
            raise LingerError(
                f"found {name} of shape {tuple(state.shape)}, allowed is {shape}; pass that, or no states"
            )
    return states
