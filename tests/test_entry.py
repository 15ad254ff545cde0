"""Objects of other libraries and functions of every kind: taken, or refused by name."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from llc_jax import SGLD, Stream, estimate_llc, tie
from llc_jax.inputs import arrays, closures, traced

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
W = {"w": np.ones(3, np.float32)}
KEY = jax.random.key(0)
RUN = {"sampler": SGLD(1e-3), "localization": 1.0, "num_chains": 1, "num_draws": 3, "num_burnin": 0}
SHAPES = jax.eval_shape(lambda: ({"w": jnp.zeros(3)}, {"x": jnp.zeros((4, 3))}))


def squares(params, batch):
    return (batch["x"] @ params["w"]) ** 2


def refusal(function, *args, **kwargs):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        function(*args, **kwargs)
    message = str(error.value)
    assert len(message) <= 600
    return message


# --- data -------------------------------------------------------------------------------------


class DataLoader:
    """BirkhoffG/jax-dataloader, issue 2, "JaxDataLoader is not a valid jax type"."""

    def __iter__(self):
        return iter([X])


DATA = {
    "loader": (DataLoader(), ("data is a DataLoader", "llc_jax.Stream", "np.concatenate")),
    "generator": ((X for _ in range(3)), ("data is a generator", "llc_jax.Stream")),
    "names in bytes": (
        # google/flax, issue 1492, "jax.jit causes type error": ids beside the images
        {"x": X, "id": np.array([b"test_09933"] * 8)}, ("data['id']", "dtype |S10", "drop"),
    ),
    "keys of two kinds": ({"x": X, 1: X}, ("data is no pytree (dict", "keys")),
    "ragged lists": ({"x": [[1.0], [1.0, 2.0]]}, ("leading axes", "not lists of numbers")),
    "objects": ({"x": np.array([X[0], X[:2]], object)}, ("data['x']", "dtype object")),
    "structured": ({"x": np.zeros(8, [("a", int)])}, ("data['x']", "dtype [('a', '<i8')]")),
    "words": ("iris.csv", ("data is a str",)),
    "nothing": (None, ("data has leading axes {}",)),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_data_that_are_no_arrays_are_refused_by_name(name):
    data, words = DATA[name]
    message = refusal(estimate_llc, KEY, squares, W, data, **RUN)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("kind", ["memmap", "file", "keys"])
def test_arrays_that_are_not_in_memory_and_keys_are_taken(kind, tmp_path):
    if kind == "memmap":
        np.save(tmp_path / "x.npy", X)
        data = np.load(tmp_path / "x.npy", mmap_mode="r")
    elif kind == "file":
        h5py = pytest.importorskip("h5py")
        data = h5py.File(tmp_path / "x.h5", "w").create_dataset("x", data=X)
    else:
        data = jax.random.split(KEY, 8)
    found = arrays.data_arrays({"x": data})["x"]
    assert found.shape[0] == 8
    assert kind == "keys" or np.array_equal(found, X)


@pytest.mark.parametrize("count", [7, 1000])
def test_a_column_that_is_constant_but_for_its_own_rounding_is_no_loss(count):
    angles = np.full(count, 0.7) * (1 + 2e-16 * (np.arange(count) % 3))
    columns = np.stack([np.full(count, 0.1), np.cos(angles), np.arange(count) / 3], axis=1)
    found = arrays.data_arrays({"x": columns})["x"]
    np.testing.assert_allclose(found, columns, rtol=1e-7)


# --- weights ----------------------------------------------------------------------------------


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=["width"])
@dataclasses.dataclass
class Model:
    """As Equinox has them: a callable tree, with fields that are no leaves."""

    w: jax.Array
    width: object = 3

    def __call__(self, x):
        return x @ self.w


def test_a_model_that_is_callable_and_a_tree_is_weights():
    found = estimate_llc(KEY, lambda m, b: m(b["x"]) ** 2, Model(W["w"]), {"x": X}, **RUN)
    expected = estimate_llc(KEY, squares, W, {"x": X}, **RUN)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-6)


def test_weights_whose_fields_cannot_be_compared_are_refused():
    """jax-ml/jax, issue 7826: arrays in static fields, "The truth value ... is ambiguous"."""
    params = Model(W["w"], np.zeros(2))
    message = refusal(estimate_llc, KEY, lambda m, b: m(b["x"]) ** 2, params, {"x": X}, **RUN)
    assert "params has an array in a static field" in message


class Cached(nn.Module):
    @nn.compact
    def __call__(self, x):
        count = self.variable("cache", "count", lambda: jnp.ones(()))
        return nn.Dense(1)(x)[:, 0] * count.value


def test_state_of_other_layers_than_batch_norm_is_named():
    """Caches of Linen, generators of NNX (google/flax keeps both beside the weights)."""
    variables = Cached().init(KEY, X)
    dropout = nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    for params, words in ((variables, "['cache']['count']"), (dropout, "(RngCount)")):
        message = refusal(estimate_llc, KEY, squares, params, {"x": X}, **RUN)
        assert words in message
        assert "pass the weights only" in message


def test_weights_of_another_range_than_float32_are_told_from_broken_ones():
    wide = refusal(estimate_llc, KEY, squares, {"w": np.array([1.0, 1e300, 0])}, {"x": X}, **RUN)
    assert "1 of 3 values that are not finite in float32: rescale" in wide
    hole = refusal(estimate_llc, KEY, squares, {"w": np.array([1, np.nan, 0])}, {"x": X}, **RUN)
    assert "use an earlier checkpoint" in hole


# --- functions --------------------------------------------------------------------------------


@dataclasses.dataclass
class Weighted:
    """jax-ml/jax, issue 3701: "dataclasses ... whether they were hashable"."""

    weight: float = 2.0

    def __call__(self, params, batch):
        return self.weight * squares(params, batch)


@dataclasses.dataclass(eq=False)
class ByIdentity(Weighted):
    __hash__ = object.__hash__


def test_a_loss_that_cannot_be_hashed_is_refused_and_one_that_can_is_not():
    message = refusal(estimate_llc, KEY, Weighted(), W, {"x": X}, **RUN)
    assert "loss_fn is a Weighted that cannot be hashed" in message
    assert "eq=False" in message
    assert traced.trace("loss_fn", ByIdentity(), *SHAPES).out.shape == (4,)


LEFT = []


@jax.jit
def leaky(x):
    LEFT.append(x)
    return x


def test_a_loss_that_sees_another_trace_is_refused():
    leaky(jnp.ones(()))
    message = refusal(traced.trace, "loss_fn", lambda p, b: squares(p, b) * LEFT[0], *SHAPES)
    assert "is being traced, or was once" in message

    def outer(c):
        return estimate_llc(KEY, lambda p, b: c * squares(p, b), W, {"x": X}, **RUN).mean

    assert "is being traced" in refusal(jax.grad(outer), 1.0)


def called_back(params, batch):
    found = squares(params, batch)
    return jax.pure_callback(np.asarray, found, found)


def test_a_loss_without_a_gradient_is_refused_before_anything_compiles():
    """jax-ml/jax: "Pure callbacks do not support JVP" came out of the sampling program."""
    message = refusal(estimate_llc, KEY, called_back, W, {"x": X}, **RUN)
    assert "loss_fn has no gradient" in message
    assert "custom_vjp" in message


IDS = np.array([5, 2**32 + 7, 1, 2])
STAMPS = 1.7e9 + np.arange(4) / 8


@pytest.mark.parametrize("constant", [IDS, IDS.astype(np.uint64), STAMPS])
def test_constants_that_do_not_fit_into_32_bits_are_refused(constant):
    """jax-ml/jax, issue 18385, again: here the array is in the function, not in the data."""

    def batch_fn(rng_key):
        at = jax.random.randint(rng_key, (2,), 0, 4)
        return {"x": jnp.asarray(X)[at], "y": jnp.take(constant, at)}

    stream = refusal(estimate_llc, KEY, squares, W, Stream(batch_fn), nbeta=10.0, **RUN)
    closed = refusal(
        estimate_llc, KEY,
        lambda p, b: jnp.where(jnp.take(constant, b["i"]) > 3, squares(p, b), 0),
        W, {"x": X[:4], "i": np.arange(4)}, **RUN,
    )  # fmt: skip
    for message, name in ((stream, "batch_fn"), (closed, "loss_fn")):
        assert f"an array of shape (4,) that {name} closes over has" in message
        assert "jax_enable_x64" in message


TABLE_64 = np.linspace(0, 1, 8)


def looked_up(params, batch):
    return (batch["x"] @ params["w"] - jnp.take(TABLE_64, batch["i"])) ** 2


def rows_and_table(rng_key):
    at = jax.random.randint(rng_key, (4,), 0, 8)
    return {"x": jnp.asarray(X)[at], "y": jnp.take(TABLE_64, at)}


@pytest.mark.parametrize("stream", [False, True])
def test_a_float64_table_in_a_function_does_what_a_float32_one_does(stream):
    """Looked at by a trace in 64 bits, it stayed so in JAX's caches, and nothing compiled."""
    if stream:
        data = Stream(rows_and_table)
        found = estimate_llc(
            KEY, lambda p, b: (b["x"] @ p["w"] - b["y"]) ** 2, W, data, nbeta=4.0, **RUN
        )
        assert np.isfinite(found.mean)
    else:
        found = estimate_llc(KEY, looked_up, W, {"x": X, "i": np.arange(8)}, **RUN)
        expected = np.mean((X @ W["w"] - TABLE_64) ** 2)
        np.testing.assert_allclose(found.init_loss, expected, rtol=1e-6)


