"""Modes of JAX that change how programs are traced, compiled or drawn from: the same estimates.

The suite itself runs under strict promotion of dtypes and of ranks (conftest.py).
"""

import contextlib
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
    curvature,
    estimate_llc,
    estimate_llc_over_checkpoints,
    estimate_llc_over_settings,
)
from llc_jax.ambient import own_key
from llc_jax.curvature.over_checkpoints import curvature_over_checkpoints
from llc_jax.observables import LossGap, LossTerms
from llc_jax.sampling.chain import Plan, sample_chain
from llc_jax.sampling.posterior import LocalPosterior
from llc_jax.trees import at_least_float32

SAMPLERS = {
    "SGLD": SGLD(1e-2),
    "MALA": MALA(1e-2),
    "BAOAB": BAOAB(1e-2, 2.0),
    "SGNHT": SGNHT(1e-2, 2.0),
    "RMSPropSGLD.devinterp": RMSPropSGLD.devinterp(1e-3),
    "RMSPropSGLD.corrected": RMSPropSGLD.corrected(1e-3),
    "AdamSGLD": AdamSGLD(1e-3),
}
KEY = jax.random.key(0)
TINY = {"nbeta": 10.0, "localization": 1.0, "num_chains": 3, "num_draws": 6, "num_burnin": 2}


def net_loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ at_least_float32(params["a"]).astype(batch["x"].dtype))
    return (hidden @ at_least_float32(params["b"]).astype(hidden.dtype) - batch["y"]) ** 2


def net_parts(params, batch):
    losses = net_loss(params, batch)
    return jnp.stack([losses, 2 * losses], axis=1)


def problem(a=np.float32, b=np.float32, data=np.float32):
    """Weights and data of a net in these dtypes, the same numbers but for rounding."""
    x = np.random.default_rng(0).normal(size=(24, 2))
    params = {"a": np.eye(2, 3).astype(a), "b": np.array([1.0, 0.5, -0.5]).astype(b)}
    return params, {"x": x.astype(data), "y": (x[:, 0] * x[:, 1]).astype(data)}


@contextlib.contextmanager
def config(name, value):
    old = jax.config.values[name]
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, old)


@pytest.fixture(autouse=True)
def _compile_fast():
    """Programs here are as long in compiling as they are short in running."""
    with config("jax_disable_most_optimizations", True):
        yield


# 64 bits.


def squares(params, batch):
    return 0.5 * (batch["x"] @ params["w"] - batch["y"]) ** 2


def regression(dtype=np.float64):
    """(params, data, eigenvalues of the Hessian) of a linear regression without noise."""
    x = np.random.default_rng(0).normal(size=(64, 3))
    w = np.array([1.0, -1.0, 0.5])
    data = {"x": x.astype(dtype), "y": (x @ w).astype(dtype)}
    return {"w": w.astype(dtype)}, data, np.linalg.eigvalsh(x.T @ x / len(x))


@pytest.mark.parametrize("name", ["SGLD", "MALA", "BAOAB"])
def test_float64_weights_have_the_exact_law(name):
    """Joshuaalbert/jaxns #154, kazewong/flowMC #200: samplers that fail in 64-bit mode, since what
    they carry from step to step starts in float32."""
    params, data, h = regression()
    stiffness = 50.0 * h + 1.0
    bias = 1 - 1e-2 * stiffness / 4 if name == "SGLD" else 1.0
    with jax.enable_x64(True):
        found = estimate_llc(
            jax.random.key(1), squares, params, data, sampler=SAMPLERS[name], nbeta=50.0,
            localization=1.0, num_chains=8, num_draws=4000, num_burnin=400, num_probes=2,
        )  # fmt: skip
    assert_within_4_stderr(found.mean, np.sum(50.0 * h / (stiffness * bias)) / 2, found.stderr)
    assert found.stderr < 0.03 * found.mean
    for array in (found.losses, found.anchor_losses, found.distance):
        assert array.dtype == np.float64
    stiffest = 1e-2 * stiffness.max()
    np.testing.assert_allclose(found.stability, stiffest, rtol=1e-9)  # 3 weights: exact in 12 steps


def shifted_squares(params, batch):
    return squares(params, batch) + 2.0**30


