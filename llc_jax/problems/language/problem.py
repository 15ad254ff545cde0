"""An attention-only language model as a `Problem`: a run of `experiments.train_language`."""

import dataclasses
import functools
import math
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax.inputs import checks
from llc_jax.metrics.own import Inspection
from llc_jax.observables import LossTerms
from llc_jax.problems.base import Columns, Measurement, Problem
from llc_jax.problems.language import behavior, datasets, heldout, probes, structure, synthetic
from llc_jax.problems.language.losses import LanguageLoss, LanguageOctaveLosses
from llc_jax.problems.language.model import AttentionOnlyTransformer
from llc_jax.problems.language.outputs import NextTokenOutputs, one_position
from llc_jax.problems.language.token_sets import prepare
from llc_jax.storage.files import read_json, write_json
from llc_jax.training.batches import TokenBatches
from llc_jax.types import Batch


def source(training: Any) -> Any:
    """The synthetic language of a configuration, or its tokens, prepared if they are not there."""
    if training.data == "synthetic":
        return synthetic.SyntheticLanguage(
            num_words=training.num_words, context=training.context, repetition=training.repetition
        )
    tokenizer = int(training.tokenizer) if training.tokenizer.isdigit() else training.tokenizer
    return prepare(
        pathlib.Path(training.workdir) / "tokens", training.data, context=training.context,
        tokenizer=tokenizer, field=training.field,
    )  # fmt: skip


def vocabulary(training: Any) -> int:
    """V of a configuration."""
    if training.data == "synthetic":
        return training.num_words + 1
    return source(training).tokenizer.vocab_size


