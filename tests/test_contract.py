"""What every sampler must satisfy, one table of samplers times properties."""

import inspect
import logging
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.errors import KeyReuseError
from laws import assert_within_4_stderr

from llc_jax import (
    BAOAB,
    MALA,
    SGLD,
    SGNHT,
    AdamSGLD,
    RMSPropSGLD,
    Stream,
    calibrate,
    estimate_llc,
    estimate_llc_over_checkpoints,
    estimate_llc_over_settings,
)
from llc_jax.parallel import CHAIN, CHECKPOINT
from llc_jax.samplers import base
from llc_jax.sampling.posterior import LocalPosterior, evaluate
from llc_jax.sampling.program import sample
from llc_jax.trees import apply_mask, at_least_float32, standard_normal_like
from llc_jax.types import Evaluation


class LeimkuhlerMatthewsState(NamedTuple):
    params: Any
    noise: Any


class LeimkuhlerMatthews(NamedTuple):
    """A user's own: `w <- w - ε drift + sqrt(ε/2) (ξ + ξ')` with the ξ of the step before, and ξ'.

    In the units of blackjax, half of ours, so that it has to say so. Written by the docstrings of
    `llc_jax.samplers.base`; nothing of the package knows it.
    """

    step_size: float

    def init(self, params):
        noise = jax.tree.map(lambda w: jnp.zeros_like(at_least_float32(w)), params)
        return LeimkuhlerMatthewsState(params, noise)

    def step(self, rng_key, state, evaluate, mask=None):
        here = evaluate(state.params)
        noise = apply_mask(mask, standard_normal_like(rng_key, here.drift))

        def move(w, d, before, now):
            step = jnp.asarray(self.step_size, d.dtype)
            return (at_least_float32(w) - step * d + jnp.sqrt(step / 2) * (before + now)).astype(
                w.dtype
            )

        params = jax.tree.map(move, state.params, here.drift, state.noise, noise)
        return LeimkuhlerMatthewsState(params, noise), here

    def stability_limit(self):
        return 2.0

    def stationary_variance(self, curvature):
        return 1 / curvature


SAMPLERS = {
    "SGLD": SGLD(1e-2),
    "RMSPropSGLD.devinterp": RMSPropSGLD.devinterp(1e-2),
    "RMSPropSGLD.corrected": RMSPropSGLD.corrected(1e-2),
    "AdamSGLD": AdamSGLD(1e-2),
    "SGNHT": SGNHT(1e-2, 3.0),
    "BAOAB": BAOAB(1e-2, 3.0),
    "MALA": MALA(1e-2),  # accepts nearly all; where it must not, the tests below say so
}

OURS = tuple(SAMPLERS)
SAMPLERS["a user's"] = LeimkuhlerMatthews(5e-3)
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
# For what takes several programs a sampler.
QUICK = ("SGLD",)
each_sampler_slowly = pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(sampler, id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, sampler in SAMPLERS.items()
    ],
)


def test_no_sampler_is_missing():
    from llc_jax import samplers

    assert {type(SAMPLERS[name]).__name__ for name in OURS} == set(samplers.__all__)


PARAMS = {
    "matrix": np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2),
    "half": jnp.linspace(0.5, 2.0, 4, dtype=jnp.bfloat16),
    "scalar": np.float32(0.75),
}
ANCHOR = jax.tree.map(lambda x: x * 0, PARAMS)


def loss_of_all(params, batch):
    wide = [jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(params)]
    return batch * (0.5 * sum(wide) + jnp.sin(params["scalar"]))


def posterior(mask=None):
    def at(params):
        scalars = jnp.float32(5.0), jnp.float32(1.0)
        return evaluate(
            loss_of_all, LocalPosterior(ANCHOR, *scalars, mask), params, jnp.ones(2)
        )

    return at


def describe(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def assert_close(found, expected):
    def check(a, b):
        # Half-precision weights may round the other way under another fusion.
        tolerance = 2**-7 if a.dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tolerance, atol=1e-6
        )

    jax.tree.map(check, found, expected)


# --- the two methods --------------------------------------------------------------------------


