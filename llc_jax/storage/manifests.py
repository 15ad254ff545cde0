"""SHA-256 manifests of folders: what was written, against what is there now."""

import errno
import hashlib
import importlib.metadata
import json
import os
import pathlib
from typing import Any

NAME = "manifest.json"


def write_manifest(folder: pathlib.Path, step: int) -> None:
    """Hashes all files of a finished step and puts everything on the disk."""
    files = {}
    for name, path in _files(folder).items():
        files[name] = {"sha256": _sha256(path), "size": path.stat().st_size}
        sync(path)
    content = {"files": files, "step": step, "versions": _versions()}
    path = folder / NAME
    path.write_text(_manifest_text(content), encoding="utf-8")
    sync(path)
    for directory, _, _ in os.walk(folder):
        sync(directory)


def find_problems(folder: pathlib.Path, items: tuple[str, ...]) -> list[str]:
    """Compares the files of some items with the manifest."""
    try:
        text = (folder / NAME).read_bytes()
        content = json.loads(text)
        content.pop("sha256")
        if _manifest_text(content).encode() != text:
            return [f"{NAME} does not match its own hash"]
        listed = {name: (file["size"], file["sha256"]) for name, file in content["files"].items()}
        if content["step"] != int(folder.name):
            return [f"{NAME} belongs to step {content['step']}"]
    except (FileNotFoundError, NotADirectoryError):
        return [f"{NAME} is missing: a copy under way, or written by another program?"]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return [f"{NAME} is not a manifest"]
    wanted = {name for name in listed if name.split("/")[0] in items}
    found = {name: path for name, path in _files(folder).items() if name.split("/")[0] in items}
    problems = [f"{name} is missing" for name in sorted(wanted - set(found))]
    # Dot files come from file managers and network file systems; Orbax reads none.
    extra = [name for name in set(found) - wanted if not name.split("/")[-1].startswith(".")]
    problems += [f"{name} is not in the manifest" for name in sorted(extra)]
    for name in sorted(wanted & set(found)):
        problems += _file_problems(name, found[name], *listed[name])
    return problems


def is_ours(folder: pathlib.Path, items: tuple[str, ...]) -> bool:
    """Whether a folder can only be a step of ours, whole or what is left of one."""
    if not folder.is_dir():
        return False
    names = {entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")}
    return names <= {*items, NAME}  # others write files of this name too


def _file_problems(name: str, path: pathlib.Path, size: int, sha256: str) -> list[str]:
    try:
        if not path.is_file() or path.is_symlink():
            return [f"{name} is not a regular file"]
        if (found := path.stat().st_size) != size:
            return [f"{name} has {found} bytes instead of {size}"]
        if _sha256(path) != sha256:
            return [f"{name} has the right size but another SHA-256: its content changed"]
    except OSError as error:
        if error.errno not in (errno.EIO, errno.ENOENT):
            raise  # no permission, say: a matter of access, not of damage
        return [f"{name} cannot be read: {error.strerror}"]
    return []


def _manifest_text(content: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """All files below a folder by relative name with forward slashes; links are not followed."""
    return {
        path.relative_to(folder).as_posix(): path
        for directory, _, names in os.walk(folder)
        for path in (pathlib.Path(directory, name) for name in names)
    }


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: str | os.PathLike) -> None:
    """Waits until a file's content or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint")}
