"""Outputs of the regression transformer on fixed inputs, as points in function space.

Source: Hoogland et al. 2024, arXiv 2402.02364, first version. Letters: B sequences, K examples, D
input dimensions.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llc_jax.problems.regression.data import to_tokens
from llc_jax.problems.regression.model import RegressionTransformer, predictions
from llc_jax.types import Batch, Params


@dataclasses.dataclass(frozen=True)
class Outputs:
    """`function(step, params, batch)` for `llc_jax.checkpoint_map.map_checkpoints`, of regression.

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
