"""Behaviour of the language model: planted models whose losses and divergences are known."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llc_jax.checkpoint_map import map_checkpoints
from llc_jax.metrics.averages import mean_over_sequences
from llc_jax.problems.language.behavior import Behavior, icl_tokens, questions
from llc_jax.problems.language.losses import LanguageTokenLosses
from llc_jax.problems.language.model import AttentionOnlyTransformer, ablate_positions, init_params

V, L, B = 12, 10, 23
MODEL = AttentionOnlyTransformer(num_layers=1, num_heads=2, d_model=16, vocab_size=V, context=L)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, V - 1, (B, L)).astype(np.uint16)
TOKENS[:, 0] = V - 1
TABLE = RNG.dirichlet(np.ones(V), V)
NGRAMS = [RNG.integers(0, V - 1, (m, n)) for m, n in ((7, 2), (7, 4), (7, 3))]
QUESTIONS = questions(0, MODEL, TOKENS, TABLE, NGRAMS, TOKENS[:3])


def drawn_params(seed):
    """Params of which none is 0 or 1, so that a forgotten bias or scale shows."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), MODEL))
    return jax.tree.map(lambda leaf: np.float32(rng.normal(0.1, 0.4, leaf.shape)), shapes)


PARAMS = drawn_params(1)


def the_table(table):
    """Params whose prediction after token t is exactly row t, whatever came before."""
    params = jax.tree.map(np.zeros_like, PARAMS)
    centred = np.eye(V) - 1 / V
    params["W_E"] = np.pad(centred, ((0, 0), (0, 16 - V))).astype(np.float32)
    params["final_norm"] = {"scale": np.ones(16, np.float32), "bias": np.zeros(16, np.float32)}
    # Rows of W_E have mean 0 and one length, so that the layer norm multiplies all by one number.
    gain = 1 / math.sqrt((1 - 1 / V) / 16 + 1e-5)
    with np.errstate(divide="ignore"):
        log_table = np.log(table)
    params["W_U"][:V] = log_table / gain
    params["b_U"] = log_table.mean(axis=0).astype(np.float32)
    return params


@functools.partial(jax.jit, static_argnums=0)
def measure(behavior, params, asked):
    return behavior(0, params, asked)


@jax.jit
def log_probs(tokens):
    """Log-probabilities of the next token after each, of the model with `PARAMS`."""
    return jax.nn.log_softmax(MODEL.apply({"params": PARAMS}, tokens))


@pytest.fixture(scope="module")
def found():
    return measure(Behavior(MODEL), PARAMS, QUESTIONS)


@pytest.fixture(scope="module")
def each():
    """Losses of every sequence, without and with positions."""
    losses = jax.jit(LanguageTokenLosses(MODEL))
    batch = {"tokens": TOKENS.astype(np.int32)}
    return [np.asarray(losses(p, batch), float) for p in (PARAMS, ablate_positions(PARAMS))]


# --- losses -----------------------------------------------------------------------------------


def test_losses_are_those_of_the_training_loss_with_their_standard_errors(found, each):
    for name, losses in zip(("", "ablated_"), each, strict=True):
        for key, values in (("loss", losses), ("mean_loss", losses.mean(axis=1))):
            key = name + key
            np.testing.assert_allclose(found[key], values.mean(axis=0), rtol=1e-5)
            error = values.std(axis=0) / math.sqrt(B)
            np.testing.assert_allclose(found[f"{key}_stderr"], error, rtol=1e-4)
    assert np.abs(found["loss"] - found["ablated_loss"]).max() > 0.01
    # No token comes before the first, so that nothing is there to tell positions apart.
    np.testing.assert_allclose(found["loss"][0], found["ablated_loss"][0], rtol=1e-5)


def test_in_context_learning_compares_late_with_early_in_each_sequence(found, each):
    assert icl_tokens(L) == (5, 2)
    gap = each[0][:, 5 - 2] - each[0][:, 2 - 2]  # token 2 has the first loss
    assert found["icl"] == pytest.approx(gap.mean(), rel=1e-4)
    assert found["icl_stderr"] == pytest.approx(gap.std() / math.sqrt(B), rel=1e-4)
    # The published code subtracts entry 48 of the losses from entry 498.
    assert icl_tokens(1024) == (500, 50)
    assert icl_tokens(128) == (62, 6)
    assert icl_tokens(2) == (2, 2)


def test_the_text_is_scored_token_by_token(found):
    log_p = np.asarray(log_probs(TOKENS))[:3, :-1]
    direct = np.take_along_axis(log_p, TOKENS[:3, 1:, None].astype(int), axis=-1)[..., 0]
    assert found["text_log_probs"].dtype == jnp.float32
    np.testing.assert_allclose(found["text_log_probs"], direct, atol=1e-5)


# --- bigrams ----------------------------------------------------------------------------------


