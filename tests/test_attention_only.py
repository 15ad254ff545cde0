"""The attention-only language model: size, initialisation, causality, positions, reference."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llc_jax.problems.language import model as attention_only
from llc_jax.problems.language.losses import LanguageLoss
from llc_jax.problems.language.model import (
    AttentionOnlyTransformer,
    ablate_positions,
    check_tokens,
    init_params,
)

SIZES = {"num_heads": 2, "d_model": 16, "vocab_size": 24, "context": 12}
MODEL = AttentionOnlyTransformer(**SIZES)
TOKENS = np.random.default_rng(0).permutation(24).reshape(2, 12).astype(np.int32)  # all distinct
# Compiled whole: op by op, the same functions take ten times as long to start.
attention = jax.jit(attention_only.attention, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tokens):
    return model.apply({"params": params}, tokens)


@functools.partial(jax.jit, static_argnums=0)
def residual(model, params, tokens):
    return model.apply({"params": params}, tokens, method="residual")


def with_every_weight_at_work(model):
    """Params of which none is 0 or 1, so that a forgotten bias or scale shows."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), model))
    return jax.tree.map(lambda leaf: np.float32(rng.normal(0.1, 0.4, leaf.shape)), shapes)


PARAMS = with_every_weight_at_work(MODEL)


