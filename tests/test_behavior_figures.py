"""Figures of the regression model, and of how estimates vary, hold the data they are given."""

import numpy as np
import pytest
import xarray
from matplotlib.colors import to_rgb

from llc_jax.figures import base as draw
from llc_jax.figures import llc, variations
from llc_jax.problems.regression import behavior_figures, datasets, structure_figures
from llc_jax.stages.boundaries import Stage
from llc_jax.stages.smoothing import SmoothedCurve

STEPS = np.array([0, 3, 10, 30, 100, 300, 1000])
STAGES = [
    Stage(0, 30, "flat", 0.1, 0.4, 0.03, 0.97, (20, 41)),
    Stage(30, 1000, "rise", 12.0, 0.5, 5.0, float("nan"), (1000, 1000)),
]
GAINS = (3.0, 5.0, 10.0, 100.0)
NORMS = ["block_0/attention_norm", "block_0/mlp_norm", "final_norm"]
SHAPES = {
    "mean_loss": (),
    "icl": (3,),
    "far_inputs_loss": (4, 8),
    "far_tasks_loss": (4, 8),
    **dict.fromkeys(
        ("loss", "prediction_square", "ridge_loss", "to_ridge", "to_one_sample", "to_dmmse"), (8,)
    ),
    "token_singular_values": (5,),
    "position_singular_values": (4,),
    "embedding_overlap": (3,),
    "norm_scale": (3, 6),
    "norm_bias": (3, 6),
    "norm_small": (3,),
    "unembed_weight": (6,),
    "unembed_bias": (),
    "weight_norm": (),
    **{f"attention_{name}": (2, 2, 5) for name in structure_figures.ATTENTION},
}


@pytest.fixture(scope="module")
def found():
    """Every number differs from every other; only losses and distances are positive."""
    rng, parts = np.random.default_rng(0), []
    for _ in STEPS:
        one = {name: rng.uniform(0.1, 1.0, shape) for name, shape in SHAPES.items()}
        one |= {name: one[name] - 0.55 for name in ("icl", "unembed_weight", "unembed_bias")}
        one |= {f"{name}_stderr": rng.uniform(0.01, 0.1, SHAPES[name]) for name in ("icl", "loss")}
        parts.append(datasets.dataset(one, GAINS, NORMS))
    return xarray.concat(parts, xarray.Variable("checkpoint", STEPS))


def labelled(ax):
    handles, labels = ax.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def curves(ax):
    """Lines over all checkpoints, in the order in which they were drawn."""
    return [line for line in ax.lines if len(line.get_xdata()) == STEPS.size]


def assert_shows(line, values):
    np.testing.assert_array_equal(line.get_xdata(), STEPS)
    np.testing.assert_array_equal(line.get_ydata(), values)


def assert_show(lines, values):
    """Line i shows column i of values [N, lines]."""
    assert len(lines) == values.shape[1]
    for i, line in enumerate(lines):
        assert_shows(line, values[:, i])


def assert_band(collection, low, high, steps=STEPS):
    """`fill_between` between low and high."""
    sides = collection.get_paths()[0].vertices
    expected = np.concatenate([np.c_[steps, low], np.c_[steps, high]])
    for corner in expected:
        assert np.isclose(sides, corner, rtol=1e-6, atol=1e-9).all(axis=1).any()


def assert_bars(container, values, errors, steps=STEPS):
    line, _, (bars,) = container
    np.testing.assert_array_equal(line.get_xydata(), np.c_[steps, values])
    ends = [segment[:, 1] for segment in bars.get_segments()]
    np.testing.assert_allclose(ends, np.c_[values - errors, values + errors], rtol=1e-12)


def assert_darker(lines):
    red, green, blue = np.array([to_rgb(line.get_color()) for line in lines]).T
    assert (np.diff(0.2126 * red + 0.7152 * green + 0.0722 * blue) < 0).all()


def assert_on_steps_with_stages(axes):
    assert axes[-1].get_xlabel() == "training step (log(step + 1) scale)"
    for ax in axes:
        assert ax.get_xscale() == "function"
        assert [(p.get_x(), p.get_x() + p.get_width()) for p in ax.patches][:2] == [
            (0, 30), (30, 1000),
        ]  # fmt: skip


# --- behaviour --------------------------------------------------------------------------------


