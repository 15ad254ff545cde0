"""The comparison with devinterp: its problems, formulas and tables; the torch side if it is there.

torch is never imported here: its worker is a process of another environment.
"""

import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import (
    compare_devinterp,
    compare_problems,
    compare_results,
    compare_worker,
)
from experiments.benchmarks.compare_results import OTHER, OURS, THEIRS, Measured, Shape
from llc_jax import SGLD, estimate_llc
from llc_jax.problems.regression.losses import RegressionLoss
from llc_jax.problems.regression.model import RegressionTransformer

TORCH = pathlib.Path(compare_devinterp.Config.torch_python)
DRAWS = {"num_draws": 6, "num_burnin": 2}
TINY = {
    "quadratic": lambda: compare_problems.quadratic(3, **DRAWS),
    "deep_linear": lambda: compare_problems.deep_linear_net(
        4, 2, **DRAWS, num_data=16, batch_size=4
    ),
    "regression": lambda: compare_problems.regression_transformer(
        **DRAWS, num_data=64, training=4, num_layers=1, d_model=8, d_mlp=8, num_heads=2
    ),
    "language": lambda: compare_problems.language_model(
        **DRAWS, vocabulary=11, width=8, length=5, num_data=32, training=4
    ),
}


# One of them in the fast suite, so that a broken import or signature is seen.
@pytest.fixture(
    scope="module",
    params=[
        "quadratic",
        *(pytest.param(k, marks=pytest.mark.slow) for k in TINY if k != "quadratic"),
    ],
)
def problem(request):
    return TINY[request.param]()


@pytest.mark.slow
def test_a_problem_survives_the_disk(problem, tmp_path):
    compare_worker.save(tmp_path, problem.stored)
    back = compare_worker.load(tmp_path)
    assert (back.kind, back.options, back.settings) == (
        problem.stored.kind, problem.stored.options, problem.stored.settings
    )  # fmt: skip
    for part in ("params", "data"):
        ours, theirs = getattr(problem.stored, part), getattr(back, part)
        assert list(ours) == list(theirs)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_losses_are_per_example_and_checked(problem):
    loss_fn, params, data = compare_problems.of_stored(problem.stored)
    assert compare_problems.of_stored(problem.stored)[0] is loss_fn  # or it compiles again
    losses = loss_fn(params, data)
    assert losses.shape == (len(jax.tree.leaves(data)[0]),)
    assert np.isfinite(losses).all()
    shifted = jax.tree.map(lambda x: x + compare_worker.SHIFT, params)
    found = np.asarray(loss_fn(shifted, data))[: compare_problems.CHECKED]
    assert compare_worker.check_agreement(problem.stored, found) < 1e-5
    with pytest.raises(RuntimeError, match="models differ"):
        compare_worker.check_agreement(problem.stored, found + 1e-3 * (1 + found))
    with pytest.raises(RuntimeError, match="models differ"):
        compare_worker.check_agreement(problem.stored, np.full_like(found, np.nan))


@pytest.mark.slow
def test_the_anchor_of_a_deep_linear_net_is_a_true_parameter():
    loss_fn, params, data = compare_problems.of_stored(TINY["deep_linear"]().stored)
    assert np.max(loss_fn(params, data)) < 1e-8


@pytest.mark.slow
def test_the_regression_loss_is_that_of_the_library():
    stored = TINY["regression"]().stored
    loss_fn, params, data = compare_problems.of_stored(stored)
    tokens = data["tokens"]
    batch = {"x": tokens[:, ::2, 1:], "y": data["y"]}
    library = RegressionLoss(RegressionTransformer(**stored.options))(params, batch)
    np.testing.assert_allclose(loss_fn(params, data), library, rtol=1e-5)


