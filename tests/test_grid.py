"""The grid of a calibration: settings whose chains died, and rehearsals of what is proposed."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llc_jax
from llc_jax import BAOAB
from llc_jax.calibration.choice import RELAXATIONS, SampledGrid
from llc_jax.calibration.grid import LIMIT, MAX_REHEARSALS, STRESS, WILD, Grid, stiffest_of
from llc_jax.calibration.pilot import Pilot

ALIVE, DEAD = np.full(2, -1), np.array([-1, 3])
FRACTION, BURNIN = 0.4, 3000


def quadratic(params, batch):
    return batch * 0.5 * jnp.sum(params["w"] ** 2)


@pytest.fixture(scope="module")
def sound():
    """An estimate with no findings."""
    found = llc_jax.estimate_llc(
        jax.random.key(0), quadratic, {"w": np.zeros(4, np.float32)}, np.ones(2, np.float32),
        sampler=BAOAB(0.01, 2.0), nbeta=30.0, localization=1.0, num_chains=2, num_draws=20,
        num_burnin=4,
    )  # fmt: skip
    return dataclasses.replace(found, rhat=1.0, ess=1e4, drift=0.0, distance_growth=0.0)


class Rehearsed(Grid):
    """Chains of [B, G] settings that survive steps up to `num_draws`[b, g], and end at Λ = 100."""

    def survives(self, rng_key, nbeta, localization, step_size):
        b, g = np.flatnonzero(self.nbetas == nbeta)[0], np.flatnonzero(
            self.localizations == localization)[0]  # fmt: skip
        return bool(step_size <= self.num_draws[b, g])


def grid_of(survived, gammas=(1.0, 4.0)):
    pilot = Pilot(quadratic, None, None, BAOAB(1.0, 1.0), FRACTION, BURNIN, {})
    return Rehearsed(pilot, np.array([FRACTION]), np.array([1.0]), np.array(gammas),
                     np.atleast_2d(survived))  # fmt: skip


def sampled_grid(grid, sound, ends):
    """A grid sampled at Λ = 100 whose chains end at these curvatures."""
    stiffness = np.full((1, grid.localizations.size), 100.0)
    steps = FRACTION / stiffness[None]
    one = dataclasses.replace(sound, stability=steps.flat[0] * np.asarray(ends, float))
    estimates = np.empty(steps.shape, object)
    for index in np.ndindex(estimates.shape):
        estimates[index] = one
    return SampledGrid(grid.fractions, grid.nbetas, grid.localizations, steps, stiffness,
                 grid.relaxations(steps), estimates, np.array([sound, sound]),
                 np.ones(2))  # fmt: skip


def test_where_curvature_is_the_same_everywhere_nothing_is_rehearsed(sound):
    grid = grid_of([0.0, 0.0])  # would survive nothing
    sampled = sampled_grid(grid, sound, [100.0, 90.0])
    choice, after = grid.choose(jax.random.key(0), sampled, 90.0)
    assert choice.num_rehearsals == 0
    assert choice.stiffness == 100.0
    assert choice.cell == (0, 0, 0)
    np.testing.assert_array_equal(after.stiffness, 100.0)
    assert not any("walls" in text for text in choice.warnings)


def test_a_step_is_proposed_if_four_times_as_much_is_survived(sound):
    # Curvature at the anchor is another one, chains agree with each other.
    step = FRACTION / 100
    grid = grid_of([STRESS * step, 0.0])
    sampled = sampled_grid(grid, sound, [100.0, 90.0])
    choice, _ = grid.choose(jax.random.key(0), sampled, 1.0)
    assert (choice.num_rehearsals, choice.stiffness) == (1, 100.0)
    # A little less, and the step is a fourth.
    grid = grid_of([0.99 * STRESS * step, 0.0])
    choice, after = grid.choose(jax.random.key(0), sampled, 1.0)
    assert (choice.num_rehearsals, choice.stiffness) == (2, STRESS * 100)
    np.testing.assert_array_equal(after.stiffness, [[STRESS * 100, 100]])
    assert any("4 times smaller" in text for text in choice.warnings)


def test_ends_that_differ_by_decades_get_a_larger_margin(sound):
    grid = grid_of([LIMIT / 100, 0.0])
    choice, _ = grid.choose(jax.random.key(0), sampled_grid(grid, sound, [100.0, 0.5]), 1.0)
    assert choice.num_rehearsals == 1
    # Proposed is 1/16 of what was survived.
    assert FRACTION / choice.stiffness == pytest.approx(LIMIT / 100 / WILD)


def test_a_stronger_pull_is_taken_where_steps_get_too_small_to_relax(sound):
    # 3000 sqrt(ε γ) relaxation times: at γ = 1 with ε = 0.4 / (100 · 4^k), 190, 95, ..., 3.0, 1.5.
    grid = grid_of([0.0, 1.0])
    sampled = sampled_grid(grid, sound, [100.0, 90.0])
    fails = math.floor(math.log2(sampled.relaxations[0, 0, 0] / RELAXATIONS)) + 1
    assert fails < MAX_REHEARSALS
    choice, after = grid.choose(jax.random.key(0), sampled, 1.0)
    assert choice.cell == (0, 0, 1)
    assert choice.num_rehearsals == fails + 1
    assert after.stiffness[0, 0] == 100 * STRESS**fails
    assert after.relaxations[0, 0, 0] < RELAXATIONS


def test_walls_for_which_no_step_is_small_enough_are_refused_with_what_to_do(sound):
    grid = grid_of([0.0, 0.0])
    with pytest.raises(ValueError, match="larger localization, such as 40") as caught:
        grid.choose(jax.random.key(0), sampled_grid(grid, sound, [100.0, 90.0]), 1.0)
    assert len(str(caught.value)) <= 600


def test_a_dead_chain_in_the_grid_asks_for_a_rehearsal(sound):
    grid = grid_of([1.0, 1.0])
    sampled = sampled_grid(grid, sound, [100.0, 90.0])
    assert grid.stress(sampled, (0, 0, 0), 100.0) == 0
    sampled.estimates[0, 0, 1] = dataclasses.replace(sound, diverged_at=DEAD)
    assert grid.stress(sampled, (0, 0, 0), 100.0) == 0  # of another setting
    assert grid.stress(sampled, (0, 0, 1), 100.0) > 0


def test_stiffest_is_the_larger_of_pilots_and_chains(sound):
    grid = grid_of([1.0, 1.0])
    assert stiffest_of(sampled_grid(grid, sound, [70.0, 90.0]), (0, 0, 0)) == 100.0
    assert stiffest_of(sampled_grid(grid, sound, [70.0, 300.0]), (0, 0, 0)) == pytest.approx(300.0)


class Dying(Grid):
    """Settings whose chains die of steps beyond 0.4 / `num_draws`[b, g]."""

    def sample(self, rng_key, stiffness):
        sampled = sampled_grid(self, self.pilot.params, [1.0, 1.0])
        for index in np.ndindex(stiffness.shape):
            dead = stiffness[index] < self.num_draws[index]
            died = dataclasses.replace(self.pilot.params, diverged_at=DEAD if dead else ALIVE)
            sampled.estimates[0, *index] = died
        return sampled._replace(stiffness=stiffness)


@pytest.mark.parametrize(
    ("needed", "burnin", "expected", "rounds"),
    [
        ([[50.0, 50.0]], BURNIN, [[100.0, 100.0]], 1),
        # Once more where chains died, as long as these relax ...
        ([[1000.0, 50.0]], BURNIN, [[1600.0, 100.0]], 3),
        # ... 3 times within 60 steps at γ = 1, Λ = 100, but not with steps a fourth of it,
        ([[1000.0, 50.0]], 60, [[100.0, 100.0]], 1),
        # unless nothing is alive.
        ([[1000.0, 300.0]], 30, [[400.0, 400.0]], 2),
    ],
)
def test_settings_with_dead_chains_are_sampled_again(sound, needed, burnin, expected, rounds):
    pilot = Pilot(quadratic, sound, None, BAOAB(1.0, 1.0), FRACTION, burnin, {})
    grid = Dying(pilot, np.array([FRACTION]), np.array([1.0]), np.array([1.0, 4.0]),
                 np.array(needed))  # fmt: skip
    sampled, spent = grid.sample_alive(jax.random.key(0), np.full((1, 2), 100.0))
    np.testing.assert_array_equal(sampled.stiffness, expected)
    assert spent == 4 * rounds
