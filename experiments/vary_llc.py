"""Shows how λ̂ depends on every choice: what should not matter, and how estimates fail.

    python -m experiments.vary_llc --preset=quickstart --workdir=runs/quickstart

Around one base setting, and at several checkpoints: size of the data set, size of the minibatch,
sequences that the loss of a draw is evaluated on, loss function (of the regression model), seed of
the chains; at the last checkpoint a grid of step size, nβ and γ with the running λ̂; and the
failures: chains that find lower losses because nothing holds them, that do not
move, that diverge, that are averaged from the start. The same command starts, continues or
estimates nothing: one line of `variations/records.jsonl` per estimate; at the end it draws
`variations.png`, `grid.png` and `failures.png`.
Expected: curves of different data sets (from 2,048 sequences on), minibatches and seeds coincide
within their errors; step size, nβ and γ move the value, so they are fixed for a whole curve.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from experiments import cli, variations, workdir
from experiments.cli import option


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings; the base is varied one setting at a time."""

    workdir: str = option("runs/quickstart", "Folder of the training run.")
    preset: str = option("quickstart", "Name of the preset.")
    seed: int = option(0, "Seed of the chains.")
    data_seed: int = option(1000, "Seed of the data set.")
    checkpoints: str = option("", "Training steps, with commas; empty for num_checkpoints of them.")
    num_checkpoints: int = option(4, "Checkpoints, evenly spaced from the last backwards.")
    num_data: int = option(2048, "Sequences in the data set of the base.")
    step_size: float = option(2e-4, "SGLD step ε of the base.")
    nbeta: float = option(30.0, "nβ of the base.")
    localization: float = option(300.0, "γ of the base.")
    num_chains: int = option(2, "Chains.")
    num_draws: int = option(60, "Draws per chain after burn-in.")
    num_burnin: int = option(60, "Draws per chain thrown away first.")
    batch_size: int = option(32, "Sequences per minibatch of the base.")
    data_sizes: str = option("128,512,2048", "Sizes of the data set.")
    batch_sizes: str = option("16,32,64", "Sizes of the minibatch.")
    fixed_sizes: str = option("256", "Sizes of a fixed set to evaluate the loss of a draw on.")
    seeds: str = option("0,1,2", "Seeds of the chains.")
    step_factors: str = option("0.3,1,3", "Step sizes of the grid, in units of the base.")
    nbeta_factors: str = option("0.3,1,3", "nβ of the grid, in units of the base.")
    localization_factors: str = option("0.3,1,3", "γ of the grid, in units of the base.")
    grad_accum: int = option(1, "Micro-batches per minibatch; bounds memory.")
    setting_batch: int = option(0, "Settings of the grid at once; 0 for all; bounds memory.")


def smoke() -> Config:
    """Seconds."""
    return Config(
        workdir="runs/smoke", preset="smoke", num_checkpoints=2, num_data=128, num_draws=12,
        num_burnin=12, data_sizes="64,128", batch_sizes="16,32", fixed_sizes="64", seeds="0,1",
        step_factors="1", nbeta_factors="1,3", localization_factors="1",
    )  # fmt: skip


def quickstart() -> Config:
    """Some minutes."""
    return Config()


def small() -> Config:
    """Half an hour of one core."""
    return Config(
        workdir="runs/small", preset="small", num_checkpoints=6, num_data=8192, step_size=5e-5,
        nbeta=100.0, localization=1000.0, num_draws=200, num_burnin=120,
        data_sizes="512,2048,8192", batch_sizes="16,32,64,128", fixed_sizes="256,1024",
    )  # fmt: skip


def paper() -> Config:
    """The published grids and checkpoints (arXiv 2402.02364); wants an accelerator."""
    return Config(
        workdir="runs/paper", preset="paper", num_data=2**20, step_size=3e-4, nbeta=66.67,
        localization=6.67, num_chains=8, num_draws=1000, num_burnin=1000, batch_size=1024,
        checkpoints="507,1124,3247,9375,27072,59968,121212,500000",
        data_sizes="4096,8192,65536,1048576", batch_sizes="256,1024,4096",
        fixed_sizes="1024,4096", setting_batch=9,
    )  # fmt: skip


