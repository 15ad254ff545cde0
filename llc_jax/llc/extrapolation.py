"""Two estimates at two step sizes, taken to step size zero."""

import math

import numpy as np

from llc_jax.inputs.scalars import number, shown
from llc_jax.llc.estimate import LLCEstimate


def extrapolate_step_size(coarse: LLCEstimate, fine: LLCEstimate) -> tuple[float, float, float]:
    """Richardson: removes the step bias of first order from estimates at ε and a smaller ε'.

    λ̂(0) = λ̂(ε') - (λ̂(ε) - λ̂(ε')) ε' / (ε - ε'). What is left is of second order: with
    x = ε Λ/4 in each direction, SGLD's bias on a quadratic is x + x² + ..., so the rest is at most
    x_max times the bias removed. Both estimates may share their random numbers; the error bar
    takes them for independent, which errs on the safe side for positive correlation.

    Args:
      coarse: at the larger step size; all other settings equal.
      fine: at the smaller one.

    Returns:
      (λ̂(0), its standard error, bound of the remaining step bias).

    Raises:
      ValueError: if the settings differ in more than the step size.
    """
    for estimate in (coarse, fine):
        if not isinstance(estimate, LLCEstimate):
            raise ValueError(f"{shown(estimate)} is no LLCEstimate: give two of them.")
    differ = {
        name: (coarse.settings.get(name), fine.settings.get(name))
        for name in coarse.settings.keys() | fine.settings.keys()
        if coarse.settings.get(name) != fine.settings.get(name) and not name.startswith("num_")
    }
    big, small = (number(x) or math.nan for x in differ.get("step_size", (None, None)))
    if set(differ) != {"step_size"} or not big > small:
        raise ValueError(
            f"estimates differ in {dict(sorted(differ.items()))}: give two that differ in step_size"
            " only, the larger first."
        )
    weight = small / (big - small)
    value = fine.mean - weight * (coarse.mean - fine.mean)
    stderr = math.hypot((1 + weight) * fine.stderr, weight * coarse.stderr)
    rest = np.nanmax(coarse.stability) / 4 * abs(fine.mean - value)
    return value, stderr, float(rest)
