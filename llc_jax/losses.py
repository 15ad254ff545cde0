"""Losses of examples, their mean over a minibatch, and how far they lie above the anchor's."""

import jax
import jax.numpy as jnp

from llc_jax.trees import at_least_float32
from llc_jax.types import Batch, LossFn, Params, PartsFn


def mean_loss(loss_fn: LossFn, params: Params, batch: Batch) -> jax.Array:
    """Returns the mean of the per-example losses, a scalar, at least float32."""
    return jnp.mean(losses_of(loss_fn, params, batch))


def losses_of(loss_fn: LossFn | PartsFn, params: Params, batch: Batch) -> jax.Array:
    """Returns the per-example losses (or parts of them), at least float32."""
    return at_least_float32(loss_fn(params, batch))


def map_examples(function: PartsFn, params: Params, data: Batch, chunk: int) -> jax.Array:
    """Returns `function` of all examples, `chunk` at a time: [n, ...], at least float32."""
    n = num_examples(data)
    if n <= chunk:
        return losses_of(function, params, data)
    return at_rows(function, params, data, rows_in_order(n, chunk))[:n]


def rows_in_order(n: int, chunk: int) -> jax.Array:
    """Rows 0 to n - 1, int32 [k, chunk]; the last chunk is filled up from row 0."""
    return (jnp.arange(-(-n // chunk) * chunk, dtype=jnp.int32) % n).reshape(-1, chunk)


def at_rows(function: PartsFn, params: Params, data: Batch, rows: jax.Array) -> jax.Array:
    """Returns `function` of the examples `rows` [k, chunk], a chunk at a time: [k * chunk, ...]."""
    found = jax.lax.map(lambda r: losses_of(function, params, take(data, r)), rows)
    return found.reshape(-1, *found.shape[2:])


def loss_and_grad(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    grad_accum: int = 1,
    anchor_losses: jax.Array | None = None,
) -> tuple[jax.Array, Params, jax.Array]:
    """Minibatch mean loss and its gradient, accumulated over `grad_accum` equal micro-batches.

    Rounding of a loss is of the size of the loss. The difference of two losses of one example is
    exact where they are close, that of two means is not: so gaps are taken example by example.

    Args:
      loss_fn: per-example losses.
      params: where to evaluate.
      batch: leading axis a multiple of `grad_accum`.
      grad_accum: number of micro-batches; the peak memory is that of one of them.
      anchor_losses: [batch] losses of w* on the same examples; None for 0.

    Returns:
      (loss, a scalar, at least float32; gradient like params but at least float32; mean of loss
      minus anchor loss, a scalar).
    """

    def one(micro):
        batch, anchor_losses = micro

        def means(p):
            losses = losses_of(loss_fn, p, batch)
            gaps = losses if anchor_losses is None else losses - anchor_losses
            return jnp.mean(losses), jnp.mean(gaps)

        (loss, gap), grad = jax.value_and_grad(means, has_aux=True)(params)
        return loss, jax.tree.map(at_least_float32, grad), gap

    everything = batch, anchor_losses
    if grad_accum == 1:
        return one(everything)
    micros = jax.tree.map(lambda x: x.reshape(grad_accum, -1, *x.shape[1:]), everything)
    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, jax.tree.map(lambda x: x[0], micros)))
    total, _ = jax.lax.scan(
        lambda acc, micro: (jax.tree.map(jnp.add, acc, one(micro)), None), zero, micros
    )
    return jax.tree.map(lambda x: x / grad_accum, total)


def num_examples(data: Batch) -> int:
    """Returns the length of the leading axis."""
    return jax.tree.leaves(data)[0].shape[0]


def take(data: Batch, rows: jax.Array) -> Batch:
    """Returns the examples `rows`."""
    return jax.tree.map(lambda x: x[rows], data)
