"""A run's folder: one writer at a time, one configuration for life, results that add up."""

import contextlib
import csv
import fcntl
import importlib.metadata
import io
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llc_jax.storage.files import local_path, read_json, write_atomic, write_json

PACKAGES = ("llc_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpyro", "numpy")


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


@contextlib.contextmanager
def lock(folder: pathlib.Path, name: str) -> Iterator[None]:
    """Holds `<folder>/.<name>.lock`; a second holder is refused, a dead one leaves no trace.

    Raises:
      ValueError: if the folder is no path of this machine.
      OSError: if the folder cannot be written, or is a file.
      RuntimeError: if another process holds the lock.
    """
    folder = local_path(folder, "workdir")
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


def check(
    path: pathlib.Path, identity: dict[str, Any], remedy: str = "", without: Iterable[str] = ()
) -> None:
    """Checks that a run, if it has begun, began with this configuration.

    Args:
      path: the JSON file that `settle` writes.
      identity: what determines the result; must not change.
      remedy: how to start afresh; to remove the folder, if none is given.
      without: settings that are no part of the identity, which older records may have.

    Raises:
      ValueError: naming every setting that differs.
    """
    if not path.exists():
        return
    before = read_json(path)["config"]
    changed = {
        name: (before.get(name), identity.get(name))
        for name in sorted((before.keys() | identity.keys()).difference(without))
        if before.get(name) != identity.get(name)
    }
    if changed:
        listing = ", ".join(
            f"{name}: {old!r} before, {new!r} now" for name, (old, new) in changed.items()
        )
        raise ValueError(
            f"{path} was begun with other settings ({listing}): repeat the command it was begun"
            f" with, or {remedy or f'remove {path.parent} to start afresh'}."
        )


def settle(
    path: pathlib.Path, identity: dict[str, Any], remedy: str = "", without: Iterable[str] = (), *,
    facts: dict[str, Any],
) -> None:  # fmt: skip
    """Writes the configuration of a run once it is known to be sound, or checks it.

    Args:
      path: the JSON file.
      identity: see `check`.
      remedy: see `check`.
      without: see `check`.
      facts: preset, command, hashes: kept as the run began.

    Raises:
      ValueError: naming every setting that differs.
    """
    check(path, identity, remedy, without)
    if not path.exists():
        write_json(path, {"config": identity, "versions": versions(), **facts})


def good_steps(checkpoints: Mapping[int, Any], done: Iterable[int] = (), name: str = "") -> list:
    """The checkpoints that have a result or whose weights are undamaged, in order.

    Args:
      checkpoints: {step: params}.
      done: steps that have a result.
      name: where they are, for the message.

    Raises:
      ValueError: if there is none.
    """
    whole = getattr(checkpoints, "undamaged", None)
    steps = sorted(checkpoints) if whole is None else whole(done)
    if not steps:
        raise ValueError(
            f"no good checkpoint in {name}: repeat the command that trained it, which also redoes"
            " damaged ones."
        )
    return steps


def numbers(text: str) -> tuple[float, ...]:
    """Parses a flag such as `0.2,0.4`."""
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r}: give numbers separated by commas.") from None


def settings_of(name: str, text: str) -> dict[str, float]:
    """Parses a flag such as `friction=10,decay=0.9`."""
    try:
        pairs = [word.split("=") for word in text.split(",") if word]
        return {key.strip(): float(value) for key, value in pairs}
    except ValueError:
        raise ValueError(f"{name}={text!r}: give name=number, separated by commas.") from None


def chosen(steps: list[int], text: str) -> list[int]:
    """Those of the steps that a flag such as `0,100` names; all if it names none.

    Raises:
      ValueError: if it names others.
    """
    if not text:
        return steps
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"checkpoints={text!r}: give training steps such as 0,100,2000.")
    wanted = sorted(set(map(int, text.split(","))))
    if missing := sorted(set(wanted) - set(steps)):
        raise ValueError(f"checkpoints={missing}: there are none; there are {steps}.")
    return wanted


def plain(value: Any) -> Any:
    """A value as JSON has it: arrays are lists, and what is not finite is null."""
    if isinstance(value, dict):
        return {name: plain(x) for name, x in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of equal keys as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def append_jsonl(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Appends one line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(plain(record), sort_keys=True) + "\n")


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
