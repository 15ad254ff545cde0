"""Follow a training run through function space: principal components and plane geometry.

Rows are checkpoints, columns are outputs on fixed inputs. The method is that of the appendix of
Hoogland et al. 2024 (arXiv 2402.02364v1): project the rows on their first principal components,
smooth each component along the run, and look at pairs of components as plane curves.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from llc_jax.stages.smoothing import smooth_curve

_EPS = float(np.finfo(np.float64).eps)


class PCA(NamedTuple):
    """Principal components of a trajectory.

    Attributes:
      scores: coordinates of the rows, in units of the outputs, shape [n + m, k]; the m rows after
        the fitted ones are projected into the same space.
      explained: share of the variance of the fitted rows, shape [k], descending.
      num_fitted: n.
    """

    scores: np.ndarray
    explained: np.ndarray
    num_fitted: int


def functional_pca(
    blocks: Iterable[ArrayLike], num_components: int = 3, num_fitted: int | None = None
) -> PCA:
    """Finds the principal components of a matrix that comes in blocks of columns.

    Exact, in float64, centred by column. One block and the inner products of the n + m rows are
    all that is in memory. For a joint analysis, stack the rows of several runs.

    Args:
      blocks: arrays [n + m, columns] of any widths, each used once.
      num_components: k < n. The largest score of each, in magnitude and of a fitted row, is
        positive.
      num_fitted: n, rows that define mean and components; all by default. The others, such as
        ideal predictors, are only projected.

    Returns:
      A `PCA`; components with less than n 2e-16 of the largest variance are 0 throughout.

    Raises:
      ValueError: if the blocks do not fit together, hold values that are not finite, or cannot
        have so many components.
    """
    blocks = iter(blocks)
    first = next(blocks, None)
    if first is None:
        raise ValueError("blocks is empty: give at least one array [checkpoints, outputs].")
    num_rows = np.shape(first)[0] if np.ndim(first) else 0
    n = num_rows if num_fitted is None else num_fitted
    if not 2 <= n <= num_rows:
        raise ValueError(
            f"num_fitted={n}, but the blocks have {num_rows} rows: fit at least 2 of them."
        )
    if not 1 <= num_components < n:
        raise ValueError(
            f"num_components={num_components}: {n} fitted rows, once centred, have from 1 to"
            f" {n - 1}; ask for fewer or add checkpoints."
        )
    gram = np.zeros((num_rows, num_rows))
    for number, block in enumerate(itertools.chain([first], blocks)):
        block = np.array(block, np.float64)
        if block.ndim != 2 or len(block) != num_rows:
            raise ValueError(
                f"block {number} has shape {block.shape}, the first has {num_rows} rows: every"
                " block must hold all checkpoints, shape [checkpoints, outputs]."
            )
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"row {np.argmin(finite)} of block {number} has values that are not finite: leave"
                " out checkpoints that diverged."
            )
        block -= block[0]  # Equal rows become 0, and a large constant costs no digits.
        block -= block[:n].mean(axis=0)
        gram += block @ block.T
    return _components(gram, num_components, n)


def _components(gram: np.ndarray, num_components: int, n: int) -> PCA:
    """Returns the components from inner products [n + m, n + m] of centred rows."""
    total = np.trace(gram[:n, :n])
    if total == 0:
        raise ValueError(
            f"the {n} fitted rows are all equal: give checkpoints whose outputs differ."
        )
    values, vectors = np.linalg.eigh(gram[:n, :n])
    values, vectors = values[::-1][:num_components], vectors[:, ::-1][:, :num_components]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)
    present = values > n * _EPS * values[0]
    values = np.where(present, values, 0.0)
    # A row's score is its inner product with the direction of a component in the space of
    # outputs, X^T v / sqrt(value). Of the fitted rows that is v sqrt(value).
    scale = present * np.sign(largest) / np.sqrt(np.where(present, values, 1.0))
    return PCA(gram[:, :n] @ (vectors * scale), values / total, n)


def smooth_path(steps: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Smooths every component by itself, over log(step + 1), with the noise of each fitted.

    For a few hundred checkpoints at uneven steps. There a filter over rows makes vertices: it
    moves a point in proportion to the spread of its neighbours, which jumps with the spacing.
    About a second per component for n = 200; the time grows as n^3.

    Args:
      steps: distinct training steps of the fitted rows, shape [n], n >= 4.
      scores: of these rows, shape [n, k].

    Returns:
      400 steps, even in log(step + 1) and so not whole, and the path there, shape [400, k], by
      `llc_jax.smooth_curve`.
    """
    grid = np.expm1(np.linspace(np.log1p(np.min(steps)), np.log1p(np.max(steps)), 400))
    curves = [smooth_curve(steps, column, grid=grid) for column in np.transpose(scores)]
    return grid, np.stack([curve.mean for curve in curves], axis=1)


def gaussian_smooth(points: ArrayLike, widths: ArrayLike) -> np.ndarray:
    """Filters each column along the rows by a Gaussian, whose weights sum to 1 also at the ends.

    For many checkpoints at even steps; for others see `smooth_path`.

    Args:
      points: [n, k], such as the scores of the checkpoints.
      widths: standard deviation of the filter at each row, in rows, shape [n] or one for all;
        0 leaves a row as it is.

    Returns:
      Array [n, k]. A straight line at an even pace stays, but for its ends, which move inwards.
    """
    points = np.asarray(points, np.float64)
    n = len(points)
    widths = np.broadcast_to(np.asarray(widths, np.float64), n)
    if not np.all(np.isfinite(widths) & (widths >= 0)):
        bad = widths[~(np.isfinite(widths) & (widths >= 0))][0]
        raise ValueError(f"widths must be finite and >= 0, got {bad}: 0 leaves a row as it is.")
    smooth = np.empty_like(points)
    for i, width in enumerate(widths):
        weights = np.exp(-0.5 * ((np.arange(n) - i) / max(width, 1e-9)) ** 2)
        smooth[i] = weights @ points / weights.sum()
    return smooth


