"""The stability number of a sampler: the largest eigenvalue of ε G^½ (nbeta H + localization) G^½.

Langevin samplers are unstable on a quadratic where it passes 4, whatever the trace looks like,
and their step bias is about a quarter of it in the stiffest direction. It is measured where the
chain is, not at the anchor: flat directions wander off, and the curvature differs there.
"""

import jax
import jax.numpy as jnp

from llc_jax.curvature.lanczos import Tridiagonal, lanczos, largest_eigenvalue
from llc_jax.samplers import base
from llc_jax.trees import apply_mask, at_least_float32, standard_normal_like
from llc_jax.types import Evaluation, Params, Sampler

__all__ = ["Tridiagonal", "largest_eigenvalue", "stability_matrix"]

NUM_ITERATIONS = 12  # Hessian-vector products: outliers of a spectrum stand within a few percent


def stability_matrix(
    rng_key: jax.Array, sampler: Sampler, state, evaluate, mask: Params | None = None
) -> Tridiagonal:
    """Returns a matrix whose largest eigenvalue is the stability number; consumes `rng_key`.

    The eigenvalue is left to the host: to find it within a program takes as long to compile as
    much of a sampler, and a library call per device on the host's own threads can deadlock.

    Args:
      rng_key: for the start of the iteration.
      sampler: with a step size, see `llc_jax.samplers.base`.
      state: of the sampler, with a field `params`.
      evaluate: params -> `Evaluation`, on one minibatch.
      mask: None, or 0/1 like params.

    Returns:
      A `Tridiagonal`; a lower bound that is tight where the top of the spectrum stands apart.
    """
    params = state.params
    scale = jax.tree.map(lambda w: jnp.ones((), at_least_float32(w).dtype), params)
    if (preconditioner := base.preconditioner(sampler)) is not None:
        scale = jax.tree.map(jnp.sqrt, preconditioner(state))

    def drift(w) -> Params:
        here: Evaluation = evaluate(w)
        return here.drift

    def matvec(v):
        v = jax.tree.map(jnp.multiply, scale, apply_mask(mask, v))
        tangent = jax.tree.map(lambda x, w: x.astype(w.dtype), v, params)
        _, image = jax.jvp(drift, (params,), (tangent,))
        return jax.tree.map(jnp.multiply, scale, image)

    wide = jax.tree.map(at_least_float32, params)
    found, _ = lanczos(
        matvec,
        # One product: it takes the start out of the null space, masked coordinates included.
        lambda _: matvec(standard_normal_like(rng_key, wide)),
        jax.tree.map(jnp.zeros_like, wide),
        NUM_ITERATIONS,
        reorthogonalize=False,
    )
    return found.times(base.sgld_step_size(sampler))
