"""The chips' recurrent cells in NumPy int64: the executable specification of LSTM, GRU and plain RNN nodes.

rsh, sat: ``numerics.shift_round``, ``numerics.saturate``. F: fraction bits of the chip's sigmoid and tanh arguments, W their
width (27 and 32, 11 and 16 on venus). G: fraction bits of what the gates multiply with, 15, or 7 on venus where the hidden
state has 8 bits. q_h: exponent of the hidden state's scale.

    a = sat_W(rsh(sat32(W_ih x + b_ih), q_x + q_iw - F)),   b = sat_W(rsh(sat32(W_hh h + b_hh), q_h + q_hw - F))       (1)
    sigmoid and tanh of sat_W arguments, brought to G fraction bits (saturated to 8 bits where G is 7)               (2)

LSTM (gates i, f, g, o of a + b):
    s = sat32(c f) + sat32(i g),   k = sat_W(rsh(s, 2 G - F)),   h' = sat(rsh(o tanh(k), 2 G - q_h))                  (3)
    c' = rsh(k, F - G), or sat_16(rsh(s, 7)) where G is 7, or sat_32(rsh(s, 15)) where F is 11 and G is 15            (4)
    with proj_size: p = sat_(G+1)(rsh(o tanh(k), G)),   h' = sat(rsh(W_hr p, q_hr + G - q_h))                         (5)
GRU (r, z of a + b, torch's definition):
    n = tanh(sat_W(a_n + rsh(r b_n, G)))                                                                           (6)
    h' = sat(rsh(sat(z rsh(h, S)) + sat((2^G - z) n), 2 G - q_h)),   saturated to 2 G + 2 bits;  S = q_h - G          (7)
RNN:
    h' = sat(rsh(tanh(a + b), G - q_h)),   or sat(rsh(max(sat_W(a + b), 0), F - q_h))                                (8)

The engine's own GRU has S = 1 whatever the scales, so that it counts the previous state half where q_h is not 8; its files
do not have the attribute ``state_shift``, ours do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from linger.numerics import saturate, shift_round
from linger.ops._pwl import evaluate
from linger.targets import known
from linger.targets._pwl import Pwl

STATES = {"lstm": ("h", "c"), "gru": ("h",), "rnn": ("h",)}


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What a chip computes a cell in: its two functions and G, which are the fraction bits of a stored cell state too."""

    sigmoid: Pwl
    tanh: Pwl
    fraction: int

    @property
    def argument(self) -> int:
        """F."""
        return self.sigmoid.x_fraction

    @property
    def width(self) -> int:
        """W."""
        return self.sigmoid.width

    @property
    def narrow(self) -> bool:
        """Whether gates have 8 bits."""
        return self.fraction == 7


def arithmetic(platform: str, hidden_bits: int) -> Arithmetic:
    """The chip's arithmetic for a hidden state of 8 or 16 bits."""
    functions = known(platform).functions
    sigmoid, tanh = functions["iqSigmoid"], functions["iqTanh"]
    return Arithmetic(sigmoid=sigmoid, tanh=tanh, fraction=7 if sigmoid.width == 16 and hidden_bits == 8 else 15)


def wide(v: np.ndarray, bits: int) -> np.ndarray:
    """Saturated, but still int64."""
    return saturate(v, bits).astype(np.int64) if bits <= 32 else v


def applied(z: np.ndarray, table: Pwl, fraction: int) -> np.ndarray:
    """Equation (2) on arguments of the table's width: int64 with ``fraction`` fraction bits."""
    y = shift_round(evaluate(z, table), table.y_fraction - fraction)
    return wide(y, 8) if fraction == 7 else y


def gate(acc: np.ndarray, exponent_of: int, how: Arithmetic) -> np.ndarray:
    """Equation (1) of an accumulator whose scale is 2^exponent_of."""
    return wide(shift_round(wide(acc, 32), exponent_of - how.argument), how.width)


def lstm(a: np.ndarray, b: np.ndarray, c: np.ndarray, how: Arithmetic) -> tuple[np.ndarray, np.ndarray]:
    """Equations (3), (4): o * tanh(k) with 2 G fraction bits, and the next cell state; a, b (N, 4 H), c (N, H)."""
    g = how.fraction
    i, f, n, o = np.split(wide(a + b, how.width), 4, axis=-1)
    i, f, o = (applied(z, how.sigmoid, g) for z in (i, f, o))
    s = wide(c * f, 32) + wide(i * applied(n, how.tanh, g), 32)
    k = wide(shift_round(s, 2 * g - how.argument), how.width)
    exact = wide(shift_round(s, g), 16 if how.narrow else 32)
    return o * applied(k, how.tanh, g), shift_round(k, how.argument - g) if how.width == 32 else exact


def gru(a: np.ndarray, b: np.ndarray, h: np.ndarray, state_shift: int, how: Arithmetic) -> np.ndarray:
    """Equations (6), (7) before the last shift: the next state with 2 G fraction bits; a, b (N, 3 H), h (N, H)."""
    g = how.fraction
    a_r, a_z, a_n = np.split(a, 3, axis=-1)
    b_r, b_z, b_n = np.split(b, 3, axis=-1)
    r, z = (applied(wide(v, how.width), how.sigmoid, g) for v in (a_r + b_r, a_z + b_z))
    n = applied(wide(a_n + shift_round(r * b_n, g), how.width), how.tanh, g)
    kept = wide(z * shift_round(h, state_shift), 2 * g + 2)
    return kept + wide((2**g - z) * n, 2 * g + 2)


def rnn(a: np.ndarray, b: np.ndarray, nonlinearity: str, how: Arithmetic) -> tuple[np.ndarray, int]:
    """Equation (8) before the last shift, and its fraction bits; a, b (N, H)."""
    z = wide(a + b, how.width)
    if nonlinearity == "relu":
        return np.maximum(z, 0), how.argument
    return applied(z, how.tanh, how.fraction), how.fraction


Cell = Callable[[np.ndarray, tuple[np.ndarray, ...]], tuple[np.ndarray, ...]]


def scan(
    a: np.ndarray, states: tuple[np.ndarray, ...], lengths: np.ndarray, reverse: bool, cell: Cell
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Run ``cell(a_t, states) -> states`` over the steps of every sequence, backwards with ``reverse``.

    Args:
        a: (T, N, gates).
        states: each (N, H); the first is the output.
        lengths: (N,); steps at and behind them leave the states as they are and give 0.

    Returns:
        Outputs (T, N, H) and the last states.
    """
    out = np.zeros((*a.shape[:2], states[0].shape[-1]), np.int64)
    for t in reversed(range(len(a))) if reverse else range(len(a)):
        running = (t < lengths)[:, None]
        after = cell(a[t], states)
        states = tuple(np.where(running, new, old) for new, old in zip(after, states, strict=True))
        out[t] = np.where(running, states[0], 0)
    return out, states
