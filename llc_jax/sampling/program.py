"""Many chains and checkpoints as one compiled, sharded program."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llc_jax import parallel
from llc_jax.parallel import CHAIN, CHECKPOINT
from llc_jax.sampling.chain import Plan, Trace, sample_chain
from llc_jax.types import Batch, LossFn, Params, PartsFn, Sampler, Stream


@functools.partial(
    jax.jit,
    static_argnames=("loss_fn", "stream", "plan", "num_chains", "mesh", "parts_fn", "collect"),
)
def sample(
    rng_key: jax.Array,
    steps: jax.Array,
    checkpoints: Params,
    references: tuple[jax.Array | None, jax.Array | None],
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
) -> Trace:
    """Samples `num_chains` chains in each of a stack of lanes: a checkpoint and its settings.

    Args:
      rng_key: typed key; chain c of checkpoint s uses `fold_in(fold_in(rng_key, s), c)`, so a
        chain does not depend on what else runs beside it.
      steps: [checkpoint] training steps, uint32.
      checkpoints: params with a leading axis [checkpoint], a multiple of the mesh axis. A grid of
        settings is one checkpoint over and over.
      references: losses [checkpoint, n] and parts [checkpoint, n, part] at the anchors, see
        `anchors.losses_at`; None for a stream, or without `parts_fn`.
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
      A `Trace` with leading axes [checkpoint, chain].
    """

    def local(
        key, steps, chains, checkpoints, references, data, sampler, nbeta, localization, mask
    ):
        def one_checkpoint(step, anchor, reference, sampler, nbeta, localization):
            key_s = jax.random.fold_in(key, step)

            def one_chain(chain):
                return sample_chain(
                    jax.random.fold_in(key_s, chain), loss_fn, anchor, stream or data, *reference,
                    sampler, nbeta, localization, mask, plan, parts_fn, collect,
                )  # fmt: skip

            return parallel.map_in_batches(one_chain, chains, plan.chain_batch)

        return parallel.vmap(one_checkpoint)(
            steps, checkpoints, references, sampler, nbeta, localization
        )

    lane = P(CHECKPOINT)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), lane, P(CHAIN), lane, lane, P(), lane, lane, lane, P()),
        out_specs=P(CHECKPOINT, CHAIN),
        # Loop carries start replicated (the anchor) and end varying; nothing is ever reduced.
        check_vma=False,
    )(
        rng_key, steps, jnp.arange(num_chains, dtype=jnp.uint32), checkpoints, references, data,
        sampler, nbeta, localization, mask,
    )  # fmt: skip
