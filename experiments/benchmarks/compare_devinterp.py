"""Side by side with devinterp 2.0.1, on the same weights, data and settings.

    make bench-devinterp
    python -m experiments.benchmarks.compare_devinterp --problems=regression --output=DIR

devinterp runs on torch, in an environment of its own, through its public `llc`; we run through
the public `estimate_llc`. Each has a process of its own for each problem, so that neither sees
the other's threads or memory; they are warm, and run in turn, never at once. Every round is a new
seed; all rounds together give the estimate.

How the two are put on a par:
* Before anything is timed the losses of both models must agree at shifted weights.
* devinterp's `llc` averages the burn-in in. Here its loss trace is cut first, and
  λ̂ = nbeta (mean of the trace after burn-in - its initial loss).
* devinterp gets what is best for it: no progress bar, no metrics, no observables, its samples
  deleted out of the time, rows that are quick to read, fused attention and cross entropy, the
  better of one thread and one per core, independent minibatches per chain, a frozen garbage
  collector. Its chains run one after another, which is how `llc` is made. Where that leaves a
  core idle, the processor time of a step says what two processes of it could gain.
* Ours uses a device per core, and no probes, which devinterp has not either.
"""

import contextlib
import csv
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from experiments.benchmarks import compare_problems, compare_results, compare_worker, timing
from experiments.benchmarks.compare_results import OTHER, OURS, THEIRS, Measured, Shape
from experiments.cli import option

