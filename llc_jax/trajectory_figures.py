"""The path of a training run through function space, and its principal components over time."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colors, ticker
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection, LineCollection
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from llc_jax import figures
from llc_jax.metrics.trajectory import PCA, cusps, osculating_circles, smooth_path, vertices


def trajectory_figure(
    steps: ArrayLike,
    pca: PCA,
    *,
    stages: Sequence = (),
    labels: Mapping[int, str] | None = None,
    references: Sequence[str] | None = None,
) -> Figure:
    """Draws pairs of components as plane curves with their geometry, above each over training.

    Dots are checkpoints; lines and their geometry are those of `smooth_path`.

    Args:
      steps: of the fitted rows, ascending, shape [n].
      pca: of one run, with at least 2 components; the first 3 are drawn.
      stages: of `llc_jax.find_stages`; may be empty.
      labels: step -> text beside the path at the nearest checkpoint; by default the boundaries
        of the stages, such as 1|2.
      references: names of the m rows that were only projected, or None to leave them out.
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
    ideal = ideal[: len(references)]
    if labels is None:
        labels = {stage.end: f"{i}|{i + 1}" for i, stage in enumerate(stages[:-1], 1)}
    times, path = smooth_path(steps, scores)
    pairs = list(itertools.combinations(range(path.shape[1]), 2))
    names = [f"PC{i + 1} ({share:.1%} of variance)" for i, share in enumerate(pca.explained)]
    marks = list(zip(references, itertools.cycle("*PXsd"), ideal, strict=False))
    figure = figures.InlineFigure(figsize=(9.6, 7.4), layout="constrained")
    top, bottom = figure.subfigures(2, height_ratios=(1.5, 1))
    planes = top.subplots(1, len(pairs), squeeze=False)[0]
    shade = colors.FuncNorm((np.log1p, np.expm1), steps[0], steps[-1])
    for ax, pair in zip(planes, map(list, pairs), strict=True):
        _limits(ax, np.concatenate([scores, ideal])[:, pair])
        ax.plot(*scores[:, pair].T, ".", ms=3, color="0.55", zorder=1, label="checkpoint")
        line = path_in_plane(ax, times, path[:, pair], shade)
        for name, marker, point in marks:
            ax.plot(*point[pair], marker, ms=9, mec="white", color=figures.PURPLE, zorder=6,
                    label=name.replace("$", r"\$"))  # fmt: skip
        for step, text in labels.items():
            point = path[np.argmin(np.abs(times - step))][pair]
            ax.plot(*point, "o", ms=4, color=figures.INK, zorder=5)
            ax.annotate(
                text, point, (4, 4), textcoords="offset points", color=figures.INK, size="small"
            )
        ax.set(xlabel=names[pair[0]], ylabel=names[pair[1]])
    ticks = ticker.FixedLocator([0, *10.0 ** np.arange(13)])
    top.colorbar(
        line, ax=planes, location="bottom", label="training step", aspect=80, ticks=ticks,
        format=ticker.EngFormatter(sep=""),
    )  # fmt: skip
    for i, ax in enumerate(bottom.subplots(1, path.shape[1])):
        ax.plot(steps, scores[:, i], ".", ms=3, color="0.55")
        ax.plot(times, path[:, i], color=figures.BLUE, lw=1.3)
        for _, marker, point in marks:
            ax.axhline(point[i], color=figures.PURPLE, lw=1, ls=":")
            ax.plot(1.0, point[i], marker, ms=7, mec="white", color=figures.PURPLE, zorder=6,
                    transform=ax.get_yaxis_transform(), clip_on=False)  # fmt: skip
        figures.log_step_axis(ax, steps[0], steps[-1])
        figures.stage_bands(ax, stages, labels=False)
        for number, stage in enumerate(stages, 1):
            middle = np.expm1(np.log1p([stage.start, stage.end]).mean())
            ax.text(middle, 1.02, number, transform=ax.get_xaxis_transform(), ha="center")
        ax.set_ylabel(names[i])
        ax.grid(color="0.5", alpha=0.2, lw=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *planes[0].get_legend_handles_labels(), loc="outside lower center", ncols=9, frameon=False,
        columnspacing=1.2, handlelength=1.6,
    )  # fmt: skip
    return figure


def path_in_plane(
    ax: Axes, steps: np.ndarray, path: np.ndarray, shade: colors.Normalize
) -> LineCollection:
    """Draws a smooth curve [n, 2] coloured by step, with circles, evolute, vertices and cusps.

    Returns:
      The coloured curve, for a colour bar.
    """
    circles = osculating_circles(path)
    every = slice(1, -1, max(len(path) // 30, 1))
    kept = np.isfinite(circles.radii[every])
    size = 2.0 * circles.radii[every][kept]
    ax.add_collection(
        EllipseCollection(
            size, size, 0.0, units="xy", offsets=circles.centres[every][kept],
            offset_transform=ax.transData, fc="none", ec="0.6", lw=0.4, alpha=0.6, zorder=0,
        ),
        autolim=False,
    )  # fmt: skip
    ax.plot([], [], color="0.6", lw=0.6, label="osculating circle")
    # At an inflection the centre leaves to infinity and comes back from the other side.
    flips = np.flatnonzero(np.diff(np.sign(circles.curvature))) + 1
    evolute = np.insert(circles.centres, flips, np.nan, axis=0)
    ax.plot(*evolute.T, color=figures.INK, lw=0.7, zorder=2, label="evolute")
    segments = np.stack([path[:-1], path[1:]], axis=1)
    line = LineCollection(segments, norm=shade, cmap="viridis", lw=2.2, zorder=3)
    line.set_array(np.expm1((np.log1p(steps[:-1]) + np.log1p(steps[1:])) / 2))
    ax.add_collection(line, autolim=False)
    # Elsewhere the path is nearly straight or stands still, and the last of the noise turns it.
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    near = np.all((circles.centres > (left, low)) & (circles.centres < (right, high)), axis=1)
    length = np.append(0.0, np.cumsum(np.hypot(*np.diff(path, axis=0).T)))
    rows, window = np.arange(len(path)), len(path) // 40
    ahead, behind = np.minimum(rows + window, rows[-1]), np.maximum(rows - window, 0)
    clear = near & (length[ahead] - length[behind] > 0.02 * (right - left))
    for rows, marker, color, label in (
        (vertices(path, circles), "D", figures.ORANGE, "vertex"),
        (cusps(path), "v", "black", "cusp"),
    ):
        rows = rows[clear[rows]]
        ax.plot(*path[rows].T, marker, ms=4, mfc="white", mec=color, mew=1.3, zorder=4, label=label)
    return line


def _limits(ax: Axes, points: np.ndarray) -> None:
    """A square around the points, in which circles are round and far centres out of sight."""
    low, high = points.min(axis=0), points.max(axis=0)
    half = 0.58 * (high - low).max()
    ax.set(xlim=(low + high)[0] / 2 + half * np.array([-1, 1]))
    ax.set(ylim=(low + high)[1] / 2 + half * np.array([-1, 1]))
    ax.set_aspect("equal")
    ax.spines[["top", "right"]].set_visible(False)
