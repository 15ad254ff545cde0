"""Statistics of n tokens in a row: the bigram table of a corpus, and words of n tokens.

What a language model can score without looking further back. Letters: N rows, T tokens in a row,
V vocabulary.
"""

import collections
import string
from collections.abc import Iterable

import numpy as np

from llc_jax.inputs import checks
from llc_jax.problems.language.bpe import Tokenizer

_PAIRS_AT_ONCE = 2**22
_ROWS_AT_ONCE = 256
_WORDS_AT_ONCE = 1000


def bigram_table(tokens: np.ndarray, vocab_size: int, smoothing: float = 0.0) -> np.ndarray:
    """Next-token probabilities (n_ab + s) / Σ_b' (n_ab' + s) from counts within rows.

    The pair at the start of a row, whose first token is the end of text, is counted: that is what
    the model sees. A token that nothing follows gets the limit s -> 0, the uniform distribution.

    Args:
      tokens: ids, integers [N, T] with T >= 2; may be memory-mapped, since it is read in pieces.
      vocab_size: V. Counting takes 12 V^2 bytes.
      smoothing: s >= 0, added to every count.

    Returns:
      float32 [V, V]; row a is the distribution of the token after a.
    """
    checks.at_least("vocab_size", vocab_size, 1)
    checks.nonnegative("smoothing", smoothing)
    if np.ndim(tokens) != 2 or len(tokens) < 1 or np.shape(tokens)[1] < 2:
        raise ValueError(
            f"tokens has shape {np.shape(tokens)}: give rows of two tokens or more, [N, T]."
        )
    counts_P = np.zeros(vocab_size**2, np.int64)
    step = max(1, _PAIRS_AT_ONCE // tokens.shape[1])
    for start in range(0, len(tokens), step):
        ids_BxT = np.asarray(tokens[start : start + step], np.int64)
        if ids_BxT.min() < 0 or ids_BxT.max() >= vocab_size:
            raise ValueError(
                f"tokens has ids from {ids_BxT.min()} to {ids_BxT.max()} and vocab_size is"
                f" {vocab_size}: give the vocabulary size of the tokenizer that made them."
            )
        np.add.at(counts_P, (ids_BxT[:, :-1] * vocab_size + ids_BxT[:, 1:]).ravel(), 1)
    counts_VxV = counts_P.reshape(vocab_size, vocab_size)
    table_VxV = counts_VxV.astype(np.float32) + np.float32(smoothing)
    totals_V = counts_VxV.sum(axis=1) + smoothing * vocab_size
    table_VxV[totals_V == 0] = 1.0
    totals_V[totals_V == 0] = vocab_size
    table_VxV /= totals_V.astype(np.float32)[:, None]
    return table_VxV


def conditional_entropy(table: np.ndarray, weights: np.ndarray) -> float:
    """Mean entropy Σ_a w_a H(p(. | a)) / Σ_a w_a of the next token, in nats.

    With w_a the frequency of a among contexts it is the least bigram loss on the counted text.

    Args:
      table: p(b | a), rows that sum to 1, [V, V].
      weights: w_a >= 0, [V].
    """
    if np.ndim(table) != 2 or np.shape(weights) != (len(table),):
        raise ValueError(
            f"table has shape {np.shape(table)} and weights {np.shape(weights)}: give [V, V], [V]."
        )
    weights_V = np.asarray(weights, np.float64)
    if not (np.isfinite(weights_V).all() and (weights_V >= 0).all() and weights_V.sum() > 0):
        raise ValueError("weights has negative or no finite positive values: give frequencies.")
    total = 0.0
    for start in range(0, len(table), _ROWS_AT_ONCE):
        p_RxV = np.asarray(table[start : start + _ROWS_AT_ONCE], np.float64)
        entropies_R = -np.sum(p_RxV * np.log(p_RxV, where=p_RxV > 0, out=np.zeros_like(p_RxV)), 1)
        total += float(weights_V[start : start + _ROWS_AT_ONCE] @ entropies_R)
    return total / float(weights_V.sum())


def ngrams(tokenizer: Tokenizer, texts: Iterable[str], n: int, how_many: int) -> np.ndarray:
    """The most frequent words of a corpus that are exactly n tokens, with a space before them.

    A word is what stands between white space, without punctuation at its ends, if only letters
    are left. As in the paper (arXiv 2402.02364), a lone space is not among its tokens. The paper
    takes entries of GPT-2's full vocabulary instead, the first 1,000 by id: strings of all kinds,
    parts of words and marks among them, common in another corpus. So the values of scores on
    these n-grams are not comparable with the published ones.

    Args:
      tokenizer: splits the words.
      texts: documents, read once.
      n: tokens in a word.
      how_many: words wanted.

    Returns:
      Ids, int32 [how_many, n], from the most frequent word on; equally frequent ones by alphabet.
    """
    checks.at_least("n", n, 1)
    checks.at_least("how_many", how_many, 1)
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(word.strip(string.punctuation) for word in text.split())
    words = [f" {word}" for word in sorted(counts, key=lambda w: (-counts[w], w)) if word.isalpha()]
    space = tokenizer.encode([" "])[0]
    found: list[np.ndarray] = []
    for start in range(0, len(words), _WORDS_AT_ONCE):
        some = tokenizer.encode(words[start : start + _WORDS_AT_ONCE])
        found += [ids for ids in some if len(ids) == n and not np.isin(ids, space).any()]
        if len(found) >= how_many:
            break
    else:
        raise ValueError(
            f"how_many={how_many}: the texts have {len(found)} words of {n} tokens; ask for fewer"
            " or give more text."
        )
    return np.stack(found[:how_many]).astype(np.int32)
