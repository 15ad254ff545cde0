"""What a language model does: losses by position, in-context learning, bigrams, n-grams.

Source: Hoogland et al. 2024, arXiv 2402.02364, sections on behaviour. Letters: B sequences of L
tokens, M = L - 1 predictions, V vocabulary, G lengths n of n-grams, T texts, R sequences at once, P
numbers from each. Means over sequences come with their standard error. All checkpoints see the same
sequences, so curves are smoother than these errors and shift as a whole with other sequences.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llc_jax.inputs import checks
from llc_jax.metrics.averages import mean_over_sequences
from llc_jax.problems.language.losses import LanguageTokenLosses
from llc_jax.problems.language.model import AttentionOnlyTransformer, ablate_positions, check_tokens
from llc_jax.types import Batch, Params

TOKENS_AT_ONCE = 2048  # 100 MB at the published size; on CPU more is no faster (measured)


class Questions(NamedTuple):
    """What every checkpoint is asked; made by `questions`.

    Attributes:
      tokens: held-out sequences, integers [B, L].
      position: the one in each sequence whose prediction is compared with the bigrams, int32 [B].
      table: p(next token | token), float32 [V, V].
      ngrams: the start token, n tokens and something after them, int32 [any, G, 1 + largest n].
      n: int32 [G].
      texts: sequences whose tokens are looked at one by one, integers [T, any].
    """

    tokens: np.ndarray
    position: np.ndarray
    table: np.ndarray
    ngrams: np.ndarray
    n: np.ndarray
    texts: np.ndarray


def questions(
    seed: int,
    model: AttentionOnlyTransformer,
    tokens: np.ndarray,
    table: np.ndarray,
    ngrams: Sequence[np.ndarray] = (),
    texts: np.ndarray | None = None,
) -> Questions:
    """Checks the data and draws the positions, uniform from 1 to L - 1.

    Args:
      seed: of the positions.
      model: whose checkpoints will be asked.
      tokens: held-out rows, integers [B, L], each from the start token on.
      table: of `data.ngrams.bigram_table` or `data.synthetic_language.bigram_table`, [V, V].
      ngrams: of `data.ngrams.ngrams`, integers [how_many, n] with 2 <= n <= L - 2, one array for
        each n, equally many of each.
      texts: rows from the start token on, integers [T, any]; by default the first of `tokens`.
    """
    checks.at_least("seed", seed, 0)
    texts = np.asarray(tokens[:1] if texts is None else texts)
    for rows in (tokens, texts):
        check_tokens(model, rows)
        if len(rows) < 1 or rows.shape[1] < 2:
            raise ValueError(f"tokens of shape {rows.shape}: give a row of 2 tokens or more.")
    size, length = model.vocab_size, tokens.shape[1]
    if np.shape(table) != (size, size) or not _are_distributions(table):
        raise ValueError(
            f"table of shape {np.shape(table)}: give p(next token | token) for vocab_size={size},"
            " rows that are >= 0 and sum to 1."
        )
    start = tokens[0, 0]
    if (tokens[:, 0] != start).any():
        raise ValueError("tokens has rows with different first tokens: begin all with one token.")
    shapes = [np.shape(grams) for grams in ngrams]
    if any(
        len(s) != 2 or not 1 <= s[0] == shapes[0][0] or not 2 <= s[1] <= length - 2 for s in shapes
    ):
        raise ValueError(
            f"ngrams of shapes {shapes}: give [how_many, n], equally many of each, with n from 2 to"
            f" {length - 2}, two less than the tokens of a sequence, which must reach beyond them."
        )
    n_G = np.array([shape[1] for shape in shapes], np.int32)
    begun = np.full((shapes[0][0], len(n_G), 1 + n_G.max()) if shapes else (0, 0, 0), start)
    for index, grams in enumerate(ngrams):
        check_tokens(model, grams)
        begun[:, index, 1 : 1 + n_G[index]] = grams
    return Questions(
        tokens=np.asarray(tokens),
        position=np.random.default_rng(seed).integers(1, length, len(tokens), np.int32),
        table=np.asarray(table, np.float32),
        ngrams=begun.astype(np.int32),
        n=n_G,
        texts=texts,
    )


@dataclasses.dataclass(frozen=True)
class Behavior:
    """`function(step, params, questions)` for `llc_jax.checkpoint_map.map_checkpoints`.

    Attributes:
      model: the transformer.
      icl: tokens (late, early), counted from 1 with the start token as the first, whose losses are
        compared; by default `icl_tokens`.
      tokens_at_once: bounds memory: so many tokens, but at least one sequence, per checkpoint.
    """

    model: AttentionOnlyTransformer
    icl: tuple[int, int] | None = None
    tokens_at_once: int = TOKENS_AT_ONCE

    def __post_init__(self) -> None:
        checks.at_least("tokens_at_once", self.tokens_at_once, 1)

    def __call__(self, step: jax.Array, params: Params, questions: Questions) -> dict:
        """Measures one checkpoint.

        Args:
          step: not used.
          params: of the checkpoint.
          questions: of the function of this name.

        Returns:
          float32, in nats, each but the last with a `<name>_stderr`:
          loss [L - 1]: entry l is that of token l + 1, given tokens 0 to l; mean_loss: of all.
          ablated_loss [L - 1], ablated_mean_loss: the same with positions set to 0.
          icl: loss of the late token minus that of the early one, paired: negative if the model
            learns in context.
          bigram_score: cross-entropy of the prediction at one position of each sequence, relative
            to the bigrams of the token there; bigram_floor: the entropy of these, the least there
            is; bigram_kl: their difference, a Kullback-Leibler divergence.
          ngram_loss [G]: of the last token of an n-gram, given the start token and the others.
          ngram_score [G]: loss at the same position, entry n - 1 of `loss`, over `ngram_loss`:
            1 if n-grams are nothing special, more if the model knows them.
          ngram_score_published [G]: the same with entry n, which sees one token more than the
            n-gram lets the model see. So the published code has it.
          text_log_probs [T, any - 1]: log-probability of every token but the first of each text.
        """
        questions = jax.tree.map(jnp.asarray, questions)
        length = questions.tokens.shape[1]
        late, early = icl_tokens(length) if self.icl is None else self.icl
        if not 2 <= early <= late <= length:
            raise ValueError(
                f"icl={(late, early)}: give tokens (late, early) from 2 to the {length} there are."
            )
        # A loop over both instead of two copies of the model, since compilation takes longer than
        # most runs.
        positions_2xLxC = jnp.stack([p["W_pos"] for p in (params, ablate_positions(params))])

        def measured(batch: Batch) -> dict[str, jax.Array]:
            def predicted(position_LxC):
                placed = {**params, "W_pos": position_LxC}
                logits_BxLxV = self.model.apply({"params": placed}, batch["tokens"])
                at_Bx1x1 = batch["position"][:, None, None]
                asked_Bx1xV = jnp.take_along_axis(logits_BxLxV, at_Bx1x1, axis=1)
                return _cross_entropy(logits_BxLxV, batch["tokens"]), asked_Bx1xV[:, 0]

            loss_2xBxM, logits_2xBxV = jax.lax.map(predicted, positions_2xLxC)
            loss_BxM, ablated_BxM = loss_2xBxM
            token_B = jnp.take_along_axis(batch["tokens"], batch["position"][:, None], axis=1)[:, 0]
            return {
                "loss": loss_BxM,
                "mean_loss": loss_BxM.mean(axis=1),
                "ablated_loss": ablated_BxM,
                "ablated_mean_loss": ablated_BxM.mean(axis=1),
                # Tokens are counted from 1, and the first has no loss.
                "icl": loss_BxM[:, late - 2] - loss_BxM[:, early - 2],
                **_bigram_scores(logits_2xBxV[0], questions.table[token_B]),
            }

        batch = {"tokens": questions.tokens, "position": questions.position}
        found = mean_over_sequences(measured, batch, self._rows(length))
        if len(questions.n):
            found |= self._ngrams(params, questions, found["loss"], found["loss_stderr"])

        def log_probs(text_L):
            return -LanguageTokenLosses(self.model)(params, {"tokens": text_L[None]})[0]

        return found | {"text_log_probs": jax.lax.map(log_probs, questions.texts)}

    def _rows(self, length: int) -> int:
        return max(1, self.tokens_at_once // length)

    def _ngrams(
        self, params: Params, questions: Questions, loss_M: jax.Array, error_M: jax.Array
    ) -> dict[str, jax.Array]:
        _, num_lengths, length = questions.ngrams.shape

        def last(tokens_BxGxL: jax.Array) -> dict[str, jax.Array]:
            batch = {"tokens": tokens_BxGxL.reshape(-1, length)}
            loss_BxGxM = LanguageTokenLosses(self.model)(params, batch)
            loss_BxGxM = loss_BxGxM.reshape(-1, num_lengths, length - 1)
            entry_1xGx1 = questions.n[None, :, None] - 1
            return {"ngram_loss": jnp.take_along_axis(loss_BxGxM, entry_1xGx1, axis=2)[..., 0]}

        found = mean_over_sequences(last, questions.ngrams, self._rows(num_lengths * length))
        below_G, below_error_G = found["ngram_loss"], found["ngram_loss_stderr"]
        for name, entry_G in (
            ("ngram_score", questions.n - 1),
            ("ngram_score_published", questions.n),
        ):
            above_G, above_error_G = loss_M[entry_G], error_M[entry_G]
            # First order in the errors of two independent means.
            relative_G = jnp.hypot(above_error_G / above_G, below_error_G / below_G)
            found[name] = above_G / below_G
            found[f"{name}_stderr"] = found[name] * relative_G
        return found


def icl_tokens(length: int) -> tuple[int, int]:
    """Returns (late, early): tokens 500 and 50 of 1024 as published, or the same fractions of L."""
    late, early = (max(2, round(token * length / 1024)) for token in (500, 50))
    return late, early


def _cross_entropy(logits_BxLxV: jax.Array, tokens_BxL: jax.Array) -> jax.Array:
    targets_BxL = jnp.roll(tokens_BxL.astype(jnp.int32), -1, axis=1)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, targets_BxL)[:, :-1]


def _bigram_scores(logits_BxV: jax.Array, p_BxV: jax.Array) -> dict[str, jax.Array]:
    log_q_BxV = jax.nn.log_softmax(logits_BxV)
    cross_B = -jnp.where(p_BxV > 0, p_BxV * log_q_BxV, 0.0).sum(axis=1)  # 0 log 0 is 0
    entropy_B = jax.scipy.special.entr(p_BxV).sum(axis=1)
    return {"bigram_score": cross_B, "bigram_floor": entropy_B, "bigram_kl": cross_B - entropy_B}


def _are_distributions(table: np.ndarray) -> bool:
    return bool(np.min(table) >= 0 and np.abs(np.sum(table, axis=1) - 1).max() < 1e-3)
