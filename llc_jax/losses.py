"""Losses of examples, their mean over a minibatch, and how far they lie above the anchor's."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llc_jax.trees import at_least_float32
from llc_jax.types import Batch, LossFn, Params, PartsFn


class Gaps(NamedTuple):
    """How far losses at w are above those at w*, example by example and then averaged.

    Rounding of a loss is of the size of the loss; the difference of two losses of one example is
    exact where they are close, that of two means is not.

    Attributes:
      loss: scalar, mean of the differences.
      parts: [part] the same of each part; None without `parts_fn`.
    """

    loss: jax.Array
    parts: jax.Array | None


def mean_loss(loss_fn: LossFn, params: Params, batch: Batch) -> jax.Array:
    """Returns the mean of the per-example losses, a scalar, at least float32."""
    return jnp.mean(losses_of(loss_fn, params, batch))


def losses_of(loss_fn: LossFn | PartsFn, params: Params, batch: Batch) -> jax.Array:
    """Returns the per-example losses (or parts of them), at least float32."""
    return at_least_float32(loss_fn(params, batch))


def loss_and_grad(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    grad_accum: int = 1,
    parts_fn: PartsFn | None = None,
    anchor_losses: jax.Array | None = None,
    anchor_parts: jax.Array | None = None,
) -> tuple[jax.Array, Params, Gaps]:
    """Minibatch mean loss and its gradient, accumulated over `grad_accum` equal micro-batches.

    Args:
      loss_fn: per-example losses.
      params: where to evaluate.
      batch: leading axis a multiple of `grad_accum`.
      grad_accum: number of micro-batches; the peak memory is that of one of them.
      parts_fn: parts of the per-example losses, optional.
      anchor_losses: [batch] losses of w* on the same examples; None for 0.
      anchor_parts: [batch, part] parts of them; None for 0.

    Returns:
      (loss, a scalar, at least float32; gradient like params but at least float32; `Gaps`).
    """

    def one(micro):
        batch, anchor_losses, anchor_parts = micro

        # Differentiated together, so that the compiler sees one forward pass, not two.
        def means(p):
            losses, parts = losses_of(loss_fn, p, batch), None
            gaps = losses if anchor_losses is None else losses - anchor_losses
            if parts_fn is not None:
                parts = losses_of(parts_fn, p, batch)
                parts = jnp.mean(parts if anchor_parts is None else parts - anchor_parts, axis=0)
            return jnp.mean(losses), Gaps(jnp.mean(gaps), parts)

        (loss, gaps), grad = jax.value_and_grad(means, has_aux=True)(params)
        return loss, jax.tree.map(at_least_float32, grad), gaps

    everything = batch, anchor_losses, anchor_parts
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
