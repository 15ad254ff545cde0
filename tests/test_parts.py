"""λ̂ of parts of the loss from the same chains: a quadratic whose parts are its directions.

SGLD keeps the directions independent, so the exact value of each part is known at finite step
size: nbeta h/2 · (1 + ε nbeta² s/4) / (Λ (1 - εΛ/4)) with Λ = nbeta h + localization, where s is
the variance that minibatches add to the gradient.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llc_jax import SGLD, Stream, estimate_llc, estimate_llc_over_checkpoints

CURVATURES = np.array([0.0, 0.25, 1.0, 2.0, -0.05])
ROWS, SIZE, SPREAD = 16, 4, 0.3
NBETA, LOCALIZATION, STEP_SIZE = 20.0, 2.0, 2e-2


def by_direction(params, batch):
    return 0.5 * batch["h"] * (params["w"][None] - batch["z"]) ** 2


def quadratic(params, batch):
    return jnp.sum(by_direction(params, batch), axis=-1)


def data():
    z = np.random.default_rng(3).normal(size=(ROWS, CURVATURES.size))
    z = SPREAD * (z - z.mean(axis=0)) / z.std(axis=0)
    h = np.broadcast_to(CURVATURES, z.shape)
    return {"h": h.astype(np.float32), "z": z.astype(np.float32)}


ANCHOR = {"w": np.zeros(CURVATURES.size, np.float32)}


def run(source=None, parts_fn=by_direction, **options):
    settings = {
        "sampler": SGLD(STEP_SIZE), "nbeta": NBETA, "localization": LOCALIZATION,
        "num_chains": 256, "num_draws": 400, "num_burnin": 300, "num_probes": 0,
        "parts_fn": parts_fn,
    }  # fmt: skip
    if source is None:
        source, settings = data(), settings | {"batch_size": SIZE}
    return estimate_llc(jax.random.key(5), quadratic, ANCHOR, source, **settings | options)


@pytest.fixture(scope="module")
def estimate():
    return run()


def test_every_part_has_its_exact_value(estimate):
    stiffness = NBETA * CURVATURES + LOCALIZATION
    noise = 1 + STEP_SIZE * NBETA**2 * (CURVATURES * SPREAD) ** 2 / SIZE / 4
    variance = noise / (stiffness * (1 - STEP_SIZE * stiffness / 4))
    exact = NBETA * CURVATURES / 2 * variance
    assert np.all(np.abs(estimate.parts - exact)[1:] < 4 * estimate.parts_stderr[1:])
    assert estimate.parts[0] == 0.0  # a flat direction adds nothing, and never varies
    assert np.isnan(estimate.parts_stderr[0])
    assert np.all(estimate.parts_stderr[1:] < 0.06 * np.abs(exact[1:]))


def test_the_parts_add_up_to_the_whole(estimate):
    assert estimate.parts.sum() == pytest.approx(estimate.mean, rel=1e-5)


def test_parts_are_compared_with_the_anchor_on_the_same_minibatch():
    # A chain that cannot move differs from the anchor by nothing, whatever its minibatches are.
    still = run(sampler=SGLD(1e-30), num_chains=2, num_draws=50)
    np.testing.assert_allclose(still.parts, 0.0, atol=1e-5)
    assert still.anchor_losses.std() > 0.01


@pytest.mark.slow
def test_parts_change_nothing_else(estimate):
    without = run(parts_fn=None)
    np.testing.assert_array_equal(without.losses, estimate.losses)
    assert without.parts is None
    assert without.parts_stderr is None


def rows_of(key):
    rows = jax.random.randint(key, (SIZE,), 0, ROWS)
    return {name: jnp.asarray(x)[rows] for name, x in data().items()}


@pytest.mark.slow
def test_a_stream_of_the_same_rows_has_the_same_parts():
    few = {"num_chains": 4, "num_draws": 40, "num_burnin": 10}
    np.testing.assert_allclose(run(Stream(rows_of), **few).parts, run(**few).parts, rtol=1e-4)


@pytest.mark.slow
def test_parts_of_full_batches_and_of_several_checkpoints():
    options = {
        "sampler": SGLD(STEP_SIZE), "nbeta": NBETA, "localization": LOCALIZATION, "num_chains": 3,
        "num_draws": 20, "num_burnin": 5, "num_probes": 0, "parts_fn": by_direction,
    }  # fmt: skip
    many = estimate_llc_over_checkpoints(
        jax.random.key(0), quadratic, {0: ANCHOR, 7: ANCHOR}, data(), checkpoint_batch=2, **options
    )
    for step, found in many:
        alone = estimate_llc(jax.random.key(0), quadratic, ANCHOR, data(), step=step, **options)
        np.testing.assert_allclose(found.parts, alone.parts, rtol=1e-6)
        assert found.parts.sum() == pytest.approx(found.mean, rel=1e-5)


@pytest.mark.slow
def test_micro_batches_change_nothing():
    few = {"num_chains": 2, "num_draws": 30, "num_burnin": 5}
    np.testing.assert_allclose(run(grad_accum=2, **few).parts, run(**few).parts, rtol=1e-3)


def half(params, batch):
    return by_direction(params, batch).astype(jnp.bfloat16)


def test_means_of_half_precision_parts_are_not_rounded():
    few = {"num_chains": 2, "num_draws": 30, "num_burnin": 5}
    exact, rounded = run(**few), run(parts_fn=half, **few)
    # Single parts are rounded to 0.4 %, not their means once more.
    np.testing.assert_allclose(rounded.parts[1:], exact.parts[1:], atol=20 * 0.004 * 0.05)


def test_a_diverged_chain_is_left_out():
    def doomed(params, batch):
        return quadratic(params, batch) * jnp.where(params["w"][1] > 0.5, jnp.nan, 1.0)

    found = estimate_llc(
        jax.random.key(1), doomed, ANCHOR, data(), sampler=SGLD(STEP_SIZE), nbeta=NBETA,
        localization=LOCALIZATION, num_chains=32, num_draws=30, num_burnin=0, num_probes=0,
        parts_fn=by_direction,
    )  # fmt: skip
    assert 0 < found.num_finite < 32
    assert found.parts.sum() == pytest.approx(found.mean, rel=1e-5)


def test_parts_are_named_in_xarray(estimate):
    dataset = estimate.to_xarray()
    assert dataset.parts.dims == dataset.parts_stderr.dims == ("part",)
    np.testing.assert_array_equal(dataset.parts, estimate.parts)


def flat_losses(params, batch):
    return quadratic(params, batch)


def test_parts_of_the_wrong_shape_are_refused_before_anything_compiles():
    with pytest.raises(ValueError, match=r"parts_fn returned shape \(4,\).*a row of losses"):
        run(parts_fn=flat_losses)
    assert math.isfinite(run(num_chains=1, num_draws=8, num_burnin=0).parts_stderr[1])
