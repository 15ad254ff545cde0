"""Curvature at every checkpoint of a run, in one compiled program."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from llc_jax.ambient import own_key, undisturbed
from llc_jax.checkpoint_map import map_checkpoints
from llc_jax.curvature.hessian import hvp
from llc_jax.curvature.krylov import DensitySizes, tridiagonals
from llc_jax.curvature.lanczos import ritz_values
from llc_jax.curvature.spectrum import check_temperature, combine, ends
from llc_jax.inputs import checks
from llc_jax.trees import Layout
from llc_jax.types import Batch, LossFn, Params


class Curvature(NamedTuple):
    """Curvature at one checkpoint; float64 on the host. H is the Hessian of the mean loss.

    Attributes:
      trace: tr H, in units of the loss per squared weight, like the eigenvalues.
      trace_stderr: its standard error over probes.
      largest: [m] largest eigenvalues, decreasing.
      largest_residuals: [m] bound of the error of each, rounding left out.
      smallest: [m] smallest eigenvalues, increasing.
      smallest_residuals: [m] bound of the error of each, rounding left out.
      gaussian_llc: λ̂ of the quadratic form; nan where it has none (`curvature.gaussian_llc`).
      gaussian_llc_stderr: its standard error over probes.
      positive_llc: the same with negative eigenvalues set to 0.
      positive_llc_stderr: its standard error over probes.
      num_products: Hessian-vector products it took.
    """

    trace: float
    trace_stderr: float
    largest: np.ndarray
    largest_residuals: np.ndarray
    smallest: np.ndarray
    smallest_residuals: np.ndarray
    gaussian_llc: float
    gaussian_llc_stderr: float
    positive_llc: float
    positive_llc_stderr: float
    num_products: int


def curvature_over_checkpoints(
    rng_key: jax.Array,
    loss_fn: LossFn,
    checkpoints: Mapping[int, Params] | Iterable[tuple[int, Params]],
    data: Batch,
    *,
    nbeta: float,
    localization: float,
    num_eigenvalues: int = 3,
    num_deflated: int = 24,
    num_iterations: int = 32,
    num_probes: int = 8,
    probe_batch: int = 1,
    micro_batch: int | None = None,
    checkpoint_batch: int = 1,
    mask: Params | None = None,
) -> Iterator[tuple[int, Curvature]]:
    """Measures the curvature at every checkpoint; compiles once for all of them.

    One Lanczos run gives the eigenvalues and takes its Krylov space out of the probes, from which
    the trace and the Gaussian λ̂ follow: see `curvature.spectral_density`.

    Args:
      rng_key: typed key; consumed. A checkpoint uses `fold_in(rng_key, step)`, so results do not
        depend on what else is measured.
      loss_fn: see `curvature.hvp`.
      checkpoints: {step: params} or an iterable of (step, params), read lazily.
      data: pytree of arrays with leading axis n.
      nbeta: n times inverse temperature, as of the λ̂ to compare with.
      localization: γ > 0, as of the λ̂ to compare with.
      num_eigenvalues: m of each end.
      num_deflated: dimension of the Krylov space, at least m.
      num_iterations: products per probe; see `curvature.gaussian_llc`.
      num_probes: at least 2.
      probe_batch: probes at once for each checkpoint; bounds memory.
      micro_batch: see `curvature.hvp`; bounds memory.
      checkpoint_batch: checkpoints at once, spread over as many of this process's devices as
        divide it; bounds memory.
      mask: see `curvature.hvp`.

    Returns:
      An iterator of (step, `Curvature`), in the order given.

    Raises:
      ValueError: on bad input, before anything compiles.
    """
    checks.typed_key(rng_key)
    check_temperature(nbeta, localization)
    checks.at_least("num_eigenvalues", num_eigenvalues, 1)
    checks.at_least("num_deflated", num_deflated, num_eigenvalues, "the eigenvalues come from it")
    checks.at_least("num_iterations", num_iterations, 1)
    checks.at_least("num_probes", num_probes, 2, "one has no standard error")
    checks.at_least("probe_batch", probe_batch, 1)
    checks.at_least("checkpoint_batch", checkpoint_batch, 1)
    pairs = checks.pairs(checkpoints)
    first = next(pairs, None)
    if first is None:
        raise ValueError("checkpoints is empty: give at least one (step, params).")
    with undisturbed():
        checks.params(first[1], first[0])
        rng_key = own_key(rng_key)
    operator = hvp(loss_fn, first[1], data, micro_batch=micro_batch, mask=mask)
    layout = Layout.of(operator.params)
    if num_eigenvalues > layout.size:
        raise ValueError(
            f"num_eigenvalues={num_eigenvalues} is above the number of weights {layout.size}."
        )
    sizes = DensitySizes(num_probes, min(num_iterations, layout.size), num_deflated, probe_batch)
    size = float(layout.num_kept(operator.mask))
    settings = {"nbeta": float(nbeta), "localization": float(localization)}
    found = map_checkpoints(
        _LanczosRuns(layout, sizes), itertools.chain([first], pairs), rng_key,
        dataclasses.replace(operator, params=None), checkpoint_batch=checkpoint_batch,
    )  # fmt: skip
    return (
        (step, _summary(deflated, probes, size, sizes, num_eigenvalues, settings))
        for step, (deflated, probes) in found
    )


@dataclasses.dataclass(frozen=True)
class _LanczosRuns:
    """The Lanczos runs at one checkpoint."""

    layout: Layout
    sizes: DensitySizes

    def __call__(self, step, params, rng_key, operator):
        at = dataclasses.replace(operator, params=self.layout.widen(params))
        return tridiagonals(jax.random.fold_in(rng_key, step), at, self.layout, self.sizes)


def _summary(deflated, probes, size, sizes, num_eigenvalues, settings) -> Curvature:
    density = combine(deflated, probes, size, sizes.num_deflated)
    eigenvalues = ends(ritz_values(deflated), num_eigenvalues)
    value = density.gaussian_llc(**settings)
    positive = density.gaussian_llc(**settings, positive_part=True)
    trace = density.trace_of(lambda h: h)
    return Curvature(
        trace=float(trace.mean),
        trace_stderr=float(trace.stderr),
        largest=eigenvalues.largest,
        largest_residuals=eigenvalues.largest_residuals,
        smallest=eigenvalues.smallest,
        smallest_residuals=eigenvalues.smallest_residuals,
        gaussian_llc=float(value.mean),
        gaussian_llc_stderr=float(value.stderr),
        positive_llc=float(positive.mean),
        positive_llc_stderr=float(positive.stderr),
        num_products=deflated.diagonal.size + sizes.num_probes * sizes.num_iterations,
    )
