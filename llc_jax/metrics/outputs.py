"""Outputs of a transformer on fixed inputs, as points in function space.

Source: Hoogland et al. 2024, arXiv 2402.02364, first version. Letters: B sequences, K examples, D
input dimensions; L tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from llc_jax.checkpoint_map import map_checkpoints
from llc_jax.types import Batch, Params


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
