"""The main job end to end, and what happens when it is interrupted, damaged or misused."""

import dataclasses
import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

import llc_jax
from experiments import (
    calibrate_sgld,
    cli,
    estimate_llc,
    find_stages,
    make_figures,
    make_report,
    measure_behavior,
    measure_curvature,
    measure_trajectory,
    quickstart,
    train_regression,
    vary_llc,
    workdir_results,
)
from experiments import run as run_loop
from experiments import workdir as workdirs
from experiments.training import schedule
from llc_jax.problems.regression import behavior as regression
from llc_jax.problems.regression import structure_figures
from llc_jax.problems.regression.losses import (
    RegressionLoss,
    RegressionPrefixLoss,
    RegressionTokenLosses,
)
from llc_jax.problems.regression.model import predictions
from llc_jax.problems.regression.problem import draw, setting
from llc_jax.storage import files, results
from llc_jax.storage.checkpoints import CheckpointDir

ROOT = pathlib.Path(__file__).parents[1]


def train_config(folder, **changes):
    return dataclasses.replace(train_regression.PRESETS["smoke"], workdir=str(folder), **changes)


def llc_config(folder, **changes):
    return dataclasses.replace(estimate_llc.PRESETS["smoke"], workdir=str(folder), **changes)


def hashes(folder, pattern):
    return {p.name: files.digest([p]) for p in sorted(pathlib.Path(folder).glob(pattern))}


def parameters(folder):
    kept = CheckpointDir(pathlib.Path(folder) / "checkpoints")
    return {s: kept.restore_state(_opt_state(), s)[1:] for s in kept.steps()}


def _opt_state():
    from llc_jax.problems.regression.model import init_params
    from llc_jax.training import loop as train
    from llc_jax.training import optimizers

    config = train_regression.PRESETS["smoke"]
    model, _ = setting(config)
    optimizer = optimizers.adam_one_cycle(config.learning_rate, config.num_steps)
    return train.init_state(init_params(jax.random.key(0), model), optimizer).opt_state


def assert_same_run(one, other):
    a, b = parameters(one), parameters(other)
    chex.assert_trees_all_equal(a, b, strict=True)
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


def start(module, *flags):
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{module}", *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process, expect=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == expect, out + err
    return out + err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished smoke run, made in this process on four virtual devices."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    quickstart.run(quickstart.Config(workdir=str(folder), preset="smoke"))
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return pathlib.Path(shutil.copytree(run, tmp_path / "copy"))


def test_quickstart_leaves_a_complete_workdir(run):
    steps = schedule(train_config(run))
    assert CheckpointDir(run / "checkpoints").steps() == steps
    assert results.finished_steps(run / "llc") == steps
    sweep = results.load_sweep(run / "llc")
    assert dict(sweep.sizes) == {
        "checkpoint": len(steps), "chain": 4, "draw": 20, "burnin": 10, "part": 8,
    }  # fmt: skip
    # λ̂ of the whole is the mean over tokens, since its loss is.
    np.testing.assert_allclose(sweep.parts.mean("part"), sweep.llc, rtol=1e-3, atol=1e-3)
    # Self-describing: the estimate follows from the file alone.
    gaps = sweep.losses.astype(float) - sweep.anchor_losses.astype(float)
    recomputed = sweep.attrs["nbeta"] * gaps.mean(("chain", "draw"))
    np.testing.assert_allclose(sweep.llc, recomputed, rtol=1e-12)
    for name in ("sampler", "step_size", "localization", "data_sha256", "version_jax", "devices"):
        assert name in sweep.attrs
    stages = find_stages.load_stages(run / "llc" / "stages.json")
    assert stages[0].start == steps[0]
    assert stages[-1].end == steps[-1]
    names = ["overview", "traces", "tokens", "curvature", "behavior", "structure", "trajectory"]
    for name in ("report.html", "results.csv", *[f"figures/{name}.png" for name in names]):
        assert (run / name).stat().st_size > 0
    assert len((run / "results.csv").read_text().splitlines()) == len(steps) + 1
    assert (
        len((run / "llc" / "curvature" / "curvature.csv").read_text().splitlines())
        == len(steps) + 1
    )


