"""Metrics that a problem brings along: functions of the weights, measured at every checkpoint."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import xarray

from llc_jax.types import Params


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
