"""What a second host device is worth: the same chains on one device and on two.

    python -m experiments.benchmarks.devices

One device already uses several threads inside an operation; devices also use them between
operations. The number of host devices is fixed when JAX starts, so each lives in a process of its
own; both are compiled and warm, and are timed in turn, never at once. Required on two cores: at
least 1.6 times faster.
"""

import contextlib
import dataclasses
import subprocess
import sys

import jax
import numpy as np

from experiments.benchmarks import programs, timing
from experiments.cli import option
from llc_jax import parallel

LIMIT = 1.6


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    counts: str = option("1,2", "Two numbers of host devices to compare.")
    batch_size: int = option(64, "Minibatch size.")
    num_chains: int = option(4, "Chains in all, the same for both.")
    num_steps: int = option(30, "T; scans of T and 2T steps are timed.")
    repeats: int = option(9, "Rounds.")
    d_model: int = option(64, "Width of the model; 64 is the published one.")
    num_layers: int = option(2, "Blocks of the model; 2 is the published number.")
    worker: int = option(0, "Internal: serve timings on this many devices.")


def serve(config: Config) -> None:
    """Compiles, says so, and then answers every line of stdin with ms per chain-step."""
    jax.config.update("jax_num_cpu_devices", config.worker)
    problem = programs.regression(config.d_model, config.num_layers)
    mesh = parallel.make_mesh(1, config.num_chains)
    share = -(-config.num_chains // mesh.shape[parallel.CHAIN])
    args = programs.arguments(problem, mesh, num_data=1024)

    def compiled(length):
        plan = programs.make_plan(length, config.batch_size, chain_batch=share)
        return timing.compiled(
            programs.lower_sample(args, problem.loss_fn, plan, config.num_chains, mesh)
        )

    (short, _), (long, seconds) = compiled(config.num_steps), compiled(2 * config.num_steps)
    print(seconds, flush=True)
    for _ in sys.stdin:
        more = timing.elapsed(lambda: long(*args)) - timing.elapsed(lambda: short(*args))
        print(1e3 * more.wall / (config.num_steps * config.num_chains), flush=True)


@contextlib.contextmanager
def worker(config: Config, count: int):
    """A process with `count` host devices; yields (seconds to compile, function that times)."""
    flags = dataclasses.asdict(dataclasses.replace(config, worker=count))
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.benchmarks.devices"]
        + [f"--{name}={value}" for name, value in flags.items()],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def answer() -> float:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process with {count} devices ended: {process.wait()}")
        return float(line)

    def ask() -> float:
        process.stdin.write("\n")
        process.stdin.flush()
        return answer()

    with process:
        try:
            yield answer(), ask
        finally:
            process.stdin.close()


def run(config: Config) -> float:
    """Prints the comparison; returns how many times faster the second count is."""
    few, many = timing.integers(config.counts)
    with (
        worker(config, few) as (few_compile, few_ask),
        worker(config, many) as (many_compile, many_ask),
    ):
        times = timing.interleaved({few: few_ask, many: many_ask}, config.repeats)
    ratio, text = timing.ratio(times[few], times[many])
    print(
        f"batch {config.batch_size}, {config.num_chains} chains:"
        f" {np.median(times[few]):.2f} ms per chain-step on {few} host device(s),"
        f" {np.median(times[many]):.2f} ms on {many}, {text} times faster,"
        f" {'at least' if ratio >= LIMIT else 'BELOW'} {LIMIT}."
        f" Compiled in {few_compile:.1f} s and {many_compile:.1f} s. [{timing.machine()}]"
    )
    return ratio


if __name__ == "__main__":
    timing.main(Config, lambda config: (serve if config.worker else run)(config))
