"""Loss functions of the models in this package, in the form every estimator expects."""

import dataclasses

import jax
import jax.numpy as jnp

from llc_jax.problems.regression import model as regression
from llc_jax.types import Batch, Params


@dataclasses.dataclass(frozen=True)
class RegressionLoss:
    """Squared error of the in-context predictions, averaged over the K positions.

    Equal and equally hashed for equal models, so it can be a static argument of `jax.jit`.
    Source: the empirical loss of Hoogland et al. 2024, arXiv 2402.02364.

    Attributes:
      model: the transformer whose parameters are passed in.
    """

    model: regression.RegressionTransformer

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        """Returns mean_k (yhat_k - y_k)^2 for each sequence, float32 [B]."""
        return jnp.mean(RegressionTokenLosses(self.model)(params, batch), axis=-1)


@dataclasses.dataclass(frozen=True)
class RegressionTokenLosses:
    """Squared error of each prediction: the parts of which `RegressionLoss` is the mean.

    Attributes:
      model: the transformer whose parameters are passed in.
    """

    model: regression.RegressionTransformer

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        """Returns (yhat_k - y_k)^2 of each position, float32 [B, K], in units of y squared."""
        errors_BxK = regression.predictions(self.model, params, batch) - batch["y"]
        return errors_BxK.astype(jnp.float32) ** 2


@dataclasses.dataclass(frozen=True)
class RegressionPrefixLoss:
    """Mean over prefixes of the sequence of the squared error averaged over the prefix.

    Its weight of position k is (1/K) Σ_{p >= k} 1/p: early predictions count more. The expectation
    of the "subsequence" loss of arXiv 2402.02364, whose prefixes have random lengths 1 to K.

    Attributes:
      model: the transformer whose parameters are passed in.
    """

    model: regression.RegressionTransformer

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        """Returns the loss of each sequence, float32 [B]."""
        losses_BxK = RegressionTokenLosses(self.model)(params, batch)
        lengths_K = jnp.arange(1, losses_BxK.shape[1] + 1, dtype=jnp.float32)
        return jnp.mean(jnp.cumsum(losses_BxK, axis=1) / lengths_K[None], axis=1)
