"""Trains whatever it is given to the end, from wherever the workdir stands."""

import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import cli, workdir
from llc_jax.storage.files import read_json


class Recipe(NamedTuple):
    """What is trained, and how.

    Attributes:
      init: `init(rng_key) -> params`.
      loss_fn: see `llc_jax.training.loop.fit`.
      batch_fn: see `llc_jax.training.loop.fit`.
      optimizer: of optax.
      tokens_per_step: to log the speed; 0 logs none.
    """

    init: Callable[[Any], Any]
    loss_fn: Any
    batch_fn: Any
    optimizer: Any
    tokens_per_step: int = 0


def load_config(folder: str, config_type: type, experiment: str):
    """Reads the configuration a workdir was trained with.

    Args:
      folder: the workdir.
      config_type: its dataclass.
      experiment: name of the module that trains such a run.

    Raises:
      ValueError: if it holds no training run, or one of another experiment.
    """
    content = record(folder, experiment)
    if (found := content.get("experiment", "train_regression")) != experiment:
        raise ValueError(f"{folder} was trained by {found}, which has no {experiment} in it.")
    return config_type(**content["config"], workdir=folder, preset=content["preset"])


def record(folder: str, experiment: str = "train_regression") -> dict[str, Any]:
    """Reads `train.json` of a workdir.

    Raises:
      ValueError: if there is none; it names the experiment that makes one.
    """
    path = pathlib.Path(folder) / "train.json"
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: {folder} holds no training run; make one with python -m"
            f" experiments.{experiment} --workdir={folder}"
        )
    return read_json(path)


def problem(make: Callable[..., Any], config: Any) -> Any:
    """The problem of a run.

    Args:
      make: `make(config, **fields of Problem)`.
      config: that the run was trained with.
    """
    from llc_jax.storage.foreign import orbax_folder

    folder = pathlib.Path(config.workdir)

    def losses() -> dict[int, float]:
        return {m["step"]: m["loss"] for m in workdir.read_jsonl(folder / "metrics.jsonl")}

    return make(
        config, checkpoints=lambda: orbax_folder(folder / "checkpoints"), train_losses=losses,
        settings=cli.identity(config),
    )  # fmt: skip


def schedule(config) -> list[int]:
    """Returns the steps at which checkpoints are kept."""
    from llc_jax.storage.checkpoints import checkpoint_steps

    return checkpoint_steps(config.num_steps, config.num_log, config.num_linear)


def standing(stops: list[int], sources: Sequence[Any]) -> list[int]:
    """Where a run stands.

    Args:
      stops: steps at which checkpoints are kept.
      sources: the `CheckpointDir` that keeps them, then those of other steps to continue from.

    Returns:
      [source, step, *missing]: which source has the newest good state with no checkpoint missing
      before it (-1: none, begin at step 0), its step, and the stops without a good checkpoint.

    Raises:
      ValueError: if there are checkpoints and none of them is whole.
    """
    kept = sources[0].steps()
    good = {s for s in kept if not sources[0].verify(s)}
    if kept and not good:
        raise ValueError(
            f"none of the {len(kept)} checkpoints in {sources[0].folder} is whole: at step"
            f" {kept[-1]}, {sources[0].verify(kept[-1])[0]}. Training would begin anew and replace"
            " them; restore them from a copy (optimizer states included), or give another"
            " --workdir."
        )
    missing = [s for s in stops if s not in good]
    starts = [(-1, -1)]
    for number, source in enumerate(sources):
        starts += [
            (s, number)
            for s in source.steps()
            if s <= min(missing, default=-1) and not source.verify(s)
        ]
    step, number = max(starts, key=lambda start: start[0])
    return [number, max(step, 0), *missing]


