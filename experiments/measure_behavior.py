"""Measures what the model does and how it is built, at every checkpoint of a workdir.

    python -m experiments.measure_behavior --preset=quickstart --workdir=runs/quickstart

Losses per example, in-context learning, shrinkage to the mean of the task prior, distance to known
predictors, sequences out of distribution; attention of every head, embeddings, layer norms; of a
problem of yours (`--problem=path/to/mine.py`) its metrics. The same command starts, continues or
does nothing: one file per checkpoint in `behavior/`, and `behavior.csv` and `attention.csv` at the
end. Two cores: `quickstart` seconds.
`--noise_variance=0.015625 --name=behavior-quiet` measures on quieter sequences, which are the same
but for the size of their noise; their known predictors are those of that noise.
Expected: predictions first shrink to the mean of the prior (zero), then errors of late examples
fall below those of early ones.
"""

import dataclasses
import pathlib
from typing import Any

from experiments import cli, estimate_llc
from experiments.cli import option
from experiments.presets import Presets


@dataclasses.dataclass(frozen=True)
class Config(cli.Run):
    """Settings of the measurement; of a problem of yours all but the first few do not matter."""

    name: str = option("behavior", "Folder of the results within the workdir.")
    noise_variance: float = option(
        0.0, "Variance of the label noise; 0 for that of the run.", added=True
    )
    seed: int = option(2000, "Seed of the sequences; fresh ones of the training task.")
    num_sequences: int = option(1024, "Sequences of the training task.")
    num_far: int = option(256, "Sequences out of distribution, of each kind.")
    num_attention: int = option(256, "Sequences whose attention is looked at.")
    checkpoint_batch: int = option(2, "Checkpoints at once, over the devices; bounds memory.")


PRESETS = Presets("measure_behavior", Config)


def folder_of(config) -> pathlib.Path:
    """Returns the folder of the results that figures and reports take."""
    return pathlib.Path(config.workdir) / "behavior"


def run(config: Config, phase: str = "behavior") -> None:
    """Measures what is missing; see `experiments.run`."""
    folder = estimate_llc.results_folder(config)
    if config.noise_variance and folder == folder_of(config):
        raise ValueError(
            f"noise_variance={config.noise_variance} with name={config.name}: figures and reports"
            " take that folder for the noise of the run; give another --name, such as"
            f" {config.name}-quiet."
        )
    measure(config, phase, folder, PRESETS, ["name"])


def measure(
    config: Any, phase: str, folder: pathlib.Path, presets: Presets, without: list[str]
) -> None:
    """Measures what the problem of a config says, into a folder.

    Args:
      config: of this experiment or another.
      phase: for the progress line.
      folder: of the results.
      presets: of the experiment.
      without: flags that do not change what is measured, beside those that bound memory.
    """
    from experiments import problems
    from experiments.run import Sweep, over_checkpoints

    problem = problems.load(config)
    if problem.measured_by != presets.experiment:
        raise ValueError(
            f"{config.workdir} holds a run of {problem.name}: use python -m"
            f" experiments.{problem.measured_by}."
        )
    checkpoints, measurement = problem.saved(), problem.measurement(config)
    identity = measurement.identity
    if identity is None:
        identity = cli.identity(config, ["checkpoint_batch", *without])
    sweep = Sweep(
        folder, identity | problems.identity(config, problem),
        lambda steps: (measurement.each(checkpoints, steps), {}),
        cli.command(config, presets), measurement.tables,
    )  # fmt: skip
    over_checkpoints(config, phase, checkpoints, sweep)


def metrics(config: Any) -> None:
    """Measures the metrics of a problem that stands alone, if it has any; other flags are default.

    Args:
      config: of any experiment on a workdir.
    """
    from experiments import problems

    if cli.stands_alone(config.problem) and problems.load(config).metrics:
        run(Config(workdir=config.workdir, preset=config.preset, problem=config.problem), "metrics")


if __name__ == "__main__":
    cli.main(PRESETS, run)
