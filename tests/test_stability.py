"""The stability number: what it measures, and that it tells where the trace does not."""

import dataclasses
import functools
import math

import jax
import jax.flatten_util
import jax.numpy as jnp
import laws
import numpy as np
import pytest

from llc_jax import (
    BAOAB,
    MALA,
    SGLD,
    SGNHT,
    AdamSGLD,
    RMSPropSGLD,
    estimate_llc,
    estimate_llc_over_settings,
)
from llc_jax.curvature.lanczos import Tridiagonal, lanczos, largest_eigenvalue
from llc_jax.sampling.posterior import LocalPosterior, evaluate
from llc_jax.sampling.stability import stability_matrix

DIM = 6
CURVATURE = np.array([0.25, 0.5, 1.0, 1.5, 3.0, -0.5])
NBETA, LOCALIZATION = 20.0, 15.0
STIFFNESS = NBETA * CURVATURE + LOCALIZATION
STEP = 0.02

# Each sampler with the G of its state below.
FIXED = {
    "SGLD": (SGLD(STEP), 1.0),
    "MALA": (MALA(STEP), 1.0),
    "BAOAB": (BAOAB(STEP, 2.0), 1.0),
    "SGNHT": (SGNHT(STEP, 2.0), 1.0),
    "RMSPropSGLD": (RMSPropSGLD(STEP, 1.0, 0.5, 4.0, 0.0), 0.4),
}
each = pytest.mark.parametrize(("sampler", "scale"), FIXED.values(), ids=FIXED)


def quadratic(params, batch):
    """½ Σ h w² over two leaves, the second of them in whatever precision it has."""
    h = jnp.asarray(CURVATURE, jnp.float32)
    wide = params["b"].astype(jnp.float32)
    return batch * 0.5 * (jnp.sum(h[:4] * params["a"] ** 2) + jnp.sum(h[4:] * wide**2))


def weights(dtype=jnp.float32):
    return {"a": jnp.ones(4), "b": jnp.ones(2, dtype)}


def at_of(params, mask=None, nbeta=NBETA, localization=LOCALIZATION, loss=quadratic):
    scalars = jnp.float32(nbeta), jnp.float32(localization)
    here = LocalPosterior(params, *scalars, mask)
    return lambda w: evaluate(loss, here, w, jnp.ones(3))


def measure(sampler, params, mask=None, state=None, **options):
    at = at_of(params, mask, **options)
    state = sampler.init(params) if state is None else state
    return float(largest_eigenvalue(stability_matrix(jax.random.key(0), sampler, state, at, mask)))


@each
def test_it_is_the_step_times_the_largest_preconditioned_stiffness(sampler, scale):
    assert measure(sampler, weights()) == pytest.approx(STEP * scale * STIFFNESS.max(), rel=1e-4)


@each
def test_half_precision_weights(sampler, scale):
    found = measure(sampler, weights(jnp.bfloat16))
    assert found == pytest.approx(STEP * scale * STIFFNESS.max(), rel=2**-7)


@each
def test_only_what_is_sampled_counts(sampler, scale):
    mask = {"a": np.array([1, 0, 1, 1]), "b": np.array([0, 1])}
    largest = np.max(STIFFNESS[[0, 2, 3, 5]])
    assert measure(sampler, weights(), mask) == pytest.approx(STEP * scale * largest, rel=1e-4)


def test_each_coordinate_has_its_own_preconditioner():
    sampler, params = RMSPropSGLD(STEP, 0.9, 0.5), weights()
    square = np.array([4.0, 1.0, 0.25, 9.0, 100.0, 0.0], np.float32)
    state = sampler.init(params)._replace(
        square={"a": jnp.asarray(square[:4]), "b": jnp.asarray(square[4:])}
    )
    products = STEP * STIFFNESS / (np.sqrt(square) + 0.5)
    assert np.argmax(products) != np.argmax(STIFFNESS)
    assert measure(sampler, params, state=state) == pytest.approx(products.max(), rel=1e-4)


def test_adam_counts_its_delay():
    sampler, params = AdamSGLD(STEP, 0.8, 0.9, 0.5), weights()
    state = sampler.init(params)
    for seed in range(2):
        state, _ = sampler.step(jax.random.key(seed), state, at_of(params), None)
    squares = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.square)])
    scale = 1 / (np.sqrt(squares / (1 - 0.9**2)) + 0.5)
    expected = np.max(STEP * scale * STIFFNESS) / (1 - 0.8)
    assert measure(sampler, params, state=state) == pytest.approx(expected, rel=1e-4)


def linear(params, batch):
    return batch * (jnp.sum(params["a"]) + jnp.sum(params["b"].astype(jnp.float32)))


