"""The integer reference some elements at a time, and in the narrowest floating point: the same integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from linger import ops, steps
from linger.numerics import exact_matmul, shift_round
from linger.ops._windows import pooled
from linger.steps import PIECE, instead, pieces, piecewise

G = np.random.default_rng(0)


def integers(*shape: int, bits: int = 8) -> np.ndarray:
    dtype = np.int8 if bits == 8 else np.int16
    return G.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype)


LAYOUTS: dict[str, tuple[np.ndarray, ...]] = {
    "plain": (integers(3, 5, 64, 400),),
    "batch last in memory": (np.moveaxis(integers(5, 64, 400, 3), -1, 0),),
    "broadcast": (integers(3, 1, 64, 400), integers(5, 1, 1)),
    "broadcast first": (integers(1), integers(30, 40, 80)),
    "one long axis": (integers(300_001), integers(300_001)),
    "a batch of one": (integers(1, 300, 400),),
    "empty": (integers(0, 70_000),),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_pieces_make_the_whole(name: str) -> None:
    arrays = LAYOUTS[name]
    seen: list[int] = []

    def total(*v: np.ndarray, more: int) -> np.ndarray:
        seen.append(np.broadcast(*v).size if len(v) > 1 else v[0].size)
        return sum((a.astype(np.int64) for a in v), np.int64(more)).astype(np.int16)

    found = piecewise(total)(*arrays, more=3)
    whole = total(*arrays, more=3)
    assert (found.dtype, found.shape) == (whole.dtype, whole.shape)
    assert np.array_equal(found, whole)
    assert sum(seen) == 2 * whole.size
    assert (len(seen) > 2) is (8 * whole.size > PIECE)


@pytest.mark.parametrize(("length", "size"), [(1, 1), (7, PIECE), (7, 10 * PIECE), (1000, PIECE // 10), (5, 0)])
def test_pieces_cover_an_axis(length: int, size: int) -> None:
    found = np.concatenate([np.arange(length)[part] for part in pieces(length, size)])
    assert found.tolist() == list(range(length))
    assert all(part.stop - part.start == 1 or (part.stop - part.start) * size <= PIECE for part in pieces(length, size))


CONV: dict[str, Any] = {"scale_x": 16.0, "scale_w": 64.0, "scale_o": 8.0, "strides": (1, 1), "pads": (1, 1, 1, 1)}


def test_replaced_steps_see_whole_sums() -> None:
    """So that they may ask which element of the result a sum belongs to; the integers are those of the pieces."""
    run, x, w, b = (
        ops.BY_NAME["Conv2dInt"].run,
        integers(6, 8, 40, 40),
        integers(5, 8, 3, 3),
        np.arange(5, dtype=np.int32),
    )
    shapes: list[tuple[int, ...]] = []

    def watched(v: np.ndarray, n: int) -> np.ndarray:
        shapes.append(v.shape)
        return shift_round.__wrapped__(v, n)  # type: ignore[attr-defined, no-any-return]

    with instead(shift_round=watched):
        whole = run(x, w, b, **CONV)
    assert shapes == [whole.shape] == [(6, 5, 40, 40)]
    assert np.array_equal(run(x, w, b, **CONV), whole)


def test_a_convolution_is_the_sum_of_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of one row of the result, groups and strides and all."""
    monkeypatch.setattr(steps, "PIECE", 1)
    x, w = integers(2, 4, 7, 6), integers(6, 2, 3, 2)
    attrs = CONV | {
        "strides": (2, 1),
        "pads": (1, 0, 2, 1),
        "dilations": (1, 2),
        "group": 2,
        "scale_o": 1024.0,
        "o_bits": 32,
    }
    padded = np.pad(x.astype(np.int64), ((0, 0), (0, 0), (1, 2), (0, 1)))
    found = ops.BY_NAME["Conv2dInt"].run(x, w, **attrs)
    for n, o, i, j in np.ndindex(found.shape):
        part = padded[n, 2 * (o // 3) : 2 * (o // 3) + 2, 2 * i : 2 * i + 3, j : j + 3 : 2]
        assert found[n, o, i, j] == (part * w[o]).sum()


@pytest.mark.parametrize(
    ("bits", "terms"),
    [((8, 8), 1023), ((8, 8), 1040), ((8, 8), 1100), ((16, 8), 4), ((16, 8), 5), ((16, 16), 1), ((16, 16), 40)],
)
def test_products_around_what_float32_holds(bits: tuple[int, int], terms: int) -> None:
    """The largest odd factors: sums on both sides of 2^24, whatever the layout."""
    a, b = (
        np.full(shape, 2 ** (n - 1) - 1, f"int{n}") for n, shape in zip(bits, ((3, terms), (terms, 2)), strict=True)
    )
    a[1], b[:, 1] = -a[1], b[:, 1] - 1
    want = a.astype(np.int64) @ b.astype(np.int64)
    for left in (a, np.asfortranarray(a)):
        found = exact_matmul(left, b)
        assert (found.dtype, found.tolist()) == (np.int64, want.tolist())


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(
    "shapes", [((5,), (5, 3)), ((4, 5), (5,)), ((2, 4, 5), (5,)), ((5,), (2, 5, 3)), ((5,), (5,))], ids=str
)
def test_products_of_vectors(shapes: tuple[tuple[int, ...], tuple[int, ...]], bits: int) -> None:
    """As of ``np.matmul``: a linear layer of a net without a batch axis is one."""
    a, b = (G.integers(-(2**24 if bits == 32 else 128), 128, shape, f"int{bits}") for shape in shapes)
    found = exact_matmul(a, b)
    assert found.dtype == np.int64
    assert np.array_equal(found, a.astype(np.int64) @ b.astype(np.int64))


@pytest.mark.parametrize("combine", [np.add, np.maximum])
def test_pooling_axis_by_axis_is_pooling_of_windows(combine: np.ufunc) -> None:
    x, kernel, strides, dilations, sizes = integers(2, 3, 9, 8), (3, 2), (2, 3), (2, 1), (3, 3)
    found = pooled(x, combine, kernel, strides, dilations, sizes, np.int64)
    for i, j in np.ndindex(*sizes):
        window = x[:, :, 2 * i : 2 * i + 5 : 2, 3 * j : 3 * j + 2].astype(np.int64)
        assert np.array_equal(found[:, :, i, j], combine.reduce(window, axis=(2, 3)))
