"""Training: published schedule, Adam against numpy, block and resume invariance, faults."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llc_jax import parallel
from llc_jax.problems.regression.data import RegressionBatches, RegressionTask
from llc_jax.problems.regression.losses import RegressionLoss
from llc_jax.problems.regression.model import RegressionTransformer, init_params
from llc_jax.training import loop as train
from llc_jax.training import optimizers
from llc_jax.training.batches import TokenBatches

KEY = 3


def normal_batch(rng_key):
    return {"x": jax.random.normal(rng_key, (8, 3))}


def quadratic_loss(params, batch):
    """Squared distance to a moving point, and a quartic so that gradients are not linear."""
    distance = params["w"][None] - batch["x"]
    return jnp.sum(distance**2, -1) + params["b"] ** 4


def initial_params():
    return {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array(0.7)}


def run(stops, *, state=None, block=1000, optimizer=None, seed=KEY, **kwargs):
    optimizer = optimizer or optimizers.adam_one_cycle(0.05, 40)
    state = state or train.init_state(initial_params(), optimizer)
    options = {"loss_fn": quadratic_loss, "batch_fn": normal_batch, **kwargs}
    outputs = train.fit(
        jax.random.key(seed), state, optimizer=optimizer, stops=stops, block=block, **options
    )
    return [jax.device_get(output) for output in outputs]


def assert_bitwise(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def published_rate(s, peak, num_steps):
    """PyTorch's OneCycleLR, linear, pct_start 0.5, both division factors num_steps / 2 - 1."""
    half = num_steps / 2 - 1
    start, end = peak / half, peak / half / half
    if s <= half:
        return start + (peak - start) * s / half
    return peak + (end - peak) * (s - half) / (num_steps - 1 - half)


def test_published_learning_rates():
    rate = optimizers.one_cycle(0.003, 500_000)
    for s in (0, 1, 100, 1673, 100_000, 249_999):
        np.testing.assert_allclose(rate(s), 1.2e-8 * (s + 1), rtol=1e-5)
    np.testing.assert_allclose(rate(249_999), 0.003, rtol=1e-6)
    for s in (250_000, 300_001, 400_000, 499_998):
        np.testing.assert_allclose(rate(s), published_rate(s, 0.003, 500_000), rtol=1e-5)
    np.testing.assert_allclose(rate(499_999), 0.003 / 249_999**2, rtol=1e-5)
    np.testing.assert_allclose(rate(600_000), 0.003 / 249_999**2, rtol=1e-5)


@pytest.mark.parametrize("num_steps", [4, 5, 40, 101])
def test_learning_rates_of_short_runs(num_steps):
    rate = optimizers.one_cycle(0.1, num_steps)
    got = np.array([rate(s) for s in range(num_steps)])
    expected = [published_rate(s, 0.1, num_steps) for s in range(num_steps)]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-9)
    assert (got > 0).all()
    assert got.max() <= np.float32(0.1)


def test_optimizer_is_adam_with_the_published_rate():
    # Three updates in float64 numpy, with the gradient by hand.
    optimizer = optimizers.adam_one_cycle(0.05, 40)
    state = train.init_state(initial_params(), optimizer)
    params = {k: np.float64(v) for k, v in initial_params().items()}
    mu, nu = ({k: np.zeros_like(v) for k, v in params.items()} for _ in range(2))
    batches = np.random.default_rng(0).normal(size=(3, 8, 3))
    for s, x in enumerate(batches):
        state, metrics = train.train_step(state, {"x": jnp.float32(x)}, quadratic_loss, optimizer)
        loss = ((params["w"] - x) ** 2).sum(-1).mean() + params["b"] ** 4
        grads = {"w": 2 * (params["w"] - x).mean(0), "b": 4 * params["b"] ** 3}
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, g in grads.items():
            mu[k] = 0.9 * mu[k] + 0.1 * g
            nu[k] = 0.999 * nu[k] + 0.001 * g**2
            mu_hat, nu_hat = mu[k] / (1 - 0.9 ** (s + 1)), nu[k] / (1 - 0.999 ** (s + 1))
            rate = published_rate(s, 0.05, 40)
            params[k] = params[k] - rate * mu_hat / (np.sqrt(nu_hat) + 1e-8)
        np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
        np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
        total = math.sqrt(sum((p**2).sum() for p in params.values()))
        np.testing.assert_allclose(metrics.param_norm, total, rtol=1e-5)
        for k in params:
            np.testing.assert_allclose(state.params[k], params[k], rtol=2e-5)
    assert int(state.step) == 3


