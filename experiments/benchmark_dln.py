"""Estimates λ̂ of random deep linear networks, whose coefficient is known, with calibrated settings.

    python -m experiments.benchmark_dln --preset=1K
    python -m experiments.benchmark_dln --preset=10K

Each network is calibrated by `llc_jax.calibrate` with the flags below, the same for all networks,
and then estimated with what it proposes; nothing is chosen by hand. One line of `records.jsonl`
per network and sampler: the same command continues. At the end `summary.csv`, `summary.md` and
`estimates.png`: estimated against true coefficient, relative error, bias, order, work; and how much
of the error is that of finite nβ and γ, from the exact value at these settings.
"""

import dataclasses
import pathlib
import time
from typing import Any

import numpy as np

from experiments import cli, dln_summary, workdir
from experiments.cli import option
from experiments.presets import Presets
from experiments.workdir import numbers


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    workdir: str = option("runs/dln-1K", "Folder of the results.")
    preset: str = option("1K", "Name of the preset.")
    class_name: str = option("1K", "Class of networks: 1K, 10K, 100K or 1M.")
    generator: str = option("aligned", "aligned, svd_truncated or zeroed.")
    loss: str = option("population", "population (no data), or minibatch (n samples).")
    samplers: str = option("BAOAB", "Samplers, separated by commas.")
    num_networks: int = option(50, "Networks per sampler.")
    first_network: int = option(0, "Number of the first: part of its seed.")
    seed: int = option(0, "Seed of networks and chains.")
    nbeta: float = option(1e4, "Middle of the grid of nβ.")
    nbeta_factors: str = option("1,3", "nβ of the grid, in units of nbeta.")
    localization_factors: str = option("1,2,4", "γ of the grid, in units of the weakest.")
    num_draws: int = option(2500, "Draws of the grid per chain after burn-in.")
    num_burnin: int = option(2500, "Burn-in of the grid, and length of the pilot chains.")
    num_chains: int = option(4, "Chains per setting.")
    relative_stderr: float = option(0.01, "Standard error to be reached, relative to λ̂.")
    num_data: int = option(10_000, "Samples for loss=minibatch, n.")
    batch_size: int = option(500, "Samples per minibatch.")


PRESETS = Presets("benchmark_dln", Config)

# One step size per sampler as a fraction of 1/Λ: small where the step biases the law.
STEP_FRACTION = {"BAOAB": 0.4, "SGNHT": 0.4, "SGLD": 0.1, "MALA": 0.1}
GENERATORS, LOSSES = ("aligned", "svd_truncated", "zeroed"), ("population", "minibatch")
GRADIENTS_PER_STEP = {"MALA": 2}
FINITE_SWEEPS = 400


def sampler_named(name: str):
    """A sampler of this name, whose step size does not matter yet."""
    import llc_jax

    makers = {
        "SGLD": lambda: llc_jax.SGLD(1.0),
        "MALA": lambda: llc_jax.MALA(1.0),
        "BAOAB": lambda: llc_jax.BAOAB(1.0, 1.0),
        "SGNHT": lambda: llc_jax.SGNHT(1.0, 1.0),
        "AdamSGLD": lambda: llc_jax.AdamSGLD(1.0),
        "RMSPropSGLD": lambda: llc_jax.RMSPropSGLD.devinterp(1.0),
        "RMSPropSGLD-corrected": lambda: llc_jax.RMSPropSGLD.corrected(1.0),
    }
    if name not in makers:
        raise ValueError(f"samplers={name!r}: choose from {', '.join(makers)}.")
    return makers[name]()


def network(config: Config, index: int):
    """The network of this number, and the key of its chains."""
    from llc_jax.problems.deep_linear.problem import network

    return network(config.seed, index, config.class_name, config.generator)


