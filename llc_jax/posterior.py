"""The localized tempered posterior p(w) ∝ exp(-nbeta L(w) - localization/2 |w - w*|²).

Symbols: `L` the mean loss, `w*` the anchor (the checkpoint under study), `nbeta` the inverse
temperature times the number of samples, `localization` the γ of Lau et al. 2023
(arXiv 2308.12108, eq. 14) and of Hoogland et al. 2024 (arXiv 2402.02364, section 3).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax.scalars import number, shown
from llc_jax.types import Batch, Evaluation, LossFn, Params, PartsFn
from llc_jax.vectors import vdot, widest


def default_nbeta(n: int) -> float:
    """Returns `n / log(n)`: the sample size times the inverse temperature of WBIC.

    Args:
      n: number of samples in the data set.

    Raises:
      ValueError: for n < 2, where the formula has no meaning.

    Source: Watanabe 2013 (JMLR 14), theorem 4: β = 1 / log n.
    """
    count = number(n)
    if count is None or not 2 <= count < math.inf:
        raise ValueError(f"default_nbeta needs n >= 2, got {shown(n)}: give nbeta yourself.")
    return count / math.log(count)


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


def evaluate(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    anchor: Params,
    nbeta: jax.Array,
    localization: jax.Array,
    mask: Params | None = None,
    grad_accum: int = 1,
    anchor_losses: jax.Array | None = None,
    parts_fn: PartsFn | None = None,
    anchor_parts: jax.Array | None = None,
) -> Evaluation:
    """Loss, gradient and drift of the posterior at `params` on one minibatch.

    Args:
      loss_fn: per-example losses.
      params: the point w.
      batch: the minibatch B.
      anchor: w*, like params.
      nbeta: scalar.
      localization: γ, scalar.
      mask: None, or 0/1 like params; zeros take no part.
      grad_accum: number of micro-batches.
      anchor_losses: [batch] losses of w* on the same minibatch; None for 0.
      parts_fn: see `loss_and_grad`.
      anchor_parts: see `loss_and_grad`.
    """
    loss, grad, gaps = loss_and_grad(
        loss_fn, params, batch, grad_accum, parts_fn, anchor_losses, anchor_parts
    )
    grad = apply_mask(mask, grad)
    pull = apply_mask(mask, displacement(params, anchor))
    drift = jax.tree.map(
        lambda g, d: nbeta.astype(g.dtype) * g + localization.astype(g.dtype) * d, grad, pull
    )
    energy = nbeta.astype(gaps.loss.dtype) * gaps.loss
    energy += localization.astype(energy.dtype) * vdot(pull, pull).astype(energy.dtype) / 2
    return Evaluation(loss, energy, grad, drift, nbeta, gaps)


def displacement(params: Params, anchor: Params) -> Params:
    """Returns w - w*, at least float32."""
    return jax.tree.map(lambda w, a: at_least_float32(w) - at_least_float32(a), params, anchor)


def apply_mask(mask: Params | None, tree: Params) -> Params:
    """Zeroes what the mask excludes; a select, so that an excluded NaN does not leak."""
    if mask is None:
        return tree
    return jax.tree.map(
        lambda m, x: jnp.where(jnp.asarray(m, bool), x, jnp.zeros_like(x)), mask, tree
    )


def at_least_float32(x: jax.Array) -> jax.Array:
    """Widens half precision; sums and small steps need the digits."""
    return x.astype(x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32)


def standard_normal_like(rng_key: jax.Array, tree: Params) -> Params:
    """Independent N(0, 1) for every entry of `tree`, in the dtype of each leaf; consumes the key.

    One long draw cut into pieces: a generator per leaf would be compiled as often as there are
    leaves (12 s instead of 1 s for a small transformer on a CPU).
    """
    leaves, structure = jax.tree.flatten(tree)
    flat = jax.random.normal(rng_key, (sum(leaf.size for leaf in leaves),), widest(tree))
    ends = [int(end) for end in np.cumsum([leaf.size for leaf in leaves])]
    pieces = jnp.split(flat, ends[:-1])
    noise = [
        piece.reshape(leaf.shape).astype(leaf.dtype)
        for piece, leaf in zip(pieces, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, noise)
