"""Writes the report of a workdir: one HTML page, its figures as PNG, a table as CSV.

    python -m experiments.make_report --workdir=runs/quickstart

Reads what the other experiments left there, whichever ran, and computes nothing anew but the
smooth curve. `make_figures` draws some more, which would overload the page.
"""

import dataclasses
import pathlib

from experiments import cli, make_figures, material, settings
from experiments.cli import option


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the report."""

    workdir: str = option("runs/quickstart", "Folder of the training run.")
    preset: str = option("quickstart", "Name of the preset.")
    name: str = option("llc", "Folder of the estimates within the workdir.")


def smoke() -> Config:
    """For the smoke run."""
    return Config(workdir="runs/smoke", preset="smoke")


def quickstart() -> Config:
    """For the quickstart run."""
    return Config()


def small() -> Config:
    """For the small run."""
    return Config(workdir="runs/small", preset="small")


def paper() -> Config:
    """For the published run."""
    return Config(workdir="runs/paper", preset="paper")


PRESETS = {p.__name__: p() for p in (smoke, quickstart, small, paper)}
TEXTS = (
    "Texts with every token coloured by how much better or worse it is predicted at the end of a"
    " stage than at its start, a page for each stage, beside this one:"
)


def run(config: Config, phase: str = "report") -> None:
    """Writes `report.html`, `results.csv` and `figures/*`, unless they are up to date."""
    from llc_jax.storage.files import read_json, write_atomic, write_json

    root = pathlib.Path(config.workdir)
    setting = settings.load(config.workdir)
    records, inputs = material.records(config), material.inputs(config)
    page = root / "report.html"
    record = root / "report.json"  # beside the page, which is that of the last --name
    if page.exists() and record.exists() and read_json(record)["inputs"] == inputs:
        cli.say(f"{phase}: {page} is up to date")
        return

    from llc_jax.figures import base
    from llc_jax.report import page as report

    contents = {name: read_json(path) for name, path in records.items()}
    found = material.load(config)
    drawn, texts = make_figures.page(found), make_figures.texts(config, found)
    places = [pathlib.PurePosixPath("figures", f"{name}.html") for name in texts]
    html = report.render(
        title=f"Loss landscape of {root.name}: {setting.title}",
        sweep=found.sweep,
        stages=found.stages,
        figures=drawn,
        configs={name: content["config"] for name, content in contents.items()},
        versions=contents["estimates"]["versions"],
        hashes={
            "data set of the estimates (SHA-256)": contents["estimates"]["data_sha256"],
            "estimates (SHA-256)": contents["stages"]["inputs"],
        },
        command="\n".join(content["command"] for content in contents.values()),
        extra_sections=[("Texts", TEXTS, *places)] if places else [],
    )
    make_figures.write_texts(root / "figures", texts)
    for name, figure in drawn.items():
        write_atomic(root / "figures" / f"{name}.png", base.png(figure))
    write_atomic(root / "results.csv", report.results_csv(found.sweep))
    write_atomic(page, html)
    write_json(record, {"inputs": inputs})
    cli.say(f"{phase}: wrote {page}, results.csv, figures/*.png")


if __name__ == "__main__":
    cli.main(PRESETS, run)
