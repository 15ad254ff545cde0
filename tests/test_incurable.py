"""Calibrations that end in one sentence: what no setting cures."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llc_jax import SGLD, Stream, calibrate
from llc_jax.calibration.incurable import refuse_flat

ONES = np.ones(2, np.float32)
SIZES = {"nbeta": 100.0, "num_draws": 20, "num_burnin": 20}


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


sine.defvjp(lambda x: (sine(x), jnp.cos(x)), lambda cosine, g: (cosine * g,))


def of_sine(params, batch):
    return batch * sine(params["x"]) ** 2


def refused(loss_fn, anchor, data=ONES, **changes):
    with pytest.raises(ValueError, match=r"\w") as caught:
        calibrate(jax.random.key(0), loss_fn, anchor, data, **{**SIZES, **changes})
    text = str(caught.value)
    assert len(text) <= 600
    assert not any(word in text for word in ("Lower step", "lower step", "smaller step_fractions"))
    return text


def test_a_rule_without_second_derivatives():
    """As in jax issue 16049, "Cannot compute Hessian of `custom_vjp`"."""
    text = refused(of_sine, {"x": np.float32(0)})
    assert "calibrate needs second derivatives of loss_fn" in text
    assert "choose step_size by hand" in text


def error_rate(params, batch):
    return ((batch["x"] @ params["w"] > 0) != batch["y"]).astype(jnp.float32)


def rounded(params, batch):
    return batch * jnp.sum(jnp.round(10 * params["w"]) ** 2)


def far_out(params, batch):
    return batch * jnp.sum(jax.nn.softplus(-params["w"]))


def labelled():
    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    return {"x": x, "y": x[:, 0] > 0}


@pytest.mark.parametrize(
    ("loss_fn", "data", "start"),
    [(error_rate, labelled(), 1.0), (rounded, ONES, 0.0), (far_out, ONES, 1e5)],
    ids=["error rate", "rounded weights", "no slope left"],
)
@pytest.mark.parametrize("changes", [{}, {"localization": 1e-3}], ids=["ladder", "given"])
def test_a_gradient_that_is_zero_along_all_chains(loss_fn, data, start, changes):
    """The third as in stan issue 3029, "base_hmc.init_stepsize() loops forever if stepsize is NaN".

    Its log-density, which is level on one side, sends the step size to infinity.
    """
    text = refused(loss_fn, {"w": np.full(3, start, np.float32)}, data, **changes)
    assert "gradient of the loss is zero" in text
    assert "differentiable loss" in text


def test_only_chains_that_have_moved_and_all_of_them_count():
    gammas = np.array([1.0, 4.0])

    def along(*norms):
        return [SimpleNamespace(sound=SimpleNamespace(gradient=np.array(x))) for x in norms]

    refuse_flat(along([[0.0, 0.0]], [[0.0, 1e-30]]), gammas)
    refuse_flat(along([[0.0, 0.0]], [[0.0, np.nan]]), gammas)
    refuse_flat(along([[0.0]], [[0.0]]), gammas)  # the anchor and nothing else
    with pytest.raises(ValueError, match=r"localization 1, which lets each weight go about 1 away"):
        refuse_flat(along([[0.0, 0.0]], [[0.0, 0.0]]), gammas)


def test_an_anchor_with_slope_only_off_it_is_no_flat_loss():
    # w^4 at 0: the gradient is 0 there, and not half way along a chain.
    found = calibrate(
        jax.random.key(0), quartic, {"w": np.zeros(1, np.float32)}, ONES, localization=1.0,
        nbeta_factors=(1.0,), localization_factors=(1.0,), step_fractions=(0.4,), **SIZES,
    )  # fmt: skip
    assert found.grid.estimates[0, 0, 0].num_finite == 4


def quartic(params, batch):
    return batch * jnp.sum(params["w"] ** 4)


def root(params, batch):
    return batch * (jnp.linalg.norm(params["w"]) - 2) ** 2


def test_a_norm_of_zero_at_the_anchor():
    """Numpyro issue 249, "HMC adaptation stuck at warmup phase due to step_size -> nan": a ring.

    In its centre, the derivative of the norm is 0 / 0.
    """
    text = refused(root, {"w": np.zeros(2, np.float32)}, sampler=SGLD(1.0))
    assert "not finite" in text


def test_a_stream_without_a_finite_loss():
    stream = Stream(lambda key: jnp.full(4, jnp.nan) * jax.random.normal(key, (4,)))
    text = refused(quartic, {"w": np.ones(1, np.float32)}, stream)
    assert "not finite" in text or "no finite" in text


def test_an_example_without_a_finite_loss_is_named():
    data = np.ones(8, np.float32)
    data[5] = np.nan
    text = refused(quartic, {"w": np.ones(1, np.float32)}, data, batch_size=4)
    assert "row 5" in text
