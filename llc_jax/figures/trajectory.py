"""The path of a training run through function space, and its principal components over time."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colors, ticker
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection, LineCollection
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from llc_jax.figures import base
from llc_jax.metrics.trajectory import (
    PCA,
    cusps,
    gaussian_smooth,
    osculating_circles,
    published_widths,
    smooth_path,
    vertices,
)

FEW = 25  # checkpoints, below which a smooth path through them has no geometry worth drawing
OTHERS = (base.VERMILLION, base.SKY, base.GREEN)
DENSE = 1000  # checkpoints, above which they are taken for even steps: `smooth_path` needs n^3


def trajectory_figure(
    steps: ArrayLike,
    pca: PCA,
    *,
    stages: Sequence = (),
    labels: Mapping[int, str] | None = None,
    references: Sequence[str] | None = None,
    others: Sequence[ArrayLike] = (),
) -> Figure:
    """Draws pairs of components as plane curves with their geometry, above each over training.

    Dots are checkpoints; lines and their geometry are those of `smooth_path`, or for more than
    `DENSE` checkpoints of the published filter. Fewer than `FEW` are joined by straight lines,
    without geometry.

    Args:
      steps: of the fitted rows, ascending, shape [n].
      pca: of one run, with at least 2 components; the first 3 are drawn.
      stages: of `llc_jax.find_stages`; may be empty.
      labels: step -> text beside the path; by default the boundaries of the stages, such as 1|2.
      references: names of the m rows that were only projected, or None to leave them out.
      others: scores of the checkpoints of further runs in the same components, [n', k] each.
    """
    steps, n = np.asarray(steps), pca.num_fitted
    scores, ideal = pca.scores[:n, :3], pca.scores[n:, :3]
    references = [] if references is None else list(references)
    if steps.shape != (n,) or scores.shape[1] < 2 or len(references) not in (0, len(ideal)):
        raise ValueError(
            f"pca has {n} fitted rows, {len(ideal)} others and {scores.shape[1]} components, but"
            f" there are steps of shape {steps.shape} and {len(references)} references: give one"
            " step per fitted row, one name per other row, and at least 2 components."
        )
    if labels is None:
        labels = {stage.end: f"{i}|{i + 1}" for i, stage in enumerate(stages[:-1], 1)}
    times, path = _path(steps, scores)
    axis_names = [f"PC{i + 1} ({share:.1%} of variance)" for i, share in enumerate(pca.explained)]
    marks = list(zip(references, itertools.cycle("*PXsd^"), ideal, strict=False))
    look = {"mec": "white", "color": base.PURPLE, "zorder": 6}

    figure = base.InlineFigure(figsize=(9.6, 7.4), layout="constrained")
    top, bottom = figure.subfigures(2, height_ratios=(1.5, 1))
    pairs = [list(pair) for pair in itertools.combinations(range(path.shape[1]), 2)]
    planes = top.subplots(1, len(pairs), squeeze=False)[0]
    shade = colors.FuncNorm((np.log1p, np.expm1), steps[0], steps[-1])
    for ax, pair in zip(planes, pairs, strict=True):
        shown = [scores, ideal[: len(marks)], *(np.asarray(other)[:, :3] for other in others)]
        _frame(ax, np.concatenate(shown)[:, pair])
        for i, other in enumerate(others):
            ax.plot(
                *np.asarray(other)[:, pair].T, "--", marker=".", ms=2, lw=0.7, zorder=1,
                color=OTHERS[i % len(OTHERS)], label=f"run {i + 2}",
            )  # fmt: skip
        ax.plot(*scores[:, pair].T, ".", ms=3, color="0.55", zorder=1, label="checkpoint")
        line = path_in_plane(ax, times, path[:, pair], shade)
        if n >= FEW:
            geometry_in_plane(ax, path[:, pair])
        for name, marker, point in marks:
            ax.plot(*point[pair], marker, ms=9, label=name.replace("$", r"\$"), **look)
        for step, text in labels.items():
            point = path[np.argmin(np.abs(times - step))][pair]
            ax.plot(*point, "o", ms=4, color=base.INK, zorder=5)
            ax.annotate(text, point, (4, 4), textcoords="offset points", size="small")
        ax.set(xlabel=axis_names[pair[0]], ylabel=axis_names[pair[1]])
    top.colorbar(
        line, ax=planes, location="bottom", label="training step", aspect=80,
        ticks=ticker.FixedLocator([0, *10.0 ** np.arange(13)]), format=ticker.EngFormatter(sep=""),
    )  # fmt: skip

    for i, ax in enumerate(bottom.subplots(1, path.shape[1])):
        ax.plot(steps, scores[:, i], ".", ms=3, color="0.55")
        ax.plot(times, path[:, i], color=base.BLUE, lw=1.3)
        for _, marker, point in marks:
            ax.axhline(point[i], color=base.PURPLE, lw=1, ls=":")
            right_edge = {"transform": ax.get_yaxis_transform(), "clip_on": False}
            ax.plot(1.0, point[i], marker, ms=7, **look, **right_edge)
        base.log_step_axis(ax, steps[0], steps[-1])
        base.stage_bands(ax, stages, labels=False)
        for number, stage in enumerate(stages, 1):
            middle = np.expm1(np.log1p([stage.start, stage.end]).mean())
            ax.text(middle, 1.02, number, transform=ax.get_xaxis_transform(), ha="center")
        if len(stages):
            ax.text(-0.01, 1.02, "stage", transform=ax.transAxes, ha="right")
        base.dress(ax, axis_names[i])
    handles, names = planes[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", frameon=False, columnspacing=1.2,
        handlelength=1.6, ncols=len(names) if len(names) <= 9 else -(-len(names) // 2),
    )  # fmt: skip
    return figure


def path_in_plane(
    ax: Axes, steps: np.ndarray, path: np.ndarray, shade: colors.Normalize | None
) -> LineCollection:
    """Draws a curve [G, 2] coloured by step [G], which it returns."""
    segments = np.stack([path[:-1], path[1:]], axis=1)
    line = LineCollection(segments, array=steps[1:], norm=shade, cmap="viridis", lw=2.2, zorder=3)
    ax.add_collection(line, autolim=False)
    return line


def geometry_in_plane(ax: Axes, path: np.ndarray) -> None:
    """Draws circles, evolute, vertices and cusps of a smooth curve [G, 2].

    These are shown where the centres are in sight and the path moves. The limits of the axes must
    be set.
    """
    circles = osculating_circles(path)
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    # Elsewhere the path is nearly straight or stands still, and the last of the noise turns it.
    near = np.all((circles.centres > (left, low)) & (circles.centres < (right, high)), axis=1)
    window = np.ones(len(path) // 20 + 1)
    moved = np.convolve(np.hypot(*np.gradient(path, axis=0).T), window, "same")
    clear = near & (moved > 0.02 * (right - left))

    some = np.flatnonzero(np.isfinite(circles.radii))[:: len(path) // 30 + 1]
    sizes = 2.0 * circles.radii[some]
    drawn = EllipseCollection(
        sizes, sizes, 0.0, units="xy", offsets=circles.centres[some], offset_transform=ax.transData,
        fc="none", ec="0.6", lw=0.4, alpha=0.6, zorder=0,
    )  # fmt: skip
    ax.add_collection(drawn, autolim=False)
    ax.plot([], [], color="0.6", lw=0.6, label="osculating circle")
    evolute = np.where(clear[:, None], circles.centres, np.nan)
    ax.plot(*evolute.T, color=base.INK, lw=0.7, zorder=2, label="evolute")
    for rows, marker, color, label in (
        (vertices(path, circles), "D", base.ORANGE, "vertex"),
        (cusps(path), "v", "black", "cusp"),
    ):
        shown = path[rows[clear[rows]]]
        ax.plot(*shown.T, marker, ms=4, mfc="white", mec=color, mew=1.3, zorder=4, label=label)


def _path(steps: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (steps [G], curve [G, k]) for checkpoints at steps [n] with scores [n, k]."""
    if steps.size < FEW:
        return steps, scores
    if steps.size > DENSE:
        return steps, gaussian_smooth(scores, published_widths(steps.size))
    return smooth_path(steps, scores)


def _frame(ax: Axes, points: np.ndarray) -> None:
    """Limits the axes to a square around the points, in which circles are round."""
    low, high = points.min(axis=0), points.max(axis=0)
    half = 0.58 * ((high - low).max() or 1.0)
    xlim, ylim = ((a + b) / 2 + half * np.array([-1, 1]) for a, b in zip(low, high, strict=True))
    ax.set(xlim=xlim, ylim=ylim, aspect="equal")
    ax.spines[["top", "right"]].set_visible(False)
