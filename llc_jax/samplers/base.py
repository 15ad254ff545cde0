"""The contract of a sampler: what it may say of itself, and what holds if it says nothing.

A sampler is a NamedTuple of numbers with the two methods of `llc_jax.types.Sampler`, `init` and
`step`. That is all that an estimate needs. Each function below asks the sampler's method of the
same name, of the same arguments; a sampler without it gets the default, which is that of an
overdamped Langevin step as `SGLD` makes it. No hyperparameter means anything by its name but one:
`step_size`, a field or a property, is the ε of a step. Without it the stability number is not
measured, and `calibrate` has nothing to set.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from llc_jax.inputs import scalars
from llc_jax.types import Evaluation, Params, Sampler

SGLD_LIMIT = 4.0  # of step_size times curvature


class Range(NamedTuple):
    """The values that a hyperparameter may take.

    Attributes:
      words: what completes "it must be", for a message.
      least: the smallest.
      most: the largest.
      excluded: an end that does not belong to it, or nan.
    """

    words: str
    least: float = 0.0
    most: float = math.inf
    excluded: float = math.nan

    def allows(self, value: float) -> bool:
        """Whether a number lies within."""
        return self.least <= value <= self.most and value != self.excluded


NONNEGATIVE = Range("0 or above")
POSITIVE = Range("above 0", excluded=0.0)
SHARE = Range("from 0 to 1", most=1.0)
MEMORY = Range(
    "below 1, for example 0.999: an average that never changes has nothing to correct its bias by"
    " (0 / 0)",
    most=1.0,
    excluded=1.0,
)


def own(sampler: Sampler, name: str) -> Callable | None:
    """The method that a sampler has itself; None for a hyperparameter of that name."""
    return getattr(sampler, name) if callable(getattr(type(sampler), name, None)) else None


def _own_or_this(default: Callable) -> Callable:
    @functools.wraps(default)
    def call(sampler, *args):
        method = own(sampler, default.__name__)
        return default(sampler, *args) if method is None else method(*args)

    return call


# --- what a sampler may say of itself -------------------------------------------------------------


@_own_or_this
def ranges(sampler: Sampler) -> dict[str, Range]:
    """The ranges of hyperparameters, by name.

    What is left out is `NONNEGATIVE`, and the step size `POSITIVE`.
    """
    return {}


@_own_or_this
def with_step_size(sampler: Sampler, step_size: Any, localization: Any) -> Sampler:
    """The sampler with this step size, and what else it sets by the localization.

    Args:
      sampler: gives the kind and the other hyperparameters.
      step_size: ε, scalar or array.
      localization: γ > 0, of the same shape.

    Raises:
      ValueError: if it has no step size.
    """
    if "step_size" not in sampler._asdict():
        raise ValueError(
            f"sampler={scalars.shown(sampler)}: calibrate sets its step_size, which it does not"
            " have; name that hyperparameter step_size, give the sampler a method with_step_size,"
            " or choose the settings by hand."
        )
    return sampler._replace(step_size=step_size)


@_own_or_this
def relaxation_steps(sampler: Sampler, localization: Any) -> np.ndarray:
    """Steps τ in which a direction without curvature forgets its start.

    Its variance approaches 1/γ like exp(-t/τ), with τ = 1 / (ε γ) for overdamped samplers.

    Args:
      sampler: as `with_step_size` returns it.
      localization: γ > 0, of the shape of the step size.
    """
    return 1 / (np.asarray(sgld_step_size(sampler), float) * localization)


@_own_or_this
def stability_limit(sampler: Sampler) -> float:
    """The largest step size times curvature at which a chain on a quadratic stays finite."""
    return SGLD_LIMIT


@_own_or_this
def stationary_variance(sampler: Sampler, curvature: Any) -> Any:
    """The variance of a direction of this curvature Λ on a quadratic, with exact gradients.

    None if it is not known: then `calibrate` takes `SGLD` for its control at nbeta = 0.
    """
    return None


def preconditioner(sampler: Sampler) -> Callable[[Any], Params] | None:
    """Its method `preconditioner(state)`, G like params by which the state multiplies ε."""
    return own(sampler, "preconditioner")


def log_acceptance(
    sampler: Sampler,
) -> Callable[[Params, Evaluation, Evaluation], jax.Array] | None:
    """Its method `log_acceptance(move, here, there)`, the log Metropolis ratio of a step."""
    return own(sampler, "log_acceptance")


def tested_log_acceptance(state: Any) -> jax.Array | None:
    """The log ratio by which a sampler accepted or refused its last step: a field of its state.

    It is called `log_acceptance`. None for samplers that make no such test.
    """
    return getattr(state, "log_acceptance", None)


# --- what follows from it -------------------------------------------------------------------------


def sgld_step_size(sampler: Sampler) -> Any:
    """The step size of the `SGLD` that is stable as far; None for a sampler without one."""
    step_size = getattr(sampler, "step_size", None)
    return step_size if step_size is None else step_size * (SGLD_LIMIT / stability_limit(sampler))


def step_variance(sampler: Sampler) -> float | None:
    """The variance of the noise of a step, if it is known beforehand and the same for all weights.

    A preconditioner makes it depend on the state.
    """
    return None if preconditioner(sampler) else sgld_step_size(sampler)


def check_instance(sampler: Sampler) -> None:
    """Checks that a sampler is an instance, not its class."""
    methods = (getattr(sampler, name, None) for name in ("_asdict", "init", "step"))
    if isinstance(sampler, type) or not all(map(callable, methods)):
        raise ValueError(
            f"sampler={scalars.shown(sampler)}: give an instance such as"
            " llc_jax.SGLD(step_size=1e-4)."
        )


def check_hyperparameters(sampler: Sampler) -> None:
    """Checks that a sampler is an instance whose hyperparameters are scalars within their range.

    Raises:
      ValueError: with the name, the value and the rule.
    """
    check_instance(sampler)
    found = {"step_size": POSITIVE} | ranges(sampler)
    for name, value in sampler._asdict().items():
        allowed = found.get(name, NONNEGATIVE)
        scalars.finite(f"{type(sampler).__name__}.{name}", value, allowed.least)
        if not allowed.allows(number := scalars.number(value)):
            raise ValueError(f"{name}={number}: it must be {allowed.words}.")
