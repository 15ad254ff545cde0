"""Numbers as people have them: one of Python comes back, or a sentence with value and rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llc_jax import SGLD, estimate_llc_over_checkpoints, estimate_llc_over_settings
from llc_jax.inputs import scalars

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
W = {"w": np.ones(3, np.float32)}
RUN = {"sampler": SGLD(1e-3), "localization": 1.0, "num_draws": 3, "num_burnin": 1}


def loss(params, batch):
    return 0.5 * (batch["x"] @ params["w"]) ** 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3), (2.5, 2.5), (np.int8(3), 3), (np.float16(2.5), 2.5), (np.array(3), 3),
        (jnp.uint32(3), 3), (jnp.bfloat16(2.5), 2.5), (2**80, 2**80), (np.longdouble(2.5), 2.5),
    ],
)  # fmt: skip
def test_a_number_of_any_kind_is_one_of_python(value, expected):
    found = scalars.number(value)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.True_,
        None,
        "3",
        b"3",
        3j,
        [3],
        np.ones(1),
        np.datetime64("2026"),
        jax.random.key(0),
    ],
)
def test_what_is_no_number_is_none(value):
    assert scalars.number(value) is None


def test_a_number_that_is_traced_or_deleted_is_none():
    gone = jnp.float32(3)
    gone.delete()
    assert scalars.number(gone) is None
    jax.make_jaxpr(lambda x: (scalars.number(x) is None or 1 / 0, x)[1])(1.0)


STEPS = [np.int64(7), jnp.int32(7), np.array(7, np.uint8)]


@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_numpy_or_jax_is_the_same_step(step):
    """tensorflow/tpu, pull 683: "Train max_steps must be int, got <class 'numpy.int64'>"."""
    assert type(scalars.step(step)) is int
    key = jax.random.key(0)
    [(found, estimate)] = estimate_llc_over_checkpoints(key, loss, [(step, W)], {"x": X}, **RUN)
    [(_, same)] = estimate_llc_over_checkpoints(key, loss, [(7, W)], {"x": X}, **RUN)
    assert found == 7
    assert type(found) is int
    np.testing.assert_array_equal(estimate.losses, same.losses)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (jnp.int32(-1627389952), "-1627389952"),
        (2**32, "4294967296 (int)"),
        ("step_100", "'step_100' (str)"),
        (100.0, "100.0 (float)"),
        (np.array([1]), "array([1]) (ndarray)"),
        (True, "True (bool)"),
    ],
)
def test_what_is_no_step_is_refused_with_its_type(step, words):
    """google-deepmind/mujoco_playground, issue 48: a step counter that wraps below zero."""
    with pytest.raises(ValueError, match="a training step from 0 to 2") as error:
        estimate_llc_over_checkpoints(jax.random.key(0), loss, [(step, W)], {"x": X}, **RUN)
    assert words in str(error.value)
    assert "whole number (int)" in str(error.value)


def test_steps_in_tokens_and_samples_go_as_far_as_is_said():
    assert scalars.step(2**32 - 1) == 2**32 - 1
    assert scalars.step(np.uint64(3_000_000_000)) == 3_000_000_000


@pytest.mark.parametrize(("value", "word"), [(1e-50, "0"), (1e-40, "0"), (1e300, "infinite")])
def test_a_number_that_float32_does_not_hold_is_refused(value, word):
    with pytest.raises(ValueError, match=rf" is {word} in float32: .*jax_enable_x64"):
        scalars.nonnegative("eps", value)
    with jax.enable_x64(True):
        scalars.nonnegative("eps", value)
    for fine in (0, 0.0, 1e-37, 3e38):
        scalars.nonnegative("eps", fine)


def test_counts_are_integers_of_python_within_32_bits():
    assert type(scalars.at_least("n", np.uint8(200), 1)) is int
    for value in (2**31, np.int64(2**40), 10**5000):
        with pytest.raises(ValueError, match=r"n=.*: give an integer of at most 2\*\*31 - 1"):
            scalars.at_least("n", value, 1)


class Stubborn:
    def __repr__(self):
        raise RuntimeError("no")


SHOWN = {
    "repr that raises": Stubborn(),
    "array": np.zeros(10**6),
    "arrays": {"x": [X] * 100},
    "text": "a" * 10**6,
    "digits": 10**5000,
    "lists": [[[]] * 99] * 9,
}


@pytest.mark.parametrize("name", SHOWN)
def test_any_value_is_shown_in_one_short_line(name):
    shown = scalars.shown(SHOWN[name])
    assert 0 < len(shown) <= 120
    assert "\n" not in shown


def test_a_grid_broadcasts_numbers_and_lists_of_them():
    found = scalars.grid({"a": [[1], [2]], "b": jnp.arange(3), "c": np.float16(4), "d": range(3)})
    assert [x.shape for x in found] == [(2, 3)] * 4
    assert {x.dtype for x in found} == {np.dtype(np.float64)}
    np.testing.assert_array_equal(found[1], [[0, 1, 2]] * 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"localization": "1"}, "localization='1': give a number or an array"),
        ({"localization": [[1.0], [1.0, 2.0]]}, "localization=[[1.0], [1.0, 2.0]]: give a number"),
        ({"nbeta": 3j}, "nbeta=3j: give a number"),
        ({"nbeta": {"a": 1}}, "nbeta={'a': 1}: give a number"),
        ({"nbeta": [1.0, 2.0], "localization": [1.0, 2.0, 3.0]}, "'nbeta': (2,)"),
        ({"sampler": SGLD([True])}, "step_size=[True]: give a number"),
    ],
)
def test_a_bad_grid_is_refused_by_the_name_of_the_setting(settings, words):
    run = {**RUN, "nbeta": 10.0, **settings}
    with pytest.raises(ValueError, match=r"give a number|must broadcast") as error:
        estimate_llc_over_settings(jax.random.key(0), loss, W, {"x": X}, **run)
    assert words in str(error.value)
