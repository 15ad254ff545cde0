"""The figure of a calibration: what the grid of settings gave, and how its chains behaved."""

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llc_jax.calibration.choice import SampledGrid
from llc_jax.calibration.result import Calibration
from llc_jax.diagnostics import MAX_RHAT, MAX_STABILITY
from llc_jax.figures.base import CHAIN_COLORS, INK, LLC, VERMILLION, InlineFigure


def grid_figure(calibration: Calibration) -> Figure:
    """Six panels: λ̂ over localization and step size, R-hat, acceptance, distance, traces.

    Args:
      calibration: of `llc_jax.calibrate`.
    """
    grid, (row, *_) = calibration.grid, calibration.chosen
    figure = InlineFigure(figsize=(12.5, 7.2), layout="constrained")
    axes = figure.subplots(2, 3)
    over_localization(axes[0, 0], grid, row, "mean", "stderr")
    axes[0, 0].set_ylabel(f"{LLC} ± 1 s.e.")
    mark(axes[0, 0], calibration)
    over_step_fraction(axes[0, 1], calibration)
    over_localization(axes[0, 2], grid, row, "rhat")
    axes[0, 2].axhline(MAX_RHAT, color=VERMILLION, ls="--", lw=1, label=f"{MAX_RHAT}: too high")
    axes[0, 2].set_ylabel("split R-hat")
    axes[0, 2].legend(fontsize=8)
    health_over_step_fraction(axes[1, 0], calibration)
    distance_over_localization(axes[1, 1], calibration)
    traces(axes[1, 2], calibration)
    settings = calibration.settings
    kind = type(settings["sampler"]).__name__
    figure.suptitle(
        f"Calibration of {kind}: proposed step size {float(settings['sampler'].step_size):.3g},"
        f" nbeta {settings['nbeta']:.4g}, localization {settings['localization']:.4g}"
    )
    return figure


def over_localization(
    ax: Axes, grid: SampledGrid, row: int, name: str, error: str | None = None
) -> Axes:
    """One line per nbeta of a quantity over the localization; a ring where a check failed."""
    values = grid.values(name)[row]
    errors = grid.values(error)[row] if error else np.zeros_like(values)
    sound = grid.each(lambda e: e.verdict in ("ok", "not a minimum"))[row]
    for b, nbeta in enumerate(grid.nbetas):
        color = CHAIN_COLORS[b % len(CHAIN_COLORS)]
        ax.errorbar(grid.localizations, values[b], errors[b], color=color, marker="o", ms=4,
                    capsize=2, lw=1.2, label=f"nbeta {_short(nbeta)}")  # fmt: skip
        bad = ~sound[b] & np.isfinite(values[b])
        ax.plot(grid.localizations[bad], values[b][bad], "o", ms=9, mfc="none", mec=VERMILLION)
    if not sound.all():
        ax.plot([], [], "o", ms=9, mfc="none", mec=VERMILLION, label="failed a check")
    return _log_axis(ax, "localization γ", grid.localizations)


def over_step_fraction(ax: Axes, calibration: Calibration) -> Axes:
    """λ̂ over the step fraction at the proposed localization, one line per nbeta."""
    grid, column = calibration.grid, calibration.chosen[2]
    for b, nbeta in enumerate(grid.nbetas):
        ax.errorbar(
            grid.step_fractions, grid.values("mean")[:, b, column],
            grid.values("stderr")[:, b, column], color=CHAIN_COLORS[b % len(CHAIN_COLORS)],
            marker="o", ms=4, capsize=2, lw=1.2, label=f"nbeta {_short(nbeta)}",
        )  # fmt: skip
    ax.set_ylabel(f"{LLC} ± 1 s.e.")
    ax.set_title(f"at localization {_short(grid.localizations[column])}", fontsize=10)
    return _log_axis(ax, "step fraction ε Λ", grid.step_fractions)


