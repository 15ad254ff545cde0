"""A grid of settings and what it says: which cuts off the least, and how far to trust it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from llc_jax.diagnostics import mean_stderr
from llc_jax.llc import soundness
from llc_jax.llc.estimate import LLCEstimate

LEVEL = 0.05  # relative change of λ̂ per e-fold of nbeta or localization that counts as level
STEP_FRACTION = 0.4  # of Λ: a tenth of the stability limit, a bias of at most a tenth for SGLD
RELAXATIONS = 3.0  # burn-in in relaxation times of the flattest direction: e^-3 of it is left
# What the proposed draws, more than those of a grid, are there to cure.
CURABLE = {"few effective draws", "chains disagree"}
HOT = 0.9  # share of the free rise of the loss above which nbeta hardly restrains the chains


class SampledGrid(NamedTuple):
    """Estimates on a grid of E step sizes, B values of nbeta and G of localization.

    Attributes:
      step_fractions: [E] f = ε Λ, increasing.
      nbetas: [B], increasing.
      localizations: [G], increasing.
      step_sizes: [E, B, G] ε.
      stiffness: [B, G] Λ along pilot chains, or what rehearsals demanded.
      relaxations: [E, B, G] length of the burn-in in relaxation times of flat directions, with
        steps to suit that Λ.
      estimates: [E, B, G] `LLCEstimate`.
      control: [G] `LLCEstimate` at nbeta = 0: chains that feel the localization only.
      control_variances: [G] of a weight there, exactly.
    """

    step_fractions: np.ndarray
    nbetas: np.ndarray
    localizations: np.ndarray
    step_sizes: np.ndarray
    stiffness: np.ndarray
    relaxations: np.ndarray
    estimates: np.ndarray
    control: np.ndarray
    control_variances: np.ndarray

    def values(self, name: str) -> np.ndarray:
        """[E, B, G] a number of each estimate, e.g. `mean`, `stderr`, `rhat`."""
        return self.each(lambda e: float(getattr(e, name)))

    def each(self, function: Callable[[LLCEstimate], Any]) -> np.ndarray:
        """[E, B, G] a function of each estimate."""
        flat = [function(e) for e in self.estimates.ravel()]
        return np.asarray(flat).reshape(self.estimates.shape)


class Sensitivity(NamedTuple):
    """How the estimate depends on the choice, at the proposed step fraction.

    Attributes:
      nbeta: [B, G] d log λ̂ / d log nbeta; nan if there is one nbeta only, or beside an estimate
        that is not finite.
      localization: [B, G] d log λ̂ / d log localization; likewise.
      steady: [2, B, G] whether each is within `LEVEL`, give or take two standard errors, where
        these are small enough to tell; true if there is one value only.
      level: [B, G] whether both are, at a healthy setting.
      healthy: [B, G] whether the burn-in was long enough for the localization and the chains
        neither diverged, drifted nor spread; not whether there were draws enough.
    """

    nbeta: np.ndarray
    localization: np.ndarray
    steady: np.ndarray
    level: np.ndarray
    healthy: np.ndarray


def unsound(estimate: LLCEstimate) -> list[tuple[str, str]]:
    """The findings about loss, gradient, data and weights: no setting cures them."""
    return soundness.findings(estimate.sound, estimate.mean, estimate.stderr)


def faults(estimate: LLCEstimate) -> int:
    """How much is wrong that more draws do not cure but other settings may.

    A negative value is no fault of the chains.
    """
    harmless = CURABLE | {"not a minimum"} | {label for label, _ in unsound(estimate)}
    return sum(label not in harmless for label, _ in estimate.findings)


def chosen_row(step_fractions: np.ndarray) -> int:
    """Index of the step fraction that is proposed: the nearest to `STEP_FRACTION`."""
    return int(np.argmin(np.abs(np.log(np.asarray(step_fractions) / STEP_FRACTION))))


def sensitivity(grid: SampledGrid, row: int) -> Sensitivity:
    """Logarithmic derivatives of λ̂ over the grid at one step fraction.

    Args:
      grid: the grid.
      row: index of the step fraction.
    """
    mean, stderr = grid.values("mean")[row], grid.values("stderr")[row]
    slopes, steady = np.full((2, *mean.shape), np.nan), np.full((2, *mean.shape), True)
    for axis, values in enumerate((grid.nbetas, grid.localizations)):
        if values.size == 1:
            continue
        with np.errstate(invalid="ignore", divide="ignore"):
            slopes[axis] = np.gradient(mean, np.log(values), axis=axis) / np.abs(mean)
            # Neighbours two apart in the middle, one at the ends: the ends are the noisier ones.
            noise = math.sqrt(2) * stderr / np.abs(mean) / np.log(values[1] / values[0])
            steady[axis] = (np.abs(slopes[axis]) <= LEVEL + 2 * noise) & (noise <= LEVEL)
    healthy = (grid.each(faults)[row] == 0) & (grid.relaxations[row] >= RELAXATIONS)
    return Sensitivity(*slopes, steady, steady.all(axis=0) & np.isfinite(mean) & healthy, healthy)


def plateau(grid: SampledGrid) -> tuple[tuple[int, int, int], Sensitivity, list[str]]:
    """Chooses the cell that cuts off the least among those whose chains reached their law.

    At the step fraction of `chosen_row`, the weakest healthy localization of an nbeta: among the
    nbetas, one where that is level if there is any, and then the nearest to the middle of the
    grid. Not the weakest *level* localization: a stronger one can be level because it has cut off
    all degenerate directions, and then the value there is that of the curvature at the anchor
    alone. If no cell is healthy, the one with the fewest findings and the smallest sum of both
    sensitivities.

    Returns:
      (index [E, B, G] of the cell, `Sensitivity`, warnings in words).

    Raises:
      ValueError: if every chain of the grid diverged.
    """
    row = chosen_row(grid.step_fractions)
    found = sensitivity(grid, row)
    if not np.isfinite(grid.values("mean")[row]).any():
        if grid.each(lambda e: e.diverged_at.max())[row].max() <= 1:  # before any step counted
            raise ValueError(
                "every chain was dead from its first step on: the loss or its gradient is not"
                " finite right beside the anchor. Use another checkpoint, or make the loss"
                " differentiable there (a root or a norm of 0, a division behind jnp.where)."
            )
        raise ValueError(
            "every chain at the proposed step fraction diverged: give smaller step_fractions, or a"
            " larger localization."
        )
    usable = found.healthy & np.isfinite(grid.values("mean")[row])
    if usable.any():
        candidates = np.flatnonzero(usable.any(axis=1))
        weakest = usable.argmax(axis=1)[candidates]
        from_middle = np.abs(candidates - (grid.nbetas.size - 1) / 2)
        best = np.lexsort((from_middle, ~found.level[candidates, weakest]))[0]
        cell = candidates[best], weakest[best]
    else:
        tried = np.array([grid.nbetas.size, grid.localizations.size]) > 1
        slopes = np.abs([found.nbeta, found.localization])[tried]
        slopes = np.where(np.isnan(slopes), np.inf, slopes).sum(axis=0)
        wrong = grid.each(faults)[row] + (grid.relaxations[row] < RELAXATIONS)
        dead = ~np.isfinite(grid.values("mean")[row])
        slopes = np.broadcast_to(slopes, dead.shape)
        order = np.lexsort((slopes.ravel(), wrong.ravel(), dead.ravel()))
        cell = np.unravel_index(order[0], dead.shape)
    chosen = (row, int(cell[0]), int(cell[1]))
    return chosen, found, _warnings(grid, chosen, found)


def _warnings(grid: SampledGrid, chosen: tuple[int, int, int], found: Sensitivity) -> list[str]:
    best, cell = grid.estimates[chosen], chosen[1:]
    said = [sentence for _, sentence in unsound(best)]
    if not found.healthy[cell]:
        said.append(
            f"No setting passed all checks; the proposed one: {best.verdict}, after a burn-in of"
            f" {grid.relaxations[chosen]:.1f} relaxation times."
        )
    for axis, (name, values) in enumerate(
        (("nbeta", grid.nbetas), ("localization", grid.localizations))
    ):
        if values.size == 1:
            said.append(f"Only one {name} was tried: how far it decides the answer is open.")
        elif not found.steady[axis][cell]:
            said.append(
                f"The answer depends on {name}, or too few draws were taken to tell: λ̂ changes by"
                f" {found[axis][cell]:+.0%} for each e-fold of it at the proposed setting, where it"
                f" is {best.mean:.3g} ± {best.stderr:.2g}. Compare values at equal settings only."
            )
    late = grid.estimates[chosen[0]]
    drifting = [
        f"nbeta {grid.nbetas[b]:.3g}, localization {grid.localizations[g]:.3g}"
        for b, g in np.ndindex(late.shape)
        if {"still drifting", "still spreading"} & {label for label, _ in late[b, g].findings}
    ]
    if drifting:
        said.append(
            f"Traces still drift or spread in {len(drifting)} of {late.size} settings"
            f" ({'; '.join(drifting[:4])}{', ...' if len(drifting) > 4 else ''}): more burn-in"
            " there, or more localization."
        )
    if grid.step_fractions.size > 1:
        means = grid.values("mean")[:, *cell]
        errors = grid.values("stderr")[:, *cell]
        span = np.ptp(means[np.isfinite(means)])
        if span > 4 * np.fmax.reduce(errors) and span > LEVEL * abs(best.mean):
            said.append(
                f"The step size biases the estimate: λ̂ from {np.nanmin(means):.4g} to"
                f" {np.nanmax(means):.4g} over ε Λ from {grid.step_fractions[0]:g} to"
                f" {grid.step_fractions[-1]:g}; use a smaller step, or `extrapolate_step_size`."
            )
    free = rise(grid.control[cell[1]])
    if free > 0 and rise(best) > HOT * free:
        said.append(
            f"nbeta hardly acts: the loss rises by {rise(best) / free:.0%} of what it rises by with"
            " nbeta = 0, so λ̂ is little more than nbeta times the mean rise in a ball around the"
            " anchor; raise nbeta or localization."
        )
    return said


def rise(estimate: LLCEstimate) -> float:
    """Mean rise of the loss above that of the anchor, over the finite chains."""
    kept = estimate.diverged_at < 0
    gaps = estimate.losses.astype(np.float64) - estimate.anchor_losses
    return float(gaps[kept].mean()) if kept.any() else math.nan


def control_score(grid: SampledGrid, column: int, num_params: int) -> tuple[float, float, float]:
    """The control at nbeta = 0 against its law.

    Without a loss the law is Gaussian: E|w - w*|² = d/γ, but for the step bias of the sampler.

    Args:
      grid: the grid.
      column: index of the localization.
      num_params: d, sampled coordinates.

    Returns:
      (mean squared distance, the exact one, difference in standard errors).
    """
    squared = np.square(grid.control[column].distance.astype(np.float64))
    exact = num_params * float(grid.control_variances[column])
    return float(squared.mean()), exact, float((squared.mean() - exact) / mean_stderr(squared))
