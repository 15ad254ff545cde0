"""One step of a chain looked at: what it says of sampler, loss, gradient and weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llc_jax.samplers.base import log_acceptance, tested_log_acceptance
from llc_jax.trees import apply_mask, at_least_float32, displacement, norm, vdot, widest
from llc_jax.types import Evaluation, Params, Sampler


class Probe(NamedTuple):
    """What one step says; scalars, 0 where it was not looked at.

    Attributes:
      log_acceptance: log Metropolis ratio of the step; None if the sampler has none.
      change: of the minibatch loss along `SHARE` of the way back to the anchor. That is a move of
        the size of the posterior, however small the steps, and where the gradient is that of the
        loss on such moves, the estimate is right for every homogeneous loss.
      predicted: the same by the gradients at both ends and halfway; exact for a cubic loss.
      gradient: Euclidean norm of the gradient at the start of the step.
      heating: variance of the rounding of weights to their dtype, relative to the mean square of
        the step, in the worst leaf; inf for a leaf that has not moved at all.
    """

    log_acceptance: jax.Array
    change: jax.Array
    predicted: jax.Array
    gradient: jax.Array
    heating: jax.Array


SHARE = 1 / 8


def look_at(
    sampler: Sampler,
    state,
    new_state,
    here: Evaluation,
    posterior,
    anchor: Params,
    mask: Params | None,
    probing: jax.Array | None,
) -> Probe:
    """Looks at a step where `probing`, a traced boolean; not at all if that is None.

    Args:
      sampler: the sampler.
      state: before the step.
      new_state: after it.
      here: evaluation at `state.params`.
      posterior: params -> `Evaluation` on the minibatch of the step.
      anchor: w*.
      mask: None, or 0/1 like params.
      probing: the same for every chain, so that vmap keeps the branch a branch.
    """
    blank = jnp.zeros_like(here.gap)
    measured = log_acceptance(sampler)  # as against a test that the sampler makes
    ratio = blank if measured else tested_log_acceptance(new_state)
    ratio = ratio if ratio is None else ratio.astype(blank.dtype)
    nothing = Probe(ratio, blank, blank, blank, blank)
    if probing is None:
        return nothing

    def look() -> Probe:
        start = state.params
        way = displacement(anchor, start)
        points = [
            jax.tree.map(lambda w, x, s=share: _moved(w, s * x), start, way)
            for share in (SHARE / 2, SHARE)
        ]
        points += [new_state.params] if measured else []
        # One after the other in a loop: the gradient is compiled once.
        there = jax.lax.map(posterior, jax.tree.map(lambda *w: jnp.stack(w), *points))
        middle, end, *far = (jax.tree.map(lambda x, i=i: x[i], there) for i in range(len(points)))
        # Simpson's rule as a sum of trapezoids, between the points as they were rounded.
        halves = _trapezoid(start, here, points[0], middle)
        halves += _trapezoid(points[0], middle, points[1], end)
        predicted = (4 * halves - _trapezoid(start, here, points[1], end)) / 3
        move = displacement(new_state.params, start)
        heating = _heating(start, move, mask)
        if not measured and ratio is not None:  # a refused proposal is not rounded away
            heating = jnp.where(norm(move) > 0, heating, 0)
        found = measured(move, here, far[0]) if measured else ratio
        change = end.gap - here.gap
        seen = Probe(found, change, predicted, norm(here.grad), heating)
        return jax.tree.map(lambda x: x.astype(blank.dtype), seen)

    return jax.lax.cond(probing, look, lambda: nothing)


def _moved(w: jax.Array, move: jax.Array) -> jax.Array:
    return (at_least_float32(w) + move).astype(w.dtype)


def _trapezoid(start: Params, here: Evaluation, end: Params, there: Evaluation) -> jax.Array:
    move = displacement(end, start)
    return (vdot(move, here.grad) + vdot(move, there.grad)) / 2


def _heating(params: Params, move: Params, mask: Params | None) -> jax.Array:
    """See `Probe`; a scalar."""
    spacing = apply_mask(mask, jax.tree.map(_spacing, params))

    def of_leaf(s, m):
        rounded = jnp.sum(jnp.square(s)) / 12
        return jnp.where(rounded > 0, rounded / jnp.sum(jnp.square(m)), 0).astype(widest(params))

    return jnp.stack(jax.tree.leaves(jax.tree.map(of_leaf, spacing, move))).max()


def _spacing(x: jax.Array) -> jax.Array:
    """The distance from each number to the next in its dtype; 0 at 0."""
    wide = at_least_float32(x)
    below = jnp.exp2(jnp.frexp(wide)[1].astype(wide.dtype) - 1)
    return jnp.where(wide == 0, 0, below * jnp.asarray(jnp.finfo(x.dtype).eps, wide.dtype))
