"""Structure of the language model: planted heads, closed forms, dense products as oracles."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llc_jax.checkpoint_map import map_checkpoints
from llc_jax.problems.language import probes as probing
from llc_jax.problems.language.model import AttentionOnlyTransformer, init_params
from llc_jax.problems.language.structure import (
    Structure,
    attended_scores,
    composition,
    position_components,
    random_composition,
    weight_names,
)

V, N, C, LENGTH = 12, 16, 32, 24
MODEL = AttentionOnlyTransformer(num_heads=2, d_model=C, vocab_size=V, context=LENGTH)
START = 5
PROBES = probing.probes(0, 30, MODEL, START)
SHAPES = jax.eval_shape(lambda: init_params(jax.random.key(0), MODEL))


def drawn_params(seed):
    """Params of which none is 0 or 1, so that a forgotten bias or scale shows."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(rng.normal(0.1, 0.4, leaf.shape)), SHAPES)


@functools.partial(jax.jit, static_argnums=0)
def measure(structure, params, probes):
    return structure(0, params, probes)


# --- heads ------------------------------------------------------------------------------------

PLACE, MIRROR, NOW, BEFORE = slice(0, 2), slice(2, 4), slice(4, 4 + V), slice(4 + V, 4 + 2 * V)


def planted_params():
    """Head (0, 1) attends to the token before, head (1, 0) to what followed the same token.

    Channels: two for the place, two that keep the mean 0, V for the token, V for the one before.
    All other heads have queries 0 and attend to everything alike.
    """
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), SHAPES)
    for norm in (params["block_0"]["attention_norm"], params["block_1"]["attention_norm"]):
        norm["scale"][:] = 1
    params["W_E"][:, NOW] = np.eye(V) - 1 / V
    step = math.pi / LENGTH  # places are on half a circle: that one step back is nearest
    angle = step * np.arange(LENGTH)
    params["W_pos"][:, PLACE] = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    params["W_pos"][:, MIRROR] = -params["W_pos"][:, PLACE]
    back = np.array([[math.cos(step), -math.sin(step)], [math.sin(step), math.cos(step)]])
    token = np.eye(V, N)
    first, second = (params[f"block_{i}"]["attention"] for i in (0, 1))
    first["W_Q"][1, PLACE, :2], first["W_K"][1, PLACE, :2] = 2e4 * back, np.eye(2)
    first["W_V"][1, NOW], first["W_O"][1, :, BEFORE] = token, token.T
    second["W_Q"][0, NOW], second["W_K"][0, BEFORE] = 1e3 * token, token
    return params


def test_planted_heads_have_score_one_and_uniform_heads_one_over_the_length():
    found = measure(Structure(MODEL), planted_params(), PROBES)
    heads = {"previous_token": (0, 1), "prefix_matching": (1, 0), "induction": (1, 0)}
    for name, probe in PROBES._asdict().items():
        score, error = np.asarray(found[name]), np.asarray(found[f"{name}_stderr"])
        assert score.shape == error.shape == (2, 2)
        assert score[heads[name]] == pytest.approx(1.0, abs=1e-5), name
        assert error[heads[name]] == pytest.approx(0.0, abs=1e-5), name
        alike = (1 / (probe.query + 1)).mean(axis=1)
        assert found[f"{name}_uniform"] == pytest.approx(alike.mean(), rel=1e-5)
        for head in ((0, 0), (1, 1)):
            assert score[head] == pytest.approx(alike.mean(), rel=1e-4), name
            assert error[head] == pytest.approx(alike.std() / math.sqrt(30), rel=1e-3, abs=1e-7)
    # The first layer knows nothing of what came twice; the second has no head for places.
    assert found["induction"][0, 1] < 1e-5
    assert found["previous_token"][1, 0] < 0.5


def test_scores_are_the_attention_between_the_positions():
    rng = np.random.default_rng(0)
    patterns = rng.random((3, 2, 4, 6, 6)).astype(np.float32)
    query, key = rng.integers(0, 6, (2, 3, 5))
    found = np.asarray(attended_scores(jnp.asarray(patterns), jnp.asarray(query), jnp.asarray(key)))
    assert found.shape == (3, 2, 4)
    for b in range(3):
        pairs = [patterns[b, :, :, q, k] for q, k in zip(query[b], key[b], strict=True)]
        np.testing.assert_allclose(found[b], np.mean(pairs, axis=0), rtol=1e-6)


