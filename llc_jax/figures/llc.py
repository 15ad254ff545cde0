"""Loss and λ̂ over training, under the stages."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from llc_jax.figures.base import (
    BLUE,
    CHAIN_COLORS,
    INK,
    LLC,
    VERMILLION,
    InlineFigure,
    dress,
    log_step_axis,
    stage_bands,
)


def loss_over_steps(
    ax: Axes, steps: ArrayLike, losses: ArrayLike, baselines: Mapping[str, float] | None = None
) -> Axes:
    """Draws the training loss [N] at steps [N], and baselines {name: loss} as dashed lines."""
    ax.plot(steps, losses, color=INK, lw=1.3, label="training loss")
    for i, (name, loss) in enumerate((baselines or {}).items()):
        # An escaped dollar, so that no name is read as mathematics.
        label = f"{loss:.4g}  {name}".replace("$", r"\$")
        color = CHAIN_COLORS[1:][i % (len(CHAIN_COLORS) - 1)]
        style = ("--", ":", "-.")[i // (len(CHAIN_COLORS) - 1) % 3]  # colours come again
        ax.axhline(loss, color=color, ls=style, lw=1.3, label=label)
    return dress(ax, "loss")


def llc_over_steps(
    ax: Axes, steps: ArrayLike, llc: ArrayLike, stderr: ArrayLike, curve=None,
    diverged: ArrayLike = False,
) -> Axes:  # fmt: skip
    """Draws λ̂ over training.

    Args:
      ax: axes over training steps.
      steps: of the checkpoints, shape [N].
      llc: estimates, shape [N]; one that is not finite is a cross at the foot of the axes.
      stderr: their standard errors, shape [N].
      curve: `SmoothedCurve`, or None.
      diverged: true where a chain diverged, shape [N]; ringed.
    """
    steps, llc, stderr = (np.asarray(x, np.float64) for x in (steps, llc, stderr))
    finite = np.isfinite(llc)
    partly = finite & np.asarray(diverged, bool)
    size = 5 if steps.size <= 40 else 3
    if curve is not None:
        ax.fill_between(
            curve.steps, curve.mean - curve.std, curve.mean + curve.std,
            color=BLUE, alpha=0.2, lw=0, label="smooth curve ± 1 s.d.",
        )  # fmt: skip
        ax.plot(curve.steps, curve.mean, color=BLUE, lw=1.3)
    ax.errorbar(
        steps[finite], llc[finite], stderr[finite],
        fmt="o", ms=size, color=BLUE, elinewidth=1, capsize=2, label=LLC + " ± 1 s.e.",
    )  # fmt: skip
    if partly.any():
        ax.plot(
            steps[partly], llc[partly], "o", ms=size + 5, mfc="none", mec=VERMILLION, mew=1.3,
            zorder=5, label="some chains diverged",
        )  # fmt: skip
    if not finite.all():
        lost = steps[~finite]
        ax.plot(
            lost, np.full(lost.size, 0.05), "x", ms=8, mew=2, color=VERMILLION,
            transform=ax.get_xaxis_transform(), label="no finite chain",
        )  # fmt: skip
    if np.any(llc[finite] < 0):
        ax.axhline(0.0, color="0.5", lw=0.8, zorder=1)
    dress(ax, LLC).yaxis.label.set(rotation=0, size="large", ha="right", va="center")
    return ax


def overview_figure(
    sweep,
    *,
    train_steps: ArrayLike,
    train_losses: ArrayLike,
    baselines: Mapping[str, float] | None = None,
    curve=None,
    stages: Sequence = (),
) -> Figure:
    """Draws the loss above λ̂ on one axis of steps, stages across both.

    Args:
      sweep: see `chain_figures.chain_traces_figure`.
      train_steps: steps of the training metrics, shape [N].
      train_losses: training losses at these steps, shape [N].
      baselines: name -> loss of simple predictors, or None.
      curve: `SmoothedCurve` of λ̂, or None.
      stages: of `llc_jax.find_stages`; may be empty.
    """
    figure = InlineFigure(figsize=(9.6, 6.2), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    steps, diverged = sweep.checkpoint.values, (sweep.diverged_at >= 0).any("chain").values
    loss_over_steps(top, train_steps, train_losses, baselines)
    llc_over_steps(bottom, steps, sweep.llc.values, sweep.stderr.values, curve, diverged)
    every = np.concatenate([np.ravel(train_steps), steps])
    log_step_axis(bottom, every.min(), every.max())
    for ax in (top, bottom):
        stage_bands(ax, stages, labels=ax is top)
        ax.legend(
            loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, frameon=False,
            reverse=ax is bottom,
        )  # fmt: skip
    return figure
