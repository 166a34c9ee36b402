"""One LSTM, GRU or RNN node as standard ONNX ops: a Scan over the steps in float64, which holds every integer of the cells.

The product of all inputs is a Gemm of two axes: ONNX Runtime 1.32 dies of a MatMul behind a Transpose and a Cast, which may be
of the layer before; a Transpose of this one is in front of its last Cast.
"""

from __future__ import annotations

from dataclasses import dataclass

from linger.errors import LingerError
from linger.ops._base import ONNX_INT, constants
from linger.ops._cells import STATES, Arithmetic, arithmetic
from linger.targets._pwl import Pwl

DOUBLE, INT64 = 11, 7
SWAP = "Transpose <perm: ints = [1, 0, 2]>"
WORDS = ("batch_first", "reverse", "lengths", "states", "projected", "relu")


@dataclass(frozen=True, kw_only=True)
class Form:
    """What decides a node's body besides its attributes. ``text`` is its spelling in the file."""

    kind: str
    platform: str
    bits: int
    words: frozenset[str]

    @property
    def text(self) -> str:
        return " ".join((self.kind, self.platform, str(self.bits), *(w for w in WORDS if w in self.words)))

    @classmethod
    def of(cls, text: str) -> Form:
        kind, platform, bits, *words = text.split(" ")
        return cls(kind=kind, platform=platform, bits=int(bits), words=frozenset(words))

    @property
    def how(self) -> Arithmetic:
        return arithmetic(self.platform, self.bits)

    @property
    def inputs(self) -> str:
        """Names of the node's inputs."""
        given = ["X", *(["Lengths"] if "lengths" in self.words else [])]
        given += [f"{s.upper()}0" for s in STATES[self.kind]] if "states" in self.words else []
        return ", ".join([*given, "Wi", "Wh", "Bi", "Bh", *(["Wr"] if "projected" in self.words else [])])


def body(text: str, opset: int) -> tuple[str, str]:
    """Inputs and statements; the outputs are Y, H and, of an LSTM, C."""
    form = Form.of(text)
    return form.inputs, _before(form, opset) + _scan(form, opset) + _after(form, opset)


def real(text: str, opset: int) -> str:
    """No form on floats: the loop is not worth a second spelling.

    Raises:
        LingerError: always.
    """
    raise LingerError(
        f"found {Form.of(text).kind.upper()}, which has no form in dialect 'qdq', allowed are the other dialects; leave dialect out"
    )


# --- pieces


def _double(**names: str) -> str:
    return "".join(f"{new} = Cast <to: int = {DOUBLE}> ({old})\n" for new, old in names.items())


def _rounded(source: str, factor: str, result: str, bits: int) -> str:
    """saturate(floor(source * factor + 1/2)): ``factor`` and the limits are constants of the function."""
    p = f"{result}_"
    return (
        f"{p}m = Mul ({source}, {factor})\n{p}a = Add ({p}m, half)\n{p}f = Floor ({p}a)\n"
        f"{result} = Clip ({p}f, lo{bits}, hi{bits})\n"
    )


def _limits(*widths: int) -> str:
    return constants(
        **{f"lo{b}": f"double {{{-(2 ** (b - 1))}}}" for b in widths},
        **{f"hi{b}": f"double {{{2 ** (b - 1) - 1}}}" for b in widths},
    )


def _power(name: str, exponent: int) -> str:
    return constants(**{name: f"double {{{2.0**exponent!r}}}"})


def _axis(op: str, source: str, result: str, opset: int) -> str:
    """Squeeze or Unsqueeze of axis 0."""
    if opset < 13:
        return f"{result} = {op} <axes: ints = [0]> ({source})\n"
    return f"{result} = {op} ({source}, zeroth)\n"


def _table(name: str, values: tuple[int | float, ...], kind: str) -> str:
    return constants(**{name: f"{kind}[{len(values)}] {{{', '.join(repr(v) for v in values)}}}"})


def _function(form: Form, name: str, table: Pwl) -> str:
    """The constants of a piecewise-linear function: bands, and 16 lines for arguments >= 0 before those below 0."""
    how = form.how
    text = _table(f"{name}_bands", tuple(float(b) for b in table.bands), "double")
    slopes = table.positive[0] + table.negative[0]
    if how.width == 16:
        steps = tuple(s * 2.0**-d for s, d in zip(slopes, table.shifts * 2, strict=True))
        biases = tuple(float(b) for b in table.positive[1] + table.negative[1])
        return text + _table(f"{name}_slope", steps, "double") + _table(f"{name}_bias", biases, "double")
    return text + _table(f"{name}_slope", slopes, "int64") + _table(f"{name}_bias", _whole_biases(table), "int64")