def published_widths(n: int) -> np.ndarray:
    """Returns the widths [n] for checkpoints at every 100 steps, 5000 in all, as published.

    1 up to row 40, growing evenly to 60 at row 200, and 60 from there on (`sigma_helper` of
    devinterp). For other steps see `smooth_path`.
    """
    return np.interp(np.arange(n), [40, 200], [1.0, 60.0])


class Circles(NamedTuple):
    """Circles that touch a plane curve, one per row.

    Attributes:
      centres: [n, 2], the evolute of the curve; nan where the curve is straight.
      radii: [n], infinite where the curve is straight.
      curvature: [n], 1 / radius, positive where the curve turns anticlockwise.
    """

    centres: np.ndarray
    radii: np.ndarray
    curvature: np.ndarray


def osculating_circles(curve: ArrayLike) -> Circles:
    """Returns the circle through each point and its two neighbours.

    Exact on a circle, however the points are spaced. The published code takes differences by row
    instead, which is not.

    Args:
      curve: [n, 2]. Smooth a noisy curve first: the circle of three close points is all noise.

    Returns:
      `Circles`; nan at both ends, and where points coincide, since many circles pass through two.
    """
    curve = _plane(curve)
    centres = np.full(curve.shape, np.nan)
    curvature = np.full(len(curve), np.nan)
    # Seen from the middle point, so that a distant origin costs no digits.
    back, ahead = curve[:-2] - curve[1:-1], curve[2:] - curve[1:-1]
    across = curve[2:] - curve[:-2]
    sides = [np.hypot(*side.T) for side in (back, ahead, across)]
    area = _cross(ahead, back) / 2.0
    # Coordinates are rounded, and so is the area of the triangle; a smaller one is none.
    size = np.abs(curve).max(axis=1)
    rounding = _EPS * (size[:-2] + size[1:-1] + size[2:]) * (sides[0] + sides[1])
    area[np.abs(area) <= rounding / 2.0] = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        curvature[1:-1] = 4.0 * area / (sides[0] * sides[1] * sides[2])
        # The centre is at half the length of both sides, measured along them.
        to_back, to_ahead = ((s**2 / (4.0 * area))[:, None] for s in sides[:2])
        offset = to_back * _quarter_turn(ahead) - to_ahead * _quarter_turn(back)
        radii = 1.0 / np.abs(curvature)
    straight = ~(radii[1:-1] < np.inf)
    centres[1:-1] = curve[1:-1] + np.where(straight[:, None], np.nan, offset)
    return Circles(centres, radii, curvature)


def vertices(curve: ArrayLike, circles: Circles | None = None) -> np.ndarray:
    """Returns the rows at which the curvature is extremal.

    There the centre of the osculating circle comes to rest and turns back: the evolute has a
    cusp. Inflections, straight parts and cusps of the curve itself are no vertices.

    Args:
      curve: [n, 2]. Smooth a noisy curve first: noise alone makes vertices of many points.
      circles: of `osculating_circles(curve)`, if at hand.

    Returns:
      Ascending rows; the middle one where rows in succession share the extremum.
    """
    curvature = (osculating_circles(curve) if circles is None else circles).curvature
    change = np.diff(curvature)
    # A circle has none, although the last digits of its curvature go up and down.
    change[np.abs(change) <= 1e-9 * np.abs(curvature[1:])] = 0.0
    moves = np.flatnonzero(change)
    before, after = moves[:-1], moves[1:]
    found = (before + 1 + after) // 2
    side = np.sign(curvature)
    turns = np.sign(change[before]) * np.sign(change[after]) < 0
    bends = (side[found] * side[before] > 0) & (side[found] * side[after + 1] > 0)
    return found[turns & bends]


def cusps(curve: ArrayLike, min_turn: float = 90.0) -> np.ndarray:
    """Returns the rows at which the curve turns sharply back.

    Args:
      curve: [n, 2]. Smooth a noisy curve first: noise alone turns back at most points.
      min_turn: degrees by which the step after a row must turn from the step before it. A cusp
        just midway between two rows turns by a little less than 90 at both.

    Returns:
      Ascending rows.
    """
    steps = np.diff(_plane(curve), axis=0)
    dot = np.sum(steps[:-1] * steps[1:], axis=1)
    turn = np.degrees(np.arctan2(np.abs(_cross(steps[:-1], steps[1:])), dot))
    return np.flatnonzero(turn > min_turn) + 1


def _plane(curve: ArrayLike) -> np.ndarray:
    curve = np.asarray(curve, np.float64)
    if curve.ndim != 2 or curve.shape[1] != 2 or len(curve) < 3:
        raise ValueError(
            f"curve has shape {curve.shape}: give at least 3 points in the plane, shape [n, 2],"
            " such as two columns of scores."
        )
    return curve


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def _quarter_turn(vectors: np.ndarray) -> np.ndarray:
    return np.stack([-vectors[:, 1], vectors[:, 0]], axis=1)
