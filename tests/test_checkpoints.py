"""Checkpoints: the published schedule, bitwise round trips, and every fault that was thought of."""

import errno
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llc_jax.storage import manifests, pytrees
from llc_jax.storage.checkpoints import CheckpointDir, CheckpointError, checkpoint_steps

OPTIMIZER = optax.adam(optax.linear_schedule(1e-2, 1e-3, 10))


def params_at(step):
    rng = np.random.default_rng(step)
    return {
        "layer": {"kernel": rng.normal(size=(40, 50)).astype(np.float32), "bias": np.zeros(7)},
        "scale": np.asarray(rng.normal(size=3), jnp.bfloat16),
    }


def opt_state_at(step):
    params = params_at(step)
    state = OPTIMIZER.init(params)
    return jax.device_get(
        jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), state)  # counts and moments move
    )


def assert_bitwise(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(x, np.ndarray)
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert x.tobytes() == y.tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    directory = CheckpointDir(folder, writer=True)
    for step in (0, 10, 20):
        directory.save(step, params_at(step), opt_state_at(step))
    return folder


@pytest.fixture
def directory(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return CheckpointDir(tmp_path / "checkpoints")


def data_files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_bit(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def names(directory):
    return sorted(path.name for path in directory.folder.iterdir())


# Schedule


def test_schedule_holds_the_published_steps():
    steps = checkpoint_steps(500_000, 100, 100)
    assert len(steps) == 191
    assert steps[:10] == list(range(10))
    assert {1465, 40404, 126262, 318181, 499_999, 500_000} <= set(steps)
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("arguments", [(1, 0, 0), (7, 3, 0), (1000, 0, 11), (1000, 20, 20)])
def test_schedule_starts_at_zero_and_ends_at_the_last_step(arguments):
    steps = checkpoint_steps(*arguments)
    assert (steps[0], steps[-1]) == (0, arguments[0])
    assert all(type(step) is int for step in steps)
    if arguments[1:] == (0, 11):
        assert steps == list(range(0, 1001, 100))


@pytest.mark.parametrize("arguments", [(0, 1, 1), (10, -1, 1), (10, 1, -1), (1.5, 1, 1)])
def test_bad_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match="give an integer of at least"):
        checkpoint_steps(*arguments)


# Round trips


def test_round_trip_is_bitwise_with_named_tuples(directory):
    assert directory.steps() == [0, 10, 20]
    assert directory.latest_good() == 20
    template = jax.eval_shape(OPTIMIZER.init, params_at(0))
    step, params, opt_state = directory.restore_state(template)
    assert step == 20
    assert_bitwise(params, params_at(20))
    assert_bitwise(opt_state, opt_state_at(20))
    assert type(opt_state[0]) is optax.ScaleByAdamState
    assert_bitwise(directory.restore_state(template, 10)[2], opt_state_at(10))
    params = directory.restore_params(10)
    assert type(params) is dict
    assert type(params["layer"]) is dict
    assert_bitwise(params, params_at(10))


def test_device_arrays_are_saved_too(tmp_path):
    directory = CheckpointDir(tmp_path, writer=True)
    params = {"w": jnp.arange(3.0)}
    directory.save(5, params, OPTIMIZER.init(params))
    assert_bitwise(directory.restore_params(5), {"w": np.arange(3, dtype=np.float32)})


def test_committed_steps_are_never_overwritten(directory):
    before = {path: path.read_bytes() for path in data_files(directory.folder)}
    with pytest.raises(FileExistsError, match="committed already"):
        directory.save(10, params_at(1), opt_state_at(1))
    assert before == {path: path.read_bytes() for path in data_files(directory.folder)}


def test_optimizer_state_of_another_run_is_refused(directory):
    with pytest.raises(ValueError, match="another structure"):
        directory.restore_state(optax.sgd(0.1).init(params_at(0)))
    wide = {**params_at(0), "scale": jnp.zeros(4, jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"does not fit.*scale.*\(4,\).*\(3,\)"):
        directory.restore_state(OPTIMIZER.init(wide))


def test_missing_steps_are_named(directory, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint .*15.*\[0, 10, 20\]"):
        directory.restore_params(15)
    with pytest.raises(ValueError, match="step -1"):
        directory.restore_params(-1)
    empty = CheckpointDir(tmp_path / "nothing")
    assert empty.steps() == []
    assert empty.latest_good() is None
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        empty.restore_state(opt_state_at(0))
    assert not empty.folder.exists()


# Damage


def test_one_flipped_bit_in_any_file_is_found(directory):
    rng = np.random.default_rng(0)
    files = data_files(directory.folder / "20")
    assert len(files) > 10
    for path in files:
        for position in {0, path.stat().st_size - 1, int(rng.integers(path.stat().st_size))}:
            bit = int(rng.integers(8))
            flip_bit(path, position, bit)
            (problem,) = directory.verify(20)
            assert problem.startswith(path.relative_to(directory.folder / "20").as_posix())
            flip_bit(path, position, bit)
            assert directory.verify(20) == []


def test_every_byte_of_the_manifest_counts(directory):
    path = directory.folder / "20" / "manifest.json"
    for position in range(0, path.stat().st_size, 7):
        flip_bit(path, position, position % 8)
        assert directory.verify(20), position
        flip_bit(path, position, position % 8)


def test_manifest_of_another_step_is_found(directory):
    shutil.copytree(directory.folder / "10", directory.folder / "30")
    assert directory.verify(30) == ["manifest.json belongs to step 10"]


@pytest.mark.parametrize("text", ["", "[]", "{", "1", '{"sha256": 1}', '{"a": "\ud800"}'])
def test_nonsense_manifests_are_damage(directory, text):
    (directory.folder / "20" / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert len(directory.verify(20)) == 1


def break_step(folder, how):
    data = max(data_files(folder / "params"), key=lambda path: path.stat().st_size)
    if how == "flip":
        flip_bit(data, 100)
    elif how == "truncate":
        os.truncate(data, data.stat().st_size // 2)
    elif how == "empty file":
        os.truncate(data, 0)
    elif how == "missing file":
        data.unlink()
    elif how == "extra file":
        (folder / "params" / "extra").write_text("x")
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "link":
        data.rename(folder.parent / "elsewhere")
        data.symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("flip", "its content changed"),
        ("truncate", r"has \d+ bytes instead of \d+"),
        ("empty file", "has 0 bytes"),
        ("missing file", "is missing"),
        ("extra file", "params/extra is not in the manifest"),
        ("no manifest", "manifest.json is missing"),
        ("empty folder", "manifest.json is missing"),
        ("link", "is not a regular file"),
    ],
)
def test_damaged_newest_step_is_skipped_and_the_previous_one_used(directory, caplog, how, message):
    break_step(directory.folder / "20", how)
    step, params, _ = directory.restore_state(opt_state_at(0))
    assert step == 10
    assert_bitwise(params, params_at(10))
    assert directory.steps() == [0, 10, 20]  # reading renames nothing
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert re.search(message, warning)
    assert "falling back from step 20 to step 10" in warning


def test_hidden_files_of_file_managers_are_not_damage(directory):
    (directory.folder / "20" / "params" / ".DS_Store").write_text("x")
    (directory.folder / "notes.txt").write_text("x")
    (directory.folder / "07").mkdir()
    assert directory.steps() == [0, 10, 20]
    assert directory.latest_good() == 20


def test_damage_is_found_before_orbax_reads(directory, monkeypatch):
    monkeypatch.setattr(pytrees, "restore", lambda *_: pytest.fail("read bad files"))
    for step, how in ((20, "flip"), (10, "truncate")):
        break_step(directory.folder / str(step), how)
        with pytest.raises(CheckpointError, match=f"checkpoint .*{step} is damaged: params/"):
            directory.restore_params(step)
    assert names(directory) == ["0", "10", "20"]


def test_params_need_only_their_own_files(directory):
    data = max(data_files(directory.folder / "20/opt_state"), key=lambda path: path.stat().st_size)
    flip_bit(data, 50)
    assert_bitwise(directory.restore_params(20), params_at(20))
    assert directory.restore_state(opt_state_at(0))[0] == 10


def test_quarantine_names_are_unique(directory, caplog):
    (directory.folder / "20.corrupt").mkdir()
    (directory.folder / "20.corrupt.1").mkdir()
    break_step(directory.folder / "20", "flip")
    before = hashlib.sha256((directory.folder / "20/manifest.json").read_bytes()).digest()
    writer = CheckpointDir(directory.folder, writer=True)
    writer.save(20, params_at(20), opt_state_at(20))
    aside = directory.folder / "20.corrupt.2" / "manifest.json"
    assert hashlib.sha256(aside.read_bytes()).digest() == before
    assert "20.corrupt.2" in caplog.text


@pytest.mark.parametrize("how", ["flip", "no manifest", "empty folder"])
def test_damaged_step_can_be_saved_again_by_its_writer(directory, caplog, how):
    break_step(directory.folder / "20", how)
    with pytest.raises(FileExistsError, match=r"damaged; CheckpointDir\(folder, writer=True\)"):
        directory.save(20, params_at(20), opt_state_at(20))
    assert names(directory) == ["0", "10", "20"]
    CheckpointDir(directory.folder, writer=True).save(20, params_at(20), opt_state_at(20))
    assert directory.latest_good() == 20
    assert "20.corrupt" in names(directory)


def test_nothing_left_is_an_error(directory, caplog):
    for step in directory.steps():
        break_step(directory.folder / str(step), "flip")
    with pytest.raises(CheckpointError, match="all 3 checkpoints in"):
        directory.latest_good()
    assert "no older step is left" in caplog.text


def test_quarantine_where_renaming_is_forbidden(directory, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    break_step(directory.folder / "20", "flip")
    writer = CheckpointDir(directory.folder, writer=True)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match=r"cannot set damaged step 20 in .* aside: Read-only"):
        writer.save(20, params_at(20), opt_state_at(20))
    assert names(directory) == ["0", "10", "20"]


def test_unreadable_but_intact_files_are_explained(directory):
    # A commit by a future format: right hashes, contents that this Orbax does not understand.
    shutil.rmtree(directory.folder / "20" / "params")
    (directory.folder / "20" / "params").mkdir()
    (directory.folder / "20" / "params" / "_METADATA").write_text("not json")
    (directory.folder / "20" / "manifest.json").unlink()
    manifests.write_manifest(directory.folder / "20", 20)
    with pytest.raises(CheckpointError, match=r"intact but Orbax [\d.]+ cannot read them"):
        directory.restore_params(20)
    assert directory.steps() == [0, 10, 20]


# Failing and killed saves

KILLED_SAVE = """
    import pathlib, sys, time
    import numpy as np
    from llc_jax.storage import checkpoints
    from llc_jax.storage import pytrees as trees

    folder, hook = sys.argv[1:]
    directory = checkpoints.CheckpointDir(folder, writer=True)
    params, opt_state = {"w": np.ones(1000, np.float32)}, (np.zeros(3, np.float32),)
    directory.save(1, params, opt_state)
    owner = {"save": trees, "rename": checkpoints.os}
    original = getattr(owner[hook], hook)

    def sleep_in(path, *rest):
        if hook == "save" and path.name == "params":
            return original(path, *rest)
        if hook == "rename" and not str(path).endswith("2.llc_jax.tmp"):
            return original(path, *rest)  # Orbax renames as well
        pathlib.Path(folder, "asleep").touch()
        time.sleep(600)

    setattr(owner[hook], hook, sleep_in)
    directory.save(2, params, opt_state)
"""


@pytest.mark.parametrize("hook", ["save", "rename"])
def test_kill_during_a_save_leaves_the_previous_step(tmp_path, hook):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED_SAVE), str(tmp_path), hook],
        cwd=pathlib.Path(__file__).parents[1],
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "asleep").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (tmp_path / "asleep").unlink()
    assert any((tmp_path / "2.llc_jax.tmp" / "params").iterdir())
    assert (tmp_path / "2.llc_jax.tmp" / "manifest.json").exists() == (hook == "rename")
    reader = CheckpointDir(tmp_path)
    assert reader.steps() == [1]
    assert reader.latest_good() == 1
    assert names(reader) == ["1", "2.llc_jax.tmp"]  # a reader leaves a save under way alone
    writer = CheckpointDir(tmp_path, writer=True)
    assert names(writer) == ["1"]
    params = {"w": np.zeros(2, np.float32)}
    writer.save(2, params, params)
    assert_bitwise(writer.restore_params(2), params)


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device"),
    ],
)
def test_full_disk_is_one_clean_error(directory, monkeypatch, failure):
    original = pytrees.save

    def fill_up(path, tree):
        original(path, tree)
        if path.name == "opt_state":
            raise failure

    monkeypatch.setattr(pytrees, "save", fill_up)
    with pytest.raises(OSError, match=r"no space left to save step 30.*bytes are free") as caught:
        directory.save(30, params_at(30), opt_state_at(30))
    assert caught.value.errno == errno.ENOSPC
    assert str(directory.folder) in str(caught.value)
    assert names(directory) == ["0", "10", "20"]
    assert all(directory.verify(step) == [] for step in directory.steps())
    monkeypatch.undo()
    directory.save(30, params_at(30), opt_state_at(30))
    assert directory.latest_good() == 30


