"""Samplers: one file each, all with the contract of `llc_jax.types.Sampler`."""

from llc_jax.samplers.sgld import SGLD

__all__ = ["SGLD"]
