"""Input checks: a `ValueError` with value, rule and remedy, before anything compiles."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax.inputs import arrays, closures, scalars
from llc_jax.inputs.arrays import data_length
from llc_jax.inputs.scalars import TRACED
from llc_jax.inputs.traced import differentiable, trace
from llc_jax.types import Batch, LossFn, Params, PartsFn, Stream

# Numbers are checked under this name, too.
at_least, flag, grid, number = scalars.at_least, scalars.flag, scalars.grid, scalars.number
nonnegative, shown, step = scalars.nonnegative, scalars.shown, scalars.step


def concrete(name: str, tree: Any) -> None:
    """Checks that nothing in a tree is being traced."""
    if any(isinstance(leaf, jax.core.Tracer) for _, leaf in arrays.flat(name, tree)):
        raise ValueError(f"{name} {TRACED}")


def typed_key(rng_key: jax.Array) -> None:
    """Checks for one new-style key."""
    concrete("rng_key", rng_key)
    array = isinstance(rng_key, jax.Array | np.ndarray)
    dtype, shape = (rng_key.dtype, rng_key.shape) if array else (None, None)
    if not array or shape != () or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"rng_key has dtype {dtype} and shape {shape}"
            f"{'' if array else f' ({type(rng_key).__name__})'}: give one typed key,"
            " jax.random.key(seed), not PRNGKey(seed) or an array of keys."
        )
    arrays.array("rng_key", rng_key)  # not deleted


def pairs(checkpoints: Any) -> Iterator[tuple[Any, Params]]:
    """Pairs (step, params) of a mapping or an iterable, read lazily; both are unchecked.

    Raises:
      ValueError: at once, for what cannot be iterated; later, for an item that is no pair.
    """
    items = checkpoints.items() if isinstance(checkpoints, Mapping) else checkpoints
    remedy = "give {step: params} or an iterable of pairs (step, params)"
    try:
        iterator = None if hasattr(items, "shape") else iter(items)
    except TypeError:
        iterator = None
    if iterator is None:
        raise ValueError(f"checkpoints={shown(checkpoints)}: {remedy}.")

    def each() -> Iterator[tuple[Any, Params]]:
        for item in iterator:
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise ValueError(f"checkpoints holds {shown(item)}: {remedy}.")
            yield item[0], item[1]

    return each()


def batch_size(size: int | None, n: int | None, grad_accum: int) -> int:
    """Returns the batch size, all of the data by default."""
    if size is None:
        size = n
    size = at_least("batch_size", size, 1)
    if n is not None and size > n:
        raise ValueError(
            f"batch_size={size} is larger than the data set (n={n}): give at most n, or None for"
            " the full batch."
        )
    if size % grad_accum:
        raise ValueError(
            f"grad_accum={grad_accum} does not divide the batch size {size}: micro-batches must be"
            " equal."
        )
    return size


def stream_batch(stream: Stream, rng_key: jax.Array) -> tuple[Batch, int]:
    """Returns the shapes of a batch of a stream, and its length, without running it."""
    key = jax.ShapeDtypeStruct((), rng_key.dtype)
    traced = trace("batch_fn", stream.batch_fn, key)
    if not traced.uses[0]:
        raise ValueError(
            "batch_fn does not depend on its key: the one batch made while it is traced would be"
            " every minibatch of every chain. Draw rows by the key (jax.random.randint), or give"
            " the data themselves instead of a Stream."
        )
    closures.lossless("batch_fn", stream.batch_fn, traced.constants)
    return traced.out, data_length(traced.out)


def linear_map(matvec: Any, params: Params, own: Params | None = None) -> None:
    """Checks a map on trees like params, of which only the shapes matter; they may be traced.

    Args:
      matvec: the map.
      params: the tree.
      own: weights that the map was made for, if that is known.
    """
    if not callable(matvec):
        raise ValueError(
            f"matvec is a {type(matvec).__name__}: give a function from pytrees like params to"
            " pytrees like params, such as llc_jax.curvature.hvp(loss_fn, params, data)."
        )
    leaves = arrays.flat("params", params)
    for name, leaf in leaves:
        known = isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer)
        dtype = leaf.dtype if known else jnp.result_type(arrays.array(name, leaf, weight=True))
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{name} has dtypes other than floats, {dtype}: give weights.")
    if not leaves:
        raise ValueError(f"params={shown(params)} has no arrays: give those that matvec takes.")
    own = params if own is None else own
    shapes = [[np.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (own, params)]
    structures = [jax.tree.structure(tree) for tree in (own, params)]
    if not same_structure(*structures) or shapes[0] != shapes[1]:
        raise ValueError(
            f"params has structure {shown(structures[1])} and shapes {shown(shapes[1])}, those of"
            f" matvec are {shown(structures[0])} and {shown(shapes[0])}: give the params that it"
            " was made for."
        )


def rows(data: Batch, size: int) -> Batch:
    """Returns the shapes of a minibatch of `size` examples."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((size, *np.shape(x)[1:]), jnp.result_type(x)), data
    )


