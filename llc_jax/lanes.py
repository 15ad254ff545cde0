"""Anchors and their settings, a few at a time through one compiled program."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from llc_jax import checks, parallel
from llc_jax.estimate import LLCEstimate, summarize
from llc_jax.posterior import default_nbeta
from llc_jax.sampling import Plan, sample
from llc_jax.types import Batch, LossFn, Params, PartsFn, Sampler, Stream


class Lane(NamedTuple):
    """One anchor at one setting: what varies along the first axis of the program.

    Attributes:
      step: training step of the anchor.
      params: the anchor.
      sampler: with scalar hyperparameters.
      nbeta: scalar.
      localization: scalar.
    """

    step: int
    params: Params
    sampler: Sampler
    nbeta: float | None
    localization: float


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
    stream = data if isinstance(data, Stream) else None
    n = None if stream else checks.data_length(data)
    checks.at_least("num_chains", num_chains, 1)
    checks.at_least("num_draws", num_draws, 1, "burn-in alone estimates nothing")
    checks.at_least("num_burnin", num_burnin, 0)
    checks.at_least("thinning", thinning, 1)
    checks.at_least("grad_accum", grad_accum, 1)
    checks.at_least("checkpoint_batch", lane_batch, 1)
    checks.at_least("num_probes", num_probes, 0)
    if chain_batch is not None:
        checks.at_least("chain_batch", chain_batch, 1)
    if stream:
        if batch_size is not None:
            raise ValueError(
                f"batch_size={batch_size} with a Stream: its batch_fn fixes the batch size; leave"
                " batch_size out."
            )
        batch_size = checks.stream_batch_size(stream)
    batch_size = checks.batch_size(batch_size, n, grad_accum)

    def settled(lane: Lane, template: Params | None) -> tuple[Lane, Params]:
        lane = lane._replace(nbeta=default_nbeta_of(lane.nbeta, data))
        checks.nonnegative("nbeta", lane.nbeta)
        checks.nonnegative("localization", lane.localization)
        checks.hyperparameters(lane.sampler)
        shapes = checks.params(lane.params, lane.step, template)
        checks.precision(lane.params, lane.sampler)
        return lane, shapes

    first = next(lanes, None)
    if first is None:
        raise ValueError("checkpoints is empty: give at least one (step, params).")
    first, template = settled(first, None)
    mask = checks.mask(mask, template)
    example = jax.eval_shape(stream.batch_fn, rng_key) if stream else checks.rows(data, batch_size)
    checks.losses(loss_fn, template, example, batch_size)
    if parts_fn is not None:
        checks.parts(parts_fn, template, example, batch_size)

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
    plan = Plan(num_draws, num_burnin, thinning, batch_size, grad_accum, chain_batch, num_probes)
    shared_settings = {
        "num_chains": num_chains,
        "num_draws": num_draws,
        "num_burnin": num_burnin,
        "thinning": thinning,
        "batch_size": batch_size,
        "grad_accum": grad_accum,
    }

    def chunks() -> Iterator[list[Lane]]:
        rest = itertools.chain([first], (settled(lane, template)[0] for lane in lanes))
        while chunk := list(itertools.islice(rest, lane_batch)):
            yield chunk

    def run() -> Iterator[tuple[Lane, LLCEstimate]]:
        key, placed_data, placed_mask = parallel.place(
            (rng_key, None if stream else data, mask), mesh
        )

        def dispatch(chunk: list[Lane]):
            # The last chunk repeats its last lane: same shapes, no second compilation.
            full = chunk + chunk[-1:] * (width - len(chunk))
            numbers = [(lane.sampler, lane.nbeta, lane.localization) for lane in full]
            varying = (
                np.asarray([lane.step for lane in full], np.uint32),
                jax.tree.map(
                    lambda *x: np.stack([np.asarray(a) for a in x]), *[lane.params for lane in full]
                ),
                jax.tree.map(lambda *x: np.asarray(x, np.float32), *numbers),
            )
            steps, stacked, (sampler, nbeta, localization) = parallel.place(
                varying, mesh, parallel.CHECKPOINT
            )
            return sample(
                key, steps, stacked, placed_data, sampler, nbeta, localization, placed_mask,
                loss_fn=loss_fn,
                stream=stream,
                plan=plan,
                num_chains=columns * chain_batch * -(-share // chain_batch),
                mesh=mesh,
                parts_fn=parts_fn,
                collect=collect,
            )  # fmt: skip

        def finish(chunk: list[Lane], output):
            init_losses, trace = parallel.fetch(output)
            for row, lane in enumerate(chunk):
                one = jax.tree.map(lambda x, row=row: x[row, :num_chains], trace)
                settings = {
                    "sampler": type(lane.sampler).__name__,
                    **{name: float(value) for name, value in lane.sampler._asdict().items()},
                    "nbeta": float(lane.nbeta),
                    "localization": float(lane.localization),
                    **shared_settings,
                }
                estimate = summarize(one, init_losses[row], float(lane.nbeta), plan, settings)
                yield lane._replace(step=int(lane.step)), estimate

        # One chunk is always in flight while the one before it is fetched. A checkpoint that cannot
        # be read must not take the finished one before it along.
        pending, source = None, chunks()
        while True:
            try:
                chunk = next(source, None)
            except Exception:
                if pending is not None:
                    yield from finish(*pending)
                raise
            output = None if chunk is None else dispatch(chunk)
            if pending is not None:
                yield from finish(*pending)
            if chunk is None:
                return
            pending = chunk, output

    return run()
