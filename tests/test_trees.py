"""Trees come back from disk as they were, or are refused by name before anything is written."""

import collections
import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import core, nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from llc_jax.storage import pytrees
from llc_jax.storage.checkpoints import CheckpointDir

W = np.ones(2, np.float32)


class Pair(NamedTuple):
    a: Any
    b: Any


def save(folder, params, opt_state=()):
    directory = CheckpointDir(folder, writer=True)
    directory.save(3, params, opt_state)
    return directory


def assert_kept(before, after):
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        x = np.asarray(x)
        assert (x.shape, x.dtype.newbyteorder("=")) == (y.shape, y.dtype)
        assert x.astype(y.dtype).tobytes() == y.tobytes()


REFUSED = {
    "integer keys": ({0: W, 1: W}, r"params has the key 0 \(int\)"),
    "integer keys below": ({"layers": {0: W}}, r"params\['layers'\] has the key 0 \(int\)"),
    "bytes as keys": ({b"w": W}, r"params has the key b'w' \(bytes\)"),
    "keys of two types": ({"a": W, 0: W}, "cannot be sorted"),
    "tuples": ({"mlp": [(W, W), W]}, r"params\['mlp'\]\[0\] is a tuple"),
    "named tuples": (Pair(W, W), "params is a Pair"),
    "an OrderedDict": (collections.OrderedDict(w=W), "params is a OrderedDict"),
    "a FrozenDict": ({"p": core.freeze({"w": W})}, r"params\['p'\] is a FrozenDict.*unfreeze"),
    "an nnx.State": (nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))), "is a State.*to_pure_dict"),
    "one name": (
        {"a.b": {"c": W}, "a": {"b.c": W}},
        r"\['a'\]\['b.c'\] and params\['a.b'\]\['c'\]",
    ),
    "one path": ({"a": W, "a/": W}, r"params\['a'\] and params\['a/'\] have one name"),
    "text that is none": ({"\ud800": W}, "a name that is no text"),
    "nothing": ({}, "params has no arrays"),
    "no elements": ({"rank0": np.zeros((0, 3))}, r"params\['rank0'\] has shape \(0, 3\)"),
    "objects": ({"w": np.array([None, 1])}, "dtype object"),
    "text": ({"name": "resnet", "w": W}, r"params\['name'\] is a str"),
    "long double": ({"w": np.zeros(2, np.longdouble)}, "has dtype float128"),
    "dates": ({"w": np.zeros(2, "M8[s]")}, "has dtype datetime64"),
    "large integers": ({"w": 2**70}, "has dtype object"),
    "masked": ({"w": np.ma.masked_array([1.0, 2.0], [0, 1])}, "is a masked array"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_come_back_as_something_else_is_refused(tmp_path, name):
    """Integer keys turn into text (google/flax issue 5030, "Provide a supported way to convert str
    keys from orbax checkpoints back to int keys"), tuples into lists (google-deepmind/ferminet pull
    request 105), and arrays without elements cannot be saved (google/orbax issue 2587)."""
    tree, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason) as caught:
        save(tmp_path / "c", tree)
    assert len(str(caught.value)) <= 600
    assert list((tmp_path / "c").iterdir()) == []


def test_messages_stay_short_whatever_the_tree(tmp_path):
    deep = {"x" * 300: {"y" * 300: {number: (W, object()) for number in range(50)}}}
    with pytest.raises(ValueError, match="and 99 more") as caught:
        save(tmp_path, deep)
    assert len(str(caught.value)) <= 600


def test_arrays_that_are_not_there_are_refused(tmp_path):
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(ValueError, match=r"params\['w'\] was donated"):
        save(tmp_path, {"w": gone})
    with pytest.raises(ValueError, match=r"opt_state\[0\] is traced"):
        jax.jit(lambda x: save(tmp_path, {"w": W}, [x]))(W)
    assert list(tmp_path.iterdir()) == []


def test_numbers_and_scalars_come_back_as_arrays(tmp_path):
    tree = {"a": 3, "b": 0.1, "c": True, "d": np.float32(2), "e": np.array(5, ">i4"), "f": [None]}
    directory = save(tmp_path, tree, tree)
    assert_kept(tree, directory.restore_params(3))
    assert_kept(tree, directory.restore_state(tree, 3)[2])


@jax.tree_util.register_pytree_node_class
class Box:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def tree_flatten(self):
        return (self.x, self.y), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


