"""Next-token losses of the language model, in the form every estimator expects.

Letters as in `language.model`: B sequences of L tokens, V vocabulary, C width; here
M = L-1 predictions and K of them to a chunk.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from llc_jax.inputs import checks
from llc_jax.problems.language.model import AttentionOnlyTransformer, check_tokens
from llc_jax.types import Batch, Params


@dataclasses.dataclass(frozen=True)
class LanguageTokenLosses:
    """Cross-entropy of each next-token prediction, in nats.

    Equal and equally hashed for equal fields, so it can be a static argument of `jax.jit`.

    Attributes:
      model: the transformer whose parameters are passed in.
      chunk: positions to unembed at once; 0 takes all. Logits then need memory for B x chunk x V
        numbers instead of B x L x V, forward and backward, and are computed twice for a gradient:
        0 to 20 % more time on CPU (B = 16, L = 128, V = 5000, chunks of 8 to 64).
    """

    model: AttentionOnlyTransformer
    chunk: int = 0

    def __post_init__(self) -> None:
        checks.at_least("chunk", self.chunk, 0, "0 takes all positions at once")

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        """Returns -log p(token l+1 | tokens 0 ... l), float32 [B, L-1].

        Args:
          params: plain nested dict of the model's parameters.
          batch: {"tokens": integers [B, L]}, L from 2 to the model's context.
        """
        tokens_BxL = batch["tokens"]
        check_tokens(self.model, tokens_BxL)
        if tokens_BxL.shape[1] < 2:
            raise ValueError(
                f"tokens of shape {tokens_BxL.shape} hold no prediction: give at least 2 tokens."
            )
        # All L tokens go in, although the last predicts nothing: lengths that are powers of two
        # keep accelerators' matrix units aligned.
        x_BxLxC = self.model.apply({"params": params}, tokens_BxL, method="residual")
        x_BxMxC = x_BxLxC[:, :-1]
        targets_BxM = jnp.asarray(tokens_BxL)[:, 1:].astype(jnp.int32)

        def losses(x_and_targets):
            x_BxKxC, targets_BxK = x_and_targets
            logits_BxKxV = self.model.apply({"params": params}, x_BxKxC, method="unembed")
            return _cross_entropy(logits_BxKxV, targets_BxK)

        if not self.chunk:
            return losses((x_BxMxC, targets_BxM))
        return _map_chunks(losses, (x_BxMxC, targets_BxM), self.chunk)


@dataclasses.dataclass(frozen=True)
class LanguageLoss(LanguageTokenLosses):
    """Mean cross-entropy of the L-1 next-token predictions of each sequence, in nats.

    Source: the empirical loss of Hoogland et al. 2024, arXiv 2402.02364.

    Attributes are those of `LanguageTokenLosses`.
    """

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        """Returns the mean over predictions of {"tokens": integers [B, L]}, float32 [B]."""
        return jnp.mean(super().__call__(params, batch), axis=1)


@dataclasses.dataclass(frozen=True)
class LanguageOctaveLosses(LanguageTokenLosses):
    """Mean cross-entropy of predictions 1, 2-3, 4-7, 8-15, ... of each sequence, in nats.

    Parts of the loss whose number grows as log L: for λ̂ of early and late positions. Weighted by
    how many predictions an octave holds, they add up to `LanguageLoss`.

    Attributes are those of `LanguageTokenLosses`.
    """

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        """Returns the mean over each octave of {"tokens": integers [B, L]}, float32 [B, octave]."""
        losses_BxM = super().__call__(params, batch)
        edges = [0, *octaves(losses_BxM.shape[1] + 1)]
        means = [losses_BxM[:, a:b].mean(axis=1) for a, b in itertools.pairwise(edges)]
        return jnp.stack(means, axis=1)


def octaves(context: int) -> list[int]:
    """The last prediction of each octave of `LanguageOctaveLosses`, counted from 1.

    1, 3, 7, 15, ..., and context - 1 for what is left.
    """
    checks.at_least("context", context, 2, "a token and one to predict")
    ends = [2 ** (i + 1) - 1 for i in range((context - 1).bit_length())]
    return [min(end, context - 1) for end in ends]


def _cross_entropy(logits_BxKxV: jax.Array, targets_BxK: jax.Array) -> jax.Array:
    """Returns -log softmax(logits)[target], float32 [B, K]."""
    # By hand for the memory of one array of logits instead of two, and with a comparison in the
    # place of a gather, whose gradient is a scatter that accelerators cannot fuse.
    peak_BxKx1 = jax.lax.stop_gradient(logits_BxKxV.max(axis=-1, keepdims=True))
    shifted_BxKxV = logits_BxKxV - peak_BxKx1
    ids_V = jnp.arange(logits_BxKxV.shape[-1])
    hit_BxKxV = ids_V[None, None] == targets_BxK[..., None]
    target_BxK = jnp.sum(jnp.where(hit_BxKxV, shifted_BxKxV, 0), axis=-1)
    return jnp.log(jnp.sum(jnp.exp(shifted_BxKxV), axis=-1)) - target_BxK


def _map_chunks(function, arrays, chunk):
    """Applies `function` to `chunk` positions (axis 1) of all arrays at a time: [B, M]."""
    batch, length = arrays[1].shape
    chunk = min(chunk, length)
    num_chunks = -(-length // chunk)

    def split(array):
        pad = ((0, 0), (0, num_chunks * chunk - length)) + ((0, 0),) * (array.ndim - 2)
        padded = jnp.pad(array, pad)
        return padded.reshape(batch, num_chunks, chunk, *array.shape[2:]).swapaxes(0, 1)

    # Inside a loop nothing can be merged across the barrier that `prevent_cse` would put up.
    recomputed = jax.checkpoint(function, prevent_cse=False)
    mapped = jax.lax.map(recomputed, jax.tree.map(split, arrays))
    return mapped.swapaxes(0, 1).reshape(batch, -1)[:, :length]