def entropy(rows):
    logs = np.log(rows, where=rows > 0, out=np.zeros_like(rows))
    return -(rows * logs).sum(axis=-1)


def rows_asked():
    return TABLE[TOKENS[np.arange(B), QUESTIONS.position]]


def test_a_model_that_is_the_table_has_divergence_zero_and_the_losses_of_the_table():
    found = measure(Behavior(MODEL), the_table(TABLE), QUESTIONS)
    floor = entropy(rows_asked())
    assert found["bigram_floor"] == pytest.approx(floor.mean(), rel=1e-5)
    assert found["bigram_floor_stderr"] == pytest.approx(floor.std() / math.sqrt(B), rel=1e-4)
    assert found["bigram_score"] == pytest.approx(floor.mean(), rel=1e-5)
    assert abs(found["bigram_kl"]) < 1e-5
    assert abs(found["bigram_kl_stderr"]) < 1e-5
    losses = -np.log(TABLE[TOKENS[:, :-1], TOKENS[:, 1:]])
    np.testing.assert_allclose(found["loss"], losses.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found["ablated_loss"], losses.mean(axis=0), rtol=1e-4)
    for index, grams in enumerate(NGRAMS):
        n = grams.shape[1]
        last = -np.log(TABLE[grams[:, -2], grams[:, -1]])
        error = last.std() / math.sqrt(7)
        at = losses.mean(axis=0)
        assert found["ngram_loss"][index] == pytest.approx(last.mean(), rel=1e-4)
        assert found["ngram_loss_stderr"][index] == pytest.approx(error, rel=1e-4)
        assert found["ngram_score"][index] == pytest.approx(at[n - 1] / last.mean(), rel=1e-4)
        published = found["ngram_score_published"][index]
        assert published == pytest.approx(at[n] / last.mean(), rel=1e-4)


def test_divergence_of_other_models_is_that_of_the_predictions(found):
    where = np.arange(B), QUESTIONS.position
    log_q = np.asarray(log_probs(TOKENS), float)[where]
    rows = rows_asked()
    kl = (rows * (np.log(rows) - log_q)).sum(axis=1)
    assert kl.min() > 0.05
    assert found["bigram_kl"] == pytest.approx(kl.mean(), rel=1e-4)
    assert found["bigram_kl_stderr"] == pytest.approx(kl.std() / math.sqrt(B), rel=1e-4)
    assert found["bigram_score"] == pytest.approx((kl + entropy(rows)).mean(), rel=1e-5)
    # A model without weights predicts all tokens alike.
    silent = measure(Behavior(MODEL), jax.tree.map(np.zeros_like, PARAMS), QUESTIONS)
    assert silent["bigram_score"] == pytest.approx(math.log(V), rel=1e-6)
    uniform = math.log(V) - entropy(rows).mean()
    assert silent["bigram_kl"] == pytest.approx(uniform, rel=1e-4)


def test_what_never_follows_costs_nothing_though_the_model_excludes_it():
    # 0 log 0 on both sides: the model gives probability 0 where the table does.
    params = the_table(TABLE)
    params["b_U"] = np.where(np.arange(V) == 4, -np.inf, params["b_U"]).astype(np.float32)
    sparse = TABLE.copy()
    sparse[:, 4] = 0
    sparse /= sparse.sum(axis=1, keepdims=True)
    asked = questions(0, MODEL, TOKENS, sparse, NGRAMS, TOKENS[:3])
    found = measure(Behavior(MODEL), params, asked)
    rows = sparse[TOKENS[np.arange(B), QUESTIONS.position]]
    assert found["bigram_floor"] == pytest.approx(entropy(rows).mean(), rel=1e-5)
    assert abs(found["bigram_kl"]) < 1e-5


def test_positions_are_uniform_beyond_the_start_token():
    many = questions(3, MODEL, np.repeat(TOKENS[:1], 9000, axis=0), TABLE)
    counts = np.bincount(many.position, minlength=L)
    assert counts[0] == 0
    p = 1 / (L - 1)
    assert (np.abs(counts[1:] - 9000 * p) < 4 * math.sqrt(9000 * p * (1 - p))).all()
    np.testing.assert_array_equal(questions(0, MODEL, TOKENS, TABLE).position, QUESTIONS.position)
    assert (questions(1, MODEL, TOKENS, TABLE).position != QUESTIONS.position).any()


# --- n-grams ----------------------------------------------------------------------------------


