"""Calibration: known curvature, known plateaus, planted traps."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llc_jax
from experiments.benchmarks.compile_once import compilations
from llc_jax import (
    BAOAB,
    SGLD,
    RMSPropSGLD,
    calibrate,
    estimate_llc_over_settings,
    extrapolate_step_size,
)
from llc_jax.calibration.choice import (
    LEVEL,
    RELAXATIONS,
    STEP_FRACTION,
    SampledGrid,
    control_score,
    faults,
    plateau,
    sensitivity,
)
from llc_jax.calibration.pilot import (
    GROWTH,
    MARGIN,
    MeasuredStiffness,
    Pilot,
    all_finite,
    guess_localization,
    stiffness_of,
)
from llc_jax.calibration.result import lengths
from llc_jax.samplers import base

ROWS, DIM = 4, 40


def quadratic(params, batch):
    """½ Σ h w²: the curvatures are data."""
    return 0.5 * jnp.sum(batch * params["w"][None] ** 2, axis=-1)


def wandering(params, batch):
    """½ u² (1 + 4 mean v²), summed over u: curvature 1 at the anchor, more where v has gone."""
    return batch * 0.5 * jnp.sum(params["u"] ** 2) * (1 + 4 * jnp.mean(params["v"] ** 2))


def curvatures(h):
    return np.broadcast_to(np.asarray(h, np.float32), (ROWS, DIM))


ORIGIN = {"w": np.zeros(DIM, np.float32)}
GAP = np.where(np.arange(DIM) < DIM // 2, np.linspace(0.5, 2.0, DIM), 0.0)
NO_GAP = np.logspace(-6, 0, DIM)
SIZES = {"num_draws": 400, "num_burnin": 300}


@pytest.fixture(scope="module")
def with_gap():
    return calibrate(jax.random.key(0), quadratic, ORIGIN, curvatures(GAP), nbeta=300.0, **SIZES)


@pytest.fixture(scope="module")
def without_gap():
    # Many draws: slopes are differences, small beside the values.
    sizes = {"num_draws": 2000, "num_burnin": 300, "num_chains": 32}
    return calibrate(jax.random.key(0), quadratic, ORIGIN, curvatures(NO_GAP), nbeta=300.0, **sizes)


@pytest.mark.parametrize("sampler", [SGLD(0.01), BAOAB(0.01, 1.0)], ids=["SGLD", "BAOAB"])
def test_a_flat_direction_is_equilibrated_after_three_relaxation_times(sampler):
    # The exact covariance recursion of one direction with curvature γ only, started at rest.
    localization = 0.25
    sampler = base.with_step_size(sampler, 0.01, localization)
    steps = round(RELAXATIONS * float(base.relaxation_steps(sampler, localization)))
    h = math.sqrt(0.01)
    if isinstance(sampler, SGLD):
        move, noise = np.array([[1 - 0.005 * localization]]), np.array([[0.01]])
    else:
        kick = np.array([[1, 0], [-h * localization, 1]])
        drift = np.array([[1, h / 2], [0, 1]])
        c = math.exp(-float(sampler.friction) * h)
        move = drift @ np.diag([1, c]) @ drift @ kick
        noise = drift @ np.diag([0, 1 - c**2]) @ drift.T
    covariance = np.zeros_like(move)
    history = []
    for _ in range(steps):
        covariance = move @ covariance @ move.T + noise
        history.append(covariance[0, 0] * localization)
    assert 0.9 < history[-1] < 1.01
    assert history[steps // 6] < 0.6  # and not long before


@pytest.mark.parametrize("sampler", [SGLD(1.0), BAOAB(1.0, 1.0)], ids=["SGLD", "BAOAB"])
def test_the_weakest_localization_just_relaxes(sampler):
    gamma = guess_localization(sampler, 5000.0, STEP_FRACTION, 700)
    tuned = base.with_step_size(sampler, STEP_FRACTION / 5000.0, gamma)
    assert 700 / base.relaxation_steps(tuned, gamma) == pytest.approx(RELAXATIONS, rel=1e-6)


def test_between_the_rungs_of_a_ladder_by_hand():
    # 1000 steps of sqrt(0.4 γ / Λ) relaxation times each, with Λ = 1e6 / γ: 0.632 γ of them.
    pilot = Pilot(quadratic, ORIGIN, None, BAOAB(1.0, 1.0), 0.4, 1000, {})
    rungs = np.array([1.0, 10.0, 100.0])

    def weakest(stiffness, converged=(True, True, True)):
        return pilot.weakest_localization(
            MeasuredStiffness(rungs, stiffness, np.array(converged), 0)
        )

    assert weakest(1e6 / rungs) == pytest.approx(MARGIN * 3 / math.sqrt(0.4))
    # Out of reach either way: the end of the ladder.
    assert weakest(1e12 / rungs) == pytest.approx(100.0)
    assert weakest(1.0 / rungs) == pytest.approx(1.0)
    # Rungs on which no step size was small enough do not count, however relaxed they look.
    assert 10 < weakest(1.0 / rungs, converged=(False, False, True)) < 100


@pytest.mark.slow
def test_the_weakest_localization_is_that_whose_own_curvature_the_burn_in_affords():
    # Mean v² is near 1/γ, so Λ near nbeta (1 + 4/γ): the weaker γ, the stiffer it gets.
    params = {"u": np.zeros(4, np.float32), "v": np.zeros(64, np.float32)}
    found = calibrate(
        jax.random.key(0), wandering, params, np.ones(2, np.float32), nbeta=100.0,
        nbeta_factors=(1.0,), localization_factors=(1.0, 3.0), step_fractions=(0.4,), **SIZES,
    )  # fmt: skip
    gamma = found.grid.localizations[0]
    assert found.grid.stiffness[0, 0] == pytest.approx(100 * (1 + 4 / gamma), rel=0.5)
    assert found.grid.stiffness[0, 0] > 3 * GROWTH * found.stiffness_at_anchor
    assert RELAXATIONS <= found.grid.relaxations[0, 0, 0] < 2 * RELAXATIONS


def test_curvature_at_the_anchor_and_step_size(with_gap):
    nbeta, gamma = with_gap.settings["nbeta"], with_gap.settings["localization"]
    stiffest = nbeta * GAP.max() + gamma
    assert with_gap.stiffness_at_anchor == pytest.approx(stiffest, rel=0.01)
    # A quadratic has the same curvature everywhere.
    assert with_gap.stiffness == pytest.approx(stiffest, rel=0.01)
    step_size = float(with_gap.settings["sampler"].step_size)
    assert step_size == pytest.approx(STEP_FRACTION / stiffest, rel=0.01)
    assert with_gap.settings["sampler"].friction == pytest.approx(2 * math.sqrt(gamma))


def test_a_plateau_is_found_and_its_value_is_right(with_gap):
    level = with_gap.sensitivity.level
    assert level.any()
    assert level[with_gap.chosen[1:]]
    assert not any("depends" in warning for warning in with_gap.warnings)
    estimate = llc_jax.estimate_llc(
        jax.random.key(1), quadratic, ORIGIN, curvatures(GAP), **with_gap.settings
    )
    nbeta, gamma = with_gap.settings["nbeta"], with_gap.settings["localization"]
    exact = np.sum(nbeta * GAP / (nbeta * GAP + gamma)) / 2
    assert estimate.verdict == "ok"
    assert abs(estimate.mean - exact) < 4 * estimate.stderr
    assert estimate.stderr < 0.05 * exact


def test_a_spectrum_without_gap_has_no_plateau_and_says_so(without_gap):
    # Eigenvalues at all scales: each e-fold of nbeta/γ brings DIM / log(1e6) / 2 more.
    assert not without_gap.sensitivity.level.any()
    assert any("depends on nbeta" in warning for warning in without_gap.warnings)
    assert any("depends on localization" in warning for warning in without_gap.warnings)


def test_sensitivities_are_the_exact_logarithmic_derivatives(without_gap):
    sampled = without_gap.grid

    def exact(nbeta, gamma):
        return np.sum(nbeta * NO_GAP / (nbeta * NO_GAP + gamma)) / 2

    values = np.array([[exact(b, g) for g in sampled.localizations] for b in sampled.nbetas])
    slope = np.gradient(values, np.log(sampled.nbetas), axis=0) / values
    stderr = sampled.values("stderr")[without_gap.chosen[0]] / values
    tolerance = 4 * math.sqrt(2) * stderr.max() / math.log(sampled.nbetas[1] / sampled.nbetas[0])
    np.testing.assert_allclose(without_gap.sensitivity.nbeta, slope, atol=tolerance)
    assert tolerance < 0.5 * slope.max()


def test_the_control_follows_its_law(with_gap):
    for column in range(3):
        squared, exact, z = control_score(with_gap.grid, column, DIM)
        assert exact == pytest.approx(DIM / with_gap.grid.localizations[column])
        assert abs(z) < 4
        assert with_gap.grid.control[column].mean == 0.0  # nbeta = 0
        assert squared != exact


def test_the_report_in_words_names_numbers(with_gap):
    text = with_gap.summary()
    for word in ("step_size", "nbeta", "localization", "burn-in", "Control at nbeta = 0"):
        assert word in text
    assert f"{with_gap.stiffness:.3g}" in text
    assert "Calibration(" in repr(with_gap)
    assert "<pre>" in with_gap._repr_html_()


@pytest.mark.slow
def test_curvature_is_taken_where_the_chains_are_not_at_the_anchor():
    params = {"u": np.zeros(4, np.float32), "v": np.zeros(8, np.float32)}
    said = []
    found = calibrate(
        jax.random.key(0), wandering, params, np.ones(2, np.float32), nbeta=100.0,
        localization=0.5, nbeta_factors=(1.0,), localization_factors=(1.0,),
        step_fractions=(0.4,), report=said.append, **SIZES,
    )  # fmt: skip
    anchor, met, sampled = said
    assert anchor.endswith("is 100")
    assert f"{found.grid.stiffness[0, 0]:.3g}" in met
    assert sampled == "sampled 2 settings"  # the control is one
    assert found.stiffness_at_anchor == pytest.approx(100.5, rel=0.01)
    # v is free up to the pull: mean v² near 1/γ = 2, curvature near 1 + 4 · 2.
    assert 4 < found.stiffness / found.stiffness_at_anchor < 30
    assert found.grid.estimates[0, 0, 0].stability.max() < 1.5
    assert any("Only one nbeta" in warning for warning in found.warnings)


@pytest.mark.slow
def test_the_worst_checkpoint_sets_the_step_size():
    stiff = {"scale": np.float32(5.0), "w": np.zeros(DIM, np.float32)}
    soft = {"scale": np.float32(1.0), "w": np.zeros(DIM, np.float32)}
    mask = {"scale": 0, "w": 1}
    found = calibrate(
        jax.random.key(0), scaled, soft, curvatures(GAP), nbeta=300.0, mask=mask,
        localization=3.0, nbeta_factors=(1.0,), localization_factors=(1.0,),
        step_fractions=(0.4,), checkpoints={10: soft, 70: stiff}, **SIZES,
    )  # fmt: skip
    assert found.worst_step == 70
    assert found.num_params == DIM  # of those that are sampled
    assert abs(control_score(found.grid, 0, found.num_params)[2]) < 4
    assert found.stiffness == pytest.approx(5 * 300 * GAP.max() + 3, rel=0.02)
    assert "at step 70" in found.summary()


def scaled(params, batch):
    return 0.5 * params["scale"] * jnp.sum(batch * params["w"][None] ** 2, axis=-1)


@pytest.mark.slow
def test_minibatches_get_sgld_and_full_batches_baoab(with_gap):
    assert isinstance(with_gap.settings["sampler"], BAOAB)
    found = calibrate(
        jax.random.key(0), quadratic, ORIGIN, curvatures(GAP), nbeta=30.0, batch_size=2,
        localization=10.0, nbeta_factors=(1.0,), localization_factors=(1.0,), num_draws=50,
        num_burnin=50,
    )  # fmt: skip
    assert isinstance(found.settings["sampler"], SGLD)
    assert found.settings["batch_size"] == 2
    # Three step sizes, and the law of each: a bias of a quarter of ε Λ in the stiffest direction.
    assert found.grid.values("mean").shape == (3, 1, 1)


# --- the grid as such -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_steps():
    """SGLD on the gapped quadratic at ε and ε/2, exact law known."""
    steps = np.array([1.2, 0.6]) / (300 * GAP.max() + 3)
    return estimate_llc_over_settings(
        jax.random.key(3), quadratic, ORIGIN, curvatures(GAP), sampler=SGLD(steps), nbeta=300.0,
        localization=3.0, num_chains=64, num_draws=2000, num_burnin=1000,
    )  # fmt: skip


def test_extrapolation_removes_the_step_bias(two_steps):
    coarse, fine = two_steps
    stiffness = 300 * GAP + 3

    def exact(step_size):
        return np.sum(300 * GAP / (stiffness * (1 - step_size * stiffness / 4))) / 2

    for estimate in two_steps:
        assert abs(estimate.mean - exact(estimate.settings["step_size"])) < 4 * estimate.stderr
    value, stderr, rest = extrapolate_step_size(coarse, fine)
    ideal = exact(0.0)
    assert fine.mean - ideal > 10 * fine.stderr  # there was a bias to remove
    assert abs(value - ideal) < 4 * stderr + rest
    assert rest < abs(fine.mean - ideal)
    # The formula on exact values: what is left is within the stated bound.
    steps = [e.settings["step_size"] for e in two_steps]
    clean = [dataclasses.replace(e, mean=exact(s)) for e, s in zip(two_steps, steps, strict=True)]
    value, _, rest = extrapolate_step_size(*clean)
    assert abs(value - ideal) < rest


def test_extrapolation_refuses_estimates_that_differ_otherwise(two_steps):
    coarse, fine = two_steps
    with pytest.raises(ValueError, match="the larger"):
        extrapolate_step_size(fine, coarse)
    hotter = dataclasses.replace(fine, settings={**fine.settings, "nbeta": 1.0})
    with pytest.raises(ValueError, match="nbeta"):
        extrapolate_step_size(coarse, hotter)


def made_up(with_gap, means, relaxations=10.0):
    """A grid whose estimates have these means [1, B, G] and tiny errors."""
    base = with_gap.grid.estimates[with_gap.chosen]
    sound = dataclasses.replace(base, rhat=1.0, ess=1e4, drift=0.0, distance_growth=0.0,
                                stderr=1e-4, below_anchor=0.0)  # fmt: skip
    estimates = np.empty(np.shape(means), object)
    for index in np.ndindex(estimates.shape):
        estimates[index] = dataclasses.replace(sound, mean=float(np.asarray(means)[index]))
    _, b, g = np.shape(means)
    return SampledGrid(
        np.array([0.4]), np.logspace(0, 1, b), np.logspace(0, 1, g), np.ones((1, b, g)),
        np.ones((b, g)), np.broadcast_to(relaxations, (1, b, g)), estimates,
        np.array([with_gap.grid.control[0]] * g), np.ones(g),
    )  # fmt: skip


def test_the_weakest_healthy_localization_and_the_middle_nbeta_are_chosen(with_gap):
    flat = made_up(with_gap, np.full((1, 3, 4), 7.0))
    chosen, found, _ = plateau(flat)
    assert chosen == (0, 1, 0)
    assert found.level.all()
    unrelaxed = np.full((1, 3, 4), 10.0)
    unrelaxed[0, :, :2] = 1.0
    chosen, found, _ = plateau(made_up(with_gap, np.full((1, 3, 4), 7.0), unrelaxed))
    assert chosen == (0, 1, 2)
    np.testing.assert_array_equal(found.healthy[1], [False, False, True, True])


def test_a_lower_plateau_at_strong_localization_is_not_preferred(with_gap):
    # Level from the third localization on, as where only the curvature at the anchor is left.
    means = [[[30.0, 25.0, 20.0, 20.0, 20.0]]]
    chosen, found, warnings = plateau(made_up(with_gap, means))
    np.testing.assert_array_equal(found.level[0], [False, False, False, True, True])
    assert chosen == (0, 0, 0)
    assert any("depends on localization" in warning for warning in warnings)


def test_an_nbeta_is_preferred_where_the_weakest_localization_is_level(with_gap):
    slope = np.array([[[9.0, 8.0, 8.0], [9.0, 8.0, 7.0], [8.0, 8.0, 8.0]]])
    wide = made_up(with_gap, slope)._replace(nbetas=np.array([1.0, 1e8, 1e16]))
    chosen, found, _ = plateau(wide)
    np.testing.assert_array_equal(found.level[:, 0], [False, False, True])
    assert chosen == (0, 2, 0)


def test_short_grids_are_not_held_against_a_setting(with_gap):
    base = with_gap.grid.estimates[with_gap.chosen]
    assert faults(dataclasses.replace(base, ess=9.0, rhat=1.3)) == 0
    assert faults(dataclasses.replace(base, drift=20.0)) == 1
    assert faults(dataclasses.replace(base, stability=np.full(4, 3.0), mean=-9.0)) == 1


def test_only_what_decides_the_answer_is_warned_of(with_gap):
    means = np.array([1.0, 2.0, 4.0])[:, None] * np.ones((1, 3))
    _, found, warnings = plateau(made_up(with_gap, means[None]))
    assert found.steady[1].all()
    assert not found.steady[0].any()
    assert any("depends on nbeta" in warning for warning in warnings)
    assert not any("localization" in warning for warning in warnings)


def test_what_lies_beside_a_diverged_setting_is_not_taken_for_level(with_gap):
    chosen, found, warnings = plateau(made_up(with_gap, [[[np.nan, 10.0, 20.0, 24.0, 27.0]]]))
    assert np.isnan(found.localization[0, 1])
    assert chosen == (0, 0, 1)  # the weakest that is finite
    assert not found.level.any()
    assert not any("Only one localization" in warning for warning in warnings)
    assert any("Only one nbeta" in warning for warning in warnings)


def test_one_setting_alone_is_not_called_level(with_gap):
    alone = dataclasses.replace(with_gap, chosen=(0, 0, 0), grid=made_up(with_gap, [[[7.0]]]))
    alone = dataclasses.replace(alone, sensitivity=sensitivity(alone.grid, 0))
    assert "nothing else was tried" in alone.summary()
    assert "nan" not in alone.summary()


def test_a_diverged_chain_leaves_what_the_others_measured():
    class Measured(NamedTuple):
        stability: np.ndarray

    some, none = Measured(np.array([0.3, np.nan, 0.5])), Measured(np.full(3, np.nan))
    np.testing.assert_allclose(stiffness_of([some, none], [0.1, 0.1], [4.0, 4.0]), [5.0, 40.0])


def test_a_guess_that_overshoots_is_taken_back():
    gamma = np.array([1.0, 40.0])
    pilot = Pilot(quadratic, ORIGIN, curvatures(GAP), SGLD(1.0), 0.4, 400, {"num_chains": 2})
    stiffest = 30.0 * GAP.max() + gamma
    nbetas = np.full(2, 30.0)
    found = pilot.measure_stiffness(jax.random.key(0), nbetas, gamma, 3 * stiffest, 0.9 * stiffest)
    assert found.converged.all()
    # Only where the chains were long enough to tell.
    relaxed = pilot.relaxations(3 * stiffest, gamma) >= RELAXATIONS
    np.testing.assert_array_equal(relaxed, [False, True])
    np.testing.assert_allclose(found.stiffness, np.where(relaxed, 1, 3) * stiffest, rtol=0.01)
    # Never below that at the anchor, where the chains start.
    floor = pilot.measure_stiffness(jax.random.key(0), nbetas, gamma, 3 * stiffest, 1.5 * stiffest)
    assert floor.stiffness[1] == 1.5 * stiffest[1]


def test_a_chain_that_diverged_makes_what_the_others_found_no_proof():
    class Measured(NamedTuple):
        stability: np.ndarray

    found = [Measured(np.array([0.3, 0.5])), Measured(np.array([0.3, np.nan]))]
    np.testing.assert_array_equal(all_finite(found), [True, False])


def test_curvature_at_an_anchor_in_half_precision():
    half = {"w": jnp.full(DIM, 0.5, jnp.bfloat16)}
    pilot = Pilot(quadratic_at_half, half, curvatures(GAP), SGLD(1.0), 0.4, 10, {"num_chains": 1})
    assert pilot.at_anchor(jax.random.key(0), 30.0) == pytest.approx(30 * GAP.max(), rel=0.02)


def quadratic_at_half(params, batch):
    wide = params["w"].astype(jnp.float32) - 0.5
    return 0.5 * jnp.sum(batch * wide[None] ** 2, axis=-1)


@pytest.mark.slow
def test_the_control_of_a_preconditioned_sampler_is_not_preconditioned():
    found = calibrate(
        jax.random.key(0), quadratic, ORIGIN, curvatures(GAP), nbeta=300.0, localization=10.0,
        sampler=RMSPropSGLD.devinterp(1.0), nbeta_factors=(1.0,), localization_factors=(1.0,),
        step_fractions=(0.4,), **SIZES,
    )  # fmt: skip
    assert found.grid.estimates[0, 0, 0].settings["sampler"] == "RMSPropSGLD"
    assert found.grid.control[0].settings["sampler"] == "SGLD"
    assert abs(control_score(found.grid, 0, DIM)[2]) < 4


def test_lengths_by_hand(with_gap):
    # 400 draws gave 8 %; 2 % takes 16 times as many, with steps half as fast 32 times.
    base = with_gap.grid.estimates[with_gap.chosen]
    grid = dataclasses.replace(base, mean=50.0, stderr=4.0, ess=300.0)
    assert grid.losses.shape == (4, 400)
    found = lengths(grid, 100.0, 2.0, 0.02)
    assert found.thinning == -(-400 * 32 // 2000)
    assert 0 <= found.num_draws * found.thinning - 400 * 32 < found.thinning
    assert 0 <= found.num_burnin * found.thinning - RELAXATIONS * 100 < found.thinning
    assert found.relative_stderr == pytest.approx(0.02)
    assert found.warnings == []
    # A precise grid: as many as R-hat wants, and eight relaxation times at least.
    few = dataclasses.replace(grid, stderr=0.1, ess=100.0)
    assert lengths(few, 10.0, 1.0, 0.02)[:3] == (800, 30, 1)
    assert lengths(few, 200.0, 1.0, 0.02)[:3] == (1600, 600, 1)
    assert lengths(few, 10.0, 1.0, 0.02).relative_stderr == pytest.approx(0.002 / math.sqrt(2))


@pytest.mark.slow
def test_an_error_out_of_reach_is_not_promised():
    # One weight, mean of the loss gap 1/2 × 30/(30 + 1e5), drowned in the noise of the minibatches.
    noise = np.array([[1.0], [-1.0]], np.float32) * np.ones((1, DIM), np.float32)
    found = calibrate(
        jax.random.key(0), tilted, ORIGIN, noise, nbeta=30.0, localization=1e5, batch_size=1,
        sampler=SGLD(1.0), nbeta_factors=(1.0,), localization_factors=(1.0,),
        step_fractions=(0.4,), num_draws=50, num_burnin=10,
    )  # fmt: skip
    assert any("would take" in warning for warning in found.warnings)
    assert found.relative_stderr > 0.04  # 0.02 was asked for
    assert found.settings["num_draws"] * found.settings["thinning"] >= 10**6


def tilted(params, batch):
    return params["w"][0] * batch[:, 0] + 0.5 * jnp.sum(1e-3 * params["w"] ** 2)


def test_slopes_by_hand_on_a_power_law(with_gap):
    # λ̂ = nbeta^0.5 localization^-0.25 has these logarithmic derivatives everywhere.
    nbetas, gammas = np.logspace(0, 1, 5), np.logspace(0, 1, 4)
    means = nbetas[:, None] ** 0.5 * gammas[None] ** -0.25
    found = sensitivity(made_up(with_gap, means[None]), 0)
    np.testing.assert_allclose(found.nbeta[1:-1], 0.5, rtol=0.02)
    np.testing.assert_allclose(found.localization[:, 1:-1], -0.25, rtol=0.02)
    assert not found.level.any()
    assert LEVEL < 0.25


def test_the_figure_shows_the_grid(with_gap):
    figure = with_gap.plot()
    assert len(figure.axes) == 6
    row, b, _ = with_gap.chosen
    drawn = [line.get_ydata() for line in figure.axes[0].lines]
    means = with_gap.grid.values("mean")[row, b]
    assert any(len(y) == len(means) and np.allclose(y, means) for y in drawn)
    assert all(ax.get_xlabel() for ax in figure.axes)


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nbeta": 0.0}, "nbeta=0.0: calibration needs a number above 0"),
        ({"nbeta": -1.0}, "nbeta=-1.0"),
        ({"localization": 0.0}, "flat directions never relax"),
        ({"step_fractions": ()}, "step_fractions"),
        ({"nbeta_factors": (3.0, 1.0)}, "increasing"),
        ({"localization_factors": (-1.0, 1.0)}, "above 0"),
        ({"num_burnin": 0}, "num_burnin=0"),
        ({"num_draws": 0}, "num_draws=0"),
        ({"relative_stderr": 0.0}, "relative_stderr=0.0"),
        ({"thinning": 10}, "thinning=10: calibrate chooses it"),
        ({"num_probes": 0}, "num_probes=0: calibrate chooses it"),
        ({"checkpoints": {}}, "checkpoints is empty"),
        ({"checkpoints": {3: {"w": np.zeros(2, np.float32)}}}, "step 3 do not match"),
        ({"rng_key": 0}, "one typed key"),
        ({"sampler": SGLD}, "give an instance"),
        ({"step_fractions": ("a",)}, "give a number or an array"),
        ({"nbeta_factors": (1.0, math.inf)}, "give finite numbers"),
        ({"checkpoints": 7}, "checkpoints=7"),
        ({"checkpoints": [7]}, "checkpoints holds 7"),
        ({"report": "print"}, "report='print'"),
        ({"num_draws": 10**9}, "at most 1e"),
        ({"nbeta_factors": np.arange(1, 10**6)}, "would record"),
    ],
)
def test_bad_input_is_refused_before_anything_compiles(change, message):
    given = {"rng_key": jax.random.key(0), "nbeta": 300.0, **change}
    with compilations() as seen, pytest.raises(ValueError, match=message):
        calibrate(loss_fn=quadratic, params=ORIGIN, data=curvatures(GAP), **given)
    assert seen == []


def product(params, batch):
    """(u v w)²/2 summed: at the origin neither slope nor curvature, only what lies around it."""
    return batch * 0.5 * jnp.sum((params["u"] * params["v"] * params["w"]) ** 2)


@pytest.mark.slow
def test_an_anchor_without_curvature_is_calibrated_by_what_lies_around_it():
    params = {name: np.zeros(16, np.float32) for name in "uvw"}
    found = calibrate(
        jax.random.key(0), product, params, np.ones(2, np.float32), nbeta=1000.0,
        nbeta_factors=(1.0,), localization_factors=(1.0, 3.0), step_fractions=(0.4,), **SIZES,
    )  # fmt: skip
    assert found.stiffness_at_anchor == found.settings["localization"]
    assert found.stiffness > 3 * found.stiffness_at_anchor
    assert found.grid.relaxations[0, 0, 0] >= RELAXATIONS
    # Between cut off and the coefficient of each product, 1/2 with multiplicity 3.
    assert 1.0 < found.grid.estimates[0, 0, 0].mean < 8.0


# --- walls that are steeper than where chains end ----------------------------------------------


class Seen(NamedTuple):
    """What a pilot chain leaves, as far as `Pilot.measure_stiffness` looks."""

    stability: np.ndarray
    diverged_at: np.ndarray
    sound: Any


class Walled(Pilot):
    """Chains that end where Λ is near γ and die of any step beyond 4 / wall(γ)."""

    def run(self, rng_key, params, nbetas, localizations, sampler, num_draws, **changes):
        found = []
        for gamma, step in zip(localizations, np.asarray(sampler.step_size), strict=True):
            dead = step * self.params(gamma) > 4
            sound = SimpleNamespace(gradient=np.full((2, 2), 1e-3))
            ends = step * np.array([gamma, np.nan if dead else gamma])  # one of two dies
            found.append(Seen(ends, np.array([-1, 7 if dead else -1]), sound))
        return np.array([*found, None], object)[:-1]

    def curvature_by_gradients(self, estimates, nbetas):
        return np.zeros(len(estimates))


def walled(wall, num_burnin=300):
    return Walled(None, wall, None, BAOAB(1.0, 1.0), 0.4, num_burnin, {"num_chains": 2})


def test_steps_that_killed_are_not_taken_again_where_chains_end_on_flat_ground():
    # Walls need Λ = 0.1 × 5000; nothing but deaths tells. Half a decade apart, on a log scale.
    gamma = np.array([2.0, 2.0])
    found = walled(lambda gamma: 5000.0).measure_stiffness(
        jax.random.key(0), np.ones(2), gamma, np.array([2.0, 1e5]), gamma, to_the_end=True
    )
    assert found.converged.all()
    assert (0.4 / found.stiffness * 5000 <= 4).all()
    assert (found.stiffness[:1] < 10 * 500).all()  # of the first, that came from below
    # A setting that can no longer relax is given up, unless asked for to the end.
    given_up = walled(lambda gamma: 1e9).measure_stiffness(
        jax.random.key(0), np.ones(1), gamma[:1], gamma[:1], gamma[:1]
    )
    assert not given_up.converged[0]


@pytest.mark.parametrize("scale", [1.0, 1e12, 1e-3])
def test_a_ladder_climbs_to_a_localization_that_is_affordable_at_any_scale(scale):
    # Walls of (w1^2 w2 ...)²: the steeper the further chains go, by a power of γ.
    pilot = walled(lambda gamma: 5000 * scale * (scale / gamma) ** 2)
    ladder = pilot.measure_ladder(jax.random.key(0), 1.0, 0.0, 2)
    assert pilot.reached(ladder)
    gamma = pilot.weakest_localization(ladder)
    # 300 sqrt(ε γ) relaxation times with ε = 4 / wall: 3 at γ = 0.8 scale, and room for a decade.
    least = scale * (9 * 5000 / (4 * 300**2)) ** (1 / 3)
    assert least < gamma < 15 * least


class Uneven(Walled):
    """Chains that happen to end on flat ground under weak pulls."""

    def run(self, rng_key, params, nbetas, localizations, sampler, num_draws, **changes):
        found = super().run(rng_key, params, nbetas, localizations, sampler, num_draws, **changes)
        steps = np.asarray(sampler.step_size)
        for k, gamma in enumerate(localizations):
            met = gamma + (500.0 if gamma > 10 else 1e-6)
            found[k] = found[k]._replace(stability=np.full(2, steps[k] * met))
        return found


def test_no_less_curvature_is_taken_for_granted_under_a_weaker_pull():
    pilot = Uneven(None, lambda gamma: 0.0, None, BAOAB(1.0, 1.0), 0.4, 300, {"num_chains": 2})
    ladder = pilot.measure_ladder(jax.random.key(0), 1.0, 0.0, 2)
    weak = ladder.localizations < 10
    assert weak.any()
    np.testing.assert_allclose((ladder.stiffness - ladder.localizations)[weak], 500, rtol=1e-3)


def crossing(a, b):
    """(x w1^a w2^b - y)² with data of the normal crossings that other packages test with."""
    return lambda p, batch: (batch["x"] * p["w"][0] ** a * p["w"][1] ** b - batch["y"]) ** 2


def noise_beside(n=1000):
    rng = np.random.default_rng(1)
    x, y = 2 * rng.normal(size=n), 0.25 * rng.normal(size=n)
    return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss_fn", "size", "data", "nbeta", "exact"),
    [
        # λ = 1 / (2 max(a, b)).
        (crossing(1, 2), 2, noise_beside(), None, 1 / 4),
        (crossing(4, 1), 2, noise_beside(), None, 1 / 8),
        # Σ 1/k of Σ |w|^k: with k = 1 there is no curvature but that of the kink.
        (lambda p, b: b * jnp.sum(p["w"] ** 6), 3, np.ones(2, np.float32), 1e3, 3 / 6),
        (lambda p, b: b * jnp.sum(jnp.abs(p["w"])), 3, np.ones(2, np.float32), 1e3, 3.0),
    ],
    ids=["(1,2)", "(4,1)", "w^6", "|w|"],
)
def test_settings_for_anchors_without_curvature(loss_fn, size, data, nbeta, exact):
    """All chains finite, and the coefficient to 40 %, or less and a warning that says so."""
    anchor = {"w": np.zeros(size, np.float32)}
    found = calibrate(jax.random.key(0), loss_fn, anchor, data, nbeta=nbeta, num_draws=300,
                      num_burnin=300)  # fmt: skip
    estimate = llc_jax.estimate_llc(jax.random.key(1), loss_fn, anchor, data, **found.settings)
    assert estimate.num_finite == 4
    assert 0.4 * exact < estimate.mean < 1.4 * exact
    assert any("curvature at the anchor is nothing" in text for text in found.warnings)
    assert all(len(text) <= 600 for text in found.warnings)


@pytest.mark.slow
def test_a_loss_that_exists_on_one_side_only_is_calibrated_within():
    """No step size is small enough for a step out of the domain: the pull has to be strong enough.

    As in blackjax issue 973, "MCLMC divergence response has no equilibrium in the position-caused-
    NaN regime", where the step size shrinks for ever.
    """

    def half_open(params, batch):
        return batch * (jnp.log1p(-params["x"]) ** 2 + jnp.sum(params["y"] ** 4))

    anchor = {"x": np.float32(0), "y": np.zeros(2, np.float32)}
    found = calibrate(
        jax.random.key(0), half_open, anchor, np.ones(2, np.float32), nbeta=100.0,
        nbeta_factors=(1.0,), step_fractions=(0.4,), num_draws=200, num_burnin=200,
    )  # fmt: skip
    estimate = llc_jax.estimate_llc(
        jax.random.key(1), half_open, anchor, np.ones(2, np.float32), **found.settings
    )
    assert estimate.num_finite == 4
    assert estimate.mean == pytest.approx(1 / 2 + 2 / 4, rel=0.4)
