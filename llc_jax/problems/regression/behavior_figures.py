"""What the regression transformer does over training, under the stages of the LLC."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from llc_jax.figures import base

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
    per_token(axes[0], steps, found.loss.values, floors=found.ridge_loss.values[-1])
    axes[0].set_ylabel("loss at\nexample k")
    per_token(axes[1], steps, found.prediction_square.values)
    axes[1].set(ylabel="mean squared\nprediction", yscale="log")
    for ax, (name, label) in zip(axes[2:-2], distances.items(), strict=True):
        per_token(ax, steps, found[name].values)
        ax.set(ylabel=label, yscale="log")
    pairs_over_steps(axes[-2], found)
    icl_over_steps(axes[-1], found)
    base.finish(figure, axes, steps, stages)
    return figure


def tokens_figure(
    sweep, *, stages: Sequence = (), part: str = "example k", labels: Sequence[str] | None = None
) -> Figure:
    """Draws λ̂ of the loss at each example, or of other parts, from the chains of the whole loss.

    Args:
      sweep: `xarray.Dataset` of `LLCEstimate.to_xarray` with a leading dimension checkpoint and
        the variables `parts` and `parts_stderr`.
      stages: of `llc_jax.find_stages`; may be empty.
      part: what a part of the loss is.
      labels: of the parts; by default k = 1 to K, of which three are named.
    """
    figure = base.InlineFigure(figsize=(9.6, 4.2), layout="constrained")
    ax = figure.subplots()
    steps = sweep.checkpoint.values
    per_token(ax, steps, sweep.parts.values, errors=sweep.parts_stderr.values, labels=labels)
    ax.plot(steps, sweep.llc.values, color=base.INK, lw=1.5, ls="--", label="whole loss")
    ax.set_ylabel(f"{base.LLC} of the\nloss at {part}")
    base.finish(figure, [ax], steps, stages)
    return figure


def slopes_figure(curves, *, stages: Sequence = ()) -> Figure:
    """Draws curves and their slopes, on which boundaries are zeros.

    Args:
      curves: name -> (steps [N], values [N], `SmoothedCurve`).
      stages: of `llc_jax.find_stages`; may be empty.
    """
    figure = base.InlineFigure(figsize=(4.2 * len(curves), 6), layout="constrained")
    axes = figure.subplots(2, len(curves), sharex=True, squeeze=False)
    for (top, bottom), (name, (steps, values, curve)) in zip(axes.T, curves.items(), strict=True):
        top.plot(steps, values, "o", ms=3, color=base.BLUE, label="checkpoints")
        top.plot(curve.steps, curve.mean, color=base.BLUE, lw=1.3, label="smooth curve")
        top.set_title(name, size=11)
        bottom.plot(curve.steps, curve.slope, color=base.PURPLE, lw=1.3, label="slope ± 1 s.d.")
        bottom.fill_between(
            curve.steps, curve.slope - curve.slope_std, curve.slope + curve.slope_std,
            color=base.PURPLE, alpha=0.2, lw=0,
        )  # fmt: skip
        bottom.axhline(0.0, color="0.5", lw=0.8)
        for ax in (top, bottom):
            base.dress(ax)
            base.log_step_axis(ax, min(steps), max(steps))
            base.stage_bands(ax, stages, labels=False)
    axes[0, 0].set_ylabel("value")
    axes[1, 0].set_ylabel("change per e-fold of steps")
    for ax in axes[0]:
        ax.set_xlabel("")
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


def per_token(
    ax: Axes, steps: ArrayLike, values: np.ndarray, *, errors: np.ndarray | None = None,
    floors: ArrayLike | None = None, labels: Sequence[str] | None = None,
) -> Axes:  # fmt: skip
    """Draws a line per example, dark for late ones.

    Args:
      ax: axes over training steps.
      steps: [N].
      values: [N, K].
      errors: [N, K] standard errors, or None.
      floors: [K] dotted levels, or None.
      labels: [K], or None for k = 1 to K, of which three are named.
    """
    count = values.shape[1]
    if labels is None:
        named = (0, count // 2, count - 1)
        labels = [f"k = {k + 1}" if k in named else "_" for k in range(count)]
    for k, (color, label) in enumerate(zip(base.shades(count), labels, strict=True)):
        if errors is None:
            ax.plot(steps, values[:, k], color=color, lw=1.2, label=label)
        else:
            ax.errorbar(steps, values[:, k], errors[:, k], fmt="o-", ms=2.5, lw=1, color=color,
                        elinewidth=0.8, label=label)  # fmt: skip
        if floors is not None:
            ax.axhline(np.asarray(floors)[k], color=color, lw=0.8, ls=":",
                       label="ridge (dotted)" if k == count - 1 else "_")  # fmt: skip
    return base.dress(ax)


def _banded(
    ax: Axes, steps: ArrayLike, values: np.ndarray, error: np.ndarray, color: str, label: str
) -> None:
    ax.plot(steps, values, color=color, lw=1.5, label=f"{label} ± 1 s.e.")
    ax.fill_between(steps, values - error, values + error, color=color, alpha=0.25, lw=0)
