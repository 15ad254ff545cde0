"""What surrounds a call: meshes, devices, guards, threads. Bitwise the same values as without."""

import concurrent.futures
import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from llc_jax import (
    SGLD,
    Stream,
    calibrate,
    curvature,
    estimate_llc,
    estimate_llc_over_checkpoints,
    estimate_llc_over_settings,
)
from llc_jax.ambient import together, undisturbed
from llc_jax.checkpoint_map import map_checkpoints
from llc_jax.curvature.over_checkpoints import curvature_over_checkpoints

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(24, 2)).astype(np.float32)
DATA = {"x": X, "y": X[:, 0] * X[:, 1]}
LOCALIZATIONS = jnp.asarray([1.0, 2.0])
PARAMS = {"a": np.eye(2, 4, dtype=np.float32), "b": np.arange(4, dtype=np.float32) / 4}


def mesh(kind=AxisType.Auto, *axes, shape=(-1,)):
    axes = axes or ("x",)
    return Mesh(np.asarray(jax.devices()).reshape(shape), axes, axis_types=(kind,) * len(axes))


def spread(tree, over, *axes):
    """The tree on a mesh, leading axis split over `axes`."""
    return jax.device_put(tree, NamedSharding(over, P(*axes)))


def net_loss(params, batch):
    return (jnp.tanh(batch["x"] @ params["a"]) @ params["b"] - batch["y"]) ** 2


def streamed(rng_key):
    x = jax.random.normal(rng_key, (8, 2), np.float32)
    return {"x": x, "y": x[:, 0]}


def everything(params, data, rng_key=KEY):
    """Numbers of every kind of call but `calibrate`."""
    run = {"nbeta": 10.0, "localization": 1.0, "num_chains": 4, "num_draws": 5, "num_burnin": 2,
           "sampler": SGLD(1e-2)}  # fmt: skip
    pairs = {0: params, 7: params}
    half = jax.tree.map(lambda x: np.arange(x.size).reshape(x.shape) % 2, params)
    estimates = [
        estimate_llc(rng_key, net_loss, params, data, batch_size=8, mask=half, **run),
        dict(estimate_llc_over_checkpoints(rng_key, net_loss, pairs, data, num_probes=0, **run))[7],
        estimate_llc(rng_key, net_loss, params, Stream(streamed), num_probes=0, **run),
        estimate_llc_over_settings(
            rng_key, net_loss, params, data, setting_batch=1, num_probes=0,
            **{**run, "localization": LOCALIZATIONS},
        )[1],
    ]  # fmt: skip
    products = [
        curvature.hvp(net_loss, params, data, mask=half)(PARAMS),
        curvature.hvp(net_loss, params, data, micro_batch=7)(PARAMS),
    ]
    matvec = curvature.hvp(net_loss, params, data)
    sizes = {"num_probes": 2, "num_iterations": 3}
    nodes = curvature.spectral_density(rng_key, matvec, params, num_points=4, **sizes).nodes
    swept = dict(curvature_over_checkpoints(
        rng_key, net_loss, pairs, data, nbeta=10.0, localization=1.0, num_deflated=3, **sizes
    ))[7]  # fmt: skip
    return jax.device_get([[(e.losses, e.distance, e.stability) for e in estimates], products,
                           nodes, swept])  # fmt: skip


def on(device, tree):
    return jax.device_put(tree, jax.devices()[device])


def mixed():
    """Weights on two meshes."""
    over = mesh(AxisType.Explicit, "d", "m", shape=(2, -1))
    return {"a": spread(PARAMS["a"], over, "d"), "b": on(3, PARAMS["b"])}


def explicit():
    return mesh(AxisType.Explicit)


nothing = contextlib.nullcontext
# name -> () -> (what surrounds the call, params, data)
SURROUNDINGS = {
    "a mesh": lambda: (lambda: jax.set_mesh(mesh()), PARAMS, DATA),
    "an explicit mesh": lambda: (lambda: jax.set_mesh(explicit()), PARAMS, DATA),
    "an explicit mesh, arrays on it": lambda: (
        lambda: jax.set_mesh(explicit()), spread(PARAMS, explicit()), spread(DATA, explicit(), "x"),
    ),
    "arrays on a mesh": lambda: (nothing, spread(PARAMS, mesh()), spread(DATA, mesh(), "x")),
    "arrays on explicit meshes": lambda: (nothing, mixed(), spread(DATA, explicit(), "x")),
    "two devices": lambda: (nothing, on(3, PARAMS), on(1, DATA)),
    "a guard": lambda: (lambda: jax.transfer_guard("disallow"), PARAMS, DATA),
    "a guard, arrays on the device": lambda: (
        lambda: jax.transfer_guard("disallow"), on(0, PARAMS), on(0, DATA),
    ),
    "a strict guard": lambda: (lambda: jax.transfer_guard("disallow_explicit"), PARAMS, DATA),
    # Compiled anew.
    "one other device": lambda: (nothing, on(3, PARAMS), on(3, DATA)),
    "a mesh of old": lambda: (mesh, PARAMS, DATA),
    "a mesh of old, our names": lambda: (
        lambda: mesh(AxisType.Auto, "checkpoint", "chain", shape=(2, -1)), PARAMS, DATA,
    ),
    "a default device": lambda: (lambda: jax.default_device(jax.devices()[2]), PARAMS, DATA),
    "a default platform": lambda: (lambda: jax.default_device("cpu"), PARAMS, DATA),
    "a precision": lambda: (lambda: jax.default_matmul_precision("highest"), PARAMS, DATA),
    "a promotion": lambda: (lambda: jax.numpy_dtype_promotion("standard"), PARAMS, DATA),
}  # fmt: skip
SLOW = [*SURROUNDINGS][[*SURROUNDINGS].index("one other device") :]


