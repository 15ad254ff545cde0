"""Wrong numbers that look well: each ends in a finding that names its cause, right ones in none.

Anchors are minima of L(w) = ½ mean (x·w - y)², whose λ̂ under SGLD is known at any step size.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import assert_within_4_stderr, sgld

from llc_jax import SGLD, Stream, estimate_llc
from llc_jax.llc import soundness

N, DIM, NBETA, STEP = 128, 4, 50.0, 3e-3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, DIM)).astype(np.float32)
Y = (X @ np.array([0.5, -1, 0.25, 2], np.float32) + 0.3 * RNG.normal(size=N)).astype(np.float32)
BEST = np.linalg.lstsq(X.astype(float), Y.astype(float), rcond=None)[0].astype(np.float32)
EIGENVALUES = np.linalg.eigvalsh(X.T.astype(float) @ X / N)
GRADIENT, ROUNDING, ZERO = (
    "gradient is not that of the loss", "rounding of the loss", "gradient is zero",
)  # fmt: skip


def exact(step_size=STEP, nbeta=NBETA):
    moments = [sgld(step_size, nbeta * h + 1.0).variance() for h in EIGENVALUES]
    return nbeta / 2 * float(EIGENVALUES @ moments)


def squares(params, batch):
    return 0.5 * (batch["x"] @ params["w"] - batch["y"]) ** 2


def estimate(loss_fn, step_size=STEP, w=BEST, data=None, nbeta=NBETA, **settings):
    settings = {"num_draws": 1000, "num_burnin": 200, **settings}
    return estimate_llc(
        jax.random.key(1), loss_fn, {"w": w}, data or {"x": X, "y": Y},
        sampler=SGLD(step_size), nbeta=nbeta, localization=1.0, **settings,
    )  # fmt: skip


def said(found):
    """Labels of what this module says."""
    return [label for label, _ in soundness.findings(found.sound, found.mean, found.stderr)]


# --- gradients that are those of another function -------------------------------------------------


def through(backward):
    """The identity with another gradient."""

    @jax.custom_vjp
    def identity(w):
        return w

    identity.defvjp(lambda w: (w, None), lambda _, g: (backward(g),))
    return lambda params, batch: squares({"w": identity(params["w"])}, batch)


clipped = through(lambda g: jnp.clip(g, -0.15, 0.15))
clipped.__doc__ = "jax-ml/jax, issue 2784: `clip_gradient`, an identity whose gradient is cut off."
shrunk = through(lambda g: 0.9 * g)
uneven = through(lambda g: g * jnp.array([0.4, 1.6, 0.4, 1.6], g.dtype))


def bootstrapped(params, batch):
    """A target that is the model's own, held back from the gradient.

    openai/baselines, issue 105, "Question on tf.stop_gradient in dqn build_graph".
    """
    target = jax.lax.stop_gradient(jnp.roll(batch["x"], 1, axis=1) @ params["w"])
    return 0.5 * (batch["x"] @ params["w"] - 0.3 * target - batch["y"]) ** 2


def rounded(params, batch):
    """Weights on a grid, straight through."""
    w = params["w"]
    w = w + jax.lax.stop_gradient(jnp.round(8 * w) / 8 - w)
    return squares({"w": w}, batch)


def jumping(params, batch):
    """An error rate, and a decay that is all its gradient."""
    wrong = jnp.abs(batch["x"] @ params["w"] - batch["y"]) > 0.5
    return wrong.astype(jnp.float32) + 0.1 * jnp.sum(params["w"] ** 2)


@pytest.mark.parametrize(
    "loss_fn", [clipped, shrunk, uneven, bootstrapped, rounded, jumping],
    ids=["clipped", "shrunk", "uneven", "bootstrapped", "rounded", "jumping"],
)  # fmt: skip
def test_the_gradient_of_another_function_is_told(loss_fn):
    found = estimate(loss_fn)
    assert said(found) == [GRADIENT]


def test_a_gradient_off_by_a_factor_is_told_by_this_factor():
    found = estimate(shrunk)
    assert found.sound.agreement.slope == pytest.approx(1 / 0.9, rel=1e-5)
    assert abs(found.mean - exact()) > 2 * found.stderr


def absolute(params, batch):
    return jnp.abs(batch["x"] @ params["w"] - batch["y"])


def quartic(params, batch):
    return jnp.full(batch["y"].shape, jnp.sum(params["w"] ** 4))


def crossing(params, batch):
    return jnp.full(batch["y"].shape, jnp.prod(params["w"][:3]) ** 2)


def half_precision(params, batch):
    out = batch["x"].astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)
    return 0.5 * (out.astype(jnp.float32) - batch["y"]) ** 2


@pytest.mark.parametrize(
    ("loss_fn", "w", "settings"),
    [
        (squares, BEST, {"step_size": 0.04}),  # half of the limit of stability
        (squares, BEST, {"batch_size": 16}),
        (absolute, BEST, {}),
        (quartic, 0 * BEST, {}),
        (crossing, 0 * BEST, {"nbeta": 200.0}),
        (half_precision, BEST, {"batch_size": 16}),
    ],
)
def test_what_is_right_is_not_accused(loss_fn, w, settings):
    found = estimate(loss_fn, w=w, **settings)
    assert said(found) == []
    if loss_fn is squares and not settings.get("batch_size"):
        assert_within_4_stderr(found.mean, exact(settings["step_size"]), found.stderr)


def test_agreement_is_a_regression_through_the_origin():
    p = np.array([1.0, -2.0, 3.0, 0.0, 5.0])
    noise = np.array([0.1, 0.05, 0.0, 0.0, 0.0])
    found = soundness.agreement(1.5 * p + noise, p)
    assert found.num_moves == 4  # the one that was none says nothing
    slope = 1.5 + noise @ p / (p @ p)
    assert found.slope == pytest.approx(slope)
    left = 1.5 * p + noise - slope * p
    assert found.slope_stderr == pytest.approx(math.sqrt(left @ left / 3 / (p @ p)))
    assert found.residual == pytest.approx(math.sqrt(np.sum((0.5 * p + noise) ** 2) / 4))
    nothing = soundness.agreement(np.zeros(9), np.zeros(9))
    assert (nothing.num_moves, nothing.predicted) == (0, 0.0)


@pytest.mark.parametrize(
    ("slope", "slope_stderr", "residual", "stderr", "told"),
    [
        (1.06, 0.01, 0.06, 1.0, True),  # a tilt beyond doubt, whatever the estimate
        (1.06, 0.03, 0.06, 1.0, False),  # one that chance explains
        (1.02, 0.001, 0.02, 0.01, True),  # a small one, of more than two standard errors
        (1.02, 0.001, 0.02, 0.02, False),
        (1.0, 0.05, 0.3, 0.1, True),  # noise of three standard errors
        (1.0, 0.05, 0.3, 0.2, False),
        (1.0, 0.2, 0.6, 1.0, True),  # most of it unexplained
        (1.0, 1e9, 1e-4, 1.0, False),  # below the last digit of the loss
    ],
)
def test_what_gradients_leave_is_compared_with_what_the_estimate_bears(
    slope, slope_stderr, residual, stderr, told
):
    predicted = 1e-5 if residual < 1e-3 else 1.0
    sound = soundness.Soundness(
        nbeta=1.0,
        anchor=soundness.Anchor(N, 1.0, 0, -1, 0.0, 1e-3, 0.0),
        agreement=soundness.Agreement(32, slope, slope_stderr, residual, predicted),
        gradient=np.ones((4, 8)),
        heating=0.0,
        second_derivatives=True,
        shared=(),
    )
    found = [label for label, _ in soundness.findings(sound, 1.1, stderr)]
    assert found == [GRADIENT] * told


# --- losses without the digits --------------------------------------------------------------------


def quantised(params, batch):
    """All examples share one loss, in bfloat16.

    google-deepmind/optax, issue 1020: "Precision bug in softmax_cross_entropy_with_integer_labels",
    losses of about 4.5 that are 1/32 apart.
    """
    loss = 4.5 + jnp.mean(squares(params, batch))
    return jnp.full(batch["y"].shape, loss.astype(jnp.bfloat16))


def offset(params, batch):
    return jnp.full(batch["y"].shape, 1e5 + jnp.mean(squares(params, batch)))


def partly_shared(params, batch):
    """A regulariser in bfloat16 below losses of their own, returned in float32."""
    shared = (10 + jnp.mean(squares(params, batch))).astype(jnp.bfloat16)
    return shared.astype(jnp.float32) + 0.01 * batch["y"]


@pytest.mark.parametrize(
    ("loss_fn", "label"), [(quantised, ROUNDING), (offset, ROUNDING), (partly_shared, GRADIENT)]
)
def test_rounding_that_is_not_small_beside_the_estimate_is_told(loss_fn, label):
    assert label in said(estimate(loss_fn))


def test_constants_of_single_examples_and_bfloat16_losses_average_out():
    def shifted(params, batch):
        return 1e3 + squares(params, batch)

    def short(params, batch):
        return squares(params, batch).astype(jnp.bfloat16)

    for loss_fn in (shifted, short):
        found = estimate(loss_fn)
        assert said(found) == []
        assert_within_4_stderr(found.mean, exact(), found.stderr)


# --- losses that do not depend on what is sampled -------------------------------------------------


def argmax(params, batch):
    """google-deepmind/dm-haiku, issue 442, "Zero Gradients after argmax"."""
    return (jnp.argmax(batch["x"] * params["w"][None], axis=1) > 0).astype(jnp.float32)


def floored(params, batch):
    return jnp.floor(4 * squares(params, batch)) / 4


def dead(params, batch):
    return jax.nn.relu(batch["x"] @ params["w"] - 1e3) ** 2 + 1


@pytest.mark.parametrize("loss_fn", [argmax, floored, dead])
def test_a_loss_without_a_gradient_is_told(loss_fn):
    assert said(estimate(loss_fn, num_draws=100)) == [ZERO]


def test_other_weights_than_the_argument_are_refused_before_anything_runs():
    trained = jnp.asarray(BEST)

    def closes_over(params, batch):
        return squares({"w": trained}, batch) + 0 * jnp.sum(jax.lax.stop_gradient(batch["x"]))

    with pytest.raises(ValueError, match="does not depend on the weights"):
        estimate(closes_over)


# --- losses without second derivatives ------------------------------------------------------------


@jax.custom_vjp
def entropy(logits, label):
    """google-research/t5x, issue 351: cross-entropy by `custom_vjp`, no forward mode."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)[:, 0]


