"""Mistakes of implementations, put into files and runs on purpose: nets x kinds of faults x nodes, as data.

Arithmetic faults are computed here from sums that PyTorch makes in float64, independently of ``linger.why``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch.nn import functional as F
from why_nets import NORMALIZED, Arrays, Made, made, run

from linger import runtime

# --- arithmetic faults: functions of the exact sum v, the shift n, and the width


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def sums(node: onnx.NodeProto, x: list[np.ndarray], dtype: torch.dtype = torch.float64) -> np.ndarray:
    """sum(q_x q_w) + q_b of a weighted node, by PyTorch."""
    a = attributes(node)
    t, w = (torch.from_numpy(v.astype(np.float64)).to(dtype) for v in x[:2])
    if node.op_type.startswith("Conv"):
        conv = F.conv2d if w.dim() == 4 else F.conv1d
        pads = list(a["pads"])[: w.dim() - 2]
        y = conv(t, w, None, tuple(a["strides"]), tuple(pads), tuple(a["dilations"]), a["group"])
        b = torch.from_numpy(x[2].astype(np.float64)).reshape(1, -1, *[1] * (w.dim() - 2))
    else:
        y = t @ (w.T if node.op_type == "LinearInt" else w)
        b = torch.from_numpy(x[2].astype(np.float64)) if len(x) > 2 else torch.zeros(())
    return (y.double() + b).numpy()


def shift_of(node: onnx.NodeProto) -> int:
    a = attributes(node)
    return int(np.log2(a["scale_x"] * a.get("scale_w", a.get("scale_y", 1.0)) / a["scale_o"]))


Rounding = Callable[[np.ndarray, int, int], np.ndarray]


def clipped(v: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(v, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def wraps(v: np.ndarray, bits: int) -> np.ndarray:
    return (v + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


def halfway(v: np.ndarray, n: int) -> np.ndarray:
    return np.floor(v / 2.0**n + 0.5)


ARITHMETIC: dict[str, list[tuple[str, Rounding]]] = {
    "tie": [
        ("even", lambda v, n, b: clipped(np.rint(v / 2.0**n), b)),
        ("down", lambda v, n, b: clipped(np.ceil(v / 2.0**n - 0.5), b)),
        ("away", lambda v, n, b: clipped(np.sign(v) * np.floor(np.abs(v) / 2.0**n + 0.5), b)),
    ],
    "truncation": [
        ("floor", lambda v, n, b: clipped(np.floor(v / 2.0**n), b)),
        ("zero", lambda v, n, b: clipped(np.trunc(v / 2.0**n), b)),
    ],
    "double rounding": [
        ("half", lambda v, n, b: clipped(halfway(halfway(v, n // 2), n - n // 2), b)),
        ("late", lambda v, n, b: clipped(halfway(halfway(v, n - 2), 2), b)),
        ("even", lambda v, n, b: clipped(np.rint(np.rint(v / 2.0 ** (n - 3)) / 8), b)),
    ],
    "saturation": [
        ("wraps", lambda v, n, b: wraps(halfway(v, n), b)),
        ("symmetric", lambda v, n, b: np.maximum(clipped(halfway(v, n), b), -(2 ** (b - 1)) + 1)),
    ],
    "accumulator overflow": [
        ("int32", lambda v, n, b: clipped(halfway(wraps(v, 32), n), b)),
        ("int32 saturates", lambda v, n, b: clipped(halfway(clipped(v, 32), n), b)),
        ("int16", lambda v, n, b: clipped(halfway(wraps(v, 16), n), b)),
        ("float32", lambda v, n, b: clipped(halfway(v.astype(np.float32).astype(np.float64), n), b)),
    ],
}  # fmt: skip
WEIGHTED = ("Conv1dInt", "Conv2dInt", "LinearInt", "BmmInt")


@dataclass(kw_only=True)
class Fault:
    """One seeded fault. ``make``: what the faulty run computes, and the file that makes it, where a file does."""

    net: str
    kind: str
    form: str
    make: Callable[[], tuple[Arrays, onnx.ModelProto | None]]

    @cached_property
    def both(self) -> tuple[Arrays, onnx.ModelProto | None]:
        return self.make()

    @property
    def wrong(self) -> Arrays:
        return self.both[0]

    @property
    def mutated(self) -> onnx.ModelProto | None:
        return self.both[1]

    @property
    def node(self) -> str:
        """The first tensor that differs, "" where none does."""
        right = made(self.net).right
        return next((k for k in right if not np.array_equal(right[k], self.wrong[k])), "")


def _steps(m: Made, kind: str, form: str, node: onnx.NodeProto, step: Callable[..., Any]) -> Fault:
    """A fault of a node that computes ``step``."""
    return Fault(net=m.name, kind=kind, form=form, make=lambda: (run(m.proto, m.x, {node.output[0]: step}), None))


def arithmetic(m: Made) -> Iterator[Fault]:
    for node in m.proto.graph.node:
        if node.op_type not in WEIGHTED or shift_of(node) < 3:
            continue
        for kind, forms in ARITHMETIC.items():
            for form, rounding in forms:

                def step(*x: np.ndarray, node: onnx.NodeProto = node, rounding: Rounding = rounding) -> np.ndarray:
                    bits = 8 * m.right[node.output[0]].dtype.itemsize
                    return rounding(sums(node, list(x)), shift_of(node), bits).astype(m.right[node.output[0]].dtype)

                yield _steps(m, kind, form, node, step)


def pairs(m: Made) -> Iterator[Fault]:
    """uint8 times int8, two products at a time in 16 bits that saturate."""
    for node in m.proto.graph.node:
        if node.op_type != "LinearInt" or m.right[node.output[0]].dtype != np.int8:
            continue

        def step(x: np.ndarray, w: np.ndarray, b: np.ndarray, node: onnx.NodeProto = node) -> np.ndarray:
            products = (x.astype(np.int64) + 128)[..., None, :] * w.astype(np.int64)
            total = np.clip(products.reshape(*products.shape[:-1], -1, 2).sum(-1), -(2**15), 2**15 - 1).sum(-1)
            v = total - 128 * w.astype(np.int64).sum(-1) + b
            return clipped(halfway(v.astype(np.float64), shift_of(node)), 8).astype(np.int8)

        yield _steps(m, "accumulator overflow", "pairs", node, step)


def means(m: Made) -> Iterator[Fault]:
    """Average pools over windows that do not overlap, rounded in another way."""
    forms: dict[tuple[str, str], Callable[[np.ndarray], np.ndarray]] = {
        ("tie", "even mean"): np.rint, ("tie", "mean down"): lambda v: np.ceil(v - 0.5),
        ("truncation", "mean floor"): np.floor, ("truncation", "mean zero"): np.trunc,
    }  # fmt: skip
    for node in m.proto.graph.node:
        if node.op_type != "AvgPool2dInt":
            continue
        kernel = tuple(attributes(node)["kernel_shape"])
        for (kind, form), rounding in forms.items():

            def step(x: np.ndarray, kernel: tuple[int, ...] = kernel, rounding: Any = rounding) -> np.ndarray:
                mean = F.avg_pool2d(torch.from_numpy(x.astype(np.float64)), kernel, divisor_override=1).numpy()
                return rounding(mean / (kernel[0] * kernel[1])).astype(x.dtype)

            yield _steps(m, kind, form, node, step)


def quantization(m: Made) -> Iterator[Fault]:
    """The input brought to its grid in another way."""
    node = m.proto.graph.node[0]
    scale, dtype = attributes(node)["scale_x"], m.right[node.output[0]].dtype
    bits = 8 * dtype.itemsize
    for form, cut in (("floor", np.floor), ("zero", np.trunc)):

        def step(x: np.ndarray, cut: Any = cut) -> np.ndarray:
            return clipped(cut(x.astype(np.float64) * scale), bits).astype(dtype)

        yield _steps(m, "truncation", f"quant {form}", node, step)


# --- faults of files


def _file(
    m: Made, kind: str, form: str, node: onnx.NodeProto, change: Callable[[onnx.ModelProto, onnx.NodeProto], Any]
) -> Fault:
    def make() -> tuple[Arrays, onnx.ModelProto]:
        proto = copy.deepcopy(m.proto)
        change(proto, next(n for n in proto.graph.node if n.output[0] == node.output[0]))
        return run(proto, m.x), proto

    return Fault(net=m.name, kind=kind, form=form, make=make)


def _scaled(name: str, factor: float) -> Callable[[onnx.ModelProto, onnx.NodeProto], None]:
    def change(proto: onnx.ModelProto, node: onnx.NodeProto) -> None:
        next(a for a in node.attribute if a.name == name).f *= factor

    return change


def _stored(
    position: int, make: Callable[[np.ndarray], np.ndarray]
) -> Callable[[onnx.ModelProto, onnx.NodeProto], None]:
    def change(proto: onnx.ModelProto, node: onnx.NodeProto) -> None:
        tensor = next(i for i in proto.graph.initializer if i.name == node.input[position])
        old = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(make(old.copy()).astype(old.dtype), tensor.name))

    return change


def scales(m: Made) -> Iterator[Fault]:
    for node in m.proto.graph.node:
        names = [a.name for a in node.attribute if a.name.startswith("scale_")]
        if node.op_type == "Dequant" or node.op_type in TABLES:
            continue
        for name in names:
            for factor in (0.5, 2.0):
                yield _file(m, "off by one exponent", f"{name} x {factor}", node, _scaled(name, factor))
            for factor in (0.25, 4.0, 16.0):
                yield _file(m, "stale grid", f"{name} x {factor}", node, _scaled(name, factor))


def _rounded(b: np.ndarray, n: int) -> np.ndarray:
    return np.floor(b / 2.0**n + 0.5)


BIASES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "4 times": lambda b: b * 4, "64 times": lambda b: b * 64, "an eighth": lambda b: _rounded(b, 3),
    "missing": lambda b: b * 0,
}  # fmt: skip


def biases(m: Made) -> Iterator[Fault]:
    for node in m.proto.graph.node:
        if node.op_type in WEIGHTED[:3]:
            for form, make in BIASES.items():
                yield _file(m, "bias scale", form, node, _stored(2, make))


def layouts(m: Made) -> Iterator[Fault]:
    shapes = {k: v.shape for k, v in m.right.items()}
    for node in m.proto.graph.node:
        if node.op_type.startswith("Conv"):
            space = len(shapes[node.output[0]]) - 2
            yield _file(m, "layout", "turned kernel", node, _stored(1, lambda w: np.flip(w, tuple(range(2, w.ndim)))))
            yield _file(m, "layout", "OHWI", node, _stored(1, lambda w: np.moveaxis(w, 1, -1).reshape(w.shape)))
            if space == 2:
                yield _file(m, "layout", "kernel axes", node, _stored(1, lambda w: w.swapaxes(2, 3)))
        if node.op_type == "LinearInt":
            yield _file(m, "layout", "transposed", node, _stored(1, lambda w: w.T.reshape(w.shape)))
        made_by = {n.output[0]: n for n in m.proto.graph.node}
        before = made_by.get(node.input[0])
        if node.op_type == "LinearInt" and before is not None and len(shapes.get(before.input[0], ())) == 4:
            c, h, w_ = shapes[before.input[0]][1:]
            order = np.arange(c * h * w_).reshape(c, h, w_).transpose(1, 2, 0).reshape(-1)
            yield _file(m, "layout", "NHWC flattened", node, _stored(1, lambda w, o=order: w[:, np.argsort(o)]))
        if node.op_type in WEIGHTED[:2]:
            right = m.right[node.output[0]]
            last = np.moveaxis(right, 1, -1).reshape(right.shape)
            yield _steps(m, "layout", "NHWC result", node, lambda *x, y=last: y)


def paddings(m: Made) -> Iterator[Fault]:
    for node in m.proto.graph.node:
        if not any(attributes(node).get("pads", ())):
            continue
        for value in (-128, 127, 3, -1):

            def step(*x: np.ndarray, node: onnx.NodeProto = node, value: int = value) -> np.ndarray:
                plain = copy.deepcopy(node)
                pads = list(attributes(node)["pads"])
                next(a for a in plain.attribute if a.name == "pads").ints[:] = [0] * len(pads)
                rank = len(pads) // 2
                around = ((0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True))
                padded = np.pad(x[0].astype(np.int64), around, constant_values=value)
                y = sums(plain, [padded, *x[1:]])
                return clipped(halfway(y, shift_of(node)), 8).astype(np.int8)

            yield _steps(m, "padding value", str(value), node, step)


TABLES = ("iqSigmoid", "iqTanh", "iqGelu", "SoftmaxInt")
OTHERS = {"iqSigmoid": "iqHardsigmoid", "iqTanh": "iqSoftsign", "iqGelu": "iqGeluTanh"}


def tables(m: Made) -> Iterator[Fault]:
    def chip(platform: str) -> Callable[[onnx.ModelProto, onnx.NodeProto], None]:
        def change(proto: onnx.ModelProto, node: onnx.NodeProto) -> None:
            next(a for a in node.attribute if a.name == "platform").s = platform.encode()

        return change

    def other(proto: onnx.ModelProto, node: onnx.NodeProto) -> None:
        node.op_type = OTHERS[node.op_type]

    for node in m.proto.graph.node:
        if node.op_type not in TABLES:
            continue
        for platform in ("venus", "arcs", "venusa"):
            yield _file(m, "wrong table", platform, node, chip(platform))
        if node.op_type == "SoftmaxInt":
            continue
        yield _file(m, "wrong table", "other function", node, other)
        right = runtime.from_proto(m.proto).step(node)

        def moved(x: np.ndarray, right: Any = right) -> np.ndarray:
            return right(clipped(x.astype(np.int64) + 1, 8 * x.dtype.itemsize).astype(x.dtype))

        yield _steps(m, "wrong table", "next entry", node, moved)
        if node.op_type == "iqGelu":
            continue
        scale, dtype = attributes(node)["scale_x"], m.right[node.output[0]].dtype
        function = np.tanh if node.op_type == "iqTanh" else lambda v: 1 / (1 + np.exp(-v))
        exact = lambda x, f=function, s=scale, d=dtype: clipped(np.floor(f(x / s) * 128 + 0.5), 8).astype(d)  # noqa: E731
        yield _steps(m, "wrong table", "exact", node, exact)


def epsilons(m: Made) -> Iterator[Fault]:
    def changed(value: float) -> Callable[[onnx.ModelProto, onnx.NodeProto], None]:
        def change(proto: onnx.ModelProto, node: onnx.NodeProto) -> None:
            next(a for a in node.attribute if a.name == "epsilon").f = value

        return change

    for node in m.proto.graph.node:
        if "epsilon" in attributes(node):
            for value in (1e-2, 1e-3, 1e-6, 0.0):
                yield _file(m, "normalization eps", str(value), node, changed(value))
    if m.name in NORMALIZED:
        for value in (3e-4, 1e-3, 3e-3, 1e-2):
            yield Fault(
                net=m.name, kind="normalization eps", form=f"bn {value}",
                make=lambda value=value: (run(made(m.name, value).proto, m.x), None),
            )  # fmt: skip


def weights(m: Made) -> Iterator[Fault]:
    def flip(w: np.ndarray, at: int, bit: int) -> np.ndarray:
        flat = w.reshape(-1).view(np.uint8 if w.dtype == np.int8 else np.uint16)
        flat[at % flat.size] ^= 1 << bit
        return w

    for node in m.proto.graph.node:
        if node.op_type in WEIGHTED[:3] and m.name != "wide":
            for at, bit in ((5, 6), (17, 4)):
                change = _stored(1, lambda w, at=at, bit=bit: flip(w, at, bit))
                yield _file(m, "stored weight", f"bit {bit}", node, change)


SEEDS = (arithmetic, pairs, means, quantization, scales, biases, layouts, paddings, tables, epsilons, weights)


def seeded(name: str, every: int = 1) -> Iterator[Fault]:
    """The faults of a net that change something; with ``every`` only one of so many."""
    m = made(name)
    faults = (fault for seed in SEEDS for fault in seed(m))
    for fault in islice(faults, 0, None, every):
        if fault.node:
            yield fault
