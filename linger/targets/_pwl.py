"""Piecewise-linear functions of the chips as data (``engine`` 9). The arithmetic that reads them is in ``ops/_pwl``.

A function has 16 segments on |z|, z the argument as an integer with ``x_fraction`` fraction bits, saturated to ``width``
bits. Segment k holds bands[k-1] < |z| <= bands[k]; the last is open.

    rounded      y = rsh(slope * z + bias * 2^bias_shift, shift)                                       (1)
    else         y = (slope * z >> shift) + bias            with >> the floor shift                    (2)

``positive`` holds (slope, bias) of every segment for z >= 0, ``negative`` for z < 0.
"""

from __future__ import annotations

from dataclasses import dataclass

Lines = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Pwl:
    """One function of one chip. ``symmetric``: the argument is kept above the lowest integer, so that |z| exists."""

    x_fraction: int
    y_fraction: int
    width: int
    bands: tuple[int, ...]
    positive: Lines
    negative: Lines
    shifts: tuple[int, ...]
    rounded: bool = False
    bias_shift: int = 0
    symmetric: bool = False


def _each(values: tuple[int, ...], *counts: int) -> tuple[int, ...]:
    """Every value as often as its count says."""
    return tuple(v for v, n in zip(values, counts, strict=True) for _ in range(n))


def _minus(values: tuple[int, ...], top: int = 0) -> tuple[int, ...]:
    return tuple(top - v for v in values)


_SIGMOID_BANDS = (
    63656107, 111395083, 153816608, 194953701, 236865036, 281253298, 329433241, 384154475, 447714743, 515399149,
    589016819, 679940425, 759830874, 862986200, 965402453,
)  # fmt: skip
_SIGMOID_SLOPES = (
    529475578, 482862538, 424212188, 361565531, 298613704, 238039992, 181912633, 132002182, 89144402, 56020914, 34019888,
    18928477, 9459126, 5291645, 2204341, 177654,
)  # fmt: skip
_SIGMOID_BIASES = (
    1073741824, 1095849221, 1144526551, 1216321063, 1307759740, 1414659140, 1532274042, 1654777693, 1777444109,
    1887935281, 1972419725, 2038648643, 2086619912, 2110212774, 2130063364, 2144640936,
)  # fmt: skip
_TANH_BANDS = (
    33584191, 58182438, 80361293, 102120620, 124483371, 148392654, 174972063, 206183541, 244722657, 281591256, 312045360,
    358241226, 403095772, 471425623, 530372454,
)  # fmt: skip
_TANH_SLOPES = (
    2114623134, 1910645334, 1662969581, 1396521636, 1131979061, 881027392, 652221876, 451080022, 281798391, 159724746,
    98692663, 60001039, 27632752, 13732196, 2832019, 172634,
)  # fmt: skip
_TANH_BIASES = (
    0, 51039676, 158405367, 317937954, 519217264, 751968259, 1004938252, 1267155516, 1527203771, 1749783808, 1877830237,
    1967785133, 2054179492, 2095926998, 2134212723, 2144721503,
)  # fmt: skip

# arcs: Q27 -> Q31 in floor shifts
SIGMOID_Q27 = Pwl(
    x_fraction=27, y_fraction=31, width=32, bands=_SIGMOID_BANDS, shifts=(27,) * 16,
    positive=(_SIGMOID_SLOPES, _SIGMOID_BIASES), negative=(_SIGMOID_SLOPES, _minus(_SIGMOID_BIASES, 2**31)),
)  # fmt: skip
TANH_Q27 = Pwl(
    x_fraction=27, y_fraction=31, width=32, bands=_TANH_BANDS, shifts=(27,) * 16, symmetric=True,
    positive=(_TANH_SLOPES, _TANH_BIASES), negative=(_TANH_SLOPES, _minus(_TANH_BIASES)),
)  # fmt: skip


def _q58(lines: Pwl) -> Pwl:
    """venusA reads the same lines with biases of Q28 and rounds the sum once."""
    biases = tuple(tuple(b >> 3 for b in part[1]) for part in (lines.positive, lines.negative))
    if lines.symmetric:
        biases = (biases[0], _minus(biases[0]))
    return Pwl(
        x_fraction=27, y_fraction=31, width=32, bands=lines.bands, shifts=(27,) * 16, symmetric=lines.symmetric,
        positive=(lines.positive[0], biases[0]), negative=(lines.negative[0], biases[1]), rounded=True, bias_shift=30,
    )  # fmt: skip


