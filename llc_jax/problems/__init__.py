"""What is learnt: a `Problem` names a loss, data and checkpoints; a folder for each of ours."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`llc_jax.problems.Problem`, loaded when asked for: it needs xarray, the package does not."""
    if name == "Problem":
        from llc_jax.problems.base import Problem

        return Problem
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
