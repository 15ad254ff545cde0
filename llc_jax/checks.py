"""Input checks: a `ValueError` with value, rule and remedy, before anything compiles."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax import arrays
from llc_jax.arrays import data_length
from llc_jax.traced import lossless_constants, trace
from llc_jax.types import Batch, LossFn, Params, PartsFn, Sampler, Stream


def at_least(name: str, value: int, minimum: int, remedy: str = "") -> None:
    """Checks an integer against its minimum."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        reason = f" ({remedy})" if remedy else ""
        raise ValueError(f"{name}={value!r}: give an integer of at least {minimum}{reason}.")


def step(value: Any, name: str = "step", limit: int = 2**32 - 1) -> int:
    """Returns a training step as a Python integer.

    Args:
      value: a Python, numpy or JAX integer; not a string or a float, which may mean another step.
      name: for the message.
      limit: the largest, a power of 2 less 1.

    Raises:
      ValueError: with the value and its type.
    """
    scalar = np.ndim(value) == 0 and getattr(value, "dtype", None) is not None
    settled = scalar and not isinstance(value, jax.core.Tracer)
    if settled and jnp.issubdtype(value.dtype, jnp.integer):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
        raise ValueError(
            f"{name} {shown(value)} ({type(value).__name__}): give a training step from 0 to"
            f" 2**{limit.bit_length()} - 1, a whole number (int)."
        )
    return value


def shown(value: Any, limit: int = 120) -> str:
    """A value in a message, cut short: arrays and containers can be of any size."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def concrete(name: str, tree: Any) -> None:
    """Checks that nothing in a tree is being traced."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        raise ValueError(f"{name} {arrays.TRACED}")


def nonnegative(name: str, value: float) -> None:
    """Checks that a number is finite and >= 0."""
    concrete(name, value)
    number = np.ndim(value) == 0 and np.asarray(value).dtype.kind in "iuf"
    if not number or not np.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value!r}: give one finite number >= 0.")


def sampler_instance(sampler: Sampler) -> None:
    """Checks that a sampler is an instance, not its class."""
    methods = hasattr(sampler, "_asdict") and hasattr(sampler, "step")
    if isinstance(sampler, type) or not methods:
        raise ValueError(
            f"sampler={sampler!r}: give an instance such as llc_jax.SGLD(step_size=1e-4)."
        )


# Rules beyond "finite and >= 0", by the name of the hyperparameter.
_POSITIVE = {"step_size", "friction", "epsilon"}
_MEMORIES = {"decay", "momentum"}
_AT_MOST_ONE = {*_MEMORIES, "bias_correction"}


def hyperparameters(sampler: Sampler) -> None:
    """Checks that a sampler is an instance whose hyperparameters are scalars within their range."""
    sampler_instance(sampler)
    fields = sampler._asdict()
    corrected = fields.get("bias_correction", 1) != 0
    for name, value in fields.items():
        nonnegative(f"{type(sampler).__name__}.{name}", value)
        if name in _POSITIVE and not value > 0:
            raise ValueError(f"{name}={value!r}: it must be above 0.")
        if name in _AT_MOST_ONE and not value <= 1:
            raise ValueError(f"{name}={value!r}: it must be from 0 to 1.")
        if name in _MEMORIES and value == 1 and corrected:
            raise ValueError(
                f"{name}={value!r}: an average that never changes has nothing to correct its bias"
                " by (0 / 0); it must be below 1, for example 0.999."
            )


