"""What the overdamped samplers share: a preconditioned Langevin step and its Metropolis ratio."""

import jax
import jax.numpy as jnp

from llc_jax.trees import apply_mask, at_least_float32, standard_normal_like, vdot
from llc_jax.types import Evaluation, Params


def langevin_step(
    rng_key: jax.Array,
    params: Params,
    drift: Params,
    step_size: float | jax.Array,
    mask: Params | None,
    preconditioner: Params | None = None,
) -> Params:
    """`w - (ε/2) G drift + sqrt(ε G) ξ`; consumes `rng_key`.

    Args:
      rng_key: for ξ ~ N(0, 1), one number per coordinate.
      params: w.
      drift: like params, zero where masked.
      step_size: ε, scalar.
      mask: None, or 0/1 like params.
      preconditioner: G >= 0, like params; None for 1.
    """
    noise = apply_mask(mask, standard_normal_like(rng_key, drift))
    if preconditioner is None:
        preconditioner = jax.tree.map(lambda d: jnp.ones((), d.dtype), drift)

    def move(w, d, xi, g):
        step = jnp.asarray(step_size, d.dtype) * g
        return (at_least_float32(w) - step / 2 * d + jnp.sqrt(step) * xi).astype(w.dtype)

    return jax.tree.map(move, params, drift, noise, preconditioner)


def langevin_log_acceptance(
    step_size: float | jax.Array, move: Params, here: Evaluation, there: Evaluation
) -> jax.Array:
    """Log of the Metropolis ratio of an unpreconditioned step, before the cap at 0; a scalar.

    Args:
      step_size: ε, scalar.
      move: w' - w.
      here: evaluation at w.
      there: evaluation at w', on the same minibatch.

    The proposal densities enter as ½ Δ·(d + d') - (ε/8)(|d'|² - |d|²), which has no cancelling
    terms of the size of the dimension.

    Source: Roberts & Tweedie 1996, eq. 2, with step variance ε.
    """
    dtype = here.energy.dtype
    step = jnp.asarray(step_size, dtype)
    symmetric = (vdot(move, here.drift) + vdot(move, there.drift)).astype(dtype)
    curvature = (vdot(there.drift, there.drift) - vdot(here.drift, here.drift)).astype(dtype)
    return here.energy - there.energy + symmetric / 2 - step / 8 * curvature
