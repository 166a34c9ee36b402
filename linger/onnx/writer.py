"""From a recorded Graph to ONNX nodes: modules say what they compute, moves and float calls are looked up in tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linger.errors import LingerError
from linger.onnx import packed
from linger.onnx.builder import DTYPES, THINKER, Builder
from linger.onnx.emit import written
from linger.onnx.float_ops import FLOAT_OPS, OTHER, RANDOM, SIZED
from linger.onnx.indexing import INDEXING, assigned
from linger.onnx.moves import MOVES
from linger.onnx.selects import SELECTED
from linger.onnx.sizes import Dyn, is_dynamic
from linger.ops import IntModule, Lowered, Operand
from linger.ops._constant import constant_of
from linger.targets import difference, known
from linger.trace import Graph, Node, Value

ORDERS = ("empty_like", "scatter", "arange")  # what PyTorch inverts the order of a packed sequence with
UNKNOWN = "linger.unknown"  # domain of a call that has no form


class Writer:
    """Keeps, for every recorded value, its integers and its float form; adds Quant, Dequant and Requant where they differ.

    ``complete``: every call has a form in the file, so that the file must be valid.
    """

    complete = True

    def __init__(self, net: nn.Module, graph: Graph, build: Builder) -> None:
        self.net, self.graph, self.build = net, graph, build
        self.modules = dict(net.named_modules(remove_duplicate=False))
        self.exact: dict[int, ir.Value] = {}
        self.floats: dict[int, ir.Value] = {}
        self.quantized: dict[tuple[str, float, int], ir.Value] = {}
        self.tensors = {id(t): name for name, t in (*net.named_buffers(), *net.named_parameters())}
        self.cast: dict[int, ir.Value] = {}
        self.islands: list[str] = []
        self.peaks: dict[str, float] = {}
        self.packed: dict[int, packed.Padded] = {}

    # --- operands

    def plain(self, v: Any) -> ir.Value:
        """The float form of a value, a constant of the net, or a number; integers and truth values are cast."""
        if not isinstance(v, Value):
            return self.build.scalar(float(v), f"number_{float(v)!r}")
        x = self.as_is(v)
        if x.dtype == ir.DataType.FLOAT:
            return x
        if v.id not in self.cast:
            self.cast[v.id] = self.build.one(f"{x.name}.float", "Cast", [x], {"to": 1}, ir.DataType.FLOAT, v.shape)
        return self.cast[v.id]

    def as_is(self, v: Value) -> ir.Value:
        """A value outside of fixed point in its own type."""
        if v.id in self.floats:
            return self.floats[v.id]
        if v.id in self.exact:
            assert v.scale is not None
            x = self.exact[v.id]
            attrs = {"scale_o": v.scale, "data_bits": v.bits}
            made = self.build.one(
                f"{x.name}.dequant", "Dequant", [x], attrs, ir.DataType.FLOAT, v.shape, domain=THINKER
            )
        else:
            made = self.fixed(v)
        self.floats[v.id] = made
        return made

    def integer(self, v: Value) -> ir.Value:
        """A tensor of indices as int64."""
        x = self.as_is(v)
        if x.dtype == ir.DataType.INT64:
            return x
        return self.build.one(
            f"{x.name}.int64", "Cast", [x], {"to": int(ir.DataType.INT64)}, ir.DataType.INT64, v.shape
        )

    def constant_of(self, v: Value) -> np.ndarray | None:
        """The contents of a parameter, buffer or constant of the forward; None for what depends on an input."""
        tensor = self.known(v)
        if tensor is None or is_dynamic(v.shape):
            return None
        tensor = tensor.detach().cpu()
        array: np.ndarray = (tensor.float() if tensor.dtype.is_floating_point else tensor).numpy()
        return array

    def fixed(self, v: Value) -> ir.Value:
        """A parameter, buffer or constant of the forward as an initializer under its state-dict key."""
        array = self.constant_of(v)
        if array is None:
            raise LingerError(
                f"a tensor of shape {tuple(int(s) for s in v.shape)} made in forward depends on a dynamic axis; register it as a buffer"
            )
        return self.build.constant(self.key(self.known(v)) or f"constant_{v.id}", array)

    def known(self, v: Value) -> Tensor | None:
        """A parameter, buffer or constant of the forward."""
        return self.graph.constants.get(v.id, self.graph.results.get(v.id))

    def key(self, tensor: Tensor | None) -> str:
        """The state-dict key of a parameter or buffer, with the name of a part behind it; "" for anything else."""
        constant = constant_of(tensor)
        if constant is None or constant.name is None:
            return self.tensors.get(id(tensor), "")
        key = self.tensors.get(id(constant.leaves[0]), "")
        return f"{key}.{constant.name}" if key and constant.name else key

    def weight(self, v: Value, name: str) -> Tensor:
        """The values of a weight, which the module itself puts on a grid: they must be the same in every run."""
        tensor = self.known(v)
        if tensor is None or self.constant_of(v) is None:
            raise LingerError(
                f"{name} is a weight whose values depend on a dynamic axis; fix that axis, or make it an activation with quant_tensor"
            )
        return tensor

    def integers(self, v: Value, module: IntModule, position: int, bits: int) -> tuple[ir.Value, Operand]:
        """The operand on a grid of ``bits`` bits, as the module's own forward makes it."""
        dynamic = frozenset(i for i, size in enumerate(v.shape) if is_dynamic(size))
        taken = replace(module.taken(position, v.scale, v.bits, bits, v.shape), dynamic=dynamic)
        if v.scale is None:
            return self.quant(v, taken.scale, bits), taken
        x = self.exact[v.id]
        if v.bits == bits:
            return x, taken
        key = (str(x.name), taken.scale, bits)
        if key not in self.quantized:
            attrs = {"scale_x": v.scale, "scale_o": taken.scale, "data_bits": v.bits, "o_bits": bits}
            self.quantized[key] = self.build.one(
                f"{x.name}.requant", "Requant", [x], attrs, DTYPES[bits], v.shape, domain=THINKER, form=str(bits)
            )
        return self.quantized[key], taken

    def quant(self, v: Value, scale: float, bits: int) -> ir.Value:
        """A plain tensor as integers; one Quant per tensor and grid."""
        x = self.plain(v)
        key = (str(x.name), scale, bits)
        if key not in self.quantized:
            attrs = {"scale_x": scale, "data_bits": bits}
            self.quantized[key] = self.build.one(
                f"{x.name}.quant", "Quant", [x], attrs, DTYPES[bits], v.shape, domain=THINKER, form=str(bits)
            )
        return self.quantized[key]

    # --- nodes

    def write(self) -> None:
        for node in self.graph.nodes:
            try:
                self.node(node)
            except LingerError as error:
                if error.layer or str(error).startswith(node.name):
                    raise
                raise LingerError(f"{node.name}: {error}" + (f" ({node.source})" if node.source else "")) from error

    def node(self, node: Node) -> None:
        module = self.modules.get(node.module) if node.module is not None else None
        if isinstance(module, IntModule) and module.several:
            self.lowered(node, module)
            return
        if node.op == packed.UNPACK:
            packed.unpack(self, node)
            return
        packed.refuse(self, node)
        if isinstance(module, IntModule):
            self.lowered(node, module)
        elif node.op == packed.PACK:
            packed.pack(self, node)
        elif self.is_constant(node):
            return  # written where it is used
        elif node.op in MOVES or node.op in INDEXING:
            self.moved(node)
        elif node.op in SELECTED:
            self.selected(node)
        else:
            self.float_op(node)

    def is_constant(self, node: Node) -> bool:
        """Whether a call made the same of constants in every recording."""
        known = all(v.id in self.graph.constants or v.id in self.graph.results for v in node.inputs())
        if known and node.op.startswith(RANDOM):
            raise LingerError(f"{node.name}: found {node.op}, random in eval; draw outside of the exported net")
        return all(v.id in self.graph.results and not is_dynamic(v.shape) for v in node.outputs)

    def moved(self, node: Node) -> None:
        source = node.inputs()[0]
        keeps = source.scale is not None and all(v.scale is not None for v in node.outputs)
        x = self.exact[source.id] if keeps else self.as_is(source)
        if not keeps and source.scale is not None:
            self.islands.append(f"{node.name} ({node.op})")
        held = self.exact if keeps else self.floats
        move = MOVES.get(node.op) or INDEXING[node.op]
        for v, made in zip(node.outputs, move(self, node, x), strict=True):
            held[v.id] = made

    def selected(self, node: Node) -> None:
        """Values of a gridded tensor stay integers; its indices and everything of a plain one have no grid."""
        source = node.inputs()[0]
        kept = source.scale is not None and (node.outputs[0].scale is not None or node.outputs[0].dtype == torch.int64)
        x = self.exact[source.id] if kept else self.as_is(source)
        for v, made in zip(node.outputs, SELECTED[node.op](self, node, x), strict=True):
            held = self.exact if v.scale is not None else self.floats
            held[v.id] = made

    def float_op(self, node: Node) -> None:
        if node.op == "setitem":
            made = [assigned(self, node)]
        else:
            row = FLOAT_OPS.get(node.op)
            if row is None or node.func in OTHER:
                raise LingerError(
                    f"{node.name}: found {node.op} at {node.source}, which has no form in the file, allowed are fixed-point "
                    f"layers, calls that move values, and the {len(FLOAT_OPS)} calls of linger.onnx.float_ops.FLOAT_OPS; "
                    "rewrite the call, or keep it out of the exported net"
                )
            if node.op not in SIZED and is_dynamic((node.args, node.kwargs)):
                raise LingerError(f"{node.name}: an argument of {node.op} changes with a dynamic axis; fix that axis")
            made = written(self, node, row)
        if node.outputs[0].dtype != torch.bool and not self.orders(node):  # a comparison and an order lose nothing
            self.islands.append(f"{node.name} ({node.op})")
        self.floats.update({v.id: x for v, x in zip(node.outputs, made, strict=True)})

    def orders(self, node: Node) -> bool:
        """Whether a call only serves to invert an order."""
        made = {v.id for v in node.outputs}
        readers = [n for n in self.graph.nodes if any(v.id in made for v in n.inputs())]
        return node.op == "scatter" or (node.op in ORDERS and bool(readers) and all(n.op == "scatter" for n in readers))

    def lowered(self, node: Node, module: IntModule) -> None:
        assert node.module is not None
        module.require_ranges()
        held = {k: v for k, v in node.kwargs.items() if k in module.parameter_names and isinstance(v, Value)}
        stored = {v.id for v in held.values()}
        values, padded = packed.entered(self, [v for v in node.inputs() if v.id not in stored])
        bits = module.operand_bits([0 if v.scale is None else v.bits for v in values])
        taken = [
            (self.as_is(v), Operand(scale=1.0, bits=0, shape=v.shape, dtype=v.dtype))
            if i in module.raw
            else self.integers(v, module, i, bits)
            for i, v in enumerate(values)
        ]
        out = node.outputs[0]
        if out.scale is None:
            raise LingerError(
                f"{node.name}: found a result without a grid, so a forward hook of the layer changes it, allowed are hooks that "
                "only look; make the change in the forward of the net"
            )
        call: dict[Any, Any] = dict(enumerate(node.args)) | node.kwargs
        call = {k: v for k, v in call.items() if not any(isinstance(x, Value) for x in pytree.tree_leaves(v))}
        call |= {k: self.weight(v, k) for k, v in held.items()}
        if padded is not None:
            call["packed_first"] = padded.batch_first
        names = {k: self.key(v) for k, v in call.items() if k in held}
        steps = self.constant_lowering(node, module, [o for _, o in taken], out, call)
        peak = max((step.peak for step in steps), default=0.0)
        if peak or module.weighted:
            s_x = torch.tensor(taken[0][1].scale)
            self.peaks[node.module or node.name] = peak or module.accumulator_peak(s_x)
        results = (steps[-1].results or (f"%{len(steps) - 1}",)) if steps else (0,)
        operands = [x for x, _ in taken]
        made: list[list[ir.Value]] = []
        for i, step in enumerate(steps):
            first = results[0] == f"%{i}"
            made.append(self.step(node, step, operands, made, out.shape if first else None, first, names))
        for given, ref in zip(node.outputs, results, strict=True):
            place = self.floats if given.scale is None else self.exact
            place[given.id] = result = _referred(ref, operands, made)
            if isinstance(ref, str) and result.shape is None:
                result.shape = self.build.shape(given.shape)
        if padded is not None:
            shape = (*padded.shape[:-1], out.shape[-1])
            self.packed[out.id] = replace(padded, shape=shape, clean=True)
            self.exact[out.id].shape = self.build.shape(shape)

    def constant_lowering(
        self, node: Node, module: IntModule, operands: Sequence[Operand], out: Value, call: dict[Any, Any]
    ) -> tuple[Lowered, ...]:
        """What the module lowers to, which must not depend on a dynamic size."""
        assert out.scale is not None
        count = 1 + len(self.build.symbols)
        each: list[tuple[Lowered, ...]] = []
        for k in range(count):
            at = tuple(replace(o, shape=_at(o.shape, k)) for o in operands)
            said = {key: _number_at(v, k) for key, v in call.items()}
            result = Operand(scale=out.scale, bits=out.bits, shape=_at(out.shape, k))
            each.append(module.lower(at, result, said))
        for symbol, other in zip(self.build.symbols, each[1:], strict=True):
            wrong = _differing(each[0], other)
            if wrong:
                raise LingerError(
                    f"{node.name}: {wrong} of the call at {node.source} changes with dynamic axis {symbol!r}; fix that axis"
                )
        self.refuse_other_target(node, module, each[0], lambda: module.lower(at, result, said))
        return each[0]

    def refuse_other_target(
        self, node: Node, module: IntModule, steps: tuple[Lowered, ...], again: Callable[[], tuple[Lowered, ...]]
    ) -> None:
        """Raise if the target of the file computes this otherwise than the target that the net was trained for."""
        own, file = module.chip, self.build.target
        if own == file.name:
            return
        try:
            module.follow_chip(file.name)
            wrong = _differing(steps, again()) or ("rounding" if known(own).rounding != file.rounding else "")
        finally:
            module.follow_chip(own)
        if wrong:
            why = next(filter(None, (difference(s.op_type, known(own), file) for s in steps)), f"another {wrong}")
            raise LingerError(
                f"found a net that follows {own} exported for {file.name}, which has {why}, allowed is one chip; pass "
                f"target={file.name!r} to init, and see with linger.retarget what that changes"
            )

    def step(
        self, node: Node, step: Lowered, operands: Sequence[ir.Value], made: Sequence[Sequence[ir.Value]], shape: Any,
        last: bool, names: Mapping[str, str],
    ) -> list[ir.Value]:  # fmt: skip
        inputs: list[ir.Value] = []
        for i in step.inputs:
            if isinstance(i, int) or i.startswith("%"):
                inputs.append(_referred(i, operands, made))
            else:
                inputs.append(self.build.constant(names.get(i) or f"{node.module}.{i}".lstrip("."), step.params[i]))
        key = (str(inputs[0].name), float(step.attrs["scale_o"]), step.bits) if step.op_type == "Requant" else None
        if key is not None and key in self.quantized:
            return [self.quantized[key]]
        stem = node.name or type(self.net).__name__  # a net that is one layer
        name = stem if last else f"{stem}.{step.op_type}"
        first, *more = (DTYPES.get(bits, ir.DataType.FLOAT) for bits in (step.bits, *step.more))
        outputs = self.build.add(
            name, step.op_type, inputs, step.attrs, first, shape, domain=step.domain, form=step.form, more=more
        )  # fmt: skip
        if key is not None:
            self.quantized[key] = outputs[0]
        return outputs


