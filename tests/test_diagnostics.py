"""Diagnostics against processes whose autocorrelation is known: x_t = φ x_(t-1) + noise."""

import math
import warnings

import numpy as np
import pytest

from llc_jax.diagnostics import (
    MAX_BELOW_ANCHOR,
    MAX_DISTANCE_GROWTH,
    MAX_DRIFT,
    MAX_RHAT,
    MAX_STABILITY,
    MIN_ACCEPTANCE,
    MIN_ESS,
    Diagnostics,
    diagnose,
    effective_sample_size,
    findings,
    mean_stderr,
    split_rhat,
)


def autoregressive(seed, phi, *shape):
    """Stationary AR(1) with unit variance, autocorrelation phi^k along the last axis."""
    x = np.random.default_rng(seed).normal(size=shape)
    x[..., 1:] *= math.sqrt(1 - phi**2)
    for t in range(1, shape[-1]):
        x[..., t] += phi * x[..., t - 1]
    return x


def tau(phi, length):
    """Integrated autocorrelation time of a mean over `length` draws, its finite sum included."""
    lags = np.arange(1, length)
    return 1 + 2 * np.sum((1 - lags / length) * phi**lags)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9, 0.98])
def test_effective_draws_and_error_bar_of_an_autoregression(phi):
    # 64 sets of 4 chains, each chain 200 autocorrelation times long. The initial-sequence
    # estimator of τ truncates the sum and subtracts an estimated mean, which costs a relative
    # 1/200 per chain; beyond that the mean over the sets must lie within 4 standard errors.
    length = int(200 * (1 + phi) / (1 - phi))
    sets = autoregressive(0, phi, 64, 4, length)
    exact = 4 * length / tau(phi, length)
    ess = np.array([effective_sample_size(x) for x in sets]) / exact
    assert abs(ess.mean() - 1) < 4 * ess.std(ddof=1) / 8 + 4 / 200
    stderr = np.array([mean_stderr(x) for x in sets]) * math.sqrt(exact)
    assert abs(stderr.mean() - 1) < 4 * stderr.std(ddof=1) / 8 + 2 / 200
    # z-scores of the means: their standard deviation has standard error 1/sqrt(2 · 64).
    z = sets.mean(axis=(1, 2)) / (stderr / math.sqrt(exact))
    assert abs(z.std(ddof=1) - 1) < 4 / math.sqrt(128)


def test_antithetic_draws_are_worth_more_than_their_number():
    sets = autoregressive(1, -0.5, 64, 4, 500)
    ess = np.array([effective_sample_size(x) for x in sets]) / (2000 / tau(-0.5, 500))
    assert ess.mean() * 3 > 2  # 1 / τ = 3
    assert abs(ess.mean() - 1) < 4 * ess.std(ddof=1) / 8 + 0.05


def test_split_rhat_of_independent_draws_has_its_known_mean():
    # With 2C half-chains of n draws, n (R̂² - 1) + 1 is χ² with 2C - 1 degrees over 2C - 1.
    sets = np.random.default_rng(2).normal(size=(400, 4, 200))
    chi2 = np.array([100 * (split_rhat(x) ** 2 - 1) + 1 for x in sets])
    assert abs(chi2.mean() - 1) < 4 * math.sqrt(2 / 7 / 400) + 2 / 100  # 1/n of the within variance
    assert abs(chi2.std(ddof=1) / math.sqrt(2 / 7) - 1) < 0.25
    assert np.mean([split_rhat(x) > MAX_RHAT for x in sets]) == 0.0


def test_split_rhat_of_separated_chains_is_large():
    draws = autoregressive(3, 0.5, 4, 400) + np.array([0.0, 0.0, 3.0, 3.0])[:, None]
    assert split_rhat(draws) > 1.5
    # and of one chain that moves from one place to another
    moving = autoregressive(4, 0.5, 1, 400)
    moving[:, 200:] += 3.0
    assert split_rhat(moving) > 1.5


@pytest.mark.parametrize("length", [100, 101])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_split_rhat_is_that_of_the_textbook_and_of_arviz(length, shift):
    draws = autoregressive(5, 0.6, 3, length) + shift * np.arange(3)[:, None]
    n = length // 2
    halves = np.concatenate([draws[:, :n], draws[:, -n:]])
    within = halves.var(axis=1, ddof=1).mean()
    between = halves.mean(axis=1).var(ddof=1)
    textbook = math.sqrt((n - 1) / n + between / within)
    assert split_rhat(draws) == pytest.approx(textbook, rel=1e-12)
    with warnings.catch_warnings():  # arviz announces its next version, once per day
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    assert split_rhat(draws) == pytest.approx(float(arviz.rhat(draws, method="split")), rel=1e-12)


