"""The points of a curve: checked, freed of those that say nothing, and averaged if they are many.

Dense Gaussian processes cost the cube of the number of points, and a least-squares fit follows
the one point that is farthest out. Both are dealt with here, before anything is fitted.
"""

import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from llc_jax.inputs.scalars import shown

# Squares of what lies beyond leave float64.
_LARGEST, _SMALLEST = 1e100, 1e-100
# An error this many times the spread of all values leaves a point a hundredth of their weight.
_BEYOND = 10.0


class Points(NamedTuple):
    """Points of a curve, in order of steps.

    Attributes:
      steps: training steps, ascending, shape [N]; means of steps where points were averaged.
      values: shape [N].
      errors: standard errors of the values, shape [N]; nan where unknown.
      share: the part of the white noise variance of one point that each has, shape [N]: 1, or
        less for a mean of several.
    """

    steps: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    share: np.ndarray


class Scatter(NamedTuple):
    """How points scatter around a straight line within each bin.

    Attributes:
      freedom: number of points beyond two, shape [K].
      squares: sum of their squared residuals, shape [K].
      variance: their typical squared standard error, shape [K].
    """

    freedom: np.ndarray
    squares: np.ndarray
    variance: np.ndarray


NO_SCATTER = Scatter(np.zeros(0), np.zeros(0), np.zeros(0))


def checked(steps: ArrayLike, values: ArrayLike, stderr: ArrayLike | None) -> Points:
    """Returns the points whose value is finite, in order of steps."""
    steps, values = floats("steps", steps), floats("values", values)
    errors = np.zeros_like(values) if stderr is None else floats("stderr", stderr)
    if steps.ndim != 1 or not steps.shape == values.shape == errors.shape:
        raise ValueError(
            "steps, values and stderr must be of one axis and of equal length, got shapes "
            f"{steps.shape}, {values.shape} and {errors.shape}: give one value per checkpoint."
        )
    whole = (steps >= 0) & (steps == np.rint(steps)) & (steps <= 2.0**62)
    if not np.all(whole):
        raise ValueError(
            f"steps must be whole numbers >= 0, got {steps[~whole][0]}: count updates from 0, "
            "to 2**62 at most."
        )
    if np.any(errors < 0):
        raise ValueError(
            f"stderr must be >= 0, got {errors[errors < 0][0]}: pass None where it is unknown."
        )
    order = np.argsort(steps)
    steps, values, errors = steps[order], values[order], errors[order]
    if np.any(np.diff(steps) == 0):
        raise ValueError(
            f"steps must be distinct, got {steps[1:][np.diff(steps) == 0][0]:.0f} more than once: "
            "average repeated estimates of one checkpoint, or smooth each run by itself."
        )
    if np.any(np.diff(np.log1p(steps)) <= 0):
        near = steps[1:][np.diff(np.log1p(steps)) <= 0][0]
        raise ValueError(
            f"log(step + 1) must tell steps apart in float64, which it does not at {near:.17g}: "
            "count in larger units."
        )
    kept = np.isfinite(values)
    _check_enough(kept)
    return Points(steps[kept], values[kept], errors[kept], np.ones(kept.sum()))


def informative(points: Points) -> Points:
    """Leaves out points without information.

    A point has no information where its error is infinite or beyond ten times the spread of the
    values, in which such points do not count: its weight is nothing beside that of the others.
    An error that is not known (nan) counts as the largest that is.
    """
    known = np.isfinite(points.errors)
    # Too large to be squared is as good as infinite.
    kept = ~(points.errors > _LARGEST)
    _check_range(points.steps[kept], points.values[kept])
    kept[kept & known] = _within_spread(points.values[kept & known], points.errors[kept & known])
    _check_enough(kept)
    if 2 * kept.sum() <= kept.size:
        warnings.warn(
            f"{kept.size - kept.sum()} of {kept.size} points, the first at step "
            f"{points.steps[~kept][0]:.0f}, have a stderr above {_BEYOND:g} times the spread of "
            "the values and are left out: find out why their chains disagree.",
            stacklevel=4,
        )
    steps, values, errors, share = (column[kept] for column in points)
    errors = np.where(np.isnan(errors), np.nanmax(errors, initial=0.0), errors)
    return Points(steps, values, errors, share)