OFFSET = 16  # added to a value of Q15, in units of 2^OFFSET, so that a division that truncates is a floor


def _whole_biases(table: Pwl) -> tuple[int, ...]:
    """B of (slope z + B) >> 43, the function of a 32-bit argument rounded to 15 fraction bits, raised by 2^OFFSET.

    The bias, half of what the function rounds by (if it rounds), and half of the 16 bits that are cut behind it: floors of
    sums of integers can be taken at once.
    """
    half = 2**26 if table.rounded else 0
    shift = table.bias_shift if table.rounded else 27
    return tuple((b << shift) + half + (1 << 42) + (1 << 43 + OFFSET) for b in table.positive[1] + table.negative[1])


def _applied(form: Form, name: str, source: str, result: str, opset: int) -> str:
    """Equation (2) of ``_cells`` on double arguments (N, n)."""
    how, p = form.how, f"{result}_"
    z = source
    text = ""
    if name == "tanh":
        z = f"{p}z"
        text = f"{z} = Max ({source}, lowest)\n"
    text += f"{p}abs = Abs ({z})\n{p}col = Reshape ({p}abs, column)\n{p}above = Greater ({p}col, {name}_bands)\n"
    text += f"{p}ones = Cast <to: int = {INT64}> ({p}above)\n" + _sum_last(f"{p}ones", f"{p}k", opset)
    text += f"{p}neg = Less ({z}, none)\n{p}negi = Cast <to: int = {INT64}> ({p}neg)\n"
    text += f"{p}half = Mul ({p}negi, sixteen)\n{p}row = Add ({p}k, {p}half)\n"
    text += f"{p}s = Gather ({name}_slope, {p}row)\n{p}b = Gather ({name}_bias, {p}row)\n"
    if how.width == 32:
        text += f"{p}zi = Cast <to: int = {INT64}> ({z})\n{p}sz = Mul ({p}s, {p}zi)\n{p}v = Add ({p}sz, {p}b)\n"
        text += f"{p}q = Div ({p}v, cut)\n{p}r = Sub ({p}q, raised)\n"
        return text + f"{result} = Cast <to: int = {DOUBLE}> ({p}r)\n"
    text += f"{p}sz = Mul ({p}s, {z})\n{p}low = Floor ({p}sz)\n"
    if not how.narrow:
        return text + f"{result} = Add ({p}low, {p}b)\n"
    return text + f"{p}y = Add ({p}low, {p}b)\n" + _rounded(f"{p}y", "eighth", result, 8)


def _sum_last(source: str, result: str, opset: int) -> str:
    if opset < 13:
        return f"{result} = ReduceSum <axes: ints = [-1], keepdims: int = 0> ({source})\n"
    return f"{result} = ReduceSum <keepdims: int = 0> ({source}, last)\n"


# --- before the loop


def _before(form: Form, opset: int) -> str:
    how = form.how
    text = _limits(*{8, 16, 32, form.bits, how.fraction + 1, 2 * how.fraction + 2})
    text += constants(
        half="double {0.5}", none="double {0}", lowest=f"double {{{-(2 ** (how.width - 1)) + 1}}}", sixteen="int64 {16}",
        column="int64[3] {0, 0, 1}", last="int64[1] {-1}", zeroth="int64[1] {0}", flat="int64[2] {-1, 1}", one_="int64[1] {1}", second="int64[1] {2}",
        cut=f"int64 {{{2**43}}}", raised=f"int64 {{{2**OFFSET}}}", si="@scale_i", siw="@scale_iw", shw="@scale_hw",
        so="@scale_o",
    )  # fmt: skip
    text += _power("eighth", -8) + _power("FF", how.argument)
    text += "siiw = Mul (si, siw)\nsohw = Mul (so, shw)\n" + _double(siiwd="siiw", sohwd="sohw", sod="so")
    text += "Mi = Div (FF, siiwd)\nMh = Div (FF, sohwd)\n" + _function(form, "sigmoid", how.sigmoid)
    text += _function(form, "tanh", how.tanh) + _double(Wid="Wi", Whd="Wh", Bid="Bi", Bhd="Bh")
    swapped = "batch_first" in form.words
    text += (
        _double(Xd="X")
        + "x_size = Shape (Wi)\nx_width = Slice (x_size, one_, second)\nmatrix = Concat <axis: int = 0> (last, x_width)\nXr = Reshape (Xd, matrix)\nP = Gemm <transB: int = 1> (Xr, Wid, Bid)\n"
    )
    text += "Px = Clip (P, lo32, hi32)\nshape_x = Shape (X)\nsteps = Slice (shape_x, zeroth, second)\n"
    text += "shape_p = Concat <axis: int = 0> (steps, last)\nPc = Reshape (Px, shape_p)\n"
    text += _rounded("Pc", "Mi", "Ap", how.width) + f"A = {SWAP if swapped else 'Identity'} (Ap)\n"
    return text + _kind_constants(form) + _first(form, opset)


