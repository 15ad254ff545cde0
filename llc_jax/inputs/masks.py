"""Masks: made by the paths of weights, and checked."""

import fnmatch
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax.inputs import arrays, checks
from llc_jax.inputs.scalars import shown
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


def check_mask(tree: Any, template: Params, name: str = "mask") -> Any:
    """Checks a mask and returns it as booleans; a leaf may be a scalar for the whole weight."""
    if tree is None:
        return None
    checks.concrete(name, tree)
    weights = arrays.flat("params", template)
    structures = [jax.tree.structure(x) for x in (tree, template)]
    if not checks.same_structure(*structures):
        raise ValueError(
            f"{name} has structure {shown(structures[0])}, params have {shown(structures[1])}: give"
            " a 0 or 1 (or an array of them) for each weight."
        )
    for (path, leaf), (weight, like) in zip(arrays.flat(name, tree), weights, strict=True):
        known = isinstance(like, jax.ShapeDtypeStruct)
        shape = like.shape if known else np.shape(arrays.array(weight, like, weight=True))
        leaf = arrays.array(path, leaf)
        if leaf.shape not in ((), shape):
            raise ValueError(f"{path} has shape {leaf.shape}: give a scalar or shape {shape}.")
        keys = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if keys or not np.isin(np.asarray(leaf), (0, 1)).all():
            raise ValueError(
                f"{path} has values other than 0 and 1: 1 samples a weight, 0 holds it."
            )
    as_bool = jax.tree.map(lambda m: np.asarray(m) != 0, tree)
    if not any(m.any() for m in jax.tree.leaves(as_bool)):
        raise ValueError(
            f"{name} is 0 everywhere: nothing would be sampled; set some weights to 1."
        )
    return as_bool


def check_masks(trees: Any, template: Params) -> dict[str, Any]:
    """Checks named masks; each leaf is a scalar in all of them, or an array in all."""
    if not isinstance(trees, Mapping) or not trees:
        raise ValueError(
            f"masks={shown(trees)}: give {{name: mask}}, each as llc_jax.mask_by_path makes it, or"
            " None for all weights."
        )
    found = []
    for name, tree in trees.items():
        if not isinstance(name, str):
            raise ValueError(f"masks has the key {shown(name)}: give names.")
        tree = jax.tree.map(lambda _: True, template) if tree is None else tree
        found.append(check_mask(tree, template, f"masks[{name!r}]"))

    def alike(like: Any, *leaves: np.ndarray) -> list[np.ndarray]:
        shape = np.shape(like) if any(x.ndim for x in leaves) else ()
        return [np.broadcast_to(x, shape) for x in leaves]

    structure = jax.tree.structure(found[0])
    columns = [
        alike(*leaves)
        for leaves in zip(jax.tree.leaves(template), *map(jax.tree.leaves, found), strict=True)
    ]
    rows = zip(*columns, strict=True)
    return {name: jax.tree.unflatten(structure, row) for name, row in zip(trees, rows, strict=True)}
