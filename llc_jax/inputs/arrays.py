"""Data and weights as people have them: made arrays without loss, or refused by name."""

import itertools
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax.inputs.scalars import TRACED
from llc_jax.types import Batch, Params

MAX_RELATIVE_LOSS = 1e-2  # rounding of a column of data, relative to its spread
NOISE = 64  # units in the last place: a column that varies by less is constant
MAX_ITEMS, MAX_LEAVES = 32, 1000  # more of them are examples, not arrays of examples
# Buffers of layers, as Flax, PyTorch, Keras and Haiku name them.
_STATE = re.compile(
    r"\b(batch_stats|cache|intermediates)\b|(running|moving)_(mean|variance|var)"
    r"|num_batches_tracked|(mean|var)_ema"
)


def flat(root: str, tree: Any) -> list[tuple[str, Any]]:
    """Returns pairs (name for messages, leaf); a ValueError for what JAX cannot flatten."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an iterator as a leaf, which is refused as such
            leaves = jax.tree_util.tree_leaves_with_path(tree)
            static = list(_static(jax.tree.structure(tree)))
        found = [(f"{root}{short(jax.tree_util.keystr(path))}", leaf) for path, leaf in leaves]
    except Exception as error:
        raise ValueError(
            f"{root} is no pytree ({type(tree).__name__}; {type(error).__name__}:"
            f" {' '.join(str(error).split())[:200]}): give dicts whose keys are all strings, lists"
            " or tuples of arrays."
        ) from None
    for name, leaf in found:
        if isinstance(leaf, Iterator):
            array(name, leaf)  # refuses it
    if any(isinstance(x, np.ndarray | jax.Array) for x in jax.tree.leaves(static)):
        raise ValueError(
            f"{root} has an array in a static field, by which JAX cannot compare two of them: make"
            " it a leaf (a data field), or a tuple of numbers."
        )
    return found


def _static(structure: Any) -> Iterator[Any]:
    """What the nodes of a structure hold beside their leaves."""
    stack = [structure]
    while stack:
        node = stack.pop()
        if (data := node.node_data()) is not None:
            yield data[1]
        stack += node.children()


def data_arrays(data: Batch) -> Batch:
    """Returns the data with every leaf an array of a dtype that JAX keeps.

    Args:
      data: pytree of numpy or JAX arrays, or of what numpy makes arrays of without guessing
        (pandas Series, PyTorch tensors on the CPU, memory maps).

    Raises:
      ValueError: naming the leaf, for anything else; for 64-bit numbers that do not fit into 32
        bits, or whose differences vanish there (unless `jax_enable_x64` is set); for leaves
        without a common leading axis.
    """
    data_length(data)
    return _map_leaves(lambda name, leaf: without_loss(name, array(name, leaf)), "data", data)


def data_length(data: Batch) -> int:
    """Returns the common length n of the leading axes of the data."""
    _refuse_containers(data)
    lengths = {}
    for name, leaf in flat("data", data):
        known = isinstance(leaf, jax.ShapeDtypeStruct)
        shape = leaf.shape if known else np.shape(array(name, leaf))
        lengths[name.removeprefix("data")] = shape[0] if shape else 0
    if not lengths or len(set(lengths.values())) > 1 or 0 in lengths.values():
        some = dict(itertools.islice(lengths.items(), 4))
        more = f" and {len(lengths) - 4} more" if len(lengths) > 4 else ""
        raise ValueError(
            f"data has leading axes {some}{more}: all leaves must share one length n >= 1; give a"
            " pytree of arrays (not lists of numbers), or llc_jax.Stream(batch_fn) for data without"
            " end."
        )
    return next(iter(lengths.values()))


def param_arrays(params: Params, step: int, mask: Any = None) -> Params:
    """Returns the weights with every leaf an array.

    Args:
      params: the weights.
      step: for messages.
      mask: None, or the checked mask: leaves that it holds altogether may be state.

    Raises:
      ValueError: naming the leaf, for what is no array; for the state of layers among the weights.
    """
    if not flat("params", params):
        raise ValueError(
            f"params at step {step} has no arrays ({type(params).__name__}): give the weights to be"
            " sampled, a pytree such as variables['params'], nnx.state(model, nnx.Param) or"
            " equinox.filter(model, equinox.is_inexact_array)."
        )
    held = [] if mask is None else [not np.any(m) for m in jax.tree.leaves(mask)]
    state = _state_leaves(params)
    if taken := [name for name, h in itertools.zip_longest(state, held) if name and not h]:
        raise ValueError(
            f"params at step {step} holds the state of layers, {', '.join(taken[:3])}"
            f"{' and others' if len(taken) > 3 else ''}, which would be sampled like weights: pass"
            " the weights only (variables['params'] in Linen, nnx.split(model, nnx.Param, ...) in"
            " NNX) and close loss_fn over the rest, or hold it by a mask of 0."
        )
    return _map_leaves(
        lambda name, leaf: array(f"{name} at step {step}", leaf, weight=True), "params", params
    )


def array(name: str, leaf: Any, weight: bool = False) -> Any:
    """Returns one leaf as a numpy or JAX array of numbers.

    Args:
      name: for messages.
      leaf: anything.
      weight: whether the remedy is that for weights.
    """
    if isinstance(leaf, jax.core.Tracer):
        raise ValueError(f"{name} {TRACED}")
    if isinstance(leaf, jax.Array) and not isinstance(leaf, np.ndarray):
        if leaf.is_deleted():
            raise ValueError(
                f"{name} has been deleted (donated to a compiled function): keep a copy, such as"
                " jax.device_get(x), before that call."
            )
        return leaf
    if isinstance(leaf, np.ma.MaskedArray) and np.ma.is_masked(leaf):
        raise ValueError(
            f"{name} is a masked array with {np.ma.count_masked(leaf)} masked values: fill them"
            " (x.filled(value)) or leave these rows out."
        )
    known = isinstance(leaf, np.ndarray | np.generic | bool | int | float | complex)
    frame = hasattr(leaf, "columns") or hasattr(leaf, "tocsr")  # of a table; a sparse matrix
    found, reason = None, ""
    if known or (hasattr(leaf, "__array__") and not frame):
        try:
            found = np.asarray(leaf)
            jnp.result_type(found)
        except Exception as error:
            reason = "" if known else f" ({' '.join(str(error).split())[:120]})"
            found = None
    if found is None or not (jnp.issubdtype(found.dtype, jnp.number) or found.dtype == bool):
        kind = f"a {type(leaf).__name__}{reason}"
        kind += "" if found is None else f" of dtype {found.dtype}"
        if isinstance(leaf, np.ndarray):
            kind = f"an array of dtype {short(str(leaf.dtype))}"
        if weight and not isinstance(leaf, np.ndarray):
            remedy = (
                "give the arrays only, for example the first part of equinox.partition(model,"
                " equinox.is_inexact_array), and close loss_fn over the rest"
            )
        elif frame:
            remedy = "give arrays, for example {'x': frame[names].to_numpy(), 'y': ...}"
        elif name == "data":
            remedy = (
                "give a pytree of arrays whose leading axis is the examples (collect them with"
                " np.stack or np.concatenate), or a llc_jax.Stream of a function of a key"
            )
        else:
            remedy = "give an array of numbers (np.asarray, np.stack), or drop this leaf"
        raise ValueError(f"{name} is {kind}: {remedy}.")
    return found


def without_loss(name: str, x: Any) -> Any:
    """Returns a numpy array in the dtype that JAX would give it, if that changes nothing in it.

    Integers must stay the same; floating-point numbers may be rounded as long as that is small
    beside the spread of their column (along the leading axis).
    """
    if isinstance(x, jax.Array):
        return x
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    if dtype == x.dtype:
        return x
    with np.errstate(over="ignore", invalid="ignore"):
        y = x.astype(dtype)
    remedy = "or set jax_enable_x64"
    if jnp.issubdtype(dtype, jnp.integer):
        changed = y != x
        if changed.any():
            raise ValueError(
                f"{name} has {int(changed.sum())} of {x.size} {x.dtype} values that do not fit into"
                f" {dtype}, the first is {x[changed].flat[0]}: reduce or shift them first (such as"
                f" ids modulo the table size), {remedy}."
            )
        return y
    if np.any(np.isfinite(x) & ~np.isfinite(y)):
        raise ValueError(
            f"{name} has {x.dtype} values too large for {dtype}, up to"
            f" {np.abs(x[np.isfinite(x)]).max():.3g}: scale them first, {remedy}."
        )
    columns = np.where(np.isfinite(x), x, 0).reshape(len(x), -1) if x.ndim else x.reshape(1, 1)
    rounded = np.where(np.isfinite(x), y, 0).astype(x.dtype).reshape(columns.shape)
    spread = columns.std(axis=0)
    lost = np.sqrt(np.mean(np.abs(rounded - columns) ** 2, axis=0))
    varies = spread > NOISE * np.finfo(x.dtype).eps * np.abs(columns).max(axis=0, initial=0)
    share = np.divide(lost, spread, out=np.zeros_like(lost), where=varies)
    if np.any(share > MAX_RELATIVE_LOSS):
        worst = int(np.argmax(share))
        raise ValueError(
            f"{name} has {x.dtype} values whose differences vanish in {dtype}: values near"
            f" {columns[0, worst]:.6g} with spread {spread[worst]:.3g} are rounded by"
            f" {lost[worst]:.3g}; subtract their mean and scale them first, {remedy}."
        )
    return y


def _map_leaves(function: Any, root: str, tree: Any) -> Any:
    """`function(name, leaf)` of every leaf; names are cut short."""
    leaves = [function(name, leaf) for name, leaf in flat(root, tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def short(path: str, limit: int = 120) -> str:
    """The path of a leaf in a message: its end, where it is long."""
    return path if len(path) <= limit else "..." + path[3 - limit :]


def _refuse_containers(data: Any) -> None:
    """Refuses what is a container of examples, not a pytree of arrays with a leading axis."""
    leaves = flat("data", data)
    sparse = sys.modules.get("jax.experimental.sparse")
    if sparse is not None and _has(data, sparse.JAXSparse):
        raise ValueError(
            "data holds a sparse JAX array, whose leading axes are not those of the examples: give"
            " it dense (x.todense())."
        )
    if isinstance(data, list | tuple) and len(data) > MAX_ITEMS:
        raise ValueError(
            f"data is a {type(data).__name__} of {len(data):,} items: stack the examples into a"
            " pytree of arrays with a leading axis, jax.tree.map(lambda *x: np.stack(x), *data)."
        )
    if len(leaves) > MAX_LEAVES:
        raise ValueError(
            f"data has {len(leaves):,} leaves: give a pytree of a few arrays whose leading axis is"
            " the examples (np.stack)."
        )


def _has(tree: Any, kind: type) -> bool:
    found = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
    return any(isinstance(x, kind) for x in found)


def _state_leaves(params: Any) -> list[str]:
    """The name of each leaf that is state of a layer, not a weight; empty for the others."""
    nnx = sys.modules.get("flax.nnx")
    kinds = []
    if nnx is not None and _has(params, nnx.Variable):
        for variable in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable)):
            weight = not isinstance(variable, nnx.Variable) or isinstance(variable, nnx.Param)
            kind = "" if weight else type(variable).__name__
            kinds += [kind] * len(jax.tree.leaves(variable))
    found = []
    for (path, _), kind in itertools.zip_longest(
        jax.tree_util.tree_leaves_with_path(params), kinds, fillvalue=""
    ):
        name = jax.tree_util.keystr(path)
        if kind or _STATE.search(name):
            found.append(f"params{short(name)}" + (f" ({kind})" if kind else ""))
        else:
            found.append("")
    return found
