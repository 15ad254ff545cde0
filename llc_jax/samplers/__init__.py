"""Samplers: one file each, all with the contract of `llc_jax.types.Sampler`."""

from llc_jax.samplers.adam_sgld import AdamSGLD
from llc_jax.samplers.baoab import BAOAB
from llc_jax.samplers.mala import MALA
from llc_jax.samplers.rmsprop_sgld import RMSPropSGLD
from llc_jax.samplers.sgld import SGLD
from llc_jax.samplers.sgnht import SGNHT

__all__ = ["BAOAB", "MALA", "SGLD", "SGNHT", "AdamSGLD", "RMSPropSGLD"]
