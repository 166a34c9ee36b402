"""``linger.fit``: rewrite the layers that a chip refuses into such as it runs, without a change to the float function."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from linger.check import Report, Violation, check
from linger.errors import LingerError, during
from linger.fit import _images, _parts
from linger.limits import errors_of
from linger.ops import IntModule
from linger.ops._base import twin
from linger.ops._normalize import Normalized
from linger.ops.conv import Conv2dInt
from linger.swap import require_net
from linger.targets import Target
from linger.targets import target as find_target
from linger.trace import Graph, Node, recorded

__all__ = ["fit"]

MOST_PASSES = 4  # a rewrite may show another: a batch normalization that stood behind a convolution


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer that does not fit: where it is, what it reads, the batch normalization that alone reads it."""

    name: str
    layer: nn.Module
    violation: Violation
    chip: Target
    shape: tuple[int, ...]
    follower: str = ""
    bn: nn.BatchNorm1d | None = None

    def allows(self, of: str, number: int) -> bool:
        """Whether every limit of the chip on this op allows a number."""
        return all(
            x.allows(number) for x in self.chip.limits if (x.op, x.of, x.kind) == (self.violation.op, of, "error")
        )

    def largest(self, of: str) -> int:
        """The largest number that they allow, 0 for none."""
        return max((n for n in range(1, 64) if self.allows(of, n)), default=0)


def fit(net: nn.Module, target: str | os.PathLike[str], *args: Any, quiet: bool = False) -> nn.Module:
    """Rewrite, in place, the layers that ``target`` refuses and for which another form computes the same.

    Parameters of a rewritten layer are new objects under new names: call it before the optimizer is made, and load
    checkpoints of the old net before. What has no such form stays; ``check`` says what.

    Args:
        net: a float net, not traced.
        target: the chip, or the path of a .toml file.
        args: inputs of its forward, one sample.
        quiet: do not print what was rewritten.

    Returns:
        ``net`` (what stands for it where ``net`` itself is such a layer).

    Raises:
        LingerError: the net was traced or converted before, or its forward does not run on these inputs.
    """
    require_net("fit", net)
    with during("fit"):
        if any(isinstance(m, (IntModule, Normalized)) for m in net.modules()):
            raise LingerError("found a net that was traced or converted, allowed is a float net; call fit first")
        chip = find_target(target)
        for _ in range(MOST_PASSES):
            net, done = _pass(net, chip, args)
            if not quiet:
                print(*done, sep="\n", end="\n" if done else "")
            if not done:
                break
    return net


def _pass(net: nn.Module, chip: Target, args: tuple[Any, ...]) -> tuple[nn.Module, list[str]]:
    """Every rewrite that what ``check`` finds now asks for."""
    report: Report = check(net, *args, target=chip.name, quiet=True)
    graph = recorded(net, args)[0]
    done: list[str] = []
    for case in _cases(net, chip, report, graph):
        made = _rewritten(case)
        if made is None or case.name not in dict(net.named_modules()):
            continue
        made.train(case.layer.training)
        net = _put(net, case.name, made)
        if case.bn is not None:
            net = _put(net, case.follower, nn.Identity())
        done.append(
            f"fit: {case.name or 'the net'}: {type(case.layer).__name__} is now {_described(made)} ({case.violation.found})"
        )
    return net, done


def _described(made: nn.Module) -> str:
    inner = ", ".join(type(m).__name__ for m in made.children())
    return f"{type(made).__name__} of {inner}" if inner else str(made)


def _cases(net: nn.Module, chip: Target, report: Report, graph: Graph) -> list[Case]:
    """The layers of torch that a violation names, each once: by their name, or as the owner of a call."""
    modules = dict(net.named_modules())
    called = {n.module: n for n in graph.nodes if n.module is not None}
    found: dict[str, Case] = {}
    for v in report.violations:
        name = v.layer if v.layer in modules else v.layer.rpartition(".")[0]
        name = _leader(graph, name, modules) or name
        layer = modules.get(name)
        if v.kind not in ("error", "wrong") or name in found or type(layer) not in REWRITES or name not in called:
            continue
        assert layer is not None
        bn = _follower(graph, called[name], modules)
        found[name] = Case(
            name=name, layer=layer, violation=v, chip=chip, shape=called[name].inputs()[0].shape, follower=bn or "",
            bn=modules[bn] if bn else None,
        )  # fmt: skip
    return list(found.values())


