"""Next-token losses: closed forms, gradients, chunks, and what chunks are for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llc_jax.problems.language.losses import (
    LanguageLoss,
    LanguageOctaveLosses,
    LanguageTokenLosses,
    octaves,
)
from llc_jax.problems.language.model import AttentionOnlyTransformer, init_params

SIZES = {"num_layers": 1, "num_heads": 2, "d_model": 16, "vocab_size": 24, "context": 12}
MODEL = AttentionOnlyTransformer(**SIZES)
TOKENS = np.random.default_rng(0).permutation(24).reshape(2, 12).astype(np.int32)  # all distinct
BATCH = {"tokens": TOKENS}


def drawn_params(seed):
    """Params of which none is 0 or 1, so that a forgotten bias or scale shows."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), MODEL))
    return jax.tree.map(lambda leaf: np.float32(rng.normal(0.1, 0.4, leaf.shape)), shapes)


PARAMS = drawn_params(0)


@functools.partial(jax.jit, static_argnums=0)
def losses(loss_fn, params, batch):
    return loss_fn(params, batch)


def mean_gradient(loss_fn, params, batch):
    return jax.grad(lambda params: loss_fn(params, batch).mean())(params)


gradient = jax.jit(mean_gradient, static_argnums=0)


def assert_trees_close(found, expected, **tolerances):
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, **tolerances)


@pytest.mark.parametrize("chunk", [0, 4])
def test_loss_of_a_model_that_knows_the_frequencies_alone(chunk):
    # With W_U = 0 and b_U = log p + c, the loss of token v is -log p_v whatever c: entropy by hand.
    frequencies = np.random.default_rng(2).dirichlet(np.ones(24))
    for shift in (0.0, 1e3, -1e3):
        bias = np.float32(np.log(frequencies) + shift)
        params = {**PARAMS, "W_U": np.zeros_like(PARAMS["W_U"]), "b_U": bias}
        per_token = losses(LanguageTokenLosses(MODEL, chunk), params, BATCH)
        assert per_token.shape == (2, 11)
        assert per_token.dtype == jnp.float32
        expected = -np.log(frequencies[TOKENS[:, 1:]])
        np.testing.assert_allclose(per_token, expected, rtol=1e-6, atol=2e-7 * abs(shift))
        loss = losses(LanguageLoss(MODEL, chunk), params, BATCH)
        np.testing.assert_allclose(loss, expected.mean(1), rtol=1e-6, atol=2e-7 * abs(shift))


def test_loss_is_that_of_the_logits():
    logits = np.float64(jax.jit(MODEL.apply)({"params": PARAMS}, TOKENS))[:, :-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, TOKENS[:, 1:, None], axis=-1)[..., 0]
    found = losses(LanguageTokenLosses(MODEL), PARAMS, BATCH)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Its gradient in the bias is softmax - one-hot, averaged over predictions.
    one_hot = np.eye(24)[TOKENS[:, 1:]]
    grads = gradient(LanguageTokenLosses(MODEL), PARAMS, BATCH)
    np.testing.assert_allclose(grads["b_U"], (np.exp(log_p) - one_hot).mean((0, 1)), atol=1e-7)


def test_loss_sees_its_target_and_the_past_only():
    # All tokens are distinct, so that row v of W_E is the input at one place alone.
    def per_token(embedding):
        return LanguageTokenLosses(MODEL)({**PARAMS, "W_E": embedding}, BATCH)[0]

    jacobian = np.abs(np.asarray(jax.jit(jax.jacobian(per_token))(PARAMS["W_E"])))
    jacobian = jacobian[:, TOKENS[0]].max(-1)  # [prediction, input]
    np.testing.assert_array_equal(np.triu(jacobian, 1), 0)
    assert (jacobian[:, :11][np.tril_indices(11)] > 0).all()
    changed = TOKENS.copy()
    changed[0, 5] = TOKENS[1, 5]
    before, after = (
        np.asarray(losses(LanguageTokenLosses(MODEL), PARAMS, {"tokens": t}))[0]
        for t in (TOKENS, changed)
    )
    np.testing.assert_array_equal(before[:4], after[:4])
    assert (before[4:] != after[4:]).all()  # entry 4 predicts token 5


@pytest.mark.parametrize("chunk", [1, 4, 99])
def test_chunks_change_neither_losses_nor_gradients(chunk):
    whole, chunked = LanguageTokenLosses(MODEL), LanguageTokenLosses(MODEL, chunk)
    np.testing.assert_allclose(
        losses(chunked, PARAMS, BATCH), losses(whole, PARAMS, BATCH), rtol=1e-5
    )
    grads = (gradient(loss_fn, PARAMS, BATCH) for loss_fn in (chunked, whole))
    assert_trees_close(*grads, rtol=2e-4, atol=1e-6)


