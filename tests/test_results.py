"""Estimates survive the disk bit for bit, and bad files are named."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llc_jax
from llc_jax import files, results


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
