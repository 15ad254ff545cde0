"""Proposes SGLD settings for the checkpoints of a workdir, and shows how far they decide λ̂.

    python -m experiments.calibrate_sgld --preset=quickstart --workdir=runs/quickstart

Writes `calibration/calibration.json`, `sweep.csv` and `sweep.png`, and prints the reasons and the
command that runs the proposal at every checkpoint. One checkpoint is swept over a grid of step
sizes, nbeta and localization; pilot chains at the others see to it that the step size suits all.
"""

import dataclasses
import pathlib

import numpy as np

from experiments import cli, estimate_llc, settings, workdir
from experiments.cli import option


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a calibration."""

    workdir: str = option("runs/quickstart", "Folder of the training run.")
    preset: str = option("quickstart", "Name of the preset.")
    seed: int = option(0, "Seed of the chains.")
    step: int = option(-1, "Training step of the checkpoint that is swept; -1 for the last.")
    num_checkpoints: int = option(3, "Other checkpoints with pilot chains, evenly spaced.")
    data_seed: int = option(1000, "Seed of the data set, as in estimate_llc.")
    num_data: int = option(2048, "Sequences in the data set, n.")
    nbeta: float = option(30.0, "Middle of the grid of nβ; 0 for n / log n.")
    localization: float = option(0.0, "Weakest γ; 0 for the weakest that the burn-in relaxes.")
    step_fractions: str = option("0.2,0.4,0.8", "Step sizes of the grid, in units of 1/Λ.")
    nbeta_factors: str = option("0.333,1,3", "nβ of the grid, in units of nbeta.")
    localization_factors: str = option("1,3,10", "γ of the grid, in units of the weakest.")
    num_chains: int = option(2, "Chains per setting.")
    num_draws: int = option(60, "Draws per chain after burn-in.")
    num_burnin: int = option(60, "Burn-in, and length of the pilot chains.")
    batch_size: int = option(32, "Sequences per minibatch, m.")
    grad_accum: int = option(1, "Micro-batches per minibatch; bounds memory.")
    setting_batch: int = option(0, "Settings in flight at once; 0 for all; bounds memory.")
    relative_stderr: float = option(0.02, "Standard error to be reached, relative to λ̂.")


def smoke() -> Config:
    """Seconds."""
    return Config(
        workdir="runs/smoke", preset="smoke", num_data=256, num_draws=20, num_burnin=20,
        num_checkpoints=1,
    )  # fmt: skip


def quickstart() -> Config:
    """Some minutes."""
    return Config()


def small() -> Config:
    """Under an hour."""
    return Config(
        workdir="runs/small", preset="small", num_data=8192, nbeta=100.0, num_chains=4,
        num_draws=300, num_burnin=300,
    )  # fmt: skip


def paper() -> Config:
    """For the published run; wants an accelerator."""
    return Config(
        workdir="runs/paper", preset="paper", num_data=2**20, nbeta=66.67, num_chains=4,
        num_draws=1000, num_burnin=1000, batch_size=1024, setting_batch=9, num_checkpoints=8,
    )  # fmt: skip


def language_small() -> Config:
    """For `train_language --preset=small`: one temperature, two localizations."""
    return Config(
        workdir="runs/language", preset="language_small", num_data=1024, nbeta=500.0,
        localization=5000.0, step_fractions="0.2,0.4", nbeta_factors="1",
        localization_factors="1,4", num_checkpoints=2, batch_size=8,
    )  # fmt: skip


PRESETS = {p.__name__: p() for p in (smoke, quickstart, small, paper, language_small)}


def numbers(text: str) -> tuple[float, ...]:
    """Parses a flag such as `0.2,0.4`."""
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r}: give numbers separated by commas.") from None


def run(config: Config, phase: str = "calibration") -> None:
    """Calibrates, unless this very calibration is there."""
    import jax

    import llc_jax
    from llc_jax.figures.base import png
    from llc_jax.storage.checkpoints import CheckpointDir
    from llc_jax.storage.files import read_json, write_atomic, write_json

    root = pathlib.Path(config.workdir)
    folder = root / "calibration"
    setting = settings.load(config.workdir)
    kept = CheckpointDir(root / "checkpoints")
    with workdir.lock(folder, "calibrate"):
        steps = kept.steps()
        step = steps[-1] if steps and config.step == -1 else config.step
        if step not in steps:
            raise ValueError(
                f"step={step}: {kept.folder} has checkpoints at {steps}; give one of these."
            )
        path, inputs = folder / "calibration.json", {"config": cli.identity(config), "step": step}
        if path.exists() and inputs.items() <= read_json(path).items():
            cli.say(f"{phase}: up to date in {path}")
            return
        count = config.num_checkpoints and config.num_checkpoints + 1
        others = np.linspace(0, len(steps) - 1, count).round().astype(int)
        others = [steps[i] for i in others if steps[i] != step]
        data, data_hash = settings.data_set(config.workdir, config.num_data, config.data_seed)
        calibration = llc_jax.calibrate(
            jax.random.key(config.seed),
            setting.loss_fn,
            kept.restore_params(step),
            data,
            nbeta=config.nbeta or None,
            localization=config.localization or None,
            sampler=llc_jax.SGLD(1.0),
            checkpoints=[(s, kept.restore_params(s)) for s in others] or None,
            step_fractions=numbers(config.step_fractions),
            nbeta_factors=numbers(config.nbeta_factors),
            localization_factors=numbers(config.localization_factors),
            num_draws=config.num_draws,
            num_burnin=config.num_burnin,
            num_chains=config.num_chains,
            relative_stderr=config.relative_stderr,
            report=lambda text: cli.say(f"{phase}: {text}"),
            batch_size=config.batch_size,
            grad_accum=config.grad_accum,
            setting_batch=config.setting_batch or None,
        )
        proposal = proposed(config, calibration.settings)
        line = cli.command("estimate_llc", config.preset, proposal,
                           estimate_llc.PRESETS[config.preset])  # fmt: skip
        write_atomic(folder / "sweep.png", png(calibration.plot()))
        write_atomic(folder / "sweep.csv", table(calibration.grid))
        write_json(path, {
            **inputs,
            "command": cli.command("calibrate_sgld", config.preset, config, PRESETS[config.preset]),
            "versions": workdir.versions(),
            "data_sha256": data_hash,
            "settings": calibration.settings
            | {"sampler": calibration.settings["sampler"]._asdict()},
            "reasons": calibration.reasons,
            "warnings": calibration.warnings,
            "run": line,
        })  # fmt: skip
    cli.say(f"{phase} at step {step}:\n{calibration.summary()}")
    cli.say(f"wrote {folder}/sweep.png, sweep.csv, calibration.json; run the proposal with\n{line}")


def proposed(config: Config, chosen) -> estimate_llc.Config:
    """The sweep over checkpoints that runs the proposal, in a results folder of its own."""
    return dataclasses.replace(
        estimate_llc.PRESETS[config.preset],
        workdir=config.workdir,
        name="llc-calibrated",
        data_seed=config.data_seed,
        num_data=config.num_data,
        step_size=float(f"{float(chosen['sampler'].step_size):.3g}"),
        nbeta=float(f"{chosen['nbeta']:.4g}"),
        localization=float(f"{chosen['localization']:.4g}"),
        num_chains=chosen["num_chains"],
        num_draws=chosen["num_draws"],
        num_burnin=chosen["num_burnin"],
        thinning=chosen["thinning"],
        batch_size=config.batch_size,
        grad_accum=config.grad_accum,
    )


def table(sweep) -> str:
    """The grid as CSV, one line per setting."""
    return workdir.csv_text([
        {
            "step_fraction": sweep.step_fractions[e], "step_size": sweep.step_sizes[e, b, g],
            "nbeta": sweep.nbetas[b], "localization": sweep.localizations[g],
            "llc": estimate.mean, "stderr": estimate.stderr, "rhat": estimate.rhat,
            "ess": estimate.ess, "acceptance": estimate.acceptance.mean(),
            "stability": estimate.stability.max(), "distance": estimate.distance.mean(),
            "verdict": estimate.verdict,
        }
        for (e, b, g), estimate in np.ndenumerate(sweep.estimates)
    ])  # fmt: skip


if __name__ == "__main__":
    cli.main(PRESETS, run)