@each_sampler
def test_is_a_named_tuple_of_numbers_with_two_methods(sampler):
    assert isinstance(sampler, tuple)
    assert sampler._fields
    assert all(jnp.ndim(value) == 0 for value in sampler)
    assert jax.tree.leaves(sampler) == list(sampler)  # a pytree whose leaves are its numbers
    assert list(inspect.signature(sampler.init).parameters) == ["params"]
    step = inspect.signature(sampler.step).parameters
    assert list(step) == ["rng_key", "state", "evaluate", "mask"]


@each_sampler
def test_a_chain_starts_where_it_is_told(sampler):
    state = sampler.init(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, state.params, PARAMS)


@each_sampler
def test_a_step_returns_the_evaluation_of_the_point_before_it(sampler):
    state, here = sampler.step(jax.random.key(0), sampler.init(PARAMS), posterior(), None)
    assert isinstance(here, Evaluation)
    jax.tree.map(np.testing.assert_array_equal, here, posterior()(PARAMS))
    moved = jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), state.params, PARAMS)
    assert all(jax.tree.leaves(moved))


@each_sampler
def test_state_keeps_its_shapes_and_dtypes(sampler):
    state = sampler.init(PARAMS)
    for seed in range(2):
        new, _ = sampler.step(jax.random.key(seed), state, posterior(), None)
        assert describe(new) == describe(state)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        state = new
    assert describe(state.params) == describe(PARAMS)


@each_sampler
def test_one_key_one_step(sampler):
    def first(seed):
        return sampler.step(jax.random.key(seed), sampler.init(PARAMS), posterior(), None)[0]

    jax.tree.map(np.testing.assert_array_equal, first(0), first(0))
    assert np.all(np.asarray(first(0).params["matrix"]) != first(1).params["matrix"])


@each_sampler
def test_runs_under_jit_vmap_and_scan(sampler):
    def chain(key):
        def step(state, t):
            state, here = sampler.step(jax.random.fold_in(key, t), state, posterior(), None)
            return state, here.loss

        return jax.lax.scan(step, sampler.init(PARAMS), jnp.arange(4))

    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(chain))(keys)
    state, losses = sampler.init(PARAMS), []
    for t in range(4):
        state, here = sampler.step(jax.random.fold_in(keys[1], t), state, posterior(), None)
        losses.append(here.loss)
    assert_close(jax.tree.map(lambda x: x[1], together), (state, jnp.stack(losses)))


@each_sampler
def test_a_grid_of_settings_is_a_vmap(sampler):
    def first(one):
        return one.step(jax.random.key(0), one.init(PARAMS), posterior(), None)[0].params

    grid = jax.tree.map(
        lambda value: jnp.stack([jnp.float32(value), jnp.float32(value) / 2]), sampler
    )
    together = jax.vmap(first)(grid)
    for i in range(2):
        alone = first(jax.tree.map(lambda value, i=i: value[i], grid))
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone)
    assert np.any(np.asarray(together["matrix"][0]) != together["matrix"][1])


@each_sampler
def test_chains_do_not_know_of_each_other(sampler):
    # Neither how many run at once, nor on how many devices, nor one that dies changes the others.
    def chain(key, wall):
        def walled(params):
            here = posterior()(params)
            lost = jnp.where(params["scalar"] > wall, jnp.nan, 1.0)
            scaled = {name: jax.tree.map(lambda x: x * lost, getattr(here, name))
                      for name in ("loss", "energy", "grad", "drift")}  # fmt: skip
            return here._replace(**scaled)

        def step(state, t):
            state, _ = sampler.step(jax.random.fold_in(key, t), state, walled, None)
            return state, state.params["scalar"]

        return jax.lax.scan(step, sampler.init(PARAMS), jnp.arange(6))[1]

    run = jax.jit(jax.vmap(chain))
    keys, free = jax.random.split(jax.random.key(0), 8), jnp.full(8, jnp.inf)
    together = np.asarray(run(keys, free))
    np.testing.assert_array_equal(run(keys[:3], free[:3]), together[:3])
    chunks = jax.jit(lambda *x: jax.lax.map(lambda one: chain(*one), x, batch_size=2))
    np.testing.assert_array_equal(chunks(keys, free), together)
    row = jax.sharding.NamedSharding(mesh_of(1, len(jax.devices())), jax.P(CHAIN))
    np.testing.assert_array_equal(run(*jax.device_put((keys, free), row)), together)
    victim = int(np.argmax(together[:, :-1].max(axis=1)))
    hurt = np.asarray(run(keys, free.at[victim].set(together[victim, :-1].max() - 1e-3)))
    others = np.arange(8) != victim
    np.testing.assert_array_equal(hurt[others], together[others])
    assert np.any(hurt[victim] != together[victim])  # dead, or, with a test of its own, refused
    assert np.isnan(hurt[victim, -1]) != isinstance(sampler, MALA)


