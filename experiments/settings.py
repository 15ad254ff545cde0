"""What the experiments after training need to know of a run, whichever model it trained."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from experiments import train_language, train_regression, training
from llc_jax.storage.files import digest


class Setting(NamedTuple):
    """A run.

    Attributes:
      experiment: that trained it.
      title: what was learnt, in words.
      training: Config of the run.
      loss_fn: losses per example.
      parts_fn: their parts, see `LLCEstimate.parts`.
      draw: `draw(num_data, seed)`: examples to sample on, a pytree of host arrays.
      baselines: `baselines(data) -> {name: loss}` of predictors that need no training.
    """

    experiment: str
    title: str
    training: Any
    loss_fn: Any
    parts_fn: Any
    draw: Callable[[int, int], Any]
    baselines: Callable[[Any], dict[str, float]]


KINDS = {"train_regression": train_regression, "train_language": train_language}


def load(folder: str) -> Setting:
    """Reads what a workdir was trained on.

    Raises:
      ValueError: if it holds no training run.
    """
    experiment = training.record(folder).get("experiment", "train_regression")
    return Setting(experiment, *KINDS[experiment].described(KINDS[experiment].load_config(folder)))


def data_set(folder: str, num_data: int, seed: int) -> tuple[Any, str]:
    """The data set of the estimates as host arrays, and its SHA-256."""
    data = load(folder).draw(num_data, seed)
    leaves = [data[name] for name in sorted(data)]
    return data, digest(np.ascontiguousarray(leaf).tobytes() for leaf in leaves)