TARGETS = (0.05, 0.01)
MAX_Z = 4.0
SHORT = {"num_draws": 4, "num_burnin": 4}
WORKERS = {"ours": "llc_jax_worker", "theirs": "devinterp_worker"}
PROGRAMS = {
    OURS: ("ours", {"sampler": "SGLD"}),
    OTHER: ("ours", {"sampler": "BAOAB"}),
    THEIRS: ("theirs", {}),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    problems: str = option(",".join(compare_problems.PROBLEMS), "Which problems.")
    draws: int = option(0, "Draws after burn-in of each chain; 0 for those of the problem.")
    burnin: int = option(0, "Steps of burn-in; 0 for those of the problem.")
    rounds: int = option(3, "Rounds, each with a seed of its own.")
    torch_python: str = option(".venv-bench/bin/python", "Interpreter that has devinterp.")
    output: str = option("", "Folder for CSV, table and config.")


@contextlib.contextmanager
def worker(python: str, module: str, folder: pathlib.Path) -> Iterator[Callable[..., dict]]:
    """A process that serves runs; yields a function of the fields of a request, {} at first."""
    process = subprocess.Popen(
        [python, "-m", f"experiments.benchmarks.{module}", str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        if request:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{module} ended with exit status {process.wait()}")
        return json.loads(line)

    with process:
        try:
            yield ask
        finally:
            process.stdin.close()


def measure(
    stored: compare_worker.Stored, config: Config, folder: pathlib.Path
) -> tuple[dict[str, Measured], dict[str, Any]]:
    """Runs all programs on a problem; returns them and what the torch side said of itself."""
    compare_worker.save(folder, stored)
    settings = stored.settings
    full = {name: settings[name] for name in SHORT}
    # Another sampler is of interest where the posterior is stiff and the value is a reference.
    programs = {k: v for k, v in PROGRAMS.items() if k != OTHER or stored.kind == "deep_linear"}
    results = {name: {"long": [], "short": [], "gaps": []} for name in programs}
    with (
        worker(sys.executable, WORKERS["ours"], folder) as ours,
        worker(config.torch_python, WORKERS["theirs"], folder) as theirs,
    ):
        asks = {"ours": ours, "theirs": theirs}
        ready = {side: ask({}) for side, ask in asks.items()}

        def run(name: str, seed: int, lengths: dict[str, int], save: str | None = None) -> dict:
            side, options = programs[name]
            return asks[side]({**options, **lengths, "seed": seed, "save": save})

        for name, result in results.items():
            first = [run(name, 0, lengths) for lengths in (full, SHORT)]
            result["first"] = first[0]["wall"]
            result["peak"] = max(reply["peak_bytes"] for reply in first)
            result["warm"] = 0
        for seed in range(1, config.rounds + 1):
            for name in list(programs)[:: -1 if seed % 2 else 1]:
                path, result = folder / "run.npz", results[name]
                for key, lengths in (("long", full), ("short", SHORT)):
                    reply = run(name, seed, lengths, str(path) if key == "long" else None)
                    result[key].append([reply["wall"], reply["cpu"]])
                    result["warm"] = max(result["warm"], reply["peak_bytes"])
                with np.load(path, allow_pickle=False) as arrays:
                    result["gaps"].append(gaps(arrays, settings))
    torch_side = ready["theirs"]
    init = compare_results.init_stderr(
        settings["nbeta"], torch_side["example_deviation"], settings["batch_size"],
        len(next(iter(stored.data.values()))), settings["num_chains"],
    )  # fmt: skip
    measured = {}
    for name, r in results.items():
        base = ready[programs[name][0]]["baseline_bytes"]
        measured[name] = Measured(
            gaps=np.asarray(r["gaps"]),
            init_stderr=init if name == THEIRS else 0.0,
            long=np.asarray(r["long"]),
            short=np.asarray(r["short"]),
            first=r["first"] if name != THEIRS else np.nan,
            memory=max(r["peak"], r["warm"]) - base,
            memory_warm=r["warm"] - base,
        )
    return measured, torch_side


def gaps(arrays: Any, settings: dict[str, Any]) -> np.ndarray:
    """The draws nbeta (loss - initial loss) of a worker's arrays, [chain, draw], no burn-in."""
    losses = arrays["losses"].astype(np.float64)
    if "init_loss" in arrays:
        losses, start = losses[:, settings["num_burnin"] :], float(arrays["init_loss"])
    else:
        start = arrays["anchor_losses"].astype(np.float64)
    return settings["nbeta"] * (losses - start)


def run(config: Config) -> list[dict[str, Any]]:
    """Compares on every problem; prints as it goes; returns the rows of the table."""
    names = config.problems.split(",")
    for name in names:
        if name not in compare_problems.PROBLEMS:
            raise ValueError(f"problem {name!r}: choose from {list(compare_problems.PROBLEMS)}.")
    if not os.access(config.torch_python, os.X_OK):
        raise ValueError(f"{config.torch_python} is not there: run `make .venv-bench/.installed`.")
    rows, notes = [], []
    for name in names:
        problem = compare_problems.PROBLEMS[name]()
        changes = {"num_draws": config.draws, "num_burnin": config.burnin}
        settings = problem.stored.settings | {k: v for k, v in changes.items() if v}
        stored = problem.stored._replace(settings=settings)
        with tempfile.TemporaryDirectory() as folder:
            measured, torch_side = measure(stored, config, pathlib.Path(folder))
        shape = Shape(settings["num_chains"], settings["num_draws"], settings["num_burnin"])
        found = compare_results.summary(
            measured, shape, Shape(settings["num_chains"], **SHORT), problem.exact, TARGETS
        )
        found = [{"problem": name, **row} for row in found]
        rows += found
        notes.append(note(name, problem.about, measured, found, torch_side, settings))
        print(compare_results.table(found, TARGETS) + f"\n{notes[-1]}\n", flush=True)
    if config.output:
        write(pathlib.Path(config.output), config, rows, notes)
    return rows


def note(name, about, measured, rows, torch_side, settings) -> str:
    """Settings and ratios of a problem in words."""
    of = {row["program"]: row for row in rows}
    z = of[OURS]["z"]
    faster = ", ".join(
        f"{of[THEIRS][key] / of[p][key]:.1f} times fewer seconds to {t:.0%} with {p}"
        for t in TARGETS for p in of if p != THEIRS for key in [f"seconds_to_{t:g}"]
    )  # fmt: skip
    values = ", ".join(f"{k} {v:.4g}" for k, v in settings.items())
    return (
        f"{name}: {about}. {values}. The estimates {'agree' if abs(z) <= MAX_Z else 'DISAGREE'}"
        f" (z = {z:.1f}). devinterp / llc_jax, time of a chain-step:"
        f" {compare_results.step_ratio(measured)}, of the processor"
        f" {compare_results.step_ratio(measured, 1)}; {faster}. Losses of the models differ by"
        f" {torch_side['agreement']:.1g} at most; torch {torch_side['torch']} with"
        f" {torch_side['threads']} thread(s), devinterp {torch_side['devinterp']}."
        f" [{timing.machine()}]"
    )


def write(folder: pathlib.Path, config: Config, rows: list[dict], notes: list[str]) -> None:
    """Writes `comparison.csv`, `comparison.md` and `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "comparison.csv").open("w", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]))
        out.writeheader()
        out.writerows(rows)
    text = [compare_results.table(rows, TARGETS), "", *[f"* {line}" for line in notes]]
    (folder / "comparison.md").write_text("\n".join(text) + "\n")
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k != "output"}
    (folder / "config.json").write_text(
        json.dumps({**fields, "machine": timing.machine()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    timing.main(Config, run)
