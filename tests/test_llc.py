"""The estimator against closed forms, through the public API.

On L(w) = ½ Σ h w² SGLD is a linear recursion, so its moments at finite step size, localization
and temperature are known exactly, transient included. With Λ = nbeta h + localization and
ρ = 1 - step_size Λ/2, from the anchor w* = 0:

    E x_t² = V (1 - ρ^2t),  cov(x_s, x_t) = ρ^(t-s) E x_s²,
    V = (1 + step_size nbeta² s / 4m) / (Λ (1 - step_size Λ/4))

where s/m is the variance that minibatches of m examples add to the gradient. Estimates must lie
within 4 standard errors of these values: no tolerance is chosen by hand.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llc_jax import SGLD, LLCEstimate, Stream, estimate_llc, estimate_llc_over_checkpoints
from llc_jax.diagnostics import mean_stderr
from llc_jax.parallel import make_mesh

DIM = 8
ROWS = 16
CHAINS = 512


def quadratic(params, batch):
    """½ Σ h (w - z)²: curvatures and targets are data, so that no setting compiles anew."""
    return 0.5 * jnp.sum(batch["h"] * (params["w"][None] - batch["z"]) ** 2, axis=-1)


def quadratic_data(h, spread=0.0):
    """[ROWS] examples with curvature h, whose targets have mean 0 and standard deviation spread."""
    h = np.broadcast_to(np.asarray(h, np.float32), (ROWS, DIM))
    z = np.random.default_rng(7).normal(size=(ROWS, DIM))
    z = spread * (z - z.mean(axis=0)) / z.std(axis=0)
    return {"h": h, "z": z.astype(np.float32)}


ORIGIN = {"w": np.zeros(DIM, np.float32)}
SPECTRUM = np.linspace(0.25, 2.0, DIM)
RANK_FOUR = np.array([0.5, 1.0, 1.5, 2.0, 0.0, 0.0, 0.0, 0.0])
SADDLE = np.array([0.5, 1.0, 1.5, 2.0, 0.25, 0.75, -0.5, -0.25])


@dataclasses.dataclass(frozen=True)
class Law:
    """Exact moments of the paired estimate of one chain on a diagonal quadratic, float64."""

    h: np.ndarray
    step_size: float
    localization: float
    nbeta: float
    gradient_variance: np.ndarray | float = 0.0  # s/m

    @functools.cached_property
    def curved(self):
        """Directions with h != 0; the others add nothing to the loss."""
        return np.asarray(self.h, np.float64)[np.asarray(self.h) != 0]

    @functools.cached_property
    def stiffness(self):
        return self.nbeta * self.curved + self.localization

    @functools.cached_property
    def rho(self):
        return 1 - self.step_size * self.stiffness / 2

    @functools.cached_property
    def variance(self):
        s = np.broadcast_to(self.gradient_variance, np.shape(self.h))[np.asarray(self.h) != 0]
        noise = 1 + self.step_size * self.nbeta**2 * s / 4
        return noise / (self.stiffness * (1 - self.step_size * self.stiffness / 4))

    def mean(self, burnin, draws):
        """½ Σ nbeta h V [1 - ρ^2B (1 - ρ^2T) / (T (1 - ρ²))], B burn-in and T draws."""
        square = self.rho**2
        missing = square**burnin * (1 - square**draws) / (draws * (1 - square))
        return np.sum(self.nbeta * self.curved * self.variance * (1 - missing)) / 2

    @property
    def tau(self):
        """Integrated autocorrelation time of the loss in each direction."""
        return (1 + self.rho**2) / (1 - self.rho**2)

    def chain_variance(self, burnin, draws):
        """Variance of the mean over `draws` draws, from cov(x_s², x_t²) = 2 cov(x_s, x_t)²."""
        t = np.arange(burnin, burnin + draws)
        total = 0.0
        for h, rho, v in zip(self.curved, self.rho, self.variance, strict=True):
            at = v * (1 - rho ** (2.0 * t))
            for lag in range(draws):
                weight = 1 if lag == 0 else 2
                covariance = rho**lag * at[: draws - lag]
                total += weight * 0.5 * (self.nbeta * h) ** 2 * np.sum(covariance**2)
        return total / draws**2


def run(data, *, step_size, localization, nbeta, seed=0, params=ORIGIN, loss=quadratic, **options):
    settings = {"num_chains": CHAINS, "num_draws": 600, "num_burnin": 100, "num_probes": 0}
    return estimate_llc(
        jax.random.key(seed), loss, params, data, sampler=SGLD(step_size),
        localization=localization, nbeta=nbeta, **{**settings, **options},
    )  # fmt: skip


def assert_within_4_stderr(value, exact, stderr):
    z = (value - exact) / stderr
    assert abs(z) < 4, f"{value:.6g} is {z:+.1f} standard errors ({stderr:.2g}) from {exact:.6g}"


def assert_spread(per_chain, variance):
    """The sample variance of the chains, within 4 of its own standard errors."""
    per_chain = np.asarray(per_chain, np.float64)
    size, centred = len(per_chain), per_chain - per_chain.mean()
    excess = np.mean(centred**4) / np.mean(centred**2) ** 2 - 3
    stderr = math.sqrt(2 / (size - 1) + max(excess, 0) / size)
    assert_within_4_stderr(per_chain.var(ddof=1) / variance, 1.0, stderr)


# --- exact means and spreads on quadratics ----------------------------------------------------

SETTINGS = {
    # name: (h, step size, localization, nbeta)
    "small step": (SPECTRUM, 5e-3, 1.0, 30.0),
    "step at 3/4 of the stability limit": (SPECTRUM, 0.048, 2.5, 30.0),
    "no localization": (SPECTRUM, 2e-2, 0.0, 30.0),
    "strong localization": (SPECTRUM, 5e-3, 200.0, 30.0),
    "cold": (SPECTRUM, 5e-4, 10.0, 1000.0),
    "zero eigenvalues add nothing": (RANK_FOUR, 1e-2, 1.0, 50.0),
    "negative directions": (SADDLE, 2e-2, 15.0, 20.0),
    "isotropic": (np.ones(DIM), 2e-2, 1.0, 20.0),
    "still in the transient": (SPECTRUM, 5e-4, 1.0, 30.0),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_full_batch_estimate_is_exact_at_finite_step_size(name):
    h, *scalars = SETTINGS[name]
    law = Law(h, *scalars)
    step_size, localization, nbeta = scalars
    estimate = run(quadratic_data(h), step_size=step_size, localization=localization, nbeta=nbeta)
    exact, variance = law.mean(100, 600), law.chain_variance(100, 600)
    assert_within_4_stderr(estimate.mean, exact, math.sqrt(variance / CHAINS))
    assert_spread(estimate.per_chain, variance)
    assert estimate.num_finite == CHAINS
    assert estimate.init_loss == 0.0
    assert estimate.mean == pytest.approx(estimate.per_chain.mean(), rel=1e-12)


def test_the_settings_above_tell_the_exact_law_from_the_ideal_one():
    # Guards the guard: the finite-step value differs from ½ Σ nbeta h / Λ by many standard errors.
    for name in ("step at 3/4 of the stability limit", "no localization"):
        law = Law(*SETTINGS[name])
        ideal = np.sum(law.nbeta * law.curved / law.stiffness) / 2
        stderr = math.sqrt(law.chain_variance(100, 600) / CHAINS)
        assert law.mean(100, 600) - ideal > 20 * stderr
    slow = Law(*SETTINGS["still in the transient"])
    stderr = math.sqrt(slow.chain_variance(100, 600) / CHAINS)
    assert slow.mean(100, 600) - slow.mean(0, 700) > 5 * stderr  # burn-in averaged in
    assert slow.mean(10**6, 600) - slow.mean(100, 600) > 5 * stderr  # burn-in taken for complete
    h, *scalars = SETTINGS["negative directions"]
    assert Law(h[h < 0], *scalars).mean(100, 600) < -0.4
    assert Law(*SETTINGS["zero eigenvalues add nothing"]).mean(10**6, 600) < 4 / 2 * 1.25


@pytest.mark.parametrize("spread", [0.1, 0.5])
@pytest.mark.parametrize("name", ["small step", "strong localization", "negative directions"])
def test_minibatch_noise_inflates_the_estimate_exactly(name, spread):
    # Batches are drawn with replacement: the gradient h (w - mean z_B) has variance h² spread²/m
    # exactly, whatever w. The law of the noise is not normal, which no second moment sees.
    h, step_size, localization, nbeta = SETTINGS[name]
    size = 4
    law = Law(h, step_size, localization, nbeta, (h * spread) ** 2 / size)
    estimate = run(
        quadratic_data(h, spread),
        step_size=step_size, localization=localization, nbeta=nbeta, batch_size=size,
    )  # fmt: skip
    stderr = estimate.per_chain.std(ddof=1) / math.sqrt(CHAINS)
    assert_within_4_stderr(estimate.mean, law.mean(100, 600), stderr)
    # init_loss is the exact mean over the data, not over the minibatches that were seen.
    assert estimate.init_loss == pytest.approx(np.sum(h * spread**2) / 2, rel=1e-5)


def test_minibatch_noise_is_visible_in_that_test():
    h, step_size, localization, nbeta = SETTINGS["small step"]
    clean = Law(h, step_size, localization, nbeta)
    noisy = Law(h, step_size, localization, nbeta, (h * 0.5) ** 2 / 4)
    without_replacement = Law(
        h, step_size, localization, nbeta, (h * 0.5) ** 2 / 4 * (ROWS - 4) / (ROWS - 1)
    )
    stderr = math.sqrt(noisy.chain_variance(100, 600) / CHAINS)
    assert noisy.mean(100, 600) - clean.mean(100, 600) > 20 * stderr
    assert noisy.mean(100, 600) - without_replacement.mean(100, 600) > 4 * stderr


def test_the_transient_from_the_anchor_is_exact():
    # 50 draws without burn-in, of which most are far from equilibrium.
    step_size, localization, nbeta = 4e-3, 1.0, 20.0
    law = Law(SPECTRUM, step_size, localization, nbeta)
    estimate = run(
        quadratic_data(SPECTRUM), step_size=step_size, localization=localization, nbeta=nbeta,
        num_burnin=0, num_draws=50,
    )  # fmt: skip
    stderr = math.sqrt(law.chain_variance(0, 50) / CHAINS)
    assert_within_4_stderr(estimate.mean, law.mean(0, 50), stderr)
    assert law.mean(0, 50) < 0.75 * law.mean(10**6, 50)
    # and draw by draw: losses are those before the step, so the first is the anchor's.
    np.testing.assert_array_equal(estimate.losses[:, 0], 0.0)
    for t in (1, 2, 10, 49):
        exact = np.sum(nbeta * law.curved * law.variance * (1 - law.rho ** (2 * t))) / 2
        gaps = nbeta * estimate.losses[:, t].astype(np.float64)
        assert_within_4_stderr(gaps.mean(), exact, gaps.std(ddof=1) / math.sqrt(CHAINS))


def test_spread_between_chains_and_effective_draws_follow_tau():
    # Equal curvatures: one autocorrelation time. Σ ½ (nbeta h V)² τ / T, and ESS = C T / τ.
    h, *scalars = SETTINGS["isotropic"]
    law = Law(h, *scalars)
    step_size, localization, nbeta = scalars
    estimate = run(
        quadratic_data(h), step_size=step_size, localization=localization, nbeta=nbeta, seed=1
    )
    tau = law.tau[0]
    formula = np.sum((nbeta * law.curved * law.variance) ** 2) / 2 * tau / 600
    assert formula == pytest.approx(law.chain_variance(100, 600), rel=0.01)
    assert_spread(estimate.per_chain, formula)
    draws = CHAINS * 600
    # Pooled over 512 chains each autocorrelation has standard error below 1/sqrt(draws / tau);
    # tau is twice the sum of about 2 tau of them (the initial monotone sequence ends there).
    relative = 2 * 2 * tau / math.sqrt(draws / tau) / tau
    assert_within_4_stderr(estimate.ess / (draws / tau), 1.0, relative)
    assert estimate.stderr == pytest.approx(math.sqrt(formula / CHAINS), rel=4 * relative)


def test_error_bars_are_calibrated():
    # 200 independent short estimates of 4 chains, all in one program: their z-scores against the
    # exact value have mean 0 and standard deviation 1, up to 4 standard errors of each. Dividing
    # by an estimate with relative error c inflates the deviation by 1 + 3c²/2, which is added.
    count, draws = 200, 400
    h, *scalars = SETTINGS["isotropic"]
    law = Law(h, *scalars)
    step_size, localization, nbeta = scalars
    estimates = [
        estimate
        for _, estimate in estimate_llc_over_checkpoints(
            jax.random.key(3), quadratic, [(step, ORIGIN) for step in range(count)],
            quadratic_data(h), sampler=SGLD(step_size), localization=localization, nbeta=nbeta,
            num_chains=4, num_draws=draws, num_burnin=100, num_probes=0, checkpoint_batch=count,
        )
    ]  # fmt: skip
    mean, stderr = (np.array([getattr(e, k) for e in estimates]) for k in ("mean", "stderr"))
    z = (mean - law.mean(100, draws)) / stderr
    scatter = stderr.std() / stderr.mean()
    assert abs(z.mean()) < 4 / math.sqrt(count)
    inflation = 1 + 1.5 * scatter**2
    assert abs(z.std(ddof=1) - inflation) < 4 / math.sqrt(2 * count)
    # The error bar itself, against the exact standard error.
    exact = math.sqrt(law.chain_variance(100, draws) / 4)
    assert abs(stderr.mean() / exact - 1) < 4 * scatter / math.sqrt(count) + scatter**2
    # Healthy runs are called healthy.
    assert sum(e.verdict == "ok" for e in estimates) >= 0.97 * count


# --- beyond quadratics ------------------------------------------------------------------------


def polynomial(params, batch):
    """½ a x⁴ + ½ b x² y²."""
    x, y = params["x"], params["y"]
    return 0.5 * (batch["a"] * x**4 + batch["b"] * x**2 * y**2)


PLANE = {"x": np.float32(0), "y": np.float32(0)}
# nbeta E[K] at localization 1, to the four digits of a published quadrature.
SINGULAR = {
    # name: (a, b, nbeta, value)
    "quartic": (1.0, 0.0, 10.0, 0.2154),
    "quartic, colder": (1.0, 0.0, 30.0, 0.2293),
    "normal crossing": (0.0, 1.0, 10.0, 0.2626),
    "normal crossing, colder": (0.0, 1.0, 30.0, 0.3044),
}


def singular_quadrature(a, b, nbeta):
    """(nbeta E[K], its derivative by the step size) under exp(-nbeta K - |w|²/2), on a grid.

    The Euler scheme with step ε samples exp(-U) (1 + ε/2 (¼|∇U|² - ½ΔU) + O(ε²)), up to
    normalization; for U = ½Λx² this is the Λ(1 - εΛ/4) of the closed form above.
    """
    axis = np.linspace(-7, 7, 1001)
    x, y = np.meshgrid(axis, axis)
    potential = nbeta * 0.5 * (a * x**4 + b * (x * y) ** 2)
    energy = potential + (x**2 + y**2) / 2
    weight = np.exp(-energy)
    weight /= weight.sum()
    slope = (nbeta * (2 * a * x**3 + b * x * y**2) + x) ** 2 + (nbeta * b * x**2 * y + y) ** 2
    laplacian = nbeta * (6 * a * x**2 + b * (x**2 + y**2)) + 2
    tilt = slope / 4 - laplacian / 2
    value = np.sum(weight * potential)
    return value, np.sum(weight * (potential - value) * tilt) / 2


@pytest.mark.parametrize("name", SINGULAR)
def test_singular_losses_agree_with_quadrature(name):
    a, b, nbeta, table = SINGULAR[name]
    exact, bias_per_step = singular_quadrature(a, b, nbeta)
    assert exact == pytest.approx(table, abs=5e-5)
    step_size = 1e-3
    estimate = run(
        {"a": np.full(1, a, np.float32), "b": np.full(1, b, np.float32)},
        loss=polynomial, params=PLANE, step_size=step_size, localization=1.0, nbeta=nbeta,
        num_chains=1024, num_burnin=4000, num_draws=3000,
    )  # fmt: skip
    # Chains are independent, so their spread is a standard error that nothing can fool. The slow
    # directions relax like exp(-ε t), in the loss exp(-2 · 1e-3/2 · 4000) = 2 % of the value at
    # the start of the draws; the discretization adds less than one standard error.
    stderr = estimate.per_chain.std(ddof=1) / math.sqrt(1024)
    assert bias_per_step * step_size < stderr
    assert stderr < 0.025 * table
    assert_within_4_stderr(estimate.mean, table, stderr)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quartic", "normal crossing"])
def test_nuts_agrees_on_singular_losses(name):
    from numpyro.infer import MCMC, NUTS

    a, b, nbeta, table = SINGULAR[name]

    def potential(w):
        return nbeta * 0.5 * (a * w["x"] ** 4 + b * (w["x"] * w["y"]) ** 2)

    with jax.numpy_dtype_promotion("standard"):
        chains = MCMC(
            NUTS(potential_fn=lambda w: potential(w) + (w["x"] ** 2 + w["y"] ** 2) / 2),
            num_warmup=500, num_samples=4000, num_chains=4, chain_method="vectorized",
            progress_bar=False,
        )  # fmt: skip
        rng = np.random.default_rng(0)
        start = {name: rng.normal(size=4).astype(np.float32) for name in PLANE}
        chains.run(jax.random.key(0), init_params=start)
        gaps = np.asarray(potential(chains.get_samples(group_by_chain=True)), np.float64)
    assert_within_4_stderr(gaps.mean(), table, mean_stderr(gaps))


# --- the estimator: nbeta, pairing, data ------------------------------------------------------

SMALL = {"num_chains": 8, "num_draws": 24, "num_burnin": 6, "batch_size": 4}
MILD = {"step_size": 1e-2, "localization": 1.0, "nbeta": 20.0}
NOISY = quadratic_data(SPECTRUM, 0.3)


def positions(params, batch):
    """For `collect`."""
    return params["w"]


def positions_and_losses(params, batch):
    """For `collect`."""
    return params["w"], quadratic(params, batch)


def test_nbeta_is_used_exactly_once():
    # (4 L, nbeta/4) is the same posterior as (L, nbeta), with the same estimate; powers of two
    # leave every rounding as it is.
    before = run(NOISY, **SMALL, **MILD)
    fourfold = {"h": 4 * NOISY["h"], "z": NOISY["z"]}
    after = run(fourfold, **SMALL, **{**MILD, "nbeta": MILD["nbeta"] / 4})
    np.testing.assert_array_equal(after.losses, 4 * before.losses)
    np.testing.assert_array_equal(after.distance, before.distance)
    np.testing.assert_array_equal(after.per_chain, before.per_chain)
    # and the estimate is nbeta times the mean gap, once.
    gaps = before.losses.astype(np.float64) - before.anchor_losses
    np.testing.assert_allclose(before.per_chain, 20.0 * gaps.mean(axis=1), rtol=1e-12)


def test_pairing_keeps_the_mean_and_lowers_the_variance():
    # Unpaired: nbeta (mean L_B(w) - L(w*)). The difference of the two estimates is the error of
    # the anchor's loss on the minibatches seen: its mean is 0 and its variance known.
    h, step_size, localization, nbeta = SETTINGS["small step"]
    data = quadratic_data(h, 0.5)
    estimate = run(data, step_size=step_size, localization=localization, nbeta=nbeta, batch_size=4)
    unpaired = nbeta * (estimate.losses.mean(axis=1, dtype=np.float64) - estimate.init_loss)
    difference = unpaired - estimate.per_chain
    at_anchor = np.asarray(quadratic(ORIGIN, data), np.float64)
    variance = nbeta**2 * at_anchor.var() / (4 * 600)
    assert_within_4_stderr(difference.mean(), 0.0, math.sqrt(variance / CHAINS))
    assert_spread(difference, variance)
    assert unpaired.var() > 1.5 * estimate.per_chain.var()


def test_every_draw_is_compared_with_the_anchor_on_its_own_batch():
    # Where the chain cannot move, the two losses are those of the same point.
    still = run(NOISY, **SMALL, step_size=1e-30, localization=1.0, nbeta=20.0)
    assert len(np.unique(still.anchor_losses)) > 100
    np.testing.assert_allclose(still.losses, still.anchor_losses, rtol=1e-6)


def draw_rows(rng_key):
    """The minibatches of `NOISY`, as a stream."""
    rows = jax.random.randint(rng_key, (4,), 0, ROWS)
    return {name: jnp.asarray(x)[rows] for name, x in NOISY.items()}


def test_a_stream_of_the_same_rows_is_the_same_run():
    finite = run(NOISY, **SMALL, **MILD)
    without_size = {k: v for k, v in SMALL.items() if k != "batch_size"}
    stream = run(Stream(draw_rows), **without_size, **MILD)
    np.testing.assert_array_equal(stream.losses, finite.losses)
    np.testing.assert_allclose(stream.anchor_losses, finite.anchor_losses, rtol=1e-6)
    assert stream.settings == finite.settings
    # A stream has no whole: its initial loss is the mean over the batches after burn-in.
    assert stream.init_loss == pytest.approx(stream.anchor_losses.mean(dtype=np.float64))


def fresh_rows(rng_key):
    """Targets that never repeat: h (w - z) with z ~ N(0, 0.3²) per example."""
    z = 0.3 * jax.random.normal(rng_key, (4, DIM))
    return {"h": jnp.broadcast_to(jnp.asarray(SPECTRUM, jnp.float32)[None], (4, DIM)), "z": z}


def test_a_stream_is_exact():
    law = Law(SPECTRUM, 1e-2, 1.0, 20.0, (SPECTRUM * 0.3) ** 2 / 4)
    estimate = run(Stream(fresh_rows), **MILD)
    stderr = estimate.per_chain.std(ddof=1) / math.sqrt(CHAINS)
    assert_within_4_stderr(estimate.mean, law.mean(100, 600), stderr)
    exact_loss = np.sum(SPECTRUM * 0.3**2) / 2
    spread = math.sqrt(np.sum(SPECTRUM**2) / 2) * 0.3**2
    assert_within_4_stderr(estimate.init_loss, exact_loss, spread / math.sqrt(4 * 600 * CHAINS))


# --- draws: burn-in, thinning, collect --------------------------------------------------------


def test_burnin_is_cut_off_and_never_averaged_in():
    whole = run(NOISY, **{**SMALL, "num_burnin": 0, "num_draws": 30}, **MILD)
    parts = run(NOISY, **SMALL, **MILD)
    np.testing.assert_array_equal(parts.burnin_losses, whole.losses[:, :6])
    np.testing.assert_array_equal(parts.losses, whole.losses[:, 6:])
    np.testing.assert_array_equal(parts.anchor_losses, whole.anchor_losses[:, 6:])
    np.testing.assert_array_equal(parts.distance, whole.distance[:, 6:])
    gaps = 20.0 * (whole.losses.astype(np.float64) - whole.anchor_losses)
    np.testing.assert_allclose(parts.per_chain, gaps[:, 6:].mean(axis=1), rtol=1e-12)
    assert parts.mean > whole.mean  # the transient is low


@functools.cache
def every_step():
    return run(NOISY, **{**SMALL, "num_draws": 84}, collect=positions_and_losses, **MILD)


def test_thinning_records_every_kth_step_of_the_same_chain():
    options = {**SMALL, **MILD, "num_probes": 8, "collect": positions_and_losses}
    thinned = run(NOISY, thinning=3, **options)
    every = every_step()
    # Another loop may round otherwise, once in each of the 90 steps.
    def close(found, expected):
        bound = 90 * np.finfo(np.float32).eps * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound)

    for found, expected in zip(thinned.collected, every.collected, strict=True):
        close(found, expected[:, 2::3])
    losses = np.concatenate([every.burnin_losses, every.losses], axis=1)[:, 2::3]
    close(thinned.burnin_losses, losses[:, :6])
    close(thinned.losses, losses[:, 6:])
    assert thinned.settings["thinning"] == 3
    # Probed draws are recorded ones: the Metropolis ratio of the last of the three steps.
    assert np.all((thinned.acceptance > 0) & (thinned.acceptance <= 1))


def test_collect_sees_the_params_and_the_batch_of_each_draw():
    estimate = every_step()
    w, losses = estimate.collected
    assert w.shape == (8, 90, DIM)
    np.testing.assert_array_equal(w[:, 0], 0.0)  # chains start at the anchor
    np.testing.assert_allclose(losses.mean(axis=-1)[:, 6:], estimate.losses, rtol=1e-6)
    distance = np.linalg.norm(w.astype(np.float64), axis=-1)[:, 6:]
    np.testing.assert_allclose(estimate.distance, distance, rtol=1e-6)
    assert run(NOISY, **SMALL, **MILD).collected is None


def test_acceptance_is_the_metropolis_ratio_of_the_steps_taken():
    # log α = Σ (ε Λ²/8) (x² - x'²) on a Gaussian, for the steps from draws 0, 3, 6, ...
    large = {"step_size": 0.04, "localization": 1.0, "nbeta": 20.0}
    plan = {**SMALL, "batch_size": None, "num_probes": 8}
    data = quadratic_data(SPECTRUM)
    estimate = run(data, **plan, **large, collect=positions)
    x = estimate.collected.astype(np.float64)
    stiffness = 20.0 * SPECTRUM + 1.0
    ratio = np.sum(0.04 * stiffness**2 / 8 * (x[:, :-1] ** 2 - x[:, 1:] ** 2), axis=-1)
    probed = np.minimum(1, np.exp(ratio))[:, 6::3]
    assert probed.shape == (8, 8)
    np.testing.assert_allclose(estimate.acceptance, probed.mean(axis=1), rtol=1e-4)
    assert 0.2 < estimate.acceptance.mean() < 0.95


# --- masks ------------------------------------------------------------------------------------


def linear(params, batch):
    """Linear regression, ½ (x·w - y)², weights in two leaves; the Hessian is XᵀX/n."""
    prediction = batch["x"][:, :3] @ params["a"] + batch["x"][:, 3:] @ params["b"]
    return 0.5 * (prediction - batch["y"]) ** 2


INPUTS = np.random.default_rng(2).normal(size=(ROWS, DIM)).astype(np.float32)
WEIGHTS = {
    "a": np.array([0.5, -1.0, 0.0], np.float32),
    "b": np.array([2.0, 0, 0, 1.0, 0.25], np.float32),
}
LINEAR = {"x": INPUTS, "y": INPUTS @ np.concatenate([WEIGHTS["a"], WEIGHTS["b"]])}
HESSIAN = INPUTS.T.astype(np.float64) @ INPUTS / ROWS


@pytest.mark.parametrize(
    "mask",
    [
        None,
        {"a": 1, "b": 0},
        {"a": np.array([1, 0, 1]), "b": np.array([0, 1, 1, 0, 1.0])},
    ],
    ids=["no mask", "scalars", "arrays"],
)
def test_a_masked_run_is_exact_for_the_submatrix_of_the_hessian(mask):
    full = {"a": np.ones(3), "b": np.ones(5)}
    chosen = full if mask is None else jax.tree.map(lambda m, one: m * one, mask, full)
    keep = np.concatenate([chosen["a"], chosen["b"]]) != 0
    law = Law(np.linalg.eigvalsh(HESSIAN[keep][:, keep]), 1e-2, 1.0, 30.0)
    estimate = run(
        LINEAR, loss=linear, params=WEIGHTS, mask=mask, step_size=1e-2, localization=1.0,
        nbeta=30.0,
    )  # fmt: skip
    exact, stderr = law.mean(100, 600), math.sqrt(law.chain_variance(100, 600) / CHAINS)
    assert_within_4_stderr(estimate.mean, exact, stderr)
    # The distance is that of the sampled coordinates, Σ V (its law does not depend on the loss).
    end = estimate.distance[:, -1].astype(np.float64) ** 2
    assert_within_4_stderr(end.mean(), law.variance.sum(), end.std(ddof=1) / math.sqrt(CHAINS))


def test_a_scalar_mask_leaf_stands_for_a_whole_weight():
    options = {"loss": linear, "params": WEIGHTS, "step_size": 1e-2, "localization": 1.0}
    scalar, array = (
        run(LINEAR, mask=mask, nbeta=30.0, seed=4, **options)
        for mask in ({"a": True, "b": False}, {"a": np.ones(3), "b": np.zeros(5, int)})
    )
    np.testing.assert_array_equal(scalar.losses, array.losses)
    np.testing.assert_array_equal(scalar.distance, array.distance)


# --- what goes wrong is said, and stays where it is -------------------------------------------


def walled(params, batch):
    """`quadratic`, not a number beyond w[0] = wall."""
    lost = jnp.where(params["w"][0] > batch["wall"], jnp.nan, 1.0)
    return quadratic(params, batch) * lost


def run_with_wall(wall, **options):
    one_device = make_mesh(1, 8, jax.devices()[:1])  # so that all chains share one vmap
    data = {**NOISY, "wall": np.full(ROWS, wall, np.float32)}
    return run(
        data, loss=walled, collect=positions, mesh=one_device, **SMALL, **{**MILD, **options}
    )


def test_a_diverging_chain_is_named_and_leaves_its_neighbours_bitwise_alone():
    healthy = run_with_wall(np.inf)
    assert healthy.verdict.count("diverged") == 0
    reach = healthy.collected[:, :, 0].max(axis=1)
    victim, runner_up = np.argsort(reach)[[-1, -2]]
    wall = np.float32((reach[victim] + reach[runner_up]) / 2)
    first = int(np.argmax(healthy.collected[victim, :, 0] > wall))
    assert first > 0
    hurt = run_with_wall(wall)
    others = np.arange(8) != victim
    for field in ("losses", "anchor_losses", "burnin_losses", "distance", "per_chain", "collected"):
        np.testing.assert_array_equal(
            getattr(hurt, field)[others], getattr(healthy, field)[others], err_msg=field
        )
    np.testing.assert_array_equal(hurt.diverged_at, np.where(others, -1, first))
    assert hurt.num_finite == 7
    assert np.isnan(hurt.per_chain[victim])
    assert hurt.mean == healthy.per_chain[others].mean()
    assert math.isfinite(hurt.stderr)
    assert "1 of 8 chains diverged" in hurt.verdict
    assert f"chain {victim} at draw {first};" in hurt.warnings[0]
    assert "over the 7 finite chains" in hurt.warnings[0]
    assert "7 of 8" in hurt.summary()


def test_all_chains_dead_is_said_and_nothing_is_averaged():
    # Warnings are errors here, so this also says that numpy was not asked for empty means.
    dead = run_with_wall(-np.inf)
    assert math.isnan(dead.mean)
    assert math.isnan(dead.stderr)
    assert dead.num_finite == 0
    np.testing.assert_array_equal(dead.diverged_at, 0)
    assert dead.verdict == "loss not finite at the anchor"
    assert "16 of 16 examples, the first is row 0" in dead.warnings[0]
    for text in (repr(dead), dead.summary(), dead._repr_html_()):
        assert "loss not finite at the anchor" in text
    assert math.isnan(dead.to_xarray()["llc"])


def test_an_unstable_step_is_flagged():
    # step_size Λ = 6 > 4 in the stiffest direction: every chain grows without bound.
    estimate = run(quadratic_data(SPECTRUM), step_size=6 / 41, localization=1.0, nbeta=20.0)
    assert estimate.num_finite == 0
    assert math.isnan(estimate.mean)
    # Losses start at order 1 and grow by (1 - 6/2)² = 4 a step, up to 3e38 = 4^64.
    assert np.all((estimate.diverged_at > 50) & (estimate.diverged_at < 80))


def test_an_infinite_loss_at_the_anchor_is_no_estimate():
    # log |w| at w* = 0: draws have finite losses, the anchor they are compared with has not.
    estimate = run(NOISY, loss=punctured, **{**SMALL, "batch_size": None}, thinning=2, **MILD)
    assert estimate.num_finite == 0
    assert math.isnan(estimate.mean)


def punctured(params, batch):
    """`quadratic`, infinite at the origin."""
    at_origin = jnp.all(params["w"] == 0.0)
    return jnp.where(at_origin, jnp.inf, quadratic(params, batch))


def test_a_saddle_gives_its_negative_value_with_the_reason():
    law = Law(np.full(DIM, -0.5), 2e-2, 15.0, 20.0)
    estimate = run(
        quadratic_data(-0.5 * np.ones(DIM)), step_size=2e-2, localization=15.0, nbeta=20.0
    )
    exact, variance = law.mean(100, 600), law.chain_variance(100, 600)
    assert -9 < exact < -8  # -½ nbeta|h| / (localization - nbeta|h|) = -1 in each direction
    assert_within_4_stderr(estimate.mean, exact, math.sqrt(variance / CHAINS))
    assert estimate.below_anchor > 0.999
    assert estimate.verdict == "not a minimum"
    assert f"{estimate.mean:.3g} is negative" in estimate.warnings[0]
    assert "saddle" in estimate.warnings[0]


def test_a_point_still_descending_gives_its_negative_value_with_the_reason():
    # ½ h (w - z)² seen from w* = 0: the chain settles at nbeta h z / Λ, and on average below.
    h, z, step_size, localization, nbeta = 1.0, 0.5, 2e-2, 20.0, 30.0
    data = {"h": np.full((ROWS, DIM), h, np.float32), "z": np.full((ROWS, DIM), z, np.float32)}
    law = Law(np.full(DIM, h), step_size, localization, nbeta)
    centre = nbeta * h * z / law.stiffness[0]
    exact = DIM * nbeta * h / 2 * (law.variance[0] + (centre - z) ** 2 - z**2)
    estimate = run(data, step_size=step_size, localization=localization, nbeta=nbeta)
    stderr = estimate.per_chain.std(ddof=1) / math.sqrt(CHAINS)
    assert_within_4_stderr(estimate.mean, exact, stderr)
    assert estimate.mean < -10
    assert "not a minimum" in estimate.verdict


def test_an_estimate_without_an_error_bar_is_never_called_ok():
    estimate = run(NOISY, **SMALL, **{**MILD, "nbeta": 0.0})
    assert estimate.mean == 0.0  # exactly, and draws that never vary have no effective size
    assert math.isnan(estimate.stderr)
    assert "few effective draws" in estimate.verdict


# --- what must not matter ---------------------------------------------------------------------

CHECKPOINTS = {
    step: {"w": np.random.default_rng(step).normal(size=DIM).astype(np.float32)}
    for step in (0, 10, 1000, 7)
}


def run_over(checkpoints, **options):
    return dict(
        estimate_llc_over_checkpoints(
            jax.random.key(0), quadratic, checkpoints, NOISY, sampler=SGLD(1e-2), nbeta=20.0,
            localization=1.0, **{**SMALL, "num_probes": 0, **options},
        )
    )  # fmt: skip


def assert_same_runs(found, expected, chains=slice(None)):
    for step, estimate in found.items():
        for field in ("losses", "anchor_losses", "burnin_losses", "distance", "per_chain"):
            np.testing.assert_array_equal(
                getattr(estimate, field), getattr(expected[step], field)[chains], err_msg=field
            )
        assert estimate.init_loss == expected[step].init_loss


@functools.cache
def reference_runs():
    return run_over(CHECKPOINTS)


@pytest.mark.parametrize("checkpoint_batch", [3])
def test_results_do_not_depend_on_the_number_of_checkpoints_in_flight(checkpoint_batch):
    runs = run_over(CHECKPOINTS, checkpoint_batch=checkpoint_batch)
    assert list(runs) == list(CHECKPOINTS)
    assert_same_runs(runs, reference_runs())


def test_results_do_not_depend_on_the_number_of_chains_in_flight():
    one_device = make_mesh(1, 8, jax.devices()[:1])
    runs = run_over(CHECKPOINTS, chain_batch=3, mesh=one_device)
    assert_same_runs(runs, reference_runs())


def test_chains_do_not_depend_on_how_many_were_asked_for():
    runs = run_over(CHECKPOINTS, num_chains=3)
    assert all(len(e.per_chain) == 3 for e in runs.values())
    assert_same_runs(runs, reference_runs(), slice(3))


def test_a_checkpoint_does_not_depend_on_the_others():
    backwards = list(reversed(CHECKPOINTS.items()))
    runs = run_over(iter(backwards))
    assert list(runs) == [step for step, _ in backwards]
    assert_same_runs(runs, reference_runs())
    assert_same_runs(run_over([(1000, CHECKPOINTS[1000])]), reference_runs())


def test_one_checkpoint_is_the_case_of_many():
    single = estimate_llc(
        jax.random.key(0), quadratic, CHECKPOINTS[10], NOISY, sampler=SGLD(1e-2), nbeta=20.0,
        localization=1.0, step=10, num_probes=0, **SMALL,
    )  # fmt: skip
    assert_same_runs({10: single}, reference_runs())
    assert single.mean == reference_runs()[10].mean


def test_chains_and_checkpoints_have_random_numbers_of_their_own():
    same = run_over([(step, ORIGIN) for step in (0, 1, 2)])
    noise = np.stack([e.distance[:, -1] for e in same.values()])
    assert len(np.unique(noise)) == noise.size
    batches = np.stack([e.anchor_losses[:, 0] for e in same.values()])
    assert len(np.unique(batches)) > 0.9 * batches.size
    # A checkpoint's own step decides, not its place in the list.
    alone = run_over([(2, ORIGIN)])
    assert_same_runs(alone, same)
    other_seed = run(NOISY, seed=1, **SMALL, **MILD, step=2)
    assert not np.any(other_seed.distance == same[2].distance)


def test_checkpoints_are_read_lazily():
    read = []

    def checkpoints():
        for step, params in CHECKPOINTS.items():
            read.append(step)
            yield step, params

    estimates = estimate_llc_over_checkpoints(
        jax.random.key(0), quadratic, checkpoints(), NOISY, sampler=SGLD(1e-2), nbeta=20.0,
        localization=1.0, num_probes=0, **SMALL,
    )  # fmt: skip
    assert read == [0]  # checked at the call, sampled when asked for
    assert next(estimates)[0] == 0
    assert len(read) < len(CHECKPOINTS)


def test_a_bad_checkpoint_does_not_cost_the_results_before_it():
    bad = {"w": np.full(DIM, np.nan, np.float32)}
    estimates = estimate_llc_over_checkpoints(
        jax.random.key(0), quadratic, [*CHECKPOINTS.items(), (2000, bad)], NOISY,
        sampler=SGLD(1e-2), nbeta=20.0, localization=1.0, **SMALL, num_probes=0,
    )  # fmt: skip
    delivered = []
    with pytest.raises(ValueError, match="step 2000"):
        delivered.extend(step for step, _ in estimates)
    assert delivered == list(CHECKPOINTS)


# --- how it is shown --------------------------------------------------------------------------


def test_summary_says_everything_once():
    estimate = reference_runs()[10]
    text = estimate.summary()
    rows = dict(line.split(None, 1) for line in text.splitlines() if not line.startswith("!"))
    assert rows["sampler"] == "SGLD"
    assert rows["llc"] == f"{estimate.mean:.4g} ± {estimate.stderr:.2g}"
    for name in ("step_size", "nbeta", "localization"):
        assert float(rows[name]) == pytest.approx(estimate.settings[name])
    for name in ("num_chains", "num_draws", "num_burnin", "thinning", "batch_size", "grad_accum"):
        assert int(rows[name]) == {**SMALL, "thinning": 1, "grad_accum": 1}[name]
    assert estimate.verdict in text
    assert [line[2:] for line in text.splitlines() if line.startswith("!")] == estimate.warnings
    assert f"{estimate.mean:.4g}" in repr(estimate)
    assert estimate.verdict in repr(estimate)
    assert "\n" not in repr(estimate)


def test_html_is_escaped():
    estimate = dataclasses.replace(
        reference_runs()[10], settings={"sampler": "<script>alert(1)</script>"}
    )
    html = estimate._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_to_xarray_names_the_dimensions():
    estimate = reference_runs()[10]
    dataset = estimate.to_xarray()
    assert dict(dataset.sizes) == {"chain": 8, "draw": 24, "burnin": 6}
    for name in ("losses", "anchor_losses", "distance"):
        assert dataset[name].dims == ("chain", "draw")
        np.testing.assert_array_equal(dataset[name], getattr(estimate, name))
    assert dataset["burnin_losses"].dims == ("chain", "burnin")
    np.testing.assert_array_equal(dataset["per_chain"], estimate.per_chain)
    assert float(dataset["llc"]) == estimate.mean
    assert dataset.attrs["step_size"] == pytest.approx(1e-2)
    assert np.isnan(dataset["acceptance"]).all()  # num_probes=0


def test_arrays_of_an_estimate_are_numpy():
    estimate = reference_runs()[10]
    assert isinstance(estimate, LLCEstimate)
    for field in dataclasses.fields(LLCEstimate):
        assert not isinstance(getattr(estimate, field.name), jax.Array), field.name
