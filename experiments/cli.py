"""What every experiment shares: flags from a Config, devices, progress, one-line errors."""

import dataclasses
import os
import pathlib
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tqdm


def option(default: Any, help: str, added: bool = False) -> Any:
    """Declares a Config field: its default lives here and nowhere else.

    Args:
      default: of the flag.
      help: for the flag.
      added: the flag came later: results begun before go on where it has its default.
    """
    return dataclasses.field(default=default, metadata={"help": help, "added": added})


@dataclasses.dataclass(frozen=True)
class Run:
    """Flags of experiments on a workdir."""

    workdir: str = option("runs/quickstart", "Folder of the run.")
    preset: str = option("quickstart", "Name of the preset.")
    problem: str = option(
        "", "path/to/mine.py with a PROBLEM of yours, or one of ours: regression, language,"
        " deep_linear; empty: what the workdir was trained on."
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Flags of experiments that run chains."""

    seed: int = option(0, "Seed of the chains.")
    data_seed: int = option(1000, "Seed of the data set, where it is drawn.")
    num_data: int = option(2048, "Examples in the data set, n; 0 for all of your own.")
    nbeta: float = option(30.0, "n times inverse temperature, nβ; 0 for n / log n.")
    localization: float = option(300.0, "Pull towards the checkpoint, γ.")
    num_burnin: int = option(60, "Draws per chain thrown away first.")
    batch_size: int = option(32, "Examples per minibatch, m.")
    grad_accum: int = option(1, "Micro-batches per minibatch; bounds memory.")
    sampler: str = option(
        "SGLD", "Sampler of llc_jax.samplers, or path/to/mine.py:ClassName.", added=True
    )
    sampler_options: str = option(
        "", "Its hyperparameters but step_size, such as friction=10,decay=0.9.", added=True
    )


@dataclasses.dataclass(frozen=True)
class Pod:
    """Flags of experiments that can run as several processes."""

    multihost: bool = option(False, "Join the processes of a pod before anything else.")
    coordinator: str = option("", "host:port of process 0; detected on TPU pods and SLURM.")
    num_processes: int = option(1, "Processes in all, with --coordinator.")
    process_id: int = option(0, "This process, from 0, with --coordinator.")


def command(config: Any, presets: Any) -> str:
    """The command that reproduces `config`: the preset and every flag that departs from it.

    Args:
      config: of the run.
      presets: `presets.Presets` of the experiment.
    """
    base, words = presets.base(config), ["python", "-m", f"experiments.{presets.experiment}"]
    words.append(f"--preset={config.preset}")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in NOT_PART_OF_A_RESULT and field.name not in ("workdir", "problem"):
            continue
        if value != getattr(base, field.name) or (field.name == "problem" and value):
            words.append(f"--{field.name}={value}")
    return shlex.join(words)


# Where and on what a run happens, as against what it computes.
NOT_PART_OF_A_RESULT = frozenset(
    ("workdir", "preset", "problem", "shard_checkpoints", "multihost", "coordinator",
     "num_processes", "process_id")
)  # fmt: skip


# What is told in one line; anything else is a mistake of ours and shows its traceback.
EXPECTED = (ValueError, OSError, ArithmeticError, RuntimeError, ModuleNotFoundError)


def identity(config: Any, without: Iterable[str] = ()) -> dict[str, Any]:
    """The part of a Config that determines the result, further fields left out."""
    left_out = NOT_PART_OF_A_RESULT.union(without)
    same = {
        field.name
        for field in dataclasses.fields(config)
        if field.metadata["added"] and getattr(config, field.name) == field.default
    }
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in left_out | same}


def main(presets: Any, run: Callable[[Any], None], default: str = "quickstart") -> None:
    """Parses flags, starts devices and runs an experiment; exits 0 only when it is done.

    Args:
      presets: `presets.Presets` of the experiment; the fields of its Config are the flags.
      run: the experiment.
      default: preset used when none is named.
    """
    from absl import app, flags, logging

    logging.set_verbosity(logging.WARNING)  # Orbax reports every file it touches
    fields = dataclasses.fields(next(iter(presets.values())))
    define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}
    names = ", ".join(sorted(presets))
    flags.DEFINE_string("preset", default, f"Where the other flags' defaults are: {names}.")
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
    for field in fields:
        if field.name != "preset":
            define.get(field.type, flags.DEFINE_string)(field.name, None, field.metadata["help"])

    def start(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}: flags are --name=value.")
        given = {f.name: getattr(flags.FLAGS, f.name) for f in fields}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            name = given.get("problem", "")
            table = presets.of(name) if stands_alone(name) else presets
            if (preset := flags.FLAGS.preset) not in table:
                raise ValueError(f"preset={preset!r}: choose from {', '.join(sorted(table))}.")
            config = dataclasses.replace(table[preset], **given)
            start_devices(config)
            run(config)
        except (Exception, KeyboardInterrupt) as error:
            if flags.FLAGS.debug or not isinstance(error, EXPECTED):
                leave_at_once(traceback.format_exc())
                raise
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            if "RESOURCE_EXHAUSTED" in str(error):
                sys.stderr.write(
                    "out of memory: raise --grad_accum, or lower whichever of --chain_batch,"
                    " --checkpoint_batch, --setting_batch, --micro_batch, --probe_batch and"
                    " --batch_size there is.\n"
                )
            leave_at_once()
            sys.exit(1)

    app.run(start)


# Ours that need no training run: name -> module with a function `problem`.
ALONE = {"deep_linear": "llc_jax.problems.deep_linear.problem"}


def stands_alone(problem: str) -> bool:
    """Whether a problem is none of those that a workdir is trained on: it brings its presets."""
    return problem in ALONE or problem.endswith(".py") or os.sep in problem


def leave_at_once(last_words: str = "") -> None:
    """On a pod: exits with 1; the usual way would wait for processes that may wait for this one."""
    import jax

    if jax.distributed.is_initialized():
        sys.stderr.write(last_words)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def start_devices(config: Any) -> None:
    """Joins a pod if asked, gives a CPU one device per core, and keeps compiled programs."""
    import jax

    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    cache = pathlib.Path(config.workdir).parent / ".compiled"
    jax.config.update("jax_compilation_cache_dir", str(cache.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if getattr(config, "multihost", False):
        from llc_jax import parallel

        parallel.start_distributed(
            config.coordinator or None,
            config.num_processes if config.coordinator else None,
            config.process_id if config.coordinator else None,
        )


def is_main() -> bool:
    """Whether this process writes and prints: process 0 of a pod."""
    import jax

    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, on the main process."""
    if is_main():
        print(text, flush=True)


def progress(
    items: Iterable[Any], phase: str, total: int, unit: str, first: int = 0
) -> Iterator[Any]:
    """A progress line with the time left; off a terminal it is printed every ten seconds.

    Args:
      items: of (units done, text beside the line, what is yielded).
      phase: what is done.
      total: units in all.
      unit: their name.
      first: units done before.
    """
    terminal = sys.stdout.isatty()
    bar = tqdm.tqdm(
        total=total, initial=first, desc=phase, unit=unit, file=sys.stdout, disable=not is_main(),
        mininterval=0.2 if terminal else 10, maxinterval=10, dynamic_ncols=terminal,
        bar_format="{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed} spent, {remaining} left]{postfix}"
        + ("" if terminal else "\n"),
    )  # fmt: skip
    with bar:
        for done, postfix, item in items:
            bar.set_postfix_str(postfix, refresh=False)
            bar.update(done - bar.n)
            yield item
