"""The local learning coefficient: λ̂ = nbeta (E[L(w)] - L(w*)) over the localized posterior."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llc_jax.ambient import undisturbed
from llc_jax.inputs import checks
from llc_jax.llc.estimate import LLCEstimate
from llc_jax.llc.lanes import default_nbeta_of, estimate_lanes
from llc_jax.llc.run import Lane
from llc_jax.types import Batch, LossFn, Params, PartsFn, Sampler, Stream


def estimate_llc(
    rng_key: jax.Array,
    loss_fn: LossFn,
    params: Params,
    data: Batch | Stream,
    *,
    sampler: Sampler,
    localization: float,
    nbeta: float | None = None,
    num_chains: int = 4,
    num_draws: int = 500,
    num_burnin: int = 500,
    step: int = 0,
    **options: Any,
) -> LLCEstimate:
    """Estimates the local learning coefficient at `params`.

    Args:
      rng_key: typed key (`jax.random.key`); consumed.
      loss_fn: `loss_fn(params, batch) -> losses` [batch]; static, so keep its identity.
      params: the anchor w*, any pytree of floating-point arrays.
      data: pytree of arrays with leading axis n, or a `Stream`.
      sampler: e.g. `llc_jax.SGLD(step_size)`.
      localization: γ >= 0, strength of the pull towards w*.
      nbeta: n times inverse temperature; default `default_nbeta(n)`, required for a stream.
      num_chains: independent chains, all from w*.
      num_draws: recorded draws per chain after burn-in.
      num_burnin: recorded draws per chain that are thrown away first.
      step: training step of the checkpoint; part of the identity of the random numbers.
      **options: as in `estimate_llc_over_checkpoints`.

    Returns:
      An `LLCEstimate`.

    Raises:
      ValueError: on bad input, before anything compiles.

    Source: Lau et al. 2023 (arXiv 2308.12108), definition 2 and section 4.
    """
    [(_, estimate)] = estimate_llc_over_checkpoints(
        rng_key,
        loss_fn,
        [(step, params)],
        data,
        sampler=sampler,
        localization=localization,
        nbeta=nbeta,
        num_chains=num_chains,
        num_draws=num_draws,
        num_burnin=num_burnin,
        **options,
    )
    return estimate


def estimate_llc_over_checkpoints(
    rng_key: jax.Array,
    loss_fn: LossFn,
    checkpoints: Mapping[int, Params] | Iterable[tuple[int, Params]],
    data: Batch | Stream,
    *,
    sampler: Sampler,
    localization: float,
    nbeta: float | None = None,
    num_chains: int = 4,
    num_draws: int = 500,
    num_burnin: int = 500,
    batch_size: int | None = None,
    thinning: int = 1,
    grad_accum: int = 1,
    checkpoint_batch: int = 1,
    chain_batch: int | None = None,
    num_probes: int = 8,
    mask: Params | None = None,
    parts_fn: PartsFn | None = None,
    collect: Callable[[Params, Batch], Any] | None = None,
    mesh: Mesh | None = None,
) -> Iterator[tuple[int, LLCEstimate]]:
    """Estimates the local learning coefficient at every checkpoint, one compiled program for all.

    Args:
      rng_key: typed key; consumed.
      loss_fn: see `estimate_llc`.
      checkpoints: {step: params} or an iterable of (step, params), read lazily.
      data: see `estimate_llc`.
      sampler: see `estimate_llc`.
      localization: see `estimate_llc`.
      nbeta: see `estimate_llc`.
      num_chains: see `estimate_llc`.
      num_draws: see `estimate_llc`.
      num_burnin: see `estimate_llc`.
      batch_size: examples per minibatch, drawn with replacement; default all n of them (full
        batch, no noise). Not for a stream.
      thinning: sampler steps per recorded draw, the burn-in's too.
      grad_accum: equal micro-batches whose gradients are added up; bounds memory.
      checkpoint_batch: checkpoints in flight at once, over all devices; bounds memory.
      chain_batch: chains that one device runs at once for each checkpoint; default all of its
        share; bounds memory.
      num_probes: draws at which a step is looked at: its Metropolis acceptance, and whether the
        loss changes along it as its gradient says (two gradients each); unless 0, the stability
        number is measured at the end of each chain (13 Hessian products).
      mask: pytree of 0/1 like params; only weights with 1 are sampled.
      parts_fn: `parts_fn(params, batch)` [batch, part], e.g. losses of each token: λ̂ of each
        part from the same chains, `LLCEstimate.parts`; static.
      collect: `collect(params, batch)`, recorded at every draw; static, keep it small.
      mesh: devices, axes (checkpoint, chain); default all devices (`parallel.make_mesh`).

    Returns:
      An iterator of (step, LLCEstimate), in the order given.

    Raises:
      ValueError: on bad input, before anything compiles.
    """
    pairs = checks.pairs(checkpoints)
    lanes = (Lane(step, params, sampler, nbeta, localization) for step, params in pairs)
    estimates = estimate_lanes(
        rng_key, loss_fn, lanes, data, lane_batch=checkpoint_batch, num_chains=num_chains,
        num_draws=num_draws, num_burnin=num_burnin, batch_size=batch_size, thinning=thinning,
        grad_accum=grad_accum, chain_batch=chain_batch, num_probes=num_probes, mask=mask,
        parts_fn=parts_fn, collect=collect, mesh=mesh,
    )  # fmt: skip
    return ((lane.step, estimate) for lane, estimate in estimates)


@undisturbed()
def estimate_llc_over_settings(
    rng_key: jax.Array,
    loss_fn: LossFn,
    params: Params,
    data: Batch | Stream,
    *,
    sampler: Sampler,
    localization: Any,
    nbeta: Any = None,
    step: int = 0,
    setting_batch: int | None = None,
    **options: Any,
) -> np.ndarray:
    """Estimates the local learning coefficient at `params` for a grid of settings, all at once.

    All settings see the same random numbers, so that differences between them are sharper than
    the standard errors say.

    Args:
      rng_key: typed key; consumed.
      loss_fn: see `estimate_llc`.
      params: the anchor.
      data: see `estimate_llc`.
      sampler: its hyperparameters are scalars or arrays.
      localization: scalar or array.
      nbeta: scalar or array; default as in `estimate_llc`. The arrays of all three must broadcast
        against each other, e.g. step sizes [5, 1, 1], nbeta [3, 1] and localization [3].
      step: training step of the checkpoint.
      setting_batch: settings in flight at once, over all devices; default all; bounds memory.
      **options: as in `estimate_llc_over_checkpoints`, but for `checkpoint_batch`.

    Returns:
      Object array of `LLCEstimate`, of the broadcast shape.

    Raises:
      ValueError: on bad input, before anything compiles.
    """
    checks.sampler_instance(sampler)
    nbeta = default_nbeta_of(nbeta, data)
    grid = checks.grid({**sampler._asdict(), "nbeta": nbeta, "localization": localization})
    columns = zip(*[leaf.ravel().tolist() for leaf in grid], strict=True)
    lanes = [Lane(step, params, type(sampler)(*row[:-2]), *row[-2:]) for row in columns]
    if not lanes:
        raise ValueError(f"settings have shape {grid[0].shape}: give at least one.")
    size = len(lanes) if setting_batch is None else setting_batch
    checks.at_least("setting_batch", size, 1)
    estimates = estimate_lanes(
        rng_key, loss_fn, iter(lanes), data, lane_batch=min(size, len(lanes)), **options
    )
    found = np.empty(len(lanes), dtype=object)
    found[:] = [estimate for _, estimate in estimates]
    return found.reshape(grid[0].shape)
