"""How an experiment runs: one writer, one configuration for life, and only what is missing.

Three kinds of work, one rule for all. What is on disk counts if it was made with the same settings
from the same inputs. Results that cost much are never replaced: other settings are refused. What is
cheap to derive from them is made again.
"""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import cli, workdir
from llc_jax import parallel
from llc_jax.storage import results
from llc_jax.storage.files import digest, read_json, write_atomic, write_json


class Sweep(NamedTuple):
    """A measurement at every checkpoint: one file for each in `folder`, and tables of all.

    Attributes:
      folder: of the results.
      identity: what determines them.
      start: `start(steps)` -> (iterator of (step, `xarray.Dataset`, text), facts for the record);
        checks its arguments when it is called.
      command: that repeats the run.
      tables: file name -> function from all results to a pandas DataFrame, or to CSV.
      chunk: checkpoints that are measured together, so that a resumed chunk is the one it was.
      shard: (i, n): do only every n-th chunk, from chunk i.
      without: settings in older records that are no part of the identity.
      remedy: how to have other settings.
    """

    folder: pathlib.Path
    identity: dict[str, Any]
    start: Callable[[list[int]], tuple[Iterator[tuple[int, Any, str]], dict[str, Any]]]
    command: str
    tables: Mapping[str, Callable] = {}
    chunk: int = 1
    shard: tuple[int, int] = (0, 1)
    without: Iterable[str] = ()
    remedy: str = ""


def over_checkpoints(config: Any, phase: str, checkpoints: Mapping[int, Any], sweep: Sweep) -> None:
    """Measures what is missing.

    1. A record of other settings is refused before anything is computed.
    2. A damaged checkpoint is left out, unless its result is there.
    3. The record is written when the arguments are known to be sound, before the first result.
    4. Each result is written whole; a signal stops after the one under way.

    On a pod, for a `cli.Pod`, process 0 decides what is missing and writes.

    Args:
      config: with `checkpoints` or without.
      phase: for the progress line.
      checkpoints: {step: params}.
      sweep: what to measure.
    """
    pod, writer, folder = isinstance(config, cli.Pod), cli.is_main(), sweep.folder
    record, args = folder / "config.json", (sweep.identity, sweep.remedy, sweep.without)

    def agreed(steps: list[int]) -> list[int]:
        numbers = np.asarray(steps, np.int32)
        return parallel.from_process_zero(numbers).tolist() if pod else steps

    name = f"shard-{sweep.shard[0]}-of-{sweep.shard[1]}-{jax.process_index()}"
    with workdir.lock(folder, name):
        if writer:
            workdir.check(record, *args)
        done = set(results.finished_steps(folder))
        steps = workdir.good_steps(checkpoints, done, config.workdir)
        steps = workdir.chosen(agreed(steps), getattr(config, "checkpoints", ""))
        work = agreed(todo(steps, done, sweep.chunk, sweep.shard))
        if work:
            measured, facts = sweep.start(work)
            if writer:
                workdir.settle(record, *args, facts={"command": sweep.command, **facts})
                for table in sweep.tables:  # stale from the first result on
                    (folder / table).unlink(missing_ok=True)

            def finish(flag: parallel.StopFlag):
                for count, (step, found, text) in enumerate(measured, 1):
                    if writer and step not in done:
                        results.save(folder, step, found)
                    yield count, text, None
                    if (signum := flag.agreed() if pod else flag.signum) is not None:
                        cli.say(f"\n{phase}: stopped after step {step}; the same command continues")
                        raise parallel.StopRequested(signum)

            with parallel.stop_signals() as flag:
                for _ in cli.progress(finish(flag), phase, len(work), "checkpoints"):
                    pass
        else:
            cli.say(f"{phase}: all checkpoints are done")
        if writer and (work or not all((folder / table).exists() for table in sweep.tables)):
            _write_tables(sweep)


def _write_tables(sweep: Sweep) -> None:
    whole = results.load(sweep.folder, "the same command") if sweep.tables else None
    for name, make in sweep.tables.items():
        text = make(whole)
        if not isinstance(text, str):  # one that is indexed by step keeps the index
            index = text.index.name == "step"
            text = text.to_csv(index=index, float_format="%.7g", lineterminator="\n")
        write_atomic(sweep.folder / name, text)


def todo(steps: list[int], finished: set[int], size: int, shard: tuple[int, int]) -> list[int]:
    """The checkpoints to measure: whole chunks, so that a resumed chunk is the one it was.

    Args:
      steps: all checkpoints, in order.
      finished: those with a result.
      size: checkpoints per chunk.
      shard: (i, n).

    Returns:
      The steps of every chunk of this shard in which a result is missing.
    """
    chunks = [steps[start : start + size] for start in range(0, len(steps), size)]
    mine = chunks[shard[0] :: shard[1]]
    return [step for chunk in mine if not finished.issuperset(chunk) for step in chunk]


def over_records(
    phase: str,
    folder: pathlib.Path,
    identity: dict[str, Any],
    line: str,
    work: Sequence[tuple[dict[str, Any], Any]],
    measure: Callable[[dict[str, Any], Any], tuple[dict[str, Any], str]],
    unit: str,
    without: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Appends a line to `records.jsonl` for each piece of work that has none.

    Args:
      phase: for the progress line.
      folder: of the results; the caller holds its lock.
      identity: what determines them.
      line: the command that repeats the run.
      work: (head, anything): the head, a dict, is the beginning of the record and says which it is.
      measure: `measure(head, anything)` -> (the rest of the record, text for the progress line).
      unit: what a piece of work is, in the plural.
      without: settings in older records that are no part of the identity.

    Returns:
      All records.
    """
    path, record = folder / "records.jsonl", folder / "config.json"
    workdir.check(record, identity, without=without)
    workdir.rewind_torn_line(path)

    def key(found: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(found[name]) for name in work[0][0])

    done = {key(found) for found in workdir.read_jsonl(path)} if work else set()
    work = [w for w in work if key(w[0]) not in done]

    def finish():
        for count, (head, what) in enumerate(work, 1):
            rest, text = measure(head, what)
            # Not before the first, which shows that the settings are sound.
            workdir.settle(record, identity, without=without, facts={"command": line})
            workdir.append_jsonl(path, head | rest)
            yield count, text, None

    for _ in cli.progress(finish(), phase, len(work), unit):
        pass
    return workdir.read_jsonl(path)


def is_fresh(record: pathlib.Path, known: Mapping[str, Any], *outputs: str) -> bool:
    """Whether what a record tells of was made from this, and is still as it was written.

    Args:
      record: of `commit`.
      known: settings and inputs.
      *outputs: files beside the record; those of older versions have no hashes in it.
    """
    paths = [record, *(record.parent / name for name in outputs)]
    if not all(path.exists() for path in paths):
        return False
    found = read_json(record)
    return known.items() <= found.items() and all(
        digest([record.parent / name]) == there for name, there in found.get("outputs", {}).items()
    )


def commit(
    record: pathlib.Path, known: Mapping[str, Any], outputs: Mapping[str, bytes | str], **facts: Any
) -> None:
    """Writes files, then the record that vouches for them.

    Args:
      record: JSON file; the outputs lie beside it.
      known: settings and inputs, see `is_fresh`.
      outputs: file name -> content.
      **facts: further entries of the record.
    """
    for name, content in outputs.items():
        write_atomic(record.parent / name, content)
    hashes = {name: digest([record.parent / name]) for name in outputs}
    write_json(record, {**known, **facts, "versions": workdir.versions(), "outputs": hashes})
