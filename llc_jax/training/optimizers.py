"""The optimizers of Hoogland et al. 2024 (arXiv 2402.02364), one object for the same numbers."""

import functools

import jax.numpy as jnp
import optax

from llc_jax.inputs import checks


@functools.cache  # the same numbers give the same object, which `jit` needs to recognise it
def one_cycle(peak: float, num_steps: int) -> optax.Schedule:
    """Learning rate that rises linearly to `peak` and falls linearly to about 0.

    With h = num_steps / 2 - 1, the update numbered s (from 0) uses
    peak / h at s = 0, `peak` at s = h, and peak / h^2 at s = num_steps - 1.
    At the paper's peak 0.003 and 500,000 steps the first half is 1.2e-8 (s + 1)
    (arXiv 2402.02364; PyTorch's OneCycleLR with pct_start 0.5 and both factors equal to h).

    Args:
      peak: largest learning rate.
      num_steps: updates in the whole run, at least 4.

    Returns:
      A function of the update number; after the last update it stays at its final value.
    """
    checks.at_least("num_steps", num_steps, 4, "the learning rate needs room to rise and fall")
    if not 0 < peak < float("inf"):
        raise ValueError(f"peak={peak} must be a positive, finite learning rate.")
    half = num_steps / 2 - 1
    start, end = peak / half, peak / half**2

    def schedule(count):
        step = jnp.asarray(count).astype(jnp.float32)
        rise = start + (peak - start) * (step / half)
        fall = end + (peak - end) * ((num_steps - 1 - step) / (num_steps - 1 - half))
        return jnp.maximum(jnp.where(step <= half, rise, fall), end)

    return schedule


@functools.cache
def adam_one_cycle(peak: float, num_steps: int) -> optax.GradientTransformation:
    """Adam(0.9, 0.999, 1e-8) with the `one_cycle` rate: the optimizer of the paper.

    Cached: optax optimizers are closures, equal only to themselves, and `fit` compiles once per
    optimizer. Asking again with the same numbers returns the same object.
    """
    return optax.adam(one_cycle(peak, num_steps), b1=0.9, b2=0.999, eps=1e-8)


@functools.cache
def adamw(
    learning_rate: float, weight_decay: float = 0.05, num_warmup: int = 0
) -> optax.GradientTransformation:
    """AdamW(0.9, 0.999, 1e-8) at a constant rate, decay of all weights: the paper's language model.

    Cached like `adam_one_cycle`.

    Args:
      learning_rate: 1e-3 in arXiv 2402.02364.
      weight_decay: decoupled, per unit of learning rate.
      num_warmup: updates over which the rate rises linearly from learning_rate / num_warmup.
    """
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate={learning_rate} must be positive and finite.")
    checks.nonnegative("weight_decay", weight_decay)
    checks.at_least("num_warmup", num_warmup, 0)

    def rate(count):
        step = jnp.asarray(count).astype(jnp.float32)
        return learning_rate * jnp.minimum(1.0, (step + 1) / num_warmup)

    return optax.adamw(
        rate if num_warmup else learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay
    )
