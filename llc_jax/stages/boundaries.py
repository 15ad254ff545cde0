"""Find the stages of a curve over training, and how sure each boundary is.

A boundary is where the curve turns (its slope changes sign) or pauses (its slope dips between
two movements in the same direction), after the rule of arXiv:2402.02364 that boundaries are zeros
of d llc / d log t. There, candidates were picked by hand; here, each is a statement about the
posterior distribution of the slope, kept if the data make it probable.
"""

import itertools
import statistics
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from llc_jax.inputs.scalars import at_least, number, shown
from llc_jax.stages.points import Points
from llc_jax.stages.smoothing import CurvePosterior, Kernel, fit_curve

# Nats a smooth curve must gain over a constant. The gain has three fitted numbers against one;
# on pure noise it exceeds 3 about once in a hundred curves.
_MIN_EVIDENCE = 3.0
# Of slopes at up to 400 steps each: 320 MB.
_MOST_SAMPLES = 100_000


class Stage(NamedTuple):
    """A stretch of training between two boundaries; the stages of a curve tile its steps.

    Attributes:
      start: first training step.
      end: last training step, and the `start` of the next stage.
      kind: "rise", "fall", or "flat" where `delta` is within its uncertainty.
      delta: change of the smoothed curve over the stage, in units of the values.
      delta_stderr: its posterior standard deviation.
      slope: `delta` per unit of log(step + 1).
      confidence: posterior probability of the boundary at `end`; nan for the last stage, which
        ends with the data.
      end_interval: steps (low, high) that hold the central 68 % of the posterior of that
        boundary, rounded outwards to grid steps; (`end`, `end`) for the last stage.
    """

    start: int
    end: int
    kind: Literal["rise", "fall", "flat"]
    delta: float
    delta_stderr: float
    slope: float
    confidence: float
    end_interval: tuple[int, int]


class _Boundary(NamedTuple):
    """A boundary and the ends of its interval as grid indices, and its probability."""

    low: int
    place: int
    high: int
    confidence: float

    def interval(self, grid: np.ndarray) -> tuple[int, int]:
        """The steps at `low` and `high`."""
        return int(grid[self.low]), int(grid[self.high])


def find_stages(
    steps: ArrayLike,
    values: ArrayLike,
    stderr: ArrayLike | None = None,
    *,
    kernel: Kernel = "fitted",
    confidence: float = 0.95,
    dip: float = 0.5,
    num_samples: int = 2000,
    seed: int = 0,
) -> list[Stage]:
    """Cuts a curve into stages.

    A movement is a local peak of |slope| at which a simultaneous credible band of the slope
    excludes zero. Between two neighbouring movements lies a boundary if, with the stated
    probability, either their signs differ or the slope between them falls below `dip` times both.
    Of a pair that fails, the weaker movement is dropped, least probable pair first, until every
    remaining pair passes. So is a movement that no two points in or next to its stage show: where
    points are sparse, a smooth curve overshoots between them. A plateau before the first or after
    the last movement makes no stage of its own: see `find_plateaus`.

    Error rates at the defaults, with Gaussian noise and log-spaced steps (the slow tests in
    tests/test_stages.py repeat a part of these measurements): noise alone gives a boundary in at
    most 1 % of curves of 6 to 100 points, and with `stderr` in none of 3000. A single rise is cut
    in two in at most 2 % with `stderr` and 4 % without, but in up to 9 % without and at 12
    points. A turning point worth 20 standard errors is found in 100 % from 12 points on. Two
    rises around a plateau, 50 standard errors each, are told apart in 100 %; if 10 each, in 10,
    33 and 88 % of curves of 12, 30 and 100 points. Intervals, rounded outwards, held the planted
    place in about 85 % of those found.

    The hyperparameters count as known once fitted, and errors as independent between checkpoints:
    errors that are shared (the same chain keys at neighbouring checkpoints) look like movement.

    Args:
      steps: training steps, whole numbers from 0, distinct, in any order, shape [N].
      values: the curve at these steps, shape [N]; points that are not finite are left out.
      stderr: standard errors of the values, shape [N], or None if unknown. A point with an error
        far beyond the spread of the values is left out (see `smoothing.fit_curve`).
      kernel: "fitted" or "published" (see `smoothing.fit_curve`). The latter knows no noise, so
        every wiggle of the curve is a movement, and all is certain.
      confidence: of the band that tells movement from noise, of every boundary, and of a
        stage's `kind`.
      dip: the fraction of both neighbouring movements below which a slope is a pause.
      num_samples: joint posterior samples of the slope.
      seed: of these samples.

    Returns:
      At least one stage, in order.

    Warns:
      UserWarning: a point decides the curve by itself (see `smoothing.fit_curve`).
    """
    _check_fraction("confidence", confidence)
    _check_fraction("dip", dip)
    _check_samples(num_samples, seed)
    posterior, grid = fit_curve(steps, values, stderr, kernel=kernel)
    mean, margin, samples = _slope_band(posterior, grid, confidence, num_samples, seed)
    boundaries = []
    if not posterior.evidence < _MIN_EVIDENCE:
        peaks = _significant_peaks(mean, margin)
        boundaries = _probable_boundaries(
            mean, samples, peaks, confidence, dip, grid, posterior.points
        )
    return _stages(posterior, grid, boundaries, confidence)


