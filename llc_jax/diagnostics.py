"""Convergence diagnostics of a set of chains, in numbers and in words; host side, float64."""

import math
from typing import NamedTuple

import numpy as np

MIN_DRAWS = 4  # below this neither split R-hat nor the effective sample size is defined
MAX_RHAT = 1.1  # healthy chains with MIN_ESS effective draws come close to it
MIN_ESS = 40.0
MIN_ACCEPTANCE = 0.5
MAX_STABILITY = 2.0  # half of the limit: measured from below, and curvature varies on the way
MAX_DRIFT = 4.0
MAX_DISTANCE_GROWTH = 0.05
MAX_BELOW_ANCHOR = 0.5


class Diagnostics(NamedTuple):
    """What the chains say of themselves, over the finite chains only.

    Attributes:
      stderr: Monte-Carlo standard error of the mean: sqrt(pooled variance / ESS). The pooled
        variance contains the spread between chains, so chains that disagree widen it.
      rhat: split R-hat of the draws.
      ess: effective sample size over all chains.
      drift: mean of the second half of the draws minus that of the first, in standard errors.
      distance_growth: relative growth of the mean squared distance from the first half of the
        draws to the second: how far the flat directions are from equilibrium; 0 where the growth
        is within `MAX_DRIFT` standard errors.
    """

    stderr: float
    rhat: float
    ess: float
    drift: float
    distance_growth: float


def split_rhat(draws: np.ndarray) -> float:
    """Split R-hat of draws[chain, draw]; nan for fewer than four draws.

    Source: Gelman et al., Bayesian Data Analysis, 3rd ed., eq. 11.4 (numpyro's implementation).
    """
    from numpyro.diagnostics import split_gelman_rubin

    if draws.shape[0] < 1 or draws.shape[1] < MIN_DRAWS:
        return math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(split_gelman_rubin(draws))


def effective_sample_size(draws: np.ndarray) -> float:
    """Effective sample size of draws[chain, draw] over all chains; nan below four draws.

    Source: Stan reference manual, "Effective sample size" (numpyro's implementation).
    """
    from numpyro.diagnostics import effective_sample_size as ess

    if draws.shape[0] < 1 or draws.shape[1] < MIN_DRAWS:
        return math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(ess(draws))


def mean_stderr(draws: np.ndarray) -> float:
    """Monte-Carlo standard error of the mean of draws[chain, draw]."""
    ess = effective_sample_size(draws)
    if not ess > 0:
        return math.nan
    length = draws.shape[1]
    within = draws.var(axis=1, ddof=1).mean()
    between = draws.mean(axis=1).var(ddof=1) if draws.shape[0] > 1 else 0.0
    return math.sqrt(((length - 1) / length * within + between) / ess)


def mean_stderrs(draws: np.ndarray, at_once: int = 4096) -> np.ndarray:
    """`mean_stderr` of each of the columns of draws[chain, draw, ...], shape [...]."""
    from numpyro.diagnostics import effective_sample_size as ess

    chains, length, *shape = draws.shape
    columns = draws.reshape(chains, length, -1)
    found = np.full(columns.shape[2], np.nan)
    if chains < 1 or length < MIN_DRAWS:
        return found.reshape(shape)
    for first in range(0, columns.shape[2], at_once):
        some = columns[:, :, first : first + at_once].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            within = some.var(axis=1, ddof=1).mean(axis=0)
            between = some.mean(axis=1).var(axis=0, ddof=1) if chains > 1 else 0.0
            size = np.asarray(ess(some))
            variance = ((length - 1) / length * within + between) / size
            found[first : first + at_once] = np.where(size > 0, np.sqrt(variance), np.nan)
    return found.reshape(shape)


def shift_in_stderrs(early: np.ndarray, late: np.ndarray) -> float:
    """Mean of late[chain, draw] minus that of early, in units of their joint standard error."""
    spread = math.hypot(mean_stderr(early), mean_stderr(late))
    return float(late.mean() - early.mean()) / spread if spread > 0 else math.nan


