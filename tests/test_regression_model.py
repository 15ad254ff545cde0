"""The regression transformer and its loss: size, initialisation, causality, reference forward."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llc_jax.problems.regression import model as regression
from llc_jax.problems.regression.data import RegressionTask, sample_batch, to_tokens
from llc_jax.problems.regression.losses import (
    RegressionLoss,
    RegressionPrefixLoss,
    RegressionTokenLosses,
)
from llc_jax.problems.regression.model import RegressionTransformer, init_params

MODEL = RegressionTransformer()
# Compiled whole: op by op, the same functions take ten times as long to start.
predictions = jax.jit(regression.predictions, static_argnums=0)
FAN_IN = {
    "token_embed": 5,
    "position_embed": 16,
    "qkv": 64,
    "out": 64,
    "up": 64,
    "down": 64,
    "unembed": 64,
}


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(0), MODEL)


@pytest.fixture(scope="module")
def batch():
    return jax.jit(lambda key: sample_batch(key, RegressionTask(), 3))(jax.random.key(1))


def reference_forward(params, tokens, *, num_heads, double_residual):
    """The published architecture in float64 numpy, one head and position at a time."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, p):
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]
        )

    def attend(x, p):
        batch, length, width = x.shape
        n = width // num_heads
        heads = []
        for h in range(num_heads):
            weights = p["qkv"]["kernel"][:, 3 * n * h : 3 * n * (h + 1)]
            q, k, v = x @ weights[:, :n], x @ weights[:, n : 2 * n], x @ weights[:, 2 * n :]
            mixed = np.zeros((batch, length, n))
            for t in range(length):
                scores = np.einsum("bn,bsn->bs", q[:, t], k[:, : t + 1]) / math.sqrt(n)
                scores = np.exp(scores - scores.max(-1, keepdims=True))
                scores /= scores.sum(-1, keepdims=True)
                mixed[:, t] = np.einsum("bs,bsn->bn", scores, v[:, : t + 1])
            heads.append(mixed)
        return np.concatenate(heads, -1) @ p["out"]["kernel"]

    def mlp(x, p):
        hidden = np.maximum(x @ p["up"]["kernel"] + p["up"]["bias"], 0)
        return hidden @ p["down"]["kernel"] + p["down"]["bias"]

    x = np.asarray(tokens, np.float64) @ p["token_embed"]["kernel"] + p["position_embed"]
    for i in range(sum(name.startswith("block_") for name in p)):
        block = p[f"block_{i}"]
        a = x + attend(norm(x, block["attention_norm"]), block["attention"])
        b = a + mlp(norm(a, block["mlp_norm"]), block["mlp"])
        x = x + b if double_residual else b
    return norm(x, p["final_norm"]) @ p["unembed"]["kernel"] + p["unembed"]["bias"]


def test_parameter_count_is_the_published_one(params):
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 51_717
    assert type(params) is dict
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def leaves_with_fan_in(params):
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [key.key for key in path]
        owner = next((name for name in reversed(names) if name in FAN_IN), None)
        yield names, np.asarray(leaf, np.float64), owner and FAN_IN[owner]


def test_initialisation_is_uniform_in_the_fan_in(params):
    for names, leaf, fan_in in leaves_with_fan_in(params):
        if fan_in is None:
            np.testing.assert_array_equal(leaf, 1.0 if names[-1] == "scale" else 0.0)
            continue
        bound = fan_in**-0.5
        assert np.abs(leaf).max() <= bound
        assert np.abs(leaf).max() > bound * (1 - 10 / leaf.size)
        # U(-b, b): variance b^2/3, variance of the square 4 b^4/45.
        stderr = bound**2 * math.sqrt(4 / 45 / leaf.size)
        assert abs((leaf**2).mean() - bound**2 / 3) < 4 * stderr, names
        assert abs(leaf.mean()) < 4 * bound / math.sqrt(3 * leaf.size), names


def test_weight_norm_at_initialisation(params):
    # 24.9307 is the recorded norm of the paper's seed 1.
    mean = variance = 0.0
    for names, leaf, fan_in in leaves_with_fan_in(params):
        if fan_in is not None:
            mean += leaf.size / fan_in / 3
            variance += leaf.size / fan_in**2 * 4 / 45
        elif names[-1] == "scale":
            mean += leaf.size
    stdev = math.sqrt(variance) / (2 * math.sqrt(mean))  # of the norm, to first order
    assert abs(math.sqrt(mean) - 24.9307) < 4 * stdev
    for seed in range(3):
        leaves = jax.tree.leaves(init_params(jax.random.key(seed), MODEL))
        norm = math.sqrt(sum(float((np.float64(leaf) ** 2).sum()) for leaf in leaves))
        assert abs(norm - math.sqrt(mean)) < 4 * stdev


@pytest.mark.parametrize("double_residual", [False, True])
def test_forward_is_the_reference(params, batch, double_residual):
    model = RegressionTransformer(double_residual=double_residual)
    # Move the norms off 1 and 0, so that forgetting them shows.
    params = jax.tree.map(
        lambda leaf: (
            leaf
            + np.float32(0.1) * np.cos(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape)
        ),
        params,
    )
    tokens = to_tokens(batch)
    expected = reference_forward(params, tokens, num_heads=4, double_residual=double_residual)
    got = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    got = predictions(model, params, batch)
    assert got.shape == (3, 8)
    np.testing.assert_allclose(got, expected[:, ::2, 0], atol=2e-5)


