"""Singular losses: every sampler against quadrature, row by row of a published table, and NUTS.

K(x, y) = ½ x^2a y^2b tempered by nbeta and localized by 1 has no Gaussian limit. All rows are
sampled at once, as independent coordinates of one loss whose exponents are data; what each of
them adds to the estimate is collected.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import assert_chains_agree, assert_within_4_stderr

from llc_jax import BAOAB, MALA, SGLD, SGNHT, estimate_llc, estimate_llc_over_settings
from llc_jax.diagnostics import mean_stderr

ROWS = [(1, 0), (1, 1), (1, 2), (2, 2), (1, 3), (3, 3), (2, 0)]
NBETA = [10.0, 100.0]
# nbeta E[K] to four digits, by an independent quadrature; the last row is the quartic ½ x⁴.
TABLE = np.array([
    [0.4545, 0.2626, 0.1604, 0.1137, 0.1138, 0.0703, 0.2154],
    [0.4950, 0.3388, 0.1976, 0.1405, 0.1346, 0.0838, 0.2384],
])  # fmt: skip
POWERS = {
    name: np.eye(4, dtype=np.float32)[[row[axis] for row in ROWS]]
    for axis, name in enumerate(("x", "y"))
}


def even_power(w, one_hot):
    """w^0, w², w⁴ or w⁶, whichever is chosen; polynomials have no trouble at w < 0."""
    square = w**2
    choices = jnp.stack([jnp.ones_like(w), square, square**2, square**3], axis=-1)
    return jnp.sum(choices * one_hot, axis=-1)


def crossings(params, batch):
    """K of every row, [copy, row]."""
    factors = [even_power(params[name], batch[name][0][None]) for name in ("x", "y")]
    return 0.5 * factors[0] * factors[1]


def sum_of_crossings(params, batch):
    return jnp.sum(crossings(params, batch), keepdims=True).reshape(1)


def each_row(params, batch):
    """For `collect`: K of every row, averaged over the copies."""
    return jnp.mean(crossings(params, batch), axis=0)


def curvature_moments(a, b, nbeta):
    """nbeta E[K], and its derivative by the step size of the Euler scheme (test_llc.py)."""
    # x = sinh-spaced, since the arms of the crossing are thin and long.
    axis = np.sinh(np.linspace(-5.5, 5.5, 1001))
    axis *= 9 / axis[-1]
    x, y = axis[:, None], (axis[None] if b else np.zeros((1, 1)))
    volume = np.gradient(axis)[:, None] * (np.gradient(axis)[None] if b else 1.0)
    potential = nbeta * 0.5 * x ** (2 * a) * y ** (2 * b)
    weight = np.exp(-potential - (x**2 + y**2) / 2) * volume
    weight /= weight.sum()
    slope_x = nbeta * a * x ** (2 * a - 1) * y ** (2 * b) + x
    slope_y = (nbeta * b * x ** (2 * a) * y ** (2 * b - 1) if b else 0.0) + y
    bend = nbeta * a * (2 * a - 1) * x ** (2 * a - 2) * y ** (2 * b) + 2
    if b:
        bend = bend + nbeta * b * (2 * b - 1) * x ** (2 * a) * y ** (2 * b - 2)
    tilt = (slope_x**2 + slope_y**2) / 4 - bend / 2
    value = np.sum(weight * potential)
    return value, np.sum(weight * (potential - value) * tilt) / 2


@functools.cache
def quadrature():
    """(values, their derivatives by the step size), each [nbeta, row]."""
    found = [[curvature_moments(a, b, nbeta) for a, b in ROWS] for nbeta in NBETA]
    return np.moveaxis(np.array(found), -1, 0)


def test_the_table_is_reproduced_by_quadrature():
    np.testing.assert_allclose(quadrature()[0], TABLE, atol=6e-5)
    # None of them is the coefficient of the limit nbeta -> infinity, min(1/2a, 1/2b).
    limit = np.array([0.5, 0.5, 0.25, 0.25, 1 / 6, 1 / 6, 0.25])
    assert np.all(TABLE[1, [1, 2, 3, 4, 5]] < 0.85 * limit[[1, 2, 3, 4, 5]])


RUNS = {
    # sampler: (sampler, copies, chains, burn-in, draws, thinning)
    # In the thin arms the curvature is nbeta y^6: steps this small leave none of them unstable.
    "BAOAB": (BAOAB(2.5e-5, 2.0), 8, 64, 50, 600, 40),
    "SGNHT": (SGNHT(2.5e-5, 2.0), 16, 32, 50, 600, 40),
    "SGLD": (SGLD(4e-4), 8, 64, 150, 1000, 50),
    "MALA": (MALA(2e-3), 1, 256, 150, 750, 25),
}


SLOW = ("SGNHT", "MALA", "BAOAB")  # about half a minute each


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RUNS]
)
def test_singular_losses_agree_with_quadrature(name):
    sampler, copies, chains, burnin, draws, thinning = RUNS[name]
    start = {axis: np.zeros((copies, len(ROWS)), np.float32) for axis in ("x", "y")}
    data = {axis: powers[None] for axis, powers in POWERS.items()}
    estimates = estimate_llc_over_settings(
        jax.random.key(0), sum_of_crossings, start, data, sampler=sampler, nbeta=NBETA,
        localization=1.0, num_chains=chains, num_burnin=burnin, num_draws=draws,
        thinning=thinning, collect=each_row,
    )  # fmt: skip
    values, slopes = quadrature()
    for nbeta, estimate, exact, slope in zip(NBETA, estimates, values, slopes, strict=True):
        rows = nbeta * estimate.collected[:, burnin:].mean(axis=1, dtype=np.float64)
        for row, value, bias in zip(rows.T, exact, slope, strict=True):
            if name == "SGLD":  # first order in the step size, where it is not below the error
                value = value + sampler.step_size * bias
            assert_chains_agree(row, value, most=0.02)
        # What is reported is the sum of what was collected.
        np.testing.assert_allclose(estimate.per_chain, copies * rows.sum(axis=1), rtol=1e-3)
        assert estimate.num_finite == chains


@pytest.mark.slow
def test_nuts_agrees_where_there_is_no_formula():
    # A tanh network of five weights at a point where it is not identifiable: no quadrature.
    from numpyro.infer import MCMC, NUTS

    nbeta = 40.0

    def potential(w):
        return nbeta * jnp.mean(tiny_network(w, TINY_DATA)) + jnp.sum(w**2) / 2

    with jax.numpy_dtype_promotion("standard"):
        chains = MCMC(
            NUTS(potential_fn=potential), num_warmup=1000, num_samples=10_000, num_chains=8,
            chain_method="vectorized", progress_bar=False,
        )  # fmt: skip
        start = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32) / 4
        chains.run(jax.random.key(0), init_params=start)
        draws = chains.get_samples(group_by_chain=True)
        losses = jax.vmap(jax.vmap(lambda w: jnp.mean(tiny_network(w, TINY_DATA))))(draws)
    gaps = nbeta * np.asarray(losses, np.float64)  # the loss of the anchor is 0
    oracle, error = gaps.mean(), mean_stderr(gaps)
    for sampler in (MALA(0.05), BAOAB(1e-2, 2.0)):
        estimate = estimate_llc(
            jax.random.key(1), tiny_network, np.zeros(5, np.float32), TINY_DATA, sampler=sampler,
            nbeta=nbeta, localization=1.0, num_chains=64, num_burnin=200, num_draws=2000,
            thinning=10,
        )  # fmt: skip
        assert math.hypot(estimate.stderr, error) < 0.01 * oracle
        assert_within_4_stderr(estimate.mean, oracle, math.hypot(estimate.stderr, error))


TINY_DATA = np.random.default_rng(5).normal(size=(16, 1)).astype(np.float32)


def tiny_network(w, batch):
    """½ (w4 tanh(w0 x + w1) + w2 tanh(w3 x))², whose zeros are a union of planes."""
    x = batch[:, 0]
    return 0.5 * (w[4] * jnp.tanh(w[0] * x + w[1]) + w[2] * jnp.tanh(w[3] * x)) ** 2
