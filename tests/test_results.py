"""Estimates survive the disk bit for bit, and bad files are named."""

import dataclasses
import errno
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray

import llc_jax
from llc_jax.storage import files, results


def quadratic(params, batch):
    return 0.5 * jnp.sum(params["w"] ** 2) + 0.0 * batch


def estimates(num_burnin):
    return llc_jax.estimate_llc_over_checkpoints(
        jax.random.key(0),
        quadratic,
        {0: {"w": jnp.zeros(3)}, 700: {"w": jnp.ones(3)}},
        jnp.zeros(8),
        sampler=llc_jax.SGLD(1e-2),
        localization=1.0,
        nbeta=10.0,
        num_draws=12,
        num_burnin=num_burnin,
    )


@pytest.mark.parametrize("num_burnin", [0, 5])
def test_round_trip(tmp_path, num_burnin):
    kept = dict(estimates(num_burnin))
    for step, estimate in kept.items():
        results.save_estimate(tmp_path, step, estimate, {"origin": "a λ test"})
    sweep = results.load_sweep(tmp_path)
    assert sweep.checkpoint.values.tolist() == [0, 700] == results.finished_steps(tmp_path)
    assert sweep.attrs["origin"] == "a λ test"
    assert sweep.attrs["nbeta"] == 10.0
    for step, estimate in kept.items():
        one = sweep.sel(checkpoint=step)
        for name in ("losses", "anchor_losses", "burnin_losses", "distance", "per_chain"):
            np.testing.assert_array_equal(one[name], getattr(estimate, name))
        assert one.llc == estimate.mean
        assert one.stderr == estimate.stderr
        assert one.verdict == estimate.verdict
        assert str(one.warnings.values) == "\n".join(estimate.warnings)


def test_equal_results_are_equal_bytes(tmp_path):
    for folder in ("a", "b"):
        for step, estimate in estimates(5):
            results.save_estimate(tmp_path / folder, step, estimate, {})
    for step in (0, 700):
        a, b = (results.result_path(tmp_path / f, step).read_bytes() for f in ("a", "b"))
        assert a == b


