"""The benchmarks run; what they require of compilation, memory and communication holds."""

import dataclasses
import functools
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import train_regression
from experiments.benchmarks import (
    chain_step,
    compile_once,
    curvature,
    devices,
    language,
    memory,
    programs,
    timing,
    tpu_aot,
)
from llc_jax import parallel
from llc_jax.curvature import ProbeMean, hvp
from llc_jax.problems.regression.model import RegressionTransformer, init_params
from llc_jax.trees import Layout

TINY = {"d_model": 4, "num_layers": 1}


@pytest.mark.slow
def test_the_sampling_program_compiles_exactly_once(capsys):
    config = compile_once.Config(num_draws=2, batch_size=4, **TINY)
    assert (config.num_checkpoints, config.checkpoint_batch) == (10, 4)
    assert compile_once.run(config) == (1, 0)
    assert "compiled 1 time(s)" in capsys.readouterr().out


def test_a_compilation_is_seen():
    with compile_once.compilations() as seen:
        jax.jit(functools.partial(jnp.add, 1.0))(2.0)
    assert len(seen) == 1
    with compile_once.compilations() as after:
        pass
    jax.jit(functools.partial(jnp.add, 2.0))(2.0)
    assert len(seen) == 1
    assert after == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_checkpoints(capsys):
    # 18 more checkpoints of 8 MiB: one copy kept of each, on the host or on the device, adds
    # 144 MiB. Half of that is nine checkpoints, more than twice as many as are in flight at once.
    config = memory.Config(num_checkpoints=6, megabytes=8)
    few, many = memory.growth(config)
    assert many - few < 72 * 2**20
    assert "ratio" in capsys.readouterr().out


@pytest.mark.slow
def test_accumulation_and_chain_batch_lower_the_temporaries():
    config = memory.Config(batch_size=64, num_chains=2, **TINY)
    size = memory.temporaries(config, [(1, 2), (4, 2), (1, 1)])
    assert size[4, 2] < 0.5 * size[1, 2]
    assert size[1, 1] < 0.75 * size[1, 2]


def quadratic(params, batch):
    return 0.5 * jnp.sum((params["w"][None] - batch) ** 2, axis=-1)


def test_gradient_descent_is_gradient_descent():
    data = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)
    params, losses = programs.gradient_descent(
        {"w": np.zeros(2, np.float32)}, data, jnp.float32(0.1), loss_fn=quadratic, num_steps=5,
        batch_size=3, mesh=parallel.make_mesh(1, 4),
    )  # fmt: skip
    means = data.reshape(4, 3, 2).mean(axis=1)
    np.testing.assert_allclose(params["w"], (1 - 0.9**5) * means, rtol=1e-5)
    assert losses.shape == (4, 5)
    np.testing.assert_allclose(losses[:, 0], (data**2).sum(1).reshape(4, 3).mean(1) / 2, rtol=1e-5)


@pytest.mark.slow
def test_chain_step_runs(capsys):
    config = chain_step.Config(batch_sizes="4", num_steps=2, repeats=2, **TINY)
    assert list(chain_step.run(config)) == [4]
    assert "batch 4, 4 chains" in capsys.readouterr().out


def test_chain_step_refuses_chains_it_would_not_count():
    if jax.device_count() == 1:
        pytest.skip("one device divides everything")
    with pytest.raises(ValueError, match="num_chains=5"):
        chain_step.run(chain_step.Config(batch_sizes="4", num_chains=5, **TINY))


@pytest.mark.slow
def test_language_model_runs(capsys):
    tiny = {"d_model": 8, "vocab_size": 50, "context": 16}
    config = language.Config(num_steps=2, repeats=2, batch_size=4, **tiny)
    assert set(language.train_report(config)) == {"bare loop", "fit", "fit, sharded"}
    assert "tokens/s" in capsys.readouterr().out
    sizes = {"batch_sizes": "2", "num_steps": 2, "repeats": 2, "d_model": 8, "num_layers": 1}
    assert list(chain_step.run(chain_step.Config(model="language", **sizes))) == [2]
    with pytest.raises(ValueError, match="model='speech': give regression or language"):
        chain_step.run(chain_step.Config(model="speech", **sizes))


@pytest.mark.slow
def test_curvature_runs(tmp_path, capsys):
    training = dataclasses.replace(train_regression.PRESETS["smoke"], workdir=str(tmp_path))
    train_regression.run(training)
    curvature.run(curvature.Config(workdir=str(tmp_path), num_data=16, repeats=1))
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"| {training.num_steps:,} |")


@pytest.mark.slow
def test_devices_runs_in_processes_of_its_own(capfd):
    config = devices.Config(batch_size=4, num_chains=2, num_steps=2, repeats=2, **TINY)
    assert math.isfinite(devices.run(config))
    assert "on 1 host device(s)" in capfd.readouterr().out


