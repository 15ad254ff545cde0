"""Numbers as arguments: of Python, numpy or JAX, and a `ValueError` for everything else."""

import contextlib
import math
import reprlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAX_COUNT = 2**31 - 1  # what a 32-bit index counts to
TRACED = (
    "is being traced: an estimate runs programs of its own and cannot stand within jax.jit, vmap,"
    " grad or a scan. Call it outside; for many sets of weights use"
    " llc_jax.estimate_llc_over_checkpoints."
)
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 120


def shown(value: Any, limit: int = 120) -> str:
    """A value in a message, cut short: arrays and containers can be of any size."""
    try:
        text = " ".join(_REPR.repr(value).split())
    except Exception:  # such as an integer of more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def number(value: Any) -> int | float | None:
    """Returns a number of Python, numpy or JAX as one of Python, None for everything else.

    A bool is none, and neither is an array with axes or one that is being traced or deleted.
    """
    if isinstance(value, jax.core.Tracer | bool):
        return None
    if isinstance(value, jax.Array) and value.is_deleted():
        return None
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        real = jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.floating)
        if value.shape != () or not real:
            return None
        value = np.asarray(value)
        return int(value) if jnp.issubdtype(value.dtype, jnp.integer) else float(value)
    return value if isinstance(value, int | float) else None


def at_least(name: str, value: int, minimum: int, remedy: str = "") -> int:
    """Returns an integer as one of Python, checked against its minimum."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < minimum:
        reason = f" ({remedy})" if remedy else ""
        raise ValueError(f"{name}={shown(value)}: give an integer of at least {minimum}{reason}.")
    if value > MAX_COUNT:
        raise ValueError(f"{name}={shown(value)}: give an integer of at most 2**31 - 1.")
    return int(value)


def step(value: Any, name: str = "step", limit: int = 2**32 - 1) -> int:
    """Returns a training step as a Python integer.

    Args:
      value: a Python, numpy or JAX integer; not a string or a float, which may mean another step.
      name: for the message.
      limit: the largest, a power of 2 less 1.

    Raises:
      ValueError: with the value and its type.
    """
    whole = number(value)
    if not isinstance(whole, int) or not 0 <= whole <= limit:
        raise ValueError(
            f"{name} {shown(value)} ({type(value).__name__}): give a training step from 0 to"
            f" 2**{limit.bit_length()} - 1, a whole number (int)."
        )
    return whole


def nonnegative(name: str, value: float) -> None:
    """Checks that a number is finite and >= 0 in the precision that JAX computes with."""
    finite(name, value, 0)


def finite(name: str, value: float, least: float) -> None:
    """Checks that a number is finite and >= `least` in the precision that JAX computes with."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} {TRACED}")
    found = number(value)
    if found is None or not (found >= least and -math.inf < found < math.inf):
        raise ValueError(f"{name}={shown(value)}: give one finite number >= {least:g}.")
    limits = jnp.finfo(jnp.result_type(float))
    if found and not float(limits.tiny) <= abs(found) <= float(limits.max):
        raise ValueError(
            f"{name}={shown(value)} is {'0' if abs(found) < 1 else 'infinite'} in {limits.dtype}:"
            f" give 0 or a number from {float(limits.tiny):.2g} to {float(limits.max):.2g}, or set"
            " jax_enable_x64."
        )


def flag(name: str, value: Any) -> None:
    """Checks for a bool."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={shown(value)}: give True or False.")


def grid(settings: dict[str, Any]) -> list[np.ndarray]:
    """Returns numbers and arrays of numbers, broadcast against each other, in float64."""
    found = []
    for name, value in settings.items():
        if any(isinstance(x, jax.core.Tracer) for x in (value, *_items(value))):
            raise ValueError(f"{name} {TRACED}")
        array = np.asarray(None)
        if isinstance(value, int | float | Sequence) or hasattr(value, "__array__"):
            with contextlib.suppress(Exception):  # ragged, deleted, or a key
                array = np.asarray(value)
        kinds = jnp.integer, jnp.floating
        if not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
            raise ValueError(f"{name}={shown(value)}: give a number or an array of numbers.")
        found.append(array.astype(np.float64))
    try:
        return np.broadcast_arrays(*found)
    except ValueError:
        shapes = {name: x.shape for name, x in zip(settings, found, strict=True)}
        raise ValueError(
            f"settings have shapes {shapes}: sampler"
            " hyperparameters, nbeta and localization must broadcast against each other."
        ) from None


def _items(value: Any) -> list | tuple:
    return value if isinstance(value, list | tuple) else ()
