"""Anchors and their settings, checked and sent a few at a time through one compiled program."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from llc_jax import parallel
from llc_jax.ambient import own_key, undisturbed
from llc_jax.checkpoint_map import chunks
from llc_jax.inputs import arrays, checks, weights
from llc_jax.llc.estimate import LLCEstimate
from llc_jax.llc.run import Lane, Run, Weighed
from llc_jax.observables import Function, LossGap, LossTerms
from llc_jax.recorder import checked, split
from llc_jax.samplers.base import check_hyperparameters, step_variance
from llc_jax.sampling.chain import Plan
from llc_jax.sampling.posterior import default_nbeta
from llc_jax.types import Batch, LossFn, Params, PartsFn, Stream


def default_nbeta_of(nbeta: Any, data: Batch | Stream) -> Any:
    """`nbeta`, or its default."""
    if nbeta is not None:
        return nbeta
    if isinstance(data, Stream):
        raise ValueError("nbeta=None has no default for a Stream (it has no n): give nbeta.")
    return default_nbeta(checks.data_length(data))


def estimate_lanes(
    rng_key: jax.Array,
    loss_fn: LossFn,
    lanes: Iterator[Lane],
    data: Batch | Stream,
    **options: Any,
) -> Iterator[tuple[Lane, LLCEstimate]]:
    """Checks everything, then estimates lane after lane, a few of them in one program.

    Args:
      rng_key: see `estimate_llc`.
      loss_fn: see `estimate_llc`.
      lanes: at least one, read lazily; they differ in anchors and settings, not in shapes.
      data: see `estimate_llc`.
      **options: of `prepare`.
    """
    first = next(lanes)
    run, weigh = prepare(rng_key, loss_fn, first, data, **options)
    weighed = weigh(first)  # before anything compiles; what comes later when it is read

    def estimates() -> Iterator[tuple[Lane, LLCEstimate]]:
        # One chunk is always in flight while the one before it is fetched. A checkpoint that cannot
        # be read or evaluated must not take the finished one before it along.
        # Read outside of `undisturbed`: the iterator of the caller may want its surroundings.
        source = chunks(itertools.chain([weighed], map(weigh, lanes)), run.lane_batch)
        placed, pending = run.place(), None
        while True:
            try:
                chunk = next(source, None)
                output = None if chunk is None else placed.dispatch(chunk)
            except Exception:
                if pending is not None:
                    yield from placed.finish(*pending)
                raise
            if pending is not None:
                yield from placed.finish(*pending)
            if chunk is None:
                return
            pending = chunk, output

    return estimates()


@undisturbed()
def prepare(
    rng_key: jax.Array,
    loss_fn: LossFn,
    first: Lane,
    data: Batch | Stream,
    *,
    lane_batch: int,
    num_chains: int = 4,
    num_draws: int = 500,
    num_burnin: int = 500,
    batch_size: int | None = None,
    thinning: int = 1,
    grad_accum: int = 1,
    chain_batch: int | None = None,
    num_probes: int = 8,
    masks: Iterable[Params | None] = (None,),
    observables: Mapping[str, Any] | None = None,
    parts_fn: PartsFn | None = None,
    collect: Callable[[Params, Batch], Any] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Run, Callable[[Lane], Weighed]]:
    """Checks what all lanes share against the first of them.

    Args:
      rng_key: see `estimate_llc`.
      loss_fn: see `estimate_llc`.
      first: gives the shapes of all.
      data: see `estimate_llc`.
      lane_batch: most lanes at once.
      num_chains: see `estimate_llc`.
      num_draws: see `estimate_llc`.
      num_burnin: see `estimate_llc`.
      batch_size: see `estimate_llc_over_checkpoints`, like all that follow.
      thinning: as there.
      grad_accum: as there.
      chain_batch: as there.
      num_probes: as there.
      masks: all masks of the lanes, checked.
      observables: as there.
      parts_fn: as there.
      collect: as there.
      mesh: as there.

    Returns:
      (the run; a function that checks one lane).

    Raises:
      ValueError: on bad input.
    """
    checks.typed_key(rng_key)
    num_chains = checks.at_least("num_chains", num_chains, 1)
    num_draws = checks.at_least("num_draws", num_draws, 1, "burn-in alone estimates nothing")
    num_burnin = checks.at_least("num_burnin", num_burnin, 0)
    thinning = checks.at_least("thinning", thinning, 1)
    grad_accum = checks.at_least("grad_accum", grad_accum, 1)
    lane_batch = checks.at_least("checkpoint_batch", lane_batch, 1)
    num_probes = checks.at_least("num_probes", num_probes, 0)
    if chain_batch is not None:
        chain_batch = checks.at_least("chain_batch", chain_batch, 1)
    stream = data if isinstance(data, Stream) else None
    n = None if stream else checks.data_length(data)
    if stream:
        if batch_size is not None:
            raise ValueError(
                f"batch_size={checks.shown(batch_size)} with a Stream: its batch_fn fixes the batch"
                " size; leave batch_size out."
            )
        example, batch_size = checks.stream_batch(stream, rng_key)
    batch_size = checks.batch_size(batch_size, n, grad_accum)

    def settled(lane: Lane) -> Lane:
        nbeta = default_nbeta_of(lane.here.nbeta, data)
        checks.nonnegative("nbeta", nbeta)
        checks.nonnegative("localization", lane.here.localization)
        check_hyperparameters(lane.sampler)
        step = checks.step(lane.here.step, "checkpoint step")
        return lane._replace(here=lane.here._replace(step=step, nbeta=nbeta))

    here = settled(first).here
    template = checks.params(here.anchor, here.step, None, here.mask)
    if not stream:
        data = arrays.data_arrays(data)
        example = checks.rows(data, batch_size)
    dtype = checks.losses(loss_fn, template, example, batch_size, masks)
    observables, names = _spelled_out(observables, parts_fn, collect)
    observables = checked(observables, loss_fn, template, example, batch_size, num_draws, names)
    recorder, held = split({"loss_gap": LossGap(), **observables})
    mesh = parallel.make_mesh(lane_batch, num_chains) if mesh is None else mesh
    axes = mesh.axis_names if isinstance(mesh, Mesh) else type(mesh).__name__
    if set(axes) != {parallel.CHECKPOINT, parallel.CHAIN}:
        raise ValueError(
            f"mesh has the axes {axes}: give one of {parallel.CHECKPOINT!r} and"
            f" {parallel.CHAIN!r}, as llc_jax.parallel.make_mesh makes it."
        )
    rows, columns = (mesh.shape[axis] for axis in (parallel.CHECKPOINT, parallel.CHAIN))
    share = -(-num_chains // columns)
    chain_batch = min(chain_batch or share, share)

    @undisturbed()
    def weigh(lane: Lane) -> Weighed:
        lane = settled(lane)
        here = lane.here
        checks.params(here.anchor, here.step, template, here.mask)
        params = arrays.param_arrays(here.anchor, here.step, here.mask)
        heating = weights.weight_heating(
            params, step_variance(lane.sampler), here.localization, here.mask
        )
        lane = lane._replace(here=here._replace(anchor=params))
        return Weighed(lane, heating, weights.shared_arrays(params))

    run = Run(
        # A key that does not depend on how many chains are drawn at once.
        rng_key=own_key(rng_key),
        loss_fn=loss_fn,
        stream=stream,
        data=None if stream else data,
        plan=Plan(num_draws, num_burnin, thinning, batch_size, grad_accum, chain_batch, num_probes),
        num_chains=num_chains,
        lane_batch=lane_batch,
        padded=(rows * -(-lane_batch // rows), columns * chain_batch * -(-share // chain_batch)),
        mesh=mesh,
        dtype=dtype,
        recorder=recorder,
        held=held,
    )
    return run, weigh


def _spelled_out(
    observables: Mapping[str, Any] | None, parts_fn: PartsFn | None, collect: Callable | None
) -> tuple[Any, dict[str, str]]:
    """(observables with those that have an argument of their own, {name: that argument})."""
    short = {}
    if parts_fn is not None:
        short["parts"] = LossTerms(parts_fn, keep=False), "parts_fn"
    if collect is not None:
        short["collected"] = Function(collect, burnin=True, summary=False), "collect"
    if not short or not isinstance(observables or {}, Mapping):
        return observables or {}, {}
    for name, (_, argument) in short.items():
        if name in (observables or {}):
            raise ValueError(
                f"observables has {name!r}, the name of what {argument} records: give it another."
            )
    named = {name: observable for name, (observable, _) in short.items()}
    return {**(observables or {}), **named}, {name: of for name, (_, of) in short.items()}
