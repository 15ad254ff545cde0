"""Arrays -> matplotlib Axes and Figures. Reads and writes nothing, computes only layout.

Figures are made without pyplot: there is no global state and nothing to close, so they are safe
in servers and threads. Colours are those of Okabe and Ito (2008), which survive colour blindness;
vermillion is kept for trouble.
"""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"
VERMILLION, INK = "#D55E00", "0.25"
CHAIN_COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY)
STAGE_COLORS = {"rise": SKY, "fall": ORANGE, "flat": "0.6"}
LLC = r"$\hat\lambda$"
MINUS = "\N{MINUS SIGN}"


class InlineFigure(Figure):
    """A Figure that notebooks show by itself; a plain one needs pyplot for that."""

    def _repr_png_(self) -> bytes:
        return png(self, dpi=100)


def png(figure: Figure, dpi: int = 160) -> bytes:
    """Returns `figure` as PNG; the same figure gives the same bytes (no dates, no versions)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def log_number_axis(axis: Axis, *digits: int) -> None:
    """Labels a logarithmic axis with plain numbers, at these leading digits only."""
    axis.set_major_locator(ticker.LogLocator(subs=digits))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def log_step_axis(ax: Axes, first: float, last: float) -> None:
    """Makes x a log(step + 1) axis from `first` to `last` >= 0, with ticks at 0, 1, 10, 100..."""
    low, high = np.log1p([first, last])
    if low == high:
        low, high = max(low - 0.5, 0.0), high + 0.5
    margin = 0.02 * (high - low)
    ax.set_xscale("function", functions=(np.log1p, np.expm1))
    ax.set_xlim(*np.expm1([low - margin, high + margin]))
    ticks = np.append(0.0, 10.0 ** np.arange(13))
    if np.sum((first <= ticks) & (ticks <= last)) < 3:
        ticks = ticker.MaxNLocator(4, integer=True).tick_values(*np.expm1([low, high]))
    ax.xaxis.set_major_locator(ticker.FixedLocator(ticks))
    ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    ax.set_xlabel("training step (log(step + 1) scale)")


def dress(ax: Axes, ylabel: str | None = None) -> Axes:
    """Gives axes the look of all figures, and a label of y."""
    if ylabel is not None:
        ax.set_ylabel(ylabel)
    ax.grid(color="0.5", alpha=0.2, lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def shades(count: int) -> np.ndarray:
    """Colours of an ordered family of lines, light to dark: [count, 4]."""
    return colormaps["viridis_r"](np.linspace(0.1, 1.0, count))


def rounded(value: float, stderr: float) -> tuple[str, str]:
    """Returns both as texts, to the second digit of stderr; where that is unknown, to four."""
    if not (np.isfinite(value) and np.isfinite(stderr) and stderr > 0):
        return f"{value:.4g}".replace("-", MINUS), f"{stderr:.2g}"
    digits = max(1 - int(np.floor(np.log10(stderr))), 0)
    return f"{value:,.{digits}f}".replace("-", MINUS), f"{stderr:,.{digits}f}"


def stage_bands(ax: Axes, stages: Sequence, *, labels: bool = True) -> Axes:
    """Shades each stage; call it when the limits of x are set.

    Args:
      ax: axes over training steps, x on a log(step + 1) scale.
      stages: of `llc_jax.find_stages`.
      labels: number and kind above the axes; a narrow stage gets its number only.

    The line at a boundary is the stronger the more probable the boundary; the bar at its foot
    is its 68 % interval.
    """
    left, right = np.log1p(ax.get_xlim())
    for i, stage in enumerate(stages):
        color, shade = STAGE_COLORS[stage.kind], (0.14, 0.26)[i % 2]
        ax.axvspan(stage.start, stage.end, color=color, alpha=shade, lw=0, zorder=0)
        if labels:
            start, end = np.log1p([stage.start, stage.end])
            wide = end - start > 0.075 * (right - left)
            ax.annotate(
                f"{i + 1} {stage.kind}" if wide else str(i + 1), (np.expm1((start + end) / 2), 1),
                (0, 7), ax.get_xaxis_transform(), "offset points", ha="center", color=INK,
            )  # fmt: skip
    if labels and len(stages):  # clear of a tick label at the upper end of y
        ax.annotate("stage", (0, 1), (-4, 7), "axes fraction", "offset points", ha="right",
                    color=INK)  # fmt: skip
    for stage in stages[:-1]:
        strength = float(np.nan_to_num(stage.confidence))
        ax.axvline(stage.end, color=INK, lw=0.4 + strength, alpha=0.2 + 0.6 * strength, zorder=1)
        ax.plot(
            stage.end_interval, (0, 0), color=INK, alpha=0.7, lw=5, solid_capstyle="butt",
            transform=ax.get_xaxis_transform(), zorder=3,
            label="boundary, 68 % interval" if stage is stages[0] and labels else "_",
        )  # fmt: skip
    return ax


def finish(figure: Figure, axes: Sequence[Axes], steps: ArrayLike, stages: Sequence) -> None:
    """One logarithmic axis of steps, stage bands and a legend to the right of each panel."""
    log_step_axis(axes[-1], np.min(steps), np.max(steps))
    for ax in axes:
        stage_bands(ax, stages, labels=ax is axes[0])
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, frameon=False)
        if ax.get_yscale() == "log":
            # Less than two decades need numbers between the powers of ten.
            low, high = ax.get_ylim()
            if high < 100 * low:
                ax.yaxis.set_minor_formatter(ticker.LogFormatterSciNotation(labelOnlyBase=False))
    figure.align_ylabels(axes)
