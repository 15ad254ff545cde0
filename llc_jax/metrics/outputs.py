"""Outputs of the regression transformer on fixed inputs, as points in function space."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax.data.regression import to_tokens
from llc_jax.mapping import map_checkpoints
from llc_jax.models.regression import RegressionTransformer, predictions
from llc_jax.types import Batch, Params


@dataclasses.dataclass(frozen=True)
class Outputs:
    """`function(step, params, batch)` for `llc_jax.mapping.map_checkpoints`.

    Attributes:
      model: the transformer.
      everything: all D + 1 outputs at all 2K tokens, as published, though the loss sees only the
        predictions; or the predictions alone.
    """

    model: RegressionTransformer
    everything: bool = False

    def __call__(self, step: jax.Array, params: Params, batch: Batch) -> jax.Array:
        """Returns float32 [B K], or [B 2K (D + 1)] with `everything`."""
        if self.everything:
            found = self.model.apply({"params": params}, to_tokens(batch))
        else:
            found = predictions(self.model, params, batch)
        return jnp.ravel(found).astype(jnp.float32)


def output_blocks(
    outputs: Outputs,
    checkpoints: Sequence[tuple[int, Params]],
    sequences: Batch,
    references: Sequence[str] = (),
    *,
    block: int = 64,
    checkpoint_batch: int = 1,
) -> Iterator[np.ndarray]:
    """Outputs of all checkpoints, block after block of sequences, for `functional_pca`.

    Args:
      outputs: which.
      checkpoints: N pairs (step, params), all in memory: they are run once per block.
      sequences: of `metrics.regression.evaluation_set`.
      references: M names of predictions in `sequences`, or "zero", whose rows come last.
      block: sequences per block; bounds memory.
      checkpoint_batch: see `map_checkpoints`.

    Yields:
      float32 [N + M, columns].
    """
    if references and outputs.everything:
        raise ValueError(
            f"references={list(references)} predict y and nothing else: use everything=False."
        )
    size = sequences["y"].shape[0]
    for start in range(0, size, block):
        # The last block is filled up with sequences of its own, so that nothing compiles twice.
        rows = np.minimum(np.arange(start, start + block), size - 1)
        batch = {name: np.asarray(x)[rows] for name, x in sequences.items()}
        inputs = {name: batch[name] for name in ("x", "y")}
        found = map_checkpoints(outputs, checkpoints, inputs, checkpoint_batch=checkpoint_batch)
        ideal = [np.zeros_like(batch["y"]) if r == "zero" else batch[r] for r in references]
        whole = np.stack([row for _, row in found] + [x.ravel() for x in ideal])
        keep = min(block, size - start)
        yield whole.reshape(len(whole), block, -1)[:, :keep].reshape(len(whole), -1)
