"""What a transformer for in-context linear regression does: losses, shrinkage, known predictors.

Source: Hoogland et al. 2024, arXiv 2402.02364, sections on behaviour. Letters: B sequences, K
examples, D input dimensions, G gains. Every number is a mean over sequences.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax.data import regression as data
from llc_jax.models.regression import RegressionTransformer, predictions
from llc_jax.types import Batch, Params

GAINS = (3.0, 5.0, 10.0, 100.0)
MAX_CHUNK = 1024  # sequences in memory at once


def evaluation_set(
    rng_key: jax.Array, task: data.RegressionTask, num_sequences: int
) -> dict[str, jax.Array]:
    """Fixed sequences, and what known predictors make of them.

    Args:
      rng_key: typed key, consumed.
      task: the distribution.
      num_sequences: B.

    Returns:
      {"x": [B, K, D], "y": [B, K], "t": [B, D] tasks, "ridge": [B, K] the optimal predictor of
      the Gaussian prior, "one_sample": [B, K] ridge on the first pair only}, and for a finite
      prior "dmmse": [B, K] its optimal predictor; all float32.
    """
    found = data.sample_sequences(rng_key, task, num_sequences)
    x, y, variance = found["x"], found["y"], task.noise_variance
    found["ridge"] = data.ridge_predictions(x, y, variance)
    found["one_sample"] = data.one_sample_predictions(x, y, variance)
    if task.num_tasks is not None:
        found["dmmse"] = data.dmmse_predictions(x, y, data.tasks(task), variance)
    return found


@dataclasses.dataclass(frozen=True)
class Behavior:
    """`function(step, params, sequences, few)` for `llc_jax.mapping.map_checkpoints`.

    Attributes:
      model: the transformer.
      gains: G factors for the sequences out of distribution.
    """

    model: RegressionTransformer
    gains: tuple[float, ...] = GAINS

    def __call__(
        self, step: jax.Array, params: Params, sequences: Batch, few: Batch
    ) -> dict[str, jax.Array]:
        """Measures one checkpoint.

        Args:
          step: not used.
          params: of the checkpoint.
          sequences: of `evaluation_set`.
          few: likewise, for the sequences out of distribution.

        Returns:
          Means over sequences, in units of y squared:
          loss [K]: squared error.
          prediction_square [K]: yhat squared; 0 for a model that predicts zero, the mean of the
            task prior.
          to_ridge, to_one_sample and, if there is one, to_dmmse [K]: squared distance to these.
          far_inputs_loss [G, K]: squared error where inputs are g times as large, x -> g x.
          far_tasks_loss [G, K]: squared error where tasks are, t -> g t.
        """

        def measured(batch):
            guess = predictions(self.model, params, batch).astype(jnp.float32)
            distances = {
                f"to_{name}": (guess - batch[name]) ** 2
                for name in ("ridge", "one_sample", "dmmse")
                if name in batch
            }
            return {
                "loss": (guess - batch["y"]) ** 2, "prediction_square": guess**2, **distances,
            }  # fmt: skip

        def far(gain):
            def measured(batch):
                # t . (g x) = (g t) . x: the same targets, with inputs g times as large or not.
                noise = batch["y"] - _outputs(batch)
                y = gain * _outputs(batch) + noise
                wide = {"x": gain * batch["x"], "y": y}
                steep = {"x": batch["x"], "y": y}
                return {
                    "far_inputs_loss": (predictions(self.model, params, wide) - y) ** 2,
                    "far_tasks_loss": (predictions(self.model, params, steep) - y) ** 2,
                }

            return mean_over_sequences(measured, few)

        return mean_over_sequences(measured, sequences) | jax.lax.map(far, jnp.array(self.gains))


def icl_scores(loss: np.ndarray) -> dict[str, np.ndarray]:
    """How much later examples of a sequence are easier, negative if they are.

    Args:
      loss: [..., K] per token, K >= 4.

    Returns:
      {"icl_K_1", "icl_4_1", "icl_K_4"}: loss of the later example minus that of the earlier, [...],
      with K as a number.
    """
    last = loss.shape[-1]
    if last < 4:
        raise ValueError(f"loss has {last} tokens: the scores compare the first, fourth and last.")
    pairs = dict.fromkeys([(last, 1), (4, 1), (last, 4)])
    return {
        f"icl_{late}_{early}": loss[..., late - 1] - loss[..., early - 1] for late, early in pairs
    }


def mean_over_sequences(function, batch: Batch) -> Any:
    """Mean of `function(batch)` over its leading axis, at most `MAX_CHUNK` sequences at a time."""
    size = jax.tree.leaves(batch)[0].shape[0]
    chunk = max(n for n in range(1, min(size, MAX_CHUNK) + 1) if size % n == 0)
    parts = jax.tree.map(lambda x: x.reshape(size // chunk, chunk, *x.shape[1:]), batch)
    sums = jax.lax.map(lambda part: jax.tree.map(_mean, function(part)), parts)
    return jax.tree.map(_mean, sums)


def _mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=0)


def _outputs(batch: Batch) -> jax.Array:
    return jnp.einsum("bkd,bd->bk", batch["x"], batch["t"], precision=jax.lax.Precision.HIGHEST)
