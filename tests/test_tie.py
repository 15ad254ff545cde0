"""Tied weights: one array in several places is one weight, or it is said that it is not."""

import jax
import numpy as np
import pytest
from laws import assert_within_4_stderr, sgld

from llc_jax import SGLD, estimate_llc, tie

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 3)).astype(np.float32)
W = np.array([0.5, -1.0, 2.0], np.float32)
Y = (X @ (2 * W)).astype(np.float32)
NBETA, STEP = 0.5, 0.2


def loss_fn(params, batch):
    """Of w + v: one network with twice the weights, or one with v = w."""
    return 0.5 * (batch["x"] @ (params["w"] + params["in"]["v"]) - batch["y"]) ** 2


def estimate(loss, params):
    return estimate_llc(
        jax.random.key(0), loss, params, {"x": X, "y": Y}, sampler=SGLD(STEP), nbeta=NBETA,
        localization=1.0, num_draws=3000, num_burnin=500,
    )  # fmt: skip


def exact(scale):
    """λ̂ at H = scale · XᵀX/n; the untied sum has scale 2, the tied one 4."""
    h = scale * np.linalg.eigvalsh(X.T.astype(float) @ X / len(X))
    return NBETA / 2 * sum(x * sgld(STEP, NBETA * x + 1.0).variance() for x in h)


def test_an_array_in_two_places_is_said_and_tied_it_is_another_model():
    """google/flax, issue 1263: weights set equal by hand are updated independently."""
    params = {"w": W, "in": {"v": W}}
    untied = estimate(loss_fn, params)
    assert untied.verdict == "one array in two places"
    assert "params['in']['v'] and params['w']" in untied.warnings[0]
    assert "llc_jax.tie" in untied.warnings[0]
    assert_within_4_stderr(untied.mean, exact(2.0), untied.stderr)

    tied = estimate(*tie(loss_fn, params))
    assert tied.verdict == "ok"
    assert_within_4_stderr(tied.mean, exact(4.0), tied.stderr)
    assert exact(4.0) > exact(2.0) + 4 * untied.stderr


def test_copies_and_constants_are_not_accused():
    for params in ({"w": W, "in": {"v": W.copy()}}, {"w": 0 * W, "in": {"v": 0 * W}}):
        zero = np.zeros(3, np.float32)
        if not params["w"].any():
            params = {"w": zero, "in": {"v": zero}}  # biases are often made this way
        assert "one array" not in estimate(loss_fn, params).verdict


def test_a_tied_tree_has_each_array_once_and_its_loss_fills_the_places():
    params = {"a": W, "b": [W, X], "c": {"d": X, "e": W + 1}, "none": None}
    loss, once = tie(lambda p, b: p, params)
    assert len(jax.tree.leaves(once)) == 3
    assert once["b"][0] is None
    whole = loss(once, None)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert all(map(np.array_equal, jax.tree.leaves(whole), jax.tree.leaves(params)))
    with pytest.raises(ValueError, match="no array stands in two places"):
        tie(loss_fn, {"w": W, "in": {"v": W.copy()}})
