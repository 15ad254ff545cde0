"""`jax.vmap` and `jax.lax.map` that leave out axes of length one.

XLA takes such an axis out of matrix products and then lays out their results in another order: with
it, a chain of the attention-only language model transposed and copied the attention patterns of
every layer, forward and backward, in every step (CPU, jax 0.10.2). An axis of two does no harm.
"""

from collections.abc import Callable
from typing import Any

import jax


def vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.vmap(function)` over the leading axis of every argument, whatever its length."""

    def mapped(*args: Any) -> Any:
        if len(jax.tree.leaves(args)[0]) > 1:
            return jax.vmap(function)(*args)
        one = function(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], one)

    return mapped


def map_in_batches(function: Callable[[Any], Any], xs: Any, batch_size: int) -> Any:
    """`jax.lax.map` over the leading axis of `xs`, `batch_size` entries at once."""
    return jax.lax.map(function, xs, batch_size=batch_size if batch_size > 1 else None)
