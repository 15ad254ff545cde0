"""What training a language model costs beside the least loop that does it, and how large λ̂ gets.

    python -m experiments.benchmarks.language

1. Tokens per second of `llc_jax.training.loop.fit` on batches read from the host, with and without
   a mesh over the devices, beside a minimal Flax and Optax loop: one jitted update per batch, the
   same model, optimizer and batches, on one device; interleaved. Required: at least 0.9 of it.
2. Memory of λ̂ of the published model, 3,355,016 parameters and context 1,024, with 4 chains on one
   device: what the compiler reserves, and the peak of a process that runs a few draws.
   Required: below 12 GiB.
"""

import dataclasses
import functools
import resource

import jax
import numpy as np
import optax

from experiments.benchmarks import programs, timing
from experiments.benchmarks.memory import KILOBYTE
from experiments.cli import option
from llc_jax import SGLD, estimate_llc, parallel
from llc_jax.problems.language.losses import LanguageLoss
from llc_jax.problems.language.model import AttentionOnlyTransformer, init_params
from llc_jax.training import loop as train
from llc_jax.training import optimizers
from llc_jax.training.batches import TokenBatches


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of both parts."""

    num_steps: int = option(10, "Updates per measurement.")
    repeats: int = option(5, "Rounds.")
    batch_size: int = option(32, "Sequences per update.")
    d_model: int = option(128, "Width of the model that is trained.")
    vocab_size: int = option(5000, "Tokens of its vocabulary.")
    context: int = option(128, "Its context.")
    num_devices: int = option(0, "Host devices; 0 for one per core.")
    num_chains: int = option(4, "Chains of the second part; 0 leaves it out.")
    chain_batch_size: int = option(4, "Sequences per minibatch of a chain.")
    grad_accum: int = option(4, "Micro-batches per minibatch.")
    num_draws: int = option(3, "Draws of the second part.")
    worker: int = option(0, "Internal: 1 to sample, and print the peak memory in bytes.")


def speeds(config: Config) -> dict[str, np.ndarray]:
    """Times the three loops; returns name -> [repeats, 2] seconds per step, clock and processor."""
    model = AttentionOnlyTransformer(
        d_model=config.d_model, vocab_size=config.vocab_size, context=config.context
    )
    rows = np.random.default_rng(0).integers(
        0, config.vocab_size, (4 * config.batch_size * config.num_steps, config.context), np.uint16
    )
    batches = TokenBatches(rows, config.batch_size, seed=0)
    optimizer = optimizers.adamw(1e-3)
    params = init_params(jax.random.key(0), model)
    state = jax.device_get(train.init_state(params, optimizer))

    def ours(mesh):
        fitted = train.fit(
            jax.random.key(1), state, loss_fn=LanguageLoss(model), batch_fn=batches,
            optimizer=optimizer, stops=[config.num_steps], block=config.num_steps, mesh=mesh,
        )  # fmt: skip
        return [metrics for _, _, metrics in fitted]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, tokens):
        def loss(params):
            logits = model.apply({"params": params}, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits[:, :-1], tokens[:, 1:]
            ).mean()

        value, grads = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    def bare():
        params, opt_state = jax.device_put((state.params, state.opt_state))
        for step in range(config.num_steps):
            tokens = rows[batches.rows(step)].astype(np.int32)
            params, opt_state, value = update(params, opt_state, tokens)
        return value

    calls = {"bare loop": bare, "fit": functools.partial(ours, None)}
    mesh = parallel.data_mesh(config.batch_size)
    if mesh.size > 1:
        calls["fit, sharded"] = functools.partial(ours, mesh)
    rounds = timing.interleaved(
        {name: functools.partial(timing.elapsed, call) for name, call in calls.items()},
        config.repeats,
    )
    return {name: values / config.num_steps for name, values in rounds.items()}


def train_report(config: Config) -> dict[str, float]:
    """Prints the first part; returns name -> tokens per second relative to the bare loop."""
    found, relative = speeds(config), {}
    tokens = config.batch_size * config.context
    for name, values in found.items():
        relative[name], by_clock = timing.ratio(found["bare loop"][:, 0], values[:, 0])
        _, by_cpu = timing.ratio(found["bare loop"][:, 1], values[:, 1])
        print(
            f"{name}: {tokens / np.median(values[:, 0]):,.0f} tokens/s; relative to the bare loop"
            f" {by_clock} by the clock, {by_cpu} of processor time [{timing.machine()}]",
            flush=True,
        )
    return relative


def published() -> programs.Problem:
    """The published model, its cross-entropy in chunks of 128 positions."""
    return programs.language(AttentionOnlyTransformer(), chunk=128)


def reserved(config: Config, grad_accum: int) -> int:
    """Bytes that the sampling program of the published model needs, arguments included."""
    mesh = parallel.make_mesh(1, config.num_chains, jax.devices()[:1])
    problem = published()
    args = programs.shapes(problem, mesh, num_data=4 * config.chain_batch_size)
    plan = programs.make_plan(
        10, config.chain_batch_size, grad_accum=grad_accum, chain_batch=config.num_chains
    )
    program = programs.lower_sample(args, problem.loss_fn, plan, config.num_chains, mesh).compile()
    found = program.memory_analysis()
    return sum(getattr(found, f"{kind}_size_in_bytes") for kind in ("temp", "argument", "output"))


def sample(config: Config) -> None:
    """Runs a few draws of the published model, and prints the peak memory of this process."""
    problem = published()
    params = jax.device_get(jax.jit(problem.init)(jax.random.key(0)))
    count = sum(x.size for x in jax.tree.leaves(params))
    if count != 3_355_016:
        raise RuntimeError(f"the published model has 3,355,016 parameters, this one {count}")
    estimate = estimate_llc(
        jax.random.key(1), problem.loss_fn, params,
        jax.device_get(problem.draw(jax.random.key(2), 4 * config.chain_batch_size)),
        sampler=SGLD(1e-7), nbeta=20.0, localization=100.0, num_chains=config.num_chains,
        num_draws=config.num_draws, num_burnin=0, batch_size=config.chain_batch_size,
        grad_accum=config.grad_accum, num_probes=0,
    )  # fmt: skip
    if not np.isfinite(estimate.mean):
        raise RuntimeError(f"the estimate is {estimate.mean}")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE)


def memory_report(config: Config) -> int:
    """Prints the second part; returns the peak of the process in bytes."""
    for accum in sorted({1, config.grad_accum}):
        print(
            f"published model, {config.num_chains} chains of minibatches of"
            f" {config.chain_batch_size} x 1,024 tokens, grad_accum={accum}: the program reserves"
            f" {reserved(config, accum) / 2**30:.2f} GiB",
            flush=True,
        )
    worker = dataclasses.replace(config, worker=1, num_devices=1)
    peak = int(timing.in_a_process("language", worker))
    print(f"a process that samples it, grad_accum={config.grad_accum}: peak {peak / 2**30:.2f} GiB")
    return peak


def start(config: Config) -> None:
    """Sets the number of host devices, which is fixed once JAX has started, and runs."""
    jax.config.update("jax_num_cpu_devices", config.num_devices or timing.cores())
    if config.worker:
        sample(config)
        return
    train_report(config)
    if config.num_chains:
        memory_report(config)


if __name__ == "__main__":
    timing.main(Config, start)
