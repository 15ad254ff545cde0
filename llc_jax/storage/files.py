"""Small files that are written whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

LAST_STEP = 2**53 - 1  # the largest training step: netCDF 3 has float64, and no integer as wide


def local_path(path: str | os.PathLike, name: str = "path") -> pathlib.Path:
    """Returns a path of this machine.

    Args:
      path: of a file or folder, there or not.
      name: of the argument, for the message.

    Raises:
      ValueError: if it is none: the address of a bucket, empty, with a NUL, or with a `~` that
        nobody has expanded. Python would make folders of these names.
    """
    try:
        text = os.fspath(path)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise ValueError(f"{name}={path!r:.120}: give a path, a string or a pathlib.Path.")
    rule = ""
    if not text.strip():
        rule = "it is empty; give a folder, '.' for this one"
    elif "\0" in text:
        rule = "it has a NUL in it, which no file system takes"
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):  # pathlib makes one slash of two
        rule = (
            "it is an address, no local path; write to a local folder and copy it there, or"
            " mount the bucket (gcsfuse, s3fs)"
        )
    elif re.match(r"~(/|$)", text):
        rule = "only a shell expands ~; give os.path.expanduser(path)"
    if rule:
        raise ValueError(f"{name}={text[:120]!r} cannot be used: {rule}.")
    return pathlib.Path(text)


def write_atomic(path: str | os.PathLike, content: bytes | str) -> None:
    """Writes a file under a temporary name, syncs it and renames it into place.

    Args:
      path: the file; its folder is created.
      content: bytes, or text to be encoded as UTF-8.

    Raises:
      ValueError: if the path is none, see `local_path`.
      OSError: naming the path, and the free space if the disk is full; an older file of the same
        name is untouched.
    """
    path = local_path(path)
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
        return json.loads(local_path(path).read_text(encoding="utf-8"))
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


@contextlib.contextmanager
def explained(action: str, folder: pathlib.Path) -> Iterator[None]:
    """Turns what the file system or Orbax raises into one OSError with path and remedy."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if not isinstance(error, OSError) and not re.search(r"\b[A-Z_]{5,}: ", text):
            raise  # not a status code of the storage layer: the arguments are wrong
        number = getattr(error, "errno", None) or errno.EIO
        if number == errno.ENOSPC or "RESOURCE_EXHAUSTED" in text:
            existing = next(path for path in (folder, *folder.parents) if path.exists())
            raise OSError(
                errno.ENOSPC,
                f"no space left to {action} "
                f"({shutil.disk_usage(existing).free:,} bytes are free); older steps are intact, "
                "free some space and run again",
            ) from error
        reason = getattr(error, "strerror", None) or "".join(text.strip().splitlines()[:1])
        raise OSError(number, f"cannot {action}: {reason}") from error