def reference_forward(params, tokens, positions):
    """The architecture in float64 numpy, one sequence, head and position at a time."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, p):
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred / deviation * p["scale"] + p["bias"]

    num_layers = sum(name.startswith("block_") for name in p)
    num_heads, _, n = p["block_0"]["attention"]["W_Q"].shape
    batch, length = tokens.shape
    patterns = np.zeros((batch, num_layers, num_heads, length, length))
    outputs = []
    for b, sequence in enumerate(tokens):
        x, place = p["W_E"][sequence], p["W_pos"][:length]
        if positions == "learned":
            x, place = x + place, np.zeros_like(place)
        for i in range(num_layers):
            a = p[f"block_{i}"]["attention"]
            values_in = norm(x, p[f"block_{i}"]["attention_norm"])
            written = np.tile(a["b_O"], (length, 1))
            for h in range(num_heads):
                q = (values_in + place) @ a["W_Q"][h] + a["b_Q"][h]
                k = (values_in + place) @ a["W_K"][h] + a["b_K"][h]
                v = values_in @ a["W_V"][h] + a["b_V"][h]
                for t in range(length):
                    weights = np.exp(k[: t + 1] @ q[t] / math.sqrt(n))
                    weights /= weights.sum()
                    patterns[b, i, h, t, : t + 1] = weights
                    written[t] += weights @ v[: t + 1] @ a["W_O"][h]
            x = x + written
        outputs.append(norm(x, p["final_norm"]) @ p["W_U"] + p["b_U"])
    return np.stack(outputs), patterns


@pytest.mark.parametrize("positions", ["shortformer", "learned"])
@pytest.mark.parametrize(("num_layers", "num_heads", "length"), [(1, 1, 3), (2, 2, 12)])
def test_forward_and_attention_are_the_reference(positions, num_layers, num_heads, length):
    sizes = {**SIZES, "num_layers": num_layers, "num_heads": num_heads, "positions": positions}
    model = AttentionOnlyTransformer(**sizes)
    params, tokens = with_every_weight_at_work(model), TOKENS[:, :length]
    params["W_E"] *= np.float32(0.01)  # variances near 1e-5 show the epsilon of the layer norm
    expected, patterns = reference_forward(params, tokens, positions)
    np.testing.assert_allclose(logits(model, params, tokens), expected, atol=5e-5)
    np.testing.assert_allclose(attention(model, params, tokens), patterns, atol=5e-6)


def test_residual_is_what_the_unembedding_reads():
    final = residual(MODEL, PARAMS, TOKENS)
    assert final.shape == (2, 12, 16)
    read = np.float64(final) @ np.float64(PARAMS["W_U"]) + PARAMS["b_U"]
    np.testing.assert_allclose(logits(MODEL, PARAMS, TOKENS), read, atol=1e-5)


@pytest.mark.parametrize(
    ("num_layers", "size", "recorded_norm"), [(2, 3_355_016, 95.567), (1, 3_091_336, 90.671)]
)
def test_published_size_and_initialisation(num_layers, size, recorded_norm):
    model = AttentionOnlyTransformer(num_layers=num_layers)
    params = init_params(jax.random.key(0), model)
    assert type(params) is dict
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size
    squares = expected = variance = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, values = path[-1].key, np.asarray(leaf, np.float64)
        assert leaf.dtype == jnp.float32
        squares += (values**2).sum()
        if name.startswith("W_"):
            # N(0, 0.05²): the mean has variance s²/n, the mean square 2 s⁴/n.
            assert abs(values.mean()) < 4 * 0.05 / math.sqrt(leaf.size), name
            assert abs((values**2).mean() - 0.05**2) < 4 * 0.05**2 * math.sqrt(2 / leaf.size), name
            expected += leaf.size * 0.05**2
            variance += leaf.size * 2 * 0.05**4
        else:
            np.testing.assert_array_equal(values, 1.0 if name == "scale" else 0.0)
            expected += leaf.size if name == "scale" else 0
    assert abs(squares - expected) < 4 * math.sqrt(variance)
    # Recorded after one step of training, whose 0.001 per weight adds 0.017 to the norm.
    stdev = math.sqrt(variance) / (2 * math.sqrt(expected))
    assert abs(math.sqrt(expected) - recorded_norm) < 4 * stdev
    # |LN x|² = C and W_U ~ N(0, s²/C): logits ~ N(0, s²), and log-mean-exp adds s²/2 to log V.
    tokens = np.random.default_rng(0).integers(0, 5000, (4, 32))
    loss = np.asarray(jax.jit(LanguageLoss(model))(params, {"tokens": tokens})).mean()
    stderr = 0.8 / math.sqrt(4 * 31)  # of the mean logit of the targets
    assert abs(loss - (math.log(5000) + 0.8**2 / 2)) < 4 * stderr < 0.8**2 / 2


def test_outputs_depend_on_present_and_past_tokens_only():
    # All tokens are distinct, so that row v of W_E is the input at one place alone.
    def output(embedding):
        return logits(MODEL, {**PARAMS, "W_E": embedding}, TOKENS)[..., 0].sum(0)

    jacobian_LxVxC = np.asarray(jax.jit(jax.jacobian(output))(PARAMS["W_E"]))
    for tokens in TOKENS:
        jacobian = np.abs(jacobian_LxVxC[:, tokens]).max(-1)
        np.testing.assert_array_equal(np.triu(jacobian, 1), 0)
        assert (jacobian[np.tril_indices(12)] > 0).all()


def test_later_tokens_leave_outputs_bitwise_alone():
    changed = TOKENS.copy()
    changed[:, 5] = TOKENS[::-1, 5]
    before, after = (np.asarray(logits(MODEL, PARAMS, t)) for t in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


def without_queries(params, layers):
    """Zero queries in the given layers: their attention is uniform, whatever the keys."""
    silent = dict(params)
    for i in layers:
        block = params[f"block_{i}"]
        muted = {name: np.zeros_like(block["attention"][name]) for name in ("W_Q", "b_Q")}
        silent[f"block_{i}"] = {**block, "attention": {**block["attention"], **muted}}
    return silent


def test_shortformer_positions_reach_queries_and_keys_of_every_layer_and_nothing_else():
    def depends_on_positions(params, positions):
        model = AttentionOnlyTransformer(**SIZES, positions=positions)
        moved = {**params, "W_pos": params["W_pos"][::-1]}
        before, after = (np.asarray(logits(model, p, TOKENS)) for p in (params, moved))
        return (before != after).any()

    uniform = without_queries(PARAMS, [0, 1])
    assert not depends_on_positions(uniform, "shortformer")
    assert depends_on_positions(uniform, "learned")
    assert depends_on_positions(without_queries(PARAMS, [0]), "shortformer")
    assert depends_on_positions(without_queries(PARAMS, [1]), "shortformer")


@pytest.mark.parametrize("positions", ["shortformer", "learned"])
def test_one_layer_without_positions_sees_a_bag_of_tokens(positions):
    model = AttentionOnlyTransformer(**SIZES, num_layers=1, positions=positions)
    params = with_every_weight_at_work(model)
    shuffled = np.concatenate([TOKENS[:, 10::-1], TOKENS[:, 11:]], axis=1)
    last = [np.asarray(logits(model, params, tokens))[:, -1] for tokens in (TOKENS, shuffled)]
    assert np.abs(last[0] - last[1]).max() > 0.1
    ablated = ablate_positions(params)
    last = [np.asarray(logits(model, ablated, tokens))[:, -1] for tokens in (TOKENS, shuffled)]
    np.testing.assert_allclose(*last, atol=1e-5)
    assert (params["W_pos"] != 0).all()  # the original is left alone


def test_short_sequences_use_the_first_positions():
    def output(positions):
        return logits(MODEL, {**PARAMS, "W_pos": positions}, TOKENS[:, :7]).std()

    grads = np.asarray(jax.jit(jax.grad(output))(PARAMS["W_pos"]))
    np.testing.assert_array_equal(grads[7:], 0)
    assert (grads[:7] != 0).all()


def test_bfloat16_computes_low_and_returns_float32():
    low = AttentionOnlyTransformer(**SIZES, dtype=jnp.bfloat16)
    fresh = jax.eval_shape(lambda: init_params(jax.random.key(0), low))
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    found, exact = (np.asarray(logits(model, PARAMS, TOKENS)) for model in (low, MODEL))
    assert found.dtype == jnp.float32
    error = np.abs(found - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.02  # a rounding is 0.004
    assert residual(low, PARAMS, TOKENS).dtype == jnp.bfloat16
    patterns = attention(low, PARAMS, TOKENS)
    assert patterns.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(patterns).sum(-1), 1, rtol=1e-6)


def test_remat_saves_the_stream_between_blocks_alone_and_changes_no_gradient():
    remat = AttentionOnlyTransformer(**SIZES, remat=True)
    assert jax.tree.structure(PARAMS) == jax.tree.structure(
        jax.eval_shape(lambda: init_params(jax.random.key(0), remat))
    )

    def spread(model):
        return lambda params: logits(model, params, TOKENS).std()

    def saved(model):  # whether the attention patterns of a layer are kept, [B, H, L, M]
        backward = jax.eval_shape(lambda params: jax.vjp(spread(model), params)[1], PARAMS)
        return sum(leaf.shape == (2, 2, 12, 12) for leaf in jax.tree.leaves(backward))

    assert saved(MODEL) >= 2
    assert saved(remat) == 0
    grads = [jax.jit(jax.grad(spread(model)))(PARAMS) for model in (MODEL, remat)]
    for expected, found in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    patterns = attention(remat, PARAMS, TOKENS)
    np.testing.assert_allclose(patterns, attention(MODEL, PARAMS, TOKENS), atol=1e-6)


def test_models_are_hashable_and_equal_by_value():
    assert hash(AttentionOnlyTransformer(**SIZES)) == hash(MODEL)
    assert AttentionOnlyTransformer(**SIZES) == MODEL != AttentionOnlyTransformer()


def test_ids_may_be_small_unsigned_integers():
    found = logits(MODEL, PARAMS, TOKENS.astype(np.uint16))
    np.testing.assert_array_equal(found, logits(MODEL, PARAMS, TOKENS))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_heads": 3}, "d_model=16.*num_heads=3"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"vocab_size": -2}, "vocab_size=-2"),
        ({"positions": "rotary"}, "positions='rotary'.*shortformer"),
        ({"init_scale": -1.0}, "init_scale=-1.0"),
        ({"dtype": jnp.float16}, "dtype=.*float16.*bfloat16"),
    ],
)
def test_bad_fields_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        AttentionOnlyTransformer(**{**SIZES, **fields})


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        (np.zeros((1, 13), np.int32), r"\(1, 13\).*context=12"),
        (np.zeros(12, np.int32), r"\(12,\).*integers \[B, L\]"),
        (np.zeros((1, 12), np.float32), "float32.*integers"),
        (np.full((1, 12), 24, np.int32), "from 24 to 24, outside 0 to 23.*vocab_size"),
        (np.full((1, 12), -1, np.int32), "from -1 to -1, outside 0 to 23"),
    ],
)
def test_bad_tokens_are_refused(tokens, match):
    with pytest.raises(ValueError, match=match):
        check_tokens(MODEL, tokens)
    with pytest.raises(ValueError, match=match):
        MODEL.apply({"params": PARAMS}, tokens)


@pytest.mark.parametrize("token", [24, -1])
@pytest.mark.parametrize("place", [0, 11])
def test_an_id_outside_the_vocabulary_turns_its_sequence_to_nan(token, place):
    tokens = TOKENS.copy()
    tokens[0, place] = token
    found = np.isnan(logits(MODEL, PARAMS, tokens))
    assert found[0].all()
    assert not found[1].any()
