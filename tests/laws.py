"""Exact laws of the samplers on diagonal quadratics, written without the library, float64.

On L(w) = ½ Σ h w² every sampler with a fixed preconditioner is a linear recursion
`z <- A z + noise` for each coordinate, z its position and what else it remembers. Its stationary
covariance solves the discrete Lyapunov equation S = A S Aᵀ + Q, whatever the step size.

Symbols: step_size ε, `preconditioner` G, Λ = nbeta h + localization, and `heat` the variance
that minibatches add to nbeta times the gradient.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.linalg import solve_discrete_lyapunov
from scipy.optimize import brentq


class Linear(NamedTuple):
    """`z <- transition z + noise` with covariance `noise`; z[0] is the position."""

    transition: np.ndarray
    noise: np.ndarray

    def variance(self) -> float:
        """Stationary variance of the position."""
        assert np.max(np.abs(np.linalg.eigvals(self.transition))) < 1
        return float(solve_discrete_lyapunov(self.transition, self.noise)[0, 0])

    def mean_square(self, burnin: int, draws: int, thinning: int = 1) -> float:
        """Mean of E x² over the draws after burn-in, from z = 0 at the first step."""
        stationary = solve_discrete_lyapunov(self.transition, self.noise)
        power = np.linalg.matrix_power(self.transition, thinning)
        # A draw is the state before the last of its `thinning` steps.
        missing = np.linalg.matrix_power(self.transition, thinning - 1)
        total = 0.0
        for draw in range(burnin + draws):
            if draw >= burnin:
                total += stationary[0, 0] - (missing @ stationary @ missing.T)[0, 0]
            missing = power @ missing
        return total / draws


def sgld(step_size, stiffness, heat=0.0, preconditioner=1.0) -> Linear:
    """`x <- x - (εG/2) (Λ x + η) + sqrt(εG) ξ`."""
    step = step_size * preconditioner
    return Linear(np.array([[1 - step / 2 * stiffness]]), np.array([[step + step**2 / 4 * heat]]))


def adam(step_size, h, nbeta, localization, momentum, heat=0.0, preconditioner=1.0) -> Linear:
    """`m <- β m + (1 - β)(h x + η); x <- x - (εG/2) (nbeta m + γ x) + sqrt(εG) ξ`, z = (x, m)."""
    step, keep = step_size * preconditioner, 1 - momentum
    transition = np.array([
        [1 - step / 2 * (nbeta * keep * h + localization), -step / 2 * nbeta * momentum],
        [keep * h, momentum],
    ])  # fmt: skip
    kick = np.array([-step / 2 * nbeta * keep, keep])
    return Linear(transition, np.diag([step, 0.0]) + heat / nbeta**2 * np.outer(kick, kick))


def baoab(step_size, friction, stiffness, heat=0.0, temperature=1.0) -> Linear:
    """Kick by h (Λ x + η), half move, `p <- c p + sqrt(1 - c²) ξ`, half move; z = (x, p)."""
    h = math.sqrt(step_size)
    c = math.exp(-friction * h)
    transition = np.array([
        [1 - step_size / 2 * (1 + c) * stiffness, h / 2 * (1 + c)],
        [-c * h * stiffness, c],
    ])  # fmt: skip
    stirred = math.sqrt(temperature * (1 - c**2)) * np.array([h / 2, 1.0])
    kick = -h * np.array([h / 2 * (1 + c), c])
    return Linear(transition, np.outer(stirred, stirred) + heat * np.outer(kick, kick))


def rmsprop_slow_memory(step_size, epsilon, h, nbeta, localization, heat=0.0) -> float:
    """E x² as decay -> 1: G = 1 / (sqrt(V) + epsilon) with V = E g², which E x² in turn sets."""
    stiffness = nbeta * h + localization

    def square(scale):
        return sgld(step_size, stiffness, heat, scale).variance()

    def excess(log_scale):
        scale = math.exp(log_scale)
        average = h**2 * square(scale) + heat / nbeta**2
        return scale * (math.sqrt(average) + epsilon) - 1

    highest = math.log(4 / (step_size * stiffness)) - 1e-9  # the limit of stability
    return square(math.exp(brentq(excess, -20.0, min(highest, 20.0))))


def assert_within_4_stderr(value, exact, stderr):
    """No tolerance is chosen by hand."""
    z = (value - exact) / stderr
    assert abs(z) < 4, f"{value:.6g} is {z:+.1f} standard errors ({stderr:.2g}) from {exact:.6g}"


def assert_chains_agree(per_chain, exact, most=0.01, size=None):
    """Independent chains: their spread is a standard error that nothing can fool.

    Args:
      per_chain: [chain] one value per chain.
      exact: what their mean must be.
      most: largest standard error, relative to `size`, at which the test says anything.
      size: default `exact`; something larger where it is a sum of terms that cancel.
    """
    per_chain = np.asarray(per_chain, np.float64)
    stderr = per_chain.std(ddof=1) / math.sqrt(len(per_chain))
    assert stderr < most * abs(exact if size is None else size)
    assert_within_4_stderr(per_chain.mean(), exact, stderr)
