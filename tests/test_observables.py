"""What is recorded at the draws: by whom, in which shape, with which error bar, and on disk."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llc_jax import SGLD, Stream, diagnostics, estimate_llc, estimate_llc_over_checkpoints
from llc_jax.observables import Function, LossGap, LossTerms, Observable, ProbeLosses
from llc_jax.storage import results

H = np.array([0.5, 1.0, 2.0], np.float32)
ANCHOR = {"w": np.zeros(3, np.float32)}
X = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
DATA = {"x": X}
PROBE = {"x": np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)}
NBETA, LOCALIZATION, STEP_SIZE = 10.0, 1.0, 1e-2


def terms(params, batch):
    return 0.5 * jnp.asarray(H)[None] * (params["w"][None] - 0.1 * batch["x"]) ** 2


def loss(params, batch):
    return jnp.sum(terms(params, batch), axis=1)


def weights(params, batch):
    return params["w"]


def rows_of(params, batch):
    return batch["x"][:, 0]


def run(observables=None, data=DATA, **options):
    settings = {
        "sampler": SGLD(STEP_SIZE), "nbeta": NBETA, "localization": LOCALIZATION,
        "num_chains": 4, "num_draws": 12, "num_burnin": 3, "num_probes": 0, "batch_size": 4,
    } | options  # fmt: skip
    if isinstance(data, Stream):
        del settings["batch_size"]
    return estimate_llc(jax.random.key(0), loss, ANCHOR, data, observables=observables, **settings)


@pytest.mark.parametrize("thinning", [1, 3])
@pytest.mark.parametrize("grad_accum", [1, 2])
def test_everything_is_recorded_at_one_point(thinning, grad_accum):
    """Weights, probes, terms and minibatch of a draw are those of which the loss is known."""
    found = run(
        {"weights": Function(weights), "probe": ProbeLosses(PROBE), "terms": LossTerms(terms),
         "rows": Function(rows_of)},
        thinning=thinning, grad_accum=grad_accum,
    )  # fmt: skip
    w, rows = found.observables["weights"], found.observables["rows"]
    assert w.shape == (4, 12, 3)
    flat = w.reshape(-1, 3)
    probes = np.stack([loss({"w": v}, PROBE) for v in flat]).reshape(4, 12, 5)
    np.testing.assert_allclose(found.observables["probe"], probes, rtol=1e-5)
    # Rows are told by their first entry.
    index = np.argmin(np.abs(rows[..., None] - X[:, 0]), axis=-1)
    batches = X[index]  # [chain, draw, batch, 3]
    direct = 0.5 * H * ((w[:, :, None] - 0.1 * batches) ** 2 - (0.1 * batches) ** 2)
    np.testing.assert_allclose(
        found.observables["terms"], direct.mean(axis=2), rtol=1e-4, atol=1e-6
    )
    gap = found.losses - found.anchor_losses
    np.testing.assert_allclose(found.observables["terms"].sum(-1), gap, rtol=1e-4, atol=1e-6)


def test_recording_changes_no_chain():
    plain = run(num_probes=2, thinning=2)
    watched = run({"probe": ProbeLosses(PROBE)}, num_probes=2, thinning=2)
    np.testing.assert_array_equal(plain.losses, watched.losses)
    np.testing.assert_array_equal(plain.acceptance, watched.acceptance)


@pytest.mark.parametrize("num_blocks", [1, 3, 12])
def test_means_of_blocks_are_those_of_the_draws(num_blocks):
    found = run(
        {"draws": ProbeLosses(PROBE), "blocks": ProbeLosses(PROBE, num_blocks=num_blocks)}
    ).observables
    expected = found["draws"].reshape(4, num_blocks, -1, 5).mean(axis=2)
    np.testing.assert_allclose(found["blocks"], expected, rtol=1e-6)


def test_a_stack_that_would_not_fit_is_never_made():
    """With blocks, no array of the program has an axis of all draws and examples."""
    big = {"x": np.ones((997, 3), np.float32)}

    def shapes(**options):
        estimate = run({"probe": ProbeLosses(big, **options)}, num_draws=60)
        return estimate.observables["probe"].shape

    assert shapes() == (4, 60, 997)
    assert shapes(num_blocks=2) == (4, 2, 997)


def test_the_summary_is_the_exact_value_with_an_honest_error():
    """Posterior mean of w² under SGLD: 1 / (Λ (1 - εΛ/4)), Λ = nbeta h + localization."""

    def squares(params, batch):
        return params["w"] ** 2

    def centred(params, batch):
        return batch["x"] * 0.5 * jnp.sum(jnp.asarray(H) * params["w"] ** 2)

    found = estimate_llc(
        jax.random.key(3), centred, ANCHOR, {"x": np.ones(2, np.float32)},
        sampler=SGLD(STEP_SIZE), nbeta=NBETA, localization=LOCALIZATION, num_chains=512,
        num_draws=500, num_burnin=200, num_probes=0,
        observables={"squares": Function(squares), "blocks": Function(squares, num_blocks=10)},
    )  # fmt: skip
    stiffness = NBETA * H + LOCALIZATION
    exact = 1 / (stiffness * (1 - STEP_SIZE * stiffness / 4))
    for name in ("squares", "blocks"):
        value, stderr = found.summaries[name]
        assert value.shape == stderr.shape == (3,)
        assert np.all(np.abs(value - exact) < 4 * stderr)
        assert np.all(stderr < 0.03 * exact)
    gap = LossGap()
    recorded = gap.Recorded(None, None, found.losses - found.anchor_losses, None)
    value, stderr = gap.summarise(recorded, NBETA)
    assert value == pytest.approx(found.mean, rel=1e-6)
    assert stderr == pytest.approx(found.stderr, rel=1e-6)


def test_errors_of_columns_are_those_of_one_at_a_time():
    draws = np.random.default_rng(0).normal(size=(3, 50, 2, 4)).cumsum(axis=1)
    found = diagnostics.mean_stderrs(draws, at_once=3)
    for i, j in np.ndindex(2, 4):
        assert found[i, j] == pytest.approx(diagnostics.mean_stderr(draws[:, :, i, j]), rel=1e-9)
    assert np.isnan(diagnostics.mean_stderrs(draws[:, :3])).all()


def test_a_dead_chain_is_in_the_record_but_not_in_the_summary():
    def wall(params, batch):
        w = params["w"]
        return batch["x"] * jnp.where(w[0] > 0.55, jnp.nan, 0.5 * jnp.sum(w**2))

    found = estimate_llc(
        jax.random.key(1), wall, ANCHOR, {"x": np.ones(2, np.float32)}, sampler=SGLD(2e-2),
        nbeta=5.0, localization=1.0, num_chains=8, num_draws=40, num_burnin=0, num_probes=0,
        observables={"w": Function(weights)},
    )  # fmt: skip
    finite = found.diverged_at < 0
    assert 0 < finite.sum() < 8
    assert np.isfinite(found.observables["w"][finite]).all()
    expected = found.observables["w"][finite].mean(axis=(0, 1), dtype=np.float64)
    np.testing.assert_allclose(found.summaries["w"].value, expected, rtol=1e-12)


# --- a user's own ---------------------------------------------------------------------------------


class Overlap(NamedTuple):
    """Not a subclass: only the methods. Its array is an argument of the program."""

    direction: Any

    def prepare(self, anchor):
        return jnp.vdot(anchor.params["w"], self.direction)

    def record(self, prepared, draw):
        return jnp.vdot(draw.params["w"], self.direction) - prepared

    def summarise(self, recorded, nbeta):
        return {"largest": recorded.max(), "nbeta": nbeta}


def test_a_class_with_the_methods_is_an_observable(caplog):
    direction = np.array([1.0, -2.0, 0.5], np.float32)
    checkpoints = {0: ANCHOR, 1: {"w": np.full(3, 0.25, np.float32)}}
    options = {
        "sampler": SGLD(STEP_SIZE), "nbeta": NBETA, "localization": LOCALIZATION, "num_draws": 6,
        "num_burnin": 0, "num_probes": 0,
    }  # fmt: skip
    compiled = []
    for factor in (1, 3):
        observables = {"overlap": Overlap(factor * direction), "w": Function(weights)}
        with jax.log_compiles():
            found = dict(
                estimate_llc_over_checkpoints(
                    jax.random.key(0), loss, checkpoints, DATA, observables=observables, **options
                )
            )
        compiled.append(sum("compilation of jit(sample)" in r.message for r in caplog.records))
        for step, estimate in found.items():
            away = estimate.observables["w"] - checkpoints[step]["w"]
            np.testing.assert_allclose(
                estimate.observables["overlap"], factor * away @ direction, rtol=1e-4, atol=1e-6
            )
            largest = estimate.observables["overlap"].max()
            assert estimate.summaries["overlap"] == {"largest": largest, "nbeta": NBETA}
    assert compiled == [1, 1]  # other arrays compile nothing


def test_a_stream_has_terms_and_probes_too():
    def batch(rng_key):
        return {"x": jax.random.normal(rng_key, (4, 3))}

    found = run({"terms": LossTerms(terms), "probe": ProbeLosses(PROBE)}, Stream(batch), thinning=2)
    gap = found.losses - found.anchor_losses
    np.testing.assert_allclose(found.observables["terms"].sum(-1), gap, rtol=1e-3, atol=1e-5)
    assert found.summaries["terms"].value.sum() == pytest.approx(found.mean, rel=1e-3)
    assert found.observables["probe"].shape == (4, 12, 5)


def test_a_probe_may_have_positions():
    found = run({"probe": ProbeLosses(PROBE, terms), "other": ProbeLosses(DATA)})
    assert found.observables["probe"].shape == (4, 12, 5, 3)
    assert found.to_xarray()["probe"].dims == ("chain", "draw", "probe_example", "probe_position")
    assert found.to_xarray()["other"].dims == ("chain", "draw", "other_example")


# --- on disk and back -----------------------------------------------------------------------------


def test_what_was_recorded_comes_back_from_disk(tmp_path):
    observables = {
        "probe": ProbeLosses(PROBE), "blocks": Function(weights, num_blocks=4),
        "terms": LossTerms(terms), "count": Function(lambda p, b: jnp.int32(3)),
    }  # fmt: skip
    made = run(observables, parts_fn=terms)
    for step in (2, 5):
        results.save_estimate(tmp_path, step, made, {})
    sweep = results.load_sweep(tmp_path)
    for name, values in made.observables.items():
        np.testing.assert_array_equal(sweep[name].isel(checkpoint=1), values)
    assert sweep["blocks"].dims == ("checkpoint", "chain", "blocks_block", "blocks_0")
    assert sweep["terms"].dims == ("checkpoint", "chain", "draw", "terms_part")
    for name in ("probe", "blocks", "terms"):
        value, stderr = made.summaries[name]
        np.testing.assert_array_equal(sweep[f"{name}_mean"].isel(checkpoint=0), value)
        np.testing.assert_array_equal(sweep[f"{name}_stderr"].isel(checkpoint=0), stderr)
    assert "count_mean" not in sweep  # no mean of integers
    # The short spelling keeps no draws; its mean takes the name.
    assert sweep["parts"].dims == ("checkpoint", "part")
    np.testing.assert_array_equal(sweep["parts"].isel(checkpoint=0), made.parts)
    np.testing.assert_array_equal(made.parts, made.summaries["terms"].value)


# --- refusals -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Unhashable(Observable):
    rows: list

    def record(self, prepared, draw):
        return jnp.float32(0)


def counting():
    state = iter(range(100))
    return lambda params, batch: params["w"] * next(state)


@pytest.mark.parametrize(
    ("observables", "message"),
    [
        ([ProbeLosses(PROBE)], "observables=.*: give {name: observable}"),
        ({"losses": Function(weights)}, r"observables\['losses'\] cannot have this name"),
        ({"a b": Function(weights)}, "cannot have this name"),
        ({"x": weights}, r"observables\['x'\] is .*without `record`"),
        ({"x": ProbeLosses}, "without `record`"),
        ({"x": ProbeLosses(PROBE, num_blocks=5)}, "num_blocks=5 .* does not divide num_draws=12"),
        ({"x": ProbeLosses(PROBE, num_blocks=0)}, r"num_blocks of observables\['x'\]=0"),
        ({"x": LossTerms(loss)}, r"observables\['x'\] returned shape \(4,\)"),
        ({"x": Function(counting())}, r"observables\['x'\] is not pure"),
        ({"x": Function(3)}, r"observables\['x'\] is a int: give a function"),
        ({"x": ProbeLosses({"y": X})}, r"loss_fn of observables\['x'\] failed when traced"),
        ({"x": ProbeLosses({"x": X, "y": X[:3]})}, "data has leading axes"),
        ({"x": ProbeLosses({"x": np.full((4, 3), 2**40)})}, "2"),
        ({"x": Unhashable([1])}, "cannot be hashed"),
    ],
)
def test_bad_observables_are_refused(observables, message):
    with pytest.raises(ValueError, match=message):
        run(observables)


def test_the_names_of_the_short_spellings_are_taken_with_them():
    run({"parts": ProbeLosses(PROBE)}, num_draws=4)
    with pytest.raises(ValueError, match="observables has 'parts', the name of what parts_fn"):
        run({"parts": ProbeLosses(PROBE)}, parts_fn=terms)
