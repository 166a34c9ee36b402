"""What the command line takes: a file or a net by name, and inputs as files or shapes."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linger.errors import LingerError


def net_or_file(what: str) -> nn.Module | str:
    """``net.onnx``, or ``package.module:name`` of a net, its class, or a function that makes it.

    Raises:
        LingerError: there is no such thing.
    """
    if what.endswith(".onnx"):
        return what
    module, colon, name = what.partition(":")
    if not colon or not re.fullmatch(r"\w+(\.\w+)*", module) or not name.isidentifier():
        raise LingerError(f"found {what!r}, allowed are a .onnx file and module:name of a net; write one of them")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise LingerError(f"found {what!r}, which cannot be imported ({error}); run in its directory") from None
    finally:
        sys.path.remove(os.getcwd())
    net = found if isinstance(found, nn.Module) else found() if callable(found) else None
    if not isinstance(net, nn.Module):
        raise LingerError(
            f"{what} is no net, allowed are a torch.nn.Module, its class, or a function that makes it; name one"
        )
    return net


def inputs_of(given: list[str]) -> tuple[Tensor, ...]:
    """Each a .npy file, or a shape such as 1,3,32,32 for random numbers, the same in every run.

    Raises:
        LingerError: one is neither.
    """
    random = torch.Generator().manual_seed(0)
    return tuple(_input(text, random) for text in given)


def _input(text: str, random: torch.Generator) -> Tensor:
    if re.fullmatch(r"\d+([,x]\d+)*", text):
        return torch.randn([int(n) for n in re.split("[,x]", text)], generator=random)
    try:
        return torch.from_numpy(np.load(Path(text), allow_pickle=False))
    except (OSError, ValueError, TypeError) as error:
        raise LingerError(
            f"found the input {text!r}, allowed are a .npy file and a shape such as 1,3,32,32 ({error}); give one of them"
        ) from None
