"""SGLD: one step by hand, its convention, its Metropolis ratio."""

import math

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llc_jax import SGLD
from llc_jax.samplers import langevin
from llc_jax.sampling.posterior import LocalPosterior, evaluate
from llc_jax.trees import standard_normal_like

DIM = 6
CURVATURE = np.linspace(0.25, 1.5, DIM, dtype=np.float32)
EPS32 = float(np.finfo(np.float32).eps)


def quadratic(params, batch):
    """½ Σ h w², once per example."""
    return batch * 0.5 * jnp.sum(CURVATURE * params["w"] ** 2)


def quartic(params, batch):
    return batch * jnp.sum(params["w"] ** 4 + 0.5 * params["w"])


def posterior(anchor, nbeta, localization, mask=None, loss=quadratic):
    def at(params):
        scalars = jnp.float32(nbeta), jnp.float32(localization)
        return evaluate(loss, LocalPosterior(anchor, *scalars, mask), params, jnp.ones(1))

    return at


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_one_step_by_hand():
    step_size, nbeta, localization = 0.02, 11.0, 3.0
    w, anchor, key = normal(0, DIM), normal(1, DIM), jax.random.key(5)
    state = SGLD(step_size).init({"w": w})
    new, here = SGLD(step_size).step(
        key, state, posterior({"w": anchor}, nbeta, localization), None
    )
    drift = nbeta * CURVATURE.astype(np.float64) * w + localization * (w.astype(float) - anchor)
    xi = standard_normal_like(key, {"w": w})["w"]
    by_hand = w - step_size / 2 * drift + math.sqrt(step_size) * np.float64(xi)
    np.testing.assert_allclose(new.params["w"], by_hand, rtol=1e-5, atol=1e-6)
    # The evaluation returned is that of the point before the step.
    assert here.loss == pytest.approx(float(0.5 * np.sum(CURVATURE * w**2)), rel=1e-6)
    np.testing.assert_allclose(here.drift["w"], drift, rtol=1e-5)


def test_noise_of_a_step_has_variance_step_size():
    size, step_size = 100_000, 0.3
    params = {"w": np.zeros(size, np.float32)}
    flat = posterior(params, 0.0, 0.0, loss=lambda p, b: 0.0 * b * jnp.sum(p["w"]))
    new, _ = SGLD(step_size).step(jax.random.key(0), SGLD(step_size).init(params), flat, None)
    noise = np.asarray(new.params["w"], np.float64)
    assert abs(noise.mean()) < 4 * math.sqrt(step_size / size)
    assert abs(noise.var() / step_size - 1) < 4 * math.sqrt(2 / size)


def test_without_noise_it_is_gradient_descent(monkeypatch):
    monkeypatch.setattr(
        langevin, "standard_normal_like", lambda key, tree: jax.tree.map(jnp.zeros_like, tree)
    )
    step_size, nbeta = 0.01, 25.0
    params = {"w": normal(0, DIM)}
    sampler, at = SGLD(step_size), posterior(params, nbeta, 0.0)
    descent = optax.sgd(step_size / 2 * nbeta)
    state, (expected, memory) = sampler.init(params), (params, descent.init(params))
    for step in range(20):
        state, _ = sampler.step(jax.random.key(step), state, at, None)
        gradient = jax.grad(lambda p: quadratic(p, jnp.float32(1)))(expected)
        updates, memory = descent.update(gradient, memory)
        expected = optax.apply_updates(expected, updates)
    np.testing.assert_allclose(state.params["w"], expected["w"], rtol=1e-5)
    # and in closed form: (1 - step_size nbeta h / 2)^20
    shrink = (1 - step_size / 2 * nbeta * CURVATURE.astype(np.float64)) ** 20
    np.testing.assert_allclose(state.params["w"], shrink * params["w"], rtol=1e-5)


def test_a_step_of_zero_does_not_move():
    params = {"w": normal(0, DIM)}
    at = posterior({"w": normal(1, DIM)}, 50.0, 2.0)
    new, _ = SGLD(0.0).step(jax.random.key(0), SGLD(0.0).init(params), at, None)
    np.testing.assert_array_equal(new.params["w"], params["w"])


def test_blackjax_takes_half_of_our_step_size():
    # Same key, same flat draw of noise: the two kernels agree to rounding, or the convention of
    # one of them has changed.
    step_size, nbeta, localization = 0.04, 7.0, 2.0
    params, anchor, key = {"w": normal(0, DIM)}, {"w": normal(1, DIM)}, jax.random.key(3)

    def log_density_gradient(position, _):
        drift = nbeta * CURVATURE * position["w"] + localization * (position["w"] - anchor["w"])
        return {"w": -drift}

    ours, _ = SGLD(step_size).step(
        key, SGLD(step_size).init(params), posterior(anchor, nbeta, localization), None
    )
    theirs = blackjax.sgld(log_density_gradient)
    half = theirs.step(key, params, None, step_size / 2)
    np.testing.assert_allclose(ours.params["w"], half["w"], rtol=1e-5, atol=1e-6)
    same = theirs.step(key, params, None, step_size)
    assert np.max(np.abs(ours.params["w"] - same["w"])) > 0.05


