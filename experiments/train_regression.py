"""Trains a transformer on in-context linear regression and keeps its checkpoints.

    python -m experiments.train_regression --preset=quickstart

The same command starts, continues or does nothing. Two cores: `smoke` seconds, `quickstart` under
a minute. Expected: the loss stays near 4.1 (predicting zero: 4.125) and then falls towards that of
ridge regression, 1.660.
"""

import dataclasses
import functools

from experiments import cli, training
from experiments.cli import option


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


def smoke() -> Config:
    """Seconds: everything small."""
    return Config(
        workdir="runs/smoke", preset="smoke", num_steps=60, batch_size=32, d_model=16, d_mlp=16,
        num_layers=1, num_heads=2, num_log=4, num_linear=3, block=20,
    )  # fmt: skip


def quickstart() -> Config:
    """Under a minute: the paper's model, a short one-cycle at its peak learning rate."""
    return Config()


def small() -> Config:
    """18 minutes of one core: with all that follows, two seeds on two cores in under an hour."""
    return Config(
        workdir="runs/small", preset="small", num_steps=16_000, batch_size=128,
        num_log=24, num_linear=16, block=1000,
    )  # fmt: skip


def paper() -> Config:
    """The published run, seed 1: 500,000 steps of batch 256, 191 checkpoints."""
    return Config(
        workdir="runs/paper", preset="paper", num_steps=500_000, batch_size=256,
        double_residual=True, num_log=100, num_linear=100, block=1000,
    )  # fmt: skip


PRESETS = {p.__name__: p() for p in (smoke, quickstart, small, paper)}


def setting(config: Config):
    """Returns (model, task) of a configuration."""
    from llc_jax.problems.regression.data import RegressionTask
    from llc_jax.problems.regression.model import RegressionTransformer

    task = RegressionTask(
        dim=config.dim,
        num_examples=config.num_examples,
        noise_variance=config.noise_variance,
        num_tasks=config.num_tasks or None,
    )
    model = RegressionTransformer(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        d_model=config.d_model,
        d_mlp=config.d_mlp,
        num_examples=config.num_examples,
        dim=config.dim,
        double_residual=config.double_residual,
    )
    return model, task


def load_config(folder: str) -> Config:
    """Reads the configuration a workdir was trained with.

    Raises:
      ValueError: if it holds no training run, or one of another model.
    """
    return training.load_config(folder, Config, "train_regression")


def described(config: Config):
    """What `experiments.settings.Setting` says of a run, in its order."""
    from llc_jax.problems.regression.losses import RegressionLoss, RegressionTokenLosses

    model, task = setting(config)
    return (
        "in-context linear regression", config, RegressionLoss(model), RegressionTokenLosses(model),
        functools.partial(draw, task), functools.partial(baselines, task),
    )  # fmt: skip


@functools.cache
def draw(task, num_data: int, seed: int):
    """Fresh sequences as host arrays, drawn on the CPU, wherever the rest runs.

    Accelerators round the normal quantiles differently, and would make another data set.
    """
    import jax

    from llc_jax.problems.regression.data import sample_batch

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return jax.device_get(sample_batch(jax.random.key(seed), task, num_data))


def baselines(task, data) -> dict[str, float]:
    """Losses of predictors that need no training: at zero exact, else on a data set."""
    import jax.numpy as jnp

    from llc_jax.problems.regression.data import dmmse_predictions, ridge_predictions, tasks

    x, y = (jnp.asarray(data[name]) for name in ("x", "y"))
    known = {"ridge": ridge_predictions(x, y, task.noise_variance)}
    if task.num_tasks:
        known["dMMSE"] = dmmse_predictions(x, y, tasks(task), task.noise_variance)
    return {"predict zero": task.dim + task.noise_variance} | {
        name: float(jnp.mean((guess - y) ** 2)) for name, guess in known.items()
    }


def run(config: Config, phase: str = "train") -> None:
    """Trains to the end, from wherever the workdir stands; see `experiments.training`."""
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

    line = cli.command("train_regression", config.preset, config, PRESETS[config.preset])
    facts = {"experiment": "train_regression", "preset": config.preset, "command": line}
    training.run(config, phase, recipe, facts)


if __name__ == "__main__":
    cli.main(PRESETS, run)