def test_interleaving_alternates_and_warms_up():
    order = []
    calls = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    times = timing.interleaved(calls, repeats=2)
    assert "".join(order) == "ba" + "ab" + "ba"
    assert {name: values.tolist() for name, values in times.items()} == {"a": [3, 6], "b": [4, 5]}


def test_elapsed_waits_for_the_result_and_subtracts():
    more = timing.elapsed(lambda: jnp.ones(3) + 1.0)
    assert more.wall > 0
    assert more.cpu >= 0
    assert timing.Elapsed(3.0, 2.0) - timing.Elapsed(1.0, 0.5) == (2.0, 1.5)
    middle, text = timing.ratio(np.asarray([2.0, 4.0, 9.0]), np.asarray([1.0, 2.0, 3.0]))
    assert middle == 2.0
    assert text.startswith("2.000")


@pytest.mark.slow
def test_shapes_are_those_of_the_arguments():
    problem = programs.regression(**TINY)
    mesh = parallel.make_mesh(2, 2)
    real, abstract = (make(problem, mesh, 8, 2) for make in (programs.arguments, programs.shapes))
    assert jax.tree.structure(real) == jax.tree.structure(abstract)
    for x, y in zip(jax.tree.leaves(real), jax.tree.leaves(abstract), strict=True):
        assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)


# --- ahead of time for TPUs -------------------------------------------------------------------


def test_fill_leaves_the_least_to_do():
    assert tpu_aot.fill(6, 2, jax.devices()[:1]) == 1  # any size is as long: the smallest
    four = jax.devices()[:4]
    if len(four) == 4:
        assert tpu_aot.fill(6, 2, four) == 2  # (2, 2): three chunks of one lane
        assert tpu_aot.fill(7, 4, four) == 1  # (1, 4): seven chunks of one lane


@pytest.mark.parametrize("once", [True, False])
def test_the_cost_of_a_loop_is_found_out(monkeypatch, once):
    def cost(program):
        [trips] = re.findall(r'"known_trip_count":{"n":"(\d+)"}', program.as_text())
        return {"flops": 2 * 256**3 * (1 if once else int(trips)) + 1000}

    monkeypatch.setattr(tpu_aot, "cost", cost)
    assert tpu_aot.counts_loop_bodies_once(parallel.make_mesh(1, 1)) is once


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="run by `make tpu-aot`")
def test_no_collectives_on_a_tpu_pod(capsys):
    config = tpu_aot.Config(
        topologies="v5e:4x4", num_draws=20, num_burnin=10, batch_size=32, num_data=256, d_model=16
    )
    found = tpu_aot.run(config)["v5e:4x4"]
    assert found["collectives"] == []
    assert found["mesh"] == {"checkpoint": 8, "chain": 2}
    assert found["once"]
    # Two operations per weight in each of three passes, for the tokens of all steps of all lanes.
    model = RegressionTransformer(d_model=16)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), model))
    weights = sum(x.size for x in jax.tree.leaves(params))
    tokens = (32 * 16) * 30 * 5 * 24
    assert 1 < found["flops"] / (6 * weights * tokens) < 5
    assert "collectives: none" in capsys.readouterr().out


def scaled_squares(params, batch):
    """½ h x² summed, one row of curvatures per example."""
    return 0.5 * jnp.sum(batch * params["x"][None] ** 2, axis=-1)


@pytest.mark.slow
def test_power_iteration_finds_the_ends_it_would_and_counts_its_products():
    spectrum = jnp.asarray([[-9.0, 6.0, 3.0, 1.0, 0.5, 0.0]])
    params = {"x": jnp.zeros(6)}
    operator, layout = hvp(scaled_squares, params, spectrum), Layout.of(params)
    run = functools.partial(curvature.power_iteration, jax.random.key(0), operator, layout, 3)
    values, products = run(500, jnp.float32(1e-5))
    # By absolute value, as PyHessian does it; convergence is geometric in the ratio squared.
    np.testing.assert_allclose(values, [-9.0, 6.0, 3.0], rtol=1e-3)
    assert 10 < products < 60
    assert run(5, jnp.float32(0.0))[1] == 15  # the limit, three times
    loose, fewer = run(500, jnp.float32(1e-2))
    assert fewer < products
    assert np.abs(loose[0] + 9.0) > np.abs(values[0] + 9.0)


def test_probes_are_as_many_as_the_error_wants():
    # 64 probes gave 8 %; 2 % takes 16 times as many.
    assert curvature.probes_needed(ProbeMean(50.0, 4.0)) == 64 * 16
    assert curvature.probes_needed(ProbeMean(50.0, 1e-9)) == 2