SIGMOID_Q58, TANH_Q58 = _q58(SIGMOID_Q27), _q58(TANH_Q27)

# venus: Q11 -> Q15 with a shift per segment
_SIGMOID_SHIFTS = _each((13, 14, 16, 19), 5, 4, 4, 3)
_TANH_SHIFTS = _each((11, 12, 14, 18), 5, 4, 4, 3)


def _scaled(slopes: tuple[int, ...], shifts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(s >> (27 - shift) for s, shift in zip(slopes, shifts, strict=True))


SIGMOID_Q11 = Pwl(
    x_fraction=11, y_fraction=15, width=16, bands=tuple(b >> 16 for b in _SIGMOID_BANDS), shifts=_SIGMOID_SHIFTS,
    positive=(_scaled(_SIGMOID_SLOPES, _SIGMOID_SHIFTS), tuple(b >> 16 for b in _SIGMOID_BIASES)),
    negative=(_scaled(_SIGMOID_SLOPES, _SIGMOID_SHIFTS), tuple(2**15 - (b >> 16) for b in _SIGMOID_BIASES)),
)  # fmt: skip
TANH_Q11 = Pwl(
    x_fraction=11, y_fraction=15, width=16, bands=tuple(b + 2**15 >> 16 for b in _TANH_BANDS), shifts=_TANH_SHIFTS,
    positive=(_scaled(_TANH_SLOPES, _TANH_SHIFTS), tuple(b >> 16 for b in _TANH_BIASES)),
    negative=(_scaled(_TANH_SLOPES, _TANH_SHIFTS), tuple(-(b >> 16) for b in _TANH_BIASES)), symmetric=True,
)  # fmt: skip

# venusA only: Q27 -> Q27, slopes of negative arguments are 1 - slope
_GELU_SLOPES = (
    72728288, 83897176, 94867369, 105507160, 115674329, 125208681, 133918928, 141554901, 147729276, 151456513, 147845039,
    143733750, 139917095, 136824421, 134818073, 134217887,
)  # fmt: skip
_GELU_BIASES = (
    -10758, -157495, -447240, -872623, -1421992, -2078164, -2815981, -3596982, -4354386, -4913744, -4157062, -3134007,
    -2046605, -1040047, -281784, -3183,
)  # fmt: skip
_SILU_SLOPES = (
    73253038, 85425077, 97268252, 108569000, 119102644, 128623281, 136842248, 143368061, 147330902, 146163034, 144088169,
    140854555, 138082720, 135988566, 134689659, 134226579,
)  # fmt: skip
_SILU_BIASES = (
    -18406, -297641, -845322, -1640240, -2649106, -3823039, -5089876, -6333243, -7277526, -6866303, -6053889, -4539545,
    -2991709, -1593178, -528753, -24754,
)  # fmt: skip
GELU_Q54 = Pwl(
    x_fraction=27, y_fraction=27, width=32, shifts=(27,) * 16, rounded=True, bias_shift=30,
    bands=(
        14115017, 28375324, 42953268, 58054959, 73951497, 91038024, 109967415, 132036451, 160959227, 226844274, 267242587,
        306191336, 350131144, 407973369, 516356188,
    ),
    positive=(_GELU_SLOPES, _GELU_BIASES), negative=(_minus(_GELU_SLOPES, 2**27), _GELU_BIASES),
)  # fmt: skip
SILU_Q54 = Pwl(
    x_fraction=27, y_fraction=27, width=32, shifts=(27,) * 16, rounded=True, bias_shift=30,
    bands=(
        24654376, 49696796, 75597255, 102943334, 132562612, 165787474, 205189411, 257698662, 386828914, 411601113,
        503293022, 600623812, 719278864, 886211418, 1200463913,
    ),
    positive=(_SILU_SLOPES, _SILU_BIASES), negative=(_minus(_SILU_SLOPES, 2**27), _SILU_BIASES),
)  # fmt: skip
