"""Settings for an estimate, with reasons: step size, temperature, localization, burn-in, draws.

Symbols as in `llc_jax.calibration.pilot`: ε, nβ, γ, and Λ, the largest curvature of the posterior.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from llc_jax.ambient import undisturbed
from llc_jax.calibration.grid import REHEARSAL, Grid
from llc_jax.calibration.incurable import refuse_incurable
from llc_jax.calibration.pilot import DIVERGED, Pilot, Settled, stiffness_of
from llc_jax.calibration.result import Calibration, lengths
from llc_jax.calibration.sweep import proposed_row
from llc_jax.calibration.walls import any_dead
from llc_jax.inputs import checks
from llc_jax.llc.estimators import estimate_llc_over_checkpoints
from llc_jax.llc.lanes import default_nbeta_of
from llc_jax.samplers import BAOAB, SGLD, base
from llc_jax.trees import Layout
from llc_jax.types import Batch, LossFn, Params, Sampler, Stream

MOST_RECORDED = 10**8  # draws of all settings: 3 GB of traces


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
    **options: Any,
) -> Calibration:
    """Proposes settings for `estimate_llc` at `params`, and says how far they decide the answer.

    1. Λ at the anchor by a few Lanczos steps, then at the end of pilot chains, again and again
       with the step size it demands until it settles: flat directions wander, and the curvature
       they meet is another one than the anchor's. How much larger depends on how far localization
       lets them go, so its weakest affordable value is looked for with such chains, too.
    2. A grid of step sizes (`step_fractions` / Λ), nbeta and localization, all in one program,
       with a control at nbeta = 0, whose law is known.
    3. Where in (nbeta, localization) the estimate is level, and by how much it changes where not.
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
      step_fractions: f of the grid, at least one; the proposal takes the one nearest 0.4.
      nbeta_factors: of `nbeta`.
      localization_factors: of `localization`.
      num_draws: draws of each chain of the grid.
      num_burnin: their burn-in, and the length of the pilot chains.
      num_chains: chains for each setting.
      relative_stderr: the standard error to be reached by the proposed draws, relative to λ̂.
      report: called with a line of text after each of the steps above, such as `print`.
      **options: of `estimate_llc_over_settings`: batch_size, grad_accum, mask, setting_batch, ...;
        not thinning and num_probes, which are chosen here.

    Returns:
      A `Calibration`; `estimate_llc(key, loss_fn, params, data, **calibration.settings)`.

    Raises:
      ValueError: on bad input, before anything compiles, and if no step size is stable.
    """
    checks.typed_key(rng_key)
    nbeta = default_nbeta_of(nbeta, data)
    for name, value in (("nbeta", nbeta), ("relative_stderr", relative_stderr)):
        checks.nonnegative(name, value)
        if not value > 0:
            raise ValueError(f"{name}={value!r}: calibration needs a number above 0.")
    checks.at_least("num_draws", num_draws, 1)
    checks.at_least("num_burnin", num_burnin, 1)
    for name in {"thinning", "num_probes"} & options.keys():
        raise ValueError(f"{name}={options[name]!r}: calibrate chooses it; leave it out.")
    checks.at_least("num_chains", num_chains, 1)
    _check_factors(step_fractions=step_fractions, nbeta_factors=nbeta_factors,
                   localization_factors=localization_factors)  # fmt: skip
    settings = len(step_fractions) * len(nbeta_factors) * len(localization_factors)
    recorded = settings * num_chains * (num_draws + num_burnin)
    if recorded > MOST_RECORDED:
        raise ValueError(
            f"{settings:,} settings x {num_chains:,} chains x {num_draws + num_burnin:,} draws:"
            f" calibrate would record {recorded:.2g} draws, and holds at most {MOST_RECORDED:.0e};"
            " give fewer factors, chains, num_draws or num_burnin."
        )
    if report is not None and not callable(report):
        raise ValueError(
            f"report={checks.shown(report)}: give a function of one text, such as print, or None."
        )
    template = checks.params(params, options.get("step", 0))
    checkpoints = _checked(checkpoints, template)
    mask = checks.mask(options.get("mask"), template)
    num_weights = int(Layout.of(template).num_kept(mask))
    if localization is not None:
        checks.nonnegative("localization", localization)
        if not localization > 0:
            raise ValueError(
                f"localization={localization!r}: without a pull towards the anchor flat directions"
                " never relax; give a number above 0, or None."
            )
    if sampler is None:
        sampler = _default_sampler(data, options.get("batch_size"))
    base.check_instance(sampler)
    # The checks of an estimate, of which nothing is run.
    estimate_llc_over_checkpoints(
        rng_key, loss_fn, [(options.get("step", 0), params)], data,
        sampler=base.with_step_size(sampler, 1.0, 1.0), nbeta=nbeta, localization=0.0,
        num_chains=num_chains, **_without(options, "setting_batch", "step"),
    )  # fmt: skip
    pilot_key, sweep_key, elsewhere_key = jax.random.split(rng_key, 3)
    rehearsal_key = jax.random.fold_in(elsewhere_key, 0)
    chains = {"num_chains": num_chains, **options}
    say = report or (lambda text: None)

    # 1. At the anchor, down a ladder of localizations, and at the cells of the grid.
    fractions = np.asarray(step_fractions, float)
    fraction = float(fractions[proposed_row(fractions)])
    pilot = Pilot(loss_fn, params, data, sampler, fraction, num_burnin, chains)
    anchor_key, ladder_key, cells_key = jax.random.split(pilot_key, 3)
    at_anchor = pilot.at_anchor(anchor_key, nbeta)
    say(f"at the anchor the largest eigenvalue of nbeta H is {at_anchor:.3g}")
    if localization is None:
        rungs = pilot.ladder(ladder_key, nbeta, at_anchor, num_weights)
        localization = pilot.affordable(rungs)
        say(f"the weakest localization that relaxes within the burn-in is {localization:.3g}")
    else:
        gamma = np.full(1, float(localization))
        rungs = Settled(gamma, at_anchor + gamma, np.full(1, True), 0)
    nbetas = nbeta * np.asarray(nbeta_factors, float)
    localizations = localization * np.asarray(localization_factors, float)
    cells = np.array(np.meshgrid(nbetas, localizations, indexing="ij")).reshape(2, -1)
    curvature = np.maximum(rungs.stiffness - rungs.localizations, 1e-3 * rungs.localizations)
    curvature = np.interp(np.log(cells[1]), np.log(rungs.localizations), np.log(curvature))
    guess = np.exp(curvature) * cells[0] / nbeta + cells[1]
    least = at_anchor * cells[0] / nbeta + cells[1]
    met = pilot.settle(cells_key, *cells, guess, least, to_the_end=True)
    low, high = met.stiffness.min(), met.stiffness.max()
    say(f"over the grid pilot chains meet a stiffness of {low:.3g} to {high:.3g}")

    # 2. The grid.
    grid = Grid(pilot, fractions, nbetas, localizations, num_draws)
    sweep, sampled = grid.sample_alive(sweep_key, met.stiffness.reshape(nbetas.size, -1))
    say(f"sampled {sampled} settings")

    # 3. The plateau, and what to run there.
    choice, sweep = grid.rehearsed(rehearsal_key, sweep, at_anchor / nbeta)
    chosen = choice.cell
    centre, nbeta, localization = nbeta, float(nbetas[chosen[1]]), float(localizations[chosen[2]])
    best: Any = sweep.estimates[chosen]
    stiffest = choice.stiffness

    # 4. Elsewhere.
    bare = [] if at_anchor * nbeta / centre > localization else [_without_curvature(localization)]
    worst_step, known_stiffest, pilots = None, stiffest, 0
    if checkpoints is not None:
        near = base.with_step_size(sampler, float(fractions[chosen[0]]) / stiffest, localization)
        elsewhere = estimate_llc_over_checkpoints(
            elsewhere_key, loss_fn, checkpoints, data, sampler=near, nbeta=nbeta,
            localization=localization, num_draws=num_burnin, num_burnin=0,
            **{**_without(chains, "setting_batch", "step"), "num_probes": 1},
        )  # fmt: skip
        for step, found_there in elsewhere:
            pilots += num_burnin
            refuse_incurable([found_there], f" at step {step:,}")
            there = float(stiffness_of([found_there], near.step_size, known_stiffest)[0])
            if any_dead([found_there])[0]:
                there = max(there, DIVERGED * known_stiffest)
            if there > stiffest:
                stiffest, worst_step = there, step

    step_size = float(fractions[chosen[0]]) / stiffest
    proposal = base.with_step_size(sampler, step_size, localization)
    proposal = type(sampler)(*map(float, proposal))
    relaxation = float(base.relaxation_steps(proposal, localization))
    # Finer steps mix more slowly than those of the grid did.
    of_grid = base.with_step_size(sampler, float(sweep.step_sizes[chosen]), localization)
    slower = relaxation / float(base.relaxation_steps(of_grid, localization))
    run_for = lengths(best, relaxation, slower, relative_stderr)
    return Calibration(
        settings={
            "sampler": proposal,
            "nbeta": nbeta,
            "localization": localization,
            "num_chains": num_chains,
            "num_draws": run_for.num_draws,
            "num_burnin": run_for.num_burnin,
            "thinning": run_for.thinning,
            **_without(chains, "setting_batch", "num_chains"),
        },
        chosen=chosen,
        sweep=sweep,
        stiffness_at_anchor=at_anchor * nbeta / centre + localization,
        stiffness=stiffest,
        worst_step=worst_step,
        sensitivity=choice.sensitivity,
        relaxation=relaxation,
        relative_stderr=run_for.relative_stderr,
        num_params=num_weights,
        num_steps=(rungs.num_steps + met.num_steps) // num_chains
        + (sampled + REHEARSAL * choice.num_rehearsals) * (num_burnin + num_draws)
        + pilots,
        warnings=choice.warnings + bare + run_for.warnings,
    )


def _checked(checkpoints: Any, template: Params) -> Iterator[tuple[int, Params]] | None:
    """The pairs (step, params), each checked against the shapes of the anchor, the first now."""
    if checkpoints is None:
        return None

    def check(pair):
        checks.params(pair[1], pair[0], template)
        return pair

    pairs = map(check, checks.pairs(checkpoints))
    first = next(pairs, None)
    if first is None:
        raise ValueError("checkpoints is empty: give at least one (step, params), or None.")
    return itertools.chain([first], pairs)


def _without_curvature(localization: float) -> str:
    return (
        "The curvature at the anchor is nothing beside the localization: λ̂ is decided by what lies"
        f" within about 1/sqrt(localization) = {localization**-0.5:.2g} of it, and mostly lower"
        " than the coefficient, which it approaches slowly as nbeta grows. For more of it, give a"
        " larger nbeta, or a smaller localization with a longer num_burnin."
    )


def _default_sampler(data: Batch | Stream, batch_size: int | None) -> Sampler:
    if isinstance(data, Stream):
        return SGLD(1.0)
    full = batch_size is None or checks.number(batch_size) == checks.data_length(data)
    return BAOAB(1.0, 1.0) if full else SGLD(1.0)


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def _check_factors(**factors: Sequence[float]) -> None:
    for name, values in factors.items():
        [array] = checks.grid({name: values})
        above = array.ndim == 1 and array.size and (array > 0).all() and np.isfinite(array).all()
        if not above or (np.diff(array) <= 0).any():
            raise ValueError(
                f"{name}={checks.shown(values)}: give finite numbers above 0 in increasing order."
            )
