"""Numbers of a dtype are some way apart: what that adds to a chain, and where there is no chain."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from llc_jax import SGLD, RMSPropSGLD
from llc_jax.inputs import weights
from llc_jax.samplers.base import step_variance

SPACING = 1 / 16  # of bfloat16 from 8 to 16
SIZE = {"w": jnp.full(5, 12.0, jnp.bfloat16)}


def heating(params, step_size, localization=0.0, mask=None, sampler=SGLD):
    return weights.weight_heating(params, step_variance(sampler(step_size)), localization, mask)


def variance_on_integers(step_size, fraction, minimum):
    """Of a chain of SGLD that is rounded to integers in every step, by its transition matrix.

    Args:
      step_size: ε, in squared spacings.
      fraction: ε Λ.
      minimum: of the potential, between two integers.
    """
    most = int(8 / np.sqrt(fraction / step_size)) + 6
    k = np.arange(-most, most + 1)
    middle = k[:, None] + fraction / 2 * (minimum - k[:, None])
    edges = (k[None] + 0.5 - middle) / np.sqrt(step_size)
    to = norm.cdf(edges) - norm.cdf(edges - 1 / np.sqrt(step_size))
    law = np.linalg.matrix_power(to / to.sum(axis=1, keepdims=True), 1 << 14)[most]
    return law @ (k - minimum) ** 2


@pytest.mark.parametrize("fraction", [0.05, 0.4])
@pytest.mark.parametrize("heat", [0.02, 0.1, weights.MAX_HEATING])
def test_a_chain_on_a_grid_is_wider_by_its_heating_up_to_the_limit(fraction, heat):
    step_size = 1 / 12 / heat
    exact = step_size / (fraction * (1 - fraction / 4))  # of the same chain without a grid
    for minimum in (0.0, 0.5):
        found = variance_on_integers(step_size, fraction, minimum)
        assert found == pytest.approx((1 + heat) * exact, rel=0.012)


def test_beyond_the_limit_the_law_fails_and_the_call_is_refused():
    heat = 3 * weights.MAX_HEATING
    narrower = variance_on_integers(1 / 12 / heat, 0.05, 0.0) * 0.05 * (1 - 0.05 / 4) * 12 * heat
    assert narrower < 0.85 * (1 + heat)
    with pytest.raises(ValueError, match="would be rounded away") as error:
        heating(SIZE, SPACING**2 / 12 / heat)
    assert "bfloat16" in str(error.value)
    assert "cast the weights to float32" in str(error.value)


def test_heating_is_that_of_the_worst_leaf_in_its_dtype():
    params = {**SIZE, "v": np.full(3, 12.0, np.float32)}
    assert heating(params, 0.01) == pytest.approx(SPACING**2 / 12 / 0.01)
    assert heating({"v": params["v"]}, 0.01) == 0.0
    assert heating({"v": params["v"] * 2.0**16}, 0.01) == pytest.approx(SPACING**2 / 12 / 0.01)
    assert heating(params, 0.01, mask={"w": False, "v": True}) == 0.0


def test_zeros_have_all_the_digits_that_steps_need():
    """Such as fresh biases: what is around 0 is as far apart as it is large."""
    assert heating({"b": jnp.zeros(4, jnp.bfloat16)}, 1e-8) == 0.0
    one = {"b": jnp.zeros(400, jnp.bfloat16).at[0].set(12.0)}
    assert heating(one, 1e-5) == pytest.approx(SPACING**2 / 400 / 12 / 1e-5)


def test_where_only_a_preconditioner_knows_the_step_the_widest_posterior_is_compared():
    width = {"localization": 100.0, "sampler": RMSPropSGLD}
    assert heating(SIZE, 1e-9, **width) == pytest.approx(SPACING**2 / 12 * 100)
    assert heating(SIZE, 1e-9, sampler=RMSPropSGLD) == 0.0
    with pytest.raises(ValueError, match="a posterior of width"):
        heating(SIZE, 1e-9, localization=1e4, sampler=RMSPropSGLD)


def test_one_array_in_two_places_is_named_and_constants_are_not():
    table, ones = np.arange(6.0).reshape(2, 3), np.ones(4)
    found = weights.shared_arrays({"in": table, "out": {"T": table}, "a": ones, "b": ones})
    assert found == ("params['in'] and params['out']['T']",)
