"""Several processes at work on one run, over loopback: the numbers of one, and no one left behind.

Two processes have two devices each where there are two cores, this one has four.
"""

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

from experiments import estimate_llc, problems, quickstart, train_language, train_regression
from experiments import workdir as workdirs
from llc_jax.storage import results
from llc_jax.storage.checkpoints import CheckpointDir

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) != 2 or jax.device_count() != 4,
    reason="needs two cores, so that two processes have the four devices of this one",
)
LONG = {"num_steps": 300, "block": 5, "num_log": 4, "num_linear": 3}


def pod(module, config):
    """Two processes that run an experiment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = [
        f"--{name}={value}"
        for name, value in dataclasses.asdict(config).items()
        if name not in ("multihost", "coordinator", "num_processes", "process_id")
    ]
    command = [sys.executable, "-m", f"experiments.{module}", *flags, "--multihost",
               f"--coordinator={address}", "--num_processes=2"]  # fmt: skip
    return [
        subprocess.Popen(
            [*command, f"--process_id={i}"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip


def finish(processes, expect=0):
    """What each said, after it ended with the status that is expected; kills them if they hang."""
    try:
        said = ["".join(process.communicate(timeout=600)) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, text in zip(processes, said, strict=True):
        assert expect is None or process.returncode == expect, text
    return said


def smoke(root):
    return dataclasses.replace(train_regression.PRESETS["smoke"], workdir=str(root))


def text(root):
    """On a file of text, whose batches each process reads its part of."""
    root.mkdir()
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(60)]
    documents = [" ".join(rng.choice(words, 80)) for _ in range(80)]
    (root / "corpus.txt").write_text("<|endoftext|>".join(documents))
    return dataclasses.replace(
        train_language.PRESETS["smoke"], workdir=str(root / "run"), data=str(root / "corpus.txt"),
        tokenizer="280", context=16, batch_size=16, num_steps=40, block=10, num_log=4,
        num_linear=2,
    )  # fmt: skip


def steps_of(config):
    return CheckpointDir(pathlib.Path(config.workdir) / "checkpoints").steps()


def weights(config):
    kept = CheckpointDir(pathlib.Path(config.workdir) / "checkpoints")
    return {step: kept.restore_params(step) for step in kept.steps()}


def losses(config):
    """Of every checkpoint on the same sequences, one by one."""
    run = problems.of_run(config.workdir)
    data, loss_fn = run.sample(16, 0), jax.jit(run.loss_fn)
    return {step: loss_fn(params, data) for step, params in weights(config).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "make"), [(train_language, text), (train_regression, smoke)],
    ids=["text", "regression"],
)  # fmt: skip
def test_two_processes_train_like_one(tmp_path, experiment, make):
    """The same batches, the same course: only the order of sums over devices differs.

    Losses are compared, not weights: the bias of keys has no gradient, and Adam makes steps of the
    rounding of zero.
    """
    one = make(tmp_path / "one")
    experiment.run(one)
    two = dataclasses.replace(one, workdir=str(tmp_path / "two"))
    finish(pod(experiment.__name__.rpartition(".")[2], two))
    expected, found = losses(one), losses(two)
    assert expected.keys() == found.keys()
    for step in expected:
        np.testing.assert_allclose(found[step], expected[step], rtol=2e-5, err_msg=str(step))
    lines = [workdirs.read_jsonl(pathlib.Path(c.workdir) / "metrics.jsonl") for c in (one, two)]
    for a, b in zip(*lines, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


def test_two_processes_get_the_numbers_of_one(tmp_path):
    """Chains over devices of two processes: bitwise."""
    trained = dataclasses.replace(smoke(tmp_path / "run"), num_log=2, num_linear=2)
    train_regression.run(trained)
    one = dataclasses.replace(estimate_llc.PRESETS["smoke"], workdir=trained.workdir)
    estimate_llc.run(one)
    finish(pod("estimate_llc", dataclasses.replace(one, name="llc-pod")))
    expected, found = (
        results.load_sweep(pathlib.Path(one.workdir) / name) for name in ("llc", "llc-pod")
    )
    assert found.checkpoint.values.tolist() == steps_of(trained)
    for name in ("llc", "losses", "anchor_losses", "distance", "acceptance"):
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_the_same_command_continues(tmp_path):
    config = dataclasses.replace(smoke(tmp_path / "stopped"), **LONG)
    processes = pod("train_regression", config)
    metrics = pathlib.Path(config.workdir) / "metrics.jsonl"
    while not (metrics.exists() and workdirs.read_jsonl(metrics)):
        if any(process.poll() is not None for process in processes):
            finish(processes)  # shows why
        time.sleep(0.01)
    processes[1].terminate()
    said = finish(processes, expect=128 + signal.SIGTERM)
    assert "the same command continues" in said[0]
    said = finish(pod("train_regression", config))
    assert "continuing from step" in said[0]
    whole = dataclasses.replace(config, workdir=str(tmp_path / "whole"))
    finish(pod("train_regression", whole))
    chex.assert_trees_all_equal(weights(whole)[300], weights(config)[300])


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(tmp_path):
    """Process 0 alone compares the settings with those that the run began with."""
    config = smoke(tmp_path / "run")
    train_regression.run(config)
    processes = pod("train_regression", dataclasses.replace(config, seed=7))
    said = finish(processes, expect=None)
    assert "was begun with other settings (seed: 1 before, 7 now)" in said[0]
    assert all(process.returncode for process in processes)


@pytest.mark.slow
def test_the_whole_flow_on_two_processes(tmp_path):
    """Process 0 does alone what cannot be shared, after the other has left."""
    config = quickstart.Config(workdir=str(tmp_path / "run"), preset="smoke")
    said = finish(pod("quickstart", config))
    assert "open" in said[0]
    assert (tmp_path / "run" / "report.html").exists()
    assert results.finished_steps(tmp_path / "run" / "llc") == steps_of(config)
