"""Every command of the command line on files and nets, its JSON against the schema, its exit codes, and bad input."""

from __future__ import annotations

import os
import pickle
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
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import linger
from linger.cli import app
from linger.weights import read_weights

NETS = """
import time
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.Linear(width, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


class Wide(Net):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 7, padding=3)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, y):
        return self.fc(x) + self.fc(y)


class Slow(Net):
    def forward(self, x):
        print("running", flush=True)
        time.sleep(60)
        return super().forward(x)


def broken():
    raise ValueError("no width was given")


number = 5
"""
run = CliRunner()


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nets, weights, data and a file; module-wide, so that the net is exported once."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "cli_nets.py").write_text(NETS)
    g = np.random.default_rng(0)
    np.save(folder / "data.npy", g.standard_normal((20, 1, 8, 8), np.float32))
    np.savez(folder / "two.npz", x=g.standard_normal((10, 4), np.float32), y=g.standard_normal((10, 4), np.float32))
    torch.manual_seed(0)
    state = {"conv.weight": torch.randn(4, 1, 3, 3), "conv.bias": torch.randn(4), "fc.weight": torch.randn(4, 4)}
    state |= {"fc.bias": torch.randn(4), "bn.weight": torch.ones(4), "bn.bias": torch.zeros(4)}
    state |= {"bn.running_mean": torch.zeros(4), "bn.running_var": torch.ones(4)}
    state |= {"bn.num_batches_tracked": torch.tensor(0)}
    save_file(state, folder / "float.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, folder / "float.pt")
    torch.save(nn.Linear(2, 2), folder / "pickled.pt")
    (folder / "text.safetensors").write_text("no weights")
    (folder / "pickle.pt").write_bytes(pickle.dumps(os.getcwd))
    (folder / "text.npy").write_text("no array")
    (folder / "text.wav").write_text("no sound")
    np.savez(folder / "none.npz")
    before = os.getcwd()
    os.chdir(folder)
    try:
        say("export cli_nets:Net --weights float.safetensors --data data.npy -o net.onnx")
        say("export cli_nets:Net --weights float.safetensors --data data.npy -o narrow.onnx --weight-bits 4")
        say("calibrate cli_nets:Net --weights float.safetensors --data data.npy -o ready.safetensors")
    finally:
        os.chdir(before)
    data = (folder / "net.onnx").read_bytes()
    (folder / "short.onnx").write_bytes(data[: len(data) // 2])
    return folder


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def say(line: str, code: int = 0) -> str:
    """Standard output of a command that ends with ``code``."""
    result = run.invoke(app, line.split())
    assert result.exit_code == code, result.output
    return result.stdout


# --- every command


COMMANDS = {
    "check net.onnx --target arcs": 0,
    "check cli_nets:Wide -i 1,1,8,8 --target venus": 1,
    "retarget venus arcs net.onnx -i 1,1,8,8": 0,
    "calibrate cli_nets:Net --args {\"width\":4} --weights float.pt --data data.npy -o fixed.safetensors --method max": 0,
    "export cli_nets:Net --weights float.pt --data data.npy -o out.onnx --target arcs --dynamic-batch": 0,
    "export cli_nets:Two --data two.npz -o out.onnx --dialect standard --no-golden": 0,
    "verify net.onnx": 0,
    "run net.onnx": 0,
    "run net.onnx -i data.npy": 2,
    "run net.onnx -i 1,1,8,8 --all --runner basic -o out.npz": 0,
    "analyse cli_nets:Net --weights float.pt --data data.npy": 0,
    "analyse float.safetensors": 0,
    "inspect net.onnx": 0,
    "diff net.onnx narrow.onnx": 1,
    "diff net.onnx net.onnx": 0,
    "report net.onnx -i 1,1,8,8 --html net.html": 0,
    "report cli_nets:Net --weights ready.safetensors --data data.npy --csv net.csv": 0,
    "report net.onnx": 2,
    "why net.onnx runtime onnxruntime:all": 0,
}  # fmt: skip


@pytest.mark.parametrize("line", COMMANDS)
def test_json_follows_the_schema(line: str) -> None:
    text = say(f"{line} --json", COMMANDS[line])
    schema.check("error" if COMMANDS[line] == 2 else line.split()[0], text)


@pytest.mark.parametrize("line", [line for line, code in COMMANDS.items() if code < 2])
def test_text(line: str) -> None:
    assert say(line, COMMANDS[line]).strip()


def test_every_command_is_tested_and_has_help() -> None:
    names = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert names <= {line.split()[0] for line in COMMANDS} | {"demo", "why", "report"}
    parts = {"error", "value", "change", "names", "sizes", "counts", "number"}
    assert names | parts == schema.SCHEMA["$defs"].keys()
    for name in names:
        assert "Usage:" in say(f"{name} --help")


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


# --- bad input


BAD = {
    "run none.onnx": "there is no file 'none.onnx'",
    "inspect none.onnx": "there is no file 'none.onnx'",
    "diff net.onnx none.onnx": "there is no file 'none.onnx'",
    "inspect short.onnx": "'short.onnx' is truncated or not an ONNX file",
    "verify short.onnx": "'short.onnx' is truncated or not an ONNX file",
    "inspect float.safetensors": "'float.safetensors' is truncated or not an ONNX file",
    "verify float.pt": "'float.pt' is truncated or not an ONNX file",
    "run data.npy": "'data.npy' is truncated or not an ONNX file",
    "run net.onnx -i none.npy": "there is no file 'none.npy'",
    "run net.onnx -i text.npy": "'text.npy' is truncated or no .npy file",
    "run net.onnx -i text.wav": "'text.wav' is truncated or no .wav file",
    "run net.onnx -i cli_nets.py": "found the input 'cli_nets.py', allowed are a .npy, .npz, .wav, .png file and a shape",
    "run net.onnx -i 1,1,8,8 -i 1,1,8,8": "found 2 inputs, the file takes x",
    "run net.onnx -i z=1,1,8,8 --runner chip": "the runner is 'chip', allowed are runtime, disable",
    "run net.onnx -i 1,2,8,8": "input x has shape (1, 2, 8, 8), allowed is (1, 1, 8, 8)",
    "run net.onnx -i 1,2,8,8 --runner all": "ONNX Runtime (all) does not run the file",
    "run net.onnx -o nowhere/out.npz": "cannot write 'nowhere/out.npz'",
    "export nowhere:Net -o out.onnx -i 1,1,8,8": "found 'nowhere:Net', which cannot be imported",
    "export cli_nets:None_ -o out.onnx -i 1,1,8,8": "found 'cli_nets:None_', which cannot be imported",
    "export cli_nets:number -o out.onnx -i 1,1,8,8": "cli_nets:number is no net",
    "export cli_nets:broken -o out.onnx -i 1,1,8,8": "cli_nets:broken raises ValueError: no width was given",
    "export cli_nets:Net --args {width -o out.onnx": "--args is '{width', allowed is JSON such as",
    "export cli_nets:Net --args [1,2] -o out.onnx": "cli_nets:Net raises TypeError",
    "export cli_nets:Net -o out.onnx": "found no input, allowed are those of forward",
    "export cli_nets:Net -i 1,1,8,8 -o out.onnx": "running_x is 0, so no batch has been seen",
    "export cli_nets:Net --weights pickled.pt -i 1,1,8,8 -o out.onnx": "'pickled.pt' holds pickled code, which is refused",
    "export cli_nets:Net --weights none.pt -i 1,1,8,8 -o out.onnx": "there is no file 'none.pt'",
    "export cli_nets:Net --weights text.safetensors -i 1,1,8,8 -o out.onnx": "'text.safetensors' is truncated or no file of",
    "export cli_nets:Net --weights cli_nets.py -i 1,1,8,8 -o out.onnx": "'cli_nets.py' is truncated or no file of weights",
    "export cli_nets:Net --args 8 --weights float.pt -i 1,1,8,8 -o out.onnx": "size mismatch for conv.weight",
    "export cli_nets:Two --data data.npy -o out.onnx": "the forward of Two does not run on inputs of shape",
    "export cli_nets:Net --data two.npz -o out.onnx": "found the array 'y', the forward of Net takes x; name arrays so",
    "export cli_nets:Net --data none.npz -o out.onnx": "'none.npz' holds arrays of [] samples, allowed is one number",
    "calibrate cli_nets:Net --data data.npy -o out.pt --method best": "method is 'best', allowed are max, percentile",
    "calibrate cli_nets:Net --data data.npy -o nowhere/out.pt": "cannot write 'nowhere/out.pt'",
    "analyse none.pt": "there is no file 'none.pt'",
    "analyse pickled.pt": "'pickled.pt' holds pickled code, which is refused",
    "analyse pickle.pt": "'pickle.pt' ",
    "verify out.pt": "there is no file 'out.pt'",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(line: str) -> None:
    before = set(os.listdir())
    result = run.invoke(app, line.split())
    assert result.exit_code == 2
    assert BAD[line] in result.stderr
    assert result.stdout == ""
    assert set(os.listdir()) == before, "nothing is left behind"


def test_files_of_other_tools() -> None:
    for name, line in (("text.onnx", "<html>"), ("empty.onnx", "")):
        Path(name).write_text(line)
        for command in ("inspect", "verify", "run", "check"):
            assert "error: " in run.invoke(app, [command, name]).stderr


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