@pytest.mark.parametrize(("localization", "expected"), [(7.0, STEP * 7.0), (0.0, 0.0)])
def test_equal_eigenvalues_and_none_at_all(localization, expected):
    # Lanczos ends after one vector, or before.
    found = measure(SGLD(STEP), weights(), loss=linear, localization=localization)
    assert found == pytest.approx(expected, rel=1e-5)


def test_without_a_positive_eigenvalue_it_is_zero_and_without_a_number_nan():
    downhill = functools.partial(measure, SGLD(STEP), weights(), {"a": 0, "b": np.array([0, 1])})
    assert downhill(localization=0.0) == 0.0
    assert downhill(localization=11.0) == pytest.approx(STEP * 1.0, rel=1e-4)  # 20·(-½) + 11
    assert math.isnan(measure(SGLD(STEP), weights(), nbeta=math.inf))
    assert math.isnan(measure(SGLD(STEP), {"a": jnp.full(4, jnp.nan), "b": jnp.ones(2)}, loss=wild))


def wild(params, batch):
    return batch * (jnp.sum(params["a"] ** 4) + jnp.sum(params["b"] ** 2))


@pytest.mark.parametrize("seed", range(3))
def test_a_spectrum_with_an_outlier(seed):
    # 400 eigenvalues in [-1, 1], one of 3: from below, and within a percent after 12 products.
    rng = np.random.default_rng(seed)
    values = np.append(rng.uniform(-1, 1, 399), 3.0)
    basis = np.linalg.qr(rng.normal(size=(400, 400)))[0]
    matrix = jnp.asarray(basis * values @ basis.T, jnp.float32)
    start = jax.random.normal(jax.random.key(seed), 400)
    found, _ = lanczos(
        lambda v: {"w": matrix @ v["w"]}, lambda _: {"w": matrix @ start}, {"w": jnp.zeros(400)},
        12, reorthogonalize=False,
    )  # fmt: skip
    assert 0.99 * 3 < float(largest_eigenvalue(found)) < 3.0001


def test_each_of_a_stack_has_its_own():
    diagonal = np.array([[1.0, 2.0], [np.nan, 1.0], [-3.0, -1.0]])
    couplings = np.array([[0.0, 2.0], [0.0, 0.0], [0.0, 0.5]])
    found = largest_eigenvalue(Tridiagonal(diagonal, couplings, np.zeros(3), diagonal < np.inf))
    np.testing.assert_allclose(found, [1.5 + np.sqrt(4.25), np.nan, 0.0])


INPUTS = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
TARGETS = np.sin(INPUTS.sum(axis=1))


def network(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["in"] + params["bias"][None])
    return 0.5 * (hidden @ params["out"] - batch["y"]) ** 2