def test_behavior_holds_losses_predictions_and_distances_of_every_example(found):
    axes = behavior_figures.behavior_figure(found, stages=STAGES).axes
    assert_on_steps_with_stages(axes)
    names = ("loss", "prediction_square", "to_ridge", "to_dmmse")
    for ax, name in zip(axes, names, strict=False):
        assert_show(curves(ax), found[name].values)
        assert_darker(curves(ax))
        assert_shows(labelled(ax)["k = 1"], found[name].values[:, 0])
        assert_shows(labelled(ax)["k = 8"], found[name].values[:, 7])
        assert ax.get_yscale() == ("linear" if name == "loss" else "log")
    floors = [line.get_ydata()[0] for line in axes[0].lines if line.get_linestyle() == ":"]
    np.testing.assert_array_equal(floors, found.ridge_loss.values[-1])
    labels = [ax.get_ylabel().replace("\n", " ") for ax in axes]
    assert labels[:4] == [
        "loss at example k", "mean squared prediction", "squared distance to ridge",
        "squared distance to finite-prior optimum",
    ]  # fmt: skip


def test_only_a_finite_prior_has_a_panel_for_its_optimum(found):
    axes = behavior_figures.behavior_figure(found.drop_vars("to_dmmse")).axes
    assert len(axes) == 5
    assert not any("finite" in ax.get_ylabel() for ax in axes)


def test_every_pair_of_examples_is_drawn_with_its_error(found):
    *_, ax, _ = behavior_figures.behavior_figure(found).axes
    shown = labelled(ax)
    assert list(shown) == [f"k = {a} minus {b} ± 1 s.e." for a, b in ((8, 1), (4, 1), (8, 4))]
    score, error = found.icl.values, found.icl_stderr.values
    assert_show(list(shown.values()), score)
    for i, band in enumerate(ax.collections):
        assert_band(band, (score - error)[:, i], (score + error)[:, i])
        assert to_rgb(band.get_facecolor()[0, :3]) == to_rgb(curves(ax)[i].get_color())


def test_a_pair_that_short_sequences_repeat_is_drawn_once(found):
    short = found.assign_coords(pair=["2_1", "2_1", "2_2"])
    *_, ax, _ = behavior_figures.behavior_figure(short).axes
    assert list(labelled(ax)) == ["k = 2 minus 1 ± 1 s.e.", "k = 2 minus 2 ± 1 s.e."]


def test_losses_of_large_inputs_are_drawn_over_their_gain(found):
    ax = behavior_figures.behavior_figure(found).axes[-1]
    shown = labelled(ax)
    assert_shows(shown.pop("as trained ± 1 s.e."), found.icl.values[:, 0])
    low, high = (found.icl + sign * found.icl_stderr for sign in (-1, 1))
    assert_band(ax.collections[0], low[:, 0], high[:, 0])
    far = found.far_inputs_loss.values
    for i, gain in enumerate((3, 5, 10)):  # 100 is off the scale
        line = shown.pop(f"inputs × {gain}, over {gain}")
        np.testing.assert_allclose(
            line.get_ydata(), (far[:, i, 7] - far[:, i, 0]) / gain, rtol=1e-6
        )
    assert shown == {}
    assert len(curves(ax)) == 4


@pytest.fixture(scope="module")
def sweep():
    rng = np.random.default_rng(1)
    return xarray.Dataset(
        {
            "llc": ("checkpoint", rng.normal(size=7)),
            "parts": (("checkpoint", "part"), rng.normal(size=(7, 3))),
            "parts_stderr": (("checkpoint", "part"), rng.uniform(0.1, 1, (7, 3))),
        },
        coords={"checkpoint": STEPS},
    )


@pytest.mark.parametrize("labels", [None, ["early", "middle", "late"]])
def test_tokens_hold_every_part_with_its_error_and_the_whole(sweep, labels):
    figure = llc.parts_figure(sweep, stages=STAGES, part="place", labels=labels)
    [ax] = figure.axes
    assert_on_steps_with_stages([ax])
    assert ax.get_ylabel() == f"{draw.LLC} of the\nloss at place"
    shown = labelled(ax)
    assert_shows(shown["whole loss"], sweep.llc)
    for k, label in enumerate(labels or ["k = 1", "k = 2", "k = 3"]):
        assert_bars(shown[label], sweep.parts.values[:, k], sweep.parts_stderr.values[:, k])
    assert_darker([container[0] for container in ax.containers])


