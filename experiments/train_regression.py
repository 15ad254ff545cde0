"""Trains a transformer on in-context linear regression and keeps its checkpoints.

    python -m experiments.train_regression --preset=quickstart

The same command starts, continues or does nothing. Two cores: `smoke` seconds, `quickstart` under
a minute. Expected: the loss stays near 4.1 (predicting zero: 4.125) and then falls towards that of
ridge regression, 1.660.
"""

import dataclasses

from experiments import cli, training
from experiments.cli import option
from experiments.presets import Presets


@dataclasses.dataclass(frozen=True)
class Config(cli.Pod):
    """Settings of a training run."""

    workdir: str = option("runs/quickstart", "Folder of the run.")
    preset: str = option("quickstart", "Name of the preset.")
    seed: int = option(1, "Seed of initialisation and data.")
    num_steps: int = option(2000, "Updates in all, T.")
    batch_size: int = option(64, "Sequences per update.")
    learning_rate: float = option(3e-3, "Peak of the linear one-cycle.")
    dim: int = option(4, "Input dimension of the tasks, D.")
    num_examples: int = option(8, "Examples per sequence, K; the context is 2K tokens.")
    noise_variance: float = option(0.125, "Variance of the label noise.")
    num_tasks: int = option(0, "Tasks of the finite prior, M; 0 for the Gaussian prior.")
    num_layers: int = option(2, "Transformer blocks.")
    num_heads: int = option(4, "Attention heads.")
    d_model: int = option(64, "Width of the residual stream.")
    d_mlp: int = option(64, "Hidden width of the MLPs.")
    double_residual: bool = option(False, "Blocks add their input twice, as in the published runs.")
    num_log: int = option(9, "Checkpoints on the logarithmic grid.")
    num_linear: int = option(5, "Checkpoints on the linear grid.")
    block: int = option(200, "Updates per compiled block: one line of metrics each.")


PRESETS = Presets("train_regression", Config)


def load_config(folder: str) -> Config:
    """Reads the configuration a workdir was trained with.

    Raises:
      ValueError: if it holds no training run, or one of another model.
    """
    return training.load_config(folder, Config, "train_regression")


def problem(config: Config):
    """The problem of a run."""
    from llc_jax.problems.regression.problem import problem

    return training.problem(problem, config)


def run(config: Config, phase: str = "train") -> None:
    """Trains to the end, from wherever the workdir stands; see `experiments.training`."""
    from llc_jax.problems.regression.problem import setting

    model, task = setting(config)

    def recipe():
        from llc_jax.problems.regression.data import RegressionBatches
        from llc_jax.problems.regression.losses import RegressionLoss
        from llc_jax.problems.regression.model import init_params
        from llc_jax.training import optimizers

        return training.Recipe(
            init=lambda rng_key: init_params(rng_key, model),
            loss_fn=RegressionLoss(model),
            batch_fn=RegressionBatches(task, config.batch_size),
            optimizer=optimizers.adam_one_cycle(config.learning_rate, config.num_steps),
        )

    training.run(config, phase, recipe, PRESETS)


if __name__ == "__main__":
    cli.main(PRESETS, run)
