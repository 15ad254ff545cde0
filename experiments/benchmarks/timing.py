"""What the benchmarks share: flags from a Config, interleaved timing, the state of the machine."""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


def main(config_class: type, run: Callable[[Any], Any]) -> None:
    """Turns the fields of a Config (see `cli.option`) into flags and runs the benchmark."""
    from absl import app, flags, logging

    logging.set_verbosity(logging.WARNING)
    define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    fields = dataclasses.fields(config_class)
    for field in fields:
        define[field.type](field.name, field.default, field.metadata["help"])

    def start(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}: flags are --name=value.")
        run(config_class(**{f.name: getattr(flags.FLAGS, f.name) for f in fields}))

    app.run(start)


def in_a_process(module: str, config: Any, **settings: str) -> str:
    """Runs a benchmark with the flags of a Config in a process of its own; returns its output.

    Args:
      module: name within `experiments.benchmarks`.
      config: its Config.
      **settings: environment variables, besides those of this process.

    Raises:
      RuntimeError: with what it wrote, if it fails.
    """
    command = [sys.executable, "-m", f"experiments.benchmarks.{module}"]
    command += [f"--{name}={value}" for name, value in dataclasses.asdict(config).items()]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | settings
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def integers(text: str) -> list[int]:
    """Parses a flag such as `64,256`."""
    return [int(word) for word in text.split(",")]


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def machine() -> str:
    """What a timing depends on, in one line; the load tells whether others were running."""
    load = os.getloadavg()[0]
    return f"{cores()} cores, load average {load:.1f} in the last minute, jax {jax.__version__}"


def compiled(lowered: Any) -> tuple[Any, float]:
    """Compiles a lowered program; returns it and the seconds this took."""
    start = time.perf_counter()
    program = lowered.compile()
    return program, time.perf_counter() - start


class Elapsed(NamedTuple):
    """Seconds a call took; differences of two are meant to be taken.

    Attributes:
      wall: by the clock.
      cpu: of all threads of this process: what remains comparable when other processes run.
    """

    wall: float
    cpu: float

    def __sub__(self, other: "Elapsed") -> "Elapsed":
        return Elapsed(self.wall - other.wall, self.cpu - other.cpu)


def elapsed(call: Callable[[], Any]) -> Elapsed:
    """Measures `call` until its arrays are there and not just promised."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return Elapsed(time.perf_counter() - wall, time.process_time() - cpu)


def interleaved(calls: Mapping[Any, Callable[[], Any]], repeats: int) -> dict[Any, np.ndarray]:
    """Measures the calls in turn, so that what else the machine does hits all of them alike.

    Args:
      calls: name -> function that returns its own measurement, numbers of any shape.
      repeats: rounds; every other one in reverse order. One more, unrecorded, warms up.

    Returns:
      name -> [repeats, ...] measurements.
    """
    results = {name: [] for name in calls}
    for repeat in range(-1, repeats):
        for name in list(calls)[:: -1 if repeat % 2 else 1]:
            measured = calls[name]()
            if repeat >= 0:
                results[name].append(measured)
    return {name: np.asarray(values) for name, values in results.items()}


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, str]:
    """The median over rounds of the ratio within a round, and a text with its quartiles."""
    low, middle, high = np.quantile(numerator / denominator, [0.25, 0.5, 0.75])
    return float(middle), f"{middle:.3f} (quartiles {low:.3f} to {high:.3f})"
