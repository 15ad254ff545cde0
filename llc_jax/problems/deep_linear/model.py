"""Deep linear networks y = W_L ... W_1 x: singular models whose learning coefficient is known.

Widths H_0 ... H_L give layers `W_k` of shape [H_k, H_{k-1}]; params are the tuple (W_1, ..., W_L).
The truth is a matrix W* of rank r, and the loss K(w) = c |W_L ... W_1 - W*|²_F for inputs with
E[x xᵀ] = c I. Everything random is drawn on the host in float64 from a typed key, so that ranks
are known by construction: in float32, a rank found by SVD is wrong for deep products.

Sources: Aoyagi 2024 ("the formula"); Aoyagi & Watanabe 2005 for two layers; Lau et al. 2023,
arXiv 2308.12108, and Furman & Lau 2024, arXiv 2402.03698, for the published random networks.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr, ndtri

from llc_jax.inputs import checks
from llc_jax.problems.deep_linear.theory import (
    aoyagi_coefficient,
    check_positive,
    check_rank,
    check_widths,
    finite_llc,
    host_rng,
    local_coefficient_two_layers,
    rank_one_llc,
)
from llc_jax.types import Batch, Params

__all__ = [
    "ARCHITECTURES", "UNIFORM_SECOND_MOMENT", "DeepLinearNet", "MinibatchLoss", "PopulationLoss",
    "aligned", "aoyagi_coefficient", "finite_llc", "local_coefficient_two_layers", "product",
    "random_architecture", "rank_one_llc", "sample_data", "svd_truncated", "zeroed",
]  # fmt: skip

_EXACT = jax.lax.Precision.HIGHEST  # the loss is a difference of products that nearly cancel

UNIFORM_SECOND_MOMENT = 100 / 3
"""c for inputs uniform on [-10, 10]^d, the published setting; standard normal inputs have c = 1,
the uniform distribution on the unit ball c = 1 / (d + 2)."""

ARCHITECTURES = {
    "1K": ((2, 5), (5, 50)),
    "10K": ((2, 10), (5, 100)),
    "100K": ((2, 10), (50, 500)),
    "1M": ((2, 20), (100, 1000)),
}
"""{class: (range of L, range of widths)}, upper ends exclusive; Furman & Lau 2024, appendix E.2."""


class DeepLinearNet(NamedTuple):
    """A network and its truth, with what is known about it. The arrays are numpy, float32.

    Attributes:
      params: (W_1, ..., W_L), `W_k` [H_k, H_{k-1}]: a true parameter, the anchor.
      target: W* [H_L, H_0], the product in float64, rounded once.
      rank: r of W*, by construction.
      llc: the exact local learning coefficient at `params`; None where only the lower bound
        `aoyagi_coefficient(widths, rank)` is known.
    """

    params: tuple[np.ndarray, ...]
    target: np.ndarray
    rank: int
    llc: float | None

    @property
    def batch(self) -> Batch:
        """The data of `PopulationLoss`: one "example", which is the whole population."""
        return {"target": self.target[None]}


# --- networks -----------------------------------------------------------------------------------


def random_architecture(rng_key: jax.Array, class_name: str) -> tuple[tuple[int, ...], int]:
    """Draws widths as published, and a rank for `aligned`.

    The number of layers, then each width, is uniform over the ranges of `ARCHITECTURES`. Class
    names are the published labels: the number of parameters is not filtered and spreads around
    them (a "1K" draw has between 50 and 9,604).

    Args:
      rng_key: typed key, consumed.
      class_name: "1K", "10K", "100K" or "1M".

    Returns:
      (widths H_0 ... H_L, rank uniform on 0 ... min(widths)).
    """
    if class_name not in ARCHITECTURES:
        raise ValueError(f"class_name={class_name!r}: choose one of {sorted(ARCHITECTURES)}.")
    (fewest, most), (narrowest, widest) = ARCHITECTURES[class_name]
    rng = host_rng(rng_key)
    num_layers = int(rng.integers(fewest, most))
    widths = tuple(int(width) for width in rng.integers(narrowest, widest, num_layers + 1))
    return widths, int(rng.integers(0, min(widths) + 1))


def aligned(rng_key: jax.Array, widths: Sequence[int], rank: int) -> DeepLinearNet:
    """A network whose local learning coefficient is Aoyagi's, at every depth.

    W_k = P_k diag(I_r, 0) P_{k-1}ᵀ with independent uniform orthogonal P_0 ... P_L. Every product
    of adjacent layers has rank r: eliminating the block I_r leaves a network of widths H_k - r at
    its origin, where the loss is homogeneous and local equals global. All nonzero singular values
    are 1, whatever the depth.

    Args:
      rng_key: typed key, consumed.
      widths: H_0 ... H_L.
      rank: r, from 0 to the least width; 0 gives all zeros.
    """
    check_widths(widths)
    check_rank("rank", rank, min(widths))
    rng = host_rng(rng_key)
    frames = [_orthogonal_columns(rng, width, rank) for width in widths]
    layers = [after @ before.T for before, after in itertools.pairwise(frames)]
    return _net(layers, frames[-1] @ frames[0].T, rank, aoyagi_coefficient(widths, rank)[0])


def svd_truncated(
    rng_key: jax.Array, widths: Sequence[int], probability: float = 0.5
) -> DeepLinearNet:
    """The random networks of Lau et al. 2023: some layers cut to a lower rank by an SVD.

    Entries are normal of variance 1/H_{k-1}, truncated at two deviations (Haiku's default); with
    `probability` a layer keeps its largest ρ singular values, ρ uniform below its full rank.
    Traps: the rank of the product, the least of the layers' (almost surely), is small in deep
    networks; and Aoyagi's λ is then often not the local value, see `DeepLinearNet.llc`.

    Args:
      rng_key: typed key, consumed.
      widths: H_0 ... H_L.
      probability: of cutting each layer, from 0 to 1.
    """
    rng, shapes, ranks = _published(rng_key, widths, probability)

    def draw(shape, rank):
        uniform = rng.uniform(ndtr(-2), ndtr(2), shape)
        u, s, vt = np.linalg.svd(ndtri(uniform) / math.sqrt(shape[1]), full_matrices=False)
        return (u[:, :rank] * s[:rank]) @ vt[:rank]

    return _generic_net(widths, list(map(draw, shapes, ranks)), ranks)


def zeroed(rng_key: jax.Array, widths: Sequence[int], probability: float = 0.5) -> DeepLinearNet:
    """The random networks of Furman & Lau 2024: some layers with rows or columns of zeros.

    Entries are normal of variance 2/(H_{k-1} + H_k) (Xavier); with `probability` a layer keeps
    the first ρ rows or columns, along its shorter side, ρ uniform below its full rank. The traps
    of `svd_truncated` hold here too.

    Args:
      rng_key: typed key, consumed.
      widths: H_0 ... H_L.
      probability: of cutting each layer, from 0 to 1.
    """
    rng, shapes, ranks = _published(rng_key, widths, probability)

    def draw(shape, rank):
        layer = rng.normal(0, math.sqrt(2 / sum(shape)), shape)
        rows, columns = shape
        (layer if rows < columns else layer.T)[rank:] = 0
        return layer

    return _generic_net(widths, list(map(draw, shapes, ranks)), ranks)


def _published(rng_key, widths, probability):
    """The common start of the published generators: shapes and ranks of the layers."""
    check_widths(widths)
    if not 0 <= probability <= 1:
        raise ValueError(f"probability={probability}: give a number from 0 to 1.")
    rng = host_rng(rng_key)
    shapes = list(zip(widths[1:], widths[:-1], strict=True))
    full = [min(shape) for shape in shapes]
    ranks = [int(rng.integers(0, f)) if rng.uniform() < probability else f for f in full]
    return rng, shapes, ranks


def _generic_net(widths, layers, ranks):
    """Layers in general position: any product of adjacent ones has the least of their ranks."""
    rank = min(ranks)
    # Local and global value agree if all products have rank r (as in `aligned`), and if r is the
    # least width (the product then maps onto the smooth set of matrices of rank r).
    if rank == min(widths) or set(ranks) == {rank}:
        llc = aoyagi_coefficient(widths, rank)[0]
    elif len(layers) == 2:
        llc = local_coefficient_two_layers(widths, ranks, rank)
    else:
        llc = None
    return _net(layers, functools.reduce(lambda product, layer: layer @ product, layers), rank, llc)


def _net(layers, target, rank, llc):
    params = tuple(layer.astype(np.float32) for layer in layers)
    return DeepLinearNet(params, target.astype(np.float32), rank, llc)


def _orthogonal_columns(rng, dim, count):
    """The first `count` columns of a uniform orthogonal matrix, float64 [dim, count]."""
    q, triangle = np.linalg.qr(rng.normal(size=(dim, count)))
    return q * np.sign(np.diag(triangle))


# --- losses -------------------------------------------------------------------------------------


def product(params: Params) -> jax.Array:
    """Returns W_L ... W_1 [H_L, H_0], multiplied in a cheap order."""
    return jnp.linalg.multi_dot(params[::-1], precision=_EXACT) if len(params) > 1 else params[0]


@dataclasses.dataclass(frozen=True)
class PopulationLoss:
    """K(w) = c |W_L ... W_1 - W*|²_F = E|W_L ... W_1 x - W* x|²: no data, no minibatch noise.

    The target is data, so another network of the same shape compiles nothing.

    Attributes:
      second_moment: c > 0, see `UNIFORM_SECOND_MOMENT`. A factor of nbeta in disguise, without
        effect on λ; the default 1 keeps the curvature at an `aligned` anchor between 2 and 2L.
    """

    second_moment: float = 1.0

    def __post_init__(self) -> None:
        check_positive("second_moment", self.second_moment)

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        """Returns K for each target in {"target": [batch, H_L, H_0]}, float32 [batch]."""
        errors = product(params)[None] - batch["target"]
        return self.second_moment * jnp.sum(errors**2, axis=(1, 2))


@dataclasses.dataclass(frozen=True)
class MinibatchLoss:
    """|W_L ... W_1 x - y|² for each pair; its mean over uniform inputs is `PopulationLoss`.

    Attributes:
      mean_over_outputs: divide by H_L. One published code does, which divides nbeta by H_L.
    """

    mean_over_outputs: bool = False

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        """Returns the losses for {"x": [batch, H_0], "y": [batch, H_L]}, float32 [batch]."""
        outputs = jnp.linalg.multi_dot([batch["x"], *(w.T for w in params)], precision=_EXACT)
        squares = (outputs - batch["y"]) ** 2
        return jnp.mean(squares, axis=1) if self.mean_over_outputs else jnp.sum(squares, axis=1)


def sample_data(rng_key: jax.Array, target: jax.Array, num_examples: int) -> Batch:
    """Draws inputs uniform on [-10, 10]^H_0 with noiseless outputs y = W* x.

    Args:
      rng_key: typed key, consumed.
      target: W* [H_L, H_0].
      num_examples: n, static.

    Returns:
      {"x": float32 [n, H_0], "y": float32 [n, H_L]}.
    """
    checks.at_least("num_examples", num_examples, 1)
    x = jax.random.uniform(rng_key, (num_examples, target.shape[1]), minval=-10, maxval=10)
    return {"x": x, "y": jnp.matmul(x, target.T, precision=_EXACT)}
