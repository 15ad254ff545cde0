"""In-context linear regression: sequences of (x, y) pairs, and the two optimal predictors.

Setting and numbers: Hoogland et al. 2024, arXiv 2402.02364 ("the paper"). A task t is drawn for
every sequence, then y_k = t . x_k + noise for K inputs x_k. Letters: B sequences, K examples,
D input dimensions, M tasks of the finite prior.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llc_jax.inputs import checks
from llc_jax.types import Batch

_EXACT = jax.lax.Precision.HIGHEST  # accelerators may round float32 products; oracles must not


@dataclasses.dataclass(frozen=True)
class RegressionTask:
    """The distribution of sequences. Hashable, so it can be a static argument.

    Attributes:
      dim: D, input dimension.
      num_examples: K, (x, y) pairs in a sequence.
      noise_variance: sigma^2, variance of the noise on y.
      num_tasks: M, size of the finite task set, whose members are equally likely; None draws
        t ~ N(0, I_D) afresh for every sequence, as the paper's main run does.
      task_seed: seed of the finite set; without effect when `num_tasks` is None.
    """

    dim: int = 4
    num_examples: int = 8
    noise_variance: float = 0.125
    num_tasks: int | None = None
    task_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("dim", "num_examples"):
            checks.at_least(name, getattr(self, name), 1)
        if not 0 < self.noise_variance < float("inf"):
            raise ValueError(
                f"noise_variance={self.noise_variance} must be positive and finite, since the "
                "posterior over tasks divides by it; use a small value for nearly clean data."
            )
        if self.num_tasks is not None:
            checks.at_least("num_tasks", self.num_tasks, 1, "None means the Gaussian prior")


@dataclasses.dataclass(frozen=True)
class RegressionBatches:
    """`batch_fn(rng_key) -> batch` for `llc_jax.types.Stream` and `llc_jax.training.loop.fit`.

    Equal fields make equal, equally hashed objects, so a second run with the same settings
    compiles nothing; a fresh lambda or `functools.partial` would.

    Attributes:
      task: the distribution of sequences.
      batch_size: B, sequences in a batch.
    """

    task: RegressionTask
    batch_size: int

    def __post_init__(self) -> None:
        checks.at_least("batch_size", self.batch_size, 1)

    def __call__(self, rng_key: jax.Array) -> Batch:
        """Returns a fresh batch; consumes `rng_key`."""
        return sample_batch(rng_key, self.task, self.batch_size)


def tasks(task: RegressionTask) -> jax.Array:
    """Returns the finite task set, float32 [M, D], drawn from N(0, I_D).

    Task i depends on `task_seed` and i only, so the sets of growing M are nested.
    """
    if task.num_tasks is None:
        raise ValueError(
            "num_tasks=None is the Gaussian prior, which has no finite task set; "
            "set num_tasks to an integer."
        )
    seed_key = jax.random.key(task.task_seed)
    keys_M = jax.vmap(lambda i: jax.random.fold_in(seed_key, i))(jnp.arange(task.num_tasks))
    return jax.vmap(lambda key: jax.random.normal(key, (task.dim,)))(keys_M)


def sample_batch(rng_key: jax.Array, task: RegressionTask, batch_size: int) -> Batch:
    """Draws sequences: t from the prior, x_k ~ N(0, I_D), y_k ~ N(t . x_k, sigma^2).

    Args:
      rng_key: typed key, consumed.
      task: the distribution.
      batch_size: B, static.

    Returns:
      {"x": float32 [B, K, D], "y": float32 [B, K]}.
    """
    sequences = sample_sequences(rng_key, task, batch_size)
    return {"x": sequences["x"], "y": sequences["y"]}


def sample_sequences(rng_key: jax.Array, task: RegressionTask, batch_size: int) -> Batch:
    """The same sequences as `sample_batch` with what no model may see: "t", float32 [B, D]."""
    checks.at_least("batch_size", batch_size, 1)
    num_examples, dim = task.num_examples, task.dim
    task_key, normal_key = jax.random.split(rng_key)
    # One draw for all normals: XLA takes about a second to compile each call of the generator.
    z_BxKxF = jax.random.normal(normal_key, (batch_size, num_examples + 1, dim + 1))
    x_BxKxD, noise_BxK = z_BxKxF[:, 1:, :dim], z_BxKxF[:, 1:, dim]
    if task.num_tasks is None:
        t_BxD = z_BxKxF[:, 0, :dim]
    else:
        t_BxD = tasks(task)[jax.random.randint(task_key, (batch_size,), 0, task.num_tasks)]
    y_BxK = jnp.einsum("bkd,bd->bk", x_BxKxD, t_BxD, precision=_EXACT)
    return {"x": x_BxKxD, "y": y_BxK + task.noise_variance**0.5 * noise_BxK, "t": t_BxD}


def to_tokens(batch: Batch) -> jax.Array:
    """Interleaves a batch into tokens x1, y1, ..., xK, yK: float32 [B, 2K, D+1].

    An x-token is (0, x_k) and a y-token is (y_k, 0), as in the paper.
    """
    x_BxKxD, y_BxK = batch["x"], batch["y"]
    zero_BxK, zero_BxKxD = jnp.zeros_like(y_BxK), jnp.zeros_like(x_BxKxD)
    x_tokens_BxKxE = jnp.concatenate([zero_BxK[..., None], x_BxKxD], axis=-1)
    y_tokens_BxKxE = jnp.concatenate([y_BxK[..., None], zero_BxKxD], axis=-1)
    pairs_BxKx2xE = jnp.stack([x_tokens_BxKxE, y_tokens_BxKxE], axis=2)
    batch_size, num_examples, _, width = pairs_BxKx2xE.shape
    return pairs_BxKx2xE.reshape(batch_size, 2 * num_examples, width)


def ridge_predictions(xs: jax.Array, ys: jax.Array, noise_variance: float | jax.Array) -> jax.Array:
    """Posterior mean of y_k given the first k-1 pairs, under t ~ N(0, I_D).

    yhat_k = x_k . (sum_{j<k} x_j x_j^T + sigma^2 I)^-1 sum_{j<k} y_j x_j; the first is 0.
    The optimal predictor for the Gaussian prior; the paper calls it ridge.

    Args:
      xs: inputs, float32 [B, K, D].
      ys: targets, float32 [B, K].
      noise_variance: sigma^2.

    Returns:
      Predictions, float32 [B, K].
    """
    num_examples, dim = xs.shape[-2:]
    before_KxK = jnp.tril(jnp.ones((num_examples, num_examples), xs.dtype), -1)
    gram_BxKxDxD = jnp.einsum("kj,bjd,bje->bkde", before_KxK, xs, xs, precision=_EXACT)
    gram_BxKxDxD += noise_variance * jnp.eye(dim, dtype=xs.dtype)[None, None]
    moment_BxKxD = jnp.einsum("kj,bjd,bj->bkd", before_KxK, xs, ys, precision=_EXACT)
    factor_BxKxDxD = jnp.linalg.cholesky(gram_BxKxDxD)
    mean_BxKxDx1 = jax.scipy.linalg.cho_solve((factor_BxKxDxD, True), moment_BxKxD[..., None])
    return jnp.einsum("bkd,bkd->bk", xs, mean_BxKxDx1[..., 0], precision=_EXACT)


def one_sample_predictions(
    xs: jax.Array, ys: jax.Array, noise_variance: float | jax.Array
) -> jax.Array:
    """Posterior mean of t . x_k given the first pair only, under t ~ N(0, I_D).

    yhat_k = y_1 x_1 . x_k / (|x_1|^2 + sigma^2), at k = 1 too: what a model predicts that has
    learnt to use one example.

    Args:
      xs: inputs, float32 [B, K, D].
      ys: targets, float32 [B, K].
      noise_variance: sigma^2.

    Returns:
      Predictions, float32 [B, K].
    """
    first_BxD = xs[:, 0]
    scale_B = ys[:, 0] / (jnp.sum(first_BxD**2, axis=-1) + noise_variance)
    return jnp.einsum("bkd,bd->bk", xs, first_BxD * scale_B[:, None], precision=_EXACT)


def dmmse_predictions(
    xs: jax.Array, ys: jax.Array, tasks: jax.Array, noise_variance: float | jax.Array
) -> jax.Array:
    """Posterior mean of y_k given the first k-1 pairs, under a uniform prior on a finite set.

    The weight of task m is proportional to exp(-sum_{j<k} (y_j - t_m . x_j)^2 / (2 sigma^2)).
    The optimal predictor for the finite prior ("dMMSE").

    Args:
      xs: inputs, float32 [B, K, D].
      ys: targets, float32 [B, K].
      tasks: the finite set, float32 [M, D]; memory grows as B K M.
      noise_variance: sigma^2.

    Returns:
      Predictions, float32 [B, K]; the first uses the mean task.
    """
    outputs_BxKxM = jnp.einsum("bkd,md->bkm", xs, tasks, precision=_EXACT)
    energies_BxKxM = (ys[..., None] - outputs_BxKxM) ** 2 / (2 * noise_variance)
    before_KxK = jnp.tril(jnp.ones((xs.shape[1], xs.shape[1]), xs.dtype), -1)
    logits_BxKxM = -jnp.einsum("kj,bjm->bkm", before_KxK, energies_BxKxM, precision=_EXACT)
    return jnp.sum(jax.nn.softmax(logits_BxKxM, axis=-1) * outputs_BxKxM, axis=-1)
