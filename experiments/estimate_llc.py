"""Estimates the LLC at every checkpoint of a workdir.

    python -m experiments.estimate_llc --preset=quickstart --workdir=runs/quickstart

The same command starts, continues or does nothing: one file per checkpoint, written whole.
`--shard_checkpoints=i/n` does every n-th chunk of checkpoints, for array jobs without
communication; `--multihost` spreads each chunk over the devices of a pod instead.
Two cores: `quickstart` about a minute. Expected: a curve that starts near or below zero, where
the initialisation is no minimum, and rises as the loss falls.
"""

import dataclasses
import pathlib
import re

from experiments import cli, workdir
from experiments.cli import option
from experiments.presets import Presets


@dataclasses.dataclass(frozen=True)
class Config(cli.Pod, cli.Sampling, cli.Run):
    """Settings of a sweep."""

    name: str = option("llc", "Folder of the results within the workdir.")
    step_size: float = option(2e-4, "Step of the sampler, ε.")
    num_chains: int = option(4, "Chains per checkpoint.")
    num_draws: int = option(90, "Draws per chain after burn-in.")
    thinning: int = option(1, "Steps of the sampler per draw.")
    checkpoint_batch: int = option(1, "Checkpoints in flight at once; bounds memory.")
    chain_batch: int = option(0, "Chains one device runs at once; 0 for all its share.")
    num_probes: int = option(
        8, "Draws at which acceptance is measured; 0: neither it nor stability, compiles sooner."
    )
    checkpoints: str = option("", "Training steps to estimate, with commas; empty for all.")
    shard_checkpoints: str = option("0/1", "i/n: do only every n-th chunk, from chunk i.")


PRESETS = Presets("estimate_llc", Config)
# Which checkpoints, and how much at once: no part of what is computed at each.
NOT_PART_OF_AN_ESTIMATE = ("checkpoints", "checkpoint_batch", "chain_batch", "grad_accum")


def results_folder(config: Config) -> pathlib.Path:
    """Returns the folder of the result files."""
    if not re.fullmatch(r"[\w.-]+", config.name) or config.name.startswith("."):
        raise ValueError(f"name={config.name!r}: give a plain folder name.")
    return pathlib.Path(config.workdir) / config.name


def parse_shard(text: str) -> tuple[int, int]:
    """Parses `i/n` with 0 <= i < n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise ValueError(f"shard_checkpoints={text!r}: give i/n with 0 <= i < n, such as 0/8.")
    return int(match[1]), int(match[2])


def run(config: Config, phase: str = "llc") -> None:
    """Estimates what is missing; see `experiments.run`."""
    import jax

    from experiments import problems
    from experiments.run import Sweep, over_checkpoints
    from llc_jax import estimate_llc_over_checkpoints
    from llc_jax.storage.files import read_json
    from llc_jax.storage.results import estimate_dataset

    folder, shard = results_folder(config), parse_shard(config.shard_checkpoints)
    problem = problems.load(config)
    checkpoints, remedy = problem.saved(), "give another --name"
    identity = cli.identity(config, NOT_PART_OF_AN_ESTIMATE) | problems.identity(config, problem)

    def start(steps):
        data, data_hash = problems.data_set(problem, config.num_data, config.data_seed)
        record = folder / "config.json"
        if record.exists() and (before := read_json(record)["data_sha256"]) != data_hash:
            raise ValueError(
                f"the data set has SHA-256 {data_hash}, that of the estimates in {folder} had"
                f" {before}: another version of jax draws other numbers, and other text has other"
                f" tokens. Go on with what they were begun with, or {remedy}."
            )
        seed = problem.settings.get("seed")
        provenance = {
            "data_sha256": data_hash,
            **({} if seed is None else {"train_seed": seed}),
            "seed": config.seed,
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            **{f"version_{name}": v for name, v in workdir.versions().items()},
        }
        estimates = estimate_llc_over_checkpoints(
            jax.random.key(config.seed),
            problem.loss_fn,
            ((step, checkpoints[step]) for step in steps),
            data,
            sampler=problems.sampler_of(config, config.step_size),
            nbeta=config.nbeta or None,
            localization=config.localization,
            num_chains=config.num_chains,
            num_draws=config.num_draws,
            num_burnin=config.num_burnin,
            thinning=config.thinning,
            batch_size=config.batch_size,
            grad_accum=config.grad_accum,
            checkpoint_batch=config.checkpoint_batch,
            chain_batch=config.chain_batch or None,
            num_probes=config.num_probes,
            **problems.estimation_options(problem),
        )

        def datasets():
            for step, found in estimates:
                text = f" step {step}: {found.mean:.1f} ± {found.stderr:.1f}"
                yield step, estimate_dataset(found, provenance), text

        return datasets(), {"preset": config.preset, "data_sha256": data_hash}

    sweep = Sweep(
        folder, identity, start, cli.command(config, PRESETS), chunk=config.checkpoint_batch,
        shard=shard, without=NOT_PART_OF_AN_ESTIMATE, remedy=remedy,
    )  # fmt: skip
    over_checkpoints(config, phase, checkpoints, sweep)


if __name__ == "__main__":
    cli.main(PRESETS, run)
