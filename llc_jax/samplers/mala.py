"""The Metropolis-adjusted Langevin algorithm: SGLD's step, accepted or refused."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llc_jax.samplers.langevin import langevin_log_acceptance, langevin_step
from llc_jax.trees import displacement
from llc_jax.types import Evaluation, Params


class MALAState(NamedTuple):
    """What the next step needs.

    Attributes:
      params: the position w_t.
      log_acceptance: log Metropolis ratio of the last proposal, float32 scalar; for diagnostics.
    """

    params: Params
    log_acceptance: jax.Array


class MALA(NamedTuple):
    """Proposes the step of `SGLD` and accepts it with probability min(1, ratio).

    Full batch only: with all the data in each evaluation its stationary law is the posterior
    itself, without step bias, which makes it the reference on small problems. (On minibatches the
    ratio is that of the minibatch, and the law is not the posterior.) A step takes two gradients.
    The best acceptance is near 0.57, at a step size that falls as d^(-1/3).

    Attributes:
      step_size: ε > 0, that of `SGLD`.

    Source: Roberts & Tweedie 1996; optimal scaling: Roberts & Rosenthal 1998.
    """

    step_size: float | jax.Array

    def init(self, params: Params) -> MALAState:
        """Starts a chain at `params`."""
        return MALAState(params, jnp.zeros((), jnp.float32))

    def step(
        self,
        rng_key: jax.Array,
        state: MALAState,
        evaluate: Callable[[Params], Evaluation],
        mask: Params | None = None,
    ) -> tuple[MALAState, Evaluation]:
        """One step; consumes `rng_key`; returns the evaluation at the point before the step."""
        noise_key, accept_key = jax.random.split(rng_key)
        here = evaluate(state.params)
        proposal = langevin_step(noise_key, state.params, here.drift, self.step_size, mask)
        there = evaluate(proposal)
        move = displacement(proposal, state.params)
        ratio = langevin_log_acceptance(self.step_size, move, here, there)
        # A proposal without a finite energy has no density: nan compares false and is refused.
        accept = jnp.log(jax.random.uniform(accept_key, (), ratio.dtype)) < ratio
        params = jax.tree.map(lambda new, old: jnp.where(accept, new, old), proposal, state.params)
        ratio = ratio.astype(state.log_acceptance.dtype)
        return MALAState(params, jnp.nan_to_num(ratio, nan=-jnp.inf, neginf=-jnp.inf)), here

    def stationary_variance(self, curvature):
        """1/Λ."""
        return 1 / curvature
