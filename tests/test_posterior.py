"""The localized tempered posterior: its gradient, its mask, its noise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llc_jax import default_nbeta
from llc_jax.losses import loss_and_grad, losses_of, mean_loss
from llc_jax.observables import Draw, LossTerms
from llc_jax.sampling.posterior import LocalPosterior, evaluate
from llc_jax.trees import apply_mask, at_least_float32, displacement, standard_normal_like


def regression_loss(params, batch):
    """½ (x·w + b - y)²; exact in float32 for small integers."""
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return 0.5 * error**2


def integers(seed, *shape):
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


REGRESSION = {"x": integers(0, 8, 3), "y": integers(1, 8)}
WEIGHTS = {"w": integers(2, 3), "b": np.float32(2)}


def tanh_loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["in"]["kernel"] + params["in"]["bias"][None])
    return jnp.square(hidden @ params["out"] - batch["y"])


def tanh_params(seed):
    rng = np.random.default_rng(seed)
    shapes = {"in": {"kernel": (3, 4), "bias": (4,)}, "out": (4,)}
    return jax.tree.map(
        lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=lambda s: type(s) is tuple
    )


def energy(params, anchor, nbeta, localization):
    """U(w) = nbeta L(w) + localization/2 |w - w*|², written without the library."""
    away = jax.tree.map(lambda w, a: jnp.sum((w - a) ** 2), params, anchor)
    loss = jnp.mean(tanh_loss(params, REGRESSION))
    return nbeta * loss + localization / 2 * sum(jax.tree.leaves(away))


def converts_float16():
    """Not where the F16C instructions are missing: XLA's substitute is (openxla/xla#6787)."""
    try:
        return bool(jnp.float16(1.0).astype(jnp.float32) == 1)
    except jax.errors.JaxRuntimeError:
        return False


half_precisions = [
    jnp.bfloat16,
    pytest.param(
        jnp.float16,
        marks=pytest.mark.skipif(not converts_float16(), reason="XLA converts no float16 here"),
    ),
]


@pytest.mark.parametrize("n", [2, 3, 1000, 1_000_000])
def test_default_nbeta_is_n_over_log_n(n):
    assert default_nbeta(n) / n == pytest.approx(1 / math.log(n), rel=1e-15)


@pytest.mark.parametrize("n", [1, 0, -5])
def test_default_nbeta_refuses_sizes_without_a_logarithm(n):
    with pytest.raises(ValueError, match=rf"n >= 2, got {n}: give nbeta"):
        default_nbeta(n)


def test_mean_loss_is_taken_in_float32():
    losses = jnp.asarray([1.0, 1.0078125], jnp.bfloat16)  # their mean is no bfloat16
    mean = mean_loss(lambda params, batch: losses, None, None)
    assert mean.dtype == jnp.float32
    assert mean == 1.00390625


@pytest.mark.parametrize("grad_accum", [1, 2, 4, 8])
def test_accumulated_loss_and_gradient_equal_those_of_the_whole_batch(grad_accum):
    # Small integers: every sum is exact in float32, so equal means equal.
    loss, grad, _ = loss_and_grad(regression_loss, WEIGHTS, REGRESSION, grad_accum)
    x, y = REGRESSION["x"].astype(np.float64), REGRESSION["y"].astype(np.float64)
    error = x @ WEIGHTS["w"] + WEIGHTS["b"] - y
    assert loss == 0.5 * np.mean(error**2)
    np.testing.assert_array_equal(grad["w"], x.T @ error / len(y))
    assert grad["b"] == error.mean()


@pytest.mark.parametrize("grad_accum", [1, 4])
def test_gradients_of_half_precision_weights_are_accumulated_in_float32(grad_accum):
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), WEIGHTS)
    data = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), REGRESSION)
    loss, grad, _ = loss_and_grad(regression_loss, half, data, grad_accum)
    assert {x.dtype for x in jax.tree.leaves((loss, grad))} == {jnp.dtype(jnp.float32)}
    _, full, _ = loss_and_grad(regression_loss, WEIGHTS, REGRESSION, 1)
    # 2^-8 is the rounding of bfloat16, in which each micro-batch is differentiated.
    scale = np.max(np.abs(full["w"]))
    np.testing.assert_allclose(grad["w"], full["w"], atol=4 * 2**-8 * scale)