def test_ngrams_are_read_from_the_start_token_on(found, each):
    for index, grams in enumerate(NGRAMS):
        n = grams.shape[1]
        begun = np.zeros((7, L), np.uint16)  # what comes after cannot matter
        begun[:, : n + 1] = np.concatenate([np.full((7, 1), V - 1), grams], axis=1)
        loss = -np.asarray(log_probs(begun), float)[np.arange(7), n - 1, grams[:, -1]]
        mean, error = loss.mean(), loss.std() / math.sqrt(7)
        assert found["ngram_loss"][index] == pytest.approx(mean, rel=1e-5)
        for name, entry in (("ngram_score", n - 1), ("ngram_score_published", n)):
            at = each[0][:, entry]
            ratio = at.mean() / mean
            spread = ratio * math.hypot(at.std() / math.sqrt(B) / at.mean(), error / mean)
            assert found[name][index] == pytest.approx(ratio, rel=1e-4)
            assert found[f"{name}_stderr"][index] == pytest.approx(spread, rel=1e-3)


def test_a_language_without_ngrams_has_no_scores_of_them():
    found = jax.eval_shape(Behavior(MODEL), 0, PARAMS, questions(0, MODEL, TOKENS, TABLE))
    assert not [name for name in found if name.startswith("ngram")]


# --- chunks, checkpoints, memory --------------------------------------------------------------


@pytest.mark.parametrize(("tokens_at_once", "icl"), [(1, None), (5 * L, (10, 3))])
@pytest.mark.slow
def test_numbers_do_not_depend_on_what_fits_in_memory(tokens_at_once, icl, found, each):
    behavior = Behavior(MODEL, icl, tokens_at_once)  # 23 sequences in chunks of 1 and of 5
    chunked = dict(measure(behavior, PARAMS, QUESTIONS))
    assert chunked.keys() == found.keys()
    if icl:
        gap = each[0][:, 10 - 2] - each[0][:, 3 - 2]
        assert chunked.pop("icl") == pytest.approx(gap.mean(), rel=1e-4)
        assert chunked.pop("icl_stderr") == pytest.approx(gap.std() / math.sqrt(B), rel=1e-4)
    for name, value in chunked.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, found[name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_memory_does_not_grow_with_the_number_of_sequences():
    count = 4096
    asked = questions(0, MODEL, np.repeat(TOKENS[:1], count, axis=0), TABLE)
    program = measure.lower(Behavior(MODEL, tokens_at_once=16 * L), PARAMS, asked).compile()
    # Less than one of the L - 1 losses of each sequence, whose logits are V times as much.
    assert program.memory_analysis().temp_size_in_bytes < 4 * count * L


def test_checkpoints_together_equal_one_by_one():
    checkpoints = {seed: drawn_params(seed) for seed in (1, 2, 3)}
    behavior = Behavior(MODEL)
    together = dict(map_checkpoints(behavior, checkpoints, QUESTIONS, checkpoint_batch=4))
    for seed, params in checkpoints.items():
        for name, value in measure(behavior, params, QUESTIONS).items():
            np.testing.assert_allclose(
                together[seed][name], value, rtol=2e-5, atol=1e-6, err_msg=name
            )


def test_moments_keep_their_digits_far_from_zero():
    # A mean square would lose a spread of 1 about 10,000 in float32 altogether.
    values = 1e4 + np.random.default_rng(0).normal(size=(1000, 2))
    values = values.astype(np.float32)
    found = mean_over_sequences(lambda x: {"x": x}, values, 64)
    exact = values.astype(float)
    np.testing.assert_allclose(found["x"], exact.mean(axis=0), rtol=2e-7)
    np.testing.assert_allclose(found["x_stderr"], exact.std(axis=0) / math.sqrt(1000), rtol=1e-2)


# --- refusals ---------------------------------------------------------------------------------

BAD_ROWS = TOKENS.copy()
BAD_ROWS[4, 0] = 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": BAD_ROWS}, "different first tokens"),
        ({"tokens": TOKENS + 1}, "outside 0 to 11"),
        ({"tokens": TOKENS[:, :1]}, "2 tokens or more"),
        ({"tokens": TOKENS[:0]}, "2 tokens or more"),
        ({"texts": TOKENS[0]}, "integers"),
        ({"table": TABLE[1:]}, r"table of shape \(11, 12\)"),
        ({"table": 2 * TABLE}, "sum to 1"),
        ({"table": -TABLE}, "sum to 1"),
        ({"ngrams": [np.zeros((3, 9), int)]}, "n from 2 to 8"),
        ({"ngrams": [np.zeros((2, 3), int), np.zeros((1, 2), int)]}, "equally many"),
        ({"ngrams": [np.zeros((0, 3), int)]}, "ngrams of shape"),
        ({"ngrams": [np.full((1, 3), V)]}, "outside 0 to 11"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_questions_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        questions(**{"seed": 0, "model": MODEL, "tokens": TOKENS, "table": TABLE, **change})


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="tokens_at_once=0"):
        Behavior(MODEL, tokens_at_once=0)
    for pair in ((3, 4), (L + 1, 3), (4, 1)):
        with pytest.raises(ValueError, match="from 2 to the 10"):
            jax.eval_shape(Behavior(MODEL, icl=pair), 0, PARAMS, QUESTIONS)
