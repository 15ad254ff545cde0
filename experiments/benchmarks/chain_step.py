"""What a step of a chain costs beside the gradient it cannot do without.

    python -m experiments.benchmarks.chain_step
    python -m experiments.benchmarks.chain_step --model=language --d_model=128 --batch_sizes=8

One run, interleaved: an SGLD step of our compiled program (minibatch, paired anchor loss,
gradient, noise, distance, trace) against a bare `value_and_grad` gradient descent of the same
model, batch size, number of chains and devices, both one scan inside one jit. The time of a step
is the difference between scans of 2T and T steps, so what happens once (the loss of the anchor
over the data set, dispatch) drops out. Beside the clock it reads the processor time of all
threads, whose ratio holds up when other programs run. Required: a ratio of at most 1.15.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import programs, timing
from experiments.cli import option
from llc_jax import parallel
from llc_jax.problems.language.model import AttentionOnlyTransformer

LIMIT = 1.15


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    model: str = option("regression", "regression, or language: 5,000 tokens, context 128.")
    batch_sizes: str = option("64,256", "Minibatch sizes.")
    num_chains: int = option(4, "Chains in all.")
    num_steps: int = option(30, "T; scans of T and 2T steps are timed.")
    repeats: int = option(9, "Rounds.")
    num_devices: int = option(0, "Host devices; 0 for one per core.")
    d_model: int = option(
        64, "Width of the model; the published one is 64, of the language model 256."
    )
    num_layers: int = option(2, "Blocks of the model; 2 is the published number.")


def problem_of(config: Config) -> programs.Problem:
    """The model that is sampled."""
    if config.model == "regression":
        return programs.regression(config.d_model, config.num_layers)
    if config.model != "language":
        raise ValueError(f"model={config.model!r}: give regression or language.")
    model = AttentionOnlyTransformer(config.num_layers, d_model=config.d_model, context=128)
    return programs.language(model)


def measure(config: Config, batch_size: int) -> tuple[dict, dict[str, np.ndarray]]:
    """Times both programs.

    Returns:
      (name -> seconds to compile,
      name -> [repeats, 2] milliseconds per chain-step, by the clock and of the processor).
    """
    problem = problem_of(config)
    mesh = parallel.make_mesh(1, config.num_chains)
    share, padding = divmod(config.num_chains, mesh.shape[parallel.CHAIN])
    if padding:
        raise ValueError(
            f"num_chains={config.num_chains} on {mesh.shape[parallel.CHAIN]} devices would run"
            " more chains than it counts: give a multiple, or --num_devices."
        )
    args = programs.arguments(problem, mesh, max(1024, config.num_chains * batch_size))
    params = jax.tree.map(lambda x: x[0], args[1].anchor)
    data = jax.tree.map(lambda x: x[: config.num_chains * batch_size], args[4])
    bare_args = parallel.place((params, data, jnp.float32(1e-3)), mesh)

    seconds, runs = {}, {}
    for length in (config.num_steps, 2 * config.num_steps):
        bare = programs.gradient_descent.lower(
            *bare_args, loss_fn=problem.loss_fn, num_steps=length, batch_size=batch_size,
            mesh=mesh,
        )  # fmt: skip
        plan = programs.make_plan(length, batch_size, chain_batch=share)
        sgld = programs.lower_sample(args, problem.loss_fn, plan, config.num_chains, mesh)
        bare, seconds["bare"] = timing.compiled(bare)
        sgld, seconds["sgld"] = timing.compiled(sgld)
        runs["bare", length] = functools.partial(bare, *bare_args)
        runs["sgld", length] = functools.partial(sgld, *args)

    def more_steps(name: str) -> timing.Elapsed:
        long, short = (runs[name, times * config.num_steps] for times in (2, 1))
        return timing.elapsed(long) - timing.elapsed(short)

    rounds = timing.interleaved(
        {name: functools.partial(more_steps, name) for name in seconds}, config.repeats
    )
    per_step = 1e3 / (config.num_steps * config.num_chains)
    return seconds, {name: per_step * values for name, values in rounds.items()}


def run(config: Config) -> dict[int, float]:
    """Prints a line per batch size; returns batch size -> ratio by the clock."""
    ratios = {}
    for batch_size in timing.integers(config.batch_sizes):
        seconds, steps = measure(config, batch_size)
        (sgld, _), (bare, _) = (np.median(steps[name], axis=0) for name in ("sgld", "bare"))
        ratios[batch_size], by_clock = timing.ratio(steps["sgld"][:, 0], steps["bare"][:, 0])
        _, by_cpu = timing.ratio(steps["sgld"][:, 1], steps["bare"][:, 1])
        print(
            f"batch {batch_size}, {config.num_chains} chains on {jax.device_count()} devices:"
            f" SGLD {sgld:.2f} ms per chain-step, bare gradient descent {bare:.2f} ms;"
            f" ratio {by_clock}, {'within' if ratios[batch_size] <= LIMIT else 'ABOVE'} {LIMIT};"
            f" of processor time {by_cpu}."
            f" Compiled in {seconds['sgld']:.1f} s and {seconds['bare']:.1f} s."
            f" [{timing.machine()}]",
            flush=True,
        )
    return ratios


def start(config: Config) -> None:
    """Sets the number of host devices, which is fixed once JAX has started, and runs."""
    jax.config.update("jax_num_cpu_devices", config.num_devices or timing.cores())
    run(config)


if __name__ == "__main__":
    timing.main(Config, start)
