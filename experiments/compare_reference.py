"""Holds a run beside recorded curves of the same setting, point by point.

    python -m experiments.compare_reference --workdir=runs/paper --reference=PATH

PATH is a folder with the `regression_*.csv` that `experiments.reference_curves` reads, of two seeds
at least. Writes `comparison/deviations.csv`, `summary.md` and `comparison.png`. The deviation of a
value is its distance from the mean of the seeds in units of half their band, which is a root mean
square over `window` checkpoints to either side: curves of two seeds cross, and at a crossing the
band has no width. The recorded seeds were measured on the same sequences and ours on others, so the
standard error of such a set, theirs and ours, is added to the band in squares; so is that of our
estimates, but not that of the data set all chains of a sweep share: nβ times the standard deviation
of y² over √n, 4 per example at the published nβ and 16,384 sequences, which shows in λ̂ by example.
Mean squared prediction and the losses out of distribution were recorded on sequences with noise of
standard deviation 0.125, not variance: without `--quiet_name` ours are those of the training task,
and differ for that reason too (for ridge on ours: 2.46 against 2.31 of mean squared prediction). So
was the curvature, and ours is always that of the training task.
"""

import dataclasses
import math
import pathlib

import numpy as np

from experiments import cli, reference_curves
from experiments.cli import option
from experiments.presets import Presets
from experiments.reference_curves import QUANTITIES


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    workdir: str = option("runs/paper", "Folder of the training run.")
    preset: str = option("paper", "Name of the preset.")
    name: str = option("llc", "Folder of the estimates within the workdir.")
    curvature_name: str = option("", "Folder of the estimates with the curvature; empty: name.")
    quiet_name: str = option("", "Folder of the behaviour on sequences with the recorded noise.")
    reference: str = option("", "Folder of the recorded curves.")
    recorded_sequences: int = option(8192, "Sequences behind the recorded behaviour.")
    window: int = option(5, "Checkpoints to either side over which the band is averaged.")
    first_step: int = option(10_000, "Where the summary begins: plateaus, not the steep descent.")
    last_step: int = option(0, "Where a second table of the summary ends; 0 for no such table.")


PRESETS = Presets("compare_reference", Config)

STAGED = ("LLC", "Hessian trace", "largest eigenvalue")
LOG = {
    "distance to ridge", "mean squared prediction", "Hessian trace", "largest eigenvalue",
    "token embedding, singular value", "position embedding, singular value",
}  # fmt: skip