@each_sampler
def test_masked_weights_do_not_move(sampler):
    mask = {"matrix": np.array([[1, 0], [0, 1], [1, 0]]), "half": 0, "scalar": 1}
    start = state = sampler.init(PARAMS)
    for seed in range(3):
        state, _ = sampler.step(jax.random.key(seed), state, posterior(mask), mask)
    same = jax.tree.map(lambda a, b: np.asarray(a) == np.asarray(b), state.params, PARAMS)
    np.testing.assert_array_equal(same["matrix"], mask["matrix"] == 0)
    assert same["half"].all()
    assert not same["scalar"]
    for field in {"momentum", "mean"} & set(state._fields):
        # Nor does anything build up for them that would move them later.
        held, before = getattr(state, field), getattr(start, field)
        still = jax.tree.map(lambda a, b: np.asarray(a) == np.asarray(b), held, before)
        np.testing.assert_array_equal(still["matrix"], mask["matrix"] == 0)
        assert still["half"].all()
        assert not still["scalar"]


def test_the_thermostat_counts_only_what_is_sampled():
    # From rest: mean p² over the four sampled of eleven coordinates, at both ends of the O step.
    mask = {"matrix": np.array([[1, 0], [0, 1], [1, 0]]), "half": 0, "scalar": 1}
    h, friction = 0.1, 3.0
    state, here = SGNHT(h**2, friction).step(
        jax.random.key(0), SGNHT(h**2, friction).init(PARAMS), posterior(mask), mask
    )
    kicked = sum(np.sum((h * np.float64(d)) ** 2) for d in jax.tree.leaves(here.drift))
    stirred = sum(np.sum(np.float64(p) ** 2) for p in jax.tree.leaves(state.momentum))
    assert kicked > 0.1
    expected = friction + h / 2 * (kicked / 4 - 1) + h / 2 * (stirred / 4 - 1)
    assert float(state.thermostat) == pytest.approx(expected, rel=1e-5)


def test_mala_moves_everything_or_nothing():
    # A long step, so that both happen; nothing moves where the proposal is refused.
    sampler, moves, ratios = MALA(0.3), [], []
    state = sampler.init(PARAMS)
    for seed in range(60):
        new, _ = sampler.step(jax.random.key(seed), state, posterior(), None)
        moved = jax.tree.map(
            lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), new.params, state.params
        )
        assert len(set(jax.tree.leaves(moved))) == 1
        moves.append(moved["scalar"])
        ratios.append(float(new.log_acceptance))
        state = new
    moves, ratios = np.array(moves), np.array(ratios)
    assert 10 <= moves.sum() <= 50
    assert moves[ratios >= 0].all()
    assert ratios[moves].mean() > ratios[~moves].mean()
    # The number accepted has mean Σ p and variance Σ p (1 - p).
    p = np.exp(np.minimum(ratios, 0))
    assert abs(moves.sum() - p.sum()) < 4 * np.sqrt(np.sum(p * (1 - p)))


@pytest.mark.parametrize("sampler", list(filter(base.log_acceptance, SAMPLERS.values())))
def test_the_way_back_has_the_inverse_metropolis_ratio(sampler):
    start = {k: jnp.asarray(v, jnp.float32) for k, v in PARAMS.items()}
    end = jax.tree.map(lambda x: 0.9 * x + 0.05, start)
    here, there = posterior()(start), posterior()(end)
    move = jax.tree.map(jnp.subtract, end, start)
    forth = sampler.log_acceptance(move, here, there)
    back = sampler.log_acceptance(jax.tree.map(jnp.negative, move), there, here)
    assert abs(float(forth)) > 1e-4
    np.testing.assert_allclose(forth, -back, atol=1e-5)


