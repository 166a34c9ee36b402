"""Which functional calls do what to a grid: tables of the calls that routing and recording look up."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_packed_sequence

from linger.numerics import grid_of
from linger.selects import SELECTS, selects

T: Any = Tensor
Call = Callable[..., Any]

# Calls that only move values: the result carries the first operand's grid.
PASS: dict[Call, str] = {
    T.view: "view", T.reshape: "reshape", torch.reshape: "reshape", T.flatten: "flatten", torch.flatten: "flatten",
    T.view_as: "view", T.reshape_as: "view", T.unflatten: "view", torch.unflatten: "view", T.ravel: "view",
    torch.ravel: "view", T.permute: "permute", torch.permute: "permute", T.transpose: "transpose",
    torch.transpose: "transpose", T.t: "transpose", torch.t: "transpose", T.movedim: "permute",
    torch.movedim: "permute", T.moveaxis: "permute", torch.moveaxis: "permute", T.swapaxes: "transpose",
    torch.swapaxes: "transpose", T.swapdims: "transpose", torch.swapdims: "transpose", T.T.__get__: "transpose",
    T.mT.__get__: "transpose", T.H.__get__: "transpose", T.mH.__get__: "transpose", T.adjoint: "transpose",
    torch.adjoint: "transpose", T.squeeze: "squeeze", torch.squeeze: "squeeze", T.unsqueeze: "unsqueeze",
    torch.unsqueeze: "unsqueeze", T.__getitem__: "getitem", T.narrow: "narrow", torch.narrow: "narrow",
    T.narrow_copy: "narrow", torch.narrow_copy: "narrow", T.select: "select", torch.select: "select",
    torch.select_copy: "select", T.index_select: "index_select", torch.index_select: "index_select",
    T.gather: "gather", torch.gather: "gather", T.split: "split", torch.split: "split", T.chunk: "split",
    torch.chunk: "split", T.split_with_sizes: "split", torch.split_with_sizes: "split", T.tensor_split: "split",
    torch.tensor_split: "split", torch.unsafe_split: "split", torch.unsafe_chunk: "split", T.unsafe_split: "split",
    T.unsafe_chunk: "split", T.hsplit: "split", torch.hsplit: "split", T.vsplit: "split", torch.vsplit: "split",
    T.dsplit: "split", torch.dsplit: "split", T.unbind: "unbind", torch.unbind: "unbind", T.flip: "flip",
    torch.flip: "flip", T.fliplr: "flip", torch.fliplr: "flip", T.flipud: "flip", torch.flipud: "flip",
    T.roll: "roll", torch.roll: "roll", T.expand: "expand", T.expand_as: "expand", T.broadcast_to: "expand",
    torch.broadcast_to: "expand", T.repeat: "repeat", T.tile: "repeat", torch.tile: "repeat",
    T.repeat_interleave: "repeat_interleave", torch.repeat_interleave: "repeat_interleave",
    F.pixel_shuffle: "pixel_shuffle", F.pixel_unshuffle: "pixel_unshuffle", T.contiguous: "identity",
    T.clone: "identity", torch.clone: "identity", T.detach: "identity", torch.detach: "identity",
    T.positive: "identity", torch.positive: "identity", T.data.__get__: "identity", T.cpu: "identity",
    T.cuda: "identity", T.to: "identity", T.type: "identity", T.type_as: "identity", T.float: "identity",
    T.double: "identity", T.half: "identity", T.bfloat16: "identity", T.int: "identity", T.long: "identity",
    T.short: "identity", T.char: "identity", T.byte: "identity", T.bool: "identity",
    torch.max_pool1d: "max_pool", torch.max_pool2d: "max_pool", F.max_pool1d: "max_pool", F.max_pool2d: "max_pool",
    F.relu: "relu", torch.relu: "relu", T.relu: "relu",
}  # fmt: skip
# In-place forms of the above; every other in-place call takes its target's grid away.
PASS_INPLACE: dict[Call, str] = {
    T.relu_: "relu", torch.relu_: "relu", F.relu_: "relu", T.squeeze_: "squeeze", T.unsqueeze_: "unsqueeze",
    T.t_: "transpose", T.transpose_: "transpose", T.swapaxes_: "transpose", T.swapdims_: "transpose",
    T.detach_: "identity", torch.detach_: "identity", T.requires_grad_: "identity",
}  # fmt: skip
CASTS: dict[Call, torch.dtype | None] = {  # None: the type is an argument
    T.to: None, T.type: None, T.type_as: None, T.float: torch.float32, T.double: torch.float64, T.half: torch.float16,
    T.bfloat16: torch.bfloat16, T.int: torch.int32, T.long: torch.int64, T.short: torch.int16, T.char: torch.int8,
    T.byte: torch.uint8, T.bool: torch.bool,
}  # fmt: skip
ASSIGN = T.__setitem__
# Dropout scales what it keeps by 1 / (1 - p) in training; the others also shift it.
DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout}
ALPHA_DROPOUTS = {F.alpha_dropout, F.feature_alpha_dropout}
QUERIES = {T.dim, T.size, T.numel, T.stride, T.is_floating_point, T.data_ptr, T.is_contiguous, T.storage_offset,
    T.shape.__get__, T.dtype.__get__, T.device.__get__, T.ndim.__get__, T.requires_grad.__get__}  # fmt: skip
RANDOM = dict.fromkeys((torch.rand_like, torch.randn_like, torch.randint_like, torch.bernoulli, T.bernoulli, torch.normal,
    torch.poisson, torch.multinomial, T.multinomial), "random")  # fmt: skip
JOINS = {torch.cat, torch.concat, torch.concatenate}
# Ranks of the inputs with a batch axis; without one, an average pool has no fixed-point form.
BATCHED = {F.avg_pool1d: 3, F.adaptive_avg_pool1d: 3, F.avg_pool2d: 4, F.adaptive_avg_pool2d: 4}
NOT_FIRST = {torch.where, torch.searchsorted}  # their ``input`` is not the first parameter


def first_positional(func: Call, args: Any, kwargs: Mapping[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """The call with its first operand given by position, as ``torch.add(input=x, other=y)`` may not have it."""
    kwargs = dict(kwargs or {})
    if not args and func not in NOT_FIRST:
        for name in ("input", "tensors", "self"):
            if name in kwargs:
                return (kwargs.pop(name),), kwargs
    return args, kwargs


def straight(func: Call, args: Any, kwargs: Mapping[str, Any]) -> tuple[Call, Any]:
    """``2 - x`` and ``2 / x`` as torch.sub and torch.div of swapped operands, ``x ** 2`` as x.pow(2).

    By identity: under torch.compile, the methods that are written in Python are found in no table.
    """
    if func is T.__rdiv__:
        return torch.div, (args[1], args[0])
    if func is T.__rsub__ or func is torch.rsub:
        other = args[1] if len(args) > 1 else kwargs["other"]
        return torch.sub, (other, args[0], *args[2:])
    if func is T.__pow__:
        return T.pow, args
    if func is T.__ipow__:
        return T.pow_, args
    return func, args


# A table and no look at the name, which torch.compile cannot take; it cannot take torch.resize_as_ either.
INPLACE = {
    getattr(place, name) for place in (T, torch, F) for name in dir(place)
    if name[-1] == "_" != name[0] and (place is T or not name.startswith("resize"))
} | {ASSIGN}  # fmt: skip


def is_inplace(func: Call, kwargs: Mapping[str, Any]) -> bool:
    """Whether the call writes into its first operand."""
    return func in INPLACE or bool(kwargs.get("inplace"))


def unshared(func: Call, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """The operands of a call, of which the first is a copy where the call would write into it."""
    return (args[0].clone(), *args[1:]) if is_inplace(func, kwargs) else args


def plain_name(func: Call) -> str:
    """What a call is called in a graph: the move it is, else its own name without underscores around it."""
    if func in DROPOUTS or func in ALPHA_DROPOUTS:
        return "dropout"
    name = (
        SELECTS.get(func) or PASS.get(func) or PASS_INPLACE.get(func) or str(getattr(func, "__name__", func)).strip("_")
    )
    return "pad" if func is torch.constant_pad_nd else name


def cast_to(func: Call, args: Any, kwargs: Mapping[str, Any]) -> torch.dtype | None:
    """The type that a call of ``CASTS`` asks for, None where it asks for none; a tensor on a grid stands for float32."""
    for given in (CASTS[func], *args[1:], *kwargs.values()):
        if isinstance(given, torch.dtype):
            return given
        if isinstance(given, Tensor):
            return torch.float32 if grid_of(given) is not None else given.dtype
    return None


PACK, UNPACK = torch._pack_padded_sequence, torch._pad_packed_sequence


def asked_length(total: int | None) -> int | None:
    """``total_length`` of the ``pad_packed_sequence`` that runs now, which calls ``UNPACK`` with a number in any case."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is pad_packed_sequence.__code__:
            asked: int | None = frame.f_locals["total_length"]
            return asked
        frame = frame.f_back  # type: ignore[assignment]
    return total


def keeps_grid(func: Call, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the result is on the first operand's grid: values only move, or zeros join them."""
    if func is UNPACK:
        return not args[3]
    if (
        func in PASS
        or func in PASS_INPLACE
        or func is PACK
        or _pads_zero(func, args, kwargs)
        or selects(func, args, kwargs)
    ):
        return True
    return (func in DROPOUTS or func in ALPHA_DROPOUTS) and not dropout_rate(args, kwargs)


def dropout_rate(args: Any, kwargs: Mapping[str, Any]) -> float:
    """p of a dropout that is active, 0 of one that is not."""
    given = dict(zip(("input", "p", "training"), args, strict=False)) | dict(kwargs)
    return float(given.get("p", 0.5)) if given.get("training", True) else 0.0


def _pads_zero(func: Call, args: Any, kwargs: Mapping[str, Any]) -> bool:
    if func is torch.constant_pad_nd:
        return not kwargs.get("value", args[2] if len(args) > 2 else 0)
    if func is not F.pad:
        return False
    mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
    value = kwargs.get("value", args[3] if len(args) > 3 else 0)
    return mode != "constant" or not value
