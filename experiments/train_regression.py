"""Trains a transformer on in-context linear regression and keeps its checkpoints.

    python -m experiments.train_regression --preset=quickstart

The same command starts, continues or does nothing. Two cores: `smoke` seconds, `quickstart` under
a minute. Expected: the loss stays near 4.1 (predicting zero: 4.125) and then falls towards that of
ridge regression, 1.660.
"""

import dataclasses
import pathlib
import shutil

from experiments import cli, workdir
from experiments.cli import option
from llc_jax.files import read_json


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
    """Under an hour without an accelerator."""
    return Config(
        workdir="runs/small", preset="small", num_steps=40_000, batch_size=128,
        num_log=30, num_linear=20, block=1000,
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
    from llc_jax.data.regression import RegressionTask
    from llc_jax.models.regression import RegressionTransformer

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
      ValueError: if it holds no training run.
    """
    path = pathlib.Path(folder) / "train.json"
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: {folder} holds no training run; make one with python -m"
            f" experiments.train_regression --workdir={folder}"
        )
    content = read_json(path)
    return Config(**content["config"], workdir=folder, preset=content["preset"])


def schedule(config: Config) -> list[int]:
    """Returns the steps at which checkpoints are kept."""
    from llc_jax.checkpoints import checkpoint_steps

    return checkpoint_steps(config.num_steps, config.num_log, config.num_linear)


def run(config: Config, phase: str = "train") -> None:
    """Trains to the end, from wherever the workdir stands.

    1. A checkpoint counts if all its hashes hold; a damaged one is set aside when it is redone.
    2. Training continues from the newest state with no scheduled checkpoint missing before it.
    3. Steps after that are repeated; they come out bitwise the same.

    With `--multihost` every process trains the same small model on its own devices and process 0
    writes.
    """
    import jax

    from llc_jax import parallel, train
    from llc_jax.checkpoints import CheckpointDir
    from llc_jax.data.regression import RegressionBatches
    from llc_jax.losses import RegressionLoss
    from llc_jax.models.regression import init_params

    folder = pathlib.Path(config.workdir)
    stops = schedule(config)
    model, task = setting(config)
    batch_fn = RegressionBatches(task, config.batch_size)
    optimizer = train.adam_one_cycle(config.learning_rate, config.num_steps)
    with workdir.lock(folder, "train" if cli.is_main() else f"train-{jax.process_index()}"):
        if cli.is_main():
            line = cli.command("train_regression", config.preset, config, PRESETS[config.preset])
            facts = {"preset": config.preset, "command": line}
            workdir.settle(folder / "train.json", cli.identity(config), facts)
        kept = CheckpointDir(folder / "checkpoints", writer=cli.is_main())
        stopped = CheckpointDir(folder / "stopped", writer=cli.is_main())
        good = {s for s in kept.steps() if not kept.verify(s)}
        missing = [s for s in stops if s not in good]
        if not missing:
            cli.say(f"{phase}: all {config.num_steps} steps are done")
            return
        init_key, data_key = jax.random.split(jax.random.key(config.seed))
        state = train.init_state(init_params(init_key, model), optimizer)
        starts = [
            (s, source)
            for source in (kept, stopped)
            for s in source.steps()
            if s <= missing[0] and not source.verify(s)
        ]
        if starts:
            step, source = max(starts, key=lambda start: start[0])
            _, params, opt_state = source.restore_state(state.opt_state, step)
            state = train.TrainState(jax.numpy.int32(step), params, opt_state)
            cli.say(f"{phase}: continuing from step {step}")
        first = int(state.step)
        if cli.is_main():
            workdir.rewind_jsonl(folder / "metrics.jsonl", first)
            if first == 0 and 0 in missing:
                kept.save(0, state.params, state.opt_state)

        def steps(flag):
            mesh = parallel.data_mesh(config.batch_size)
            for step, state_, metrics in train.fit(
                data_key, state, loss_fn=RegressionLoss(model), batch_fn=batch_fn,
                optimizer=optimizer, stops=stops[1:], block=config.block, mesh=mesh,
            ):  # fmt: skip
                values = {name: float(value) for name, value in metrics.items()}
                if cli.is_main():
                    workdir.append_jsonl(folder / "metrics.jsonl", {"step": step, **values})
                    if step in missing:
                        kept.save(step, *jax.device_get((state_.params, state_.opt_state)))
                    if flag.signum is not None:
                        if step not in stops and step not in stopped.steps():
                            stopped.save(step, *jax.device_get((state_.params, state_.opt_state)))
                        cli.say(f"\n{phase}: stopped at step {step}; the same command continues")
                        raise parallel.StopRequested(flag.signum)
                yield step, f" loss {values['loss']:.3f}", None

        with parallel.stop_signals() as flag:
            for _ in cli.progress(steps(flag), phase, config.num_steps, "steps"):
                pass
        shutil.rmtree(stopped.folder, ignore_errors=True)


if __name__ == "__main__":
    cli.main(PRESETS, run)