# --- what a sampler says of itself, or is said of it in its place -------------------------------

NBETA, CHAINS = 5.0, 20_000


def on_a_quadratic(sampler, curvature, num_steps):
    """Positions [num_steps, CHAINS] of one weight of this curvature Λ, started at the minimum."""

    def at(w):
        energy = curvature * w**2 / 2
        grad = curvature * w / NBETA
        return Evaluation(energy / NBETA, energy, grad, curvature * w, jnp.float32(NBETA))

    def chain(key):
        def step(state, t):
            state, _ = sampler.step(jax.random.fold_in(key, t), state, at, None)
            return state, state.params

        return jax.lax.scan(step, sampler.init(jnp.float32(0)), jnp.arange(num_steps))[1]

    keys = jax.random.split(jax.random.key(0), CHAINS)
    return np.asarray(jax.jit(jax.vmap(chain, out_axes=1))(keys), np.float64)


def with_relaxation(sampler, curvature):
    """The sampler as calibration sets it, a tenth of the way to its stability limit."""
    step_size = 0.1 * base.stability_limit(sampler) / curvature
    return base.with_step_size(sampler, step_size, curvature)


@each_sampler
def test_a_step_size_is_set_and_nothing_else_of_its_kind(sampler):
    new = base.with_step_size(sampler, 0.25, 9.0)
    assert type(new) is type(sampler)
    assert new.step_size == 0.25
    grid = base.with_step_size(sampler, np.array([0.5, 0.25]), np.array([1.0, 9.0]))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: np.ravel(x)[-1], grid), new)
    base.check_hyperparameters(new)
    steps = base.relaxation_steps(grid, np.array([1.0, 9.0]))
    assert steps.shape == (2,)
    assert (steps > 0).all()


@each_sampler
def test_the_variance_it_states_is_that_of_its_chains(sampler):
    curvature = 8.0
    tuned = with_relaxation(sampler, curvature)
    stated = base.stationary_variance(tuned, curvature)
    if stated is None:
        assert base.preconditioner(sampler) is not None  # of ours, only these have no known law
        return
    if isinstance(sampler, SGNHT):
        return  # many coordinates: test_samplers
    steps = math.ceil(8 * float(base.relaxation_steps(tuned, curvature)))
    squares = on_a_quadratic(tuned, curvature, steps)[-1] ** 2
    assert_within_4_stderr(squares.mean(), stated, squares.std() / math.sqrt(CHAINS))


@each_sampler
def test_a_flat_direction_forgets_its_start_in_the_time_it_states(sampler):
    # The variance approaches that of the pull like exp(-t/τ); a tenth of the limit per step.
    if base.preconditioner(sampler) is not None or isinstance(sampler, SGNHT):
        return  # faster by as much as G is above 1; made for many coordinates
    pull = 0.5
    tuned = base.with_step_size(sampler, 0.02 * base.stability_limit(sampler) / pull, pull)
    tau = float(base.relaxation_steps(tuned, pull))
    path = on_a_quadratic(tuned, pull, math.ceil(3 * tau))
    share = np.square(path).mean(axis=1) * pull
    assert 0.9 < share[-1] < 1.1
    assert share[math.ceil(tau / 2)] < 0.7


@each_sampler
def test_the_limit_it_states_is_where_chains_leave(sampler):
    if isinstance(sampler, MALA | RMSPropSGLD | AdamSGLD):
        return  # MALA refuses, and preconditioners give way
    curvature, limit = 2.0, base.stability_limit(sampler)
    below, above = (
        on_a_quadratic(base.with_step_size(sampler, share * limit / curvature, 1.0), curvature, 200)
        for share in (0.9, 1.1)
    )
    assert np.square(below[-1]).mean() < 100
    assert np.square(above[-1]).mean() > 1e6


@each_sampler
def test_a_preconditioner_is_positive_and_like_the_weights(sampler):
    of = base.preconditioner(sampler)
    assert (of is None) == (not isinstance(sampler, RMSPropSGLD | AdamSGLD))
    assert (base.step_variance(sampler) is None) == (of is not None)
    if of is not None:
        state, _ = sampler.step(jax.random.key(0), sampler.init(PARAMS), posterior(), None)
        found = of(state)
        wide = jax.tree.map(at_least_float32, jax.tree.map(jnp.asarray, PARAMS))
        assert describe(found) == describe(wide)
        assert all(np.all(np.asarray(x) > 0) for x in jax.tree.leaves(found))