def diagnose(gaps: np.ndarray, distance: np.ndarray) -> Diagnostics:
    """Diagnoses finite chains.

    Args:
      gaps: [chain, draw] the quantity averaged: nbeta (L_B(w) - L_B(w*)), without burn-in.
      distance: [chain, draw] |w - w*|.

    Returns:
      `Diagnostics`; nan where there are too few draws or no chain.
    """
    if gaps.size == 0:
        return Diagnostics(*[math.nan] * 5)
    half = gaps.shape[1] // 2
    drift = growth = math.nan
    if half >= MIN_DRAWS:
        drift = shift_in_stderrs(gaps[:, :half], gaps[:, -half:])
        early, late = np.square(distance[:, :half]), np.square(distance[:, -half:])
        significant = shift_in_stderrs(early, late) > MAX_DRIFT
        growth = float(late.mean() / early.mean() - 1) if significant else 0.0
    return Diagnostics(
        stderr=mean_stderr(gaps),
        rhat=split_rhat(gaps),
        ess=effective_sample_size(gaps),
        drift=drift,
        distance_growth=growth,
    )


def findings(
    *,
    mean: float,
    stderr: float,
    num_chains: int,
    diverged_at: np.ndarray,
    below_anchor: float,
    acceptance: float,
    stability: float,
    diagnostics: Diagnostics,
    explained: bool = False,
) -> list[tuple[str, str]]:
    """Says what is wrong with an estimate and what to do about it.

    Args:
      mean: the estimate.
      stderr: its standard error.
      num_chains: chains run.
      diverged_at: [chain] draw (burn-in counted) of the first non-finite value, -1 for none.
      below_anchor: share of draws with a loss below that of the anchor on the same minibatch.
      acceptance: mean Metropolis acceptance of the steps, nan if not measured.
      stability: largest stability number of the chains, nan if not measured.
      diagnostics: those of the finite chains.
      explained: whether another finding says why chains diverged.

    Returns:
      Pairs (label of a few words, sentence with numbers and remedy); empty if all is well.
    """
    found = []
    dead = np.flatnonzero(diverged_at >= 0)
    if dead.size == num_chains and explained:
        return found
    if dead.size:
        where = ", ".join(f"chain {c} at draw {diverged_at[c]}" for c in dead[:8])
        more = f" and {dead.size - 8} more" if dead.size > 8 else ""
        alive = num_chains - dead.size
        rest = f"the mean is over the {alive} finite chains" if alive else "there is no estimate"
        what, remedy = ("stopped", "") if explained else ("diverged", " Lower step_size.")
        found.append((
            f"{dead.size} of {num_chains} chains {what}",
            f"Non-finite values in {where}{more}; {rest}.{remedy}",
        ))  # fmt: skip
    if dead.size == num_chains:
        return found
    d = diagnostics
    if mean < -2 * stderr or (mean < 0 and below_anchor > MAX_BELOW_ANCHOR):
        found.append((
            "not a minimum",
            f"The estimate {mean:.3g} is negative: {below_anchor:.0%} of the draws have a lower"
            " loss than the anchor, so the anchor is no local minimum at this temperature (a"
            " saddle or a point still descending). The value is reported as it is.",
        ))  # fmt: skip
    if d.rhat > MAX_RHAT:
        found.append((
            "chains disagree",
            f"Split R-hat {d.rhat:.3f} is above {MAX_RHAT}: run longer burn-in or more draws.",
        ))  # fmt: skip
    if abs(d.drift) > MAX_DRIFT:
        found.append((
            "still drifting",
            f"The second half of the draws differs from the first by {d.drift:+.1f} standard"
            " errors: lengthen the burn-in.",
        ))  # fmt: skip
    if d.distance_growth > MAX_DISTANCE_GROWTH:
        found.append((
            "still spreading",
            f"The squared distance from the anchor grew by {d.distance_growth:.0%} from the first"
            " half of the draws to the second: flat directions have not reached equilibrium;"
            " lengthen the burn-in or raise localization.",
        ))  # fmt: skip
    if not d.ess >= MIN_ESS:  # nan as well: too few draws to tell
        found.append((
            "few effective draws",
            f"Effective sample size {d.ess:.0f} is below {MIN_ESS:.0f}: the error bar itself is"
            " uncertain; take more draws or chains.",
        ))  # fmt: skip
    if stability > MAX_STABILITY:
        found.append((
            "near instability",
            f"The stability number, the largest eigenvalue of step_size G (nbeta H + localization)"
            f" at the end of the chains, is {stability:.2g}, above {MAX_STABILITY:g}; the limit is"
            f" 4. A preconditioner can hold a chain at this edge with a level trace and a wrong"
            f" value; lower step_size by a factor {stability / 0.4:.2g}.",
        ))  # fmt: skip
    if acceptance < MIN_ACCEPTANCE:
        found.append((
            "step too large",
            f"A Metropolis test would accept {acceptance:.0%} of the steps, below"
            f" {MIN_ACCEPTANCE:.0%}: the discretization biases the estimate; lower step_size.",
        ))  # fmt: skip
    return found
