"""Planted boundaries are found, noise makes none, and the statistics hold what they promise."""

import csv
import itertools
import pathlib
import re

import numpy as np
import pytest
from scipy import stats

from llc_jax.stages import boundaries
from llc_jax.stages.boundaries import find_plateaus, find_stages
from llc_jax.stages.smoothing import fit_curve

_REFERENCE = pathlib.Path(__file__).parents[2] / "shared" / "reference"
_LAST = 100_000


def _steps(num):
    return np.unique(np.rint(np.geomspace(1, _LAST, num)).astype(int))


def _rise(x, centre, width=0.06):
    return 1.0 / (1.0 + np.exp(-(x - centre) / width))


# Curves over x = log(step + 1) / log(last step + 1), the kinds of their stages, and the x of
# their boundaries, known by symmetry.
_PLANTED = {
    "rise": (lambda x: _rise(x, 0.5), ["rise"], []),
    "straight rise": (lambda x: x, ["rise"], []),
    "rise, plateau, rise": (
        lambda x: (_rise(x, 0.3) + _rise(x, 0.75)) / 2,
        ["rise", "rise"],
        [0.525],
    ),
    "rise, fall": (
        lambda x: np.exp(-0.5 * ((x - 0.6) / 0.15) ** 2),
        ["rise", "fall"],
        [0.6],
    ),
    "rise, plateau, rise, fall": (
        lambda x: (_rise(x, 0.2, 0.04) + _rise(x, 0.5, 0.04) - _rise(x, 0.8, 0.04)) / 2,
        ["rise", "rise", "fall"],
        [0.35, 0.65],
    ),
}


def _noisy(shape, num, height, seed):
    """A planted curve with unit Gaussian noise: steps, values, stderr."""
    steps = _steps(num)
    x = np.log1p(steps) / np.log1p(_LAST)
    rng = np.random.default_rng([seed, num])
    return steps, height * shape(x) + rng.standard_normal(x.size), np.ones(x.size)


def _kinds(found):
    return [stage.kind for stage in found]


def _ends(found):
    return [stage.end for stage in found]


@pytest.mark.parametrize("known_errors", [True, False])
@pytest.mark.parametrize("name", _PLANTED)
def test_planted_stages_are_found(name, known_errors):
    shape, kinds, boundaries = _PLANTED[name]
    for seed in range(2):
        steps, values, stderr = _noisy(shape, 60, 100.0, seed)
        found = find_stages(steps, values, stderr if known_errors else None)
        assert _kinds(found) == kinds
        for stage, x in zip(found, boundaries, strict=False):
            assert stage.confidence >= 0.95
            assert stage.end_interval[0] < stage.end < stage.end_interval[1]
            assert np.log1p(stage.end) == pytest.approx(x * np.log1p(_LAST), abs=0.35)


@pytest.mark.parametrize("name", _PLANTED)
def test_stages_tile_the_steps_and_their_changes_add_up(name):
    steps, values, stderr = _noisy(_PLANTED[name][0], 60, 100.0, seed=0)
    found = find_stages(steps, values, stderr)
    assert (found[0].start, found[-1].end) == (1, _LAST)
    assert all(a.end == b.start for a, b in itertools.pairwise(found))
    posterior, _ = fit_curve(steps, values, stderr, kernel="fitted")
    mean, cov = posterior.curve(np.log1p([found[0].start, found[0].end]))
    assert found[0].delta == pytest.approx(mean[1] - mean[0])
    assert found[0].delta_stderr ** 2 == pytest.approx(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1])
    assert found[0].slope == pytest.approx(
        found[0].delta / np.log((found[0].end + 1) / (found[0].start + 1))
    )
    assert sum(s.delta for s in found) == pytest.approx(
        np.diff(posterior.curve(np.log1p(steps[[0, -1]]))[0]).item()
    )
    assert np.isnan(found[-1].confidence)
    assert found[-1].end_interval == (_LAST, _LAST)


def test_a_shallow_dip_is_a_boundary_only_for_a_large_enough_fraction():
    # Slope 1 - 0.6 exp(..): it dips to 0.4 of what it is on both sides.
    def shape(x):
        return x - 0.6 * 0.1 * np.sqrt(2 * np.pi) * stats.norm(0.5, 0.1).cdf(x)

    curve = _noisy(shape, 100, 2000.0, seed=0)
    assert len(find_stages(*curve, dip=0.6)) == 2
    assert len(find_stages(*curve, dip=0.25)) == 1


