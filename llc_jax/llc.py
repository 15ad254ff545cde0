"""The local learning coefficient: λ̂ = nbeta (E[L(w)] - L(w*)) over the localized posterior."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llc_jax import checks, parallel
from llc_jax.estimate import LLCEstimate, summarize
from llc_jax.posterior import default_nbeta
from llc_jax.sampling import Plan, sample
from llc_jax.types import Batch, LossFn, Params, Sampler, Stream


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
      num_probes: draws at which the Metropolis acceptance is measured (one gradient each).
      mask: pytree of 0/1 like params; only weights with 1 are sampled.
      collect: `collect(params, batch)`, recorded at every draw; static, keep it small.
      mesh: devices, axes (checkpoint, chain); default all devices (`parallel.make_mesh`).

    Returns:
      An iterator of (step, LLCEstimate), in the order given.

    Raises:
      ValueError: on bad input, before anything compiles.
    """
    checks.typed_key(rng_key)
    stream = data if isinstance(data, Stream) else None
    n = None if stream else checks.data_length(data)
    if nbeta is None:
        if n is None:
            raise ValueError("nbeta=None has no default for a Stream (it has no n): give nbeta.")
        nbeta = default_nbeta(n)
    checks.at_least("num_chains", num_chains, 1)
    checks.at_least("num_draws", num_draws, 1, "burn-in alone estimates nothing")
    checks.at_least("num_burnin", num_burnin, 0)
    checks.at_least("thinning", thinning, 1)
    checks.at_least("grad_accum", grad_accum, 1)
    checks.at_least("checkpoint_batch", checkpoint_batch, 1)
    checks.at_least("num_probes", num_probes, 0)
    if chain_batch is not None:
        checks.at_least("chain_batch", chain_batch, 1)
    checks.nonnegative("nbeta", nbeta)
    checks.nonnegative("localization", localization)
    checks.hyperparameters(sampler)
    if stream:
        if batch_size is not None:
            raise ValueError(
                f"batch_size={batch_size} with a Stream: its batch_fn fixes the batch size; leave"
                " batch_size out."
            )
        batch_size = checks.stream_batch_size(stream)
    batch_size = checks.batch_size(batch_size, n, grad_accum)

    mesh = mesh or parallel.make_mesh(checkpoint_batch, num_chains)
    rows, columns = (mesh.shape[axis] for axis in (parallel.CHECKPOINT, parallel.CHAIN))
    width = rows * -(-checkpoint_batch // rows)
    share = -(-num_chains // columns)
    chain_batch = min(chain_batch or share, share)
    plan = Plan(num_draws, num_burnin, thinning, batch_size, grad_accum, chain_batch, num_probes)
    settings = {
        "sampler": type(sampler).__name__,
        **{name: float(v) for name, v in sampler._asdict().items()},
        "nbeta": float(nbeta),
        "localization": float(localization),
        "num_chains": num_chains,
        "num_draws": num_draws,
        "num_burnin": num_burnin,
        "thinning": thinning,
        "batch_size": batch_size,
        "grad_accum": grad_accum,
    }

    pairs = iter(checkpoints.items() if isinstance(checkpoints, Mapping) else checkpoints)
    first = next(pairs, None)
    if first is None:
        raise ValueError("checkpoints is empty: give at least one (step, params).")
    template = checks.params(first[1], first[0])
    checks.precision(first[1], sampler)
    mask = checks.mask(mask, template)
    example = jax.eval_shape(stream.batch_fn, rng_key) if stream else checks.rows(data, batch_size)
    checks.losses(loss_fn, template, example, batch_size)

    def checked(pair):
        checks.params(pair[1], pair[0], template)
        return pair

    def chunks():
        rest = itertools.chain([first], map(checked, pairs))
        while chunk := list(itertools.islice(rest, checkpoint_batch)):
            yield chunk

    def run() -> Iterator[tuple[int, LLCEstimate]]:
        as_float = functools.partial(np.asarray, dtype=np.float32)
        shared = parallel.place(
            (rng_key, None if stream else data, jax.tree.map(as_float, sampler),
             as_float(nbeta), as_float(localization), mask),
            mesh,
        )  # fmt: skip
        key, rows_of_data, traced_sampler, traced_nbeta, traced_localization, placed_mask = shared

        def dispatch(chunk):
            # The last chunk repeats its last checkpoint: same shapes, no second compilation.
            full = chunk + chunk[-1:] * (width - len(chunk))
            steps = np.asarray([s for s, _ in full], np.uint32)
            stacked = jax.tree.map(
                lambda *x: np.stack([np.asarray(a) for a in x]), *[p for _, p in full]
            )
            return sample(
                key,
                parallel.place(steps, mesh, parallel.CHECKPOINT),
                parallel.place(stacked, mesh, parallel.CHECKPOINT),
                rows_of_data,
                traced_sampler,
                traced_nbeta,
                traced_localization,
                placed_mask,
                loss_fn=loss_fn,
                stream=stream,
                plan=plan,
                num_chains=columns * chain_batch * -(-share // chain_batch),
                mesh=mesh,
                collect=collect,
            )

        def finish(chunk, output):
            init_losses, trace = parallel.fetch(output)
            for row, (step, _) in enumerate(chunk):
                one = jax.tree.map(lambda x, row=row: x[row, :num_chains], trace)
                yield int(step), summarize(one, init_losses[row], float(nbeta), plan, settings)

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