def test_chains_that_disagree_widen_the_error_bar_to_their_spread():
    # Chains stuck at different places are worth one draw each: the error is spread / sqrt(C). The
    # sum of autocorrelations of draws that never forget is N and not N/2, so τ = 2N - 1, and the
    # error bar errs on the careful side by sqrt(2).
    places = np.array([-1.0, 0.0, 1.0, 2.0])
    draws = places[:, None] + 1e-3 * autoregressive(6, 0.5, 4, 1000)
    spread = places.std(ddof=1) / 2
    assert mean_stderr(draws) == pytest.approx(math.sqrt(2) * spread, rel=2e-3)
    assert effective_sample_size(draws) == pytest.approx(4 * 1000 / 1999, rel=2e-3)
    # Independent draws around places that differ as much as the draws themselves: in between.
    mixed = places[:, None] + np.random.default_rng(6).normal(size=(4, 1000))
    assert spread < mean_stderr(mixed) < 1.6 * spread


@pytest.mark.parametrize(("chains", "length"), [(0, 100), (4, 3), (1, 1)])
def test_too_few_draws_give_nan_not_a_number_from_nowhere(chains, length):
    draws = np.zeros((chains, length))
    assert math.isnan(split_rhat(draws))
    assert math.isnan(effective_sample_size(draws))
    assert math.isnan(mean_stderr(draws))
    assert math.isnan(diagnose(draws, draws).drift)
    if not chains:
        assert all(math.isnan(value) for value in diagnose(draws, draws))


def test_constant_draws_have_no_error_bar():
    draws = np.ones((4, 100))
    assert math.isnan(mean_stderr(draws))
    assert math.isnan(diagnose(draws, draws).drift)


def test_one_chain_is_diagnosed_by_its_halves():
    draws = autoregressive(7, 0.5, 1, 2000)
    d = diagnose(draws, np.ones_like(draws) + 0.01 * autoregressive(8, 0.5, 1, 2000))
    assert d.rhat < MAX_RHAT
    assert d.stderr == pytest.approx(math.sqrt(3 / 2000), rel=0.3)
    assert d.distance_growth == 0.0


def distances(seed, phi, *shape):
    """Distances whose square is a stationary, positive autoregression around 100."""
    return np.sqrt(100 + 10 * autoregressive(seed, phi, *shape))


def test_drift_of_stationary_chains_is_standard_normal():
    sets, away = autoregressive(9, 0.8, 300, 4, 500), distances(10, 0.8, 300, 4, 500)
    diagnoses = [diagnose(x, y) for x, y in zip(sets, away, strict=True)]
    drift = np.array([d.drift for d in diagnoses])
    # The error bar of half a chain, 28 autocorrelation times, is itself uncertain by c: its
    # inverse is 1 + c² too large on average and adds 3c²/2 to the standard deviation.
    scatter = np.array([mean_stderr(x[:, :250]) for x in sets])
    c = scatter.std() / scatter.mean() / math.sqrt(2)
    assert abs(drift.mean()) < 4 / math.sqrt(300)
    assert abs(drift.std(ddof=1) - (1 + 1.5 * c**2)) < 4 / math.sqrt(600)
    # False positives: P(|z| > 4) is 6e-5, so one in 300 would be much.
    assert np.sum(np.abs(drift) > MAX_DRIFT) == 0
    assert np.sum([d.distance_growth > 0 for d in diagnoses]) == 0


def test_drift_is_the_difference_of_the_halves_in_their_standard_errors():
    draws = autoregressive(11, 0.5, 8, 1000)
    draws[:, 500:] += 0.5
    early, late = draws[:, :500], draws[:, 500:]
    stderr = math.hypot(mean_stderr(early), mean_stderr(late))
    d = diagnose(draws, np.ones_like(draws))
    assert d.drift == pytest.approx((late.mean() - early.mean()) / stderr, rel=1e-12)
    assert d.drift > MAX_DRIFT  # exact value 0.5 / sqrt(2 · 3/4000) = 12.9
    assert abs(d.drift - 0.5 / math.sqrt(2 * tau(0.5, 500) / 4000)) < 4
    assert diagnose(-draws, np.ones_like(draws)).drift == pytest.approx(-d.drift, rel=1e-12)


def test_diffusing_chains_are_seen_to_spread():
    # Brownian motion: E |w|² grows like t, so the second half is three times the first.
    steps = np.random.default_rng(12).normal(size=(8, 400, 50))
    away = np.linalg.norm(np.cumsum(steps, axis=1), axis=-1)
    growth = diagnose(autoregressive(13, 0.5, 8, 400), away).distance_growth
    square = away**2
    assert growth == pytest.approx(square[:, 200:].mean() / square[:, :200].mean() - 1, rel=1e-12)
    # Var of the sums over 8 chains x 50 directions: about a tenth of the value.
    assert abs(growth - 2) < 4 * 0.2
    # and a shrinking distance is no growth
    assert diagnose(autoregressive(13, 0.5, 8, 400), away[:, ::-1]).distance_growth == 0.0


