"""A sweep compiles once: whatever the checkpoint, the step size and the call.

    python -m experiments.benchmarks.compile_once

Samples 10 checkpoints with each of 3 step sizes, and once more with a different temperature,
localization and seed, counting what XLA compiles. Required: the sampling program once, in the
first call, and in the last call nothing at all.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import jax

from experiments.benchmarks import programs, timing
from experiments.cli import option
from llc_jax import SGLD, estimate_llc_over_checkpoints

EVENT = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the sweep."""

    num_checkpoints: int = option(10, "Checkpoints.")
    checkpoint_batch: int = option(4, "Checkpoints in flight; leaves a rest, to make it harder.")
    num_chains: int = option(4, "Chains per checkpoint.")
    num_draws: int = option(20, "Draws per chain.")
    batch_size: int = option(64, "Minibatch size.")
    d_model: int = option(64, "Width of the model; 64 is the published one.")
    num_layers: int = option(2, "Blocks of the model; 2 is the published number.")


@contextlib.contextmanager
def compilations() -> Iterator[list[tuple[str, float]]]:
    """Yields a list that grows by (program, seconds) with everything that XLA compiles."""
    seen = []

    def listen(event: str, seconds: float, fun_name: str = "?", **_) -> None:
        if event == EVENT:
            seen.append((fun_name, seconds))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def run(config: Config) -> tuple[int, int]:
    """Prints the counts; returns (sampling programs compiled, anything compiled in the last)."""
    init, draw, loss_fn = programs.regression(config.d_model, config.num_layers)
    data = jax.device_get(draw(jax.random.key(0), 512))
    keys = {step: jax.random.key(step) for step in range(config.num_checkpoints)}
    checkpoints = {s: jax.device_get(init(key)) for s, key in keys.items()}

    def sweep(seed: int, step_size: float, nbeta: float, localization: float) -> float:
        start = time.perf_counter()
        estimates = estimate_llc_over_checkpoints(
            jax.random.key(seed), loss_fn, checkpoints, data, sampler=SGLD(step_size),
            nbeta=nbeta, localization=localization, num_chains=config.num_chains,
            num_draws=config.num_draws, num_burnin=0, batch_size=config.batch_size,
            checkpoint_batch=config.checkpoint_batch,
        )  # fmt: skip
        finished = len(list(estimates))
        if finished != config.num_checkpoints:
            raise RuntimeError(f"{finished} estimates of {config.num_checkpoints} checkpoints")
        return time.perf_counter() - start

    with compilations() as seen:
        seconds = [sweep(0, step_size, 30.0, 300.0) for step_size in (1e-5, 3e-5, 1e-4)]
        before_last = len(seen)
        seconds.append(sweep(1, 2e-5, 60.0, 100.0))
    ours = [spent for name, spent in seen if name == "jit(sample)"]
    in_last = len(seen) - before_last
    print(
        f"{config.num_checkpoints} checkpoints, 3 step sizes and a second call: the sampling"
        f" program was compiled {len(ours)} time(s), in {sum(ours):.1f} s; the last call compiled"
        f" {in_last} programs. Calls took"
        f" {', '.join(f'{s:.1f}' for s in seconds)} s, the first with its compilation."
        f" [{timing.machine()}]"
    )
    return len(ours), in_last


def start(config: Config) -> None:
    """One host device per core, then `run`."""
    jax.config.update("jax_num_cpu_devices", timing.cores())
    run(config)


if __name__ == "__main__":
    timing.main(Config, start)
