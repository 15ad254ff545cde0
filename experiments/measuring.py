"""Measures something at every checkpoint of a workdir: one file each, tables at the end."""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from experiments import cli, workdir


def folder_of(config) -> pathlib.Path:
    """Returns the folder of the results that figures and reports take."""
    return pathlib.Path(config.workdir) / "behavior"


def run(
    config,
    phase: str,
    experiment: str,
    presets: Mapping[str, Any],
    measure: Callable[[Any, list[int]], Iterator[tuple[int, Any, float]]],
    tables: Mapping[str, Callable],
    folder: pathlib.Path | None = None,
    without: Iterable[str] = (),
) -> None:
    """Measures what is missing; the same command starts, continues or does nothing.

    Args:
      config: with workdir, preset and checkpoint_batch.
      phase: for the progress line.
      experiment: name of the module.
      presets: of that module.
      measure: `measure(kept, steps)`, an iterator of (step, `xarray.Dataset`, loss) over the
        checkpoints at these steps; checks its arguments when it is called.
      tables: file name -> function from all results to a pandas DataFrame, written as CSV.
      folder: of the results; `folder_of(config)` if none.
      without: further fields of the config that do not change what is measured.
    """
    from llc_jax.storage import results
    from llc_jax.storage.checkpoints import CheckpointDir
    from llc_jax.storage.files import write_atomic

    folder = folder or folder_of(config)
    kept = CheckpointDir(pathlib.Path(config.workdir) / "checkpoints")
    with workdir.lock(folder, "behavior"):
        identity = cli.identity(config, ["checkpoint_batch", *without])
        line = cli.command(experiment, config.preset, config, presets[config.preset])
        done = set(results.finished_steps(folder))
        work = [step for step in workdir.good_steps(kept, done) if step not in done]
        measured = measure(kept, work) if work else None
        workdir.settle(folder / "config.json", identity, {"command": line})
        if not work:
            cli.say(f"{phase}: all checkpoints are done")
        else:
            for name in tables:  # stale from the first result on
                (folder / name).unlink(missing_ok=True)

            def finish():
                for count, (step, found, loss) in enumerate(measured, 1):
                    results.save(folder, step, found)
                    yield count, f" step {step}: loss {loss:.4f}", None

            for _ in cli.progress(finish(), phase, len(work), "checkpoints"):
                pass
        if work or not all((folder / name).exists() for name in tables):
            whole = results.load(folder, experiment)
            for name, make in tables.items():
                frame = make(whole)  # one that is indexed by step keeps the index
                text = frame.to_csv(
                    index=frame.index.name == "step", float_format="%.7g", lineterminator="\n"
                )
                write_atomic(folder / name, text)
