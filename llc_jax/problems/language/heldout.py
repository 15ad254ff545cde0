"""What a language model is asked about: held-out sequences, bigrams, n-grams, and their words."""

from typing import Any

import jax
import numpy as np

from llc_jax.problems.language import corpora, ngrams, synthetic

LENGTHS = (2, 3, 4)  # of the n-grams


def sequences(training: Any, source: Any, num_sequences: int, seed: int) -> np.ndarray:
    """Sequences that were not trained on, integers [B, L].

    Fresh ones of the synthetic language, else the first of the held-out text, or all there are.

    Args:
      training: configuration of the run.
      source: its `SyntheticLanguage` or token set.
      num_sequences: B.
      seed: of fresh ones.
    """
    if training.data == "synthetic":
        key, _ = jax.random.split(jax.random.key(seed))
        return np.asarray(synthetic.sample(key, source, num_sequences)["tokens"])
    return source.heldout[:num_sequences]


def material(flags: Any, training: Any, source: Any):
    """Held-out sequences, the bigram table, n-grams of each length and the start token."""
    rows = sequences(training, source, flags.num_sequences, flags.seed)
    if training.data == "synthetic":
        _, key = jax.random.split(jax.random.key(flags.seed))
        others = np.asarray(synthetic.sample(key, source, flags.num_sequences)["tokens"])
        grams = [frequent(others, n, flags.num_ngrams) for n in LENGTHS]
        # Nothing follows the last word of a table but words: the start token's column is empty.
        return rows, synthetic.bigram_table(source), grams, source.start_token
    texts = list(corpora.documents(training.data, field=training.field))
    grams = [ngrams.ngrams(source.tokenizer, texts, n, flags.num_ngrams) for n in LENGTHS]
    table = ngrams.bigram_table(source.train, source.tokenizer.vocab_size)
    return rows, table, grams, source.tokenizer.eos_id


def words(training: Any, source: Any, rows: np.ndarray) -> list[list[str]]:
    """The tokens of sequences [B, L] as text; those of the synthetic language are numbered."""
    if training.data == "synthetic":
        return [[f"{token} " for token in row] for row in rows.tolist()]
    return [[source.tokenizer.decode([token]) for token in row] for row in rows.tolist()]


def frequent(rows: np.ndarray, n: int, how_many: int) -> np.ndarray:
    """The most frequent n-grams of sequences [B, L], their first token left out: [how_many, n]."""
    windows = np.lib.stride_tricks.sliding_window_view(rows[:, 1:], n, axis=1).reshape(-1, n)
    found, counts = np.unique(windows, axis=0, return_counts=True)
    if len(found) < how_many:
        raise ValueError(
            f"num_ngrams={how_many}: the sequences have {len(found)} different {n}-grams; ask for"
            " fewer or raise num_sequences."
        )
    return found[np.argsort(-counts, kind="stable")[:how_many]]
