"""What an estimate is: the value, its error, its chains and how far to trust it."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llc_jax import diagnostics
from llc_jax.llc import soundness
from llc_jax.llc.soundness import Anchor, Soundness
from llc_jax.recorder import Observed, observed
from llc_jax.sampling.chain import Plan, Trace
from llc_jax.sampling.stability import largest_eigenvalue


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
      anchor_losses: [C, D] losses of the anchor on the same minibatches, float64: the difference
        keeps the digits that it has example by example. λ̂ is nbeta times its mean.
      burnin_losses: [C, B] minibatch losses of the burn-in.
      init_loss: loss of the anchor: over the whole data set, or for a stream over the batches of
        the draws.
      distance: [C, D] Euclidean distance from the anchor, over the sampled coordinates.
      rhat: split R-hat of the paired losses.
      ess: their effective sample size.
      acceptance: [C] mean Metropolis acceptance of the steps; nan if the sampler has none.
      stability: [C] stability number at the end of each chain: the largest eigenvalue of
        ε G^½ (nbeta H + localization) G^½, unstable above 4; nan if not probed.
      below_anchor: share of draws whose loss is below that of the anchor.
      drift: second half of the draws minus first, in standard errors.
      distance_growth: relative growth of the squared distance between the halves, 0 if not
        significant.
      num_finite: chains without a non-finite value.
      diverged_at: [C] recorded draw, burn-in counted, of the first non-finite value; -1 if none.
      settings: name -> value of every hyperparameter of the run.
      sound: what speaks for and against loss, gradient, data and weights, see
        `soundness.Soundness`.
      observed: {name: `observables.Observed`} of every observable but the loss itself.
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
    stability: np.ndarray
    below_anchor: float
    drift: float
    distance_growth: float
    num_finite: int
    diverged_at: np.ndarray
    settings: Mapping[str, float | int | str]
    sound: Soundness
    observed: Mapping[str, Observed] = dataclasses.field(default_factory=dict)

    @property
    def observables(self) -> dict[str, Any]:
        """{name: what was recorded}, numpy arrays [C, draw or block, ...], without burn-in."""
        return {name: x.values for name, x in self.observed.items() if x.values is not None}

    @property
    def summaries(self) -> dict[str, Any]:
        """{name: its summary}, such as `observables.Estimated` (value, stderr) [...]."""
        return {name: x.summary for name, x in self.observed.items() if x.summary is not None}

    @property
    def parts(self) -> np.ndarray | None:
        """[K] λ̂ of each part of the loss; None without `parts_fn`."""
        return getattr(self.summaries.get("parts"), "value", None)

    @property
    def parts_stderr(self) -> np.ndarray | None:
        """[K] their Monte-Carlo standard errors; nan for one that never varies."""
        return getattr(self.summaries.get("parts"), "stderr", None)

    @property
    def collected(self) -> Any:
        """What `collect` returned, leading axes [C, burn-in + D]; None without it."""
        return self.observables.get("collected")

    @property
    def worst_stability(self) -> float:
        """Largest stability number of the finite chains; inf if one has lost its last state."""
        found = self.stability[self.diverged_at < 0]
        if np.isnan(found).all():  # not probed, or no chain is left
            return math.nan
        return math.inf if np.isnan(found).any() else float(found.max())

    @functools.cached_property
    def findings(self) -> list[tuple[str, str]]:
        """Pairs (label, sentence) for everything that is wrong; empty if nothing is."""
        finite = self.diverged_at < 0
        return soundness.findings(self.sound, self.mean, self.stderr) + diagnostics.findings(
            mean=self.mean,
            stderr=self.stderr,
            num_chains=len(self.per_chain),
            diverged_at=self.diverged_at,
            below_anchor=self.below_anchor,
            acceptance=float(np.mean(self.acceptance[finite])) if finite.any() else math.nan,
            stability=self.worst_stability,
            diagnostics=diagnostics.Diagnostics(
                self.stderr, self.rhat, self.ess, self.drift, self.distance_growth
            ),
            explained=self.sound.explains_death,
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
            "stability number": f"{self.worst_stability:.3g}",
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
        from llc_jax.figures import chains

        return chains.trace_figure(self)

    def to_xarray(self):
        """Returns an `xarray.Dataset`, see `llc.dataset.to_dataset`."""
        from llc_jax.llc import dataset

        return dataset.to_dataset(self)


def summarize(
    trace: Trace,
    anchor: Anchor,
    observables: Mapping[str, Any],
    plan: Plan,
    settings: Mapping[str, Any],
    heating: float,
    shared: tuple[str, ...],
) -> LLCEstimate:
    """Turns the traces of one checkpoint into an estimate; float64 from here on.

    Args:
      trace: host arrays with leading axes [chain, ...].
      anchor: what the losses at the anchor say.
      observables: those of the trace.
      plan: the sizes of the run.
      settings: stored in the estimate; nbeta is one of them.
      heating: see `Soundness`.
      shared: see `Soundness`.
    """
    nbeta, loss = settings["nbeta"], trace.observed["loss_gap"]
    probe: Any = trace.probe
    healthy = np.all([np.isfinite(x) for x in (loss.loss, loss.gap, loss.distance)], axis=0)
    diverged_at = np.where(healthy.all(axis=1), -1, np.argmin(healthy, axis=1))
    finite = diverged_at < 0
    after = slice(plan.num_burnin, None)
    losses, distance = loss.loss[:, after], loss.distance[:, after]
    with np.errstate(invalid="ignore"):  # inf - inf in a dead chain
        gaps = nbeta * loss.gap[:, after].astype(np.float64)
        anchors = losses.astype(np.float64) - loss.gap[:, after]
        per_chain = np.where(finite, gaps.mean(axis=1), np.nan)
    diagnosis = diagnostics.diagnose(gaps[finite], distance[finite].astype(np.float64))
    acceptance = np.full(len(finite), np.nan)
    probes = list(plan.probe_draws())
    if probes and probe.log_acceptance is not None:
        log_ratio = probe.log_acceptance[:, probes].astype(np.float64)
        acceptance[finite] = np.exp(np.minimum(log_ratio[finite], 0.0)).mean(axis=1)
    mean_of_batches = float(loss.anchor_loss[:, after].mean(dtype=np.float64))
    wanted = plan.num_probes > 0 and "step_size" in settings
    looked_at = sorted({0, *probes}) if probes else []
    agreement = soundness.agreement(
        probe.change[finite][:, probes], probe.predicted[finite][:, probes]
    )
    coarse = probe.heating[finite][:, probes]
    stability = np.full(len(finite), np.nan)
    if trace.stability is not None:
        stability[finite] = largest_eigenvalue(trace.stability)[finite]
    found = {
        name: observed(observables[name], recorded, finite, nbeta, plan.num_burnin)
        for name, recorded in trace.observed.items()
        if name != "loss_gap"
    }
    return LLCEstimate(
        mean=float(per_chain[finite].mean()) if finite.any() else math.nan,
        stderr=diagnosis.stderr,
        per_chain=per_chain,
        losses=losses,
        anchor_losses=anchors,
        burnin_losses=loss.loss[:, : plan.num_burnin],
        init_loss=anchor.init_loss if anchor.num_examples else mean_of_batches,
        distance=distance,
        rhat=diagnosis.rhat,
        ess=diagnosis.ess,
        acceptance=acceptance,
        stability=stability,
        below_anchor=float((gaps[finite] < 0).mean()) if finite.any() else math.nan,
        drift=diagnosis.drift,
        distance_growth=diagnosis.distance_growth,
        num_finite=int(finite.sum()),
        diverged_at=diverged_at,
        settings=settings,
        sound=Soundness(
            nbeta=nbeta,
            anchor=anchor,
            agreement=agreement,
            gradient=probe.gradient[:, looked_at],
            heating=max(heating, float(np.median(coarse)) if coarse.size else 0.0),
            second_derivatives=trace.stability is not None or not wanted,
            shared=shared,
        ),
        observed=found,
    )
