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

from experiments import cli, workdir
from experiments.cli import option
from experiments.presets import Presets


@dataclasses.dataclass(frozen=True)
class Config(cli.Sampling, cli.Run):
    """Settings; the base is varied one setting at a time."""

    checkpoints: str = option("", "Training steps, with commas; empty for num_checkpoints of them.")
    num_checkpoints: int = option(4, "Checkpoints, evenly spaced from the last backwards.")
    step_size: float = option(2e-4, "Step of the sampler, ε.")
    num_chains: int = option(2, "Chains.")
    num_draws: int = option(60, "Draws per chain after burn-in.")
    data_sizes: str = option("128,512,2048", "Sizes of the data set.")
    batch_sizes: str = option("16,32,64", "Sizes of the minibatch.")
    fixed_sizes: str = option("256", "Sizes of a fixed set to evaluate the loss of a draw on.")
    seeds: str = option("0,1,2", "Seeds of the chains.")
    step_factors: str = option("0.3,1,3", "Step sizes of the grid, in units of the base.")
    nbeta_factors: str = option("0.3,1,3", "nβ of the grid, in units of the base.")
    localization_factors: str = option("0.3,1,3", "γ of the grid, in units of the base.")
    setting_batch: int = option(0, "Settings of the grid at once; 0 for all; bounds memory.")


PRESETS = Presets("vary_llc", Config)
MEMORY = ("grad_accum", "setting_batch")


def folder_of(config) -> pathlib.Path:
    """Returns the folder of the results."""
    return pathlib.Path(config.workdir) / "variations"


def run(config: Config, phase: str = "variations") -> None:
    """Estimates what is missing and draws everything; see `experiments.run`."""
    from experiments import problems, variations
    from experiments.run import over_records
    from llc_jax.figures.base import png
    from llc_jax.inputs import checks
    from llc_jax.storage.files import read_json, write_atomic

    folder = folder_of(config)
    problem = problems.load(config)
    config = variations.within(config, problem.size)
    kept = problem.saved()
    every = workdir.good_steps(kept, name=config.workdir)
    subject = variations.subject_of(config, problem)
    around = variations.around(config, subject)
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
    work = [(what, value, step, change) for what, value, change in around for step in steps]
    work += [
        ("failure", name, step, change)
        for name, (step, change) in variations.failures(config, steps[0], steps[-1]).items()
    ]
    work += [("grid", "", steps[-1], None)]
    known = {}

    def measure(head, change):
        params, step = kept[head["step"]], head["step"]
        text = f" {head['what']} {head['value']} at step {step}"
        if change is None:
            return {"grid": variations.grid(config, params, subject, step)}, text
        s = variations.resolved(config, change)
        key = (step, *s.values())  # the base is a value of every variation
        if key not in known:
            estimate = variations.measure(config, params, subject, step, s)
            known[key] = variations.record(estimate)
        return known[key], text

    with workdir.lock(folder, "variations"):
        identity = cli.identity(config, MEMORY) | {"checkpoints": steps}
        identity |= problems.identity(config, problem)
        heads = [(dict(zip(("what", "value", "step"), w, strict=False)), w[3]) for w in work]
        line = cli.command(config, PRESETS)
        over_records(phase, folder, identity, line, heads, measure, "estimates", MEMORY)
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
