"""A run's folder: one writer at a time, one configuration for life, results that add up."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from llc_jax.files import read_json, write_atomic, write_json

PACKAGES = ("llc_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpyro", "numpy")


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


@contextlib.contextmanager
def lock(folder: pathlib.Path, name: str) -> Iterator[None]:
    """Holds `<folder>/.<name>.lock`; a second holder is refused, a dead one leaves no trace.

    Raises:
      OSError: if the folder cannot be written, or is a file.
      RuntimeError: if another process holds the lock.
    """
    path = folder / f".{name}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write in {folder} ({error.strerror}): give a --workdir that can be written",
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another process is at work on {folder} ({name}): wait for it, or use another"
                " --workdir."
            ) from None
        yield
    finally:
        os.close(descriptor)


def settle(path: pathlib.Path, identity: dict[str, Any], facts: dict[str, Any]) -> None:
    """Writes the configuration of a run, or checks that it is the one the run began with.

    Args:
      path: the JSON file.
      identity: what determines the result; must not change.
      facts: preset, command, hashes: kept as the run began.

    Raises:
      ValueError: naming every setting that differs.
    """
    if not path.exists():
        write_json(path, {"config": identity, "versions": versions(), **facts})
        return
    before = read_json(path)["config"]
    changed = {
        name: (before.get(name), identity.get(name))
        for name in sorted(before.keys() | identity.keys())
        if before.get(name) != identity.get(name)
    }
    if changed:
        listing = ", ".join(
            f"{name}: {old!r} before, {new!r} now" for name, (old, new) in changed.items()
        )
        raise ValueError(
            f"{path} was begun with other settings ({listing}): repeat the command it was begun"
            " with, or start afresh in another --workdir."
        )


def append_jsonl(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Appends one line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, sort_keys=True) + "\n")


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads lines of JSON; a torn last line, left by a kill, is dropped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def rewind_torn_line(path: pathlib.Path) -> None:
    """Drops a torn last line, left by a kill."""
    if path.exists():
        whole = path.read_text(encoding="utf-8").rpartition("\n")
        if whole[2]:
            write_atomic(path, whole[0] + whole[1])


def rewind_jsonl(path: pathlib.Path, last_step: int) -> None:
    """Drops the lines of steps after `last_step`, and a torn one."""
    kept = [r for r in read_jsonl(path) if r["step"] <= last_step]
    write_atomic(path, "".join(json.dumps(r, sort_keys=True) + "\n" for r in kept))
