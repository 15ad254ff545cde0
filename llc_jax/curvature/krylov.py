"""The compiled part of every curvature estimate: products with random and with Krylov vectors.

`operator` is a symmetric map as a pytree: a `HessianProduct`, whose arrays are traced, or a
`jax.tree_util.Partial` of a function on pytrees.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llc_jax.curvature.hessian import HessianProduct
from llc_jax.curvature.lanczos import Tridiagonal, lanczos
from llc_jax.parallel import map_in_batches
from llc_jax.trees import Layout


class DensitySizes(NamedTuple):
    """The integers that fix the shapes of a density: static.

    Attributes:
      num_probes: P, random starts.
      num_iterations: k, products for each.
      num_deflated: vectors of one more run that the starts leave out; 0 for none.
      probe_batch: starts at once.
    """

    num_probes: int
    num_iterations: int
    num_deflated: int = 0
    probe_batch: int = 1


def maps(operator: Any, layout: Layout) -> tuple[Callable, Callable]:
    """(product, projection onto what the mask leaves) as functions of vectors [d]."""
    if not isinstance(operator, HessianProduct):
        return lambda v: layout.flatten(operator(layout.unflatten(v))), lambda v: v
    product = operator.linearize()
    return (
        lambda v: layout.flatten(product(layout.unflatten(v))),
        lambda v: layout.flatten(operator.project(layout.unflatten(v))),
    )


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def quadratic_forms(rng_key, operator, layout, num_probes, probe_batch):
    """The quadratic form of each probe [P]."""
    product, project = maps(operator, layout)

    def one(probe):
        key = jax.random.fold_in(rng_key, probe)
        signs = project(jax.random.rademacher(key, (layout.size,), layout.dtype))
        return jnp.vdot(signs, product(signs))

    return map_in_batches(one, jnp.arange(num_probes), probe_batch)


@functools.partial(jax.jit, static_argnums=(2, 3))
def tridiagonal(rng_key, operator, layout, num_iterations):
    """T of one run."""
    return _run(rng_key, *maps(operator, layout), layout, num_iterations)[0]


@functools.partial(jax.jit, static_argnums=(2, 3))
def tridiagonals(rng_key, operator, layout, sizes) -> tuple[Tridiagonal | None, Tridiagonal]:
    """(T of the deflating run or None, T of the probes with leading axis [P])."""
    product, project = maps(operator, layout)
    deflated, basis = None, None
    if sizes.num_deflated:
        key = jax.random.fold_in(rng_key, sizes.num_probes)
        length = min(sizes.num_deflated + sizes.num_iterations, layout.size)
        deflated, basis = _run(key, product, project, layout, length)
        basis = basis[: sizes.num_deflated]

    def outside(vector):
        vector = project(vector)
        return vector if basis is None else vector - (basis @ vector) @ basis

    def one(probe):
        key = jax.random.fold_in(rng_key, probe)
        return _run(key, product, outside, layout, sizes.num_iterations)[0]

    return deflated, map_in_batches(one, jnp.arange(sizes.num_probes), sizes.probe_batch)


def _run(rng_key, product, project, layout, num_iterations) -> tuple[Tridiagonal, Any]:
    """Lanczos from projected random normals; iteration i draws with `fold_in(rng_key, i)`."""

    def draw(i):
        key = jax.random.fold_in(rng_key, i)
        return project(jax.random.normal(key, (layout.size,), layout.dtype))

    return lanczos(product, draw, jnp.zeros(layout.size, layout.dtype), num_iterations)