def test_only_result_files_count(tmp_path):
    (tmp_path / "notes.nc").write_text("")
    (tmp_path / ".000000001.nc.77.tmp").write_text("")
    assert results.finished_steps(tmp_path) == []
    with pytest.raises(ValueError, match="no results"):
        results.load_sweep(tmp_path)


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomic(path, "old")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="bytes free") as caught:
        files.write_atomic(path, "new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_digest_tells_parts_apart(tmp_path):
    assert files.digest([b"ab", b"c"]) != files.digest([b"a", b"bc"])
    assert files.digest([tmp_path / "none"]) == files.digest([b"absent"])


def test_bad_json_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON"):
        files.read_json(tmp_path / "x.json")


def test_llc_of_a_window_of_draws(tmp_path):
    for step, estimate in estimates(5):
        results.save_estimate(tmp_path, step, estimate, {})
    sweep = results.load_sweep(tmp_path)
    after = results.llc_between(sweep, 5, 17)
    # All losses at the anchor are equal here, so that paired and unpaired estimates agree.
    np.testing.assert_allclose(after, sweep.per_chain, rtol=1e-5)
    whole = results.llc_between(sweep, 0, 17)
    burnin = results.llc_between(sweep, 0, 5)
    np.testing.assert_allclose(17 * whole, 5 * burnin + 12 * after, rtol=1e-5)
    # The first draw is the anchor itself.
    np.testing.assert_allclose(results.llc_between(sweep, 0, 1), 0.0, atol=1e-5)
    with pytest.raises(ValueError, match="draws 3 to 18"):
        results.llc_between(sweep, 3, 18)


def test_published_init_adds_a_ramp_over_chains(tmp_path):
    """Mean and spread of what is added, for C chains: nβ ℓ (C - 1) / 2C and nβ ℓ times that of
    1/C, 2/C, ... 1, the formulas of the published curve's excess."""
    for step, estimate in estimates(5):
        results.save_estimate(tmp_path, step, estimate, {})
    sweep = results.load_sweep(tmp_path)
    added = results.llc_with_published_init(sweep) - sweep.per_chain
    count, scale = sweep.sizes["chain"], sweep.attrs["nbeta"] * sweep.init_loss
    np.testing.assert_allclose(added.mean("chain"), scale * (count - 1) / (2 * count), rtol=1e-12)
    spread = np.sqrt((count + 1) / (12 * count))  # with one degree of freedom taken
    np.testing.assert_allclose(added.std("chain", ddof=1), scale * spread, rtol=1e-12)
    # The chain that ran last saw all others: it alone has the right loss.
    np.testing.assert_array_equal(added.isel(chain=-1), 0.0)


@functools.cache
def estimate(**options):
    """A small estimate; what it is called with is in its settings."""
    options = {"nbeta": 10.0, "num_draws": 12, "num_burnin": 5, "localization": 1.0, **options}
    return llc_jax.estimate_llc(
        jax.random.key(0), quadratic, {"w": jnp.zeros(3)}, jnp.zeros(8),
        sampler=llc_jax.SGLD(1e-2), num_probes=0, **options,
    )  # fmt: skip


def parts(params, batch):
    return jnp.stack([quadratic(params, batch), batch], axis=1)


def collect(params, batch):
    w = params["w"]
    return {
        "w": w,
        "layer/norm": jnp.linalg.norm(w),
        "many": (jnp.sum(w > 0), w > 0, w.astype(jnp.bfloat16)),
        "count": jnp.uint32(4_000_000_000) + jnp.zeros((), jnp.uint32),
        "nothing": jnp.zeros((0, 2)),
    }


def with_collected(made, values):
    observed = made.observed["collected"]._replace(values=values)
    return dataclasses.replace(made, observed={"collected": observed})


def test_what_collect_recorded_is_kept(tmp_path):
    """All of it, burn-in included, by the paths of the leaves, and in the same dtypes."""
    made = estimate(collect=collect)
    dataset = made.to_xarray()
    results.save_estimate(tmp_path, 3, made, {})
    loaded = results.load_sweep(tmp_path).isel(checkpoint=0)
    expected = {
        "collected.w": made.collected["w"],
        "collected.layer/norm": made.collected["layer/norm"],
        "collected.many.0": made.collected["many"][0],
        "collected.many.1": made.collected["many"][1],
        "collected.many.2": made.collected["many"][2],
        "collected.count": made.collected["count"],
    }
    assert {name for name in dataset if name.startswith("collected")} == set(expected)
    for name, values in expected.items():
        for found in (dataset[name], loaded[name]):
            assert found.dims[:2] == ("chain", "all_draws")
            assert found.dtype == values.dtype
            np.testing.assert_array_equal(found, values)
    assert dataset["collected.w"].shape == (4, 17, 3)
    alone = with_collected(made, made.collected["w"])
    np.testing.assert_array_equal(alone.to_xarray()["collected"], made.collected["w"])
    same = {"a.b": made.collected["w"], "a": {"b": made.collected["count"]}}
    both = with_collected(made, same).to_xarray()
    np.testing.assert_array_equal(both["collected.a.b"], made.collected["count"])
    np.testing.assert_array_equal(both["collected.a.b_"], made.collected["w"])


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.ones((4, 17)) * 1j, "'collected.x' has dtype complex128"),
        (np.full((4, 17), 2**60), "'collected.x' has int64 values"),
        (np.zeros((4, 17), "M8[ns]"), "'collected.x' has dtype datetime64"),
    ],
)
def test_what_no_file_can_hold_is_refused_by_name(tmp_path, leaf, message):
    made = with_collected(estimate(collect=collect), {"x": leaf})
    with pytest.raises(ValueError, match=message):
        results.save_estimate(tmp_path / "new", 3, made, {})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("num_burnin", [0, 5])
