"""The results of all experiments on a workdir, read back."""

import pathlib
from typing import Any, NamedTuple

from experiments import (
    cli,
    estimate_llc,
    find_stages,
    measure_behavior,
    measure_curvature,
    measure_trajectory,
    problems,
    vary_llc,
)
from llc_jax.problems.base import Problem


class Results(NamedTuple):
    """What there is; behavior and trajectory are None where nothing was measured.

    Attributes:
      problem: of the run.
      train_curve: {step: training loss}; empty if it is not known.
      baselines: name -> loss of simple predictors.
      sweep: estimates, `results.load_sweep`.
      curve: `SmoothedCurve` of λ̂.
      stages: of `llc_jax.find_stages`.
      kernel: of the curve.
      curvature: step -> `llc_jax.Curvature`, empty if there is none.
      behavior: `xarray.Dataset`.
      trajectory: of `measure_trajectory.load`.
      variations: of `vary_llc.load`, empty before it has finished.
    """

    problem: Problem
    train_curve: dict[int, float]
    baselines: dict[str, float]
    sweep: Any
    curve: Any
    stages: list
    kernel: str
    curvature: dict
    behavior: Any
    trajectory: Any
    variations: list[dict[str, Any]]


# What results are, and the code that draws them.
RESULTS = (".nc", ".csv", ".json", ".jsonl")
DRAWN_BY = ("report", "figures", "metrics", "problems")


def optional(config) -> dict[str, tuple[pathlib.Path, str, str]]:
    """Of what need not be there: name -> (folder, result, record)."""
    return {
        "curvature": (measure_curvature.folder_of(config), "curvature.csv", "config.json"),
        "behavior": (measure_behavior.folder_of(config), "behavior.csv", "config.json"),
        "trajectory": (measure_trajectory.folder_of(config), "trajectory.csv", "trajectory.json"),
    }


def records(config) -> dict[str, pathlib.Path]:
    """The record of every experiment that this workdir has results of; the first ones it must.

    Raises:
      ValueError: if one of these is missing.
    """
    folder = estimate_llc.results_folder(config)
    needed = {"estimates": folder / "config.json", "stages": folder / "stages.json"}
    if not cli.stands_alone(config.problem):
        needed = {"training": pathlib.Path(config.workdir) / "train.json"} | needed
    for name, path in needed.items():
        if not path.exists():
            raise ValueError(f"{path} is missing: run the experiment that makes the {name} first.")
    return needed | {
        name: where / record
        for name, (where, result, record) in optional(config).items()
        if (where / result).exists()
    }


def inputs(config) -> str:
    """Digest of everything that figures are made of, the code that draws them included."""
    from llc_jax.storage.files import digest

    root, folder = pathlib.Path(config.workdir), estimate_llc.results_folder(config)
    code = pathlib.Path(__file__).parents[1] / "llc_jax"
    places = [
        folder, *(where for where, *_ in optional(config).values()), vary_llc.folder_of(config)
    ]  # fmt: skip
    found = [p for place in places for p in sorted(place.glob("*")) if p.suffix in RESULTS]
    sources = [p for room in DRAWN_BY for p in sorted((code / room).rglob("*.py"))]
    own = [config.problem] if config.problem.endswith(".py") else []
    return digest([root / "train.json", root / "metrics.jsonl", *found, *sources, *own])


def load(config) -> Results:
    """Reads everything."""
    from llc_jax.stages.smoothing import smooth_curve
    from llc_jax.storage import results
    from llc_jax.storage.files import read_json

    found, folder = records(config), estimate_llc.results_folder(config)
    sampled, staged = (read_json(found[name]) for name in ("estimates", "stages"))
    sweep = results.load_sweep(folder)
    kernel = staged["config"]["kernel"]
    curve = smooth_curve(
        sweep.checkpoint.values, sweep.llc.values, sweep.stderr.values, kernel=kernel
    )
    problem = problems.load(config)
    behavior = trajectory = None
    if "behavior" in found:
        behavior = results.load(measure_behavior.folder_of(config), "measure_behavior")
    if "trajectory" in found:
        trajectory = measure_trajectory.load(measure_trajectory.folder_of(config))
    data = problem.sample(sampled["config"]["num_data"], sampled["config"]["data_seed"])
    return Results(
        problem=problem,
        train_curve=problem.train_curve(),
        baselines=problem.baselines(data),
        sweep=sweep,
        curve=curve,
        stages=find_stages.load_stages(found["stages"]),
        kernel=kernel,
        curvature=measure_curvature.load(measure_curvature.folder_of(config)),
        behavior=behavior,
        trajectory=trajectory,
        variations=vary_llc.load(vary_llc.folder_of(config)),
    )