@pytest.mark.slow
def test_hessian_vector_products_pass_through_chunks():
    loss_fn, direction = LanguageTokenLosses(MODEL, 4), drawn_params(1)

    @jax.jit
    def product(direction):
        of_params = functools.partial(mean_gradient, loss_fn, batch=BATCH)
        return jax.jvp(of_params, (PARAMS,), (direction,))[1]

    def shifted(by):
        moved = jax.tree.map(lambda w, v: w + np.float32(by) * v, PARAMS, direction)
        return jax.tree.map(np.asarray, gradient(loss_fn, moved, BATCH))

    difference = jax.tree.map(lambda a, b: (a - b) / 2e-3, shifted(1e-3), shifted(-1e-3))
    assert_trees_close(product(direction), difference, rtol=5e-3, atol=1e-3)


@pytest.mark.slow
def test_chunks_bound_the_memory_of_a_gradient():
    model = AttentionOnlyTransformer(num_heads=1, d_model=16, vocab_size=5000, context=65)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), model))
    tokens = jax.ShapeDtypeStruct((4, 65), jnp.uint16)

    def temporary(chunk):
        compiled = gradient.lower(LanguageLoss(model, chunk), params, {"tokens": tokens}).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * 64 * 5000 * 4  # bytes
    assert temporary(0) > logits
    assert temporary(4) < 0.5 * logits


def test_vmap_over_models_is_a_loop_over_models():
    models, loss_fn = [drawn_params(seed) for seed in range(3)], LanguageTokenLosses(MODEL, 4)
    stacked, alone = (
        jax.tree.map(lambda *x: np.stack(x), *trees)
        for trees in (models, [gradient(loss_fn, params, BATCH) for params in models])
    )
    together = jax.jit(jax.vmap(functools.partial(mean_gradient, loss_fn, batch=BATCH)))(stacked)
    assert_trees_close(together, alone, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [0, 4])
def test_bfloat16_losses_are_float32_and_close(chunk):
    low = AttentionOnlyTransformer(**SIZES, dtype=jnp.bfloat16)
    found = losses(LanguageTokenLosses(low, chunk), PARAMS, BATCH)
    exact = losses(LanguageTokenLosses(MODEL, chunk), PARAMS, BATCH)
    assert found.dtype == jnp.float32
    assert 1e-4 < np.abs(found - exact).max() < 0.1
    grads = jax.eval_shape(
        functools.partial(mean_gradient, LanguageLoss(low, chunk)), PARAMS, BATCH
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_ids_may_be_small_unsigned_integers():
    small = {"tokens": TOKENS.astype(np.uint16)}
    loss_fn = LanguageTokenLosses(MODEL, 4)
    found = losses(loss_fn, PARAMS, small)
    np.testing.assert_array_equal(found, losses(loss_fn, PARAMS, BATCH))


def test_equal_losses_share_one_compilation():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(loss_fn):
        traces.append(loss_fn)

    for chunk in (0, 0, 4):
        run(LanguageLoss(AttentionOnlyTransformer(**SIZES), chunk))
    assert len(traces) == 2


@pytest.mark.parametrize("token", [24, -1])
@pytest.mark.parametrize("place", [0, 11])
def test_an_id_outside_the_vocabulary_gives_nan(token, place):
    tokens = TOKENS.copy()
    tokens[0, place] = token
    found = losses(LanguageLoss(MODEL), PARAMS, {"tokens": tokens})
    np.testing.assert_array_equal(np.isnan(found), [True, False])


@pytest.mark.parametrize("loss_type", [LanguageLoss, LanguageTokenLosses])
def test_bad_input_is_refused(loss_type):
    with pytest.raises(ValueError, match="chunk=-1"):
        loss_type(MODEL, -1)
    loss_fn = loss_type(MODEL)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        loss_fn(PARAMS, {"tokens": TOKENS[:, :1]})
    with pytest.raises(ValueError, match="context=12"):
        loss_fn(PARAMS, {"tokens": np.zeros((1, 13), np.int32)})
    with pytest.raises(ValueError, match="from 0 to 23, outside 0 to 22"):
        loss_type(AttentionOnlyTransformer(**{**SIZES, "vocab_size": 23}))(PARAMS, BATCH)


def test_octaves_are_means_over_their_predictions():
    assert octaves(1024) == [1, 3, 7, 15, 31, 63, 127, 255, 511, 1023]
    assert octaves(9) == [1, 3, 7, 8]
    assert octaves(2) == [1]
    with pytest.raises(ValueError, match="context=1"):
        octaves(1)
    parts = losses(LanguageOctaveLosses(MODEL), PARAMS, BATCH)
    tokens = losses(LanguageTokenLosses(MODEL), PARAMS, BATCH)
    expected = [tokens[:, a:b].mean(1) for a, b in ((0, 1), (1, 3), (3, 7), (7, 11))]
    np.testing.assert_allclose(parts, np.stack(expected, 1), rtol=1e-6)
    whole = losses(LanguageLoss(MODEL), PARAMS, BATCH)
    np.testing.assert_allclose(parts @ np.float32([1, 2, 4, 4]) / 11, whole, rtol=1e-6)
