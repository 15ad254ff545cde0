"""Pilot chains: the curvature that chains meet, and the weakest localization they can afford.

Symbols: ε = step_size, nβ = nbeta, γ = localization, Λ = the largest eigenvalue of nβ H + γ (with
a preconditioner: of G^½ (nβ H + γ) G^½), measured where chains are. Step sizes are counted in units
of 1/Λ: a fraction f = ε Λ is unstable above 4 and biases `SGLD` by about f/4 in the stiffest
direction. A relaxation time is the number of steps in which a direction without curvature forgets
its start.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax.diagnostics import MAX_STABILITY
from llc_jax.llc import estimate_llc_over_settings
from llc_jax.posterior import at_least_float32
from llc_jax.sweep import RELAXATIONS
from llc_jax.types import Batch, LossFn, Params, Sampler, Stream

ROOM = 1.25  # growth of Λ between rounds that counts as settled
MAX_ROUNDS = 5
GROWTH = 3.0  # of the curvature on the way from the anchor, for a first guess at γ
RUNGS = GROWTH ** np.arange(0, 4.5, 0.5)  # of the ladder of γ, in units of that guess
DECADES = 10.0 ** np.arange(-6, 1)  # the same, per weight, where the anchor has no curvature
MARGIN = 1.2  # of the burn-in, for what the ladder does not see
DIVERGED = 10.0  # times the Λ that was assumed is assumed next where all chains diverged
TINY = 1e-9  # step fraction that leaves a chain at its anchor


def relaxation_steps(sampler: Sampler, localization: Any) -> np.ndarray:
    """Steps τ in which a direction without curvature forgets its start.

    Its variance approaches 1/γ like exp(-t/τ): τ = 1 / (ε γ) for overdamped samplers; for those
    with a momentum and friction 2 sqrt(γ), critical damping, τ = 1 / sqrt(ε γ). A preconditioner
    above 1 makes it faster.

    Args:
      sampler: its kind and step size, scalar or array.
      localization: γ > 0, of the same shape.
    """
    rate = np.asarray(sampler.step_size, float) * localization
    return 1 / np.sqrt(rate) if hasattr(sampler, "friction") else 1 / rate


def weakest_localization(
    sampler: Sampler, stiffness: float, fraction: float, num_burnin: int
) -> float:
    """The smallest γ whose flat directions relax `RELAXATIONS` times within a burn-in.

    Args:
      sampler: its kind decides.
      stiffness: Λ.
      fraction: ε Λ.
      num_burnin: steps.
    """
    per_step = RELAXATIONS / num_burnin
    exponent = 2 if hasattr(sampler, "friction") else 1
    return stiffness / fraction * per_step**exponent


def fitted(sampler: Sampler, step_size: Any, localization: Any) -> Sampler:
    """`sampler` with this step size, and critical friction for flat directions if it has one.

    Args:
      sampler: gives the kind and the other hyperparameters.
      step_size: scalar or array.
      localization: of the same shape.
    """
    if hasattr(sampler, "friction"):
        return sampler._replace(step_size=step_size, friction=2 * np.sqrt(localization))
    return sampler._replace(step_size=step_size)


def stiffness_of(estimates: Any, step_sizes: Any, before: Any) -> np.ndarray:
    """Λ of each estimate: what its chains measured, `DIVERGED` times more where all diverged."""
    measured = np.asarray([np.fmax.reduce(e.stability) for e in estimates])
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(measured), measured / step_sizes, DIVERGED * np.asarray(before))


def all_finite(estimates: Any) -> np.ndarray:
    """Whether no chain of an estimate diverged."""
    return np.asarray([bool(np.isfinite(e.stability).all()) for e in estimates])


class Settled(NamedTuple):
    """Λ of K settings at the end of chains with the step size it demands.

    Attributes:
      localizations: [K] γ.
      stiffness: [K] Λ.
      settled: [K] whether the chains of the last round were stable, or found no more.
      num_steps: steps of single chains that it took.
    """

    localizations: np.ndarray
    stiffness: np.ndarray
    settled: np.ndarray
    num_steps: int


class Pilot(NamedTuple):
    """Runs pilot chains on one problem.

    Attributes:
      loss_fn: see `estimate_llc`.
      params: the anchor.
      data: see `estimate_llc`.
      sampler: its kind.
      fraction: ε Λ.
      num_burnin: steps of a chain.
      options: of `estimate_llc_over_settings`.
    """

    loss_fn: LossFn
    params: Params
    data: Batch | Stream
    sampler: Sampler
    fraction: float
    num_burnin: int
    options: Mapping[str, Any]

    def run(
        self, rng_key, params, nbetas, localizations, sampler, num_draws, **changes
    ) -> np.ndarray:
        """[K] estimates without burn-in."""
        options = {**self.options, "num_probes": 1, **changes}  # for the stability number
        return estimate_llc_over_settings(
            rng_key, self.loss_fn, params, self.data, sampler=sampler, nbeta=nbetas,
            localization=localizations, num_draws=num_draws, num_burnin=0, **options,
        )  # fmt: skip

    def at_anchor(self, rng_key: jax.Array, nbeta: float) -> float:
        """The largest eigenvalue of nβ H at the anchor."""
        still = fitted(self.sampler, np.full(1, TINY), np.ones(1))
        # Widened: half precision would round the tiny step away.
        params = jax.tree.map(lambda x: at_least_float32(jnp.asarray(x)), self.params)
        found = self.run(rng_key, params, np.full(1, nbeta), np.zeros(1), still, 1)
        return float(stiffness_of(found, still.step_size, np.full(1, np.nan))[0])

    def settle(self, rng_key, nbetas, localizations, stiffness, least, **changes) -> Settled:
        """Looks for the curvature that chains meet whose step size suits that curvature.

        Raised round by round until no chain finds more; a setting whose flat directions no longer
        relax within the chains is not worth another round. Unstable chains go where no chain
        should, and the curvature there is far too large: what they find makes the next round safe,
        but it does not count once stable chains, long enough to forget their start, have been.

        Args:
          rng_key: consumed.
          nbetas: [K].
          localizations: [K].
          stiffness: [K] first guess.
          least: [K] Λ at the anchor, where chains start: no less is returned.
          **changes: of the options.
        """
        trusted = np.asarray(least, float)
        for number in range(MAX_ROUNDS):
            steps = self.fraction / stiffness
            key = jax.random.fold_in(rng_key, number)
            sampler = fitted(self.sampler, steps, localizations)
            found = self.run(
                key, self.params, nbetas, localizations, sampler, self.num_burnin, **changes
            )
            measured = stiffness_of(found, steps, stiffness)
            settled = measured <= ROOM * stiffness
            sound = (measured * steps <= MAX_STABILITY) & all_finite(found)
            sound &= self.relaxations(stiffness, localizations) >= RELAXATIONS
            trusted = np.where(sound, np.maximum(trusted, measured), trusted)
            stiffness = np.where(sound, trusted, np.maximum(stiffness, measured))
            if (settled | (self.relaxations(stiffness, localizations) < RELAXATIONS)).all():
                break
        chains = changes.get("num_chains", self.options["num_chains"])
        spent = (number + 1) * stiffness.size * self.num_burnin * chains
        return Settled(localizations, stiffness, settled | sound, spent)

    def relaxations(self, stiffness, localizations) -> np.ndarray:
        """Length of the burn-in in relaxation times."""
        sampler = fitted(self.sampler, self.fraction / stiffness, localizations)
        return self.num_burnin / relaxation_steps(sampler, localizations)

    def ladder(self, rng_key, nbeta: float, at_anchor: float, num_weights: int) -> Settled:
        """Rungs of γ at one nbeta, by one chain each.

        The weaker the localization, the further chains go and the larger the curvature that they
        meet: how much larger differs from loss to loss, so it is measured. At an anchor without
        curvature, such as the origin of a deep linear network, nothing tells the scale of γ, and
        the rungs let chains go a distance of 1 to 1000.
        """
        lowest = weakest_localization(
            self.sampler, GROWTH * at_anchor, self.fraction, self.num_burnin
        )
        rungs = lowest * RUNGS if at_anchor > 0 else num_weights * DECADES
        nbetas = np.full(rungs.size, nbeta)
        least = at_anchor + rungs
        return self.settle(rng_key, nbetas, rungs, least, least, num_chains=1)

    def affordable(self, rungs: Settled) -> float:
        """The weakest γ that relaxes within the burn-in, between the rungs of a ladder."""
        # Where no step size was small enough next to nothing relaxes.
        gammas = rungs.localizations
        relaxed = np.where(rungs.settled, self.relaxations(rungs.stiffness, gammas), 1e-3)
        relaxed = np.maximum.accumulate(relaxed)
        wanted = MARGIN * RELAXATIONS
        return float(np.exp(np.interp(np.log(wanted), np.log(relaxed), np.log(gammas))))
