"""Hessian products, Lanczos, traces and the Gaussian LLC, against dense linear algebra."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import llc_jax
from experiments.benchmarks.compile_once import compilations
from llc_jax import curvature
from llc_jax.curvature.lanczos import lanczos, ritz_values
from llc_jax.curvature.over_checkpoints import Curvature, curvature_over_checkpoints

KEY = jax.random.key(0)
N = 50


def net_loss(params, batch):
    """A small network whose Hessian has both signs."""
    hidden = jnp.tanh(batch["x"] @ params["a"] + params["bias"][None])
    return (hidden @ params["b"] - batch["y"]) ** 2


def net(width=6, seed=0, scale=1.0):
    a, b, bias = jax.random.split(jax.random.key(seed), 3)
    return {
        "a": scale * jax.random.normal(a, (4, width)),
        "b": scale * jax.random.normal(b, (width,)),
        "bias": 0.1 * jax.random.normal(bias, (width,)),
    }


def net_data(n=N):
    x = jax.random.normal(jax.random.key(99), (n, 4))
    return {"x": x, "y": jnp.sin(x[:, 0]) * x[:, 1]}


def dense(loss_fn, params, data):
    """The Hessian of the mean loss as a matrix, in the order of the flattened pytree."""
    flat, unravel = ravel_pytree(params)
    hessian = jax.hessian(lambda w: jnp.mean(loss_fn(unravel(w), data)))(flat)
    return np.asarray(hessian, np.float64)


def matrix(eigenvalues, seed=0):
    """A symmetric matrix with a prescribed spectrum, as a `Partial` with the matrix traced."""
    d = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))
    return jax.tree_util.Partial(multiply, jnp.asarray((q * eigenvalues) @ q.T, jnp.float32))


def multiply(a, v):
    return a @ v


def quadratic_loss(params, batch):
    """½ h x² summed, one row of curvatures per example."""
    return 0.5 * jnp.sum(batch * params["x"][None] ** 2, axis=-1)


# --- Hessian-vector products ------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [None, 1, 7, 25, 49, 50, 1000])
def test_hvp_is_the_hessian_times_a_vector(micro_batch):
    params, data = net(), net_data()
    vector, unravel = ravel_pytree(net(seed=5))
    matvec = curvature.hvp(net_loss, params, data, micro_batch=micro_batch)
    product, _ = ravel_pytree(matvec(unravel(vector)))
    expected = dense(net_loss, params, data) @ np.asarray(vector, np.float64)
    np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("micro_batch", [None, 7])
def test_masked_product_is_that_of_the_block(micro_batch):
    params, data = net(), net_data()
    mask = {"a": np.arange(24).reshape(4, 6) % 2, "b": 1, "bias": 0}
    whole = {name: np.broadcast_to(mask[name], params[name].shape) for name in params}
    chosen = np.asarray(ravel_pytree(whole)[0], np.float64)
    vector, unravel = ravel_pytree(net(seed=5))
    matvec = curvature.hvp(net_loss, params, data, micro_batch=micro_batch, mask=mask)
    product, _ = ravel_pytree(matvec(unravel(vector)))
    hessian = chosen[:, None] * dense(net_loss, params, data) * chosen
    np.testing.assert_allclose(product, hessian @ np.asarray(vector), rtol=1e-4, atol=1e-5)
    assert np.all(np.asarray(product)[chosen == 0] == 0)
    # Nothing of the held weights is left in the spectrum: no spurious eigenvalues 0.
    count = int(chosen.sum())
    kept = np.linalg.eigvalsh(hessian[np.ix_(chosen > 0, chosen > 0)])
    ends = curvature.top_eigenvalues(KEY, matvec, params, num_eigenvalues=18, num_iterations=36)
    assert count == 18
    np.testing.assert_allclose(ends.smallest, kept, rtol=1e-3, atol=1e-5 * kept.max())
    density = curvature.spectral_density(
        KEY, matvec, params, num_probes=4, num_iterations=18, num_deflated=6
    )
    assert density.size == count
    assert density.trace_of(np.ones_like).mean == pytest.approx(count)
    estimate = curvature.hutchinson_trace(KEY, matvec, params, num_probes=400)
    assert abs(estimate.mean - kept.sum()) < 4 * estimate.stderr


def test_half_precision_weights_are_widened():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), net())
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    data, vector = net_data(), net(seed=5)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), vector)
    product = curvature.hvp(net_loss, half, data)(narrow)
    assert {x.dtype for x in jax.tree.leaves(product)} == {jnp.dtype("float32")}
    vector = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    expected = curvature.hvp(net_loss, wide, data)(vector)

    @jax.vmap
    def terms(x, y):
        gradient = jax.grad(lambda p: net_loss(p, {"x": x[None], "y": y[None]})[0])
        return jax.jvp(gradient, (wide,), (vector,))[1]

    def check(found, expected, terms):
        # Of N terms added in another order: bfloat16 arithmetic would be off by 1e-2.
        rounding = N * np.finfo(np.float32).eps * np.mean(np.abs(terms), axis=0)
        assert np.all(np.abs(found - expected) <= rounding)

    jax.tree.map(check, product, expected, terms(**data))
    mixed = {**wide, "b": half["b"]}
    estimate = curvature.hutchinson_trace(
        KEY, curvature.hvp(net_loss, mixed, data), mixed, num_probes=64
    )
    assert abs(estimate.mean - np.trace(dense(net_loss, wide, data))) < 4 * estimate.stderr


def test_memory_holds_one_micro_batch_and_no_gradient_per_micro_batch():
    width, n = 64, 1024
    params, data = net(width), net_data(n)
    size = sum(x.size for x in jax.tree.leaves(params))

    def temporaries(micro_batch):
        matvec = curvature.hvp(net_loss, params, data, micro_batch=micro_batch)
        lowered = jax.jit(lambda m, v: m(v)).lower(matvec, params)
        count = n // micro_batch
        for shape in (f"{count}x4x{width}x", f"{count}x{width}x", f"{count}x{size}x"):
            assert f"tensor<{shape}f32>" not in lowered.as_text() or count == 1
        return lowered.compile().memory_analysis().temp_size_in_bytes

    whole, small = temporaries(n), temporaries(16)
    assert small < whole / 8


# --- Lanczos ----------------------------------------------------------------------------------


def run_lanczos(matvec, d, k, seed=0):
    key = jax.random.key(seed)

    def draw(i):
        return jax.random.normal(jax.random.fold_in(key, i), (d,))

    return jax.device_get(jax.jit(lambda m: lanczos(m, draw, jnp.zeros(d), k))(matvec))


SPECTRA = {
    "simple": np.linspace(-2, 5, 30),
    "geometric": 10.0 * 0.5 ** np.arange(30),
    "low rank": np.r_[5.0, 3.0, -1.0, np.zeros(27)],
    "degenerate": np.repeat([4.0, 1.0, -2.0], 10),
    "identity": np.ones(30),
    "zero": np.zeros(30),
    "tiny": 1e-12 * np.linspace(1, 2, 30),
    "huge": 1e12 * np.linspace(1, 2, 30),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [12, 30, 40])
@pytest.mark.slow
def test_lanczos_reconstructs_the_matrix(name, k):
    h = SPECTRA[name]
    matvec = matrix(h)
    run, basis = run_lanczos(matvec, 30, k)
    rank = min(k, 30)
    np.testing.assert_array_equal(run.valid, np.arange(k) < 30)
    basis = basis.astype(np.float64)
    np.testing.assert_allclose(basis[:rank] @ basis[:rank].T, np.eye(rank), atol=2e-6)
    assert np.all(basis[rank:] == 0)
    t = np.diag(run.diagonal) + np.diag(run.couplings[1:], 1) + np.diag(run.couplings[1:], -1)
    a = np.asarray(matvec.args[0], np.float64)
    size = np.abs(h).max()
    np.testing.assert_allclose(basis @ a @ basis.T, t, atol=5e-6 * size)
    # A Qᵀ = Qᵀ T but for the last column, whose length is the residual.
    rest = a @ basis.T - basis.T @ t
    assert np.abs(rest[:, : rank - 1]).max(initial=0) <= 5e-6 * size
    assert np.linalg.norm(rest[:, rank - 1]) == pytest.approx(run.residual, abs=5e-6 * size)
    if k >= 30:  # every eigenvalue, as often as it occurs
        ritz = ritz_values(run)
        assert ritz.num_values == 30
        np.testing.assert_allclose(ritz.values[:30], np.sort(h), atol=5e-6 * size)


@pytest.mark.parametrize("k", [6, 12, 24])
def test_residuals_bound_the_true_error(k):
    h = 10.0 * 0.85 ** np.arange(200) - 0.5
    ends = curvature.top_eigenvalues(
        KEY, matrix(h), jnp.zeros(200), num_eigenvalues=5, num_iterations=k
    )
    for found, residuals in (
        (ends.largest, ends.largest_residuals), (ends.smallest, ends.smallest_residuals),
    ):  # fmt: skip
        error = np.abs(found[:, None] - h).min(axis=1)
        assert np.all(error <= residuals + 2e-5)
    assert np.all(np.diff(ends.largest) <= 0)
    assert np.all(np.diff(ends.smallest) >= 0)
    # Ritz values from within: never beyond the spectrum, nor beyond the same place in it.
    assert np.all(ends.largest <= np.sort(h)[::-1][:5] + 2e-5)
    assert np.all(ends.smallest >= np.sort(h)[:5] - 2e-5)
    if k == 24:
        np.testing.assert_allclose(ends.largest[:3], h[:3], rtol=1e-5)
        assert np.all(ends.largest_residuals[:3] < 1e-2)


def test_eigenvalues_can_be_used_as_values():
    values = curvature.top_eigenvalues(
        KEY, matrix(np.arange(10.0)), jnp.zeros(10), num_eigenvalues=3, num_iterations=10
    )
    np.testing.assert_allclose(values, [9, 8, 7], rtol=1e-5)
    assert len(values) == 3
    assert np.asarray(values).shape == (3,)
    assert float(values[0]) == pytest.approx(9, rel=1e-5)
    assert [round(v) for v in values] == [9, 8, 7]
    np.testing.assert_allclose(values.smallest, [0, 1, 2], atol=1e-4)


# --- traces and densities ---------------------------------------------------------------------

TRACE_SPECTRA = {
    "outliers": np.r_[50.0, 20.0, 10.0, np.linspace(-0.5, 1, 97)],
    "geometric": 10 * 0.8 ** np.arange(100),
    "harmonic": 10 / (1.0 + np.arange(100)),
    "flat": np.linspace(1, 2, 100),
}
ESTIMATORS = {
    "hutchinson": functools.partial(curvature.hutchinson_trace, num_probes=24),
    "deflated": functools.partial(curvature.deflated_trace, num_probes=24, num_deflated=12),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("spectrum", TRACE_SPECTRA)
def test_trace_is_unbiased_and_its_error_honest(estimator, spectrum):
    h = TRACE_SPECTRA[spectrum]
    matvec, seeds = matrix(h), 300
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    found = jax.jit(jax.vmap(lambda k: ESTIMATORS[estimator](k, matvec, jnp.zeros(100))))(keys)
    error = np.asarray(found.mean, np.float64) - h.sum()
    assert abs(error.mean()) < 4 * error.std() / seeds**0.5
    # stderr² is an unbiased estimate of the squared error; and one that would notice a factor 2.
    stated = np.mean(np.square(found.stderr, dtype=np.float64))
    difference = error**2 - np.square(found.stderr, dtype=np.float64)
    assert abs(difference.mean()) < 4 * difference.std() / seeds**0.5 < stated


def test_deflation_cuts_the_error_where_few_eigenvalues_dominate():
    h = TRACE_SPECTRA["outliers"]
    same = {"rng_key": KEY, "matvec": matrix(h), "params": jnp.zeros(100)}
    plain = curvature.hutchinson_trace(**same, num_probes=40)
    better = curvature.deflated_trace(**same, num_probes=28, num_deflated=11)  # 40 products too
    assert better.stderr < plain.stderr / 5
    assert abs(better.mean - h.sum()) < 4 * better.stderr
    exact = curvature.deflated_trace(**same, num_probes=2, num_deflated=100)
    assert exact.mean == pytest.approx(h.sum(), rel=1e-5)
    assert exact.stderr < 1e-3


def test_hutchinson_is_exact_on_a_diagonal():
    h = jnp.asarray([[1.0, 2.0, -3.0, 10.0]])
    params = {"x": jnp.ones(4)}
    matvec = curvature.hvp(quadratic_loss, params, h)
    estimate = curvature.hutchinson_trace(KEY, matvec, params, num_probes=4)
    assert estimate.mean == pytest.approx(10.0)
    assert estimate.stderr == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_results_do_not_depend_on_how_many_probes_run_at_once():
    matvec = matrix(TRACE_SPECTRA["geometric"])
    for estimate in (
        functools.partial(curvature.hutchinson_trace, num_probes=6),
        functools.partial(curvature.deflated_trace, num_probes=6, num_deflated=4),
    ):
        one, four = (estimate(KEY, matvec, jnp.zeros(100), probe_batch=b) for b in (1, 4))
        np.testing.assert_allclose(one, four, rtol=1e-5)


@pytest.mark.parametrize("num_deflated", [0, 5])
def test_quadrature_has_the_moments_of_the_spectrum(num_deflated):
    """k nodes integrate polynomials up to degree 2k - 1 exactly, for each start by itself."""
    h = np.linspace(-1, 2, 60)
    matvec = matrix(h)
    density = curvature.spectral_density(
        KEY, matvec, jnp.zeros(60), num_probes=300, num_iterations=4, num_deflated=num_deflated
    )
    np.testing.assert_allclose(density.weights.sum(axis=1), 1.0, rtol=1e-5)
    for power in range(8):
        estimate = density.trace_of(lambda x, power=power: x**power)
        assert abs(estimate.mean - np.sum(h**power)) < 4 * estimate.stderr + 1e-4 * power
    integral = np.trapezoid(density.density, density.grid)
    assert integral == pytest.approx(1.0, abs=0.01)
    middle = np.trapezoid(density.density * density.grid, density.grid)
    assert middle == pytest.approx(h.mean(), abs=0.05)


def test_density_agrees_with_matfree():
    stochtrace = pytest.importorskip("matfree.stochtrace")
    decomp, funm = (pytest.importorskip(f"matfree.{name}") for name in ("decomp", "funm"))
    h = np.linspace(0.5, 20, 80)
    matvec = matrix(h)
    problem = funm.monte_carlo_funm_sym_logdet(decomp.tridiag_sym(10, reortho="full"))
    sampler = stochtrace.sampler_signs(jnp.zeros(80), num=64)
    theirs = stochtrace.estimator_monte_carlo(problem, sampler)(matvec, jax.random.key(1))
    ours = curvature.spectral_density(
        KEY, matvec, jnp.zeros(80), num_probes=64, num_iterations=10
    ).trace_of(np.log)
    exact = np.log(h).sum()
    assert abs(ours.mean - exact) < 4 * ours.stderr
    assert abs(float(theirs) - ours.mean) < 6 * ours.stderr


def test_trace_agrees_with_matfree_on_a_network():
    stochtrace = pytest.importorskip("matfree.stochtrace")
    params, data = net(), net_data()
    flat, unravel = ravel_pytree(params)
    matvec = curvature.hvp(net_loss, params, data)
    sampler = stochtrace.sampler_signs(flat, num=400)
    estimate = stochtrace.estimator_monte_carlo(stochtrace.monte_carlo_trace(), sampler)
    theirs = float(estimate(lambda v: ravel_pytree(matvec(unravel(v)))[0], jax.random.key(1)))
    ours = curvature.hutchinson_trace(KEY, matvec, params, num_probes=400)
    assert abs(ours.mean - theirs) < 4 * 2**0.5 * ours.stderr


# --- the Gaussian LLC -------------------------------------------------------------------------

SETTINGS = {"nbeta": 30.0, "localization": 10.0}


def gaussian(h, nbeta, localization):
    return np.sum(nbeta * h / (nbeta * h + localization)) / 2


def trained(width, steps=300):
    """A network near a minimum: gradient descent on `net_loss`."""
    data = net_data(200)

    def step(params, _):
        grad = jax.grad(lambda p: jnp.mean(net_loss(p, data)))(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grad), None

    return jax.jit(lambda p: jax.lax.scan(step, p, length=steps)[0])(net(width, scale=0.3)), data


@pytest.mark.parametrize(
    "width", [*(pytest.param(w, marks=pytest.mark.slow) for w in (6, 60)), 330]
)
def test_gaussian_llc_is_the_dense_value(width):
    params, data = trained(width)
    hessian = dense(net_loss, params, data)
    assert len(hessian) == 6 * width
    h = np.linalg.eigvalsh(hessian)
    settings = {"nbeta": 50.0, "localization": 50.0 * 2 * max(-h[0], 0.05)}
    matvec = curvature.hvp(net_loss, params, data)
    for options in ({}, {"num_deflated": 0}):
        estimate = curvature.gaussian_llc(KEY, matvec, params, **settings, **options)
        exact = gaussian(h, **settings)
        assert abs(estimate.mean - exact) < 2 * estimate.stderr + 0.02 * abs(exact)
    assert h[0] < 0  # the next would otherwise repeat the last
    positive = curvature.gaussian_llc(KEY, matvec, params, **settings, positive_part=True)
    exact = gaussian(np.maximum(h, 0), **settings)
    assert abs(positive.mean - exact) < 2 * positive.stderr + 0.02 * exact


def test_gaussian_llc_of_a_diagonal_quadratic():
    h = np.r_[100.0, 10.0, 1.0, 0.1, np.zeros(12)]
    params = {"x": jnp.ones(16)}
    matvec = curvature.hvp(quadratic_loss, params, jnp.asarray(h, jnp.float32)[None])
    value, stderr = curvature.gaussian_llc(
        KEY, matvec, params, **SETTINGS, num_iterations=16, num_deflated=8
    )
    assert abs(value - gaussian(h, **SETTINGS)) < 2 * stderr + 1e-4
    # All of it in the Krylov space: exact, flat directions count nothing.
    value, stderr = curvature.gaussian_llc(KEY, matvec, params, **SETTINGS, num_deflated=16)
    assert value == pytest.approx(gaussian(h, **SETTINGS), rel=1e-5)
    assert stderr < 1e-5
    # γ/nbeta far below the rest of the spectrum, far above the rounding of it: half the rank.
    value, _ = curvature.gaussian_llc(
        KEY, matvec, params, nbeta=1e5, localization=100.0, num_deflated=16
    )
    assert value == pytest.approx(2.0, abs=0.02)


def test_a_saddle_has_a_negative_value_or_none():
    h = np.r_[5.0, 2.0, -0.3, np.zeros(5)]
    params = {"x": jnp.zeros(8)}
    matvec = curvature.hvp(quadratic_loss, params, jnp.asarray(h, jnp.float32)[None])
    estimate = functools.partial(
        curvature.gaussian_llc, KEY, matvec, params, nbeta=30.0, num_deflated=8
    )
    assert estimate(localization=9.5).mean == pytest.approx(gaussian(h, 30.0, 9.5), rel=1e-3)
    assert estimate(localization=9.5).mean < 0
    # The SGLD estimate of the same quadratic has a posterior exactly when ours has a value.
    assert np.isnan(estimate(localization=8.9).mean)
    assert np.isnan(estimate(localization=8.9).stderr)
    positive = estimate(localization=8.9, positive_part=True)
    assert positive.mean == pytest.approx(gaussian(np.maximum(h, 0), 30.0, 8.9), rel=1e-4)


# --- checkpoints ------------------------------------------------------------------------------

SWEEP = {
    **SETTINGS, "num_eigenvalues": 3, "num_deflated": 12, "num_iterations": 6, "num_probes": 4,
}  # fmt: skip
CHECKPOINTS = {step: net(seed=step, scale=0.5) for step in (0, 3, 10, 40, 41)}


@pytest.mark.slow
def test_vmapped_checkpoints_are_those_one_at_a_time():
    data = net_data()
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *CHECKPOINTS.values())

    def one(params):
        matvec = curvature.hvp(net_loss, params, data, micro_batch=20)
        ends = curvature.top_eigenvalues(KEY, matvec, params, num_eigenvalues=2, num_iterations=12)
        trace = curvature.hutchinson_trace(KEY, matvec, params, num_probes=4)
        llc = curvature.gaussian_llc(
            KEY, matvec, params, nbeta=30.0, localization=500.0, num_probes=4
        )
        return ends.largest, ends.smallest, trace, llc

    together = jax.jit(jax.vmap(one))(stacked)
    for row, params in enumerate(CHECKPOINTS.values()):
        alone = one(params)
        np.testing.assert_allclose(alone[0], together[0][row], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(alone[1], together[1][row], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(alone[2], jnp.stack(together[2])[:, row], rtol=1e-3)
        np.testing.assert_allclose(alone[3], jnp.stack(together[3])[:, row], rtol=1e-3, atol=1e-4)


def as_vector(found: Curvature) -> np.ndarray:
    return np.hstack([np.ravel(x) for x in found])


@pytest.mark.parametrize("checkpoint_batch", [2, 4])
@pytest.mark.slow
def test_sweep_is_the_same_in_chunks_and_right(checkpoint_batch):
    data = net_data()
    options = {**SWEEP, "localization": 500.0}
    whole = dict(curvature_over_checkpoints(KEY, net_loss, CHECKPOINTS, data, **options))
    chunks = dict(
        curvature_over_checkpoints(
            KEY, net_loss, CHECKPOINTS.items(), data, **options, checkpoint_batch=checkpoint_batch,
            micro_batch=20, probe_batch=4,
        )
    )  # fmt: skip
    assert list(whole) == list(chunks) == list(CHECKPOINTS)
    for step, params in CHECKPOINTS.items():
        np.testing.assert_allclose(
            as_vector(chunks[step]), as_vector(whole[step]), rtol=1e-3, atol=1e-2
        )
        h = np.linalg.eigvalsh(dense(net_loss, params, data))
        found = whole[step]
        assert abs(found.trace - h.sum()) < 4 * found.trace_stderr + 1e-3
        np.testing.assert_allclose(found.largest[:1], h[-1:], rtol=1e-3)
        assert np.all(found.smallest >= h[:3] - 1e-3)
        exact = gaussian(h, SETTINGS["nbeta"], 500.0)
        assert abs(found.gaussian_llc - exact) < 4 * found.gaussian_llc_stderr + 0.01 * exact
        assert found.num_products == 12 + 6 + 4 * 6


@pytest.mark.slow
def test_many_checkpoints_compile_once():
    data = net_data(33)
    options = {**SWEEP, "localization": 500.0, "checkpoint_batch": 2}
    with compilations() as seen:
        dict(curvature_over_checkpoints(KEY, net_loss, CHECKPOINTS, data, **options))
    assert sum("_apply" in name for name, _ in seen) == 1
    options |= {"nbeta": 7.0, "localization": 600.0}
    more = {step + 1: params for step, params in CHECKPOINTS.items()}
    with compilations() as again:
        dict(curvature_over_checkpoints(KEY, net_loss, more, data, **options))
    assert again == []
    # One at a time through the public functions: the first compiles, the others do not.
    for expected, params in zip((True, False, False), CHECKPOINTS.values(), strict=False):
        with compilations() as seen:
            matvec = curvature.hvp(net_loss, params, data)
            curvature.hutchinson_trace(KEY, matvec, params, num_probes=3)
            curvature.gaussian_llc(
                KEY, matvec, params, **SETTINGS, positive_part=True, num_deflated=7
            )
            curvature.top_eigenvalues(KEY, matvec, params, num_eigenvalues=1, num_iterations=7)
        assert bool(seen) == expected


def test_a_checkpoint_that_is_not_finite_has_no_value():
    def infinite(params, batch):
        return jnp.exp(1e4 * params["x"][None] ** 2)[:, 0] + 0.0 * batch

    [(_, found)] = curvature_over_checkpoints(
        KEY, infinite, {0: {"x": jnp.ones(4)}}, jnp.ones(3), **SETTINGS, num_deflated=3
    )
    assert np.isnan(found.gaussian_llc)
    assert np.isnan(found.trace)


# --- bad input --------------------------------------------------------------------------------


def test_bad_input_is_explained_before_anything_compiles():
    params, data = net(), net_data()
    matvec = curvature.hvp(net_loss, params, data)
    trace, llc = curvature.hutchinson_trace, curvature.gaussian_llc
    top, sweep = curvature.top_eigenvalues, curvature_over_checkpoints
    stream = llc_jax.Stream(lambda key: net_data())
    infinite, wider = {**params, "b": np.full(6, np.inf, np.float32)}, net(7)
    three, integers = np.ones(3, np.float32), np.arange(3, dtype=np.int32)
    cases = [
        ("Stream.*one fixed data set", lambda: curvature.hvp(net_loss, params, stream)),
        ("micro_batch=0", lambda: curvature.hvp(net_loss, params, data, micro_batch=0)),
        ("leading axes", lambda: curvature.hvp(net_loss, params, {**data, "y": np.ones(3)})),
        ("not finite", lambda: curvature.hvp(net_loss, infinite, data)),
        ("mask is 0 everywhere", lambda: curvature.hvp(
            net_loss, params, data, mask=jax.tree.map(lambda x: 0, params))),
        ("drop the final mean", lambda: curvature.hvp(
            lambda p, b: jnp.mean(net_loss(p, b)), params, data)),
        ("one typed key", lambda: trace(jax.random.PRNGKey(0), matvec, params, num_probes=4)),
        ("num_probes=1.*no standard error", lambda: trace(KEY, matvec, params, num_probes=1)),
        ("matvec is a ndarray", lambda: trace(KEY, np.eye(3), np.ones(3), num_probes=4)),
        ("like params", lambda: trace(KEY, lambda v: v[:2], three, num_probes=4)),
        ("dtypes.*int32", lambda: trace(KEY, lambda v: v, integers, num_probes=4)),
        ("num_iterations=2.*at least 3", lambda: top(
            KEY, matvec, params, num_eigenvalues=3, num_iterations=2)),
        ("above the number of weights 3", lambda: top(
            KEY, lambda v: v, three, num_eigenvalues=4, num_iterations=8)),
        ("localization=0", lambda: llc(KEY, matvec, params, nbeta=1.0, localization=0.0)),
        ("nbeta=-1", lambda: llc(KEY, matvec, params, nbeta=-1.0, localization=1.0)),
        ("checkpoints is empty", lambda: sweep(KEY, net_loss, {}, data, **SETTINGS)),
        ("num_deflated=2", lambda: sweep(
            KEY, net_loss, {0: params}, data, **{**SWEEP, "num_deflated": 2})),
        ("do not match", lambda: list(sweep(
            KEY, net_loss, {0: params, 1: wider}, data, **SETTINGS, checkpoint_batch=2))),
    ]  # fmt: skip
    for message, call in cases:
        with compilations() as seen, pytest.raises(ValueError, match=message):
            call()
        assert seen == [], message


def test_operators_are_pytrees():
    matvec = curvature.hvp(net_loss, net(), net_data())
    assert isinstance(matvec, curvature.HessianProduct)
    doubled = jax.tree.map(lambda x: 2 * x, matvec)
    assert doubled.loss_fn is net_loss
    assert dataclasses.replace(matvec, params=None).params is None
