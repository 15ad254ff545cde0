"""Lanczos tridiagonalisation of a symmetric linear map of which only products are known.

Symbols: A the map, d its dimension, k the number of iterations, T the tridiagonal matrix, Q the
orthonormal basis with A Qᵀ = Qᵀ T up to what the last step leaves over. Everything is written for
one start; batch it with `vmap`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax.trees import norm, vdot, widest

Array = jax.Array | np.ndarray


class Tridiagonal(NamedTuple):
    """T, and how far it goes. Leading axes may precede [k].

    Attributes:
      diagonal: [k].
      couplings: [k] between rows i - 1 and i; 0 at i = 0 and wherever a new start was needed.
      residual: norm of what the last step left over; 0 if Q spans an invariant subspace.
      valid: [k] false once Q spans the whole space and no further direction exists; without
        reorthogonalisation always true.
    """

    diagonal: Array
    couplings: Array
    residual: Array
    valid: Array

    def times(self, factor: jax.Array | float) -> "Tridiagonal":
        """Returns T of the map times `factor` >= 0, a scalar, in the dtype of T."""
        factor = jnp.asarray(factor, self.diagonal.dtype)
        return Tridiagonal(
            factor * self.diagonal, factor * self.couplings, factor * self.residual, self.valid
        )


class RitzValues(NamedTuple):
    """Eigenvalues of T, in increasing order. Leading axes may precede [k].

    Attributes:
      values: [k]; past `num_values` they repeat the first diagonal entry, a value within the
        spectrum.
      weights: [k] squared first entries of the eigenvectors: the quadrature of the start; sum 1.
        With several `rows`, the sum over them.
      residuals: [k] |A q - θ q| of each Ritz pair: an eigenvalue of A lies within, but for
        rounding.
      num_values: how many values there are; below k if the space was exhausted.
    """

    values: Array
    weights: Array
    residuals: Array
    num_values: Array


def lanczos(
    product: Callable[[Any], Any],
    draw: Callable[[jax.Array], Any],
    zero: Any,
    num_iterations: int,
    *,
    reorthogonalize: bool = True,
) -> tuple[Tridiagonal, jax.Array | None]:
    """Runs k iterations, with full reorthogonalisation or with none.

    With it, each vector is made orthogonal to all before it, twice. When the Krylov space is
    invariant (a breakdown: low rank, equal eigenvalues), it goes on from a fresh vector orthogonal
    to it, uncoupled from what came before. So equal eigenvalues are found as often as they occur,
    while the quadrature weights of the first start stay what they are.

    Without it, the memory is that of three vectors. Rounding then makes copies of eigenvalues that
    have converged, which does no harm to the largest. After a breakdown, T goes on with zeros.

    Args:
      product: v -> A v.
      draw: i -> the random vector that starts afresh at iteration i; i = 0 is the start.
      zero: a vector of zeros, which sets shapes and dtypes: an array [d] with
        reorthogonalisation, any pytree of floating-point arrays without it.
      num_iterations: k, static; with reorthogonalisation the memory is that of k vectors.
      reorthogonalize: static.

    Returns:
      (T, Q [k, d]), rows of Q orthonormal, and zero where not valid; without reorthogonalisation
      (T, None).

    Source: Golub and Van Loan 2013, Matrix Computations, sections 10.1 and 10.3; Parlett 1998,
    The Symmetric Eigenvalue Problem, section 6.9 ("twice is enough"); Paige 1972 for none.
    """
    step = _full_step if reorthogonalize else _short_step

    def iteration(carry, i):
        return step(product, draw, i, *carry)

    none = jnp.zeros((), widest(zero))
    if reorthogonalize:
        start = (jnp.zeros((num_iterations, zero.size), zero.dtype), none, zero)
    else:
        start = (zero, none, draw(jnp.zeros((), int)))
    (memory, scale, rest), (diagonal, couplings, valid) = jax.lax.scan(
        iteration, start, jnp.arange(num_iterations)
    )
    if not reorthogonalize:
        return Tridiagonal(diagonal, couplings, norm(rest), valid), None
    left = norm(_orthogonal(rest, memory))
    residual = jnp.where(left <= _rounding(10, zero) * scale, 0.0, left)
    return Tridiagonal(diagonal, couplings, residual, valid), memory


def _full_step(product, draw, i, basis, scale, rest):
    """Iteration i from all vectors before it; `scale` is the longest image so far."""
    fresh = norm(rest) <= _rounding(10, rest) * scale  # rounding of A v, not a direction
    before = jnp.where(fresh, draw(i), rest)
    vector = _orthogonal(_orthogonal(before, basis), basis)
    length = norm(vector)
    exists = length > _rounding(100, rest) * norm(before)
    vector = jnp.where(exists, vector / jnp.where(exists, length, 1.0), 0.0)
    basis = basis.at[i].set(vector)
    image = product(vector)
    row = vdot(vector, image), jnp.where(fresh | ~exists, 0.0, length), exists
    return (basis, jnp.maximum(scale, norm(image)), _orthogonal(image, basis)), row


def _short_step(product, _, i, before, scale, rest):
    """Iteration i from the one vector before it, on pytrees."""
    length = norm(rest)
    safe = jnp.where(length > 0, length, 1)
    vector = jax.tree.map(lambda x: x / safe.astype(x.dtype), rest)
    coupling = jnp.where(i == 0, jnp.zeros_like(length), length)
    image = product(vector)
    entry = vdot(vector, image)
    rest = jax.tree.map(
        lambda y, v, u: y - entry.astype(y.dtype) * v - coupling.astype(y.dtype) * u,
        image, vector, before,
    )  # fmt: skip
    return (vector, scale, rest), (entry, coupling, jnp.ones((), bool))


def _orthogonal(vector: jax.Array, basis: jax.Array) -> jax.Array:
    """What `vector` has outside of the span of the rows of `basis`."""
    return vector - (basis @ vector) @ basis


def _rounding(units: float, vector: jax.Array) -> float:
    """So many units of rounding of the dtype of `vector`."""
    return units * float(jnp.finfo(vector.dtype).eps)


def ritz_values(tridiagonal: Tridiagonal, rows: int = 1) -> RitzValues:
    """Eigenvalues of T; in float64 if T is on the host, else in its own precision.

    Args:
      tridiagonal: with any leading axes.
      rows: how many of the first entries of the eigenvectors the weights add up.
    """
    xp, t = _precise(tridiagonal)
    # Rows that do not exist are uncoupled: a value beyond the spectrum sorts them to the end.
    bound = xp.max(xp.abs(t.diagonal), axis=-1) + 2 * xp.max(t.couplings, axis=-1)
    diagonal = xp.where(t.valid, t.diagonal, 2 * bound[..., None] + 1)
    matrix, finite = _dense(xp, diagonal, t.couplings)
    identity = _identity(xp, diagonal).astype(diagonal.dtype)
    values, vectors = xp.linalg.eigh(xp.where(finite[..., None, None], matrix, identity))
    values = xp.where(finite[..., None], values, xp.nan)
    num_values = xp.sum(t.valid, axis=-1)
    places = xp.arange(diagonal.shape[-1]).reshape(*(1,) * num_values.ndim, -1)
    exists = places < num_values[..., None]
    return RitzValues(
        values=xp.where(exists, values, t.diagonal[..., :1]),
        weights=xp.where(exists, (vectors[..., :rows, :] ** 2).sum(-2), 0.0),
        residuals=t.residual[..., None] * xp.abs(vectors[..., -1, :]),
        num_values=num_values,
    )


def largest_eigenvalue(tridiagonal: Tridiagonal) -> np.ndarray:
    """Largest eigenvalue of T, on the host in float64, with the leading axes of T.

    0 if none is positive; nan if an entry is not finite. Never above that of A, rounding apart.
    """
    _, t = _precise(tridiagonal)
    matrix, finite = _dense(np, t.diagonal, t.couplings)
    top = np.linalg.eigvalsh(np.where(finite[..., None, None], matrix, 0.0))[..., -1]
    return np.where(finite, np.maximum(top, 0.0), np.nan)


def _precise(tridiagonal: Tridiagonal) -> tuple[Any, Tridiagonal]:
    """(numpy, T in float64), or (jax.numpy, T) while tracing."""
    if isinstance(tridiagonal.diagonal, jax.core.Tracer):
        return jnp, tridiagonal
    diagonal, couplings, residual = (np.asarray(x, np.float64) for x in tridiagonal[:3])
    return np, Tridiagonal(diagonal, couplings, residual, np.asarray(tridiagonal.valid))


def _dense(xp, diagonal, couplings) -> tuple[Any, Any]:
    """([..., k, k] the matrix, [...] whether it is finite: LAPACK may refuse others)."""
    lower = xp.where(_identity(xp, diagonal, 1), couplings[..., :, None], 0.0)
    matrix = xp.where(_identity(xp, diagonal), diagonal[..., :, None], lower)
    matrix = matrix + xp.swapaxes(lower, -1, -2)
    return matrix, xp.isfinite(matrix).all(axis=(-2, -1))


def _identity(xp, diagonal, below: int = 0) -> Any:
    """True on the diagonal or `below` it, with as many axes as the matrix (strict promotion)."""
    size = diagonal.shape[-1]
    return xp.eye(size, k=-below, dtype=bool).reshape(*(1,) * (diagonal.ndim - 1), size, size)
