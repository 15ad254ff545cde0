"""Deep linear networks: formulas against independent ones, networks against their ranks."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import llc_jax
from llc_jax.problems.deep_linear import model as deep_linear
from llc_jax.problems.deep_linear.model import (
    PopulationLoss,
    aligned,
    aoyagi_coefficient,
    finite_llc,
    local_coefficient_two_layers,
    rank_one_llc,
)

EPS32 = float(np.finfo(np.float32).eps)
GENERATORS = {
    "aligned": lambda key, widths: aligned(key, widths, max(1, min(widths) // 2)),
    "svd_truncated": deep_linear.svd_truncated,
    "zeroed": deep_linear.zeroed,
}


# --- the formula ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "rank", "value", "multiplicity"),
    [
        ((1, 1, 1), 0, 1 / 2, 2),
        ((1, 1, 1), 1, 1 / 2, 1),
        ((1, 1, 1, 1), 0, 1 / 2, 3),
        ((1,) * 7, 0, 1 / 2, 6),
        ((2, 2, 2), 0, 3 / 2, 1),
        ((2, 2, 2), 1, 2, 2),
        ((2, 2, 2), 2, 2, 1),
        ((5, 3, 5), 0, 13 / 2, 2),
        ((5, 3, 5), 3, 21 / 2, 1),
        ((3, 8, 4), 0, 6, 1),
        ((10,) * 4, 0, 67 / 2, 3),
        ((10,) * 4, 5, 46, 3),
        ((4, 6), 2, 12, 1),  # one layer is linear regression: d/2
    ],
)
def test_known_values(widths, rank, value, multiplicity):
    assert aoyagi_coefficient(widths, rank) == (value, multiplicity)


def reduced_rank_regression(m, h, n, r):
    """Aoyagi & Watanabe 2005, by cases."""
    if m + h < n + r:
        return (h * m - h * r + n * r) / 2, 1
    if n + h < m + r:
        return (h * n - h * r + m * r) / 2, 1
    if m + n < h + r:
        return m * n / 2, 1
    even = -((h + r) ** 2) - m**2 - n**2 + 2 * (h + r) * (m + n) + 2 * m * n
    odd = (m + h + n + r) % 2
    return (even + odd) / 8, 1 + odd


def test_two_layers_are_reduced_rank_regression():
    for m, h, n in itertools.product(range(1, 8), repeat=3):
        for r in range(min(m, h, n) + 1):
            assert aoyagi_coefficient((m, h, n), r) == reduced_rank_regression(m, h, n, r)


def by_search(widths, rank):
    """All subsets that satisfy Aoyagi's three conditions; the values they give."""
    deltas = [width - rank for width in widths]
    found = set()
    for size in range(2, len(deltas) + 1):
        for subset in itertools.combinations(range(len(deltas)), size):
            inside = [deltas[i] for i in subset]
            outside = [deltas[i] for i in range(len(deltas)) if i not in subset]
            ell, total = size - 1, sum(inside)
            if total < ell * max(inside):
                continue
            if outside and (max(inside) >= min(outside) or total >= ell * min(outside)):
                continue
            a = total - (math.ceil(total / ell) - 1) * ell
            value = (rank * (widths[0] + widths[-1]) - rank**2) / 2
            value += a * (ell - a) / (4 * ell) - (ell - 1) / (4 * ell) * total**2
            value += sum(x * y for x, y in itertools.combinations(inside, 2)) / 2
            found.add((round(value, 9), a * (ell - a) + 1))
    return found


def random_nets(count, seed=0, layers=(1, 7), width=(1, 12)):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        widths = tuple(int(h) for h in rng.integers(*width, rng.integers(*layers) + 1))
        yield widths, int(rng.integers(0, min(widths) + 1))


def test_sorting_finds_what_a_search_over_subsets_finds():
    for widths, rank in random_nets(1000):
        value, multiplicity = aoyagi_coefficient(widths, rank)
        assert by_search(widths, rank) == {(round(value, 9), multiplicity)}


def test_it_is_at_most_half_the_dimension_and_blind_to_the_order_of_hidden_layers():
    for widths, rank in random_nets(300, seed=1):
        value = aoyagi_coefficient(widths, rank)
        dimension = sum(h * w for h, w in itertools.pairwise(widths))
        assert 0 <= value[0] <= dimension / 2
        shuffled = (widths[0], *sorted(widths[1:-1]), widths[-1])
        assert aoyagi_coefficient(shuffled, rank) == value
        assert aoyagi_coefficient(widths[::-1], rank) == value


