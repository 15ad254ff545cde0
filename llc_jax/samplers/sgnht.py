"""Underdamped Langevin dynamics with a thermostat that absorbs minibatch noise."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax.samplers.baoab import advance, at_rest, critical, critical_relaxation, kick, ou_step
from llc_jax.samplers.base import POSITIVE, Range
from llc_jax.trees import apply_mask, standard_normal_like, vdot, widest
from llc_jax.types import Evaluation, Params


class SGNHTState(NamedTuple):
    """What the next step needs.

    Attributes:
      params: the position w_t.
      momentum: p before the kick at w_t, like params, at least float32.
      thermostat: ζ, the friction that acts, scalar of the widest dtype of params.
    """

    params: Params
    momentum: Params
    thermostat: jax.Array


class SGNHT(NamedTuple):
    """`BAOAB` whose friction ζ adapts until the mean of p² over the coordinates is 1.

    The momentum is driven by noise of strength `friction` and damped by ζ, which grows while
    the momenta are too hot and shrinks while they are too cold:
    `dp = -drift dt - ζ p dt + sqrt(2 friction) dW`, `dζ = (mean(p²) - 1) dt`. White gradient noise
    of whatever strength, if the same in all coordinates, ends in ζ and not in the positions; what
    differs between coordinates stays as heat in the noisier ones. Splitting BADODAB: on quadratics
    no step bias but what the fluctuation of ζ leaves, of order 1/d.

    Stable for step_size Λ < 4. In a few dimensions ζ swings widely; meant for many.

    Attributes:
      step_size: h² > 0, in squared units of the parameters.
      friction: A > 0, strength of the noise put in; ζ starts there, and ends there without
        gradient noise.

    Source: Ding et al. 2014 (NeurIPS 27), algorithm 2; splitting: Leimkuhler & Shang 2016 (SIAM
    J. Sci. Comput. 38, A712), section 3.
    """

    step_size: float | jax.Array
    friction: float | jax.Array

    def init(self, params: Params) -> SGNHTState:
        """Starts a chain at `params`, at rest, with the thermostat at `friction`."""
        return SGNHTState(params, at_rest(params), jnp.asarray(self.friction, widest(params)))

    def step(
        self,
        rng_key: jax.Array,
        state: SGNHTState,
        evaluate: Callable[[Params], Evaluation],
        mask: Params | None = None,
    ) -> tuple[SGNHTState, Evaluation]:
        """One step; consumes `rng_key`; returns the evaluation at the point before the step."""
        here = evaluate(state.params)
        dtype = state.thermostat.dtype
        h = jnp.sqrt(jnp.asarray(self.step_size, dtype))
        friction = jnp.asarray(self.friction, dtype)
        xi = apply_mask(mask, standard_normal_like(rng_key, here.drift))
        size = num_coordinates(state.momentum, mask).astype(dtype)

        def kinetic_excess(momentum):
            """By how much the mean of p² is above 1."""
            return vdot(momentum, momentum) / size - 1

        kicked = kick(state.momentum, here.drift, h)
        middle = state.thermostat + h / 2 * kinetic_excess(kicked)
        decay = jnp.exp(-middle * h)
        # (1 - exp(-2 ζ h)) / (2 ζ), which is h at ζ = 0 and positive for negative ζ as well.
        safe = jnp.where(jnp.abs(middle * h) < 1e-4, 1.0, middle)
        spread = jnp.where(safe == middle, -jnp.expm1(-2 * safe * h) / (2 * safe), h)
        noise = jnp.sqrt(2 * friction * spread)
        momentum, displacement = ou_step(kicked, xi, decay, noise, h)
        thermostat = middle + h / 2 * kinetic_excess(momentum)
        return SGNHTState(advance(state.params, displacement), momentum, thermostat), here

    def ranges(self) -> dict[str, Range]:
        """See `llc_jax.samplers.base.ranges`."""
        return {"friction": POSITIVE}

    def with_step_size(self, step_size: Any, localization: Any) -> Self:
        """Sets the friction, too: critical for directions without curvature."""
        return critical(self, step_size, localization)

    def relaxation_steps(self, localization: Any) -> np.ndarray:
        """τ = 1 / sqrt(ε γ), at the friction of `with_step_size`."""
        return critical_relaxation(self.step_size, localization)

    def stationary_variance(self, curvature: Any) -> Any:
        """1/Λ but for a share of order 1/d."""
        return 1 / curvature


def num_coordinates(tree: Params, mask: Params | None) -> jax.Array:
    """How many coordinates are sampled: all, or those with mask 1; float32 scalar."""
    if mask is None:
        return jnp.float32(sum(leaf.size for leaf in jax.tree.leaves(tree)))
    kept = jax.tree.map(
        lambda leaf, m: jnp.sum(jnp.broadcast_to(jnp.asarray(m, bool), leaf.shape)), tree, mask
    )
    return jnp.float32(sum(jax.tree.leaves(kept)))
