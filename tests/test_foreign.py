"""Folders of steps that another program wrote: read as they are, and never changed."""

import logging
import shutil

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llc_jax.storage import orbax_steps
from llc_jax.storage.checkpoints import CheckpointDir, CheckpointError

TREE = {"w": np.arange(3.0, dtype=np.float32), "l": [np.ones(2), {"n": np.int32(7)}]}


def manage(folder, steps=(0, 100, 200), args=None, **options):
    args = args or ocp.args.StandardSave(TREE)
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(**options)) as manager:
        for step in steps:
            manager.save(step, args=args)
    return CheckpointDir(folder)


@pytest.fixture(scope="module")
def managed(tmp_path_factory):
    return manage(tmp_path_factory.mktemp("foreign") / "run").folder


@pytest.fixture
def folder(managed, tmp_path):
    shutil.copytree(managed, tmp_path / "run")
    return tmp_path / "run"


def everything(folder):
    return {
        path.relative_to(folder): (path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


def assert_read(params):
    np.testing.assert_array_equal(params["w"], TREE["w"])
    np.testing.assert_array_equal(params["l"][0], TREE["l"][0])
    assert params["l"][1]["n"] == 7
    assert type(params["w"]) is np.ndarray


def test_steps_of_a_manager_are_read_and_stay_as_they_are(folder, caplog):
    before = everything(folder)
    for writer in (False, True):
        directory = CheckpointDir(folder, writer=writer)
        assert directory.steps() == [0, 100, 200]
        assert directory.latest_good() == 200
        assert_read(directory.restore_params(np.int64(100)))
        assert "no manifest.json: written by another program?" in caplog.text
        assert "written by another program?" in directory.verify(100)[0]
        with pytest.raises(CheckpointError, match="optimizer state only by that program"):
            directory.restore_state({"a": np.zeros(1)})
    assert everything(folder) == before
    with ocp.CheckpointManager(folder) as manager:
        assert manager.all_steps() == [0, 100, 200]


@pytest.mark.parametrize(
    "options",
    [
        {"step_prefix": "ckpt"},
        {"step_format_fixed_length": 8},
        {"step_prefix": "model-2", "step_format_fixed_length": 4},
    ],
)
def test_names_of_steps_as_orbax_makes_them(tmp_path, options):
    directory = manage(tmp_path / "run", (7, 12), **options)
    (tmp_path / "run" / "logs_3").mkdir()
    assert directory.steps() == [7, 12]
    assert_read(directory.restore_params(12))
    with pytest.raises(CheckpointError, match=r"committed steps: \[7, 12\]"):
        directory.restore_params(3)


def test_items_and_plain_trees(tmp_path):
    both = ocp.args.Composite(
        params=ocp.args.StandardSave(TREE), opt_state=ocp.args.StandardSave({"m": np.ones(1)})
    )
    assert_read(manage(tmp_path / "both", (5,), both).restore_params(5))
    one = ocp.args.Composite(
        state=ocp.args.StandardSave(TREE), notes=ocp.args.JsonSave({"lr": 0.1})
    )
    assert_read(manage(tmp_path / "one", (5,), one).restore_params(5))
    two = ocp.args.Composite(a=ocp.args.StandardSave(TREE), b=ocp.args.StandardSave(TREE))
    with pytest.raises(CheckpointError, match="items a, b, none called params"):
        manage(tmp_path / "two", (5,), two).restore_params(5)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "plain" / "9", args=ocp.args.PyTreeSave(TREE))
    assert_read(CheckpointDir(tmp_path / "plain").restore_params(9))
    with pytest.raises(CheckpointError, match="is one checkpoint itself: open the folder it is in"):
        CheckpointDir(tmp_path / "plain" / "9").restore_params(9)


def test_weights_that_were_on_devices_come_as_numpy(tmp_path):
    args = ocp.args.StandardSave({"w": jnp.ones(2, jnp.bfloat16), "n": 3})
    params = manage(tmp_path / "run", (1,), args).restore_params(1)
    assert (type(params["w"]), params["w"].dtype) == (np.ndarray, jnp.bfloat16)
    assert params["n"] == 3


# A read that fails leaves a task of Orbax behind, collected after its event loop has gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["empty", "no metadata", "half of the data"])
def test_steps_half_copied_are_skipped_with_a_word(folder, caplog, how):
    """A copy without its marker was taken for a temporary and deleted in google/orbax issue 394,
    "If you copy checkpoints from HOME to gcs they can get deleted"; a step that was not whole
    stopped a run in AI-Hypercomputer/maxtext pull request 5260."""
    if how == "empty":
        shutil.rmtree(folder / "200")
        (folder / "200").mkdir()
    elif how == "no metadata":
        (folder / "200" / "default" / "_METADATA").unlink()
    else:
        for path in (folder / "200" / "default" / "d").iterdir():
            path.write_bytes(path.read_bytes()[:-20])
    before = everything(folder)
    directory = CheckpointDir(folder)
    assert directory.latest_good() == 100
    [warning] = [r.getMessage() for r in caplog.records if "is skipped" in r.getMessage()]
    assert "200" in warning
    assert "falling back from step 200 to step 100" in warning
    with pytest.raises(CheckpointError, match="200") as caught:
        directory.restore_params(200)
    assert len(str(caught.value)) <= 600
    assert_read(directory.restore_params(100))
    assert everything(folder) == before


def test_nothing_is_saved_among_the_steps_of_another_program(folder):
    before = everything(folder)
    directory = CheckpointDir(folder, writer=True)
    for step in (100, 300):
        with pytest.raises(FileExistsError, match=r"another program .* folder of your own"):
            directory.save(step, {"w": np.ones(1)}, ())
    assert everything(folder) == before


def test_a_foreign_step_among_ours_stays(tmp_path, folder, caplog):
    directory = CheckpointDir(tmp_path / "ours", writer=True)
    directory.save(1, {"w": np.ones(1)}, ())
    shutil.copytree(folder / "200", tmp_path / "ours" / "200")
    (tmp_path / "ours" / "300").write_text("a file")
    (tmp_path / "ours" / "400").mkdir()
    for name in ("manifest.json", "model.safetensors"):
        (tmp_path / "ours" / "400" / name).write_text("{}")
    before = everything(tmp_path / "ours")
    assert directory.latest_good() == 1
    for step in (200, 300, 400):
        with pytest.raises(CheckpointError):
            directory.restore_params(step)
        with pytest.raises(FileExistsError, match="another program"):
            directory.save(step, {"w": np.ones(1)}, ())
    assert everything(tmp_path / "ours") == before


def test_a_writer_removes_its_own_leftovers_only(tmp_path):
    """Only what the process itself wrote: Checkmk/checkmk pull request 566, "don't remove output of
    another instance"; google/orbax issue 647 has temporaries of other names."""
    theirs = ["12.tmp", "12.orbax-checkpoint-tmp-170", "a.tmp", "12.corrupt", "tmp"]
    for name in [*theirs, "12.llc_jax.tmp"]:
        (tmp_path / name / "params").mkdir(parents=True)
    CheckpointDir(tmp_path)
    assert (tmp_path / "12.llc_jax.tmp").exists()
    CheckpointDir(tmp_path, writer=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(theirs)


def test_ambiguous_folders_are_refused(folder):
    for name in ("0000100", "best_100", "last_100"):
        shutil.copytree(folder / "100", folder / name)
    with pytest.raises(CheckpointError, match="has step 100 twice"):
        CheckpointDir(folder).steps()
    for name in ("0000100", "0", "100", "200"):
        shutil.rmtree(folder / name)
    with pytest.raises(CheckpointError, match="several kinds, best_, last_"):
        CheckpointDir(folder).steps()


def test_other_folders_hold_no_steps(tmp_path):
    for name in ("exp_1", "exp_2", "7", "2024-01-05"):
        (tmp_path / name / "sub").mkdir(parents=True)
    assert orbax_steps.steps(tmp_path) == {}
    assert CheckpointDir(tmp_path).steps() == [7]
    with pytest.raises(CheckpointError, match=r"manifest.json is missing"):
        CheckpointDir(tmp_path).restore_params(7)


@pytest.fixture(autouse=True)
def only_our_log(caplog):
    caplog.set_level(logging.WARNING, logger="llc_jax")
