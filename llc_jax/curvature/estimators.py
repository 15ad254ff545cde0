"""Curvature of the loss from Hessian-vector products: trace, eigenvalues, density, Gaussian LLC.

Every estimator takes a symmetric linear map `matvec` on pytrees like params, either of `hvp` or
any traceable function, and works under `jit` and `vmap`. Outside of them the last step is done on
the host in float64. A plain function is static: keep its identity, or each call compiles afresh;
what `hvp` returns compiles once for all checkpoints.

Symbols: H the symmetric map, d the number of weights (of those with mask 1), h its eigenvalues.
"""

from collections.abc import Callable
from typing import Any

import jax

from llc_jax.ambient import own_key, together, undisturbed
from llc_jax.curvature.hessian import HessianProduct
from llc_jax.curvature.krylov import DensitySizes, quadratic_forms, tridiagonal, tridiagonals
from llc_jax.curvature.lanczos import ritz_values
from llc_jax.curvature.spectrum import (
    Eigenvalues,
    ProbeMean,
    SpectralDensity,
    check_temperature,
    combine,
    ends,
    mean,
)
from llc_jax.inputs import checks
from llc_jax.trees import Layout
from llc_jax.types import Params

Matvec = Callable[[Params], Params]


@undisturbed()
def hutchinson_trace(
    rng_key: jax.Array, matvec: Matvec, params: Params, *, num_probes: int, probe_batch: int = 1
) -> ProbeMean:
    """Estimates tr H by the mean of zᵀ H z over random signs z; `num_probes` products.

    Args:
      rng_key: typed key, consumed; probe p uses `fold_in(rng_key, p)`.
      matvec: symmetric map, see the module.
      params: pytree of the weights; only shapes and dtypes matter.
      num_probes: static, at least 2.
      probe_batch: probes at once; faster where one does not fill the device, and as many times
        the memory.

    Returns:
      (mean, stderr); on a diagonal H the estimate is exact.

    Source: Hutchinson 1990, A stochastic estimator of the trace of the influence matrix.
    """
    rng_key, operator, layout = _checked(rng_key, matvec, params, num_probes, probe_batch)
    return mean(quadratic_forms(rng_key, operator, layout, num_probes, probe_batch))


@undisturbed()
def deflated_trace(
    rng_key: jax.Array,
    matvec: Matvec,
    params: Params,
    *,
    num_probes: int,
    num_deflated: int,
    probe_batch: int = 1,
) -> ProbeMean:
    """Estimates tr H with less variance where few eigenvalues dominate.

    The trace on a Krylov space, which holds the dominant directions, is exact, and random probes
    estimate only that on its complement: `num_deflated` + 1 + `num_probes` products.

    Args:
      rng_key: as in `hutchinson_trace`.
      matvec: as in `hutchinson_trace`.
      params: as in `hutchinson_trace`.
      num_probes: static, at least 2.
      num_deflated: dimension of the Krylov space, static; memory is that of as many vectors.
      probe_batch: as in `hutchinson_trace`.

    Source: Meyer, Musco, Musco and Woodruff 2021 (arXiv 2010.09649), Hutch++, with the Krylov
    space of Chen and Hallman 2023 (arXiv 2205.01736) as the deflated one.
    """
    checks.at_least("num_deflated", num_deflated, 1, "0 is hutchinson_trace")
    density = spectral_density(
        rng_key, matvec, params, num_probes=num_probes, num_iterations=1,
        num_deflated=num_deflated, probe_batch=probe_batch, num_points=2,
    )  # fmt: skip
    return density.trace_of(lambda h: h)


@undisturbed()
def top_eigenvalues(
    rng_key: jax.Array,
    matvec: Matvec,
    params: Params,
    *,
    num_eigenvalues: int,
    num_iterations: int,
) -> Eigenvalues:
    """Estimates the largest and the smallest eigenvalues of H by Lanczos; k products.

    Args:
      rng_key: as in `hutchinson_trace`.
      matvec: as in `hutchinson_trace`.
      params: as in `hutchinson_trace`.
      num_eigenvalues: m, static: how many of each end.
      num_iterations: k >= m, static; memory is that of k vectors. No more than d are run.

    Returns:
      `Eigenvalues`, with residuals that tell which have converged: raise k until they are small.
      As an array it is the m largest (algebraically), in decreasing order.
    """
    rng_key, operator, layout = _checked(rng_key, matvec, params)
    checks.at_least("num_eigenvalues", num_eigenvalues, 1)
    checks.at_least("num_iterations", num_iterations, num_eigenvalues, "one per eigenvalue")
    if num_eigenvalues > layout.size:
        raise ValueError(
            f"num_eigenvalues={num_eigenvalues} is above the number of weights {layout.size}."
        )
    run = tridiagonal(rng_key, operator, layout, min(num_iterations, layout.size))
    return ends(ritz_values(run), num_eigenvalues)