def transformer(training: Any) -> AttentionOnlyTransformer:
    """The model of a configuration."""
    return AttentionOnlyTransformer(
        num_layers=training.num_layers, num_heads=training.num_heads, d_model=training.d_model,
        vocab_size=vocabulary(training), context=training.context, positions=training.positions,
        init_scale=training.init_scale,
        dtype=jnp.bfloat16 if training.bfloat16 else jnp.float32, remat=training.remat,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Language(Problem):
    """A training run.

    Attributes:
      training: its configuration.
      model: the transformer.
    """

    training: Any
    model: AttentionOnlyTransformer

    title = "attention-only language model"
    measured_by = "measure_language"
    curve_names = types.MappingProxyType({"loss": "mean_loss", "weight norm": "weight_norm"})

    @functools.cached_property
    def source(self) -> Any:
        """The synthetic language, or the tokens."""
        return source(self.training)

    @property
    def is_synthetic(self) -> bool:
        """Whether the law of the language is known."""
        return self.training.data == "synthetic"

    @property
    def size(self) -> None:
        """Sequences are drawn."""

    def sample(self, num_data: int, seed: int) -> Batch:
        """Fresh sequences of the synthetic language, else of the training text."""
        if self.is_synthetic:
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                return jax.device_get(synthetic.sample(jax.random.key(seed), self.source, num_data))
        rows = self.source.train
        if num_data > len(rows):
            raise ValueError(
                f"num_data={num_data}: the training text has {len(rows)} sequences; give at most"
                " that."
            )
        chosen = TokenBatches(rows, num_data, seed).block(0, 1)
        return {"tokens": np.asarray(chosen["tokens"][0])}

    def baselines(self, data: Batch) -> dict[str, float]:
        """Losses of predictors that need no training, in nats."""
        size = self.model.vocab_size
        uniform = {"uniform": math.log(size)}
        if self.is_synthetic:
            known = synthetic.reference_losses(self.source, data["tokens"][:256])
            return uniform | {
                name.replace("_", " "): float(np.mean(losses)) for name, losses in known.items()
            }
        ids = np.asarray(data["tokens"][:, 1:]).ravel()
        counts = np.bincount(ids, minlength=size) / ids.size
        entropy = float(-np.sum(counts * np.log(counts + (counts == 0))))
        return uniform | {"word frequencies": entropy}

    def measurement(self, flags: Any) -> Measurement:
        """Behaviour and structure, by the flags of `experiments.measure_language`."""
        for name in ("num_sequences", "num_probes", "num_ngrams", "num_texts"):
            checks.at_least(name, getattr(flags, name), 1)

        def named(found, params):
            found |= structure.position_components(params)
            return datasets.dataset(found, heldout.LENGTHS, structure.weight_names(params))

        def each(checkpoints, steps):
            rows, table, grams, start = heldout.material(flags, self.training, self.source)
            texts = rows[: flags.num_texts]
            both = Inspection(behavior.Behavior(self.model), structure.Structure(self.model))
            measured = both.over(
                checkpoints, steps,
                (behavior.questions(flags.seed, self.model, rows, table, grams, texts),),
                probes.probes(flags.seed, flags.num_probes, self.model, start),
                named, flags.checkpoint_batch,
            )  # fmt: skip

            def results():  # from here on the settings are known to be those of the folder
                place = pathlib.Path(flags.workdir) / "behavior" / "texts.json"
                write_json(place, heldout.words(self.training, self.source, texts))
                yield from measured

            return results()

        tables = {"behavior.csv": datasets.behavior_table, "heads.csv": datasets.heads_table}
        if self.training.num_layers > 1:
            tables["composition.csv"] = datasets.composition_table
        return Measurement(each, tables)

    def columns(self, flags: Any) -> Columns:
        """The logit of the token that follows, or with `log_probs` its log-probability."""
        if flags.all_outputs:
            raise ValueError("all_outputs=True: not for a run of train_language; leave it out.")
        rows = heldout.sequences(self.training, self.source, flags.num_sequences, flags.seed)
        inputs, known = one_position(flags.seed, rows), {}
        if flags.log_probs:
            known["uniform"] = np.full(len(rows), -np.log(self.model.vocab_size))
            if self.is_synthetic:
                losses = [
                    synthetic.reference_losses(self.source, rows[start : start + flags.block])
                    for start in range(0, len(rows), flags.block)
                ]
                for name in losses[0]:
                    whole = np.concatenate([part[name] for part in losses])
                    found = -whole[np.arange(len(rows)), inputs["position"]]
                    known[name.replace("_", " ")] = found
        return Columns(NextTokenOutputs(self.model, flags.log_probs), inputs, known)

    def figures(self, found: Any) -> dict[str, Any]:
        """λ̂ of early and late tokens, behaviour and heads."""
        from llc_jax.figures.llc import parts_figure
        from llc_jax.problems.language import figures

        stages, drawn = found.stages, {}
        if "parts" in found.sweep:
            ranges = datasets.octave_ranges(self.training.context - 1)
            labels = [f"{a}" if a == b else f"{a} to {b}" for a, b in ranges]
            drawn["octaves"] = parts_figure(
                found.sweep, stages=stages, part="tokens", labels=labels
            )
        if found.behavior is not None:
            drawn["language"] = figures.behavior_figure(found.behavior, stages=stages)
            drawn["heads"] = figures.heads_figure(found.behavior, stages=stages)
        return drawn

    def details(self, found: Any) -> dict[str, Any]:
        """Positions, embedding, and composition of heads."""
        from llc_jax.problems.language import figures

        measured, stages = found.behavior, found.stages
        if measured is None:
            return {}
        drawn = {
            "positions": figures.positions_figure(measured, stages=stages),
            "embedding": figures.embedding_figure(measured, stages=stages),
        }
        if "k_composition" in measured:
            baseline = structure.random_composition(self.model)
            drawn["composition"] = figures.composition_figure(measured, baseline, stages=stages)
        return drawn

    def pages(self, folder: pathlib.Path, found: Any) -> dict[str, str]:
        """A page for each stage: texts, coloured by how their prediction changed over it."""
        from llc_jax.report.heatmap import heatmap_html

        path = pathlib.Path(folder) / "texts.json"
        if found.behavior is None or "text_log_probs" not in found.behavior or not path.exists():
            return {}
        steps, log_probs = found.behavior.checkpoint.values, found.behavior.text_log_probs.values
        drawn = {}
        for number, stage in enumerate(found.stages, 1):
            first, last = (int(np.argmin(np.abs(steps - s))) for s in (stage.start, stage.end))
            drawn[f"texts_stage_{number}"] = heatmap_html(
                read_json(path), log_probs[last] - log_probs[first],
                title=f"Stage {number}: what steps {steps[first]:,} to {steps[last]:,} changed",
            )  # fmt: skip
        return drawn


def problem(training: Any, **given: Any) -> Language:
    """The problem of a training run.

    Args:
      training: its configuration, see `transformer` and `source`.
      **given: fields of `Problem`: checkpoints, train_losses, settings.
    """
    model = transformer(training)
    return Language(
        name="language", loss_fn=LanguageLoss(model, training.chunk),
        data=lambda: {"tokens": source(training).train}, model=model, training=training,
        observables={"parts": LossTerms(LanguageOctaveLosses(model, training.chunk), keep=False)},
        **given,
    )  # fmt: skip
