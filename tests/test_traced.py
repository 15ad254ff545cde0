"""Functions that are not pure are refused before anything is compiled, however deep it sits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llc_jax import SGLD, Stream, estimate_llc
from llc_jax.inputs import traced

X = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
W = {"w": np.ones(3, np.float32)}
ROWS = {"x": jax.ShapeDtypeStruct((64, 3), np.float32)}
NUMBERS = np.random.default_rng(1)


def squares(params, batch):
    return (batch["x"] @ params["w"]) ** 2


def noisy(params, batch):
    return squares(params, batch) + NUMBERS.normal(size=64).astype(np.float32)


@jax.jit
def seeded():
    """jcmgray/autoray, issue 27, "JAX tracing out the random global key"."""
    return jax.random.normal(jax.random.key(int(NUMBERS.integers(2**31))), (64,))


def noisy_within(params, batch):
    """The inner function is traced once by JAX, so that it looks the same every time."""
    return squares(params, batch) + seeded()


COUNT = itertools.count()


def counting(params, batch):
    """jax-ml/jax, issue 1141, "Consider tracing twice to detect Python side effects"."""
    return squares(params, batch) ** (1 + next(COUNT) % 7)


@jax.jit
def sliced(x):
    start = next(COUNT) % 32
    return jnp.sum(x[:, :1]) * jnp.sum(jnp.asarray(X)[start : start + 4])


def reading_on(params, batch):
    return squares(params, batch) + sliced(batch["x"])


@pytest.mark.parametrize("loss_fn", [noisy, noisy_within, counting, reading_on])
@pytest.mark.parametrize("jitted", [False, True])
def test_impure_losses_are_refused(loss_fn, jitted):
    with pytest.raises(ValueError, match="loss_fn is not pure"):
        traced.trace("loss_fn", jax.jit(loss_fn) if jitted else loss_fn, W, ROWS)


def test_an_impure_stream_is_refused_though_it_depends_on_its_key():
    def batch_fn(rng_key):
        start = next(COUNT) % 32
        return {"x": jnp.asarray(X)[start : start + 4] + jax.random.normal(rng_key, (4, 3))}

    with pytest.raises(ValueError, match="batch_fn is not pure"):
        estimate_llc(
            jax.random.key(0), squares, W, Stream(batch_fn),
            sampler=SGLD(1e-3), nbeta=10.0, localization=1.0,
        )  # fmt: skip


@jax.custom_jvp
def ruled(x):
    return jnp.sin(x)


ruled.defjvp(lambda primals, tangents: (ruled(*primals), jnp.cos(primals[0]) * tangents[0]))


def involved(params, batch):
    """Whatever may hold a number of its own: loops, branches, rules, keys, checkpoints."""
    noise = jax.random.normal(jax.random.key(7), (64,))
    looped, _ = jax.lax.scan(lambda c, x: (c + jnp.sin(x), None), 0.0, batch["x"][:, 0])
    chosen = jax.lax.cond(looped > 0, lambda x: x**3, lambda x: x, noise)
    return jax.checkpoint(ruled)(squares(params, batch)) + chosen


def test_pure_losses_are_not_accused_and_no_setting_is_left_behind():
    before = jax.config.jax_numpy_rank_promotion
    for _ in range(2):
        traced.trace("loss_fn", involved, W, ROWS)
    assert jax.config.jax_numpy_rank_promotion == before