def test_a_small_wiggle_inside_a_movement_is_merged_into_it():
    # Two peaks of slope on a common shoulder, then a true plateau, then another rise.
    def shape(x):
        return _rise(x, 0.25, 0.04) + _rise(x, 0.38, 0.04) + _rise(x, 0.8, 0.05)

    found = find_stages(*_noisy(shape, 120, 300.0, seed=0))
    assert _kinds(found) == ["rise", "rise"]
    assert 0.5 < np.log1p(found[0].end) / np.log1p(_LAST) < 0.7


def test_confidence_is_the_share_of_samples_that_show_the_boundary():
    # Columns: a rise, a pause, a rise. Of four samples, the first and third dip below half.
    mean = np.array([1.0, 0.1, 1.0])
    samples = np.array([[1.0, 0.3, 1.0], [1.0, 0.6, 1.0], [1.0, -0.2, 1.0], [0.4, 0.3, 1.0]])
    for sign in (1, -1):
        assert boundaries._boundary(sign * mean, sign * samples, 0, 2, dip=0.5).confidence == 0.5
    # A rise and a fall: in the first sample alone are the signs those of the mean.
    mean = np.array([1.0, 0.2, -1.0])
    samples = np.array([[1.0, -0.9, -1.0], [-0.1, 0.0, -1.0], [1.0, 0.0, 0.1], [-1.0, 0.0, 1.0]])
    assert boundaries._boundary(mean, samples, 0, 2, dip=0.5).confidence == 0.25


def test_band_is_simultaneous():
    """Whole slopes, not single points, stay inside with the stated probability."""
    posterior, grid = fit_curve(*_noisy(_PLANTED["rise, fall"][0], 40, 20.0, 0), kernel="fitted")
    mean, margin, _ = boundaries._slope_band(posterior, grid, 0.9, 4000, seed=0)
    fresh = posterior.slope_samples(np.log1p(grid), 4000, seed=1)
    inside = np.all(np.abs(fresh - mean) <= margin, axis=1).mean()
    # Two samples of 4000: one set the band, the other counts.
    assert inside == pytest.approx(0.9, abs=4 * (2 * 0.9 * 0.1 / 4000) ** 0.5)


@pytest.mark.parametrize("factor", [1e-3, 3.7, -2.0])
def test_boundaries_do_not_depend_on_units(factor):
    steps, values, stderr = _noisy(_PLANTED["rise, plateau, rise, fall"][0], 80, 100.0, seed=1)
    plain = find_stages(steps, values, stderr)
    scaled = find_stages(steps, factor * values, abs(factor) * stderr)
    assert _ends(scaled) == _ends(plain)
    np.testing.assert_allclose([s.delta for s in scaled], [factor * s.delta for s in plain], 1e-3)


def test_boundaries_do_not_depend_on_a_constant():
    steps, values, stderr = _noisy(_PLANTED["rise, plateau, rise, fall"][0], 80, 100.0, seed=1)
    assert _ends(find_stages(steps, values + 1e4, stderr)) == _ends(
        find_stages(steps, values, stderr)
    )


def test_dead_checkpoints_are_as_if_absent():
    steps, values, stderr = _noisy(_PLANTED["rise, fall"][0], 40, 20.0, seed=0)
    dead = np.zeros(steps.size, bool)
    dead[[0, 7, 20]] = True
    lived = find_stages(steps[~dead], values[~dead], stderr[~dead])
    stderr[7], values[dead] = np.nan, [np.nan, np.inf, -np.inf]
    found = find_stages(steps, values, stderr)
    assert (_kinds(found), _ends(found)) == (_kinds(lived), _ends(lived))
    np.testing.assert_allclose([s.delta for s in found], [s.delta for s in lived], rtol=1e-6)


def _false_positives(num_points, seeds, known_errors, shape=np.zeros_like, height=0.0):
    curves = (_noisy(shape, num_points, height, seed) for seed in seeds)
    return sum(
        len(find_stages(steps, values, stderr if known_errors else None, num_samples=500)) > 1
        for steps, values, stderr in curves
    )


def _allowed(trials, rate):
    """A count that a process with this rate exceeds once in ten thousand."""
    return stats.binom(trials, rate).ppf(0.9999)


