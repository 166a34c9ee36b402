"""How a fixed-point module enters a state dict: upstream's keys (``upstream`` 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from linger.observe import stands_for_scale
from linger.ops._learned import NAMES, Learned

UPSTREAM_ONLY = ("y", "min_thresh", "max_thresh")  # buffers of upstream 1.1.1 that follow from others


def is_range(name: str) -> bool:
    """Whether a buffer is a running maximum, which a checkpoint may lack, and not a statistic."""
    return name.startswith("running_") and name not in ("running_mean", "running_var")


def is_learned(name: str) -> bool:
    """Whether a parameter is a learned range, which a checkpoint may lack."""
    return name.startswith(NAMES)


class Derived:
    """A key of the state dict that follows from the ranges, as an attribute: whoever saves sharded parameters looks there."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        try:
            return module.derived()[self.name].detach()
        except KeyError:
            raise AttributeError(f"{type(module).__name__} has no {self.name}") from None


class Stored(Learned):
    """Saves what follows from the ranges beside them, and loads every stage's and upstream's own checkpoints."""

    scale_x, scale_o, scale_w, scale_normal = Derived(), Derived(), Derived(), Derived()
    scale_i, scale_h, scale_iw, scale_hw = Derived(), Derived(), Derived(), Derived()
    running_w, running_iw, running_hw, running_normal = Derived(), Derived(), Derived(), Derived()
    _plain: frozenset[str] = frozenset()  # names of ranges that are those of operands without a grid

    def derived(self) -> dict[str, Tensor]:
        """The keys of upstream's state dict that follow from the running ranges."""
        raise NotImplementedError

    def forget(self) -> None:
        """Ranges may have changed."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, value in self.derived().items():
            destination[prefix + key] = value.detach().clone()  # scales are shared; safetensors takes no memory twice

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, meta: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        self.take_names(own)
        for name, value in own.items():
            if name in self._buffers and is_range(name) and isinstance(value, Tensor):
                state_dict[prefix + name] = value.float()
            elif (
                name not in self._buffers
                and name not in self._parameters
                and (name in UPSTREAM_ONLY or name.startswith(("running_", "scale_", *NAMES)))
            ):
                del state_dict[prefix + name]
            elif name in self._parameters and isinstance(value, Tensor) and not value.is_floating_point():
                self._take_integers(state_dict, prefix, name, own, errors)
        new: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, meta, strict, new, unexpected, errors)
        missing += [key for key in new if not is_range(key[len(prefix) :]) and not is_learned(key[len(prefix) :])]
        self.forget()
        self.loaded({name for name in self.learned_names() if own.keys() & {p + name for p in NAMES}})

    def loaded(self, held: set[str]) -> None:
        """Also: training goes on as it would have where the checkpoint was saved, with ranges of operands without a grid."""
        super().loaded(held)
        ranges = {k.removeprefix("running_"): t for k, t in self._buffers.items() if t is not None and is_range(k)}
        found = {k for k, t in ranges.items() if k != "o" and not t.is_meta and not stands_for_scale(float(t))}
        self._plain = self._plain | found

    def _take_integers(
        self, state_dict: Any, prefix: str, name: str, own: Mapping[str, Tensor], errors: list[str]
    ) -> None:
        """What upstream's export leaves in a net, as the floats it stands for: w = q_w / s_w, b = q_b / (s_x s_w)."""
        keys = {"weight": ("scale_w",), "bias": ("scale_w", "scale_x")}.get(name, ())
        scales = [own[key].double().reshape(()) for key in keys if key in own and own[key].numel() == 1]
        scale = math.prod(float(s) for s in scales)
        if len(scales) == len(keys) > 0 and scale > 0 and "running_mean" not in self._buffers:
            state_dict[prefix + name] = (own[name].double() / scale).float()
            return
        errors.append(
            f'"{prefix}{name}" holds integers ({own[name].dtype}), as after an export of linger 1.1.1, which cannot be '
            "taken back here; load the checkpoint saved before that export"
        )
        state_dict[prefix + name] = self._parameters[name]