@pytest.mark.slow
def test_the_language_model_does_not_see_the_future():
    loss_fn, params, data = compare_problems.of_stored(TINY["language"]().stored)
    tokens = jnp.asarray(data["tokens"][:1])

    def shape_of_change(position):
        """Which of the losses of prefixes change with the token at `position`."""
        changed = tokens.at[0, position].set((tokens[0, position] + 1) % 11)
        params_cut = [
            params | {"position_embed": params["position_embed"][: t - 1]} for t in range(2, 7)
        ]
        return [
            not np.allclose(*[loss_fn(p, {"tokens": x[:, :t]}) for x in (tokens, changed)])
            for t, p in zip(range(2, 7), params_cut, strict=True)
        ]

    assert shape_of_change(3) == [False, False, True, True, True]


def test_synthetic_text_is_a_sparse_markov_chain():
    text = compare_problems.synthetic_text(7, 30, 400)
    assert text.shape == (400, 30)
    assert text.min() >= 0
    assert text.max() < 7
    big = compare_problems.synthetic_text(500, 30, 400)
    followers = [len(set(big[:, 1:][big[:, :-1] == token])) for token in range(500)]
    assert max(followers) <= 8


@pytest.mark.slow
def test_training_lowers_the_loss():
    stored = compare_problems.language_model(
        **DRAWS, vocabulary=11, width=8, length=5, num_data=64, training=60
    ).stored
    loss_fn, params, data = compare_problems.of_stored(stored)
    assert float(np.mean(loss_fn(params, data))) < 0.95 * math.log(11)


@pytest.mark.slow
def test_the_exact_quadratic_value_is_sampled():
    problem = compare_problems.quadratic(20, 4000, 400)
    loss_fn, params, data = compare_problems.of_stored(problem.stored)
    s = problem.stored.settings
    estimate = estimate_llc(
        jax.random.key(0), loss_fn, params, data, sampler=SGLD(s["step_size"]), nbeta=s["nbeta"],
        localization=s["localization"], num_chains=4, num_draws=s["num_draws"],
        num_burnin=s["num_burnin"], num_probes=0,
    )  # fmt: skip
    assert abs(estimate.mean - problem.exact) < 4 * estimate.stderr
    assert estimate.stderr < 0.04 * problem.exact


def test_exact_quadratic_by_hand():
    # Λ = 10·2 + 5 = 25, ε Λ/4 = 0.25: ½·20 / (25·0.75).
    value = compare_problems.exact_quadratic(np.asarray([2.0]), 0.04, 10.0, 5.0)
    assert value == pytest.approx(10 / 18.75)


def test_cost_by_hand():
    # Twice the error that is wanted: four times the 100 draws; 4 chains, 50 steps of burn-in.
    gradients, seconds = compare_results.cost(0.05, 10.0, 1.0, Shape(4, 100, 50), 2.0, 0.01)
    assert gradients == pytest.approx(4 * (50 + 400))
    assert seconds == pytest.approx(2 + 18)


def test_init_stderr():
    # 4 chains with 32 batches of 8: 1,024 draws of deviation 0.5, of 1,024 examples a quarter each.
    value = compare_results.init_stderr(10.0, 0.5, 8, 1024, 4)
    assert value == pytest.approx(10 * 0.5 / 32 * math.sqrt(0.75))
    assert compare_results.init_stderr(10.0, 0.5, 8, 100, 4) == 0.0


def made_up(seconds, mean, seed):
    rng = np.random.default_rng(seed)
    return Measured(
        gaps=mean + rng.normal(size=(2, 4, 500)), init_stderr=0.0,
        long=np.asarray([[2 * seconds + 1, seconds + 1], [2 * seconds + 1, seconds + 1]]),
        short=np.asarray([[1.0, 1.0], [1.0, 1.0]]), first=2 * seconds + 4, memory=2.0**21,
        memory_warm=2.0**20,
    )  # fmt: skip


