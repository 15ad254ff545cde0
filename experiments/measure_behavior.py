"""Measures what the model does and how it is built, at every checkpoint of a workdir.

    python -m experiments.measure_behavior --preset=quickstart --workdir=runs/quickstart

Losses per example, in-context learning, shrinkage to the mean of the task prior, distance to known
predictors, sequences out of distribution; attention of every head, embeddings, layer norms. The
same command starts, continues or does nothing: one file per checkpoint in `behavior/`, and
`behavior.csv` and `attention.csv` at the end. Two cores: `quickstart` seconds.
`--noise_variance=0.015625 --name=behavior-quiet` measures on quieter sequences, which are the same
but for the size of their noise; their known predictors are those of that noise.
Expected: predictions first shrink to the mean of the prior (zero), then errors of late examples
fall below those of early ones.
"""

import dataclasses

from experiments import cli, estimate_llc, measuring, train_regression
from experiments.cli import option


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the measurement."""

    workdir: str = option("runs/quickstart", "Folder of the training run.")
    preset: str = option("quickstart", "Name of the preset.")
    name: str = option("behavior", "Folder of the results within the workdir.")
    noise_variance: float = option(0.0, "Variance of the label noise; 0 for that of the run.")
    seed: int = option(2000, "Seed of the sequences; fresh ones of the training task.")
    num_sequences: int = option(1024, "Sequences of the training task.")
    num_far: int = option(256, "Sequences out of distribution, of each kind.")
    num_attention: int = option(256, "Sequences whose attention is looked at.")
    checkpoint_batch: int = option(2, "Checkpoints at once, over the devices; bounds memory.")


def smoke() -> Config:
    """Seconds."""
    return Config(
        workdir="runs/smoke", preset="smoke", num_sequences=64, num_far=32, num_attention=32
    )


def quickstart() -> Config:
    """Seconds."""
    return Config()


def small() -> Config:
    """A minute."""
    return Config(
        workdir="runs/small", preset="small", num_sequences=8192, num_far=1024, num_attention=1024
    )


def paper() -> Config:
    """For the published run: some minutes for 191 checkpoints."""
    return dataclasses.replace(small(), workdir="runs/paper", preset="paper")


PRESETS = {p.__name__: p() for p in (smoke, quickstart, small, paper)}


@dataclasses.dataclass(frozen=True)
class Measure:
    """Behaviour and structure of one checkpoint, for `llc_jax.checkpoint_map.map_checkpoints`."""

    behavior: object
    structure: object

    def __call__(self, step, params, sequences, few, seen):
        """Returns both dictionaries in one."""
        return self.behavior(step, params, sequences, few) | self.structure(step, params, seen)


def run(config: Config, phase: str = "behavior") -> None:
    """Measures what is missing; see `experiments.measuring`."""
    import jax

    from llc_jax.checkpoint_map import map_checkpoints
    from llc_jax.inputs import checks
    from llc_jax.problems.regression import behavior as regression
    from llc_jax.problems.regression import datasets, structure

    for name in ("num_sequences", "num_far", "num_attention"):
        checks.at_least(name, getattr(config, name), 1)
    for name in ("num_far", "num_attention"):
        if getattr(config, name) > config.num_sequences:
            raise ValueError(
                f"{name}={getattr(config, name)} is above num_sequences={config.num_sequences},"
                " of which it takes the first."
            )
    folder, without = estimate_llc.results_folder(config), ["name"]
    model, task = train_regression.setting(train_regression.load_config(config.workdir))
    if not config.noise_variance:
        without.append("noise_variance")  # folders begun before there was this flag go on
    elif folder == measuring.folder_of(config):
        raise ValueError(
            f"noise_variance={config.noise_variance} with name={config.name}: figures and reports"
            " take that folder for the noise of the run; give another --name, such as"
            f" {config.name}-quiet."
        )
    else:
        task = dataclasses.replace(task, noise_variance=config.noise_variance)

    def measure(kept, steps):
        sequences = regression.evaluation_set(
            jax.random.key(config.seed), task, config.num_sequences
        )
        few, seen = (
            {name: x[:count] for name, x in sequences.items()}
            for count in (config.num_far, config.num_attention)
        )
        measured = map_checkpoints(
            Measure(regression.Behavior(model), structure.Structure(model)),
            ((step, kept.restore_params(step)) for step in steps),
            sequences, few, {name: seen[name] for name in ("x", "y")},
            checkpoint_batch=config.checkpoint_batch,
        )  # fmt: skip

        def named(step, found):
            params = kept.restore_params(step)
            found |= structure.embeddings(params)
            names = structure.layer_norm_names(params)
            return step, datasets.dataset(found, regression.GAINS, names), found["mean_loss"]

        return (named(*one) for one in measured)

    tables = {"behavior.csv": datasets.behavior_table, "attention.csv": datasets.attention_table}
    measuring.run(
        config, phase, "measure_behavior", PRESETS, measure, tables, folder=folder, without=without
    )


if __name__ == "__main__":
    cli.main(PRESETS, run)
