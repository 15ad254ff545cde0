"""What a transformer for in-context linear regression does: losses, shrinkage, known predictors.

Source: Hoogland et al. 2024, arXiv 2402.02364, sections on behaviour. Letters: B sequences, K
examples, D input dimensions, G gains. Every number is a mean over sequences and comes with its
standard error. All checkpoints see the same sequences, so curves are smoother than these errors
and shift as a whole with other sequences.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from llc_jax.metrics.averages import mean_over_sequences
from llc_jax.problems.regression import data
from llc_jax.problems.regression.model import RegressionTransformer, predictions
from llc_jax.types import Batch, Params

GAINS = (3.0, 5.0, 10.0, 100.0)
MAX_CHUNK = 1024  # sequences in memory at once


@functools.partial(jax.jit, static_argnames=("task", "num_sequences"))
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
    """`function(step, params, sequences, few)` for `llc_jax.checkpoint_map.map_checkpoints`.

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
          Means over sequences, in units of y squared, each with a `<name>_stderr`:
          loss [K]: squared error; mean_loss: that of the whole sequence.
          icl [3]: loss at one example minus that at an earlier one, see `icl_pairs`: negative if
            the model learns in context.
          prediction_square [K]: yhat squared; 0 for a model that predicts zero, the mean of the
            Gaussian prior.
          ridge_loss [K]: that of ridge on the same sequences, the least there is for that prior.
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
            loss = (guess - batch["y"]) ** 2
            return {
                "loss": loss,
                "mean_loss": loss.mean(axis=-1),
                "icl": jnp.stack(
                    [loss[:, late] - loss[:, early] for late, early in icl_pairs(loss.shape[-1])],
                    axis=-1,
                ),
                "prediction_square": guess**2,
                "ridge_loss": (batch["ridge"] - batch["y"]) ** 2,
                **distances,
            }

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

            return mean_over_sequences(measured, few, MAX_CHUNK)

        near = mean_over_sequences(measured, sequences, MAX_CHUNK)
        return near | jax.lax.map(far, jnp.array(self.gains))


def icl_pairs(num_examples: int) -> list[tuple[int, int]]:
    """Examples (late, early) whose losses are compared, from 0: last - 1st, 4th - 1st, last - 4th.

    With fewer than four examples the second takes the fourth's place.
    """
    last, middle = num_examples - 1, 3 if num_examples >= 4 else min(1, num_examples - 1)
    return [(last, 0), (middle, 0), (last, middle)]


def _outputs(batch: Batch) -> jax.Array:
    return jnp.einsum("bkd,bd->bk", batch["x"], batch["t"], precision=jax.lax.Precision.HIGHEST)
