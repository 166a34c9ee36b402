"""What an op is: a frozen row (Op) that names its float module or calls, its twins, its NumPy reference and its body."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linger import observe
from linger.errors import LingerError
from linger.numerics import WIDEST, Grid, fake_quant, grid_of, levels, scale_from_running, scale_from_weight, set_grid
from linger.ops import _symbolic
from linger.ops._bits import check_bits
from linger.ops._constant import constant_of
from linger.ops._lowered import Lowered, Operand
from linger.ops._state import Stored, is_range
from linger.rounding import HALF_UP, ROUNDINGS
from linger.targets import known

_DRY: ContextVar[bool] = ContextVar("_DRY", default=False)


@contextmanager
def dry() -> Iterator[None]:
    """A forward made only to see its calls or to create sites: ranges may be missing."""
    token = _DRY.set(True)
    try:
        yield
    finally:
        _DRY.reset(token)


@dataclass(frozen=True, kw_only=True, eq=False)
class Op:
    """A row of the op table. ``body(form, opset)`` returns the node's standard-ONNX meaning in ONNX text (inputs, statements).

    ``real(form, opset)`` returns the statements of the same node on floats, for dialect "qdq". ``outputs``: names of the body's results.
    ``half_up``: it rounds half up, whatever the target says; where it is False, ``run`` and ``body`` take a ``rounding``, or there is nothing to round.
    ``bias_at`` is the scale that makes the bias's together with ``scale_w`` where that is not ``scale_x``.
    ``calls`` are the functions that ``site`` stands for, ``modules`` torch's layers whose forward makes such a call; ``names`` gives the names of a call's arguments after the first.
    """

    name: str
    run: Callable[..., np.ndarray]
    body: Callable[[str, int], tuple[str, str]]
    real: Callable[[str, int], str]
    integer: type[nn.Module] | None = None
    floats: tuple[type[nn.Module], ...] = ()
    normalized: type[nn.Module] | None = None
    calls: tuple[Callable[..., Any], ...] = ()
    site: str = ""
    names: Mapping[Callable[..., Any], tuple[str, ...]] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    modules: tuple[type[nn.Module], ...] = ()
    bias_at: float = 0.0
    half_up: bool = False
    outputs: str = "Y"


def twin(cls: type[nn.Module], source: nn.Module) -> Any:
    """An instance of ``cls`` with the same parameters, buffers, hooks and attributes (the same objects) as ``source``."""
    new = cls.__new__(cls)
    for key, value in source.__dict__.items():
        new.__dict__[key] = value.copy() if isinstance(value, dict) else value
    return new


class IntModule(Stored):
    """State and bookkeeping that every fixed-point twin and site shares. Mixed in before the torch class.

    Buffers ``running_<name>`` (0-d float32) for each name in ``observed``; ``scale_<name>`` are derived from them and
    appear in the state dict under upstream's keys. ``parameter_names`` are the keyword arguments of a call that hold
    parameters of the net: no operands, ``lower`` gets the tensors and stores them as integers.
    """

    observed: ClassVar[tuple[str, ...]] = ("x", "o")
    parameter_names: ClassVar[tuple[str, ...]] = ()
    weighted: ClassVar[bool] = False
    raw: ClassVar[frozenset[int]] = frozenset()  # positions of operands that enter as they are, without a grid
    several: ClassVar[bool] = False  # whether forward returns several tensors
    chip: str = "venus"
    rounding: str = HALF_UP  # of activations, as the chip rounds
    still: bool = False  # ranges stay as they are, in training too
    data_bits: int
    parameter_bits: int
    out_bits: int
    normalize_data: float | None
    normalize_weight: float | None
    normalize_bias: float | None
    ahead_relu: bool
    _ranged: set[str]
    _calls: list[_symbolic.Call]
    _seen_in: int | None

    def start(
        self,
        *,
        data_bits: int = 8,
        parameter_bits: int = 8,
        out_bits: int = 8,
        normalize_data: float | None = None,
        normalize_weight: float | None = None,
        normalize_bias: float | None = None,
        ahead_relu: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """Add the fixed-point state to a module made by ``twin`` or by its constructor."""
        check_bits(data_bits, parameter_bits, out_bits)
        self.data_bits, self.parameter_bits, self.out_bits = data_bits, parameter_bits, out_bits
        self.normalize_data, self.normalize_weight, self.normalize_bias = (
            normalize_data,
            normalize_weight,
            normalize_bias,
        )
        self.ahead_relu = ahead_relu
        self.forget()
        for name in self.observed:
            self.register_buffer(f"running_{name}", torch.zeros((), device=device))

    clamp_data = property(lambda self: self.normalize_data)
    clamp_weight = property(lambda self: self.normalize_weight)
    clamp_bias = property(lambda self: self.normalize_bias)
    o_bits = property(lambda self: self.out_bits)

    def follow_chip(self, name: str) -> None:
        """Compute as this chip does from now on."""
        self.chip, self.rounding = name, known(name).rounding

    @classmethod
    def refuses(cls, source: Any) -> str:
        """Why this float module has no integer form and stays in float; "" where it has one."""
        return ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            if torch.compiler.is_compiling() and not _symbolic.exporting():
                return self._in_float32(args, kwargs)
            try:
                if torch.compiler.is_compiling():
                    return _symbolic.emit(self, args, kwargs)
                out = self._in_float32(args, kwargs)
            except LingerError as error:
                error.module = error.module or self
                raise
            if not (self.training or self.several):
                self.remember(args, kwargs, out)
            return out

    def _in_float32(self, args: Any, kwargs: Any) -> Any:
        """The module's own call, under autocast too: half a float holds no accumulator."""
        if not torch._C._is_any_autocast_enabled():
            return super().__call__(*args, **kwargs)
        first = next(t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        with torch.autocast(first.device.type, enabled=False):
            return super().__call__(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Ranges follow to another device, but stay float32 in ``half()`` and ``double()``: scales are their exponent bits."""
        ranges = {name: t for name, t in self._buffers.items() if t is not None and is_range(name)}
        super()._apply(fn, recurse)
        for name, old in ranges.items():
            new: Any = self._buffers[name]
            if new.dtype != torch.float32:
                self._buffers[name] = old.to(new.device)
        return self

    def remember(self, args: Any, kwargs: Any, out: Tensor) -> None:
        """Keep the grids of the calls of the first eval forward, for an exporter that has no values to look at."""
        forward = _symbolic.FORWARD.get()
        if self._seen_in in (None, forward):
            self._seen_in = forward
            self._calls.append(_symbolic.seen(self, args, kwargs, out))

    # --- grids

    def running(self, name: str) -> Tensor:
        return self._buffers[f"running_{name}"]  # type: ignore[return-value]

    def observe(
        self, name: str, x: Tensor, ahead_relu: bool = False, bound: float | None = None
    ) -> observe.Spread | None:
        """In training, let ``running_<name>`` follow max|x|; in eval, refuse to work without a range.

        Where the tensor reaches is returned, if that was looked at.
        """
        if not self.following(name):
            self.require_range(name)
            return None
        spread = observe.spread_of(x)
        with torch.no_grad():
            self.follow(name, observe.peak(x, ahead_relu, bound, spread))
        return spread

    @torch.no_grad()
    def hold(self, name: str, x: Tensor, bits: int) -> None:
        """Let ``running_<name>`` stand for the scale that a weight has: of a parameter as operand, nothing saturates."""
        observe.hold_at(self.running(name), scale_from_weight(x, bits), bits)

    def following(self, name: str) -> bool:
        """Whether this forward has to look at data for a range: in training, where it is neither held nor learned."""
        if not self.training:
            return False
        if self.is_warm(name) and observe.watcher() is None:
            self.take_learned()
            return False
        return not self.still

    def watch(self, name: str, x: Tensor, ahead_relu: bool = False, bound: float | None = None) -> None:
        """Show a tensor that is to be quantized to the range ``name`` to a calibration that runs."""
        watcher = observe.watcher()
        if watcher is not None:
            watcher.see(self, name, x, ahead_relu, bound)

    def follow(self, name: str, peak: Tensor) -> None:
        """Let ``running_<name>`` follow a peak, unless the ranges are held or the batch was seen before."""
        if not (self.still or observe.recomputing()):
            observe.update(self.running(name), peak, f"running_{name}")
            if self.learned(name) is not None and observe.watcher() is None:
                self.start_from(name, self.scale(name, self.bits_of(name)))

    def require_range(self, name: str) -> None:
        """Raise unless ``running_<name>`` has seen a finite batch; asked once after every ``train()`` and load."""
        unseen = f"running_{name} is 0, so no batch has been seen; run at least one batch in train mode, "
        unseen += "or load a fixed-point checkpoint"
        if torch.compiler.is_compiling():
            if not _symbolic.exporting():
                torch._assert_async(self.running(name) > 0, unseen)
            return
        if name in self._ranged or _DRY.get():
            return
        value = float(self.running(name))
        if value == 0:
            raise LingerError(unseen)
        if not np.isfinite(value):
            raise LingerError(f"running_{name} is {value}, allowed are finite values; the training diverged")
        self._ranged.add(name)

    def require_ranges(self) -> None:
        """Raise unless every range that this module always uses was observed."""
        if "o" in self.observed:
            self.require_range("o")

    def scale(self, name: str, bits: int) -> Tensor:
        return scale_from_running(self.running(name), bits)

    def enter(self, x: Tensor, name: str = "x", bits: int | None = None) -> tuple[Tensor, Tensor]:
        """The operand on a grid of ``bits`` bits, and its scale: as it comes, requantized, or quantized here."""
        bits = self.data_bits if bits is None else bits
        grid = grid_of(x)
        if grid is None:
            held, spread, x = constant_of(x) is not None, None, x.float()
            if held and (self.training or observe.watcher() is not None):
                self.hold(name, x, min(bits, WIDEST))
            else:
                self.watch(name, x)
                spread = self.observe(name, x)
                self.takes_plain(name)
            scale = self.scale(name, bits)
            return fake_quant(
                x, scale, min(bits, WIDEST), inside=observe.fits(spread, scale, bits), rounding=self.rounding
            ), scale
        if grid.bits > bits:
            self.watch(name, x)
            spread = self.observe(name, x)
            self.takes_plain(name)
            scale = torch.minimum(self.scale(name, bits), grid.scale)
            return fake_quant(x, scale, bits, inside=observe.fits(spread, scale, bits), rounding=self.rounding), scale
        scale = grid.scale if grid.bits == bits else grid.scale * observe.wider(grid.bits, bits)
        running = self._buffers.get(f"running_{name}")
        if self.training and running is not None and name not in self._plain:
            observe.hold_at(running, scale, bits)
        return x, scale

    def takes_plain(self, name: str) -> None:
        """Note that operands come here without a grid of ``data_bits``: the range is theirs, also where others come in between."""
        if name not in self._plain and not torch.compiler.is_compiling() and (self.training or _DRY.get()):
            self._plain = self._plain | {name}

    def taken(self, position: int, scale: float | None, given: int, bits: int, shape: tuple[int, ...]) -> Operand:
        """An operand of ``given`` bits (a plain tensor where ``scale`` is None) as forward brings it to ``bits`` bits."""
        if scale is not None and given <= bits:
            return Operand(scale=scale * observe.wider(given, bits), bits=bits, shape=shape)
        name = self.operand_name(position)
        self.require_range(name)
        own = float(self.scale(name, bits))
        return Operand(scale=own if scale is None else min(own, scale), bits=bits, shape=shape)

    def operand_name(self, position: int) -> str:
        """Under which name the range of the operand at ``position`` is observed where it comes without a grid."""
        return "xy"[position]

    def operand_bits(self, bits: Sequence[int]) -> int:
        """Width that every operand is brought to, given the widths they come in (0 for a plain tensor)."""
        return self.data_bits

    def leave(self, y: Tensor, finest: Tensor, fresh: bool = False) -> Tensor:
        """Quantize the result: observe its range, choose its grid (never finer than ``finest``), tag it.

        ``fresh``: ``y`` may be overwritten, for nothing else reads it, its own backward included.
        """
        bits, bound = self.out_bits, self.normalize_data
        self.watch("o", y, self.ahead_relu, bound)
        spread = self.observe("o", y, self.ahead_relu, bound)
        own = self.scale("o", bits)
        scale = torch.minimum(own, finest)
        inside = observe.fits(spread, scale, bits, bound)
        out = self.snapped(y, "o", scale, own, bits, bound, inside, fresh).float()
        return set_grid(out, Grid(scale, self.out_bits))

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        """The nodes that compute the same integers; ``call`` holds the non-tensor arguments of a functional call."""
        raise NotImplementedError

    # --- certificate, from the actual weights

    def accumulator_peak(self, s_x: Tensor) -> float:
        """An upper bound of |accumulator| in LSB for an input of scale ``s_x``; below ``FLOAT32_EXACT`` float32 is exact."""
        return 0.0

    def forget(self) -> None:
        """Ranges may have changed: check them again at the next forward."""
        self._ranged = set()
        self._calls = []
        self._seen_in = None

    def train(self, mode: bool = True) -> Any:
        self.forget()
        self.take_learned()
        return super().train(mode)

    def derived(self) -> dict[str, Tensor]:
        """The keys of upstream's state dict that follow from the running ranges."""
        bits = {"o": self.out_bits}
        return {f"scale_{n}": self.scale(n, bits.get(n, self.data_bits)) for n in self.observed}


# --- pieces of ONNX text shared by the bodies


def constants(**values: str) -> str:
    """``Constant`` statements, one per name: ``@attr`` reads a float attribute, anything else is ONNX tensor text."""
    out = []
    for name, value in values.items():
        if value.startswith("@"):
            out.append(f"{name} = Constant <value_float: float = {value}> ()")
        else:
            out.append(f"{name} = Constant <value = {value}> ()")
    return "\n".join(out) + "\n"


def output_bits(form: str) -> tuple[str, int]:
    """``"f32_o16"`` -> ``("f32", 16)``; the suffix is left out for 8 bits."""
    base, _, bits = form.partition("_o")
    return base, int(bits or 8)


ONNX_INT = {8: 3, 16: 5, 32: 6}


def requant_text(
    source: str, multiplier: str, result: str, bits: int, double: bool = False, cast: bool = True, limit: int = 0,
    rounding: str = HALF_UP,
) -> str:  # fmt: skip
    """Statements for saturate(round(source * multiplier), bits); in float up to 16 bits, in double where asked or wider.

    ``limit``: saturate to fewer bits than are stored.
    """
    stored, bits = bits, limit or bits
    assert double or bits <= 16, "2^31 - 1 is no float32"
    kind = "double" if double else "float"
    p = f"{result}_"
    text = constants(
        **{
            f"{p}lo": f"{kind} {{{-(2 ** (bits - 1))}}}",
            f"{p}hi": f"{kind} {{{levels(bits)}}}",
        }
    )
    text += f"{p}m = Mul ({source}, {multiplier})\n" + ROUNDINGS[rounding].text(f"{p}m", f"{p}f", kind)
    clipped = f"{p}c" if cast else result
    text += f"{clipped} = Clip ({p}f, {p}lo, {p}hi)\n"
    return text + (f"{result} = Cast <to: int = {ONNX_INT[stored]}> ({clipped})\n" if cast else "")


def real_text(statement: str) -> Callable[[str, int], str]:
    """``Op.real`` of an op that is one standard op whatever the form and opset."""
    return lambda form, opset: statement + "\n"
