"""Masks by the paths of weights: of layers, of heads, of slices of fused arrays."""

import fnmatch
import re
from typing import Any

import jax
import numpy as np

from llc_jax.types import Params

_SLICE = re.compile(r"\[([^\]]*)\]$")


def mask_by_path(params: Params, *patterns: str) -> Any:
    """Returns a mask that is 1 for the weights that any of the patterns names, and 0 elsewhere.

    A pattern is the path of a leaf, or the beginning of one, its parts separated by `/`; in each
    part `*` stands for any characters. A slice of numpy in brackets at the end selects a part of
    every leaf named, such as one head of a fused matrix: `"layers/*/qkv[..., 2, :]"`.

    Args:
      params: pytree of arrays.
      *patterns: at least one.

    Returns:
      Pytree like params of bool arrays: a scalar for a whole leaf, else of the shape of the leaf.

    Raises:
      ValueError: for a pattern that names nothing, with the paths there are.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    shapes = [np.shape(leaf) for _, leaf in leaves]
    found: list[Any] = [np.False_] * len(leaves)
    if not patterns:
        raise ValueError(f"mask_by_path needs a pattern, such as {paths[0]!r}.")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"pattern {pattern!r} is a {type(pattern).__name__}: give a string.")
        inside = _SLICE.search(pattern)
        parts = _SLICE.sub("", pattern).split("/")
        hits = [i for i, path in enumerate(paths) if _begins(path.split("/"), parts)]
        if not hits:
            some = ", ".join(paths[:20]) + (", ..." if len(paths) > 20 else "")
            raise ValueError(
                f"pattern {pattern!r} names no weight: give the path of one, or its beginning, with"
                f" * for any characters of a part. The paths are {some}."
            )
        for i in hits:
            if inside is None:
                found[i] = np.True_
            elif found[i].ndim or not found[i]:
                found[i] = np.array(np.broadcast_to(found[i], shapes[i]))
                found[i][_index(pattern, inside.group(1), paths[i], shapes[i])] = True
    return jax.tree.unflatten(structure, found)


def _begins(path: list[str], parts: list[str]) -> bool:
    if len(parts) > len(path):
        return False
    return all(fnmatch.fnmatchcase(a, b) for a, b in zip(path, parts, strict=False))


def _index(pattern: str, text: str, path: str, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """The index that a text such as `..., 2, 4:8` stands for, if it selects something."""
    index: list[Any] = []
    for item in text.split(","):
        item = item.strip()
        if item == "...":
            index.append(...)
        elif re.fullmatch(r"-?\d+", item):
            index.append(int(item))
        elif re.fullmatch(r"(-?\d+)?(:(-?\d+)?){1,2}", item):
            index.append(slice(*[int(x) if x else None for x in item.split(":")]))
        else:
            raise ValueError(f"pattern {pattern!r} has the index {item!r}: give ..., 2 or 4:8.")
    try:
        size = np.empty(shape, bool)[tuple(index)].size
    except (IndexError, ValueError):  # too many axes, out of range, a step of 0, two ellipses
        size = 0
    if not size:
        raise ValueError(f"pattern {pattern!r} selects nothing of {path}, which has shape {shape}.")
    return tuple(index)