def test_noise_alone_makes_one_flat_stage():
    kinds = [_kinds(find_stages(*_noisy(np.zeros_like, 30, 0.0, s))) for s in range(8)]
    assert kinds.count(["flat"]) >= 7
    assert all(len(kind) == 1 for kind in kinds)


@pytest.mark.slow
@pytest.mark.parametrize("known_errors", [True, False])
@pytest.mark.parametrize("num_points", [12, 30, 100])
def test_noise_alone_makes_no_boundary(num_points, known_errors):
    """At most 1 % of 200 curves measured; the limit is what 2 % would hardly ever exceed."""
    count = _false_positives(num_points, range(200), known_errors)
    assert count <= _allowed(200, 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("known_errors", [True, False])
@pytest.mark.parametrize("num_points", [12, 30, 100])
def test_one_rise_is_seldom_cut_in_two(num_points, known_errors):
    """The design level is 5 % (one minus confidence); few points without errors reach 8 %."""
    count = _false_positives(num_points, range(100), known_errors, _PLANTED["rise"][0], 20.0)
    assert count <= _allowed(100, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_points", "height", "rate"),
    [
        ("rise, fall", 12, 20.0, 1.0),
        ("rise, plateau, rise", 12, 100.0, 1.0),
        ("rise, plateau, rise", 100, 20.0, 0.88),
        ("rise, plateau, rise, fall", 30, 100.0, 1.0),
    ],
)
def test_detection_rate_and_coverage(name, num_points, height, rate):
    """Rates as stated in `find_stages`, and 68 % intervals that hold the planted place."""
    shape, kinds, boundaries = _PLANTED[name]
    found = [find_stages(*_noisy(shape, num_points, height, seed)) for seed in range(60)]
    right = [curve for curve in found if _kinds(curve) == kinds]
    assert len(right) >= stats.binom(60, rate - 0.02).ppf(0.001)
    covered = [
        stage.end_interval[0] <= np.expm1(x * np.log1p(_LAST)) <= stage.end_interval[1]
        for curve in right
        for stage, x in zip(curve, boundaries, strict=False)
    ]
    assert np.mean(covered) >= stats.binom(len(covered), 0.68).ppf(0.001) / len(covered)


def _two_steep_rises(x):
    return _rise(x, 0.3, 0.03) + _rise(x, 0.75, 0.03)


def test_plateaus_lie_where_the_curve_is_flat():
    x = np.linspace(0, 1, 4001)
    true_slope = np.abs(np.gradient(_two_steep_rises(x), x))
    plateaus = find_plateaus(*_noisy(_two_steep_rises, 100, 1000.0, seed=0))
    places = np.log1p(plateaus) / np.log1p(_LAST)
    for start, end in places:
        assert true_slope[(x > start) & (x < end)].max() < 0.1 * true_slope.max()
    for centre in (0.15, 0.525, 0.9):  # before, between and after the rises
        assert np.any((places[:, 0] < centre - 0.02) & (places[:, 1] > centre + 0.02))


def test_plateaus_need_knowledge_not_ignorance():
    steps, values, stderr = _noisy(_two_steep_rises, 100, 1000.0, seed=0)
    assert find_plateaus(steps, values, 100 * stderr) == []
    noise = _noisy(np.zeros_like, 30, 0.0, seed=0)
    assert find_plateaus(*noise) == []
    assert find_plateaus(*noise, max_slope=20.0) == [(1, _LAST)]


def test_close_first_steps_leave_no_empty_stage():
    values = [0.0, 5.0, 0.0, 5.0, 0.0, 5.0, 0.0, 5.0]
    found = find_stages(range(8), values, np.full(8, 1e-3))
    assert all(stage.start < stage.end for stage in found)


def test_published_kernel_finds_the_planted_plateau():
    # Without noise, as that kernel assumes; it wiggles between points, hence "contains".
    steps = _steps(60)
    shape, _, (x,) = _PLANTED["rise, plateau, rise"]
    found = find_stages(steps, shape(np.log1p(steps) / np.log1p(_LAST)), kernel="published")
    places = np.log1p(_ends(found)) / np.log1p(_LAST)
    assert np.min(np.abs(places - x)) < 0.03


@pytest.mark.parametrize("name", ["confidence", "dip"])
@pytest.mark.parametrize("value", [0.0, 1.0, 1.5, float("nan")])
def test_fractions_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name} must lie between 0 and 1"):
        find_stages(range(5), range(5), **{name: value})


def test_max_slope_is_checked():
    with pytest.raises(ValueError, match="max_slope must be > 0, got -1"):
        find_plateaus(range(5), range(5), max_slope=-1)


