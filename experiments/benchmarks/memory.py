"""What bounds the memory of a sweep: not the number of checkpoints, but three settings.

    python -m experiments.benchmarks.memory

1. Peak resident memory of a process that sweeps N checkpoints, and of one that sweeps 4N with
   the same `checkpoint_batch`. Checkpoints come from a generator, one at a time, and estimates
   are dropped. Checkpoints are megabytes large and the network is trivial, so that keeping any of
   them would show. Required: flat, a ratio of about 1.
2. Temporary memory of the compiled sampling program of the regression transformer, as the
   compiler reports it: `grad_accum` and `chain_batch` lower it.
"""

import dataclasses
import itertools
import resource
import sys
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import programs, timing
from experiments.cli import option
from llc_jax import SGLD, estimate_llc_over_checkpoints, parallel

KILOBYTE = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
CHECKPOINT_BATCH = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of both parts."""

    num_checkpoints: int = option(8, "N.")
    megabytes: int = option(32, "Size of a checkpoint.")
    batch_size: int = option(256, "Minibatch size of the second part.")
    num_chains: int = option(4, "Chains of the second part, all on one device.")
    d_model: int = option(64, "Width of the model of the second part.")
    num_layers: int = option(2, "Blocks of the model; 2 is the published number.")
    worker: int = option(0, "Internal: sweep over this many checkpoints and print the peak.")


def linear_loss(params, batch):
    """Squared outputs of a linear map with as many weights as wanted."""
    return jnp.sum((batch @ params["w"]) ** 2, axis=-1)


def sweep(config: Config) -> None:
    """Sweeps, and prints the peak resident memory of this process in bytes."""
    inputs = 64
    shape = (inputs, config.megabytes * 2**20 // (4 * inputs))

    def checkpoints():
        for step in range(config.worker):
            yield step, {"w": np.full(shape, 1e-3 * step, np.float32)}

    estimates = estimate_llc_over_checkpoints(
        jax.random.key(0), linear_loss, checkpoints(), np.ones((4, inputs), np.float32),
        sampler=SGLD(1e-9), nbeta=1.0, localization=1.0, num_chains=1, num_draws=2, num_burnin=0,
        num_probes=0, checkpoint_batch=CHECKPOINT_BATCH,
    )  # fmt: skip
    count = sum(np.isfinite(estimate.init_loss) for _, estimate in estimates)
    if count != config.worker:
        raise RuntimeError(f"{count} finite estimates of {config.worker}")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE)


def peak(config: Config, num_checkpoints: int) -> int:
    """Bytes of peak resident memory of a process that sweeps `num_checkpoints`."""
    config = dataclasses.replace(config, worker=num_checkpoints)
    # glibc then hands freed arrays back at once: the peak is what is held, not how fragments lie.
    return int(timing.in_a_process("memory", config, MALLOC_MMAP_THRESHOLD_=str(2**20)))


def temporaries(config: Config, settings: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """(grad_accum, chain_batch) -> bytes of temporaries of the sampling program on one device."""
    problem = programs.regression(config.d_model, config.num_layers)
    mesh = parallel.make_mesh(1, config.num_chains, jax.devices()[:1])
    args = programs.shapes(problem, mesh, num_data=4 * config.batch_size)
    result = {}
    for accum, chains in settings:
        plan = programs.make_plan(10, config.batch_size, grad_accum=accum, chain_batch=chains)
        program = programs.lower_sample(
            args, problem.loss_fn, plan, config.num_chains, mesh
        ).compile()
        result[accum, chains] = program.memory_analysis().temp_size_in_bytes
    return result


def growth(config: Config) -> tuple[int, int]:
    """Prints the first part; returns the peaks of N and 4N checkpoints in bytes."""
    few, many = (peak(config, times * config.num_checkpoints) for times in (1, 4))
    more = 3 * config.num_checkpoints * config.megabytes
    print(
        f"peak resident memory with {CHECKPOINT_BATCH} checkpoints of {config.megabytes} MiB in"
        f" flight: {few / 2**20:.0f} MiB for {config.num_checkpoints} checkpoints,"
        f" {many / 2**20:.0f} MiB for {4 * config.num_checkpoints}; ratio {many / few:.3f}."
        f" Keeping them would add {more} MiB.",
        flush=True,
    )
    return few, many


def run(config: Config) -> None:
    """Prints both parts."""
    growth(config)
    settings = itertools.product((1, 4), (config.num_chains, 1))
    for (accum, chains), size in temporaries(config, settings).items():
        print(
            f"temporaries of {config.num_chains} chains at batch {config.batch_size}:"
            f" {size / 2**20:.1f} MiB with grad_accum={accum}, chain_batch={chains}"
        )


if __name__ == "__main__":
    timing.main(Config, lambda config: (sweep if config.worker else run)(config))
