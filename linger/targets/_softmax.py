"""Softmax and log-softmax of the chips as data (``engine`` 3 and 9). The arithmetic that reads them is in ``ops/_softmax``.

What differs between chips are the fields of ``Softmax``; what all of them share are the constants below. Two chips take
log-softmax from the 16-bit probability through a logarithm with 128 segments, one from the sum through a table of 512
entries; both tables have a closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """The variants of one chip.

    ``exp_rounds``: the last shift of the exponential rounds half up, else it floors. ``newton``: the sum's reciprocal takes
    two Newton steps, else it is an exact division. ``log_of_sum``: log-softmax subtracts ln of the sum, in Q15; else it is
    ln of the probability, in Q25.
    """

    exp_rounds: bool
    newton: bool
    log_of_sum: bool

    @property
    def log_fraction(self) -> int:
        """Fraction bits of log-softmax before it is brought to the output grid."""
        return 15 if self.log_of_sum else 25


HIGHEST = 2**31 - 1  # where the sum of exponentials saturates: 256 in Q23
LOG2E = 774541002  # log2(e) / 4 in Q31: from Q25 to the exponent of two in Q23
EXP_OF_0 = 8388668  # what the polynomial makes of e^0, in Q23
EXPONENTIAL = (57364, 446161, 2008107, 5813551, 8388575)  # of 2^f on -1 <= f < 0 in Q23, highest power first
NEWTON_START = 0xBB5000  # 1.46 in Q23

# log2 on 0.5 <= m < 1: (value in Q31, slope in Q29) at the middle of each of 128 segments
_MIDDLES = tuple((257 + 2 * i) / 512 for i in range(128))
LOG2_VALUES = tuple(math.trunc(2**31 * math.log2(m)) for m in _MIDDLES)
LOG2_SLOPES = tuple(math.trunc(2**29 / (math.log(2) * m)) for m in _MIDDLES)
LN2_Q31 = 1488522236

LN_TABLE = tuple(math.floor(2**16 * math.log1p(i / 512) + 0.5) for i in range(512))  # Q16
LN2_Q16 = 0xB172