def test_masks_of_very_negative_numbers_are_left_alone():
    causal = np.triu(np.full((3, 3), -1e300), 1)

    def attention(params, batch):
        return (batch["x"] @ jax.nn.softmax(params["w"][None] + causal)).sum(-1)

    with np.errstate(over="ignore"):
        found = traced.trace("loss_fn", attention, *SHAPES)
    assert [x.shape for x in found.constants] == [(3, 3)]
    closures.lossless("loss_fn", attention, found.constants)


TABLE = {"ids": IDS}


class Holder:
    def __init__(self):
        self.ids = IDS

    def loss(self, params, batch):
        return squares(params, batch) * jnp.take(self.ids, batch["i"])

    __call__ = loss


def by_default(params, batch, ids=IDS):
    return squares(params, batch) * jnp.take(ids, batch["i"])


def by_global(params, batch):
    return jax.vmap(lambda i: jnp.take(TABLE["ids"], i))(batch["i"]) * squares(params, batch)


def by_helper(params, batch):
    return by_global(params, batch)


def shifted(params, batch):
    """What is used is small, and the array that it is made of is not used itself."""
    return squares(params, batch) * jnp.take(np.float32(IDS % 7), batch["i"]) + len(STAMPS)


@pytest.mark.parametrize(
    ("loss_fn", "refused"),
    [
        (by_default, True), (by_global, True), (by_helper, True), (Holder().loss, True),
        (Holder(), True), (functools.partial(by_default, ids=IDS), True),
        (jax.jit(by_global), True), (shifted, False), (squares, False),
    ],
)  # fmt: skip
def test_arrays_are_found_wherever_a_function_has_them_if_they_are_used(loss_fn, refused):
    batch = {"x": X[:4], "i": np.arange(4)}
    shapes = jax.eval_shape(lambda: (W, batch))
    with jax.numpy_dtype_promotion("standard"):
        found = traced.trace("loss_fn", loss_fn, *shapes)
    if refused:
        assert "int64" in refusal(closures.lossless, "loss_fn", loss_fn, found.constants)
    else:
        closures.lossless("loss_fn", loss_fn, found.constants)