def test_local_value_is_at_least_the_global_one_which_it_attains():
    above = 0
    for m, h, n in itertools.product(range(1, 6), repeat=3):
        for a, b in itertools.product(range(min(m, h) + 1), range(min(h, n) + 1)):
            for r in range(max(0, a + b - h), min(a, b) + 1):
                local = local_coefficient_two_layers((m, h, n), (a, b), r)
                lowest = aoyagi_coefficient((m, h, n), r)[0]
                assert local >= lowest
                # Transposing the network changes nothing, but swaps the roles of the terms.
                assert local == local_coefficient_two_layers((n, h, m), (b, a), r)
                above += local > lowest
                if a == b == r or r == min(m, h, n):
                    assert local == lowest
    assert above  # the bound is strict somewhere, or the two names were one


def test_local_value_of_a_saddle_by_hand():
    # w_2 w_1 at (0, 1) is a regular point of w_2 = 0, unlike the crossing at the origin.
    assert local_coefficient_two_layers((1, 1, 1), (1, 0), 0) == 1 / 2
    # W_1 = I_2, W_2 = 0: K = |W_2|² to leading order, N M / 2 parameters; the origin has 3/2.
    assert local_coefficient_two_layers((2, 2, 2), (2, 0), 0) == 2
    # W_1 = e_1 e_1ᵀ, W_2 = e_1 e_2ᵀ: of the four outputs the first column and the first row move
    # at first order, which are three; the fourth adds nothing.
    assert local_coefficient_two_layers((2, 2, 2), (1, 1), 0) == 3 / 2


# --- finite nbeta -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbeta", "value"),
    [(10, 0.2626), (30, 0.3044), (100, 0.3388), (1e3, 0.3813), (1e4, 0.4067), (1e6, 0.4347)],
)
def test_one_by_one_by_one_is_the_normal_crossing(nbeta, value):
    # K = (w_1 w_2)² / 2, values of an independent quadrature.
    assert rank_one_llc((1, 1, 1), nbeta, 1.0, 0.5) == pytest.approx(value, abs=6e-5)


def test_one_layer_is_a_quadratic():
    # K = c |w|² in 5 dimensions.
    assert rank_one_llc((1, 5), 3.0, 7.0, 0.5) == pytest.approx(5 / 2 * 3 / (3 + 7), rel=1e-9)


def test_rank_one_by_quadrature_in_two_dimensions():
    nbeta, localization, (h, n) = 40.0, 2.0, (3, 4)

    def moment(power):
        def integrand(log_x, log_y):
            x, y = math.exp(log_x), math.exp(log_y)  # χ² densities, with the Jacobian
            t = nbeta * x * y / localization**2
            return x ** (h / 2) * y ** (n / 2) * math.exp(-x / 2 - y / 2 - t) * t**power

        return scipy.integrate.dblquad(integrand, -25, 6, -25, 6, epsabs=0, epsrel=1e-6)[0]

    expected = moment(1) / moment(0)
    assert rank_one_llc((h, 1, n), nbeta, localization) == pytest.approx(expected, rel=1e-5)
    # Only the widths beside the 1 and the one combination of scales count.
    assert rank_one_llc((n, h, 1), nbeta / 4, localization / 2) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("widths", [(1, 4, 7), (6, 1, 9, 8), (1, 3, 3, 3)])
def test_rank_one_approaches_aoyagi(widths):
    value, multiplicity = aoyagi_coefficient(widths, 0)
    # Γ(s) and the nearest poles correct the logarithm by a constant: compare two scales.
    gaps = [value - rank_one_llc(widths, 10.0**power, 1.0) for power in (100, 200)]
    if multiplicity == 1:
        assert max(map(abs, gaps)) < 1e-9
    else:
        slope = (1 / gaps[1] - 1 / gaps[0]) / (100 * math.log(10))
        assert slope == pytest.approx(1 / (multiplicity - 1), rel=0.02)


