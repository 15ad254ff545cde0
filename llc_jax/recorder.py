"""Observables on their way: checked, into the compiled program, and what came out summed up."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from llc_jax.inputs import arrays, checks
from llc_jax.observables import Observable
from llc_jax.types import Batch, LossFn, Params


class Observed(NamedTuple):
    """What became of an observable.

    Attributes:
      values: pytree of numpy arrays [chain, draw or block, ...] as recorded; None if not kept.
      summary: pytree of `Estimated`, see `Observable.summarise`; None for none.
      axis: name of the second axis of `values`: "draw", "all_draws" with the burn-in, or "block".
      dims: names of the axes after it.
    """

    values: Any
    summary: Any
    axis: str
    dims: tuple[str, ...]


def observed(
    observable: Any, recorded: Any, finite: np.ndarray, nbeta: float, num_burnin: int
) -> Observed:
    """Sums up what an observable recorded.

    Args:
      observable: the observable.
      recorded: pytree of numpy arrays [chain, draw or block, ...].
      finite: [chain] which of them to sum up.
      nbeta: n times inverse temperature.
      num_burnin: draws in front that are left out, if they were recorded.
    """
    burnin, blocks = trait(observable, "burnin"), trait(observable, "num_blocks")
    after = num_burnin if burnin else 0
    healthy = jax.tree.map(lambda x: x[finite, after:], recorded)
    summary = observable.summarise(healthy, nbeta) if hasattr(observable, "summarise") else None
    axis = "all_draws" if burnin else "block" if blocks else "draw"
    values = recorded if trait(observable, "keep") else None
    return Observed(values, summary, axis, tuple(trait(observable, "dims")))


class Recorder(NamedTuple):
    """Observables by name, without their arrays: static, hashable, compared by value.

    Attributes:
      names: of the observables.
      structure: of the tuple of observables.
      leaves: its leaves, `ARRAY` in the place of each array.
    """

    names: tuple[str, ...]
    structure: Any
    leaves: tuple[Any, ...]

    def join(self, held: list[jax.Array]) -> dict[str, Any]:
        """Returns the observables with their arrays."""
        rest = iter(held)
        leaves = [next(rest) if leaf is ARRAY else leaf for leaf in self.leaves]
        return dict(zip(self.names, jax.tree.unflatten(self.structure, leaves), strict=True))


ARRAY = "an array of an observable"


def split(observables: Mapping[str, Any]) -> tuple[Recorder, list[Any]]:
    """Separates observables into what is static and their arrays.

    Raises:
      ValueError: for what is neither an array nor hashable.
    """
    leaves, structure = jax.tree.flatten(tuple(observables.values()))
    is_array = [hasattr(leaf, "dtype") and hasattr(leaf, "shape") for leaf in leaves]
    held = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
    static = [ARRAY if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]
    recorder = Recorder(tuple(observables), structure, tuple(static))
    try:
        hash(recorder)
    except TypeError as error:
        raise ValueError(
            f"observables hold something that cannot be hashed ({error}): make a class that holds"
            " arrays a pytree, and its functions module-level ones."
        ) from None
    return recorder, held


def trait(observable: Any, name: str) -> Any:
    """An attribute of an observable, or its default; other classes need only the methods."""
    return getattr(observable, name, getattr(Observable, name))


def checked(
    observables: Mapping[str, Any],
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    size: int,
    num_draws: int,
    names: Mapping[str, str],
) -> dict[str, Any]:
    """Checks observables and returns them with arrays that JAX keeps.

    Args:
      observables: the user's.
      loss_fn: per-example losses.
      params: shapes of the weights.
      batch: shapes of a minibatch.
      size: its length.
      num_draws: draws after burn-in.
      names: what to call some of them in messages.

    Raises:
      ValueError: naming the observable.
    """
    remedy = "give {name: observable}, such as {'probe': llc_jax.observables.ProbeLosses(data)}"
    if not isinstance(observables, Mapping):
        raise ValueError(f"observables={checks.shown(observables)}: {remedy}.")
    found = {}
    for key, observable in observables.items():
        name = names.get(key, f"observables[{key!r}]")
        taken = key in RESERVED or not isinstance(key, str) or not key.isidentifier()
        if taken:
            raise ValueError(
                f"{name} cannot have this name: give a word that is none of {', '.join(RESERVED)}."
            )
        if isinstance(observable, type) or not callable(getattr(observable, "record", None)):
            raise ValueError(f"{name} is {checks.shown(observable)}, without `record`: {remedy}.")
        blocks = trait(observable, "num_blocks")
        if blocks is not None:
            blocks = checks.at_least(f"num_blocks of {name}", blocks, 1)
            if num_draws % blocks or trait(observable, "burnin"):
                raise ValueError(
                    f"num_blocks={blocks} of {name} does not divide num_draws={num_draws} (burn-in"
                    " has no blocks): blocks must be equal."
                )
        observable = jax.tree_util.tree_map_with_path(
            lambda path, x, name=name: (
                arrays.without_loss(f"{name}{arrays.short(jax.tree_util.keystr(path))}", x)
                if isinstance(x, np.ndarray)
                else x
            ),
            observable,
        )
        if hasattr(observable, "check"):
            observable.check(name, loss_fn, params, batch, size)
        found[key] = observable
    return found


# Variables of `LLCEstimate.to_xarray`, whose names are taken.
RESERVED = (
    "llc", "stderr", "init_loss", "rhat", "ess", "below_anchor", "drift", "distance_growth",
    "num_finite", "verdict", "warnings", "per_chain", "acceptance", "stability", "diverged_at",
    "losses", "anchor_losses", "burnin_losses", "distance", "chain", "draw", "burnin", "all_draws",
    "checkpoint", "loss_gap",
)  # fmt: skip
