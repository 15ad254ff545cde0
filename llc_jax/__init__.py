"""llc_jax: local learning coefficients of JAX models. The public names, and nothing else."""

from llc_jax import curvature, observables
from llc_jax.calibration.calibrate import calibrate
from llc_jax.curvature.over_checkpoints import Curvature, curvature_over_checkpoints
from llc_jax.inputs.masks import mask_by_path
from llc_jax.inputs.tie import tie
from llc_jax.llc.estimate import LLCEstimate
from llc_jax.llc.estimators import (
    estimate_llc,
    estimate_llc_over_checkpoints,
    estimate_llc_over_settings,
)
from llc_jax.llc.extrapolation import extrapolate_step_size
from llc_jax.samplers import BAOAB, MALA, SGLD, SGNHT, AdamSGLD, RMSPropSGLD
from llc_jax.sampling.posterior import default_nbeta
from llc_jax.stages.boundaries import Stage, find_plateaus, find_stages
from llc_jax.stages.smoothing import SmoothedCurve, smooth_curve
from llc_jax.types import Batch, LossFn, Params, Sampler, Stream

__all__ = [
    "BAOAB",
    "MALA",
    "SGLD",
    "SGNHT",
    "AdamSGLD",
    "Batch",
    "Curvature",
    "LLCEstimate",
    "LossFn",
    "Params",
    "RMSPropSGLD",
    "Sampler",
    "SmoothedCurve",
    "Stage",
    "Stream",
    "calibrate",
    "curvature",
    "curvature_over_checkpoints",
    "default_nbeta",
    "estimate_llc",
    "estimate_llc_over_checkpoints",
    "estimate_llc_over_settings",
    "extrapolate_step_size",
    "find_plateaus",
    "find_stages",
    "mask_by_path",
    "observables",
    "smooth_curve",
    "tie",
]
