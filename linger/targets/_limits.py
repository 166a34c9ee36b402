"""What a chip's table says of shapes and sizes: limits of ops, memories, and what a cycle does where that is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

KINDS = ("error", "wrong", "split", "warning")
STATUSES = ("runs", "repair", "workspace", "prefetch", "share", "unverified", "none")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Numbers of one op that a chip allows.

    Attributes:
        op: op type of the exported file.
        of: what is counted, a name of ``linger.targets._measures.MEASURES``.
        low: smallest number allowed.
        high: largest number allowed.
        among: the only numbers allowed, any where empty.
        when: a condition, a name of ``linger.targets._measures.CONDITIONS``; "" for always.
        kind: what happens beyond it: "error" (the packer or the chip refuses), "wrong" (other integers), "split" (the
            packer divides the op, the integers stay), "warning".
        align: to which multiples the factors of a size in bytes are rounded up, in the order that the measure names.
        way: the way out, where it is not the measure's own.
    """

    op: str
    of: str
    low: int | None = None
    high: int | None = None
    among: tuple[int, ...] = ()
    when: str = ""
    kind: str = "error"
    align: tuple[int, ...] = ()
    way: str = ""

    def allows(self, number: int) -> bool:
        """Whether this number is within the limit."""
        if self.among and number not in self.among:
            return False
        return (self.low is None or number >= self.low) and (self.high is None or number <= self.high)

    def text(self, show: Callable[[int], str] = str) -> str:
        """The numbers allowed, as a reader says them: "1 to 5", "1, 2, 4", "at most 4"."""
        if self.among:
            return ", ".join(map(show, self.among))
        if self.high is None:
            return f"at least {show(self.low or 0)}"
        if self.low is None:
            return f"at most {show(self.high)}"
        return f"{show(self.low)} to {show(self.high)}" if self.low != self.high else show(self.low)

    def __str__(self) -> str:
        return self.text()


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Sizes in bytes; None where no figure is known.

    ``align``: every tensor takes a multiple of so many bytes. ``spill``: an activation larger than this lies in PSRAM.
    """

    share: int | None = None
    psram: int | None = None
    flash: int | None = None
    align: int = 16
    spill: int | None = 640 * 1024


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Work of one cycle. Every figure is measured or None; with a None no cycles are printed.

    Attributes:
        macs_per_cycle: multiplications and additions of a convolution or a matrix product.
        bytes_per_cycle: bytes of activations that any other op reads and writes.
        cycles_per_op: overhead of one node.
    """

    macs_per_cycle: float | None = None
    bytes_per_cycle: float | None = None
    cycles_per_op: float | None = None
