"""A net of any stage as the file it would become, without a change to the net, whatever has no form in it."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import nn

from linger.check._words import op_name
from linger.convert import disable_quant, init
from linger.errors import LingerError, LingerWarning
from linger.fuse import trace_layers
from linger.onnx.builder import DTYPES, ONNX_TYPES, Builder
from linger.onnx.export import DEFAULT_OPSET, build
from linger.onnx.inputs import given
from linger.onnx.writer import UNKNOWN, Writer
from linger.ops import IntModule
from linger.ops._base import dry
from linger.ops._normalize import Normalized
from linger.ops._site import Site
from linger.ops.convbn import EmptyBatchNorm
from linger.ops.quant import ScaledRoundLayer
from linger.targets import Target
from linger.trace import Graph, Node


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a node of the file comes from: the layer or call, its op and source line, and why it has no form."""

    name: str
    op: str
    source: str
    module: bool
    why: str = ""


class Lenient(Writer):
    """A writer that notes where nodes come from, and writes what has no form as a node of an unknown domain."""

    def __init__(self, net: nn.Module, graph: Graph, build: Builder) -> None:
        super().__init__(net, graph, build)
        self.made: list[tuple[ir.Node, Origin]] = []

    def node(self, node: Node) -> None:
        before, why = len(self.build.nodes), ""
        try:
            super().node(node)
        except LingerError as error:
            why = str(error)
            self.complete = False
            self._unknown(node)
        layer = self._layer(node)
        origin = Origin(
            name=node.name if layer is None else layer, op=node.op, source="" if layer is not None else node.source,
            module=layer is not None, why=why,
        )  # fmt: skip
        self.made += [(n, origin) for n in self.build.nodes[before:]]

    def _layer(self, node: Node) -> str | None:
        """The layer of the net that a node is, or is the only call of: its name, with the number of a later call."""
        if node.module is not None and not isinstance(self.modules.get(node.module), Site):
            return node.name if node.module else op_name(node.op)
        owner = node.name.rpartition(".")[0]
        module = self.modules.get(owner)
        own = module is not None and type(module).__module__.startswith("torch.nn") and not list(module.children())
        return owner if own else None

    def _unknown(self, node: Node) -> None:
        inputs = [self.exact[v.id] if v.id in self.exact else self.as_is(v) for v in node.inputs()]
        for v in node.outputs:
            dtype = DTYPES[v.bits] if v.scale is not None else ONNX_TYPES.get(v.dtype, ir.DataType.FLOAT)
            made = self.build.one(node.name, node.op, inputs, {}, dtype, v.shape, domain=UNKNOWN)
            (self.floats if v.scale is None else self.exact)[v.id] = made


def exported(
    net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], chip: Target, bits: dict[str, int]
) -> tuple[onnx.ModelProto, dict[str, Origin], list[str]]:
    """The file of a copy of ``net``, where its nodes come from, and what is said of layers left in float.

    Those that ``init`` leaves, and those whose fixed-point form refuses these inputs: each is taken out, and all are said.
    """
    refused: dict[str, str] = {}
    while True:
        made = copy.deepcopy(net)
        for name in refused:
            disable_quant(made.get_submodule(name))
        try:
            proto, origins, left = _once(made, args, kwargs, chip, bits)
        except LingerError as error:
            name, fact = _refusing(error)
            if name in refused or _float_layer(net, name) is None:
                raise
            refused[name] = fact
        else:
            return proto, origins, [*left, *(f"{name}: {fact}" for name, fact in refused.items())]


def _refusing(error: LingerError) -> tuple[str, str]:
    """The layer that an error speaks of, "" where it speaks of none, and what it says."""
    inner: BaseException | None = error
    while isinstance(inner, LingerError) and not inner.layer:
        inner = inner.__cause__
    return (inner.layer, inner.fact) if isinstance(inner, LingerError) else ("", "")


def _float_layer(net: nn.Module, name: str) -> nn.Module | None:
    """A layer of the net that could stay in float."""
    layer = dict(net.named_modules()).get(name) if name else None
    return None if isinstance(layer, IntModule) else layer


def _once(
    made: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], chip: Target, bits: dict[str, int]
) -> tuple[onnx.ModelProto, dict[str, Origin], list[str]]:
    args, kwargs = given(made, args, kwargs)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = _converted(made, args, kwargs, chip, bits)
        ranged = _ranged(made, args, kwargs)
        proto, origins = built(made, args, kwargs, chip, ranged)
    left = [str(w.message) for w in said if issubclass(w.category, LingerWarning)]
    return proto, origins, left


def _converted(
    net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], chip: Target, bits: dict[str, int]
) -> nn.Module:
    modules = [m for m in net.modules() if not isinstance(m, ScaledRoundLayer)]
    if any(isinstance(m, IntModule) for m in modules):
        return follow(net, chip)
    if not kwargs and not any(isinstance(m, (Normalized, EmptyBatchNorm)) for m in modules):
        trace_layers(net, net, *args)
    return init(net, target=chip.name, limits=False, **bits)  # type: ignore[arg-type]


def follow(net: nn.Module, chip: Target) -> nn.Module:
    """Let a converted net compute as another chip does, in place."""
    for module in net.modules():
        if isinstance(module, IntModule):
            module.follow_chip(chip.name)
            module.forget()
        elif "_linger_chip" in module.__dict__:
            module._linger_chip = chip.name  # type: ignore[assignment]
    net._linger_target = chip.name  # type: ignore[assignment]
    return net


def _ranged(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether every range is known: after one training forward where the net allows one on these inputs."""
    modes = {m: m.training for m in net.modules()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            net.train()
            net(*args, **kwargs)
        except Exception:  # one value per channel, for example: the forward in eval says what else is wrong
            return False
        finally:
            for m in net.modules():
                m.training = modes.get(m, False)
    return True


def built(
    net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], chip: Target, ranged: bool = True
) -> tuple[onnx.ModelProto, dict[str, Origin]]:
    """The file of a converted net and where its nodes come from. ``ranged``: its ranges are known."""
    writers: list[Lenient] = []

    def writer(*parts: Any) -> Lenient:
        writers.append(Lenient(*parts))
        return writers[0]

    def write() -> onnx.ModelProto:
        return build(net, args, kwargs, None, None, DEFAULT_OPSET, {}, "thinker", chip.name, writer)[0]

    if ranged:
        proto = write()
    else:
        with dry():
            proto = write()
    return proto, {str(node.name): origin for node, origin in writers[0].made}