def measure(config: Config, name: str, index: int) -> dict[str, Any]:
    """Calibrates and estimates one network with one sampler."""
    import jax

    import llc_jax
    from llc_jax.problems.deep_linear import model as deep_linear

    widths, net, key = network(config, index)
    data_key, calibration_key, estimate_key = jax.random.split(key, 3)
    options = {}
    loss_fn, data = deep_linear.PopulationLoss(), net.batch
    if config.loss == "minibatch":
        loss_fn = deep_linear.MinibatchLoss()
        data = deep_linear.sample_data(data_key, net.target, config.num_data)
        options["batch_size"] = config.batch_size
    start = time.perf_counter()
    calibration = llc_jax.calibrate(
        calibration_key, loss_fn, net.params, data, sampler=sampler_named(name),
        nbeta=config.nbeta, step_fractions=(STEP_FRACTION.get(name, 0.1),),
        nbeta_factors=numbers(config.nbeta_factors),
        localization_factors=numbers(config.localization_factors),
        num_draws=config.num_draws, num_burnin=config.num_burnin, num_chains=config.num_chains,
        relative_stderr=config.relative_stderr, **options,
    )  # fmt: skip
    middle = time.perf_counter()
    estimate = llc_jax.estimate_llc(estimate_key, loss_fn, net.params, data, **calibration.settings)
    end = time.perf_counter()
    settings = estimate.settings
    draws = settings["num_draws"] + settings["num_burnin"]
    reference, multiplicity = deep_linear.aoyagi_coefficient(widths, net.rank)
    record = {
        "sampler": name,
        "network": index,
        "widths": list(widths),
        "rank": net.rank,
        "num_params": int(sum(np.size(w) for w in net.params)),
        "aoyagi": reference,
        "multiplicity": multiplicity,
        "exact": net.llc,
        "llc": estimate.mean,
        "stderr": estimate.stderr,
        "rhat": estimate.rhat,
        "ess": estimate.ess,
        "verdict": estimate.verdict,
        "step_size": float(settings["step_size"]),
        "nbeta": settings["nbeta"],
        "localization": settings["localization"],
        "steps": draws * settings["thinning"],
        "gradients": draws * settings["thinning"] * config.num_chains
        * GRADIENTS_PER_STEP.get(name, 1),
        "gradients_of_calibration": calibration.num_steps * config.num_chains
        * GRADIENTS_PER_STEP.get(name, 1),
        "level": bool(calibration.sensitivity.level[calibration.chosen[1:]]),
        "warnings": len(calibration.warnings),
        "seconds_of_calibration": middle - start,
        "seconds": end - middle,
    }  # fmt: skip
    return record | value_at(config, record)


def value_at(config: Config, record: dict[str, Any]) -> dict[str, float]:
    """The exact value at the settings of a record: what finite nβ and γ make of the coefficient.

    By Gibbs sampling, an algorithm that has nothing to do with the sampler; nan where it does not
    apply.
    """
    import jax

    from llc_jax.problems.deep_linear import model as deep_linear

    if config.generator != "aligned" or config.loss != "population":
        return {"finite": np.nan, "finite_stderr": np.nan}
    found = deep_linear.finite_llc(
        jax.random.key(record["network"]), record["widths"], record["rank"], record["nbeta"],
        record["localization"], num_sweeps=FINITE_SWEEPS, num_burnin=FINITE_SWEEPS // 2,
    )  # fmt: skip
    return {"finite": found.mean, "finite_stderr": found.stderr}


def run(config: Config, phase: str = "dln") -> None:
    """Measures what is missing and writes the summary."""
    import jax

    # Each network has shapes of its own: nothing compiled for one is of use to another.
    jax.config.update("jax_enable_compilation_cache", False)
    from experiments.run import over_records
    from llc_jax.figures.base import png
    from llc_jax.storage.files import write_atomic

    folder = pathlib.Path(config.workdir)
    names = config.samplers.split(",")
    for name in names:
        sampler_named(name)
    for name, known in (("generator", GENERATORS), ("loss", LOSSES)):
        if getattr(config, name) not in known:
            raise ValueError(f"{name}={getattr(config, name)!r}: choose from {', '.join(known)}.")
    indices = range(config.first_network, config.first_network + config.num_networks)
    work = [({"sampler": name, "network": index}, None) for index in indices for name in names]

    def one(head, _):
        record = measure(config, head["sampler"], head["network"])
        jax.clear_caches()
        truth = record["exact"] or record["aoyagi"]
        text = f" {head['sampler']}: {record['llc']:.4g} ± {record['stderr']:.2g}, true {truth:g}"
        return record, text

    with workdir.lock(folder, "dln"):
        identity = cli.identity(config, ("samplers", "num_networks", "first_network"))
        line = cli.command(config, PRESETS)
        found = over_records(phase, folder, identity, line, work, one, "networks")
        rows = dln_summary.summary(found)
        write_atomic(folder / "records.csv", workdir.csv_text(found))
        write_atomic(folder / "summary.csv", workdir.csv_text(rows))
        write_atomic(folder / "summary.md", f"`{line}`\n\n{dln_summary.markdown(rows)}")
        title = f"Deep linear networks, class {config.class_name}, {config.generator}"
        write_atomic(folder / "estimates.png", png(dln_summary.figure(found, title)))
    cli.say(
        dln_summary.markdown(rows)
        + f"{phase}: wrote {folder}/summary.md, records.csv, estimates.png"
    )


if __name__ == "__main__":
    cli.main(PRESETS, run, default="1K")
