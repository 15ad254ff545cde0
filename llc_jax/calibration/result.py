"""What a calibration finds, and why."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from llc_jax.calibration.choice import (
    LEVEL,
    RELAXATIONS,
    SampledGrid,
    Sensitivity,
    control_score,
    rise,
)
from llc_jax.llc.estimate import LLCEstimate

LENGTH = 8.0  # least length of a chain in relaxation times
MOST = 10**6  # steps of a chain
ENOUGH = 200.0  # least effective draws: below, R-hat and the error bar itself are uncertain
DRAWS = 2000  # most recorded draws of a chain


class Lengths(NamedTuple):
    """How long to run.

    Attributes:
      num_draws: recorded draws per chain.
      num_burnin: recorded draws thrown away first.
      thinning: steps per draw.
      relative_stderr: of λ̂, expected.
      warnings: one sentence if that is not what was asked for.
    """

    num_draws: int
    num_burnin: int
    thinning: int
    relative_stderr: float
    warnings: list[str]


def lengths(grid: LLCEstimate, relaxation: float, slower: float, relative_stderr: float) -> Lengths:
    """How long chains must be for a standard error, from an estimate of a grid.

    It falls like one over the root of the effective draws, which grow with the steps.

    Args:
      grid: the estimate at these settings, but for the step size.
      relaxation: steps in which a direction without curvature forgets its start.
      slower: how many times longer this is than it was on the grid.
      relative_stderr: to be reached, relative to λ̂.
    """
    same = grid.losses.shape[1] * slower  # steps that are worth the draws of the grid
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.float64(grid.stderr) / abs(grid.mean)
        wanted = same * max((relative / relative_stderr) ** 2, ENOUGH / grid.ess)
    fewest = max(100.0, LENGTH * relaxation)
    steps = int(np.clip(np.nan_to_num(wanted, nan=same), fewest, MOST))
    reached = float(relative * math.sqrt(same / steps))
    thinning = -(-steps // DRAWS)
    warnings = []
    if not wanted <= MOST:
        warnings = [
            f"A standard error of {relative_stderr:.0%} of λ̂ = {grid.mean:.3g} ± {grid.stderr:.2g}"
            f" would take {wanted:.2g} steps; proposed are {steps:,}, for {reached:.0%}."
        ]
    burnin = math.ceil(RELAXATIONS * relaxation)
    return Lengths(-(-steps // thinning), -(-burnin // thinning), thinning, reached, warnings)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Settings, the grid they come from, and the reasons.

    Attributes:
      settings: keyword arguments for `estimate_llc`.
      chosen: index [E, B, G] of the cell of the grid.
      grid: the grid.
      stiffness_at_anchor: Λ at w*.
      stiffness: Λ that set the step size: the largest seen along chains, or what a rehearsal with
        longer ones demanded.
      worst_step: training step of the checkpoint where it was seen, None for the anchor's chains.
      sensitivity: how the estimate depends on the choice.
      relaxation: steps in which a direction without curvature forgets its start.
      relative_stderr: of λ̂, expected of that many draws.
      num_params: d.
      num_steps: sampler steps spent, over all settings, per chain.
      warnings: what to beware of, one sentence each.
    """

    settings: Mapping[str, Any]
    chosen: tuple[int, int, int]
    grid: SampledGrid
    stiffness_at_anchor: float
    stiffness: float
    worst_step: int | None
    sensitivity: Sensitivity
    relaxation: float
    relative_stderr: float
    num_params: int
    num_steps: int
    warnings: list[str]

    @property
    def sweep(self) -> SampledGrid:
        """The former name of `grid`."""
        return self.grid

    @property
    def reasons(self) -> list[str]:
        """Why these settings: one sentence each."""
        s, grid = self.settings, self.grid
        step_size, cell = float(s["sampler"].step_size), self.chosen[1:]
        best = grid.estimates[self.chosen]
        where = "along the chains" if self.worst_step is None else f"at step {self.worst_step:,}"
        fractions = np.append(best.stability, grid.step_fractions[self.chosen[0]])
        seen = np.fmax.reduce(fractions) / grid.step_sizes[self.chosen]
        if self.worst_step is None and self.stiffness > 1.01 * seen:
            where += ", with a margin for walls that are rarely met"
        squared, exact, z = control_score(grid, cell[1], self.num_params)
        level = np.argwhere(self.sensitivity.level)
        slopes = [
            f"{slope[cell]:+.1%} per e-fold of {name}"
            for name, slope in zip(("nbeta", "localization"), self.sensitivity, strict=False)
            if math.isfinite(slope[cell])
        ]
        change = f"; here it changes by {' and '.join(slopes)}" if slopes else ""
        if self.sensitivity.level.size == 1:
            span = "nothing else was tried"
        elif level.size:
            (b0, g0), (b1, g1) = level.min(axis=0), level.max(axis=0)
            span = (
                f"λ̂ is level in {len(level)} of {self.sensitivity.level.size} settings, with nbeta"
                f" from {grid.nbetas[b0]:.3g} to {grid.nbetas[b1]:.3g} and localization from"
                f" {grid.localizations[g0]:.3g} to {grid.localizations[g1]:.3g} (within"
                f" {LEVEL:.0%} per e-fold)"
            )
        else:
            span = f"λ̂ is level (within {LEVEL:.0%} per e-fold) nowhere on the grid"
        return [
            f"step_size {step_size:.3g}: {step_size * self.stiffness:.2g} / Λ with Λ ="
            f" {self.stiffness:.3g}, the largest curvature of the posterior {where}"
            f" ({self.stiffness / self.stiffness_at_anchor:.2g} times that at the anchor).",
            f"nbeta {s['nbeta']:.4g} and localization {s['localization']:.4g}: {span}{change}.",
            f"burn-in {s['num_burnin'] * s['thinning']} steps: flat directions forget their start"
            f" in {self.relaxation:.3g} steps.",
            f"{s['num_draws']} draws, {s['thinning']} steps apart, in {s['num_chains']} chains: for"
            f" a standard error near {self.relative_stderr:.1%}; the grid had {best.mean:.4g} ±"
            f" {best.stderr:.2g}.",
            f"Control at nbeta = 0: mean squared distance {squared:.4g}, exact {exact:.4g}"
            f" ({z:+.1f} standard errors); there the loss rises by"
            f" {rise(grid.control[cell[1]]):.3g}, here by {rise(best):.3g}.",
        ]

    def summary(self) -> str:
        """Returns the settings, the reasons and the warnings as text."""
        lines = [f"{name:<14}{value}" for name, value in self.settings.items()]
        lines += ["", *[f"- {reason}" for reason in self.reasons]]
        return "\n".join(lines + [f"! {warning}" for warning in self.warnings])

    def __repr__(self) -> str:
        return f"Calibration({dict(self.settings)}, {len(self.warnings)} warnings)"

    def _repr_html_(self) -> str:
        import html

        return f"<pre>{html.escape(self.summary())}</pre>"

    def plot(self):
        """Draws the grid; returns a matplotlib `Figure`."""
        from llc_jax.figures import calibration as figures

        return figures.grid_figure(self)