def test_float64_losses_keep_all_their_digits():
    params, data, _ = regression()
    options = dict(TINY, sampler=BAOAB(1e-2, 2.0), num_probes=0)
    with jax.enable_x64(True):
        plain, shifted = (
            estimate_llc(KEY, loss, params, data, **options) for loss in (squares, shifted_squares)
        )
    rounding = 2 * 2.0**30 * np.finfo(np.float64).eps  # of a loss, of their mean
    np.testing.assert_allclose(shifted.losses - 2.0**30, plain.losses, rtol=0, atol=rounding)
    np.testing.assert_allclose(shifted.mean, plain.mean, rtol=0, atol=10 * rounding)
    assert 0 < plain.losses.max() < 1  # nothing to float32, whose unit at 2^30 is 64
    assert shifted.init_loss == 2.0**30


WIDTHS = (jnp.bfloat16, np.float32, np.float64)
MIXES = [(a, b, data) for a in WIDTHS for b in WIDTHS for data in WIDTHS[1:]]
QUICK_MIXES = [(jnp.bfloat16, np.float64, np.float32), (np.float32, np.float64, np.float64),
               (np.float64, np.float64, np.float32)]  # fmt: skip


@pytest.mark.parametrize(
    ("a", "b", "data"),
    [pytest.param(*m, marks=[] if m in QUICK_MIXES else pytest.mark.slow) for m in MIXES],
)
def test_every_sampler_traces_with_weights_of_any_two_dtypes(a, b, data):
    """Nothing is promoted (promotion is strict) and no carry of a loop changes its dtype."""
    plan = Plan(num_draws=2, num_burnin=1, thinning=2, batch_size=4, grad_accum=2, chain_batch=1,
                num_probes=1)  # fmt: skip
    with jax.enable_x64(True):
        params, examples = problem(a, b, data)
        params, examples = jax.tree.map(jnp.asarray, (params, examples))
        scalars = jnp.float64(10.0), jnp.float64(1.0)
        losses, parts = net_loss(params, examples), net_parts(params, examples)
        here = LocalPosterior(params, *scalars)
        observables = {"gap": LossGap(), "parts": LossTerms(net_parts)}
        for sampler in SAMPLERS.values():
            sampler = jax.tree.map(jnp.float64, sampler)
            trace = jax.eval_shape(
                lambda sampler=sampler: sample_chain(
                    KEY, net_loss, here, examples, losses, {"gap": None, "parts": parts}, sampler,
                    plan, observables,
                )
            )  # fmt: skip
            found, parts_found = trace.observed["gap"], trace.observed["parts"]
            for losses_of_draws in (found.loss, found.gap, parts_found):
                assert losses_of_draws.dtype == data
            widest = np.float64 if np.float64 in (a, b) else np.float32
            assert found.distance.dtype == widest
            assert trace.stability.diagonal.dtype == widest


def test_float32_weights_in_64_bit_mode_give_what_they_give_without():
    """Minibatches and noise are the same numbers: neither follows the default dtype."""
    params, data = problem()
    options = dict(TINY, sampler=SGLD(1e-2), batch_size=8, num_probes=0)
    plain = estimate_llc(KEY, net_loss, params, data, **options)
    matvec = curvature.hvp(net_loss, params, data)
    product = matvec(params)
    with jax.enable_x64(True):
        in_x64 = estimate_llc(KEY, net_loss, params, data, **options)
        product_in_x64 = curvature.hvp(net_loss, params, data)(params)
    assert in_x64.losses.dtype == np.float32
    # Hyperparameters are float64 there and rounded later.
    np.testing.assert_allclose(in_x64.losses, plain.losses, rtol=1e-4)
    assert {x.dtype for x in product_in_x64.values()} == {np.dtype(np.float32)}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), product, product_in_x64)


