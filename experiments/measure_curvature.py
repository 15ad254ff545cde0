"""Measures the curvature of the loss at every checkpoint of a workdir.

    python -m experiments.measure_curvature --preset=quickstart --workdir=runs/quickstart

Trace, both ends of the spectrum, and the λ̂ that the quadratic form alone would have at the nβ and
γ of the estimates, whose data set it takes too. The same command starts, continues or does nothing:
one file per checkpoint in `llc/curvature/`, `curvature.csv` at the end.
Expected: λ̂ moves where these do not, and the other way round; the report draws them together.
"""

import dataclasses
import functools
import pathlib

import numpy as np

from experiments import cli, estimate_llc, workdir
from experiments.cli import option
from experiments.presets import Presets


@dataclasses.dataclass(frozen=True)
class Config(cli.Run):
    """Settings of the measurement; nβ and γ are those of the estimates."""

    name: str = option("llc", "Folder of the estimates within the workdir.")
    seed: int = option(0, "Seed of the probes.")
    checkpoints: str = option("", "Training steps to measure, with commas; empty for all.")
    num_data: int = option(256, "Examples: the first ones of the data set of the estimates.")
    num_eigenvalues: int = option(3, "Eigenvalues of each end.")
    num_deflated: int = option(16, "Lanczos vectors that are treated exactly.")
    num_probes: int = option(6, "Random probes for what is left.")
    num_iterations: int = option(12, "Products per probe.")
    probe_batch: int = option(1, "Probes at once; bounds memory.")
    micro_batch: int = option(0, "Examples in memory at once; 0 for all, which is fastest.")
    checkpoint_batch: int = option(2, "Checkpoints at once, over the devices; bounds memory.")


# How much is done at once and where, as against what comes out.
MEMORY = ("checkpoints", "probe_batch", "micro_batch", "checkpoint_batch")

PRESETS = Presets("measure_curvature", Config)


def folder_of(config: Config) -> pathlib.Path:
    """Returns the folder of the results, within that of the estimates they belong to."""
    return estimate_llc.results_folder(config) / "curvature"


def run(config: Config, phase: str = "curvature") -> None:
    """Measures what is missing; see `experiments.run`."""
    import jax

    import llc_jax
    from experiments import problems
    from experiments.run import Sweep, over_checkpoints
    from llc_jax import losses
    from llc_jax.inputs import checks
    from llc_jax.storage.files import read_json

    folder, estimates = folder_of(config), estimate_llc.results_folder(config) / "config.json"
    if not estimates.exists():
        raise ValueError(f"{estimates} is missing: run experiments.estimate_llc on it first.")
    record = read_json(estimates)
    sampled, problem = record["config"], problems.load(config)
    checkpoints = problem.saved()

    @functools.cache
    def data_set():
        data, data_hash = problems.data_set(problem, sampled["num_data"], sampled["data_seed"])
        if data_hash != record["data_sha256"]:
            raise ValueError(
                f"the data set has SHA-256 {data_hash}, the estimates had"
                f" {record['data_sha256']}: another version of jax draws other numbers."
            )
        return data

    def start(steps):
        measured = llc_jax.curvature_over_checkpoints(
            jax.random.key(config.seed),
            problem.loss_fn,
            ((step, checkpoints[step]) for step in steps),
            problem.first(data_set(), config.num_data, sampled["data_seed"]),
            **temperature,
            num_eigenvalues=config.num_eigenvalues,
            num_deflated=config.num_deflated,
            num_iterations=config.num_iterations,
            num_probes=config.num_probes,
            probe_batch=config.probe_batch,
            micro_batch=config.micro_batch or None,
            checkpoint_batch=config.checkpoint_batch,
        )
        each = ((s, dataset(found), f" step {s}: trace {found.trace:.4g}") for s, found in measured)
        return each, {"data_sha256": record["data_sha256"]}

    checks.at_least("num_data", config.num_data, 1)
    nbeta = sampled["nbeta"] or llc_jax.default_nbeta(losses.num_examples(data_set()))
    temperature = {"nbeta": nbeta, "localization": sampled["localization"]}
    identity = cli.identity(config, MEMORY) | temperature | problems.identity(config, problem)
    adopt_older(folder)
    sweep = Sweep(folder, identity, start, cli.command(config, PRESETS), {"curvature.csv": table})
    over_checkpoints(config, phase, checkpoints, sweep)


def dataset(found):
    """One `llc_jax.Curvature` as an `xarray.Dataset`."""
    import xarray

    end = ("largest", "largest_residuals", "smallest", "smallest_residuals")
    return xarray.Dataset({
        name: (("number",) * (name in end), np.asarray(value))
        for name, value in found._asdict().items()
    })  # fmt: skip


def load(folder: pathlib.Path):
    """Reads the results back: {step: `llc_jax.Curvature`}, by step; empty if there are none."""
    from llc_jax import Curvature
    from llc_jax.storage import results

    if (folder / "records.jsonl").exists():
        raise ValueError(f"{folder} is of an older version: measure_curvature will convert it.")
    if not results.finished_steps(folder):
        return {}
    whole = results.load(folder, "measure_curvature")
    return {
        int(step): Curvature(**{
            name: x.values[i] if x.ndim > 1 else x.values[i].item()
            for name, x in whole.data_vars.items()
        })
        for i, step in enumerate(whole.checkpoint.values)
    }  # fmt: skip


def adopt_older(folder: pathlib.Path) -> None:
    """Converts the results of a version that kept them as lines of one file."""
    from llc_jax import Curvature
    from llc_jax.storage import results

    path = folder / "records.jsonl"
    for record in workdir.read_jsonl(path):
        values = {name: np.nan if x is None else x for name, x in record.items() if name != "step"}
        results.save(folder, record["step"], dataset(Curvature(**values)))
    path.unlink(missing_ok=True)


def table(whole):
    """One line per checkpoint, as CSV with all digits; the eigenvalues in columns of their own."""
    from llc_jax import Curvature
    from llc_jax.metrics import own

    return own.table(whole[list(Curvature._fields)]).to_csv(lineterminator="\n")


if __name__ == "__main__":
    cli.main(PRESETS, run)