def test_a_dataset_of_an_estimate_can_be_written_by_xarray_alone(tmp_path, num_burnin):
    """pydata/xarray issue 10310 and scipy/scipy issue 8153: files with a length of 0."""
    made = estimate(num_burnin=num_burnin)
    made.to_xarray().to_netcdf(tmp_path / "x.nc", engine="scipy")
    with xarray.open_dataset(tmp_path / "x.nc", engine="scipy") as found:
        np.testing.assert_array_equal(found.losses, made.losses)
        assert ("burnin_losses" in found) == bool(num_burnin)
        assert 0 not in found.sizes.values()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_draws": 20}, "num_draws 12 and 20"),
        ({"num_burnin": 7}, "num_burnin 5 and 7"),
        ({"num_burnin": 0}, "num_burnin 5 and 0"),
        ({"num_chains": 3}, "num_chains 4 and 3"),
        ({"nbeta": 20.0}, "nbeta 10.0 and 20.0"),
        ({"localization": 2.0}, "localization 1.0 and 2.0"),
        ({"parts_fn": parts}, "only one has parts; only one has parts_stderr"),
        ({"collect": collect}, "only one has collected.count"),
    ],
)
def test_two_kinds_in_one_folder_are_named(tmp_path, other, message):
    """pydata/xarray issue 443, "multiple files - variable X not equal across datasets": the error
    names the variable, and neither the files nor what differs."""
    results.save_estimate(tmp_path, 1, estimate(), {})
    results.save_estimate(tmp_path, 2, estimate(), {})
    results.save_estimate(tmp_path, 30, estimate(**other), {})
    with pytest.raises(ValueError, match=message) as caught:
        results.load_sweep(tmp_path)
    for part in ("000000001.nc", "000000030.nc", "folder of its own"):
        assert part in str(caught.value)
    assert len(str(caught.value)) <= 600


def test_observables_of_two_shapes_are_named(tmp_path):
    made = estimate(collect=collect)
    for step, width in ((1, 3), (2, 2)):
        collected = made.collected["w"][..., :width]
        changed = with_collected(made, collected)
        results.save_estimate(tmp_path, step, changed, {})
    with pytest.raises(ValueError, match=r"collected has .*'collected_0': 3.*'collected_0': 2"):
        results.load(tmp_path, "estimate_llc")
    results.save(tmp_path, 1, xarray.Dataset({"v": ("x", [1.0])}, coords={"x": [1]}))
    results.save(tmp_path, 2, xarray.Dataset({"v": ("x", [1.0])}, coords={"x": [2]}))
    with pytest.raises(ValueError, match="values along x"):
        results.load(tmp_path, "measure_behavior")
    (tmp_path / "000000002.nc").unlink()
    with pytest.raises(ValueError, match="other results than estimates"):
        results.load_sweep(tmp_path)


def test_values_need_the_one_nbeta_of_their_checkpoints(tmp_path):
    """Gathered by hand, not by `load_sweep`."""
    both = [estimate(nbeta=nbeta).to_xarray() for nbeta in (10.0, 20.0)]
    sweep = xarray.concat(both, "checkpoint", combine_attrs="drop_conflicts", data_vars="all")
    for use in (
        lambda: results.llc_between(sweep, 0, 3),
        lambda: results.llc_with_published_init(sweep),
    ):
        with pytest.raises(ValueError, match="no attribute nbeta"):
            use()
    sweep.attrs["nbeta"] = 10.0
    with pytest.raises(ValueError, match=r"first 0.5"):
        results.llc_between(sweep, 0.5, 3)


@pytest.mark.parametrize(
    "step", [7, np.int64(7), jnp.int32(7), np.uint8(7), 2**31, 10**12, 2**53 - 1]
)
def test_any_whole_step_comes_back(tmp_path, step):
    """SciTools/iris issue 6178 lost 64-bit numbers in a file of 32-bit ones, without a word."""
    results.save_estimate(tmp_path, step, estimate(), {})
    results.save_estimate(tmp_path, 3, estimate(), {})
    assert results.finished_steps(tmp_path) == [3, int(step)]
    sweep = results.load_sweep(tmp_path)
    assert sweep.checkpoint.values.tolist() == [3, int(step)]
    assert sweep.checkpoint.dtype.kind == "i"
    assert sweep.sel(checkpoint=int(step)).llc == estimate().mean