@pytest.mark.slow
def test_curvature_is_that_of_the_library_and_resumes_where_it_was_killed(copy):
    folder = copy / "llc" / "curvature"
    whole = measure_curvature.load(folder)
    assert list(whole) == schedule(train_config(copy))
    model, task = setting(train_config(copy))
    kept = CheckpointDir(copy / "checkpoints")
    last = list(whole)[-1]
    data = draw(task, 256, 1000)
    matvec = llc_jax.curvature.hvp(
        RegressionLoss(model), kept.restore_params(last), jax.tree.map(lambda x: x[:64], data)
    )
    top = llc_jax.curvature.top_eigenvalues(
        jax.random.key(5), matvec, kept.restore_params(last), num_eigenvalues=1, num_iterations=40
    )
    assert whole[last].largest[0] == pytest.approx(top[0], rel=1e-3)
    before = hashes(folder, "*.nc") | hashes(folder, "*.csv")
    for step in list(whole)[2:]:
        results.result_path(folder, step).unlink()
    (folder / "curvature.csv").unlink()
    measure_curvature.run(
        dataclasses.replace(measure_curvature.PRESETS["smoke"], workdir=str(copy))
    )
    assert hashes(folder, "*.nc") | hashes(folder, "*.csv") == before
    with pytest.raises(ValueError, match="num_probes: 2 before, 3 now"):
        measure_curvature.run(
            dataclasses.replace(measure_curvature.PRESETS["smoke"], workdir=str(copy), num_probes=3)
        )


def test_behavior_is_that_of_the_library_and_resumes(copy):
    folder, config = copy / "behavior", dataclasses.replace(
        measure_behavior.PRESETS["smoke"], workdir=str(copy)
    )  # fmt: skip
    whole = results.load(folder, "measure_behavior")
    steps = schedule(train_config(copy))
    assert list(whole.checkpoint) == steps
    model, task = setting(train_config(copy))
    params = CheckpointDir(copy / "checkpoints").restore_params(steps[-1])
    sequences = regression.evaluation_set(jax.random.key(config.seed), task, config.num_sequences)
    losses = RegressionTokenLosses(model)(params, sequences).mean(axis=0)
    np.testing.assert_allclose(whole.loss[-1], losses, rtol=1e-4)
    squares = sum(np.sum(np.square(x, dtype=float)) for x in jax.tree.leaves(params))
    assert float(whole.weight_norm[-1]) == pytest.approx(squares**0.5, rel=1e-6)
    before = hashes(folder, "*.nc") | hashes(folder, "*.csv")
    results.result_path(folder, steps[1]).unlink()
    (folder / "attention.csv").unlink()
    (folder / "behavior.csv").write_text("stale")
    measure_behavior.run(config)
    assert hashes(folder, "*.nc") | hashes(folder, "*.csv") == before
    with pytest.raises(ValueError, match="num_far: 32 before, 16 now"):
        measure_behavior.run(dataclasses.replace(config, num_far=16))
    with pytest.raises(ValueError, match="num_attention=65 is above num_sequences=64"):
        measure_behavior.run(dataclasses.replace(config, num_attention=65))


