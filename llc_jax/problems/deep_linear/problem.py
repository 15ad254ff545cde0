"""A random deep linear network as a `Problem`: one true parameter whose coefficient is known."""

import dataclasses

import jax

from llc_jax.problems.base import Problem
from llc_jax.problems.deep_linear import model
from llc_jax.problems.deep_linear.theory import aoyagi_coefficient

# What calibration finds for such networks; there is one example, the population.
ESTIMATES = {
    "quickstart": {
        "estimate_llc": {
            "sampler": "BAOAB", "sampler_options": "friction=3", "step_size": 7e-7, "nbeta": 1e4,
            "localization": 5.0, "num_draws": 2000, "num_burnin": 1000, "thinning": 4,
            "batch_size": 1,
        },
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DeepLinear(Problem):
    """A network at a true parameter.

    Attributes:
      widths: of its layers.
      net: the network.
    """

    widths: tuple[int, ...]
    net: model.DeepLinearNet

    @property
    def title(self) -> str:
        """The network, and what is known about it."""
        widths = "-".join(map(str, self.widths))
        return f"deep linear network {widths}, local coefficient {self.net.llc:g}"


def network(seed: int, index: int, class_name: str, generator: str = "aligned"):
    """A random network.

    Args:
      seed: of the networks.
      index: number of the network, part of its seed.
      class_name: see `model.random_architecture`.
      generator: aligned, svd_truncated or zeroed.

    Returns:
      (widths, `DeepLinearNet`, typed key for its chains).
    """
    key = jax.random.fold_in(jax.random.key(seed), index)
    shape_key, weight_key, chain_key = jax.random.split(key, 3)
    widths, rank = model.random_architecture(shape_key, class_name)
    if generator == "aligned":
        return widths, model.aligned(weight_key, widths, rank), chain_key
    makers = {"svd_truncated": model.svd_truncated, "zeroed": model.zeroed}
    return widths, makers[generator](weight_key, widths), chain_key


def problem(seed: int = 0, index: int = 0, class_name: str = "1K") -> DeepLinear:
    """The problem of one network of `network`, without data: its loss is that of the population."""
    widths, net, _ = network(seed, index, class_name)
    aoyagi, multiplicity = aoyagi_coefficient(widths, net.rank)
    settings = {
        "seed": seed, "network": index, "widths": list(widths), "rank": net.rank,
        "local coefficient": net.llc, "Aoyagi's coefficient": aoyagi, "multiplicity": multiplicity,
    }  # fmt: skip
    return DeepLinear(
        name="deep_linear", loss_fn=model.PopulationLoss(), data=lambda: net.batch,
        checkpoints=lambda: {0: net.params}, settings=settings, presets=ESTIMATES,
        widths=widths, net=net,
    )  # fmt: skip
