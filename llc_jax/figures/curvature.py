"""Curvature over training under the LLC curve, so that one sees what second order misses."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llc_jax.curvature.over_checkpoints import Curvature
from llc_jax.figures import base, llc


def curvature_figure(
    sweep, measured: Mapping[int, Curvature], *, curve=None, stages: Sequence = ()
) -> Figure:
    """Draws λ̂, the λ̂ of the quadratic form, trace and eigenvalues over one axis of steps.

    Args:
      sweep: `xarray.Dataset` of `LLCEstimate.to_xarray` with a leading dimension checkpoint.
      measured: step -> `Curvature`, in increasing order of steps.
      curve: `SmoothedCurve` of λ̂, or None.
      stages: of `llc_jax.find_stages`; may be empty.
    """
    figure = base.InlineFigure(figsize=(9.6, 9.6), layout="constrained")
    axes = figure.subplots(4, sharex=True)
    steps = np.asarray(list(measured))
    found = Curvature(*(np.stack(x) for x in zip(*measured.values(), strict=True)))
    diverged = (sweep.diverged_at >= 0).any("chain").values
    llc.llc_over_steps(
        axes[0], sweep.checkpoint.values, sweep.llc.values, sweep.stderr.values, curve, diverged
    )
    gaussian_over_steps(axes[1], steps, found)
    trace_over_steps(axes[2], steps, found)
    eigenvalues_over_steps(axes[3], steps, found)
    every = np.concatenate([steps, sweep.checkpoint.values])
    base.log_step_axis(axes[3], every.min(), every.max())
    for ax in axes:
        base.stage_bands(ax, stages, labels=ax is axes[0])
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, frameon=False)
    figure.align_ylabels(axes[1:])
    return figure


def gaussian_over_steps(ax: Axes, steps: np.ndarray, found: Curvature) -> Axes:
    """Draws λ̂ of the quadratic form, with and without its negative eigenvalues."""
    _errorbar(ax, steps, found.positive_llc, found.positive_llc_stderr, "s", base.GREEN,
              "negative\neigenvalues left out")  # fmt: skip
    _errorbar(ax, steps, found.gaussian_llc, found.gaussian_llc_stderr, "o", base.PURPLE,
              "all eigenvalues\n(none at a steep saddle)")  # fmt: skip
    ax.set_ylabel(f"{base.LLC} of the\nquadratic form")
    return _dressed(ax, found.positive_llc, found.gaussian_llc)


def trace_over_steps(ax: Axes, steps: np.ndarray, found: Curvature) -> Axes:
    """Draws the trace of the Hessian with its standard error."""
    _errorbar(ax, steps, found.trace, found.trace_stderr, "o", base.BLUE, "± 1 s.e.")
    ax.set_ylabel("trace of the\nHessian")
    return _dressed(ax, found.trace)


def eigenvalues_over_steps(ax: Axes, steps: np.ndarray, found: Curvature) -> Axes:
    """Draws both ends of the spectrum, bars the residuals, on a scale linear around 0."""
    for name, color, values, residuals in (
        ("largest", base.VERMILLION, found.largest, found.largest_residuals),
        ("smallest", base.SKY, found.smallest, found.smallest_residuals),
    ):
        for i, (value, residual) in enumerate(zip(values.T, residuals.T, strict=True)):
            label = f"{values.shape[1]} {name}" if i == 0 else "_"
            _errorbar(ax, steps, value, residual, "o", color, label, alpha=1 - 0.25 * min(i, 3))
    size = np.abs(np.concatenate([found.largest, found.smallest], axis=1))
    size = size[np.isfinite(size) & (size > 0)]
    if size.size and size.max() > 30 * np.median(size):
        ax.set_yscale("symlog", linthresh=10.0 ** np.floor(np.log10(np.median(size))))
        ax.yaxis.set_major_locator(ticker.SymmetricalLogLocator(ax.yaxis.get_transform()))
    ax.set_ylabel("eigenvalues of\nthe Hessian")
    return _dressed(ax, found.smallest)


def _errorbar(ax, steps, values, errors, marker, color, label, **style) -> None:
    ax.errorbar(
        steps, values, errors, fmt=f"{marker}-", ms=4, lw=1, color=color, elinewidth=1, capsize=2,
        label=label, **style,
    )  # fmt: skip


def _dressed(ax: Axes, *values: np.ndarray) -> Axes:
    if any(np.any(value[np.isfinite(value)] < 0) for value in values):
        ax.axhline(0.0, color="0.5", lw=0.8, zorder=1)
    return base.dress(ax)