def test_trajectory_is_the_pca_of_the_predictions(copy, capsys):
    config = dataclasses.replace(measure_trajectory.PRESETS["smoke"], workdir=str(copy))
    steps, pca, names, others = measure_trajectory.load(copy / "trajectory")
    assert others == []
    assert list(steps) == schedule(train_config(copy))
    assert names == ["zero", "ridge"]
    model, task = setting(train_config(copy))
    kept = CheckpointDir(copy / "checkpoints")
    batch = regression.evaluation_set(jax.random.key(config.seed), task, config.num_sequences)
    rows = [predictions(model, kept.restore_params(s), batch).ravel() for s in steps]
    rows += [np.zeros_like(rows[0]), np.ravel(batch["ridge"])]
    rows = np.array(rows, float)
    centred = rows - rows[: steps.size].mean(axis=0)
    _, values, vectors = np.linalg.svd(centred[: steps.size], full_matrices=False)
    np.testing.assert_allclose(pca.explained, values[:3] ** 2 / np.sum(values**2), rtol=1e-3)
    scores = centred @ vectors[:3].T
    np.testing.assert_allclose(np.abs(pca.scores), np.abs(scores), rtol=1e-2, atol=1e-4)
    capsys.readouterr()
    measure_trajectory.run(config)
    assert "up to date" in capsys.readouterr().out
    # A table that is not the one of the record, as after a kill between the two, is made again.
    csv = copy / "trajectory" / "trajectory.csv"
    whole = csv.read_bytes()
    csv.write_bytes(whole[:-30])
    measure_trajectory.run(config)
    assert csv.read_bytes() == whole
    with pytest.raises(ValueError, match="num_components=1: give 2 to"):
        measure_trajectory.run(dataclasses.replace(config, num_components=1))
    # Blocks are a matter of memory; two equal runs share their components.
    again = dataclasses.replace(config, block=5, also=str(shutil.copytree(copy, copy / "twin")))
    measure_trajectory.run(again)
    _, joint, _, [twin] = measure_trajectory.load(copy / "trajectory")
    np.testing.assert_allclose(twin, joint.scores[: steps.size], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(joint.explained, pca.explained, rtol=1e-3)
    np.testing.assert_allclose(np.abs(joint.scores), np.abs(pca.scores), rtol=1e-2, atol=1e-3)
    measure_trajectory.run(dataclasses.replace(config, all_outputs=True))
    assert measure_trajectory.load(copy / "trajectory").references == []


def test_some_checkpoints_first_and_the_rest_later(copy):
    steps = schedule(train_config(copy))
    before = hashes(copy / "llc", "*.nc")
    shutil.rmtree(copy / "llc")
    estimate_llc.run(llc_config(copy, checkpoints=f"{steps[-1]},{steps[1]}"))
    assert results.finished_steps(copy / "llc") == [steps[1], steps[-1]]
    with pytest.raises(ValueError, match="num_draws"):
        estimate_llc.run(llc_config(copy, name="other", num_draws=0))
    estimate_llc.run(llc_config(copy, name="other", checkpoints=f"{steps[0]}"))
    with pytest.raises(ValueError, match=r"checkpoints=\[12345\]: there are none"):
        estimate_llc.run(llc_config(copy, checkpoints="12345"))
    with pytest.raises(ValueError, match="checkpoints='1;2'"):
        estimate_llc.run(llc_config(copy, checkpoints="1;2"))
    estimate_llc.run(llc_config(copy))
    after = hashes(copy / "llc", "*.nc")
    assert after.keys() == before.keys()
    sweep = results.load_sweep(copy / "llc")
    assert list(sweep.checkpoint) == steps


def test_every_figure_is_drawn(copy):
    shutil.rmtree(copy / "figures")
    make_figures.run(dataclasses.replace(make_figures.PRESETS["smoke"], workdir=str(copy)))
    drawn = {p.stem for p in (copy / "figures").glob("*.png")}
    attention = {f"attention_{name}" for name in structure_figures.ATTENTION}
    assert drawn == attention | {
        "overview", "traces", "tokens", "curvature", "behavior", "structure", "trajectory",
        "slopes", "norms",
    }  # fmt: skip
    # What was not measured is not drawn, and not missed.
    for name in ("behavior", "trajectory", "llc/curvature"):
        shutil.rmtree(copy / name)
    found = workdir_results.load(make_figures.Config(workdir=str(copy)))
    assert set(make_figures.page(found)) == {"overview", "traces", "tokens"}
    assert set(make_figures.more(found)) == {"slopes"}


@pytest.mark.slow
def test_variations_of_the_settings(copy):
    config = dataclasses.replace(
        vary_llc.PRESETS["smoke"], workdir=str(copy), data_sizes="32", batch_sizes="16", seeds="3",
        num_checkpoints=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="no minibatch may be larger"):
        vary_llc.run(dataclasses.replace(config, batch_sizes="256"))
    with pytest.raises(ValueError, match="numbers separated by commas"):
        vary_llc.run(dataclasses.replace(config, seeds="0,x"))
    vary_llc.run(config)  # what was refused has left nothing behind
    folder = copy / "variations"
    lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    records = workdirs.read_jsonl(folder / "records.jsonl")
    assert len(records) == 1 + 1 + 2 + 2 + 1 + 5 + 1
    [dead] = [r for r in records if "diverge" in str(r["value"])]
    assert dead["llc"] is None
    assert "diverged" in dead["verdict"]
    [still] = [r for r in records if "do not move" in str(r["value"])]
    assert abs(still["llc"]) < 0.5

    # Every other record is what the library says at settings that differ in one place.
    model, task = setting(train_config(copy))
    step = schedule(train_config(copy))[-1]
    params = CheckpointDir(copy / "checkpoints").restore_params(step)
    mean, prefix = RegressionLoss(model), RegressionPrefixLoss(model)

    def estimate(loss=mean, num_data=config.num_data, seed=config.seed, batch_size=None, **more):
        return llc_jax.estimate_llc(
            jax.random.key(seed), loss, params,
            draw(task, num_data, config.data_seed), step=step,
            sampler=llc_jax.SGLD(config.step_size), nbeta=config.nbeta,
            localization=config.localization, num_chains=config.num_chains,
            num_draws=config.num_draws, num_burnin=config.num_burnin,
            batch_size=batch_size or config.batch_size, num_probes=0, **more,
        )  # fmt: skip

    other = draw(task, 64, config.data_seed + 1)
    there = estimate(collect=lambda params, batch: mean(params, other).mean())
    rise = there.collected[:, config.num_burnin :].mean() - float(mean(params, other).mean())
    expected = {
        ("num_data", 32): estimate(num_data=32).mean,
        ("batch_size", 16): estimate(batch_size=16).mean,
        ("evaluation", 0): estimate().mean,
        ("evaluation", 64): config.nbeta * rise,
        ("loss", "mean"): estimate().mean,
        ("loss", "random prefix"): estimate(prefix).mean,
        ("seed", 3): estimate(seed=3).mean,
    }
    found = {(r["what"], r["value"]): r["llc"] for r in records if "llc" in r and r["step"] == step}
    assert len(set(expected.values())) == len(expected) - 1  # only the base is there twice
    for what, value in expected.items():
        assert found[what] == pytest.approx(value, rel=1e-4), what
    [grid] = [r["grid"] for r in records if r["what"] == "grid"]
    assert [cell["nbeta"] for cell in grid] == pytest.approx([config.nbeta, 3 * config.nbeta])
    # Killed within a line: the rest is redone, and nothing else.
    (folder / "records.jsonl").write_text("".join(lines[:9]) + lines[9][:30])
    assert vary_llc.load(folder) == []  # unfinished: nothing to draw
    vary_llc.run(config)
    assert len(vary_llc.load(folder)) == len(lines)
    assert (folder / "records.jsonl").read_text() == "".join(lines)
    make_figures.run(dataclasses.replace(make_figures.PRESETS["smoke"], workdir=str(copy)))
    for name in ("variations", "grid", "failures"):
        assert (folder / f"{name}.png").stat().st_size > 0
        assert (copy / "figures" / f"{name}.png").stat().st_size > 0


@pytest.mark.slow
def test_calibration_of_a_run_proposes_a_command_that_runs(copy, capsys):
    config = dataclasses.replace(
        calibrate_sgld.PRESETS["smoke"], workdir=str(copy), step_fractions="0.4",
        nbeta_factors="1", localization_factors="1,3",
    )  # fmt: skip
    calibrate_sgld.run(config)
    folder, last = copy / "calibration", results.finished_steps(copy / "llc")[-1]
    found = files.read_json(folder / "calibration.json")
    assert found["step"] == last
    assert len((folder / "sweep.csv").read_text().splitlines()) == 1 + 2
    assert (folder / "sweep.png").stat().st_size > 0
    flags = dict(word[2:].split("=") for word in found["run"].split() if word.startswith("--"))
    assert float(flags["step_size"]) == pytest.approx(
        found["settings"]["sampler"]["step_size"], rel=0.01
    )
    # The proposal at every checkpoint, in a folder of its own.
    proposal = llc_config(
        copy, name=flags["name"], step_size=float(flags["step_size"]),
        localization=float(flags["localization"]), num_draws=4, num_burnin=2,
    )  # fmt: skip
    estimate_llc.run(proposal)
    assert last in results.finished_steps(copy / flags["name"])
    capsys.readouterr()
    calibrate_sgld.run(config)
    assert "up to date" in capsys.readouterr().out
    with pytest.raises(ValueError, match="step=12345: "):
        calibrate_sgld.run(dataclasses.replace(config, step=12345))


def test_second_run_changes_nothing(copy, capsys):
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()}
    quickstart.run(quickstart.Config(workdir=str(copy), preset="smoke"))
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()} == before
    assert capsys.readouterr().out.count("done") == 4


