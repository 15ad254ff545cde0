"""Trace to 2 % and the top eigenvalues to 1 %: our Lanczos run against PyHessian's algorithm.

    python -m experiments.benchmarks.curvature --workdir=runs/quickstart

PyHessian (Yao et al. 2020, arXiv 1912.07145) finds eigenvalues one after another by power
iteration, each orthogonal to those before, until the estimate changes by less than a tolerance,
and the trace by Hutchinson's estimator. Its algorithm runs here on the very same Hessian-vector
product (same loss, data, weights, compiler), with the largest tolerance at which all eigenvalues
are right; ours runs with the fewest iterations at which they are. Either takes as many probes as
a pilot of its own says that 2 % need. The seconds are medians, interleaved, without compilation.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from experiments import problems
from experiments.benchmarks import timing
from experiments.cli import option
from llc_jax import curvature, curvature_over_checkpoints
from llc_jax.curvature.krylov import maps
from llc_jax.trees import Layout

EIGENVALUE_ERROR, TRACE_ERROR = 0.01, 0.02
TOLERANCES = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
ITERATIONS = (6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
PILOT = 64  # probes


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    workdir: str = option("runs/quickstart", "Folder of a training run.")
    steps: str = option("", "Training steps of the checkpoints; default the middle and the last.")
    num_data: int = option(256, "Sequences.")
    num_eigenvalues: int = option(3, "Eigenvalues from the top.")
    repeats: int = option(3, "Rounds.")


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def power_iteration(rng_key, operator, layout, num_eigenvalues, limit, tolerance):
    """Eigenvalues of largest absolute value, one after another; (values [m], products)."""
    product, _ = maps(operator, layout)

    def unit(vector):
        return vector / (jnp.linalg.norm(vector) + 1e-6)

    found, vectors, products = [], jnp.zeros((num_eigenvalues, layout.size)), 0
    for number in range(num_eigenvalues):

        def more(carry):
            _, before, now, count = carry
            changed = jnp.abs(now - before) / (jnp.abs(before) + 1e-6) >= tolerance
            return (count < 2) | (changed & (count < limit))

        def iterate(carry, vectors=vectors):
            vector, _, before, count = carry
            vector = unit(vector - (vectors @ vector) @ vectors)
            image = product(vector)
            return unit(image), before, jnp.vdot(vector, image), count + 1

        start = jax.random.normal(jax.random.fold_in(rng_key, number), (layout.size,))
        nothing = jnp.float32(0)
        vector, _, value, count = jax.lax.while_loop(
            more, iterate, (unit(start), nothing, nothing, jnp.int32(0))
        )
        vectors = vectors.at[number].set(vector)
        found.append(value)
        products = products + count
    return jnp.stack(found), products


def compare(step: int, loss, params, data, config: Config) -> str:
    """Measures one checkpoint; returns a line of a table."""
    key, number = jax.random.key(0), config.num_eigenvalues
    operator, layout = curvature.hvp(loss, params, data), Layout.of(params)
    exact = curvature.top_eigenvalues(
        jax.random.key(7), operator, params, num_eigenvalues=number, num_iterations=160
    )
    reference = np.asarray(exact)
    assert np.all(exact.largest_residuals < 1e-3 * reference), exact.largest_residuals

    def error(values):
        return float(np.max(np.abs(np.asarray(values) - reference) / np.abs(reference)))

    # PyHessian's algorithm.
    for tolerance in TOLERANCES:
        powers = functools.partial(
            power_iteration, key, operator, layout, number, 2000, jnp.float32(tolerance)
        )
        values, power_products = powers()
        if error(values) < EIGENVALUE_ERROR:
            break
    power_error, power_products = error(values), int(power_products)
    pilot = curvature.hutchinson_trace(key, operator, params, num_probes=PILOT)
    plain_probes = probes_needed(pilot)
    hutchinson = functools.partial(
        curvature.hutchinson_trace, key, operator, params, num_probes=plain_probes
    )

    # Ours: eigenvalues, and the space that is taken out of the probes, from one run.
    def sweep(num_probes, iterations):
        measured = curvature_over_checkpoints(
            key, loss, {step: params}, data, nbeta=1.0, localization=1.0, num_probes=num_probes,
            num_eigenvalues=number, num_deflated=iterations - 1, num_iterations=1,
        )  # fmt: skip
        return next(iter(measured))[1]

    for iterations in ITERATIONS:
        if error(sweep(2, iterations).largest) < EIGENVALUE_ERROR:
            break

    piloted = sweep(PILOT, iterations)
    few = probes_needed(curvature.ProbeMean(piloted.trace, piloted.trace_stderr))
    ours = sweep(few, iterations)

    seconds = timing.interleaved(
        {
            "power": lambda: timing.elapsed(powers),
            "hutchinson": lambda: timing.elapsed(hutchinson),
            "ours": lambda: timing.elapsed(lambda: np.asarray(sweep(few, iterations).largest)),
        },
        config.repeats,
    )
    power, plain, lanczos = (
        float(np.median(seconds[name][:, 0])) for name in ("power", "hutchinson", "ours")
    )
    theirs, mean = power_products + plain_probes, hutchinson()
    cells = [
        f"{step:,}",
        f"{power_products} + {plain_probes} = {theirs}",
        f"{power:.1f} + {plain:.1f} = {power + plain:.1f}",
        f"{100 * power_error:.2f} %, {100 * mean.stderr / mean.mean:.1f} %",
        f"{ours.num_products}",
        f"{lanczos:.1f}",
        f"{100 * error(ours.largest):.2f} %, {100 * ours.trace_stderr / ours.trace:.1f} %",
        f"{theirs / ours.num_products:.1f}",
        f"{(power + plain) / lanczos:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def probes_needed(pilot) -> int:
    """Probes for the standard error wanted, from a pilot of `PILOT`; at least 2."""
    return max(2, math.ceil(PILOT * float(pilot.stderr / (TRACE_ERROR * pilot.mean)) ** 2))


HEADER = """\
| step | PyHessian's algorithm: products | seconds | errors of eigenvalues, trace | ours: products\
 | seconds | errors of eigenvalues, trace | products, ratio | seconds, ratio |
|---|---|---|---|---|---|---|---|---|"""


def run(config: Config) -> None:
    """Prints a table with a line per checkpoint."""
    problem = problems.of_run(config.workdir, "regression")
    kept = problem.saved()
    every = list(kept)
    steps = timing.integers(config.steps) if config.steps else [every[len(every) // 2], every[-1]]
    data = problem.sample(config.num_data, 1000)
    size = sum(x.size for x in jax.tree.leaves(kept[steps[0]]))
    print(f"{size:,} parameters, {config.num_data} sequences [{timing.machine()}]\n{HEADER}")
    for step in steps:
        print(compare(step, problem.loss_fn, kept[step], data, config), flush=True)


if __name__ == "__main__":
    timing.main(Config, run)