@each_sampler
def test_ranges_are_those_of_hyperparameters_and_are_kept(sampler):
    assert set(base.ranges(sampler)) <= set(sampler._fields)
    for name, value in sampler._asdict().items():
        allowed = base.ranges(sampler).get(name, base.NONNEGATIVE)
        assert allowed.allows(value)
        for bad in (allowed.least - 0.5, 2 * allowed.most, allowed.excluded):
            if np.isfinite(bad):
                with pytest.raises(ValueError, match=rf"{name}=.*(it must be|finite number)"):
                    base.check_hyperparameters(sampler._replace(**{name: bad}))


class Frictional(NamedTuple):
    """Has names that mean something in other samplers, and says nothing of itself."""

    friction: float
    decay: float
    step_size: float
    preconditioner: float = 2.0
    ranges: float = 3.0

    def init(self, params):
        return SGLD(self.step_size).init(params)

    def step(self, rng_key, state, evaluate, mask=None):
        return SGLD(self.step_size).step(rng_key, state, evaluate, mask)


def test_names_of_hyperparameters_mean_nothing():
    mine = Frictional(0.0, 7.0, 0.5)
    base.check_hyperparameters(mine)
    assert base.with_step_size(mine, 0.1, 25.0) == (0.0, 7.0, 0.1, 2.0, 3.0)
    assert base.relaxation_steps(mine, 4.0) == 0.5
    assert base.preconditioner(mine) is None
    assert base.step_variance(mine) == 0.5


class Stepless(NamedTuple):
    """Has no step size at all."""

    rate: float

    def init(self, params):
        return SGLD(self.rate).init(params)

    def step(self, rng_key, state, evaluate, mask=None):
        return SGLD(self.rate).step(rng_key, state, evaluate, mask)


def test_a_sampler_without_a_step_size_is_estimated_and_not_calibrated():
    plan = {**PLAN, "nbeta": 10.0, "localization": 1.0}
    key = jax.random.key(0)
    found = estimate_llc(key, example_losses, WEIGHTS, DATA, sampler=Stepless(1e-2), **plan)
    same = estimate_llc(key, example_losses, WEIGHTS, DATA, sampler=SGLD(1e-2), **plan)
    np.testing.assert_array_equal(found.losses, same.losses)
    assert np.isnan(found.stability).all()
    assert found.settings["rate"] == 1e-2
    with pytest.raises(ValueError, match="calibrate sets its step_size, which it does not have"):
        calibrate(key, example_losses, WEIGHTS, DATA, sampler=Stepless(1e-2))


def test_a_sampler_of_twenty_lines_is_calibrated():
    found = calibrate(
        jax.random.key(0), example_losses, {"w": DATA.mean(axis=0)}, DATA,
        sampler=LeimkuhlerMatthews(1.0),
        nbeta=50.0, localization=1.0, step_fractions=(0.4,), nbeta_factors=(1.0,),
        localization_factors=(1.0,), num_draws=400, num_burnin=400,
    )  # fmt: skip
    sampler = found.settings["sampler"]
    assert isinstance(sampler, LeimkuhlerMatthews)
    # Half of what SGLD would get, since it takes steps twice as long.
    assert sampler.step_size == pytest.approx(0.4 / (50 + 1) / 2, rel=0.02)
    assert found.relaxation == pytest.approx(1 / (2 * sampler.step_size))
    assert found.grid.control[0].settings["sampler"] == "LeimkuhlerMatthews"
    best = found.grid.estimates[0, 0, 0]
    assert abs(best.mean - 5 / 2 * 50 / 51) < 4 * best.stderr


# --- the sampling program ---------------------------------------------------------------------


def example_losses(params, batch):
    return 0.5 * jnp.sum((params["w"][None] - batch) ** 2, axis=-1)


DATA = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
WEIGHTS = {"w": np.zeros(5, np.float32)}
PLAN = {"num_chains": 4, "num_draws": 6, "num_burnin": 2, "batch_size": 4}


