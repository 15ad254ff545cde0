"""Synthetic sequences that tell what attention heads of a language model look for.

Source: Hoogland et al. 2024, arXiv 2402.02364, previous-token and prefix-matching scores; words are
uniformly random, so that nothing but place and repetition can guide a head. Letters: B sequences, L
tokens, Q pairs of positions.
"""

from typing import NamedTuple

import numpy as np

from llc_jax.inputs import checks
from llc_jax.problems.language.model import AttentionOnlyTransformer


class Probe(NamedTuple):
    """Sequences, and the attention in them that is a head's score.

    Attributes:
      tokens: the start token and L - 1 words, int32 [B, L].
      query: positions attended from, int32 [B, Q].
      key: positions attended to, before those of `query`, int32 [B, Q].
    """

    tokens: np.ndarray
    query: np.ndarray
    key: np.ndarray


class Probes(NamedTuple):
    """One probe for each kind of head; see the functions of the same names."""

    previous_token: Probe
    prefix_matching: Probe
    induction: Probe


def probes(
    seed: int, num_sequences: int, model: AttentionOnlyTransformer, start_token: int
) -> Probes:
    """Returns all probes in their published sizes, or as long as the model's context lets them be.

    Args:
      seed: of all three, which are independent of each other.
      num_sequences: B, published 10,000.
      model: gives the vocabulary and the context, at least 5 tokens.
      start_token: see `previous_token`.
    """
    checks.at_least("the model's context", model.context, 5, "a start token and two pairs")
    checks.at_least("vocab_size", model.vocab_size, 3, "a start token and two words")
    sizes = {"vocab_size": model.vocab_size, "start_token": start_token}
    longest, half = min(64, model.context), (model.context - 1) // 2
    return Probes(
        previous_token(seed, num_sequences, longest=longest, shortest=min(16, longest), **sizes),
        prefix_matching(seed, num_sequences, length=min(128, model.context), **sizes),
        induction(seed, num_sequences, block=min(50, half, model.vocab_size - 1), **sizes),
    )


def previous_token(
    seed: int,
    num_sequences: int,
    *,
    vocab_size: int,
    start_token: int,
    shortest: int = 16,
    longest: int = 64,
) -> Probe:
    """Random words: attention from the last token to the one before it.

    Lengths are uniform from `shortest` to `longest`. Tokens go on after the last one, which causal
    attention cannot see, so that all rows are equally long.

    Args:
      seed: of the words and lengths.
      num_sequences: B.
      vocab_size: ids, the start token's included.
      start_token: the first of every sequence and nowhere else.
      shortest: at least 2 tokens.
      longest: L.

    Returns:
      A probe with Q = 1.
    """
    checks.at_least("shortest", shortest, 2, "a token and the one before it")
    checks.at_least("longest", longest, shortest)
    rng = _generator(seed, 0, num_sequences, vocab_size, start_token, words=1)
    last_Bx1 = rng.integers(shortest - 1, longest, (num_sequences, 1))
    words_BxM = rng.integers(0, vocab_size - 1, (num_sequences, longest - 1))
    return _probe(words_BxM, start_token, last_Bx1, last_Bx1 - 1)


def prefix_matching(
    seed: int, num_sequences: int, *, vocab_size: int, start_token: int, length: int = 128
) -> Probe:
    """One word comes twice: attention from the second to what followed the first.

    Its places are uniform from 1 to L/2 - 1 and from L/2 + 1 to L - 1, L/2 rounded down; the other
    words are random and differ from it.

    Args:
      seed: of the words and places.
      num_sequences: B.
      vocab_size: ids, the start token's included.
      start_token: the first of every sequence and nowhere else.
      length: L.

    Returns:
      A probe with Q = 1.
    """
    checks.at_least("length", length, 4, "a start token, a word, another, and the first again")
    rng = _generator(seed, 1, num_sequences, vocab_size, start_token, words=2)
    num_words, half = vocab_size - 1, length // 2
    first_Bx1 = rng.integers(1, half, (num_sequences, 1))
    second_Bx1 = rng.integers(half + 1, length, (num_sequences, 1))
    special_Bx1 = rng.integers(0, num_words, (num_sequences, 1))
    # So far from the special word around the circle of words that it is another.
    away_BxM = rng.integers(1, num_words, (num_sequences, length - 1))
    place_1xM = np.arange(1, length)[None]
    away_BxM[(place_1xM == first_Bx1) | (place_1xM == second_Bx1)] = 0
    words_BxM = (special_Bx1 + away_BxM) % num_words
    return _probe(words_BxM, start_token, second_Bx1, first_Bx1 + 1)


def induction(
    seed: int, num_sequences: int, *, vocab_size: int, start_token: int, block: int = 50
) -> Probe:
    """A random block of words comes twice: attention from each word to what followed it before.

    No word comes twice within a block, so that what followed it is unambiguous. Not in the paper,
    but common: a mean over many places varies less than the score of `prefix_matching`.

    Args:
      seed: of the words.
      num_sequences: B.
      vocab_size: ids, the start token's included; above `block`.
      start_token: the first of every sequence and nowhere else.
      block: words in the block; sequences are twice as long and a start token.

    Returns:
      A probe with Q = block.
    """
    checks.at_least("block", block, 2, "one word would be what followed itself")
    rng = _generator(seed, 2, num_sequences, vocab_size, start_token, words=block)
    every_BxW = np.broadcast_to(np.arange(vocab_size - 1), (num_sequences, vocab_size - 1))
    half_BxM = rng.permuted(every_BxW, axis=1)[:, :block]
    second_BxQ = np.broadcast_to(np.arange(block + 1, 2 * block + 1), (num_sequences, block))
    words_BxM = np.concatenate([half_BxM, half_BxM], axis=1)
    return _probe(words_BxM, start_token, second_BxQ, second_BxQ - block + 1)


def _generator(
    seed: int, kind: int, num_sequences: int, vocab_size: int, start_token: int, *, words: int
) -> np.random.Generator:
    checks.at_least("seed", seed, 0)
    checks.at_least("num_sequences", num_sequences, 1)
    checks.at_least("vocab_size", vocab_size, words + 1, "the start token and enough words")
    checks.at_least("start_token", start_token, 0)
    if start_token >= vocab_size:
        raise ValueError(f"start_token={start_token}: give an id below vocab_size={vocab_size}.")
    return np.random.default_rng([seed, kind])


def _probe(words_BxM: np.ndarray, start_token: int, query: np.ndarray, key: np.ndarray) -> Probe:
    """Puts the start token in front; words are numbered without it."""
    ids_BxM = words_BxM + (words_BxM >= start_token)
    tokens_BxL = np.pad(ids_BxM, ((0, 0), (1, 0)), constant_values=start_token)
    return Probe(*(np.ascontiguousarray(x, dtype=np.int32) for x in (tokens_BxL, query, key)))
