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
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import loggamma, ndtr, ndtri

from llc_jax import checks
from llc_jax.types import Batch, Params

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


def aoyagi_coefficient(widths: Sequence[int], rank: int) -> tuple[float, int]:
    """The learning coefficient λ and its multiplicity m: minimum over all true parameters.

    With Δ = widths - rank in ascending order, the layers that count are the first ℓ + 1, the
    least number >= 2 with Δ_1 + ... + Δ_{ℓ+1} < ℓ Δ_{ℓ+2} (all, if there is none). With their sum
    S, M = ⌈S/ℓ⌉ and a = S - (M - 1) ℓ:

    λ = [r (H_0 + H_L) - r²]/2 + a (ℓ-a)/(4ℓ) - (ℓ-1) S²/(4ℓ) + Σ_{i<j} Δ_i Δ_j / 2,
    m = a (ℓ-a) + 1.

    It is the *local* coefficient at `aligned` networks, and a lower bound elsewhere.

    Args:
      widths: H_0 ... H_L, at least two; 0 is allowed.
      rank: r, from 0 to the least width.

    Returns:
      (λ, m), exact but for one rounding of λ.

    Raises:
      ValueError: on impossible widths or ranks.

    Source: Aoyagi 2024, theorem 1, solved without a search.
    """
    _check_widths(widths, minimum=0)
    _check_rank("rank", rank, min(widths))
    deltas = sorted(width - rank for width in widths)
    total, used = deltas[0] + deltas[1], 2
    while used < len(deltas) and total >= (used - 1) * deltas[used]:
        total += deltas[used]
        used += 1
    ell = used - 1
    remainder = total - (math.ceil(Fraction(total, ell)) - 1) * ell
    pairs = (total**2 - sum(delta**2 for delta in deltas[:used])) // 2
    value = (
        Fraction(rank * (widths[0] + widths[-1] - rank), 2)
        + Fraction(remainder * (ell - remainder) - (ell - 1) * total**2, 4 * ell)
        + Fraction(pairs, 2)
    )
    return float(value), remainder * (ell - remainder) + 1


def local_coefficient_two_layers(
    widths: Sequence[int], layer_ranks: Sequence[int], rank: int
) -> float:
    """The local learning coefficient of a two-layer network at (W_1, W_2).

    With a = rk W_1, b = rk W_2, r = rk W_2 W_1, α = a - r, β = b - r and widths M, H, N:
    λ = [r (M + N - r) + α (N - r) + β (M - r - α)]/2 + λ_0(M - r - α, H - r - α - β, N - r - β),
    λ_0 being the formula at rank 0: the invertible blocks are eliminated by the implicit
    function theorem and a network at the origin is left.

    Args:
      widths: M = H_0, H = H_1, N = H_2.
      layer_ranks: a, b.
      rank: r; a + b - H <= r <= min(a, b).

    Raises:
      ValueError: on impossible widths or ranks.
    """
    _check_widths(widths, minimum=0)
    if len(widths) != 3 or len(layer_ranks) != 2:
        raise ValueError(
            f"widths={widths}, layer_ranks={layer_ranks}: two layers have three widths and two"
            " ranks; for more layers use `aligned` networks, where local and global value agree."
        )
    (m, h, n), (a, b) = widths, layer_ranks
    _check_rank("layer_ranks[0]", a, min(m, h))
    _check_rank("layer_ranks[1]", b, min(h, n))
    if not max(0, a + b - h) <= rank <= min(a, b):
        raise ValueError(
            f"rank={rank}: matrices of rank {a} and {b} that meet in dimension {h} have a product"
            f" of rank {max(0, a + b - h)} to {min(a, b)}; give a rank in this range."
        )
    alpha, beta = a - rank, b - rank
    rest, _ = aoyagi_coefficient((m - a, h - a - b + rank, n - b), 0)
    return (rank * (m + n - rank) + alpha * (n - rank) + beta * (m - a)) / 2 + rest


