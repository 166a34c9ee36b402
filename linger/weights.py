"""State dicts from files, without ever running code that a file holds: safetensors, and torch files of tensors only."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from linger.errors import LingerError
from linger.files import whole

NONSENSE = re.compile(
    "Unsupported operand|invalid load key|[Rr]an out|underflow|truncated"
)  # no pickle, or half of one
WRAPPED = ("state_dict", "model_state_dict", "model", "net")  # where training scripts keep it in a larger dict


def read_weights(f: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict of a .safetensors file, or of a file of ``torch.save`` that holds nothing but tensors.

    Raises:
        LingerError: there is no such file, it is damaged, holds pickled code, or no state dict.
    """
    name = os.fspath(f)
    try:
        if Path(f).suffix == ".safetensors":
            return dict(safetensors.torch.load_file(f))
        with warnings.catch_warnings():  # about pickles that are refused anyway
            warnings.simplefilter("ignore")
            return _tensors(torch.load(f, map_location="cpu", weights_only=True), name)
    except FileNotFoundError:
        raise LingerError(f"there is no file {name!r}; name one that exists") from None
    except pickle.UnpicklingError as error:
        if NONSENSE.search(str(error)):
            raise LingerError(f"{name!r} is truncated or no file of weights; save it again") from None
        raise LingerError(
            f"{name!r} holds pickled code, which is refused because loading it would run it, allowed are tensors; save "
            "net.state_dict() alone, best as .safetensors"
        ) from None
    except LingerError:
        raise
    except Exception as error:  # of a damaged file, PyTorch raises whatever it stumbles over
        raise LingerError(
            f"{name!r} is truncated or no file of weights ({_first_sentence(error)}); save it again"
        ) from None


def _first_sentence(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]


def _tensors(found: Any, name: str) -> dict[str, Tensor]:
    for key in WRAPPED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not any(isinstance(v, Tensor) for v in found.values()):
        raise LingerError(f"{name!r} holds {type(found).__name__}, allowed is a state dict; save net.state_dict()")
    return {str(k): v for k, v in found.items() if isinstance(v, Tensor)}


def write_weights(net: nn.Module, f: str | os.PathLike[str]) -> None:
    """The state dict of a net as a .safetensors file, or with ``torch.save`` under any other name; whole or not at all."""
    state = {k: v.detach().cpu().contiguous().clone() for k, v in net.state_dict().items()}
    with whole(f) as out:
        if Path(f).suffix == ".safetensors":
            out.write(safetensors.torch.save(state))
        else:
            torch.save(state, out)


def load_into(net: nn.Module, f: str | os.PathLike[str]) -> None:
    """Load a file into a net, strictly.

    Raises:
        LingerError: as ``read_weights``, or a key or shape does not fit.
    """
    state = read_weights(f)
    try:
        net.load_state_dict(state)
    except LingerError:
        raise
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise LingerError(
            f"{os.fspath(f)!r} does not fit {type(net).__name__}: {said}; name the net it is of"
        ) from None
