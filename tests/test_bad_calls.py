"""Bad calls end in a short error of ours before anything compiles, or in the right value."""

import contextlib
import datetime
import decimal
import functools
import logging
import pathlib
import traceback
from typing import NamedTuple

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings

import llc_jax
from llc_jax import SGLD, curvature

PACKAGE = str(pathlib.Path(llc_jax.__file__).parent)
KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


def loss(params, batch):
    return 0.5 * (batch["x"] @ params["w"]) ** 2


def parts(params, batch):
    return batch["x"] * params["w"]


def collected(params, batch):
    return params["w"][0]


def rows(rng_key):
    return {"x": jax.random.normal(rng_key, (4, 3))}


class Unhashable:
    __hash__ = None

    def __call__(self, params, batch):
        return loss(params, batch)


class NoRepr:
    def __repr__(self):
        raise RuntimeError("no repr")


class NoArray:
    shape, dtype = (8, 3), np.float32

    def __array__(self, *args, **kwargs):
        raise RuntimeError("not on this machine")


class Loader:
    """As of torch, tf.data and Hugging Face: a thing to loop over."""

    def __len__(self):
        return 1

    def __iter__(self):
        return iter([{"x": X}])


def raises(params, batch):
    raise RuntimeError("a long story " * 500)


FUNCTIONS = (
    raises, Unhashable(), rows, scalar := lambda p, b: jnp.mean(loss(p, b)), lambda p, b: None,
    lambda p, b: (loss(p, b), {}), lambda p, b: loss(p, b) + 0j, lambda p, b: "loss",
    lambda p, b: list(loss(p, b)), lambda p, b: float(p["w"][0]), lambda p, b: p["v"],
    lambda p, b: loss(p, b)[1:], lambda p, b: loss(p, b).astype(int), lambda p, b: b["x"][:, 0],
    lambda p, b: jax.pure_callback(np.asarray, loss(p, b), loss(p, b)),
    lambda p, b: loss(p, b) if p["w"][0] > 0 else -loss(p, b),
)  # fmt: skip


@functools.cache
def specials():
    """Objects that hypothesis does not make; made late, since some start a backend."""
    deleted, leaked = jnp.ones(3), []
    deleted.delete()
    jax.make_jaxpr(lambda x: leaked.append(x) or x)(jnp.ones(3))
    objects = [
        object(), int, ..., NotImplemented, datetime.datetime(2026, 1, 1), decimal.Decimal("1.5"),
        np.datetime64("2026-01-01"), jax.random.PRNGKey(0), jax.random.split(KEY, 3), deleted,
        leaked[0], pd.DataFrame({"x": [1.0, 2.0]}), pd.Series(["a", "b"], dtype="category"),
        np.ma.masked_invalid([np.nan, 1.0]), NoRepr(), NoArray(), Loader(), SGLD,
        llc_jax.Stream(None), llc_jax.Stream(rows), jax.ShapeDtypeStruct((8, 3), np.float32),
        {"x": [[1.0], [1.0, 2.0]]}, {1: X, "x": X}, [np.zeros(3, np.float32)] * 50, np, loss,
        jax.make_mesh((1,), ("batch",)), pathlib.Path("data"), {"x": X, "name": "iris"},
    ]  # fmt: skip
    return [*objects, *FUNCTIONS]


SCALARS = (
    st.none() | st.booleans() | st.integers(max_value=-1) | st.integers(min_value=2**31)
    | st.floats(max_value=-1e-3) | st.sampled_from([np.nan, np.inf, 1e-50, 1e300, 2.5])
    | st.complex_numbers() | st.text(max_size=8) | st.binary(max_size=3)
)  # fmt: skip
DTYPES = (
    arrays.floating_dtypes() | arrays.integer_dtypes() | arrays.unsigned_integer_dtypes()
    | arrays.complex_number_dtypes() | arrays.datetime64_dtypes() | arrays.unicode_string_dtypes()
    | st.just(np.dtype(bool)) | st.just(np.dtype(object))
)  # fmt: skip
ARRAYS = arrays.arrays(DTYPES, arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5))


class Special(NamedTuple):
    """Stands for one of the objects, some of which cannot be printed."""

    index: int


