"""Weights as arrays: how far apart the numbers of their dtype are, and which are one array."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax.inputs import arrays
from llc_jax.types import Params

# Of the variance of steps by rounding; above it, steps of half a spacing are mostly undone, and the
# variance of a chain on the numbers of a dtype is no longer 1 + heating times the exact one.
MAX_HEATING = 1 / 3


def weight_heating(
    params: Params, step_variance: float | None, localization: float, mask: Params | None
) -> float:
    """The share of a step's variance that rounding of the weights adds, in the worst leaf.

    Numbers `s` apart are rounded by s²/12 in the mean square in every step. Where the step is not
    known beforehand, the width of the posterior, at most 1/sqrt(localization), stands in its place.

    Args:
      params: w*.
      step_variance: of the noise of a step, None if it is not known.
      localization: γ.
      mask: None, or 0/1 like params.

    Raises:
      ValueError: where that is more than `MAX_HEATING`.
    """
    variances = []
    if step_variance is not None:
        variances.append((float(step_variance), "steps of sqrt(step_size)"))
    if localization > 0:
        variances.append((1 / float(localization), "a posterior of width 1/sqrt(localization)"))
    worst = 0.0
    kept = [True] * len(jax.tree.leaves(params)) if mask is None else jax.tree.leaves(mask)
    for (path, leaf), sampled in zip(
        jax.tree_util.tree_leaves_with_path(params), kept, strict=True
    ):
        dtype = jnp.result_type(leaf)
        eps = float(jnp.finfo(dtype).eps)
        values = np.abs(np.asarray(leaf).astype(np.float32 if eps > 1e-10 else np.float64))
        values = values[np.broadcast_to(sampled, values.shape)]
        largest = values.max(initial=0.0)
        for variance, what in variances:
            if not variance > 0 or (eps * largest) ** 2 / 12 < 1e-4 * variance:
                continue
            spacing = np.ldexp(eps, np.frexp(values)[1].astype(int) - 1) * (values > 0)
            squared = float(np.mean(np.square(spacing)))
            worst = max(worst, squared / 12 / variance)
            if squared / 12 > MAX_HEATING * variance:
                raise ValueError(
                    f"params{arrays.short(jax.tree_util.keystr(path))} has dtype {dtype} and values"
                    f" near {float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))):.2g},"
                    f" which are {math.sqrt(squared):.2g} apart: {what} = {variance**0.5:.2g} would"
                    f" be rounded away; {_wider(dtype)}."
                )
    return worst


def _wider(dtype: Any) -> str:
    if jnp.finfo(dtype).bits < 32:
        return "cast the weights to float32"
    return "rescale the weights, or use float64 ones with jax_enable_x64"


def shared_arrays(params: Params) -> tuple[str, ...]:
    """Pairs of leaves that are one array in two places, as tied weights are; constants may be."""
    first: dict[int, str] = {}
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = arrays.short(jax.tree_util.keystr(path), 60)
        if id(leaf) in first:
            values = np.asarray(leaf)
            if values.size > 1 and np.any(values != values.flat[0]):
                found.append(f"params{first[id(leaf)]} and params{name}")
        elif isinstance(leaf, jax.Array | np.ndarray):
            first[id(leaf)] = name
    return tuple(found)
