"""Shows how λ̂ depends on every choice: what should not matter, and how estimates fail.

    python -m experiments.vary_llc --preset=quickstart --workdir=runs/quickstart

Around one base setting, and at several checkpoints: size of the data set, size of the minibatch,
loss function, seed of the chains; at the last checkpoint a grid of step size, nβ and γ with the
running λ̂; and the failures: chains that find lower losses because nothing holds them, that do not
move, that diverge, that are averaged from the start. The same command starts, continues or
estimates nothing: one line of `variations/records.jsonl` per estimate; at the end it draws
`variations.png`, `grid.png` and `failures.png`.
Expected: curves of different data sets (from 2,048 sequences on), minibatches and seeds coincide
within their errors; step size, nβ and γ move the value, so they are fixed for a whole curve.
"""

import dataclasses
import pathlib

import numpy as np

from experiments import cli, train_regression, workdir
from experiments.calibrate_sgld import numbers
from experiments.cli import option

TRACE_POINTS = 100  # of a running mean that is kept


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings; the base is varied one setting at a time."""

    workdir: str = option("runs/quickstart", "Folder of the training run.")
    preset: str = option("quickstart", "Name of the preset.")
    seed: int = option(0, "Seed of the chains.")
    data_seed: int = option(1000, "Seed of the data set.")
    checkpoints: str = option("", "Training steps, with commas; empty for num_checkpoints of them.")
    num_checkpoints: int = option(4, "Checkpoints, evenly spaced from the last backwards.")
    num_data: int = option(2048, "Sequences in the data set of the base.")
    step_size: float = option(2e-4, "SGLD step ε of the base.")
    nbeta: float = option(30.0, "nβ of the base.")
    localization: float = option(300.0, "γ of the base.")
    num_chains: int = option(2, "Chains.")
    num_draws: int = option(60, "Draws per chain after burn-in.")
    num_burnin: int = option(60, "Draws per chain thrown away first.")
    batch_size: int = option(32, "Sequences per minibatch of the base.")
    data_sizes: str = option("128,512,2048", "Sizes of the data set.")
    batch_sizes: str = option("16,32,64", "Sizes of the minibatch.")
    seeds: str = option("0,1,2", "Seeds of the chains.")
    step_factors: str = option("0.3,1,3", "Step sizes of the grid, in units of the base.")
    nbeta_factors: str = option("0.3,1,3", "nβ of the grid, in units of the base.")
    localization_factors: str = option("0.3,1,3", "γ of the grid, in units of the base.")
    grad_accum: int = option(1, "Micro-batches per minibatch; bounds memory.")
    setting_batch: int = option(0, "Settings of the grid at once; 0 for all; bounds memory.")


def smoke() -> Config:
    """Seconds."""
    return Config(
        workdir="runs/smoke", preset="smoke", num_checkpoints=2, num_data=128, num_draws=12,
        num_burnin=12, data_sizes="64,128", batch_sizes="16,32", seeds="0,1", step_factors="1",
        nbeta_factors="1,3", localization_factors="1",
    )  # fmt: skip


def quickstart() -> Config:
    """Some minutes."""
    return Config()


def small() -> Config:
    """Under an hour."""
    return Config(
        workdir="runs/small", preset="small", num_checkpoints=8, num_data=8192, step_size=5e-5,
        nbeta=100.0, localization=1000.0, num_chains=4, num_draws=300, num_burnin=200,
        data_sizes="512,2048,8192", batch_sizes="16,32,64,128",
    )  # fmt: skip


def paper() -> Config:
    """The published grids and checkpoints (arXiv 2402.02364); wants an accelerator."""
    return Config(
        workdir="runs/paper", preset="paper", num_data=2**20, step_size=3e-4, nbeta=66.67,
        localization=6.67, num_chains=8, num_draws=1000, num_burnin=1000, batch_size=1024,
        checkpoints="507,1124,3247,9375,27072,59968,121212,500000",
        data_sizes="4096,8192,65536,1048576", batch_sizes="256,1024,4096", setting_batch=9,
    )  # fmt: skip


PRESETS = {p.__name__: p() for p in (smoke, quickstart, small, paper)}


def folder_of(config) -> pathlib.Path:
    """Returns the folder of the results."""
    return pathlib.Path(config.workdir) / "variations"


def variations(config: Config) -> list[tuple[str, float | str, dict]]:
    """Every variation of the base: (what, value, settings that differ from the base)."""
    sizes = [*numbers(config.data_sizes), config.num_data]
    batches = [*numbers(config.batch_sizes), config.batch_size]
    if min(sizes) < config.batch_size or config.num_data < max(batches):
        raise ValueError(
            f"data_sizes={config.data_sizes}, num_data={config.num_data} and batch_sizes="
            f"{config.batch_sizes}, batch_size={config.batch_size}: no minibatch may be larger than"
            " the data set it is drawn from."
        )
    found = [("num_data", n, {"num_data": int(n)}) for n in numbers(config.data_sizes)]
    found += [("batch_size", m, {"batch_size": int(m)}) for m in numbers(config.batch_sizes)]
    found += [("loss", name, {"loss": name}) for name in ("mean", "random prefix")]
    found += [("seed", s, {"seed": int(s)}) for s in numbers(config.seeds)]
    return found


def failures(config: Config, first: int, last: int) -> dict[str, tuple[int, dict]]:
    """What goes wrong, and where to see it: name -> (training step, settings that differ)."""
    return {
        "nothing holds the chains (γ = 0) at an untrained model": (first, {"localization": 0.0}),
        "they do not move (ε / 10,000)": (last, {"step_size": config.step_size / 1e4}),
        "they diverge (ε × 1,000)": (last, {"step_size": config.step_size * 1e3}),
        "averaged from the start (no burn-in)": (
            last, {"num_burnin": 0, "num_draws": config.num_burnin + config.num_draws},
        ),
        "the base, for comparison": (last, {}),
    }  # fmt: skip


def measure(config: Config, params, task, model, step: int, change: dict):
    """One estimate; `change` is what departs from the base."""
    import jax

    import llc_jax
    from llc_jax.losses import RegressionLoss, RegressionPrefixLoss

    base = {
        name: getattr(config, name)
        for name in ("num_data", "batch_size", "seed", "step_size", "localization", "num_draws",
                     "num_burnin")
    }  # fmt: skip
    s = {**base, "loss": "mean", **change}
    data = train_regression.draw(task, s["num_data"], config.data_seed)
    loss = RegressionLoss(model) if s["loss"] == "mean" else RegressionPrefixLoss(model)
    return llc_jax.estimate_llc(
        jax.random.key(s["seed"]), loss, params, data, step=step,
        sampler=llc_jax.SGLD(s["step_size"]), nbeta=config.nbeta, localization=s["localization"],
        num_chains=config.num_chains, num_draws=s["num_draws"], num_burnin=s["num_burnin"],
        batch_size=s["batch_size"], grad_accum=config.grad_accum, num_probes=0,
    )  # fmt: skip


def record(estimate) -> dict:
    """What is kept of an estimate: the value, its error, and what λ̂ was after fewer draws."""
    finite = estimate.diverged_at < 0
    gaps = estimate.losses[finite].astype(float) - estimate.anchor_losses[finite]
    kept = np.unique(np.linspace(1, gaps.shape[1], TRACE_POINTS).astype(int))
    mean = gaps.mean(axis=0) if finite.any() else np.full(gaps.shape[1], np.nan)
    running = np.cumsum(mean)[kept - 1] / kept * estimate.settings["nbeta"]
    return {
        "llc": estimate.mean, "stderr": estimate.stderr, "rhat": estimate.rhat,
        "verdict": estimate.verdict, "num_burnin": estimate.burnin_losses.shape[1],
        "draws": kept + estimate.burnin_losses.shape[1], "running": running,
        "distance": estimate.distance.mean(),
    }  # fmt: skip


def grid(config: Config, params, task, model, step: int) -> list[dict]:
    """The grid of step size, nβ and γ as one program."""
    import jax

    import llc_jax
    from llc_jax.losses import RegressionLoss

    data = train_regression.draw(task, config.num_data, config.data_seed)
    factors = [np.array(numbers(getattr(config, name))) for name in
               ("step_factors", "nbeta_factors", "localization_factors")]  # fmt: skip
    steps, nbetas, gammas = (
        base * f.reshape([-1 if i == axis else 1 for i in range(3)])
        for axis, (base, f) in enumerate(
            zip((config.step_size, config.nbeta, config.localization), factors, strict=True)
        )
    )
    found = llc_jax.estimate_llc_over_settings(
        jax.random.key(config.seed), RegressionLoss(model), params, data, step=step,
        sampler=llc_jax.SGLD(steps), nbeta=nbetas, localization=gammas,
        num_chains=config.num_chains, num_draws=config.num_draws, num_burnin=config.num_burnin,
        batch_size=config.batch_size, grad_accum=config.grad_accum,
        setting_batch=config.setting_batch or None, num_probes=0,
    )  # fmt: skip
    names = ("step_size", "nbeta", "localization")
    return [{name: e.settings[name] for name in names} | record(e) for e in found.ravel()]


def run(config: Config, phase: str = "variations") -> None:
    """Estimates what is missing and draws everything."""
    from llc_jax import checks
    from llc_jax.checkpoints import CheckpointDir
    from llc_jax.figures import png
    from llc_jax.files import read_json, write_atomic
    from llc_jax.variation_figures import failures_figure, grid_figure, variations_figure

    folder = folder_of(config)
    model, task = train_regression.setting(train_regression.load_config(config.workdir))
    kept = CheckpointDir(pathlib.Path(config.workdir) / "checkpoints")
    every = workdir.good_steps(kept)
    work = variations(config)
    checks.at_least("num_checkpoints", config.num_checkpoints, 1)
    for name in ("num_chains", "num_draws", "grad_accum"):
        checks.at_least(name, getattr(config, name), 1)
    if not config.nbeta > 0:
        raise ValueError(f"nbeta={config.nbeta}: give a number above 0.")
    steps = workdir.chosen(every, config.checkpoints)
    if not config.checkpoints:
        index = np.linspace(len(every) - 1, 0, config.num_checkpoints).round().astype(int)
        steps = sorted({every[i] for i in index})
    begun = folder / "config.json"
    if begun.exists() and not config.checkpoints:
        steps = read_json(begun)["config"]["checkpoints"]  # there may be more by now
    with workdir.lock(folder, "variations"):
        line = cli.command("vary_llc", config.preset, config, PRESETS[config.preset])
        workdir.settle(folder / "config.json", cli.identity(config) | {"checkpoints": steps},
                       {"command": line})  # fmt: skip
        path = folder / "records.jsonl"
        workdir.rewind_torn_line(path)
        done = {(r["what"], str(r["value"]), r["step"]) for r in workdir.read_jsonl(path)}
        work = [(*v, s) for v in work for s in steps]
        work += [
            ("failure", name, change, step)
            for name, (step, change) in failures(config, steps[0], steps[-1]).items()
        ]
        work += [("grid", "", {}, steps[-1])]
        work = [w for w in work if (w[0], str(w[1]), w[3]) not in done]

        def finish():
            for count, (what, value, change, step) in enumerate(work, 1):
                params = kept.restore_params(step)
                head = {"what": what, "value": value, "step": step}
                if what == "grid":
                    found = {"grid": grid(config, params, task, model, step)}
                else:
                    found = record(measure(config, params, task, model, step, change))
                workdir.append_jsonl(path, head | found)
                yield count, f" {what} {value} at step {step}", None

        for _ in cli.progress(finish(), phase, len(work), "estimates"):
            pass
        records = workdir.read_jsonl(path)
        write_atomic(folder / "variations.png", png(variations_figure(records)))
        write_atomic(folder / "grid.png", png(grid_figure(records)))
        write_atomic(folder / "failures.png", png(failures_figure(records)))
    cli.say(f"{phase}: wrote {folder}/variations.png, grid.png, failures.png")


if __name__ == "__main__":
    cli.main(PRESETS, run)
