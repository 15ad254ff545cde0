"""Anchors and their settings, checked and sent a few at a time through one compiled program."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from llc_jax import arrays, checks, parallel, soundness, traced
from llc_jax.estimate import LLCEstimate
from llc_jax.posterior import default_nbeta
from llc_jax.program import Lane, Run, Weighed
from llc_jax.sampling import Plan
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
    mask: Params | None = None,
    parts_fn: PartsFn | None = None,
    collect: Callable[[Params, Batch], Any] | None = None,
    mesh: Mesh | None = None,
) -> Iterator[tuple[Lane, LLCEstimate]]:
    """Checks everything, then estimates lane after lane, `lane_batch` of them in one program."""
    checks.typed_key(rng_key)
    checks.at_least("num_chains", num_chains, 1)
    checks.at_least("num_draws", num_draws, 1, "burn-in alone estimates nothing")
    checks.at_least("num_burnin", num_burnin, 0)
    checks.at_least("thinning", thinning, 1)
    checks.at_least("grad_accum", grad_accum, 1)
    checks.at_least("checkpoint_batch", lane_batch, 1)
    checks.at_least("num_probes", num_probes, 0)
    if chain_batch is not None:
        checks.at_least("chain_batch", chain_batch, 1)
    stream = data if isinstance(data, Stream) else None
    n = None if stream else checks.data_length(data)
    if stream:
        if batch_size is not None:
            raise ValueError(
                f"batch_size={batch_size!r} with a Stream: its batch_fn fixes the batch size; leave"
                " batch_size out."
            )
        example, batch_size = checks.stream_batch(stream, rng_key)
    batch_size = checks.batch_size(batch_size, n, grad_accum)

    def settled(lane: Lane) -> Lane:
        nbeta = default_nbeta_of(lane.nbeta, data)
        checks.nonnegative("nbeta", nbeta)
        checks.nonnegative("localization", lane.localization)
        checks.hyperparameters(lane.sampler)
        step = checks.step(lane.step, "checkpoint step")
        return lane._replace(step=step, nbeta=nbeta)

    first = next(lanes, None)
    if first is None:
        raise ValueError("checkpoints is empty: give at least one (step, params).")
    first = settled(first)
    mask = checks.mask(mask, first.params)
    template = checks.params(first.params, first.step, None, mask)
    if not stream:
        data = arrays.data_arrays(data)
        example = checks.rows(data, batch_size)
    dtype = checks.losses(loss_fn, template, example, batch_size, mask)
    if parts_fn is not None:
        checks.parts(parts_fn, template, example, batch_size)
    if collect is not None:
        traced.trace("collect", collect, template, example)
    mesh = mesh or parallel.make_mesh(lane_batch, num_chains)
    if set(mesh.axis_names) != {parallel.CHECKPOINT, parallel.CHAIN}:
        raise ValueError(
            f"mesh has the axes {mesh.axis_names}: give one of {parallel.CHECKPOINT!r} and"
            f" {parallel.CHAIN!r}, as llc_jax.parallel.make_mesh makes it."
        )
    rows, columns = (mesh.shape[axis] for axis in (parallel.CHECKPOINT, parallel.CHAIN))
    width = rows * -(-lane_batch // rows)
    share = -(-num_chains // columns)
    chain_batch = min(chain_batch or share, share)
    run = Run(
        rng_key=rng_key,
        loss_fn=loss_fn,
        stream=stream,
        data=None if stream else data,
        mask=mask,
        plan=Plan(num_draws, num_burnin, thinning, batch_size, grad_accum, chain_batch, num_probes),
        num_chains=num_chains,
        padded=(width, columns * chain_batch * -(-share // chain_batch)),
        mesh=mesh,
        dtype=dtype,
        parts_fn=parts_fn,
        collect=collect,
    )

    def weighed(lane: Lane) -> Weighed:
        checks.params(lane.params, lane.step, template, mask)
        params = arrays.param_arrays(lane.params, lane.step, mask)
        heating = soundness.weight_heating(params, lane.sampler, lane.localization, mask)
        return Weighed(lane._replace(params=params), heating, soundness.shared_arrays(params))

    # Before anything compiles; what comes later is checked when it is read.
    first = weighed(first)

    def chunks() -> Iterator[list[Weighed]]:
        rest = itertools.chain([first], (weighed(settled(lane)) for lane in lanes))
        while chunk := list(itertools.islice(rest, lane_batch)):
            yield chunk

    def estimates() -> Iterator[tuple[Lane, LLCEstimate]]:
        # One chunk is always in flight while the one before it is fetched. A checkpoint that cannot
        # be read or evaluated must not take the finished one before it along.
        placed, pending, source = run.place(), None, chunks()
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
