"""The synthetic language: its law by brute force, samples against the law, order of predictors."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llc_jax.problems.language import synthetic as synthetic_language
from llc_jax.problems.language.synthetic import (
    SyntheticLanguage,
    SyntheticLanguageBatches,
    bigram_table,
    entropies,
    kernel,
    unigram,
)

LANGUAGE = SyntheticLanguage()
TINY = SyntheticLanguage(
    num_words=3, context=12, repetition=0.6, bigram_strength=1.0, skip_strength=1.5, zipf=0.5
)
MARKOV = dataclasses.replace(TINY, repetition=0.0)
# Compiled whole: op by op, the same functions take ten times as long to start.
sample = jax.jit(synthetic_language.sample, static_argnums=(1, 2))
predictive = jax.jit(synthetic_language.predictive, static_argnums=0)
reference_losses = jax.jit(synthetic_language.reference_losses, static_argnums=0)


def draw(seed, language, batch_size):
    return np.asarray(sample(jax.random.key(seed), language, batch_size)["tokens"])


@pytest.fixture(scope="module")
def tiny():
    return draw(1, TINY, 10_000)


@pytest.fixture(scope="module")
def default():
    return draw(2, LANGUAGE, 200)


def assert_mean(values, exact=0.0):
    """The mean over the first axis is within 4 standard errors of the exact value."""
    values = np.asarray(values, np.float64)
    stderr = values.std(0, ddof=1) / np.sqrt(len(values))
    np.testing.assert_array_less(np.abs(values.mean(0) - exact), 4 * stderr + 1e-7)


def entropy(p):
    return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)


def law_after(language, words):
    """The module's formula for one history of words, with loops and integers only."""
    table, v = kernel(language), language.num_words
    before, last = ([v, v, *words])[-2:]
    following = [c for b, c in itertools.pairwise(words) if b == last]
    fresh = table[before, last, :v]
    if not following:
        return fresh
    copied = np.bincount(following, minlength=v) / len(following)
    return language.repetition * copied + (1 - language.repetition) * fresh


# --- the law ----------------------------------------------------------------------------------


@pytest.mark.parametrize("language", [TINY, LANGUAGE])
def test_kernel_is_a_mixture_of_a_law_of_each_word(language):
    table, v = kernel(language), language.num_words
    assert table.shape == (v + 1,) * 3
    np.testing.assert_allclose(table.sum(-1), 1, rtol=1e-12)
    np.testing.assert_array_equal(table[..., v], 0)
    assert table[:v, :v, :v].min() > 0
    # A sum of functions of (b, c) and of (a, c) has no part that depends on both a and b.
    words = table[:v, :v, :v]
    both = words - words.mean(0) - words.mean(1)[:, None] + words.mean((0, 1))
    np.testing.assert_allclose(both, 0, atol=1e-15)


@pytest.mark.parametrize(("weight", "axis", "strength"), [(0.0, 0, 3.0), (1.0, 1, 4.0)])
def test_strength_is_the_deviation_of_the_log_odds(weight, axis, strength):
    words = kernel(dataclasses.replace(LANGUAGE, skip_weight=weight))[:64, :64, :64]
    rows = words.take(0, axis)  # nothing depends on the other word
    np.testing.assert_array_equal(words, np.repeat(np.expand_dims(rows, axis), 64, axis))
    x = np.log(rows) + np.log(np.arange(1, 65))
    x -= x.mean(-1, keepdims=True)
    # 64 x 63 free normals: the relative error of their deviation is 1 / sqrt(2 x 64 x 63).
    deviation = np.sqrt(np.sum(x**2) / (64 * 63))
    assert abs(deviation / strength - 1) < 4 / np.sqrt(2 * 64 * 63)
    assert abs(x.mean(0).std() / (strength / 8) - 1) < 4 / np.sqrt(2 * 63)


def test_share_of_the_word_before_last():
    parts = [kernel(dataclasses.replace(TINY, skip_weight=w))[:3, :3] for w in (0.0, 0.25, 1.0)]
    np.testing.assert_allclose(parts[1], 0.75 * parts[0] + 0.25 * parts[2], rtol=1e-12)


