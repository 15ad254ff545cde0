"""The local learning coefficient: λ̂ = nbeta (E[L(w)] - L(w*)) over the localized posterior."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypedDict, Unpack

import jax
import numpy as np
from jax.sharding import Mesh

from llc_jax.ambient import undisturbed
from llc_jax.checkpoint_map import chunks
from llc_jax.inputs import checks
from llc_jax.inputs.masks import check_mask, check_masks
from llc_jax.llc.lanes import default_nbeta_of, estimate_lanes
from llc_jax.llc.run import Lane
from llc_jax.samplers.base import check_instance
from llc_jax.sampling.posterior import LocalPosterior
from llc_jax.types import Batch, LossFn, Params, PartsFn, Sampler, Stream


class Options(TypedDict, total=False):
    """What all functions of this module, and `calibrate`, take beside their own arguments.

    Attributes:
      batch_size: examples per minibatch, drawn with replacement; default all n of them (full
        batch, no noise). Not for a stream.
      thinning: sampler steps per recorded draw, the burn-in's too; default 1.
      grad_accum: equal micro-batches whose gradients are added up; bounds memory; default 1.
      chain_batch: chains that one device runs at once for each checkpoint; default all of its
        share; bounds memory.
      num_probes: draws at which a step is looked at: its Metropolis acceptance, and whether the
        loss changes along it as its gradient says (two gradients each); unless 0, the stability
        number is measured at the end of each chain (13 Hessian products). Default 8.
      mask: pytree of 0/1 like params; only weights with 1 are sampled.
      masks: {name: mask} instead, see `mask_by_path`, None for all weights: one more axis of the
        program. All see the same random numbers, and results are {name: result}.
      observables: {name: `observables.Observable`}, recorded at every draw.
      parts_fn: `parts_fn(params, batch)` [batch, part], e.g. losses of each token: λ̂ of each
        part from the same chains. Short for an observable `LossTerms` "parts".
      collect: `collect(params, batch)`, recorded at every draw, the burn-in's too. Short for an
        observable `Function` "collected".
      mesh: devices, axes (checkpoint, chain); default all devices (`parallel.make_mesh`).
    """

    batch_size: int | None
    thinning: int
    grad_accum: int
    chain_batch: int | None
    num_probes: int
    mask: Params | None
    masks: Mapping[str, Params | None] | None
    observables: Mapping[str, Any] | None
    parts_fn: PartsFn | None
    collect: Callable[[Params, Batch], Any] | None
    mesh: Mesh | None


class ChainOptions(Options, total=False):
    """The same, and how long chains are.

    Attributes:
      num_chains: independent chains, all from w*; default 4.
      num_draws: recorded draws per chain after burn-in; default 500.
      num_burnin: recorded draws per chain that are thrown away first; default 500.
    """

    num_chains: int
    num_draws: int
    num_burnin: int


class GridOptions(Options, total=False):
    """The same, for many settings of one checkpoint.

    Attributes:
      step: training step of the checkpoint; default 0.
      setting_batch: settings in flight at once, over all devices, each of its masks counted;
        default all; bounds memory.
    """

    step: int
    setting_batch: int | None


def estimate_llc(
    rng_key: jax.Array,
    loss_fn: LossFn,
    params: Params,
    data: Batch | Stream,
    *,
    sampler: Sampler,
    localization: float,
    nbeta: float | None = None,
    step: int = 0,
    checkpoint_batch: int | None = None,
    **options: Unpack[ChainOptions],
) -> Any:
    """Estimates the local learning coefficient at `params`.

    Args:
      rng_key: typed key (`jax.random.key`); consumed.
      loss_fn: `loss_fn(params, batch) -> losses` [batch]; static, so keep its identity.
      params: the anchor w*, any pytree of floating-point arrays.
      data: pytree of arrays with leading axis n, or a `Stream`.
      sampler: e.g. `llc_jax.SGLD(step_size)`.
      localization: γ >= 0, strength of the pull towards w*.
      nbeta: n times inverse temperature; default `default_nbeta(n)`, required for a stream.
      step: training step of the checkpoint; part of the identity of the random numbers.
      checkpoint_batch: masks in flight at once; default all; bounds memory.
      **options: see `ChainOptions`.

    Returns:
      An `LLCEstimate`; with `masks`, {name: LLCEstimate}.

    Raises:
      ValueError: on bad input, before anything compiles.

    Source: Lau et al. 2023 (arXiv 2308.12108), definition 2 and section 4.
    """
    [(_, estimate)] = estimate_llc_over_checkpoints(
        rng_key, loss_fn, [(step, params)], data, sampler=sampler, localization=localization,
        nbeta=nbeta, checkpoint_batch=checkpoint_batch, **options,
    )  # fmt: skip
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
    checkpoint_batch: int | None = None,
    **options: Unpack[ChainOptions],
) -> Iterator[tuple[int, Any]]:
    """Estimates the local learning coefficient at every checkpoint, one compiled program for all.

    Args:
      rng_key: typed key; consumed.
      loss_fn: see `estimate_llc`.
      checkpoints: {step: params} or an iterable of (step, params), read lazily.
      data: see `estimate_llc`.
      sampler: see `estimate_llc`.
      localization: see `estimate_llc`.
      nbeta: see `estimate_llc`.
      checkpoint_batch: checkpoints in flight at once, over all devices, each of its masks counted;
        default 1, or all masks of one checkpoint; bounds memory.
      **options: see `ChainOptions`.

    Returns:
      An iterator of (step, LLCEstimate), in the order given; with `masks`, of (step, {name:
      LLCEstimate}).

    Raises:
      ValueError: on bad input, before anything compiles.
    """
    pairs = checks.pairs(checkpoints)
    first = next(pairs, None)
    if first is None:
        raise ValueError("checkpoints is empty: give at least one (step, params).")
    masks = _masks(options, first[1])

    def lanes() -> Iterator[Lane]:
        for step, params in itertools.chain([first], pairs):
            for name, mask in masks.items():
                here = LocalPosterior(params, nbeta, localization, mask, step)
                yield Lane(here, sampler, name)

    size = len(masks) if checkpoint_batch is None else checkpoint_batch
    estimates = estimate_lanes(
        rng_key, loss_fn, lanes(), data, lane_batch=size, masks=list(masks.values()), **options
    )
    if NO_NAME in masks:
        return ((lane.here.step, estimate) for lane, estimate in estimates)
    return (
        (group[0][0].here.step, {lane.name: estimate for lane, estimate in group})
        for group in chunks(estimates, len(masks))
    )


NO_NAME = ""  # of a mask that is not one of several


def _masks(options: Any, params: Params) -> dict[str, Any]:
    """Takes mask or masks out of the options; checked, by name."""
    mask, masks = options.pop("mask", None), options.pop("masks", None)
    if masks is None:
        return {NO_NAME: check_mask(mask, params)}
    if mask is not None:
        raise ValueError("mask and masks are given: put the one among the others.")
    return check_masks(masks, params)


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
    **options: Unpack[ChainOptions],
) -> Any:
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
      **options: see `ChainOptions`.

    Returns:
      Object array of `LLCEstimate`, of the broadcast shape; with `masks`, {name: such an array}.

    Raises:
      ValueError: on bad input, before anything compiles.
    """
    check_instance(sampler)
    nbeta = default_nbeta_of(nbeta, data)
    grid = checks.grid({**sampler._asdict(), "nbeta": nbeta, "localization": localization})
    columns = zip(*[leaf.ravel().tolist() for leaf in grid], strict=True)
    settings = [(type(sampler)(*row[:-2]), *row[-2:]) for row in columns]
    if not settings:
        raise ValueError(f"settings have shape {grid[0].shape}: give at least one.")
    masks = _masks(options, params)
    lanes = [
        Lane(LocalPosterior(params, nbeta, localization, mask, step), sampler, name)
        for name, mask in masks.items()
        for sampler, nbeta, localization in settings
    ]
    size = len(lanes) if setting_batch is None else setting_batch
    checks.at_least("setting_batch", size, 1)
    estimates = estimate_lanes(
        rng_key, loss_fn, iter(lanes), data, lane_batch=min(size, len(lanes)),
        masks=list(masks.values()), **options,
    )  # fmt: skip
    found = np.empty(len(lanes), dtype=object)
    found[:] = [estimate for _, estimate in estimates]
    found = found.reshape(len(masks), *grid[0].shape)
    return found[0] if NO_NAME in masks else dict(zip(masks, found, strict=True))
