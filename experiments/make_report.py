"""Writes the report of a workdir: one HTML page, its figures as PNG, a table as CSV.

    python -m experiments.make_report --workdir=runs/quickstart

Reads what the other experiments left there and computes nothing anew but the smooth curve.
"""

import dataclasses
import pathlib

from experiments import (
    cli,
    estimate_llc,
    find_stages,
    measure_curvature,
    train_regression,
    workdir,
)
from experiments.cli import option


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the report."""

    workdir: str = option("runs/quickstart", "Folder of the training run.")
    preset: str = option("quickstart", "Name of the preset.")
    name: str = option("llc", "Folder of the estimates within the workdir.")


def smoke() -> Config:
    """For the smoke run."""
    return Config(workdir="runs/smoke", preset="smoke")


def quickstart() -> Config:
    """For the quickstart run."""
    return Config()


def small() -> Config:
    """For the small run."""
    return Config(workdir="runs/small", preset="small")


def paper() -> Config:
    """For the published run."""
    return Config(workdir="runs/paper", preset="paper")


PRESETS = {p.__name__: p() for p in (smoke, quickstart, small, paper)}


def baselines(training: train_regression.Config, data) -> dict[str, float]:
    """Losses of predictors that need no training, on the data set of the estimates."""
    import jax.numpy as jnp

    from llc_jax.data.regression import dmmse_predictions, ridge_predictions, tasks

    _, task = train_regression.setting(training)
    x, y = (jnp.asarray(data[name]) for name in ("x", "y"))
    losses = {
        "predict zero": task.dim + task.noise_variance,
        "ridge": float(jnp.mean((ridge_predictions(x, y, task.noise_variance) - y) ** 2)),
    }
    if task.num_tasks:
        predicted = dmmse_predictions(x, y, tasks(task), task.noise_variance)
        losses["dMMSE"] = float(jnp.mean((predicted - y) ** 2))
    return losses


def run(config: Config, phase: str = "report") -> None:
    """Writes `report.html`, `results.csv` and `figures/*.png`, unless they are up to date."""
    from llc_jax.files import digest, read_json, write_atomic, write_json
    from llc_jax.results import finished_steps, result_path

    root, folder = pathlib.Path(config.workdir), estimate_llc.results_folder(config)
    training = train_regression.load_config(config.workdir)
    records = {
        "training": root / "train.json",
        "estimates": folder / "config.json",
        "stages": folder / "stages.json",
    }
    for name, path in records.items():
        if not path.exists():
            raise ValueError(f"{path} is missing: run the experiment that makes the {name} first.")
    curved = measure_curvature.folder_of(config)  # optional: the page does without
    if (curved / "records.jsonl").exists():
        records["curvature"] = curved / "config.json"
    page = root / "report.html"
    record = folder / "report.json"
    sources = pathlib.Path(__file__).parents[1] / "llc_jax"
    inputs = digest(
        [*records.values(), *curved.glob("records.jsonl"), root / "metrics.jsonl"]
        + [sources / name for name in ("report.py", "figures.py", "curvature_figures.py")]
        + [result_path(folder, s) for s in finished_steps(folder)]
    )
    if page.exists() and record.exists() and read_json(record)["inputs"] == inputs:
        cli.say(f"{phase}: {page} is up to date")
        return

    from llc_jax import curvature_figures, figures, report
    from llc_jax.results import load_sweep
    from llc_jax.smoothing import smooth_curve

    contents = {name: read_json(path) for name, path in records.items()}
    sweep = load_sweep(folder)
    metrics = workdir.read_jsonl(root / "metrics.jsonl")
    sweep_config = contents["estimates"]["config"]
    _, task = train_regression.setting(training)
    data, _ = estimate_llc.data_set(task, sweep_config["num_data"], sweep_config["data_seed"])
    stages = find_stages.load_stages(records["stages"])
    curve = smooth_curve(
        sweep.checkpoint.values, sweep.llc.values, sweep.stderr.values,
        kernel=contents["stages"]["config"]["kernel"],
    )  # fmt: skip
    drawn = report.render_figures(
        sweep,
        train_steps=[m["step"] for m in metrics],
        train_losses=[m["loss"] for m in metrics],
        baselines=baselines(training, data),
        curve=curve,
        stages=stages,
    )
    if measured := measure_curvature.load(curved):
        drawn["curvature"] = curvature_figures.curvature_figure(
            sweep, measured, curve=curve, stages=stages
        )
    html = report.render(
        title=f"Loss landscape of {root.name}: in-context linear regression",
        sweep=sweep,
        stages=stages,
        figures=drawn,
        configs={name: content["config"] for name, content in contents.items()},
        versions=contents["estimates"]["versions"],
        hashes={
            "data set of the estimates (SHA-256)": contents["estimates"]["data_sha256"],
            "estimates (SHA-256)": contents["stages"]["inputs"],
        },
        command="\n".join(content["command"] for content in contents.values()),
    )
    for name, figure in drawn.items():
        write_atomic(root / "figures" / f"{name}.png", figures.png(figure))
    write_atomic(root / "results.csv", report.results_csv(sweep))
    write_atomic(page, html)
    write_json(record, {"inputs": inputs})
    cli.say(f"{phase}: wrote {page}, results.csv, figures/*.png")


if __name__ == "__main__":
    cli.main(PRESETS, run)