def _kind_constants(form: Form) -> str:
    how = form.how
    g = how.fraction
    text = _power("to_h_full", -2 * g) + "Ma = Mul (sod, to_h_full)\n"
    if form.kind == "lstm":
        text += _power("to_k", how.argument - 2 * g) + _power("k_to_c", g - how.argument) + _power("s_to_c", -g)
        if "projected" in form.words:
            text += constants(sr="@scale_rw") + _double(srd="sr", Wrd="Wr") + _power("to_g", -g) + _power("GG", g)
            text += "srg = Mul (srd, GG)\nMr = Div (sod, srg)\n"
    elif form.kind == "gru":
        text += _power("GG", g) + _power("r_to_f", -g) + "Ms = Div (GG, sod)\n"
    else:
        text += _power("to_h", -(how.argument if "relu" in form.words else g)) + "Mn = Mul (sod, to_h)\n"
    return text


def _first(form: Form, opset: int) -> str:
    """The states before the first step, double (N, H): ``h_first`` and ``c_first``."""
    if "states" in form.words:
        text = constants(halff="float {0.5}") + _axis("Squeeze", "H0", "H0s", opset)
        text += _entered("H0s", "so", "h_first", form.bits)
        if form.kind == "lstm":
            text += _axis("Squeeze", "C0", "C0s", opset) + constants(sc=f"float {{{2.0**form.how.fraction}}}")
            text += _entered("C0s", "sc", "c_first", 16 if form.how.narrow else 32)
        return text
    text = constants(two="int64[1] {2}", first="int64[1] {1}")
    text += "shape_a = Shape (A)\nn = Slice (shape_a, first, two)\n"
    held = {"h": "Wh", "c": "Wr" if "projected" in form.words else "Wh"}
    for state in STATES[form.kind]:
        text += f"{state}_w = Shape ({held[state]})\n{state}_n = Slice ({state}_w, first, two)\n"
        text += f"{state}_shape = Concat <axis: int = 0> (n, {state}_n)\n"
        text += f"{state}_first = ConstantOfShape <value = double[1] {{0}}> ({state}_shape)\n"
    return text


def _entered(source: str, scale: str, result: str, bits: int) -> str:
    """Floats on the grid of ``scale``, as Quant puts them there."""
    p = f"{result}_"
    if bits > 16:
        text = _double(**{f"{p}x": source, f"{p}s": scale}) + constants(
            lo25=f"double {{{-(2**24)}}}", hi25=f"double {{{2**24 - 1}}}"
        )
        return text + _rounded(f"{p}x", f"{p}s", result, 25)
    text = constants(**{f"{p}lo": f"float {{{-(2 ** (bits - 1))}}}", f"{p}hi": f"float {{{2 ** (bits - 1) - 1}}}"})
    text += f"{p}m = Mul ({source}, {scale})\n{p}a = Add ({p}m, halff)\n{p}f = Floor ({p}a)\n"
    return text + f"{p}c = Clip ({p}f, {p}lo, {p}hi)\n" + _double(**{result: f"{p}c"})


# --- the loop


def _scan(form: Form, opset: int) -> str:
    states = STATES[form.kind]
    masked = "lengths" in form.words
    text = ""
    if masked:
        text += constants(begin="int64 {0}", stride="int64 {1}") + "shape_t = Shape (A)\nT = Gather (shape_t, begin)\n"
        text += "ticks = Range (begin, T, stride)\nuntil = Reshape (Lengths, flat)\n"
    scanned = ["a_t", *(["tick"] if masked else [])]
    held = ", ".join([f"double[n, {s}n] {s}" for s in states] + ["double[n, g] a_t"] + ["int64 tick"] * masked)
    given = ", ".join([f"{s}_first" for s in states] + ["A"] + ["ticks"] * masked)
    made = ", ".join([f"double[n, {s}n] {s}_out" for s in states] + ["double[n, hn] y_out"])
    ways = ", ".join(["1" if "reverse" in form.words else "0"] * len(scanned))
    last = ", ".join([f"{s}_last" for s in states] + ["Yd"])
    steps = _gates(form, opset) + {"lstm": _lstm, "gru": _gru, "rnn": _rnn}[form.kind](form, opset) + _masked(form)
    way = "1" if "reverse" in form.words else "0"
    lines = "".join(f"    {line}\n" for line in steps.strip().splitlines())
    return (
        f"{text}{last} = Scan <num_scan_inputs: int = {len(scanned)}, scan_input_directions: ints = [{ways}], "
        f"scan_output_directions: ints = [{way}], body: graph = step ({held}) => ({made}) {{\n{lines}}}> ({given})\n"
    )


