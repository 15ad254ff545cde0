"""Smooth a curve over training with a Gaussian process, and give its slope in closed form.

A curve is a handful of noisy estimates, so everything here is dense linear algebra in float64 on
the host. Time is `u = log(step + 1)` throughout, and a slope is a change of the curve per unit
of `u`, that is, per e-fold of training.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy import linalg

Kernel = Literal["fitted", "published"]

_LOG_2PI = float(np.log(2.0 * np.pi))


class CurvePosterior(NamedTuple):
    """A Gaussian process `y = m + f(u) + noise`, conditioned on a curve.

    `f` has covariance `amplitude^2 exp(-(u - u')^2 / (2 length_scale^2))`; under
    `kernel="fitted"` the constant `m` has a flat prior and is integrated out, under "published"
    it is 0.

    Attributes:
      u: log times of the points, ascending, shape [N].
      factor: lower Cholesky factor of the covariance of the observations, shape [N, N].
      weights: covariance^-1 (values - offset), shape [N].
      offset: the mean `m`, in units of the values.
      ones: covariance^-1 1, shape [N]; zeros where the mean is known.
      precision: 1^T covariance^-1 1 of a flat-prior mean; infinite where the mean is known.
      length_scale: in units of `u`.
      amplitude: prior standard deviation of `f`, in units of the values.
      noise: standard deviation of the white noise beyond `stderr`, in units of the values.
      evidence: log marginal likelihood (restricted: `m` integrated out) minus that of the best
        constant curve, in nats; nan where nothing was fitted.
    """

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

    def curve(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean [G] and the covariance [G, G] of the noiseless curve at times `u`."""
        cross = self.amplitude**2 * _rbf(u, self.u, self.length_scale)
        prior = self.amplitude**2 * _rbf(u, u, self.length_scale)
        mean, cov = self._condition(cross, prior, basis=1.0)
        return self.offset + mean, cov

    def slope(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean [G] and the covariance [G, G] of the curve's derivative at times `u`.

        A derivative of a Gaussian process is one too: differentiate the kernel once for the
        covariance with the data, twice for the prior (Rasmussen and Williams 2006, eq. 9.1).
        """
        scale = self.length_scale
        to_data, to_grid = (u[:, None] - self.u) / scale, (u[:, None] - u) / scale
        cross = -(self.amplitude**2 / scale) * to_data * _rbf(u, self.u, scale)
        prior = (self.amplitude / scale) ** 2 * (1.0 - to_grid**2) * _rbf(u, u, scale)
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
          prior: covariance of targets, shape [G, G].
          basis: what the linear operator makes of the constant 1: 1 for values, 0 for slopes.
        """
        half = linalg.solve_triangular(self.factor, cross.T, lower=True)
        rest = basis - cross @ self.ones
        return cross @ self.weights, prior - half.T @ half + np.outer(rest, rest) / self.precision


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
        grid_steps = np.asarray(grid)
        if grid_steps.ndim != 1 or not np.all(np.isfinite(grid_steps) & (grid_steps >= 0)):
            raise ValueError(f"grid must be one axis of finite steps >= 0, got {grid!r}.")
    u = np.log1p(grid_steps)
    (mean, cov), (slope, slope_cov) = posterior.curve(u), posterior.slope(u)
    return SmoothedCurve(
        steps=grid_steps,
        mean=mean,
        std=_std(cov),
        slope=slope,
        slope_std=_std(slope_cov),
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
      stderr: standard errors, shape [N], or None. One that is not finite (a single chain left)
        counts as the largest known. Fitted white noise is added, so they may be too small.
      kernel: "fitted": amplitude, length scale and white noise maximise the restricted marginal
        likelihood. "published": the smoother behind the figures of arXiv:2402.02364, whose
        own fit stops at its bounds, amplitude^2 = 1000 and length scale 0.5, without a mean or
        noise. It runs through every point and ignores `stderr`: for comparison, not inference.

    Returns:
      The posterior, and the steps of a grid for it, ascending, whole, from first to last.
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel must be one of {get_args(Kernel)}, got {kernel!r}.")
    kept, y, variance = _validate(steps, values, stderr)
    u = np.log1p(kept)
    if kernel == "published":
        # sklearn's default diagonal, needed for a Cholesky factor to exist.
        variance = np.full(u.size, 1e-10)
        length_scale, amplitude, noise, evidence = 0.5, 1e3**0.5, 0.0, np.nan
    else:
        length_scale, amplitude, noise, evidence = _maximise_evidence(u, y, variance)
        variance = variance + noise**2
    cov = amplitude**2 * _rbf(u, u, length_scale)
    cov[np.diag_indices_from(cov)] += variance
    factor = linalg.cholesky(cov, lower=True)
    if kernel == "published":
        offset, ones, precision = 0.0, np.zeros(u.size), np.inf
    else:
        ones = linalg.cho_solve((factor, True), np.ones(u.size))
        precision = float(ones.sum())
        # Around the plain mean, so that a large constant costs no digits.
        offset = float(y.mean() + ones @ (y - y.mean()) / precision)
    weights = linalg.cho_solve((factor, True), y - offset)
    posterior = CurvePosterior(
        u, factor, weights, offset, ones, precision, length_scale, amplitude, noise, evidence
    )
    return posterior, step_grid(kept)


def step_grid(steps: ArrayLike, num: int = 400) -> np.ndarray:
    """Returns at most `num` whole steps from first to last, evenly spaced in log(step + 1)."""
    first, last = np.min(steps), np.max(steps)
    grid = np.rint(np.expm1(np.linspace(np.log1p(first), np.log1p(last), num))).astype(np.int64)
    return np.unique(np.clip(grid, first, last))


def _validate(
    steps: ArrayLike, values: ArrayLike, stderr: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns steps (int64), values and error variances of the finite points, in step order."""
    steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    errors = np.zeros_like(values) if stderr is None else np.array(stderr, np.float64)
    if steps.ndim != 1 or not steps.shape == values.shape == errors.shape:
        raise ValueError(
            "steps, values and stderr must be of one axis and of equal length, got shapes "
            f"{steps.shape}, {values.shape} and {errors.shape}: give one value per checkpoint."
        )
    if not np.all(np.isfinite(steps) & (steps >= 0) & (steps == np.rint(steps))):
        bad = steps[~(np.isfinite(steps) & (steps >= 0) & (steps == np.rint(steps)))][0]
        raise ValueError(f"steps must be whole numbers >= 0, got {bad}: count updates from 0.")
    if np.any(errors < 0):
        raise ValueError(
            f"stderr must be >= 0, got {errors[errors < 0][0]}: pass None where it is unknown."
        )
    distinct, counts = np.unique(steps, return_counts=True)
    if np.any(counts > 1):
        raise ValueError(
            f"steps must be distinct, got {distinct[counts > 1][0]:.0f} more than once: "
            "average repeated estimates of one checkpoint, or smooth each run by itself."
        )
    finite = np.isfinite(values)
    if finite.sum() < 4:
        raise ValueError(
            f"need at least 4 checkpoints with a finite value, got {finite.sum()} of {steps.size}: "
            "add checkpoints, or find out why chains died."
        )
    order = np.argsort(steps[finite])
    errors = errors[finite][order]
    known = np.isfinite(errors)
    errors[~known] = errors[known].max(initial=0.0)
    return steps[finite][order].astype(np.int64), values[finite][order], errors**2


def _maximise_evidence(
    u: np.ndarray, y: np.ndarray, variance: np.ndarray
) -> tuple[float, float, float, float]:
    """Returns length scale, amplitude, white noise and evidence (see `CurvePosterior`)."""
    span = u[-1] - u[0]
    # In units of the spread of the values, so that their scale changes nothing but the scale.
    scale = float(np.std(y)) or 1.0
    y, variance = (y - y.mean()) / scale, variance / scale**2
    # A length scale below the mean gap would let the curve chase single points. Where no error
    # bar says how much is noise, only neighbours within one length scale can: then two gaps.
    # Below a thirtieth of the span there would be more stages than anyone means by the word.
    gaps = 1.0 if variance.any() else 2.0
    shortest = span * max(gaps / (u.size - 1), 1.0 / 30.0)
    log_bounds = np.log([(shortest, 2.0 * span), (1e-2, 1e2), (1e-3, 2.0)])

    from scipy import optimize  # half a second that `import llc_jax` need not spend

    def fit(start: np.ndarray, bounds: np.ndarray):
        args = (u, y, variance)
        return optimize.minimize(_negative_evidence, start, args, jac=True, bounds=bounds)

    # The surface has a few basins (all is noise, all is signal): start in the best of a grid.
    lengths = np.maximum(shortest, span * np.array([0.05, 0.1, 0.2, 0.5, 1.0]))
    starts = [np.log([length, 1.0, noise]) for length in lengths for noise in (0.01, 0.1, 0.7)]
    starts.sort(key=lambda start: _negative_evidence(start, u, y, variance)[0])
    best = min((fit(start, log_bounds) for start in starts[:3]), key=lambda result: result.fun)
    # The constant curve is the same model with an amplitude too small to matter.
    constant_bounds = np.log([(span, span), (1e-6, 1e-6), (1e-3, 2.0)])
    constant = fit(np.log([span, 1e-6, 0.9]), constant_bounds)
    length_scale, amplitude, noise = np.exp(best.x)
    return length_scale, scale * amplitude, scale * noise, float(constant.fun - best.fun)


def _negative_evidence(
    theta: np.ndarray, u: np.ndarray, y: np.ndarray, variance: np.ndarray
) -> tuple[float, np.ndarray]:
    """Returns minus the log restricted marginal likelihood, and its gradient.

    Args:
      theta: logs of length scale, amplitude and white noise, shape [3].
      u: times, shape [N].
      y: values, shape [N].
      variance: known observation variances, shape [N].

    With covariance C and projection P = C^-1 - C^-1 1 1^T C^-1 / (1^T C^-1 1), which removes
    the constant, the likelihood is -(y^T P y + log|C| + log 1^T C^-1 1 + (N - 1) log 2 pi) / 2
    and its gradient tr((P y y^T P - P) dC) / 2 (Rasmussen and Williams 2006, section 2.7).
    """
    length_scale, amplitude, noise = np.exp(theta)
    signal = amplitude**2 * _rbf(u, u, length_scale)
    factor = linalg.cholesky(signal + np.diag(variance + noise**2), lower=True)
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
    by_noise = noise**2 * np.trace(inner)
    return value, -np.array([by_length_scale, by_amplitude, by_noise])


def _rbf(a: np.ndarray, b: np.ndarray, length_scale: float) -> np.ndarray:
    """Returns exp(-(a - b)^2 / (2 length_scale^2)) for all pairs, shape [A, B]."""
    return np.exp(-0.5 * ((a[:, None] - b) / length_scale) ** 2)


def _std(cov: np.ndarray) -> np.ndarray:
    """Returns the standard deviations of a covariance; rounding may leave it below zero."""
    return np.sqrt(np.maximum(np.diag(cov), 0.0))
