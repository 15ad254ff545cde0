"""Stochastic gradient Langevin dynamics (Welling & Teh 2011), the field's standard sampler."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from llc_jax.posterior import apply_mask, at_least_float32, standard_normal_like
from llc_jax.types import Evaluation, Params


class SGLDState(NamedTuple):
    """What the next step needs.

    Attributes:
      params: the position w_t.
    """

    params: Params


class SGLD(NamedTuple):
    """`w <- w - (step_size/2) drift(w) + sqrt(step_size) ξ`, ξ ~ N(0, 1) per coordinate.

    `drift = nbeta ∇L_B(w) + localization (w - w*)`. This is the convention of the LLC literature;
    blackjax's `sgld` takes half of our step size: its ε is the factor of the whole drift and its
    noise has variance 2ε.

    On a quadratic loss with eigenvalue h and Λ = nbeta h + localization the chain is stable for
    step_size Λ < 4 and its variance is 1 / (Λ (1 - step_size Λ/4)) rather than 1/Λ.

    Attributes:
      step_size: ε > 0, in squared units of the parameters times the drift's temperature.

    Source: Lau et al. 2023 (arXiv 2308.12108), eq. 16, without its factor for n.
    """

    step_size: float | jax.Array

    def init(self, params: Params) -> SGLDState:
        """Starts a chain at `params`."""
        return SGLDState(params)

    def step(
        self,
        rng_key: jax.Array,
        state: SGLDState,
        evaluate: Callable[[Params], Evaluation],
        mask: Params | None = None,
    ) -> tuple[SGLDState, Evaluation]:
        """One step; consumes `rng_key`; returns the evaluation at the point before the step."""
        here = evaluate(state.params)
        noise = apply_mask(mask, standard_normal_like(rng_key, here.drift))

        def move(w, drift, xi):
            step = jnp.asarray(self.step_size, drift.dtype)
            return (at_least_float32(w) - step / 2 * drift + jnp.sqrt(step) * xi).astype(w.dtype)

        return SGLDState(jax.tree.map(move, state.params, here.drift, noise)), here

    def log_acceptance(
        self, energy_change: jax.Array, move: Params, here: Evaluation, there: Evaluation
    ) -> jax.Array:
        """Log of the Metropolis ratio (MALA) of a step, before the cap at 0.

        Args:
          energy_change: U(w') - U(w), with U = nbeta L_B + localization/2 |w - w*|², scalar.
          move: w' - w.
          here: evaluation at w.
          there: evaluation at w', on the same minibatch.

        The proposal densities enter as ½ Δ·(d + d') - (ε/8)(|d'|² - |d|²), which has no
        cancelling terms of the size of the dimension.

        Source: Roberts & Tweedie 1996, eq. 2, with step variance ε.
        """
        step = jnp.asarray(self.step_size, energy_change.dtype)
        vdot = optax.tree.vdot
        symmetric = vdot(move, here.drift) + vdot(move, there.drift)
        curvature = vdot(there.drift, there.drift) - vdot(here.drift, here.drift)
        return -energy_change + symmetric / 2 - step / 8 * curvature
