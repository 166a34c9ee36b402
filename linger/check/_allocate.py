"""The engine's memory planner: tensors with lifetimes into slots, by three greedy orders, the smallest sum wins.

A slot is a piece of memory that holds one tensor at a time; its size is that of the first, largest tensor put in it:

    total = sum of slots >= max over steps of the sum of sizes alive then = lower bound                (1)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Block:
    """A tensor in memory: bytes, and the first and last step at which it is needed."""

    name: str
    size: int
    begin: int
    end: int

    def meets(self, other: Block) -> bool:
        """Whether both are needed at some step."""
        return self.begin <= other.end and other.begin <= self.end


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which order won, the sum of its slots in bytes, and the slot of every block."""

    order: str
    total: int
    slots: dict[str, int]


def alive(blocks: Iterable[Block], step: int) -> list[Block]:
    """What is needed at a step."""
    return [b for b in blocks if b.begin <= step <= b.end]


def steps_of(blocks: Sequence[Block]) -> range:
    """Every step at which something is needed."""
    return range(min((b.begin for b in blocks), default=0), 1 + max((b.end for b in blocks), default=-1))


def lower_bound(blocks: Sequence[Block]) -> int:
    """Bytes that no plan can go below, equation (1)."""
    return max((sum(b.size for b in alive(blocks, step)) for step in steps_of(blocks)), default=0)


def best_fit(blocks: Iterable[Block]) -> tuple[int, dict[str, int]]:
    """Each block, in the order given, into the free slot with the least room left over, or into a new one."""
    slots: list[list[Block]] = []
    sizes: list[int] = []
    placed: dict[str, int] = {}
    for block in blocks:
        free = [i for i, held in enumerate(slots) if sizes[i] >= block.size and not any(map(block.meets, held))]
        if free:
            slot = min(free, key=lambda i: sizes[i])
            slots[slot].append(block)
        else:
            slot = len(slots)
            slots.append([block])
            sizes.append(block.size)
        placed[block.name] = slot
    return sum(sizes), placed


def by_size(blocks: Sequence[Block]) -> tuple[int, dict[str, int]]:
    """The largest first."""
    return best_fit(sorted(blocks, key=lambda b: -b.size))


def by_breadth(blocks: Sequence[Block]) -> tuple[int, dict[str, int]]:
    """What is alive at the fullest step first, the largest of those first."""
    widest = sorted(steps_of(blocks), key=lambda s: -sum(b.size for b in alive(blocks, s)))
    order: dict[str, Block] = {}
    for step in widest:
        order.update((b.name, b) for b in sorted(alive(blocks, step), key=lambda b: -b.size) if b.name not in order)
    return best_fit(order.values())


def by_order(blocks: Sequence[Block]) -> tuple[int, dict[str, int]]:
    """Step after step: the smallest free slot that is large enough, or a new one."""
    sizes: list[int] = []
    idle: set[int] = set()
    placed: dict[str, int] = {}
    before: list[Block] = []
    for step in steps_of(blocks):
        now = alive(blocks, step)
        idle.update(placed[b.name] for b in before if b not in now)
        for block in now:
            if block.name in placed:
                continue
            fitting = [i for i in idle if sizes[i] >= block.size]
            if fitting:
                placed[block.name] = min(fitting, key=lambda i: (sizes[i], i))
                idle.discard(placed[block.name])
            else:
                placed[block.name] = len(sizes)
                sizes.append(block.size)
        before = now
    return sum(sizes), placed


ORDERS = {"size": by_size, "breadth": by_breadth, "order": by_order}


def plan(blocks: Sequence[Block]) -> Plan:
    """The smallest of the three; the first of equal ones."""
    made = {name: order(blocks) for name, order in ORDERS.items()}
    name = min(made, key=lambda n: made[n][0])
    return Plan(order=name, total=made[name][0], slots=made[name][1])
