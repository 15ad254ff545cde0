"""What the local learning coefficient of a deep linear network is, and at finite nbeta and γ.

Notation as in `deep_linear.model`: widths H_0 ... H_L, W_k of shape [H_k, H_{k-1}], true rank r,
K(w) = c |W_L ... W_1 - W*|²_F. Everything here runs on the host in float64.

Sources: Aoyagi 2024 ("the formula"); Aoyagi & Watanabe 2005 for two layers.
"""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import numpy as np
from scipy.special import loggamma

from llc_jax.inputs import checks


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
    check_widths(widths, minimum=0)
    check_rank("rank", rank, min(widths))
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
    check_widths(widths, minimum=0)
    if len(widths) != 3 or len(layer_ranks) != 2:
        raise ValueError(
            f"widths={widths}, layer_ranks={layer_ranks}: two layers have three widths and two"
            " ranks; for more layers use `aligned` networks, where local and global value agree."
        )
    (m, h, n), (a, b) = widths, layer_ranks
    check_rank("layer_ranks[0]", a, min(m, h))
    check_rank("layer_ranks[1]", b, min(h, n))
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
    check_widths(widths)
    if 1 not in widths:
        raise ValueError(f"widths={widths}: the closed form needs a width of 1.")
    _check_scales(nbeta, localization, second_moment)
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


class FiniteLLC(NamedTuple):
    """nbeta E[K] under the localized posterior, by exact block sampling.

    Attributes:
      mean: the estimate.
      stderr: its standard error, from 20 batches of sweeps.
      halves: means of the first and of the second half; far apart, `num_sweeps` is too small.
    """

    mean: float
    stderr: float
    halves: tuple[float, float]


def finite_llc(
    rng_key: jax.Array,
    widths: Sequence[int],
    rank: int,
    nbeta: float,
    localization: float,
    second_moment: float = 1.0,
    *,
    num_sweeps: int = 2000,
    num_burnin: int = 500,
) -> FiniteLLC:
    """λ̂ = nbeta E[K] at an `aligned` network, for finite nbeta and γ: an oracle for samplers.

    Given the other layers the posterior of one layer is Gaussian, diagonal in the singular bases
    of the products A above and B below it: precision 2 nbeta c a_i² b_j² + γ. So each layer is
    drawn exactly, without a step size, however stiff the posterior; E[K] is averaged over the
    conditional law of the layer, not its draw. Loss and localization do not change under the
    orthogonal frames of `aligned`, so diag(I_r, 0) stands for all such networks.

    Compare the result with a sampler's λ̂ at the same settings, and with `aoyagi_coefficient` to
    see how far finite nbeta and γ bias it.

    Args:
      rng_key: typed key, consumed.
      widths: H_0 ... H_L.
      rank: r.
      nbeta: inverse temperature times the number of samples, > 0.
      localization: γ > 0.
      second_moment: c > 0.
      num_sweeps: sweeps over all layers that are averaged; each costs 2L SVDs.
      num_burnin: sweeps thrown away first; the chain starts at the anchor.

    Raises:
      ValueError: on impossible widths or ranks, or a scale that is not positive.
    """
    check_widths(widths)
    check_rank("rank", rank, min(widths))
    _check_scales(nbeta, localization, second_moment)
    checks.at_least("num_sweeps", num_sweeps, 20, "the error bar needs 20 batches")
    checks.at_least("num_burnin", num_burnin, 0)
    rng = host_rng(rng_key)
    stiffness = 2 * nbeta * second_moment
    anchors = [_leading_identity(h, w, rank) for w, h in itertools.pairwise(widths)]
    target = _leading_identity(widths[-1], widths[0], rank)
    layers = list(anchors)
    trace = np.empty(num_burnin + num_sweeps)
    for sweep in range(len(trace)):
        above = [np.eye(widths[-1])]
        for layer in layers[:0:-1]:
            above.append(above[-1] @ layer)
        below = np.eye(widths[0])
        losses = []
        for k, (a, anchor) in enumerate(zip(above[::-1], anchors, strict=True)):
            layers[k], loss = _draw_layer(rng, a, below, target, anchor, stiffness, localization)
            below = layers[k] @ below
            losses.append(loss)
        trace[sweep] = stiffness / 2 * np.mean(losses)
    kept = trace[num_burnin:]
    batches = [part.mean() for part in np.array_split(kept, 20)]
    halves = tuple(float(part.mean()) for part in np.array_split(kept, 2))
    return FiniteLLC(float(kept.mean()), float(np.std(batches, ddof=1) / math.sqrt(20)), halves)


def _draw_layer(rng, a, b, target, anchor, stiffness, localization):
    """Draws W given A and B; returns it and E|A W B - W*|² over the same conditional law."""
    u_a, values_a, vt_a = np.linalg.svd(a)
    u_b, values_b, vt_b = np.linalg.svd(b)
    gains = np.zeros_like(anchor)
    gains[: len(values_a), : len(values_b)] = values_a[:, None] * values_b[None]
    # In the singular bases the loss is Σ (gain w - target)², with zero gain where sizes differ.
    rotated = u_a.T @ target @ vt_b.T
    rows, columns = (min(sizes) for sizes in zip(anchor.shape, rotated.shape, strict=True))
    goal = np.zeros_like(anchor)
    goal[:rows, :columns] = rotated[:rows, :columns]
    precision = stiffness * gains**2 + localization
    mean = (stiffness * gains * goal + localization * (vt_a @ anchor @ u_b)) / precision
    out_of_reach = np.sum(rotated**2) - np.sum(goal**2)
    loss = np.sum(gains**2 / precision + (gains * mean - goal) ** 2) + out_of_reach
    draw = mean + rng.normal(size=anchor.shape) / np.sqrt(precision)
    return vt_a.T @ draw @ u_b.T, loss


def _leading_identity(rows, columns, rank):
    return np.eye(rows, columns) * (np.arange(columns) < rank)[None]


def host_rng(rng_key: jax.Array) -> np.random.Generator:
    """A numpy generator seeded by a typed key, which is consumed: float64 without jax's x64."""
    checks.typed_key(rng_key)
    return np.random.default_rng(np.asarray(jax.random.key_data(rng_key)))


def _check_scales(nbeta, localization, second_moment):
    check_positive("nbeta", nbeta)
    check_positive("localization", localization)
    check_positive("second_moment", second_moment)


def check_widths(widths: Sequence[int], minimum: int = 1) -> None:
    """Checks a chain of widths."""
    if len(widths) < 2:
        raise ValueError(f"widths={widths}: give at least two, of the input and of the output.")
    for k, width in enumerate(widths):
        checks.at_least(f"widths[{k}]", width, minimum)


def check_rank(name: str, rank: int, largest: int) -> None:
    """Checks a rank against the largest possible one."""
    checks.at_least(name, rank, 0)
    if rank > largest:
        raise ValueError(f"{name}={rank}: a rank is at most the least width, here {largest}.")


def check_positive(name: str, value: float) -> None:
    """Checks that a number is finite and above 0."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value}: give a finite number above 0.")
