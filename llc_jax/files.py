"""Small files that are written whole or not at all."""

import errno
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any


def write_atomic(path: str | os.PathLike, content: bytes | str) -> None:
    """Writes a file under a temporary name, syncs it and renames it into place.

    Args:
      path: the file; its folder is created.
      content: bytes, or text to be encoded as UTF-8.

    Raises:
      OSError: naming the path, and the free space if the disk is full; an older file of the same
        name is untouched.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            existing = next(p for p in path.absolute().parents if p.exists())
            free = shutil.disk_usage(existing).free
            raise OSError(
                errno.ENOSPC,
                f"no space left to write {path} ({free:,} bytes free): free some space and run the"
                " same command again; finished results are kept",
            ) from error
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON that is the same bytes for the same value."""
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Reads JSON; a `ValueError` names a file that is none."""
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): delete it or restore it from a copy."
        ) from error


def digest(parts: Iterable[bytes | str | os.PathLike]) -> str:
    """SHA-256 over bytes and the contents of files, in order; a missing file counts as such."""
    total = hashlib.sha256()
    for part in parts:
        if not isinstance(part, bytes):
            path = pathlib.Path(part)
            part = path.read_bytes() if path.exists() else b"absent"
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()
