"""How an estimate depends on its settings, and how it fails."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from llc_jax.figures import base

TITLES = {
    "num_data": "sequences in the data set", "batch_size": "sequences per minibatch",
    "evaluation": "sequences to evaluate a draw on (0: its minibatch)",
    "loss": "loss function", "seed": "seed of the chains",
}  # fmt: skip


def variations_figure(records: Iterable[Mapping[str, Any]]) -> Figure:
    """Draws λ̂ over training steps, a panel per setting that varies, a line per value.

    Args:
      records: with "what", "value", "step", "llc" and "stderr".
    """
    kept = [r for r in records if r["what"] in TITLES]
    varied = [what for what in TITLES if any(r["what"] == what for r in kept)]
    rows = -(-len(varied) // 2)
    figure = base.InlineFigure(figsize=(9.6, 3.5 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, sharey=True, squeeze=False)
    every = [r["step"] for r in kept]
    for ax in axes.flat[len(varied) :]:
        ax.remove()
    for ax, what in zip(axes.flat, varied, strict=False):
        mine, title = [r for r in kept if r["what"] == what], TITLES[what]
        values = list(dict.fromkeys(r["value"] for r in mine))
        for value, color in zip(values, base.shades(len(values)), strict=True):
            line = sorted((r for r in mine if r["value"] == value), key=lambda r: r["step"])
            label = value if isinstance(value, str) else f"{value:,.0f}"
            ax.errorbar(
                [r["step"] for r in line], _floats(line, "llc"), _floats(line, "stderr"),
                fmt="o-", ms=3, lw=1, capsize=2, color=color, label=label,
            )  # fmt: skip
        ax.set_title(title, size=11)
        base.dress(ax)
        ax.legend(frameon=False, fontsize=8)
        base.log_step_axis(ax, min(every), max(every))
    for ax in axes[:, 0]:
        ax.set_ylabel(f"{base.LLC} ± 1 s.e.")
    return figure


def grid_figure(records: Iterable[Mapping[str, Any]]) -> Figure:
    """Draws what λ̂ was after fewer draws: a row per nbeta, a column per step size, a line per γ.

    Args:
      records: one of them with "what" equal to "grid" and "grid" a list of estimates.
    """
    [found] = [r for r in records if r["what"] == "grid"]
    cells = found["grid"]
    steps, nbetas, gammas = (
        sorted({c[name] for c in cells}) for name in ("step_size", "nbeta", "localization")
    )
    figure = base.InlineFigure(
        figsize=(3 * len(steps) + 1.2, 2.3 * len(nbetas) + 1), layout="constrained"
    )
    axes = figure.subplots(len(nbetas), len(steps), sharex=True, sharey="row", squeeze=False)
    colors = base.shades(len(gammas))
    for cell in cells:
        row, column = nbetas.index(cell["nbeta"]), steps.index(cell["step_size"])
        i = gammas.index(cell["localization"])
        ax = axes[row, column]
        ax.plot(cell["draws"], _numbers(cell["running"]), color=colors[i], lw=1.2,
                label=f"γ = {gammas[i]:,g}")  # fmt: skip
    for row, nbeta in enumerate(nbetas):
        axes[row, 0].set_ylabel(f"running {base.LLC}\nnβ = {nbeta:,g}")
    for column, step in enumerate(steps):
        axes[0, column].set_title(f"ε = {step:.3g}", size=11)
        axes[-1, column].set_xlabel("draw, from the start")
    for ax in axes.flat:
        base.dress(ax)
        ax.axvspan(0, cells[0]["num_burnin"], color="0.5", alpha=0.15, lw=0)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Step {found['step']:,}: {base.LLC} over the draws so far; burn-in grey")
    return figure


def failures_figure(records: Iterable[Mapping[str, Any]]) -> Figure:
    """Draws the running λ̂ of chains that fail, with what the diagnostics say.

    Args:
      records: with "what" equal to "failure" for some.
    """
    found = [r for r in records if r["what"] == "failure"]
    figure = base.InlineFigure(figsize=(9.6, 2.3 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), squeeze=False)[:, 0]
    for ax, r in zip(axes, found, strict=True):
        ax.plot(r["draws"], _numbers(r["running"]), color=base.BLUE, lw=1.3)
        ax.axhline(0.0, color="0.5", lw=0.8)
        ax.set_xlim(0, r["draws"][-1])
        if r["num_burnin"]:
            ax.axvspan(0, r["num_burnin"], color="0.5", alpha=0.15, lw=0, label="burn-in")
        if r["llc"] is None:
            ax.text(0.5, 0.6, "no finite chain", transform=ax.transAxes, ha="center",
                    color=base.VERMILLION)  # fmt: skip
        value = "none" if r["llc"] is None else f"{r['llc']:.3g}"
        ax.set_title(
            f"{r['value']}, step {r['step']:,}\n{base.LLC} = {value}; verdict: {r['verdict']}",
            size=10, loc="left",
        )  # fmt: skip
        ax.set_ylabel(f"running {base.LLC}")
        base.dress(ax)
    axes[-1].set_xlabel("draw, from the start")
    return figure


def _floats(records, name: str) -> np.ndarray:
    return _numbers([r[name] for r in records])


def _numbers(values) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], float)
