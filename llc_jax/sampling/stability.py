"""The stability number of a sampler: the largest eigenvalue of ε G^½ (nbeta H + localization) G^½.

Langevin samplers are unstable on a quadratic where it passes 4, whatever the trace looks like,
and their step bias is about a quarter of it in the stiffest direction. It is measured where the
chain is, not at the anchor: flat directions wander off, and there the curvature is another one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax.trees import apply_mask, at_least_float32, norm, standard_normal_like, vdot, widest
from llc_jax.types import Evaluation, Params, Sampler

NUM_ITERATIONS = 12  # Hessian-vector products: outliers of a spectrum stand within a few percent


class Tridiagonal(NamedTuple):
    """A small symmetric matrix that has nearly the largest eigenvalue of a large operator.

    Its eigenvalues are for the host: finding them within a program takes as long to compile as
    much of a sampler, and a library call per device on the host's own threads can deadlock.

    Attributes:
      diagonal: [..., k], at least float32.
      off_diagonal: [..., k - 1], likewise.
    """

    diagonal: jax.Array
    off_diagonal: jax.Array


def tridiagonal(rng_key: jax.Array, matvec, params: Params, num_iterations: int) -> Tridiagonal:
    """Lanczos without a stored basis; consumes `rng_key`.

    Rounding makes copies of converged eigenvalues, which does no harm to the largest, and the
    memory is that of three vectors.

    Args:
      rng_key: for the start.
      matvec: pytree like params -> like params, at least float32.
      params: gives shapes.
      num_iterations: products with the operator, static; one more for the start.

    Source: Paige 1972; Golub & Van Loan, Matrix Computations, section 10.1.
    """
    wide = jax.tree.map(at_least_float32, params)

    def unit(v):
        length = norm(v)
        safe = jnp.where(length > 0, length, 1)
        return length, jax.tree.map(lambda x: x / safe.astype(x.dtype), v)

    # One product first: it takes the start out of the null space, masked coordinates included.
    _, start = unit(matvec(standard_normal_like(rng_key, wide)))

    def iterate(carry, _):
        before, now, beta = carry
        image = matvec(now)
        alpha = vdot(now, image)
        rest = jax.tree.map(
            lambda y, v, u: y - alpha.astype(y.dtype) * v - beta.astype(y.dtype) * u,
            image, now, before,
        )  # fmt: skip
        length, following = unit(rest)
        return (now, following, length), (alpha, length)

    zero = jax.tree.map(jnp.zeros_like, start)
    none = jnp.zeros((), widest(start))
    _, (alphas, betas) = jax.lax.scan(iterate, (zero, start, none), length=num_iterations)
    return Tridiagonal(alphas, betas[:-1])


def largest_eigenvalue(matrix: Tridiagonal) -> np.ndarray:
    """Largest eigenvalue of each of a stack of matrices, on the host, float64 [...].

    0 if none is positive; nan if a matrix is not finite. From below that of the operator.
    """
    diagonal, off = (np.asarray(x, np.float64) for x in matrix)
    k = diagonal.shape[-1]
    dense = np.zeros((*diagonal.shape, k))
    dense[..., np.arange(k), np.arange(k)] = diagonal
    dense[..., np.arange(1, k), np.arange(k - 1)] = off  # eigvalsh reads the lower triangle
    finite = np.isfinite(dense).all(axis=(-2, -1))
    top = np.linalg.eigvalsh(np.where(finite[..., None, None], dense, 0.0))[..., -1]
    return np.where(finite, np.maximum(top, 0.0), np.nan)


def stability_matrix(
    rng_key: jax.Array, sampler: Sampler, state, evaluate, mask: Params | None = None
) -> Tridiagonal:
    """Returns a matrix whose largest eigenvalue is the stability number; consumes `rng_key`.

    Args:
      rng_key: for the start of the iteration.
      sampler: with a field `step_size`, and `preconditioner(state)` if it has one.
      state: of the sampler, with a field `params`.
      evaluate: params -> `Evaluation`, on one minibatch.
      mask: None, or 0/1 like params.

    Returns:
      A `Tridiagonal`; a lower bound that is tight where the top of the spectrum stands apart.
    """
    params = state.params
    scale = jax.tree.map(lambda w: jnp.ones((), at_least_float32(w).dtype), params)
    if hasattr(sampler, "preconditioner"):
        scale = jax.tree.map(jnp.sqrt, sampler.preconditioner(state))

    def drift(w) -> Params:
        here: Evaluation = evaluate(w)
        return here.drift

    def matvec(v):
        v = jax.tree.map(jnp.multiply, scale, apply_mask(mask, v))
        tangent = jax.tree.map(lambda x, w: x.astype(w.dtype), v, params)
        _, image = jax.jvp(drift, (params,), (tangent,))
        return jax.tree.map(jnp.multiply, scale, image)

    found = tridiagonal(rng_key, matvec, params, NUM_ITERATIONS)
    return jax.tree.map(lambda x: jnp.asarray(sampler.step_size, x.dtype) * x, found)