def compiled(caplog):
    return [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]


@each_sampler_slowly
def test_ten_checkpoints_three_settings_and_a_second_call_compile_once(sampler, caplog):
    checkpoints = [(step, {"w": np.full(5, step, np.float32)}) for step in range(10)]

    def sweep(seed, nbeta):
        for scale in (1.0, 0.5, 0.25):
            setting = jax.tree.map(lambda value, scale=scale: value * scale, sampler)
            estimates = estimate_llc_over_checkpoints(
                jax.random.key(seed), example_losses, checkpoints, DATA, sampler=setting,
                nbeta=nbeta, localization=1.0 + scale, checkpoint_batch=4, **PLAN,
            )  # fmt: skip
            assert len(list(estimates)) == 10

    sample.clear_cache()  # both variants of RMSPropSGLD are one program
    before = sample._cache_size()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        sweep(0, 30.0)
        programs = [line for line in compiled(caplog) if "jit(sample)" in line]
        assert len(programs) == 1
        caplog.clear()
        sweep(1, 60.0)
        assert compiled(caplog) == []
    assert sample._cache_size() == before + 1


@pytest.mark.parametrize(
    ("sampler", "thinning"),
    [*((sampler, 1) for sampler in SAMPLERS.values()), (SAMPLERS["SGLD"], 2)],
    ids=[*SAMPLERS, "SGLD, thinned"],
)
def test_no_key_is_used_twice_in_an_estimate(sampler, thinning):
    with jax.debug_key_reuse(True):
        estimate = estimate_llc(
            jax.random.key(0), example_losses, WEIGHTS, DATA, sampler=sampler, nbeta=10.0,
            localization=1.0, thinning=thinning, **PLAN,
        )  # fmt: skip
    assert estimate.num_finite == 4
    assert estimate.settings["sampler"] == type(sampler).__name__
    for name, value in sampler._asdict().items():
        assert estimate.settings[name] == value
    measured = isinstance(sampler, SGLD | MALA)
    assert np.isfinite(estimate.acceptance).all() == measured
    assert np.isfinite(estimate.stability).all()


class Reuser(NamedTuple):
    """SGLD that draws its noise twice from one key."""

    step_size: float

    def init(self, params):
        return SGLD(self.step_size).init(params)

    def step(self, rng_key, state, evaluate, mask):
        state, _ = SGLD(self.step_size).step(rng_key, state, evaluate, mask)
        return SGLD(self.step_size).step(rng_key, state, evaluate, mask)


def reusing_rows(rng_key):
    return jax.random.normal(rng_key, (4, 5)) + jax.random.uniform(rng_key, (4, 5))


@pytest.mark.parametrize("planted", ["sampler", "stream"])
def test_a_planted_reuse_of_keys_is_caught(planted):
    data = Stream(reusing_rows) if planted == "stream" else DATA
    plan = {**PLAN, "batch_size": None if planted == "stream" else 4}
    sampler = Reuser(1e-2) if planted == "sampler" else SGLD(1e-2)
    with jax.debug_key_reuse(True), pytest.raises(KeyReuseError):
        estimate_llc(
            jax.random.key(0), example_losses, WEIGHTS, data, sampler=sampler, nbeta=10.0,
            localization=1.0, **plan,
        )  # fmt: skip


# --- layouts, neighbours, grids, half precision -----------------------------------------------

CHECKPOINTS = [(step, {"w": np.full(5, step / 10, np.float32)}) for step in range(3)]
FIELDS = ("losses", "anchor_losses", "burnin_losses", "distance", "per_chain", "stability")


def over_checkpoints(sampler, **options):
    return dict(
        estimate_llc_over_checkpoints(
            jax.random.key(0), example_losses, CHECKPOINTS, DATA, sampler=sampler, nbeta=10.0,
            localization=1.0, **{**PLAN, **options},
        )
    )  # fmt: skip


def mesh_of(rows, columns):
    devices = np.asarray(jax.devices()[: rows * columns]).reshape(rows, columns)
    auto = jax.sharding.AxisType.Auto
    return jax.sharding.Mesh(devices, (CHECKPOINT, CHAIN), axis_types=(auto, auto))


