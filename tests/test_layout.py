"""The shape of the project: imports point down one list, ops stand alone, rounding is written once, files stay short."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "linger"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module imports only what stands before it here, or is part of the same package (docs/decisions/002-import-order.md).
ORDER = """
_version errors plain files settings eager masks rounding steps products numerics histogram observe targets ops selects calls composed trace constants sites route forwards checkpoint swap limits batches fuse normalize recipe convert floating equalize refine calibrate sensitivity search training schedule accumulators onnx runtime verify
weights analysis dumper check fit retarget report log contents differ arguments execute why demo_data demo cli __main__ __init__
"""
RANK = {name: i for i, name in enumerate(ORDER.split())}
READER = {
    "_version",
    "errors",
    "rounding",
    "steps",
    "products",
    "numerics",
    "ops",
    "runtime",
}  # all that running a file may need
OPTIONAL = {"mlxtend", "PIL"}  # imported where they are used: linger installs without them
LONGEST = 400


def dotted(path: Path) -> str:
    """linger/ops/__init__.py -> linger.ops, linger/ops/conv.py -> linger.ops.conv."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {dotted(path): path for path in FILES}


def unit(name: str) -> str:
    """The entry of ORDER that a module belongs to."""
    return [*name.split("."), "__init__"][1]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def targets(node: ast.AST) -> Iterator[str]:
    """What an import statement imports: modules of linger by their full name, others as they are written."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        for alias in node.names:
            full = f"{module}.{alias.name}"
            yield full if full in NAMES else module


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when a module is imported; not what only a type checker reads."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from statements(getattr(node, field, []))


@cache
def imports(path: Path) -> frozenset[str]:
    """Names imported when the module is."""
    return frozenset(name for node in statements(tree(path).body) for name in targets(node))


def ours(path: Path) -> list[str]:
    return sorted(name for name in imports(path) if name.partition(".")[0] == "linger")


def id_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_file = pytest.mark.parametrize("path", FILES, ids=id_of)


def test_the_list_is_the_package() -> None:
    assert {unit(name) for name in NAMES} == RANK.keys()


@every_file
def test_imports_point_down(path: Path) -> None:
    own = unit(dotted(path))
    assert not [name for name in ours(path) if unit(name) != own and RANK[unit(name)] >= RANK[own]]
    assert not [name for name in imports(path) if name.startswith(".")], "imports are absolute"


def test_no_cycle_inside_a_package() -> None:
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for other in ours(NAMES[name]):
                if other in NAMES:
                    visit(other, (*above, name))
            done.add(name)

    for name in NAMES:
        visit(name, ())
    assert done == NAMES.keys()


def test_the_runtime_reads_files_alone() -> None:
    """Neither the tracer nor the exporter is needed to run a file."""
    assert {unit(name) for name in ours(PACKAGE / "runtime.py")} <= READER


@every_file
def test_imports_stand_at_the_top(path: Path) -> None:
    """Except in the command line, which starts fast, and for optional packages."""
    functions = [n for n in ast.walk(tree(path)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
    inner = {name for f in functions for node in ast.walk(f) for name in targets(node)}
    lazy = {name for name in inner if name.partition(".")[0] not in OPTIONAL}
    assert not lazy or unit(dotted(path)) == "cli"
    assert not {name for name in imports(path) if name.partition(".")[0] in OPTIONAL}


# --- ops


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*.py")), ids=id_of)
def test_op_files_never_import_onnx(path: Path) -> None:
    names = {name for node in ast.walk(tree(path)) for name in targets(node)}
    assert not [name for name in names if re.match(r"(onnx|linger\.onnx|torch\.onnx)", name)]


def test_the_op_table_lists_every_op_file() -> None:
    files = {p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_")}
    init = tree(PACKAGE / "ops" / "__init__.py")
    imported = [name.removeprefix("linger.ops.") for node in init.body for name in targets(node)]
    table = next(n.value for n in init.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "MODULES")
    assert isinstance(table, ast.Tuple)
    rows = [ast.unparse(row) for row in table.elts]
    assert {name for name in imported if name in files} == set(rows) == files
    assert len(rows) == len(files)


# --- one meaning, one place

ROUNDING = {"floor", "round", "rint", "trunc", "ceil", "around", "fix", "floor_divide"}
WHY_ELSEWHERE = {  # file -> why its rounding is none of rounding.py's
    "linger/demo.py": "a number of epochs, not a value on a grid",
    "linger/ops/_norm.py": "the chip's normalization, each step fused into as few passes as possible",
    "linger/ops/_pwl.py": "the argument of a chip's function, on the levels of a grid",
    "linger/ops/_recurrent_gru.py": "the chip's cells, each step fused into as few passes as possible",
    "linger/ops/_recurrent_lstm.py": "the chip's cells, each step fused into as few passes as possible",
    "linger/ops/_recurrent_rnn.py": "the chip's cells, each step fused into as few passes as possible",
    "linger/ops/_recurrent_step.py": "the chip's cells, each step fused into as few passes as possible",
    "linger/ops/_recurrent_tables.py": "the chip's functions on 32-bit arguments, on the device",
    "linger/ops/_softmax.py": "the chip's softmax in its own fractions of 23, 25 and 31 bits",
    "linger/ops/_unary.py": "tables of correctly rounded functions, their exact part split off",
    "linger/ops/clamp.py": "bounds brought to the grid, on the device and as numbers",
    "linger/ops/glu.py": "the chip's gate in its own fraction of 15 bits",
    "linger/ops/mask.py": "scores and additive masks brought to the output grid, on the device",
    "linger/ops/softmax.py": "the chip's probabilities brought to the output grid in place",
    "linger/ops/where.py": "a fill brought to the grid, on the device and as a number",
    "linger/why/_arithmetic.py": "what other implementations compute: every rounding but ours",
    "linger/why/_fits.py": "a line of least squares, rounded as the file does",
    "linger/why/_hypotheses.py": "the float function where a chip has a table",
    "linger/why/_runs.py": "whole numbers of a text file",
    "linger/targets/_softmax.py": "the chip's tables, as its maker rounded them",
    "linger/onnx/float_math.py": "the user's own torch.floor, torch.round and torch.trunc of float islands, as ONNX nodes",
}


def rounding(path: Path) -> list[str]:
    """Calls that round: of a tensor, an array or a number."""
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    named = [(c.func.attr if isinstance(c.func, ast.Attribute) else ast.unparse(c.func), c) for c in calls]
    return [f"line {call.lineno}: {ast.unparse(call)}" for name, call in named if name.rstrip("_") in ROUNDING]


@every_file
def test_rounding_is_written_once(path: Path) -> None:
    found = rounding(path)
    if path.name in ("rounding.py", "numerics.py"):
        assert found
    else:
        assert bool(found) is (id_of(path) in WHY_ELSEWHERE), found


# --- sizes and words


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "tests").rglob("*.py"))], ids=id_of)
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= LONGEST


HIDDEN = {".git", ".venv", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis", "__pycache__", "dist"}
TEXT = {".py", ".md", ".toml", ".txt", ".json", ".yml", ".yaml", ".cfg", ".sh", ""}
MACHINE = re.compile(r"(?<![\w.~-])/(?:" + "|".join(("work", "tmp", "root", "home", "mnt")) + r")(?:/|\b)")


def texts() -> list[Path]:
    inside = (p for p in ROOT.rglob("*") if not HIDDEN & set(p.relative_to(ROOT).parts))
    return sorted(p for p in inside if p.suffix in TEXT and p.is_file() and not p.name.startswith(".git"))


def test_no_text_knows_the_machine_it_was_written_on() -> None:
    """No path that exists on one machine only; the list holds the whole project."""
    found = texts()
    assert {"README.md", "pyproject.toml", "LICENSE", "test", "numerics.py", Path(__file__).name} <= {
        p.name for p in found
    }
    said = {id_of(p): MACHINE.findall(p.read_text("utf-8")) for p in found if p != Path(__file__)}
    assert not {name: words for name, words in said.items() if words}


def test_every_module_has_its_row() -> None:
    """In the decision about the order, in that order."""
    text = (ROOT / "docs/decisions/002-import-order.md").read_text("utf-8")
    names = [name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    assert names == ORDER.split()
