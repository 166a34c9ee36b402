"""One LSTM, GRU or RNN node in NumPy: one direction of one layer on integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from linger.errors import LingerError
from linger.numerics import exact_matmul, exponent, int_dtype, quantize_array, saturate, shift_round
from linger.ops._cells import STATES, Arithmetic, Cell, arithmetic, gate, gru, lstm, rnn, scan, wide
from linger.steps import piecewise
from linger.targets import known

ANY_LENGTH = 2**31 - 1


def operands(kind: str, given: tuple[np.ndarray, ...], projected: bool) -> tuple[Any, list[np.ndarray], list[Any]]:
    """Lengths (None where there are none), initial states ([] likewise), and the parameters."""
    stored = 4 + projected
    rest, parameters = list(given[: len(given) - stored]), list(given[len(given) - stored :])
    lengths = rest.pop(0) if rest else None
    if len(rest) not in (0, len(STATES[kind])):
        raise LingerError(f"found {len(given) + 1} inputs, which are no recurrent layer's; export the net again")
    return lengths, rest, parameters


def checked(lengths: np.ndarray, steps: int, batch: int) -> np.ndarray:
    """Lengths of a batch; a single one as large as can be, of a layer without lengths, stands for all of every sequence.

    Raises:
        LingerError: one is missing, below 1 or beyond the steps.
    """
    if lengths.shape == (1,) and lengths[0] == ANY_LENGTH:
        return np.full(batch, steps)
    if lengths.shape != (batch,) or not ((lengths >= 1) & (lengths <= steps)).all():
        raise LingerError(
            f"found lengths {lengths.tolist()} of {batch} sequences of {steps} steps, allowed are 1 to {steps}, one for each; pass "
            "those"
        )
    return lengths


def state_of(x: np.ndarray, scale: float, bits: int) -> np.ndarray:
    """A state on its grid, from the floats of an earlier run: (1, N, H) -> (N, H)."""
    return quantize_array(x, scale, bits).astype(np.int64).reshape(x.shape[-2:])


def node(kind: str) -> Callable[..., Any]:
    """``run`` of the op: (y, h) or (y, h, c); y and h of ``o_bits``, c int32, states with a leading axis of 1."""

    def run(
        x: np.ndarray, *given: np.ndarray, scale_x: float, scale_iw: float, scale_hw: float, scale_o: float,
        batch_first: int = 0, go_forward: int = 1, o_bits: int = 8, platform: str = "venus", scale_rw: float = 0.0,
        **said: Any,
    ) -> Any:  # fmt: skip
        how = arithmetic(platform, o_bits)
        lengths, states, (w_ih, w_hh, b_ih, b_hh, *w_hr) = operands(kind, given, bool(scale_rw))
        swapped = bool(batch_first) != known(platform).time_swapped
        steps = np.moveaxis(x, 1, 0) if swapped else x
        batch, hidden, out = steps.shape[1], w_hh.shape[0] // {"lstm": 4, "gru": 3, "rnn": 1}[kind], w_hh.shape[1]
        q_h = exponent(scale_o)
        q_i = exponent(scale_x) + exponent(scale_iw)
        a = piecewise(lambda acc: gate(acc, q_i, how))(exact_matmul(steps, w_ih.T) + b_ih)
        first = [np.zeros((batch, n), np.int64) for n in (out, hidden)[: len(STATES[kind])]]
        if states:
            first[0] = state_of(states[0], scale_o, o_bits)
            first[1:] = [state_of(c, 2.0**how.fraction, 16 if how.narrow else 32) for c in states[1:]]
        scales = {"q_h": q_h, "q_hw": exponent(scale_hw), "q_hr": exponent(scale_rw) if scale_rw else 0}
        cell = CELLS[kind]((w_hh, b_hh, *w_hr), scales, o_bits, how, said)
        lengths = np.full(batch, len(steps)) if lengths is None else checked(lengths, len(steps), batch)
        y, last = scan(a, tuple(first), lengths, not go_forward, cell)
        y = (np.moveaxis(y, 0, 1) if swapped else y).astype(int_dtype(o_bits))
        return (y, last[0][None].astype(int_dtype(o_bits)), *(c[None].astype(np.int32) for c in last[1:]))

    return run


Maker = Callable[[tuple[np.ndarray, ...], Mapping[str, int], int, Arithmetic, Mapping[str, Any]], Cell]


def _lstm(parameters: Any, q: Mapping[str, int], bits: int, how: Arithmetic, said: Mapping[str, Any]) -> Cell:
    w_hh, b_hh, *w_hr = parameters

    def cell(a: np.ndarray, states: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        h, c = states
        b = gate(exact_matmul(h, w_hh.T) + b_hh, q["q_h"] + q["q_hw"], how)
        p, c = lstm(a, b, c, how)
        fraction = 2 * how.fraction
        if w_hr:
            p = exact_matmul(wide(shift_round(p, how.fraction), how.fraction + 1), w_hr[0].T)
            fraction = q["q_hr"] + how.fraction
        return saturate(shift_round(p, fraction - q["q_h"]), bits).astype(np.int64), c

    return cell


def _gru(parameters: Any, q: Mapping[str, int], bits: int, how: Arithmetic, said: Mapping[str, Any]) -> Cell:
    w_hh, b_hh = parameters

    def cell(a: np.ndarray, states: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        (h,) = states
        b = gate(exact_matmul(h, w_hh.T) + b_hh, q["q_h"] + q["q_hw"], how)
        after = gru(a, b, h, int(said.get("state_shift", 1)), how)
        return (saturate(shift_round(after, 2 * how.fraction - q["q_h"]), bits).astype(np.int64),)

    return cell


def _rnn(parameters: Any, q: Mapping[str, int], bits: int, how: Arithmetic, said: Mapping[str, Any]) -> Cell:
    w_hh, b_hh = parameters

    def cell(a: np.ndarray, states: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        b = gate(exact_matmul(states[0], w_hh.T) + b_hh, q["q_h"] + q["q_hw"], how)
        after, fraction = rnn(a, b, said["nonlinearity"], how)
        return (saturate(shift_round(after, fraction - q["q_h"]), bits).astype(np.int64),)

    return cell


CELLS: dict[str, Maker] = {"lstm": _lstm, "gru": _gru, "rnn": _rnn}
