"""Pytrees on disk, by Orbax: what comes back is what was saved, or it is refused before."""

import collections
import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax.inputs import arrays
from llc_jax.storage import manifests

# Those that TensorStore has, beside numpy's own.
_ML_DTYPES = {
    "bfloat16", "float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz",
    "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn", "int4", "int2",
}  # fmt: skip


class CheckpointError(RuntimeError):
    """A step that is missing, damaged or not readable; the message says which file and why."""


def storable(name: str, tree: Any, *, plain: bool) -> Any:
    """Returns a tree as it is saved: the same structure, its leaves numpy arrays.

    Numbers become arrays without a dimension; typed keys stay what they are.

    Args:
      name: of the tree, for messages.
      tree: its leaves are numbers, or arrays that this process holds whole.
      plain: it will be read without a template, whence only dicts with string keys and lists come
        back as they were.

    Raises:
      ValueError: naming leaves and containers that would come back as something else, or not.
    """
    try:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
    except (TypeError, ValueError):
        raise ValueError(f"{name} has a dict whose keys cannot be sorted: use strings.") from None
    problems = list(_containers(name, tree)) if plain else []
    problems += [f"{name} has no arrays"] if plain and not leaves else []
    for path, leaf in leaves:
        if problem := _leaf_problem(leaf):
            problems.append(f"{name}{_short(path)} {problem}")
    problems += _names(name, [path for path, _ in leaves])
    if problems:
        more = f" and {len(problems) - 2} more" if len(problems) > 2 else ""
        remedy = "give arrays of numbers, and None for what is empty"
        if plain:
            remedy = (
                "give dicts with string keys, lists and arrays (an nnx.State by nnx.to_pure_dict,"
                " a FrozenDict by flax.core.unfreeze)"
            )
        raise ValueError(
            f"a checkpoint would not give this back: {'; '.join(problems[:2])}{more}. Before"
            f" saving, {remedy}."
        )
    # Host copies: Orbax would want every process of a pod to take part in saving a device's.
    host = jax.device_get(tree)
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), host)


def shapes(tree: Any) -> Any:
    """The shapes and dtypes of a tree whose leaves may be numbers, as `storable` makes them."""

    def shape(leaf):
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if isinstance(dtype, np.dtype):  # not of a key
            dtype = dtype.newbyteorder("=")  # as it will be on disk
        return jax.ShapeDtypeStruct(np.shape(leaf), dtype)

    return jax.tree.map(shape, tree)


def save(path: pathlib.Path, tree: Any) -> None:
    """Writes a tree of `storable` as an Orbax item; nothing for one without leaves."""
    if not jax.tree.leaves(tree):
        return  # Orbax has no items that are empty
    import orbax.checkpoint as ocp

    with _checkpointer() as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))


def restore(path: pathlib.Path, like: Any = None) -> Any:
    """Reads an item whose hashes hold.

    Args:
      path: of the item; need not exist if `like` has no leaves.
      like: None for nested dicts and lists, or the `shapes` of the tree.

    Raises:
      ValueError: if `like` has another structure.
      CheckpointError: if this version of Orbax cannot read it.
    """
    if like is not None and not path.exists():  # saved without arrays
        if jax.tree.leaves(like):
            raise ValueError(
                f"the optimizer state in {path.parent} does not fit opt_state_like: it has no"
                " arrays; pass that of the model which was trained."
            )
        return like
    import orbax.checkpoint as ocp

    try:
        with _checkpointer() as checkpointer:
            return checkpointer.restore(path, args=ocp.args.PyTreeRestore(item=like))
    except Exception as error:
        if like is not None and "structures do not match" in str(error):
            raise ValueError(
                f"the optimizer state in {path} has another structure than opt_state_like; pass "
                "that of the optimizer and model which were trained."
            ) from error
        raise CheckpointError(
            f"the files of {path} are intact but Orbax {ocp.__version__} cannot read them "
            f"({_reason(error)}); {manifests.NAME} names the version that wrote them."
        ) from error


def restore_foreign(path: pathlib.Path) -> Any:
    """Reads an item of any program as nested dicts, lists and numpy arrays, whatever its devices.

    Raises:
      CheckpointError: if it is not whole.
    """
    import orbax.checkpoint as ocp

    try:
        with _checkpointer() as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree
            kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=kinds))
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read by Orbax {ocp.__version__} ({_reason(error)}): half copied, or"
            " of another version?"
        ) from error


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    """A synchronous Orbax checkpointer that waits for no other process."""
    import orbax.checkpoint as ocp  # half a second, and not needed to list or verify steps

    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        yield checkpointer


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _short(path: tuple) -> str:
    return arrays.short(jax.tree_util.keystr(path), 80)


def _containers(name: str, tree: Any) -> Iterator[str]:
    """What is no dict with string keys, list, None or leaf."""
    if type(tree) is dict:
        if odd := [key for key in tree if not isinstance(key, str)]:
            yield f"{arrays.short(name, 80)} has the key {odd[0]!r:.40} ({type(odd[0]).__name__})"
        for key, value in tree.items():
            yield from _containers(f"{name}[{key!r}]", value)
    elif type(tree) is list:
        for number, value in enumerate(tree):
            yield from _containers(f"{name}[{number}]", value)
    elif tree is not None and not jax.tree_util.all_leaves([tree]):
        yield f"{arrays.short(name, 80)} is a {type(tree).__name__}"


def _leaf_problem(leaf: Any) -> str:
    if isinstance(leaf, jax.core.Tracer):
        return "is traced: save outside of jit"
    if isinstance(leaf, jax.Array):
        if leaf.is_deleted():
            return "was donated and is gone"
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return "is spread over processes: gather it first"
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return ""
    elif isinstance(leaf, np.ma.MaskedArray):
        return "is a masked array"
    elif not isinstance(leaf, np.ndarray | np.generic | bool | int | float | complex):
        return f"is a {type(leaf).__name__}"
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    usual = dtype.kind in "biufc" and dtype.itemsize <= (16 if dtype.kind == "c" else 8)
    if not usual and dtype.name not in _ML_DTYPES:
        return f"has dtype {dtype}"
    return f"has shape {leaf.shape}, no elements" if not np.size(leaf) else ""


def _names(name: str, paths: list[tuple]) -> list[str]:
    """Leaves whose names in a file, keys joined by dots as if folders, are none or equal."""
    named = collections.defaultdict(list)
    for path in paths:
        parts = [getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))) for k in path]
        named[".".join(map(str, parts)).removesuffix("/")].append(_short(path))
    problems = []
    for text, same in named.items():
        if len(same) > 1:
            problems.append(f"{name}{same[0]} and {name}{same[1]} have one name in a file")
        try:
            text.encode()
        except UnicodeEncodeError:
            problems.append(f"{name}{same[0]} has a name that is no text")
    return problems
