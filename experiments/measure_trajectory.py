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

from experiments import cli, workdir
from experiments.cli import option
from experiments.presets import Presets


@dataclasses.dataclass(frozen=True)
class Config(cli.Run):
    """Settings of the analysis."""

    also: str = option("", "Further workdirs of the same task, separated by commas.")
    seed: int = option(3000, "Seed of the sequences, or of the positions in held-out text.")
    num_sequences: int = option(128, "Sequences; fewer if the held-out text has fewer.")
    all_outputs: bool = option(False, "Regression: all outputs, as published, not predictions.")
    log_probs: bool = option(False, "Language: log-probabilities, not logits as published.")
    num_components: int = option(3, "Principal components.")
    block: int = option(128, "Sequences at once; bounds memory.")
    checkpoint_batch: int = option(2, "Checkpoints at once, over the devices; bounds memory.")


PRESETS = Presets("measure_trajectory", Config)
MEMORY = ("block", "checkpoint_batch")


def folder_of(config) -> pathlib.Path:
    """Returns the folder of the results."""
    return pathlib.Path(config.workdir) / "trajectory"


def run(config: Config, phase: str = "trajectory") -> None:
    """Analyses all checkpoints there are, unless that has been done."""
    from experiments import problems
    from experiments.run import commit, is_fresh
    from llc_jax.inputs import checks
    from llc_jax.metrics.outputs import output_blocks
    from llc_jax.metrics.trajectory import functional_pca

    for name in ("num_sequences", "num_components", "block", "checkpoint_batch"):
        checks.at_least(name, getattr(config, name), 1)
    folder = folder_of(config)
    problem, *others = [problems.load(config)] + [
        problems.load(dataclasses.replace(config, workdir=other))
        for other in filter(None, config.also.split(","))
    ]
    with workdir.lock(folder, "trajectory"):
        kept = [each.saved() for each in (problem, *others)]
        steps = [workdir.good_steps(k, name=config.workdir) for k in kept]
        rows = sum(map(len, steps))
        if not 2 <= config.num_components < rows:
            raise ValueError(
                f"num_components={config.num_components}: give 2 to {rows - 1}, one less than"
                " there are checkpoints."
            )
        identity = cli.identity(config, MEMORY) | problems.identity(config, problem)
        record, known = folder / "trajectory.json", {"config": identity, "steps": steps}
        if is_fresh(record, known, "trajectory.csv"):
            cli.say(f"{phase}: up to date in {record}")
            return
        found = problem.columns(config)
        for other, name in zip(others, config.also.split(","), strict=False):
            theirs = other.columns(config)
            if theirs.outputs != found.outputs or not _same(theirs.inputs, found.inputs):
                raise ValueError(f"also={name}: trained on another task or model; give equal ones.")
        checkpoints = [(s, k[s]) for k, of in zip(kept, steps, strict=True) for s in of]
        size = len(next(iter(found.inputs.values())))
        block = min(config.block, size)
        blocks = output_blocks(
            found.outputs, checkpoints, found.inputs, list(found.references.values()), block=block,
            checkpoint_batch=config.checkpoint_batch,
        )  # fmt: skip
        counted = ((number, "", values) for number, values in enumerate(blocks, 1))
        pca = functional_pca(
            cli.progress(counted, phase, -(-size // block), "blocks"),
            config.num_components, len(checkpoints),
        )  # fmt: skip
        rows = [(number, step) for number, of in enumerate(steps, 1) for step in of]
        names = list(found.references)
        commit(
            record, known, {"trajectory.csv": table(rows, names, pca.scores)},
            command=cli.command(config, PRESETS), explained=pca.explained.tolist(),
            references=names,
        )  # fmt: skip
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
