"""A step looked at: moves to the anchor by Simpson's rule, rounding by the spacing of floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import assert_within_4_stderr, sgld

from llc_jax import MALA, SGLD, AdamSGLD, RMSPropSGLD, estimate_llc
from llc_jax.inputs import weights
from llc_jax.llc import soundness
from llc_jax.sampling import probe
from llc_jax.sampling.posterior import LocalPosterior, evaluate

ANCHOR = {"a": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array(0.25)}
ONES = {"x": jnp.ones(4)}


def polynomial(degree):
    def loss_fn(params, batch):
        away = jnp.stack([*(params["a"] - ANCHOR["a"]), params["b"] - ANCHOR["b"]])
        return jnp.full(batch["x"].shape, jnp.sum(away**degree))

    return loss_fn


def looked_at(loss_fn, params, sampler, new=None, mask=None, probing=True):
    def posterior(w):
        losses = loss_fn(ANCHOR, ONES)
        here = LocalPosterior(ANCHOR, jnp.array(3.0), jnp.array(1.0), mask)
        return evaluate(loss_fn, here, w, ONES, anchor_losses=losses)

    state = sampler.init(params)
    here = posterior(params)
    new = params if new is None else new
    return probe.look_at(
        sampler, state, state._replace(params=new), here, posterior, ANCHOR, mask,
        jnp.array(probing),
    )  # fmt: skip


AWAY = {"a": ANCHOR["a"] + jnp.array([0.3, -0.2, 0.4]), "b": ANCHOR["b"] + 0.1}


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 8])
def test_change_and_prediction_on_the_way_back(degree):
    seen = looked_at(polynomial(degree), AWAY, SGLD(0.1))
    x = np.array([0.3, -0.2, 0.4, 0.1])
    exact = np.sum(((1 - probe.SHARE) * x) ** degree) - np.sum(x**degree)
    np.testing.assert_allclose(seen.change, exact, rtol=1e-4, atol=1e-7)
    # Exact for cubics; beyond, of a relative error of the fourth power of the share.
    rtol = 1e-4 if degree < 4 else 1e-3
    np.testing.assert_allclose(seen.predicted, exact, rtol=rtol, atol=1e-7)
    np.testing.assert_allclose(
        seen.gradient, degree * np.linalg.norm(x ** (degree - 1)), rtol=1e-4
    )


def test_nothing_is_looked_at_where_it_was_not_asked_for():
    assert not any(map(np.any, looked_at(polynomial(2), AWAY, SGLD(0.1), probing=False)))


def test_heating_is_the_variance_of_rounding_beside_that_of_the_move():
    start = {"a": jnp.array([3.0, 1000.0, 0.0]), "b": jnp.array(0.0)}
    new = {"a": start["a"] + jnp.array([0.5, 0.25, 0.0]), "b": jnp.array(0.125)}
    seen = looked_at(polynomial(2), start, SGLD(0.1), new)
    squared = (2 * 2.0**-23) ** 2 + (512 * 2.0**-23) ** 2  # spacing from 2 on, from 512 on
    np.testing.assert_allclose(seen.heating, squared / 12 / (0.5**2 + 0.25**2), rtol=1e-5)
    # A leaf that stands still is rounded away, unless it is held or a proposal was refused.
    stuck = {**new, "a": start["a"]}
    assert looked_at(polynomial(2), start, SGLD(0.1), stuck).heating == np.inf
    held = {"a": False, "b": True}
    assert looked_at(polynomial(2), start, SGLD(0.1), stuck, held).heating == 0
    assert looked_at(polynomial(2), start, MALA(0.1)).heating == 0


# --- the law of a chain on the numbers of a dtype -------------------------------------------------

X = np.random.default_rng(0).normal(size=(128, 3)).astype(np.float32)
EIGENVALUES = np.linalg.eigvalsh(X.T.astype(float) @ X / 128)
NBETA, STEP = 50.0, 4e-3


def centred(params, batch):
    away = params["w"].astype(jnp.float32)[None] - batch["centre"]
    return 0.5 * jnp.sum(batch["x"] * away, axis=1) ** 2


def estimate(size, dtype, sampler, **settings):
    w = np.full(3, size).astype(dtype)
    data = {"x": X, "centre": np.tile(w.astype(np.float32), (len(X), 1))}
    settings = {"num_draws": 2000, "num_burnin": 200, **settings}
    return estimate_llc(
        jax.random.key(0), centred, {"w": w}, data,
        sampler=sampler, nbeta=NBETA, localization=1.0, **settings,
    )  # fmt: skip


def exact(heating):
    moments = [sgld(STEP, NBETA * h + 1.0).variance() for h in EIGENVALUES]
    return NBETA / 2 * float(EIGENVALUES @ moments) * (1 + heating)


@pytest.mark.parametrize(
    ("size", "dtype", "spacing"),
    [(12.0, jnp.bfloat16, 1 / 16), (2.5e6, np.float32, 1 / 4), (12.0, np.float32, 2.0**-20)],
)
def test_rounding_of_the_weights_heats_by_its_variance(size, dtype, spacing):
    """Spacing s² / 12 beside the variance of a step, in any dtype.

    Nerogar/OneTrainer, issue 996, "No weight decay with Adam, bf16 and stochastic rounding": steps
    below the spacing of weights, which are neither refused nor told.
    """
    heating = spacing**2 / 12 / STEP
    if heating > weights.MAX_HEATING:
        with pytest.raises(ValueError, match="would be rounded away"):
            estimate(size, dtype, SGLD(STEP))
        return
    found = estimate(size, dtype, SGLD(STEP))
    # The median over single steps, of three weights each, is above the ratio of the means.
    assert heating * 0.9 < found.sound.heating < 2 * heating
    assert_within_4_stderr(found.mean, exact(heating), found.stderr)
    told = "rounding of the weights" in [label for label, _ in found.findings]
    assert told == (heating * found.mean > found.stderr)
    assert told == (dtype is jnp.bfloat16)


@pytest.mark.parametrize("sampler", [RMSPropSGLD(1e-3), AdamSGLD(1e-3)])
def test_steps_that_only_a_preconditioner_knows_are_measured(sampler):
    found = estimate(1e6, np.float32, sampler, num_draws=300)
    assert found.sound.heating > 0.01
    labels = dict(soundness.findings(found.sound, found.mean, found.stderr / 100))
    assert "rounding of the weights" in labels
