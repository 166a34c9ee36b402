"""What the user's own training loop calls: parameter groups for learned ranges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from linger.errors import LingerError
from linger.ops import IntModule
from linger.ops._learned import NAMES
from linger.swap import require_net


def thresholds(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The learned ranges and their dotted names."""
    for name, p in net.named_parameters():
        if name.rpartition(".")[2].startswith(NAMES):
            yield name, p


def param_groups(net: nn.Module, *, threshold_lr: float = 0.01, **options: Any) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: the net's own parameters, and its learned ranges with a rate of their own.

    Args:
        net: a fixed-point net; without learned ranges there is one group.
        threshold_lr: learning rate of log2-domain thresholds; a learned step has this times its value, for it is that small.
            Meant for optimizers that normalize gradients, such as Adam.
        options: of the first group: ``lr``, ``weight_decay`` ...

    Returns:
        The groups; those of ranges have no weight decay.

    Raises:
        LingerError: a learned range has not been started by calibration or a training forward.
    """
    require_net("param_groups", net)
    _require_warm(net)
    found = list(thresholds(net))
    learned = {id(p) for _, p in found}
    groups: list[dict[str, Any]] = [{"params": [p for p in net.parameters() if id(p) not in learned], **options}]
    logs = [p for name, p in found if name.rpartition(".")[2].startswith("log2_")]
    if logs:
        groups.append({"params": logs, "lr": threshold_lr, "weight_decay": 0.0})
    for name, p in found:
        if name.rpartition(".")[2].startswith("step_"):
            groups.append({"params": [p], "lr": threshold_lr * p.item(), "weight_decay": 0.0})
    return groups


def _require_warm(net: nn.Module) -> None:
    for name, module in net.named_modules():
        if isinstance(module, IntModule):
            cold = [n for n in module.learned_names() if not module.is_warm(n)]
            if cold:
                raise LingerError(
                    f"param_groups: {name}: the learned range {cold[0]!r} has no value yet; call calibrate first, or run one "
                    "batch in training mode"
                )
