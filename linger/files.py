"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from linger.errors import LingerError


@contextmanager
def whole(f: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write bytes to, which appears under its name only when everything is written.

    Raises:
        LingerError: the directory does not exist.
    """
    path = Path(f)
    if not path.parent.is_dir() or path.is_dir():
        raise LingerError(f"cannot write {os.fspath(f)!r}, allowed is a file in a directory that exists; make it first")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            yield out
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
