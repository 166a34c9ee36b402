"""Arrays from files (.npy, .npz, .wav, .png) and files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
import wave
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from linger.errors import LingerError


@contextmanager
def whole(f: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write bytes to, which appears under its name only when everything is written.

    Raises:
        LingerError: the directory does not exist, or takes no new file.
    """
    path = Path(f)
    if not path.parent.is_dir() or path.is_dir():
        raise LingerError(f"cannot write {os.fspath(f)!r}, allowed is a file in a directory that exists; make it first")
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise LingerError(f"cannot write {os.fspath(f)!r} ({error.strerror}); name another directory") from None
    try:
        with os.fdopen(handle, "wb") as out:
            yield out
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_arrays(f: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """An .npz file; the same arrays make the same bytes, and any name is allowed."""
    with whole(f) as out, zipfile.ZipFile(out, "w") as z:
        for name, array in arrays.items():
            with z.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)


def read_arrays(f: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a file by name; "" is the name of the only one of a .npy, .wav or .png file.

    A .wav file is float32 (1, channels, samples) from -1 up to 1, a .png file float32 (1, channels, height, width) from 0 to 1.

    Raises:
        LingerError: there is no such file, it is damaged, or of another kind.
    """
    path = Path(f)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise LingerError(f"found the file {os.fspath(f)!r}, allowed are {', '.join(READERS)}; convert it")
    try:
        return reader(path)
    except LingerError:
        raise
    except FileNotFoundError:
        raise LingerError(f"there is no file {os.fspath(f)!r}; name one that exists") from None
    except Exception as error:  # of a damaged file, these readers raise whatever they stumble over
        said = str(error) or type(error).__name__
        raise LingerError(f"{os.fspath(f)!r} is truncated or no {path.suffix} file ({said}); write it again") from None


def _npy(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as f:
        return {"": np.lib.format.read_array(f, allow_pickle=False)}


def _npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as z:
        return {name: z[name] for name in z.files}


def _wav(path: Path) -> dict[str, np.ndarray]:
    """PCM of 8 (unsigned), 16, 24 or 32 bits."""
    with wave.open(os.fspath(path), "rb") as w:
        width, channels, data = w.getsampwidth(), w.getnchannels(), w.readframes(w.getnframes())
        if len(data) < w.getnframes() * width * channels:
            raise EOFError("it ends early")
    raw = np.frombuffer(data, np.uint8).reshape(-1, width)
    if width == 1:
        samples = raw[:, 0].astype(np.int64) - 128
    else:
        padded = np.zeros((len(raw), 4), np.uint8)
        padded[:, 4 - width :] = raw
        samples = padded.view("<i4")[:, 0].astype(np.int64) >> 8 * (4 - width)
    return {"": (samples / 2.0 ** (8 * width - 1)).astype(np.float32).reshape(-1, channels).T[None]}


def _png(path: Path) -> dict[str, np.ndarray]:
    try:
        from PIL import Image
    except ImportError:
        raise LingerError("a .png file needs Pillow, which is not installed; pip install 'linger-qat[png]'") from None
    with Image.open(path) as image:
        grey = image.mode in ("1", "L", "I", "I;16", "F")
        pixels = np.asarray(image if grey else image.convert("RGB"))
    top = {"b": 1, "u": 2 ** (8 * pixels.dtype.itemsize) - 1, "i": 65535}.get(pixels.dtype.kind, 1)
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return {"": (planes / np.float64(top)).astype(np.float32)[None]}


READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".npy": _npy, ".npz": _npz, ".wav": _wav, ".png": _png,
}  # fmt: skip


def fitted(array: np.ndarray, rank: int | None, dtype: Any) -> np.ndarray:
    """A float array in the rank and float type that a file declares: axes of size 1 in front come and go."""
    while rank is not None and array.ndim > rank and array.shape[0] == 1:
        array = array[0]
    while rank is not None and array.ndim < rank:
        array = array[None]
    both_float = array.dtype.kind == "f" and dtype is not None and np.dtype(dtype).kind == "f"
    return array.astype(dtype) if both_float else array
