"""Draws every figure of a workdir into `figures/`, from what the other experiments left there.

    python -m experiments.make_figures --workdir=runs/quickstart

Loss and λ̂ over training, λ̂ of every token, chains, slopes; and where there are results for them,
curvature, behaviour, structure, attention of every head, layer norms, the path in function space,
and how λ̂ depends on the settings.
"""

import dataclasses
import pathlib
from typing import Any

from experiments import (
    cli,
    material,
    measuring,
    train_language,
    train_regression,
    vary_llc,
)
from experiments.cli import option


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the figures."""

    workdir: str = option("runs/quickstart", "Folder of the training run.")
    preset: str = option("quickstart", "Name of the preset.")
    name: str = option("llc", "Folder of the estimates within the workdir.")
    published_init: bool = option(False, "Also λ̂ with the init loss of the published LM curve.")


PRESETS = {
    name: Config(workdir=training.workdir, preset=name)
    for name, training in train_regression.PRESETS.items()
}


def page(found: material.Material) -> dict[str, Any]:
    """The figures of the report, in its order."""
    from llc_jax.figures.curvature import curvature_figure
    from llc_jax.figures.trajectory import trajectory_figure
    from llc_jax.report import page as report

    drawn = report.render_figures(
        found.sweep,
        train_steps=[m["step"] for m in found.metrics],
        train_losses=[m["loss"] for m in found.metrics],
        baselines=found.baselines,
        curve=found.curve,
        stages=found.stages,
    )
    if "parts" in found.sweep:
        drawn |= parts(found)
    if found.curvature:
        drawn["curvature"] = curvature_figure(
            found.sweep, found.curvature, curve=found.curve, stages=found.stages
        )
    if found.behavior is not None:
        drawn |= behavior(found)
    if found.trajectory is not None:
        steps, pca, names, others = found.trajectory
        drawn["trajectory"] = trajectory_figure(
            steps, pca, stages=found.stages, references=names, others=others
        )
    return drawn


def parts(found: material.Material) -> dict[str, Any]:
    """λ̂ of the parts of the loss."""
    from llc_jax.problems.language.datasets import octave_ranges
    from llc_jax.problems.regression.behavior_figures import tokens_figure

    if found.setting.experiment == "train_regression":
        return {"tokens": tokens_figure(found.sweep, stages=found.stages)}
    ranges = octave_ranges(found.setting.training.context - 1)
    labels = [f"{a}" if a == b else f"{a} to {b}" for a, b in ranges]
    return {
        "octaves": tokens_figure(found.sweep, stages=found.stages, part="tokens", labels=labels)
    }


def behavior(found: material.Material) -> dict[str, Any]:
    """Behaviour and structure, for the report."""
    from llc_jax.problems.language import figures as language_figures
    from llc_jax.problems.regression import behavior_figures, structure_figures

    measured, stages = found.behavior, found.stages
    if found.setting.experiment == "train_regression":
        return {
            "behavior": behavior_figures.behavior_figure(measured, stages=stages),
            "structure": structure_figures.structure_figure(measured, stages=stages),
        }
    return {
        "language": language_figures.behavior_figure(measured, stages=stages),
        "heads": language_figures.heads_figure(measured, stages=stages),
    }


def more(found: material.Material) -> dict[str, Any]:
    """The figures that would overload the report."""
    from llc_jax.problems.regression import behavior_figures
    from llc_jax.stages.smoothing import smooth_curve

    sweep = found.sweep
    curves = {"λ̂": (sweep.checkpoint.values, sweep.llc.values, found.curve)}
    if found.behavior is None:
        return {"slopes": behavior_figures.slopes_figure(curves, stages=found.stages)}
    steps = found.behavior.checkpoint.values
    for name, values in (
        ("loss", found.behavior.mean_loss.values),
        ("weight norm", found.behavior.weight_norm.values),
    ):
        if steps.size >= 4:
            curves[name] = (steps, values, smooth_curve(steps, values, kernel=found.kernel))
    slopes = {"slopes": behavior_figures.slopes_figure(curves, stages=found.stages)}
    return slopes | details(found)


def details(found: material.Material) -> dict[str, Any]:
    """Structure in detail."""
    from llc_jax.problems.language import figures as language_figures
    from llc_jax.problems.language.structure import random_composition
    from llc_jax.problems.regression import structure_figures

    measured, stages = found.behavior, found.stages
    if found.setting.experiment == "train_regression":
        return {"norms": structure_figures.norms_figure(measured, stages=stages)} | {
            f"attention_{name}": structure_figures.attention_figure(measured, name, stages=stages)
            for name in structure_figures.ATTENTION
        }
    drawn = {
        "positions": language_figures.positions_figure(measured, stages=stages),
        "embedding": language_figures.embedding_figure(measured, stages=stages),
    }
    if "k_composition" in measured:
        baseline = random_composition(train_language.model(found.setting.training))
        drawn["composition"] = language_figures.composition_figure(
            measured, baseline, stages=stages
        )
    return drawn


def texts(config, found: material.Material) -> dict[str, str]:
    """A page for each stage: texts, coloured by how their prediction changed over it."""
    import numpy as np

    from llc_jax.report.heatmap import heatmap_html
    from llc_jax.storage.files import read_json

    path = measuring.folder_of(config) / "texts.json"
    if found.behavior is None or "text_log_probs" not in found.behavior or not path.exists():
        return {}
    steps, log_probs = found.behavior.checkpoint.values, found.behavior.text_log_probs.values
    pages = {}
    for number, stage in enumerate(found.stages, 1):
        first, last = (int(np.argmin(np.abs(steps - s))) for s in (stage.start, stage.end))
        pages[f"texts_stage_{number}"] = heatmap_html(
            read_json(path), log_probs[last] - log_probs[first],
            title=f"Stage {number}: what steps {steps[first]:,} to {steps[last]:,} changed",
        )  # fmt: skip
    return pages


def write_texts(folder: pathlib.Path, pages: dict[str, str]) -> None:
    """Writes what `texts` returned; pages of stages that are no more go."""
    from llc_jax.storage.files import write_atomic

    for old in folder.glob("texts_stage_*.html"):
        if old.stem not in pages:
            old.unlink()
    for name, html in pages.items():
        write_atomic(folder / f"{name}.html", html)


def run(config: Config, phase: str = "figures") -> None:
    """Writes `figures/*.png`."""
    from llc_jax.figures.base import png
    from llc_jax.problems.language.figures import published_init_figure
    from llc_jax.storage.files import write_atomic

    folder = pathlib.Path(config.workdir) / "figures"
    found = material.load(config)
    drawn = page(found) | more(found)
    if config.published_init:
        drawn["published_init"] = published_init_figure(found.sweep, stages=found.stages)
    if found.variations:
        drawn |= vary_llc.drawn(found.variations)
    for name, figure in drawn.items():
        write_atomic(folder / f"{name}.png", png(figure))
    write_texts(folder, texts(config, found))
    cli.say(f"{phase}: wrote {len(drawn)} figures to {folder}")


if __name__ == "__main__":
    cli.main(PRESETS, run)
