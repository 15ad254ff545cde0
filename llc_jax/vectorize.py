"""`jax.vmap` and `jax.lax.map` that leave out axes of length one, and a mean that does not notice.

XLA takes such an axis out of matrix products and then lays out their results in another order: with
it, a chain of the attention-only language model transposed and copied the attention patterns of
every layer, forward and backward, in every step (CPU, jax 0.10.2). An axis of two does no harm.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.vmap(function)` over the leading axis of every argument, whatever its length."""

    def mapped(*args: Any) -> Any:
        if len(jax.tree.leaves(args)[0]) > 1:
            return jax.vmap(function)(*args)
        one = function(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], one)

    return mapped


def mean_of_pairs(x: jax.Array) -> jax.Array:
    """Mean over the leading axis, halves added to each other until one entry is left.

    The order of additions is part of the program, so that the last bit is the same however many
    of these are mapped: XLA sums a vector in another order than the rows of a matrix.
    """
    total = x
    while len(total) > 1:
        half = len(total) // 2
        total = jnp.concatenate([total[:half] + total[half : 2 * half], total[2 * half :]])
    return total[0] / len(x)


def map_in_batches(function: Callable[[Any], Any], xs: Any, batch_size: int) -> Any:
    """`jax.lax.map` over the leading axis of `xs`, `batch_size` entries at once."""
    return jax.lax.map(function, xs, batch_size=batch_size if batch_size > 1 else None)
