"""The two programs that are timed: our sampling program and a bare gradient descent."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llc_jax import SGLD
from llc_jax.losses import mean_loss
from llc_jax.observables import LossGap
from llc_jax.parallel import CHAIN, CHECKPOINT
from llc_jax.problems.language import model as attention_only
from llc_jax.problems.language.losses import LanguageLoss
from llc_jax.problems.regression import data as regression_data
from llc_jax.problems.regression import model as regression_models
from llc_jax.problems.regression.losses import RegressionLoss
from llc_jax.recorder import split as split_observables
from llc_jax.sampling.chain import Plan
from llc_jax.sampling.posterior import LocalPosterior
from llc_jax.sampling.program import sample


class Problem(NamedTuple):
    """What is sampled.

    Attributes:
      init: `init(rng_key) -> params`, traceable.
      draw: `draw(rng_key, n) -> batch` of n examples, traceable.
      loss_fn: losses per example.
    """

    init: Callable[[jax.Array], Any]
    draw: Callable[[jax.Array, int], Any]
    loss_fn: Any


def regression(d_model: int, num_layers: int) -> Problem:
    """The regression transformer, its MLPs as wide as its residual stream, as published."""
    model = regression_models.RegressionTransformer(
        num_layers=num_layers, d_model=d_model, d_mlp=d_model
    )
    task = regression_data.RegressionTask(dim=model.dim, num_examples=model.num_examples)
    return Problem(
        init=lambda rng_key: regression_models.init_params(rng_key, model),
        draw=lambda rng_key, n: regression_data.sample_batch(rng_key, task, n),
        loss_fn=RegressionLoss(model),
    )


def language(model: attention_only.AttentionOnlyTransformer, chunk: int = 0) -> Problem:
    """The language model on random tokens, which cost what any others do."""
    return Problem(
        init=lambda rng_key: attention_only.init_params(rng_key, model),
        draw=lambda rng_key, n: {
            "tokens": jax.random.randint(rng_key, (n, model.context), 0, model.vocab_size)
        },
        loss_fn=LanguageLoss(model, chunk),
    )


def make_plan(num_draws: int, batch_size: int, **changes: int) -> Plan:
    """A `Plan` without burn-in and probes, one micro-batch, all chains of a device at once."""
    settings = {"num_burnin": 0, "thinning": 1, "grad_accum": 1, "chain_batch": 1, "num_probes": 0}
    return Plan(num_draws=num_draws, batch_size=batch_size, **settings | changes)


def build(problem: Problem, num_data: int, num_checkpoints: int) -> tuple:
    """The traced arguments of `sample`; the checkpoints are copies of an initialisation.

    The losses of the anchors are zeros: what they are costs the program nothing.
    """
    params_key, data_key, chain_key = jax.random.split(jax.random.key(0), 3)
    params = problem.init(params_key)
    number = functools.partial(jnp.full, num_checkpoints, dtype=jnp.float32)
    anchors = jax.tree.map(lambda x: jnp.stack([x] * num_checkpoints), params)
    steps = jnp.arange(num_checkpoints, dtype=jnp.uint32)
    return (
        chain_key,
        LocalPosterior(anchors, number(30.0), number(300.0), None, steps),
        SGLD(number(1e-5)),
        jnp.zeros((num_checkpoints, num_data)),
        problem.draw(data_key, num_data),
        [],
    )


def arguments(problem: Problem, mesh: Mesh, num_data: int, num_checkpoints: int = 1):
    """`build` on the devices of `mesh`, which must be there."""
    values = jax.jit(functools.partial(build, problem, num_data, num_checkpoints))()
    return jax.tree.map(jax.device_put, values, shardings(values, mesh))


def shapes(problem: Problem, mesh: Mesh, num_data: int, num_checkpoints: int = 1):
    """Shapes and shardings of `build`: enough to compile for devices that are not there."""
    values = jax.eval_shape(functools.partial(build, problem, num_data, num_checkpoints))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        values,
        shardings(values, mesh),
    )


def shardings(values: tuple, mesh: Mesh) -> tuple:
    """What has a checkpoint axis split over the mesh as `sample` splits it, the rest replicated."""
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(CHECKPOINT))
    # key, posteriors, sampler, references, data, arrays of observables
    axes = (whole, split, split, split, whole, whole)
    return tuple(
        jax.tree.map(lambda _, to=to: to, part) for part, to in zip(values, axes, strict=True)
    )


def lower_sample(args: tuple, loss_fn, plan: Plan, chains: int, mesh: Mesh):
    """Lowers `sampling.program.sample` for arguments or shapes; `compile` is up to the caller."""
    return sample.lower(
        *args, loss_fn=loss_fn, stream=None, plan=plan, num_chains=chains, mesh=mesh,
        recorder=split_observables({"loss_gap": LossGap()})[0],
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("loss_fn", "num_steps", "batch_size", "mesh"))
def gradient_descent(
    params: Any, data: Any, rate: jax.Array, *, loss_fn, num_steps: int, batch_size: int, mesh: Mesh
):
    """What any sampler has to do at least: `value_and_grad` and a step, for each chain.

    Args:
      params: where all chains start.
      data: `batch_size` rows for each chain.
      rate: scalar.
      loss_fn: per-example losses.
      num_steps: length of the scan.
      batch_size: examples per step, always the same ones: nothing is drawn, nothing gathered.
      mesh: devices; the chains are split over its chain axis as in `sample`.

    Returns:
      (params [chain, ...], losses [chain, num_steps]).
    """
    chains = jax.tree.leaves(data)[0].shape[0] // batch_size
    batches = jax.tree.map(lambda x: x.reshape(chains, batch_size, *x.shape[1:]), data)

    def one_chain(params, rate, batch):
        def step(w, _):
            loss, grad = jax.value_and_grad(lambda v: mean_loss(loss_fn, v, batch))(w)
            return jax.tree.map(lambda w, g: w - rate * g, w, grad), loss

        return jax.lax.scan(step, params, None, length=num_steps)

    return jax.shard_map(
        jax.vmap(one_chain, in_axes=(None, None, 0)),
        mesh=mesh,
        in_specs=(P(), P(), P(CHAIN)),
        out_specs=P(CHAIN),
        check_vma=False,
    )(params, rate, batches)
