"""How local λ̂ is: one network, two known coefficients, and localization that chooses between them.

    python -m experiments.locality

Two layers with more rank than their product are a true parameter whose local coefficient is known
and larger than Aoyagi's, the least of all true parameters (`DeepLinearNet.llc`). At a fixed ratio
nβ/γ chains go a distance of about sqrt(d/γ), d the number of weights: far ones meet the more
degenerate parameters, near ones do not. Writes `locality.csv` and `locality.png`.
Two cores: a minute. Expected: λ̂ climbs from Aoyagi's value to the local one.
"""

import dataclasses
import math
import pathlib

import numpy as np

from experiments import cli, workdir
from experiments.cli import option
from experiments.presets import Presets
from experiments.workdir import numbers


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings."""

    workdir: str = option("runs/locality", "Folder of the results.")
    preset: str = option("two", "Name of the preset.")
    networks: str = option("4,3", "Numbers of networks of `benchmark_dln`, with two layers each.")
    generator: str = option("svd_truncated", "svd_truncated or zeroed.")
    seed: int = option(0, "Seed of networks and chains.")
    localizations: str = option("3,10,30,100,300,1000,3000,10000,30000,100000", "Values of γ.")
    ratio: float = option(3000.0, "nβ/γ.")
    step_fraction: float = option(0.3, "Step size in units of 1/Λ.")
    num_chains: int = option(4, "Chains per setting.")
    num_draws: int = option(3000, "Draws per chain after burn-in.")
    num_burnin: int = option(2000, "Draws per chain thrown away first.")
    thinning: int = option(4, "Steps per draw.")


PRESETS = Presets("locality", Config)


def stiffness(params, nbeta: float, localization: float) -> float:
    """A bound on the curvature of the posterior that chains meet.

    The Hessian of |W_2 W_1 - W*|² is at most 2 (|W_1|² + |W_2|²) near a true parameter, and a
    layer that localization alone holds has moved by a random matrix of norm at most about
    (sqrt(rows) + sqrt(columns)) / sqrt(γ).
    """
    norms = [
        np.linalg.norm(w, 2) + sum(map(math.sqrt, w.shape)) / math.sqrt(localization)
        for w in params
    ]
    return 2 * nbeta * float(np.sum(np.square(norms))) + localization


def measure(config: Config, index: int) -> list[dict]:
    """λ̂ of one network at every localization, as one program; a row each."""
    import llc_jax
    from experiments import benchmark_dln
    from llc_jax.problems.deep_linear import model as deep_linear

    source = dataclasses.replace(
        benchmark_dln.PRESETS["1K"], generator=config.generator, seed=config.seed
    )
    widths, net, key = benchmark_dln.network(source, index)
    if len(net.params) != 2:
        raise ValueError(
            f"networks={config.networks!r}: number {index} has {len(net.params)} layers; the local"
            " coefficient is known for two."
        )
    gammas = np.array(numbers(config.localizations))
    nbetas = config.ratio * gammas
    steps = [
        config.step_fraction / stiffness(net.params, *pair)
        for pair in zip(nbetas, gammas, strict=True)
    ]
    estimates = llc_jax.estimate_llc_over_settings(
        key, deep_linear.PopulationLoss(), net.params, net.batch,
        sampler=llc_jax.BAOAB(1.0, 1.0).with_step_size(np.array(steps), gammas), nbeta=nbetas,
        localization=gammas, num_chains=config.num_chains, num_draws=config.num_draws,
        num_burnin=config.num_burnin, thinning=config.thinning,
    )  # fmt: skip
    aoyagi, _ = deep_linear.aoyagi_coefficient(widths, net.rank)
    return [
        {
            "network": index, "widths": "-".join(map(str, widths)), "rank": net.rank,
            "aoyagi": aoyagi, "local": net.llc, "localization": gamma, "nbeta": nbeta,
            "distance": float(np.sqrt(np.mean(e.distance**2))), "llc": e.mean, "stderr": e.stderr,
            "rhat": e.rhat, "ess": e.ess, "stability": e.worst_stability, "verdict": e.verdict,
        }
        for gamma, nbeta, e in zip(gammas, nbetas, estimates.ravel(), strict=True)
    ]  # fmt: skip


def figure(rows: list[dict]):
    """λ̂ against the distance of the chains, a panel per network."""
    from llc_jax.figures.base import CHAIN_COLORS, INK, LLC, InlineFigure, log_number_axis

    names = list(dict.fromkeys(r["network"] for r in rows))
    fig = InlineFigure(figsize=(5 * len(names), 3.8), layout="constrained")
    for ax, name in zip(np.atleast_1d(fig.subplots(1, len(names))), names, strict=True):
        mine = [r for r in rows if r["network"] == name]
        x, y, error = (np.array([r[k] for r in mine]) for k in ("distance", "llc", "stderr"))
        ax.errorbar(x, y, error, fmt="o-", ms=4, lw=1, color=CHAIN_COLORS[0], label="± 1 s.e.")
        for key, style, label in (("local", "-", "local"), ("aoyagi", "--", "Aoyagi's")):
            value = mine[0][key]
            ax.axhline(value, color=INK, lw=1, ls=style, label=f"{label} coefficient, {value:g}")
        ax.set(
            xscale="log", xlabel="root mean squared distance of the chains", ylabel=LLC,
            title=f"widths {mine[0]['widths']}, rank {mine[0]['rank']}",
        )  # fmt: skip
        log_number_axis(ax.xaxis, 1, 3)
        ax.legend(fontsize=8)
    return fig


def run(config: Config, phase: str = "locality") -> None:
    """Measures all networks and writes the table and the figure."""
    from llc_jax.figures.base import png
    from llc_jax.storage.files import write_atomic

    folder = pathlib.Path(config.workdir)
    indices = [int(number) for number in numbers(config.networks)]
    with workdir.lock(folder, "locality"):
        rows = [row for index in indices for row in measure(config, index)]
        facts = {"command": cli.command(config, PRESETS)}
        workdir.settle(folder / "config.json", cli.identity(config), facts=facts)
        write_atomic(folder / "locality.csv", workdir.csv_text(rows))
        write_atomic(folder / "locality.png", png(figure(rows)))
    for r in rows:
        cli.say(
            f"{phase}: widths {r['widths']}, γ {r['localization']:g}, distance"
            f" {r['distance']:.3g}: {r['llc']:.1f} ± {r['stderr']:.1f}"
            f" (local {r['local']:g}, Aoyagi {r['aoyagi']:g}), {r['verdict']}"
        )
    cli.say(f"{phase}: wrote {folder}/locality.csv, locality.png")


if __name__ == "__main__":
    cli.main(PRESETS, run, default="two")
