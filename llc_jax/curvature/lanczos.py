"""Lanczos tridiagonalisation of a symmetric linear map of which only products are known.

Symbols: A the map, d its dimension, k the number of iterations, T the tridiagonal matrix, Q the
orthonormal basis with A Qᵀ = Qᵀ T up to what the last step leaves over. Everything is written for
one start; batch it with `vmap`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Tridiagonal(NamedTuple):
    """T, and how far it goes. Leading axes may precede [k].

    Attributes:
      diagonal: [k].
      couplings: [k] between rows i - 1 and i; 0 at i = 0 and wherever a new start was needed.
      residual: norm of what the last step left over; 0 if Q spans an invariant subspace.
      valid: [k] false once Q spans the whole space and no further direction exists.
    """

    diagonal: jax.Array
    couplings: jax.Array
    residual: jax.Array
    valid: jax.Array


class RitzValues(NamedTuple):
    """Eigenvalues of T, in increasing order. Leading axes may precede [k].

    Attributes:
      values: [k]; past `count` they repeat the first diagonal entry, a value within the spectrum.
      weights: [k] squared first entries of the eigenvectors: the quadrature of the start; sum 1.
        With several `rows`, the sum over them.
      residuals: [k] |A q - θ q| of each Ritz pair: an eigenvalue of A lies within, but for
        rounding.
      count: how many values there are; below k if the space was exhausted.
    """

    values: jax.Array
    weights: jax.Array
    residuals: jax.Array
    count: jax.Array


def lanczos(
    product: Callable[[jax.Array], jax.Array],
    draw: Callable[[jax.Array], jax.Array],
    zero: jax.Array,
    num_iterations: int,
) -> tuple[Tridiagonal, jax.Array]:
    """Runs k iterations with full reorthogonalisation, each vector against all before it, twice.

    When the Krylov space is invariant (a breakdown: low rank, equal eigenvalues), it goes on from
    a fresh vector orthogonal to it, uncoupled from what came before. So equal eigenvalues are
    found as often as they occur, while the quadrature weights of the first start stay what they
    are.

    Args:
      product: v [d] -> A v [d].
      draw: i -> the random vector [d] that starts afresh at iteration i; i = 0 is the start.
      zero: zeros [d], whose dtype is that of the computation.
      num_iterations: k, static; memory is that of k vectors.

    Returns:
      (T, Q [k, d]), rows of Q orthonormal, and zero where not valid.

    Source: Golub and Van Loan 2013, Matrix Computations, section 10.3; Parlett 1998, The
    Symmetric Eigenvalue Problem, section 6.9 ("twice is enough").
    """
    epsilon = float(jnp.finfo(zero.dtype).eps)

    def orthogonal(vector, basis):
        return vector - (basis @ vector) @ basis

    def iteration(i, carry):
        basis, diagonal, couplings, valid, rest, scale = carry
        left = jnp.linalg.norm(rest)
        fresh = left <= 10 * epsilon * scale  # rounding of A v, not a direction
        before = jnp.where(fresh, draw(i), rest)
        vector = orthogonal(orthogonal(before, basis), basis)
        length = jnp.linalg.norm(vector)
        exists = length > 100 * epsilon * jnp.linalg.norm(before)
        vector = jnp.where(exists, vector / jnp.where(exists, length, 1.0), 0.0)
        basis = basis.at[i].set(vector)
        image = product(vector)
        rest = orthogonal(image, basis)
        return (
            basis,
            diagonal.at[i].set(jnp.vdot(vector, image)),
            couplings.at[i].set(jnp.where(fresh | ~exists, 0.0, length)),
            valid.at[i].set(exists),
            rest,
            jnp.maximum(scale, jnp.linalg.norm(image)),
        )

    row = jnp.zeros(num_iterations, zero.dtype)
    start = (jnp.zeros((num_iterations, zero.size), zero.dtype), row, row, row > 0, zero, row[0])
    basis, diagonal, couplings, valid, rest, scale = jax.lax.fori_loop(
        0, num_iterations, iteration, start
    )
    left = jnp.linalg.norm(orthogonal(rest, basis))
    residual = jnp.where(left <= 10 * epsilon * scale, 0.0, left)
    return Tridiagonal(diagonal, couplings, residual, valid), basis


def ritz_values(tridiagonal: Tridiagonal, rows: int = 1) -> RitzValues:
    """Eigenvalues of T; in float64 if T is on the host, else in its own precision.

    Args:
      tridiagonal: with any leading axes.
      rows: how many of the first entries of the eigenvectors the weights add up.
    """
    traced = isinstance(tridiagonal.diagonal, jax.core.Tracer)
    xp = jnp if traced else np
    diagonal, couplings, residual = (
        x if traced else np.asarray(x, np.float64) for x in tridiagonal[:3]
    )
    valid = xp.asarray(tridiagonal.valid)
    size = diagonal.shape[-1]
    # Rows that do not exist are uncoupled: a value beyond the spectrum sorts them to the end.
    bound = xp.max(xp.abs(diagonal), axis=-1) + 2 * xp.max(couplings, axis=-1)
    beyond = 2 * bound[..., None] + 1
    axes = (1,) * (diagonal.ndim - 1)
    identity = xp.eye(size, dtype=diagonal.dtype).reshape(*axes, size, size)
    below = xp.eye(size, k=-1, dtype=diagonal.dtype).reshape(*axes, size, size)
    lower = couplings[..., :, None] * below
    matrix = xp.where(valid, diagonal, beyond)[..., :, None] * identity
    matrix = matrix + lower + xp.swapaxes(lower, -1, -2)
    finite = xp.isfinite(matrix).all(axis=(-2, -1), keepdims=True)  # LAPACK may refuse others
    values, vectors = xp.linalg.eigh(xp.where(finite, matrix, identity))
    values = xp.where(finite[..., 0], values, xp.nan)
    count = xp.sum(valid, axis=-1)
    exists = xp.arange(size).reshape(*axes, size) < count[..., None]
    return RitzValues(
        values=xp.where(exists, values, diagonal[..., :1]),
        weights=xp.where(exists, (vectors[..., :rows, :] ** 2).sum(-2), 0.0),
        residuals=residual[..., None] * xp.abs(vectors[..., -1, :]),
        count=count,
    )