@pytest.mark.parametrize(("widths", "nbeta"), [((1, 6, 6, 9), 1e4), ((5, 1, 4), 30.0)])
def test_block_sampling_is_exact(widths, nbeta):
    found = finite_llc(jax.random.key(0), widths, 0, nbeta, 2.0, 0.7, num_sweeps=2500)
    exact = rank_one_llc(widths, nbeta, 2.0, 0.7)
    assert abs(found.mean - exact) < 4 * found.stderr < 0.05 * exact


def test_block_sampling_of_one_layer_is_the_gaussian():
    found = finite_llc(jax.random.key(0), (4, 3), 2, 5.0, 3.0, num_sweeps=20)
    assert found.mean == pytest.approx(12 / 2 * 10 / 13, rel=1e-12)
    assert found.stderr < 1e-12


def test_block_sampling_approaches_aoyagi_at_full_rank():
    # A smooth set of truths of codimension 2 λ.
    widths, rank = (6, 3, 5), 3
    found = finite_llc(jax.random.key(0), widths, rank, 1e8, 30.0, num_sweeps=500)
    assert abs(found.mean - aoyagi_coefficient(widths, rank)[0]) < 4 * found.stderr + 1e-3
    assert found.stderr < 0.1


def test_sgld_agrees_with_block_sampling():
    # A singular truth of rank 1 with the rest at its origin, settings that 3000 steps can mix.
    widths, rank, nbeta, localization = (3, 3, 4), 1, 50.0, 20.0
    net = aligned(jax.random.key(3), widths, rank)
    exact = finite_llc(jax.random.key(1), widths, rank, nbeta, localization, num_sweeps=4000)
    found = llc_jax.estimate_llc(
        jax.random.key(2),
        PopulationLoss(),
        net.params,
        net.batch,
        sampler=llc_jax.SGLD(step_size=1e-4),
        nbeta=nbeta,
        localization=localization,
        num_chains=32,
        num_draws=1500,
        num_burnin=400,
        thinning=4,
    )
    assert abs(exact.mean - found.mean) < 4 * math.hypot(exact.stderr, found.stderr)
    assert found.stderr < 0.02 * exact.mean


# --- networks ---------------------------------------------------------------------------------


def float64_products(params):
    """{(i, j): W_j ... W_i} of adjacent layers."""
    for i in range(len(params)):
        for j in range(i, len(params)):
            chain = [np.float64(w) for w in params[i : j + 1]]
            yield (i, j), np.linalg.multi_dot(chain[::-1]) if j > i else chain[0]


def num_singular_values(matrix):
    """The rank, where a wide gap makes it unmistakable."""
    values = np.linalg.svd(matrix, compute_uv=False)
    if values[0] == 0:
        return 0
    rank = int(np.sum(values > 1e-4 * values[0]))
    assert rank == len(values) or values[rank] < 1e-5 * values[0]
    return rank


@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_every_product_of_an_aligned_network_has_the_rank(rank):
    widths = (5, 9, 6, 7, 5, 8)
    net = aligned(jax.random.key(rank), widths, rank)
    assert net.rank == rank
    assert net.llc == aoyagi_coefficient(widths, rank)[0]
    for _, matrix in float64_products(net.params):
        values = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(values[:rank], 1, atol=10 * EPS32)
        np.testing.assert_allclose(values[rank:], 0, atol=10 * EPS32)


def test_outer_frames_of_aligned_networks_are_random():
    nets = [aligned(jax.random.key(seed), (4, 3, 4), 2) for seed in range(1000)]
    again = aligned(jax.random.key(7), (4, 3, 4), 2)
    np.testing.assert_array_equal(again.target, nets[7].target)
    targets = np.stack([net.target for net in nets])
    # W* is a random partial isometry: mean 0, entries of variance r / (H_0 H_L).
    assert np.abs(targets.mean(0)).max() < 5 * math.sqrt(2 / 16 / 1000)
    np.testing.assert_allclose((targets**2).mean(0), 2 / 16, rtol=0.25)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("widths", [(7, 5, 6), (4, 9), (8, 5, 9, 6), (6,) * 12])
