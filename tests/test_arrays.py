"""Data and weights as people have them: arrays without loss, or a sentence that names the leaf."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import nnx
from jax.experimental import sparse

from llc_jax import SGLD, estimate_llc
from llc_jax.inputs import arrays, traced

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


class Tensor:
    """As torch has it: no numpy array, but one can be made of it."""

    def __array__(self, dtype=None, copy=None):
        return X


class Loader:
    """Examples one by one, as a Dataset or DataLoader has them."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return X[i]


def refusal(function, *args):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        function(*args)
    message = str(error.value)
    assert len(message) <= 600
    return message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"t": pd.DataFrame({"a": [1.0]})}, ("data['t'] is a DataFrame", "to_numpy")),
        ({"x": X, "s": sparse.BCOO.fromdense(X)}, ("sparse", "todense")),
        (Loader(), ("data is a Loader", "np.stack")),
        ({"id": np.array(["a", "b"])}, ("data['id']", "dtype <U1")),
        ({"t": np.array(["2020-01-01"], "datetime64[s]")}, ("data['t']", "datetime64")),
        ({"x": np.ma.masked_invalid([1.0, np.nan])}, ("data['x']", "1 masked values", "filled")),
        ([(X[0], 1.0)] * 1000, ("list of 1,000 items", "np.stack")),
        ({"x": X, "y": X[:5]}, ("'x'", "8", "5", "one length")),
    ],
)
def test_what_is_no_array_is_refused_by_name(data, words):
    message = refusal(arrays.data_arrays, data)
    assert all(word in message for word in words), message


def test_what_numpy_makes_arrays_of_is_taken():
    found = arrays.data_arrays({"a": Tensor(), "b": pd.Series(X[:, 0]), "c": X.astype(np.float16)})
    np.testing.assert_array_equal(found["a"], X)
    np.testing.assert_array_equal(found["b"], X[:, 0])
    assert found["c"].dtype == np.float16


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([5, 2**32 + 7]), ("1 of 2 int64", "4294967303")),
        (np.array([2**63], np.uint64), ("uint64", "fit into uint32")),
        (1.7e9 + np.arange(8) / 8, ("differences vanish", "subtract their mean")),
        (np.array([1.0, 1e300]), ("too large for float32", "1e+300")),
        (np.arange(8) * 1e-50, ("differences vanish",)),
        (np.stack([np.arange(8.0), 1e9 + np.arange(8.0)], axis=1), ("differences vanish",)),
    ],
)
def test_numbers_that_do_not_fit_into_32_bits_are_refused(values, words):
    """jax-ml/jax, issue 18385, "silent truncation of numpy int64 arrays to in32 range"."""
    message = refusal(arrays.data_arrays, {"v": values})
    assert message.startswith("data['v'] ")
    assert "jax_enable_x64" in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "values",
    [
        np.arange(-5, 5),
        np.array([2**31 - 1, -(2**31)]),
        np.linspace(0, 1, 9),
        np.full(4, 0.1),
        np.array([1e-30, 2e-30]),
        np.array([1.0, np.nan, np.inf]),
    ],
)
def test_numbers_that_fit_are_taken_in_the_dtype_of_jax(values):
    found = arrays.data_arrays({"v": values})["v"]
    assert found.dtype == jnp.asarray(values).dtype
    np.testing.assert_allclose(found, values, rtol=np.finfo(np.float32).eps)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"bn.running_mean": X, "w": X}, ("running_mean", "mask of 0")),  # a torch state_dict
        ({"batch_stats": {"mean": X}, "params": {"w": X}}, ("['batch_stats']['mean']",)),
        ({"norm/~/mean_ema": {"average": X}, "w": X}, ("mean_ema",)),  # Haiku
        (nnx.state(nnx.BatchNorm(3, rngs=nnx.Rngs(0))), ("BatchStat", "nnx.split")),
        ({"w": X, "act": jax.nn.relu}, ("params['act'] at step 3", "partition")),
        ({"w": X, "kind": "linear"}, ("params['kind'] at step 3 is a str",)),
        (jax.nn.relu, ("params at step 3 is a custom_jvp",)),
        ({}, ("has no arrays",)),
    ],
)
def test_what_is_no_weight_is_refused_by_name(params, words):
    message = refusal(arrays.param_arrays, params, 3)
    assert all(word in message for word in words), message


def test_state_that_the_mask_holds_is_taken():
    params = {"bn.running_mean": X, "w": X}
    mask = {"bn.running_mean": np.False_, "w": np.True_}
    assert arrays.param_arrays(params, 0, mask).keys() == params.keys()


def test_a_new_function_over_a_large_array_is_said_once():
    """A closure for every call: compiled afresh, and a copy of the array kept, each time."""
    large = jnp.zeros(3_000_000)

    def fresh():
        return lambda params, batch: (batch["x"] @ params["w"]) ** 2 + large[: len(batch["x"])]

    shapes = jax.eval_shape(lambda: ({"w": jnp.zeros(3)}, {"x": jnp.zeros((4, 3))}))
    first, second, third = fresh(), fresh(), fresh()  # programs keep them alive
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            traced.trace("loss_fn", first, *shapes)
    with pytest.warns(UserWarning, match=r"closes over 12 MB .* new function .*clear_caches"):
        traced.trace("loss_fn", second, *shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced.trace("loss_fn", third, *shapes)


def test_nothing_is_estimated_within_a_transformation():
    def llc(w):
        return estimate_llc(
            jax.random.key(0), lambda p, b: (b["x"] @ p["w"]) ** 2, {"w": w}, {"x": X},
            sampler=SGLD(1e-3), localization=1.0, num_draws=4,
        ).mean  # fmt: skip

    for transform in (jax.jit, jax.grad, jax.vmap):
        message = refusal(transform(llc), jnp.zeros((3, 3) if transform is jax.vmap else 3))
        assert "estimate_llc_over_checkpoints" in message
