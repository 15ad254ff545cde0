"""Holds a run beside recorded curves of the same setting, point by point.

    python -m experiments.compare_reference --workdir=runs/paper --reference=PATH

PATH is a folder with `regression_llc.csv`, `regression_hessian.csv` and `regression_behavior.csv`:
columns `step`, `seed` and the recorded values, at least two seeds (the authors of arXiv 2402.02364
published theirs as result files of their code). Writes `comparison/deviations.csv`, `summary.md`
and `comparison.png`. The deviation of a value is its distance from the mean of the seeds in units
of half their band, which is a root mean square over `window` checkpoints to either side: curves of
two seeds cross, and at a crossing the band has no width. The recorded seeds were measured on the
same sequences and ours on others, so the standard error of such a set, theirs and ours, is added
to the band in squares; so is that of our estimates. Mean squared prediction and the losses out of
distribution were recorded on sequences with noise of standard deviation 0.125, not variance, and
so was the curvature: ours are those of the training task, and differ for that reason too (for ridge
on ours: 2.46 against 2.31 of mean squared prediction).
"""

import dataclasses
import math
import pathlib

import numpy as np

from experiments import cli, estimate_llc, measure_curvature, measuring, train_regression
from experiments.cli import option
from llc_jax.files import read_json


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    workdir: str = option("runs/paper", "Folder of the training run.")
    preset: str = option("paper", "Name of the preset.")
    name: str = option("llc", "Folder of the estimates within the workdir.")
    reference: str = option("", "Folder of the recorded curves.")
    recorded_sequences: int = option(8192, "Sequences behind the recorded behaviour.")
    window: int = option(5, "Checkpoints to either side over which the band is averaged.")
    first_step: int = option(10_000, "Where the summary begins: plateaus, not the steep descent.")


PRESETS = {
    name: Config(workdir=training.workdir, preset=name)
    for name, training in train_regression.PRESETS.items()
}

TOKENS = 8
# name of the quantity -> (file, our column, their column or their columns' difference)
QUANTITIES = {
    "loss": ("behavior", "mean_loss", "pretrain/mse"),
    "loss at example 1": ("behavior", "loss_1", "pretrain/mse/token/0"),
    "loss at example 8": ("behavior", "loss_8", "pretrain/mse/token/7"),
    "ICL, 8 - 1": ("behavior", "icl_8_1", ("pretrain/mse/token/7", "pretrain/mse/token/0")),
    "ICL, 4 - 1": ("behavior", "icl_4_1", ("pretrain/mse/token/3", "pretrain/mse/token/0")),
    "ICL, 8 - 4": ("behavior", "icl_8_4", ("pretrain/mse/token/7", "pretrain/mse/token/3")),
    "distance to ridge": ("behavior", "to_ridge", "pretrain/delta_ridge"),
    "mean squared prediction": ("behavior", "prediction_square", "loss_0/mean"),
    "loss, inputs x 3": ("behavior", "far_inputs_loss_g3", "ood_a_inputs_loss/mean"),
    "loss, inputs x 10": ("behavior", "far_inputs_loss_g10", "ood_c_inputs_loss/mean"),
    "loss, tasks x 3": ("behavior", "far_tasks_loss_g3", "ood_a_tasks_loss/mean"),
    "weight norm": ("behavior", "weight_norm", "weight/norm"),
    "Hessian trace": ("hessian", "trace", "trace_mean"),
    "largest eigenvalue": ("hessian", "largest_1", "eig1"),
    "LLC": ("llc", "llc", "llc_mean"),
}
STAGED = ("LLC", "Hessian trace", "largest eigenvalue")
RECORDED_CHAINS = 10  # behind each recorded λ̂, whose file gives the spread over them
LOG = {"distance to ridge", "mean squared prediction", "Hessian trace", "largest eigenvalue"}