def test_same_command_same_bits(run, tmp_path):
    other = tmp_path / "other"
    train_regression.run(train_config(other))
    estimate_llc.run(llc_config(other))
    assert_same_run(run, other)
    assert hashes(run / "llc", "*.nc") == hashes(other / "llc", "*.nc")


def test_shards_add_up_to_the_whole(copy):
    whole = hashes(copy / "llc", "*.nc")
    shutil.rmtree(copy / "llc")
    estimate_llc.run(llc_config(copy, shard_checkpoints="1/2"))
    part = hashes(copy / "llc", "*.nc")
    assert list(part) == list(whole)[1::2]
    estimate_llc.run(llc_config(copy, shard_checkpoints="0/2"))
    assert hashes(copy / "llc", "*.nc") == whole


def test_resumed_chunks_are_the_chunks_they_were():
    steps = [0, 1, 2, 3, 4, 5, 6]
    assert run_loop.todo(steps, set(), 3, (0, 1)) == steps
    assert run_loop.todo(steps, {0, 1, 2, 3}, 3, (0, 1)) == [3, 4, 5, 6]
    assert run_loop.todo(steps, {6}, 3, (0, 2)) == [0, 1, 2]
    assert run_loop.todo(steps, set(), 3, (1, 2)) == [3, 4, 5]
    parts = [run_loop.todo(steps, set(), 2, (i, 3)) for i in range(3)]
    assert sorted(step for part in parts for step in part) == steps


