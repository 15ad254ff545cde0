"""Strict settings for every test: virtual devices, no silent promotion, no dates in seeds."""

import os

os.environ.setdefault("MPLBACKEND", "agg")
# Before numpy loads: threads of BLAS that share their cores with other workers wait for each other,
# which turns seconds into minutes.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax

# Before any backend starts: four virtual devices, so that every estimate runs sharded.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
if jax.config.jax_platforms == "cpu":
    jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
