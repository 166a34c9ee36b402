"""Text files of what a net computes, layer by layer: the names and the format that the chip's tools compare.

with linger.Dumper() as dumper:
    dumper.enable_dump_quanted(net, path="dump")
    net(x)

Every file holds one tensor, flattened, one value per line with six decimals; integers of fixed point too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linger import runtime
from linger.analysis import Analysis, spread
from linger.errors import LingerError, during
from linger.files import whole
from linger.numerics import grid_of, quantize
from linger.ops import ROWS, IntModule, Operand
from linger.swap import named, require_net
from linger.trace import tensors_of
from linger.verify import verify

Hook = Callable[[nn.Module, Any, Any], Any]
OP_NAMES = {op.integer: op.name for op in reversed(ROWS) if op.integer is not None}
NAMES = {"quant_tensor": "ScaledRoundLayer", "BatchNorm1dInt": "BatchNormInt", "BatchNorm2dInt": "BatchNormInt"}
PARAMETERS = {"weight": "weights"}  # file names of parameters that have another name than the layer gives them


class Dumper:
    """A context manager; everything that it installs on nets is removed on exit."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._turns: dict[tuple[str, nn.Module], int] = {}
        self._seen: dict[str, list[Tensor]] = {}

    def __enter__(self) -> Dumper:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def enable_dump_quanted(
        self, model: nn.Module, path: str | os.PathLike[str] = "./dump", match_pattern: str = ".*"
    ) -> None:
        """From now on, an eval forward writes what every fixed-point layer and call reads, holds and makes.

        Files are ``root.<dotted name>.<op>.<tensor>``; tensors are ``input``, ``weights``, ``bias``, ``outputs`` and so on, and
        with ``q_`` in front the integers that the exported file holds. The second call of a layer in a forward is
        ``name@1``.

        Args:
            model: a fixed-point net in eval mode.
            path: directory, made where it does not exist.
            match_pattern: regular expression at the start of the name with ``root.``.

        Raises:
            LingerError: the net is in train mode, or nothing matches.
        """
        with during("Dumper"):
            chosen = self._chosen(model, match_pattern, lambda m: isinstance(m, IntModule))
            directory = _directory(path)
            self._on_forward(model)

            def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
                stem = self._turn("quanted", module, chosen[module])
                for name, values in tensors_in(module, args, kwargs, out).items():
                    write_text(directory / f"{stem}.{op_name(module)}.{name}", values)

            self._install(chosen, hook)

    def enable_dump_model(
        self,
        model: nn.Module,
        path: str | os.PathLike[str] = "./dump",
        match_pattern: str = ".*",
        hook_forward: Hook | None = None,
    ) -> None:
        """From now on, an eval forward writes the first input and the output of every layer without children, as floats.

        Files are ``root.<dotted name>_input_float`` and ``_output_float``. Several outputs are written one after the
        other; of a recurrent layer, only the sequence.

        Args:
            model: a net of any stage in eval mode.
            path: directory, made where it does not exist.
            match_pattern: regular expression at the start of the name with ``root.``.
            hook_forward: called instead, as a forward hook of PyTorch is.
        """
        with during("Dumper"):
            chosen = self._chosen(model, match_pattern, _is_leaf)
            directory = _directory(path)
            self._on_forward(model)

            def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
                stem = self._turn("model", module, chosen[module])
                out = out[:1] if isinstance(module, nn.RNNBase) else out
                for kind, tensors in (("input", tensors_of((args, kwargs))[:1]), ("output", tensors_of(out))):
                    values = [v for t in tensors for v in t.detach().flatten().tolist()]
                    write_text(directory / f"{stem}_{kind}_float", values)

            if hook_forward is not None:
                self._handles += [m.register_forward_hook(hook_forward) for m in chosen]
            else:
                self._install(chosen, hook)

    def analyse_layer_output(self, model: nn.Module, match_pattern: str = ".*") -> None:
        """From now on, forwards (in train mode too) collect the outputs of every layer without children for one table."""
        with during("Dumper"):
            chosen = self._chosen(model, match_pattern, _is_leaf, evaluating=False)

            def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
                kept = self._seen.setdefault(chosen[module].removeprefix("root."), [])
                kept += [t.detach().cpu() for t in tensors_of(out) if t.is_floating_point()]

            self._install(chosen, hook)

    def save_out_analyse_log(
        self, save_log_path: str | os.PathLike[str] | None = "Analyse_layer_output.log"
    ) -> Analysis:
        """The table of what ``analyse_layer_output`` has seen, as a text file and returned."""
        with during("Dumper"):
            if not self._seen:
                raise LingerError("found no layer output, allowed after a forward; call analyse_layer_output before it")
            rows = [spread(name, tensors) for name, tensors in self._seen.items()]
            made = Analysis(tuple(r for r in rows if r is not None))
            if save_log_path is not None:
                made.save(save_log_path)
        return made

    # --- hooks

    def _chosen(
        self, model: nn.Module, pattern: str, wanted: Callable[[nn.Module], bool], evaluating: bool = True
    ) -> dict[nn.Module, str]:
        """The modules to look at, and their names with ``root``."""
        require_net("Dumper", model)
        if evaluating and model.training:
            raise LingerError("found a net in train mode, allowed is eval mode; call model.eval() before dumping")
        try:
            matches = re.compile(pattern).match
        except re.error as error:
            raise LingerError(
                f"match_pattern is {pattern!r}, allowed are regular expressions ({error}); repair it"
            ) from None
        found = {m: f"root.{name}".rstrip(".") for m, name in named(model).items() if wanted(m)}
        chosen = {m: name for m, name in found.items() if matches(name)}
        if not chosen:
            known = ", ".join(list(found.values())[:5]) or "none; call linger.init first"
            raise LingerError(f"match_pattern {pattern!r} fits no layer, allowed are names such as {known}; change it")
        return chosen

    def _install(self, chosen: Mapping[nn.Module, str], hook: Callable[..., None]) -> None:
        self._handles += [m.register_forward_hook(hook, with_kwargs=True) for m in chosen]

    def _on_forward(self, model: nn.Module) -> None:
        self._handles.append(model.register_forward_pre_hook(lambda *_: self._turns.clear()))

    def _turn(self, kind: str, module: nn.Module, name: str) -> str:
        """The name, with ``@1`` at the second call in a forward."""
        n = self._turns[kind, module] = self._turns.get((kind, module), -1) + 1
        return f"{name}@{n}" if n else name


