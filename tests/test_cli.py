"""Every command of the command line on files and nets, its JSON against the schema, and its exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import schema
import torch
from commands import say
from PIL import Image

import linger
from linger.cli import app
from linger.weights import read_weights

pytestmark = pytest.mark.usefixtures("in_command_folder")


# --- every command


COMMANDS: dict[str, tuple[int, str]] = {  # exit code, and a part of the text
    "check net.onnx --target arcs": (0, "arcs: fits"),
    "check cli_nets:Wide -i 1,1,8,8 --target venus": (1, "conv"),
    "check cli_nets:Net -i 1,1,8,8 --args {\"width\":8} --target venus": (0, "1x8x8x8"),
    "check cli_nets:Net -i 1,1,8,8 --weights float.pt": (0, "venus: fits"),
    "retarget venus arcs net.onnx -i 1,1,8,8": (0, "venus -> arcs: 0 of 4 output elements change"),
    "retarget venus arcs cli_nets:Net --weights ready.safetensors -i 1,1,8,8": (0, "venus -> arcs: 0 of 4 output"),
    "calibrate cli_nets:Net --args {\"width\":4} --weights float.pt --data data.npy -o fixed.safetensors --method max":
        (0, "ranges from 1 batches with max: fixed.safetensors"),
    "export cli_nets:Net --weights float.pt --data data.npy -o out.onnx --target arcs --dynamic-batch": (0, "out.onnx: 7 nodes, 84 bytes of parameters"),
    "export cli_nets:Two --data two.npz -o out.onnx --dialect standard --no-golden": (0, "out.onnx: "),
    "verify net.onnx": (0, "equal: 4 elements in the golden outputs, linger.runtime, ONNX Runtime"),
    "run net.onnx": (0, "output_0 float32 1x4: "),
    "run net.onnx -i data.npy": (2, ""),
    "run net.onnx -i 1,1,8,8 --all --runner basic -o out.npz": (0, "conv int8 1x4x8x8: "),
    "analyse cli_nets:Net --weights float.pt --data data.npy": (0, "all layers"),
    "analyse float.safetensors": (0, "| conv.weight "),
    "inspect net.onnx": (0, "holds golden inputs (x 1x1x8x8); linger verify compares them"),
    "diff net.onnx narrow.onnx": (1, "node conv: scale_o = 8.0, scale_w = 32.0 -> scale_o = 16.0, scale_w = 4.0"),
    "diff net.onnx net.onnx": (0, "equal: net.onnx and net.onnx"),
    "report net.onnx -i 1,1,8,8 --html net.html": (0, "exact: 4 outputs compared"),
    "report cli_nets:Net --weights ready.safetensors --data data.npy --csv net.csv": (0, "outputs: SQNR"),
    "report net.onnx": (2, ""),
    "why net.onnx runtime onnxruntime:all": (0, "equal: all 7 tensors that both runs have"),
}  # fmt: skip


@pytest.mark.parametrize("line", COMMANDS)
def test_json_follows_the_schema(line: str) -> None:
    code, _ = COMMANDS[line]
    schema.check("error" if code == 2 else line.split()[0], say(f"{line} --json", code))


@pytest.mark.parametrize("line", [line for line, (code, _) in COMMANDS.items() if code < 2])
def test_text(line: str) -> None:
    code, text = COMMANDS[line]
    assert text in say(line, code)


def test_every_command_is_tested_and_has_help() -> None:
    names = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert names == {line.split()[0] for line in COMMANDS} | {"demo"}  # its test is slow
    parts = {"error", "value", "change", "names", "sizes", "counts", "number"}
    assert names | parts == schema.SCHEMA["$defs"].keys()
    for name in names:
        assert "Usage:" in say(f"{name} --help")


WIDTHS = {
    "--target arcs": "",
    "--weight-bits 4": "--weight-bits 4",
    "--target venusa --weight-bits 4": "--weight-bits 4",
}


@pytest.mark.parametrize("options", WIDTHS)
def test_a_net_is_compared_as_the_file_has_it(options: str) -> None:
    """The chip is that of the file; the width of the weights has to be said."""
    say(f"calibrate cli_nets:Gated --weights float.pt --data data.npy -o other.pt {options}")
    say(f"export cli_nets:Gated --weights other.pt -i 64,1,8,8 -o other.onnx {options}")
    net = f"cli_nets:Gated --weights other.pt -i 64,1,8,8 {WIDTHS[options]}"
    assert say(f"verify other.onnx --net {net}").startswith("equal: 256 elements in PyTorch eval, linger.runtime")
    assert say(f"why other.onnx {net}").startswith("equal: all ")


def test_from_weights_to_a_file_that_verifies() -> None:
    """Calibrate, export from the checkpoint, compare with the net by name: the same file as in one step."""
    say("calibrate cli_nets:Net --weights float.safetensors --data data.npy -o fixed.safetensors")
    say("calibrate cli_nets:Net --weights float.pt --data data.npy -o fixed.pt")
    assert all(torch.equal(v, read_weights("fixed.pt")[k]) for k, v in read_weights("fixed.safetensors").items())
    np.save("first.npy", np.load("data.npy")[:1])
    say("export cli_nets:Net --weights fixed.safetensors -i first.npy -o two_steps.onnx")
    assert Path("two_steps.onnx").read_bytes() == Path("net.onnx").read_bytes()
    said = say("verify net.onnx --net cli_nets:Net --weights fixed.pt -i first.npy")
    assert said == "equal: 4 elements in PyTorch eval, linger.runtime, ONNX Runtime (disable, basic, extended, all)\n"
    assert "no batch has been seen" in say(
        "verify net.onnx --net cli_nets:Net --weights float.pt -i first.npy --json", 2
    )


def test_run_writes_what_the_runtime_says() -> None:
    say("run net.onnx -i 1,1,8,8 -o a.npz --all")
    say("run net.onnx -i 1x1x8x8 -o b.npz --all --runner disable")
    model = linger.runtime.load("net.onnx")
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model(x.numpy())
    with np.load("a.npz") as a, np.load("b.npz") as b:
        assert set(a.files) == set(b.files) == {"x", *(n for node in model.proto.graph.node for n in node.output)}
        for name in a.files:
            assert a[name].tolist() == b[name].tolist() == model.tensors[name].tolist()
    first = Path("a.npz").read_bytes()
    say("run net.onnx -i 1,1,8,8 -o a.npz --all")
    assert Path("a.npz").read_bytes() == first


def test_run_takes_an_image() -> None:
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save("grey.png")
    schema.check("run", say("run net.onnx -i grey.png --json"))


def test_a_flipped_bit_on_the_command_line() -> None:
    proto = onnx.load("net.onnx")
    (weight,) = (i for i in proto.graph.initializer if i.name == "fc.weight")
    weight.raw_data = bytes([weight.raw_data[0] ^ 1]) + weight.raw_data[1:]
    onnx.save(proto, "flipped.onnx")
    assert "damaged since export: initializer fc.weight" in say("verify flipped.onnx", 1)
    assert "damaged since export: initializer fc.weight" in say("inspect flipped.onnx")
    said = schema.check("diff", say("diff net.onnx flipped.onnx --json", 1))
    assert [(e["part"], e["name"]) for e in said["entries"]] == [("tensor", "fc.weight")]
    assert "at [0, 0] of 1 of 16 elements" in said["entries"][0]["first"]


def test_every_part_of_a_difference() -> None:
    proto = onnx.load("net.onnx")
    node = next(n for n in proto.graph.node if n.op_type == "LinearInt")
    before = next(a for a in node.attribute if a.name == "scale_o").f
    next(a for a in node.attribute if a.name == "scale_o").f *= 2
    next(p for p in proto.metadata_props if p.key == "target").value = "arcs"
    next(i for i in proto.opset_import if not i.domain).version = 18
    del next(f for f in proto.functions if f.name == "LinearInt").node[-1]
    proto.graph.initializer.add().CopyFrom(onnx.numpy_helper.from_array(np.zeros(3, np.int8), "more"))
    proto.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(np.zeros(3, np.int8), proto.graph.initializer[0].name)
    )
    onnx.save(proto, "other.onnx")
    said = schema.check("diff", say("diff net.onnx other.onnx --json", 1))
    found = {(e["part"], e["name"]): (e["first"], e["second"]) for e in said["entries"]}
    assert found["node", "fc"] == (f"scale_o = {before}", f"scale_o = {2 * before}")
    assert found["metadata", "target"] == ("venus", "arcs")
    assert found["signature", "opset of ai.onnx"] == ("17", "18")
    assert found["tensor", "more"] == ("missing", "there")
    assert found["tensor", "conv.weight"] == ("int8 (4, 1, 3, 3)", "int8 (3,)")
    assert ("function", "LinearInt") in found
    assert len(found) == 6


def test_inspect_says_grids_and_sums() -> None:
    said = schema.check("inspect", say("inspect net.onnx --json"))
    by_name = {o["name"]: o for o in said["operations"]}
    conv = by_name["conv"]
    assert (conv["op"], conv["output"]["dtype"], conv["output"]["bits"], conv["parameters"]) == (
        "Conv2dInt",
        "int8",
        8,
        40,
    )
    assert conv["output"]["scale"] == conv["attributes"]["scale_o"]
    assert by_name["relu_0"]["output"]["scale"] == conv["output"]["scale"]
    assert 8 < conv["sum_bits"] <= 32
    assert said["golden"] == {"x": [1, 1, 8, 8]}
    assert sum(said["ops"].values()) == len(said["operations"])


# --- a real process


def test_a_process_of_its_own() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "linger", "verify", "net.onnx", "--json"],
        capture_output=True, text=True, env=_environment(), check=False,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert schema.check("verify", result.stdout)["equal"] is True


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(linger.__file__).parents[1])}


def test_ctrl_c_leaves_nothing() -> None:
    before = set(os.listdir())
    line = [sys.executable, "-m", "linger", "export", "cli_nets:Slow", "--data", "data.npy", "-o", "out.onnx"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment())
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "stopped; no file was left half written" in err
    assert set(os.listdir()) - {"__pycache__"} == before - {"__pycache__"}


# --- the demo's files

DEMO = {
    "verify model.onnx": 0,
    "verify model.onnx --net linger.demo:ResidualNet --weights model.safetensors -i 2,1,28,28": 0,
    "inspect model.onnx": 0,
    "diff model.onnx model-4bit.onnx": 1,
    "run model.onnx --all -o a.npz": 0,
    "run model.onnx --all --runner all -o b.npz": 0,
    "why model.onnx a.npz b.npz": 0,
    "why model.onnx linger.demo:ResidualNet --weights model.safetensors -i 2,1,28,28": 0,
    "verify model-4bit.onnx --net linger.demo:ResidualNet --weights model-4bit.safetensors -i 2,1,28,28 --weight-bits 4": 0,
    "report model.onnx -i 2,1,28,28 --html net.html": 0,
    "check model.onnx -i 1,1,28,28": 0,
    "retarget venus arcs model.onnx -i 1,1,28,28": 0,
    "export linger.demo:ResidualNet --weights model.safetensors -i 1,1,28,28 -o again.onnx": 0,
    "calibrate linger.demo:ResidualNet --weights model.safetensors --data images.npy -o c.safetensors": 0,
    "analyse linger.demo:ResidualNet --weights model.safetensors --data images.npy": 0,
    "analyse model.safetensors": 0,
}


@pytest.mark.slow
def test_every_command_on_the_files_of_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = schema.check("demo", say("demo --epochs 1 --out . --json"))
    assert [set(f["differing"].values()) for f in said["files"]] == [{0}, {0}]
    np.save("images.npy", np.random.default_rng(0).random((8, 1, 28, 28), np.float32))
    for line, code in DEMO.items():
        schema.check(line.split()[0], say(f"{line} --json", code))
