"""A Gaussian process conditioned on a curve: the curve, its slope, and both their covariances."""

from typing import NamedTuple

import numpy as np
from scipy import linalg

from llc_jax.stages.points import Points


class CurvePosterior(NamedTuple):
    """A Gaussian process `y = m + f(u) + noise`, conditioned on a curve.

    `f` has covariance `amplitude^2 exp(-(u - u')^2 / (2 length_scale^2))`; under
    `kernel="fitted"` the constant `m` has a flat prior and is integrated out, under "published"
    it is 0.

    Attributes:
      points: the points, after those without information were left out and many were averaged.
      u: log times of the points, ascending, shape [N].
      factor: lower Cholesky factor of the covariance of the observations, shape [N, N].
      weights: covariance^-1 (values - offset), shape [N].
      offset: the mean `m`, in units of the values.
      ones: covariance^-1 1, shape [N]; zeros where the mean is known.
      precision: 1^T covariance^-1 1 of a flat-prior mean; infinite where the mean is known.
      length_scale: in units of `u`.
      amplitude: prior standard deviation of `f`, in units of the values.
      noise: standard deviation of the white noise of one point beyond `stderr`, in units of the
        values.
      evidence: log marginal likelihood (restricted: `m` integrated out) minus that of the best
        constant curve, in nats; nan where nothing was fitted.
    """

    points: Points
    u: np.ndarray
    factor: np.ndarray
    weights: np.ndarray
    offset: float
    ones: np.ndarray
    precision: float
    length_scale: float
    amplitude: float
    noise: float
    evidence: float

    def curve(self, u: np.ndarray, joint: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean [G] of the noiseless curve at times `u`, and its covariance [G, G].

        Unless `joint`, only the diagonal of the covariance, shape [G].
        """
        cross = self.amplitude**2 * rbf(u, self.u, self.length_scale)
        correlation = rbf(u, u, self.length_scale) if joint else np.ones(u.size)
        prior = self.amplitude**2 * correlation
        mean, cov = self._condition(cross, prior, basis=1.0)
        return self.offset + mean, cov

    def slope(self, u: np.ndarray, joint: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean [G] of the derivative at times `u`, and its covariance, as `curve` does.

        A derivative of a Gaussian process is one too: differentiate the kernel once for the
        covariance with the data, twice for the prior (Rasmussen and Williams 2006, eq. 9.1).
        """
        scale = self.length_scale
        to_data = (u[:, None] - self.u) / scale
        cross = -(self.amplitude**2 / scale) * to_data * rbf(u, self.u, scale)
        if joint:
            correlation = (1.0 - ((u[:, None] - u) / scale) ** 2) * rbf(u, u, scale)
        else:
            correlation = np.ones(u.size)
        prior = (self.amplitude / scale) ** 2 * correlation
        return self._condition(cross, prior, basis=0.0)

    def slope_samples(self, u: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
        """Draws the whole slope at once: joint posterior samples, shape [num_samples, G]."""
        mean, cov = self.slope(u)
        # The covariance of a smooth function on a fine grid is singular in float64: no Cholesky
        # factor exists. Its symmetric root does, and varies smoothly with the data.
        values, vectors = linalg.eigh(cov)
        root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
        return mean + np.random.default_rng(seed).standard_normal((num_samples, u.size)) @ root

    def _condition(
        self, cross: np.ndarray, prior: np.ndarray, basis: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gaussian conditioning, with the uncertainty of a fitted constant (op. cit., eq. 2.41).

        Args:
          cross: covariance of targets with observations, shape [G, N].
          prior: covariance of targets, shape [G, G], or its diagonal, shape [G].
          basis: what the linear operator makes of the constant 1: 1 for values, 0 for slopes.
        """
        half = linalg.solve_triangular(self.factor, cross.T, lower=True)
        rest = basis - cross @ self.ones
        mean = cross @ self.weights
        if prior.ndim == 1:
            return mean, prior - np.sum(half**2, axis=0) + rest**2 / self.precision
        return mean, prior - half.T @ half + np.outer(rest, rest) / self.precision


def conditioned(
    points: Points, variance: np.ndarray, length_scale: float, amplitude: float, noise: float,
    evidence: float, centred: bool = True,
) -> CurvePosterior:  # fmt: skip
    """Conditions a process on points.

    Args:
      points: of the curve.
      variance: of these observations, shape [N].
      length_scale: see `CurvePosterior`.
      amplitude: see `CurvePosterior`.
      noise: see `CurvePosterior`.
      evidence: see `CurvePosterior`.
      centred: whether a constant is integrated out.
    """
    u, y = np.log1p(points.steps), points.values
    cov = amplitude**2 * rbf(u, u, length_scale)
    cov[np.diag_indices_from(cov)] += variance
    factor = linalg.cholesky(cov, lower=True)
    if centred:
        ones = linalg.cho_solve((factor, True), np.ones(u.size))
        precision = float(ones.sum())
        # Around the plain mean, so that a large constant costs no digits.
        offset = float(y.mean() + ones @ (y - y.mean()) / precision)
    else:
        offset, ones, precision = 0.0, np.zeros(u.size), np.inf
    weights = linalg.cho_solve((factor, True), y - offset)
    return CurvePosterior(
        points, u, factor, weights, offset, ones, precision,
        length_scale, amplitude, noise, evidence,
    )  # fmt: skip


def rbf(a: np.ndarray, b: np.ndarray, length_scale: float) -> np.ndarray:
    """Returns exp(-(a - b)^2 / (2 length_scale^2)) for all pairs, shape [A, B]."""
    return np.exp(-0.5 * ((a[:, None] - b) / length_scale) ** 2)