STATES = {
    "sgd": optax.sgd(0.1).init({"w": W}),
    "masked": optax.masked(optax.adam(0.1), {"w": True, "b": False}).init({"w": W, "b": W}),
    "hyperparameters": optax.inject_hyperparams(optax.adam)(0.1).init({"w": W}),
    "integer labels": optax.multi_transform(
        {0: optax.adam(0.1), 1: optax.sgd(0.1)}, {"w": 0, "b": 1}
    ).init({"w": W, "b": W}),
    "nothing": (),
    "None": (None, {}),
    "tuples": ((W, 2 * W), [Pair(W, None)]),
    "integer keys": {0: W, 10: 2 * W, 2: 3 * W},
    "frozen": core.freeze({"a": {"b": W}}),
    "of one's own": Box(W, {"z": 2 * W}),
    "state of nnx": nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
}


@pytest.mark.parametrize("name", STATES)
def test_optimizer_states_of_any_structure_come_back(tmp_path, name):
    """Lists for tuples broke a training loop in google-deepmind/ferminet pull request 105, "Fix
    opt_state type mismatch when restoring checkpoints with Adam/LAMB optimizers"; states without
    arrays failed in horovod/horovod pull request 548."""
    state = STATES[name]
    directory = save(tmp_path, {"w": W}, state)
    assert directory.latest_good() == 3
    step, params, back = directory.restore_state(state)
    assert step == 3
    assert_kept({"w": W}, params)
    assert_kept(state, back)
    with pytest.raises(ValueError, match=r"structure|does not fit"):
        directory.restore_state({"another": np.zeros(7)})


def test_typed_keys_of_an_optimizer_come_back(tmp_path):
    state = optax.add_noise(0.1, 0.1, jax.random.key(3)).init({"w": W})
    back = save(tmp_path, {"w": W}, state).restore_state(state)[2]
    assert jax.tree.structure(back) == jax.tree.structure(state)
    expected = jax.random.key_data(jax.random.key(3))
    np.testing.assert_array_equal(jax.random.key_data(back.rng_key), expected)


@pytest.mark.parametrize("opt_state", [{"n": "adam"}, [object()], {"f": jnp.sin}, {"z": W[:0]}])
def test_optimizer_states_that_would_not_come_back_are_refused(tmp_path, opt_state):
    """google/flax issue 4423, "Issues checkpointing optimizer state using Optax, nnx.Optimizer, and
    Orbax": what cannot be stored is named by its place, not by the type of a handler."""
    with pytest.raises(ValueError, match=r"opt_state\[.*\] (is a|has shape)"):
        save(tmp_path, {"w": W}, opt_state)
    assert list(tmp_path.iterdir()) == []


def dtypes_of_jax():
    """All that JAX has arrays of, and numpy has no other name for."""
    import ml_dtypes

    extended = [getattr(ml_dtypes, name) for name in dir(ml_dtypes)]
    extended = [d for d in extended if isinstance(d, type) and issubclass(d, np.generic)]
    return [np.dtype(d) for d in [*"?bhilBHILefdFD", *extended]]


def test_every_dtype_comes_back_or_is_refused(tmp_path):
    kept = {}
    for dtype in dtypes_of_jax():
        leaf = np.arange(2).astype(dtype)
        try:
            pytrees.storable("params", {"w": leaf}, plain=True)
        except ValueError as error:
            assert f"has dtype {dtype}" in str(error)  # noqa: PT017
        else:
            kept[f"{dtype.name} {dtype.char}"] = leaf
    assert {"bfloat16 E", "float8_e4m3fn 4", "bool ?", "complex128 D"} & set(kept)
    assert len(kept) > 20
    assert_kept(kept, save(tmp_path, kept).restore_params(3))


KEYS = st.text(string.printable + "λ\0é/~.%", max_size=4)
LEAVES = st.sampled_from([W, np.int8(3), 0.5, np.arange(6.0).reshape(2, 3).T, None])
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=3),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(st.integers(0, 3), inner, min_size=1, max_size=2),
    ),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(tree=ANYTHING)
def test_any_tree_comes_back_or_is_refused(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("any")
    try:
        directory = save(folder, tree, tree)
    except ValueError:
        assert list(folder.iterdir()) == []
    else:
        assert_kept(tree, directory.restore_params(3))
        assert_kept(tree, directory.restore_state(tree)[2])
