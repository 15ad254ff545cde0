"""Faults of data, weights or model at one checkpoint: named, and no harm to the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llc_jax import SGLD, Stream, estimate_llc, estimate_llc_over_checkpoints

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
SHORT = dict(sampler=SGLD(1e-3), localization=1.0, num_chains=2, num_draws=12, num_burnin=4)


def weights(value):
    return {"w": np.full(3, value, np.float32)}


def squares(params, batch):
    return 0.5 * (batch["x"] @ params["w"]) ** 2


def rooted(params, batch):
    """Finite everywhere; without a finite gradient where an example is zero."""
    return jnp.sqrt(jnp.sum((batch["x"] * params["w"][None]) ** 2, axis=1))


def exploding(params, batch):
    return jnp.exp(batch["x"] @ params["w"]) ** 2


def run(loss, params, data, **options):
    return estimate_llc(KEY, loss, params, data, **{**SHORT, **options})


def over(loss, values, **options):
    points = [(step, weights(value)) for step, value in enumerate(values)]
    return estimate_llc_over_checkpoints(KEY, loss, points, {"x": X}, **{**SHORT, **options})


@pytest.mark.parametrize("batch_size", [None, 4])
def test_an_example_without_a_finite_loss_is_named_and_no_step_size_blamed(batch_size):
    hole = X.copy()
    hole[[17, 30], 1] = np.nan
    estimate = run(squares, weights(1.0), {"x": hole}, batch_size=batch_size)
    assert np.isnan(estimate.mean)
    assert estimate.verdict == "loss not finite at the anchor"
    [sentence] = estimate.warnings
    assert "2 of 40 examples, the first is row 17" in sentence
    assert "step_size" not in sentence


@pytest.mark.parametrize(
    ("batch_size", "thinning"),
    [(40, 1), (40, 3), (4, 3), pytest.param(4, 1, marks=pytest.mark.slow)],
)
def test_an_example_without_a_finite_gradient_is_named(batch_size, thinning):
    # "NaN in gradient of np.linalg.norm at 0", jax-ml/jax issue 3058, and many others.
    data = {"x": X.copy()}
    data["x"][23] = 0
    options = {"batch_size": batch_size, "thinning": thinning, "num_draws": 60}
    estimate = run(rooted, weights(1.0), data, **options)
    assert estimate.num_finite < 2
    assert "gradient not finite at the anchor" in estimate.verdict
    assert "row 23:" in " ".join(estimate.warnings)
    assert "step_size" not in " ".join(estimate.warnings)
    data["x"][23] = 1
    assert "finite" not in run(rooted, weights(1.0), data, **options).verdict


def test_a_stream_that_brings_bad_examples_is_named():
    def batch(key):
        return {"x": jnp.where(jax.random.uniform(key) < 0.5, jnp.nan, 1.0) * X[:4]}

    estimate = run(squares, weights(1.0), Stream(batch), nbeta=10.0, num_draws=30)
    assert estimate.num_finite == 0
    assert "not finite at the anchor" in estimate.verdict
    assert "step_size" not in " ".join(estimate.warnings)


def test_a_step_that_is_too_large_is_still_told_so():
    for batch_size in (None, 4):
        estimate = run(exploding, weights(0.0), {"x": X}, sampler=SGLD(30.0), batch_size=batch_size)
        assert estimate.num_finite == 0
        assert estimate.verdict.startswith("2 of 2 chains diverged")
        assert "Lower step_size" in estimate.warnings[0]


@pytest.mark.parametrize("checkpoint_batch", [1, 2])
def test_a_checkpoint_without_a_finite_loss_leaves_the_others_bitwise_alone(checkpoint_batch):
    healthy = dict(over(exploding, [0.0, 0.0, 0.1], checkpoint_batch=checkpoint_batch))
    found = dict(over(exploding, [0.0, 1e3, 0.1], checkpoint_batch=checkpoint_batch))
    assert list(found) == [0, 1, 2]
    assert "loss not finite at the anchor" in found[1].verdict
    assert found[1].num_finite == 0
    for step in (0, 2):
        np.testing.assert_array_equal(found[step].losses, healthy[step].losses)
        assert found[step].mean == healthy[step].mean


def test_what_is_finished_comes_out_before_the_error_of_the_next():
    """Weights that cannot be read, and a model that gives up while it is evaluated."""

    def unreadable():
        yield 0, weights(0.0)
        yield 1, weights(0.0)
        raise OSError("no such file")

    def solver(w):
        if np.abs(w).max() > 50:
            raise RuntimeError("step limit reached")
        return np.zeros(w.shape[:-1], np.float32)

    def solved(params, batch):
        held = jax.lax.stop_gradient(params["w"])
        shape = jax.ShapeDtypeStruct((), np.float32)
        return squares(params, batch) + jax.pure_callback(
            solver, shape, held, vmap_method="expand_dims"
        )

    first = estimate_llc_over_checkpoints(KEY, squares, unreadable(), {"x": X}, **SHORT)
    second = over(solved, [0.0, 0.0, 90.0], num_probes=0)
    for estimates, error in ((first, OSError), (second, Exception)):
        got = []
        with pytest.raises(error):  # noqa: PT012
            for step, _ in estimates:
                got.append(step)
        assert got == [0, 1]


@jax.custom_vjp
def doubled(x):
    return 2 * x


# The forward rule calls the function itself, which has no derivative forwards.
doubled.defvjp(lambda x: (doubled(x), None), lambda _, g: (2 * g,))


RULES = {"plain": doubled, "jitted": jax.jit(doubled)}


@pytest.mark.parametrize(
    ("rule", "num_chains"),
    [("plain", 1), ("plain", 5), ("jitted", 4),
     *(pytest.param(*case, marks=pytest.mark.slow)
       for case in (("plain", 4), ("jitted", 1), ("jitted", 5)))],
)  # fmt: skip
def test_a_loss_without_second_derivatives_is_sampled_however_many_chains_share_a_device(
    rule, num_chains
):
    def loss(params, batch):
        return RULES[rule](batch["x"] @ params["w"]) ** 2

    estimate = run(loss, weights(0.1), {"x": X}, num_chains=num_chains, num_burnin=0)
    assert np.isfinite(estimate.mean)
    assert np.isnan(estimate.stability).all()
    assert "stability not measured" in estimate.verdict