def test_slopes_stand_under_their_curves():
    grid = np.arange(5)
    given = {}
    for i, name in enumerate(("one", "two")):
        mean, slope, std = (10.0 * i + row + np.arange(5.0) for row in (1, 20, 40))
        curve = SmoothedCurve(grid, mean, 0 * mean, slope, std, 1.0, 1.0, 0.0, 9.0)
        given[name] = (STEPS, 100.0 * i + STEPS, curve)
    figure = llc.slopes_figure(given, stages=STAGES)
    axes = np.reshape(figure.axes, (2, 2))
    assert_on_steps_with_stages(axes[1])
    for (top, bottom), (name, (_, values, curve)) in zip(axes.T, given.items(), strict=True):
        assert top.get_title() == name
        assert_shows(labelled(top)["checkpoints"], values)
        smooth, slope = labelled(top)["smooth curve"], labelled(bottom)["slope ± 1 s.d."]
        np.testing.assert_array_equal(smooth.get_xydata(), np.c_[grid, curve.mean])
        np.testing.assert_array_equal(slope.get_xydata(), np.c_[grid, curve.slope])
        low, high = curve.slope - curve.slope_std, curve.slope + curve.slope_std
        assert_band(bottom.collections[0], low, high, grid)
        assert [0.0, 0.0] in [list(line.get_ydata()) for line in bottom.lines]


# --- structure --------------------------------------------------------------------------------


def test_structure_holds_norms_embeddings_and_unembedding(found):
    axes = structure_figures.structure_figure(found, stages=STAGES).axes
    assert_on_steps_with_stages(axes)
    weights, norms, token, position, overlap, unembedding = axes
    assert_shows(labelled(weights)["all weights"], found.weight_norm)
    assert_show(curves(norms), found.norm_small.values)
    assert list(labelled(norms)) == ["block 1, attention", "block 1, mlp", "last norm"]
    for ax, name in ((token, "token"), (position, "position")):
        values = found[f"{name}_singular_values"].values.astype(np.float64)
        shares = [[s**2 / sum(row**2) for s in row] for row in values]
        shown = np.transpose([line.get_ydata() for line in curves(ax)])
        np.testing.assert_allclose(shown, shares, rtol=1e-6)
        assert ax.get_ylabel().startswith(f"{name} embedding")
        count = values.shape[1]
        assert list(labelled(ax)) == ["singular value 1", f"singular value {count}"]
        np.testing.assert_array_equal(
            labelled(ax)["singular value 1"].get_ydata(), curves(ax)[0].get_ydata()
        )
    assert_show(curves(overlap), found.embedding_overlap.values)
    assert list(labelled(overlap)) == ["y", "x, component 1", "x, component 2"]
    shown = labelled(unembedding)
    size = np.sort(np.abs(found.unembed_weight.values), axis=1)  # of 6 channels
    between = (size[:, 2] + size[:, 3]) / 2, (size[:, 4] + size[:, 5]) / 2, size[:, 5]
    for label, values in zip(("50% quantile", "90% quantile", "largest"), between, strict=True):
        np.testing.assert_allclose(shown[label].get_ydata(), values, rtol=1e-6)
    assert_shows(shown["|bias|"], np.abs(found.unembed_bias))


@pytest.mark.parametrize("statistic", structure_figures.ATTENTION)
def test_attention_of_every_head_is_split_into_x_and_y_tokens(found, statistic):
    figure = structure_figures.attention_figure(found, statistic, stages=STAGES)
    assert figure.get_suptitle() == f"Attention: {structure_figures.ATTENTION[statistic]}"
    values = found[f"attention_{statistic}"].values
    axes = np.reshape(figure.axes, (4, 2))
    assert_on_steps_with_stages(axes[:, 0])
    assert_on_steps_with_stages(axes[:, 1])
    for (layer, head), (x, y) in zip(np.ndindex(2, 2), axes, strict=True):
        assert x.get_ylabel() == f"block {layer + 1}\nhead {head + 1}"
        assert_show(curves(x), values[:, layer, head, [0, 2, 4]])
        assert_show(curves(y), values[:, layer, head, [1, 3]])
        assert_darker(curves(x))
        assert_darker(curves(y))
    assert axes[0, 0].get_title().startswith("from x-tokens")
    assert axes[0, 1].get_title().startswith("from y-tokens")


def test_norms_hold_every_scale_above_every_bias(found):
    figure = structure_figures.norms_figure(found, stages=STAGES)
    axes = np.reshape(figure.axes, (2, 4)).T
    titles = [top.get_title() for top, _ in axes]
    assert titles == ["block 1, attention", "block 1, mlp", "last norm", "unembedding"]
    for i, (top, bottom) in enumerate(axes[:3]):
        assert_show(curves(top), found.norm_scale.values[:, i])
        assert_show(curves(bottom), found.norm_bias.values[:, i])
    assert_show(curves(axes[3, 0]), found.unembed_weight.values)
    assert_show(curves(axes[3, 1]), found.unembed_bias.values[:, None])