def find_plateaus(
    steps: ArrayLike,
    values: ArrayLike,
    stderr: ArrayLike | None = None,
    *,
    kernel: Kernel = "fitted",
    confidence: float = 0.95,
    max_slope: float | None = None,
    num_samples: int = 2000,
    seed: int = 0,
) -> list[tuple[int, int]]:
    """Finds where a curve is flat, as opposed to where nothing is known about it.

    Args:
      steps: training steps, as in `find_stages`.
      values: the curve at these steps, as in `find_stages`.
      stderr: standard errors of the values, as in `find_stages`.
      kernel: "fitted" or "published".
      confidence: of the simultaneous band that must lie within `max_slope`.
      max_slope: the largest slope that counts as flat, in units of the values per unit of
        log(step + 1); by default a tenth of the steepest significant one.
      num_samples: joint posterior samples of the slope.
      seed: of these samples.

    Returns:
      Steps (start, end) of every longest interval on which |slope| <= `max_slope` throughout,
      with probability `confidence` for all of them at once. Empty, if the curve shows no
      movement that could say by default what flat means.
    """
    _check_fraction("confidence", confidence)
    if max_slope is not None and not (number(max_slope) or 0) > 0:
        raise ValueError(f"max_slope must be > 0, got {shown(max_slope)}: or leave it out.")
    _check_samples(num_samples, seed)
    posterior, grid = fit_curve(steps, values, stderr, kernel=kernel)
    mean, margin, _ = _slope_band(posterior, grid, confidence, num_samples, seed)
    if max_slope is None:
        peaks = _significant_peaks(mean, margin)
        if posterior.evidence < _MIN_EVIDENCE or peaks.size == 0:
            return []
        max_slope = 0.1 * np.abs(mean[peaks]).max()
    flat = np.abs(mean) + margin <= max_slope
    change = np.diff(np.concatenate([[0], flat, [0]]))
    starts, ends = np.flatnonzero(change == 1), np.flatnonzero(change == -1) - 1
    return [(int(grid[a]), int(grid[b])) for a, b in zip(starts, ends, strict=True) if a < b]


def _check_fraction(name: str, value: float) -> None:
    found = number(value)
    if found is None or not 0.0 < found < 1.0:
        raise ValueError(f"{name} must lie between 0 and 1, both excluded, got {shown(value)}.")


def _check_samples(num_samples: int, seed: int) -> None:
    count = number(num_samples)
    if not isinstance(count, int) or not 1 <= count <= _MOST_SAMPLES:
        raise ValueError(
            f"num_samples must lie between 1 and {_MOST_SAMPLES:,}, got {shown(num_samples)}: "
            "2,000 tell 0.95 from 0.94."
        )
    at_least("seed", seed, 0)