def recorded(folder: pathlib.Path, file: str, columns) -> tuple[np.ndarray, np.ndarray]:
    """Returns (steps [T], values [seed, T]) of a recorded curve, or of the difference of two."""
    import pandas

    path = folder / f"regression_{file}.csv"
    if not path.exists():
        raise ValueError(f"reference={folder}: {path.name} is not there; give the folder with it.")
    frame = pandas.read_csv(path)
    names = (columns,) if isinstance(columns, str) else columns
    if missing := {"step", "seed", *names} - set(frame.columns):
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}.")
    curves = [frame.pivot(index="seed", columns="step", values=name) for name in names]
    values = curves[0] if len(curves) == 1 else curves[0] - curves[1]
    if len(values) < 2:
        raise ValueError(f"{path} has {len(values)} seed: a band takes two at least.")
    return values.columns.to_numpy(), values.to_numpy()


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


def ours(config: Config) -> dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Our tables: file -> (steps, {column: values}); those that are missing are left out."""
    import pandas

    from llc_jax.results import finished_steps, load_sweep

    found = {}
    path = measuring.folder_of(config) / "behavior.csv"
    if path.exists():
        frame = pandas.read_csv(path, index_col="step")
        if f"loss_{TOKENS}" not in frame or f"loss_{TOKENS + 1}" in frame:
            raise ValueError(f"{path} is not of {TOKENS} examples, as the recorded curves are.")
        names = ("to_ridge", "prediction_square", "far_inputs_loss_g3", "far_inputs_loss_g10",
                 "far_tasks_loss_g3")  # fmt: skip
        # Errors at the examples of a sequence go together: their mean is the safe side.
        means = {
            name + end: frame[[f"{name}_{k + 1}{end}" for k in range(TOKENS)]].mean(axis=1)
            for name in names
            for end in ("", "_stderr")
        }
        found["behavior"] = pandas.concat([frame, pandas.DataFrame(means)], axis=1)
    path = measure_curvature.folder_of(config) / "curvature.csv"
    if path.exists():
        found["hessian"] = pandas.read_csv(path, index_col="step")
    if finished_steps(estimate_llc.results_folder(config)):
        sweep = load_sweep(estimate_llc.results_folder(config))
        found["llc"] = pandas.DataFrame(
            {"llc": sweep.llc.values, "llc_stderr": sweep.stderr.values},
            index=sweep.checkpoint.values,
        )
    if not found:
        raise ValueError(
            f"{config.workdir} has no results: run experiments.measure_behavior first."
        )
    return found


def run(config: Config, phase: str = "comparison") -> None:
    """Writes the comparison."""
    import pandas

    from llc_jax.figures import png
    from llc_jax.files import write_atomic

    if not config.reference:
        raise ValueError("reference='': give the folder of the recorded curves.")
    reference, found = pathlib.Path(config.reference), ours(config)
    rows, curves = [], {}
    for name, (file, column, columns) in QUANTITIES.items():
        if file not in found:
            continue
        frame = found[file]
        their_steps, theirs = recorded(reference, file, columns)
        steps, values = frame.index.to_numpy(), frame[column].to_numpy()
        known = f"{column}_stderr" in frame
        error = frame[f"{column}_stderr"].to_numpy() if known else np.zeros(steps.size)
        both = error * scale(config, file, column)
        mean, half, deviation = deviations(steps, values, both, their_steps, theirs, config.window)
        curves[name] = (steps, values, error, their_steps, theirs)
        rows += [
            {"quantity": name, "step": s, "ours": v, "stderr": e, "recorded": m, "half_band": h,
             "deviation": d}
            for s, v, e, m, h, d in zip(steps, values, error, mean, half, deviation, strict=True)
        ]  # fmt: skip
    table = pandas.DataFrame(rows)
    folder = pathlib.Path(config.workdir) / "comparison"
    line = cli.command("compare_reference", config.preset, dataclasses.replace(
        config, reference="PATH"), PRESETS[config.preset])  # fmt: skip
    text = f"`{line}`\n\n{summary(table, config.first_step)}\n{boundaries(curves, reference)}"
    write_atomic(folder / "deviations.csv", table.to_csv(index=False, float_format="%.6g"))
    write_atomic(folder / "summary.md", text)
    write_atomic(folder / "comparison.png", png(figure(curves)))
    cli.say(f"{text}{phase}: wrote {folder}/summary.md, deviations.csv, comparison.png")


def scale(config: Config, file: str, column: str) -> float:
    """What our standard error is to be multiplied by to be that of the difference to theirs."""
    if file != "behavior":
        return 1.0
    measured = read_json(measuring.folder_of(config) / "config.json")["config"]
    size = measured["num_far" if column.startswith("far_") else "num_sequences"]
    return math.sqrt(1 + size / config.recorded_sequences)


def summary(table, first_step: int) -> str:
    """Per quantity: how far from the recorded band, from `first_step` on."""
    lines = [
        f"From step {first_step:,} on, deviation from the mean of the recorded seeds in half-widths"
        " of their band:\n",
        "| quantity | checkpoints | median deviation | median of its size | share within 2 |"
        " largest relative difference |",
        "|---|---|---|---|---|---|",
    ]
    late = table[(table.step >= first_step) & table.deviation.notna()]
    for name, part in late.groupby("quantity", sort=False):
        size = part.deviation.abs()
        relative = (part.ours / part.recorded - 1).abs().max()
        lines.append(
            f"| {name} | {len(part)} | {part.deviation.median():+.2f} | {size.median():.2f} |"
            f" {(size <= 2).mean():.0%} | {relative:.1%} |"
        )
    return "\n".join(lines) + "\n"


def boundaries(curves, reference: pathlib.Path) -> str:
    """What the stage finder says, unaided, of our curves and of each recorded seed."""
    from llc_jax.stages import find_stages

    lines = ["| curve | boundaries found (68 % interval) |", "|---|---|"]

    def add(label, steps, values, error=None):
        stages = find_stages(steps, values, error)
        ends = [
            f"{s.end:,} ({s.end_interval[0]:,} to {s.end_interval[1]:,}) after a {s.kind}"
            for s in stages[:-1]
        ]
        lines.append(f"| {label} | {'; '.join(ends) or 'none'} |")

    for name in STAGED:
        file, _, column = QUANTITIES[name]
        if name in curves:
            steps, values, error, *_ = curves[name]
            if steps.size >= 4:
                add(f"{name}, ours", steps, values, error if np.any(error > 0) else None)
        steps, theirs = recorded(reference, file, column)
        errors = [None] * len(theirs)
        if name == "LLC":
            _, spread = recorded(reference, file, "llc_std_over_chains")
            errors = spread / math.sqrt(RECORDED_CHAINS)
        for number, (curve, error) in enumerate(zip(theirs, errors, strict=True), 1):
            add(f"{name}, recorded run {number}", steps, curve, error)
    return "\n".join(lines) + "\n"


def figure(curves):
    """A panel per quantity: recorded seeds in grey, ours in colour."""
    from llc_jax import figures

    columns = 3
    rows = -(-len(curves) // columns)
    fig = figures.InlineFigure(figsize=(12, 2.7 * rows), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, sharex=True)
    for ax, (name, (steps, values, error, their_steps, theirs)) in zip(
        axes.flat, curves.items(), strict=False
    ):
        for i, curve in enumerate(theirs):
            ax.plot(their_steps, curve, color="0.6", lw=1.2, label="_" if i else "recorded seeds")
        dots = {"fmt": "o", "ms": 2.5, "color": figures.BLUE, "elinewidth": 0.8}
        ax.errorbar(steps, values, error, label="this run", **dots)
        if name in LOG:
            ax.set_yscale("log")
        ax.set_title(name, size=10)
        figures.dress(ax)
        figures.log_step_axis(ax, 0, their_steps.max())
        ax.set_xlabel("")
    for ax in list(axes.flat)[len(curves) :]:
        ax.set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8)
    fig.supxlabel("training step (log(step + 1) scale)", size=10)
    return fig


if __name__ == "__main__":
    cli.main(PRESETS, run, default="paper")
