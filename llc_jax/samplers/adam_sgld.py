"""SGLD with the preconditioner and the averaged gradient of Adam."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llc_jax.samplers.base import MEMORY, POSITIVE, Range
from llc_jax.samplers.langevin import langevin_step
from llc_jax.samplers.rmsprop_sgld import inverse_root, moving_average, start_square
from llc_jax.trees import widest
from llc_jax.types import Evaluation, Params


class AdamSGLDState(NamedTuple):
    """What the next step needs.

    Attributes:
      params: the position w_t.
      mean: m_t, running mean of the gradient, like params, at least float32.
      square: V_t, running mean of the squared gradient, like params, at least float32.
      num_seen: t, number of gradients in both, scalar of the widest dtype of params.
    """

    params: Params
    mean: Params
    square: Params
    num_seen: jax.Array


class AdamSGLD(NamedTuple):
    """`w <- w - (ε/2) G (nbeta m + localization (w - w*)) + sqrt(ε G) ξ`.

    m is the bias-corrected running mean of the minibatch gradient, `G = 1 / (sqrt(V) + epsilon)`
    with V the bias-corrected running mean of its square, which starts at 1.

    The averaged gradient is that of a point about `1 / (1 - momentum)` steps ago, and nothing
    pays for the delay: the law is the posterior only as ε G Λ / (1 - momentum) -> 0, and the
    variance is too large before, by a factor near 1 + ε G Λ / (2 (1 - momentum)). Prefer `BAOAB`
    where momentum is wanted. The stability number counts the delay in; at 4 the variance is three
    times too large, yet the chain is stable up to ε G Λ = 4 (1 + momentum) / (1 - momentum) where
    localization is small.

    Attributes:
      step_size: ε > 0; the step that acts is ε G.
      momentum: β₁ in [0, 1), memory of m.
      decay: β₂ in [0, 1), memory of V.
      epsilon: > 0, added to sqrt(V).

    Source: Hitchcock & Hoogland 2025 (arXiv 2507.21449), appendix D.3, as lambda_hat gives it.
    """

    step_size: float | jax.Array
    momentum: float | jax.Array = 0.9
    decay: float | jax.Array = 0.999
    epsilon: float | jax.Array = 1e-8

    def init(self, params: Params) -> AdamSGLDState:
        """Starts a chain at `params`."""
        mean, square = start_square(params, 0.0), start_square(params, 1.0)
        return AdamSGLDState(params, mean, square, jnp.zeros((), widest(params)))

    def step(
        self,
        rng_key: jax.Array,
        state: AdamSGLDState,
        evaluate: Callable[[Params], Evaluation],
        mask: Params | None = None,
    ) -> tuple[AdamSGLDState, Evaluation]:
        """One step; consumes `rng_key`; returns the evaluation at the point before the step."""
        here = evaluate(state.params)
        mean = moving_average(self.momentum, state.mean, here.grad)
        square = moving_average(self.decay, state.square, jax.tree.map(jnp.square, here.grad))
        state = AdamSGLDState(state.params, mean, square, state.num_seen + 1)
        correction = weight_seen(self.momentum, state.num_seen)

        def average(drift, grad, m):
            # drift = nbeta grad + pull: exchange the gradient and leave the pull.
            return drift + here.nbeta.astype(m.dtype) * (m / correction.astype(m.dtype) - grad)

        drift = jax.tree.map(average, here.drift, here.grad, mean)
        scale = inverse_root(state.square, weight_seen(self.decay, state.num_seen), self.epsilon)
        params = langevin_step(rng_key, state.params, drift, self.step_size, mask, scale)
        return state._replace(params=params), here

    def preconditioner(self, state: AdamSGLDState) -> Params:
        """G / (1 - momentum) after the last step, like params: the delay acts like longer steps."""
        scale = inverse_root(state.square, weight_seen(self.decay, state.num_seen), self.epsilon)
        return jax.tree.map(lambda g: g / (1 - jnp.asarray(self.momentum, g.dtype)), scale)

    def ranges(self) -> dict[str, Range]:
        """See `llc_jax.samplers.base.ranges`."""
        return {"momentum": MEMORY, "decay": MEMORY, "epsilon": POSITIVE}


def weight_seen(memory: float | jax.Array, count: jax.Array) -> jax.Array:
    """`1 - memory^count`: the weight of all that a running mean has seen."""
    return 1 - jnp.asarray(memory, count.dtype) ** count