def test_doubled_residual_doubles_the_stream_when_blocks_write_nothing(params, batch):
    def silence(path, leaf):
        owner = path[-2].key if len(path) > 1 else None
        return leaf * np.float32(0) if owner in ("out", "down") else leaf

    silent = jax.tree_util.tree_map_with_path(silence, params)
    # A final norm of scale 1 hides the factor 4 of two doublings, but for its epsilon.
    plain = predictions(MODEL, silent, batch)
    doubled = predictions(RegressionTransformer(double_residual=True), silent, batch)
    np.testing.assert_allclose(plain, doubled, atol=1e-3)
    # With the written part back they differ: the published block weighs its input more.
    plain = predictions(MODEL, params, batch)
    doubled = predictions(RegressionTransformer(double_residual=True), params, batch)
    assert np.abs(plain - doubled).max() > 1e-2


def test_outputs_depend_on_present_and_past_tokens_only(params, batch):
    tokens = to_tokens(batch)

    def outputs(tokens):
        return MODEL.apply({"params": params}, tokens)[..., 0].sum(0)

    jacobian = np.abs(np.asarray(jax.jit(jax.jacobian(outputs))(tokens))).max((1, 3))  # [T, S]
    np.testing.assert_array_equal(np.triu(jacobian, 1), 0)
    assert (jacobian[np.tril_indices(16)] > 0).all()


def test_prediction_k_sees_x_to_k_and_y_before_k(params, batch):
    jacobian = jax.jit(jax.jacobian(lambda b: predictions(MODEL, params, b).sum(0)))(batch)
    x, y = np.abs(jacobian["x"]).max((1, 3)), np.abs(jacobian["y"]).max(1)
    np.testing.assert_array_equal(np.triu(x, 1), 0)
    np.testing.assert_array_equal(np.triu(y), 0)
    assert (x[np.tril_indices(8)] > 0).all()
    assert (y[np.tril_indices(8, -1)] > 0).all()


def test_later_targets_leave_predictions_bitwise_alone(params, batch):
    changed = {**batch, "y": batch["y"].at[:, 4:].add(3.0)}
    before, after = predictions(MODEL, params, batch), predictions(MODEL, params, changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.asarray(before[:, 5:]) != np.asarray(after[:, 5:])).all()


def test_attention_rows_are_causal_distributions(params, batch):
    apply = jax.jit(functools.partial(MODEL.apply, mutable="intermediates"))
    _, state = apply({"params": params}, to_tokens(batch))
    for i in range(2):
        (attention,) = state["intermediates"][f"block_{i}"]["attention"]["attention"]
        assert attention.shape == (3, 4, 16, 16)
        np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
        np.testing.assert_array_equal(np.triu(attention, 1), 0)


def test_weights_that_no_prediction_uses_have_zero_gradient(params, batch):
    loss = RegressionLoss(MODEL)
    grads = jax.jit(jax.grad(lambda p: loss(p, batch).mean()))(params)
    unused = sum(int((np.asarray(leaf) == 0).sum()) for leaf in jax.tree.leaves(grads["unembed"]))
    assert unused == 4 * 65  # rows of the unembedding that feed components 1 to 4
    np.testing.assert_array_equal(grads["position_embed"][15], 0)  # the last y-token
    assert (np.asarray(grads["position_embed"][:15]) != 0).all()


def test_loss_is_the_mean_squared_error_over_positions(params, batch):
    loss, per_token = (jax.jit(f) for f in (RegressionLoss(MODEL), RegressionTokenLosses(MODEL)))
    errors = np.float64(predictions(MODEL, params, batch)) - np.float64(batch["y"])
    np.testing.assert_allclose(per_token(params, batch), errors**2, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss(params, batch), (errors**2).mean(1), rtol=1e-5)
    mute = {**params, "unembed": jax.tree.map(jnp.zeros_like, params["unembed"])}
    np.testing.assert_allclose(loss(mute, batch), (np.float64(batch["y"]) ** 2).mean(1), rtol=1e-5)


def test_equal_losses_share_one_compilation(params, batch):
    run = jax.jit(lambda loss, params, batch: loss(params, batch), static_argnums=0)
    for _ in range(2):
        run(RegressionLoss(RegressionTransformer()), params, batch)
    assert run._cache_size() == 1
    run(RegressionLoss(RegressionTransformer(double_residual=True)), params, batch)
    assert run._cache_size() == 2


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_heads": 3}, "d_model=64.*num_heads=3"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"d_mlp": -2}, "d_mlp=-2"),
    ],
)
def test_bad_sizes_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        RegressionTransformer(**fields)


@pytest.mark.parametrize("shape", [(1, 18, 5), (1, 16, 4)])
def test_bad_tokens_are_refused(params, shape):
    with pytest.raises(ValueError, match=r"tokens of shape .*num_examples=8, dim=4"):
        MODEL.apply({"params": params}, jnp.zeros(shape))


def test_prefix_loss_is_the_mean_over_prefixes(params, batch):
    each = np.asarray(RegressionTokenLosses(MODEL)(params, batch), np.float64)
    length = each.shape[1]
    prefixes = [each[:, :p].mean(axis=1) for p in range(1, length + 1)]
    np.testing.assert_allclose(
        RegressionPrefixLoss(MODEL)(params, batch), np.mean(prefixes, axis=0), rtol=1e-5
    )
