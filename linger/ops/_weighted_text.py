"""Weighted sums as ONNX text: products cut into pieces that float32 holds, and the shift to the output's grid (``_weighted`` (2))."""

from __future__ import annotations

from linger.errors import LingerError
from linger.numerics import FLOAT32_EXACT
from linger.ops._base import constants, output_bits, requant_text
from linger.rounding import HALF_UP


def split_form(terms: int, data_bits: int, parameter_bits: int) -> str:
    """Cut x into 8-bit pieces and w into p-bit pieces so that each partial product of ``terms`` terms is below 2^24.

    Raises:
        LingerError: ``terms`` are too many even for pieces of one bit.
    """
    pieces = max(1, data_bits // 8)
    top = 128 if pieces == 1 else 255
    if terms * top >= FLOAT32_EXACT:
        raise LingerError(
            f"found sums of {terms} products, allowed are {(FLOAT32_EXACT - 1) // top}; use groups or fewer bits"
        )
    width = next(p for p in (4, 2, 1) if p == 1 or terms * top * (2**p - 1) < FLOAT32_EXACT)
    return f"x{pieces}w{-(-max(parameter_bits, width) // width)}p{width}"


def split_text(source: str, prefix: str, pieces: int, width: int) -> str:
    """Statements cutting double ``source`` into floats ``prefix0`` .. of ``width`` bits, lowest first, the last signed."""
    text = constants(**{f"{prefix}base": f"double {{{2**width}}}", f"{prefix}inv": f"double {{{2.0**-width}}}"})
    rest = source
    for i in range(pieces - 1):
        high, low = f"{prefix}h{i}", f"{prefix}l{i}"
        text += (
            f"{high}m = Mul ({rest}, {prefix}inv)\n{high} = Floor ({high}m)\n{high}b = Mul ({high}, {prefix}base)\n"
            f"{low} = Sub ({rest}, {high}b)\n{prefix}{i} = Cast <to: int = 1> ({low})\n"
        )
        rest = high
    return text + f"{prefix}{pieces - 1} = Cast <to: int = 1> ({rest})\n"


def multiplier_text(double: bool = False, second: str = "scale_w") -> str:
    """Statements for ``M`` = s_o / (s_x * s_w), exact because all are powers of two."""
    text = constants(sx="@scale_x", sw=f"@{second}", so="@scale_o") + "sxw = Mul (sx, sw)\n"
    return text + ("Mf = Div (so, sxw)\nM = Cast <to: int = 11> (Mf)\n" if double else "M = Div (so, sxw)\n")


def result_text(accumulator: str, double: bool, bits: int, second: str = "scale_w", rounding: str = HALF_UP) -> str:
    """Equation (2) of an ``accumulator`` statement that is exact in float (or double); results above 16 bits need double.

    ``second``: the attribute that holds the second factor's scale.
    """
    if double or bits <= 16:
        text = f"A = {accumulator}\n" + multiplier_text(double, second)
        return text + requant_text("A", "M", "Y", bits, double, rounding=rounding)
    text = f"S = {accumulator}\nA = Cast <to: int = 11> (S)\n"
    return text + multiplier_text(True, second) + requant_text("A", "M", "Y", bits, double=True, rounding=rounding)


def sum_body(form: str, product: str, rounding: str = HALF_UP) -> tuple[str, str]:
    """Body of a weighted sum. ``product`` is an ONNX expression with {x}, {w} and {b} (", bias" or empty)."""
    base, bits = output_bits(form)
    if base == "f32":
        text = "Xf = Cast <to: int = 1> (X)\nWf = Cast <to: int = 1> (W)\nBf = Cast <to: int = 1> (B)\n"
        return "X, W, B", text + result_text(product.format(x="Xf", w="Wf", b=", Bf"), False, bits, rounding=rounding)
    n_x, rest = base[1:].split("w")
    n_w, width = (int(v) for v in rest.split("p"))
    text = "Xd = Cast <to: int = 11> (X)\nWd = Cast <to: int = 11> (W)\nBd = Cast <to: int = 11> (B)\n"
    text += split_text("Xd", "x", int(n_x), 8) + split_text("Wd", "w", n_w, width)
    total = ""
    for i in range(int(n_x)):
        for j in range(n_w):
            name = f"t{i}_{j}"
            text += f"{name}f = " + product.format(x=f"x{i}", w=f"w{j}", b="") + "\n"
            text += constants(**{f"{name}s": f"double {{{2 ** (8 * i + width * j)}}}"})
            text += f"{name}d = Cast <to: int = 11> ({name}f)\n{name} = Mul ({name}d, {name}s)\n"
            text += f"{name}a = Add ({total}, {name})\n" if total else ""
            total = f"{name}a" if total else name
    return "X, W, B", text + "Bn = BiasShape (Bd)\n" + result_text(f"Add ({total}, Bn)", True, bits, rounding=rounding)
