"""In-context linear regression as a `Problem`: a run of `experiments.train_regression`."""

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax.inputs import checks
from llc_jax.metrics.own import Inspection
from llc_jax.observables import LossTerms
from llc_jax.problems.base import Columns, Measurement, Problem
from llc_jax.problems.regression import behavior, data, datasets, losses, structure
from llc_jax.problems.regression.model import RegressionTransformer
from llc_jax.problems.regression.outputs import Outputs
from llc_jax.types import Batch


def setting(training: Any) -> tuple[RegressionTransformer, data.RegressionTask]:
    """The model and the task of a training configuration."""
    task = data.RegressionTask(
        dim=training.dim, num_examples=training.num_examples,
        noise_variance=training.noise_variance, num_tasks=training.num_tasks or None,
    )  # fmt: skip
    model = RegressionTransformer(
        num_layers=training.num_layers, num_heads=training.num_heads, d_model=training.d_model,
        d_mlp=training.d_mlp, num_examples=training.num_examples, dim=training.dim,
        double_residual=training.double_residual,
    )  # fmt: skip
    return model, task


@functools.cache
def draw(task: data.RegressionTask, num_data: int, seed: int) -> Batch:
    """Fresh sequences as host arrays, drawn on the CPU, wherever the rest runs.

    Accelerators round the normal quantiles differently, and would make another data set.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return jax.device_get(data.sample_batch(jax.random.key(seed), task, num_data))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Regression(Problem):
    """A training run.

    Attributes:
      model: the transformer.
      task: the distribution of its sequences.
    """

    model: RegressionTransformer
    task: data.RegressionTask

    title = "in-context linear regression"
    curve_names = types.MappingProxyType({"loss": "mean_loss", "weight norm": "weight_norm"})

    @property
    def losses(self) -> Mapping[str, Any]:
        """The loss, and that of random prefixes."""
        return {"mean": self.loss_fn, "random prefix": losses.RegressionPrefixLoss(self.model)}

    @property
    def size(self) -> None:
        """Sequences are drawn."""

    def sample(self, num_data: int, seed: int) -> Batch:
        """Fresh sequences of the task."""
        return draw(self.task, num_data, seed)

    def baselines(self, data_set: Batch) -> dict[str, float]:
        """Losses of predictors that need no training: at zero exact, else on a data set."""
        x, y = (jnp.asarray(data_set[name]) for name in ("x", "y"))
        task = self.task
        known = {"ridge": data.ridge_predictions(x, y, task.noise_variance)}
        if task.num_tasks:
            known["dMMSE"] = data.dmmse_predictions(x, y, data.tasks(task), task.noise_variance)
        return {"predict zero": task.dim + task.noise_variance} | {
            name: float(jnp.mean((guess - y) ** 2)) for name, guess in known.items()
        }

    def measurement(self, flags: Any) -> Measurement:
        """Behaviour and structure, by the flags of `experiments.measure_behavior`."""
        for name in ("num_sequences", "num_far", "num_attention"):
            checks.at_least(name, getattr(flags, name), 1)
        for name in ("num_far", "num_attention"):
            if getattr(flags, name) > flags.num_sequences:
                raise ValueError(
                    f"{name}={getattr(flags, name)} is above num_sequences={flags.num_sequences},"
                    " of which it takes the first."
                )
        task = self.task
        if flags.noise_variance:
            task = dataclasses.replace(task, noise_variance=flags.noise_variance)

        def each(checkpoints, steps):
            sequences = behavior.evaluation_set(
                jax.random.key(flags.seed), task, flags.num_sequences
            )
            few, seen = (
                {name: x[:count] for name, x in sequences.items()}
                for count in (flags.num_far, flags.num_attention)
            )

            def named(found, params):
                names = structure.layer_norm_names(params)
                return datasets.dataset(found | structure.embeddings(params), behavior.GAINS, names)

            both = Inspection(behavior.Behavior(self.model), structure.Structure(self.model))
            shown = {name: seen[name] for name in ("x", "y")}
            return both.over(
                checkpoints, steps, (sequences, few), shown, named, flags.checkpoint_batch
            )

        return Measurement(
            each,
            {"behavior.csv": datasets.behavior_table, "attention.csv": datasets.attention_table},
        )

    def columns(self, flags: Any) -> Columns:
        """The predictions, or with `all_outputs` everything that the model puts out."""
        if flags.log_probs:
            raise ValueError("log_probs=True: not for a run of train_regression; leave it out.")
        found = jax.device_get(
            behavior.evaluation_set(jax.random.key(flags.seed), self.task, flags.num_sequences)
        )
        known = {"zero": np.zeros_like(found["y"])}
        known |= {name: found[name] for name in ("ridge", "dmmse") if name in found}
        return Columns(
            Outputs(self.model, flags.all_outputs), {name: found[name] for name in ("x", "y")},
            {} if flags.all_outputs else known,
        )  # fmt: skip

    def figures(self, found: Any) -> dict[str, Any]:
        """λ̂ of every example, behaviour and structure."""
        from llc_jax.figures.llc import parts_figure
        from llc_jax.problems.regression import behavior_figures, structure_figures

        stages, drawn = found.stages, {}
        if "parts" in found.sweep:
            drawn["tokens"] = parts_figure(found.sweep, stages=stages)
        if found.behavior is not None:
            drawn["behavior"] = behavior_figures.behavior_figure(found.behavior, stages=stages)
            drawn["structure"] = structure_figures.structure_figure(found.behavior, stages=stages)
        return drawn

    def details(self, found: Any) -> dict[str, Any]:
        """Layer norms, and attention of every head."""
        from llc_jax.problems.regression import structure_figures

        if found.behavior is None:
            return {}
        stages = found.stages
        return {"norms": structure_figures.norms_figure(found.behavior, stages=stages)} | {
            f"attention_{name}": structure_figures.attention_figure(
                found.behavior, name, stages=stages
            )
            for name in structure_figures.ATTENTION
        }


def problem(training: Any, **given: Any) -> Regression:
    """The problem of a training run.

    Args:
      training: its configuration, see `setting`.
      **given: fields of `Problem`: checkpoints, train_losses, settings.
    """
    model, task = setting(training)
    return Regression(
        name="regression", loss_fn=losses.RegressionLoss(model),
        data=functools.partial(draw, task, 2048, 1000),
        observables={"parts": LossTerms(losses.RegressionTokenLosses(model), keep=False)},
        model=model, task=task, **given,
    )  # fmt: skip
