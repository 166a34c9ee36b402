"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from linger.errors import LingerError


def write_whole(f: str | os.PathLike[str], contents: bytes) -> Path:
    """Write a file beside its place and move it there, so that nobody ever reads half of it.

    Raises:
        LingerError: the directory does not exist, or the path is one.
    """
    path = Path(f)
    if not path.parent.is_dir() or path.is_dir():
        raise LingerError(f"cannot write {os.fspath(f)!r}, allowed is a file in a directory that exists; make it first")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(contents)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
