"""Mistakes on the command line are one line on stderr and exit code 2, and leave nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from commands import run

from linger.cli import app

pytestmark = pytest.mark.usefixtures("in_command_folder")


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
    "analyse pickle.pt": "'pickle.pt' is truncated or no file of weights; save it again",
    "export net.onnx -o again.onnx": "found 'net.onnx', allowed is package.module:name of a net; write it so",
    "check net.txt": "found 'net.txt', allowed is a .onnx file or package.module:name of a net; write it so",
    "run net.onnx -i 99999999,9999999,8,8": "the shape 99999999,9999999,8,8 does not fit in memory",
    "run net.onnx -i 999999999999999999999,8": "the shape 999999999999999999999,8 does not fit in memory",
    "run net.onnx -o /dev/fd/out.npz": "cannot write '/dev/fd/out.npz' (",
    "run damaged.npz": "'damaged.npz' is truncated or not an ONNX file",
    "run net.onnx -i damaged.npz": "'damaged.npz' is truncated or no .npz file (",
    "analyse old.pt": "'old.pt' is truncated or no file of weights (",
    "verify net.onnx -i 1,1,8,8": "verify: found --input, --weights or --args without --net",
    "verify net.onnx --net cli_nets:Net": "found no input, allowed are those of forward; pass --input",
    "retarget venus moon net.onnx": "target is 'moon', allowed are venus, arcs",
    "demo --out net.onnx": "demo: cannot make the directory 'net.onnx' (File exists); name another",
    "verify out.pt": "there is no file 'out.pt'",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(line: str) -> None:
    before = set(os.listdir())
    result = run.invoke(app, line.split())
    assert result.exit_code == 2
    assert BAD[line] in result.stderr
    assert [t[:7] for t in result.stderr.splitlines()][-1:] == ["error: "], "one line, behind progress bars"
    assert result.stdout == ""
    assert set(os.listdir()) == before, "nothing is left behind"


def test_files_of_other_tools() -> None:
    for name, line in (("text.onnx", "<html>"), ("empty.onnx", "")):
        Path(name).write_text(line)
        for command in ("inspect", "verify", "run", "check"):
            result = run.invoke(app, [command, name])
            assert result.exit_code == 2
            assert result.stderr.startswith("error: ")
            assert "truncated" in result.stderr
            assert result.stderr.count("\n") == 1