class Task:
    """Holds its data, as many do; each `task.loss` is another object, and the same function."""

    def __init__(self):
        self.table = jnp.zeros(3_000_000)

    def loss(self, params, batch):
        return squares(params, batch) + self.table[: len(batch["x"])]


def with_table(table, params, batch):
    return squares(params, batch) + table[: len(batch["x"])]


def test_large_arrays_are_said_of_partial_functions_and_not_of_methods_of_one_object():
    """jax-ml/jax, issue 16278, "Possible memory leak / OOM when closing over large constant"."""
    task, table = Task(), jnp.zeros(3_000_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            traced.trace("loss_fn", task.loss, *SHAPES)
    kept = [functools.partial(with_table, table) for _ in range(2)]
    traced.trace("loss_fn", kept[0], *SHAPES)
    with pytest.warns(UserWarning, match="12 MB"):
        traced.trace("loss_fn", kept[1], *SHAPES)


# --- tied weights -----------------------------------------------------------------------------


def test_equal_numbers_of_python_are_not_tied_and_arrays_beside_them_are():
    """patrick-kidger/equinox, issue 469: one array for the embedding and the last layer."""
    table = np.eye(3, dtype=np.float32)
    params = {"embed": table, "head": table, "scales": [1.0, 1.0, 1.0]}
    _, once = tie(lambda p, b: b, params)
    assert once == {"embed": table, "head": None, "scales": [1.0, 1.0, 1.0]}
    assert "no array stands in two places" in refusal(tie, squares, {"scales": [1.0, 1.0]})


def test_what_cannot_be_tied_is_refused():
    assert "loss_fn is a str" in refusal(tie, "loss", {"a": X, "b": X})
    assert "params['act'] is a custom_jvp" in refusal(tie, squares, {"act": jax.nn.relu, "b": X})
