"""Smooth a curve over training with a Gaussian process, and give its slope in closed form.

A curve is a handful of noisy estimates, so everything here is dense linear algebra in float64 on
the host; one of more than 512 points is averaged in bins first. Time is `u = log(step + 1)`
throughout, and a slope is a change of the curve per unit of `u`, that is, per e-fold of training.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy import linalg

from llc_jax.inputs.scalars import shown
from llc_jax.stages.gaussian_process import CurvePosterior, conditioned, rbf
from llc_jax.stages.points import (
    NO_SCATTER,
    Points,
    Scatter,
    apart,
    averaged,
    checked,
    floats,
    informative,
    warn_of,
)

Kernel = Literal["fitted", "published"]

_LOG_2PI = float(np.log(2.0 * np.pi))

# Dense algebra costs the cube of the number of points: seconds a fit at this many. More are
# averaged in bins, where there are bins; the published kernel has none and is fitted only once.
_MOST_POINTS, _NUM_BINS = 512, 256
_MOST_PUBLISHED = 2000
_MOST_GRID = 1_000_000

# Heights above all neighbours, in units of the largest difference of other neighbours, from which
# a point is suspected to decide the curve, or does for certain. A suspect does if without it the
# curve moves by two standard deviations. The most in 2,300 recorded curves are 26, and 1.0.
_FAR, _FAR_FOR_CERTAIN, _SHIFT = 1.5, 30.0, 2.0


class SmoothedCurve(NamedTuple):
    """A smooth curve with error bars, for plotting.

    Attributes:
      steps: training steps, shape [G].
      mean: the curve, in units of the values, shape [G].
      std: its standard deviation, pointwise and without observation noise, shape [G].
      slope: derivative with respect to log(step + 1), shape [G].
      slope_std: its pointwise standard deviation, shape [G].
      length_scale: of the kernel, in units of log(step + 1).
      amplitude: prior standard deviation of the curve, in units of the values.
      noise: standard deviation of the fitted white noise beyond `stderr`.
      evidence: nats by which the curve explains the values better than a constant would.
    """

    steps: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    slope: np.ndarray
    slope_std: np.ndarray
    length_scale: float
    amplitude: float
    noise: float
    evidence: float


def smooth_curve(
    steps: ArrayLike,
    values: ArrayLike,
    stderr: ArrayLike | None = None,
    *,
    kernel: Kernel = "fitted",
    grid: ArrayLike | None = None,
) -> SmoothedCurve:
    """Smooths a curve and its slope, with error bars.

    Args:
      steps: training steps, whole numbers from 0, distinct, in any order, shape [N].
      values: the curve at these steps, shape [N]; points that are not finite are left out.
      stderr: standard errors of the values, shape [N], or None if unknown. See `fit_curve`.
      kernel: "fitted" or "published". See `fit_curve`.
      grid: steps at which to give the curve, shape [G]; by default `step_grid(steps)`.

    Returns:
      A `SmoothedCurve` on the grid.
    """
    posterior, grid_steps = fit_curve(steps, values, stderr, kernel=kernel)
    if grid is not None:
        numbers, grid_steps = floats("grid", grid), np.asarray(grid)
        bad = ~(np.isfinite(numbers) & (numbers >= 0))
        if numbers.ndim != 1 or numbers.size > _MOST_GRID or bad.any():
            raise ValueError(
                f"grid must be one axis of at most {_MOST_GRID:,} finite steps >= 0, got shape "
                f"{numbers.shape}{f' with {numbers[bad][0]}' if bad.any() else ''}: give fewer "
                "steps, or leave it out."
            )
    u = np.log1p(grid_steps)
    # Point by point, and some at a time: a covariance of all pairs would be the grid squared.
    pieces = [
        (*posterior.curve(part, joint=False), *posterior.slope(part, joint=False))
        for part in np.split(u, range(1000, u.size, 1000))
    ]
    mean, variance, slope, slope_variance = map(np.concatenate, zip(*pieces, strict=True))
    return SmoothedCurve(
        steps=grid_steps,
        mean=mean,
        std=_std(variance),
        slope=slope,
        slope_std=_std(slope_variance),
        length_scale=posterior.length_scale,
        amplitude=posterior.amplitude,
        noise=posterior.noise,
        evidence=posterior.evidence,
    )


def fit_curve(
    steps: ArrayLike, values: ArrayLike, stderr: ArrayLike | None = None, *, kernel: Kernel
) -> tuple[CurvePosterior, np.ndarray]:
    """Conditions a Gaussian process on a curve.

    Args:
      steps: training steps, whole numbers from 0, distinct, in any order, shape [N].
      values: the curve at these steps, shape [N]; points that are not finite are left out.
      stderr: standard errors, shape [N], or None. One that is nan (a single chain left) counts
        as the largest known. A point whose error is infinite, or above ten times the spread of
        the values, says nothing and is left out. Fitted white noise is added, so they may be too
        small.
      kernel: "fitted": amplitude, length scale and white noise maximise the restricted marginal
        likelihood. "published": the smoother behind the figures of arXiv:2402.02364, whose
        own fit stops at its bounds, amplitude^2 = 1000 and length scale 0.5, without a mean or
        noise. It runs through every point and ignores `stderr`: for comparison, not inference.

    More than 512 points are first averaged in at most 256 bins of equal width in
    log(step + 1), with their errors; how they scatter within bins counts for the noise.

    Returns:
      The posterior, and the steps of a grid for it, ascending, whole, from first to last.

    Warns:
      UserWarning: a point lies so far from its neighbours, and beyond its error, that it decides
        the curve by itself: without it, the curve moves by two standard deviations. It is kept.
    """
    if not isinstance(kernel, str) or kernel not in get_args(Kernel):
        raise ValueError(f"kernel must be one of {get_args(Kernel)}, got {shown(kernel)}.")
    points = checked(steps, values, stderr)
    if kernel == "published":
        if points.steps.size > _MOST_PUBLISHED:
            raise ValueError(
                f"kernel='published' runs through every point, at most {_MOST_PUBLISHED}, got "
                f"{points.steps.size}: thin the curve, or average it with kernel='fitted'."
            )
        points = informative(points._replace(errors=np.zeros(points.steps.size)))
        posterior, far = _published(points), apart(points, _FAR_FOR_CERTAIN)
    else:
        points = informative(points)
        posterior, far = _fitted(points), apart(points, _FAR)
        if far.any() and not _differ(posterior, _fitted(_rows(points, ~far))):
            far = apart(points, _FAR_FOR_CERTAIN)
    if far.any():
        warn_of(points, far)
    return posterior, step_grid(points.steps.astype(np.int64))


def _rows(points: Points, kept: np.ndarray) -> Points:
    return Points(*(column[kept] for column in points))


def _published(points: Points) -> CurvePosterior:
    # The variance is sklearn's default diagonal, needed for a Cholesky factor to exist.
    return conditioned(
        points, np.full(points.steps.size, 1e-10), 0.5, 1e3**0.5, 0.0, np.nan, centred=False
    )


def _fitted(points: Points) -> CurvePosterior:
    """Maximises the evidence, of means over bins if the points are many."""
    if points.steps.size <= _MOST_POINTS:
        fitted = _maximise_evidence(points, NO_SCATTER, points)
        return conditioned(points, points.errors**2 + fitted[2] ** 2, *fitted)
    white = None
    # Means need weights, weights the noise, and the noise a fit of means.
    for _ in range(2 if np.ptp(points.errors) else 1):
        means, scatter = averaged(points, _NUM_BINS, white)
        fitted = _maximise_evidence(means, scatter, points)
        white = fitted[2] ** 2
    return conditioned(means, means.errors**2 + white * means.share, *fitted)


def _differ(posterior: CurvePosterior, other: CurvePosterior) -> bool:
    """Whether a curve misses the points of another that fits them."""
    points = other.points
    mean, variance = other.curve(other.u, joint=False)
    expected = np.maximum(variance, 0.0) + points.errors**2 + other.noise**2 * points.share
    shift = posterior.curve(other.u, joint=False)[0] - mean
    return bool(np.mean(shift**2 / expected) > _SHIFT**2)


def step_grid(steps: ArrayLike, num: int = 400) -> np.ndarray:
    """Returns at most `num` whole steps from first to last, evenly spaced in log(step + 1)."""
    first, last = np.min(steps), np.max(steps)
    grid = np.rint(np.expm1(np.linspace(np.log1p(first), np.log1p(last), num))).astype(np.int64)
    return np.unique(np.clip(grid, first, last))


def _maximise_evidence(
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
        return optimize.minimize(_negative_evidence, start, args, jac=True, bounds=bounds)

    # The surface has a few basins (all is noise, all is signal): start in the best of a grid.
    lengths = np.maximum(shortest, span * np.array([0.05, 0.1, 0.2, 0.5, 1.0]))
    starts = [np.log([length, 1.0, noise]) for length in lengths for noise in (0.01, 0.1, 0.7)]
    starts.sort(key=lambda start: _negative_evidence(start, u, y, variance, share, scatter)[0])
    best = min((fit(start, log_bounds) for start in starts[:3]), key=lambda result: result.fun)
    # The constant curve is the same model with an amplitude too small to matter.
    constant_bounds = np.log([(span, span), (1e-6, 1e-6), (1e-3, 2.0)])
    constant = fit(np.log([span, 1e-6, 0.9]), constant_bounds)
    length_scale, amplitude, noise = np.exp(best.x)
    return length_scale, scale * amplitude, scale * noise, float(constant.fun - best.fun)


def _negative_evidence(
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


def _std(variance: np.ndarray) -> np.ndarray:
    """Returns standard deviations; rounding may leave a variance below zero."""
    return np.sqrt(np.maximum(variance, 0.0))
