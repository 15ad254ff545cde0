"""Masks by path, and masks as an axis of the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llc_jax import (
    SGLD,
    calibrate,
    estimate_llc,
    estimate_llc_over_checkpoints,
    estimate_llc_over_settings,
)
from llc_jax import mask_by_path as by_path

PARAMS = {
    "layers": [
        {"attention": {"qkv": np.ones((3, 2, 4), np.float32)}, "mlp": np.ones(5, np.float32)},
        {"attention": {"qkv": np.ones((3, 2, 4), np.float32)}, "mlp": np.ones(5, np.float32)},
    ],
    "embed": np.ones((7, 3), np.float32),
}


def counted(mask):
    """How many weights a mask leaves in each leaf."""
    sizes = jax.tree.map(lambda m, w: int(np.broadcast_to(m, w.shape).sum()), mask, PARAMS)
    return jax.tree.leaves(sizes)  # embed, then qkv and mlp of each layer


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["layers/0/attention"], [0, 24, 0, 0, 0]),
        (["layers/*/mlp"], [0, 0, 5, 0, 5]),
        (["layers/1"], [0, 0, 0, 24, 5]),
        (["lay*/0/att*/qkv[..., 2, :]"], None),
        (["layers/0/attention/qkv[0]", "embed"], [21, 8, 0, 0, 0]),
        (["layers/0/attention/qkv[:, 1, 1:3]"], [0, 6, 0, 0, 0]),
        (["layers/*/attention/qkv[..., -1]"], [0, 6, 0, 6, 0]),
        (["layers/0/attention/qkv[0]", "layers/0/attention/qkv[:, 0]"], [0, 16, 0, 0, 0]),
        (["embed[0]", "embed"], [21, 0, 0, 0, 0]),
        (["embed", "embed[0]"], [21, 0, 0, 0, 0]),
        (["embed[::2, 0]"], [4, 0, 0, 0, 0]),
    ],
)
def test_a_pattern_names_weights(patterns, expected):
    if expected is None:  # axis 1 has two entries
        with pytest.raises(ValueError, match=r"selects nothing of layers/0/attention/qkv.*3, 2, 4"):
            by_path(PARAMS, *patterns)
        return
    mask = by_path(PARAMS, *patterns)
    assert jax.tree.structure(mask) == jax.tree.structure(PARAMS)
    assert counted(mask) == expected


def test_a_slice_is_that_of_numpy():
    mask = by_path(PARAMS, "layers/1/attention/qkv[1:, 0, ::2]")
    expected = np.zeros((3, 2, 4), bool)
    expected[1:, 0, ::2] = True
    np.testing.assert_array_equal(mask["layers"][1]["attention"]["qkv"], expected)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("attention", r"'attention' names no weight.*embed, layers/0/attention/qkv"),
        ("layers/2", "names no weight"),
        ("layers/0/attention/qkv/more", "names no weight"),
        ("embed[x]", r"has the index 'x': give \.\.\., 2 or 4:8"),
        ("embed[__import__('os')]", "has the index"),
        ("embed[0, 0, 0]", r"selects nothing of embed, which has shape \(7, 3\)"),
        ("embed[7]", "selects nothing"),
        ("embed[3:3]", "selects nothing"),
        ("embed[..., ...]", "selects nothing"),
        ("embed[::0]", "selects nothing"),
        (3, "is a int: give a string"),
    ],
)
def test_what_names_nothing_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        by_path(PARAMS, pattern)


def test_no_pattern_is_refused():
    with pytest.raises(ValueError, match="needs a pattern, such as 'embed'"):
        by_path(PARAMS)


# --- masks as an axis -----------------------------------------------------------------------------

H = np.array([0.5, 1.0, 2.0, 4.0])
NBETA, LOCALIZATION, STEP_SIZE = 10.0, 1.0, 1e-2
W = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
DATA = {"x": np.ones(8, np.float32)}
MASKS = {"all": None, "a": by_path(W, "a"), "one of b": by_path(W, "b[1]")}
KEPT = {"all": [0, 1, 2, 3], "a": [0, 1], "one of b": [3]}


def quadratic(params, batch):
    w = jnp.concatenate([params["a"], params["b"]])
    return batch["x"] * 0.5 * jnp.sum(jnp.asarray(H, w.dtype) * w**2)


OPTIONS = {
    "sampler": SGLD(STEP_SIZE), "nbeta": NBETA, "localization": LOCALIZATION, "num_chains": 128,
    "num_draws": 600, "num_burnin": 200, "num_probes": 0,
}  # fmt: skip


def exact(name):
    h = H[KEPT[name]]
    stiffness = NBETA * h + LOCALIZATION
    return np.sum(NBETA * h / 2 / (stiffness * (1 - STEP_SIZE * stiffness / 4)))


@pytest.fixture(scope="module")
def found():
    return estimate_llc(jax.random.key(0), quadratic, W, DATA, masks=MASKS, **OPTIONS)


@pytest.mark.parametrize("name", MASKS)
def test_each_mask_has_the_exact_value_of_its_weights(found, name):
    assert abs(found[name].mean - exact(name)) < 4 * found[name].stderr
    assert found[name].stderr < 0.02 * exact(name)
    assert found[name].settings["mask"] == name


def test_a_mask_among_others_gives_what_it_gives_alone(found):
    alone = estimate_llc(jax.random.key(0), quadratic, W, DATA, mask=MASKS["a"], **OPTIONS)
    np.testing.assert_allclose(found["a"].losses, alone.losses, rtol=1e-4, atol=1e-6)
    assert "mask" not in alone.settings


SHORT = {**OPTIONS, "num_chains": 2, "num_draws": 8, "num_burnin": 0}


def test_masks_checkpoints_and_settings_are_one_program(caplog):
    checkpoints = {3: W, 8: jax.tree.map(lambda x: x + 1, W), 9: W}
    options = {**SHORT, "masks": MASKS}
    with jax.log_compiles():
        pairs = list(
            estimate_llc_over_checkpoints(
                jax.random.key(0), quadratic, checkpoints, DATA, checkpoint_batch=4, **options
            )
        )
    compiled = [r for r in caplog.records if "Finished XLA compilation of jit(sample)" in r.message]
    assert len(compiled) == 1
    assert [step for step, _ in pairs] == [3, 8, 9]
    for step, by_name in pairs:
        assert list(by_name) == list(MASKS)
        again = estimate_llc(
            jax.random.key(0), quadratic, checkpoints[step], DATA, step=step, **options
        )
        for name, estimate in by_name.items():
            np.testing.assert_array_equal(estimate.losses, again[name].losses)
    grid = estimate_llc_over_settings(
        jax.random.key(0), quadratic, W, DATA, step=3, setting_batch=4,
        **{**options, "localization": np.array([1.0, 2.0])},
    )  # fmt: skip
    assert {name: values.shape for name, values in grid.items()} == dict.fromkeys(MASKS, (2,))
    np.testing.assert_array_equal(grid["a"][0].losses, pairs[0][1]["a"].losses)
    assert grid["a"][1].settings["localization"] == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": {}}, r"masks={}: give {name: mask}"),
        ({"masks": [MASKS["a"]]}, "masks=.*: give {name: mask}"),
        ({"masks": {1: None}}, "masks has the key 1: give names"),
        ({"masks": {"x": {"a": 1}}}, r"masks\['x'\] has structure"),
        ({"masks": {"x": {"a": 2, "b": 0}}}, r"masks\['x'\]\['a'\] has values other than 0 and 1"),
        ({"masks": {"x": {"a": 0, "b": 0}}}, r"masks\['x'\] is 0 everywhere"),
        ({"masks": MASKS, "mask": MASKS["a"]}, "mask and masks are given"),
    ],
)
def test_bad_masks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        estimate_llc(jax.random.key(0), quadratic, W, DATA, **SHORT, **options)


def test_calibrate_takes_one_mask():
    with pytest.raises(ValueError, match=r"masks=.*: settings are chosen for one posterior"):
        calibrate(jax.random.key(0), quadratic, W, DATA, masks=MASKS)
