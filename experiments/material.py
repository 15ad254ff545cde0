"""What there is to draw of a workdir: the results of all experiments, read back."""

import pathlib
from typing import Any, NamedTuple

from experiments import (
    estimate_llc,
    find_stages,
    measure_curvature,
    measure_trajectory,
    measuring,
    settings,
    vary_llc,
    workdir,
)


class Material(NamedTuple):
    """What there is to draw; behavior and trajectory are None where nothing was measured.

    Attributes:
      setting: of the run.
      metrics: lines of the training log.
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

    setting: settings.Setting
    metrics: list[dict[str, float]]
    baselines: dict[str, float]
    sweep: Any
    curve: Any
    stages: list
    kernel: str
    curvature: dict
    behavior: Any
    trajectory: Any
    variations: list[dict[str, Any]]


def records(config) -> dict[str, pathlib.Path]:
    """The record of every experiment that this workdir has results of; the first three it must.

    Raises:
      ValueError: if one of these is missing.
    """
    root, folder = pathlib.Path(config.workdir), estimate_llc.results_folder(config)
    needed = {
        "training": root / "train.json",
        "estimates": folder / "config.json",
        "stages": folder / "stages.json",
    }
    for name, path in needed.items():
        if not path.exists():
            raise ValueError(f"{path} is missing: run the experiment that makes the {name} first.")
    optional = {
        "curvature": (measure_curvature.folder_of(config), "records.jsonl", "config.json"),
        "behavior": (measuring.folder_of(config), "behavior.csv", "config.json"),
        "trajectory": (measure_trajectory.folder_of(config), "trajectory.csv", "trajectory.json"),
    }
    return needed | {
        name: where / record
        for name, (where, result, record) in optional.items()
        if (where / result).exists()
    }


def inputs(config) -> str:
    """Digest of everything that figures are made of, the code that draws them included."""
    from llc_jax.storage.files import digest
    from llc_jax.storage.results import finished_steps, result_path

    root, folder = pathlib.Path(config.workdir), estimate_llc.results_folder(config)
    found = records(config)
    sources = pathlib.Path(__file__).parents[1] / "llc_jax"
    behavior, trajectory = measuring.folder_of(config), measure_trajectory.folder_of(config)
    return digest(
        [*found.values(), root / "metrics.jsonl"]
        + sorted([*sources.glob("report/*.py"), *sources.glob("figures/*.py")])
        + sorted([*sources.glob("problems/*/*figures.py"), sources / "metrics/trajectory.py"])
        + [pathlib.Path(__file__).with_name("make_figures.py")]
        + [*measure_curvature.folder_of(config).glob("records.jsonl")]
        + [*behavior.glob("behavior.csv"), *behavior.glob("texts.json")]
        + [*trajectory.glob("trajectory.csv")]
        + [result_path(folder, s) for s in finished_steps(folder)]
    )


def load(config) -> Material:
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
    data, _ = settings.data_set(
        config.workdir, sampled["config"]["num_data"], sampled["config"]["data_seed"]
    )
    behavior = trajectory = None
    if "behavior" in found:
        behavior = results.load(measuring.folder_of(config), "measure_behavior or measure_language")
    if "trajectory" in found:
        trajectory = measure_trajectory.load(measure_trajectory.folder_of(config))
    setting = settings.load(config.workdir)
    return Material(
        setting=setting,
        metrics=workdir.read_jsonl(pathlib.Path(config.workdir) / "metrics.jsonl"),
        baselines=setting.baselines(data),
        sweep=sweep,
        curve=curve,
        stages=find_stages.load_stages(found["stages"]),
        kernel=kernel,
        curvature=measure_curvature.load(measure_curvature.folder_of(config)),
        behavior=behavior,
        trajectory=trajectory,
        variations=vary_llc.load(vary_llc.folder_of(config)),
    )