def test_without_strength_words_follow_their_frequencies():
    flat = dataclasses.replace(LANGUAGE, bigram_strength=0.0, skip_strength=0.0)
    expected = 1 / np.arange(1, 65) / np.sum(1 / np.arange(1, 65))
    np.testing.assert_allclose(kernel(flat)[..., :-1], expected + np.zeros((65, 65, 1)))
    assert np.ptp(list(entropies(flat).values())) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_marginals_and_entropies_by_brute_force(seed):
    language = dataclasses.replace(TINY, seed=seed)
    table = kernel(language)[:3, :3, :3]
    # The chain of pairs (a, b) as a 9 x 9 matrix, solved as a linear system.
    chain = np.zeros((9, 9))
    for a, b, c in itertools.product(range(3), repeat=3):
        chain[3 * a + b, 3 * b + c] = table[a, b, c]
    system = np.vstack([chain.T - np.eye(9), np.ones(9)])
    pairs = np.linalg.lstsq(system, np.eye(10)[9], rcond=None)[0].reshape(3, 3)
    np.testing.assert_allclose(unigram(language), [*pairs.sum(0), 0], atol=1e-12)
    np.testing.assert_allclose(unigram(language), [*pairs.sum(1), 0], atol=1e-12)
    bigram = np.array([[pairs[b, c] / pairs[b].sum() for c in range(3)] for b in range(3)])
    np.testing.assert_allclose(bigram_table(language)[:3, :3], bigram, atol=1e-12)
    np.testing.assert_allclose(bigram_table(language)[3], unigram(language))
    expected = {
        "unigram": entropy(pairs.sum(0)),
        "bigram": pairs.sum(1) @ entropy(bigram),
        "trigram": np.sum(pairs * entropy(table)),
    }
    assert entropies(language) == pytest.approx(expected, abs=1e-12)
    assert expected["unigram"] > expected["bigram"] > expected["trigram"]


def test_tables_depend_on_the_seed_and_cannot_be_overwritten():
    assert not np.allclose(kernel(TINY), kernel(dataclasses.replace(TINY, seed=1)))
    np.testing.assert_array_equal(kernel(TINY), kernel(MARKOV))
    with pytest.raises(ValueError, match="read-only"):
        unigram(TINY)[0] = 1


# --- samples ----------------------------------------------------------------------------------


def test_sequences_start_with_the_start_token_and_go_on_in_words(default):
    assert default.shape == (200, 128)
    assert default.dtype == np.int32
    np.testing.assert_array_equal(default[:, 0], LANGUAGE.start_token)
    assert default[:, 1:].min() == 0
    assert default[:, 1:].max() == LANGUAGE.num_words - 1


def test_every_short_sequence_has_its_exact_probability(tiny):
    index = np.ravel_multi_index(tiny[:, 1:6].T, (3,) * 5)
    counts = np.bincount(index, minlength=3**5)
    exact = [
        np.prod([law_after(TINY, words[:t])[words[t]] for t in range(5)])
        for words in itertools.product(range(3), repeat=5)
    ]
    assert sum(exact) == pytest.approx(1)
    expected = len(tiny) * np.array(exact)
    usual = expected > 10
    chi2 = np.sum((counts - expected)[usual] ** 2 / expected[usual])
    assert abs(chi2 - usual.sum()) < 4 * np.sqrt(2 * usual.sum())


def test_words_given_their_histories_have_the_predicted_probabilities(tiny):
    # Martingale differences: [word is c] - P(c | history), also times functions of the history.
    law = np.exp(predictive(TINY, tiny))[..., :3]
    surprise = (tiny[:, 1:, None] == np.arange(3)) - law
    assert_mean(surprise)
    previous = tiny[:, 1:-1, None] == np.arange(3)
    assert_mean(np.einsum("btc,btd->bcd", surprise[:, 1:], previous))
    assert_mean(np.einsum("btc,btd->bcd", surprise[:, 1:], surprise[:, :-1]))
    assert_mean(np.sum(surprise * law, axis=1))


def test_loss_of_the_exact_predictor_is_its_entropy(default):
    log = np.asarray(predictive(LANGUAGE, default))
    loss = np.asarray(reference_losses(LANGUAGE, default)["exact"])
    np.testing.assert_allclose(
        loss, -np.take_along_axis(log, default[:, 1:, None], -1)[..., 0], rtol=1e-5, atol=1e-6
    )
    assert_mean((loss - entropy(np.exp(log))).mean(1))
    assert_mean(loss[:, 64:].mean(1) - entropy(np.exp(log[:, 64:])).mean(1))


def test_without_repetition_the_chain_is_stationary_from_the_start():
    tokens = draw(4, MARKOV, 20_000)
    for t in (1, 2, 3, 11):
        assert_mean(tokens[:, t, None] == np.arange(4), unigram(MARKOV))
    pairs = unigram(MARKOV)[:3, None] * bigram_table(MARKOV)[:3, :3]
    for t in (2, 11):
        assert_mean(np.eye(9)[tokens[:, t - 1] * 3 + tokens[:, t]], pairs.ravel())
    losses = {k: np.asarray(v) for k, v in reference_losses(MARKOV, tokens).items()}
    exact = entropies(MARKOV)
    assert_mean(losses["unigram"].mean(1), exact["unigram"])
    assert_mean(losses["bigram"][:, 1:].mean(1), exact["bigram"])
    assert_mean(losses["trigram"][:, 2:].mean(1), exact["trigram"])
    np.testing.assert_array_equal(losses["trigram"], losses["exact"])
    np.testing.assert_array_equal(losses["bigram"], losses["repeated_bigram"])


