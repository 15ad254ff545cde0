"""llc_jax: local learning coefficients of JAX models. The public names, and nothing else."""

from llc_jax.estimate import LLCEstimate
from llc_jax.llc import estimate_llc, estimate_llc_over_checkpoints
from llc_jax.posterior import default_nbeta
from llc_jax.samplers import SGLD
from llc_jax.smoothing import SmoothedCurve, smooth_curve
from llc_jax.stages import Stage, find_plateaus, find_stages
from llc_jax.types import Batch, LossFn, Params, Sampler, Stream

__all__ = [
    "SGLD",
    "Batch",
    "LLCEstimate",
    "LossFn",
    "Params",
    "Sampler",
    "SmoothedCurve",
    "Stage",
    "Stream",
    "default_nbeta",
    "estimate_llc",
    "estimate_llc_over_checkpoints",
    "find_plateaus",
    "find_stages",
    "smooth_curve",
]