def typed_key(rng_key: jax.Array) -> None:
    """Checks for one new-style key."""
    concrete("rng_key", rng_key)
    dtype = getattr(rng_key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed or rng_key.shape != ():
        raise ValueError(
            f"rng_key has dtype {dtype} and shape {np.shape(rng_key)}: give one typed key,"
            " jax.random.key(seed), not PRNGKey(seed) or an array of keys."
        )


def batch_size(size: int | None, n: int | None, grad_accum: int) -> int:
    """Returns the batch size, all of the data by default."""
    if size is None:
        size = n
    at_least("batch_size", size, 1)
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
    lossless_constants("batch_fn", stream.batch_fn, key)
    return traced.out, data_length(traced.out)


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
            raise ValueError(
                f"{name} has {bad} of {np.size(leaf)} values that are not finite in"
                f" {jnp.result_type(leaf)}: use an earlier checkpoint, or hold them by a mask of 0."
            )
    return shapes


def precision(tree: Params, sampler: Sampler) -> None:
    """Checks that one step of noise is not rounded away in half-precision weights."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if jnp.finfo(dtype).bits >= 32 or not hasattr(sampler, "step_size"):
            continue
        size = float(np.sqrt(np.mean(np.square(np.asarray(leaf, np.float64)))))
        spacing, noise = size * float(jnp.finfo(dtype).eps), float(sampler.step_size) ** 0.5
        if noise < spacing / 2:
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} has dtype {dtype} and values near {size:.2g},"
                f" which are {spacing:.2g} apart: steps of sqrt(step_size) = {noise:.2g} would be"
                " rounded away; cast the weights to float32."
            )


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
    if not lines and jax.tree.structure(expected) != jax.tree.structure(found):
        lines = [f"{jax.tree.structure(expected)} against {jax.tree.structure(found)}"]
    lines = [line if len(line) < 200 else f"{line[:196]} ..." for line in lines]
    return ", ".join(lines[:limit]) + (f" and {len(lines) - limit} more" * (len(lines) > limit))


def mask(tree: Any, template: Params) -> Any:
    """Checks a mask and returns it as booleans; a leaf may be a scalar for the whole weight."""
    if tree is None:
        return None
    concrete("mask", tree)
    if jax.tree.structure(tree) != jax.tree.structure(template):
        raise ValueError(
            f"mask has structure {shown(jax.tree.structure(tree))}, params have"
            f" {shown(jax.tree.structure(template))}: give a 0 or 1 (or an array of them) for each"
            " weight."
        )
    for (path, leaf), weight in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(template), strict=True
    ):
        name = f"mask{jax.tree_util.keystr(path)}"
        if np.shape(leaf) not in ((), weight.shape):
            raise ValueError(
                f"{name} has shape {np.shape(leaf)}: give a scalar or shape {weight.shape}."
            )
        if not np.isin(np.asarray(leaf), (0, 1)).all():
            raise ValueError(
                f"{name} has values other than 0 and 1: 1 samples a weight, 0 holds it."
            )
    as_bool = jax.tree.map(lambda m: np.asarray(m) != 0, tree)
    if not any(m.any() for m in jax.tree.leaves(as_bool)):
        raise ValueError("mask is 0 everywhere: nothing would be sampled; set some weights to 1.")
    return as_bool


def losses(
    loss_fn: LossFn, template: Params, batch: Batch, size: int, mask: Params | None = None
) -> jnp.dtype:
    """Checks that a loss function returns one real loss per example and depends on the weights.

    Args:
      loss_fn: the user's; traced twice, not run.
      template: shapes of the weights.
      batch: shapes of a minibatch.
      size: its length.
      mask: None, or 0/1 like params: at least one weight that it leaves must matter.

    Returns:
      The dtype of the losses.
    """
    traced = trace("loss_fn", loss_fn, template, batch)
    dtype = _floats("loss_fn", traced.out, (size,), "the losses of the examples")
    used = jax.tree.leaves(traced.uses[0])
    sampled = [True] * len(used) if mask is None else map(np.any, jax.tree.leaves(mask))
    if not any(u and s for u, s in zip(used, sampled, strict=True)):
        raise ValueError(
            "loss_fn does not depend on the weights that are sampled: it may close over other"
            " weights than its argument params, or use only those that the mask holds. Compute the"
            " losses from params."
        )
    return dtype


def parts(parts_fn: PartsFn, template: Params, batch: Batch, size: int) -> None:
    """Checks that the function returns a row of real parts per example."""
    out = trace("parts_fn", parts_fn, template, batch).out
    width = out.shape[1:2] if len(getattr(out, "shape", ())) == 2 else ("parts",)
    _floats("parts_fn", out, (size, *width), "a row of losses per example")


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