def _gates(form: Form, opset: int) -> str:
    return (
        "bb = Gemm <transB: int = 1> (h, Whd, Bhd)\nbc = Clip (bb, lo32, hi32)\n"
        + _rounded("bc", "Mh", "b_t", form.how.width)
        + _summed("a_t", "b_t", "z", form.how.width)
    )


def _summed(a: str, b: str, result: str, bits: int) -> str:
    return f"{result}_s = Add ({a}, {b})\n{result} = Clip ({result}_s, lo{bits}, hi{bits})\n"


def _split(source: str, names: str, opset: int) -> str:
    parts = names.split(", ")
    count = f", num_outputs: int = {len(parts)}" if opset >= 18 else ""
    return f"{names} = Split <axis: int = -1{count}> ({source})\n"


def _lstm(form: Form, opset: int) -> str:
    how = form.how
    text = _split("z", "zi, zf, zg, zo", opset)
    text += "".join(_applied(form, "sigmoid", f"z{v}", f"v{v}", opset) for v in "ifo") + _applied(
        form, "tanh", "zg", "vg", opset
    )
    text += "cf = Mul (c, vf)\ncfc = Clip (cf, lo32, hi32)\nig = Mul (vi, vg)\nigc = Clip (ig, lo32, hi32)\n"
    text += "s = Add (cfc, igc)\n" + _rounded("s", "to_k", "k", how.width)
    source, factor, bits = ("k", "k_to_c", 32) if how.width == 32 else ("s", "s_to_c", 16 if how.narrow else 32)
    text += _rounded(source, factor, "c_new", bits) + _applied(form, "tanh", "k", "vk", opset) + "ok = Mul (vo, vk)\n"
    if "projected" not in form.words:
        return text + _rounded("ok", "Ma", "h_new", form.bits)
    text += _rounded("ok", "to_g", "p", how.fraction + 1)
    return text + "pm = Gemm <transB: int = 1> (p, Wrd)\n" + _rounded("pm", "Mr", "h_new", form.bits)


def _gru(form: Form, opset: int) -> str:
    how = form.how
    wide = 2 * how.fraction + 2
    text = _split("a_t", "a_r, a_z, a_n", opset) + _split("b_t", "b_r, b_z, b_n", opset)
    text += _split("z", "z_r, z_z, z_n", opset)
    text += _applied(form, "sigmoid", "z_r", "vr", opset) + _applied(form, "sigmoid", "z_z", "vz", opset)
    text += "rb = Mul (vr, b_n)\nrm = Mul (rb, r_to_f)\nra = Add (rm, half)\nrf = Floor (ra)\n"
    text += _summed("a_n", "rf", "zn", how.width) + _applied(form, "tanh", "zn", "vn", opset)
    text += "hm = Mul (h, Ms)\nha = Add (hm, half)\nhf = Floor (ha)\nzh = Mul (vz, hf)\nzc = Sub (GG, vz)\n"
    text += f"zhc = Clip (zh, lo{wide}, hi{wide})\nnz = Mul (zc, vn)\nnzc = Clip (nz, lo{wide}, hi{wide})\n"
    return text + "after = Add (zhc, nzc)\n" + _rounded("after", "Ma", "h_new", form.bits)


def _rnn(form: Form, opset: int) -> str:
    if "relu" in form.words:
        return "zr = Max (z, none)\n" + _rounded("zr", "Mn", "h_new", form.bits)
    return _applied(form, "tanh", "z", "vz", opset) + _rounded("vz", "Mn", "h_new", form.bits)


def _masked(form: Form) -> str:
    states = STATES[form.kind]
    if "lengths" not in form.words:
        return "".join(f"{s}_out = Identity ({s}_new)\n" for s in states) + "y_out = Identity (h_new)\n"
    text = "on = Less (tick, until)\n"
    return text + "".join(f"{s}_out = Where (on, {s}_new, {s})\n" for s in states) + "y_out = Where (on, h_new, none)\n"


# --- behind the loop


def _after(form: Form, opset: int) -> str:
    to = ONNX_INT[form.bits]
    swap = SWAP if "batch_first" in form.words else "Identity"
    text = f"Yt = {swap} (Yd)\nY = Cast <to: int = {to}> (Yt)\n"
    text += f"Hi = Cast <to: int = {to}> (h_last)\n" + _axis("Unsqueeze", "Hi", "H", opset)
    if form.kind == "lstm":
        text += "Ci = Cast <to: int = 6> (c_last)\n" + _axis("Unsqueeze", "Ci", "C", opset)
    return text
