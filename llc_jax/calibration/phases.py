"""The phases of a calibration, each a function of what the one before it found.

Symbols as in `llc_jax.calibration.pilot`.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from llc_jax.calibration.choice import SampledGrid
from llc_jax.calibration.grid import Choice, Grid
from llc_jax.calibration.incurable import refuse_incurable
from llc_jax.calibration.pilot import DIVERGED, MeasuredStiffness, Pilot, stiffness_of
from llc_jax.calibration.requests import without
from llc_jax.calibration.result import Lengths, lengths
from llc_jax.calibration.walls import any_dead
from llc_jax.llc.estimators import estimate_llc_over_checkpoints
from llc_jax.samplers import base


class Pull(NamedTuple):
    """The weakest localization of the grid.

    Attributes:
      localization: γ.
      ladder: Λ under pulls of several strengths, at one nbeta.
    """

    localization: float
    ladder: MeasuredStiffness


def weakest_pull(
    rng_key: jax.Array,
    pilot: Pilot,
    at_anchor: float,
    nbeta: float,
    num_params: int,
    localization: float | None,
) -> Pull:
    """Finds the weakest localization that relaxes within the burn-in, or takes the one given.

    Args:
      rng_key: consumed.
      pilot: the problem.
      at_anchor: the largest eigenvalue of nbeta H there.
      nbeta: scalar.
      num_params: d.
      localization: None, or γ.
    """
    if localization is not None:
        gamma = np.full(1, float(localization))
        return Pull(localization, MeasuredStiffness(gamma, at_anchor + gamma, np.full(1, True), 0))
    ladder = pilot.measure_ladder(rng_key, nbeta, at_anchor, num_params)
    return Pull(pilot.weakest_localization(ladder), ladder)


def stiffness_of_cells(
    rng_key: jax.Array, grid: Grid, at_anchor: float, nbeta: float, ladder: MeasuredStiffness
) -> MeasuredStiffness:
    """Measures Λ along pilot chains at each nbeta and localization of a grid, [B * G].

    Args:
      rng_key: consumed.
      grid: the grid.
      at_anchor: the largest eigenvalue of nbeta H there.
      nbeta: at which that and the ladder were measured.
      ladder: gives the first guess.
    """
    nbetas, gammas = grid.cells()
    curvature = np.maximum(ladder.stiffness - ladder.localizations, 1e-3 * ladder.localizations)
    curvature = np.interp(np.log(gammas), np.log(ladder.localizations), np.log(curvature))
    guess = np.exp(curvature) * nbetas / nbeta + gammas
    least = at_anchor * nbetas / nbeta + gammas
    return grid.pilot.measure_stiffness(rng_key, nbetas, gammas, guess, least, to_the_end=True)


class Worst(NamedTuple):
    """The largest curvature over all checkpoints.

    Attributes:
      stiffness: Λ.
      step: training step where it was met, None for the anchor's chains.
      num_steps: steps of a chain that it took.
    """

    stiffness: float
    step: int | None
    num_steps: int


def stiffness_elsewhere(rng_key: jax.Array, grid: Grid, choice: Choice, checkpoints: Any) -> Worst:
    """Measures Λ along pilot chains at other checkpoints, at the setting that was chosen.

    Args:
      rng_key: consumed.
      grid: the grid.
      choice: of its settings.
      checkpoints: pairs (step, params), or None.
    """
    worst, pilot = Worst(choice.stiffness, None, 0), grid.pilot
    if checkpoints is None:
        return worst
    fraction, nbeta, localization = grid.setting(choice.cell)
    step_size = fraction / choice.stiffness
    estimates = estimate_llc_over_checkpoints(
        rng_key, pilot.loss_fn, checkpoints, pilot.data, nbeta=nbeta, localization=localization,
        sampler=base.with_step_size(pilot.sampler, step_size, localization),
        num_draws=pilot.num_burnin, num_burnin=0,
        **{**without(pilot.options, "setting_batch", "step"), "num_probes": 1},
    )  # fmt: skip
    for step, found in estimates:
        worst = worst._replace(num_steps=worst.num_steps + pilot.num_burnin)
        refuse_incurable([found], f" at step {step:,}")
        there = float(stiffness_of([found], step_size, choice.stiffness)[0])
        if any_dead([found])[0]:
            there = max(there, DIVERGED * choice.stiffness)
        if there > worst.stiffness:
            worst = worst._replace(stiffness=there, step=step)
    return worst


class Advice(NamedTuple):
    """What to run.

    Attributes:
      settings: keyword arguments for `estimate_llc`.
      relaxation: steps in which a direction without curvature forgets its start.
      lengths: how long chains are, and why.
    """

    settings: dict[str, Any]
    relaxation: float
    lengths: Lengths


def advise(
    grid: Grid, sampled: SampledGrid, choice: Choice, stiffness: float, relative_stderr: float
) -> Advice:
    """Turns a choice into arguments.

    Args:
      grid: the grid.
      sampled: what it gave.
      choice: of its settings.
      stiffness: Λ that sets the step size.
      relative_stderr: to be reached, relative to λ̂.
    """
    fraction, nbeta, localization = grid.setting(choice.cell)
    like = grid.pilot.sampler
    sampler = base.with_step_size(like, fraction / stiffness, localization)
    sampler = type(like)(*map(float, sampler))
    relaxation = float(base.relaxation_steps(sampler, localization))
    # Finer steps mix more slowly than those of the grid did.
    of_grid = base.with_step_size(like, float(sampled.step_sizes[choice.cell]), localization)
    slower = relaxation / float(base.relaxation_steps(of_grid, localization))
    best: Any = sampled.estimates[choice.cell]
    run_for = lengths(best, relaxation, slower, relative_stderr)
    settings = {
        "sampler": sampler,
        "nbeta": nbeta,
        "localization": localization,
        "num_chains": grid.pilot.options["num_chains"],
        "num_draws": run_for.num_draws,
        "num_burnin": run_for.num_burnin,
        "thinning": run_for.thinning,
        **without(grid.pilot.options, "setting_batch", "num_chains"),
    }
    return Advice(settings, relaxation, run_for)