def network_params(seed):
    rng = np.random.default_rng(seed)
    shapes = {"in": (3, 5), "bias": (5,), "out": (5,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def last_weights(params, batch):
    """For `collect`."""
    return params


@pytest.mark.slow
def test_the_number_of_an_estimate_is_that_of_the_hessian_where_the_chain_is():
    data = {"x": INPUTS, "y": TARGETS}
    run = functools.partial(
        estimate_llc, jax.random.key(0), network, network_params(1), data, sampler=SGLD(1e-3),
        num_chains=4, num_burnin=0, nbeta=50.0, localization=2.0,
    )  # fmt: skip
    estimate = run(num_draws=300, num_probes=1)
    # One draw more of the same chains is the point where they ended.
    longer = run(num_draws=301, num_probes=0, collect=last_weights)
    flat, unravel = jax.flatten_util.ravel_pytree(network_params(1))
    hessian = jax.jit(jax.hessian(lambda v: jnp.mean(network(unravel(v), data))))
    for chain in range(4):
        end = jax.tree.map(lambda x, c=chain: jnp.asarray(x[c, -1]), longer.collected)
        top = np.linalg.eigvalsh(hessian(jax.flatten_util.ravel_pytree(end)[0]))[-1]
        assert estimate.stability[chain] == pytest.approx(1e-3 * (50.0 * top + 2.0), rel=0.002)
    # Not that of the anchor.
    at_anchor = 1e-3 * (50 * np.linalg.eigvalsh(hessian(flat))[-1] + 2)
    assert np.max(np.abs(estimate.stability / at_anchor - 1)) > 0.1


def test_without_probes_nothing_is_measured_or_said():
    estimate = estimate_llc(
        jax.random.key(0), network, network_params(1), {"x": INPUTS, "y": TARGETS},
        sampler=SGLD(1e-3), num_chains=2, num_draws=5, num_burnin=0, num_probes=0, nbeta=1.0,
        localization=1.0,
    )  # fmt: skip
    assert np.isnan(estimate.stability).all()
    assert "near instability" not in estimate.verdict


def test_a_chain_that_lost_its_last_state_is_not_passed_over():
    good = estimate_llc(
        jax.random.key(0), lambda params, batch: 0.5 * jnp.sum(params["w"] ** 2)[None],
        {"w": jnp.zeros(2)}, {"x": jnp.zeros((1, 1))}, sampler=SGLD(1e-3), nbeta=10.0,
        localization=1.0, num_chains=3, num_draws=8, num_burnin=0,
    )  # fmt: skip
    assert good.worst_stability == good.stability.max()
    lost = dataclasses.replace(good, stability=np.array([0.1, np.nan, 0.2]))
    assert lost.worst_stability == np.inf
    assert "near instability" in lost.verdict
    dead = dataclasses.replace(lost, diverged_at=np.array([-1, 3, -1]))
    assert dead.worst_stability == 0.2


# --- a preconditioner hides instability -----------------------------------------------------------

SPREAD_OUT = np.geomspace(1e-2, 1e2, 400)
STIFF = {"nbeta": 100.0, "localization": 1.0}


def stiff(params, batch):
    """½ Σ h w²; the data are there to give the losses a length."""
    h = jnp.asarray(SPREAD_OUT, jnp.float32)
    return batch * 0.5 * jnp.sum(h * params["w"] ** 2)


def over_steps(sampler, **options):
    plan = {"num_chains": 4, "num_draws": 1000, "num_burnin": 1000, "thinning": 4}
    return estimate_llc_over_settings(
        jax.random.key(0), stiff, {"w": np.zeros(400, np.float32)}, np.ones(1, np.float32),
        sampler=sampler, **STIFF, **{**plan, **options},
    )  # fmt: skip


IDEAL = np.sum(100 * SPREAD_OUT / (100 * SPREAD_OUT + 1)) / 2


def test_rmsprop_at_the_edge_is_level_wrong_and_found_out():
    # Published as a warning without a remedy: 351 and 1380 on level traces where 184.9 is right.
    assert pytest.approx(184.86, abs=0.01) == IDEAL
    mild, hard, worse = over_steps(RMSPropSGLD.devinterp(np.array([1e-4, 1e-3, 3e-3])))
    for estimate, value in [(hard, 350.0), (worse, 1380.0)]:
        assert estimate.mean == pytest.approx(value, rel=0.02)
        assert estimate.num_finite == 4
        assert estimate.rhat < 1.01
        assert abs(estimate.drift) < 4
        early, late = np.split(estimate.losses.mean(axis=0, dtype=np.float64), 2)
        assert abs(early.mean() / late.mean() - 1) < 0.01
        assert estimate.verdict == "near instability"
        assert estimate.stability.min() > 3.5
        assert "lower step_size by a factor" in estimate.warnings[0]
    # No instability at 1e-4, and none is reported. Nor is the value right, even by the law of a
    # fixed G, which is 4.8 % too high itself: V remembers 100 steps, the flat directions take
    # longer, and the term ∂G/∂w that is left out shows.
    assert mild.verdict == "ok"
    assert mild.stability.max() < 1
    slow = [laws.rmsprop_slow_memory(1e-4, 0.1, h, 100.0, 1.0) for h in SPREAD_OUT]
    exact = 50 * np.sum(SPREAD_OUT * slow)
    assert exact == pytest.approx(193.75, abs=0.01)
    assert mild.mean > exact + 8 * mild.stderr


@pytest.mark.slow
def test_sgld_is_honest_on_the_same_target():
    # ε Λ = 1, 3 and 10 in the stiffest direction: right by its own law, warned, diverged.
    mild, hard, worse = over_steps(SGLD(np.array([1e-4, 3e-4, 1e-3])), num_draws=3000, thinning=8)
    for estimate, step_size in [(mild, 1e-4), (hard, 3e-4)]:
        chains = [laws.sgld(step_size, 100 * h + 1).variance() for h in SPREAD_OUT]
        exact = 50 * np.sum(SPREAD_OUT * chains)
        laws.assert_within_4_stderr(estimate.mean, exact, estimate.stderr)
        top = step_size * (100 * 100 + 1)
        assert estimate.stability == pytest.approx(np.full(4, top), rel=0.05)
        assert np.all(estimate.stability < top * 1.001)
    assert mild.verdict == "ok"
    assert hard.verdict.startswith("near instability")
    assert worse.num_finite == 0
    assert worse.verdict == "4 of 4 chains diverged"
    assert np.isnan(worse.stability).all()
