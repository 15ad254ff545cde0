"""Follows a training run through function space: principal components of its outputs.

    python -m experiments.measure_trajectory --preset=quickstart --workdir=runs/quickstart

Rows are checkpoints, columns the outputs on fixed sequences that were not trained on: of a
regression run its predictions, of a language run the logit of the token that follows, at one random
position of each sequence. Known predictors are projected into the same space; those of the
synthetic language have no logits, but with `--log_probs` they are there too. With
`--also=runs/other,runs/third` the components are those of all runs together. Writes
`trajectory/trajectory.csv` and `trajectory.json`, unless they are up to date.
Expected: few components carry nearly everything, and the path turns where stages meet.
"""

import csv
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments import cli, measure_language, settings, train_language, train_regression, workdir
from experiments.cli import option


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the analysis."""

    workdir: str = option("runs/quickstart", "Folder of the training run.")
    preset: str = option("quickstart", "Name of the preset.")
    also: str = option("", "Further workdirs of the same task, separated by commas.")
    seed: int = option(3000, "Seed of the sequences, or of the positions in held-out text.")
    num_sequences: int = option(128, "Sequences; fewer if the held-out text has fewer.")
    all_outputs: bool = option(False, "Regression: all outputs, as published, not predictions.")
    log_probs: bool = option(False, "Language: log-probabilities, not logits as published.")
    num_components: int = option(3, "Principal components.")
    block: int = option(128, "Sequences at once; bounds memory.")
    checkpoint_batch: int = option(2, "Checkpoints at once, over the devices; bounds memory.")


def smoke() -> Config:
    """Seconds."""
    return Config(workdir="runs/smoke", preset="smoke", num_sequences=16)


def quickstart() -> Config:
    """Seconds."""
    return Config()


def small() -> Config:
    """A minute."""
    return Config(workdir="runs/small", preset="small", num_sequences=1024, block=256)


def paper() -> Config:
    """81,920 predictions at 191 checkpoints; --all_outputs --num_sequences=1024 as published."""
    return Config(workdir="runs/paper", preset="paper", num_sequences=10_240, block=512)


PRESETS = {p.__name__: p() for p in (smoke, quickstart, small, paper)}
MEMORY = ("block", "checkpoint_batch")


class Columns(NamedTuple):
    """What is compared between checkpoints.

    Attributes:
      outputs: of `llc_jax.metrics.outputs`.
      inputs: its batch, arrays [B, ...].
      references: name -> what a known predictor has in the place of the outputs, [B, ...].
    """

    outputs: Any
    inputs: Mapping[str, np.ndarray]
    references: Mapping[str, np.ndarray]


def columns(config: Config, folder: str) -> Columns:
    """The columns for a run, whichever model it trained.

    Raises:
      ValueError: if a flag is for the other model, or the folder holds no run.
    """
    run = settings.load(folder)
    language = run.experiment == "train_language"
    for name, here in (("all_outputs", not language), ("log_probs", language)):
        if getattr(config, name) and not here:
            raise ValueError(f"{name}=True: not for a run of {run.experiment}; leave it out.")
    make = _language if language else _regression
    return make(config, run.training)


def _regression(config: Config, training: train_regression.Config) -> Columns:
    import jax

    from llc_jax.problems.regression.behavior import evaluation_set
    from llc_jax.problems.regression.outputs import Outputs

    model, task = train_regression.setting(training)
    found = jax.device_get(evaluation_set(jax.random.key(config.seed), task, config.num_sequences))
    known = {"zero": np.zeros_like(found["y"])}
    known |= {name: found[name] for name in ("ridge", "dmmse") if name in found}
    return Columns(
        Outputs(model, config.all_outputs), {name: found[name] for name in ("x", "y")},
        {} if config.all_outputs else known,
    )  # fmt: skip


def _language(config: Config, training: train_language.Config) -> Columns:
    from llc_jax.problems.language.outputs import NextTokenOutputs, one_position
    from llc_jax.problems.language.synthetic import reference_losses

    rows = measure_language.held_out(training, config.num_sequences, config.seed)
    inputs, known = one_position(config.seed, rows), {}
    if config.log_probs:
        known["uniform"] = np.full(len(rows), -np.log(train_language.vocabulary(training)))
        if training.data == "synthetic":
            law = train_language.language(training)
            losses = [
                reference_losses(law, rows[start : start + config.block])
                for start in range(0, len(rows), config.block)
            ]
            for name in losses[0]:
                whole = np.concatenate([part[name] for part in losses])
                known[name.replace("_", " ")] = -whole[np.arange(len(rows)), inputs["position"]]
    model = train_language.model(training)
    return Columns(NextTokenOutputs(model, config.log_probs), inputs, known)


def folder_of(config) -> pathlib.Path:
    """Returns the folder of the results."""
    return pathlib.Path(config.workdir) / "trajectory"


def run(config: Config, phase: str = "trajectory") -> None:
    """Analyses all checkpoints there are, unless that has been done."""
    from llc_jax.inputs import checks
    from llc_jax.metrics.outputs import output_blocks
    from llc_jax.metrics.trajectory import functional_pca
    from llc_jax.storage.checkpoints import CheckpointDir
    from llc_jax.storage.files import digest, read_json, write_atomic, write_json

    for name in ("num_sequences", "num_components", "block", "checkpoint_batch"):
        checks.at_least(name, getattr(config, name), 1)
    folder = folder_of(config)
    runs = [config.workdir, *filter(None, config.also.split(","))]
    with workdir.lock(folder, "trajectory"):
        kept = [CheckpointDir(pathlib.Path(name) / "checkpoints") for name in runs]
        steps = [workdir.good_steps(k) for k in kept]
        identity = cli.identity(config, MEMORY)
        rows = sum(map(len, steps))
        if not 2 <= config.num_components < rows:
            raise ValueError(
                f"num_components={config.num_components}: give 2 to {rows - 1}, one less than"
                " there are checkpoints."
            )
        path, inputs = folder / "trajectory.json", {"config": identity, "steps": steps}
        out = folder / "trajectory.csv"
        stamp = {"csv_sha256": digest([out])} if out.exists() else {"csv_sha256": None}
        if path.exists() and (inputs | stamp).items() <= read_json(path).items():
            cli.say(f"{phase}: up to date in {path}")
            return
        found = columns(config, config.workdir)
        for other in runs[1:]:
            theirs = columns(config, other)
            if theirs.outputs != found.outputs or not _same(theirs.inputs, found.inputs):
                raise ValueError(
                    f"also={other}: trained on another task or model; give equal ones."
                )
        checkpoints = [(s, k.restore_params(s)) for k, of in zip(kept, steps, strict=True)
                       for s in of]  # fmt: skip
        size = len(next(iter(found.inputs.values())))
        block = min(config.block, size)
        blocks = output_blocks(
            found.outputs, checkpoints, found.inputs, list(found.references.values()), block=block,
            checkpoint_batch=config.checkpoint_batch,
        )  # fmt: skip
        count = -(-size // block)

        def counted():
            for number, values in enumerate(blocks, 1):
                yield number, "", values

        pca = functional_pca(
            cli.progress(counted(), phase, count, "blocks"),
            config.num_components, len(checkpoints),
        )  # fmt: skip
        rows = [(number, step) for number, of in enumerate(steps, 1) for step in of]
        names = list(found.references)
        write_atomic(out, table(rows, names, pca.scores))
        write_json(path, {
            **inputs,
            "csv_sha256": digest([out]),
            "command": cli.command(
                "measure_trajectory", config.preset, config, PRESETS[config.preset]
            ),
            "versions": workdir.versions(),
            "explained": pca.explained.tolist(),
            "references": names,
        })  # fmt: skip
    shares = ", ".join(f"{share:.1%}" for share in pca.explained)
    cli.say(f"{phase}: components carry {shares} of the variance; wrote {folder}/trajectory.csv")


def _same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def table(rows, names, scores: np.ndarray) -> str:
    """One line per checkpoint of each run, numbered from 1, then one per known predictor."""
    heads = [{"run": number, "step": step} for number, step in rows]
    heads += [{"run": name, "step": ""} for name in names]
    return workdir.csv_text([
        head | {f"pc{i}": float(x) for i, x in enumerate(score, 1)}
        for head, score in zip(heads, scores, strict=True)
    ])  # fmt: skip


class Paths(NamedTuple):
    """Results of a workdir.

    Attributes:
      steps: of the checkpoints of the first run, [N].
      pca: `metrics.trajectory.PCA` of these and the references, shares those of all runs together.
      references: names of the known predictors.
      others: scores of the checkpoints of each further run, [N', k].
    """

    steps: np.ndarray
    pca: Any
    references: list[str]
    others: list[np.ndarray]


def load(folder: pathlib.Path) -> Paths:
    """Reads the results back."""
    from llc_jax.metrics.trajectory import PCA
    from llc_jax.storage.files import read_json

    content = read_json(folder / "trajectory.json")
    with open(folder / "trajectory.csv", encoding="utf-8") as file:
        scores = np.array([row[2:] for row in csv.reader(file)][1:], float)
    steps = [np.array(of) for of in content["steps"]]
    mine, *others, ideal = np.split(scores, np.cumsum([of.size for of in steps]))
    pca = PCA(
        scores=np.concatenate([mine, ideal]), explained=np.array(content["explained"]),
        num_fitted=steps[0].size,
    )  # fmt: skip
    return Paths(steps[0], pca, content["references"], others)


if __name__ == "__main__":
    cli.main(PRESETS, run)
