"""How far every integer function is from its float function: over all int8 inputs at the scales 2^0 .. 2^8.

Prints the table of docs/functions.md. The output grid is the finest that holds the function's largest finite value over
those inputs. Left out are infinite values, those beyond the coarsest grid (2^-60), and arguments beyond the +-16 that a
chip's own function takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from linger.ops import ROWS, glu
from linger.ops._unary import Function, UnarySite, integer_table
from linger.targets import TARGETS

BITS, EXPONENTS = 8, range(9)
ARGUMENT = 16  # beyond it, the argument of a chip's own function saturates
Errors = list[tuple[np.ndarray, float]]  # per exponent: |integer - f * s_o| in LSB, and s_o


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; errors in output LSB and in real units."""

    function: str
    targets: str
    max_lsb: float
    mean_lsb: float
    max_real: float
    mean_real: float


def row(function: str, targets: str, errors: Errors) -> Row:
    """The largest and the mean error over all exponents."""
    lsb = np.concatenate([e.ravel() for e, _ in errors])
    real = np.concatenate([e.ravel() / scale for e, scale in errors])
    return Row(function=function, targets=targets, max_lsb=lsb.max(), mean_lsb=lsb.mean(), max_real=real.max(),
               mean_real=real.mean())  # fmt: skip


def finest(peak: float) -> float:
    """The finest scale whose largest level reaches ``peak``."""
    return 2.0 ** max(np.floor(np.log2((2 ** (BITS - 1) - 1) / peak)), -60)


def unary_errors(function: Function, platform: str) -> Errors:
    """A function with the default numbers."""
    found: Errors = []
    k = np.arange(-(2 ** (BITS - 1)), 2 ** (BITS - 1))
    reach = ARGUMENT if function.op_type in TARGETS[platform].functions else np.inf
    for n in EXPONENTS:
        with np.errstate(all="ignore"):
            line, rest = function.numpy(k / 2.0**n, **function.numbers)
            exact = line + rest
        scale = 2.0 ** (BITS - function.fixed) if function.fixed else finest(np.abs(exact[np.isfinite(exact)]).max())
        integers = integer_table(function, 2.0**n, scale, BITS, BITS, platform, function.numbers)
        held = np.isfinite(exact) & (np.abs(exact) * scale <= 2 ** (BITS - 1)) & (np.abs(k) <= reach * 2.0**n)
        found.append((np.abs(integers - exact * scale)[held], scale))
    return found


def glu_errors(platform: str) -> Errors:
    """GLU over all pairs of levels."""
    found: Errors = []
    a, b = np.meshgrid(*[np.arange(-(2.0 ** (BITS - 1)), 2.0 ** (BITS - 1))] * 2)
    for n in EXPONENTS:
        exact = a / 2.0**n / (1 + np.exp(-b / 2.0**n))
        scale = finest(np.abs(exact).max())
        integers = glu.run(np.stack([a, b]).astype(np.int8), dim=0, scale_x=2.0**n, scale_o=scale, platform=platform)[0]
        found.append((np.abs(integers - exact * scale), scale))
    return found


def grouped(name: str, errors_on: Callable[[str], Errors], own: Callable[[str], bool]) -> Iterator[Row]:
    """A row per chip that has the function itself, and one for all the others."""
    groups = [[t] for t in TARGETS if own(t)] + [[t for t in TARGETS if not own(t)]]
    for targets in filter(None, groups):
        yield row(name, ", ".join(targets), errors_on(targets[0]))


def rows() -> list[Row]:
    """Every function of one tensor, and GLU."""
    found: list[Row] = []
    functions = {
        f.op_type: f for op in ROWS if isinstance(op.integer, type) and issubclass(op.integer, UnarySite)
        for f in op.integer.functions.values()
    }  # fmt: skip
    for name, function in functions.items():
        found += grouped(
            name, lambda t, f=function: unary_errors(f, t), lambda t, n=name: n in TARGETS[t].functions
        )  # fmt: skip
    return found + list(grouped("GluInt", glu_errors, lambda t: True))


def table() -> str:
    """The rows as a Markdown table."""
    lines = ["| op | chips | max, LSB | mean, LSB | max, real | mean, real |", "|---|---|---|---|---|---|"]
    for r in rows():
        numbers = f"{r.max_lsb:.3f} | {r.mean_lsb:.3f} | {r.max_real:.2e} | {r.mean_real:.2e}"
        lines.append(f"| {r.function} | {r.targets} | {numbers} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
