"""Averages over sequences with their standard errors, in constant memory.

Letters: R sequences at once, P numbers from each.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from llc_jax.types import Batch


def mean_over_sequences(
    function: Callable[[Batch], dict[str, jax.Array]], batch: Batch, rows: int
) -> dict[str, jax.Array]:
    """Means of `function(batch)` over sequences and their standard errors, in constant memory.

    Args:
      function: batch -> {name: values with a leading axis of sequences}.
      batch: of B sequences.
      rows: sequences at once.

    Returns:
      {name: mean, name_stderr: sqrt(variance / B)}, float32.
    """
    size = jax.tree.leaves(batch)[0].shape[0]
    count = math.ceil(size / rows)
    rows = math.ceil(size / count)

    def part(number: int | jax.Array) -> Batch:
        index = (number * rows + jnp.arange(rows)) % size  # the last part is filled up
        return jax.tree.map(lambda x: jnp.asarray(x)[index], batch)

    def flat(values: dict[str, jax.Array]) -> jax.Array:  # one array compiles faster than many
        return jax.vmap(lambda row: ravel_pytree(row)[0])(values).astype(jnp.float32)

    def add(carry, number):
        # The update of Chan et al. 1983. The mean of squares less the square of the mean would lose
        # digits where spreads are small.
        mean_P, squares_P = carry
        values_RxP = flat(function(part(number)))
        before = (number * rows).astype(jnp.float32)
        kept_Rx1 = (number * rows + jnp.arange(rows) < size).astype(jnp.float32)[:, None]
        taken = kept_Rx1.sum()
        own_P = (kept_Rx1 * values_RxP).sum(axis=0) / taken
        own_squares_P = (kept_Rx1 * (values_RxP - own_P[None]) ** 2).sum(axis=0)
        share, shift_P = taken / (before + taken), own_P - mean_P
        squares_P = squares_P + own_squares_P + before * share * shift_P**2
        return (mean_P + share * shift_P, squares_P), None

    shapes = jax.eval_shape(lambda: function(part(0)))
    zeros, unravel = ravel_pytree(
        jax.tree.map(lambda x: jnp.zeros(x.shape[1:], jnp.float32), shapes)
    )
    (mean_P, squares_P), _ = jax.lax.scan(add, (zeros, zeros), jnp.arange(count))
    errors = unravel(jnp.sqrt(squares_P) / size)
    return unravel(mean_P) | {f"{name}_stderr": error for name, error in errors.items()}