def _slope_band(
    posterior: CurvePosterior, grid: np.ndarray, confidence: float, num_samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the mean slope [G], the half-width of its simultaneous band [G], samples [S, G].

    The half-width is the same multiple of the standard deviation everywhere: the quantile, over
    samples of the whole slope, of the largest deviation in units of it.
    """
    u = np.log1p(grid)
    mean, cov = posterior.slope(u)
    samples = posterior.slope_samples(u, num_samples, seed)
    std = np.sqrt(np.maximum(cov.diagonal(), 0.0))
    # Where the curve is known to rounding, a ratio of rounding errors must not set the band.
    std = np.maximum(std, 1e-3 * std.max())
    largest = np.max(np.abs(samples - mean) / std, axis=1)
    return mean, np.quantile(largest, confidence) * std, samples


def _significant_peaks(mean: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Returns the grid indices of local maxima of |slope| among the slopes clear of zero."""
    height = np.where(np.abs(mean) > margin, np.abs(mean), 0.0)
    padded = np.pad(height, 1)
    return np.flatnonzero((height > padded[:-2]) & (height >= padded[2:]))


def _probable_boundaries(
    mean: np.ndarray, samples: np.ndarray, peaks: np.ndarray, confidence: float, dip: float,
    grid: np.ndarray, points: Points,
) -> list[_Boundary]:  # fmt: skip
    """Merges neighbouring movements until all are seen and every boundary between is probable."""
    movements = peaks.tolist()
    while len(movements) > 1:
        pairs = list(itertools.pairwise(movements))
        found = [_boundary(mean, samples, *pair, dip) for pair in pairs]
        worst = min(range(len(found)), key=lambda i: found[i].confidence)
        if found[worst].confidence < confidence:
            movements.remove(min(pairs[worst], key=lambda index: abs(mean[index])))
            continue
        cuts = grid[[0, *(boundary.place for boundary in found), -1]]
        unseen = [
            index for index, start, end in zip(movements, cuts[:-1], cuts[1:], strict=True)
            if not _seen(points.steps, points.values, start, end, np.sign(mean[index]))
        ]  # fmt: skip
        if not unseen:
            return found
        movements.remove(min(unseen, key=lambda index: abs(mean[index])))
    return []


def _seen(steps: np.ndarray, values: np.ndarray, start: float, end: float, sign: float) -> bool:
    """Whether any two points in a stage, or next to it, differ in the direction of its movement."""
    first = max(np.searchsorted(steps, start, side="right") - 1, 0)
    last = np.searchsorted(steps, end, side="left") + 1
    risen = sign * values[first:last]
    return bool(np.any(risen > np.minimum.accumulate(risen)))


def _boundary(
    mean: np.ndarray, samples: np.ndarray, before: int, after: int, dip: float
) -> _Boundary:
    """Weighs the case for a boundary between the movements at two grid indices."""
    inside = slice(before + 1, after)
    if before + 1 == after:  # neighbouring training steps: no room for a boundary
        return _Boundary(before, before, before, 0.0)
    sign, sign_after = np.sign(mean[before]), np.sign(mean[after])
    shown = (sign * samples[:, before] > 0) & (sign_after * samples[:, after] > 0)
    if sign == sign_after:
        # One place for all samples, the lowest of the mean: somewhere or other, every rough
        # sample dips, which says more about the prior than about the data.
        lowest = before + 1 + np.argmin(sign * mean[inside])
        weaker = np.minimum(sign * samples[:, before], sign * samples[:, after])
        shown &= sign * samples[:, lowest] < dip * weaker
    if not shown.any():
        return _Boundary(before, before, before, 0.0)
    places = before + 1 + np.argmin(np.abs(samples[shown, inside]), axis=1)
    low, place, high = np.quantile(places, [0.16, 0.5, 0.84], method="nearest").tolist()
    # A zero lies anywhere within one grid step of the grid point where |slope| is least.
    return _Boundary(low - 1, place, high + 1, float(shown.mean()))


def _stages(
    posterior: CurvePosterior, grid: np.ndarray, boundaries: list[_Boundary], confidence: float
) -> list[Stage]:
    """Measures the stretches of the curve between boundaries."""
    last = grid.size - 1
    ends = [*boundaries, _Boundary(last, last, last, float("nan"))]
    cuts = grid[[0, *(end.place for end in ends)]]
    u = np.log1p(cuts)
    mean, cov = posterior.curve(u)
    delta = np.diff(mean)
    variance = np.diff(np.diff(cov, axis=0), axis=1).diagonal()
    stderr = np.sqrt(np.maximum(variance, 0.0))
    clear = np.abs(delta) > statistics.NormalDist().inv_cdf(0.5 + 0.5 * confidence) * stderr
    kind = np.where(clear, np.where(delta > 0, "rise", "fall"), "flat")
    columns = (cuts[:-1], cuts[1:], kind, delta, stderr, delta / np.diff(u))
    rows = zip(*(column.tolist() for column in columns), ends, strict=True)
    return [
        Stage(start, stop, word, change, error, slope, end.confidence, end.interval(grid))
        for start, stop, word, change, error, slope, end in rows
    ]