def run(config, phase: str, recipe: Callable[[], Recipe], presets: Any) -> None:
    """Trains.

    1. A checkpoint counts if all its hashes hold; a damaged one is set aside when it is redone.
    2. Training continues from the newest state with no scheduled checkpoint missing before it.
    3. Steps after that are repeated; on the same devices they come out bitwise the same.

    With `--multihost` the batch is shared by the devices of all processes; all read the workdir,
    and process 0 decides where to go on from and writes.

    Args:
      config: with workdir, seed, num_steps, batch_size, num_log, num_linear, block.
      phase: for the progress line.
      recipe: called when there is something to do.
      presets: `presets.Presets` of the experiment.
    """
    import jax

    from llc_jax import parallel
    from llc_jax.storage.checkpoints import CheckpointDir
    from llc_jax.training import loop as train

    folder = pathlib.Path(config.workdir)
    stops = schedule(config)
    with workdir.lock(folder, "train" if cli.is_main() else f"train-{jax.process_index()}"):
        mesh = parallel.pod_mesh(config.batch_size)  # refuses before anything is written
        if mesh.size < jax.device_count():
            cli.say(
                f"{phase}: {mesh.size} of {jax.device_count()} devices share the batch of"
                f" {config.batch_size}; a multiple of {jax.device_count()} would use all"
            )
        record, identity = folder / "train.json", cli.identity(config)
        remedy = "start afresh in another --workdir"
        if cli.is_main():
            workdir.check(record, identity, remedy)
        sources = [CheckpointDir(folder / name) for name in ("checkpoints", "stopped")]
        plan = standing(stops, sources) if cli.is_main() else []
        source, first, *missing = parallel.from_process_zero(np.asarray(plan, np.int32)).tolist()
        if not missing:
            cli.say(f"{phase}: all {config.num_steps} steps are done")
            return
        made = recipe() if cli.is_main() else None
        parallel.wait_for_all("the data is prepared")  # by process 0; the others read it
        init, loss_fn, batch_fn, optimizer, tokens_per_step = made or recipe()
        init_key, data_key = jax.random.split(jax.random.key(config.seed))
        state = train.init_state(init(init_key), optimizer)
        if source >= 0:
            _, params, opt_state = sources[source].restore_state(state.opt_state, first)
            state = train.TrainState(jax.numpy.int32(first), params, opt_state)
            cli.say(f"{phase}: continuing from step {first}")
        blocks = train.fit(  # checks its arguments before anything is written
            data_key, state, loss_fn=loss_fn, batch_fn=batch_fn, optimizer=optimizer,
            stops=stops[1:], block=config.block, mesh=mesh,
        )  # fmt: skip
        kept, stopped = (CheckpointDir(s.folder, writer=cli.is_main()) for s in sources)
        if cli.is_main():
            facts = {"experiment": presets.experiment, "preset": config.preset}
            facts["command"] = cli.command(config, presets)
            workdir.settle(record, identity, remedy, facts=facts)
            workdir.rewind_jsonl(folder / "metrics.jsonl", first)
            if first == 0 and 0 in missing:
                kept.save(0, state.params, state.opt_state)

        def steps(flag):
            before, clock = first, time.monotonic()
            for step, state_, metrics in blocks:
                values = {name: float(value) for name, value in metrics.items()}
                postfix = f" loss {values['loss']:.3f}"
                if tokens_per_step:
                    now = time.monotonic()
                    speed = (step - before) * tokens_per_step / (now - clock)
                    before, clock = step, now
                    values["tokens_per_second"] = speed
                    postfix += f", {speed:,.0f} tokens/s"
                signum = flag.agreed()
                if cli.is_main():
                    workdir.append_jsonl(folder / "metrics.jsonl", {"step": step, **values})
                    if step in missing:
                        kept.save(step, *jax.device_get((state_.params, state_.opt_state)))
                    elif signum and step not in stops and step not in stopped.steps():
                        stopped.save(step, *jax.device_get((state_.params, state_.opt_state)))
                if signum:
                    cli.say(f"\n{phase}: stopped at step {step}; the same command continues")
                    raise parallel.StopRequested(signum)
                yield step, postfix, None

        with parallel.stop_signals() as flag:
            for _ in cli.progress(steps(flag), phase, config.num_steps, "steps", first):
                pass
        if cli.is_main():
            shutil.rmtree(stopped.folder, ignore_errors=True)
