"""Finds the stages in an LLC curve.

    python -m experiments.find_stages --workdir=runs/quickstart

Writes `stages.json` beside the estimates. A few seconds.
"""

import dataclasses
import math
import pathlib

from experiments import cli, estimate_llc, workdir
from experiments.cli import option
from experiments.presets import Presets


@dataclasses.dataclass(frozen=True)
class Config(cli.Run):
    """Settings of the stage finder."""

    name: str = option("llc", "Folder of the estimates within the workdir.")
    kernel: str = option("fitted", "Smoother: fitted, or the published fixed kernel.")
    confidence: float = option(0.95, "Least probability of a boundary.")


PRESETS = Presets("find_stages", Config)
# What the boundaries follow from.
SOURCES = tuple(sorted(pathlib.Path(__file__).parents[1].glob("llc_jax/stages/*.py")))


def run(config: Config, phase: str = "stages") -> None:
    """Finds the stages, unless `stages.json` is up to date with estimates, settings and code."""
    from experiments.run import commit, is_fresh
    from llc_jax.stages.boundaries import find_plateaus, find_stages
    from llc_jax.storage.files import digest, read_json
    from llc_jax.storage.results import finished_steps, load_sweep, result_path

    folder = estimate_llc.results_folder(config)
    path = folder / "stages.json"
    known = {
        "config": cli.identity(config),
        "inputs": digest(result_path(folder, s) for s in finished_steps(folder)),
        "sources": digest(SOURCES),
    }
    if is_fresh(path, known):
        cli.say(f"{phase}: {_describe(read_json(path)['stages'])} (up to date)")
        return
    sweep = load_sweep(folder)
    curve = (sweep.checkpoint.values, sweep.llc.values, sweep.stderr.values)
    options = {"kernel": config.kernel, "confidence": config.confidence}
    stages = [workdir.plain(stage._asdict()) for stage in find_stages(*curve, **options)]
    plateaus = find_plateaus(*curve, **options)
    command = cli.command(config, PRESETS)
    commit(path, known, {}, command=command, stages=stages, plateaus=plateaus)
    cli.say(f"{phase}: {_describe(stages)}")


def load_stages(path: pathlib.Path):
    """Reads back the list of `llc_jax.Stage`."""
    from llc_jax.stages.boundaries import Stage
    from llc_jax.storage.files import read_json

    def restore(value):
        if isinstance(value, list):
            return tuple(value)
        return math.nan if value is None else value

    return [Stage(**{k: restore(v) for k, v in s.items()}) for s in read_json(path)["stages"]]


def _describe(stages: list[dict]) -> str:
    spans = ", ".join(f"{s['start']}-{s['end']} {s['kind']}" for s in stages)
    return f"{len(stages)} found: {spans}"


if __name__ == "__main__":
    cli.main(PRESETS, run)