def test_curvature_of_float64_weights_is_that_of_numpy():
    params, data, h = regression()
    with jax.enable_x64(True):
        matvec = curvature.hvp(squares, params, data, micro_batch=20)
        assert matvec(params)["w"].dtype == np.float64
        found = curvature.top_eigenvalues(
            KEY, matvec, params, num_eigenvalues=3, num_iterations=3
        )  # fmt: skip
        value, _ = curvature.gaussian_llc(
            KEY, matvec, params, nbeta=50.0, localization=1.0, num_probes=2, num_iterations=3,
            num_deflated=3,
        )  # fmt: skip
        [(_, swept)] = curvature_over_checkpoints(
            KEY, squares, {3: params}, data, nbeta=50.0, localization=1.0, num_deflated=3,
            num_probes=2, num_iterations=3,
        )  # fmt: skip
    np.testing.assert_allclose(found.largest, h[::-1], rtol=1e-12)
    np.testing.assert_allclose(swept.largest, h[::-1], rtol=1e-12)
    exact = np.sum(50.0 * h / (50.0 * h + 1)) / 2
    np.testing.assert_allclose([value, swept.gaussian_llc], exact, rtol=1e-12)
    np.testing.assert_allclose(swept.trace, h.sum(), rtol=1e-12)


# Everything else: bitwise what it is without the mode.


def everything(loss_fn=net_loss):
    """Losses of a run that uses most options, and a spectrum: arrays to compare."""
    params, data = problem()
    found = estimate_llc(
        KEY, loss_fn, params, data, sampler=SGLD(1e-2), batch_size=8, grad_accum=2,
        parts_fn=net_parts, mask={"a": np.ones((2, 3)), "b": np.array([1, 0, 1])}, **TINY,
    )  # fmt: skip
    matvec = curvature.hvp(loss_fn, params, data, micro_batch=7)
    density = curvature.spectral_density(
        KEY, matvec, params, num_probes=2, num_iterations=4, num_deflated=2, num_points=4
    )
    return [found.losses, found.distance, found.stability, found.acceptance, found.parts,
            matvec(params), density.nodes]  # fmt: skip


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def without():
    with config("jax_disable_most_optimizations", True):
        return everything()


MODES = {
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_disable_jit": True,
    "jax_check_tracer_leaks": True,
    "jax_debug_key_reuse": True,
    "jax_default_matmul_precision": "highest",
    "jax_enable_checks": True,
    "jax_numpy_dtype_promotion": "standard",
    "jax_use_shardy_partitioner": False,
    "jax_remove_size_one_mesh_axis_from_type": True,
    "jax_legacy_prng_key": "error",
}
QUICK = {"jax_debug_nans", "jax_debug_infs", "jax_disable_jit", "jax_check_tracer_leaks"}


@pytest.mark.parametrize(
    "mode", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in MODES]
)
def test_a_mode_changes_nothing(mode, without):
    def traced_anew(params, batch):
        return net_loss(params, batch)

    anew = mode in ("jax_check_tracer_leaks", "jax_enable_checks")  # they look at tracing only
    with config(mode, MODES[mode]):
        assert_same(everything(traced_anew if anew else net_loss), without)


def explosive(params, batch):
    return jnp.exp(batch["x"][:, 0] * params["a"][0, 0] ** 2) + 0 * params["b"].sum()


@pytest.mark.parametrize("mode", ["jax_debug_nans", "jax_debug_infs"])
def test_a_chain_that_diverges_is_a_result_while_nans_are_looked_for(mode):
    """jax-ml/jax #7510: the mode stops at a nan that a function makes and takes care of."""
    params, data = problem()
    options = dict(TINY, num_probes=2, num_draws=30, localization=0.0)
    for sampler in (SGLD(4.0), MALA(1e6)):
        with config(mode, True):
            found = estimate_llc(KEY, explosive, params, data, sampler=sampler, **options)
        assert (found.diverged_at >= 0).any() == isinstance(sampler, SGLD)
        assert found.verdict != "ok"


# Other generators.


def test_keys_of_another_kind_give_what_does_not_depend_on_chunks():
    """jax-ml/jax #21663: numbers of "rbg" keys differ with the batch and the number of devices."""
    params, data = problem()
    options = dict(TINY, sampler=SGLD(1e-2), batch_size=8, num_probes=0, num_chains=4)
    matvec = curvature.hvp(net_loss, params, data)
    counts = {"num_probes": 4, "num_iterations": 2}
    seen = []
    for kind in ("threefry2x32", "rbg", "unsafe_rbg"):
        key = jax.random.key(0, impl=kind)
        at_once = estimate_llc(key, net_loss, params, data, **options)
        in_turn = estimate_llc(key, net_loss, params, data, **options, chain_batch=1)
        assert_same(at_once.losses, in_turn.losses)
        seen.append(at_once.losses)
        densities = [
            curvature.spectral_density(key, matvec, params, probe_batch=size, **counts)
            for size in (1, 4)
        ]
        nodes, batched = (density.nodes for density in densities)
        np.testing.assert_allclose(nodes, batched, rtol=1e-4, atol=1e-5)
    assert len({losses.tobytes() for losses in seen}) == 2  # unsafe_rbg splits otherwise, only


