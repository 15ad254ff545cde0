"""Every sampler against its exact law, through the public API, and two of its steps by hand.

The laws are those of `laws.py`, each at the step size, localization and temperature of the run.
SGLD's own tests are in test_sgld.py and test_llc.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from laws import assert_chains_agree, assert_within_4_stderr
from scipy import integrate, optimize, stats

from llc_jax import BAOAB, MALA, SGLD, SGNHT, AdamSGLD, RMSPropSGLD, estimate_llc_over_settings
from llc_jax.sampling.posterior import LocalPosterior, evaluate
from llc_jax.trees import standard_normal_like

# --- two steps by hand --------------------------------------------------------------------------

NBETA, LOCALIZATION = 11.0, 3.0
CURVATURE = {"a": np.array([0.25, 1.0, 2.0]), "b": np.array(0.5)}
START = {"a": np.array([0.5, -1.0, 0.25], np.float32), "b": np.float32(1.5)}
CENTRE = {"a": np.array([0.0, 0.5, -0.25], np.float32), "b": np.float32(1.0)}


def two_leaves(params, batch):
    """½ Σ h w² over both leaves."""
    terms = jax.tree.map(lambda h, w: jnp.sum(jnp.float32(h) * w**2), CURVATURE, params)
    return batch * 0.5 * (terms["a"] + terms["b"])


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def two_steps(sampler):
    """States after 0, 1 and 2 steps, and the noise ξ of each step, flat and float64."""

    def at(params):
        scalars = jnp.float32(NBETA), jnp.float32(LOCALIZATION)
        return evaluate(two_leaves, LocalPosterior(CENTRE, *scalars), params, jnp.ones(2))

    states, noises = [sampler.init(START)], []
    for seed in range(2):
        key = jax.random.key(seed)
        noises.append(flat(standard_normal_like(key, START)))
        states.append(sampler.step(key, states[-1], at, None)[0])
    return states, noises


def gradient(w):
    return flat(CURVATURE) * w


def pull(w):
    return LOCALIZATION * (w - flat(CENTRE))


def close(found, expected):
    np.testing.assert_allclose(flat(found), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("corrected", [False, True])
def test_rmsprop_by_hand(corrected):
    step, decay, epsilon = 0.02, 0.75, 0.125
    make = RMSPropSGLD.corrected if corrected else RMSPropSGLD.devinterp
    sampler = make(step, decay, epsilon)
    states, noises = two_steps(sampler)
    w, square = flat(START), np.full(4, float(corrected))
    for t, xi in enumerate(noises, start=1):
        g = gradient(w)
        square = decay * square + (1 - decay) * g**2
        scale = 1 / (np.sqrt(square / (1 - decay**t if corrected else 1)) + epsilon)
        w = w - step / 2 * scale * (NBETA * g + pull(w)) + np.sqrt(step * scale) * xi
        close(states[t].params, w)
        close(states[t].square, square)
        close(sampler.preconditioner(states[t]), scale)
    assert RMSPropSGLD.devinterp(1e-3) == (1e-3, 0.99, 0.1, 0.0, 0.0)
    assert RMSPropSGLD.corrected(1e-3) == (1e-3, 0.99, 1e-8, 1.0, 1.0)


def test_adam_by_hand():
    step, momentum, decay, epsilon = 0.02, 0.5, 0.75, 0.125
    sampler = AdamSGLD(step, momentum, decay, epsilon)
    states, noises = two_steps(sampler)
    w, mean, square = flat(START), np.zeros(4), np.ones(4)
    for t, xi in enumerate(noises, start=1):
        g = gradient(w)
        mean = momentum * mean + (1 - momentum) * g
        square = decay * square + (1 - decay) * g**2
        scale = 1 / (np.sqrt(square / (1 - decay**t)) + epsilon)
        drift = NBETA * mean / (1 - momentum**t) + pull(w)
        w = w - step / 2 * scale * drift + np.sqrt(step * scale) * xi
        close(states[t].params, w)
        close(states[t].mean, mean)
        close(states[t].square, square)
        close(sampler.preconditioner(states[t]), scale / (1 - momentum))
    assert AdamSGLD(1e-3) == (1e-3, 0.9, 0.999, 1e-8)


def test_baoab_by_hand():
    step, friction = 0.04, 1.5
    states, noises = two_steps(BAOAB(step, friction))
    h, w, p = math.sqrt(step), flat(START), np.zeros(4)
    c = math.exp(-friction * h)
    for t, xi in enumerate(noises, start=1):
        p = p - h * (NBETA * gradient(w) + pull(w))
        w = w + h / 2 * p
        p = c * p + math.sqrt(1 - c**2) * xi
        w = w + h / 2 * p
        close(states[t].params, w)
        close(states[t].momentum, p)


def test_sgnht_by_hand():
    step, friction = 0.04, 1.5
    states, noises = two_steps(SGNHT(step, friction))
    h, w, p, zeta = math.sqrt(step), flat(START), np.zeros(4), friction
    for t, xi in enumerate(noises, start=1):
        p = p - h * (NBETA * gradient(w) + pull(w))
        w = w + h / 2 * p
        zeta = zeta + h / 2 * (np.mean(p**2) - 1)
        c = math.exp(-zeta * h)
        p = c * p + math.sqrt(friction * (1 - c**2) / zeta) * xi
        zeta = zeta + h / 2 * (np.mean(p**2) - 1)
        w = w + h / 2 * p
        close(states[t].params, w)
        close(states[t].momentum, p)
        assert float(states[t].thermostat) == pytest.approx(zeta, rel=1e-5)
    assert abs(zeta - friction) > 0.1


@pytest.mark.parametrize("zeta", [0.0, 1e-5, -2.0, 3.0])
def test_the_noise_of_sgnht_is_right_at_any_friction(zeta):
    # (1 - exp(-2 ζ h)) / (2 ζ), which tends to h. Flat posterior: the momentum is stirred only.
    step, friction, size = 0.04, 1.5, 40_000
    h = math.sqrt(step)
    w = jnp.zeros(size)
    p = jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], size), jnp.float32)  # p² = 1
    sampler = SGNHT(step, friction)
    state = sampler.init(w)._replace(momentum=p, thermostat=jnp.float32(zeta))
    flat_posterior = LocalPosterior(w, jnp.float32(1), jnp.float32(0))
    at = lambda v: evaluate(  # noqa: E731
        lambda q, b: 0.0 * b * jnp.sum(q), flat_posterior, v, jnp.ones(1)
    )
    new, _ = sampler.step(jax.random.key(0), state, at)
    c = math.exp(-zeta * h)
    spread = 2 * friction * ((1 - c**2) / (2 * zeta) if zeta else h)
    rest = np.asarray(new.momentum, np.float64) - c * np.asarray(p, np.float64)
    assert_within_4_stderr(np.mean(rest**2) / spread, 1.0, math.sqrt(2 / size))


# --- exact laws on quadratics ---------------------------------------------------------------------

DIM, ROWS, BATCH, CHAINS = 8, 16, 4, 512
SPECTRUM = np.linspace(0.25, 2.0, DIM)
SPECTRA = {
    "positive": SPECTRUM,
    "flat directions": np.array([0.5, 1.0, 1.5, 2.0, 0.0, 0.0, 0.0, 0.0]),
    "saddle": np.array([0.5, 1.0, 1.5, 2.0, 0.25, 0.75, -0.5, -0.25]),
}
SPREAD = 0.5  # of the targets, in the runs with minibatch noise
TEMPERED, PULLED = 20.0, 15.0  # nbeta and localization; the saddle needs localization > nbeta/2


def quadratic(params, batch):
    """½ Σ h (w - z)²: curvatures and targets are data, so that no spectrum compiles anew."""
    return 0.5 * jnp.sum(batch["h"] * (params["w"][None] - batch["z"]) ** 2, axis=-1)


def quadratic_data(h, spread=0.0, rows=ROWS):
    """Examples of curvature h whose targets have mean 0 and standard deviation `spread`."""
    h = np.broadcast_to(np.asarray(h, np.float32), (rows, np.size(h)))
    z = np.random.default_rng(7).normal(size=h.shape)
    z = spread * (z - z.mean(axis=0)) / z.std(axis=0)
    return {"h": h, "z": z.astype(np.float32)}


def grid(sampler, h, spread=0.0, *, nbeta=TEMPERED, localization=PULLED, seed=0, **options):
    """Estimates at all settings of `sampler`, in one program that all spectra share.

    Without spread the minibatches are all alike: no noise.
    """
    plan = {
        "num_chains": CHAINS, "num_burnin": 400, "num_draws": 600, "num_probes": 0,
        "batch_size": BATCH,
    }  # fmt: skip
    return estimate_llc_over_settings(
        jax.random.key(seed), quadratic, {"w": np.zeros(np.size(h), np.float32)},
        quadratic_data(h, spread), sampler=sampler, nbeta=nbeta, localization=localization,
        **{**plan, **options},
    )  # fmt: skip


def heat(h, spread, nbeta=TEMPERED):
    """Variance that minibatches add to nbeta times the gradient h (w - mean z_B)."""
    return nbeta**2 * (np.asarray(h) * spread) ** 2 / BATCH


def llc(h, mean_squares, nbeta=TEMPERED):
    return nbeta / 2 * np.sum(np.asarray(h) * mean_squares)


def law_of(sampler, h, noise, nbeta=TEMPERED, localization=PULLED):
    """Mean of the estimate over 600 draws after a burn-in of 400, one lane of settings."""
    stiffness = nbeta * h + localization
    match sampler:
        case SGLD():
            chain = laws.sgld(sampler.step_size, stiffness, noise)
        case RMSPropSGLD():
            scale = 1 / (math.sqrt(sampler.initial_square) + sampler.epsilon)
            chain = laws.sgld(sampler.step_size, stiffness, noise, scale)
        case AdamSGLD():
            scale = 1 / sampler.epsilon
            chain = laws.adam(
                sampler.step_size, h, nbeta, localization, sampler.momentum, noise, scale
            )
        case BAOAB():
            chain = laws.baoab(*sampler, stiffness, noise)
    return chain.mean_square(400, 600)


def lanes(sampler):
    """The settings of a sampler with array hyperparameters, one by one."""
    columns = np.broadcast_arrays(*sampler)
    return [type(sampler)(*map(float, row)) for row in zip(*columns, strict=True)]


# Λ is 5 in the softest and 55 in the stiffest direction of the three spectra.
FIXED = {
    "SGLD": SGLD(np.array([0.01, 0.02, 0.04, 0.05])),
    # decay 1: V stays where it starts, G = 1 / (sqrt(4) + 0.5) = 0.4.
    "RMSPropSGLD": RMSPropSGLD(np.array([0.02, 0.05, 0.1, 0.15]), 1.0, 0.5, 4.0, 0.0),
    # epsilon far above sqrt(V): G = 1e-5.
    "AdamSGLD": AdamSGLD(
        np.array([1e3, 2e3, 1e3, 4e3]), np.array([0.5, 0.9, 0.95, 0.8]), 0.999, 1e5
    ),
    # The last two steps are at 0.69 and 0.96 of the stability limit.
    "BAOAB": BAOAB(np.array([0.005, 0.005, 0.05, 0.07]), np.array([1.0, 20.0, 3.0, 5.0])),
}


@pytest.mark.parametrize("spread", [0.0, SPREAD], ids=["full gradient", "minibatches"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", FIXED)
def test_the_linear_samplers_are_exact_at_finite_step_size(name, spectrum, spread):
    h = SPECTRA[spectrum]
    estimates = grid(FIXED[name], h, spread)
    for sampler, estimate in zip(lanes(FIXED[name]), estimates, strict=True):
        squares = [law_of(sampler, x, s) for x, s in zip(h, heat(h, spread), strict=True)]
        size = llc(np.abs(h), squares)  # the terms of a saddle cancel
        assert_chains_agree(estimate.per_chain, llc(h, squares), size=size)
        assert estimate.num_finite == CHAINS


def test_baoab_has_no_step_bias_and_a_known_heat():
    # The law above in closed form: V = [1 + (εs/4) coth(friction h/2) / (1 - εΛ/4)] / Λ.
    for step_size, friction in [(0.005, 1.0), (0.07, 5.0), (0.05, 0.1), (1e-4, 30.0)]:
        for stiffness in (5.0, 55.0):
            cold = laws.baoab(step_size, friction, stiffness).variance()
            assert cold * stiffness == pytest.approx(1.0, rel=1e-9)
            warm = laws.baoab(step_size, friction, stiffness, 3.0).variance()
            gain = step_size * 3.0 / 4 / math.tanh(friction * math.sqrt(step_size) / 2)
            expected = (1 + gain / (1 - step_size * stiffness / 4)) / stiffness
            assert warm == pytest.approx(expected, rel=1e-9)
    # Only the samplers without step bias come near the ideal value at such steps.
    ideal = llc(SPECTRUM, 1 / (TEMPERED * SPECTRUM + PULLED))
    for name, bias in [("SGLD", 0.3), ("RMSPropSGLD", 0.3), ("AdamSGLD", 0.1)]:
        worst = [law_of(lanes(FIXED[name])[-1], x, 0.0) for x in SPECTRUM]
        assert llc(SPECTRUM, worst) > (1 + bias) * ideal


def test_adam_pays_for_the_delay_as_its_docstring_says():
    # Factor 1 + εGΛ / (2 (1 - momentum)) without localization, whose pull is not delayed.
    for momentum in (0.5, 0.9, 0.99):
        for number in (0.01, 0.1, 1.0, 4.0):  # εGΛ / (1 - momentum)
            step = number * (1 - momentum)
            exact = laws.adam(step, 1.0, 1.0, 0.0, momentum).variance()
            assert exact == pytest.approx(1 + number / 2, rel=0.1)
            if momentum == 0.99:
                assert exact == pytest.approx(1 + number / 2, rel=0.004)
        limit = 4 * (1 + momentum) / (1 - momentum)  # of εGΛ
        for step, inside in [(0.999 * limit, True), (1.001 * limit, False)]:
            chain = laws.adam(step, 1.0, 1.0, 0.0, momentum)
            assert (np.max(np.abs(np.linalg.eigvals(chain.transition))) < 1) == inside


# --- adaptive preconditioners ---------------------------------------------------------------------

STIFF = 30.0  # nbeta; localization 1


def rmsprop_no_memory(step_size, epsilon, h, nbeta=STIFF, localization=1.0):
    """E x² at decay 0, where G(x) = 1 / (h|x| + epsilon): the chain on a fine grid."""
    stiffness = nbeta * h + localization
    edges = np.linspace(-9, 9, 1802) / math.sqrt(stiffness)
    x = (edges[1:] + edges[:-1]) / 2
    step = step_size / (h * np.abs(x) + epsilon)
    centre = x * (1 - step / 2 * stiffness)
    moves = np.diff(stats.norm.cdf((edges[None] - centre[:, None]) / np.sqrt(step)[:, None]))
    moves /= moves.sum(axis=1, keepdims=True)
    law = np.linalg.matrix_power(moves, 2**14)[len(x) // 3]
    return float(law @ x**2)


def rmsprop_tracking(epsilon, h, nbeta=STIFF, localization=1.0):
    """E x² as step_size -> 0 at a fixed decay: V is h² x², and the density exp(-Λx²/2) / G(x)."""
    stiffness = nbeta * h + localization

    def moment(power):
        weight = lambda x: x**power * (h * x + epsilon) * math.exp(-stiffness * x**2 / 2)  # noqa: E731
        return integrate.quad(weight, 0, 12 / math.sqrt(stiffness))[0]

    return moment(2) / moment(0)


LONG = {"num_chains": 64, "num_burnin": 1500, "num_draws": 1000, "thinning": 20}
ALIKE = np.ones(DIM)


@pytest.mark.parametrize("spread", [0.0, SPREAD], ids=["full gradient", "minibatches"])
@pytest.mark.slow
def test_rmsprop_is_exact_in_the_two_limits_of_its_memory_and_wrong_between(spread):
    # εGΛ is 0.1: the chain forgets in some 20 steps, V in 0, 100 and 10 000.
    noise, stiffness = heat(1.0, spread, STIFF), STIFF + 1
    step = 0.1 * (math.sqrt((1 + noise / STIFF) / stiffness) + 0.1) / stiffness
    estimates = grid(
        RMSPropSGLD.devinterp(step, np.array([0.0, 0.99, 0.9999])), ALIKE, spread,
        nbeta=STIFF, localization=1.0, **LONG,
    )  # fmt: skip
    none, usual, long = estimates
    slow = llc(ALIKE, laws.rmsprop_slow_memory(step, 0.1, 1.0, STIFF, 1.0, noise), STIFF)
    assert_chains_agree(long.per_chain, slow)
    if not spread:
        assert_chains_agree(none.per_chain, llc(ALIKE, rmsprop_no_memory(step, 0.1, 1.0), STIFF))
    # What the term ∂G/∂w that is left out does at the usual decay.
    excess, stderr = usual.mean / slow - 1, usual.stderr / slow
    assert excess > 5 * stderr
    assert (0.01 if spread else 0.04) < excess < 0.08


@pytest.mark.slow
def test_smaller_steps_do_not_make_rmsprop_right():
    # The law tends to exp(-U)/G as step_size -> 0: twice the value for a small epsilon.
    ideal = 1 / (STIFF + 1)
    assert rmsprop_tracking(1e-9, 1.0) == pytest.approx(2 * ideal, rel=1e-6)
    assert rmsprop_tracking(1e6, 1.0) == pytest.approx(ideal, rel=1e-6)
    assert rmsprop_tracking(0.1, 1.0) == pytest.approx(1.589 * ideal, rel=1e-3)
    assert rmsprop_no_memory(1e-4, 0.1, 1.0) == pytest.approx(1.589 * ideal, rel=0.01)
    small = 0.01 * (math.sqrt(ideal) + 0.1) * ideal  # εGΛ = 0.01
    both = RMSPropSGLD(small, 0.99, np.array([0.1, 1e-8]), 1.0, 1.0)
    estimates = grid(both, ALIKE, nbeta=STIFF, localization=1.0, **LONG)
    excess = [e.mean / llc(ALIKE, ideal, STIFF) - 1 for e in estimates]
    assert 0.25 < excess[0] < 0.59
    assert 0.35 < excess[1] < 1.0


# --- the thermostat -------------------------------------------------------------------------------

MANY = np.ones(400)
HOT = {"nbeta": 100.0, "localization": 1.0}


def thermostat_law(step_size, friction, stiffness, noise):
    """E x² in infinitely many equal coordinates, where ζ does not fluctuate.

    ζ settles where p² averages 1 over the two ends of the O step, which is that of `BAOAB` with
    friction ζ at temperature friction/ζ.
    """
    h = math.sqrt(step_size)

    def chain(zeta):
        return laws.baoab(step_size, zeta, stiffness, noise, friction / zeta)

    def excess(zeta):
        one = chain(zeta)
        covariance = laws.solve_discrete_lyapunov(one.transition, one.noise)
        kick = np.array([-h * stiffness, 1.0])
        kicked = kick @ covariance @ kick + step_size * noise
        return (kicked + covariance[1, 1]) / 2 - 1

    zeta = optimize.brentq(excess, friction / 2, 50 * friction)
    return chain(zeta).variance(), zeta


CROWDS = {
    # spread of the minibatches: (step sizes, frictions)
    0.0: (np.array([1e-4, 1e-3, 1e-2]), np.array([10.0, 5.0, 10.0])),
    0.3: (np.array([1e-4, 3e-4, 1e-3]), np.array([10.0, 20.0, 5.0])),
}


@functools.cache
def crowd(sampler, spread):
    """400 equal coordinates, as few chains as it takes."""
    settings = sampler(*CROWDS[spread])
    estimates = grid(
        settings, MANY, spread, **HOT, num_chains=16, num_burnin=1000, num_draws=1000, thinning=3
    )
    return list(zip(lanes(settings), estimates, strict=True))


@pytest.mark.parametrize("spread", CROWDS, ids=["full gradient", "minibatches"])
def test_a_thermostat_that_works(spread):
    # Peers' example: 198.02 is right, a thermostat that does nothing gives 4.57.
    noise, stiffness = heat(1.0, spread, 100.0), 101.0
    ideal = llc(MANY, 1 / stiffness, 100.0)
    assert ideal == pytest.approx(198.02, abs=0.01)
    for sampler, estimate in crowd(SGNHT, spread):
        variance, _ = thermostat_law(*sampler, stiffness, noise)
        exact = llc(MANY, variance, 100.0)
        assert_chains_agree(estimate.per_chain, exact, most=0.005)
        assert exact == pytest.approx(ideal, rel=0.01 if spread else 1e-9)


@pytest.mark.slow
def test_the_thermostat_absorbs_what_heats_the_others():
    spread, stiffness = 0.3, 101.0
    noise, ideal = heat(1.0, spread, 100.0), llc(MANY, 1 / stiffness, 100.0)
    pairs = zip(crowd(SGNHT, spread), crowd(BAOAB, spread), strict=True)
    for (sampler, cooled), (_, heated) in pairs:
        hot = llc(MANY, laws.baoab(*sampler, stiffness, noise).variance(), 100.0)
        assert_chains_agree(heated.per_chain, hot, most=0.005)
        assert heated.mean - cooled.mean > 20 * math.hypot(heated.stderr, cooled.stderr)
        assert hot > 1.05 * ideal


def test_the_mean_of_the_squared_momenta_is_one():
    sampler, chains = SGNHT(1e-3, 5.0), 8

    def at(w):
        here = LocalPosterior(jnp.zeros(400), jnp.float32(100.0), jnp.float32(1.0))
        return evaluate(lambda q, b: b * 0.5 * jnp.sum(q**2), here, w, jnp.ones(1))

    def chain(key):
        def step(state, t):
            state, _ = sampler.step(jax.random.fold_in(key, t), state, at)
            return state, (jnp.mean(state.momentum**2), state.thermostat)

        return jax.lax.scan(step, sampler.init(jnp.zeros(400)), jnp.arange(6000))[1]

    heat_of, zeta = jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(0), chains))
    assert_chains_agree(np.asarray(heat_of, np.float64)[:, 1000:].mean(axis=1), 1.0, most=0.001)
    assert_chains_agree(np.asarray(zeta, np.float64)[:, 1000:].mean(axis=1), 5.0)
    assert np.asarray(zeta)[:, 1000:].std() > 0.01


# --- Metropolis -----------------------------------------------------------------------------------


def acceptance_of_mala(step_size, stiffness, dim):
    """E min(1, exp(εΛ²/8 (|x|² - |x'|²))) for `dim` equal directions, by quadrature.

    |x|² Λ is chi-squared, |x'|²/ε given x is noncentral chi-squared.
    """
    rho = 1 - step_size * stiffness / 2
    nodes = stats.chi2.ppf((np.arange(800) + 0.5) / 800, dim) / stiffness
    levels = (np.arange(800) + 0.5) / 800
    total = 0.0
    for square in nodes:
        proposed = step_size * stats.ncx2.ppf(levels, dim, rho**2 * square / step_size)
        ratio = step_size * stiffness**2 / 8 * (square - proposed)
        total += np.mean(np.exp(np.minimum(ratio, 0)))
    return total / len(nodes)


@pytest.mark.slow
def test_mala_has_no_step_bias_and_the_acceptance_of_the_closed_form():
    step = np.array([0.01, 0.03, 0.06])
    options = {"batch_size": None, "num_probes": 600}
    for h in (np.full(DIM, 1.0), SPECTRUM):
        ideal = llc(h, 1 / (TEMPERED * h + PULLED))
        for sampler, estimate in zip(
            lanes(MALA(step)), grid(MALA(step), h, **options), strict=True
        ):
            assert_chains_agree(estimate.per_chain, ideal)
            biased = llc(h, [law_of(SGLD(sampler.step_size), x, 0.0) for x in h])
            if sampler.step_size >= 0.03:
                assert biased - ideal > 20 * estimate.stderr
            if h.std() == 0:
                expected = acceptance_of_mala(sampler.step_size, TEMPERED + PULLED, DIM)
                assert_chains_agree(estimate.acceptance, expected)
                assert 0.2 < expected < 0.99
