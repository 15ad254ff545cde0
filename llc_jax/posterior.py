"""The localized tempered posterior p(w) ∝ exp(-nbeta L(w) - localization/2 |w - w*|²).

Symbols: `L` the mean loss, `w*` the anchor (the checkpoint under study), `nbeta` the inverse
temperature times the number of samples, `localization` the γ of Lau et al. 2023
(arXiv 2308.12108, eq. 14) and of Hoogland et al. 2024 (arXiv 2402.02364, section 3).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llc_jax.types import Batch, Evaluation, LossFn, Params, PartsFn


def default_nbeta(n: int) -> float:
    """Returns `n / log(n)`: the sample size times the inverse temperature of WBIC.

    Args:
      n: number of samples in the data set.

    Raises:
      ValueError: for n < 2, where the formula has no meaning.

    Source: Watanabe 2013 (JMLR 14), theorem 4: β = 1 / log n.
    """
    if n < 2:
        raise ValueError(f"default_nbeta needs n >= 2, got {n}: give nbeta yourself.")
    return n / math.log(n)


def mean_loss(loss_fn: LossFn, params: Params, batch: Batch) -> jax.Array:
    """Returns the mean of the per-example losses as a float32 scalar."""
    return jnp.mean(loss_fn(params, batch).astype(jnp.float32))


def mean_parts(parts_fn: PartsFn | None, params: Params, batch: Batch) -> jax.Array | None:
    """Returns the means of the per-example parts, float32 [part]; None without `parts_fn`."""
    if parts_fn is None:
        return None
    return jnp.mean(parts_fn(params, batch).astype(jnp.float32), axis=0)


def loss_and_grad(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    grad_accum: int = 1,
    parts_fn: PartsFn | None = None,
) -> tuple[jax.Array, Params, jax.Array | None]:
    """Minibatch mean loss and its gradient, accumulated over `grad_accum` equal micro-batches.

    Args:
      loss_fn: per-example losses.
      params: where to evaluate.
      batch: leading axis a multiple of `grad_accum`.
      grad_accum: number of micro-batches; the peak memory is that of one of them.
      parts_fn: see `mean_parts`.

    Returns:
      (float32 scalar, gradient like params but at least float32, `mean_parts`).
    """

    def one(micro):
        # Differentiated together, so that the compiler sees one forward pass, not two.
        (loss, parts), grad = jax.value_and_grad(
            lambda p: (mean_loss(loss_fn, p, micro), mean_parts(parts_fn, p, micro)), has_aux=True
        )(params)
        return loss, jax.tree.map(at_least_float32, grad), parts

    if grad_accum == 1:
        return one(batch)
    micros = jax.tree.map(lambda x: x.reshape(grad_accum, -1, *x.shape[1:]), batch)
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
    anchor_loss: jax.Array | float = 0.0,
    parts_fn: PartsFn | None = None,
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
      anchor_loss: loss of w* on the same minibatch, subtracted from the energy.
      parts_fn: see `mean_parts`.
    """
    loss, grad, parts = loss_and_grad(loss_fn, params, batch, grad_accum, parts_fn)
    grad = apply_mask(mask, grad)
    pull = apply_mask(mask, displacement(params, anchor))
    drift = jax.tree.map(
        lambda g, d: nbeta.astype(g.dtype) * g + localization.astype(g.dtype) * d, grad, pull
    )
    energy = nbeta * (loss - anchor_loss) + localization * optax.tree.vdot(pull, pull) / 2
    return Evaluation(loss, energy.astype(jnp.float32), grad, drift, nbeta, parts)


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
    widest = max((leaf.dtype for leaf in leaves), key=lambda dtype: jnp.finfo(dtype).bits)
    flat = jax.random.normal(rng_key, (sum(leaf.size for leaf in leaves),), widest)
    ends = [int(end) for end in np.cumsum([leaf.size for leaf in leaves])]
    pieces = jnp.split(flat, ends[:-1])
    noise = [
        piece.reshape(leaf.shape).astype(leaf.dtype)
        for piece, leaf in zip(pieces, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, noise)
