"""The grid of settings that a calibration samples, and the rehearsal of what it chooses.

Symbols as in `llc_jax.calibration.pilot`.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from llc_jax.calibration.choice import RELAXATIONS, SampledGrid, Sensitivity, chosen_row, plateau
from llc_jax.calibration.incurable import refuse_incurable
from llc_jax.calibration.pilot import VARIES, Pilot, stiffness_of
from llc_jax.calibration.walls import any_dead, spread
from llc_jax.llc.estimators import estimate_llc_over_settings
from llc_jax.samplers import SGLD, base

MAX_GRIDS = 4  # while chains die
MAX_REHEARSALS = 10
STRESS = 4.0  # times the proposed step size must be survived,
WILD = 16.0  # or so many times where ends of chains differ by as much in curvature,
LIMIT = 1.6  # but for ε Λ above this, which kills where nothing is wrong: quadratics end at 4
REHEARSAL = 10  # lengths of a grid


class Choice(NamedTuple):
    """What to run.

    Attributes:
      cell: index [E, B, G].
      stiffness: Λ to be assumed there.
      sensitivity: how the estimate depends on the choice.
      warnings: one sentence each.
      num_rehearsals: that it took.
    """

    cell: tuple[int, int, int]
    stiffness: float
    sensitivity: Sensitivity
    warnings: list[str]
    num_rehearsals: int


def stiffest_of(sampled: SampledGrid, cell: tuple[int, int, int]) -> float:
    """Λ of a setting: the largest that pilots or its own chains met."""
    before, step_size = sampled.stiffness[cell[1:]], sampled.step_sizes[cell]
    found = stiffness_of([sampled.estimates[cell]], step_size, before)
    return max(float(before), float(found[0]))


def _steep(factor: float) -> list[str]:
    if factor < STRESS:
        return []
    return [
        f"The walls around the anchor are steeper than where chains mostly are: the step size is"
        f" {factor:.2g} times smaller than the curvature there asks for, so that longer chains with"
        " larger steps survived a rehearsal. Should one die all the same, raise localization."
    ]


class Grid(NamedTuple):
    """What is tried, with one Λ for each nbeta and localization.

    Attributes:
      pilot: the problem.
      fractions: [E] ε Λ.
      nbetas: [B].
      localizations: [G].
      num_draws: draws of a chain after the burn-in, which is that of the pilot.
    """

    pilot: Pilot
    fractions: np.ndarray
    nbetas: np.ndarray
    localizations: np.ndarray
    num_draws: int

    def cells(self) -> np.ndarray:
        """[2, B * G] nbeta and localization of each cell."""
        return np.array(np.meshgrid(self.nbetas, self.localizations, indexing="ij")).reshape(2, -1)

    def setting(self, cell: tuple[int, int, int]) -> tuple[float, float, float]:
        """ε Λ, nbeta and localization of one cell."""
        axes = self.fractions, self.nbetas, self.localizations
        fraction, nbeta, localization = (float(x[i]) for x, i in zip(axes, cell, strict=True))
        return fraction, nbeta, localization

    def run(self, rng_key, sampler, nbetas, localizations, steps, **changes: Any) -> np.ndarray:
        """[K] estimates, all settings in one program."""
        pilot = self.pilot
        found = estimate_llc_over_settings(
            rng_key, pilot.loss_fn, pilot.params, pilot.data,
            sampler=base.with_step_size(sampler, steps, localizations), nbeta=nbetas,
            localization=localizations, num_draws=self.num_draws, num_burnin=pilot.num_burnin,
            **{**pilot.options, **changes},
        )  # fmt: skip
        refuse_incurable(found)
        return found

    def sample(self, rng_key: jax.Array, stiffness: np.ndarray) -> SampledGrid:
        """Samples the grid, and the control at nbeta = 0, whose law is known.

        Args:
          rng_key: consumed.
          stiffness: [B, G] Λ.
        """
        sampler, row = self.pilot.sampler, chosen_row(self.fractions)
        shape = (self.fractions.size, *stiffness.shape)
        steps = self.fractions[:, None, None] / stiffness
        tried = *np.tile(self.cells(), self.fractions.size), steps.ravel()
        free = np.zeros_like(self.localizations)
        control = free, self.localizations, self.fractions[row] / self.localizations
        lawful = sampler if base.stationary_variance(sampler, 1.0) is not None else SGLD(1.0)
        if lawful is not sampler:
            both = self.run(rng_key, sampler, *tried), self.run(rng_key, lawful, *control)
            estimates = np.concatenate(both)
        else:  # one program for both
            both = zip(tried, control, strict=True)
            estimates = self.run(rng_key, sampler, *(np.concatenate(x) for x in both))
        size = steps.size
        return SampledGrid(
            step_fractions=self.fractions,
            nbetas=self.nbetas,
            localizations=self.localizations,
            step_sizes=steps,
            stiffness=stiffness,
            relaxations=self.relaxations(steps),
            estimates=estimates[:size].reshape(shape),
            control=estimates[size:],
            control_variances=np.asarray(
                base.stationary_variance(
                    base.with_step_size(lawful, control[2], self.localizations), self.localizations
                )
            ),
        )

    def relaxations(self, step_sizes: np.ndarray) -> np.ndarray:
        """[..., G] length of the burn-in in relaxation times, for step sizes of that shape."""
        gammas = np.broadcast_to(self.localizations, step_sizes.shape)
        tuned = base.with_step_size(self.pilot.sampler, step_sizes, gammas)
        return self.pilot.num_burnin / base.relaxation_steps(tuned, gammas)

    def sample_alive(self, rng_key: jax.Array, stiffness: np.ndarray) -> tuple[SampledGrid, int]:
        """Samples, again with smaller steps where chains died, if those relax or all died.

        Returns:
          (the last `SampledGrid`, settings sampled on the way).
        """
        row, spent = chosen_row(self.fractions), 0
        for _ in range(MAX_GRIDS):
            sampled = self.sample(rng_key, stiffness)
            spent += sampled.estimates.size + sampled.control.size
            dead = any_dead(sampled.estimates[row].ravel()).reshape(stiffness.shape)
            stiffer = np.where(dead, STRESS * stiffness, stiffness)
            relaxed = self.relaxations(self.fractions[row] / stiffer) >= RELAXATIONS
            if not (dead & (relaxed | dead.all())).any():
                break
            stiffness = stiffer
        return sampled, spent

    def stiffened(
        self, sampled: SampledGrid, chosen: tuple[int, int, int], stiffness: float
    ) -> SampledGrid:
        """`sampled` with another Λ for one setting, and with what that leaves of its burn-in."""
        demanded = sampled.stiffness.copy()
        demanded[chosen[1:]] = stiffness
        left = self.relaxations(self.fractions[:, None, None] / demanded)
        return sampled._replace(stiffness=demanded, relaxations=left)

    def choose(
        self, rng_key: jax.Array, sampled: SampledGrid, at_anchor: float
    ) -> tuple[Choice, SampledGrid]:
        """Chooses a setting; a smaller step or another setting where long chains do not survive.

        Args:
          rng_key: consumed.
          sampled: the grid.
          at_anchor: the largest eigenvalue of H there.

        Returns:
          (`Choice`, the `SampledGrid` with what rehearsals demand).

        Raises:
          ValueError: if no step size was small enough.
        """
        for number in range(MAX_REHEARSALS):
            cell, found, warnings = plateau(sampled)
            fraction, nbeta, gamma = self.setting(cell)
            met = stiffest_of(sampled, cell)
            stress = self.stress(sampled, cell, at_anchor * nbeta + gamma)
            if stress == 0:
                return Choice(cell, met, found, warnings, number), sampled
            step_size = max(fraction, min(stress * fraction, LIMIT)) / met
            if self.survives(jax.random.fold_in(rng_key, number), nbeta, gamma, step_size):
                safe = max(met, fraction * stress / step_size) if stress > STRESS else met
                warnings += _steep(safe * sampled.step_sizes[cell] / fraction)
                return Choice(cell, safe, found, warnings, number + 1), sampled
            sampled = self.stiffened(sampled, cell, STRESS * met)
        raise ValueError(
            f"long chains died in {MAX_REHEARSALS} rehearsals, the last with localization"
            f" {gamma:.3g} and step size {step_size:.2g}: the loss rises too steeply around the"
            f" anchor. Give a larger localization, such as {10 * self.localizations[-1]:.2g}, or a"
            " larger num_burnin, which affords smaller steps."
        )

    def stress(self, sampled: SampledGrid, cell: tuple[int, int, int], at_anchor: float) -> float:
        """How many times the step size long chains must survive; 0 if curvature is all the same.

        Args:
          sampled: the grid.
          cell: index [E, B, G].
          at_anchor: Λ there.
        """
        column, steps = sampled.estimates[:, *cell[1:]], sampled.step_sizes[:, *cell[1:]]
        met = np.concatenate([e.stability / step for e, step in zip(column, steps, strict=True)])
        pilots = sampled.stiffness[cell[1:]]
        if not any_dead(column).any() and spread(met, at_anchor, pilots) <= VARIES:
            return 0.0
        return WILD if spread(met, pilots) > WILD else STRESS

    def survives(self, rng_key: jax.Array, nbeta: float, localization: float, step_size) -> bool:
        """Whether long chains at one setting with larger steps than proposed all stay finite.

        How often chains meet walls steep enough to kill falls fast with the step size.

        Args:
          rng_key: consumed.
          nbeta: scalar.
          localization: scalar.
          step_size: that of the rehearsal.
        """
        one: list[Any] = [np.full(1, float(x)) for x in (nbeta, localization, step_size)]
        dropped = {"parts_fn": None, "collect": None, "observables": None}
        found = self.run(
            rng_key, self.pilot.sampler, *one, thinning=REHEARSAL, num_probes=0, **dropped
        )
        return not any_dead(found)[0]
