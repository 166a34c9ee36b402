"""One error class: facts inside, verb and layer outside, each said once."""

from __future__ import annotations

import pickle
import re

import pytest

import linger
from linger.errors import during


@pytest.mark.parametrize(
    ("verb", "layer", "error", "want"),
    [
        ("init", "", linger.LingerError("bits are 3"), "init: bits are 3"),
        ("init", "conv", linger.LingerError("bits are 3"), "init: conv: bits are 3"),
        ("init", "conv", linger.LingerError("bits are 3", "block.0"), "init: block.0: bits are 3"),
        ("init", "conv", linger.LingerError("init: conv: bits are 3"), "init: conv: bits are 3"),
        ("init", "conv", ValueError("not ours"), "not ours"),
    ],
    ids=["verb", "layer", "own layer", "said before", "another error"],
)
def test_during(verb: str, layer: str, error: Exception, want: str) -> None:
    with pytest.raises(type(error), match=f"^{re.escape(want)}$"), during(verb, layer):
        raise error


def test_the_inner_error_is_kept() -> None:
    inner = linger.LingerError("bits are 3")
    with (
        pytest.raises(linger.LingerError, match="export: init: bits are 3") as caught,
        during("export"),
        during("init"),
    ):
        raise inner
    assert caught.value.__cause__.__cause__ is inner  # type: ignore[union-attr]


def test_no_error_no_trace() -> None:
    with during("init", "conv"):
        pass


def test_crosses_processes() -> None:
    """A data loader or a launcher sends errors by pickle."""
    sent = pickle.loads(pickle.dumps(linger.LingerError("bits are 3", "block.0")))
    assert (str(sent), sent.fact, sent.layer) == ("block.0: bits are 3", "bits are 3", "block.0")


def test_kinds() -> None:
    """What a script that knows PyTorch catches and filters."""
    assert issubclass(linger.LingerError, RuntimeError)
    assert issubclass(linger.LingerWarning, UserWarning)