def test_fit_is_train_step_on_keys_folded_with_the_step():
    optimizer = optimizers.adam_one_cycle(0.05, 40)
    state = train.init_state(initial_params(), optimizer)
    losses = []
    for s in range(5):
        batch = normal_batch(jax.random.fold_in(jax.random.key(KEY), s))
        state, metrics = train.train_step(state, batch, quadratic_loss, optimizer)
        losses.append(float(metrics.loss))
    ((step, fitted, fit_metrics),) = run([5])
    assert step == fitted.step == 5
    for k in ("w", "b"):
        np.testing.assert_allclose(fitted.params[k], state.params[k], rtol=1e-5)
    np.testing.assert_allclose(fit_metrics["loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(fit_metrics["last_loss"], losses[-1], rtol=1e-5)
    np.testing.assert_allclose(fit_metrics["grad_norm"], metrics.grad_norm, rtol=1e-5)
    np.testing.assert_allclose(fit_metrics["param_norm"], metrics.param_norm, rtol=1e-5)


@pytest.mark.parametrize("cut", [1, 7, 19])
def test_resumed_run_is_bitwise_the_uninterrupted_one(cut):
    whole = run([20])[-1][1]
    ((_, half, _),) = run([cut])
    assert isinstance(half.params["w"], np.ndarray)
    resumed = run([cut, 20], state=half)
    assert [step for step, _, _ in resumed] == [20]
    assert_bitwise(resumed[-1][1], whole)


@pytest.mark.parametrize("block", [1, 3, 6, 20])
def test_block_length_does_not_matter(block):
    assert_bitwise(run([20], block=block)[-1][1], run([20])[-1][1])


def test_another_key_gives_another_run():
    assert run([5], seed=1)[-1][1].params["w"].tobytes() != run([5])[-1][1].params["w"].tobytes()


def test_blocks_end_at_stops_and_at_multiples_of_the_block():
    steps = [step for step, _, _ in run([0, 3, 8, 20], block=6)]
    assert steps == [3, 6, 8, 12, 18, 20]


def test_rows_after_a_resume_repeat_those_of_the_uninterrupted_run():
    whole = run([0, 3, 8, 20], block=6)
    resumed = run([0, 3, 8, 20], block=6, state=whole[2][1])
    assert [step for step, _, _ in resumed] == [12, 18, 20]
    for first, second in zip(whole[3:], resumed, strict=True):
        assert_bitwise(first, second)


@dataclasses.dataclass(frozen=True)
class ScaledLoss:
    scale: float

    def __call__(self, params, batch):
        return self.scale * quadratic_loss(params, batch)


@dataclasses.dataclass(frozen=True)
class NormalBatches:
    size: int

    def __call__(self, rng_key):
        return {"x": jax.random.normal(rng_key, (self.size, 3))}


def test_one_compilation_serves_all_block_lengths_and_equal_arguments():
    before = train._run_block._cache_size()
    for stops, block in (([1], 1), ([4, 5, 12], 5), ([9], 100)):
        optimizer = optimizers.adam_one_cycle(0.01, 50)
        state = train.init_state(initial_params(), optimizer)
        for _ in range(2):  # the second time from numpy, as after a restart
            later = [int(state.step) + stop for stop in stops]
            options = {"loss_fn": ScaledLoss(2.0), "batch_fn": NormalBatches(4)}
            state = run(later, state=state, block=block, optimizer=optimizer, **options)[-1][1]
            state = state._replace(step=int(state.step))
    assert train._run_block._cache_size() == before + 1


def test_caller_keeps_his_arrays():
    optimizer = optimizers.adam_one_cycle(0.05, 40)
    params = initial_params()
    state = train.init_state(params, optimizer)
    outputs = list(
        train.fit(
            jax.random.key(KEY),
            state,
            loss_fn=quadratic_loss,
            batch_fn=normal_batch,
            optimizer=optimizer,
            stops=[2, 4],
        )
    )
    assert_bitwise(params, initial_params())
    assert_bitwise(state, train.init_state(initial_params(), optimizer))
    assert outputs[0][1].params["w"].is_deleted()  # a yielded state is donated to the next block


def nan_from_five(params, batch):
    """With plain descent at rate 1, w counts the steps and the loss is NaN from w = 5 on."""
    loss = jnp.where(params["w"] > 4.5, jnp.nan, -params["w"])
    return jnp.broadcast_to(loss, (batch["x"].shape[0],))


@pytest.mark.parametrize(("block", "before"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4]), (100, [3])])
def test_non_finite_loss_stops_the_run_at_its_step(block, before):
    optimizer = optax.sgd(1.0)
    state = train.init_state({"w": jnp.array(0.0)}, optimizer)
    outputs = train.fit(
        jax.random.key(0),
        state,
        loss_fn=nan_from_five,
        batch_fn=normal_batch,
        optimizer=optimizer,
        stops=[20] if block < 100 else [3, 20],
        block=block,
    )
    seen = []

    def consume():
        for step, state, _ in outputs:
            seen.append((step, float(state.params["w"])))

    with pytest.raises(FloatingPointError, match=r"at step 5 \(loss nan"):
        consume()
    assert seen == [(step, step) for step in before]