def test_certain_repetition_follows_a_precedent():
    tokens = draw(5, dataclasses.replace(TINY, repetition=1.0), 2000)
    last, following = tokens[:, 1:-1], tokens[:, 2:]
    earlier = np.tri(last.shape[1], k=-1, dtype=bool)
    same = (last[:, :, None] == last[:, None, :]) & earlier
    precedent = same & (following[:, :, None] == following[:, None, :])
    np.testing.assert_array_equal(precedent.any(-1), same.any(-1))


# --- predictors -------------------------------------------------------------------------------


def test_predictive_is_the_formula_word_by_word(tiny):
    tokens = tiny[:20]
    got = np.exp(np.float64(predictive(TINY, tokens)))
    assert got.shape == (20, 11, 4)
    for b, t in np.ndindex(20, 11):
        expected = law_after(TINY, [int(w) for w in tokens[b, 1 : t + 1]])
        np.testing.assert_allclose(got[b, t], [*expected, 0], rtol=1e-5)


def test_exact_predictor_beats_all_others(default):
    losses = {k: np.float64(v) for k, v in reference_losses(LANGUAGE, default).items()}
    assert losses.keys() == {"unigram", "bigram", "trigram", "repeated_bigram", "exact"}
    for name, values in losses.items():
        assert values.shape == (200, 127)
        assert np.isfinite(values).all()
        gap = (values - losses["exact"]).mean(1)
        if name != "exact":
            assert gap.mean() > 4 * gap.std() / np.sqrt(len(gap))


def test_every_stage_of_the_default_language_is_worth_a_third_of_a_nat(default):
    means = {k: np.mean(v) for k, v in reference_losses(LANGUAGE, default).items()}
    path = [means[k] for k in ("unigram", "bigram", "trigram", "exact")]
    assert np.all(np.diff([np.log(64), *path]) < -0.3)
    assert means["repeated_bigram"] - means["exact"] > 0.3


def test_later_tokens_leave_predictions_alone(tiny):
    tokens = tiny[:20]
    changed = np.where(np.arange(12) < 7, tokens, (tokens + 1) % 3)
    before, after = predictive(TINY, tokens), predictive(TINY, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    np.testing.assert_allclose(before[:, :6], predictive(TINY, tokens[:, :7]), rtol=1e-6)


# --- as a program -----------------------------------------------------------------------------


def test_same_key_same_tokens_and_other_keys_others(tiny, default):
    np.testing.assert_array_equal(draw(1, TINY, 10_000), tiny)
    assert not np.array_equal(draw(3, TINY, 10_000), tiny)
    assert len(np.unique(default, axis=0)) == 200


def test_a_smaller_batch_is_a_prefix_and_vmap_changes_nothing(tiny):
    np.testing.assert_array_equal(draw(1, TINY, 3), tiny[:3])
    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
    mapped = jax.jit(jax.vmap(SyntheticLanguageBatches(TINY, 3)))(keys)["tokens"]
    np.testing.assert_array_equal(mapped[1], tiny[:3])
    np.testing.assert_array_equal(mapped[0], draw(0, TINY, 3))
    losses = jax.jit(jax.vmap(lambda tokens: synthetic_language.predictive(TINY, tokens)))(mapped)
    np.testing.assert_allclose(losses[1], predictive(TINY, tiny[:20])[:3], rtol=1e-6)


def test_batches_are_static_arguments():
    first, second = (
        SyntheticLanguageBatches(SyntheticLanguage(), 3),
        SyntheticLanguageBatches(LANGUAGE, 3),
    )
    assert first == second
    assert hash(first) == hash(second)
    batch = jax.eval_shape(first, jax.random.key(0))
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {"tokens": ((3, 128), jnp.int32)}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_words": 1}, "num_words=1"),
        ({"context": 1}, "context=1.*start token"),
        ({"seed": -1}, "seed=-1"),
        ({"repetition": 1.5}, "repetition=1.5.*probability"),
        ({"repetition": -0.1}, "repetition=-0.1"),
        ({"skip_weight": 1.01}, "skip_weight=1.01.*probability"),
        ({"zipf": float("nan")}, "zipf=nan"),
        ({"bigram_strength": -1.0}, "bigram_strength=-1.0"),
        ({"skip_strength": float("inf")}, "skip_strength=inf"),
    ],
)
def test_bad_languages_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        SyntheticLanguage(**fields)


def test_other_bad_arguments_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="batch_size=0"):
        SyntheticLanguageBatches(TINY, 0)
    with pytest.raises(ValueError, match="batch_size=0"):
        synthetic_language.sample(jax.random.key(0), TINY, 0)
    for shape in ((12,), (2, 1)):
        with pytest.raises(ValueError, match=r"tokens of shape .*\[B, L >= 2\]"):
            synthetic_language.predictive(TINY, jnp.zeros(shape, jnp.int32))
    monkeypatch.setattr(synthetic_language, "_MAX_ITERATIONS", 3)
    with pytest.raises(ValueError, match=r"no stationary law within 3 steps.*lower"):
        kernel(dataclasses.replace(TINY, seed=99))
