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

import numpy as np

from experiments import cli, settings, workdir
from experiments.cli import option


@dataclasses.dataclass(frozen=True)
class Config(cli.Pod):
    """Settings of a sweep. SGLD: ε = step_size, γ = localization, nβ = nbeta, m = batch_size."""

    workdir: str = option("runs/quickstart", "Folder of the training run.")
    preset: str = option("quickstart", "Name of the preset.")
    name: str = option("llc", "Folder of the results within the workdir.")
    seed: int = option(0, "Seed of the chains.")
    data_seed: int = option(1000, "Seed of the data set, sequences as in training.")
    num_data: int = option(2048, "Sequences in the data set, n.")
    step_size: float = option(2e-4, "SGLD step ε.")
    nbeta: float = option(30.0, "n times inverse temperature, nβ; 0 for n / log n.")
    localization: float = option(300.0, "Pull towards the checkpoint, γ.")
    num_chains: int = option(4, "Chains per checkpoint.")
    num_draws: int = option(90, "Draws per chain after burn-in.")
    num_burnin: int = option(60, "Draws per chain thrown away first.")
    thinning: int = option(1, "SGLD steps per draw.")
    batch_size: int = option(32, "Sequences per minibatch, m.")
    grad_accum: int = option(1, "Micro-batches per minibatch; bounds memory.")
    checkpoint_batch: int = option(1, "Checkpoints in flight at once; bounds memory.")
    chain_batch: int = option(0, "Chains one device runs at once; 0 for all its share.")
    num_probes: int = option(
        8, "Draws at which acceptance is measured; 0: neither it nor stability, compiles sooner."
    )
    checkpoints: str = option("", "Training steps to estimate, with commas; empty for all.")
    shard_checkpoints: str = option("0/1", "i/n: do only every n-th chunk, from chunk i.")


def smoke() -> Config:
    """Seconds."""
    return Config(
        workdir="runs/smoke", preset="smoke", num_data=256, batch_size=32, num_draws=20,
        num_burnin=10, localization=1000.0,
    )  # fmt: skip


def quickstart() -> Config:
    """About a minute: strong localization, so that the chains forget their start within burn-in."""
    return Config()


def small() -> Config:
    """Half a minute a checkpoint on one core: closer to the checkpoint and longer."""
    return Config(
        workdir="runs/small", preset="small", num_data=8192, step_size=5e-5, nbeta=100.0,
        localization=1000.0, num_draws=300, num_burnin=150,
    )  # fmt: skip


def paper() -> Config:
    """The published settings: Hoogland et al. 2024 (arXiv 2402.02364), table A.9."""
    return Config(
        workdir="runs/paper", preset="paper", num_data=2**20, step_size=3e-4, nbeta=66.67,
        localization=6.67, num_chains=10, num_draws=4000, num_burnin=1000, batch_size=1024,
        checkpoint_batch=8,
    )  # fmt: skip


def language_small() -> Config:
    """For `train_language --preset=small`, on two cores: 32 checkpoints in one to two hours."""
    return Config(
        workdir="runs/language", preset="language_small", num_data=1024, step_size=7e-6,
        nbeta=500.0, localization=10_000.0, num_chains=2, num_draws=100, num_burnin=70,
        batch_size=8,
    )  # fmt: skip


def language_paper() -> Config:
    """The published settings of the language model (arXiv 2402.02364, appendix A), no burn-in."""
    return Config(
        workdir="runs/language-paper", preset="language_paper", num_data=2**15, step_size=3e-3,
        nbeta=21.71, localization=300.0, num_chains=20, num_draws=200, num_burnin=0,
        batch_size=100, grad_accum=25, chain_batch=1,
    )  # fmt: skip


PRESETS = {
    p.__name__: p() for p in (smoke, quickstart, small, paper, language_small, language_paper)
}


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


