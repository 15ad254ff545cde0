"""Length scale, amplitude and white noise of a process: those that explain a curve best."""

import numpy as np
from numpy.typing import ArrayLike
from scipy import linalg

from llc_jax.stages.gaussian_process import rbf
from llc_jax.stages.points import NO_SCATTER, Points, Scatter

_LOG_2PI = float(np.log(2.0 * np.pi))


def maximise_evidence(
    points: Points, scatter: Scatter, all_points: Points
) -> tuple[float, float, float, float]:
    """Returns length scale, amplitude, white noise and evidence (see `CurvePosterior`).

    Args:
      points: the points of the process, means or not.
      scatter: around these means.
      all_points: the points before any were averaged.
    """
    u, y, variance = np.log1p(points.steps), points.values, points.errors**2
    span, share = u[-1] - u[0], points.share
    # In units of the spread of the values, so that their scale changes nothing but the scale.
    scale = float(np.std(all_points.values)) or 1.0
    y, variance = (y - y.mean()) / scale, variance / scale**2
    scatter = Scatter(scatter.freedom, scatter.squares / scale**2, scatter.variance / scale**2)
    # A length scale below the mean gap would let the curve chase single points. Where no error
    # bar says how much is noise, only neighbours within one length scale can: then two gaps.
    # Below a thirtieth of the span there would be more stages than anyone means by the word.
    gaps = 1.0 if variance.any() else 2.0
    shortest = span * max(gaps / (all_points.steps.size - 1), 1.0 / 30.0)
    log_bounds = np.log([(shortest, 2.0 * span), (1e-2, 1e2), (1e-3, 2.0)])

    from scipy import optimize  # half a second that `import llc_jax` need not spend

    def fit(start: np.ndarray, bounds: np.ndarray):
        args = (u, y, variance, share, scatter)
        return optimize.minimize(negative_evidence, start, args, jac=True, bounds=bounds)

    # The surface has a few basins (all is noise, all is signal): start in the best of a grid.
    lengths = np.maximum(shortest, span * np.array([0.05, 0.1, 0.2, 0.5, 1.0]))
    starts = [np.log([length, 1.0, noise]) for length in lengths for noise in (0.01, 0.1, 0.7)]
    starts.sort(key=lambda start: negative_evidence(start, u, y, variance, share, scatter)[0])
    best = min((fit(start, log_bounds) for start in starts[:3]), key=lambda result: result.fun)
    # The constant curve is the same model with an amplitude too small to matter.
    constant_bounds = np.log([(span, span), (1e-6, 1e-6), (1e-3, 2.0)])
    constant = fit(np.log([span, 1e-6, 0.9]), constant_bounds)
    length_scale, amplitude, noise = np.exp(best.x)
    return length_scale, scale * amplitude, scale * noise, float(constant.fun - best.fun)


def negative_evidence(
    theta: np.ndarray, u: np.ndarray, y: np.ndarray, variance: np.ndarray,
    share: ArrayLike = 1.0, scatter: Scatter = NO_SCATTER,
) -> tuple[float, np.ndarray]:  # fmt: skip
    """Returns minus the log restricted marginal likelihood, and its gradient.

    Args:
      theta: logs of length scale, amplitude and white noise, shape [3].
      u: times, shape [N].
      y: values, shape [N].
      variance: known observation variances, shape [N].
      share: of the white noise, shape [N] (see `Points`).
      scatter: of the points whose means these are, if they are means.

    With covariance C and projection P = C^-1 - C^-1 1 1^T C^-1 / (1^T C^-1 1), which removes
    the constant, the likelihood is -(y^T P y + log|C| + log 1^T C^-1 1 + (N - 1) log 2 pi) / 2
    and its gradient tr((P y y^T P - P) dC) / 2 (Rasmussen and Williams 2006, section 2.7).
    """
    length_scale, amplitude, noise = np.exp(theta)
    signal = amplitude**2 * rbf(u, u, length_scale)
    factor = linalg.cholesky(signal + np.diag(variance + noise**2 * share), lower=True)
    triangle = linalg.lapack.dpotri(factor, lower=True)[0]
    inverse = np.tril(triangle) + np.tril(triangle, -1).T
    ones = inverse.sum(axis=1)
    projection = inverse - np.outer(ones, ones) / ones.sum()
    weights = projection @ y
    log_det = 2.0 * np.log(np.diag(factor)).sum() + np.log(ones.sum())
    value = 0.5 * (y @ weights + log_det + (u.size - 1) * _LOG_2PI)
    inner = np.outer(weights, weights) - projection
    squared = ((u[:, None] - u) / length_scale) ** 2
    by_length_scale = 0.5 * np.sum(inner * signal * squared)
    by_amplitude = np.sum(inner * signal)
    by_noise = noise**2 * np.sum(share * inner.diagonal())
    around = scatter.variance + noise**2
    ratio = scatter.squares / around
    value += 0.5 * np.sum(scatter.freedom * (_LOG_2PI + np.log(around)) + ratio)
    by_noise -= noise**2 * np.sum((scatter.freedom - ratio) / around)
    return value, -np.array([by_length_scale, by_amplitude, by_noise])