# --- how estimates vary -----------------------------------------------------------------------


def test_variations_hold_a_line_per_value_in_order_of_steps():
    def record(what, value, step, llc):
        return {"what": what, "value": value, "step": step, "llc": llc, "stderr": step / 1000}

    records = [
        record("grid", 1, 7, 9.0),  # drawn elsewhere
        *(record("num_data", 2048, step, step + 0.5) for step in (100, 1, 10)),
        *(record("num_data", 512, step, step + 0.25) for step in (1, 10, 100)),
        record("loss", "squared", 1, 3.0),
        record("batch_size", 64, 10, None),
        record("seed", 0, 100, 4.0),
    ]
    data, batch, loss, seed = variations.variations_figure(records).axes
    assert [ax.get_title() for ax in (data, batch, loss, seed)] == [
        "sequences in the data set", "sequences per minibatch", "loss function",
        "seed of the chains",
    ]  # fmt: skip
    shown = labelled(data)
    assert list(shown) == ["2,048", "512"]
    for label, offset in (("2,048", 0.5), ("512", 0.25)):
        line, _, (bars,) = shown[label]
        np.testing.assert_array_equal(
            line.get_xydata(), [[1, 1 + offset], [10, 10 + offset], [100, 100 + offset]]
        )
        for step, segment in zip((1, 10, 100), bars.get_segments(), strict=True):
            middle, half = step + offset, step / 1000
            np.testing.assert_allclose(segment[:, 1], [middle - half, middle + half])
    assert labelled(loss)["squared"][0].get_xydata().tolist() == [[1, 3.0]]
    assert labelled(seed)["0"][0].get_xydata().tolist() == [[100, 4.0]]
    assert np.isnan(labelled(batch)["64"][0].get_ydata()).all()


def test_a_grid_has_nbeta_by_row_and_step_size_by_column():
    cells = [
        {
            "nbeta": nbeta, "step_size": step_size, "localization": gamma, "num_burnin": 2,
            "draws": [1, 2, 3], "running": [nbeta, step_size, gamma if gamma > 1 else None],
        }
        for gamma in (1.0, 100.0) for step_size in (0.1, 0.01) for nbeta in (30.0, 3.0)
    ]  # fmt: skip
    figure = variations.grid_figure([{"what": "seed"}, {"what": "grid", "step": 5, "grid": cells}])
    axes = np.reshape(figure.axes, (2, 2))
    assert figure.get_suptitle().startswith("Step 5: ")
    for (row, column), ax in np.ndenumerate(axes):
        nbeta, step_size = (3.0, 30.0)[row], (0.01, 0.1)[column]
        shown = labelled(ax)
        assert list(shown) == ["γ = 1", "γ = 100"]
        for label, last in (("γ = 1", np.nan), ("γ = 100", 100.0)):
            expected = [[1, nbeta], [2, step_size], [3, last]]
            np.testing.assert_array_equal(shown[label].get_xydata(), expected)
        assert [p.get_x() + p.get_width() for p in ax.patches] == [2]
    assert [ax.get_ylabel().split("\n")[1] for ax in axes[:, 0]] == ["nβ = 3", "nβ = 30"]
    assert [ax.get_title() for ax in axes[0]] == ["ε = 0.01", "ε = 0.1"]


def test_failures_hold_the_running_estimate_and_the_verdict():
    common = {"what": "failure", "step": 1000, "draws": [1, 2, 3]}
    records = [
        {"what": "seed"},
        common | {"value": "far too large", "num_burnin": 0, "running": [1.0, None, None],
                  "llc": None, "verdict": "all chains diverged"},
        common | {"value": "too short", "num_burnin": 2, "running": [5.0, 6.0, 7.0],
                  "llc": 7.0, "verdict": "drift"},
    ]  # fmt: skip
    dead, short = variations.failures_figure(records).axes
    titles = [ax.get_title(loc="left") for ax in (dead, short)]
    assert titles == [
        f"far too large, step 1,000\n{draw.LLC} = none; verdict: all chains diverged",
        f"too short, step 1,000\n{draw.LLC} = 7; verdict: drift",
    ]
    np.testing.assert_array_equal(dead.lines[0].get_xydata(), [[1, 1.0], [2, np.nan], [3, np.nan]])
    assert short.lines[0].get_xydata().tolist() == [[1, 5.0], [2, 6.0], [3, 7.0]]
    assert [text.get_text() for text in dead.texts] == ["no finite chain"]
    assert list(short.texts) == []
    assert [p.get_x() + p.get_width() for p in short.patches] == [2]
    assert list(dead.patches) == []
