"""Bad input gives a `ValueError` with the value and a remedy, before anything compiles."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llc_jax import SGLD, AdamSGLD, RMSPropSGLD, Stream, estimate_llc, estimate_llc_over_checkpoints

ROWS = 6


def quadratic(params, batch):
    return 0.5 * jnp.sum((params["w"][None] - batch["x"]) ** 2, axis=-1) + params["b"] ** 2


def scalar_loss(params, batch):
    return jnp.mean(quadratic(params, batch))


def one_loss_too_many(params, batch):
    return jnp.concatenate([quadratic(params, batch), jnp.zeros(1)])


def column_of_losses(params, batch):
    return quadratic(params, batch)[:, None]


def loss_and_metrics(params, batch):
    return quadratic(params, batch), {"accuracy": 1.0}


def integer_losses(params, batch):
    return jnp.zeros(batch["x"].shape[0], jnp.int32)


def rows_of_a_stream(rng_key):
    return {"x": jax.random.normal(rng_key, (4, 3))}


def ragged_stream(rng_key):
    return {"x": jax.random.normal(rng_key, (4, 3)), "y": jnp.zeros(5)}


PARAMS = {"w": np.array([1.0, -2.0, 0.5], np.float32), "b": np.float32(0.25)}
DATA = {"x": np.ones((ROWS, 3), np.float32)}
STREAM = Stream(rows_of_a_stream)
KEY = jax.random.key(0)
LEGACY_KEY = jax.random.PRNGKey(0)
TWO_KEYS = jax.random.split(KEY)
NAN, INF = float("nan"), float("inf")


def params(**changes):
    return {**PARAMS, **changes}


def mask(w=1, b=1):
    return {"w": w, "b": b}


CASES = {
    # id: (changes to a good call, what the message must contain: the value, then the remedy)
    "no draws": ({"num_draws": 0}, ["num_draws=0", "at least 1"]),
    "burn-in without draws": (
        {"num_draws": 0, "num_burnin": 100}, ["num_draws=0", "burn-in alone estimates nothing"],
    ),
    "half a draw": ({"num_draws": 2.5}, ["num_draws=2.5", "give an integer"]),
    "draws are not a flag": ({"num_draws": True}, ["num_draws=True", "give an integer"]),
    "draws as text": ({"num_draws": "10"}, ["num_draws='10'", "give an integer"]),
    "no chains": ({"num_chains": 0}, ["num_chains=0", "at least 1"]),
    "negative burn-in": ({"num_burnin": -1}, ["num_burnin=-1", "at least 0"]),
    "no thinning is 1": ({"thinning": 0}, ["thinning=0", "at least 1"]),
    "no accumulation is 1": ({"grad_accum": 0}, ["grad_accum=0", "at least 1"]),
    "no checkpoints in flight": ({"checkpoint_batch": 0}, ["checkpoint_batch=0", "at least 1"]),
    "no chains in flight": ({"chain_batch": 0}, ["chain_batch=0", "at least 1"]),
    "negative probes": ({"num_probes": -1}, ["num_probes=-1", "at least 0"]),
    "batch larger than data": ({"batch_size": 7}, ["batch_size=7", "n=6", "give at most n"]),
    "empty batch": ({"batch_size": 0}, ["batch_size=0", "at least 1"]),
    "micro-batches do not divide": (
        {"grad_accum": 4}, ["grad_accum=4", "batch size 6", "must be equal"],
    ),
    "nan params": (
        {"params": params(w=np.array([1.0, NAN, 0.0], np.float32))},
        ["params['w'] at step 0", "1 of 3 values", "use an earlier checkpoint"],
    ),
    "infinite params": (
        {"params": params(b=np.float32(INF)), "step": 12},
        ["params['b'] at step 12", "1 of 1 values", "use an earlier checkpoint"],
    ),
    "integer params": (
        {"params": params(b=np.int32(3))}, ["params['b']", "int32", "close loss_fn over integers"],
    ),
    "no params": ({"params": {}}, ["no arrays", "give the weights"]),
    "half a step": ({"step": 1.5}, ["step 1.5", "give a training step from 0"]),
    "step as text": ({"step": "7"}, ["step '7' (str)", "give a training step from 0"]),
    "negative step": ({"step": -1}, ["step -1", "give a training step from 0"]),
    "huge step": ({"step": 2**32}, ["step 4294967296", "to 2**32 - 1"]),
    "mask of other structure": (
        {"mask": {"w": 1}}, ["mask has structure", "'w': *", "give a 0 or 1"],
    ),
    "mask of other shape": (
        {"mask": mask(w=np.ones(2))}, ["mask['w'] has shape (2,)", "give a scalar or shape (3,)"],
    ),
    "mask that is not 0 or 1": (
        {"mask": mask(w=np.array([0, 0.5, 1]))}, ["mask['w'] has values other than 0 and 1"],
    ),
    "nan mask": ({"mask": mask(b=NAN)}, ["mask['b'] has values other than 0 and 1"]),
    "mask of zeros": ({"mask": mask(0, 0)}, ["0 everywhere", "set some weights to 1"]),
    "scalar loss": (
        {"loss_fn": scalar_loss}, ["shape ()", "(6,)", "drop the final mean over the batch"],
    ),
    "one loss too many": ({"loss_fn": one_loss_too_many}, ["shape (7,)", "shape (6,)"]),
    "column of losses": ({"loss_fn": column_of_losses}, ["shape (6, 1)", "shape (6,)"]),
    "loss with metrics": ({"loss_fn": loss_and_metrics}, ["returned tuple", "shape (6,)"]),
    "integer losses": ({"loss_fn": integer_losses}, ["int32", "floating point"]),
    "legacy key": ({"rng_key": LEGACY_KEY}, ["uint32", "(2,)", "jax.random.key(seed)"]),
    "array of keys": ({"rng_key": TWO_KEYS}, ["shape (2,)", "give one typed key"]),
    "seed": ({"rng_key": 0}, ["dtype None", "jax.random.key(seed)"]),
    "negative step size": ({"sampler": SGLD(-1e-3)}, ["step_size=-0.001", "give one finite"]),
    "step size of zero": ({"sampler": SGLD(0.0)}, ["step_size=0.0", "must be above 0"]),
    "decay of one, corrected": (
        {"sampler": RMSPropSGLD.corrected(1e-3, decay=1.0)}, ["decay=1.0", "must be below 1"],
    ),
    "no epsilon": (
        {"sampler": RMSPropSGLD.devinterp(1e-3, epsilon=0.0)}, ["epsilon=0.0", "must be above 0"],
    ),
    "momentum of one": ({"sampler": AdamSGLD(1e-3, 1.0)}, ["momentum=1.0", "must be below 1"]),
    "nan step size": ({"sampler": SGLD(NAN)}, ["step_size=nan", "give one finite number"]),
    "infinite step size": ({"sampler": SGLD(INF)}, ["step_size=inf", "give one finite number"]),
    "two step sizes": (
        {"sampler": SGLD(np.array([1.0, 2.0]))}, ["step_size=array([1., 2.])", "give one finite"],
    ),
    "sampler class": ({"sampler": SGLD}, ["SGLD", "give an instance"]),
    "sampler by name": ({"sampler": "sgld"}, ["sampler='sgld'", "give an instance"]),
    "an optimizer": ({"sampler": optax.sgd(1e-3)}, ["sampler=Gradient", "give an instance"]),
    "nan nbeta": ({"nbeta": NAN}, ["nbeta=nan", "finite number >= 0"]),
    "negative nbeta": ({"nbeta": -1.0}, ["nbeta=-1.0", "finite number >= 0"]),
    "several nbetas": ({"nbeta": np.array([1.0, 2.0])}, ["nbeta=array", "give one finite"]),
    "nbeta as text": ({"nbeta": "100"}, ["nbeta='100'", "give one finite"]),
    "negative localization": ({"localization": -2.0}, ["localization=-2.0", ">= 0"]),
    "infinite localization": ({"localization": INF}, ["localization=inf", "finite number"]),
    "stream without nbeta": ({"data": STREAM, "nbeta": None}, ["nbeta=None", "give nbeta"]),
    "stream with batch size": ({"data": STREAM, "batch_size": 4}, ["batch_size=4", "leave"]),
    "ragged stream": ({"data": Stream(ragged_stream)}, ["'y'", "5", "must share one length"]),
    "micro-batches of a stream": (
        {"data": STREAM, "grad_accum": 3}, ["grad_accum=3", "batch size 4", "must be equal"],
    ),
    "ragged data": (
        {"data": {**DATA, "y": np.zeros(5)}}, ["['y']\": 5", "['x']\": 6", "must share one length"],
    ),
    "scalar data": ({"data": {**DATA, "y": 1.0}}, ["['y']\": 0", "pytree of arrays"]),
    "no data": ({"data": {}}, ["leading axes {}", "pytree of arrays"]),
    "data without rows": ({"data": {"x": np.zeros((0, 3))}}, ["['x']\": 0", "n >= 1"]),
    "one example": (
        {"data": {"x": np.ones((1, 3))}, "nbeta": None}, ["got 1", "give nbeta yourself"],
    ),
}  # fmt: skip


@pytest.fixture
def compiled(caplog):
    """The log lines of everything that was compiled so far in this test."""
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        yield lambda: [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]


def test_compilations_are_seen(compiled):
    jax.jit(lambda x: x * 3 + 1)(1.0)
    assert any("Compiling" in line for line in compiled())


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_with_value_and_remedy(name, compiled):
    changes, fragments = CASES[name]
    call = {
        "rng_key": KEY, "loss_fn": quadratic, "params": PARAMS, "data": DATA,
        "sampler": SGLD(1e-3), "nbeta": 10.0, "localization": 1.0, "num_chains": 2,
        "num_draws": 3, "num_burnin": 1, **changes,
    }  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(fragments[0])) as error:
        estimate_llc(**call)
    for fragment in fragments:
        assert fragment in str(error.value)
    assert compiled() == []


CHECKPOINT_CASES = {
    # id: (the checkpoint after a good one, what the message must contain)
    "other shape": (
        params(w=np.zeros(4, np.float32)), ["step 7", "['w']", "(3,)", "(4,)", "from one model"],
    ),
    "other dtype": (params(w=np.zeros(3, np.float16)), ["step 7", "float32", "float16"]),
    "leaf missing": ({"w": PARAMS["w"]}, ["step 7", "['b']", "absent", "from one model"]),
    "leaf too many": (params(extra=np.zeros(2)), ["step 7", "['extra']", "absent"]),
    "other container": ([PARAMS["b"], PARAMS["w"]], ["step 7", "absent", "from one model"]),
    "nan": (params(b=np.float32(NAN)), ["params['b'] at step 7", "use an earlier checkpoint"]),
    "integers": (params(b=np.int32(0)), ["params['b'] at step 7", "int32"]),
}  # fmt: skip


def over(checkpoints, **options):
    return estimate_llc_over_checkpoints(
        KEY, quadratic, checkpoints, DATA, sampler=SGLD(1e-3), localization=1.0,
        num_chains=2, num_draws=3, num_burnin=1, num_probes=0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINT_CASES)
def test_a_later_checkpoint_that_does_not_fit_is_named(name, compiled):
    later, fragments = CHECKPOINT_CASES[name]
    estimates = over([(0, PARAMS), (7, later)], checkpoint_batch=2)
    with pytest.raises(ValueError, match=re.escape(fragments[0])) as error:
        next(estimates)
    for fragment in fragments:
        assert fragment in str(error.value)
    assert not any("jit(sample)" in line for line in compiled())


@pytest.mark.parametrize("empty", [[], {}, iter(())], ids=["list", "dict", "iterator"])
def test_no_checkpoints_are_refused_at_the_call(empty, compiled):
    with pytest.raises(ValueError, match=r"checkpoints is empty: give at least one"):
        over(empty)
    assert compiled() == []


def test_errors_of_the_first_checkpoint_come_at_the_call_not_at_the_first_result(compiled):
    with pytest.raises(ValueError, match="not finite"):
        over({3: params(b=np.float32(NAN))})
    with pytest.raises(ValueError, match="num_draws=0"):
        estimate_llc_over_checkpoints(
            KEY, quadratic, {0: PARAMS}, DATA, sampler=SGLD(1e-3), localization=1.0, num_draws=0
        )
    assert compiled() == []


def test_differences_between_large_trees_are_cut():
    many = {f"w{i}": np.zeros(2, np.float32) for i in range(9)}
    other = {name: np.zeros(3, np.float32) for name in many}
    with pytest.raises(ValueError, match=r"\['w3'\].* and 5 more; all checkpoints") as error:
        list(
            estimate_llc_over_checkpoints(
                KEY, lambda p, b: b["x"][:, 0] * p["w0"][0], [(0, many), (1, other)], DATA,
                sampler=SGLD(1e-3), localization=1.0, checkpoint_batch=2,
            )
        )  # fmt: skip
    assert "['w4']" not in str(error.value)


def test_the_smallest_run_of_numpy_scalars_is_accepted():
    estimate = estimate_llc(
        KEY, quadratic, PARAMS, DATA, sampler=SGLD(np.float64(1e-3)), nbeta=np.float32(10),
        localization=0, num_chains=np.int64(1), num_draws=1, num_burnin=0, mask=mask(1.0, False),
        step=np.int64(2**32 - 1),
    )  # fmt: skip
    assert estimate.mean == 0.0  # the only draw is the anchor
    assert np.isnan([estimate.stderr, estimate.rhat, estimate.ess]).all()
    assert "few effective draws" in estimate.verdict
    assert estimate.settings["localization"] == 0.0