def _referred(ref: int | str, operands: Sequence[ir.Value], made: Sequence[Sequence[ir.Value]]) -> ir.Value:
    """The value that a reference of ``Lowered`` means: an operand, or an output of an earlier node."""
    if isinstance(ref, int):
        return operands[ref]
    step, _, output = ref[1:].partition(".")
    return made[int(step)][int(output or 0)]


def _differing(steps: Sequence[Lowered], others: Sequence[Lowered]) -> str:
    """Names of what differs between two lowerings, "" where they are equal."""
    if [s.op_type for s in steps] != [s.op_type for s in others]:
        return ", ".join(s.op_type for s in steps)
    for a, b in zip(steps, others, strict=True):
        wrong = [key for key in a.attrs if a.attrs[key] != b.attrs[key]]
        wrong += [key for key in a.params if not np.array_equal(a.params[key], b.params[key])]
        if wrong or a.form != b.form:
            return ", ".join(wrong) or a.op_type
    return ""


def _number_at(tree: Any, k: int) -> Any:
    """Arguments of a call as they were in recording ``k``."""
    return pytree.tree_map_only(Dyn, lambda size: size.values[k], tree)


def _at(shape: Sequence[int], k: int) -> tuple[int, ...]:
    return tuple(getattr(s, "values", (int(s),) * (k + 1))[k] for s in shape)
