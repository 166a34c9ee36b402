"""The named children of a module that stand for its functional calls: what they are called, and how they are made."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd import graph
from torch.utils import checkpoint

from linger.errors import LingerError
from linger.ops import HALF_UP_ONLY, SITES, IntModule
from linger.rounding import HALF_UP

PREFIX = "_linger_round_tensor_"


class Witness(Protocol):
    """What looks at every call of a site beside the same call in float (``floating``)."""

    def run(self, site: Any, plain: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """The result of ``site(*args, **kwargs)``, or of ``plain()``, which writes into no operand."""


HANDLERS = (checkpoint.__file__, graph.__file__)  # they move saved tensors, also those with grids
CALLERS = ("checkpoint", "forward")  # in the first of them: what runs the function given
WITNESSES: list[Witness] = []  # a list and no context variable, which PyTorch's compiler cannot read
SHARED = {  # tags that are counted together, as upstream does
    "iqadd", "iqmul", "iqdiv", "iqsum", "iqcat", "iqclamp", "iqsigmoid", "iqtanh", "iqvar", "SoftmaxInt", "LogSoftmaxInt",
}  # fmt: skip


def refuse_other(owner: nn.Module, tag: str, n: int, name: str) -> None:
    """Raise if a checkpoint brought another call's site for this place in the count."""
    for other in SHARED if tag in SHARED else ():
        site: Any = children(owner).get(site_name(other, n))
        if site is not None and not site.used:
            error = LingerError(
                f"found this site in the checkpoint where the forward has {name}, allowed are checkpoints of this net; load one"
            )
            error.module = site
            raise error


def refuse_checkpointed(what: str, forward: Callable[..., Any]) -> None:
    """Raise if ``forward`` gave ``torch.utils.checkpoint`` the function that runs: repeated alone, nothing would see its calls."""
    frame, code = sys._getframe(), getattr(forward, "__code__", None)
    while frame.f_back is not None and frame.f_code is not code and frame.f_code.co_filename not in HANDLERS:
        frame = frame.f_back
    if frame.f_code.co_filename == checkpoint.__file__ and frame.f_code.co_name in CALLERS:
        raise LingerError(
            f"found {what} in a function given to torch.utils.checkpoint, allowed are modules; give it a module whose forward "
            "is that function"
        )


def site_name(tag: str, n: int) -> str:
    """Upstream's key of the n-th functional call of a module (``upstream`` 3.1)."""
    default = "_default_index_" if tag in ("iqadd", "iqmul", "iqdiv", "iqsum") else ""
    return f"{PREFIX}{tag}_{default}{n}"


def make_site(owner: nn.Module, tag: str, name: str) -> nn.Module:
    """Create the child that stands for a functional call; deterministic names, so two nets agree."""
    if torch.compiler.is_compiling():
        raise LingerError(
            "this net has not run yet, so its functional ops have no state; run one batch before compiling"
        )
    device = next((t.device for t in owner.parameters()), torch.device("cpu"))
    device = next((t.device for t in owner.buffers()), device)
    made: IntModule = SITES[tag].integer(device)  # type: ignore[assignment,misc]
    made.follow_chip(owner.__dict__.get("_linger_chip", "venus"))
    if made.rounding != HALF_UP and type(made) in HALF_UP_ONLY:
        raise LingerError(
            f"{SITES[tag].name} rounds half up, allowed on {made.chip} is {made.rounding}; keep the calls of this module in "
            "float with linger.disable_quant, or use another op"
        )
    for key, bits in owner.__dict__.get("_linger_bits", {}).items():
        if made.weighted or key == "parameter_bits":
            setattr(made, key, bits)
    if owner.__dict__.get("_linger_learn"):
        made.learn(owner.__dict__["_linger_learn"])  # type: ignore[operator]
    made.train(owner.training)
    children(owner)[name] = made
    return made


def children(owner: nn.Module) -> dict[str, Any]:
    """Everything below ``owner``, sites included, also while its forward iterates over its layers."""
    return owner.__dict__.get("_linger_children", owner._modules)  # type: ignore[no-any-return]