# --- probes -----------------------------------------------------------------------------------


def check_start_and_range(probe, start, vocab_size):
    np.testing.assert_array_equal(probe.tokens[:, 0], start)
    assert (probe.tokens[:, 1:] != start).all()
    assert probe.tokens.min() >= 0
    assert probe.tokens.max() < vocab_size
    assert {x.dtype for x in probe} == {np.dtype(np.int32)}


def check_uniform(values, outcomes):
    p, count = 1 / len(outcomes), np.size(values)
    found = np.array([(values == outcome).sum() for outcome in outcomes])
    assert found.sum() == count
    assert (np.abs(found - count * p) < 4 * math.sqrt(count * p * (1 - p))).all()


@pytest.mark.parametrize("start", [0, 5, 9])
def test_previous_token_probe(start):
    sizes = {"vocab_size": 10, "start_token": start, "shortest": 4, "longest": 9}
    probe = probing.previous_token(0, 2000, **sizes)
    check_start_and_range(probe, start, 10)
    assert probe.tokens.shape == (2000, 9)
    check_uniform(probe.query, range(3, 9))  # lengths 4 to 9
    np.testing.assert_array_equal(probe.key, probe.query - 1)
    check_uniform(probe.tokens[:, 1:], [word for word in range(10) if word != start])


@pytest.mark.parametrize("start", [0, 5, 9])
def test_prefix_matching_probe(start):
    sizes = {"vocab_size": 10, "start_token": start, "length": 12}
    probe = probing.prefix_matching(0, 2000, **sizes)
    check_start_and_range(probe, start, 10)
    check_uniform(probe.key, range(2, 7))  # the first place is from 1 to 5
    check_uniform(probe.query, range(7, 12))
    rows = np.arange(2000)[:, None]
    special = probe.tokens[rows, probe.query]
    check_uniform(special, [word for word in range(10) if word != start])
    np.testing.assert_array_equal(probe.tokens[rows, probe.key - 1], special)
    np.testing.assert_array_equal((probe.tokens == special).sum(axis=1), 2)
    others = probe.tokens[:, 1:][probe.tokens[:, 1:] != special]
    check_uniform(others, [word for word in range(10) if word != start])


@pytest.mark.parametrize(("start", "block"), [(0, 3), (5, 9)])
def test_induction_probe(start, block):
    sizes = {"vocab_size": 10, "start_token": start, "block": block}
    probe = probing.induction(0, 2000, **sizes)
    check_start_and_range(probe, start, 10)
    assert probe.tokens.shape == (2000, 2 * block + 1)
    np.testing.assert_array_equal(probe.tokens[:, 1 : block + 1], probe.tokens[:, block + 1 :])
    assert all(len(set(row)) == block for row in probe.tokens[:, 1 : block + 1])
    check_uniform(probe.tokens[:, 1], [word for word in range(10) if word != start])
    np.testing.assert_array_equal(probe.query[0], np.arange(block + 1, 2 * block + 1))
    rows = np.arange(2000)[:, None]
    np.testing.assert_array_equal(
        probe.tokens[rows, probe.key - 1], probe.tokens[rows, probe.query]
    )
    assert (probe.key <= probe.query - 1).all()
    assert (probe.key - 1 <= block).all()  # the first occurrence, not the word itself


