"""The Gaussian process against sklearn, finite differences, and its own definition."""

import numpy as np
import pytest
from scipy import linalg, stats
from sklearn.gaussian_process import GaussianProcessRegressor, kernels

from llc_jax.stages import smoothing
from llc_jax.stages.evidence import negative_evidence
from llc_jax.stages.points import Scatter
from llc_jax.stages.smoothing import fit_curve, smooth_curve


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
    without = smooth_curve(steps, values, kernel="published")
    np.testing.assert_allclose(with_stderr.mean, without.mean, rtol=0, atol=1e-6)


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
    # The first samples are the same, whatever their number, but for the order of summation.
    np.testing.assert_allclose(
        samples[:9], posterior.slope_samples(u, 9, seed=1), rtol=0, atol=1e-9 * std.max()
    )


def test_evidence_is_the_density_of_contrasts_and_its_gradient():
    steps, values, stderr = _bump(num=15)
    u, theta = np.log1p(steps), np.log([1.3, 7.0, 0.8])
    ours, gradient = negative_evidence(theta, u, values, stderr**2)
    # A flat prior on m is a density over 1 * m; over the unit vector 1 / sqrt(N), log N / 2 more.
    defined = _log_evidence(u, values, stderr**2, 1.3, 7.0, 0.8)
    assert -ours == pytest.approx(defined - 0.5 * np.log(u.size), abs=1e-8)
    h = 1e-5
    for k, unit in enumerate(np.eye(3)):
        up, down = (
            negative_evidence(theta + sign * h * unit, u, values, stderr**2)[0]
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
    gradient = negative_evidence(theta, u, values, stderr**2)[1]
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


def test_observations_have_the_fitted_noise_beyond_their_errors():
    steps, values, stderr = _bump(noise=2.0)
    posterior, _ = fit_curve(steps, values, stderr / 4, kernel="fitted")
    assert posterior.noise > 1.0
    np.testing.assert_allclose(
        np.diag(posterior.factor @ posterior.factor.T),
        posterior.amplitude**2 + stderr**2 / 16 + posterior.noise**2,
        rtol=1e-9,
    )


def test_pointwise_deviations_are_the_diagonal_of_the_joint_covariance():
    """Also where the grid is taken in pieces, one of them short."""
    steps, values, stderr = _bump()
    posterior, _ = fit_curve(steps, values, stderr, kernel="fitted")
    smoothed = smooth_curve(steps, values, stderr, grid=np.arange(0, 4500, 2))
    some = [0, 1, 999, 1000, 1001, 2000, 2249]
    for joint, mean, std in (
        (posterior.curve, smoothed.mean, smoothed.std),
        (posterior.slope, smoothed.slope, smoothed.slope_std),
    ):
        expected, cov = joint(np.log1p(smoothed.steps[some]))
        np.testing.assert_allclose(mean[some], expected, rtol=1e-8)
        np.testing.assert_allclose(std[some], np.sqrt(np.diag(cov)), rtol=1e-6)


def test_a_grid_may_be_as_long_as_a_log():
    steps, values, stderr = _bump()
    smoothed = smooth_curve(steps, values, stderr, grid=np.arange(50_000))
    assert smoothed.mean.shape == smoothed.slope_std.shape == (50_000,)


@pytest.mark.parametrize("known_errors", [True, False])
def test_means_over_bins_give_the_process_of_all_points(monkeypatch, known_errors):
    """580 points against 256 bins; errors differ by a factor of ten and more where known."""
    rng = np.random.default_rng(3)
    steps = np.unique(np.rint(np.geomspace(1, 1e6, 720)).astype(int))
    x = np.log1p(steps) / np.log(1e6)
    stderr = np.exp(0.7 * rng.standard_normal(x.size)) if known_errors else np.ones(x.size)
    values = 20 * np.exp(-0.5 * ((x - 0.5) / 0.15) ** 2) + stderr * rng.standard_normal(x.size)
    assert 512 < x.size < 600
    curve = (steps, values, stderr if known_errors else None)
    binned = smooth_curve(*curve)
    monkeypatch.setattr(smoothing, "_MOST_POINTS", 10_000)
    exact = smooth_curve(*curve)
    assert np.max(np.abs(binned.mean - exact.mean) / exact.std) < 0.5
    np.testing.assert_allclose(binned.std, exact.std, rtol=0.06)
    np.testing.assert_allclose(binned.slope_std, exact.slope_std, rtol=0.06)
    assert binned.length_scale == pytest.approx(exact.length_scale, rel=0.03)


def test_evidence_of_scatter_and_its_gradient():
    """Residuals that are orthogonal to the means: independent, each Gaussian of known variance."""
    steps, values, stderr = _bump(num=15)
    u, theta, share = np.log1p(steps), np.log([1.3, 7.0, 0.8]), np.linspace(0.1, 1, steps.size)
    scatter = Scatter(*map(np.array, [[0, 7], [0.0, 5.0], [0.1, 0.3]]))
    arguments = (u, values, stderr**2, share)
    ours, gradient = negative_evidence(theta, *arguments, scatter)
    alone, _ = negative_evidence(theta, *arguments)
    around = 0.3 + 0.8**2
    expected = -stats.norm(scale=around**0.5).logpdf([5.0**0.5, 0, 0, 0, 0, 0, 0]).sum()
    assert ours - alone == pytest.approx(expected)
    h = 1e-5
    for k, unit in enumerate(np.eye(3)):
        up, down = (
            negative_evidence(theta + sign * h * unit, *arguments, scatter)[0]
            for sign in (1, -1)
        )
        assert gradient[k] == pytest.approx((up - down) / (2 * h), abs=1e-5)


def test_published_kernel_refuses_what_it_cannot_run_through():
    with pytest.raises(ValueError, match="every point, at most 2000, got 2001: thin"):
        smooth_curve(np.arange(2001), np.zeros(2001), kernel="published")


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
    np.testing.assert_allclose(plain.mean, shuffled.mean, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(plain.steps, shuffled.steps)


def test_unknown_error_of_one_point_counts_as_the_largest_known():
    steps, values, stderr = _bump()
    stderr = stderr * np.linspace(1, 2, steps.size)
    missing, filled = stderr.copy(), stderr.copy()
    missing[5], filled[5] = np.nan, stderr.max()
    np.testing.assert_allclose(
        smooth_curve(steps, values, missing).mean,
        smooth_curve(steps, values, filled).mean,
        rtol=0,
        atol=1e-6,
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
        ({"grid": [-2.0, 1.0]}, "grid must be .* with -2"),
        ({"grid": np.arange(1_000_001)}, "at most 1,000,000 finite steps"),
        ({"grid": ["1"]}, "grid must be real numbers"),
        ({"values": [1j, 2, 3, 4, 5]}, "values must be real numbers"),
        ({"stderr": [[1], [1, 1], 1, 1, 1]}, "stderr must be real numbers"),
        ({"steps": [0, 1, 2, 3, 1e300]}, r"got 1e\+300: .* 2\*\*62"),
        ({"steps": 10**15 + np.arange(5)}, "log.* must tell steps apart"),
        ({"values": [0, 1e-200, 0, 0, 0]}, "at least 1e-100"),
        ({"values": [0, 1e200, 0, 0, 0]}, r"1e\+200 at step 1 .*use other units"),
        ({"stderr": [1, 1, 1, np.inf, np.inf]}, "stderr below ten times .* got 3 of 5"),
    ],
)
def test_errors_name_value_and_rule(change, message):
    good = {"steps": [0, 1, 2, 3, 4], "values": [1, 2, 3, 4, 5], "stderr": None}
    with pytest.raises(ValueError, match=message):
        smooth_curve(**(good | change))