def params(
    tree: Params, at: int, template: Params | None = None, mask: Params | None = None
) -> Params:
    """Checks one checkpoint and returns its shapes and dtypes.

    Args:
      tree: the weights.
      at: its training step, checked as well.
      template: shapes and dtypes they must have, if any.
      mask: None, or 0/1 like params; what it holds need not be finite.
    """
    at = step(at, "checkpoint step")
    tree = arrays.param_arrays(tree, at, mask)
    paths = [
        f"params{arrays.short(jax.tree_util.keystr(path))} at step {at}"
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), tree)
    for name, leaf in zip(paths, jax.tree.leaves(shapes), strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            remedy = "close loss_fn over integers and counters instead"
            if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                remedy = "give the real and the imaginary part as two weights"
            raise ValueError(
                f"{name} has dtype {leaf.dtype}: only floating-point weights can be sampled;"
                f" {remedy}."
            )
    if template is not None and (differences := mismatches(template, shapes)):
        raise ValueError(
            f"params at step {at} do not match those of the first checkpoint: {differences}; all"
            " checkpoints of one call must come from one model."
        )
    sampled = [True] * len(paths) if mask is None else jax.tree.leaves(mask)
    for name, leaf, kept in zip(paths, jax.tree.leaves(tree), sampled, strict=True):
        if np.any(kept) and (bad := np.sum(~np.isfinite(_as_sampled(leaf)) & kept)):
            remedy = "use an earlier checkpoint, or hold them by a mask of 0"
            if np.isfinite(np.asarray(leaf)).all():
                remedy = "rescale the weights, or set jax_enable_x64"
            raise ValueError(
                f"{name} has {bad} of {np.size(leaf)} values that are not finite in"
                f" {jnp.result_type(leaf)}: {remedy}."
            )
    return shapes


def _as_sampled(leaf: Any) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(leaf).astype(jnp.result_type(leaf))


def mismatches(expected: Any, found: Any, limit: int = 4) -> str:
    """Describes where two trees of shapes differ; empty if nowhere."""
    flat = [
        {jax.tree_util.keystr(p): (x.shape, str(x.dtype)) for p, x in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (expected, found))
    ]
    lines = [
        f"{path}: {flat[0].get(path, 'absent')} against {flat[1].get(path, 'absent')}"
        for path in sorted(flat[0].keys() | flat[1].keys())
        if flat[0].get(path) != flat[1].get(path)
    ]
    structures = [jax.tree.structure(tree) for tree in (expected, found)]
    if not lines and not same_structure(*structures):
        lines = [f"{structures[0]} against {structures[1]}"]
    lines = [line if len(line) < 200 else f"{line[:196]} ..." for line in lines]
    return ", ".join(lines[:limit]) + (f" and {len(lines) - limit} more" * (len(lines) > limit))


def same_structure(left: Any, right: Any) -> bool:
    """Whether two structures are one; those with arrays in static fields have no comparison."""
    try:
        return left == right
    except Exception:
        return False


def losses(
    loss_fn: LossFn, template: Params, batch: Batch, size: int, masks: Sequence[Any] = (None,)
) -> jnp.dtype:
    """Checks that a loss function returns one real loss per example and depends on the weights.

    Args:
      loss_fn: the user's; traced twice, not run.
      template: shapes of the weights.
      batch: shapes of a minibatch.
      size: its length.
      masks: of which each is None, or 0/1 like params: a weight that it leaves must matter.

    Returns:
      The dtype of the losses.
    """
    traced = trace("loss_fn", loss_fn, template, batch)
    dtype = _floats("loss_fn", traced.out, (size,), "the losses of the examples")
    used = jax.tree.leaves(traced.uses[0])
    for mask in masks:
        sampled = [True] * len(used) if mask is None else map(np.any, jax.tree.leaves(mask))
        if any(u and s for u, s in zip(used, sampled, strict=True)):
            continue
        raise ValueError(
            "loss_fn does not depend on the weights that are sampled: it may close over other"
            " weights than its argument params, or use only those that the mask holds. Compute the"
            " losses from params."
        )
    differentiable("loss_fn", loss_fn, template, batch)
    closures.lossless("loss_fn", loss_fn, traced.constants)
    return dtype


def parts(name: str, parts_fn: PartsFn, template: Params, batch: Batch, size: int) -> None:
    """Checks that the function returns a row of real parts per example."""
    out = trace(name, parts_fn, template, batch).out
    width = out.shape[1:2] if len(getattr(out, "shape", ())) == 2 else ("parts",)
    _floats(name, out, (size, *width), "a row of losses per example")


def _floats(name: str, out: Any, wanted: tuple, what: str) -> jnp.dtype:
    shape, dtype = getattr(out, "shape", None), getattr(out, "dtype", None)
    if shape != wanted or not jnp.issubdtype(dtype, jnp.floating):
        found = f"shape {shape} and dtype {dtype}" if shape is not None else type(out).__name__
        hint = "; drop the final mean over the batch" if shape == () else ""
        expected = f"({', '.join(map(str, wanted))}{',' if len(wanted) == 1 else ''})"
        raise ValueError(
            f"{name} returned {found} for a batch of {wanted[0]}: it must return {what}, shape"
            f" {expected}, floating point{hint}."
        )
    return dtype