def test_failure_at_the_rename_leaves_nothing_behind(directory, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(pytrees, "save", lambda path, tree: path.mkdir())
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match=r"cannot save step 30 in .*Read-only") as caught:
        directory.save(30, {"w": np.ones(1)}, ())
    assert caught.value.errno == errno.EROFS
    assert names(directory) == ["0", "10", "20"]


def test_unsaveable_arguments_are_not_disguised_as_disk_errors(directory):
    with pytest.raises(ValueError, match=r"params\['w'\] is a object"):
        directory.save(30, {"w": object()}, ())
    assert names(directory) == ["0", "10", "20"]


def test_folder_that_is_a_file_is_refused_on_open(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "checkpoints"):
        with pytest.raises(OSError, match=r"cannot open the checkpoint folder .*file"):
            CheckpointDir(folder, writer=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_write_permission_is_refused(directory):
    directory.folder.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="cannot save step 30"):
            directory.save(30, params_at(30), opt_state_at(30))
    finally:
        directory.folder.chmod(0o700)


def test_manifest_lists_all_files_with_versions(directory):
    folder = directory.folder / "20"
    content = json.loads((folder / "manifest.json").read_text())
    found = {path.relative_to(folder).as_posix() for path in data_files(folder)}
    assert set(content["files"]) == found - {"manifest.json"}
    assert content["versions"]["jax"] == jax.__version__
    assert content["step"] == 20
    for name, entry in content["files"].items():
        assert entry["size"] == (folder / name).stat().st_size


def test_listing_and_verifying_do_not_import_orbax(directory):
    code = (
        "import sys; from llc_jax.storage.checkpoints import CheckpointDir;"
        f"d = CheckpointDir({str(directory.folder)!r});"
        "assert d.steps() == [0, 10, 20] and d.latest_good() == 20;"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('orbax', 'tensorstore')]"
    )
    root = pathlib.Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
