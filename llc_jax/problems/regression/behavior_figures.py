"""What the regression transformer does over training, under the stages of the LLC."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from llc_jax.figures import base
from llc_jax.figures.llc import per_part

_DISTANCES = {
    "to_ridge": "squared distance\nto ridge",
    "to_dmmse": "squared distance to\nfinite-prior optimum",
}


def behavior_figure(found, *, stages: Sequence = ()) -> Figure:
    """Draws losses, shrinkage, distances to optimal predictors and learning in context.

    Args:
      found: `xarray.Dataset` of `metrics.datasets.dataset` with a leading dimension checkpoint;
        `to_dmmse`, which only a finite task prior has, gets a panel of its own.
      stages: of `llc_jax.find_stages`; may be empty.
    """
    distances = {name: label for name, label in _DISTANCES.items() if name in found}
    count = 4 + len(distances)
    figure = base.InlineFigure(figsize=(9.6, 2.75 * count), layout="constrained")
    axes = figure.subplots(count, sharex=True)
    steps = found.checkpoint.values
    per_part(axes[0], steps, found.loss.values, floors=found.ridge_loss.values[-1])
    axes[0].set_ylabel("loss at\nexample k")
    per_part(axes[1], steps, found.prediction_square.values)
    axes[1].set(ylabel="mean squared\nprediction", yscale="log")
    for ax, (name, label) in zip(axes[2:-2], distances.items(), strict=True):
        per_part(ax, steps, found[name].values)
        ax.set(ylabel=label, yscale="log")
    pairs_over_steps(axes[-2], found)
    icl_over_steps(axes[-1], found)
    base.finish(figure, axes, steps, stages)
    return figure


def pairs_over_steps(ax: Axes, found) -> Axes:
    """Draws loss of a late example minus that of an early one, for each pair measured."""
    steps = found.checkpoint.values
    rows = {str(pair): i for i, pair in enumerate(found.pair.values)}  # short sequences repeat one
    colors = (base.INK, base.BLUE, base.ORANGE)
    for (pair, i), color in zip(rows.items(), colors, strict=False):
        label = "k = {} minus {}".format(*pair.split("_"))
        _banded(ax, steps, found.icl.values[:, i], found.icl_stderr.values[:, i], color, label)
    ax.axhline(0.0, color="0.5", lw=0.8)
    return base.dress(ax, "difference of losses\nof two examples")


def icl_over_steps(ax: Axes, found) -> Axes:
    """Draws loss of the last example minus that of the first, in and out of distribution.

    Inputs g times as large have losses about g² times as large; they are drawn over g, as published
    (arXiv 2402.02364).
    """
    steps = found.checkpoint.values
    last = found.icl.values[:, 0], found.icl_stderr.values[:, 0]
    _banded(ax, steps, *last, base.INK, "as trained")
    colors = (base.SKY, base.GREEN, base.ORANGE, base.PURPLE)
    for i, (gain, color) in enumerate(zip(found.gain.values, colors, strict=False)):
        if gain > 20:
            continue  # off the scale of the others
        far = found.far_inputs_loss.values[:, i]
        ax.plot(steps, (far[:, -1] - far[:, 0]) / gain, color=color, lw=1.1,
                label=f"inputs × {gain:g}, over {gain:g}")  # fmt: skip
    ax.axhline(0.0, color="0.5", lw=0.8)
    return base.dress(ax, "loss at last minus\nfirst example")


def _banded(
    ax: Axes, steps: ArrayLike, values: np.ndarray, error: np.ndarray, color: str, label: str
) -> None:
    ax.plot(steps, values, color=color, lw=1.5, label=f"{label} ± 1 s.e.")
    ax.fill_between(steps, values - error, values + error, color=color, alpha=0.25, lw=0)
