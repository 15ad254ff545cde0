"""Draws every figure of a workdir into `figures/`, from what the other experiments left there.

    python -m experiments.make_figures --workdir=runs/quickstart

Loss and λ̂ over training, chains, slopes, what the problem adds; and where there are results for
them, curvature, behaviour and structure, the path in function space, and how λ̂ depends on the
settings.
"""

import dataclasses
import pathlib
from typing import Any

from experiments import cli, measure_behavior, vary_llc, workdir_results
from experiments.cli import option
from experiments.presets import Presets
from experiments.workdir_results import Results


@dataclasses.dataclass(frozen=True)
class Config(cli.Run):
    """Settings of the figures."""

    name: str = option("llc", "Folder of the estimates within the workdir.")
    published_init: bool = option(False, "Also λ̂ with the init loss of the published LM curve.")


PRESETS = Presets("make_figures", Config)


def page(found: Results) -> dict[str, Any]:
    """The figures of the report, in its order."""
    from llc_jax.figures.curvature import curvature_figure
    from llc_jax.figures.trajectory import trajectory_figure
    from llc_jax.report import page as report

    known = dict(zip(found.sweep.checkpoint.values, found.sweep.init_loss.values, strict=True))
    curve = found.train_curve or known
    drawn = report.render_figures(
        found.sweep,
        train_steps=list(curve),
        train_losses=list(curve.values()),
        train_label="training loss" if found.train_curve else "loss of the checkpoints",
        baselines=found.baselines,
        curve=found.curve,
        stages=found.stages,
    )
    if found.curvature:
        drawn["curvature"] = curvature_figure(
            found.sweep, found.curvature, curve=found.curve, stages=found.stages
        )
    drawn |= found.problem.figures(found)
    if found.trajectory is not None:
        steps, pca, names, others = found.trajectory
        drawn["trajectory"] = trajectory_figure(
            steps, pca, stages=found.stages, references=names, others=others
        )
    return drawn


def more(found: Results) -> dict[str, Any]:
    """The figures that would overload the report."""
    from llc_jax.figures.llc import slopes_figure
    from llc_jax.stages.smoothing import smooth_curve

    sweep = found.sweep
    curves = {"λ̂": (sweep.checkpoint.values, sweep.llc.values, found.curve)}
    for name, (steps, values) in found.problem.curves(found).items():
        if steps.size >= 4:
            curves[name] = (steps, values, smooth_curve(steps, values, kernel=found.kernel))
    slopes = {"slopes": slopes_figure(curves, stages=found.stages)}
    return slopes | found.problem.details(found)


def write_pages(config, found: Results) -> list[str]:
    """Writes the pages of the problem; those of stages that are no more go."""
    from llc_jax.storage.files import write_atomic

    pages = found.problem.pages(measure_behavior.folder_of(config), found)
    folder = pathlib.Path(config.workdir) / "figures"
    for old in folder.glob("*.html"):
        if old.stem not in pages:
            old.unlink()
    for name, html in pages.items():
        write_atomic(folder / f"{name}.html", html)
    return list(pages)


def run(config: Config, phase: str = "figures") -> None:
    """Writes `figures/*.png`."""
    from llc_jax.figures.base import png
    from llc_jax.figures.llc import published_init_figure
    from llc_jax.storage.files import write_atomic

    folder = pathlib.Path(config.workdir) / "figures"
    measure_behavior.metrics(config)
    found = workdir_results.load(config)
    drawn = page(found) | more(found)
    if config.published_init:
        drawn["published_init"] = published_init_figure(found.sweep, stages=found.stages)
    if found.variations:
        drawn |= vary_llc.drawn(found.variations)
    for name, figure in drawn.items():
        write_atomic(folder / f"{name}.png", png(figure))
    write_pages(config, found)
    cli.say(f"{phase}: wrote {len(drawn)} figures to {folder}")


if __name__ == "__main__":
    cli.main(PRESETS, run)
