"""What is read off Ritz values and probes: eigenvalues, densities, traces, with their errors.

Everything takes arrays of a traced function, and stays in their precision, or arrays of the host,
and is then done in float64.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax.curvature.lanczos import Array, RitzValues, Tridiagonal, ritz_values
from llc_jax.inputs import checks


class ProbeMean(NamedTuple):
    """A Monte-Carlo mean and its standard error over the probes."""

    mean: Any
    stderr: Any


class Eigenvalues:
    """Both ends of the spectrum. As an array or a sequence it is its `largest`.

    Attributes:
      largest: [m] in decreasing order; nan for those that do not exist.
      smallest: [m] in increasing order, the most negative first.
      largest_residuals: [m] |H q - θ q| for each: an eigenvalue lies within it, rounding apart
        (float32: about 1e-6 of the largest absolute one).
      smallest_residuals: [m] the same.
    """

    def __init__(self, largest, smallest, largest_residuals, smallest_residuals):
        self.largest, self.smallest = largest, smallest
        self.largest_residuals, self.smallest_residuals = largest_residuals, smallest_residuals

    def __array__(self, dtype=None, copy=None):
        return np.array(self.largest, dtype)

    def __jax_array__(self):
        return jnp.asarray(self.largest)

    def __getitem__(self, index):
        return self.largest[index]

    def __len__(self) -> int:
        return len(self.largest)

    def __repr__(self) -> str:
        return f"Eigenvalues(largest={self.largest}, smallest={self.smallest})"


jax.tree_util.register_pytree_node(
    Eigenvalues, lambda e: (tuple(vars(e).values()), None), lambda _, c: Eigenvalues(*c)
)


class SpectralDensity(NamedTuple):
    """Distribution of the eigenvalues as seen from P random starts.

    Attributes:
      nodes: [P, k] Ritz values; those of the deflated part first, the same for every start.
      weights: [P, k] their share of the eigenvalues; the sum over k is 1.
      size: d, number of weights; an array where a traced mask decides.
      grid: [G] where the smooth density is given.
      density: [G] mean over starts, per unit of eigenvalue; its integral is 1.
    """

    nodes: Array
    weights: Array
    size: Array | int
    grid: Array
    density: Array

    def trace_of(self, function: Callable[[Any], Any]) -> ProbeMean:
        """Estimates tr f(H) for an elementwise `function` f of the eigenvalues.

        Unbiased if the iterations resolve f (polynomials of degree 2k - 1 exactly); the standard
        error, over starts, does not cover what they do not.
        """
        return mean(self.size * (self.weights * function(self.nodes)).sum(-1))

    def gaussian_llc(
        self, *, nbeta: float, localization: float, positive_part: bool = False
    ) -> ProbeMean:
        """The same as `curvature.gaussian_llc`, for any number of settings from one density."""
        check_temperature(nbeta, localization)
        xp = _namespace(self.nodes)
        nodes = xp.maximum(self.nodes, 0.0) if positive_part else self.nodes
        precision = nbeta * nodes + localization
        safe = xp.where(precision > 0, precision, 1.0)
        found = self._replace(nodes=nodes).trace_of(lambda h: nbeta * h / (2 * safe))
        return ProbeMean(*(xp.where((precision > 0).all(), x, xp.nan)[()] for x in found))


def combine(
    deflated: Tridiagonal | None,
    probes: Tridiagonal,
    size: Array | int,
    num_deflated: int,
    num_points: int = 2,
    width: float | None = None,
) -> SpectralDensity:
    """Puts the exact part and the random part of a density together; see `spectral_density`.

    Args:
      deflated: T of the run whose first `num_deflated` vectors Q are left out of the probes.
      probes: T of the P probes, leading axis [P].
      size: d.
      num_deflated: rows of Q.
      num_points: points of the grid.
      width: of the smoothing.
    """
    xp = _namespace(probes.diagonal)
    ritz = ritz_values(probes)
    nodes, weights = ritz.values, ritz.weights
    if deflated is not None:
        exact = ritz_values(deflated, num_deflated)
        shape = (nodes.shape[0], exact.values.size)
        rest = size - exact.weights.sum()
        nodes = xp.concatenate([xp.broadcast_to(exact.values[None], shape), nodes], axis=1)
        weights = xp.concatenate(
            [xp.broadcast_to(exact.weights[None], shape) / size, weights * (rest / size)], axis=1
        )
    low, high = nodes.min(), nodes.max()
    if width is None:
        # All eigenvalues equal: any width will do that is not lost in rounding.
        width = xp.where(high > low, (high - low) / 100, xp.maximum(xp.abs(high), 1.0) / 100)
    grid = xp.linspace(low - 3 * width, high + 3 * width, num_points)
    distance = (grid[:, None, None] - nodes[None]) / width
    bumps = xp.exp(-(distance**2) / 2) / (width * math.sqrt(2 * math.pi))
    density = (weights[None] * bumps).sum(-1).mean(-1)
    return SpectralDensity(nodes, weights, size, grid, density)


def ends(ritz: RitzValues, number: int) -> Eigenvalues:
    """Both ends of the Ritz values [k] of one run."""
    xp = _namespace(ritz.values)

    def choose(order):
        exists = (order >= 0) & (order < ritz.num_values)
        order = xp.clip(order, 0, ritz.values.size - 1)
        return (xp.where(exists, x[order], xp.nan) for x in (ritz.values, ritz.residuals))

    largest, largest_residuals = choose(ritz.num_values - 1 - xp.arange(number))
    smallest, smallest_residuals = choose(xp.arange(number))
    return Eigenvalues(largest, smallest, largest_residuals, smallest_residuals)


def mean(values: Array) -> ProbeMean:
    """The mean of [P] independent values and its standard error."""
    xp = _namespace(values)
    precise = values if xp is jnp else np.asarray(values, np.float64)
    return ProbeMean(precise.mean(), precise.std(ddof=1) / math.sqrt(values.size))


def check_temperature(nbeta: float, localization: float) -> None:
    """Checks nbeta >= 0 and localization > 0, unless they are traced."""
    for name, value in (("nbeta", nbeta), ("localization", localization)):
        if not isinstance(value, jax.core.Tracer):
            checks.nonnegative(name, value)
    if not isinstance(localization, jax.core.Tracer) and localization == 0:
        raise ValueError(
            "localization=0: the value would then be half the number of eigenvalues that are not"
            " exactly 0, which is a matter of rounding; give the localization of the estimate."
        )


def _namespace(array):
    return jnp if isinstance(array, jax.core.Tracer) else np
