"""What chains did: loss and λ̂ over their draws."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from llc_jax.figures import base


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
        ax.text(
            0.5, 0.5, "no finite chain", transform=ax.transAxes, ha="center",
            color=base.VERMILLION,
        )  # fmt: skip
    return _dress_draws(ax, f"running {base.LLC}", num_burnin, num_burnin + length)


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
    figure = base.InlineFigure(figsize=(9.6, 5.6), layout="constrained")
    axes = figure.subplots(2, len(columns), sharex="col", squeeze=False)
    handles = {}
    for (top, bottom), (name, one) in zip(axes.T, columns.items(), strict=True):
        losses, dead = one.losses.values, one.diverged_at.values
        burnin = one.burnin_losses.values if "burnin_losses" in one else losses[:, :0]
        traces(top, losses, burnin, one.init_loss.item(), dead)
        running_llc(
            bottom, losses, one.anchor_losses.values, one.attrs["nbeta"],
            num_burnin=burnin.shape[1], diverged_at=dead,
        )  # fmt: skip
        llc = " ± ".join(base.rounded(one.llc.item(), one.stderr.item())).removesuffix(" ± nan")
        top.set_title(f"{name}{base.LLC} = {llc}", size=11)
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
    color = base.CHAIN_COLORS[chain % len(base.CHAIN_COLORS)]
    return {"color": color, "lw": 1.4, "label": label}


def _limit(ax: Axes, values: np.ndarray, share: float) -> None:
    """Sets the limits of y to those of `values` and a margin, a share of their range."""
    margin = share * float(np.ptp(values)) or 0.05 * float(np.abs(values).max()) or 1.0
    ax.set_ylim(values.min() - margin, values.max() + margin)


def _dress_draws(ax: Axes, ylabel: str, num_burnin: int, length: int) -> Axes:
    if num_burnin:
        ax.axvspan(0, num_burnin, color="0.5", alpha=0.15, lw=0, zorder=0, label="burn-in")
    ax.set_xlim(0, length)
    ax.set_xlabel("draw (burn-in counted)")
    return base.dress(ax, ylabel)
