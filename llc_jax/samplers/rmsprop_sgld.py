"""SGLD with the diagonal preconditioner of RMSProp (pSGLD, Li et al. 2016), in both variants."""

from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from llc_jax.samplers.base import MEMORY, POSITIVE, SHARE, Range
from llc_jax.samplers.langevin import langevin_step
from llc_jax.trees import at_least_float32, widest
from llc_jax.types import Evaluation, Params


class RMSPropSGLDState(NamedTuple):
    """What the next step needs.

    Attributes:
      params: the position w_t.
      square: V_t, running mean of the squared gradient, like params, at least float32.
      num_seen: t, number of gradients in `square`, scalar of the widest dtype of params.
    """

    params: Params
    square: Params
    num_seen: jax.Array


class RMSPropSGLD(NamedTuple):
    """`w <- w - (ε/2) G drift(w) + sqrt(ε G) ξ` with `G = 1 / (sqrt(V) + epsilon)`.

    `V <- decay V + (1 - decay) g²` with the minibatch gradient g of the mean loss, neither times
    nbeta nor with the pull to the anchor. V is divided by `1 - decay^t` with bias correction.
    Two variants are in use, so take them by name:

    * `RMSPropSGLD.devinterp(step_size)`: V starts at 0, no bias correction, epsilon 0.1; here
      G <= 10.
    * `RMSPropSGLD.corrected(step_size)`: V starts at 1, bias correction, epsilon 1e-8
      (Hitchcock & Hoogland 2025, arXiv 2507.21449, appendix D.3, as lambda_hat gives it).

    For a fixed G the law on a quadratic is that of `SGLD` with step size ε G: stable for
    ε G Λ < 4, variance 1 / (Λ (1 - ε G Λ/4)). But G adapts: where ε is too large the gradient
    grows, G shrinks, and the chain settles at the edge of stability on a level trace far above
    the right one. The stability number of the estimate, the largest eigenvalue of ε G^½ Λ G^½,
    tells (see `llc_jax.sampling.stability`).

    Smaller steps do not make it right. G moves with w, and the term ∂G/∂w is left out as in both
    originals, so the law is that of a fixed G only if V remembers, 1 / (1 - decay) steps, much
    longer than the chain, 2 / (ε G Λ). As ε -> 0 at a fixed decay it tends to exp(-U) / G: on a
    full-batch quadratic up to twice the value. Measured there in equal directions, at the decay of
    0.99: 6 % above the fixed G with ε G Λ = 0.1 and epsilon 0.1; 30 % and 39 % above the ideal
    value with ε G Λ near 0.01 and epsilon 0.1 and 1e-8. Minibatch noise, which fills V and does not
    move with w, lowers it (3 % instead of 6 %). No diagnostic sees it: compare with `SGLD` or
    `BAOAB`.

    Attributes:
      step_size: ε > 0; the step that acts is ε G.
      decay: α in [0, 1], memory of V; below 1 with bias correction.
      epsilon: > 0, added to sqrt(V).
      initial_square: V_0 >= 0.
      bias_correction: 1 or 0.
    """

    step_size: float | jax.Array
    decay: float | jax.Array = 0.99
    epsilon: float | jax.Array = 0.1
    initial_square: float | jax.Array = 0.0
    bias_correction: float | jax.Array = 0.0

    @classmethod
    def devinterp(cls, step_size: float | jax.Array, decay: float = 0.99, epsilon=0.1) -> Self:
        """V starts at 0 and is not corrected."""
        return cls(step_size, decay, epsilon, 0.0, 0.0)

    @classmethod
    def corrected(cls, step_size: float | jax.Array, decay: float = 0.99, epsilon=1e-8) -> Self:
        """V starts at 1 and is bias-corrected."""
        return cls(step_size, decay, epsilon, 1.0, 1.0)

    def init(self, params: Params) -> RMSPropSGLDState:
        """Starts a chain at `params`."""
        square = start_square(params, self.initial_square)
        return RMSPropSGLDState(params, square, jnp.zeros((), widest(params)))

    def step(
        self,
        rng_key: jax.Array,
        state: RMSPropSGLDState,
        evaluate: Callable[[Params], Evaluation],
        mask: Params | None = None,
    ) -> tuple[RMSPropSGLDState, Evaluation]:
        """One step; consumes `rng_key`; returns the evaluation at the point before the step."""
        here = evaluate(state.params)
        square = moving_average(self.decay, state.square, jax.tree.map(jnp.square, here.grad))
        state = RMSPropSGLDState(state.params, square, state.num_seen + 1)
        scale = self.preconditioner(state)
        params = langevin_step(rng_key, state.params, here.drift, self.step_size, mask, scale)
        return state._replace(params=params), here

    def preconditioner(self, state: RMSPropSGLDState) -> Params:
        """G of the last step, like params."""
        dtype = state.num_seen.dtype
        decay = jnp.asarray(self.decay, dtype)
        correction = 1 - jnp.asarray(self.bias_correction, dtype) * decay**state.num_seen
        return inverse_root(state.square, correction, self.epsilon)

    def ranges(self) -> dict[str, Range]:
        """See `llc_jax.samplers.base.ranges`."""
        memory = MEMORY if self.bias_correction != 0 else SHARE
        return {"decay": memory, "epsilon": POSITIVE, "bias_correction": SHARE}


def start_square(params: Params, value: float | jax.Array) -> Params:
    """V_0: `value` everywhere, like params but at least float32."""
    return jax.tree.map(lambda w: jnp.full_like(at_least_float32(w), value), params)


def moving_average(decay: float | jax.Array, old: Params, new: Params) -> Params:
    """`decay old + (1 - decay) new`."""
    return jax.tree.map(lambda v, x: x + jnp.asarray(decay, v.dtype) * (v - x), old, new)


def inverse_root(square: Params, correction: jax.Array, epsilon: float | jax.Array) -> Params:
    """`1 / (sqrt(square / correction) + epsilon)`."""
    return jax.tree.map(
        lambda v: (
            1 / (jnp.sqrt(v / jnp.asarray(correction, v.dtype)) + jnp.asarray(epsilon, v.dtype))
        ),
        square,
    )