def test_probes_have_the_published_sizes_or_fit_the_context():
    published = probing.probes(0, 5, AttentionOnlyTransformer(), 4999)
    assert [probe.tokens.shape for probe in published] == [(5, 64), (5, 128), (5, 101)]
    assert published.previous_token.query.min() >= 15
    assert [probe.tokens.shape[1] for probe in PROBES] == [24, 24, 23]
    tiny = AttentionOnlyTransformer(num_heads=1, d_model=4, vocab_size=3, context=5)
    assert [probe.tokens.shape[1] for probe in probing.probes(0, 5, tiny, 0)] == [5, 5, 5]
    again, other = (probing.probes(seed, 30, MODEL, START) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, again, PROBES)
    assert all((a.tokens != b.tokens).any() for a, b in zip(other, PROBES, strict=True))


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (probing.previous_token, {"longest": 8}, "longest=8: give an integer of at least 16"),
        (probing.previous_token, {"shortest": 1}, "shortest=1"),
        (probing.previous_token, {"start_token": 12}, "start_token=12: give an id below"),
        (probing.prefix_matching, {"length": 3}, "length=3"),
        (probing.prefix_matching, {"vocab_size": 2, "start_token": 1}, "vocab_size=2"),
        (probing.induction, {"block": 12}, "vocab_size=12: give an integer of at least 13"),
        (probing.induction, {"block": 1}, "block=1"),
        (probing.induction, {"seed": -1}, "seed=-1"),
        (probing.induction, {"num_sequences": 0}, "num_sequences=0"),
    ],
)
def test_probes_that_make_no_sense_are_refused(make, change, message):
    settings = {"seed": 0, "num_sequences": 3, "vocab_size": V, "start_token": START, **change}
    with pytest.raises(ValueError, match=message):
        make(settings.pop("seed"), settings.pop("num_sequences"), **settings)


# --- composition ------------------------------------------------------------------------------


def circuits(params, layer):
    """W_V W_O and W_Q W_K^T of every head, float64 [H, C, C]."""
    weights = {
        name: np.asarray(weight, np.float64)
        for name, weight in params[f"block_{layer}"]["attention"].items()
    }
    return weights["W_V"] @ weights["W_O"], weights["W_Q"] @ weights["W_K"].swapaxes(1, 2)


def read_circuits(params, layer):
    """The dense matrix with which each kind of composition reads."""
    ov, qk = circuits(params, layer)
    return {"k_composition": qk.swapaxes(1, 2), "q_composition": qk, "v_composition": ov}


def test_composition_is_that_of_the_dense_products():
    params = drawn_params(3)
    for early, late in ((0, 1), (1, 0), (0, 0)):
        found = composition(params, early, late)
        written, _ = circuits(params, early)
        for name, read in read_circuits(params, late).items():
            product = np.linalg.norm(written[:, None] @ read[None], axis=(2, 3))
            lengths = [np.linalg.norm(x, axis=(1, 2)) for x in (written, read)]
            np.testing.assert_allclose(found[name], product / np.outer(*lengths), rtol=1e-5)


def test_heads_of_rank_one_compose_by_the_cosine_of_their_directions():
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), SHAPES)
    reader, writer = (params[f"block_{i}"]["attention"] for i in (1, 0))
    for head in range(2):
        for name in ("W_Q", "W_K", "W_V"):
            writer[name][head, :, 3], reader[name][head, :, 3] = rng.normal(size=(2, C))
        writer["W_O"][head, 3], reader["W_O"][head, 3] = rng.normal(size=(2, C))
    reader["W_Q"][1, :, 3] = writer["W_O"][0, 3]  # reads just what the other writes
    found = composition(params)
    for kind in "kqv":
        directions = reader[f"W_{kind.upper()}"][:, :, 3]
        lengths = np.outer(
            np.linalg.norm(writer["W_O"][:, 3], axis=1), np.linalg.norm(directions, axis=1)
        )
        cosine = np.abs(writer["W_O"][:, 3] @ directions.T) / lengths
        np.testing.assert_allclose(found[f"{kind}_composition"], cosine, rtol=1e-5)
    assert found["q_composition"][0, 1] == pytest.approx(1.0, rel=1e-5)
    reader["W_Q"][1] = 0
    assert np.isnan(composition(params)["k_composition"]).tolist() == [[False, True]] * 2


