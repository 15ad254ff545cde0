"""Input checks: a `ValueError` with value, rule and remedy, before anything compiles."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
      limit: the largest.

    Raises:
      ValueError: with the value and its type.
    """
    scalar = np.ndim(value) == 0 and getattr(value, "dtype", None) is not None
    concrete = scalar and not isinstance(value, jax.core.Tracer)
    if concrete and jnp.issubdtype(value.dtype, jnp.integer):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
        raise ValueError(
            f"{name}={shown(value)} ({type(value).__name__}): give a training step, a whole number"
            f" (int) from 0 to {limit:,}."
        )
    return value


def shown(value: Any, limit: int = 80) -> str:
    """A value in a message, cut short: arrays and containers can be of any size."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def nonnegative(name: str, value: float) -> None:
    """Checks that a number is finite and >= 0."""
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
    dtype = getattr(rng_key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed or rng_key.shape != ():
        raise ValueError(
            f"rng_key has dtype {dtype} and shape {np.shape(rng_key)}: give one typed key,"
            " jax.random.key(seed), not PRNGKey(seed) or an array of keys."
        )


def data_length(data: Batch) -> int:
    """Returns the common length n of the leading axes."""
    lengths = {
        jax.tree_util.keystr(path): np.shape(leaf)[0] if np.ndim(leaf) else 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(data)
    }
    if not lengths or len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(
            f"data has leading axes {lengths}: all leaves must share one length n >= 1; give a"
            " pytree of arrays, or llc_jax.Stream(batch_fn) for data without end."
        )
    return next(iter(lengths.values()))


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


def stream_batch_size(stream: Stream) -> int:
    """Returns the batch size of a stream without running it."""
    batch = jax.eval_shape(stream.batch_fn, jax.eval_shape(lambda: jax.random.key(0)))
    return data_length(batch)


def rows(data: Batch, size: int) -> Batch:
    """Returns the shapes of a minibatch of `size` examples."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((size, *np.shape(x)[1:]), jnp.result_type(x)), data
    )


def params(tree: Params, step: int, template: Params | None = None) -> Params:
    """Checks one checkpoint and returns its shapes and dtypes."""
    if not hasattr(step, "__index__") or not 0 <= step < 2**32:
        raise ValueError(f"checkpoint step {step}: give a training step from 0 to 2**32 - 1.")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise ValueError(f"params at step {step} has no arrays: give the weights to be sampled.")
    for path, leaf in leaves:
        name = f"params{jax.tree_util.keystr(path)} at step {step}"
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"{name} has dtype {jnp.result_type(leaf)}: only floating-point weights can be"
                " sampled; close loss_fn over integers and counters instead."
            )
        bad = int(np.sum(~np.isfinite(np.asarray(leaf))))
        if bad:
            raise ValueError(
                f"{name} has {bad} of {np.size(leaf)} values that are not finite: use an earlier"
                " checkpoint."
            )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), tree)
    if template is not None and (differences := mismatches(template, shapes)):
        raise ValueError(
            f"params at step {step} do not match those of the first checkpoint: {differences}; all"
            " checkpoints of one call must come from one model."
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
    return ", ".join(lines[:limit]) + (f" and {len(lines) - limit} more" * (len(lines) > limit))


def mask(tree: Any, template: Params) -> Any:
    """Checks a mask and returns it as booleans; a leaf may be a scalar for the whole weight."""
    if tree is None:
        return None
    if jax.tree.structure(tree) != jax.tree.structure(template):
        raise ValueError(
            f"mask has structure {jax.tree.structure(tree)}, params have"
            f" {jax.tree.structure(template)}: give a 0 or 1 (or an array of them) per weight."
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


def losses(loss_fn: LossFn, template: Params, batch: Batch, size: int) -> None:
    """Checks that the loss function returns one real loss per example."""
    out = jax.eval_shape(loss_fn, template, batch)
    shape, dtype = getattr(out, "shape", None), getattr(out, "dtype", None)
    if shape != (size,) or not _is_float(dtype):
        found = f"shape {shape} and dtype {dtype}" if shape is not None else f"{type(out).__name__}"
        hint = "; drop the final mean over the batch" if shape == () else ""
        raise ValueError(
            f"loss_fn returned {found} for a batch of {size}: it must return the losses of the"
            f" examples, shape ({size},), floating point{hint}."
        )


def parts(parts_fn: PartsFn, template: Params, batch: Batch, size: int) -> None:
    """Checks that the function returns a row of real parts per example."""
    out = jax.eval_shape(parts_fn, template, batch)
    shape, dtype = getattr(out, "shape", None), getattr(out, "dtype", None)
    if shape is None or shape[:1] != (size,) or len(shape) != 2 or not _is_float(dtype):
        found = f"shape {shape} and dtype {dtype}" if shape is not None else f"{type(out).__name__}"
        raise ValueError(
            f"parts_fn returned {found} for a batch of {size}: it must return a row of losses per"
            f" example, shape ({size}, parts), floating point."
        )


def _is_float(dtype) -> bool:
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)