def resolved(tree):
    if isinstance(tree, Special):
        return specials()[tree.index % len(specials())]
    if isinstance(tree, list | tuple):
        return type(tree)(map(resolved, tree))
    return {k: resolved(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


LEAVES = SCALARS | ARRAYS | st.builds(Special, st.integers(0, 60))
TREES = st.recursive(
    LEAVES,
    lambda x: (
        st.lists(x, max_size=3)
        | st.lists(x, max_size=3).map(tuple)
        | st.sets(st.integers())
        | st.dictionaries(st.sampled_from(["w", "x"]), x, max_size=2)
    ),
    max_leaves=3,
)
SIZES = {"num_chains": 2, "num_draws": 3, "num_burnin": 1, "num_probes": 0}
W = {"w": np.ones(3, np.float32)}
RUN = {"rng_key": KEY, "loss_fn": loss, "params": W, "data": {"x": X}, "mask": None}
SAMPLED = {**RUN, "sampler": SGLD(1e-3), "localization": 1.0, "nbeta": 10.0, "step": 0, **SIZES}
OVER = {**{k: v for k, v in SAMPLED.items() if k not in ("params", "step")}, "checkpoints": {1: W}}
MAP = {"rng_key": KEY, "params": W, "num_probes": 2}
CURVE = {"steps": np.arange(8), "values": np.arange(8.0), "stderr": None, "kernel": "fitted"}
BAND = {"confidence": 0.95, "num_samples": 50, "seed": 0}


EXAMPLES = 10


@functools.cache
def reference():
    return llc_jax.estimate_llc(**SAMPLED)


@functools.cache
def product():
    return curvature.hvp(loss, W, {"x": X})


def with_product(function):
    return lambda **call: function(**{"matvec": product(), **call})


def listed(function):
    return lambda **call: list(function(**call))


def late():
    jax.jit(lambda x: x * 5 - 2)(1.0)
    llc_jax.default_nbeta("too late")


def run_of(sampler):
    return lambda **call: llc_jax.estimate_llc(**{**SAMPLED, "sampler": sampler(**call)})


CALLS = {
    # name: (function, a good call, all of whose arguments may go bad)
    "estimate_llc": (
        llc_jax.estimate_llc,
        {**SAMPLED, "batch_size": 4, "thinning": 1, "grad_accum": 1, "chain_batch": None,
         "parts_fn": parts, "collect": collected, "mesh": None, "checkpoint_batch": 1},
    ),
    "over checkpoints": (listed(llc_jax.estimate_llc_over_checkpoints), OVER),
    "over settings": (
        llc_jax.estimate_llc_over_settings, {**SAMPLED, "setting_batch": None, "mesh": None},
    ),
    "curvature": (
        listed(llc_jax.curvature_over_checkpoints),
        {**{k: v for k, v in RUN.items() if k != "params"}, "checkpoints": {1: W}, "nbeta": 10.0,
         "localization": 1.0, "num_eigenvalues": 1, "num_deflated": 2, "num_iterations": 2,
         "num_probes": 2, "probe_batch": 1, "micro_batch": None, "checkpoint_batch": 1},
    ),
    "trace": (with_product(curvature.hutchinson_trace), {**MAP, "probe_batch": 1}),
    "eigenvalues": (
        with_product(curvature.top_eigenvalues),
        {"rng_key": KEY, "params": W, "num_eigenvalues": 1, "num_iterations": 2},
    ),
    "density": (
        with_product(curvature.spectral_density),
        {**MAP, "num_iterations": 2, "num_deflated": 0, "num_points": 4, "width": None},
    ),
    "gaussian": (
        with_product(curvature.gaussian_llc),
        {**MAP, "nbeta": 10.0, "localization": 1.0, "num_iterations": 2, "num_deflated": 1,
         "positive_part": False},
    ),
    "stages": (llc_jax.find_stages, {**CURVE, **BAND, "dip": 0.5}),
    "plateaus": (llc_jax.find_plateaus, {**CURVE, **BAND, "max_slope": None}),
    "smooth": (llc_jax.smooth_curve, {**CURVE, "grid": None}),
    "calibrate": (
        llc_jax.calibrate,
        {**RUN, "nbeta": 10.0, "localization": 1.0, "sampler": None, "checkpoints": None,
         "step_fractions": (0.4,), "nbeta_factors": (1.0,), "localization_factors": (1.0,),
         "num_draws": 4, "num_burnin": 4, "num_chains": 2, "relative_stderr": 0.1,
         "batch_size": None, "step": 0},
    ),
    "extrapolate": (llc_jax.extrapolate_step_size, {"coarse": None, "fine": None}),
    "default_nbeta": (llc_jax.default_nbeta, {"n": 100}),
    "tie": (llc_jax.tie, {"loss_fn": loss, "params": {"a": W["w"], "b": W["w"]}}),
    **{
        kind.__name__: (run_of(kind), dict(kind(1e-3, *rest)._asdict()))
        for kind, *rest in (
            (llc_jax.SGLD,), (llc_jax.RMSPropSGLD,), (llc_jax.AdamSGLD,), (llc_jax.SGNHT, 1.0),
            (llc_jax.BAOAB, 1.0), (llc_jax.MALA,),
        )
    },
}  # fmt: skip


@contextlib.contextmanager
def compilations():
    """A list of the log lines of everything that is compiled."""
    lines, logger = [], logging.getLogger("jax")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    before, logger.propagate = logger.propagate, False
    try:
        with jax.log_compiles():
            yield lambda: [line for line in lines if "Compiling" in line]
    finally:
        logger.propagate = before
        logger.removeHandler(handler)


def fault(function, call, compiled):
    """What is wrong with how a call ends, or None; and how it ends."""
    before = len(compiled())
    try:
        function(**call)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        message = str(error)
        if not isinstance(error, ValueError | TypeError):
            return f"{type(error).__name__}: {message[:200]}", "error"
        if not where.startswith(PACKAGE):
            return f"raised in {where}: {message[:200]}", "error"
        if len(message) > 600:
            return f"{len(message)} characters: {message[:200]}", "error"
        if len(compiled()) > before:
            return f"{compiled()[before:]}, and then: {message[:200]}", "error"
        return None, message
    return None, None


@pytest.mark.parametrize("name", CALLS)
def test_ten_bad_calls_each_end_in_an_error_of_ours_or_a_value(name):
    function, good = CALLS[name]
    refused = []
    specials(), product()  # which compile

    @settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def check(data):
        count = data.draw(st.integers(1, min(2, len(good))), "how many")
        bad = data.draw(st.permutations(sorted(good)), "which")[:count]
        changes = {argument: resolved(data.draw(TREES, argument)) for argument in bad}
        assume(any(value is not good[argument] for argument, value in changes.items()))
        found, message = fault(function, {**good, **changes}, compiled)
        assert found is None, found
        refused.append(message)

    with compilations() as compiled:
        check()
    assert sum(message is not None for message in refused) > EXAMPLES / 2


def test_they_are_two_hundred():
    assert len(CALLS) * EXAMPLES >= 200


def test_compilations_and_errors_of_others_are_seen():
    with compilations() as compiled:
        assert "too late" in fault(late, {}, compiled)[0].split("Compiling")[1]
        assert "raised in" in fault(lambda: np.zeros(2) + np.zeros(3), {}, compiled)[0]
        assert "RuntimeError" in fault(raises, {"params": 0, "batch": 0}, compiled)[0]
        assert fault(llc_jax.default_nbeta, {"n": 1}, compiled)[0] is None


DISGUISED = {
    # id: a change to the call that is the same call
    "numpy integers": {"num_draws": np.int64(3), "num_chains": np.uint8(2), "step": np.int32(0)},
    "jax scalars": {"step": jnp.uint32(0), "nbeta": jnp.float32(10), "localization": jnp.int32(1)},
    "half a number": {"nbeta": jnp.bfloat16(10), "localization": np.float16(1)},
    "arrays of no axes": {"nbeta": np.array(10), "localization": np.array(1.0)},
    "jax weights": {"params": {"w": jnp.ones(3)}},
    "double weights": {"params": {"w": np.ones(3)}},
    "double data": {"data": {"x": X.astype(np.float64)}},
    "a memory map of data": {"data": {"x": X.view(np.memmap)}},
    "a mask of ones": {"mask": {"w": np.ones(3, bool)}},
    "a partial function": {"loss_fn": functools.partial(loss)},
    "a function under jit": {"loss_fn": jax.jit(loss)},
    "a sampler of numpy numbers": {"sampler": SGLD(np.float64(1e-3))},
}


@pytest.mark.parametrize("name", DISGUISED)
def test_the_same_call_in_another_guise_has_the_same_value(name):
    found = llc_jax.estimate_llc(**{**SAMPLED, **DISGUISED[name]})
    np.testing.assert_allclose(found.losses, reference().losses, rtol=1e-6)
    assert found.settings == reference().settings