# --- findings ---------------------------------------------------------------------------------

HEALTHY = {
    "mean": 3.0,
    "stderr": 0.1,
    "num_chains": 4,
    "diverged_at": np.full(4, -1),
    "below_anchor": 0.01,
    "acceptance": 0.97,
    "stability": 0.4,
    "diagnostics": Diagnostics(stderr=0.1, rhat=1.001, ess=900.0, drift=0.3, distance_growth=0.0),
}


def labels(**changes):
    diagnostics = HEALTHY["diagnostics"]._replace(
        **{k: changes.pop(k) for k in list(changes) if k in ("rhat", "ess", "drift", "growth")}
    )
    if "distance_growth" in changes:
        diagnostics = diagnostics._replace(distance_growth=changes.pop("distance_growth"))
    return findings(**{**HEALTHY, "diagnostics": diagnostics, **changes})


def dead(*at):
    return np.array(at)


SITUATIONS = [
    # (changes to a healthy run, the one label, what its sentence must contain)
    ({"diverged_at": dead(-1, 17, -1, -1)}, "1 of 4 chains diverged", "chain 1 at draw 17"),
    ({"diverged_at": dead(0, 17, 3, -1)}, "3 of 4 chains diverged", "over the 1 finite chains"),
    ({"mean": -0.21}, "not a minimum", "-0.21 is negative"),
    ({"mean": -0.1, "below_anchor": 0.6}, "not a minimum", "60% of the draws"),
    ({"rhat": MAX_RHAT + 0.01}, "chains disagree", "1.110"),
    ({"drift": MAX_DRIFT + 0.1}, "still drifting", "+4.1 standard errors"),
    ({"drift": -MAX_DRIFT - 0.1}, "still drifting", "-4.1 standard errors"),
    ({"distance_growth": MAX_DISTANCE_GROWTH + 0.01}, "still spreading", "6%"),
    ({"ess": MIN_ESS - 1}, "few effective draws", "39 is below 40"),
    ({"ess": math.nan}, "few effective draws", "nan is below 40"),
    ({"stability": MAX_STABILITY + 0.1}, "near instability", "is 2.1, above 2"),
    ({"stability": 4.3}, "near instability", "lower step_size by a factor 11"),
    ({"stability": math.inf}, "near instability", "is inf"),
    ({"acceptance": MIN_ACCEPTANCE - 0.01}, "step too large", "49%"),
]


@pytest.mark.parametrize(("changes", "label", "words"), SITUATIONS, ids=lambda x: str(x)[:40])
def test_each_label_appears_exactly_in_its_situation(changes, label, words):
    [(found, sentence)] = labels(**changes)
    assert found == label
    assert words in sentence
    assert sentence.endswith(".")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mean": -0.19},  # within two standard errors of zero
        {"below_anchor": MAX_BELOW_ANCHOR + 0.1},  # low draws, positive mean
        {"rhat": MAX_RHAT},
        {"rhat": math.nan},
        {"drift": MAX_DRIFT},
        {"drift": math.nan},
        {"distance_growth": MAX_DISTANCE_GROWTH},
        {"distance_growth": math.nan},
        {"ess": MIN_ESS},
        {"stability": MAX_STABILITY},
        {"stability": math.nan},  # not measured
        {"acceptance": MIN_ACCEPTANCE},
        {"acceptance": math.nan},  # not measured
    ],
    ids=str,
)
def test_a_healthy_run_has_no_findings(changes):
    assert labels(**changes) == []


def test_all_findings_together_in_order():
    found = labels(
        diverged_at=dead(5, -1, -1, -1), mean=-3.0, rhat=2.0, drift=9.0, distance_growth=1.0,
        ess=3.0, stability=3.7, acceptance=0.1,
    )  # fmt: skip
    assert [label for label, _ in found] == [
        "1 of 4 chains diverged", "not a minimum", "chains disagree", "still drifting",
        "still spreading", "few effective draws", "near instability", "step too large",
    ]  # fmt: skip


def test_nothing_else_is_said_of_dead_chains():
    nan = math.nan
    found = labels(
        diverged_at=dead(1, 2, 3, 4), mean=nan, stderr=nan, below_anchor=nan, acceptance=nan,
        stability=nan, rhat=nan, ess=nan, drift=nan, distance_growth=nan,
    )  # fmt: skip
    assert [label for label, _ in found] == ["4 of 4 chains diverged"]


def test_a_long_list_of_dead_chains_is_cut():
    [(label, sentence)] = labels(num_chains=20, diverged_at=np.r_[np.arange(12), np.full(8, -1)])
    assert label == "12 of 20 chains diverged"
    assert "chain 7 at draw 7 and 4 more" in sentence
    assert "chain 8" not in sentence