@undisturbed()
def spectral_density(
    rng_key: jax.Array,
    matvec: Matvec,
    params: Params,
    *,
    num_probes: int,
    num_iterations: int,
    num_deflated: int = 0,
    probe_batch: int = 1,
    num_points: int = 256,
    width: float | None = None,
) -> SpectralDensity:
    """Estimates the density of eigenvalues by stochastic Lanczos quadrature; P k products.

    With `num_deflated`, one more run of `num_deflated` + k products spans a Krylov space Q, on
    which the density is exact, as far as k more iterations resolve it; the starts of the others
    are orthogonal to Q and stand for the rest only. That cuts the variance where few eigenvalues
    dominate.

    Args:
      rng_key: as in `hutchinson_trace`; the deflating run uses `fold_in(rng_key, P)`.
      matvec: as in `hutchinson_trace`.
      params: as in `hutchinson_trace`.
      num_probes: P, static, at least 2.
      num_iterations: k, static; memory is that of k vectors per probe at once.
      num_deflated: static; memory is that of as many vectors, and k more.
      probe_batch: as in `hutchinson_trace`.
      num_points: G, static: points of the grid, over the range of the nodes and 3 widths more.
      width: standard deviation of the Gaussian that smooths, in units of eigenvalue; default a
        hundredth of the range of the nodes.

    Source: Ubaru, Chen and Saad 2017, SIAM J. Matrix Anal. Appl. 38(4); Ghorbani, Krishnan and
    Xiao 2019 (arXiv 1901.10159), section 2; deflation: Chen and Hallman 2023 (arXiv 2205.01736).
    """
    rng_key, operator, layout = _checked(rng_key, matvec, params, num_probes, probe_batch)
    checks.at_least("num_iterations", num_iterations, 1)
    checks.at_least("num_deflated", num_deflated, 0)
    checks.at_least("num_points", num_points, 2)
    if width is not None:
        checks.nonnegative("width", width)
        if not width > 0:
            raise ValueError(f"width={checks.shown(width)}: it must be above 0, or None.")
    sizes = DensitySizes(num_probes, min(num_iterations, layout.size), num_deflated, probe_batch)
    deflated, probes = tridiagonals(rng_key, operator, layout, sizes)
    size = layout.num_kept(getattr(operator, "mask", None))
    return combine(deflated, probes, size, num_deflated, num_points, width)


def gaussian_llc(
    rng_key: jax.Array,
    matvec: Matvec,
    params: Params,
    *,
    nbeta: float,
    localization: float,
    num_probes: int = 8,
    num_iterations: int = 32,
    num_deflated: int = 16,
    probe_batch: int = 1,
    positive_part: bool = False,
) -> ProbeMean:
    """What λ̂ would be if the loss were its quadratic form: ½ tr[nbeta H (nbeta H + γ)⁻¹].

    The mean loss gap times nbeta under the Gaussian exp(-nbeta xᵀHx/2 - γ|x|²/2). It needs no
    sampling, so next to λ̂ it shows how much of λ̂ second order accounts for.

    Where an eigenvalue is at most -γ/nbeta (a saddle, steep for these settings) that Gaussian
    does not exist and the value is nan. Eigenvalues between -γ/nbeta and 0 count, negatively.
    `positive_part` sets negative eigenvalues to 0 instead: ½ Σ over h > 0 of
    nbeta h / (nbeta h + γ), half the effective number of directions that the loss confines, as in
    MacKay 1992, Bayesian Interpolation. It always exists, lies between 0 and d/2 and agrees with
    the value wherever H has no negative eigenvalue; at a saddle it is not the LLC of the quadratic
    form, for it leaves out what is gained by going down.

    How many iterations it takes depends on how fast the summand bends. The value itself is
    smooth beyond -γ/nbeta and needs few; with `positive_part` it has a corner at 0, where most
    eigenvalues of a network are: compare with twice as many. In float32 eigenvalues are off by
    about 1e-7 of the largest, so γ/nbeta has to be well above that.

    Whether an eigenvalue is that low is judged by the Ritz values, which lie within the spectrum:
    a nan is certain, but few iterations can miss an eigenvalue close to the limit.

    Args:
      rng_key: as in `hutchinson_trace`.
      matvec: as in `hutchinson_trace`.
      params: as in `hutchinson_trace`.
      nbeta: n times inverse temperature, >= 0.
      localization: γ > 0.
      num_probes: as in `spectral_density`.
      num_iterations: as in `spectral_density`.
      num_deflated: as in `spectral_density`.
      probe_batch: as in `hutchinson_trace`.
      positive_part: leave out negative eigenvalues.

    Returns:
      (value, stderr over probes).

    Raises:
      ValueError: on bad input. With γ = 0 every eigenvalue that rounding moves off 0 would count.
    """
    check_temperature(nbeta, localization)
    checks.flag("positive_part", positive_part)
    density = spectral_density(
        rng_key, matvec, params, num_probes=num_probes, num_iterations=num_iterations,
        num_deflated=num_deflated, probe_batch=probe_batch, num_points=2,
    )  # fmt: skip
    return density.gaussian_llc(nbeta=nbeta, localization=localization, positive_part=positive_part)


def _checked(
    rng_key: jax.Array, matvec: Matvec, params: Params, num_probes: int = 2, probe_batch: int = 1
) -> tuple[jax.Array, Any, Layout]:
    """(key, matvec as a pytree, layout of the weights), or a ValueError."""
    if not isinstance(rng_key, jax.core.Tracer):
        checks.typed_key(rng_key)
    checks.at_least("num_probes", num_probes, 2, "one has no standard error")
    checks.at_least("probe_batch", probe_batch, 1)
    own = matvec.params if isinstance(matvec, HessianProduct) else None
    checks.linear_map(matvec, params, own)
    known = isinstance(matvec, HessianProduct | jax.tree_util.Partial)
    operator = matvec if known else jax.tree_util.Partial(matvec)
    return *together((own_key(rng_key), operator)), Layout.of(params)
