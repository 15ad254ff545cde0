"""Many chains and checkpoints as one compiled, sharded program."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llc_jax import parallel
from llc_jax.observables import Anchor
from llc_jax.parallel import CHAIN, CHECKPOINT
from llc_jax.recorder import Recorder
from llc_jax.sampling.chain import Plan, Trace, sample_chain
from llc_jax.sampling.posterior import LocalPosterior
from llc_jax.types import Batch, LossFn, Sampler, Stream


@functools.partial(
    jax.jit, static_argnames=("loss_fn", "stream", "plan", "num_chains", "mesh", "recorder")
)
def sample(
    rng_key: jax.Array,
    posteriors: LocalPosterior,
    sampler: Sampler,
    references: jax.Array | None,
    data: Batch | None,
    held: list[jax.Array],
    *,
    loss_fn: LossFn,
    stream: Stream | None,
    plan: Plan,
    num_chains: int,
    mesh: Mesh,
    recorder: Recorder,
) -> Trace:
    """Samples `num_chains` chains in each of a stack of local posteriors.

    Args:
      rng_key: typed key; chain c of checkpoint s uses `fold_in(fold_in(rng_key, s), c)`, so a
        chain does not depend on what else runs beside it.
      posteriors: each leaf with a leading axis [checkpoint], a multiple of the mesh axis; steps are
        uint32. A grid of settings, or of masks, is one checkpoint over and over.
      sampler: sampler whose hyperparameters are [checkpoint].
      references: losses [checkpoint, n] at the anchors, see `anchors.losses_at`; None for a stream.
      data: finite data set, replicated; None with a `stream`.
      held: arrays of the observables, replicated.
      loss_fn: static.
      stream: static; None with finite `data`.
      plan: static sizes.
      num_chains: a multiple of mesh axis times `plan.chain_batch`.
      mesh: axes (checkpoint, chain); each device runs its own lanes and never talks to another.
      recorder: static, the observables without their arrays.

    Returns:
      A `Trace` with leading axes [checkpoint, chain].
    """

    def local(key, chains, posteriors, sampler, references, data, held):
        observables = recorder.join(held)

        def one_checkpoint(here, sampler, reference):
            key_s = jax.random.fold_in(key, here.step)
            at = Anchor(loss_fn, here.anchor, stream or data, plan.micro_batch)
            prepared = {name: x.prepare(at) for name, x in observables.items()}

            def one_chain(chain):
                return sample_chain(
                    jax.random.fold_in(key_s, chain), loss_fn, here, stream or data, reference,
                    prepared, sampler, plan, observables,
                )  # fmt: skip

            return parallel.map_in_batches(one_chain, chains, plan.chain_batch)

        return parallel.vmap(one_checkpoint)(posteriors, sampler, references)

    lane = P(CHECKPOINT)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P(CHAIN), lane, lane, lane, P(), P()),
        out_specs=P(CHECKPOINT, CHAIN),
        # Loop carries start replicated (the anchor) and end varying; nothing is ever reduced.
        check_vma=False,
    )(
        rng_key, jnp.arange(num_chains, dtype=jnp.uint32), posteriors, sampler, references, data,
        held,
    )  # fmt: skip