def test_composition_at_initialisation_is_that_of_random_rotations():
    model = AttentionOnlyTransformer()
    width = model.d_model
    assert random_composition(model) == 0.0625
    params = init_params(jax.random.key(0), model)
    found = jax.jit(composition)(params)

    def spread(matrices):
        """|S0|² of S = A A^T / |A|² without its trace, for every head's A; [H]."""
        grams = matrices @ matrices.swapaxes(1, 2)
        lengths = np.trace(grams, axis1=1, axis2=2)
        return np.square(grams).sum(axis=(1, 2)) / lengths**2 - 1 / width

    written = spread(circuits(params, 0)[0].swapaxes(1, 2))
    for name, read in read_circuits(params, 1).items():
        # |A R B|² is the trace of A^T A R B B^T R^T. Over rotations R its mean is |A|² |B|² / C and
        # its variance 2 |S0|² |T0|² / ((C - 1)(C + 2)), S0 = A^T A and T0 = B B^T without trace.
        # Pairs are uncorrelated, since every head has a rotation of its own.
        variance = 2 * np.outer(written, spread(read)) / ((width - 1) * (width + 2))
        squares = np.asarray(found[name], np.float64) ** 2
        assert abs(squares.mean() - 1 / width) < 4 * math.sqrt(variance.mean() / squares.size), name
        assert squares.std() == pytest.approx(math.sqrt(variance.mean()), rel=0.4)
        assert np.abs(np.sqrt(squares) / 0.0625 - 1).max() < 0.1


# --- positions and norms ----------------------------------------------------------------------


def test_positions_on_an_ellipse_have_two_components():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(C, C)))[0][:2]
    angle = 2 * math.pi * np.arange(LENGTH) / LENGTH
    ellipse = np.stack([5 * np.cos(angle), 2 * np.sin(angle)], axis=1)
    rows = (rng.normal(size=C)[None] + ellipse @ basis).astype(np.float32)
    found = position_components({"W_pos": rows})
    np.testing.assert_allclose(found["position_explained"], [25 / 29, 4 / 29, 0], atol=1e-6)
    np.testing.assert_allclose(
        np.abs(found["position_coordinates"][:, :2]), np.abs(ellipse), atol=1e-5
    )
    assert found["position_coordinates"].shape == (LENGTH, 3)
    np.testing.assert_allclose(found["position_norm"], np.sqrt((rows**2).sum(axis=1)), rtol=1e-5)
    assert {x.dtype for x in found.values()} == {np.dtype(np.float32)}


def test_norms_are_those_of_the_weights_by_name():
    params = drawn_params(4)
    found = measure(Structure(MODEL), params, PROBES)
    names = weight_names(params)
    assert {"W_E", "b_U", "block_1/attention/W_O", "final_norm/scale"} < set(names)
    total = 0.0
    for name, value in zip(names, found["weight_norms"], strict=True):
        leaf = functools.reduce(lambda tree, key: tree[key], name.split("/"), params)
        square = float(np.sum(np.square(leaf, dtype=np.float64)))
        assert value == pytest.approx(math.sqrt(square), rel=1e-5)
        total += square
    assert found["weight_norm"] == pytest.approx(math.sqrt(total), rel=1e-5)
    for name, value in composition(params).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)


# --- chunks, checkpoints ----------------------------------------------------------------------


def test_numbers_do_not_depend_on_checkpoints_beside_them_nor_on_chunks():
    checkpoints = {seed: drawn_params(seed) for seed in (1, 2, 3)}
    chunked = Structure(MODEL, tokens_at_once=7 * LENGTH)  # 30 sequences in chunks of 6
    together = dict(map_checkpoints(chunked, checkpoints, PROBES, checkpoint_batch=4))
    for seed, params in checkpoints.items():
        alone = measure(Structure(MODEL), params, PROBES)
        assert together[seed].keys() == alone.keys()
        for name, value in alone.items():
            assert value.dtype == jnp.float32
            np.testing.assert_allclose(
                together[seed][name], value, rtol=2e-5, atol=1e-6, err_msg=name
            )
    lowered = measure.lower(chunked, params, PROBES).as_text()
    assert "lapack" not in lowered


def test_one_layer_composes_with_nothing():
    model = AttentionOnlyTransformer(
        num_layers=1, num_heads=2, d_model=C, vocab_size=V, context=LENGTH
    )
    params = {name: value for name, value in drawn_params(0).items() if name != "block_1"}
    found = jax.eval_shape(Structure(model), 0, params, PROBES)
    assert not [name for name in found if "composition" in name]
    assert found["induction"].shape == (1, 2)
    with pytest.raises(ValueError, match="tokens_at_once=0"):
        Structure(model, tokens_at_once=0)
