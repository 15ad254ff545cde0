"""In-context regression data: published constants, closed forms, brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from llc_jax.problems.regression import data as regression
from llc_jax.problems.regression.data import RegressionBatches, RegressionTask

TASK = RegressionTask()
FINITE = RegressionTask(num_tasks=4)

# Compiled whole: op by op, the same functions take ten times as long to start.
sample_batch = jax.jit(regression.sample_batch, static_argnums=(1, 2))
ridge_predictions = jax.jit(regression.ridge_predictions)
dmmse_predictions = jax.jit(regression.dmmse_predictions)
tasks = jax.jit(regression.tasks, static_argnums=0)


@pytest.fixture(scope="module")
def sample():
    batch = jax.device_get(sample_batch(jax.random.key(11), TASK, 20_000))
    ridge = ridge_predictions(batch["x"], batch["y"], TASK.noise_variance)
    return batch["x"], batch["y"], np.asarray(ridge)


@pytest.fixture(scope="module")
def finite_sample():
    batch = jax.device_get(sample_batch(jax.random.key(12), FINITE, 20_000))
    return batch["x"], batch["y"], np.asarray(tasks(FINITE))


def assert_mean(values, exact, slack=0.0):
    """The mean over the first axis is within 4 standard errors of the exact value."""
    values = np.asarray(values, np.float64)
    stderr = values.std(0, ddof=1) / np.sqrt(len(values))
    np.testing.assert_array_less(np.abs(values.mean(0) - exact), 4 * stderr + slack)


def test_predicting_zero_costs_dim_plus_noise(sample):
    _, y, _ = sample
    assert_mean((y**2).mean(1), 4 + 0.125)
    assert_mean(y**2, np.full(8, 4.125))


def test_ridge_loss_per_position_matches_published_values(sample):
    _, y, ridge = sample
    published = [4.13, 3.18, 2.28, 1.50, 0.90, 0.57, 0.41, 0.32]
    assert_mean((ridge - y) ** 2, published, slack=0.005)
    assert_mean(((ridge - y) ** 2).mean(1), 1.660, slack=0.0005)


def test_ridge_loss_after_one_pair_is_exact(sample):
    # The posterior covariance is I - x x^T / (|x|^2 + s), whose mean trace is a chi^2_4 integral.
    _, y, ridge = sample
    s = TASK.noise_variance
    explained, _ = scipy.integrate.quad(
        lambda r: r / (r + s) * scipy.stats.chi2(4).pdf(r), 0, np.inf
    )
    assert_mean((ridge[:, 1] - y[:, 1]) ** 2, 4 + s - explained)


@pytest.mark.parametrize("noise_variance", [0.01, 0.125, 2.0])
def test_ridge_is_the_dense_closed_form(noise_variance):
    rng = np.random.default_rng(0)
    xs, ys = rng.normal(size=(5, 8, 4)), rng.normal(size=(5, 8))
    expected = np.zeros((5, 8))
    for b in range(5):
        for k in range(8):
            x, y = xs[b, :k], ys[b, :k]
            # The dual form, an algebra apart from the one under test.
            dual = np.linalg.solve(x @ x.T + noise_variance * np.eye(k), y)
            expected[b, k] = xs[b, k] @ (x.T @ dual)
    got = ridge_predictions(jnp.float32(xs), jnp.float32(ys), noise_variance)
    assert got.dtype == jnp.float32
    # float32 loses the condition number of the Gram matrix, about 30 / noise_variance.
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 / noise_variance)
    np.testing.assert_array_equal(got[:, 0], 0)


@pytest.mark.parametrize("name", ["ridge", "dmmse"])
def test_predictors_ignore_the_present_and_later_targets(sample, finite_sample, name):
    x, y, finite = sample[0][:5], sample[1][:5], finite_sample[2]
    predict = {
        "ridge": lambda y: regression.ridge_predictions(x, y, 0.125),
        "dmmse": lambda y: regression.dmmse_predictions(x, y, finite, 0.125),
    }[name]
    jacobian = jax.jit(jax.jacobian(lambda y: predict(y).sum(0)))(y)  # [K, B, K]
    size = np.abs(np.asarray(jacobian)).max(1)
    np.testing.assert_array_equal(np.triu(size), 0)
    assert (size[np.tril_indices(8, -1)] > 0).all()


def test_dmmse_with_one_task_predicts_that_task(sample):
    x, y, _ = sample
    task = np.float32([[1.0, -2.0, 0.5, 0.0]])
    got = dmmse_predictions(x[:6], y[:6], task, 0.125)
    np.testing.assert_allclose(got, np.float64(x[:6]) @ task[0], rtol=1e-5, atol=1e-6)


def test_dmmse_is_bayes_rule_by_brute_force(finite_sample):
    finite = np.float64(finite_sample[2])
    xs, ys = (np.float64(array[:5]) for array in finite_sample[:2])
    expected = np.zeros((5, 8))
    for b in range(5):
        weights = np.full(4, 1 / 4)
        for k in range(8):
            outputs = finite @ xs[b, k]
            expected[b, k] = weights @ outputs
            weights *= scipy.stats.norm(outputs, np.sqrt(0.125)).pdf(ys[b, k])
            weights /= weights.sum()
    got = dmmse_predictions(finite_sample[0][:5], finite_sample[1][:5], finite_sample[2], 0.125)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_dmmse_with_many_tasks_approaches_ridge():
    rng = np.random.default_rng(5)
    x, y = (rng.normal(size=shape).astype(np.float32) for shape in ((16, 3, 1), (16, 3)))
    finite = rng.normal(size=(50_000, 1)).astype(np.float32)
    difference = dmmse_predictions(x, y, finite, 0.5) - ridge_predictions(x, y, 0.5)
    assert np.abs(difference).max() < 0.05


def test_each_predictor_is_better_on_its_own_prior(sample, finite_sample):
    finite = finite_sample[2]
    for (x, y, _), sign in ((sample, -1), (finite_sample, 1)):
        ridge, dmmse = ridge_predictions(x, y, 0.125), dmmse_predictions(x, y, finite, 0.125)
        gap = np.asarray((ridge - y) ** 2 - (dmmse - y) ** 2).mean(1)
        assert sign * gap.mean() > 4 * gap.std() / np.sqrt(len(gap))


def test_finite_prior_draws_members_with_the_stated_noise(finite_sample):
    x, y, finite = finite_sample
    residuals = y[..., None] - x @ finite.T
    member = (residuals**2).sum(1).argmin(-1)  # the right one but for rare, harmless ties
    assert scipy.stats.chisquare(np.bincount(member, minlength=4)).pvalue > 1e-4
    noise = np.take_along_axis(residuals, member[:, None, None], -1)[..., 0]
    assert_mean(noise.mean(1), 0)
    assert_mean((noise**2).mean(1), 0.125, slack=0.001)
    assert_mean(x[:, 0] * noise[:, :1], np.zeros(4))


def test_inputs_are_independent_standard_normals(sample):
    x, _, _ = sample
    assert_mean(x[:, 3, :, None] * x[:, 3, None, :], np.eye(4))
    assert_mean(x[:, 3, :, None] * x[:, 4, None, :], np.zeros((4, 4)))


def test_gaussian_tasks_are_fresh_in_every_sequence(sample):
    # Within a sequence E[y_1 y_2 x_1 x_2^T] = I; across sequences it vanishes.
    x, y, _ = sample
    yx = y[..., None] * x
    assert_mean(yx[:, 0, :, None] * yx[:, 1, None, :], np.eye(4))
    assert_mean(yx[1:, 0, :, None] * yx[:-1, 1, None, :], np.zeros((4, 4)))


def test_smaller_batch_is_a_prefix(sample):
    smaller = sample_batch(jax.random.key(11), TASK, 3)
    np.testing.assert_array_equal(smaller["x"], sample[0][:3])


def test_task_sets_are_nested_and_depend_on_the_seed():
    small = tasks(RegressionTask(num_tasks=3))
    large = tasks(RegressionTask(num_tasks=64))
    np.testing.assert_array_equal(small, large[:3])
    assert large.shape == (64, 4)
    assert not np.isin(small, tasks(RegressionTask(num_tasks=3, task_seed=1))).any()
    assert_mean(large.ravel() ** 2, 1)


def test_tokens_are_interleaved():
    x = jnp.arange(1.0, 7.0).reshape(1, 3, 2)
    y = jnp.array([[10.0, 20.0, 30.0]])
    expected = [
        [[0, 1, 2], [10, 0, 0], [0, 3, 4], [20, 0, 0], [0, 5, 6], [30, 0, 0]],
    ]
    np.testing.assert_array_equal(regression.to_tokens({"x": x, "y": y}), expected)


def test_batches_are_static_arguments():
    first, second = RegressionBatches(TASK, 3), RegressionBatches(RegressionTask(), 3)
    assert first == second
    assert hash(first) == hash(second)
    batch = jax.eval_shape(first, jax.random.key(0))
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "x": ((3, 8, 4), jnp.float32),
        "y": ((3, 8), jnp.float32),
    }


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"dim": 0}, "dim=0"),
        ({"num_examples": -1}, "num_examples=-1"),
        ({"noise_variance": 0.0}, "noise_variance=0.0"),
        ({"noise_variance": float("nan")}, "noise_variance=nan"),
        ({"num_tasks": 0}, "num_tasks=0.*Gaussian"),
    ],
)
def test_bad_tasks_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        RegressionTask(**fields)


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="batch_size=0"):
        RegressionBatches(TASK, 0)
    with pytest.raises(ValueError, match="batch_size=0"):
        regression.sample_batch(jax.random.key(0), TASK, 0)
    with pytest.raises(ValueError, match="num_tasks=None"):
        regression.tasks(TASK)
