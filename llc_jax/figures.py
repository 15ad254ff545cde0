"""Arrays -> matplotlib Axes and Figures. Reads and writes nothing, computes only layout.

Figures are made without pyplot: there is no global state and nothing to close, so they are safe
in servers and threads. Colours are those of Okabe and Ito (2008), which survive colour blindness;
vermillion is kept for trouble.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.axes import Axes
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
            ax.text(
                np.expm1((start + end) / 2), 1.015, f"{i + 1} {stage.kind}" if wide else i + 1,
                transform=ax.get_xaxis_transform(), ha="center", color=INK,
            )  # fmt: skip
    if labels and len(stages):
        ax.text(-0.01, 1.015, "stage", transform=ax.transAxes, ha="right", color=INK)
    for stage in stages[:-1]:
        strength = float(np.nan_to_num(stage.confidence))
        ax.axvline(stage.end, color=INK, lw=0.4 + strength, alpha=0.2 + 0.6 * strength, zorder=1)
        ax.plot(
            stage.end_interval, (0, 0), color=INK, alpha=0.7, lw=5, solid_capstyle="butt",
            transform=ax.get_xaxis_transform(), zorder=3,
            label="boundary, 68 % interval" if stage is stages[0] and labels else "_",
        )  # fmt: skip
    return ax


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


def traces(
    ax: Axes, losses: ArrayLike, burnin_losses: ArrayLike, anchor_loss: float,
    diverged_at: ArrayLike = -1,
) -> Axes:  # fmt: skip
    """Draws the loss of each chain over its draws, numbered from the start of the burn-in.

    Args:
      ax: axes over draws.
      losses: [C, D] minibatch losses after burn-in.
      burnin_losses: [C, B] those of the burn-in, shaded; B may be 0.
      anchor_loss: loss of the anchor, a dashed line.
      diverged_at: [C] draw, burn-in counted, of the first non-finite value; -1 for none. Marked
        by a cross; what such a chain does before does not set the limits of y.
    """
    whole = np.concatenate([burnin_losses, losses], axis=1).astype(np.float64)
    num_chains, length = whole.shape
    num_burnin = length - np.shape(losses)[1]
    dead = np.broadcast_to(diverged_at, num_chains)
    window = max(length // 20, 1)
    ax.axhline(anchor_loss, color="black", ls="--", lw=1.2, zorder=4, label="anchor loss")
    for chain, values in enumerate(whole):
        thick = _line(chain, num_chains)
        means = np.convolve(values, np.full(window, 1 / window), "valid")
        ax.plot(values, color=thick["color"], lw=0.5, alpha=0.35)
        ax.plot(np.arange(means.size) + (window - 1) / 2, means, **thick)
    for chain in np.flatnonzero(dead >= 0):
        ax.plot(
            dead[chain], 0.94, "x", ms=9, mew=2.5, color=_line(chain, num_chains)["color"],
            transform=ax.get_xaxis_transform(), zorder=5, label="chain diverged",
        )  # fmt: skip
    if np.any(dead < 0):
        _limit(ax, np.append(whole[dead < 0], anchor_loss), 0.05)
    return _dress_draws(ax, "minibatch loss", num_burnin, length)


def running_llc(
    ax: Axes, losses: ArrayLike, anchor_losses: ArrayLike, nbeta: float, *,
    num_burnin: int = 0, diverged_at: ArrayLike = -1,
) -> Axes:  # fmt: skip
    """Draws what λ̂ of each chain would have been, had it stopped at each draw.

    Args:
      ax: axes over draws.
      losses: [C, D] minibatch losses after burn-in.
      anchor_losses: [C, D] losses of the anchor on the same minibatches.
      nbeta: n times inverse temperature.
      num_burnin: B, the number of the first draw.
      diverged_at: as in `traces`; such a chain is not drawn.
    """
    losses, anchors = np.asarray(losses, np.float64), np.asarray(anchor_losses, np.float64)
    num_chains, length = losses.shape
    finite = np.flatnonzero(np.broadcast_to(diverged_at, num_chains) < 0)
    running = nbeta * np.cumsum(losses[finite] - anchors[finite], axis=1) / np.arange(1, length + 1)
    for chain, values in zip(finite, running, strict=True):
        ax.plot(num_burnin + np.arange(length), values, **_line(chain, num_chains))
    if finite.size:
        # The first few draws are nearly pure noise and would set the scale of everything.
        _limit(ax, running[:, length // 10 :], 0.25)
    else:
        ax.text(0.5, 0.5, "no finite chain", transform=ax.transAxes, ha="center", color=VERMILLION)
    return _dress_draws(ax, f"running {LLC}", num_burnin, num_burnin + length)


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
      sweep: see `chain_traces_figure`.
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


def trace_figure(estimate) -> Figure:
    """Draws loss traces and running λ̂ of one `LLCEstimate`."""
    return _chains_figure({"": estimate.to_xarray()})


def chain_traces_figure(sweep, steps: Sequence[int] | None = None) -> Figure:
    """Draws loss traces and running λ̂ at some checkpoints of a sweep.

    Args:
      sweep: `xarray.Dataset` of `LLCEstimate.to_xarray` with a leading dimension checkpoint.
      steps: checkpoints to show; by default the first, the middle and the last.
    """
    if steps is None:
        every = sweep.checkpoint.values
        steps = every[sorted({0, len(every) // 2, len(every) - 1})]
    return _chains_figure({f"step {step:,}: ": sweep.sel(checkpoint=step) for step in steps})


def _chains_figure(columns: Mapping) -> Figure:
    """Draws a column of two panels for each {start of title: Dataset of one checkpoint}."""
    figure = InlineFigure(figsize=(9.6, 5.6), layout="constrained")
    axes = figure.subplots(2, len(columns), sharex="col", squeeze=False)
    handles = {}
    for (top, bottom), (name, one) in zip(axes.T, columns.items(), strict=True):
        losses, burnin, dead = (one[k].values for k in ("losses", "burnin_losses", "diverged_at"))
        traces(top, losses, burnin, one.init_loss.item(), dead)
        running_llc(
            bottom, losses, one.anchor_losses.values, one.attrs["nbeta"],
            num_burnin=burnin.shape[1], diverged_at=dead,
        )  # fmt: skip
        llc = " ± ".join(rounded(one.llc.item(), one.stderr.item())).removesuffix(" ± nan")
        top.set_title(f"{name}{LLC} = {llc}", size=11)
        top.set_xlabel("")
        handles |= dict(zip(*reversed(top.get_legend_handles_labels()), strict=True))
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=9, frameon=False,
        columnspacing=1.2, handlelength=1.6,
    )  # fmt: skip
    return figure


def _line(chain: int, num_chains: int) -> dict:
    """Returns the look of a chain's line; many chains share one entry of the legend."""
    label = f"chain {chain}" if num_chains <= 6 else "_" if chain else f"{num_chains} chains"
    return {"color": CHAIN_COLORS[chain % len(CHAIN_COLORS)], "lw": 1.4, "label": label}


def _limit(ax: Axes, values: np.ndarray, share: float) -> None:
    """Sets the limits of y to those of `values` and a margin, a share of their range."""
    margin = share * float(np.ptp(values)) or 0.05 * float(np.abs(values).max()) or 1.0
    ax.set_ylim(values.min() - margin, values.max() + margin)


def _dress_draws(ax: Axes, ylabel: str, num_burnin: int, length: int) -> Axes:
    if num_burnin:
        ax.axvspan(0, num_burnin, color="0.5", alpha=0.15, lw=0, zorder=0, label="burn-in")
    ax.set_xlim(0, length)
    ax.set_xlabel("draw (burn-in counted)")
    return dress(ax, ylabel)
