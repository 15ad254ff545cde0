"""Pilot chains: the curvature that chains meet, and the weakest localization they can afford.

Symbols: ε = step_size, nβ = nbeta, γ = localization, Λ = the largest eigenvalue of nβ H + γ (with
a preconditioner: of G^½ (nβ H + γ) G^½), measured where chains are. Step sizes are counted in units
of 1/Λ: a fraction f = ε Λ is unstable above 4 and biases `SGLD` by about f/4 in the stiffest
direction. A relaxation time is the number of steps in which a direction without curvature forgets
its start.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax.calibration.choice import RELAXATIONS
from llc_jax.calibration.incurable import refuse_flat, refuse_incurable
from llc_jax.calibration.walls import any_dead, curvature_by_gradients, spread
from llc_jax.diagnostics import MAX_STABILITY
from llc_jax.inputs import checks
from llc_jax.inputs.masks import check_mask
from llc_jax.llc.estimators import estimate_llc_over_settings
from llc_jax.samplers import base
from llc_jax.trees import Layout, at_least_float32
from llc_jax.types import Batch, LossFn, Params, Sampler, Stream

ROOM = 1.25  # growth of Λ between rounds that counts as converged
MAX_ROUNDS = 5
MOST_ROUNDS = 12  # while chains die
GROWTH = 3.0  # of the curvature on the way from the anchor, for a first guess at γ
LADDER = GROWTH ** np.arange(0, 4.5, 0.5)  # the γ tried, in units of that guess
FARTHEST = 1e-6  # γ at which each weight goes a distance of 1000
DECADES = 10.0 ** np.arange(9)  # of a ladder whose lowest rung is a guess
MAX_LADDERS = 4
VARIES = 2.0  # ratio of curvatures above which ends of chains do not tell how steep walls get
MARGIN = 1.2  # of the burn-in, for what the ladder does not see
DIVERGED = 10.0  # times the Λ that was assumed is assumed next where chains diverged
TINY = 1e-9  # step fraction that leaves a chain at its anchor
LARGE = 100.0  # weights above it round a step of that size away
PROBES = 2  # draws at which the gradient is looked at: the anchor, and half way


def guess_localization(
    sampler: Sampler, stiffness: float, fraction: float, num_burnin: int
) -> float:
    """The smallest γ whose flat directions relax `RELAXATIONS` times within a burn-in.

    Relaxation times depend on ε γ, by a power that the sampler says: 1, or with momentum 1/2.

    Args:
      sampler: its kind decides.
      stiffness: Λ.
      fraction: ε Λ.
      num_burnin: steps.
    """
    per_step = RELAXATIONS / num_burnin
    unit, quarter = (
        float(base.relaxation_steps(base.with_step_size(sampler, 1.0, gamma), gamma))
        for gamma in (1.0, 0.25)
    )
    power = math.log2(quarter / unit) / 2
    return stiffness / fraction * (unit * per_step) ** (1 / power)


def stiffness_of(estimates: Any, step_sizes: Any, before: Any) -> np.ndarray:
    """Λ of each estimate: what its chains measured, `DIVERGED` times more where all diverged."""
    measured = np.asarray([np.fmax.reduce(e.stability) for e in estimates])
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(measured), measured / step_sizes, DIVERGED * np.asarray(before))


def all_finite(estimates: Any) -> np.ndarray:
    """Whether no chain of an estimate diverged."""
    return np.asarray([bool(np.isfinite(e.stability).all()) for e in estimates])


class MeasuredStiffness(NamedTuple):
    """Λ of K settings at the end of chains with the step size it demands.

    Attributes:
      localizations: [K] γ.
      stiffness: [K] Λ.
      converged: [K] whether the chains of the last round were stable, or found no more.
      num_steps: steps of single chains that it took.
    """

    localizations: np.ndarray
    stiffness: np.ndarray
    converged: np.ndarray
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
        options = {**self.options, "num_probes": PROBES, **changes}  # and the stability number
        found = estimate_llc_over_settings(
            rng_key, self.loss_fn, params, self.data, sampler=sampler, nbeta=nbetas,
            localization=localizations, num_draws=num_draws, num_burnin=0, **options,
        )  # fmt: skip
        refuse_incurable(found)
        return found

    def at_anchor(self, rng_key: jax.Array, nbeta: float) -> float:
        """The largest eigenvalue of nβ H at the anchor.

        Raises:
          ValueError: if it, the loss or its gradient is not finite.
        """
        # Widened: half precision would round the tiny step away.
        params = jax.tree.map(lambda x: at_least_float32(jnp.asarray(x)), self.params)
        largest = max(float(jnp.max(jnp.abs(x), initial=0)) for x in jax.tree.leaves(params))
        step = TINY * max(1.0, largest / LARGE) ** 2
        still = base.with_step_size(self.sampler, np.full(1, step), np.ones(1))
        found = self.run(rng_key, params, np.full(1, nbeta), np.zeros(1), still, 1)
        if (found[0].diverged_at >= 0).all():
            raise ValueError(
                "the loss at params is not finite: use another checkpoint, or look for missing"
                " values and labels out of range in the data."
            )
        at_anchor = float(stiffness_of(found, still.step_size, np.full(1, np.nan))[0])
        if not math.isfinite(at_anchor):
            raise ValueError(
                "the Hessian at params is not finite: use another checkpoint, or make the loss"
                " differentiable there (a root or a norm of 0, a division behind jnp.where)."
            )
        return at_anchor

    def measure_stiffness(
        self, rng_key, nbetas, localizations, stiffness, least, to_the_end=False, **changes
    ) -> MeasuredStiffness:
        """Looks for the curvature that chains meet whose step size suits that curvature.

        Raised round by round until no chain finds more; a setting whose flat directions no longer
        relax within the chains is not worth another round. Unstable chains go where no chain
        should, and the curvature there is far too large: what they find makes the next round safe,
        but it does not count once stable chains, long enough to forget their start, have been.
        That chains died does count: walls can be steep where no chain happens to end.

        Args:
          rng_key: consumed.
          nbetas: [K].
          localizations: [K].
          stiffness: [K] first guess.
          least: [K] Λ at the anchor, where chains start: no less is returned.
          to_the_end: whether to go on where chains die, however short they get.
          **changes: of the options.
        """
        trusted = np.asarray(least, float)
        for number in range(MOST_ROUNDS):
            steps = self.fraction / stiffness
            key = jax.random.fold_in(rng_key, number)
            sampler = base.with_step_size(self.sampler, steps, localizations)
            found = self.run(
                key, self.params, nbetas, localizations, sampler, self.num_burnin, **changes
            )
            if number == 0:
                refuse_flat(found, localizations)
            dead = any_dead(found)
            measured = stiffness_of(found, steps, stiffness)
            measured = np.where(dead, np.maximum(measured, DIVERGED * stiffness), measured)
            kinked = self.curvature_by_gradients(found, nbetas)
            measured = np.where(kinked > DIVERGED * measured, kinked, measured)
            converged = measured <= ROOM * stiffness
            sound = (measured * steps <= MAX_STABILITY) & all_finite(found)
            sound &= self.relaxations(stiffness, localizations) >= RELAXATIONS
            # Half way, on a logarithmic scale, between steps that killed and the next ones.
            refuted = np.where(dead, math.sqrt(DIVERGED) * stiffness, 0.0)
            trusted = np.maximum(trusted, np.where(sound, measured, refuted))
            wild = np.asarray([spread(e.stability) > VARIES for e in found])
            lower = np.maximum(trusted, np.where(wild, stiffness / math.sqrt(DIVERGED), 0.0))
            stiffness = np.where(sound, lower, np.maximum(stiffness, measured))
            hopeless = self.relaxations(stiffness, localizations) < RELAXATIONS
            dying = dead & (to_the_end | ~hopeless)
            if (converged | hopeless & ~dying).all() or (
                number + 1 >= MAX_ROUNDS and not dying.any()
            ):
                break
        chains = changes.get("num_chains", self.options["num_chains"])
        spent = (number + 1) * stiffness.size * self.num_burnin * chains
        return MeasuredStiffness(localizations, stiffness, converged | sound, spent)

    def curvature_by_gradients(self, estimates: Any, nbetas: np.ndarray) -> np.ndarray:
        """[K] as in `walls`; 0 for minibatches, whose noise is in their gradients."""
        size = self.options.get("batch_size")
        if isinstance(self.data, Stream) or size not in (None, checks.data_length(self.data)):
            return np.zeros(len(estimates))
        mask = check_mask(self.options.get("mask"), self.params)
        return curvature_by_gradients(estimates, nbetas, int(Layout.of(self.params).num_kept(mask)))

    def relaxations(self, stiffness, localizations) -> np.ndarray:
        """Length of the burn-in in relaxation times."""
        sampler = base.with_step_size(self.sampler, self.fraction / stiffness, localizations)
        return self.num_burnin / base.relaxation_steps(sampler, localizations)

    def measure_ladder(
        self, rng_key, nbeta: float, at_anchor: float, num_weights: int
    ) -> MeasuredStiffness:
        """Rungs of γ at one nbeta, up to one that the burn-in affords.

        The weaker the localization, the further chains go and the larger the curvature that they
        meet: how much larger differs from loss to loss, so it is measured. Where the curvature at
        the anchor is none, or nothing beside what lies around it, as at the origin of a deep linear
        network, it does not tell the scale of γ, and the rungs are decades.
        """
        near = guess_localization(self.sampler, GROWTH * at_anchor, self.fraction, self.num_burnin)
        lowest, spent = num_weights * FARTHEST, 0
        if near > FARTHEST:
            gammas = near * LADDER
            least = at_anchor + gammas
            nbetas = np.full(gammas.size, nbeta)
            ladder = self.measure_stiffness(rng_key, nbetas, gammas, least, least, num_chains=1)
            if self.reached(ladder):
                return ladder
            lowest, spent = gammas[-1], ladder.num_steps
        for number in range(MAX_LADDERS):
            gammas = lowest * DECADES
            least = at_anchor + gammas
            key = jax.random.fold_in(rng_key, MOST_ROUNDS + number)
            ladder = self.measure_stiffness(key, np.full(gammas.size, nbeta), gammas, least, least)
            # No less than under a stronger pull: chains may have ended where it happens to be flat.
            met = np.maximum.accumulate((ladder.stiffness - gammas)[::-1])[::-1]
            spent += ladder.num_steps
            ladder = ladder._replace(stiffness=met + gammas, num_steps=spent)
            if self.reached(ladder):
                break
            lowest = gammas[-1]
        return ladder

    def reached(self, ladder: MeasuredStiffness) -> bool:
        """Whether the last rung of a ladder relaxes within the burn-in."""
        last = self.relaxations(ladder.stiffness, ladder.localizations)[-1]
        return bool(ladder.converged[-1] and last >= MARGIN * RELAXATIONS)

    def weakest_localization(self, ladder: MeasuredStiffness) -> float:
        """The weakest γ that relaxes within the burn-in, between the rungs of a ladder."""
        # Where no step size was small enough next to nothing relaxes.
        gammas = ladder.localizations
        relaxed = np.where(ladder.converged, self.relaxations(ladder.stiffness, gammas), 1e-3)
        relaxed = np.maximum.accumulate(relaxed)
        wanted = MARGIN * RELAXATIONS
        return float(np.exp(np.interp(np.log(wanted), np.log(relaxed), np.log(gammas))))
