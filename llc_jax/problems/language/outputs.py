"""Outputs of the language model on fixed inputs, as points in function space.

Source: Hoogland et al. 2024, arXiv 2402.02364, first version. Letters: B sequences, L tokens, V
vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax.inputs import checks
from llc_jax.problems.language.behavior import TOKENS_AT_ONCE
from llc_jax.problems.language.model import AttentionOnlyTransformer
from llc_jax.types import Batch, Params


@dataclasses.dataclass(frozen=True)
class NextTokenOutputs:
    """`function(step, params, batch)` for `llc_jax.checkpoint_map.map_checkpoints`, of language.

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
