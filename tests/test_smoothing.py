"""The Gaussian process against sklearn, finite differences, and its own definition."""

import numpy as np
import pytest
from scipy import linalg, stats
from sklearn.gaussian_process import GaussianProcessRegressor, kernels

from llc_jax import smoothing
from llc_jax.smoothing import fit_curve, smooth_curve


def _bump(num=40, noise=0.5, seed=0):
    """A rise and a fall, in units of which the noise is one."""
    steps = np.unique(np.rint(np.geomspace(1, 1e5, num)).astype(int))
    u = np.log1p(steps)
    rng = np.random.default_rng(seed)
    curve = 20 * np.exp(-0.5 * ((u - 7.0) / 1.7) ** 2)
    return steps, curve + noise * rng.standard_normal(u.size), np.full(u.size, noise)


def _log_evidence(u, y, variance, length_scale, amplitude, noise):
    """Restricted likelihood by its definition: the density of contrasts orthogonal to 1."""
    cov = amplitude**2 * np.exp(-0.5 * ((u[:, None] - u) / length_scale) ** 2)
    cov += np.diag(variance + noise**2)
    contrasts = linalg.null_space(np.ones((1, u.size)))
    return stats.multivariate_normal(cov=contrasts.T @ cov @ contrasts).logpdf(contrasts.T @ y)


