"""One chain as a scan, many chains and checkpoints as one compiled, sharded program."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llc_jax import vectorize
from llc_jax.parallel import CHAIN, CHECKPOINT
from llc_jax.posterior import apply_mask, displacement, evaluate, mean_loss, mean_parts
from llc_jax.stability import Tridiagonal, stability_matrix
from llc_jax.types import Batch, LossFn, Params, PartsFn, Sampler, Stream


class Plan(NamedTuple):
    """The integers that fix the shapes of a run: static, hashable, compared by value.

    Attributes:
      num_draws: recorded draws after burn-in.
      num_burnin: recorded draws that are thrown away first.
      thinning: sampler steps per recorded draw.
      batch_size: examples per minibatch; ignored for a `Stream`, whose batches have their own.
      grad_accum: micro-batches per minibatch.
      chain_batch: chains that one device runs at once; the rest wait their turn.
      num_probes: most draws after burn-in at which the Metropolis acceptance is measured; with 0
        the stability number is not measured either.
    """

    num_draws: int
    num_burnin: int
    thinning: int
    batch_size: int
    grad_accum: int
    chain_batch: int
    num_probes: int

    @property
    def total_draws(self) -> int:
        """Recorded draws, burn-in included."""
        return self.num_burnin + self.num_draws

    def probe_draws(self) -> range:
        """The draws at which acceptance is measured, evenly spaced after burn-in."""
        every = -(-self.num_draws // max(1, self.num_probes))
        last = self.total_draws if self.num_probes else self.num_burnin
        return range(self.num_burnin, last, every)


class Trace(NamedTuple):
    """What a chain leaves behind; leading axes [checkpoint, chain] outside `sample_chain`.

    Attributes:
      losses: [draw] minibatch loss L_B at the draw.
      anchor_losses: [draw] loss of w* on the same minibatch.
      distance: [draw] Euclidean distance |w - w*|.
      log_acceptance: [draw] log Metropolis ratio of the step from the draw; nan where not probed.
      stability: of the end of the chain, `stability.stability_matrix`; None if not probed.
      part_gaps: [draw, part] parts of the loss at the draw minus those at w*, both means over the
        same minibatch; None without `parts_fn`.
      collected: what `collect` returned, stacked over draws; None without it.
    """

    losses: jax.Array
    anchor_losses: jax.Array
    distance: jax.Array
    log_acceptance: jax.Array
    stability: Tridiagonal | None
    part_gaps: jax.Array | None
    collected: Any


def anchor_losses(loss_fn: PartsFn, params: Params, data: Batch, chunk: int) -> jax.Array:
    """Losses of all n examples, [n] or [n, part], float32, `chunk` examples at a time."""
    n = num_examples(data)
    num_chunks = -(-n // chunk)
    rows = (jnp.arange(num_chunks * chunk) % n).reshape(num_chunks, chunk)
    losses = jax.lax.map(lambda r: loss_fn(params, take(data, r)).astype(jnp.float32), rows)
    return losses.reshape(-1, *losses.shape[2:])[:n]


def num_examples(data: Batch) -> int:
    """Returns the length of the leading axis."""
    return jax.tree.leaves(data)[0].shape[0]


def take(data: Batch, rows: jax.Array) -> Batch:
    """Returns the examples `rows`."""
    return jax.tree.map(lambda x: x[rows], data)


def sample_chain(
    rng_key: jax.Array,
    loss_fn: LossFn,
    anchor: Params,
    data: Batch | Stream,
    reference: jax.Array | None,
    part_reference: jax.Array | None,
    sampler: Sampler,
    nbeta: jax.Array,
    localization: jax.Array,
    mask: Params | None,
    plan: Plan,
    parts_fn: PartsFn | None = None,
    collect: Callable[[Params, Batch], Any] | None = None,
) -> Trace:
    """Runs one chain from the anchor.

    Args:
      rng_key: identity of the chain; step t uses `fold_in(rng_key, t)` and nothing else.
      loss_fn: per-example losses.
      anchor: w*, start of the chain and centre of the localization.
      data: a data set with leading axis n, or a `Stream`.
      reference: [n] losses at the anchor; None for a `Stream`.
      part_reference: [n, part] parts of them; None for a `Stream` or without `parts_fn`.
      sampler: the sampler.
      nbeta: scalar.
      localization: scalar.
      mask: None, or 0/1 like params.
      plan: the static sizes.
      parts_fn: optional `parts_fn(params, batch)` [batch, part], averaged at every draw.
      collect: optional `collect(params, batch)` recorded at every draw.

    Returns:
      A `Trace` over burn-in and draws. The first recorded draw of a chain with `thinning=1` is
      the anchor itself.
    """
    probes = plan.probe_draws() if hasattr(sampler, "log_acceptance") else range(0)

    def minibatch(key):
        if isinstance(data, Stream):
            batch = data.batch_fn(key)
            loss, parts = mean_loss(loss_fn, anchor, batch), mean_parts(parts_fn, anchor, batch)
            return batch, loss, parts
        n = num_examples(data)
        if plan.batch_size == n:
            rows, batch = slice(None), data
        else:
            rows = jax.random.randint(key, (plan.batch_size,), 0, n)
            batch = take(data, rows)
        parts = None if parts_fn is None else jnp.mean(part_reference[rows], axis=0)
        return batch, jnp.mean(reference[rows]), parts

    def posterior_on(batch, anchor_loss):
        return lambda params: evaluate(
            loss_fn, params, batch, anchor, nbeta, localization, mask, plan.grad_accum,
            anchor_loss, parts_fn,
        )  # fmt: skip

    def step(state, key_data, probing):
        batch_key, noise_key = jax.random.wrap_key_data(key_data, impl=jax.random.key_impl(rng_key))
        batch, anchor_loss, anchor_parts = minibatch(batch_key)
        posterior = posterior_on(batch, anchor_loss)
        new_state, here = sampler.step(noise_key, state, posterior, mask)
        distance = optax.tree.norm(apply_mask(mask, displacement(state.params, anchor)))

        def probe():
            move = displacement(new_state.params, state.params)
            return sampler.log_acceptance(move, here, posterior(new_state.params))

        ratio = getattr(new_state, "log_acceptance", jnp.float32(jnp.nan))
        if len(probes):
            # The predicate is the same for every chain, so vmap keeps the branch a branch.
            ratio = jax.lax.cond(probing, probe, lambda: jnp.float32(jnp.nan))
        parts = None if parts_fn is None else here.parts - anchor_parts
        extra = None if collect is None else collect(state.params, batch)
        return new_state, (here.loss, anchor_loss, distance, ratio, parts, extra)

    def draw(state, inputs):
        key_data, probing = inputs
        if plan.thinning == 1:
            return step(state, key_data[0], probing)
        blank = jax.eval_shape(lambda: step(state, key_data[0], probing)[1])
        return jax.lax.fori_loop(
            0,
            plan.thinning,
            lambda i, carry: step(carry[0], key_data[i], probing & (i == plan.thinning - 1)),
            (state, jax.tree.map(jnp.zeros_like, blank)),
        )

    def keys_of(t):  # of the minibatch, of the noise
        return jax.random.split(jax.random.fold_in(rng_key, t))

    # Of all steps at once: in the loop they would be programs of their own, every step. As data,
    # since checks for keys that are used twice do not see through a scan over keys in a vmap.
    count = plan.total_draws * plan.thinning
    key_data = jax.vmap(lambda t: jax.random.key_data(keys_of(t)))(jnp.arange(count))
    key_data = key_data.reshape(plan.total_draws, plan.thinning, *key_data.shape[1:])
    draws = jnp.arange(plan.total_draws)
    probing = jnp.isin(draws, jnp.asarray(probes, draws.dtype))
    state, (losses, references, distance, ratio, parts, extra) = jax.lax.scan(
        draw, sampler.init(anchor), (key_data, probing)
    )
    stability = None
    if plan.num_probes and hasattr(sampler, "step_size"):
        batch_key, start_key = keys_of(count)  # of the step after the last
        posterior = posterior_on(*minibatch(batch_key)[:2])
        stability = stability_matrix(start_key, sampler, state, posterior, mask)
    return Trace(losses, references, distance, ratio, stability, parts, extra)


@functools.partial(
    jax.jit,
    static_argnames=("loss_fn", "stream", "plan", "num_chains", "mesh", "parts_fn", "collect"),
)
def sample(
    rng_key: jax.Array,
    steps: jax.Array,
    checkpoints: Params,
    data: Batch | None,
    sampler: Sampler,
    nbeta: jax.Array,
    localization: jax.Array,
    mask: Params | None,
    *,
    loss_fn: LossFn,
    stream: Stream | None,
    plan: Plan,
    num_chains: int,
    mesh: Mesh,
    parts_fn: PartsFn | None = None,
    collect: Callable[[Params, Batch], Any] | None = None,
) -> tuple[jax.Array, Trace]:
    """Samples `num_chains` chains in each of a stack of lanes: a checkpoint and its settings.

    Args:
      rng_key: typed key; chain c of checkpoint s uses `fold_in(fold_in(rng_key, s), c)`, so a
        chain does not depend on what else runs beside it.
      steps: [checkpoint] training steps, uint32.
      checkpoints: params with a leading axis [checkpoint], a multiple of the mesh axis. A grid of
        settings is one checkpoint over and over.
      data: finite data set, replicated; None with a `stream`.
      sampler: sampler whose hyperparameters are [checkpoint].
      nbeta: [checkpoint].
      localization: [checkpoint].
      mask: None, or 0/1 like params.
      loss_fn: static.
      stream: static; None with finite `data`.
      plan: static sizes.
      num_chains: a multiple of mesh axis times `plan.chain_batch`.
      mesh: axes (checkpoint, chain); each device runs its own lanes and never talks to another.
      parts_fn: static, see `sample_chain`.
      collect: static, see `sample_chain`.

    Returns:
      (init_losses [checkpoint], nan for a stream; `Trace` with leading axes [checkpoint, chain]).
    """

    def local(key, steps, chains, checkpoints, data, sampler, nbeta, localization, mask):
        def one_checkpoint(step, anchor, sampler, nbeta, localization):
            key_s = jax.random.fold_in(key, step)
            reference, parts, init_loss = None, None, jnp.float32(jnp.nan)
            if stream is None:
                chunk = plan.batch_size // plan.grad_accum
                reference = anchor_losses(loss_fn, anchor, data, chunk)
                init_loss = vectorize.mean_of_pairs(reference)
                if parts_fn is not None:
                    parts = anchor_losses(parts_fn, anchor, data, chunk)

            def one_chain(chain):
                return sample_chain(
                    jax.random.fold_in(key_s, chain), loss_fn, anchor,
                    stream or data, reference, parts, sampler, nbeta, localization, mask, plan,
                    parts_fn, collect,
                )  # fmt: skip

            return init_loss, vectorize.map_in_batches(one_chain, chains, plan.chain_batch)

        return vectorize.vmap(one_checkpoint)(steps, checkpoints, sampler, nbeta, localization)

    lane = P(CHECKPOINT)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), lane, P(CHAIN), lane, P(), lane, lane, lane, P()),
        out_specs=(lane, P(CHECKPOINT, CHAIN)),
        # Loop carries start replicated (the anchor) and end varying; nothing is ever reduced.
        check_vma=False,
    )(
        rng_key, steps, jnp.arange(num_chains, dtype=jnp.uint32), checkpoints, data, sampler,
        nbeta, localization, mask,
    )  # fmt: skip
