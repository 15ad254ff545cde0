"""The whole flow in one command: train, estimate λ̂, measure everything else, find stages, report.

    python -m experiments.quickstart

Under three minutes on two cores; run again, it finds everything done. Expected: the loss falls
from about 4.4 to about 2.0, λ̂ rises from below zero, and `runs/quickstart/report.html` shows
both with the stages found.
"""

import dataclasses

from experiments import (
    cli,
    estimate_llc,
    find_stages,
    make_report,
    measure_behavior,
    measure_curvature,
    measure_trajectory,
    train_regression,
)
from experiments.cli import option
from experiments.presets import Presets

PHASES = {
    "train": train_regression,
    "llc": estimate_llc,
    "curvature": measure_curvature,
    "behavior": measure_behavior,
    "trajectory": measure_trajectory,
    "stages": find_stages,
    "report": make_report,
}


@dataclasses.dataclass(frozen=True)
class Config(cli.Pod):
    """Where to run; every other setting is the preset's."""

    workdir: str = option("runs/quickstart", "Folder of the run.")
    preset: str = option("quickstart", "Name of the preset, the same for every phase.")
    seed: int = option(1, "Seed of the training run.")


PRESETS = Presets("quickstart", Config)


def run(config: Config) -> None:
    """Runs the phases in order; each starts, continues or finds its work done.

    On a pod process 0 does alone what follows the first phase that is no `cli.Pod`.
    """
    from llc_jax import parallel

    for number, (name, module) in enumerate(PHASES.items(), 1):
        settings = dataclasses.replace(module.PRESETS[config.preset], workdir=config.workdir)
        if module is train_regression:
            settings = dataclasses.replace(settings, seed=config.seed)
        if not issubclass(module.Config, cli.Pod):
            parallel.leave_pod()
            if not cli.is_main():
                return
        module.run(settings, f"[{number}/{len(PHASES)}] {name}")
    cli.say(f"open {config.workdir}/report.html")


if __name__ == "__main__":
    cli.main(PRESETS, run)