def test_missing_result_is_recomputed_and_the_rest_left_alone(copy):
    whole = hashes(copy / "llc", "*.nc")
    times = {p.name: p.stat().st_mtime_ns for p in (copy / "llc").glob("*.nc")}
    gone = results.result_path(copy / "llc", 15)
    gone.unlink()
    estimate_llc.run(llc_config(copy))
    assert hashes(copy / "llc", "*.nc") == whole
    changed = {p.name for p in (copy / "llc").glob("*.nc") if p.stat().st_mtime_ns != times[p.name]}
    assert changed == {gone.name}


def test_damaged_checkpoint_is_redone_bitwise(run, copy, caplog):
    victim = next(p for p in (copy / "checkpoints/15/params").rglob("d/*") if p.is_file())
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    train_regression.run(train_config(copy))
    assert "15" in caplog.text
    assert "SHA-256" in caplog.text
    assert (copy / "checkpoints/15.corrupt").is_dir()
    assert_same_run(run, copy)


def test_run_whose_optimizer_states_are_gone_is_left_alone(copy):
    for folder in (copy / "checkpoints").glob("*/opt_state"):
        shutil.rmtree(folder)
    before = {p: files.digest([p]) for p in copy.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"none of the .* is whole: .*opt_state.*--workdir"):
        train_regression.run(train_config(copy))
    assert {p: files.digest([p]) for p in copy.rglob("*") if p.is_file()} == before