def test_target_is_the_product_and_the_loss_vanishes_there(name, widths):
    net = GENERATORS[name](jax.random.key(1), widths)
    assert [w.shape for w in net.params] == [(h, w) for w, h in itertools.pairwise(widths)]
    assert {w.dtype for w in (*net.params, net.target)} == {np.dtype(np.float32)}
    # Backward error of L float32 products, in units of the product of norms.
    scale = math.prod(np.linalg.norm(w, 2) for w in net.params) * EPS32 * sum(widths)
    whole = dict(float64_products(net.params))[0, len(widths) - 2]
    assert np.abs(whole - net.target).max() <= scale
    loss = PopulationLoss()(net.params, net.batch)
    assert loss.shape == (1,)
    assert loss[0] <= (scale * max(widths)) ** 2


@pytest.mark.parametrize("name", ["svd_truncated", "zeroed"])
def test_published_networks_have_the_stated_rank_and_reference(name):
    kinds = set()
    for seed in range(40):
        widths = ((7, 5, 6), (6, 8, 5, 7))[seed % 2]
        net = GENERATORS[name](jax.random.key(seed), widths)
        ranks = {key: num_singular_values(p) for key, p in float64_products(net.params)}
        assert ranks[0, len(widths) - 2] == net.rank
        lowest = aoyagi_coefficient(widths, net.rank)[0]
        if net.llc is None:
            kinds.add("unknown")
        elif len(widths) == 3:
            layer_ranks = ranks[0, 0], ranks[1, 1]
            assert net.llc == local_coefficient_two_layers(widths, layer_ranks, net.rank)
            kinds.add("above" if net.llc > lowest else "equal")
        else:
            assert net.llc == lowest
            kinds.add("equal")
    assert kinds == {"unknown", "above", "equal"}


def test_without_truncation_published_networks_are_full_rank():
    for name in ("svd_truncated", "zeroed"):
        net = getattr(deep_linear, name)(jax.random.key(0), (30, 20, 25), 0.0)
        assert net.rank == 20
        assert net.llc == aoyagi_coefficient((30, 20, 25), 20)[0]
        for w in net.params:
            rows, columns = w.shape
            if name == "svd_truncated":
                # Normal cut at two deviations keeps 0.7737 of the variance.
                variance, largest = 0.7737 / columns, 2 / math.sqrt(columns)
                assert np.abs(w).max() <= largest * 1.001
            else:
                variance = 2 / (rows + columns)
            assert abs(w.mean()) < 4 * math.sqrt(variance / w.size)
            assert abs(w.var() / variance - 1) < 4 * math.sqrt(2 / w.size)


def hessian(net):
    flat, unflatten = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.asarray, net.params))
    batch = net.batch
    loss = jax.jit(jax.hessian(lambda v: PopulationLoss()(unflatten(v), batch)[0]))
    return np.float64(loss(flat))


@pytest.mark.parametrize(
    ("widths", "rank"), [((4, 2, 3), 2), ((3, 5, 4), 3), ((3, 4, 2, 3), 2), ((4, 3, 4), 1)]
)
def test_rank_of_the_hessian(widths, rank):
    # Where the set of truths is smooth, λ is half the rank; elsewhere the rank is a lower bound,
    # that of the block I_r alone.
    net = aligned(jax.random.key(0), widths, rank)
    found = num_singular_values(hessian(net))
    assert found == rank * (widths[0] + widths[-1] - rank)
    assert found == 2 * net.llc if rank == min(widths) else found < 2 * net.llc


@pytest.mark.parametrize("generate", [deep_linear.svd_truncated, deep_linear.zeroed])
def test_least_width_as_rank_is_a_smooth_point_whatever_the_layers(generate):
    # W_2 of rank 2 < 4 beside full-rank layers, the truth of rank 2 = the least width.
    checked = 0
    for seed in range(40):
        net = generate(jax.random.key(seed), (2, 4, 5, 3))
        if net.rank == 2 and any(num_singular_values(w) < min(w.shape) for w in net.params):
            assert num_singular_values(hessian(net)) == 2 * net.llc
            checked += 1
            if checked == 2:
                return
    pytest.fail("no such network among the seeds")


@pytest.mark.parametrize("class_name", deep_linear.ARCHITECTURES)
def test_architectures_cover_the_published_ranges(class_name):
    (fewest, most), (narrowest, widest) = deep_linear.ARCHITECTURES[class_name]
    draws = [
        deep_linear.random_architecture(jax.random.key(seed), class_name) for seed in range(300)
    ]
    layers = {len(widths) - 1 for widths, _ in draws}
    assert layers == set(range(fewest, most))
    flat = [h for widths, _ in draws for h in widths]
    assert narrowest <= min(flat) < 1.2 * narrowest + 1
    assert 0.95 * widest < max(flat) < widest
    assert all(0 <= rank <= min(widths) for widths, rank in draws)