def language_small() -> Config:
    """For `train_language --preset=small`, around the settings of `estimate_llc` for it; hours."""
    return Config(
        workdir="runs/language", preset="language_small", num_data=1024, step_size=7e-6,
        nbeta=500.0, localization=10_000.0, num_draws=100, num_burnin=70, batch_size=8,
        data_sizes="128,512", batch_sizes="4,8,16", fixed_sizes="32", seeds="0,1",
    )  # fmt: skip


PRESETS = {p.__name__: p() for p in (smoke, quickstart, small, paper, language_small)}


MEMORY = ("grad_accum", "setting_batch")


def folder_of(config) -> pathlib.Path:
    """Returns the folder of the results."""
    return pathlib.Path(config.workdir) / "variations"


def run(config: Config, phase: str = "variations") -> None:
    """Estimates what is missing and draws everything."""
    from llc_jax.figures.base import png
    from llc_jax.inputs import checks
    from llc_jax.storage.checkpoints import CheckpointDir
    from llc_jax.storage.files import read_json, write_atomic

    folder = folder_of(config)
    subject = variations.subject_of(config)
    kept = CheckpointDir(pathlib.Path(config.workdir) / "checkpoints")
    every = workdir.good_steps(kept)
    work = variations.around(config, subject)
    checks.at_least("num_checkpoints", config.num_checkpoints, 1)
    for name in ("num_chains", "num_draws", "grad_accum"):
        checks.at_least(name, getattr(config, name), 1)
    if not config.nbeta > 0:
        raise ValueError(f"nbeta={config.nbeta}: give a number above 0.")
    steps = workdir.chosen(every, config.checkpoints)
    if not config.checkpoints:
        index = np.linspace(len(every) - 1, 0, config.num_checkpoints).round().astype(int)
        steps = sorted({every[i] for i in index})
    begun = folder / "config.json"
    if begun.exists() and not config.checkpoints:
        steps = read_json(begun)["config"]["checkpoints"]  # there may be more by now
    with workdir.lock(folder, "variations"):
        line = cli.command("vary_llc", config.preset, config, PRESETS[config.preset])
        identity = cli.identity(config, MEMORY) | {"checkpoints": steps}
        workdir.check(begun, identity, without=MEMORY)
        path = folder / "records.jsonl"
        workdir.rewind_torn_line(path)
        done = {(r["what"], str(r["value"]), r["step"]) for r in workdir.read_jsonl(path)}
        work = [(*v, s) for v in work for s in steps]
        work += [
            ("failure", name, change, step)
            for name, (step, change) in variations.failures(config, steps[0], steps[-1]).items()
        ]
        work += [("grid", "", {}, steps[-1])]
        work = [w for w in work if (w[0], str(w[1]), w[3]) not in done]

        known = {}

        def finish():
            for count, (what, value, change, step) in enumerate(work, 1):
                params = kept.restore_params(step)
                head = {"what": what, "value": value, "step": step}
                if what == "grid":
                    found = {"grid": variations.grid(config, params, subject, step)}
                else:
                    s = variations.resolved(config, change)
                    key = (step, *s.values())  # the base is a value of every variation
                    if key not in known:
                        estimate = variations.measure(config, params, subject, step, s)
                        known[key] = variations.record(estimate)
                    found = known[key]
                # Not before the first, which shows that the settings are sound.
                workdir.settle(begun, identity, {"command": line}, without=MEMORY)
                workdir.append_jsonl(path, head | found)
                yield count, f" {what} {value} at step {step}", None

        for _ in cli.progress(finish(), phase, len(work), "estimates"):
            pass
        for name, figure in drawn(load(folder)).items():
            write_atomic(folder / f"{name}.png", png(figure))
    cli.say(f"{phase}: wrote {folder}/variations.png, grid.png, failures.png")


def load(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The records of all estimates; none before the last of them, the grid, is there."""
    records = workdir.read_jsonl(folder / "records.jsonl")
    return records if any(r["what"] == "grid" for r in records) else []


def drawn(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of these records."""
    from llc_jax.figures.variations import failures_figure, grid_figure, variations_figure

    return {
        "variations": variations_figure(records),
        "grid": grid_figure(records),
        "failures": failures_figure(records),
    }


if __name__ == "__main__":
    cli.main(PRESETS, run)
