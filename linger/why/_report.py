"""What ``why`` found."""

from __future__ import annotations

from dataclasses import dataclass

from linger.check._words import readable

UNKNOWN = "unknown"


def _number(value: float | None) -> str:
    return "NaN" if value is None else f"{value:g}"


@dataclass(frozen=True, kw_only=True)
class Why:
    """The first tensor and element that differ, and the cause.

    Attributes:
        tensor: name of the first tensor that differs, "" where none does.
        op: op type of the node that makes it; ``node`` is the one that the cause is in.
        index: of the first element that differs, with its values in both runs and as the file says; None for NaN.
        differing: how many elements differ, of ``elements``.
        wrong: which run is not what the file says: "first", "second", or "both".
        cause: name of a hypothesis, or "unknown".
        said: the cause in words.
        explained: how many of the differing elements it reproduces; ``certain`` if it reproduces the whole tensor.
        evidence: lines.
        others: further causes that reproduce the whole tensor.
    """

    compared: int
    tensor: str = ""
    op: str = ""
    node: str = ""
    index: tuple[int, ...] = ()
    first: float | None = None
    second: float | None = None
    expected: float | None = None
    differing: int = 0
    elements: int = 0
    wrong: str = ""
    cause: str = ""
    said: str = ""
    explained: int = 0
    certain: bool = False
    evidence: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether all tensors that both runs have are equal."""
        return not self.tensor

    def __str__(self) -> str:
        if self.equal:
            return f"equal: all {self.compared} tensors that both runs have"
        place = f"{readable(self.tensor)}[{', '.join(map(str, self.index))}]"
        lines = [
            f"first difference: {place} is {_number(self.first)} in the first run and {_number(self.second)} in the second; "
            f"the file says {_number(self.expected)}, so the {self.wrong} {'are' if self.wrong == 'both' else 'is'} wrong",
            f"{self.differing} of {self.elements} elements of it differ; made by {self.op} {readable(self.node)}",
        ]
        if self.cause == UNKNOWN:
            lines.append("cause: unknown; no hypothesis reproduces it")
        else:
            sure = "" if self.certain else ", not the whole tensor"
            lines.append(f"cause: {self.cause}: {self.said}")
            lines.append(f"explains {self.explained} of {self.differing} differing elements{sure}")
        lines += self.evidence
        lines += [f"as well: {', '.join(self.others)}"] if self.others else []
        return "\n".join(lines)
