"""trace_layers: run the float net once, swap conv + bn pairs for fused modules, mark layers followed by relu or sigmoid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linger import checkpoint
from linger.errors import LingerError, during
from linger.ops import IntModule
from linger.ops._base import dry
from linger.ops._normalize import Normalized
from linger.ops.batchnorm import BATCHNORMS
from linger.ops.convbn import FUSED, EmptyBatchNorm
from linger.ops.quant import ScaledRoundLayer
from linger.swap import require_net
from linger.trace import Graph, Node, recorded

RELU = {"ReLU", "relu"}
SIGMOID = {"Sigmoid", "sigmoid"}
CONV = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def consumers(graph: Graph) -> dict[int, list[Node | None]]:
    """For each value, the nodes that read it; None stands for the caller of the net."""
    readers: dict[int, list[Node | None]] = {}
    for node in graph.nodes:
        for value in node.inputs():
            readers.setdefault(value.id, []).append(node)
    for value in graph.outputs:
        readers.setdefault(value.id, []).append(None)
    return readers


def sole_followers(graph: Graph) -> dict[str, set[str]]:
    """For each module, the op that alone reads its result, one per call; "" where there is none or more than one."""
    readers = consumers(graph)
    found: dict[str, set[str]] = {}
    for node in graph.nodes:
        if node.module is not None:
            after = readers.get(node.outputs[0].id, []) if len(node.outputs) == 1 else []
            only = after[0] if len(after) == 1 else None
            found.setdefault(node.module, set()).add(only.module or only.op if only is not None else "")
    return found


def shared_parameters(root: nn.Module) -> set[int]:
    """Ids of the parameters that more than one module owns (tied weights)."""
    owners = Counter(id(p) for m in root.modules() for p in m._parameters.values() if p is not None)
    return {key for key, n in owners.items() if n > 1}


Places = dict[nn.Module, list[tuple[nn.Module, str]]]


def places_of(root: nn.Module) -> Places:
    """Where each module hangs below ``root``: its owners, and its name in each."""
    places: Places = {}
    for owner in root.modules():
        for name, child in owner._modules.items():
            if child is not None:
                places.setdefault(child, []).append((owner, name))
    return places


def replace(places: Places, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` hung when ``places`` was made."""
    for owner, name in places[old]:
        owner._modules[name] = new


def pairs(root: nn.Module, names: dict[str, nn.Module], graph: Graph) -> list[tuple[str, str]]:
    """(conv, bn) names: the convolution's only reader is the batch normalization, each is called once, types are exact.

    A pair with a forward hook stays apart, for the hook would see other tensors; so does one of which only the batch
    normalization is to stay as it is.
    """
    after = sole_followers(graph)
    calls = Counter(node.module for node in graph.nodes)
    tied = shared_parameters(root)
    found: list[tuple[str, str]] = []
    for conv, followers in after.items():
        if len(followers) != 1:
            continue
        (bn,) = followers
        if bn not in names or (type(names[conv]), type(names[bn])) not in FUSED:
            continue
        source, norm = names[conv], names[bn]
        hooked = any(m._forward_pre_hooks or m._forward_hooks for m in (source, norm))
        plain = isinstance(source._parameters.get("weight"), Tensor) and not hooked
        untied = not any(id(p) in tied for m in (source, norm) for p in m.parameters())
        if (
            plain
            and untied
            and _agree(source, norm)
            and calls[conv] == calls[bn] == 1
            and norm.running_mean is not None
        ):
            found.append((conv, bn))
    return found


def _agree(conv: nn.Module, bn: nn.Module) -> bool:
    """Whether no stage is disabled for the batch normalization alone."""
    keys = ("_linger_normalize", "_linger_quant")
    return not any(bn.__dict__.get(k) is False and conv.__dict__.get(k) is not False for k in keys)


