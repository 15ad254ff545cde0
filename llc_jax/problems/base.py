"""What the experiments ask of a problem: the one interface between them and what is learnt."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from llc_jax.inputs import checks
from llc_jax.inputs.arrays import data_length
from llc_jax.metrics import own
from llc_jax.storage.checkpoints import CheckpointDir
from llc_jax.storage.foreign import Checkpoints, orbax_folder
from llc_jax.types import Batch, LossFn, Params, Stream


class Measurement(NamedTuple):
    """What is measured at every checkpoint.

    Attributes:
      each: `each(checkpoints, steps)`: iterator of (step, `xarray.Dataset`, text for the progress
        line); checks its arguments when it is called.
      tables: file name -> function from all results to a pandas DataFrame.
      identity: what determines the results; None: the flags of the command.
    """

    each: Callable[[Mapping[int, Params], list[int]], Iterator[tuple[int, Any, str]]]
    tables: Mapping[str, Callable]
    identity: Mapping[str, Any] | None = None


class Columns(NamedTuple):
    """What is compared between checkpoints in function space.

    Attributes:
      outputs: `outputs(step, params, inputs)` [B, columns], see `map_checkpoints`.
      inputs: arrays [B, ...].
      references: name -> what a known predictor has in the place of the outputs, [B, ...].
    """

    outputs: Any
    inputs: Mapping[str, np.ndarray]
    references: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """A loss, data and checkpoints. Yours is an instance; ours override what they have more of.

    Attributes:
      name: letters, digits, `_`, `-` and dots.
      loss_fn: `loss_fn(params, batch)` [batch]; see `llc_jax.LossFn`.
      data: function that returns a pytree of arrays [n, ...], or a `llc_jax.Stream`.
      checkpoints: function that returns {step: params} or an iterable of (step, params), read
        lazily; called again whenever checkpoints are gone through. `llc_jax.storage.foreign` opens
        folders.
      observables: name -> what is recorded along the chains beside the loss.
      metrics: name -> function of params, a number or [part], measured at every checkpoint.
      train_losses: {step: training loss}, or a function that returns it; None: the report shows the
        loss of the checkpoints on `data`.
      presets: name -> {flag: value}, for all experiments that have such a flag; a value that is a
        dict is {flag: value} of the experiment so named.
      settings: how the checkpoints came about, for the report.
    """

    name: str
    loss_fn: LossFn
    data: Callable[[], Batch | Stream]
    checkpoints: Callable[[], Any]
    observables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Callable[[Params], Any]] = dataclasses.field(default_factory=dict)
    train_losses: Any = None
    presets: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    measured_by = "measure_behavior"  # the experiment whose flags `measurement` takes

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"name={self.name!r:.80}: give a plain name, such as 'digits'.")
        for name in ("loss_fn", "data", "checkpoints"):
            if not callable(getattr(self, name)):
                raise ValueError(
                    f"{name}={getattr(self, name)!r:.80} of problem {self.name}: give a function."
                )
        for name in ("observables", "metrics", "presets", "settings"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name}={getattr(self, name)!r:.80}: give a dict, {{}} for none.")
        for name, metric in self.metrics.items():
            if not callable(metric) or not re.fullmatch(r"[A-Za-z]\w*", str(name), re.ASCII):
                raise ValueError(
                    f"metrics has {name!r:.80}: {metric!r:.80}: give {{name: function of params}},"
                    " names of ASCII letters, digits and _."
                )

    @property
    def title(self) -> str:
        """What is learnt, in words."""
        return self.name

    @property
    def losses(self) -> Mapping[str, LossFn]:
        """Loss functions whose λ̂ is compared; the first is that of the estimates."""
        return {"mean": self.loss_fn}

    @property
    def size(self) -> int | None:
        """Examples that there are; None where they are drawn."""
        data = self.data()
        return None if isinstance(data, Stream) else data_length(data)

    def sample(self, num_data: int, seed: int) -> Batch | Stream:
        """The data set of the estimates, host arrays [n, ...]: the first `num_data` examples.

        All there are, if there are fewer, or if `num_data` is 0. The seed is for problems that
        draw their data.
        """
        data = self.data()
        if isinstance(data, Stream):
            return data
        data_length(data)  # checks that they are examples
        return self.first(jax.tree.map(np.asarray, data), num_data, seed)

    def examples(self, num_data: int, seed: int) -> Batch:
        """Like `sample`, and of a stream that many examples."""
        return self.first(self.sample(num_data, seed), num_data, seed)

    def first(self, data: Batch | Stream, num_data: int, seed: int) -> Batch:
        """The first examples of data, or of what a stream gives by a seed."""
        if not isinstance(data, Stream):
            return jax.tree.map(lambda x: x[: num_data or None], data)
        checks.at_least("num_data", num_data, 1, "a stream has no end")
        parts: list[Batch] = []
        key, size = jax.random.key(seed), 0
        while size < num_data:
            parts.append(jax.device_get(data.batch_fn(jax.random.fold_in(key, len(parts)))))
            size += data_length(parts[-1])
        return jax.tree.map(lambda *x: np.concatenate(x)[:num_data], *parts)

    def saved(self) -> Mapping[int, Params]:
        """The checkpoints as {step: params}, read when asked for."""
        found = self.checkpoints()
        if isinstance(found, CheckpointDir):
            return orbax_folder(found.folder)
        return found if isinstance(found, Mapping) else passes(self.checkpoints)

    def baselines(self, data: Batch) -> dict[str, float]:
        """Losses of predictors that need no training, by name."""
        return {}

    def train_curve(self) -> dict[int, float]:
        """{step: training loss}; empty if it is not known."""
        found = self.train_losses() if callable(self.train_losses) else self.train_losses
        return {int(step): float(loss) for step, loss in dict(found or {}).items()}

    def measurement(self, flags: Any) -> Measurement:
        """What is measured at every checkpoint, by the flags of the command; here the metrics.

        Raises:
          ValueError: on bad flags, or if there is nothing to measure.
        """
        if not self.metrics:
            raise ValueError(
                f"problem {self.name} has no metrics: give Problem(metrics={{name: function of"
                " params}})."
            )
        return Measurement(
            lambda checkpoints, steps: own.measured(self.metrics, checkpoints, steps),
            {"behavior.csv": own.table},
            {"metrics": sorted(self.metrics)},
        )

    def columns(self, flags: Any) -> Columns:
        """What is compared in function space.

        Raises:
          ValueError: on bad flags, or if the problem has no such outputs.
        """
        raise ValueError(f"problem {self.name} names no outputs to compare in function space.")

    def figures(self, found: Any) -> dict[str, Any]:
        """Figures of the report beside those of λ̂: name -> Figure.

        Args:
          found: results of the workdir: sweep, stages, curve, and behavior or None.
        """
        from llc_jax.figures.llc import parts_figure
        from llc_jax.figures.metrics import metrics_figure

        drawn = {}
        if "parts" in found.sweep:
            drawn["parts"] = parts_figure(found.sweep, stages=found.stages, part="part k")
        if found.behavior is not None:
            in_order = found.behavior[list(self.metrics)]  # files have an order of their own
            drawn["metrics"] = metrics_figure(in_order, stages=found.stages)
        return drawn

    def details(self, found: Any) -> dict[str, Any]:
        """Figures that would overload the report."""
        return {}

    @property
    def curve_names(self) -> Mapping[str, str]:
        """What has a slope to be drawn beside that of λ̂: label -> variable of the behavior."""
        return {name: name for name in self.metrics}

    def curves(self, found: Any) -> dict[str, tuple]:
        """Those of one value per checkpoint: label -> (steps, values)."""
        if found.behavior is None:
            return {}
        every = {label: found.behavior[name] for label, name in self.curve_names.items()}
        return {name: (x.checkpoint.values, x.values) for name, x in every.items() if x.ndim == 1}

    def pages(self, folder: Any, found: Any) -> dict[str, str]:
        """HTML pages beside the report, from what was measured into a folder: name -> page."""
        return {}


def passes(open_checkpoints: Callable[[], Any]) -> Checkpoints:
    """{step: params} of checkpoints that can only be gone through from the beginning.

    In the order they come in, all of them are read in one pass; steps alone take another.

    Args:
      open_checkpoints: returns a new iterable of (step, params) at each call.

    Raises:
      ValueError: if there are none, or a step comes twice.
    """
    steps = [checks.step(step) for step, _ in checks.pairs(open_checkpoints())]
    if not steps or len(set(steps)) < len(steps):
        found = f"step {next(s for s in steps if steps.count(s) > 1)} twice" if steps else "nothing"
        raise ValueError(f"checkpoints() gives {found}: give pairs (step, params), one for a step.")
    under_way: Iterator[tuple[int, Params]] = iter(())

    def read(step: int) -> Params:
        nonlocal under_way
        for anew in (False, True):  # what is left of this pass, then a whole one
            if anew:
                under_way = checks.pairs(open_checkpoints())
            for here, params in under_way:
                if here == step:
                    return params
        raise ValueError(
            f"checkpoints() had step {step} before and has it no more: return a new iterator at"
            " every call, such as a generator's."
        )

    return Checkpoints(steps, read)
