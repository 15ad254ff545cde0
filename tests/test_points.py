"""Points without information go, points without support are found, and means lose nothing."""

import numpy as np
import pytest
from scipy import stats

from llc_jax.stages import points as points_module
from llc_jax.stages.evidence import negative_evidence
from llc_jax.stages.points import Points, apart, averaged, checked, informative


def _points(values, errors=None, steps=None):
    values = np.asarray(values, float)
    steps = np.arange(values.size) if steps is None else steps
    return checked(steps, values, errors)


def _rising(num=25):
    """Values from 0 to 20 with errors of 0.1."""
    return np.linspace(0, 20, num), np.full(num, 0.1)


@pytest.mark.parametrize("error", [1e3, 1e6, 1e60, 1e200, np.inf])
@pytest.mark.parametrize("place", [0, 12, 24])
def test_a_point_whose_error_is_beyond_all_others_is_left_out(place, error):
    values, errors = _rising()
    for value in (values[place], min(error, 1e307)):
        values[place], errors[place] = value, error
        kept = informative(_points(values, errors))
        np.testing.assert_array_equal(kept.steps, np.delete(np.arange(25), place))
        np.testing.assert_array_equal(kept.values, np.delete(values, place))


def test_many_points_without_information_do_not_hide_each_other():
    values, errors = _rising()
    bad = np.arange(25) % 2 == 0
    values[bad], errors[bad] = 1e6 * np.cos(np.arange(13)), 1e6
    with pytest.warns(UserWarning, match="13 of 25 points, the first at step 0, .* left out"):
        kept = informative(_points(values, errors))
    np.testing.assert_array_equal(kept.steps, np.flatnonzero(~bad))


def test_large_errors_of_large_values_are_kept():
    """One per cent of values over five decades: the largest error is 1,000 times the smallest."""
    values = np.geomspace(1e-2, 1e3, 30)
    assert informative(_points(values, 0.01 * values)).values.size == 30
    noise = np.random.default_rng(0).standard_normal(30)
    assert informative(_points(noise, np.full(30, 1e3))).values.size == 30
    assert informative(_points(np.ones(30), np.geomspace(1e-3, 1, 30))).values.size == 30


def test_spread_beyond_errors_satisfies_its_equation():
    """Errors just below and above ten times the typical deviation, computed by another rule."""
    rng = np.random.default_rng(1)
    errors = np.exp(rng.standard_normal(20))
    values = 5 * rng.standard_normal(20)
    known = np.maximum(errors, np.quantile(np.append(errors, 1e3), 0.25))

    def excess(tau):
        weights = 1 / (known**2 + tau**2)
        return np.sum(weights * (values - np.average(values, weights=weights)) ** 2) - 19

    tau = np.linspace(0, 10, 100_001)
    tau = tau[np.argmin(np.abs([excess(t) for t in tau[::100]])) * 100]
    typical = np.mean(1 / (known**2 + tau**2)) ** -0.5
    for factor, size in ((9.0, 21), (12.0, 20)):
        larger = np.append(errors, factor * typical)
        assert informative(_points(np.append(values, 0.0), larger)).values.size == size


def test_unknown_errors_count_as_the_largest_that_tells_anything():
    values, errors = _rising()
    errors[[3, 4, 5]] = [np.nan, 0.4, 1e9]
    kept = informative(_points(values, errors))
    assert kept.errors[3] == 0.4
    assert kept.errors.size == 24


@pytest.mark.parametrize("sign", [1, -1])
def test_a_point_is_apart_by_its_height_above_both_neighbours(sign):
    values = sign * np.array([0.0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1])
    for height, expected in ((2.9, []), (3.1, [8])):  # three times the largest difference
        values[8] = sign * (1 + height)
        assert np.flatnonzero(apart(_points(values), 3.0)).tolist() == expected
    assert not apart(_points(values, np.full(20, 0.1)), 3.0).any()  # beyond three errors, too


def test_points_at_the_ends_and_several_are_found_but_movements_are_not():
    values = np.tile([0.0, 1.0], 15)
    lone = values.copy()
    lone[[0, 7, 8, 29]] = [50, -1e6, 1e4, 1e3]
    assert np.flatnonzero(apart(_points(lone), 3.0)).tolist() == [0, 7, 8, 29]
    values[-5:] = 20 * 10.0 ** np.arange(5)  # an ever steeper rise: at most its last point
    assert not apart(_points(values), 3.0)[:-1].any()
    assert not apart(_points(values[::-1]), 3.0)[1:].any()
    values = np.tile([0.0, 1.0], 15)
    values[10:13] = [20, 50, 30]  # a peak of three points
    assert not apart(_points(values), 3.0).any()


def test_noise_alone_sets_hardly_a_point_apart():
    rng = np.random.default_rng(0)
    for num in (5, 8, 12, 30):
        count = sum(apart(_points(rng.standard_normal(num)), 1.5).any() for _ in range(1000))
        assert count <= stats.binom(1000, 0.02).ppf(0.9999)


def test_equal_values_are_not_apart():
    assert not apart(_points(np.full(9, 0.1) * np.float64(3)), 1.5).any()
    assert not apart(_points([0.1 + 0.2, 0.3, 0.3, 0.3, 0.3]), 1.5).any()