def trace_layers(
    root_model: nn.Module,
    target_model: nn.Module,
    *args: Any,
    fuse_bn: bool = True,
    ahead_conv_relu: bool = True,
    ahead_bn_relu: bool = True,
    ahead_linear_relu: bool = True,
    ahead_conv_sigmoid: bool = True,
    ahead_linear_sigmoid: bool = True,
) -> nn.Module:
    """Run ``target_model(*args)`` once and prepare ``root_model`` in place.

    Every convolution whose only reader is a batch normalization becomes a ``NormalizeConvBN*`` under the convolution's
    name (``EmptyBatchNorm`` under the other's) with the same parameters. Layers whose only reader is a relu are marked,
    so that their grid is chosen for the positive half. The run is in eval mode and leaves no statistics behind.

    Args:
        root_model: the net whose state dict will be loaded; ``target_model`` is it or one of its modules.
        target_model: the module to run.
        args: the inputs of its forward; one tuple stands for several inputs.
        fuse_bn: fuse conv + bn.
        ahead_conv_relu: mark conv -> relu; the other ``ahead`` flags do so for bn, linear and sigmoid.

    Returns:
        ``root_model``.

    Raises:
        LingerError: ``target_model`` is not part of ``root_model``, was already traced or converted, or its forward
            does not accept ``args``.
    """
    require_net("trace_layers", root_model)
    names = dict(root_model.named_modules())
    if target_model not in names.values():
        raise LingerError("trace_layers: target_model is not part of root_model; pass the net that contains it first")
    for name, module in target_model.named_modules():
        if isinstance(module, (IntModule, Normalized, EmptyBatchNorm)) and not isinstance(module, ScaledRoundLayer):
            raise LingerError(
                f"trace_layers: {name or type(target_model).__name__}: found {type(module).__name__}, allowed is a float net "
                "that was not traced before; call trace_layers once, before normalize_layers and init"
            )
    inputs = args[0] if len(args) == 1 and type(args[0]) is tuple else args
    with during("trace_layers"), dry():
        graph = recorded(target_model, inputs, lenient=True)[0]
    below = dict(target_model.named_modules())
    fused = pairs(target_model, below, graph) if fuse_bn else []
    flags = {
        "relu": (ahead_conv_relu, ahead_bn_relu, ahead_linear_relu),
        "sigmoid": (ahead_conv_sigmoid, False, ahead_linear_sigmoid),
    }
    _mark(below, graph, fused, flags)
    _note_shapes(below, graph)
    plan = checkpoint.plan_of(root_model)
    outer, places = {module: name for name, module in names.items()}, places_of(root_model)
    for conv, bn in fused:
        plan.append(_fuse(places, below[conv], below[bn], outer[below[conv]], outer[below[bn]]))
    checkpoint.attach(root_model, plan)
    root_model._linger_sample = pytree.tree_map_only(Tensor, _hollow, inputs) if root_model is target_model else None  # type: ignore[assignment]
    return root_model


def _hollow(x: Tensor) -> Tensor:
    """Zeros of the same shape that take no memory."""
    return x.new_zeros(()).expand(x.shape)


def _mark(
    below: dict[str, nn.Module],
    graph: Graph,
    fused: Iterable[tuple[str, str]],
    flags: dict[str, tuple[bool, bool, bool]],
) -> None:
    after = sole_followers(graph)
    followed = {key: {type(below[f]).__name__ if f in below else f for f in v} for key, v in after.items()}
    ends = dict(fused)
    for name in after:
        module = below[name]
        for what, ops in (("relu", RELU), ("sigmoid", SIGMOID)):
            conv, bn, linear = flags[what]
            wanted = bn if name in ends else next(
                (w for w, kinds in ((conv, CONV), (bn, BATCHNORMS), (linear, (nn.Linear,))) if isinstance(module, kinds)), False
            )  # fmt: skip
            last = followed.get(ends.get(name, name), set())
            if wanted and last and last <= ops:
                setattr(module, f"_linger_ahead_{what}", True)


def _note_shapes(below: dict[str, nn.Module], graph: Graph) -> None:
    """Every layer's first input as one sample, for the limits of a chip."""
    for node in reversed(graph.nodes):
        inputs = node.inputs()
        if node.module in below and inputs and inputs[0].shape:
            below[node.module]._linger_shape = (1, *map(int, inputs[0].shape[1:]))  # type: ignore[assignment]


def _fuse(places: Places, conv: Any, bn: Any, conv_name: str, bn_name: str) -> checkpoint.Pair:
    made = FUSED[type(conv), type(bn)](conv, bn, ahead_relu=getattr(conv, "_linger_ahead_relu", False))
    for key in ("_linger_normalize", "_linger_quant"):
        settings = [m.__dict__[key] for m in (conv, bn) if key in m.__dict__]
        if settings:
            setattr(made, key, settings[0])
    empty = EmptyBatchNorm()
    empty.train(bn.training)
    replace(places, bn, empty)
    replace(places, conv, made)
    return checkpoint.Pair(conv=conv_name, bn=bn_name, eps=bn.eps, transposed=conv.transposed, groups=conv.groups)