def test_sweep_leaves_out_a_damaged_checkpoint(copy):
    shutil.rmtree(copy / "llc")
    (copy / "checkpoints/15/manifest.json").write_text("{}")
    estimate_llc.run(llc_config(copy))
    steps = schedule(train_config(copy))
    assert results.finished_steps(copy / "llc") == [s for s in steps if s != 15]


@pytest.mark.parametrize(
    ("experiment", "config", "remedy"),
    [(train_regression, train_config, "--workdir"), (estimate_llc, llc_config, "--name")],
)
def test_changed_settings_are_refused(copy, experiment, config, remedy):
    with pytest.raises(ValueError, match=rf"seed: \d+ before, 77 now.*{remedy}"):
        experiment.run(config(copy, seed=77))


def test_what_bounds_memory_may_change(copy):
    record = files.read_json(copy / "llc/config.json")  # as it was when these were settings
    record["config"] |= {"chain_batch": 0, "grad_accum": 1, "checkpoint_batch": 1}
    files.write_json(copy / "llc/config.json", record)
    results.result_path(copy / "llc", 15).unlink()
    estimate_llc.run(llc_config(copy, chain_batch=1, grad_accum=2, checkpoint_batch=2))
    assert results.finished_steps(copy / "llc") == schedule(train_config(copy))


def test_estimates_go_on_with_the_data_they_were_begun_with(copy):
    path = copy / "llc/config.json"
    path.write_text(path.read_text().replace('"data_sha256": "', '"data_sha256": "0'))
    results.result_path(copy / "llc", 15).unlink()
    with pytest.raises(ValueError, match=r"the data set has SHA-256 .*--name"):
        estimate_llc.run(llc_config(copy))


@pytest.mark.parametrize("wrong", [{"learning_rate": 0.0}, {"block": 0}, {"num_heads": 3}])
def test_a_refused_run_leaves_nothing_to_contradict_the_next(tmp_path, wrong):
    with pytest.raises(ValueError, match=str(*wrong.values())):
        train_regression.run(train_config(tmp_path, **wrong))
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_the_report_is_that_of_the_last_name(copy):
    shutil.copytree(copy / "llc", copy / "other")
    results.result_path(copy / "other", 15).unlink()
    find_stages.run(find_stages.Config(str(copy), name="other"))
    pages = []
    for name in ("llc", "other", "llc"):
        make_report.run(make_report.Config(workdir=str(copy), preset="smoke", name=name))
        pages.append((copy / "results.csv").read_bytes())
    assert pages[0] == pages[2] != pages[1]


def test_empty_workdir(tmp_path):
    with pytest.raises(ValueError, match="holds no training run"):
        estimate_llc.run(llc_config(tmp_path))
    with pytest.raises(ValueError, match="no results"):
        find_stages.run(find_stages.Config(str(tmp_path)))


def test_unreadable_result(copy):
    path = results.result_path(copy / "llc", 15)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{path.name}.*delete it"):
        find_stages.run(find_stages.Config(str(copy), "smoke"))


@pytest.mark.parametrize("text", ["2/2", "a/b", "1", "-1/2", "1/0"])
def test_shard_syntax(copy, text):
    with pytest.raises(ValueError, match="i/n"):
        estimate_llc.run(llc_config(copy, shard_checkpoints=text))


def test_workdir_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="--workdir"):
        train_regression.run(train_config(tmp_path / "file"))


def test_one_writer_at_a_time(copy):
    with workdirs.lock(copy, "train"), pytest.raises(RuntimeError, match="another process"):
        train_regression.run(train_config(copy))


def test_full_disk_stops_cleanly_and_the_same_command_completes(copy, monkeypatch):
    whole = hashes(copy / "llc", "*.nc")
    for step in (15, 30):
        results.result_path(copy / "llc", step).unlink()
    real = os.fsync
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"no space left to write .*bytes free"):
        estimate_llc.run(llc_config(copy))
    monkeypatch.undo()
    left = hashes(copy / "llc", "*.nc")
    assert len(left) == len(whole) - 1
    assert left.items() <= whole.items()
    assert not list((copy / "llc").glob("*.tmp"))
    estimate_llc.run(llc_config(copy))
    assert hashes(copy / "llc", "*.nc") == whole


