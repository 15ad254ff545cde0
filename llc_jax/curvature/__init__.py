"""Curvature of the loss from Hessian-vector products: trace, eigenvalues, density, Gaussian LLC."""

from llc_jax.curvature.estimators import (
    deflated_trace,
    gaussian_llc,
    hutchinson_trace,
    spectral_density,
    top_eigenvalues,
)
from llc_jax.curvature.hessian import HessianProduct, hvp
from llc_jax.curvature.spectrum import Eigenvalues, ProbeMean, SpectralDensity

__all__ = [
    "Eigenvalues",
    "HessianProduct",
    "ProbeMean",
    "SpectralDensity",
    "deflated_trace",
    "gaussian_llc",
    "hutchinson_trace",
    "hvp",
    "spectral_density",
    "top_eigenvalues",
]