def _entropy_backward(residual, g):
    logits, label = residual
    return (jax.nn.softmax(logits) - jax.nn.one_hot(label, DIM)) * g[:, None], None


entropy.defvjp(lambda logits, label: (entropy(logits, label), (logits, label)), _entropy_backward)


def called(function, r):
    """A callback, as for a simulator outside of JAX."""
    shape = jax.ShapeDtypeStruct(r.shape, r.dtype)
    return jax.pure_callback(function, shape, r, vmap_method="expand_dims")


@jax.custom_vjp
def outside(r):
    return called(lambda v: 0.5 * np.square(v), r)


outside.defvjp(lambda r: (outside(r), called(np.copy, r)), lambda slope, g: (slope * g,))


def test_sampling_needs_no_second_derivative():
    def by_callback(params, batch):
        return outside(batch["x"] @ params["w"] - batch["y"])

    found = estimate(by_callback)
    assert said(found) == ["stability not measured"]
    assert math.isnan(found.worst_stability)
    assert_within_4_stderr(found.mean, exact(), found.stderr)


def test_a_rule_for_the_gradient_alone_is_sampled_and_what_is_missing_is_told():
    def by_rule(params, batch):
        return entropy(batch["x"] * params["w"][None], batch["k"])

    data = {"x": X, "k": RNG.integers(0, DIM, N).astype(np.int32)}
    found = estimate(by_rule, data=data, num_draws=50)
    # Whether JAX sees that the rule itself is not needed depends on how it shards the program.
    missing = math.isnan(found.worst_stability)
    assert said(found) == ["stability not measured"] * missing
    assert said(estimate(by_rule, data=data, num_draws=50, num_probes=0)) == []


# --- the words ------------------------------------------------------------------------------------


def test_every_sentence_is_short_and_names_a_remedy():
    every = soundness.Soundness(
        nbeta=NBETA,
        anchor=soundness.Anchor(N, 1.0, 0, -1, 0.0, 1e-7, 1.0, 1.0),
        agreement=soundness.Agreement(32, 2.0, 0.01, 1.0, 1.0),
        gradient=np.ones((4, 8)),
        heating=0.3,
        second_derivatives=False,
        shared=("params['a'] and params['b']",) * 9,
    )
    found = soundness.findings(every, 2.0, 0.05)
    assert len(found) == 5
    assert all(40 < len(sentence) <= 600 for _, sentence in found)
    assert "inf" not in dict(soundness.findings(every._replace(heating=math.inf), 2.0, 0.05))


def test_a_stream_is_judged_by_its_moves():
    def batch_fn(rng_key):
        rows = jax.random.randint(rng_key, (32,), 0, N)
        return {"x": jnp.asarray(X)[rows], "y": jnp.asarray(Y)[rows]}

    assert said(estimate(squares, data=Stream(batch_fn))) == []
    assert said(estimate(shrunk, data=Stream(batch_fn))) == [GRADIENT]
