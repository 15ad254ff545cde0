"""Smooth a curve over training with a Gaussian process, and give its slope in closed form.

A curve is a handful of noisy estimates, so everything here is dense linear algebra in float64 on
the host; one of more than 512 points is averaged in bins first. Time is `u = log(step + 1)`
throughout, and a slope is a change of the curve per unit of `u`, that is, per e-fold of training.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike

from llc_jax.inputs.scalars import shown
from llc_jax.stages.evidence import maximise_evidence
from llc_jax.stages.gaussian_process import CurvePosterior, conditioned
from llc_jax.stages.points import (
    NO_SCATTER,
    Points,
    apart,
    averaged,
    checked,
    floats,
    informative,
    warn_of,
)

Kernel = Literal["fitted", "published"]

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
        fitted = maximise_evidence(points, NO_SCATTER, points)
        return conditioned(points, points.errors**2 + fitted[2] ** 2, *fitted)
    white = None
    # Means need weights, weights the noise, and the noise a fit of means.
    for _ in range(2 if np.ptp(points.errors) else 1):
        means, scatter = averaged(points, _NUM_BINS, white)
        fitted = maximise_evidence(means, scatter, points)
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


def _std(variance: np.ndarray) -> np.ndarray:
    """Returns standard deviations; rounding may leave a variance below zero."""
    return np.sqrt(np.maximum(variance, 0.0))