def apart(points: Points, factor: float) -> np.ndarray:
    """Finds points that no other supports: above their neighbours, or below them, and by far.

    "By far" is `factor` times (more below 20 points) the largest difference of any two neighbours
    among the rest, and three times the error of the point; a hundred times, where the next point
    stands out to the same side, as on a peak. At most one in five, and ten, are taken away to see
    the rest, the farthest first.

    Returns:
      Which points these are, shape [N].
    """
    values, size = points.values, points.values.size
    # Few differences may all be small by chance.
    factor *= max(1.0, (20.0 / size) ** 2)
    index, taken, found, largest = np.arange(size), [], 0, np.inf
    for _ in range(min(max(size // 5, 1), 10, size - 3)):
        rise = np.diff(values[index])
        up, down = np.append(0.0, rise), np.append(-rise, 0.0)
        # The first and the last have one neighbour; those that come first and last without them
        # may be part of a movement there.
        up[0], down[-1] = down[0] * (index[0] == 0), up[-1] * (index[-1] == size - 1)
        height = np.where(up * down > 0, np.minimum(np.abs(up), np.abs(down)), 0.0)
        worst = int(np.argmax(height))
        taken.append(index[worst])
        index = np.delete(index, worst)
        rest = np.abs(np.diff(values[index])).max()
        # Values that are equal to rounding are no measure.
        if height[worst] > factor * rest + 1e-9 * np.abs(values[index]).max():
            found, largest = len(taken), rest
    far = np.zeros(size, bool)
    far[taken[:found]] = True
    near = np.interp(np.arange(size), np.flatnonzero(~far), values[~far])
    side = np.pad(np.where(far, np.sign(values - near), 0.0), 1)
    peak = (side[1:-1] == side[:-2]) | (side[1:-1] == side[2:])
    needed = np.where(peak, max(factor, 100.0), factor) * largest + 3.0 * points.errors
    return far & (np.abs(values - near) > needed)


def warn_of(points: Points, apart: np.ndarray) -> None:
    """Says which points decide a curve by themselves."""
    listed = ", ".join(
        f"{value:.4g}{f' ± {error:.2g}' if error else ''} at step {step:.0f}"
        for step, value, error, _ in zip(*(column[apart][:3] for column in points), strict=True)
    )
    low, high = np.quantile(points.values[~apart], [0.0, 1.0])
    warnings.warn(
        f"{apart.sum()} of {apart.size} points decide the curve by themselves: {listed}; the "
        f"others lie between {low:.4g} and {high:.4g}, and the curve through them is another. Give "
        "such a point its true stderr, or the value nan, which leaves it out.",
        stacklevel=4,
    )


def averaged(points: Points, most: int, white: float | None = None) -> tuple[Points, Scatter]:
    """Returns at most `most` points, means over bins of equal width in log(step + 1).

    Bins are as narrow as their number allows, so few points that lie far apart stay as they are.
    Nothing is lost where the curve is straight over a bin: the likelihood of the points is that
    of their means and of their scatter.

    Args:
      points: in order of steps.
      most: number of bins.
      white: variance of the white noise beyond the errors; weights are `1 / (errors^2 + white)`.
        By default the median of `errors^2`, lest one error that is too small speaks for a bin.
    """
    if points.steps.size <= most:
        return points, NO_SCATTER
    u, variance = np.log1p(points.steps), points.errors**2
    starts = _bins(u, most)
    sizes = np.diff(starts, append=u.size)

    def total(terms: np.ndarray) -> np.ndarray:
        return np.add.reduceat(terms, starts)

    white = white or np.median(variance) or variance.max() or 1.0
    precision = 1.0 / (variance + white)
    weights = precision / np.repeat(total(precision), sizes)
    mean_u, mean = total(weights * u), total(weights * points.values)
    means = Points(
        np.expm1(mean_u),
        mean,
        np.sqrt(total(weights**2 * variance)),
        total(weights**2 * points.share),
    )
    across, up = u - np.repeat(mean_u, sizes), points.values - np.repeat(mean, sizes)
    several = sizes > 2
    along = total(weights * across * up) ** 2 / np.where(several, total(weights * across**2), 1.0)
    squares = np.where(several, sizes * (total(weights * up**2) - along), 0.0)
    # Residuals of unequal precision count as if all had the harmonic mean of the variances.
    typical = sizes / total(precision) - white
    return means, Scatter(np.maximum(sizes - 2, 0), squares, np.maximum(typical, 0.0))


def _bins(u: np.ndarray, most: int) -> np.ndarray:
    """Returns where bins of the least width start that leaves at most `most` of them."""
    starts, width = np.zeros(1, int), u[-1] - u[0]
    while True:
        width *= 0.8
        finer = np.flatnonzero(np.diff(np.floor((u - u[0]) / width), prepend=-1.0))
        if finer.size > most:
            return starts
        starts = finer


def floats(name: str, numbers: ArrayLike) -> np.ndarray:
    """Returns numbers as float64, without reading text or dropping an imaginary part."""
    try:
        array = np.asarray(numbers)
        if array.dtype.kind not in "USc":
            return array.astype(np.float64)
    except Exception:  # anything: a deleted array, a key, one that is being traced
        pass
    raise ValueError(
        f"{name} must be real numbers, each one number, got {shown(numbers, 80)}: convert them."
    )


def _check_enough(kept: np.ndarray) -> None:
    if kept.sum() < 4:
        raise ValueError(
            "need at least 4 checkpoints with a finite value and a stderr below ten times the "
            f"spread of the values, got {kept.sum()} of {kept.size}: add checkpoints, or find out "
            "why chains died."
        )


def _check_range(steps: np.ndarray, values: np.ndarray) -> None:
    largest, spread = np.argmax(np.abs(values)), np.ptp(values)
    if np.abs(values[largest]) > _LARGEST or 0.0 < spread < _SMALLEST:
        raise ValueError(
            f"values must be at most {_LARGEST:g} and differ by at least {_SMALLEST:g}, got "
            f"{values[largest]:.4g} at step {steps[largest]:.0f} and a range of {spread:.3g}: use "
            "other units, or the value nan, which leaves a point out."
        )


def _within_spread(values: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Which errors are not far beyond the spread of the values, shape [N].

    The spread is that of a typical point, the harmonic mean of `errors^2 + tau^2`, where the
    variance tau^2 beyond errors is that of Paule and Mandel (1982): it makes the weighted sum of
    squares equal to its expectation N - 1. Points without information do not change it, however
    many and wherever they are.
    """
    everything = np.ones(values.size, bool)
    # Errors that are far too small are no better than usual ones.
    least = np.quantile(errors, 0.25) if errors.size else 0.0
    total = np.sum((values - values.mean()) ** 2) if errors.size else 0.0
    if total == 0.0 or errors.max() <= _BEYOND * least:
        return everything
    variance = np.maximum(errors, least) ** 2

    def excess(log_tau: float) -> float:
        weights = 1.0 / (variance + np.exp(log_tau))
        mean = np.sum(weights * values) / np.sum(weights)
        return np.sum(weights * (values - mean) ** 2) - (values.size - 1)

    low, high = np.log(total) - 600.0, np.log(total)
    if least == 0.0 and excess(low) <= 0:
        return everything
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    typical = 1.0 / np.mean(1.0 / (variance + np.exp(low)))
    return errors**2 <= _BEYOND**2 * typical