def test_update_that_breaks_the_parameters_is_not_yielded():
    # Loss and gradient of step 3 are finite; its learning rate is not.
    optimizer = optax.sgd(lambda count: jnp.where(count == 3, jnp.inf, 0.1))
    state = train.init_state(initial_params(), optimizer)
    with pytest.raises(FloatingPointError, match="at step 3 "):
        run([4], state=state, optimizer=optimizer)


class HostNormal:
    """The batches of `normal_batch`, read on the host."""

    def __init__(self):
        self.read = []

    def block(self, first, stop):
        self.read.append((first, stop))
        keys = [jax.random.fold_in(jax.random.key(KEY), step) for step in range(first, stop)]
        batches = [jax.device_get(normal_batch(key)) for key in keys]
        return jax.tree.map(lambda *x: np.stack(x), *batches)


@pytest.mark.parametrize("block", [3, 8])
def test_batches_of_the_host_are_those_of_their_steps(block):
    host, whole = HostNormal(), run([10, 20])[-1][1]
    read = run([10, 20], batch_fn=host, block=block)[-1][1]
    for x, y in zip(jax.tree.leaves(read), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    ends = sorted({10, 20, *range(block, 20, block)})
    assert host.read == [(0, 1), *itertools.pairwise([0, *ends])]  # one to look at its shape
    # A run that resumes at the end of a block reads what is left, and comes out the same.
    half = run([10], batch_fn=HostNormal(), block=block)[-1][1]
    host = HostNormal()
    resumed = run([10, 20], state=half, batch_fn=host, block=block)[-1][1]
    assert host.read[1][0] == 10
    assert_bitwise(resumed, read)


def test_batches_of_the_host_are_split_over_a_mesh():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    one, many = run([10])[-1], run([10], batch_fn=HostNormal(), mesh=mesh)[-1]
    for x, y in zip(jax.tree.leaves(one[1:]), jax.tree.leaves(many[1:]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_adamw_by_hand():
    optimizer = optimizers.adamw(0.1, weight_decay=0.5, num_warmup=4)
    assert optimizers.adamw(0.1, weight_decay=0.5, num_warmup=4) is optimizer
    w, g = 2.0, 3.0  # the first Adam step is the sign of the gradient; the rate begins at a quarter
    with jax.numpy_dtype_promotion("standard"):  # as in `train_step`
        update, _ = optimizer.update(jnp.float32(g), optimizer.init(jnp.float32(w)), jnp.float32(w))
    np.testing.assert_allclose(update, -0.1 / 4 * (1 + 0.5 * w), rtol=1e-5)
    with pytest.raises(ValueError, match="learning_rate=0"):
        optimizers.adamw(0)


@pytest.mark.parametrize("num_devices", [2, 4])
def test_sharded_batches_give_the_same_run(num_devices):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:num_devices]), ("data",))
    one, many = run([10])[-1], run([10], mesh=mesh)[-1]
    assert many[1].step == 10
    for x, y in zip(jax.tree.leaves(one[1:]), jax.tree.leaves(many[1:]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_mesh_splits_the_batch_and_copies_the_state():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    optimizer = optimizers.adam_one_cycle(0.05, 40)
    state = train.init_state(initial_params(), optimizer)
    ((_, state, _),) = train.fit(
        jax.random.key(0),
        state,
        loss_fn=quadratic_loss,
        batch_fn=normal_batch,
        optimizer=optimizer,
        stops=[2],
        mesh=mesh,
    )
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    assert len(state.params["w"].sharding.device_set) == 4


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"stops": []}, "stops is empty"),
        ({"stops": [3, 3]}, "3 after 3"),
        ({"stops": [5, 2]}, "2 after 5"),
        ({"stops": [-1, 2]}, "-1 after -1"),
        ({"stops": [3], "block": 0}, "block=0"),
        ({"stops": [3], "loss_fn": lambda p, b: jnp.sum(p["w"])}, "drop the final mean"),
        ({"stops": [3], "batch_fn": lambda key: {}}, "leading axes"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(kwargs, match):
    with pytest.raises(ValueError, match=match):
        run(**kwargs)


def test_raw_keys_and_odd_meshes_are_refused():
    optimizer = optimizers.adam_one_cycle(0.05, 40)
    state = train.init_state(initial_params(), optimizer)
    options = {"loss_fn": quadratic_loss, "optimizer": optimizer, "stops": [3]}
    with pytest.raises(ValueError, match="typed key"):
        train.fit(jax.random.PRNGKey(0), state, batch_fn=normal_batch, **options)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:3]), ("data",))
    with pytest.raises(ValueError, match="8 is not a multiple of the 3 devices"):
        train.fit(jax.random.key(0), state, batch_fn=normal_batch, mesh=mesh, **options)


