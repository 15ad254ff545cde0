"""A synthetic language with a closed-form law: word pairs, words two back, and repetition.

Given all words so far, of which b is the last and a the one before, the next word is c with

    rho n(b, c) / n(b) + (1 - rho) P(c | a, b)   if n(b) > 0, else   P(c | a, b),
    P(c | a, b) = (1 - s) B(c | b) + s S(c | a),

where n(b, c) counts how often c followed b earlier in this sequence and n(b) is its sum over c;
B(c | b) and S(c | a) are proportional to f(c) exp(x) with frequencies f and x normal for each pair.
So there is something to gain from frequencies, from the last word (B), from the one before it (S,
by a head that attends to the previous token), and from repetition (by induction heads). S does not
depend on b, since attention adds up what it finds at different tokens: a table of all (a, b, c) is
beyond a transformer without MLPs.

Letters: B sequences, L tokens, V words, W = V + 1 tokens: the words and the start token V.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from llc_jax.inputs import checks
from llc_jax.types import Batch

_EXACT = jax.lax.Precision.HIGHEST  # accelerators may round float32 products; oracles must not
_MAX_ITERATIONS = 100_000


@dataclasses.dataclass(frozen=True)
class SyntheticLanguage:
    """The distribution of sequences. Hashable, so it can be a static argument.

    Attributes:
      num_words: V; the law takes 8 V^3 bytes on the host, and half of it wherever it is used.
      context: L, tokens in a sequence, the start token included.
      repetition: rho, probability of copying what followed an earlier occurrence.
      skip_weight: s, share of the word before last in what is not copied.
      bigram_strength: standard deviation of x in B, in nats; the larger, the fewer likely words.
      skip_strength: the same in S.
      zipf: f of the word of rank r is proportional to r^-zipf; 0 makes all words alike.
      seed: seed of B and S.
    """

    num_words: int = 64
    context: int = 128
    repetition: float = 0.5
    skip_weight: float = 0.6
    bigram_strength: float = 3.0
    skip_strength: float = 4.0
    zipf: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks.at_least("num_words", self.num_words, 2)
        checks.at_least("context", self.context, 2, "the start token and a word")
        checks.at_least("seed", self.seed, 0)
        probabilities = ("repetition", "skip_weight")
        for name in (*probabilities, "bigram_strength", "skip_strength", "zipf"):
            value = getattr(self, name)
            checks.nonnegative(name, value)
            if name in probabilities and value > 1:
                raise ValueError(f"{name}={value} is a probability: give 0 to 1.")

    @property
    def start_token(self) -> int:
        """V, the token at position 0 of every sequence and nowhere else."""
        return self.num_words


@dataclasses.dataclass(frozen=True)
class SyntheticLanguageBatches:
    """`batch_fn(rng_key) -> batch` for `llc_jax.types.Stream` and `llc_jax.training.loop.fit`.

    Attributes:
      language: the distribution of sequences.
      batch_size: B, sequences in a batch.
    """

    language: SyntheticLanguage
    batch_size: int

    def __post_init__(self) -> None:
        checks.at_least("batch_size", self.batch_size, 1)

    def __call__(self, rng_key: jax.Array) -> Batch:
        """Returns a fresh batch; consumes `rng_key`."""
        return sample(rng_key, self.language, self.batch_size)


def sample(rng_key: jax.Array, language: SyntheticLanguage, batch_size: int) -> Batch:
    """Draws sequences; the first of a batch do not depend on how many there are.

    Args:
      rng_key: typed key, consumed.
      language: the distribution, static.
      batch_size: B, static.

    Returns:
      {"tokens": int32 [B, L]}, the start token and L - 1 words.
    """
    checks.at_least("batch_size", batch_size, 1)
    start, length = language.start_token, language.context
    cumulative_WxWxV = np.cumsum(kernel(language)[..., :-1], axis=-1)
    cumulative_WxWxV /= cumulative_WxWxV[..., -1:]  # ends at exactly 1, above every uniform
    cumulative_WxWxV = jnp.asarray(cumulative_WxWxV, jnp.float32)

    def append(carry, inputs):
        tokens_BxL, ranks_BxL, before_B, last_B = carry
        position, (repeat_B, which_B) = inputs
        # Occurrences of a word are numbered from 0, so the last is number n = how many precede it.
        same_BxL = tokens_BxL == last_B[:, None]
        count_B = jnp.sum(same_BxL, axis=1, dtype=jnp.int32) - 1
        ranks_BxL = ranks_BxL.at[:, position - 1].set(count_B)
        chosen_B = jnp.floor(which_B * count_B.astype(jnp.float32)).astype(jnp.int32)
        source_BxL = same_BxL & (ranks_BxL == chosen_B[:, None])
        copied_B = jnp.sum(jnp.where(source_BxL[:, :-1], tokens_BxL[:, 1:], 0), axis=1)
        drawn_B = jnp.sum(cumulative_WxWxV[before_B, last_B] <= which_B[:, None], axis=1)
        repeats_B = (repeat_B < language.repetition) & (count_B > 0)
        next_B = jnp.where(repeats_B, copied_B, drawn_B).astype(jnp.int32)
        return (tokens_BxL.at[:, position].set(next_B), ranks_BxL, last_B, next_B), None

    uniform_BxNx2 = jax.random.uniform(rng_key, (batch_size, length - 1, 2))
    unwritten_BxL = jnp.full((batch_size, length), -1, jnp.int32)
    tokens_BxL = unwritten_BxL.at[:, 0].set(start)
    start_B = tokens_BxL[:, 0]
    inputs = jnp.arange(1, length), jnp.moveaxis(uniform_BxNx2, 0, -1)
    carry, _ = jax.lax.scan(append, (tokens_BxL, unwritten_BxL, start_B, start_B), inputs)
    return {"tokens": carry[0]}


def predictive(language: SyntheticLanguage, tokens: jax.Array) -> jax.Array:
    """Exact log-probabilities of the next token, in nats: no model has a lower mean loss.

    Args:
      language: the distribution, static.
      tokens: int32 [B, L], each row from the start token on, of any length L >= 2.

    Returns:
      Entry [b, t, c] is log P(token t + 1 is c | tokens 0 to t), float32 [B, L - 1, W]; it is -inf
      for the start token.
    """
    return jnp.log(_predictions(language, tokens)["exact"])


def reference_losses(language: SyntheticLanguage, tokens: jax.Array) -> dict[str, jax.Array]:
    """Losses of predictors that know a part of the law, so that a model's stage can be told.

    "unigram" and "bigram" are the marginals of `unigram` and `bigram_table`. "trigram" knows
    P(c | a, b) and when a word may be repeated, but puts the bigram law in place of n(b, c) / n(b):
    P alone would charge any price for repeated words that it finds unlikely. "repeated_bigram"
    knows n(b, c) / n(b), but puts the bigram law in place of P. "exact" knows all.

    Args:
      language: the distribution, static.
      tokens: int32 [B, L], each row from the start token on, of any length L >= 2.

    Returns:
      For each predictor the cross-entropy of tokens 1 to L - 1 in nats, float32 [B, L - 1].
    """
    target_BxNx1 = tokens[:, 1:, None]
    return {
        name: -jnp.log(jnp.take_along_axis(predicted_BxNxW, target_BxNx1, axis=-1)[..., 0])
        for name, predicted_BxNxW in _predictions(language, tokens).items()
    }


def _predictions(language: SyntheticLanguage, tokens: jax.Array) -> dict[str, jax.Array]:
    """Probabilities of the next token by each predictor, float32 [B, N, W] with N = L - 1."""
    if jnp.ndim(tokens) != 2 or tokens.shape[1] < 2:
        raise ValueError(
            f"tokens of shape {jnp.shape(tokens)} must be [B, L >= 2]: the start token and at "
            "least one word per row."
        )
    kernel_WxWxW, bigram_WxW, unigram_W = (
        jnp.asarray(table(language), jnp.float32) for table in (kernel, bigram_table, unigram)
    )
    num_tokens = language.num_words + 1
    last_BxN, next_BxN = tokens[:, :-1], tokens[:, 1:]
    before_BxN = jnp.pad(last_BxN[:, :-1], ((0, 0), (1, 0)), constant_values=language.start_token)
    earlier_NxN = np.tri(last_BxN.shape[1], k=-1, dtype=bool)
    same_BxNxN = (last_BxN[:, :, None] == last_BxN[:, None, :]) & earlier_NxN[None]
    counts_BxNxW = jnp.einsum(
        "bnm,bmw->bnw",
        same_BxNxN.astype(jnp.float32),
        jax.nn.one_hot(next_BxN, num_tokens),
        precision=_EXACT,
    )
    count_BxNx1 = jnp.sum(same_BxNxN, axis=-1, keepdims=True).astype(jnp.float32)
    repeated_BxNxW = counts_BxNxW / jnp.maximum(count_BxNx1, 1)
    rate_BxNx1 = jnp.where(count_BxNx1 > 0, jnp.float32(language.repetition), 0)
    trigram_BxNxW, bigram_BxNxW = kernel_WxWxW[before_BxN, last_BxN], bigram_WxW[last_BxN]
    return {
        "unigram": jnp.broadcast_to(unigram_W, counts_BxNxW.shape),
        "bigram": bigram_BxNxW,
        "trigram": rate_BxNx1 * bigram_BxNxW + (1 - rate_BxNx1) * trigram_BxNxW,
        "repeated_bigram": rate_BxNx1 * repeated_BxNxW + (1 - rate_BxNx1) * bigram_BxNxW,
        "exact": rate_BxNx1 * repeated_BxNxW + (1 - rate_BxNx1) * trigram_BxNxW,
    }


def kernel(language: SyntheticLanguage) -> np.ndarray:
    """Returns P(c | a, b), float64 [W, W, W], what follows unless a word is repeated.

    The chain starts in its stationary law: P(c | V, b) is the bigram law and P(c | V, V) that of
    single words. P(c | a, V), which is never needed, is that of single words too.
    """
    return _law(language)[1]


def bigram_table(language: SyntheticLanguage) -> np.ndarray:
    """Returns the mean of P(c | a, b) over a, float64 [W, W], row b; row V is `unigram`.

    Exact for the law without repetition, which moves the marginals of the data little.
    """
    return _law(language)[1][-1]


def unigram(language: SyntheticLanguage) -> np.ndarray:
    """Returns the stationary frequencies of the tokens without repetition, float64 [W]."""
    return _law(language)[1][-1, -1]


def entropies(language: SyntheticLanguage) -> dict[str, float]:
    """Returns the entropy of a word given none, one and two before it, in nats.

    Of the stationary law without repetition, under "unigram", "bigram" and "trigram".
    """
    pairs_VxV, table_WxWxW = _law(language)
    terms = {
        "unigram": (1.0, table_WxWxW[-1, -1]),
        "bigram": (pairs_VxV.sum(axis=0), table_WxWxW[-1, :-1]),
        "trigram": (pairs_VxV, table_WxWxW[:-1, :-1]),
    }
    return {
        name: float(np.sum(weight * scipy.special.entr(rows).sum(axis=-1)))
        for name, (weight, rows) in terms.items()
    }


@functools.lru_cache(maxsize=8)
def _law(language: SyntheticLanguage) -> tuple[np.ndarray, np.ndarray]:
    """Returns the stationary law of (a, b), float64 [V, V], and `kernel`; on the host."""
    num_words = language.num_words
    normal_2xVxV = np.random.default_rng(language.seed).standard_normal((2, num_words, num_words))
    log_frequency_V = -language.zipf * np.log(np.arange(1, num_words + 1))
    bigram_VxV, skip_VxV = (
        scipy.special.softmax(log_frequency_V + strength * x_VxV, axis=-1)
        for strength, x_VxV in zip(
            (language.bigram_strength, language.skip_strength), normal_2xVxV, strict=True
        )
    )
    weight = language.skip_weight
    words_VxVxV = (1 - weight) * bigram_VxV[None] + weight * skip_VxV[:, None]

    pairs_VxV = np.full((num_words, num_words), num_words**-2.0)
    for _ in range(_MAX_ITERATIONS):
        following_VxV = np.einsum("ab,abc->bc", pairs_VxV, words_VxVxV)
        change = np.abs(following_VxV - pairs_VxV).sum()
        # Half a step, since a chain near period two hardly settles; scaled, since rounding adds up.
        pairs_VxV = pairs_VxV + following_VxV
        pairs_VxV /= pairs_VxV.sum()
        if change < 1e-14:
            break
    else:
        raise ValueError(
            f"{language} has no stationary law within {_MAX_ITERATIONS} steps: words hardly ever "
            "change; lower bigram_strength and skip_strength."
        )

    following_VxV = np.einsum("ab,abc->bc", pairs_VxV, words_VxVxV)
    table_WxWxW = np.zeros((num_words + 1,) * 3)
    table_WxWxW[:-1, :-1, :-1] = words_VxVxV
    table_WxWxW[-1, :-1, :-1] = following_VxV / following_VxV.sum(axis=1, keepdims=True)
    table_WxWxW[:, -1, :-1] = pairs_VxV.sum(axis=0)
    for table in (pairs_VxV, table_WxWxW):
        table.flags.writeable = False  # every caller gets the same arrays
    return pairs_VxV, table_WxWxW
