"""Folders of steps that another program wrote with Orbax: found, never changed."""

import os
import pathlib
import re

from llc_jax.storage.pytrees import CheckpointError

_MARK = "_METADATA"  # of Orbax, in the folder of a tree


def steps(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """Finds the steps in a folder that has no manifest of ours.

    Names as Orbax makes them: `100`, `00000100`, `ckpt_100`. Empty ones and those half copied
    count as long as another of the same form is an Orbax checkpoint.

    Raises:
      CheckpointError: if two folders are the same step.
    """
    groups: dict[str, list[tuple[int, pathlib.Path]]] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        found = re.fullmatch(r"((?:[A-Za-z][\w.-]*[_-])?)(\d+)", entry.name, re.ASCII)
        if found and entry.is_dir():
            path = folder / entry.name
            groups.setdefault(found[1], []).append((int(found[2]), path))
    groups = {prefix: g for prefix, g in groups.items() if any(is_orbax(path) for _, path in g)}
    if not groups:
        return {}
    if "" not in groups and len(groups) > 1:
        raise CheckpointError(
            f"{folder} has steps of several kinds, {', '.join(sorted(groups))[:100]}: put each"
            " into a folder of its own."
        )
    group = groups[""] if "" in groups else next(iter(groups.values()))
    found = dict(group)
    if len(found) < len(group):
        twice = next(step for step, path in group if found[step] != path)
        raise CheckpointError(f"{folder} has step {twice} twice: remove one of them.")
    return found


def is_orbax(path: pathlib.Path) -> bool:
    """Whether a folder is an Orbax checkpoint, with or without items."""
    return (path / _MARK).exists() or bool(_items(path))


def item(path: pathlib.Path, wanted: str = "params") -> pathlib.Path:
    """Returns the item of a step that has the weights: the one so called, or the only one.

    Raises:
      CheckpointError: if there is none, or several others.
    """
    if (path / _MARK).exists():
        return path
    items = _items(path)
    if wanted in items:
        return path / wanted
    if len(items) == 1:
        return path / items[0]
    if not items:
        empty = "empty" if not any(path.iterdir()) else "no whole Orbax checkpoint"
        raise CheckpointError(f"{path} is {empty}: a copy under way, or a killed save?")
    raise CheckpointError(
        f"{path} has the items {', '.join(items)[:100]}, none called {wanted}: read it by Orbax."
    )


def _items(path: pathlib.Path) -> list[str]:
    try:
        return sorted(e.name for e in os.scandir(path) if os.path.exists(f"{e.path}/{_MARK}"))
    except OSError:
        return []
