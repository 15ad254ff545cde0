"""Chains and checkpoints over devices: the same numbers, and no device waits for another."""

import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llc_jax import SGLD, estimate_llc_over_checkpoints, parallel
from llc_jax.llc import run as program
from llc_jax.sampling.program import sample

DEVICES = jax.devices()
DIM = 5
DATA = np.random.default_rng(0).normal(size=(8, DIM)).astype(np.float32)
needs_four = pytest.mark.skipif(len(DEVICES) < 4, reason="needs four devices")


def elementwise(params, batch):
    return 0.5 * jnp.sum((params["w"][None] - batch) ** 2, axis=-1)


def perceptron(params, batch):
    hidden = jnp.tanh(batch @ params["in"])
    return jnp.sum((hidden @ params["out"]) ** 2, axis=-1)


def weights(step):
    return {"w": np.random.default_rng(step).normal(size=DIM).astype(np.float32)}


def layers(step):
    rng = np.random.default_rng(step)
    shapes = {"in": (DIM, 6), "out": (6, 2)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def estimates(mesh, loss=elementwise, make=weights, steps=(0, 1, 2), num_chains=4, **options):
    return estimate_llc_over_checkpoints(
        jax.random.key(0), loss, [(step, make(step)) for step in steps], DATA, sampler=SGLD(1e-2),
        nbeta=10.0, localization=1.0, num_chains=num_chains, num_draws=12, num_burnin=3,
        batch_size=4, num_probes=0, mesh=mesh, **options,
    )  # fmt: skip


def mesh_of(rows, columns):
    devices = np.asarray(DEVICES[: rows * columns]).reshape(rows, columns)
    axes = (parallel.CHECKPOINT, parallel.CHAIN)
    return jax.sharding.Mesh(devices, axes, axis_types=(AxisType.Auto, AxisType.Auto))


@pytest.fixture(scope="module")
def on_one_device():
    """Seven chains on one device; fewer chains are the first of them."""
    return dict(estimates(mesh_of(1, 1), num_chains=7))


@needs_four
@pytest.mark.parametrize(
    ("rows", "columns", "num_chains", "checkpoint_batch"),
    [
        (1, 4, 4, 1),
        (1, 4, 7, 1),  # chains not divisible by devices
        (4, 1, 3, 3),  # checkpoints not divisible by devices
        (2, 2, 3, 3),  # both axes sharded, neither divisible
        (1, 4, 1, 1),  # more devices than lanes
    ],
)
def test_devices_do_not_change_the_numbers(
    rows, columns, num_chains, checkpoint_batch, on_one_device
):
    runs = estimates(
        mesh_of(rows, columns), num_chains=num_chains, checkpoint_batch=checkpoint_batch
    )
    for step, estimate in runs:
        expected = on_one_device[step]
        for field in ("losses", "anchor_losses", "burnin_losses", "distance", "per_chain"):
            np.testing.assert_array_equal(
                getattr(estimate, field), getattr(expected, field)[:num_chains], err_msg=field
            )
        assert estimate.init_loss == expected.init_loss
        assert estimate.settings["num_chains"] == num_chains


@needs_four
def test_the_default_mesh_uses_all_devices_with_the_same_numbers(on_one_device):
    runs = dict(estimates(None, num_chains=7))
    for step, estimate in runs.items():
        np.testing.assert_array_equal(estimate.losses, on_one_device[step].losses)


def test_a_mesh_of_other_axes_is_refused():
    with pytest.raises(ValueError, match=r"\('x',\).*: give one of .*'checkpoint' and 'chain'"):
        list(estimates(jax.make_mesh((1,), ("x",))))


class CapturedError(Exception):
    """Carries the arguments of `sample`."""


def arguments_of_sample(monkeypatch, *args, **options):
    def capture(*positional, **named):
        raise CapturedError(positional, named)

    with monkeypatch.context() as patch:
        patch.setattr(program, "sample", capture)
        with pytest.raises(CapturedError) as error:
            next(iter(estimates(*args, **options)))
    return error.value.args


COLLECTIVES = re.compile(
    r"\b(all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter|collective-broadcast)"
)


@needs_four
def test_the_search_finds_a_collective_where_there_is_one():
    sharding = NamedSharding(mesh_of(1, 4), P(parallel.CHAIN))
    x = jax.device_put(np.ones(8, np.float32), sharding)
    assert COLLECTIVES.search(jax.jit(jnp.sum).lower(x).compile().as_text())


@needs_four
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (2, 2)])
def test_the_program_has_no_collectives_and_splits_both_axes(rows, columns, monkeypatch):
    positional, named = arguments_of_sample(
        monkeypatch, mesh_of(rows, columns), perceptron, layers, steps=(0, 1), checkpoint_batch=2
    )
    compiled = sample.lower(*positional, **named).compile()
    text = compiled.as_text()
    assert "while" in text  # it is the program with the scan
    assert not COLLECTIVES.search(text)
    trace = compiled(*positional)
    losses = trace.observed["loss_gap"].loss
    assert losses.shape == (2, 4, 15)
    assert losses.sharding.shard_shape(losses.shape) == (2 // rows, 4 // columns, 15)
    assert len(losses.sharding.device_set) == 4
    # Checkpoints and their losses arrive split as well: no device holds more than it samples.
    for leaf in jax.tree.leaves(positional[1:4]):
        assert leaf.sharding.shard_shape(leaf.shape)[0] == 2 // rows


def test_the_program_of_one_chain_multiplies_matrices_not_stacks_of_one(monkeypatch):
    positional, named = arguments_of_sample(
        monkeypatch, mesh_of(1, 1), perceptron, layers, num_chains=1
    )
    lines = sample.lower(*positional, **named).as_text().splitlines()
    products = [line for line in lines if "stablehlo.dot_general" in line]
    assert products
    assert not [line for line in products if "batching_dims" in line]


# --- meshes -----------------------------------------------------------------------------------


@needs_four
@pytest.mark.parametrize(
    ("checkpoints", "chains", "devices", "shape"),
    [
        (1, 4, 4, (1, 4)),
        (4, 1, 4, (4, 1)),
        (2, 2, 4, (2, 2)),
        (8, 8, 4, (1, 4)),  # all equal: the longer chain axis
        (1, 1, 4, (1, 4)),  # more devices than lanes
        (10, 3, 4, (4, 1)),  # 3·3 lanes on the busiest device, against 5·2 and 10·1
        (3, 2, 4, (2, 2)),  # 2·1 lanes, against 3·1 and 1·2: the longer chain axis of the best
        (3, 1, 3, (3, 1)),
        (5, 5, 1, (1, 1)),
    ],
)
def test_mesh_gives_the_busiest_device_the_least_to_do(checkpoints, chains, devices, shape):
    mesh = parallel.make_mesh(checkpoints, chains, DEVICES[:devices])
    assert mesh.devices.shape == shape
    assert mesh.axis_names == (parallel.CHECKPOINT, parallel.CHAIN)
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    load = -(-checkpoints // shape[0]) * -(-chains // shape[1])
    for rows in range(1, devices + 1):
        if devices % rows == 0:
            assert load <= -(-checkpoints // rows) * -(-chains // (devices // rows))


def test_mesh_defaults_to_all_devices():
    assert parallel.make_mesh(1, 8).devices.ravel().tolist() == DEVICES


@needs_four
def test_place_splits_and_fetch_gathers():
    mesh = mesh_of(2, 2)
    tree = {"a": np.arange(8.0, dtype=np.float32).reshape(4, 2), "key": jax.random.key(3)}
    whole = parallel.place(tree, mesh)
    assert whole["a"].sharding.shard_shape((4, 2)) == (4, 2)
    assert (jax.random.key_data(whole["key"]) == jax.random.key_data(tree["key"])).all()
    split = parallel.place(tree["a"], mesh, parallel.CHECKPOINT, parallel.CHAIN)
    assert split.sharding.shard_shape((4, 2)) == (2, 1)
    back = parallel.fetch(split)
    assert type(back) is np.ndarray
    np.testing.assert_array_equal(back, tree["a"])


# --- start-up and signals ---------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "expected"), [(8, 4), (6, 3), (2, 2), (7, 1)])
@needs_four
def test_data_mesh_has_as_many_devices_as_divide_the_batch(batch_size, expected):
    assert parallel.data_mesh(batch_size).devices.tolist() == DEVICES[:expected]


def test_pod_mesh_wants_equal_parts_for_processes(monkeypatch):
    assert parallel.pod_mesh(8) == parallel.data_mesh(8)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match="batch_size=32 is not a multiple of the 3 processes"):
        parallel.pod_mesh(32)


@pytest.mark.parametrize(
    "arguments",
    [
        {"coordinator": "10.0.0.1:1234"},
        {"num_processes": 2},
        {"process_id": 0},
        {"coordinator": "10.0.0.1:1234", "num_processes": 2},
        {"num_processes": 2, "process_id": 0},
    ],
)
def test_start_distributed_wants_all_or_nothing(arguments, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: pytest.fail("started"))
    with pytest.raises(ValueError, match="give all three, or none") as error:
        parallel.start_distributed(**arguments)
    for name, value in arguments.items():
        assert f"{name}={value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), ((None, None, None), {})),
        (("10.0.0.1:99", 2, 0), (("10.0.0.1:99", 2, 0), {})),
        (
            ("127.0.0.1:99", 2, 1),
            (("127.0.0.1:99", 2, 1), {"coordinator_bind_address": "127.0.0.1:99"}),
        ),
        (
            ("localhost:99", 2, 1),
            (("localhost:99", 2, 1), {"coordinator_bind_address": "localhost:99"}),
        ),
    ],
)
def test_start_distributed_listens_only_where_it_must(arguments, expected, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    parallel.start_distributed(*arguments)
    assert calls == [expected]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_is_remembered_and_the_old_handlers_come_back(signum, monkeypatch):
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    with parallel.stop_signals() as flag:
        assert flag.signum is None
        os.kill(os.getpid(), signum)
        assert flag.signum == signum
        # The second one does not wait for a safe point.
        exits = []
        monkeypatch.setattr(os, "_exit", exits.append)
        os.kill(os.getpid(), signum)
        assert exits == [128 + signum]
    assert {s: signal.getsignal(s) for s in before} == before


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), parallel.stop_signals():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_stop_exits_with_the_code_of_its_signal():
    with pytest.raises(SystemExit) as stopped:
        raise parallel.StopRequested(signal.SIGTERM)
    assert stopped.value.code == 128 + signal.SIGTERM
