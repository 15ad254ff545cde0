"""The local learning coefficient: λ̂ = nbeta (E[L(w)] - L(w*)) over the localized posterior."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llc_jax import checks, diagnostics, parallel
from llc_jax.posterior import default_nbeta
from llc_jax.sampling import Plan, Trace, sample
from llc_jax.types import Batch, LossFn, Params, Sampler, Stream


@dataclasses.dataclass(frozen=True)
class LLCEstimate:
    """Estimate at one checkpoint, its chains and how far to trust them. C chains, D draws.

    Means are over the finite chains. All arrays are numpy; [C, D] means [chain, draw].

    Attributes:
      mean: λ̂; nan if every chain diverged.
      stderr: Monte-Carlo standard error of `mean`. Each draw is compared with the anchor on the
        same minibatch, so the error of the initial loss is part of it.
      per_chain: [C] λ̂ of each chain, nan for a diverged one.
      losses: [C, D] minibatch losses after burn-in.
      anchor_losses: [C, D] losses of the anchor on the same minibatches.
      burnin_losses: [C, B] minibatch losses of the burn-in.
      init_loss: loss of the anchor: over the whole data set, or for a stream over all batches.
      distance: [C, D] Euclidean distance from the anchor, over the sampled coordinates.
      rhat: split R-hat of the paired losses.
      ess: their effective sample size.
      acceptance: [C] mean Metropolis acceptance of the steps; nan if the sampler has none.
      below_anchor: share of draws whose loss is below that of the anchor.
      drift: second half of the draws minus first, in standard errors.
      distance_growth: relative growth of the squared distance between the halves, 0 if not
        significant.
      num_finite: chains without a non-finite value.
      diverged_at: [C] recorded draw, burn-in counted, of the first non-finite value; -1 if none.
      settings: name -> value of every hyperparameter of the run.
      collected: what `collect` returned, leading axes [C, burn-in + D]; None without it.
    """

    mean: float
    stderr: float
    per_chain: np.ndarray
    losses: np.ndarray
    anchor_losses: np.ndarray
    burnin_losses: np.ndarray
    init_loss: float
    distance: np.ndarray
    rhat: float
    ess: float
    acceptance: np.ndarray
    below_anchor: float
    drift: float
    distance_growth: float
    num_finite: int
    diverged_at: np.ndarray
    settings: Mapping[str, float | int | str]
    collected: Any = None

    @functools.cached_property
    def findings(self) -> list[tuple[str, str]]:
        """Pairs (label, sentence) for everything that is wrong; empty if nothing is."""
        finite = self.diverged_at < 0
        return diagnostics.findings(
            mean=self.mean,
            stderr=self.stderr,
            num_chains=len(self.per_chain),
            diverged_at=self.diverged_at,
            below_anchor=self.below_anchor,
            acceptance=float(np.mean(self.acceptance[finite])) if finite.any() else math.nan,
            diagnostics=diagnostics.Diagnostics(
                self.stderr, self.rhat, self.ess, self.drift, self.distance_growth
            ),
        )

    @property
    def warnings(self) -> list[str]:
        """One sentence with numbers and remedy for each finding."""
        return [sentence for _, sentence in self.findings]

    @property
    def verdict(self) -> str:
        """`ok`, or the labels of the findings."""
        return "; ".join(label for label, _ in self.findings) or "ok"

    def summary(self) -> str:
        """Returns a table of the estimate, its diagnostics, its settings and the verdict."""
        acceptance = np.mean(self.acceptance[self.diverged_at < 0]) if self.num_finite else math.nan
        rows = {
            "llc": f"{self.mean:.4g} ± {self.stderr:.2g}",
            "init loss": f"{self.init_loss:.6g}",
            "split R-hat": f"{self.rhat:.3f}",
            "effective draws": f"{self.ess:.0f}",
            "finite chains": f"{self.num_finite} of {len(self.per_chain)}",
            "acceptance": f"{acceptance:.3f}",
            "draws below anchor": f"{self.below_anchor:.1%}",
            **{
                name: f"{v:.6g}" if isinstance(v, float) else v for name, v in self.settings.items()
            },
            "verdict": self.verdict,
        }
        width = max(map(len, rows))
        lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
        return "\n".join(lines + [f"! {w}" for w in self.warnings])

    def __repr__(self) -> str:
        return (
            f"LLCEstimate({self.mean:.4g} ± {self.stderr:.2g}, R-hat {self.rhat:.3f},"
            f" ESS {self.ess:.0f}, {self.verdict})"
        )

    def _repr_html_(self) -> str:
        import html

        return f"<pre>{html.escape(self.summary())}</pre>"

    def plot(self):
        """Draws the loss traces, burn-in shaded; returns a matplotlib `Figure`."""
        from llc_jax import figures

        return figures.trace_figure(self)

    def to_xarray(self):
        """Returns an `xarray.Dataset` with dimensions chain, draw and burnin."""
        import xarray

        return xarray.Dataset(
            data_vars={
                "llc": self.mean,
                "stderr": self.stderr,
                "init_loss": self.init_loss,
                "rhat": self.rhat,
                "ess": self.ess,
                "below_anchor": self.below_anchor,
                "drift": self.drift,
                "distance_growth": self.distance_growth,
                "num_finite": self.num_finite,
                "verdict": self.verdict,
                "warnings": "\n".join(self.warnings),
                "per_chain": ("chain", self.per_chain),
                "acceptance": ("chain", self.acceptance),
                "diverged_at": ("chain", self.diverged_at),
                "losses": (("chain", "draw"), self.losses),
                "anchor_losses": (("chain", "draw"), self.anchor_losses),
                "distance": (("chain", "draw"), self.distance),
                "burnin_losses": (("chain", "burnin"), self.burnin_losses),
            },
            coords={
                "chain": np.arange(len(self.per_chain)),
                "draw": np.arange(self.losses.shape[1]),
            },
            attrs=dict(self.settings),
        )


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
    mask = checks.mask(mask, template)
    example = jax.eval_shape(stream.batch_fn, rng_key) if stream else checks.rows(data, batch_size)
    checks.losses(loss_fn, template, example, batch_size)

    def chunks():
        chunk = [first]
        for step, params in pairs:
            if len(chunk) == checkpoint_batch:
                yield chunk
                chunk = []
            checks.params(params, step, template)
            chunk.append((step, params))
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

        # One chunk is always in flight while the one before it is fetched.
        pending = None
        for chunk in chunks():
            output = dispatch(chunk)
            if pending is not None:
                yield from finish(*pending)
            pending = chunk, output
        yield from finish(*pending)

    return run()


def summarize(
    trace: Trace, init_loss: float, nbeta: float, plan: Plan, settings: Mapping[str, Any]
) -> LLCEstimate:
    """Turns the traces of one checkpoint into an estimate; float64 from here on.

    Args:
      trace: host arrays with leading axes [chain, burn-in + draw].
      init_loss: loss of the anchor over the whole data set, nan for a stream.
      nbeta: n times inverse temperature.
      plan: the sizes of the run.
      settings: stored in the estimate.
    """
    healthy = np.isfinite([trace.losses, trace.anchor_losses, trace.distance]).all(axis=0)
    diverged_at = np.where(healthy.all(axis=1), -1, np.argmin(healthy, axis=1))
    finite = diverged_at < 0
    after = slice(plan.num_burnin, None)
    losses, anchors = trace.losses[:, after], trace.anchor_losses[:, after]
    distance = trace.distance[:, after]
    with np.errstate(invalid="ignore"):  # inf - inf in a dead chain
        gaps = nbeta * (losses.astype(np.float64) - anchors.astype(np.float64))
        per_chain = np.where(finite, gaps.mean(axis=1), np.nan)
    diagnosis = diagnostics.diagnose(gaps[finite], distance[finite].astype(np.float64))
    log_ratio = trace.log_acceptance[:, list(plan.probe_draws())].astype(np.float64)
    acceptance = np.full(len(finite), np.nan)
    if log_ratio.size:
        acceptance[finite] = np.exp(np.minimum(log_ratio[finite], 0.0)).mean(axis=1)
    return LLCEstimate(
        mean=float(per_chain[finite].mean()) if finite.any() else math.nan,
        stderr=diagnosis.stderr,
        per_chain=per_chain,
        losses=losses,
        anchor_losses=anchors,
        burnin_losses=trace.losses[:, : plan.num_burnin],
        init_loss=float(init_loss if np.isfinite(init_loss) else anchors.mean(dtype=np.float64)),
        distance=distance,
        rhat=diagnosis.rhat,
        ess=diagnosis.ess,
        acceptance=acceptance,
        below_anchor=float((gaps[finite] < 0).mean()) if finite.any() else math.nan,
        drift=diagnosis.drift,
        distance_growth=diagnosis.distance_growth,
        num_finite=int(finite.sum()),
        diverged_at=diverged_at,
        settings=settings,
        collected=trace.collected,
    )