def _recorded(name, **columns):
    path = _REFERENCE / name
    if not path.exists():
        pytest.skip(f"recorded curves are not beside the repository: {path}")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {k: np.array([float(row[c] or "nan") for row in rows]) for k, c in columns.items()}


def _near(found, step):
    """Whether a boundary lies within half an e-fold of a step."""
    return any(abs(np.log1p(stage.end) - np.log1p(step)) < 0.5 for stage in found[:-1])


@pytest.mark.parametrize("known_errors", [True, False])
def test_published_regression_boundaries_are_found_unaided(known_errors):
    """Seed 1 of arXiv:2402.02364, which states 1k, 40k, 126k and 320k, picked by hand."""
    table = _recorded(
        "regression_llc.csv",
        seed="seed",
        steps="step",
        values="llc_mean",
        std="llc_std_over_chains",
    )
    one = table["seed"] == 1
    stderr = table["std"][one] / 10**0.5 if known_errors else None
    found = find_stages(table["steps"][one], table["values"][one], stderr)
    assert all(_near(found, step) for step in (1_000, 40_000, 126_000, 320_000))
    assert _kinds(found) == ["rise", "rise", "fall", "fall", "rise"]


def test_published_language_boundaries_are_found_unaided():
    """Two layers; the paper states 900, 6.5k, 8.5k and 17k on the same recorded curve."""
    table = _recorded("language_curves.csv", steps="step", values="L2_llc_recorded_mean")
    found = find_stages(table["steps"], table["values"])
    assert all(_near(found, step) for step in (900, 6_500, 8_500, 17_000))
    assert _kinds(found)[:4] == ["rise", "rise", "fall", "rise"]


_SPARSE = pathlib.Path(__file__).parents[1] / "experiments/results/regression/llc-hot.csv"


def test_overshoot_between_sparse_points_is_no_stage(monkeypatch):
    """λ̂ of a run at few steps: each is above the one before from 69 to 20,202, but a smooth curve
    through them falls between two of them, as if it were sure of it."""
    with open(_SPARSE, encoding="utf-8") as file:
        rows = [(int(r["step"]), float(r["llc"]), float(r["stderr"])) for r in csv.DictReader(file)]
    steps, values, stderr = map(np.array, zip(*rows, strict=True))
    assert np.all(np.diff(values[(steps >= 69) & (steps <= 20_202)]) > 0)
    assert _kinds(find_stages(steps, values, stderr)) == ["rise", "rise", "fall"]
    monkeypatch.setattr(boundaries, "_seen", lambda *_: True)
    assert _kinds(find_stages(steps, values, stderr)) == ["rise", "fall", "rise", "fall"]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_movement_is_seen_in_its_stage_and_next_to_it(sign):
    steps, values = np.array([0.0, 10.0, 20.0, 30.0]), sign * np.array([1.0, 3.0, 2.0, 5.0])
    assert boundaries._seen(steps, values, 12.0, 18.0, -sign)  # from 10 to 20, both outside
    assert boundaries._seen(steps, values, 10.0, 20.0, -sign)
    assert not boundaries._seen(steps, values, 21.0, 29.0, -sign)
    assert not boundaries._seen(steps, values, 0.0, 9.0, -sign)
    assert boundaries._seen(steps, values, 0.0, 30.0, -sign)


def test_a_logged_loss_takes_seconds():
    """50,000 points, as in GPy issue 203, "Using GPy with Big Data, MemoryError": the covariance
    of all pairs would be 20 GB."""
    steps = np.arange(50_000)
    x = np.log1p(steps) / np.log1p(steps[-1])
    values = _rise(x, 0.4) + _rise(x, 0.8) + 0.1 * np.random.default_rng(0).standard_normal(x.size)
    found = find_stages(steps, values)
    assert _kinds(found) == ["rise", "rise"]
    assert np.log1p(found[0].end) / np.log1p(steps[-1]) == pytest.approx(0.6, abs=0.03)


