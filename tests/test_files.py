"""Arrays from files, and files that are written whole or not at all."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import linger


def test_sounds_and_images(tmp_path: Path) -> None:
    samples = np.array([[-(2**15), 0], [2**14, 1], [2**15 - 1, -1]], "<i2")
    with wave.open(str(tmp_path / "a.wav"), "wb") as w:
        w.setnchannels(2)
        w.setsampwidth(2)
        w.setframerate(8000)
        w.writeframes(samples.tobytes())
    found = linger.files.read_arrays(tmp_path / "a.wav")[""]
    assert found.dtype == np.float32
    assert found.tolist() == (samples / 2**15).T[None].tolist()
    for width, value in ((1, 2**7), (3, -(2**23)), (4, -(2**31))):
        with wave.open(str(tmp_path / "b.wav"), "wb") as w:
            w.setnchannels(1)
            w.setsampwidth(width)
            w.setframerate(8000)
            w.writeframes((value.to_bytes(width, "little", signed=value < 0)) * 2)
        assert linger.files.read_arrays(tmp_path / "b.wav")[""].tolist() == [[[0.0 if width == 1 else -1.0] * 2]]
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([pixels, 255 - pixels, pixels], -1)).save(tmp_path / "rgb.png")
    assert (
        linger.files.read_arrays(tmp_path / "grey.png")[""].tolist()
        == (pixels / 255).astype(np.float32)[None, None].tolist()
    )
    planes = np.stack([pixels, 255 - pixels, pixels])
    assert (
        linger.files.read_arrays(tmp_path / "rgb.png")[""].tolist() == (planes / 255).astype(np.float32)[None].tolist()
    )


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def stopped() -> None:
        with linger.files.whole(tmp_path / "out") as out:
            out.write(b"half")
            raise KeyboardInterrupt

    (tmp_path / "out").write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("out", b"before")]