def test_summary_and_table():
    measured = {
        OURS: made_up(1.0, 10.0, 0), OTHER: made_up(1.5, 10.5, 1), THEIRS: made_up(3.0, 10.0, 2)
    }  # fmt: skip
    measured[THEIRS] = measured[THEIRS]._replace(init_stderr=1.0, first=math.nan)
    shape = Shape(4, 500, 100)
    rows = compare_results.summary(measured, shape, Shape(4, 0, 0), 10.0, (0.05,))
    ours, _, theirs = rows
    assert ours["stderr"] == pytest.approx(1 / math.sqrt(4000), rel=0.2)
    assert ours["stderr_of_spread"] == pytest.approx(1 / math.sqrt(4000), rel=0.6)
    assert theirs["stderr"] == pytest.approx(math.sqrt(1 / 2 + 1 / 4000), rel=0.02)
    assert ours["ms_per_chain_step"] == pytest.approx(2000 / 2400)
    assert ours["cpu_ms_per_chain_step"] == pytest.approx(1000 / 2400)
    assert ours["fixed_seconds"] == pytest.approx(1.0)
    assert ours["compile_seconds"] == pytest.approx(3.0)
    assert abs(ours["z"]) < 4
    assert abs(ours["z_exact"]) < 4
    # One round of devinterp has the error 1.0 against the 0.5 wanted: four times the draws.
    assert theirs["gradients_to_0.05"] == pytest.approx(4 * (100 + 2000), rel=0.05)
    assert theirs["seconds_to_0.05"] > 3 * ours["seconds_to_0.05"]
    assert compare_results.step_ratio(measured).startswith("3.000")
    text = compare_results.table([{"problem": "p", **row} for row in rows], (0.05,)).splitlines()
    assert len(text) == 5
    assert len({len(line) for line in text}) == 1
    assert len({line.count("|") for line in text}) == 1
    assert "gradients to 5%" in text[0]
    assert "–" in text[4]


def test_burnin_is_cut_off_devinterp_and_not_off_ours():
    losses = np.arange(12.0).reshape(2, 6)
    settings = {"nbeta": 2.0, "num_burnin": 4}
    theirs = compare_devinterp.gaps({"losses": losses, "init_loss": np.asarray(1.0)}, settings)
    ours = compare_devinterp.gaps(
        {"losses": losses[:, 4:], "anchor_losses": np.ones((2, 2))}, settings
    )
    np.testing.assert_array_equal(theirs, ours)
    np.testing.assert_array_equal(theirs, [[6, 8], [18, 20]])


def test_measured_reports_time_and_memory():
    result, cost = compare_worker.measured(lambda: float(np.ones(4_000_000).sum()))
    assert result == 4e6
    assert cost["wall"] > 0
    assert cost["peak_bytes"] > 32e6


def test_bad_input():
    with pytest.raises(ValueError, match="problem 'x'"):
        compare_devinterp.run(compare_devinterp.Config(problems="x"))
    with pytest.raises(ValueError, match=r"make \.venv-bench"):
        compare_devinterp.run(compare_devinterp.Config(torch_python="nowhere/python"))


@pytest.mark.slow
@pytest.mark.skipif(not os.access(TORCH, os.X_OK), reason="run `make .venv-bench/.installed`")
def test_side_by_side(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(compare_problems, "PROBLEMS", TINY)
    monkeypatch.setattr(compare_devinterp, "SHORT", {"num_draws": 1, "num_burnin": 1})
    config = compare_devinterp.Config(
        problems=",".join(TINY), draws=8, rounds=1, output=str(tmp_path)
    )
    rows = compare_devinterp.run(config)
    assert len(rows) == 9
    assert all(np.isfinite(row["llc"]) for row in rows)
    assert "z = " in capfd.readouterr().out
    assert len((tmp_path / "comparison.csv").read_text().splitlines()) == 10
    assert (tmp_path / "comparison.md").read_text().count("\n| ") == 9
    assert json.loads((tmp_path / "config.json").read_text())["draws"] == 8