def rank_one_llc(
    widths: Sequence[int], nbeta: float, localization: float, second_moment: float = 1.0
) -> float:
    """λ̂ = nbeta E[K] at the origin of a network with a width of 1: exact at finite nbeta, γ.

    The posterior at w* = 0 with W* = 0 weighs w ~ N(0, 1/γ) by exp(-t S), with
    S = |G_L ... G_1|² of standard normal G and t = nbeta c / γ^L, the only combination that
    counts. A width of 1 cuts the product into two vectors, so S is a product of independent
    χ² with H_k degrees of freedom, one for each of the other L widths. Then
    Z(t) = (2πi)⁻¹ ∫ Γ(s) Π_k [2^-s Γ(H_k/2 - s) / Γ(H_k/2)] t^-s ds and λ̂ = -d log Z / d log t.
    The rightmost pole gives Aoyagi's λ = min H_k / 2 and m, the number of times it is attained:
    λ̂ ≈ λ - (m-1)/log t, so convergence is logarithmic where m > 1.

    Args:
      widths: H_0 ... H_L, one of them 1.
      nbeta: inverse temperature times the number of samples, > 0.
      localization: γ > 0; without it the posterior of a singular model has no finite mass.
      second_moment: c.

    Returns:
      λ̂, to about 10 digits.

    Raises:
      ValueError: for widths without a 1, or a scale that is not positive.
    """
    _check_widths(widths)
    if 1 not in widths:
        raise ValueError(f"widths={widths}: the closed form needs a width of 1.")
    for name, value in (
        ("nbeta", nbeta),
        ("localization", localization),
        ("second_moment", second_moment),
    ):
        _check_positive(name, value)
    degrees = sorted(widths)[1:]
    log_t = math.log(nbeta * second_moment) - len(degrees) * math.log(localization)
    pole = degrees[0] / 2

    def log_integrand(s):
        chi = [loggamma(h / 2 - s) - math.lgamma(h / 2) for h in degrees]
        return loggamma(s) - s * (log_t + len(degrees) * math.log(2)) + sum(chi)

    # On the real axis the integrand is convex; through its minimum the contour cancels least.
    # Both ends of the interval are poles, resolved on a logit scale.
    line = pole / (1 + np.exp(-np.linspace(-14, 14, 4001)))
    saddle = line[np.argmin(log_integrand(line))]
    # The trapezoid rule converges like exp(-2π distance to the nearest pole / spacing).
    spacing = min(saddle, pole - saddle, 0.5) / 5
    s = saddle + 1j * spacing * np.arange(int(60 / spacing))
    weights = np.exp(log_integrand(s) - log_integrand(saddle))
    weights[0] /= 2
    return float(np.sum(s * weights).real / np.sum(weights).real)


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
    rng = _host_rng(rng_key)
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
    _check_widths(widths)
    _check_rank("rank", rank, min(widths))
    rng = _host_rng(rng_key)
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
    _check_widths(widths)
    if not 0 <= probability <= 1:
        raise ValueError(f"probability={probability}: give a number from 0 to 1.")
    rng = _host_rng(rng_key)
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


def _host_rng(rng_key):
    checks.typed_key(rng_key)
    return np.random.default_rng(np.asarray(jax.random.key_data(rng_key)))


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
        _check_positive("second_moment", self.second_moment)

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


# --- checks -------------------------------------------------------------------------------------


def _check_widths(widths, minimum=1):
    if len(widths) < 2:
        raise ValueError(f"widths={widths}: give at least two, of the input and of the output.")
    for k, width in enumerate(widths):
        checks.at_least(f"widths[{k}]", width, minimum)


def _check_rank(name, rank, largest):
    checks.at_least(name, rank, 0)
    if rank > largest:
        raise ValueError(f"{name}={rank}: a rank is at most the least width, here {largest}.")


def _check_positive(name, value):
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value}: give a finite number above 0.")
