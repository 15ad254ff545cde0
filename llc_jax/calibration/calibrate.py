"""Settings for an estimate, with reasons: step size, temperature, localization, burn-in, draws.

Symbols as in `llc_jax.calibration.pilot`: ε, nβ, γ, and Λ, the largest curvature of the posterior.
"""

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import numpy as np

from llc_jax.ambient import undisturbed
from llc_jax.calibration import requests
from llc_jax.calibration.choice import chosen_row
from llc_jax.calibration.grid import REHEARSAL, Grid
from llc_jax.calibration.phases import advise, stiffness_elsewhere, stiffness_of_cells, weakest_pull
from llc_jax.calibration.pilot import Pilot
from llc_jax.calibration.result import Calibration
from llc_jax.inputs import checks
from llc_jax.inputs.masks import check_mask
from llc_jax.llc.estimators import GridOptions
from llc_jax.llc.lanes import default_nbeta_of
from llc_jax.trees import Layout
from llc_jax.types import Batch, LossFn, Params, Sampler, Stream


@undisturbed()
def calibrate(
    rng_key: jax.Array,
    loss_fn: LossFn,
    params: Params,
    data: Batch | Stream,
    *,
    nbeta: float | None = None,
    localization: float | None = None,
    sampler: Sampler | None = None,
    checkpoints: Any = None,
    step_fractions: Sequence[float] = (0.2, 0.4, 0.8),
    nbeta_factors: Sequence[float] = (1 / 3, 1.0, 3.0),
    localization_factors: Sequence[float] = (1.0, 3.0, 10.0),
    num_draws: int = 500,
    num_burnin: int = 500,
    num_chains: int = 4,
    relative_stderr: float = 0.02,
    report: Callable[[str], None] | None = None,
    **options: Unpack[GridOptions],
) -> Calibration:
    """Finds settings for `estimate_llc` at `params`, and says how far they decide the answer.

    1. Λ at the anchor by a few Lanczos steps, then at the end of pilot chains, again and again
       with the step size it demands until it settles: flat directions wander, and the curvature
       there differs from that at the anchor. How much larger it is depends on how far localization
       lets chains go, so the weakest localization that still relaxes is looked for with such
       chains, too.
    2. A grid of step sizes (`step_fractions` / Λ), nbeta and localization, all in one program,
       with a control at nbeta = 0, whose law is known.
    3. Where in (nbeta, localization) the estimate is level, and by how much it changes where not;
       longer chains with larger steps have to survive there.
    4. If `checkpoints` are given, Λ along pilot chains there too; the worst sets the step size.

    Args:
      rng_key: typed key; consumed.
      loss_fn: see `estimate_llc`.
      params: the anchor.
      data: see `estimate_llc`.
      nbeta: centre of the grid; default as in `estimate_llc`.
      localization: weakest of the grid; default the weakest that relaxes within `num_burnin`.
      sampler: gives the kind, its step size is not used; default `BAOAB` on the full batch, and
        `SGLD`, which minibatch noise heats less, otherwise.
      checkpoints: {step: params} or pairs, other anchors that share the settings; optional.
      step_fractions: f of the grid, at least one; the one nearest 0.4 is chosen.
      nbeta_factors: of `nbeta`.
      localization_factors: of `localization`.
      num_draws: draws of each chain of the grid.
      num_burnin: their burn-in, and the length of the pilot chains.
      num_chains: chains for each setting.
      relative_stderr: the standard error to be reached by the draws that are advised, relative to
        λ̂.
      report: called with a line of text after each of the steps above, such as `print`.
      **options: see `estimators.GridOptions`: batch_size, grad_accum, mask, setting_batch, ...; not
        masks, and not thinning and num_probes, which are chosen here.

    Returns:
      A `Calibration`; `estimate_llc(key, loss_fn, params, data, **calibration.settings)`.

    Raises:
      ValueError: on bad input, before anything compiles, and if no step size is stable.
    """
    checks.typed_key(rng_key)
    nbeta = default_nbeta_of(nbeta, data)
    requests.check_numbers(nbeta, localization, relative_stderr)
    requests.check_options(options)
    requests.check_sizes(
        num_chains, num_draws, num_burnin, step_fractions=step_fractions,
        nbeta_factors=nbeta_factors, localization_factors=localization_factors,
    )  # fmt: skip
    if report is not None and not callable(report):
        raise ValueError(
            f"report={checks.shown(report)}: give a function of one text, such as print, or None."
        )
    template = checks.params(params, options.get("step", 0))
    num_params = int(Layout.of(template).num_kept(check_mask(options.get("mask"), template)))
    if checkpoints is not None:
        checkpoints = requests.anchors(checkpoints, template)
    if sampler is None:
        sampler = requests.default_sampler(data, options.get("batch_size"))
    fractions = np.asarray(step_fractions, float)
    fraction = float(fractions[chosen_row(fractions)])
    given = {"num_chains": num_chains, **options}
    pilot = Pilot(loss_fn, params, data, sampler, fraction, num_burnin, given)
    requests.check_estimate(rng_key, pilot, nbeta)
    pilot_key, grid_key, elsewhere_key = jax.random.split(rng_key, 3)
    rehearsal_key = jax.random.fold_in(elsewhere_key, 0)
    anchor_key, ladder_key, cells_key = jax.random.split(pilot_key, 3)
    say = report or (lambda text: None)

    at_anchor = pilot.at_anchor(anchor_key, nbeta)
    say(f"at the anchor the largest eigenvalue of nbeta H is {at_anchor:.3g}")
    weakest = weakest_pull(ladder_key, pilot, at_anchor, nbeta, num_params, localization)
    if localization is None:
        localization = weakest.localization
        say(f"the weakest localization that relaxes within the burn-in is {localization:.3g}")

    nbetas = nbeta * np.asarray(nbeta_factors, float)
    localizations = weakest.localization * np.asarray(localization_factors, float)
    grid = Grid(pilot, fractions, nbetas, localizations, num_draws)
    met = stiffness_of_cells(cells_key, grid, at_anchor, nbeta, weakest.ladder)
    low, high = met.stiffness.min(), met.stiffness.max()
    say(f"over the grid pilot chains meet a stiffness of {low:.3g} to {high:.3g}")
    sampled, num_sampled = grid.sample_alive(grid_key, met.stiffness.reshape(nbetas.size, -1))
    say(f"sampled {num_sampled} settings")

    choice, sampled = grid.choose(rehearsal_key, sampled, at_anchor / nbeta)
    worst = stiffness_elsewhere(elsewhere_key, grid, choice, checkpoints)
    advice = advise(grid, sampled, choice, worst.stiffness, relative_stderr)

    _, chosen_nbeta, pull = grid.setting(choice.cell)
    curvature = at_anchor * chosen_nbeta / nbeta
    return Calibration(
        settings=advice.settings,
        chosen=choice.cell,
        grid=sampled,
        stiffness_at_anchor=curvature + pull,
        stiffness=worst.stiffness,
        worst_step=worst.step,
        sensitivity=choice.sensitivity,
        relaxation=advice.relaxation,
        relative_stderr=advice.lengths.relative_stderr,
        num_params=num_params,
        num_steps=(weakest.ladder.num_steps + met.num_steps) // num_chains
        + (num_sampled + REHEARSAL * choice.num_rehearsals) * (num_burnin + num_draws)
        + worst.num_steps,
        warnings=choice.warnings
        + ([] if curvature > pull else [_without_curvature(pull)])
        + advice.lengths.warnings,
    )


def _without_curvature(localization: float) -> str:
    return (
        "The curvature at the anchor is nothing beside the localization: λ̂ is decided by what lies"
        f" within about 1/sqrt(localization) = {localization**-0.5:.2g} of it, and mostly lower"
        " than the coefficient, which it approaches slowly as nbeta grows. For more of it, give a"
        " larger nbeta, or a smaller localization with a longer num_burnin."
    )