def test_few_points_are_not_averaged():
    points = _points(np.arange(20.0))
    means, scatter = averaged(points, 20)
    assert means is points
    assert scatter.freedom.sum() == 0


@pytest.mark.parametrize("most", [50, 64, 90])
def test_bins_are_as_many_as_allowed(most):
    means, _ = averaged(_points(np.zeros(5000), steps=10**9 + np.arange(5000)), most)
    assert 0.78 * most <= means.steps.size <= most


def test_means_are_means_and_lone_points_stay():
    steps = np.concatenate([[0, 3, 50], 10_000 + np.arange(300)])
    rng = np.random.default_rng(0)
    values = rng.standard_normal(steps.size)
    errors = np.full(steps.size, 0.5)
    means, scatter = averaged(_points(values, errors, steps), 40)
    assert 30 <= means.steps.size <= 40
    np.testing.assert_allclose(means.steps[:3], steps[:3], atol=1e-12)
    np.testing.assert_allclose(means.values[:3], values[:3])
    assert np.all(np.diff(means.steps) > 0)
    sizes = np.rint(1 / means.share)
    assert sizes.sum() == steps.size
    np.testing.assert_allclose(means.errors, 0.5 / np.sqrt(sizes))
    np.testing.assert_allclose(np.average(means.values, weights=sizes), values.mean())
    np.testing.assert_array_equal(scatter.freedom, np.maximum(sizes - 2, 0))
    np.testing.assert_allclose(scatter.variance, 0.25)


def test_weights_are_those_of_the_noise():
    """Two points at one place: the mean of least variance, and that variance."""
    steps = 10**9 + np.arange(5)
    points = Points(np.append(steps, 2 * 10**9.0), np.arange(6.0), np.arange(1.0, 7), np.ones(6))
    means, _ = averaged(points, 2, white=3.0)
    weights = 1 / (np.arange(1.0, 6) ** 2 + 3.0)
    assert means.values[0] == pytest.approx(np.average(np.arange(5), weights=weights))
    variance = means.errors[0] ** 2 + 3.0 * means.share[0]
    assert variance == pytest.approx(1 / weights.sum())


def test_scatter_of_unequal_errors_has_its_expectation():
    """Noise of variance errors^2 + white: squares of each bin are typical * chi-squared."""
    rng = np.random.default_rng(4)
    steps, white = 10**9 + np.arange(4000.0), 0.5
    errors = np.exp(rng.standard_normal(4000))
    values = np.sqrt(errors**2 + white) * rng.standard_normal(4000)
    points = Points(steps, values, errors, np.ones(4000))
    _, scatter = averaged(points, 100, white)
    freedom = scatter.freedom.sum()
    ratio = np.sum(scatter.squares / (scatter.variance + white))
    assert ratio == pytest.approx(freedom, abs=4 * (2 * freedom) ** 0.5)


def test_straight_lines_do_not_scatter():
    _, scatter = averaged(_points(np.log1p(np.arange(1000))), 50)
    assert scatter.freedom.sum() > 800
    assert scatter.squares.sum() < 1e-20 * 1000


def test_likelihood_of_points_is_that_of_their_means_and_scatter():
    """Clusters of points at one place each, whose likelihoods factorise: what is lost is one
    contrast in each, the slope within."""
    rng = np.random.default_rng(2)
    place, inner = np.meshgrid(np.geomspace(1e12, 1e16, 12), np.arange(10.0), indexing="ij")
    steps = (place * (1 + 1e-9 * inner)).ravel()
    values, errors = 3 * rng.standard_normal(steps.size), np.full(steps.size, 0.3)
    points = Points(np.rint(steps), values, errors, np.ones(steps.size))
    means, scatter = averaged(points, 12)
    assert (means.steps.size, scatter.freedom.sum()) == (12, 12 * 8)
    across = np.log1p(points.steps).reshape(12, 10)
    across = across - across.mean(axis=1, keepdims=True)
    along = (across * values.reshape(12, 10)).sum(axis=1) / np.sqrt((across**2).sum(axis=1))
    differences = []
    for theta in np.log([(1.3, 7.0, 0.8), (0.7, 2.0, 1.9)]):
        variance = 0.3**2 + np.exp(2 * theta[2])
        lost = -stats.norm(scale=variance**0.5).logpdf(along).sum()
        exact, _ = negative_evidence(theta, np.log1p(points.steps), values, points.errors**2)
        binned, _ = negative_evidence(
            theta, np.log1p(means.steps), means.values, means.errors**2, means.share, scatter
        )
        differences.append(exact - binned - lost)
    assert differences[0] == pytest.approx(differences[1], abs=1e-3)


def test_messages_are_short():
    values, errors = 1e90 * np.ones(400), np.full(400, 0.1)
    points = Points(np.arange(400.0) + 2.0**61, values, errors, np.ones(400))
    with pytest.warns(UserWarning, match="300 of 400 points") as said:
        points_module.warn_of(points, np.arange(400) < 300)
    assert len(str(said[0].message)) <= 600
    with pytest.raises(ValueError, match="convert them") as refused:
        checked(["x" * 1000] * 1000, values, None)
    assert len(str(refused.value)) <= 600