def health_over_step_fraction(ax: Axes, calibration: Calibration) -> Axes:
    """Acceptance, where the sampler has one, and stability number over the step fraction."""
    grid, (_, b, g) = calibration.grid, calibration.chosen
    acceptance = grid.each(lambda e: _mean_of_finite(e.acceptance))[:, b, g]
    stability = grid.each(lambda e: _max_of_finite(e.stability))[:, b, g]
    ax.plot(grid.step_fractions, stability, "s-", color=CHAIN_COLORS[1], ms=4,
            label="stability number at the end of the chains")  # fmt: skip
    ax.axhline(MAX_STABILITY, color=VERMILLION, ls="--", lw=1, label=f"{MAX_STABILITY:g}: too high")
    if np.isfinite(acceptance).any():
        ax.plot(grid.step_fractions, acceptance, "o-", color=CHAIN_COLORS[0], ms=4,
                label="Metropolis acceptance")  # fmt: skip
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8)
    ax.set_title("at the proposed nbeta and localization", fontsize=10)
    return _log_axis(ax, "step fraction ε Λ", grid.step_fractions)


def distance_over_localization(ax: Axes, calibration: Calibration) -> Axes:
    """Root mean squared distance from the anchor, beside the control and its exact value."""
    grid, row = calibration.grid, calibration.chosen[0]

    def distance(estimate):
        return np.sqrt(np.mean(np.square(estimate.distance[estimate.diverged_at < 0])))

    for b, nbeta in enumerate(grid.nbetas):
        values = [distance(e) for e in grid.estimates[row, b]]
        color = CHAIN_COLORS[b % len(CHAIN_COLORS)]
        ax.plot(grid.localizations, values, "o-", ms=4, lw=1.2, color=color,
                label=f"nbeta {_short(nbeta)}")  # fmt: skip
    control = [distance(e) for e in grid.control]
    ax.plot(grid.localizations, control, "x", ms=7, color=INK, label="control, nbeta 0")
    exact = np.sqrt(calibration.num_params / grid.localizations)
    ax.plot(grid.localizations, exact, ":", color=INK, lw=1, label="no loss: $\\sqrt{d/γ}$")
    ax.set_yscale("log")
    ax.set_ylabel("distance from the anchor")
    ax.legend(fontsize=8)
    return _log_axis(ax, "localization γ", grid.localizations)


def traces(ax: Axes, calibration: Calibration) -> Axes:
    """Loss traces of the proposed cell, relative to the anchor's loss, burn-in included."""
    best = calibration.grid.estimates[calibration.chosen]
    burnin = best.burnin_losses.shape[1]
    losses = np.concatenate([best.burnin_losses, best.losses], axis=1) - best.init_loss
    for c, trace in enumerate(losses):
        ax.plot(trace, lw=0.7, color=CHAIN_COLORS[c % len(CHAIN_COLORS)])
    ax.axvspan(0, burnin, color="0.5", alpha=0.15, lw=0, label="burn-in")
    ax.set_xlabel("draw")
    ax.set_ylabel("loss above the anchor's")
    ax.set_title("chains at the proposed setting", fontsize=10)
    ax.legend(fontsize=8)
    return ax


def mark(ax: Axes, calibration: Calibration) -> None:
    """A star at the proposed cell."""
    grid, (e, b, g) = calibration.grid, calibration.chosen
    ax.plot(
        grid.localizations[g], grid.estimates[e, b, g].mean, "*", ms=15, mfc="none", mec=INK,
        zorder=5, label="proposed",
    )  # fmt: skip
    ax.legend(fontsize=8)


def _log_axis(ax: Axes, label: str, values: np.ndarray) -> Axes:
    ax.set_xscale("log")
    ax.set_xticks(values, [_short(v) for v in values])
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.set_xlabel(label)
    return ax


def _short(value: float) -> str:
    """Three digits, without an exponent where the number is of everyday size."""
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:.3g}"


def _mean_of_finite(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else np.nan


def _max_of_finite(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size else np.nan