@pytest.mark.parametrize(("nbeta", "localization"), [(1.0, 0.0), (0.0, 3.0), (120.0, 7.0)])
def test_drift_is_the_gradient_of_the_negative_log_posterior(nbeta, localization):
    params, anchor = tanh_params(0), tanh_params(1)
    posterior = LocalPosterior(anchor, jnp.float32(nbeta), jnp.float32(localization))
    here = evaluate(tanh_loss, posterior, params, REGRESSION)
    expected = jax.grad(energy)(params, anchor, nbeta, localization)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), here.drift, expected)
    loss_gradient = jax.grad(energy)(params, anchor, 1.0, 0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), here.grad, loss_gradient)
    assert here.loss == pytest.approx(float(energy(params, anchor, 1.0, 0.0)), rel=1e-6)


@pytest.mark.parametrize(("nbeta", "localization"), [(1.0, 0.0), (0.0, 3.0), (120.0, 7.0)])
def test_energy_is_the_negative_log_posterior_above_the_anchor(nbeta, localization):
    params, anchor = tanh_params(0), tanh_params(1)
    anchor_losses = losses_of(tanh_loss, anchor, REGRESSION)
    anchor_loss = mean_loss(tanh_loss, anchor, REGRESSION)
    scalars = jnp.float32(nbeta), jnp.float32(localization)
    posterior = LocalPosterior(anchor, *scalars)
    here = evaluate(tanh_loss, posterior, params, REGRESSION, anchor_losses=anchor_losses)
    expected = energy(params, anchor, nbeta, localization) - nbeta * anchor_loss
    assert here.energy == pytest.approx(float(expected), rel=1e-5)
    # Losses of small integers have no rounding, whoever multiplies: nothing is left at the anchor.
    exact = losses_of(regression_loss, WEIGHTS, REGRESSION)
    posterior = LocalPosterior(WEIGHTS, *scalars)
    start = evaluate(regression_loss, posterior, WEIGHTS, REGRESSION, anchor_losses=exact)
    assert start.energy == 0.0
    assert here.nbeta == nbeta
    # Only what is sampled is pulled; the loss is that of all weights.
    mask = {"in": {"kernel": 0, "bias": 1}, "out": np.array([1, 0, 0, 1])}
    posterior = LocalPosterior(anchor, *scalars, mask)
    held = evaluate(tanh_loss, posterior, params, REGRESSION, anchor_losses=anchor_losses)
    away = [
        params["in"]["bias"] - anchor["in"]["bias"],
        (params["out"] - anchor["out"])[np.array([0, 3])],
    ]
    pull = localization / 2 * sum(np.sum(np.float64(x) ** 2) for x in away)
    gap = nbeta * (float(here.loss) - float(anchor_loss))
    assert held.energy == pytest.approx(gap + pull, rel=1e-5, abs=1e-5)
    assert held.energy.dtype == jnp.float32


def test_a_mask_zeroes_gradient_and_drift_and_leaves_the_rest_alone():
    params, anchor = tanh_params(0), tanh_params(1)
    mask = {"in": {"kernel": np.arange(12).reshape(3, 4) % 2, "bias": 1.0}, "out": False}
    scalars = jnp.float32(30.0), jnp.float32(2.0)
    free = evaluate(tanh_loss, LocalPosterior(anchor, *scalars), params, REGRESSION)
    held = evaluate(tanh_loss, LocalPosterior(anchor, *scalars, mask), params, REGRESSION)
    assert held.loss == free.loss

    def check(m, with_mask, without):
        np.testing.assert_array_equal(with_mask, np.where(m != 0, without, 0.0))

    jax.tree.map(check, mask, held.grad, free.grad)
    jax.tree.map(check, mask, held.drift, free.drift)


