"""The JAX side of `compare_devinterp`: `llc_jax.estimate_llc` on the stored problem."""

import pathlib
import sys

import jax
import numpy as np

from experiments.benchmarks import compare_problems, compare_worker, timing
from llc_jax import BAOAB, SGLD, estimate_llc

SAMPLERS = {
    "SGLD": lambda settings: SGLD(settings["step_size"]),
    # Friction of the flattest direction, γ, as `BAOAB` advises. Without step bias on quadratics it
    # can afford twice the step size at a smaller error.
    "BAOAB": lambda settings: BAOAB(2 * settings["step_size"], 2 * settings["localization"] ** 0.5),
}


def main(folder: pathlib.Path) -> None:
    """Serves runs of `estimate_llc` on the problem in `folder`."""
    compare_worker.forget_peak()
    baseline = compare_worker.peak_bytes()
    jax.config.update("jax_num_cpu_devices", timing.cores())
    stored = compare_worker.load(folder)
    settings = stored.settings
    loss_fn, params, data = compare_problems.of_stored(stored)

    def run(num_draws: int, num_burnin: int, seed: int, sampler: str) -> dict[str, np.ndarray]:
        estimate = estimate_llc(
            jax.random.key(seed), loss_fn, params, data, sampler=SAMPLERS[sampler](settings),
            nbeta=settings["nbeta"], localization=settings["localization"],
            num_chains=settings["num_chains"], num_draws=num_draws, num_burnin=num_burnin,
            batch_size=settings["batch_size"], num_probes=0,
        )  # fmt: skip
        return {"losses": estimate.losses, "anchor_losses": estimate.anchor_losses}

    compare_worker.serve({"baseline_bytes": baseline}, run)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
