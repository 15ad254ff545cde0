"""What a problem measures at every checkpoint: its metrics, or its behaviour and structure."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import xarray

from llc_jax.checkpoint_map import map_checkpoints
from llc_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a model does and how it is built, measured in one program.

    Attributes:
      behavior: `behavior(step, params, *asked)`, a dictionary of arrays with `mean_loss`.
      structure: `structure(step, params, shown)`, likewise.
    """

    behavior: Callable[..., dict]
    structure: Callable[..., dict]

    def __call__(self, step: Any, params: Params, asked: tuple, shown: Any) -> dict:
        """Both dictionaries in one, for `map_checkpoints`."""
        return self.behavior(step, params, *asked) | self.structure(step, params, shown)

    def over(
        self, checkpoints: Mapping[int, Params], steps: list[int], asked: tuple, shown: Any,
        named: Callable[[dict, Params], xarray.Dataset], checkpoint_batch: int,
    ) -> Iterator[tuple[int, xarray.Dataset, str]]:  # fmt: skip
        """Measures checkpoints.

        Args:
          checkpoints: {step: params}.
          steps: those to measure.
          asked: what behaviour is measured on.
          shown: what structure is measured on.
          named: makes a Dataset of both dictionaries and the weights.
          checkpoint_batch: checkpoints at once.

        Returns:
          Iterator of (step, Dataset, text for a progress line).
        """
        pairs = ((step, checkpoints[step]) for step in steps)
        measured = map_checkpoints(self, pairs, asked, shown, checkpoint_batch=checkpoint_batch)
        return (
            (step, named(found, checkpoints[step]), f" step {step}: loss {found['mean_loss']:.4f}")
            for step, found in measured
        )


def measured(
    metrics: Mapping[str, Callable[[Params], Any]],
    checkpoints: Mapping[int, Params],
    steps: list[int],
) -> Iterator[tuple[int, xarray.Dataset, str]]:
    """Measures every metric, one checkpoint after another.

    Args:
      metrics: name -> function of params: a number, or an array [part].
      checkpoints: {step: params}.
      steps: those to measure.

    Yields:
      (step, Dataset of a variable per metric, text for a progress line).

    Raises:
      ValueError: naming a metric of another shape, or of other things than real numbers.
    """
    for step in steps:
        params, found = checkpoints[step], {}
        for name, metric in metrics.items():
            value = np.asarray(metric(params))
            if value.ndim > 1 or not value.size or value.dtype.kind not in "biuf":
                raise ValueError(
                    f"metric {name} of step {step} has shape {value.shape} and dtype"
                    f" {value.dtype}: return a number, or an array [part] of them."
                )
            found[name] = ((f"{name}_part",) * value.ndim, value.astype(np.float64))
        first, (_, value) = next(iter(found.items()))
        yield step, xarray.Dataset(found), f" step {step}: {first} {value.mean():.4g}"


def table(found: xarray.Dataset):
    """One line per checkpoint; the parts of a metric in columns name_1, name_2, ...

    Args:
      found: with a leading dimension checkpoint.

    Returns:
      pandas DataFrame, indexed by step.
    """
    import pandas

    columns = {}
    for name, variable in found.data_vars.items():
        if variable.ndim == 1:
            columns[name] = variable.values
        else:
            columns |= {f"{name}_{k}": x for k, x in enumerate(variable.values.T, 1)}
    return pandas.DataFrame(columns, index=found.checkpoint.values).rename_axis("step")
