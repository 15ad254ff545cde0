"""Underdamped Langevin dynamics in the BAOAB splitting (SGHMC family)."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax.samplers.base import POSITIVE, Range
from llc_jax.trees import apply_mask, at_least_float32, standard_normal_like, widest
from llc_jax.types import Evaluation, Params


class BAOABState(NamedTuple):
    """What the next step needs.

    Attributes:
      params: the position w_t.
      momentum: p before the kick at w_t, like params, at least float32.
    """

    params: Params
    momentum: Params


class BAOAB(NamedTuple):
    """`p -= h drift(w)`; `w += (h/2) p`; `p <- c p + sqrt(1 - c²) ξ`; `w += (h/2) p`.

    With `h = sqrt(step_size)` and `c = exp(-friction h)`: unit mass, one gradient per step (the
    two half kicks of neighbouring steps fall on the same point and are one). Position has the
    units of `SGLD`: at infinite friction the drift per step is SGLD's (the method of Leimkuhler &
    Matthews), and the stability limit is the same, step_size Λ < 4.

    On quadratics the positions have variance 1/Λ exactly, at every step size and friction: no
    step bias, where SGLD has step_size Λ/4. Directions of curvature Λ forget their start within
    about max(friction/Λ, 1/friction) / h steps, so with friction near 2 sqrt(Λ) of the flattest
    direction that counts (2 sqrt(localization) at the least), the chain needs of the order of
    sqrt(Λ_max/Λ) steps where SGLD needs Λ_max/Λ. Minibatch noise of gradient variance s heats
    it: the variance is higher by the factor
    1 + (ε nbeta² s / 4) coth(friction h / 2) / (1 - ε Λ/4) with ε = step_size, exactly, which is
    about 1 + nbeta² s h / (2 friction) for small steps.

    Attributes:
      step_size: h² > 0, in squared units of the parameters.
      friction: > 0, inverse time of the momentum, in units of 1/h.

    Source: Leimkuhler & Matthews 2013 (J. Chem. Phys. 138, 174102), section II.
    """

    step_size: float | jax.Array
    friction: float | jax.Array

    def init(self, params: Params) -> BAOABState:
        """Starts a chain at `params`, at rest."""
        return BAOABState(params, at_rest(params))

    def step(
        self,
        rng_key: jax.Array,
        state: BAOABState,
        evaluate: Callable[[Params], Evaluation],
        mask: Params | None = None,
    ) -> tuple[BAOABState, Evaluation]:
        """One step; consumes `rng_key`; returns the evaluation at the point before the step."""
        here = evaluate(state.params)
        dtype = widest(here.drift)
        h = jnp.sqrt(jnp.asarray(self.step_size, dtype))
        friction = jnp.asarray(self.friction, dtype)
        decay = jnp.exp(-friction * h)
        noise = jnp.sqrt(-jnp.expm1(-2 * friction * h))
        xi = apply_mask(mask, standard_normal_like(rng_key, here.drift))
        kicked = kick(state.momentum, here.drift, h)
        momentum, displacement = ou_step(kicked, xi, decay, noise, h)
        return BAOABState(advance(state.params, displacement), momentum), here

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
        """1/Λ."""
        return 1 / curvature


def critical(sampler: Any, step_size: Any, localization: Any) -> Any:
    """A sampler with momenta, and the friction 2 sqrt(γ): critical where there is no curvature."""
    return sampler._replace(step_size=step_size, friction=2 * np.sqrt(localization))


def critical_relaxation(step_size: Any, localization: Any) -> np.ndarray:
    """τ = 1 / sqrt(ε γ) of `critical`."""
    return 1 / np.sqrt(np.asarray(step_size, float) * localization)


def at_rest(params: Params) -> Params:
    """Zero momentum, like params but at least float32."""
    return jax.tree.map(lambda w: jnp.zeros_like(at_least_float32(w)), params)


def kick(momentum: Params, drift: Params, h: jax.Array) -> Params:
    """Half kicks of two steps at once: p - h drift, like `drift`."""
    return jax.tree.map(lambda p, d: p - h.astype(d.dtype) * d, momentum, drift)


def ou_step(
    momentum: Params, xi: Params, decay: jax.Array, noise: jax.Array, h: jax.Array
) -> tuple[Params, Params]:
    """An Ornstein-Uhlenbeck step `p <- decay p + noise ξ` between two half moves of w.

    Args:
      momentum: p.
      xi: ξ, like p.
      decay: scalar.
      noise: scalar.
      h: time step, scalar.

    Returns:
      (p after, displacement of w), both like p.
    """

    def after_noise(p, x):
        return decay.astype(p.dtype) * p + noise.astype(p.dtype) * x

    after = jax.tree.map(after_noise, momentum, xi)
    return after, jax.tree.map(lambda p, q: (h / 2).astype(p.dtype) * (p + q), momentum, after)


def advance(params: Params, displacement: Params) -> Params:
    """Adds the displacement to w, in the dtype of w."""
    return jax.tree.map(
        lambda w, x: (at_least_float32(w) + x).astype(w.dtype), params, displacement
    )