@pytest.fixture(scope="module")
def without():
    return everything(PARAMS, DATA)


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.filterwarnings("ignore:`with mesh.` context manager:DeprecationWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else []) for n in SURROUNDINGS]
)
def test_what_surrounds_a_call_changes_nothing(name, without):
    """google-deepmind/alphagenome_research #8: arrays of numpy handed to a compiled function within
    a transfer guard. jax-ml/jax #31793: arrays that are still of the mesh they were made on."""
    context, params, data = SURROUNDINGS[name]()
    key = spread(KEY, mesh(AxisType.Explicit)) if "explicit" in name else KEY
    with context():
        assert_same(everything(params, data, key), without)


def test_threads_give_what_the_main_one_does(without):
    with jax.set_mesh(mesh()), concurrent.futures.ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: everything(PARAMS, DATA), range(2)):
            assert_same(found, without)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["an explicit mesh, arrays on it", "a strict guard"])
def test_calibrate_is_not_disturbed_either(name):
    context, params, data = SURROUNDINGS[name]()
    run = {"num_draws": 20, "num_burnin": 20, "num_chains": 2, "step_fractions": (0.4,),
           "nbeta_factors": (1.0,), "localization_factors": (1.0,)}  # fmt: skip
    plain = calibrate(KEY, net_loss, PARAMS, DATA, **run)
    with context():
        found = calibrate(KEY, net_loss, params, data, **run)
    assert found.settings == plain.settings


def test_what_surrounds_a_call_is_still_there_after_it():
    def after_a_call(context, look):
        with context:
            before = look()
            curvature.hvp(net_loss, PARAMS, DATA)
            with pytest.raises(ValueError, match="Stream"):
                curvature.hvp(net_loss, PARAMS, Stream(streamed))
            return before, look()

    flags = ("jax_debug_nans", "jax_disable_jit", "jax_transfer_guard")
    for context in (jax.debug_nans(True), jax.disable_jit(), jax.transfer_guard("disallow")):
        before, after = after_a_call(context, lambda: [getattr(jax.config, f) for f in flags])
        assert before == after != [False, False, None]
    over = mesh(AxisType.Explicit)
    seen = after_a_call(jax.set_mesh(over), jax.sharding.get_mesh)
    assert seen == (over, over)


def test_iterators_of_the_caller_see_what_surrounds_them():
    over, seen = mesh(), []

    def pairs():
        for step in range(3):
            seen.append((jax.sharding.get_mesh(), jax.config.jax_transfer_guard))
            yield step, PARAMS

    run = {"nbeta": 1.0, "localization": 1.0, "num_draws": 4, "num_burnin": 0, "num_probes": 0}
    with jax.set_mesh(over), jax.transfer_guard("log"):
        list(map_checkpoints(_total, pairs()))
        list(estimate_llc_over_checkpoints(
            KEY, net_loss, pairs(), DATA, sampler=SGLD(1e-2), **run))  # fmt: skip
    assert seen == [(over, "log")] * 6


def _total(step, params):
    return params["a"].sum()


def test_arrays_are_copied_only_where_one_program_could_not_take_them():
    same = on(1, PARAMS)
    assert together((same, X, 1.0))[0]["a"] is same["a"]
    free = jax.tree.map(jnp.asarray, PARAMS)
    assert together((same, free))[1]["a"] is free["a"]
    for apart in ((same, on(2, DATA)), (spread(PARAMS, mesh()), X), (mixed(), KEY)):
        found = [x for x in jax.tree.leaves(together(apart)) if isinstance(x, jax.Array)]
        assert all(isinstance(x.sharding, SingleDeviceSharding) for x in found)
        assert not any(x.committed for x in found)
    [key] = together((spread(KEY, mesh(AxisType.Explicit)),))
    assert key == KEY


def test_curvature_works_within_a_traced_function_in_a_mesh():
    matvec = curvature.hvp(net_loss, PARAMS, DATA)
    plain = matvec(PARAMS)
    with jax.set_mesh(mesh()):
        within = jax.jit(lambda v: curvature.hvp(net_loss, PARAMS, DATA)(v))(PARAMS)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), within, plain)
    assert jax.jit(lambda x: undisturbed()(lambda y: y + 1)(x))(1) == 2


@pytest.mark.parametrize("axes", [("x",), ()])
def test_a_loss_that_closes_over_an_explicitly_sharded_array_is_refused(axes):
    """jax-ml/jax #31799: arrays on a mesh of other axes than those of the `shard_map` around."""
    shift = spread(np.ones(4, np.float32), mesh(AxisType.Explicit), *axes)

    def loss(params, batch):
        return net_loss(params, batch) + shift.sum()

    stream = Stream(lambda key: {**streamed(key), "z": shift})
    run = {"sampler": SGLD(1e-2), "nbeta": 1.0, "localization": 1.0, "num_draws": 4}
    with pytest.raises(ValueError, match=r"closes over.*Explicit axes.*device_get"):
        estimate_llc(KEY, loss, PARAMS, DATA, **run)
    with pytest.raises(ValueError, match=r"batch_fn closes over.*Explicit axes"):
        estimate_llc(KEY, net_loss, PARAMS, stream, **run)