# --- losses -----------------------------------------------------------------------------------


def test_population_loss_is_the_mean_over_uniform_inputs():
    net = aligned(jax.random.key(0), (4, 6, 3), 2)
    params = tuple(w + 0.3 * np.float32(i + 1) for i, w in enumerate(net.params))
    data = deep_linear.sample_data(jax.random.key(1), net.target, 40_000)
    losses = np.float64(deep_linear.MinibatchLoss()(params, data))
    second_moment = deep_linear.UNIFORM_SECOND_MOMENT
    exact = float(PopulationLoss(second_moment)(params, net.batch)[0])
    assert abs(losses.mean() - exact) < 4 * losses.std() / math.sqrt(len(losses))
    whole = np.float64(params[1]) @ np.float64(params[0]) - net.target
    assert exact == pytest.approx(second_moment * np.sum(whole**2), rel=1e-5)
    averaged = deep_linear.MinibatchLoss(mean_over_outputs=True)(params, data)
    np.testing.assert_allclose(averaged, losses / 3, rtol=1e-5)


def test_data_are_uniform_and_noiseless():
    net = aligned(jax.random.key(0), (4, 6, 3), 2)
    data = jax.device_get(deep_linear.sample_data(jax.random.key(1), net.target, 5000))
    assert np.abs(data["x"]).max() <= 10
    np.testing.assert_allclose(np.mean(data["x"] ** 2, 0), 100 / 3, rtol=0.08)
    exact = np.float64(data["x"]) @ np.float64(net.target).T
    np.testing.assert_allclose(data["y"], exact, atol=1e-5)
    assert deep_linear.MinibatchLoss()(net.params, data).max() < 1e-9


def test_another_network_of_the_shape_compiles_nothing(caplog):
    loss = jax.jit(lambda params, batch, loss_fn: loss_fn(params, batch), static_argnums=2)
    for seed in range(2):
        net = aligned(jax.random.key(seed), (5, 4, 6), 2)
        loss(net.params, net.batch, PopulationLoss())
    assert loss._cache_size() == 1


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: aoyagi_coefficient((3,), 0), "at least two"),
        (lambda: aoyagi_coefficient((3, -1, 2), 0), r"widths\[1\]=-1"),
        (lambda: aoyagi_coefficient((3, 2, 4), 3), "rank=3.*here 2"),
        (lambda: aoyagi_coefficient((3, 2, 4), -1), "rank=-1"),
        (lambda: aligned(jax.random.key(0), (3, 2, 4), 3), "rank=3.*here 2"),
        (lambda: aligned(jax.random.key(0), (3, 0, 4), 0), r"widths\[1\]=0"),
        (lambda: aligned(np.zeros(2, np.uint32), (3, 2), 1), "rng_key"),
        (lambda: local_coefficient_two_layers((3, 2), (2,), 1), "three widths"),
        (lambda: local_coefficient_two_layers((3, 2, 4), (3, 1), 1), r"layer_ranks\[0\]=3"),
        (lambda: local_coefficient_two_layers((3, 2, 4), (2, 2), 1), "rank=1.*2 to 2"),
        (lambda: rank_one_llc((2, 2, 2), 1.0, 1.0), "a width of 1"),
        (lambda: rank_one_llc((1, 2), 1.0, 0.0), "localization=0.0"),
        (lambda: finite_llc(jax.random.key(0), (2, 2), 1, 1.0, 0.0), "localization=0.0"),
        (lambda: finite_llc(jax.random.key(0), (2, 2), 1, 1.0, 1.0, num_sweeps=3), "num_sweeps"),
        (lambda: deep_linear.svd_truncated(jax.random.key(0), (2, 2), 1.5), "probability=1.5"),
        (lambda: deep_linear.random_architecture(jax.random.key(0), "1G"), "'1G'.*10K"),
        (lambda: PopulationLoss(0.0), "second_moment=0.0"),
        (lambda: deep_linear.sample_data(jax.random.key(0), np.eye(2), 0), "num_examples=0"),
    ],
)
def test_bad_arguments_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
