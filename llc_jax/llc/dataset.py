"""An estimate as an `xarray.Dataset`, for ArviZ and for files."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from llc_jax.observables import Estimated
from llc_jax.recorder import Observed

if TYPE_CHECKING:
    import xarray

    from llc_jax.llc.estimate import LLCEstimate


def to_dataset(estimate: "LLCEstimate") -> "xarray.Dataset":
    """Returns a Dataset with dimensions chain, draw and burnin, and those of its observables.

    What an observable recorded has the name of the observable, followed by the path of the leaf if
    it is a pytree; a summary the same name with `_mean`, and its error with `_stderr`. Where the
    draws were not kept, the mean takes the name alone. Arrays without elements are left out: a file
    of netCDF 3 with a length of 0 can be written and not be read.
    """
    import xarray

    found: dict[str, Any] = {}
    for name, observed in estimate.observed.items():
        for variable, (dims, values) in _variables(name, observed):
            while variable in found:  # {"a.b": x, "a": {"b": y}}
                variable += "_"
            if np.size(values):
                found[variable] = dims, values
    if estimate.burnin_losses.size:
        found["burnin_losses"] = (("chain", "burnin"), estimate.burnin_losses)
    return xarray.Dataset(
        data_vars={
            **found,
            "llc": estimate.mean,
            "stderr": estimate.stderr,
            "init_loss": estimate.init_loss,
            "rhat": estimate.rhat,
            "ess": estimate.ess,
            "below_anchor": estimate.below_anchor,
            "drift": estimate.drift,
            "distance_growth": estimate.distance_growth,
            "num_finite": estimate.num_finite,
            "verdict": estimate.verdict,
            "warnings": "\n".join(estimate.warnings),
            "per_chain": ("chain", estimate.per_chain),
            "acceptance": ("chain", estimate.acceptance),
            "stability": ("chain", estimate.stability),
            "diverged_at": ("chain", estimate.diverged_at),
            "losses": (("chain", "draw"), estimate.losses),
            "anchor_losses": (("chain", "draw"), estimate.anchor_losses),
            "distance": (("chain", "draw"), estimate.distance),
        },
        coords={
            "chain": np.arange(len(estimate.per_chain)),
            "draw": np.arange(estimate.losses.shape[1]),
        },
        attrs=dict(estimate.settings),
    )


def _variables(name: str, observed: Observed) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Pairs (variable, (dimensions, values)) of one observable."""
    axis = f"{name}_block" if observed.axis == "block" else observed.axis

    # Of one observable, since another may have more examples: probe_example; but parts have part.
    named = [dim if name.startswith(dim) else f"{name}_{dim}" for dim in observed.dims]

    def dims(variable: str, ndim: int) -> list[str]:
        return [*named[:ndim], *(f"{variable}_{n}" for n in range(len(named), ndim))]

    for variable, leaf in _leaves(name, observed.values):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        leaf = np.asarray(leaf)
        yield variable, (["chain", axis, *dims(variable, leaf.ndim - 2)], leaf)
    for variable, leaf in _leaves(name, observed.summary):
        mean = variable if observed.values is None else f"{variable}_mean"
        if not isinstance(leaf, Estimated):
            leaf = np.asarray(leaf)
            yield f"{variable}_summary", (dims(f"{variable}_summary", leaf.ndim), leaf)
            continue
        own = dims(variable, np.ndim(leaf.value))
        yield mean, (own, np.asarray(leaf.value))
        yield f"{variable}_stderr", (own, np.asarray(leaf.stderr))


def _leaves(name: str, tree: Any) -> Iterator[tuple[str, Any]]:
    """Pairs (name and path, leaf), an `Estimated` counted as a leaf."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, Estimated)
    ):
        own = jax.tree_util.keystr(path, simple=True, separator=".")
        yield (f"{name}.{own}" if own else name), leaf
