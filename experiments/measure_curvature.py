"""Measures the curvature of the loss at every checkpoint of a workdir.

    python -m experiments.measure_curvature --preset=quickstart --workdir=runs/quickstart

Trace, both ends of the spectrum, and the λ̂ that the quadratic form alone would have at the nβ and
γ of the estimates, whose data set it takes too. The same command starts, continues or does nothing:
one line of `llc/curvature/records.jsonl` per checkpoint; `curvature.csv` at the end.
Expected: λ̂ moves where these do not, and the other way round; the report draws them together.
"""

import dataclasses
import math
import pathlib

import numpy as np

from experiments import cli, estimate_llc, settings, workdir
from experiments.cli import option


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the measurement; nβ and γ are those of the estimates."""

    workdir: str = option("runs/quickstart", "Folder of the training run.")
    preset: str = option("quickstart", "Name of the preset.")
    name: str = option("llc", "Folder of the estimates within the workdir.")
    seed: int = option(0, "Seed of the probes.")
    checkpoints: str = option("", "Training steps to measure, with commas; empty for all.")
    num_data: int = option(256, "Sequences: the first ones of the data set of the estimates.")
    num_eigenvalues: int = option(3, "Eigenvalues of each end.")
    num_deflated: int = option(16, "Lanczos vectors that are treated exactly.")
    num_probes: int = option(6, "Random probes for what is left.")
    num_iterations: int = option(12, "Products per probe.")
    probe_batch: int = option(1, "Probes at once; bounds memory.")
    micro_batch: int = option(0, "Sequences in memory at once; 0 for all, which is fastest.")
    checkpoint_batch: int = option(2, "Checkpoints at once, over the devices; bounds memory.")


def smoke() -> Config:
    """Seconds."""
    return Config(workdir="runs/smoke", preset="smoke", num_data=64, num_probes=2, num_iterations=6)


def quickstart() -> Config:
    """Under a minute."""
    return Config()


def small() -> Config:
    """A quarter of a minute a checkpoint on one core."""
    return Config(workdir="runs/small", preset="small")


def paper() -> Config:
    """For the published run; wants an accelerator."""
    return Config(
        workdir="runs/paper", preset="paper", num_data=2**15, num_deflated=48, num_probes=16,
        num_iterations=48, micro_batch=4096, checkpoint_batch=8,
    )  # fmt: skip


def language_small() -> Config:
    """For `train_language --preset=small`; minutes a checkpoint on one core."""
    return Config(
        workdir="runs/language", preset="language_small", num_data=64, num_iterations=8,
        num_probes=3, checkpoint_batch=1,
    )  # fmt: skip


# How much is done at once and where, as against what comes out.
MEMORY = ("checkpoints", "probe_batch", "micro_batch", "checkpoint_batch")

PRESETS = {p.__name__: p() for p in (smoke, quickstart, small, paper, language_small)}


def folder_of(config: Config) -> pathlib.Path:
    """Returns the folder of the results, within that of the estimates they belong to."""
    return estimate_llc.results_folder(config) / "curvature"


def run(config: Config, phase: str = "curvature") -> None:
    """Measures what is missing."""
    import jax

    import llc_jax
    from llc_jax.storage.checkpoints import CheckpointDir
    from llc_jax.storage.files import read_json, write_atomic

    folder, estimates = folder_of(config), estimate_llc.results_folder(config) / "config.json"
    if not estimates.exists():
        raise ValueError(f"{estimates} is missing: run experiments.estimate_llc on it first.")
    sampled = read_json(estimates)
    setting = settings.load(config.workdir)
    kept = CheckpointDir(pathlib.Path(config.workdir) / "checkpoints")
    temperature = {
        "nbeta": sampled["config"]["nbeta"] or llc_jax.default_nbeta(sampled["config"]["num_data"]),
        "localization": sampled["config"]["localization"],
    }
    with workdir.lock(folder, "curvature"):
        facts = {
            "command": cli.command(
                "measure_curvature", config.preset, config, PRESETS[config.preset]
            ),
            "data_sha256": sampled["data_sha256"],
        }
        identity = cli.identity(config, MEMORY) | temperature
        path = folder / "records.jsonl"
        workdir.rewind_torn_line(path)
        done = {record["step"] for record in workdir.read_jsonl(path)}
        steps = workdir.good_steps(kept, done)
        steps = workdir.chosen(steps, config.checkpoints)
        work = [step for step in steps if step not in done]
        if not work:
            workdir.settle(folder / "config.json", identity, facts)
            cli.say(f"{phase}: all checkpoints are done")
        else:
            data, data_hash = settings.data_set(
                config.workdir, sampled["config"]["num_data"], sampled["config"]["data_seed"]
            )
            if not 1 <= config.num_data <= sampled["config"]["num_data"]:
                raise ValueError(
                    f"num_data={config.num_data}: the data set of the estimates has"
                    f" {sampled['config']['num_data']} sequences; give 1 to that many."
                )
            if data_hash != sampled["data_sha256"]:
                raise ValueError(
                    f"the data set has SHA-256 {data_hash}, the estimates had"
                    f" {sampled['data_sha256']}: another version of jax draws other numbers."
                )
            measured = llc_jax.curvature_over_checkpoints(
                jax.random.key(config.seed),
                setting.loss_fn,
                ((step, kept.restore_params(step)) for step in work),
                jax.tree.map(lambda x: x[: config.num_data], data),
                **temperature,
                num_eigenvalues=config.num_eigenvalues,
                num_deflated=config.num_deflated,
                num_iterations=config.num_iterations,
                num_probes=config.num_probes,
                probe_batch=config.probe_batch,
                micro_batch=config.micro_batch or None,
                checkpoint_batch=config.checkpoint_batch,
            )

            workdir.settle(folder / "config.json", identity, facts)
            (folder / "curvature.csv").unlink(missing_ok=True)  # stale from the first record on

            def finish():
                for count, (step, found) in enumerate(measured, 1):
                    workdir.append_jsonl(path, {"step": step, **found._asdict()})
                    yield count, f" step {step}: trace {found.trace:.4g}", None

            for _ in cli.progress(finish(), phase, len(work), "checkpoints"):
                pass
        out = folder / "curvature.csv"
        if work or not out.exists():
            write_atomic(out, table(load(folder)))


def load(folder: pathlib.Path):
    """Reads the results back: {step: `llc_jax.Curvature`}, by step; empty if there are none."""
    from llc_jax import Curvature

    records = workdir.read_jsonl(folder / "records.jsonl")
    return {
        record.pop("step"): Curvature(
            **{
                k: np.asarray(v, float) if isinstance(v, list) else math.nan if v is None else v
                for k, v in record.items()
            }
        )
        for record in sorted(records, key=lambda record: record["step"])
    }


def table(measured) -> str:
    """One line per checkpoint; the eigenvalues in columns of their own."""
    rows = []
    for step, found in measured.items():
        row = {"step": step}
        for name, value in found._asdict().items():
            if isinstance(value, np.ndarray):
                row |= {f"{name}_{i}": float(x) for i, x in enumerate(value, 1)}
            else:
                row[name] = value
        rows.append(row)
    return workdir.csv_text(rows)


if __name__ == "__main__":
    cli.main(PRESETS, run)
