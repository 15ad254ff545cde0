"""What chains tell of the walls around them beyond the curvature where they end."""

import math
from typing import Any

import numpy as np


def any_dead(estimates: Any) -> np.ndarray:
    """Whether a chain of each estimate diverged."""
    return np.asarray([bool((e.diverged_at >= 0).any()) for e in estimates])


def spread(*curvatures: Any) -> float:
    """The largest of these, arrays of Λ or multiples of it, over the smallest; nan left out."""
    found = np.concatenate([np.ravel(np.asarray(x, float)) for x in curvatures])
    smallest = np.fmin.reduce(found)
    return float(np.fmax.reduce(found) / smallest) if smallest > 0 else math.inf


def curvature_by_gradients(estimates: Any, nbetas: np.ndarray, num_weights: int) -> np.ndarray:
    """Mean curvature of each posterior by the gradients that its chains met last.

    E|nβ ∇L|² is the trace of nβ H over the posterior (integration by parts), and kinks, as that of
    |w|, have no other curvature.

    Args:
      estimates: [K] with a gradient for each chain.
      nbetas: [K].
      num_weights: d.

    Returns:
      [K] E|nβ ∇L|² / d; 0 where it is not finite.
    """
    last = np.asarray([e.sound.gradient[:, -1] for e in estimates], float)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = np.square(nbetas) * np.mean(np.square(last), axis=1) / num_weights
    return np.where(np.isfinite(mean), mean, 0.0)