def test_half_precision_in_half_precision_out():
    # The step is taken in float32 and rounded once at the end.
    w = jnp.asarray(normal(0, DIM), jnp.bfloat16)
    params = {"w": w, "v": normal(1, DIM)}

    def loss(p, batch):
        return batch * (0.5 * jnp.sum(p["w"].astype(jnp.float32) ** 2) + 0.5 * jnp.sum(p["v"] ** 2))

    sampler, key = SGLD(1e-2), jax.random.key(0)
    at = posterior(params, 3.0, 0.0, loss=loss)
    new, here = sampler.step(key, sampler.init(params), at, None)
    assert new.params["w"].dtype == jnp.bfloat16
    assert new.params["v"].dtype == jnp.float32
    assert here.drift["w"].dtype == jnp.float32
    xi = standard_normal_like(key, here.drift)["w"]
    unrounded = np.float64(w) - 5e-3 * 3.0 * np.float64(w) + 0.1 * np.float64(xi)
    # Half a unit in the last place of bfloat16 is 2^-8 of the value at most.
    assert np.all(np.abs(np.float64(new.params["w"]) - unrounded) <= 1.01 * 2**-8 * abs(unrounded))


@pytest.mark.parametrize("kind", [bool, np.int32, np.float32])
def test_masked_weights_never_move(kind):
    # An inner mask, a scalar mask, and a held weight whose gradient is not a number.
    def loss(p, batch):
        return batch * (jnp.sum(p["w"] ** 2) + p["v"] @ p["v"] + 0.0 * jnp.sqrt(p["bad"]))

    params = {
        "w": normal(0, DIM),
        "v": jnp.asarray(normal(1, 3)),
        "bad": jnp.float32(0.0),
        "half": jnp.asarray(normal(2, 4), jnp.bfloat16),
    }
    inner = (np.arange(DIM) % 2).astype(kind)
    mask = {"w": inner, "v": kind(1), "bad": kind(0), "half": kind(0)}
    anchor = jax.tree.map(lambda x: x + jnp.ones_like(x), params)
    sampler = SGLD(1e-2)
    at = posterior(anchor, 5.0, 1.0, mask, loss)

    @jax.jit
    def run(keys):
        step = lambda state, key: (sampler.step(key, state, at, mask)[0], None)  # noqa: E731
        return jax.lax.scan(step, sampler.init(params), keys)[0].params

    end = run(jax.random.split(jax.random.key(0), 50))
    same = jax.tree.map(lambda a, b: np.asarray(a) == np.asarray(b), params, end)
    np.testing.assert_array_equal(same["w"], inner == 0)
    assert not same["v"].any()
    assert same["bad"]
    assert same["half"].all()


def acceptance_of_a_move(step_size, nbeta, localization, w, w_new, anchor, loss, mask=None):
    """`SGLD.log_acceptance` of the move w -> w_new, from the library's own evaluations."""
    at = posterior({"w": anchor}, nbeta, localization, mask, loss)
    here, there = at({"w": w}), at({"w": w_new})
    return float(SGLD(step_size).log_acceptance({"w": w_new - w}, here, there))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("step_size", "nbeta", "localization"), [(0.01, 20.0, 1.0), (0.3, 5.0, 0.0), (1e-3, 500.0, 9.0)]
)
def test_log_acceptance_on_a_gaussian_is_the_closed_form(seed, step_size, nbeta, localization):
    stiffness = nbeta * CURVATURE.astype(np.float64) + localization
    x = normal(seed, DIM) / np.sqrt(stiffness).astype(np.float32)
    move = math.sqrt(step_size) * normal(seed + 100, DIM) - step_size / 2 * stiffness * x
    x_new = (x + move).astype(np.float32)
    got = acceptance_of_a_move(
        step_size, nbeta, localization, x, x_new, np.zeros_like(x), quadratic
    )
    before, after = np.float64(x) ** 2, np.float64(x_new) ** 2
    expected = np.sum(step_size * stiffness**2 / 8 * (before - after))
    # Each of the terms that cancel is of the size of the energies.
    size = np.sum(stiffness * (before + after)) + abs(expected)
    assert abs(got - expected) < 8 * EPS32 * size


@pytest.mark.parametrize("seed", range(4))
def test_log_acceptance_is_the_textbook_ratio(seed):
    # log π(w') q(w|w') - log π(w) q(w'|w), written out in float64 with a gradient by hand.
    step_size, nbeta, localization = 0.05, 3.0, 2.0
    w, w_new, anchor = (normal(3 * seed + i, DIM) for i in range(3))

    def log_density(v):
        loss = np.sum(v**4 + 0.5 * v)
        return -nbeta * loss - localization / 2 * np.sum((v - anchor.astype(float)) ** 2)

    def log_proposal(to, at):
        drift = nbeta * (4 * at**3 + 0.5) + localization * (at - anchor.astype(float))
        return -np.sum((to - at + step_size / 2 * drift) ** 2) / (2 * step_size)

    a, b = w.astype(np.float64), w_new.astype(np.float64)
    expected = log_density(b) + log_proposal(a, b) - log_density(a) - log_proposal(b, a)
    got = acceptance_of_a_move(step_size, nbeta, localization, w, w_new, anchor, quartic)
    terms = [log_density(a), log_density(b), log_proposal(a, b), log_proposal(b, a)]
    assert abs(got - expected) < 16 * EPS32 * sum(map(abs, terms))