def test_a_key_of_another_kind_becomes_the_seed_of_ours():
    assert own_key(KEY) is KEY
    for kind in ("rbg", "unsafe_rbg"):
        one, two = (own_key(jax.random.key(seed, impl=kind)) for seed in (1, 2))
        assert str(jax.random.key_impl(one)) == "threefry2x32"
        assert one != two
    with jax.default_prng_impl("rbg"):
        assert own_key(jax.random.key(1)) == own_key(jax.random.key(1, impl="rbg"))


# All of it: what users call, under each mode.


def streamed(rng_key):
    x = jax.random.normal(rng_key, (8, 2), np.float32)
    return {"x": x, "y": x[:, 0]}


def calls(params, data):
    """The calls of the library, each as a function without arguments."""
    half = jax.tree.map(lambda x: np.arange(x.size).reshape(x.shape) % 2, params)
    options = {
        "plain": {},
        "minibatches": {"batch_size": 8, "grad_accum": 2, "parts_fn": net_parts},
        "mask, thinning": {"mask": half, "thinning": 2, "chain_batch": 1},
    }
    for name, sampler in SAMPLERS.items():
        for kind, more in options.items():
            run = dict(TINY, sampler=sampler, **more)
            yield f"{name} {kind}", lambda run=run: estimate_llc(KEY, net_loss, params, data, **run)
    run = dict(TINY, sampler=SGLD(1e-2))
    curves = {"nbeta": 10.0, "localization": 1.0, "num_deflated": 3, "num_probes": 2}
    pairs = {0: params, 5: params}
    yield "stream", lambda: estimate_llc(KEY, net_loss, params, Stream(streamed), **run)
    yield "checkpoints", lambda: dict(estimate_llc_over_checkpoints(
        KEY, net_loss, pairs, data, checkpoint_batch=2, **run))[5]  # fmt: skip
    yield "settings", lambda: estimate_llc_over_settings(
        KEY, net_loss, params, data, **{**run, "nbeta": np.array([5.0, 10.0])})[1]  # fmt: skip
    yield "calibrate", lambda: calibrate(
        KEY, net_loss, params, data, num_draws=20, num_burnin=20, num_chains=2,
        step_fractions=(0.4,), nbeta_factors=(1.0,), localization_factors=(1.0,))  # fmt: skip
    yield "curvature", lambda: dict(curvature_over_checkpoints(
        KEY, net_loss, pairs, data, num_iterations=3, checkpoint_batch=2, **curves))[5]  # fmt: skip
    matvec = curvature.hvp(net_loss, params, data)
    yield "trace", lambda: curvature.hutchinson_trace(KEY, matvec, params, num_probes=2)
    yield "deflated", lambda: curvature.deflated_trace(
        KEY, matvec, params, num_probes=2, num_deflated=2)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    ["strict", "float64", "mixed", "float32", "jax_check_tracer_leaks", "jax_debug_key_reuse"],
)
def test_every_call_under_a_mode(mode):
    with contextlib.ExitStack() as stack:
        params, data = problem()
        if mode in ("float64", "float32", "mixed"):
            stack.enter_context(jax.enable_x64(True))
            dtype = np.float32 if mode == "float32" else np.float64
            params, data = problem(
                a=dtype, b=jnp.bfloat16 if mode == "mixed" else dtype, data=dtype
            )
        elif mode != "strict":
            stack.enter_context(config(mode, MODES[mode]))
        for name, call in calls(params, data):
            found = call()
            values = [found.mean] if hasattr(found, "mean") else [0.0]
            assert np.isfinite(values).all(), (name, found)


@pytest.mark.slow
def test_the_mode_of_a_whole_process():
    """As users set it: in the environment, for all that is imported and run."""
    root = pathlib.Path(__file__).parents[1]
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_modes\n"
        "test_modes.test_float64_weights_have_the_exact_law('MALA')\n"
        "test_modes.test_curvature_of_float64_weights_is_that_of_numpy()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False,
        env={**os.environ, "JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
