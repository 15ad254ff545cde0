"""Proposes settings of SGLD or another sampler for a workdir, and shows how far they decide λ̂.

    python -m experiments.calibrate_sgld --preset=quickstart --workdir=runs/quickstart

Writes `calibration/calibration.json`, `sweep.csv` and `sweep.png`, and prints the reasons and the
command that runs the proposal at every checkpoint. One checkpoint is swept over a grid of step
sizes, nbeta and localization; pilot chains at the others see to it that the step size suits all.
"""

import dataclasses
import pathlib

import numpy as np

from experiments import cli, estimate_llc, workdir
from experiments.cli import option
from experiments.presets import Presets
from experiments.workdir import numbers


@dataclasses.dataclass(frozen=True)
class Config(cli.Sampling, cli.Run):
    """Settings of a calibration."""

    step: int = option(-1, "Training step of the checkpoint that is swept; -1 for the last.")
    num_checkpoints: int = option(3, "Other checkpoints with pilot chains, evenly spaced.")
    localization: float = option(0.0, "Weakest γ; 0 for the weakest that the burn-in relaxes.")
    step_fractions: str = option("0.2,0.4,0.8", "Step sizes of the grid, in units of 1/Λ.")
    nbeta_factors: str = option("0.333,1,3", "nβ of the grid, in units of nbeta.")
    localization_factors: str = option("1,3,10", "γ of the grid, in units of the weakest.")
    num_chains: int = option(2, "Chains per setting.")
    num_draws: int = option(60, "Draws per chain after burn-in.")
    setting_batch: int = option(0, "Settings in flight at once; 0 for all; bounds memory.")
    relative_stderr: float = option(0.02, "Standard error to be reached, relative to λ̂.")


PRESETS = Presets("calibrate_sgld", Config)


def run(config: Config, phase: str = "calibration") -> None:
    """Calibrates, unless this very calibration is there."""
    import jax

    import llc_jax
    from experiments import problems
    from experiments.run import commit, is_fresh
    from llc_jax.figures.base import png

    folder = pathlib.Path(config.workdir) / "calibration"
    problem = problems.load(config)
    kept = problem.saved()
    with workdir.lock(folder, "calibrate"):
        steps = sorted(kept)
        step = steps[-1] if steps and config.step == -1 else config.step
        if step not in steps:
            raise ValueError(
                f"step={step}: {config.workdir} has checkpoints at {steps}; give one of these."
            )
        identity = cli.identity(config) | problems.identity(config, problem)
        record, known = folder / "calibration.json", {"config": identity, "step": step}
        if is_fresh(record, known, "sweep.png", "sweep.csv"):
            cli.say(f"{phase}: up to date in {record}")
            return
        count = config.num_checkpoints and config.num_checkpoints + 1
        others = np.linspace(0, len(steps) - 1, count).round().astype(int)
        others = [steps[i] for i in others if steps[i] != step]
        data, data_hash = problems.data_set(problem, config.num_data, config.data_seed)
        calibration = llc_jax.calibrate(
            jax.random.key(config.seed),
            problem.loss_fn,
            kept[step],
            data,
            nbeta=config.nbeta or None,
            localization=config.localization or None,
            sampler=problems.sampler_of(config, 1.0),
            checkpoints=[(s, kept[s]) for s in others] or None,
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
        line = cli.command(proposal, estimate_llc.PRESETS)
        outputs = {"sweep.png": png(calibration.plot()), "sweep.csv": table(calibration.grid)}
        chosen = calibration.settings
        commit(
            record, known, outputs, command=cli.command(config, PRESETS), data_sha256=data_hash,
            settings=chosen | {"sampler": chosen["sampler"]._asdict()}, run=line,
            reasons=calibration.reasons, warnings=calibration.warnings,
        )  # fmt: skip
    cli.say(f"{phase} at step {step}:\n{calibration.summary()}")
    cli.say(f"wrote {folder}/sweep.png, sweep.csv, calibration.json; run the proposal with\n{line}")


def proposed(config: Config, chosen) -> estimate_llc.Config:
    """The sweep over checkpoints that runs the proposal, in a results folder of its own."""
    given = chosen["sampler"]._asdict()
    options = {name: value for name, value in given.items() if name != "step_size"}
    base = estimate_llc.PRESETS.base(config)
    return dataclasses.replace(
        base,
        workdir=config.workdir,
        problem=config.problem,
        sampler=config.sampler,
        sampler_options=",".join(f"{name}={float(x):.6g}" for name, x in options.items()),
        name="llc-calibrated",
        data_seed=config.data_seed,
        num_data=config.num_data,
        step_size=float(f"{float(given['step_size']):.3g}"),
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