def test_levels_of_a_long_signal_are_told_apart():
    """As in ruptures issue 365: 15,000 points on levels, with noise and spikes, and a search that
    did not end. Jumps make a smooth curve ring, so the three largest movements count."""
    rng = np.random.default_rng(7)
    jumps, levels = [1000, 3000, 7000], [2000, 3200, 1700, 2600]
    values = np.repeat(levels, np.diff([0, *jumps, 15_000])) + 350 * rng.standard_normal(15_000)
    values[rng.choice(15_000, 70, replace=False)] += rng.gamma(3.0, 1200.0, 70)
    found = find_stages(np.arange(15_000), values)
    largest = sorted(sorted(found, key=lambda stage: -abs(stage.delta))[:3])
    assert _kinds(largest) == ["rise", "fall", "rise"]
    for stage, jump in zip(largest, jumps, strict=True):
        assert stage.start < jump < stage.end


@pytest.mark.parametrize("num_samples", [0, 10**9])
@pytest.mark.parametrize("find", [find_stages, find_plateaus])
def test_number_of_samples_is_checked(find, num_samples):
    with pytest.raises(ValueError, match=f"between 1 and 100,000, got {num_samples}"):
        find(range(5), range(5), num_samples=num_samples)


def _two_rises(num=24):
    """A curve with two rises of 100 standard errors each, as `_noisy` gives it."""
    return _noisy(lambda x: _rise(x, 0.25) + _rise(x, 0.8), num, 100.0, seed=0)


@pytest.mark.parametrize("place", [0, 12, -1])
def test_a_point_without_information_changes_no_stage(place):
    steps, values, stderr = _two_rises()
    without = find_stages(*(np.delete(column, place) for column in (steps, values, stderr)))
    assert _kinds(without) == ["rise", "rise"]
    for size in (1e4, 1e6, 1e30, 1e300):
        values[place], stderr[place] = size, size
        found = find_stages(steps, values, stderr)
        assert (_kinds(found), _ends(found)) == (_kinds(without), _ends(without))


@pytest.mark.parametrize("size", [10.0, 100.0])
def test_a_point_with_little_information_changes_little(size):
    steps, values, stderr = _two_rises()
    without = find_stages(*(np.delete(column, 12) for column in (steps, values, stderr)))
    values[12], stderr[12] = values[12] + size, size
    found = find_stages(steps, values, stderr)
    assert _kinds(found) == _kinds(without)
    assert np.log1p(found[0].end) == pytest.approx(np.log1p(without[0].end), abs=0.2)


@pytest.mark.parametrize("error", [1.0, 0.0, np.nan, None])
@pytest.mark.parametrize("place", [0, 12, -1])
def test_a_point_that_decides_the_stages_is_named(place, error):
    """As in statsmodels issue 7700, "spikes in lowess": single points become peaks, silently."""
    steps, values, stderr = _two_rises()
    for size in (2e3, -1e6, 1e30):
        values[place] = size
        stderr[place] = 1.0 if error is None else error
        with pytest.warns(
            UserWarning, match=re.escape(f"{size:.4g}") + f".* at step {steps[place]};"
        ):
            find_stages(steps, values, None if error is None else stderr)


@pytest.mark.parametrize("error", [0.0, 1e-9])
def test_an_error_far_too_small_moves_no_boundary(error):
    """As in qiskit-experiments pull request 1224, where points with too small an error took over
    the fit, and veusz issue 213, where one with none made it impossible."""
    steps, values, stderr = _two_rises()
    honest = find_stages(steps, values, stderr)
    stderr[[3, 12]] = error
    found = find_stages(steps, values, stderr)
    assert _kinds(found) == _kinds(honest)
    assert np.log1p(found[0].end) == pytest.approx(np.log1p(honest[0].end), abs=0.3)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_boundaries_do_not_depend_on_extreme_units(factor):
    steps, values, stderr = _two_rises()
    assert _ends(find_stages(steps, factor * values, factor * stderr)) == _ends(
        find_stages(steps, values, stderr)
    )


def test_recorded_curves_are_taken_as_they_are():
    """No warning, and no point left out, on any curve of λ̂ in experiments/results."""
    paths = sorted((_SPARSE.parents[1]).rglob("*.csv"))
    curves = [path for path in paths if path.name == "results.csv" or path.stem.startswith("llc")]
    count = 0
    for path in curves:
        with path.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not {"step", "llc", "stderr"} <= rows[0].keys():
            continue
        steps, values, stderr = (
            np.array([float(row[name] or "nan") for row in rows])
            for name in ("step", "llc", "stderr")
        )
        for known in (stderr, None):
            posterior, _ = fit_curve(steps, values, known, kernel="fitted")
            assert posterior.points.steps.size == np.isfinite(values).sum()
        count += 1
    assert count >= 9