def test_published_kernel_equals_sklearn():
    steps, values, _ = _bump()
    kernel = kernels.ConstantKernel(1e3) * kernels.RBF(0.5)
    oracle = GaussianProcessRegressor(kernel, optimizer=None)
    oracle.fit(np.log1p(steps)[:, None], values)
    smoothed = smooth_curve(steps, values, kernel="published")
    mean, std = oracle.predict(np.log1p(smoothed.steps)[:, None], return_std=True)
    np.testing.assert_allclose(smoothed.mean, mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(smoothed.std, std, rtol=0, atol=1e-6)


def test_published_kernel_ignores_stderr():
    steps, values, stderr = _bump()
    with_stderr = smooth_curve(steps, values, stderr, kernel="published")
    np.testing.assert_array_equal(
        with_stderr.mean, smooth_curve(steps, values, kernel="published").mean
    )


def test_fitted_kernel_equals_sklearn_with_a_nearly_flat_prior_on_the_constant():
    steps, values, stderr = _bump()
    posterior, _ = fit_curve(steps, values, stderr, kernel="fitted")
    constant = kernels.ConstantKernel(1e8)
    signal = kernels.ConstantKernel(posterior.amplitude**2) * kernels.RBF(posterior.length_scale)
    oracle = GaussianProcessRegressor(
        constant + signal, alpha=stderr**2 + posterior.noise**2, optimizer=None
    )
    oracle.fit(np.log1p(steps)[:, None], values)
    u = np.linspace(0.0, 13.0, 50)
    mean, std = oracle.predict(u[:, None], return_std=True)
    our_mean, our_cov = posterior.curve(u)
    np.testing.assert_allclose(our_mean, mean, atol=1e-3)
    np.testing.assert_allclose(np.sqrt(np.diag(our_cov)), std, rtol=1e-3)


@pytest.mark.parametrize("kernel", ["fitted", "published"])
def test_slope_is_the_derivative_of_the_mean_curve(kernel):
    posterior, grid = fit_curve(*_bump(), kernel=kernel)
    u, h = np.log1p(grid), 1e-4
    difference = (posterior.curve(u + h)[0] - posterior.curve(u - h)[0]) / (2 * h)
    slope = posterior.slope(u)[0]
    np.testing.assert_allclose(slope, difference, atol=1e-5 * np.abs(slope).max())


def test_slope_covariance_is_the_mixed_derivative_of_the_curve_covariance():
    posterior, _ = fit_curve(*_bump(), kernel="fitted")
    u, h = np.linspace(0.5, 11.5, 12), 1e-3
    cov = posterior.curve(np.concatenate([u + h, u - h]))[1].reshape(2, 12, 2, 12)
    difference = (cov[0, :, 0] - cov[0, :, 1] - cov[1, :, 0] + cov[1, :, 1]) / (2 * h) ** 2
    ours = posterior.slope(u)[1]
    np.testing.assert_allclose(ours, difference, atol=1e-3 * ours.max())


def test_joint_samples_have_the_mean_and_covariance_of_the_slope():
    posterior, _ = fit_curve(*_bump(), kernel="fitted")
    u = np.linspace(0.5, 11.5, 30)
    mean, cov = posterior.slope(u)
    num = 40_000
    samples = posterior.slope_samples(u, num, seed=1)
    std = np.sqrt(np.diag(cov))
    assert np.all(np.abs(samples.mean(0) - mean) < 5 * std / num**0.5)
    # Standard error of a sample covariance: sqrt((cov_ij^2 + cov_ii cov_jj) / num).
    error = np.sqrt((cov**2 + np.outer(std, std) ** 2) / num)
    assert np.all(np.abs(np.cov(samples.T) - cov) < 5 * error)
    np.testing.assert_array_equal(samples[:9], posterior.slope_samples(u, 9, seed=1))


def test_evidence_is_the_density_of_contrasts_and_its_gradient():
    steps, values, stderr = _bump(num=15)
    u, theta = np.log1p(steps), np.log([1.3, 7.0, 0.8])
    ours, gradient = smoothing._negative_evidence(theta, u, values, stderr**2)
    # A flat prior on m is a density over 1 * m; over the unit vector 1 / sqrt(N), log N / 2 more.
    defined = _log_evidence(u, values, stderr**2, 1.3, 7.0, 0.8)
    assert -ours == pytest.approx(defined - 0.5 * np.log(u.size), abs=1e-8)
    h = 1e-5
    for k, unit in enumerate(np.eye(3)):
        up, down = (
            smoothing._negative_evidence(theta + sign * h * unit, u, values, stderr**2)[0]
            for sign in (1, -1)
        )
        assert gradient[k] == pytest.approx((up - down) / (2 * h), abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_fit_explains_a_planted_process_better_than_the_truth_does(seed):
    truth = {"length_scale": 1.5, "amplitude": 5.0, "noise": 0.4}
    rng = np.random.default_rng(seed)
    steps = np.unique(np.rint(np.geomspace(1, 1e5, 80)).astype(int))
    u = np.log1p(steps)
    cov = truth["amplitude"] ** 2 * np.exp(-0.5 * ((u[:, None] - u) / truth["length_scale"]) ** 2)
    stderr = 0.3 * np.ones(u.size)
    cov += np.diag(stderr**2 + truth["noise"] ** 2)
    values = 100 + linalg.cholesky(cov, lower=True) @ rng.standard_normal(u.size)
    fit = fit_curve(steps, values, stderr, kernel="fitted")[0]
    at_fit = _log_evidence(u, values, stderr**2, fit.length_scale, fit.amplitude, fit.noise)
    at_truth = _log_evidence(u, values, stderr**2, **truth)
    assert at_fit > at_truth - 1e-6
    # Twice the gain is about chi-squared with three degrees of freedom.
    assert at_fit < at_truth + 0.5 * stats.chi2(3).ppf(0.999)
    theta = np.log([fit.length_scale, fit.amplitude, fit.noise])
    gradient = smoothing._negative_evidence(theta, u, values, stderr**2)[1]
    np.testing.assert_allclose(gradient, 0.0, atol=0.02)


def test_pointwise_errors_cover_the_planted_curve():
    covered = []
    for seed in range(40):
        steps, values, stderr = _bump(noise=1.0, seed=seed)
        smoothed = smooth_curve(steps, values, stderr, grid=steps)
        truth = 20 * np.exp(-0.5 * ((np.log1p(steps) - 7.0) / 1.7) ** 2)
        covered.append(np.abs(smoothed.mean - truth) < smoothed.std)
    # Points of one curve share its errors: 40 curves with about ten free numbers each.
    assert np.mean(covered) == pytest.approx(0.683, abs=4 * (0.683 * 0.317 / 400) ** 0.5)


def test_evidence_separates_signal_from_noise():
    steps, values, stderr = _bump()
    assert smooth_curve(steps, values, stderr).evidence > 50
    noise = np.random.default_rng(0).standard_normal(steps.size)
    assert -1e-3 < smooth_curve(steps, noise).evidence < 3


def test_shift_and_scale_of_the_values_pass_through():
    steps, values, stderr = _bump()
    plain = smooth_curve(steps, values, stderr)
    moved = smooth_curve(steps, 1e4 - 3.0 * values, 3.0 * stderr)
    np.testing.assert_allclose(moved.mean, 1e4 - 3.0 * plain.mean, atol=1e-3)
    np.testing.assert_allclose(moved.slope, -3.0 * plain.slope, atol=1e-3)
    np.testing.assert_allclose(moved.slope_std, 3.0 * plain.slope_std, rtol=1e-3)
    assert moved.length_scale == pytest.approx(plain.length_scale, rel=1e-4)


def test_order_of_points_and_dead_checkpoints_do_not_matter():
    steps, values, stderr = _bump()
    plain = smooth_curve(steps, values, stderr)
    order = np.random.default_rng(0).permutation(steps.size + 2)
    steps_2 = np.append(steps, [500_000, 3_000_000])[order]
    values_2 = np.append(values, [np.nan, np.inf])[order]
    stderr_2 = np.append(stderr, [np.nan, 7.0])[order]
    shuffled = smooth_curve(steps_2, values_2, stderr_2)
    np.testing.assert_array_equal(plain.mean, shuffled.mean)
    np.testing.assert_array_equal(plain.steps, shuffled.steps)


def test_unknown_error_of_one_point_counts_as_the_largest_known():
    steps, values, stderr = _bump()
    stderr = stderr * np.linspace(1, 2, steps.size)
    missing, filled = stderr.copy(), stderr.copy()
    missing[5], filled[5] = np.nan, stderr.max()
    np.testing.assert_array_equal(
        smooth_curve(steps, values, missing).mean, smooth_curve(steps, values, filled).mean
    )


@pytest.mark.parametrize("values", [np.ones(8), np.linspace(0, 1, 8), 1e-30 * np.arange(8.0)])
def test_degenerate_curves_stay_finite(values):
    smoothed = smooth_curve(np.arange(8) * 100, values)
    assert all(np.all(np.isfinite(field)) for field in smoothed)


def test_grid_is_whole_steps_from_first_to_last():
    grid = smoothing.step_grid([3, 50, 40_000])
    assert (grid[0], grid[-1]) == (3, 40_000)
    assert grid.dtype == np.int64
    assert np.all(np.diff(grid) > 0)
    gaps = np.diff(np.log1p(grid))[grid[:-1] > 1000]
    np.testing.assert_allclose(gaps, np.log(40_001 / 4) / 399, rtol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": [1.0, 2.0]}, "equal length"),
        ({"steps": [-1, 1, 2, 3, 4]}, r"-1\.0: count updates"),
        ({"steps": [0, 1, 2, 3, 4.5]}, r"whole numbers >= 0, got 4\.5"),
        ({"steps": [0, 1, 2, 3, np.nan]}, "whole numbers >= 0, got nan"),
        ({"steps": [0, 1, 2, 7, 7]}, "distinct, got 7 more than once"),
        ({"values": [1, 2, np.nan, np.inf, 3]}, "at least 4 .* got 3 of 5"),
        ({"stderr": [1, 1, 1, -0.5, 1]}, r"stderr must be >= 0, got -0\.5"),
        ({"kernel": "matern"}, r"\('fitted', 'published'\), got 'matern'"),
        ({"grid": [-2.0, 1.0]}, "grid must be"),
    ],
)
def test_errors_name_value_and_rule(change, message):
    good = {"steps": [0, 1, 2, 3, 4], "values": [1, 2, 3, 4, 5], "stderr": None}
    with pytest.raises(ValueError, match=message):
        smooth_curve(**(good | change))
