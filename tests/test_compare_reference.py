"""The comparison with recorded curves: planted deviations, planted boundaries, bad folders."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pandas
import pytest
import xarray
from matplotlib.figure import Figure

from experiments import cli, compare_reference, measure_behavior, train_regression
from llc_jax.problems.regression import behavior as regression
from llc_jax.problems.regression.model import init_params, predictions
from llc_jax.problems.regression.problem import setting
from llc_jax.storage import results
from llc_jax.storage.checkpoints import CheckpointDir

STEPS = np.unique(np.logspace(0, 5, 30).astype(int))
CONFIG = dataclasses.replace(compare_reference.PRESETS["small"], first_step=100)


def curve(steps):
    """Rises once in log(step), between 100 and 10,000."""
    return 50 / (1 + np.exp(-4 * (np.log10(steps + 1) - 3)))


def test_deviation_by_hand():
    theirs = np.stack([np.full(5, 10.0), np.full(5, 14.0)])  # mean 12, half band 2
    steps = np.array([1, 10, 100, 1000, 10_000])
    ours = np.array([12.0, 14.0, 10.0, 15.0, 12.0])
    mean, half, found = compare_reference.deviations(
        steps, ours, np.zeros(5), steps, theirs, window=1
    )
    np.testing.assert_allclose(mean, 12.0)
    np.testing.assert_allclose(half, 2.0)
    np.testing.assert_allclose(found, [0.0, 1.0, -1.0, 1.5, 0.0])
    # Errors are added to the band in squares: 2 and 1.5 make 2.5.
    _, half, found = compare_reference.deviations(
        steps, ours, np.full(5, 1.5), steps, theirs, window=1
    )
    np.testing.assert_allclose(half, 2.5)
    np.testing.assert_allclose(found, [0.0, 0.8, -0.8, 1.2, 0.0])


def test_a_crossing_takes_its_band_from_its_neighbours():
    theirs = np.array([[0.0, 3.0, 0.0], [4.0, 3.0, 4.0]])  # half bands 2, 0, 2
    steps = np.array([1, 2, 3])
    _, half, _ = compare_reference.deviations(
        steps, np.zeros(3), np.zeros(3), steps, theirs, window=1
    )
    np.testing.assert_allclose(half**2, [(4 + 0) / 2, (4 + 0 + 4) / 3, (0 + 4) / 2])


def test_curves_are_compared_at_equal_log_steps():
    their_steps = np.array([0, 99, 9999])
    theirs = np.stack([np.log1p(their_steps) - 1, np.log1p(their_steps) + 1])
    steps = np.array([9, 999, 20_000])
    mean, _, found = compare_reference.deviations(
        steps, np.log1p(steps), np.zeros(3), their_steps, theirs, window=0
    )
    np.testing.assert_allclose(mean[:2], np.log1p(steps[:2]))
    np.testing.assert_allclose(found[:2], 0.0, atol=1e-12)
    assert np.isnan(found[2])  # beyond what was recorded


# --- a workdir and recorded curves with a number of its own in every column -------------------

GAINS = {"a": 3, "b": 5, "c": 10, "d": 100}
LAYERS = {
    "block_0/attention_norm": "blocks.0.layer_norms.0",
    "block_0/mlp_norm": "blocks.0.layer_norms.1",
    "block_1/attention_norm": "blocks.1.layer_norms.0",
    "block_1/mlp_norm": "blocks.1.layer_norms.1",
    "final_norm": "unembedding.0",
}
LOSSES = [f"pretrain/mse/token/{k}" for k in range(8)]
FAR = [f"ood_{letter}_{kind}_loss/mean" for letter in GAINS for kind in ("inputs", "tasks")]
COLUMNS = {
    "behavior": ["pretrain/mse", *LOSSES, "pretrain/delta_ridge", "loss/mean", "loss_0/mean", *FAR,
                 "weight/norm"],
    "layernorm": ["weight/norm", "weight/mean", "bias/norm"],
    "embedding_svd": [f"embed_S{i}" for i in range(1, 6)] + [f"postn_S{i}" for i in range(1, 17)],
    "hessian": ["trace_mean", "trace_sem", "eig1", "eig2", "eig3"],
    "llc": ["llc_mean", "llc_std_over_chains", *[f"llc_token{k}" for k in range(1, 9)]],
}  # fmt: skip
KEYS = [
    (file, column, layer)
    for file, columns in COLUMNS.items()
    for column in columns
    for layer in (LAYERS.values() if file == "layernorm" else [""])
]


def recorded(column, file="behavior", layer="", seed=0):
    """Squares of a running number tell columns apart, and differences of two columns too."""
    number = 1 + KEYS.index((file, column, layer))
    return curve(STEPS) + 7 * number**2 + 2 * seed * number


def above(column, file="behavior", layer="", minus=None):
    """One half-width above the mean of seeds 0 and 1."""
    seeds = np.stack([recorded(column, file, layer, seed) for seed in (0, 1)])
    if minus:
        seeds -= np.stack([recorded(minus, file, layer, seed) for seed in (0, 1)])
    return seeds.mean(axis=0) + np.ptp(seeds, axis=0) / 2


def write_reference(folder, seeds=2):
    folder.mkdir(parents=True, exist_ok=True)
    for file, columns in COLUMNS.items():
        frames = [
            pandas.DataFrame(
                {"seed": seed, "step": STEPS}
                | ({"layer": layer} if layer else {})
                | {column: recorded(column, file, layer, seed) for column in columns}
            )
            for seed in range(seeds)
            for layer in (LAYERS.values() if file == "layernorm" else [""])
        ]
        pandas.concat(frames).to_csv(folder / f"regression_{file}.csv", index=False)


def write_behavior(folder, shift=0.0, **settings):
    """What `measure_behavior` leaves, every value one half-width above, plus a shift."""
    examples = np.arange(8) - 3.5  # a mean over examples is not the value at any of them

    def by_example(values):
        return values[..., None] + examples + shift

    far = {
        kind: np.stack([by_example(above(f"ood_{x}_{kind}_loss/mean")) for x in GAINS], axis=1)
        for kind in ("inputs", "tasks")
    }
    lengths = np.stack([above("weight/norm", "layernorm", x) for x in LAYERS.values()], axis=1)
    pairs = [(7, 0), (3, 0), (7, 3)]
    values = {
        "mean_loss": ((), above("pretrain/mse" if not shift else "loss/mean") + shift),
        "loss": (("token",), np.stack([above(x) for x in LOSSES], axis=1) + shift),
        "icl": (("pair",), np.stack([above(LOSSES[i], minus=LOSSES[j]) for i, j in pairs], 1)),
        "to_ridge": (("token",), by_example(above("pretrain/delta_ridge"))),
        "to_one_sample": (("token",), by_example(np.zeros(STEPS.size))),
        "prediction_square": (("token",), by_example(above("loss_0/mean"))),
        **{f"far_{kind}_loss": (("gain", "token"), far[kind]) for kind in far},
    }
    values |= {
        f"{name}_stderr": (dims, np.full_like(x, 3.0 if "far" in name else 0.0))
        for name, (dims, x) in values.items()
    }
    values |= {
        "weight_norm": ((), above("weight/norm")),
        "norm_scale": (("norm", "channel"), lengths[..., None] * [0.6, -0.8, 0.0]),
        "norm_small": (("norm",), lengths * 0),
    }
    for name, size, theirs in (("token", 5, "embed_S"), ("position", 16, "postn_S")):
        found = [above(f"{theirs}{i}", "embedding_svd") for i in range(1, size + 1)]
        values[f"{name}_singular_values"] = ((f"{name}_value",), np.stack(found, axis=1))
    for i, step in enumerate(STEPS):
        one = {name: (dims, x[i]) for name, (dims, x) in values.items()}
        coords = {
            "token": range(1, 9), "gain": [float(g) for g in GAINS.values()],
            "pair": ["8_1", "4_1", "8_4"], "norm": list(LAYERS),
        }  # fmt: skip
        results.save(folder, step, xarray.Dataset(one, coords=coords))
    measured = {"num_sequences": 8192, "num_far": 1024, **settings}
    (folder / "config.json").write_text(json.dumps({"config": measured}))


def write_estimates(folder, values, parts, stderr=40.0):
    for i, step in enumerate(STEPS):
        found = {
            "llc": values[i], "stderr": stderr, "per_chain": ("chain", np.full(2, values[i])),
            "parts": ("part", parts[i]), "parts_stderr": ("part", 30.0 + np.arange(8)),
        }  # fmt: skip
        results.save(folder, step, xarray.Dataset(found))


@pytest.fixture
def run(tmp_path):
    """A workdir whose numbers lie one half-width above the mean of the recorded seeds."""
    write_reference(tmp_path / "recorded")
    root = tmp_path / "run"
    write_behavior(root / "behavior")
    parts = np.stack([above(f"llc_token{k}", "llc") for k in range(1, 9)], axis=1)
    write_estimates(root / "llc", above("llc_mean", "llc"), parts)
    (root / "llc" / "curvature").mkdir()
    pandas.DataFrame(
        {
            "trace": above("trace_mean", "hessian"), "trace_stderr": 0.0,
            "largest_1": above("eig1", "hessian"), "largest_2": above("eig2", "hessian"),
        },
        index=pandas.Index(STEPS, name="step"),
    ).to_csv(root / "llc" / "curvature" / "curvature.csv")  # fmt: skip
    return dataclasses.replace(CONFIG, workdir=str(root), reference=str(tmp_path / "recorded"))


def outcome(config):
    """(table of the deviations, summary) of a run of the comparison."""
    compare_reference.run(config)
    folder = compare_reference.pathlib.Path(config.workdir) / "comparison"
    assert (folder / "comparison.png").stat().st_size > 0
    return pandas.read_csv(folder / "deviations.csv"), (folder / "summary.md").read_text()


def half_band(quantity, number):
    """With standard errors in squares: those of 1,024 and of 8,192 sequences for far ones."""
    if quantity.startswith(("loss, inputs", "loss, tasks")):
        return np.sqrt(number**2 + 9 * (1 + 1024 / 8192))
    if quantity.startswith("LLC by example: "):
        return np.hypot(number, 29 + int(quantity[-1]))
    return np.hypot(number, 40) if quantity == "LLC" else number


def number(column, file="behavior", layer=""):
    return 1 + KEYS.index((file, column, layer))


# Rows of the tables -> half-width of the recorded band.
BANDS = {
    "loss": number("pretrain/mse"),
    "loss at example 1": number(LOSSES[0]),
    "loss at example 8": number(LOSSES[7]),
    "ICL: 8 - 1": 7,
    "ICL: 4 - 1": 3,
    "ICL: 8 - 4": 4,
    "distance to ridge": number("pretrain/delta_ridge"),
    "mean squared prediction": number("loss_0/mean"),
    **{
        f"loss, {kind} x {gain}": number(f"ood_{letter}_{kind}_loss/mean")
        for kind in ("inputs", "tasks")
        for letter, gain in GAINS.items()
    },
    "weight norm": number("weight/norm"),
    **{
        f"length of layer norm scales: {name}": number("weight/norm", "layernorm", layer)
        for name, layer in zip(
            ("block 1, attention", "block 1, MLP", "block 2, attention", "block 2, MLP", "last"),
            LAYERS.values(),
            strict=True,
        )
    },
    **{
        f"token embedding, singular value: {i}": number(f"embed_S{i}", "embedding_svd")
        for i in range(1, 6)
    },
    **{
        f"position embedding, singular value: {i}": number(f"postn_S{i}", "embedding_svd")
        for i in (1, 2, 4, 8, 15)
    },
    "Hessian trace": number("trace_mean", "hessian"),
    "largest eigenvalue": number("eig1", "hessian"),
    "LLC": number("llc_mean", "llc"),
    **{f"LLC by example: {k}": number(f"llc_token{k}", "llc") for k in range(1, 9)},
}


@pytest.fixture
def no_stages(monkeypatch):
    """They take time."""
    monkeypatch.setattr(compare_reference, "STAGED", ())


@pytest.fixture
def no_panels(monkeypatch):
    """They take more."""
    monkeypatch.setattr(compare_reference, "figure", lambda curves: Figure())


@pytest.mark.slow
def test_planted_deviations_are_found_in_every_column(run, no_stages):
    table, text = outcome(dataclasses.replace(run, last_step=10_000))
    assert list(table.quantity.unique()) == list(BANDS)
    for name, part in table.groupby("quantity"):
        band = half_band(name, BANDS[name])
        np.testing.assert_array_equal(part.step, STEPS)
        np.testing.assert_allclose(part.half_band, band, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(part.deviation, BANDS[name] / band, rtol=1e-3, err_msg=name)
    first, second = text.index("From step 100 on"), text.index("From step 100 to 10,000,")
    count, some = np.sum(STEPS >= 100), np.sum((STEPS >= 100) & (STEPS <= 10_000))
    assert f"| loss | {count} | +1.00 | 1.00 | 100% |" in text[first:second]
    assert f"| loss | {some} | +1.00 | 1.00 | 100% |" in text[second:]
    assert "--last_step=10000" in text
    assert "--reference=PATH" in text
    assert str(run.reference) not in text


def test_the_summary_counts_what_lies_in_its_range():
    deviation = [9.0, 1.0, -2.0, 2.5, -3.0, np.nan]
    table = pandas.DataFrame(
        {"quantity": "loss", "step": [5, 10, 20, 30, 40, 50], "deviation": deviation,
         "ours": [9.0, 1.0, 1.1, 0.8, 0.5, 7.0], "recorded": 1.0}
    )  # fmt: skip
    whole = "| loss | 4 | -0.50 | 2.25 | 50% | 50.0% |"
    part = "| loss | 3 | +1.00 | 2.00 | 67% | 20.0% |"
    assert compare_reference.summary(table, 10).splitlines()[-1] == whole
    assert compare_reference.summary(table, 10, 30).splitlines()[-1] == part


@pytest.mark.slow
def test_quiet_sequences_are_held_beside_what_was_recorded_on_such(run, no_stages, no_panels):
    quiet = ["loss, quiet sequences", "mean squared prediction"]
    quiet += [name for name in BANDS if name.startswith(("loss, inputs", "loss, tasks"))]
    root = compare_reference.pathlib.Path(run.workdir)
    write_behavior(root / "behavior-quiet", shift=1000.0, noise_variance=0.125**2)
    table, _ = outcome(dataclasses.replace(run, quiet_name="behavior-quiet"))
    bands = BANDS | {"loss, quiet sequences": number("loss/mean")}
    assert set(table.quantity) == set(bands)
    for name, part in table.groupby("quantity"):
        band = half_band(name, bands[name])
        shift = 1000.0 if name in quiet else 0.0
        np.testing.assert_allclose(
            part.deviation, (bands[name] + shift) / band, rtol=1e-3, err_msg=name
        )
    write_behavior(root / "behavior-loud", noise_variance=0.125)
    for name, noise in (("behavior", "0.0"), ("behavior-loud", "0.125")):
        with pytest.raises(ValueError, match=f"noise_variance={noise}, the recorded"):
            compare_reference.run(dataclasses.replace(run, quiet_name=name))
    with pytest.raises(ValueError, match=r"no results in .*nowhere"):
        compare_reference.run(dataclasses.replace(run, quiet_name="nowhere"))


@pytest.mark.slow
def test_boundaries_are_those_of_each_curve(run, no_panels):
    root = compare_reference.pathlib.Path(run.workdir)
    bump = 50 * np.exp(-((np.log1p(STEPS) - np.log1p(1000)) ** 2) / 2)
    write_estimates(root / "other", bump, np.zeros((STEPS.size, 8)), stderr=0.5)
    pandas.DataFrame(
        {"trace": -bump, "trace_stderr": 0.5, "largest_1": bump},
        index=pandas.Index(STEPS, name="step"),
    ).to_csv(root / "llc" / "curvature" / "curvature.csv")
    missing = dataclasses.replace(run, name="other")
    table, text = outcome(missing)
    assert "Hessian trace" not in set(table.quantity)  # other/ has none
    assert "Hessian trace, ours" not in text
    table, text = outcome(dataclasses.replace(missing, curvature_name="llc"))
    assert "Hessian trace" in set(table.quantity)
    for name, kind in (("LLC", "rise"), ("Hessian trace", "fall"), ("largest eigenvalue", "rise")):
        [line] = [line for line in text.splitlines() if line.startswith(f"| {name}, ours |")]
        [at] = line.split(" | ")[2].split("; ")
        assert 700 < int(at.split()[0].replace(",", "")) < 1400, line
        assert f"after a {kind}" in line
        for seed in (1, 2):  # one rise, no boundary within
            assert f"| {name}, recorded run {seed} | {STEPS.size} | none |" in text
    with pytest.raises(ValueError, match=r"curvature_name=other: .*is not there"):
        compare_reference.run(dataclasses.replace(run, curvature_name="other"))


def test_folders_without_what_it_takes_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="reference=''"):
        compare_reference.run(dataclasses.replace(run, reference=""))
    with pytest.raises(ValueError, match=r"last_step=50 is not after first_step=100"):
        compare_reference.run(dataclasses.replace(run, last_step=50))
    with pytest.raises(ValueError, match=r"regression_behavior.csv is not there"):
        compare_reference.run(dataclasses.replace(run, reference=str(tmp_path)))
    write_reference(tmp_path / "single", seeds=1)
    with pytest.raises(ValueError, match="has 1 seed"):
        compare_reference.run(dataclasses.replace(run, reference=str(tmp_path / "single")))
    with pytest.raises(ValueError, match="no results"):
        compare_reference.run(dataclasses.replace(run, workdir=str(tmp_path / "empty")))


# --- behaviour at another noise ---------------------------------------------------------------


@pytest.mark.slow
def test_behavior_at_another_noise_is_a_measurement_of_its_own(tmp_path):
    trained = dataclasses.replace(train_regression.PRESETS["smoke"], workdir=str(tmp_path))
    model, task = setting(trained)
    params = init_params(jax.random.key(0), model)
    CheckpointDir(tmp_path / "checkpoints", writer=True).save(0, params, {"none": np.zeros(1)})
    record = {"config": cli.identity(trained), "preset": "smoke"}
    (tmp_path / "train.json").write_text(json.dumps(record))
    config = dataclasses.replace(measure_behavior.PRESETS["smoke"], workdir=str(tmp_path))
    quiet = dataclasses.replace(config, noise_variance=0.015, name="quiet")
    measure_behavior.run(quiet)
    found = results.load(tmp_path / "quiet", "measure_behavior")
    quieter = dataclasses.replace(task, noise_variance=0.015)
    sequences = regression.evaluation_set(
        jax.random.key(config.seed), quieter, config.num_sequences
    )
    guess = predictions(model, params, sequences)
    for name, theirs in (("loss", "y"), ("to_ridge", "ridge")):
        square = ((guess - sequences[theirs]) ** 2).mean(axis=0)
        np.testing.assert_allclose(found[name][0], square, rtol=1e-4)
    # A folder begun before there was the flag holds the noise of the run, and goes on.
    shutil.copytree(tmp_path / "quiet", measure_behavior.folder_of(config))
    old = {"seed": 2000, "num_sequences": 64, "num_far": 32, "num_attention": 32}
    (measure_behavior.folder_of(config) / "config.json").write_text(json.dumps({"config": old}))
    measure_behavior.run(config)
    shutil.copytree(measure_behavior.folder_of(config), tmp_path / "old")
    for changes, said in (
        ({"name": "old"}, "noise_variance: None before, 0.015 now"),
        ({"noise_variance": 0.0}, "noise_variance: 0.015 before, None now"),
        ({"noise_variance": 0.02}, "noise_variance: 0.015 before, 0.02 now"),
        ({"name": "behavior"}, "noise_variance=0.015 with name=behavior"),
        ({"name": "../quiet"}, "give a plain folder name"),
        ({"noise_variance": -1.0}, "noise_variance=-1.0 must be positive"),
    ):
        with pytest.raises(ValueError, match=said):
            measure_behavior.run(dataclasses.replace(quiet, **changes))
