"""Tied weights: one array that stands in several places of a tree of weights."""

import dataclasses
from typing import Any

import jax
import numpy as np

from llc_jax.inputs import arrays
from llc_jax.types import Batch, LossFn, Params


@dataclasses.dataclass(frozen=True)
class TiedLoss:
    """A loss whose weights are given once; made by `tie`.

    Attributes:
      loss_fn: the loss of the whole tree.
      sources: for each leaf of it, the number of the leaf that it is a copy of.
    """

    loss_fn: LossFn
    sources: tuple[int, ...]

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        """Returns the losses of the examples in `batch`, shape [batch]."""
        return self.loss_fn(self.whole(params), batch)

    def whole(self, params: Params) -> Params:
        """Returns the tree with the copies in their places."""
        leaves, structure = jax.tree.flatten(params, is_leaf=lambda x: x is None)
        return jax.tree.unflatten(structure, [leaves[source] for source in self.sources])


def tie(loss_fn: LossFn, params: Params) -> tuple[TiedLoss, Params]:
    """Makes one weight of each array that stands in several places of `params`.

    Sampled as it is, such a tree has an independent weight in each place: the λ̂ of another, untied
    model. `loss_fn, params = llc_jax.tie(loss_fn, params)` gives that of the tied one.

    Args:
      loss_fn: `loss_fn(params, batch) -> losses` of the whole tree.
      params: in which tied leaves are the same array object, as in the model (copies are not).

    Returns:
      (loss of the reduced tree, params with None in place of every copy).

    Raises:
      ValueError: if no array stands twice in `params`; for what is no function or no array.
    """
    if not callable(loss_fn):
        raise ValueError(f"loss_fn is a {type(loss_fn).__name__}: give a function.")
    for name, leaf in arrays.flat("params", params):
        arrays.array(name, leaf, weight=True)  # or an error
    leaves, structure = jax.tree.flatten(params, is_leaf=lambda x: x is None)
    first: dict[int, int] = {}
    # Numbers of Python are one object wherever they are equal.
    sources = tuple(
        first.setdefault(id(leaf), number) if isinstance(leaf, np.ndarray | jax.Array) else number
        for number, leaf in enumerate(leaves)
    )
    if sources == tuple(range(len(leaves))):
        raise ValueError(
            "no array stands in two places of params: tied leaves must be the same object. Put it"
            " there yourself, for example params['head'] = params['embed']."
        )
    once: list[Any] = [leaf if sources[i] == i else None for i, leaf in enumerate(leaves)]
    return TiedLoss(loss_fn, sources), jax.tree.unflatten(structure, once)
