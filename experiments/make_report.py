"""Writes the report of a workdir: one HTML page, its figures as PNG, a table as CSV.

    python -m experiments.make_report --workdir=runs/quickstart

Reads what the other experiments left there, whichever ran, and computes nothing anew but the
smooth curve, and the metrics of a problem of yours. `make_figures` draws some more, which would
overload the page.
"""

import dataclasses
import pathlib

from experiments import cli, make_figures, measure_behavior, workdir_results
from experiments.cli import option
from experiments.presets import Presets


@dataclasses.dataclass(frozen=True)
class Config(cli.Run):
    """Settings of the report."""

    name: str = option("llc", "Folder of the estimates within the workdir.")


PRESETS = Presets("make_report", Config)
TEXTS = (
    "Texts with every token coloured by how much better or worse it is predicted at the end of a"
    " stage than at its start, a page for each stage, beside this one:"
)


def run(config: Config, phase: str = "report") -> None:
    """Writes `report.html`, `results.csv` and `figures/*`, unless they are up to date."""
    from experiments.run import commit, is_fresh
    from llc_jax.storage.files import read_json, write_atomic

    root = pathlib.Path(config.workdir)
    measure_behavior.metrics(config)
    records, known = workdir_results.records(config), {"inputs": workdir_results.inputs(config)}
    record = root / "report.json"  # beside the page, which is that of the last --name
    if is_fresh(record, known, "report.html"):
        cli.say(f"{phase}: {root / 'report.html'} is up to date")
        return

    from llc_jax.figures import base
    from llc_jax.report import page as report

    contents = {name: read_json(path) for name, path in records.items()}
    found = workdir_results.load(config)
    drawn, settings = make_figures.page(found), dict(found.problem.settings)
    configs = {name: content["config"] for name, content in contents.items()}
    pages = make_figures.write_pages(config, found)
    places = [pathlib.PurePosixPath("figures", f"{name}.html") for name in pages]
    html = report.render(
        title=f"Loss landscape of {root.name}: {found.problem.title}",
        sweep=found.sweep,
        stages=found.stages,
        figures=drawn,
        configs=configs if "training" in configs else {"problem": settings} | configs,
        versions=contents["estimates"]["versions"],
        hashes={
            "data set of the estimates (SHA-256)": contents["estimates"]["data_sha256"],
            "estimates (SHA-256)": contents["stages"]["inputs"],
        },
        command="\n".join(content["command"] for content in contents.values()),
        extra_sections=[("Texts", TEXTS, *places)] if places else [],
    )
    for name, figure in drawn.items():  # make_figures writes them, too
        write_atomic(root / "figures" / f"{name}.png", base.png(figure))
    commit(record, known, {"results.csv": report.results_csv(found.sweep), "report.html": html})
    cli.say(f"{phase}: wrote {root / 'report.html'}, results.csv, figures/*.png")


if __name__ == "__main__":
    cli.main(PRESETS, run)
