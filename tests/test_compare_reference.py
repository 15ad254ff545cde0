"""The comparison with recorded curves: planted deviations, planted boundaries, bad folders."""

import dataclasses
import json

import numpy as np
import pandas
import pytest

from experiments import compare_reference

STEPS = np.unique(np.logspace(0, 5, 60).astype(int))
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


def write_reference(folder, seeds=2):
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        "behavior": set(), "hessian": {"trace_mean", "eig1"},
        "llc": {"llc_mean", "llc_std_over_chains"},
    }  # fmt: skip
    for file, _, columns in compare_reference.QUANTITIES.values():
        names[file] |= {columns} if isinstance(columns, str) else set(columns)
    for file, columns in names.items():
        frames = [
            pandas.DataFrame(
                {"seed": seed, "step": STEPS, **{c: curve(STEPS) + 2 * seed for c in columns}}
            )
            for seed in range(seeds)
        ]
        pandas.concat(frames).to_csv(folder / f"regression_{file}.csv", index=False)


@pytest.fixture
def run(tmp_path):
    """A workdir whose numbers lie one half-width above the mean of the recorded seeds."""
    write_reference(tmp_path / "recorded")
    root = tmp_path / "run"
    tokens = range(1, 9)
    values = {"mean_loss": curve(STEPS) + 2, "weight_norm": curve(STEPS) + 2}
    for name in ("loss", "to_ridge", "prediction_square", "far_inputs_loss_g3",
                 "far_inputs_loss_g10", "far_tasks_loss_g3"):  # fmt: skip
        for k in tokens:
            values[f"{name}_{k}"] = curve(STEPS) + 2
            values[f"{name}_{k}_stderr"] = np.full(STEPS.size, 3.0 if "far" in name else 0.0)
    for pair in ("8_1", "4_1", "8_4"):
        values[f"icl_{pair}"] = np.ones(STEPS.size)
    frame = pandas.DataFrame(values, index=pandas.Index(STEPS, name="step"))
    (root / "behavior").mkdir(parents=True)
    frame.to_csv(root / "behavior" / "behavior.csv")
    (root / "behavior" / "config.json").write_text(
        json.dumps({"config": {"num_sequences": 8192, "num_far": 1024}})
    )
    (root / "llc" / "curvature").mkdir(parents=True)
    pandas.DataFrame(
        {"trace": curve(STEPS) + 2, "trace_stderr": 0.0, "largest_1": curve(STEPS) + 2},
        index=pandas.Index(STEPS, name="step"),
    ).to_csv(root / "llc" / "curvature" / "curvature.csv")
    return dataclasses.replace(CONFIG, workdir=str(root), reference=str(tmp_path / "recorded"))


def test_planted_deviations_and_boundaries_are_found(run, capsys):
    compare_reference.run(run)
    folder = compare_reference.pathlib.Path(run.workdir) / "comparison"
    table = pandas.read_csv(folder / "deviations.csv")
    one = table[table.quantity.isin(["loss", "loss at example 8", "weight norm", "Hessian trace"])]
    np.testing.assert_allclose(one.deviation, 1.0, rtol=1e-4)
    text = (folder / "summary.md").read_text()
    assert "| loss | " in text
    assert "| +1.00 | 1.00 | 100% |" in text
    assert "--reference=PATH" in text
    assert str(run.reference) not in text
    assert (folder / "comparison.png").stat().st_size > 0
    assert "Hessian trace, ours" in text
    # One rise, no boundary within; λ̂ was recorded, although this run has none.
    assert "| Hessian trace, recorded run 1 | none |" in text
    assert "| LLC, recorded run 2 | " in text
    assert "LLC, ours" not in text
    assert "LLC" not in table.quantity.values
    # Errors of 1,024 sequences of ours and 8,192 of theirs, beside a half band of 1.
    far = table[table.quantity == "loss, inputs x 3"]
    half = np.sqrt(1 + 9 * (1 + 1024 / 8192))
    np.testing.assert_allclose(far.half_band, half, rtol=1e-4)
    np.testing.assert_allclose(far.deviation, 1 / half, rtol=1e-4)


def test_folders_without_what_it_takes_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="reference=''"):
        compare_reference.run(dataclasses.replace(run, reference=""))
    with pytest.raises(ValueError, match=r"regression_behavior.csv is not there"):
        compare_reference.run(dataclasses.replace(run, reference=str(tmp_path)))
    write_reference(tmp_path / "single", seeds=1)
    with pytest.raises(ValueError, match="has 1 seed"):
        compare_reference.run(dataclasses.replace(run, reference=str(tmp_path / "single")))
    with pytest.raises(ValueError, match="no results"):
        compare_reference.run(dataclasses.replace(run, workdir=str(tmp_path / "empty")))