@pytest.mark.parametrize(
    ("peak", "num_steps", "match"),
    [(0.1, 3, "num_steps=3"), (0.0, 10, "peak=0.0"), (float("inf"), 10, "peak=inf")],
)
def test_bad_schedules_are_refused(peak, num_steps, match):
    with pytest.raises(ValueError, match=match):
        optimizers.one_cycle(peak, num_steps)


@pytest.mark.slow
def test_training_learns_in_context():
    # 1500 steps at ten times the paper's rate get well below predicting zero, loss 4.125.
    model = RegressionTransformer(double_residual=True)
    optimizer = optimizers.adam_one_cycle(0.003, 1500)
    *_, (_, _, metrics) = train.fit(
        jax.random.key(0),
        train.init_state(init_params(jax.random.key(1), model), optimizer),
        loss_fn=RegressionLoss(model),
        batch_fn=RegressionBatches(RegressionTask(), 64),
        optimizer=optimizer,
        stops=[1500],
        block=300,
    )
    assert 1.6 < float(metrics["loss"]) < 2.6


@pytest.mark.parametrize("mesh", [None, parallel.data_mesh(1)], ids=["no mesh", "mesh"])
def test_parts_of_batches_need_a_mesh_over_as_many_processes(mesh):
    tokens = np.zeros((8, 4), np.uint16)
    batches = TokenBatches(tokens, 4, seed=0, process_index=0, process_count=2)
    state = train.init_state({"w": jnp.zeros(4)}, optimizers.adamw(1e-3))
    with pytest.raises(ValueError, match=r"process_count=2 processes and the mesh is over 1"):
        train.fit(
            jax.random.key(0), state, loss_fn=lambda p, b: b["tokens"].astype(float) @ p["w"],
            batch_fn=batches,
            optimizer=optimizers.adamw(1e-3), stops=[1], mesh=mesh,
        )  # fmt: skip