@each_sampler_slowly
def test_neither_devices_nor_chunks_change_the_numbers(sampler):
    together = over_checkpoints(sampler, num_chains=5, mesh=mesh_of(1, 1))
    layouts = [{"mesh": mesh_of(1, 1), "checkpoint_batch": 3, "chain_batch": 2}]
    if len(jax.devices()) >= 4:
        layouts.append({"mesh": mesh_of(2, 2), "checkpoint_batch": 2})
    for layout in layouts:
        for step, estimate in over_checkpoints(sampler, num_chains=3, **layout).items():
            for field in FIELDS:
                found, expected = (getattr(e, field) for e in (estimate, together[step]))
                # The chains are the same bit by bit; long sums in the measured eigenvalue are not.
                rounding = 1e-5 if field == "stability" else 0
                np.testing.assert_allclose(
                    found, expected[:3], rtol=rounding, atol=0, err_msg=f"{field} {layout}"
                )


def walled_losses(params, batch):
    """`example_losses`, not a number beyond w[0] = wall."""
    lost = jnp.where(params["w"][0] > batch["wall"], jnp.nan, 1.0)
    return example_losses(params, batch["z"]) * lost


def weights_of(params, batch):
    """For `collect`."""
    return params["w"]


@each_sampler_slowly
def test_a_diverged_chain_leaves_its_neighbours_bitwise_alone(sampler):
    def run(wall):
        return estimate_llc(
            jax.random.key(0), walled_losses, WEIGHTS,
            {"z": DATA, "wall": np.full(12, wall, np.float32)}, sampler=sampler, nbeta=10.0,
            localization=1.0, collect=weights_of, mesh=mesh_of(1, 1),
            **{**PLAN, "num_chains": 8, "num_draws": 40},
        )  # fmt: skip

    healthy = run(np.inf)
    reach = healthy.collected[:, :, 0].max(axis=1)
    victim, runner_up = np.argsort(reach)[[-1, -2]]
    wall = np.float32((reach[victim] + reach[runner_up]) / 2)
    assert reach[victim] > wall > reach[runner_up]
    first = int(np.argmax(healthy.collected[victim, :, 0] > wall))
    hurt = run(wall)
    others = np.arange(8) != victim
    if isinstance(sampler, MALA):
        # A proposal beyond the wall has no energy: it is refused, and the chain lives on, but a
        # chain that proposed to go there and was refused anyway is not changed.
        np.testing.assert_array_equal(hurt.diverged_at, -1)
        assert hurt.collected[:, :, 0].max() <= wall
        before = slice(None, first)
        np.testing.assert_array_equal(
            hurt.collected[victim, before], healthy.collected[victim, before]
        )
        np.testing.assert_array_equal(
            hurt.collected[victim, first], hurt.collected[victim, first - 1]
        )
    else:
        np.testing.assert_array_equal(hurt.diverged_at, np.where(others, -1, first))
        assert np.isnan(hurt.per_chain[victim])
        assert np.isnan(hurt.stability[victim])
        assert hurt.mean == healthy.per_chain[others].mean()
    for field in (*FIELDS, "collected"):
        found, expected = (getattr(e, field)[others] for e in (hurt, healthy))
        np.testing.assert_array_equal(found, expected, err_msg=field)


@each_sampler_slowly
def test_a_grid_of_settings_compiles_once_and_equals_its_settings_one_by_one(sampler, caplog):
    options = {**PLAN, "batch_size": 4}
    scale = np.geomspace(0.1, 1, 5).reshape(5, 1, 1)
    nbeta, localization = np.array([[3.0], [10.0], [30.0]]), np.array([0.5, 1.0, 2.0])
    step_size = sampler.step_size * scale
    sample.clear_cache()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        grid = estimate_llc_over_settings(
            jax.random.key(0), example_losses, WEIGHTS, DATA,
            sampler=sampler._replace(step_size=step_size), nbeta=nbeta, localization=localization,
            step=7, **options,
        )  # fmt: skip
    assert len([line for line in compiled(caplog) if "jit(sample)" in line]) == 1
    assert grid.shape == (5, 3, 3)
    assert len({estimate.mean for estimate in grid.flat}) == 45
    for index in [(0, 0, 0), (4, 2, 2), (2, 1, 0), (3, 0, 2), (1, 2, 1)]:
        i, j, k = index
        setting = sampler._replace(step_size=float(step_size[i, 0, 0]))
        alone = estimate_llc(
            jax.random.key(0), example_losses, WEIGHTS, DATA, sampler=setting,
            nbeta=float(nbeta[j, 0]), localization=float(localization[k]), step=7, **options,
        )  # fmt: skip
        assert grid[index].settings == alone.settings
        for field in FIELDS:
            np.testing.assert_allclose(
                getattr(grid[index], field), getattr(alone, field), rtol=1e-4, atol=1e-5,
                err_msg=field,
            )  # fmt: skip