def test_a_masked_nan_does_not_leak():
    # The derivative of sqrt at 0 is infinite, and the anchor of `b` is not a number.
    def loss(params, batch):
        return batch * params["a"] ** 2 + 0.0 * jnp.sqrt(params["b"])

    params = {"a": jnp.float32(2.0), "b": jnp.float32(0.0)}
    anchor = {"a": jnp.float32(1.0), "b": jnp.float32(np.nan)}
    batch = jnp.ones(4)
    scalars = jnp.float32(10.0), jnp.float32(3.0)
    assert np.isnan(evaluate(loss, LocalPosterior(anchor, *scalars), params, batch).drift["b"])
    posterior = LocalPosterior(anchor, *scalars, {"a": 1, "b": 0})
    held = evaluate(loss, posterior, params, batch)
    assert held.grad == {"a": 4.0, "b": 0.0}
    assert held.drift == {"a": 10.0 * 4.0 + 3.0 * 1.0, "b": 0.0}


def test_no_mask_is_the_identity():
    tree = tanh_params(0)
    assert apply_mask(None, tree) is tree


@pytest.mark.parametrize("dtype", [*half_precisions, jnp.float32])
def test_displacement_is_exact_in_at_least_float32(dtype):
    # 1 + 2^-7 and 2^-20 have no common half-precision grid: a difference in `dtype` would round.
    w, a = jnp.asarray([1.0078125, 2.0], dtype), jnp.asarray([2**-20, 1.0], dtype)
    away = displacement({"w": w}, {"w": a})["w"]
    assert away.dtype == jnp.float32
    np.testing.assert_array_equal(away, np.float32(w) - np.float32(a))
    assert at_least_float32(w).dtype == jnp.float32


def test_noise_is_standard_normal_and_independent_between_leaves():
    size = 100_000
    tree = {"a": np.zeros(size, np.float32), "b": {"c": np.zeros((size // 10, 10), np.float32)}}
    noise = standard_normal_like(jax.random.key(0), tree)
    assert jax.tree.map(np.shape, noise) == jax.tree.map(np.shape, tree)
    a, b = (np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(noise))
    for x in (a, b):
        # E z^k and Var z^k of N(0, 1), k = 1..4.
        for power, (mean, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
            assert abs(np.mean(x**power) - mean) < 4 * math.sqrt(variance / size)
    for left, right in [(a, b), (a, np.roll(b, 1)), (a, np.roll(a, 1)), (a**2 - 1, b**2 - 1)]:
        correlation = np.mean(left * right) / (left.std() * right.std())
        assert abs(correlation) < 4 / math.sqrt(size)


def test_equal_shaped_leaves_and_other_keys_get_other_noise():
    tree = [np.zeros(5, np.float32)] * 3
    first, second = (standard_normal_like(jax.random.key(seed), tree) for seed in (0, 1))
    values = np.concatenate([np.ravel(x) for x in first + second])
    assert len(np.unique(values)) == values.size


@pytest.mark.parametrize("dtype", half_precisions)
def test_noise_has_the_dtype_of_each_leaf(dtype):
    tree = {"half": jnp.zeros((3, 2), dtype), "scalar": jnp.float32(0)}
    noise = standard_normal_like(jax.random.key(0), tree)
    described = jax.tree.map(lambda x: (x.shape, x.dtype), noise)
    assert described == jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    all_half = standard_normal_like(jax.random.key(0), {"half": tree["half"]})
    assert all_half["half"].dtype == dtype


def test_gaps_keep_the_digits_of_single_examples_beside_a_large_constant():
    # Near 2^15 neighbours in float32 are 2^-8 apart: these losses are exact, their mean is not.
    unit, constant = np.float32(2.0**-8), np.float32(2.0**15)
    anchor_losses = jnp.full(3, constant)

    def shifted(params, batch):
        return anchor_losses + unit * batch * params["w"]

    batch, params = jnp.asarray([1.0, 0.0, 0.0]), {"w": jnp.float32(1)}
    loss, _, gap = loss_and_grad(shifted, params, batch, anchor_losses=anchor_losses)
    assert gap == unit / np.float32(3)
    assert float(loss) - float(constant) in (0.0, float(unit))
    terms = LossTerms(lambda p, b: jnp.stack([shifted(p, b), -shifted(p, b)], axis=1))
    here = LocalPosterior({"w": jnp.float32(0)}, None, None)
    draw = Draw(shifted, here, params, batch, None, None, loss, None, gap, chunk=3)
    np.testing.assert_array_equal(terms.record(None, draw), gap * np.array([1, -1], np.float32))
