"""Tensors that depend on parameters and buffers alone: a functional call that takes one has a weight.

The tag says which parameters and buffers a tensor was computed from. It travels like a grid, as an attribute of the plain
tensor, and is void as soon as the tensor is changed in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from linger.numerics import version


class Constant(NamedTuple):
    """``leaves``: the parameters and buffers behind a tensor. ``name``: of its place in the first one's key.

    "" stands for a leaf, or all of it with its axes in another order; None for a part or anything computed.
    """

    leaves: tuple[Tensor, ...]
    name: str | None = ""


def constant_of(x: Any) -> Constant | None:
    """What the tensor was computed from; None where something other than parameters and buffers took part."""
    if isinstance(x, nn.Parameter):
        return Constant((x,))
    tag: tuple[Constant, int] | None = getattr(x, "_linger_constant", None)
    return None if tag is None or tag[1] != version(x) else tag[0]


def set_constant(x: Tensor, constant: Constant) -> Tensor:
    """Tag a tensor that is not a leaf. Tags are only read and written by these functions."""
    x._linger_constant = (constant, version(x))  # type: ignore[attr-defined]
    return x


def named(x: Tensor, name: str) -> Tensor:
    """Give a constant that is a part of a parameter a name of its own in the file, behind the parameter's key."""
    constant = None if isinstance(x, nn.Parameter) else constant_of(x)
    return x if constant is None else set_constant(x, constant._replace(name=name))


def has_parameter(constant: Constant | None) -> bool:
    """Whether something that can be trained is behind it, not only buffers."""
    return constant is not None and any(isinstance(t, nn.Parameter) for t in constant.leaves)


def leaves(x: Any) -> tuple[Tensor, ...]:
    """The tensors whose change changes ``x``: itself where it is not computed from others; nothing for what is no tensor."""
    if not isinstance(x, Tensor):
        return ()
    constant = constant_of(x)
    return (x,) if constant is None else constant.leaves
