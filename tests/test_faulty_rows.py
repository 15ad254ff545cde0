"""Rows without a loss or a gradient are named, and no advice about steps is given for them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llc_jax import SGLD, calibrate, estimate_llc

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 3)).astype(np.float32)
LABELS = RNG.integers(0, 3, 64)
KEY = jax.random.key(0)


def entropy(params, batch):
    logits = batch["x"] @ params["w"]
    if "bias" in batch:
        logits = logits + batch["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def normed(params, batch):
    return jnp.linalg.norm(batch["x"] @ params["w"], axis=-1)


def rooted(params, batch):
    """The root is behind a `where`, its gradient is not."""
    power = jnp.sum((batch["x"] @ params["w"]) ** 2, axis=-1)
    return jnp.where(power > 0, jnp.sqrt(power), 0.0)


def changed(array, row, value):
    array = array.copy()
    array[row] = value
    return array


DEAD = {
    # a label that counts from one: tensorflow/tensorflow, issue 15962, "Model diverges with NaN if
    # the class label exceeds the expected number of classes"
    "label beyond the classes": ({"x": X, "y": changed(LABELS, 17, 3)}, 17),
    # `ignore_index` of torch: tensorflow/tensorflow, issue 1234, labels that are not to count
    "label to be ignored": ({"x": X, "y": changed(LABELS, 5, -100)}, 5),
    "hole in a row": ({"x": changed(X, 3, np.nan), "y": LABELS}, 3),
    "all logits masked": (
        {"x": X, "y": LABELS, "bias": changed(np.zeros((64, 3), np.float32), 9, -np.inf)}, 9,
    ),
}  # fmt: skip


def estimate(loss_fn, data, w):
    return estimate_llc(
        KEY, loss_fn, {"w": w}, data, sampler=SGLD(1e-4), localization=1.0, batch_size=8,
        num_chains=2, num_draws=40, num_burnin=5,
    )  # fmt: skip


@pytest.mark.parametrize("name", DEAD)
def test_a_row_without_a_loss_is_named(name):
    data, row = DEAD[name]
    found = estimate(entropy, data, np.zeros((3, 3), np.float32))
    assert found.verdict == "loss not finite at the anchor"
    [sentence] = found.warnings
    assert f"1 of 64 examples, the first is row {row}:" in sentence
    assert "step" not in sentence


@pytest.mark.parametrize("loss_fn", [normed, rooted])
def test_a_row_without_a_gradient_is_named(loss_fn):
    """jax-ml/jax, issue 4177, "Gradient of squared 2-norm returns NaN when input is vector of
    zeros"; the loss itself is finite.
    """
    data = {"x": changed(X, 11, 0.0)}
    found = estimate(loss_fn, data, np.ones((3, 3), np.float32))
    assert found.verdict.startswith("gradient not finite at the anchor")
    assert "such as row 11:" in found.warnings[0]
    assert not any("step_size" in sentence for sentence in found.warnings)


def test_calibrate_tells_a_faulty_row_before_it_sweeps():
    data, _ = DEAD["label beyond the classes"]
    said = []
    with pytest.raises(ValueError, match="not finite") as error:
        calibrate(
            KEY, entropy, {"w": np.zeros((3, 3), np.float32)}, data, report=said.append,
            num_draws=4, num_burnin=4, num_chains=2,
        )  # fmt: skip
    assert said == []
    assert "step" not in str(error.value)


def test_chains_that_die_of_their_steps_are_not_put_down_to_rows():
    found = estimate_llc(
        KEY, lambda p, b: (b["x"] @ p["w"]) ** 4, {"w": np.ones(3, np.float32)}, {"x": X},
        sampler=SGLD(10.0), localization=1.0, num_chains=2, num_draws=20, num_burnin=0,
    )  # fmt: skip
    assert found.num_finite == 0
    assert "at the anchor" not in found.verdict
    assert any("step_size" in sentence for sentence in found.warnings)