def deviations(
    steps: np.ndarray,
    values: np.ndarray,
    errors: np.ndarray,
    their_steps: np.ndarray,
    theirs: np.ndarray,
    window: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Our curve against theirs, interpolated in log(step + 1) to our steps.

    Args:
      steps: [N] ours.
      values: [N] ours.
      errors: [N] standard errors of the difference to the recorded values.
      their_steps: [T], increasing.
      theirs: [S, T] curves of S seeds.
      window: checkpoints to either side over which the band is averaged.

    Returns:
      (mean of the seeds [N], half-width of their band with the errors [N], deviation in
      half-widths [N]); nan where they recorded nothing.
    """
    mean = theirs.mean(axis=0)
    half = np.ptp(theirs, axis=0) / 2
    square = [np.mean(half[max(i - window, 0) : i + window + 1] ** 2) for i in range(half.size)]
    u, their_u = np.log1p(steps), np.log1p(their_steps)
    outside = {"left": np.nan, "right": np.nan}
    mean = np.interp(u, their_u, mean, **outside)
    half = np.hypot(np.interp(u, their_u, np.sqrt(square), **outside), errors)
    with np.errstate(divide="ignore", invalid="ignore"):  # seeds that agree to the last digit
        return mean, half, (values - mean) / half


def run(config: Config, phase: str = "comparison") -> None:
    """Writes the comparison."""
    import pandas

    from llc_jax.figures.base import png
    from llc_jax.storage.files import write_atomic

    if not config.reference:
        raise ValueError("reference='': give the folder of the recorded curves.")
    if config.last_step and config.last_step <= config.first_step:
        raise ValueError(
            f"last_step={config.last_step} is not after first_step={config.first_step}; give a"
            " later one, or 0 for none."
        )
    reference, found = pathlib.Path(config.reference), reference_curves.ours(config)
    rows, curves = [], {}
    for name, quantity in QUANTITIES.items():
        source, column = found.get(quantity.source), quantity.column
        if source is None or column not in source.frame:
            continue
        their_steps, theirs = reference_curves.recorded(reference, quantity)
        steps, values = source.frame.index.to_numpy(), source.frame[column].to_numpy()
        known = f"{column}_stderr" in source.frame
        error = source.frame[f"{column}_stderr"].to_numpy() if known else np.zeros(steps.size)
        both = error * source.error_scale(column, config.recorded_sequences)
        mean, half, deviation = deviations(steps, values, both, their_steps, theirs, config.window)
        curves[name] = (steps, values, error, their_steps, theirs)
        rows += [
            {"quantity": name, "step": s, "ours": v, "stderr": e, "recorded": m, "half_band": h,
             "deviation": d}
            for s, v, e, m, h, d in zip(steps, values, error, mean, half, deviation, strict=True)
        ]  # fmt: skip
    table = pandas.DataFrame(rows)
    folder = pathlib.Path(config.workdir) / "comparison"
    line = cli.command(dataclasses.replace(config, reference="PATH"), PRESETS)
    ranges = [0, config.last_step] if config.last_step else [0]
    tables = [summary(table, config.first_step, last) for last in ranges]
    text = "\n".join([f"`{line}`\n", *tables, boundaries(curves, reference)])
    write_atomic(folder / "deviations.csv", table.to_csv(index=False, float_format="%.6g"))
    write_atomic(folder / "summary.md", text)
    write_atomic(folder / "comparison.png", png(figure(curves), dpi=120))
    cli.say(f"{text}{phase}: wrote {folder}/summary.md, deviations.csv, comparison.png")


def summary(table, first_step: int, last_step: int = 0) -> str:
    """Per quantity: how far from the recorded band, from `first_step` to `last_step`; 0: the end.

    Args:
      table: pandas DataFrame of `deviations.csv`.
      first_step: included.
      last_step: included.
    """
    kept = (table.step >= first_step) & table.deviation.notna()
    where = f"From step {first_step:,} on"
    if last_step:
        kept &= table.step <= last_step
        where = f"From step {first_step:,} to {last_step:,}"
    lines = [
        f"{where}, deviation from the mean of the recorded seeds in half-widths of their band:\n",
        "| quantity | checkpoints | median deviation | median of its size | share within 2 |"
        " largest relative difference |",
        "|---|---|---|---|---|---|",
    ]
    for name, part in table[kept].groupby("quantity", sort=False):
        size = part.deviation.abs()
        relative = (part.ours / part.recorded - 1).abs().max()
        lines.append(
            f"| {name} | {len(part)} | {part.deviation.median():+.2f} | {size.median():.2f} |"
            f" {(size <= 2).mean():.0%} | {relative:.1%} |"
        )
    return "\n".join(lines) + "\n"


def boundaries(curves, reference: pathlib.Path) -> str:
    """What the stage finder says, unaided, of our curves and of each recorded seed."""
    from llc_jax.stages.boundaries import find_stages

    lines = ["| curve | checkpoints | boundaries found (68 % interval) |", "|---|---|---|"]

    def add(label, steps, values, error=None):
        stages = find_stages(steps, values, error)
        ends = [
            f"{s.end:,} ({s.end_interval[0]:,} to {s.end_interval[1]:,}) after a {s.kind}"
            for s in stages[:-1]
        ]
        lines.append(f"| {label} | {len(steps)} | {'; '.join(ends) or 'none'} |")

    for name in STAGED:
        quantity = QUANTITIES[name]
        if name in curves:
            steps, values, error, *_ = curves[name]
            if steps.size >= 4:
                add(f"{name}, ours", steps, values, error if np.any(error > 0) else None)
        steps, theirs = reference_curves.recorded(reference, quantity)
        errors = [None] * len(theirs)
        if name == "LLC":
            quantity = quantity._replace(theirs="llc_std_over_chains")
            _, spread = reference_curves.recorded(reference, quantity)
            errors = spread / math.sqrt(reference_curves.RECORDED_CHAINS)
        for number, (curve, error) in enumerate(zip(theirs, errors, strict=True), 1):
            add(f"{name}, recorded run {number}", steps, curve, error)
    return "\n".join(lines) + "\n"


def figure(curves):
    """A panel per quantity, or per family of them: recorded seeds in grey, ours in colour."""
    from matplotlib import ticker
    from matplotlib.colors import to_rgba

    from llc_jax.figures import base

    panels = {}
    for name, curve in curves.items():
        family, _, member = name.partition(": ")
        panels.setdefault(family, {})[member] = curve
    columns = 4
    rows = -(-len(panels) // columns)
    fig = base.InlineFigure(figsize=(13, 2.4 * rows), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, sharex=True)
    for ax, (name, members) in zip(axes.flat, panels.items(), strict=False):
        single = len(members) == 1
        colors = [base.BLUE] if single else base.shades(len(members))
        for (member, curve), color in zip(members.items(), colors, strict=True):
            steps, values, error, their_steps, theirs = curve
            for i, seed in enumerate(theirs):
                label = "_" if i or not single else "recorded seeds"
                ax.plot(their_steps, seed, color="0.45", lw=0.8, label=label, zorder=3)
            ax.errorbar(
                steps, values, error, fmt="o", ms=2, color=color, elinewidth=0.6,
                ecolor=to_rgba(color, 0.3), label=member or "this run",
            )  # fmt: skip
        if name in LOG:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            ax.yaxis.set_minor_formatter(ticker.NullFormatter())
        ax.set_title(name, size=9)
        base.dress(ax)
        base.log_step_axis(ax, 0, their_steps.max())
        ax.set_xlabel("")
        ax.tick_params(labelsize=8)
        if not single or ax is axes[0, 0]:
            ax.legend(frameon=False, fontsize=7, markerscale=2, ncols=1 + (len(members) > 5))
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    for ax in list(axes.flat)[: len(panels)][-columns:]:  # an empty panel below has no ticks
        ax.tick_params(labelbottom=True)
    fig.supxlabel("training step (log(step + 1) scale)", size=10)
    return fig


if __name__ == "__main__":
    cli.main(PRESETS, run, default="paper")