def test_torn_metrics_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert workdirs.read_jsonl(path) == [{"step": 1}, {"step": 2}]
    workdirs.rewind_jsonl(path, 1)
    assert path.read_text() == '{"step": 1}\n'


def test_command_reproduces_the_config():
    base = estimate_llc.PRESETS["smoke"]
    config = dataclasses.replace(base, workdir="a b", num_draws=7, seed=3)
    line = cli.command(config, estimate_llc.PRESETS)
    assert line == (
        "python -m experiments.estimate_llc --preset=smoke '--workdir=a b' --seed=3 --num_draws=7"
    )


def test_report_is_remade_when_the_estimates_change(copy):
    page = copy / "report.html"
    before = page.stat().st_mtime_ns
    results.result_path(copy / "llc", 30).unlink()
    find_stages.run(find_stages.Config(str(copy), "smoke"))
    make_report.run(make_report.Config(str(copy), "smoke"))
    assert page.stat().st_mtime_ns > before


def test_flags_reach_the_config_and_errors_are_one_line(tmp_path):
    text = finish(start("estimate_llc", f"--workdir={tmp_path}", "--num_draws=0"), expect=1)
    assert text.splitlines()[-1].startswith("ValueError: ")
    assert "Traceback" not in text
    text = finish(start("estimate_llc", "--num_drawz=3"), expect=1)
    assert "num_drawz" in text


SLOWED = ("--num_steps=400", "--block=5", "--num_log=12", "--num_linear=20")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill") / "uninterrupted"
    finish(start("train_regression", "--preset=smoke", f"--workdir={folder}", *SLOWED))
    finish(start("estimate_llc", "--preset=smoke", f"--workdir={folder}"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_kill_9_leaves_no_trace(uninterrupted, seed):
    """Training and the sweep, killed at a random moment and run again, end bitwise the same."""
    rng = np.random.default_rng(seed)
    folder = uninterrupted.with_name(f"killed-{seed}")
    train = ("train_regression", "--preset=smoke", f"--workdir={folder}", *SLOWED)
    sweep = ("estimate_llc", "--preset=smoke", f"--workdir={folder}")
    for command, watched in ((train, "checkpoints/*[0-9]/manifest.json"), (sweep, "llc/*.nc")):
        process = start(*command)
        some = int(rng.integers(1, 12))
        while len(list(folder.glob(watched))) < some and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "finished before the kill: slow it down"
        before = {p: p.stat().st_mtime_ns for p in folder.glob(watched)}
        finish(start(*command))
        assert {p: p.stat().st_mtime_ns for p in before} == before, "finished work was redone"
    assert hashes(folder / "llc", "*.nc") == hashes(uninterrupted / "llc", "*.nc")
    a, b = (f / "metrics.jsonl" for f in (folder, uninterrupted))
    assert a.read_bytes() == b.read_bytes()
    last = [CheckpointDir(f / "checkpoints").restore_params(400) for f in (folder, uninterrupted)]
    chex.assert_trees_all_equal(*last, strict=True)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_continues(uninterrupted):
    folder = uninterrupted.with_name("stopped")
    command = ("train_regression", "--preset=smoke", f"--workdir={folder}", *SLOWED)
    process = start(*command)
    while not (folder / "metrics.jsonl").exists() or not workdirs.read_jsonl(
        folder / "metrics.jsonl"
    ):
        time.sleep(0.01)
    process.terminate()
    assert "the same command continues" in finish(process, expect=128 + signal.SIGTERM)
    assert "continuing from step" in finish(start(*command))
    a, b = (f / "metrics.jsonl" for f in (folder, uninterrupted))
    assert a.read_bytes() == b.read_bytes()
    assert not (folder / "stopped").exists()
