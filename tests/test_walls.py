"""What chains tell of walls: deaths, spread of curvature, gradients at kinks."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from llc_jax.calibration.walls import any_dead, curvature_by_gradients, spread


def test_one_dead_chain_is_enough():
    found = [SimpleNamespace(diverged_at=np.array(x)) for x in ([-1, -1], [-1, 0], [5, 9])]
    np.testing.assert_array_equal(any_dead(found), [False, True, True])


def test_spread_by_hand():
    assert spread(2.0, [3.0, np.nan], np.array([[6.0]])) == 3.0
    assert spread([0.0, 1.0]) == math.inf
    assert spread([np.nan, 4.0]) == 1.0


def test_the_trace_of_the_curvature_from_gradients():
    """Integration by parts: E|nβ ∇L|² = E tr nβ H; a kink c |w| has it at 0, in all (nβ c)²."""
    kink = SimpleNamespace(sound=SimpleNamespace(gradient=np.array([[0.0, 2.0], [0.0, 2.0]])))
    lost = SimpleNamespace(sound=SimpleNamespace(gradient=np.array([[0.0, np.inf], [0.0, 1.0]])))
    np.testing.assert_allclose(
        curvature_by_gradients([kink, lost], np.array([5.0, 5.0]), 1), [100.0, 0.0]
    )
    # ½ h w² in d directions, sampled from its law: h on the mean over the directions.
    rng, h, nbeta = np.random.default_rng(0), np.array([1.0, 3.0]), 50.0
    w = rng.normal(size=(20_000, 2)) / np.sqrt(nbeta * h)
    norms = np.linalg.norm(h * w, axis=1)[:, None]
    one = SimpleNamespace(sound=SimpleNamespace(gradient=norms))
    assert curvature_by_gradients([one], np.array([nbeta]), 2)[0] == pytest.approx(
        nbeta * h.mean(), rel=0.05
    )
