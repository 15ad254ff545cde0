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
    ORANGE,
    PURPLE,
    VERMILLION,
    InlineFigure,
    dress,
    finish,
    log_step_axis,
    shades,
    stage_bands,
)
from llc_jax.storage.results import llc_with_published_init, parts_of


def loss_over_steps(
    ax: Axes, steps: ArrayLike, losses: ArrayLike, baselines: Mapping[str, float] | None = None,
    label: str = "training loss",
) -> Axes:  # fmt: skip
    """Draws the training loss [N] at steps [N], and baselines {name: loss} as dashed lines."""
    ax.plot(steps, losses, color=INK, lw=1.3, label=label)
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
    train_label: str = "training loss",
    baselines: Mapping[str, float] | None = None,
    curve=None,
    stages: Sequence = (),
) -> Figure:
    """Draws the loss above λ̂ on one axis of steps, stages across both.

    Args:
      sweep: see `chain_figures.chain_traces_figure`.
      train_steps: steps of the training metrics, shape [N].
      train_losses: training losses at these steps, shape [N].
      train_label: what they are.
      baselines: name -> loss of simple predictors, or None.
      curve: `SmoothedCurve` of λ̂, or None.
      stages: of `llc_jax.find_stages`; may be empty.
    """
    figure = InlineFigure(figsize=(9.6, 6.2), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    steps, diverged = sweep.checkpoint.values, (sweep.diverged_at >= 0).any("chain").values
    loss_over_steps(top, train_steps, train_losses, baselines, train_label)
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


def parts_figure(
    sweep, *, stages: Sequence = (), part: str = "example k", labels: Sequence[str] | None = None
) -> Figure:
    """Draws λ̂ of the loss at each example, or of other parts, from the chains of the whole loss.

    Args:
      sweep: `xarray.Dataset` of `LLCEstimate.to_xarray` with a leading dimension checkpoint and
        λ̂ of parts, see `storage.results.parts_of`.
      stages: of `llc_jax.find_stages`; may be empty.
      part: what a part of the loss is.
      labels: of the parts; by default k = 1 to K, of which three are named.
    """
    figure = InlineFigure(figsize=(9.6, 4.2), layout="constrained")
    ax = figure.subplots()
    steps = sweep.checkpoint.values
    values, errors = (x.values for x in parts_of(sweep) or ())
    per_part(ax, steps, values, errors=errors, labels=labels)
    ax.plot(steps, sweep.llc.values, color=INK, lw=1.5, ls="--", label="whole loss")
    ax.set_ylabel(f"{LLC} of the\nloss at {part}")
    finish(figure, [ax], steps, stages)
    return figure


def slopes_figure(curves, *, stages: Sequence = ()) -> Figure:
    """Draws curves and their slopes, on which boundaries are zeros.

    Args:
      curves: name -> (steps [N], values [N], `SmoothedCurve`).
      stages: of `llc_jax.find_stages`; may be empty.
    """
    figure = InlineFigure(figsize=(4.2 * len(curves), 6), layout="constrained")
    axes = figure.subplots(2, len(curves), sharex=True, squeeze=False)
    for (top, bottom), (name, (steps, values, curve)) in zip(axes.T, curves.items(), strict=True):
        top.plot(steps, values, "o", ms=3, color=BLUE, label="checkpoints")
        top.plot(curve.steps, curve.mean, color=BLUE, lw=1.3, label="smooth curve")
        top.set_title(name, size=11)
        bottom.plot(curve.steps, curve.slope, color=PURPLE, lw=1.3, label="slope ± 1 s.d.")
        bottom.fill_between(
            curve.steps, curve.slope - curve.slope_std, curve.slope + curve.slope_std,
            color=PURPLE, alpha=0.2, lw=0,
        )  # fmt: skip
        bottom.axhline(0.0, color="0.5", lw=0.8)
        for ax in (top, bottom):
            dress(ax)
            log_step_axis(ax, min(steps), max(steps))
            stage_bands(ax, stages, labels=False)
    axes[0, 0].set_ylabel("value")
    axes[1, 0].set_ylabel("change per e-fold of steps")
    for ax in axes[0]:
        ax.set_xlabel("")
    return figure


def per_part(
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
    for k, (color, label) in enumerate(zip(shades(count), labels, strict=True)):
        if errors is None:
            ax.plot(steps, values[:, k], color=color, lw=1.2, label=label)
        else:
            ax.errorbar(steps, values[:, k], errors[:, k], fmt="o-", ms=2.5, lw=1, color=color,
                        elinewidth=0.8, label=label)  # fmt: skip
        if floors is not None:
            ax.axhline(np.asarray(floors)[k], color=color, lw=0.8, ls=":",
                       label="ridge (dotted)" if k == count - 1 else "_")  # fmt: skip
    return dress(ax)


def published_init_figure(sweep, *, stages: Sequence = ()) -> Figure:
    """Draws λ̂ beside what the published estimator makes of the same chains.

    Args:
      sweep: estimates, of `results.load_sweep`.
      stages: of `llc_jax.find_stages`; may be empty.
    """
    steps = sweep.checkpoint.values
    published = llc_with_published_init(sweep)
    figure = InlineFigure(figsize=(9.6, 4.6), layout="constrained")
    ax = figure.subplots()
    ax.errorbar(
        steps, published.mean("chain"), published.std("chain", ddof=1), color=ORANGE,
        marker="s", ms=4, lw=1.3, elinewidth=1, label="published init loss ± spread over chains",
    )  # fmt: skip
    ax.errorbar(
        steps, sweep.llc, sweep.stderr, color=BLUE, marker="o", ms=4, lw=1.3,
        label="init loss of each chain ± 1 s.e.",
    )  # fmt: skip
    dress(ax, LLC)
    finish(figure, [ax], steps, stages)
    return figure