def _follower(graph: Graph, node: Node, modules: dict[str, nn.Module]) -> str | None:
    """The batch normalization that is called once, alone reads a layer's output, and has its features as channels."""
    value = node.outputs[0]
    readers = [n for n in graph.nodes if any(v.id == value.id for v in n.inputs())]
    other_axis = type(modules.get(node.module or "")) is nn.Linear and len(value.shape) != 2
    if other_axis or len(readers) != 1 or any(v.id == value.id for v in graph.outputs):
        return None
    name = readers[0].module
    once = sum(n.module == name for n in graph.nodes) == 1
    return name if name is not None and once and type(modules.get(name)) is nn.BatchNorm1d else None


def _leader(graph: Graph, name: str, modules: dict[str, nn.Module]) -> str | None:
    """The Linear that a batch normalization alone reads."""
    reads = [
        v.id for n in graph.nodes if n.module == name and type(modules.get(name)) is nn.BatchNorm1d for v in n.inputs()
    ]
    for node in graph.nodes:
        made = node.module is not None and type(modules[node.module]) is nn.Linear and node.outputs[0].id in reads
        if made and _follower(graph, node, modules) == name:
            return node.module
    return None


def _put(net: nn.Module, name: str, made: nn.Module) -> nn.Module:
    """``made`` under the name of a module, wherever it is registered."""
    if not name:
        return made
    old = net.get_submodule(name)
    for module in list(net.modules()):
        for key, child in module._modules.items():
            if child is old:
                module._modules[key] = made
    return net


def _rewritten(case: Case) -> nn.Module | None:
    """None where there is no such form: of what has no batch, for example, whose channels would be taken for one."""
    batched = len(case.shape) == RANKS.get(type(case.layer), len(case.shape))
    return REWRITES[type(case.layer)](case) if batched else None


def _linear(case: Case) -> nn.Module | None:
    return _images.linear(case.layer, case.bn) if case.bn or case.violation.of in ("rows", "rank") else None  # type: ignore[arg-type]


def _batchnorm(case: Case) -> nn.Module:
    return _images.AsImage(_images.batchnorm(case.layer))  # type: ignore[arg-type]


def _conv1d(case: Case) -> nn.Module | None:
    made = _images.conv1d(case.layer, case.bn)  # type: ignore[arg-type]
    integer = twin(Conv2dInt, made.layers()[0])
    integer.start()
    return None if errors_of(integer, case.chip) else made


def _conv2d(case: Case) -> nn.Module | None:
    if case.violation.of == "kernel_over_stride":
        return _parts.widened(case.layer, case.largest("kernel"), case.largest("pad"))  # type: ignore[arg-type]
    if case.violation.of != "kernel":
        return None
    return _parts.kernel_parts(case.layer, case.largest("kernel"), case.largest("pad"))  # type: ignore[arg-type]


def _groups(case: Case) -> nn.Module | None:
    layer: Any = case.layer
    return _parts.GroupParts(layer) if layer.groups > 1 else None


def _pool(case: Case) -> nn.Module | None:
    too_large = case.violation.of == "kernel"
    return _parts.two_pools(case.layer, lambda n: case.allows("kernel", n)) if too_large else None


def _adaptive(case: Case) -> nn.Module | None:
    rank = 1 if isinstance(case.layer, nn.AdaptiveAvgPool1d) else 2
    return _images.adaptive(case.layer, case.shape[-rank:])  # type: ignore[arg-type]


REWRITES: dict[type[nn.Module], Callable[[Case], nn.Module | None]] = {
    nn.Linear: _linear,
    nn.BatchNorm1d: _batchnorm,
    nn.Conv1d: _conv1d,
    nn.ConvTranspose1d: lambda case: _images.conv_transpose1d(case.layer),  # type: ignore[arg-type]
    nn.Conv2d: _conv2d,
    nn.ConvTranspose2d: _groups,
    nn.MaxPool1d: lambda case: _images.pool1d(case.layer),
    nn.AvgPool1d: lambda case: _images.pool1d(case.layer),
    nn.MaxPool2d: _pool,
    nn.AvgPool2d: _pool,
    nn.AdaptiveAvgPool1d: _adaptive,
    nn.AdaptiveAvgPool2d: _adaptive,
}
RANKS: dict[type[nn.Module], int] = {
    **dict.fromkeys((nn.Conv1d, nn.ConvTranspose1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d), 3),
    **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d), 4),
}  # layer -> dimensions of its input, a batch with them