@pytest.mark.parametrize("step", ["7", 7.0, -1, True, None, 2**53, np.array([7]), np.float32(7)])
def test_other_steps_are_refused_before_anything_is_written(tmp_path, step):
    with pytest.raises(ValueError, match=r"step .*whole number"):
        results.save_estimate(tmp_path / "new", step, estimate(), {})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("provenance", "message"),
    [
        ({"nbeta": 3.0}, "'nbeta' is the name of a setting"),
        ({"losses": "x"}, "'losses' is the name of a variable"),
        ({"draw": "x"}, "'draw' is the name of a variable"),
        ({"checkpoint": 1}, "'checkpoint' is the name of a variable"),
        ({"git": None}, "provenance 'git' is None"),
        ({"dirty": True}, "provenance 'dirty' is True"),
        ({"config": {"lr": 1}}, r"provenance 'config' is \{'lr': 1\} \(dict\): .*json.dumps"),
        ({"gpus": ["a", "b"]}, r"provenance 'gpus' is \['a', 'b'\]"),
        ({1: "x"}, "provenance 1: a name must be text"),
        ({"a b": "x"}, "provenance 'a b': a name must be text"),
        ({"dimensions": "x"}, "none of its own"),
        ({"close": "x"}, "cannot hold this|would not come back"),
        (None, "provenance is a NoneType"),
        ([("a", "b")], "provenance is a list"),
    ],
)
def test_provenance_that_hides_or_cannot_be_kept_is_named(tmp_path, provenance, message):
    """google/Xee issue 49 and uafgeotools/rtm issue 18: "Invalid value for attr"; SciTools/iris
    issue 1167: an attribute called `dimensions`."""
    with pytest.raises(ValueError, match=message) as caught:
        results.save_estimate(tmp_path / "new", 3, estimate(), provenance)
    assert len(str(caught.value)) <= 600
    assert not (tmp_path / "new").exists()


def test_cut_or_foreign_files_are_named(tmp_path):
    """Unidata/netcdf4-python issue 1030, "Reading a variable from a truncated file returns a valid
    array without warning/error"."""
    results.save_estimate(tmp_path, 3, estimate(), {})
    path = results.result_path(tmp_path, 3)
    content = path.read_bytes()
    for size in (0, 1, 4, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"000000003.nc cannot be read .*delete it") as caught:
            results.load_sweep(tmp_path)
        assert len(str(caught.value)) <= 600
    path.write_bytes(content)
    path.rename(results.result_path(tmp_path, 4))
    with pytest.raises(
        ValueError, match=r"000000004.nc cannot be read \(it is of checkpoint \[3\]"
    ):
        results.load_sweep(tmp_path)
    xarray.Dataset({"v": 1.0}).to_netcdf(results.result_path(tmp_path, 4), engine="scipy")
    with pytest.raises(ValueError, match=r"000000004.nc cannot be read"):
        results.load_sweep(tmp_path)


NO_PATHS = ["gs://bucket/run", "s3://b", "https://host/x", "file:///tmp/x", "hdfs://n/x", "gs:/b",
            "", "  ", "a\0b", "~/runs", None, 3, b"x"]  # fmt: skip


@pytest.mark.parametrize("path", NO_PATHS)
def test_paths_that_are_none_leave_nothing_behind(tmp_path, monkeypatch, path):
    """blue-oil/blueoil issue 1121, "OUTPUT_DIR with the gcs path does not work": a local folder
    called `gs:`; tensorpack/tensorpack issue 1317 likewise."""
    from llc_jax.storage.checkpoints import CheckpointDir

    monkeypatch.chdir(tmp_path)
    for use in (
        lambda: CheckpointDir(path, writer=True),
        lambda: CheckpointDir(path),
        lambda: results.save_estimate(path, 3, estimate(), {}),
        lambda: results.save(path, 3, xarray.Dataset({"v": 1.0})),
        lambda: results.load_sweep(path),
        lambda: results.finished_steps(path),
        lambda: files.write_atomic(path, "x"),
        lambda: files.write_json(path, {}),
        lambda: files.read_json(path),
    ):
        with pytest.raises(ValueError, match=r"cannot be used|give a path") as caught:
            use()
        assert len(str(caught.value)) <= 600
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    from llc_jax.storage.checkpoints import CheckpointDir

    path = tmp_path / "file"
    path.write_text("x")
    for use in (
        lambda: CheckpointDir(path),
        lambda: CheckpointDir(path, writer=True),
        lambda: results.save_estimate(path, 3, estimate(), {}),
        lambda: files.write_atomic(path / "x", "y"),
        lambda: files.write_atomic(tmp_path, "y"),
    ):
        with pytest.raises(OSError, match=r"cannot (open|write) .*"):
            use()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "x"


@pytest.mark.parametrize("name", ["a:b", "C:", "~backup", "a~", "x//y", "1:/z", "ünï cödé"])
def test_odd_names_of_local_folders_are_taken(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    results.save(name, 3, xarray.Dataset({"v": 1.0}))
    assert results.load(name, "any").v.values.tolist() == [1.0]