def todo(steps: list[int], finished: set[int], size: int, shard: tuple[int, int]) -> list[int]:
    """The checkpoints to sample: whole chunks, so that a resumed chunk is the one it was.

    Args:
      steps: all checkpoints, in order.
      finished: those with a result.
      size: checkpoints per chunk.
      shard: (i, n).

    Returns:
      The steps of every chunk of this shard in which a result is missing.
    """
    chunks = [steps[start : start + size] for start in range(0, len(steps), size)]
    mine = chunks[shard[0] :: shard[1]]
    return [step for chunk in mine if not finished.issuperset(chunk) for step in chunk]


def run(config: Config, phase: str = "llc") -> None:
    """Estimates what is missing."""
    import jax

    from llc_jax import SGLD, estimate_llc_over_checkpoints, parallel
    from llc_jax.storage.checkpoints import CheckpointDir
    from llc_jax.storage.files import read_json
    from llc_jax.storage.results import finished_steps, save_estimate

    folder, shard = results_folder(config), parse_shard(config.shard_checkpoints)
    setting = settings.load(config.workdir)
    kept = CheckpointDir(pathlib.Path(config.workdir) / "checkpoints")
    writer = cli.is_main()
    record, identity = folder / "config.json", cli.identity(config, NOT_PART_OF_AN_ESTIMATE)
    remedy = "give another --name"
    with workdir.lock(folder, f"shard-{shard[0]}-of-{shard[1]}-{jax.process_index()}"):
        if writer:
            workdir.check(record, identity, remedy, NOT_PART_OF_AN_ESTIMATE)
        done = set(finished_steps(folder))
        steps = workdir.good_steps(kept, done)
        steps = parallel.from_process_zero(np.asarray(steps, np.int32)).tolist()
        steps = workdir.chosen(steps, config.checkpoints)
        work = todo(steps, done, config.checkpoint_batch, shard)
        work = parallel.from_process_zero(np.asarray(work, np.int32)).tolist()
        if not work:
            cli.say(f"{phase}: all checkpoints of shard {config.shard_checkpoints} are done")
            return
        data, data_hash = settings.data_set(config.workdir, config.num_data, config.data_seed)
        if record.exists() and (before := read_json(record)["data_sha256"]) != data_hash:
            raise ValueError(
                f"the data set has SHA-256 {data_hash}, that of the estimates in {folder} had"
                f" {before}: another version of jax draws other numbers, and other text has other"
                f" tokens. Go on with what they were begun with, or {remedy}."
            )
        provenance = {
            "data_sha256": data_hash,
            "train_seed": setting.training.seed,
            "seed": config.seed,
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            **{f"version_{name}": v for name, v in workdir.versions().items()},
        }
        estimates = estimate_llc_over_checkpoints(
            jax.random.key(config.seed),
            setting.loss_fn,
            ((step, kept.restore_params(step)) for step in work),
            data,
            sampler=SGLD(config.step_size),
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
            parts_fn=setting.parts_fn,
        )
        if writer:
            facts = {
                "preset": config.preset,
                "command": cli.command(
                    "estimate_llc", config.preset, config, PRESETS[config.preset]
                ),
                "data_sha256": data_hash,
            }
            workdir.settle(record, identity, facts, remedy, NOT_PART_OF_AN_ESTIMATE)

        def finish(flag):
            for count, (step, estimate) in enumerate(estimates, 1):
                if writer and step not in done:
                    save_estimate(folder, step, estimate, provenance)
                yield count, f" step {step}: {estimate.mean:.1f} ± {estimate.stderr:.1f}", None
                if (signum := flag.agreed()) is not None:
                    cli.say(f"\n{phase}: stopped after step {step}; the same command continues")
                    raise parallel.StopRequested(signum)

        with parallel.stop_signals() as flag:
            for _ in cli.progress(finish(flag), phase, len(work), "checkpoints"):
                pass


if __name__ == "__main__":
    cli.main(PRESETS, run)
