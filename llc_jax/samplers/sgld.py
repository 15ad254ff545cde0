"""Stochastic gradient Langevin dynamics (Welling & Teh 2011), the field's standard sampler."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from llc_jax.samplers.langevin import langevin_log_acceptance, langevin_step
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
        params = langevin_step(rng_key, state.params, here.drift, self.step_size, mask)
        return SGLDState(params), here

    def log_acceptance(self, move: Params, here: Evaluation, there: Evaluation) -> jax.Array:
        """Log Metropolis ratio (MALA) of a step; see `langevin_log_acceptance`."""
        return langevin_log_acceptance(self.step_size, move, here, there)

    def stationary_variance(self, curvature):
        """1 / (Λ (1 - ε Λ/4))."""
        return 1 / (curvature * (1 - self.step_size * curvature / 4))