@each_sampler
@pytest.mark.slow
def test_half_precision_weights_are_sampled_as_such(sampler):
    half = {"w": jnp.full(5, 0.25, jnp.bfloat16)}
    full = {"w": np.full(5, 0.25, np.float32)}
    halved, whole = (
        estimate_llc(
            jax.random.key(0), wide_losses, params, DATA, sampler=sampler, nbeta=10.0,
            localization=1.0, collect=weights_of, mesh=mesh_of(1, 1), **PLAN,
        )
        for params in (half, full)
    )  # fmt: skip
    assert halved.collected.dtype == jnp.bfloat16
    assert whole.collected.dtype == np.float32
    # One rounding to eight digits per step, which the pull of the posterior does not amplify.
    away = np.max(np.abs(halved.collected.astype(np.float32) - whole.collected))
    assert 0 < away < 8 * 2**-8 * np.max(np.abs(whole.collected))
    assert halved.losses.dtype == np.float32
    assert halved.stability == pytest.approx(whole.stability, rel=0.05)


def wide_losses(params, batch):
    """`example_losses` with a sum in float32."""
    return example_losses({"w": params["w"].astype(jnp.float32)}, batch)


# --- models of any make -----------------------------------------------------------------------

INPUTS = np.random.default_rng(1).normal(size=(12, 3)).astype(np.float32)
TARGETS = np.random.default_rng(2).normal(size=(12, 2)).astype(np.float32)
KERNEL = np.random.default_rng(3).normal(size=(3, 2)).astype(np.float32)
BIAS = np.array([0.5, -0.25], np.float32)

LINEN = nn.Dense(2)
GRAPH, STATE = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))


def squares(outputs, batch):
    return jnp.sum((outputs - batch["y"]) ** 2, axis=-1)


def linen_loss(params, batch):
    return squares(LINEN.apply(params, batch["x"]), batch)


def nnx_loss(params, batch):
    return squares(nnx.merge(GRAPH, params)(batch["x"]), batch)


def dict_loss(params, batch):
    return squares(batch["x"] @ params["kernel"] + params["bias"][None], batch)


def state_with_our_weights():
    weights = {"bias": BIAS, "kernel": KERNEL}
    leaves, structure = jax.tree.flatten(STATE)
    assert [leaf.shape for leaf in leaves] == [w.shape for w in jax.tree.leaves(weights)]
    return jax.tree.unflatten(structure, jax.tree.leaves(weights))


def test_linen_nnx_and_plain_models_give_the_same_numbers():
    weights = {"bias": BIAS, "kernel": KERNEL}
    makes = {
        "linen": (linen_loss, {"params": weights}),
        "nnx": (nnx_loss, state_with_our_weights()),
        "dict": (dict_loss, weights),
    }
    estimates = {
        make: estimate_llc(
            jax.random.key(0), loss, params, {"x": INPUTS, "y": TARGETS}, sampler=SGLD(1e-2),
            nbeta=5.0, localization=1.0, num_probes=0, **PLAN,
        )
        for make, (loss, params) in makes.items()
    }  # fmt: skip
    for make in ("linen", "nnx"):
        for field in ("losses", "anchor_losses", "distance", "init_loss"):
            np.testing.assert_allclose(
                getattr(estimates[make], field), getattr(estimates["dict"], field), rtol=1e-5,
                err_msg=f"{make} {field}",
            )  # fmt: skip
    initial = np.mean(np.sum((INPUTS.astype(float) @ KERNEL + BIAS - TARGETS) ** 2, axis=1))
    assert estimates["dict"].init_loss == pytest.approx(initial, rel=1e-5)
