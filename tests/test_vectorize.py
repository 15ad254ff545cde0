"""The mapped functions are those of JAX, without an axis of length one in their products."""

import re

import jax
import numpy as np
import pytest

from llc_jax import parallel


def product(trees, matrix):
    return {"product": trees["a"] @ matrix}


def assert_products(found, a, b):
    """`a @ b`, in any order: n terms are off by n roundings, each at most 2^-24 of their sizes."""
    a, b = np.float64(a), np.float64(b)
    bound = a.shape[-1] * 2.0**-24 * (np.abs(a) @ np.abs(b))
    np.testing.assert_array_less(np.abs(found - a @ b), bound)


def shapes_of_products(function, *args):
    """Of the result of every matrix product of the program, loops included."""
    text = str(jax.make_jaxpr(function)(*args))
    return set(re.findall(r"f32\[([\d,]+)\] = dot_general", text))


@pytest.mark.parametrize("length", [1, 3])
def test_vmap_is_that_of_jax(length):
    a, b = (jax.random.normal(jax.random.key(i), (length, 4, 4)) for i in (0, 1))
    found = parallel.vmap(product)({"a": a}, b)
    assert found["product"].shape == (length, 4, 4)
    assert_products(found["product"], a, b)
    shapes = shapes_of_products(parallel.vmap(product), {"a": a}, b)
    assert shapes == {"4,4" if length == 1 else "3,4,4"}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_map_in_batches_is_that_of_jax(batch_size):
    xs = jax.random.normal(jax.random.key(0), (5, 4, 4))

    def mapped(xs):
        return parallel.map_in_batches(lambda x: x @ x, xs, batch_size)

    assert_products(mapped(xs), xs, xs)
    # Of 5 in batches of 2, one is left over: JAX maps it as a batch of its own.
    shapes = {1: {"4,4"}, 2: {"2,4,4", "1,4,4"}, 5: {"5,4,4"}}
    assert shapes_of_products(mapped, xs) == shapes[batch_size]


@pytest.mark.parametrize("length", [1, 2, 7, 1000])
def test_mean_of_pairs_has_the_same_bits_mapped_or_not(length):
    x = jax.random.normal(jax.random.key(0), (3, length)) + 100
    alone = jax.jit(parallel.mean_of_pairs)
    mapped = jax.jit(jax.vmap(parallel.mean_of_pairs))(x)
    exact = np.mean(np.asarray(x, np.float64), axis=1)
    np.testing.assert_array_equal(mapped, [alone(row) for row in x])
    # log2(n) additions and a division, each to half a unit in the last place.
    bound = (np.ceil(np.log2(length)) + 1) * 2.0**-24
    np.testing.assert_allclose(mapped, exact, rtol=bound)
