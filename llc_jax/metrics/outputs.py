"""Outputs of a transformer on fixed inputs, as points in function space.

Source: Hoogland et al. 2024, arXiv 2402.02364, first version. Letters: B sequences, K examples, D
input dimensions; L tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax import checks
from llc_jax.data.regression import to_tokens
from llc_jax.mapping import map_checkpoints
from llc_jax.metrics.language import TOKENS_AT_ONCE
from llc_jax.models.attention_only import AttentionOnlyTransformer
from llc_jax.models.regression import RegressionTransformer, predictions
from llc_jax.types import Batch, Params


@dataclasses.dataclass(frozen=True)
class Outputs:
    """`function(step, params, batch)` for `llc_jax.mapping.map_checkpoints`, of regression.

    Attributes:
      model: the transformer.
      everything: all D + 1 outputs at all 2K tokens, as published, though the loss sees only the
        predictions; or the predictions alone.
    """

    model: RegressionTransformer
    everything: bool = False

    def __call__(self, step: jax.Array, params: Params, batch: Batch) -> jax.Array:
        """Returns float32 [B, K], or [B, 2K (D + 1)] with `everything`."""
        if self.everything:
            found = self.model.apply({"params": params}, to_tokens(batch))
        else:
            found = predictions(self.model, params, batch)
        return found.reshape(len(found), -1).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class NextTokenOutputs:
    """`function(step, params, batch)` for `llc_jax.mapping.map_checkpoints`, of language.

    Attributes:
      model: the transformer.
      log_probs: log-probabilities, in nats; or logits, as published, of which a constant for each
        position has no effect on any prediction.
      tokens_at_once: bounds memory: so many tokens, but at least one sequence, per checkpoint.
    """

    model: AttentionOnlyTransformer
    log_probs: bool = False
    tokens_at_once: int = TOKENS_AT_ONCE

    def __post_init__(self) -> None:
        checks.at_least("tokens_at_once", self.tokens_at_once, 1)

    def __call__(self, step: jax.Array, params: Params, batch: Batch) -> jax.Array:
        """Returns that of the token that follows, float32 [B, 1]; batch of `one_position`."""

        def output(one: Batch) -> jax.Array:
            tokens_L, at = one["tokens"], one["position"]
            x_1xLxC = self.model.apply({"params": params}, tokens_L[None], method="residual")
            x_1x1xC = jax.lax.dynamic_slice_in_dim(x_1xLxC, at, 1, axis=1)
            logits_V = self.model.apply({"params": params}, x_1x1xC, method="unembed")[0, 0]
            if self.log_probs:
                logits_V = jax.nn.log_softmax(logits_V)
            return logits_V[tokens_L[at + 1].astype(jnp.int32)][None]

        rows = max(1, self.tokens_at_once // batch["tokens"].shape[1])
        return jax.lax.map(output, batch, batch_size=rows)


def one_position(seed: int, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Chooses one position of each sequence, uniform from 0 to L - 2: a token follows.

    Args:
      seed: of the positions.
      tokens: integers [B, L], each row from the start token on.

    Returns:
      {"tokens": the same, "position": int32 [B]}.
    """
    checks.at_least("seed", seed, 0)
    if np.ndim(tokens) != 2 or tokens.shape[1] < 2:
        raise ValueError(f"tokens of shape {np.shape(tokens)}: give rows of 2 tokens or more.")
    random = np.random.default_rng(seed)
    return {
        "tokens": tokens,
        "position": random.integers(tokens.shape[1] - 1, size=len(tokens), dtype=np.int32),
    }


def output_blocks(
    outputs: Callable[..., jax.Array],
    checkpoints: Sequence[tuple[int, Params]],
    inputs: Batch,
    references: Sequence[np.ndarray] = (),
    *,
    block: int = 64,
    checkpoint_batch: int = 1,
) -> Iterator[np.ndarray]:
    """Outputs of all checkpoints, block after block of sequences, for `functional_pca`.

    Args:
      outputs: which: `Outputs` or `NextTokenOutputs`, or a function like these.
      checkpoints: N pairs (step, params), all in memory: they are run once per block.
      inputs: arrays [B, ...], the batch of `outputs`.
      references: M arrays [B, ...] of what known predictors have in the place of the outputs; their
        rows come last.
      block: sequences per block; bounds memory.
      checkpoint_batch: see `map_checkpoints`.

    Yields:
      float32 [N + M, columns].
    """
    size = len(next(iter(inputs.values())))
    for start in range(0, size, block):
        # The last block is filled up with sequences of its own, so that nothing compiles twice.
        rows = np.minimum(np.arange(start, start + block), size - 1)
        batch = {name: np.asarray(x)[rows] for name, x in inputs.items()}
        found = map_checkpoints(outputs, checkpoints, batch, checkpoint_batch=checkpoint_batch)
        found = np.stack([values for _, values in found])
        ideal = [np.asarray(x)[rows].reshape(block, -1) for x in references]
        for one in ideal:
            if one.shape != found.shape[1:]:
                raise ValueError(
                    f"references have {one.shape[1]} values a sequence, the outputs"
                    f" {found.shape[2]}: give predictors of the same."
                )
        whole = np.concatenate([found, np.stack(ideal)]) if ideal else found
        keep = min(block, size - start)
        yield whole[:, :keep].reshape(len(whole), -1).astype(np.float32)