def _is_leaf(module: nn.Module) -> bool:
    return not any(True for _ in module.children())


def _directory(path: str | os.PathLike[str]) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LingerError(f"cannot make the directory {os.fspath(path)!r} ({error.strerror}); name another") from None
    return Path(path)


def op_name(module: nn.Module) -> str:
    """What the file's name calls the op: upstream's word."""
    name = OP_NAMES.get(type(module), type(module).__name__)
    return NAMES.get(name, name)


def write_text(path: Path, values: list[float]) -> None:
    """One value per line."""
    with whole(path) as out:
        out.write("".join(f"{v:.6f}\n" for v in values).encode("ascii"))


@torch.no_grad()
def tensors_in(module: IntModule, args: Any, kwargs: Any, out: Any) -> dict[str, list[float]]:
    """The values of one call of a fixed-point module by the names of their files."""
    held = {k: v for k, v in kwargs.items() if k in module.parameter_names and isinstance(v, Tensor)}
    rest = {k: v for k, v in kwargs.items() if k not in held}
    operands = tensors_of((args, rest))
    bits = module.operand_bits([0 if g is None else g.bits for g in map(grid_of, operands)])
    found: dict[str, list[float]] = {}
    entered: list[Operand] = []
    for i, t in enumerate(operands):
        name = "input" if i == 0 else f"input_{i}"
        found[name] = _flat(t)
        taken = _taken(module, i, t, bits)
        entered.append(taken)
        if taken.bits:
            found[f"q_{name}"] = _flat(
                torch.from_numpy(quantize(t.float(), torch.tensor(taken.scale), min(taken.bits, 25)))
            )
    found.update(_parameters(module, tuple(entered), args, rest, held, out))
    for i, t in enumerate(tensors_of(out)):
        name, grid = "outputs" if i == 0 else f"outputs_{i}", grid_of(t)
        found[name] = _flat(t)
        if grid is not None:
            found[f"q_{name}"] = _flat(t.double() * grid.scale.double())
    return found


def _taken(module: IntModule, position: int, t: Tensor, bits: int) -> Operand:
    """An operand as the module's forward brings it to its grid."""
    if position in module.raw or not t.is_floating_point():
        return Operand(scale=1.0, bits=0, shape=tuple(t.shape), dtype=t.dtype)
    grid = grid_of(t)
    scale, given = (None, 0) if grid is None else (float(grid.scale), grid.bits)
    return module.taken(position, scale, given, bits, tuple(t.shape))


def _parameters(
    module: IntModule, operands: tuple[Operand, ...], args: Any, kwargs: Any, held: Mapping[str, Tensor], out: Any
) -> dict[str, list[float]]:
    """What the module holds, as floats and as the integers that the file stores."""
    floats = dict((*module.named_parameters(recurse=False), *held.items()))
    found = {PARAMETERS.get(k, k): _flat(t) for k, t in floats.items()}
    first = next(iter(tensors_of(out)), None)
    grid = None if first is None else grid_of(first)
    if first is None or grid is None or any(isinstance(a, nn.utils.rnn.PackedSequence) for a in args):
        return found
    call = {
        k: v
        for k, v in (dict(enumerate(args)) | kwargs).items()
        if not any(isinstance(x, Tensor) for x in pytree.tree_leaves(v))
    }
    result = Operand(scale=float(grid.scale), bits=grid.bits, shape=tuple(first.shape))
    for step in module.lower(operands, result, call | dict(held)):
        for k, array in step.params.items():
            found[f"q_{PARAMETERS.get(k, k)}"] = [float(v) for v in array.flatten().tolist()]
    return found


def _flat(t: Tensor) -> list[float]:
    return t.detach().double().flatten().tolist()  # type: ignore[no-any-return]


def fix_dequant(model_name: str | os.PathLike[str], is_check: bool = False) -> str:
    """Nothing: a file of this version needs no repair. Prints why, for scripts that call it.

    Upstream wrote ``Dequant`` nodes from tables of op names, in places where the chip's tools stumbled over them, and this
    call took them out again. The exporter decides from the grids of the tensors themselves, so that a ``Dequant`` stands
    exactly where integers become floats.

    Args:
        model_name: the file.
        is_check: also verify a file that holds golden inputs.

    Returns:
        ``model_name``, for the file is as it should be.

    Raises:
        LingerError: there is no such file, or it is none of linger's.
    """
    with during("fix_dequant"):
        runtime.from_proto(runtime.read(model_name), os.fspath(model_name))
        print(
            f"fix_dequant: nothing to fix in {os.fspath(model_name)!r}: Dequant stands only where integers become floats; "
            "leave the call out"
        )
        if is_check:
            verify(model_name)
    return os.fspath(model_name)
