"""Trajectories with known components and known geometry give exactly these."""

import jax
import matplotlib.collections
import numpy as np
import pytest

from llc_jax.figures import base
from llc_jax.figures.trajectory import geometry_in_plane, trajectory_figure
from llc_jax.metrics.outputs import output_blocks
from llc_jax.metrics.trajectory import (
    PCA,
    cusps,
    functional_pca,
    gaussian_smooth,
    osculating_circles,
    published_widths,
    smooth_path,
    vertices,
)
from llc_jax.problems.language.model import AttentionOnlyTransformer, init_params
from llc_jax.problems.language.outputs import NextTokenOutputs, one_position
from llc_jax.stages.boundaries import Stage
from llc_jax.storage.checkpoints import checkpoint_steps

# Rows around a mean that is not 0; the last 3 are to be projected.
ROWS = np.random.default_rng(0).normal(np.linspace(-2, 2, 60), np.geomspace(1, 0.01, 60), (23, 60))
HOLED = ROWS.copy()
HOLED[7, 3] = np.nan


def closed(num, *, start=-0.3, turns=1.0):
    """Even parameters [num + 1] of `turns` around, shifted off the ends, with 0 among them."""
    h = 2 * np.pi / num
    return h * np.arange(round(start / h), round(start / h) + round(num * turns) + 1)


def circle(t, radius=1.0, centre=(0.0, 0.0)):
    return np.array(centre) + radius * np.stack([np.cos(t), np.sin(t)], axis=1)


def test_components_are_those_of_the_whole_centred_matrix():
    pca = functional_pca(np.split(ROWS, 4, axis=1), num_components=5, num_fitted=20)
    mean = ROWS[:20].mean(axis=0)
    left, singular, right = np.linalg.svd(ROWS[:20] - mean, full_matrices=False)
    sign = np.sign([u[np.abs(u).argmax()] for u in left.T[:5]])
    np.testing.assert_allclose(pca.scores[:20], sign * (left * singular)[:, :5], atol=1e-13)
    np.testing.assert_allclose(pca.explained, (singular**2 / np.sum(singular**2))[:5], rtol=1e-12)
    projected = (ROWS[20:] - mean) @ (sign[:, None] * right[:5]).T
    np.testing.assert_allclose(pca.scores[20:], projected, atol=1e-13)
    assert pca.num_fitted == 20
    assert np.all(pca.scores[np.abs(pca.scores[:20]).argmax(axis=0), range(5)] > 0)


@pytest.mark.parametrize("cuts", [[], [1], [7, 7, 50], range(1, 60)])
def test_blocks_may_be_cut_anywhere_and_come_in_any_order(cuts):
    whole = functional_pca([ROWS], 3, 20)
    blocks = np.split(ROWS, cuts, axis=1)[::-1]
    for found, expected in zip(functional_pca(iter(blocks), 3, 20), whole, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-13)


def test_planted_plane_is_found_among_a_thousand_outputs():
    plane = np.linalg.qr(np.random.default_rng(1).standard_normal((1000, 2)))[0]
    t = np.linspace(0, 2 * np.pi, 41)[:-1]
    path = np.stack([3 * np.cos(t), 2 * np.sin(t)], axis=1)
    pca = functional_pca([5.0 + path @ plane.T])
    np.testing.assert_allclose(np.abs(pca.scores[:, :2]), np.abs(path), atol=1e-12)
    np.testing.assert_allclose(pca.explained, [9 / 13, 4 / 13, 0.0], atol=1e-14)
    # What is not there has no direction, rather than that of the rounding.
    assert not pca.scores[:, 2].any()


def test_a_large_constant_costs_no_more_digits_than_rounding_the_matrix_does():
    moved = functional_pca([ROWS + 1e8], 3, 20)
    rounded = functional_pca([(ROWS + 1e8) - 1e8], 3, 20)
    np.testing.assert_allclose(moved.scores, rounded.scores, atol=1e-13)
    # float32 blocks are multiplied in float64.
    single = ROWS.astype(np.float32)
    expected = functional_pca([single.astype(np.float64)], 3, 20)
    np.testing.assert_array_equal(functional_pca([single], 3, 20).scores, expected.scores)


def test_joint_components_are_those_of_stacked_runs():
    runs = functional_pca([np.concatenate([ROWS[:20], ROWS[:20]])], 3)
    alone = functional_pca([ROWS[:20]], 3)
    np.testing.assert_allclose(runs.scores[20:], runs.scores[:20], atol=1e-13)
    np.testing.assert_allclose(np.abs(runs.scores[:20]), np.abs(alone.scores), atol=1e-12)


def test_brownian_motion_has_the_shares_of_its_sine_series():
    """Centred over time, a walk has variances 1 / (pi k)^2 that sum to 1/6.

    Over 30 seeds of this size, shares over theirs varied by 1.1 %, 2.7 % and 2.5 % around 1.
    """
    walk = np.random.default_rng(1).standard_normal((400, 4000)).cumsum(axis=0)
    explained = functional_pca(np.split(walk, 4, axis=1)).explained
    error = explained / (6 / (np.pi * np.arange(1, 4)) ** 2) - 1
    assert np.all(np.abs(error) < 4 * np.array([0.011, 0.027, 0.025]))


MODEL = AttentionOnlyTransformer(
    num_layers=2, num_heads=2, d_model=8, vocab_size=6, context=7, init_scale=3.0
)
TOKENS = np.random.default_rng(5).integers(0, 6, (23, 7)).astype(np.uint16)


@pytest.mark.parametrize("tokens_at_once", [1, 70, 10_000])
def test_language_outputs_are_logits_of_the_token_after_the_position(tokens_at_once):
    params = init_params(jax.random.key(0), MODEL)
    batch = one_position(3, TOKENS)
    rows, at = np.arange(23), batch["position"]
    logits = np.asarray(MODEL.apply({"params": params}, TOKENS))[rows, at]
    following = TOKENS[rows, at + 1]
    for log_probs, expected in ((False, logits), (True, jax.nn.log_softmax(logits))):
        found = NextTokenOutputs(MODEL, log_probs, tokens_at_once)(0, params, batch)
        assert found.shape == (23, 1)
        np.testing.assert_allclose(found[:, 0], expected[rows, following], rtol=1e-4, atol=1e-5)


def test_positions_are_uniform_over_those_that_a_token_follows():
    found = one_position(0, np.zeros((60_000, 7), np.uint16))["position"]
    counts = np.bincount(found, minlength=6)
    assert counts.shape == (6,)
    assert np.abs(counts - 10_000).max() < 4 * (60_000 * (1 / 6) * (5 / 6)) ** 0.5
    np.testing.assert_array_equal(
        one_position(0, TOKENS)["position"], one_position(0, TOKENS)["position"]
    )
    assert (one_position(1, TOKENS)["position"] != one_position(0, TOKENS)["position"]).any()
    with pytest.raises(ValueError, match=r"shape \(4, 1\): give rows of 2 tokens or more"):
        one_position(0, TOKENS[:4, :1])


@pytest.mark.parametrize(("block", "checkpoint_batch"), [(23, 1), (5, 3)])
def test_a_planted_path_of_logits_is_found_in_its_plane(block, checkpoint_batch):
    """With W_U = 0 a logit is the bias of its token: here 3 cos t of token 1, 2 sin t of token 2.

    n of the outputs have a token, so that the path is an ellipse of half axes 3 sqrt(n_1) and
    2 sqrt(n_2), and a predictor that is a constant c at all outputs with token 1 lies on its axis.
    """
    params = init_params(jax.random.key(0), MODEL)
    t = closed(12)[:-1]
    biases = np.zeros((12, 6), np.float32)
    biases[:, 1], biases[:, 2] = 3 * np.cos(t), 2 * np.sin(t)
    checkpoints = [
        (step, params | {"W_U": np.zeros_like(params["W_U"]), "b_U": bias})
        for step, bias in enumerate(biases)
    ]
    batch = one_position(3, TOKENS)
    following = TOKENS[np.arange(23), batch["position"] + 1]
    n_1, n_2 = ((following == token).sum() for token in (1, 2))
    assert n_1 > n_2 > 0
    blocks = output_blocks(
        NextTokenOutputs(MODEL), checkpoints, batch, [7.0 * (following == 1)], block=block,
        checkpoint_batch=checkpoint_batch,
    )  # fmt: skip
    pca = functional_pca(blocks, 2, num_fitted=12)
    axes = np.sqrt([9 * n_1, 4 * n_2])
    np.testing.assert_allclose(pca.explained, axes**2 / np.sum(axes**2), rtol=1e-6)
    ellipse = np.stack([np.cos(t), np.sin(t)], axis=1) * axes
    np.testing.assert_allclose(np.abs(pca.scores[:12]), np.abs(ellipse), atol=1e-5)
    np.testing.assert_allclose(np.abs(pca.scores[12]), [7 * n_1**0.5, 0], atol=1e-5)


def test_predictors_of_something_else_are_refused():
    params = init_params(jax.random.key(0), MODEL)
    blocks = output_blocks(
        NextTokenOutputs(MODEL), [(0, params)], one_position(3, TOKENS), [np.zeros((23, 4))]
    )
    with pytest.raises(ValueError, match="references have 4 values a sequence, the outputs 1"):
        next(blocks)


@pytest.mark.parametrize(
    ("blocks", "options", "message"),
    [
        ([], {}, "blocks is empty: give at least one array"),
        ([ROWS, ROWS[:9]], {}, r"block 1 has shape \(9, 60\), the first has 23 rows"),
        ([ROWS[:, 0]], {}, r"block 0 has shape \(23,\)"),
        ([ROWS], {"num_fitted": 24}, "num_fitted=24, but the blocks have 23 rows"),
        ([ROWS], {"num_fitted": 1}, "num_fitted=1, but .* fit at least 2"),
        ([ROWS], {"num_components": 0}, "num_components=0: 23 fitted rows.* from 1 to 22"),
        ([ROWS[:3]], {}, "num_components=3: 3 fitted rows, once centred, have from 1 to 2"),
        ([ROWS, HOLED], {}, "row 7 of block 1 has values"),
        ([np.full((5, 9), 0.1)], {}, "the 5 fitted rows are all equal"),
    ],
)
def test_bad_blocks_are_explained(blocks, options, message):
    with pytest.raises(ValueError, match=message):
        functional_pca(blocks, **options)


def test_filter_leaves_constants_and_the_middle_of_lines():
    rows = np.arange(60.0)
    points = np.stack([np.full(60, 7.0), 2 * rows - 5], axis=1)
    smooth = gaussian_smooth(points, np.full(60, 2.0))
    np.testing.assert_allclose(smooth[:, 0], 7.0, rtol=1e-14)
    np.testing.assert_allclose(smooth[20:40, 1], points[20:40, 1], rtol=1e-12)
    assert smooth[0, 1] > points[0, 1]  # the end moves inwards


def test_filter_spreads_an_impulse_by_its_weights_and_the_width_of_each_row():
    impulse = np.zeros((9, 1))
    impulse[4] = 1.0
    widths = np.array([0.0, 1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 0.0, 1.0])
    smooth = gaussian_smooth(impulse, widths)[:, 0]
    rows = np.arange(9)
    for i, width in enumerate(widths):
        near = np.exp(-0.5 * ((rows - i) / width) ** 2) if width else np.eye(9)[i]
        assert smooth[i] == pytest.approx(near[4] / near.sum(), rel=1e-14)
    np.testing.assert_array_equal(gaussian_smooth(ROWS, 0.0), ROWS)


def test_published_widths():
    widths = published_widths(5000)
    assert widths.shape == (5000,)
    assert set(widths[:41]) == {1.0}
    assert widths[120] == pytest.approx(30.5)
    assert set(widths[200:]) == {60.0}


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_widths_are_checked(bad):
    with pytest.raises(ValueError, match=f"widths must be finite and >= 0, got {bad}"):
        gaussian_smooth(ROWS, np.append(np.ones(22), bad))


@pytest.mark.parametrize(("direction", "sign"), [(1, 1.0), (-1, -1.0)])
def test_circles_are_exact_on_a_circle_at_uneven_points_far_away(direction, sign):
    t = direction * np.cumsum(np.random.default_rng(2).uniform(0.2, 1.0, 30))
    circles = osculating_circles(circle(t, 2.5, centre=(1e3, -1e3)))
    inner = slice(1, -1)
    np.testing.assert_allclose(circles.centres[inner], [[1e3, -1e3]] * 28, rtol=0, atol=1e-10)
    np.testing.assert_allclose(circles.radii[inner], 2.5, rtol=1e-10)
    np.testing.assert_allclose(circles.curvature[inner], sign / 2.5, rtol=1e-10)
    for field in circles:
        assert np.isnan(field[[0, -1]]).all()


def test_straight_lines_have_no_curvature_and_coincident_points_no_circle():
    line = np.outer(np.geomspace(1, 2, 9), [0.3, -0.7]) + 0.1
    circles = osculating_circles(line)
    assert not circles.curvature[1:-1].any()
    assert np.isposinf(circles.radii[1:-1]).all()
    assert np.isnan(circles.centres).all()
    there_and_back = np.array([[0.0, 0], [1, 0], [1, 0], [1, 1], [1, 0], [3, 0]])
    assert np.isnan(osculating_circles(there_and_back).curvature[[1, 2, 3]]).all()
    assert vertices(line).size == vertices(there_and_back).size == 0


def test_an_ellipse_has_its_vertices_and_the_cusps_of_its_evolute_at_the_ends_of_its_axes():
    a, b = 3.0, 2.0
    t = closed(400)
    curve = np.stack([a * np.cos(t), b * np.sin(t)], axis=1)
    circles = osculating_circles(curve)
    rows = vertices(curve)
    np.testing.assert_allclose(t[rows], np.pi / 2 * np.arange(4), atol=1e-12)
    np.testing.assert_array_equal(vertices(curve, circles), rows)
    far, high = a - b**2 / a, b - a**2 / b
    expected = np.array([[far, 0], [0, high], [-far, 0], [0, -high]])
    # The circle through three points h apart is short of the limit by just this factor.
    factor = (1 + np.cos(t[1] - t[0])) / 2
    np.testing.assert_allclose(circles.centres[rows], factor * expected, atol=1e-10)
    evolute = np.stack([far * np.cos(t) ** 3, high * np.sin(t) ** 3], axis=1)
    np.testing.assert_allclose(circles.centres[1:-1], evolute[1:-1], atol=1e-3)
    assert cusps(curve).size == 0
    # The evolute turns back there and nowhere else.
    np.testing.assert_array_equal(1 + cusps(circles.centres[1:-1]), rows)


def test_a_vertex_between_two_rows_is_one_of_them():
    t = closed(400) + np.pi / 400
    rows = vertices(np.stack([3 * np.cos(t), 2 * np.sin(t)], axis=1))
    np.testing.assert_allclose(t[rows], np.pi / 2 * np.arange(4), atol=1.01 * np.pi / 400)


def test_the_vertex_of_an_arc_is_its_middle():
    # Steps of equal length that turn by these angles lie on arcs of circles.
    turns = np.repeat([0.1, 0.3, 0.1], [10, 7, 10])
    heading = np.cumsum(turns)
    curve = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0)
    assert curve.shape == (27, 2)
    # The turn at row i is that of the step after it.
    assert vertices(curve).tolist() == [10 + 3 - 1]


def test_a_cycloid_has_cusps_on_its_line_and_vertices_on_its_tops():
    t = closed(100, start=-1.0, turns=3.0)
    curve = np.stack([t - np.sin(t), 1 - np.cos(t)], axis=1)
    np.testing.assert_allclose(t[cusps(curve)], 2 * np.pi * np.arange(3), atol=1e-12)
    np.testing.assert_allclose(t[vertices(curve)], np.pi * np.array([1, 3, 5]), atol=1e-12)
    # A cusp between two rows is a corner at each, and no vertex at either.
    t = closed(100, start=-1.0, turns=3.0) + np.pi / 100
    curve = np.stack([t - np.sin(t), 1 - np.cos(t)], axis=1)
    found = t[cusps(curve, min_turn=75)].reshape(3, 2)
    np.testing.assert_allclose(found.mean(axis=1), 2 * np.pi * np.arange(3), atol=1e-12)
    assert vertices(curve).size == 3


def test_the_angle_of_a_cusp():
    corner = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])  # turns by 120 degrees
    for sign in ([1, 1], [1, -1]):
        assert cusps(sign * corner, min_turn=119.9).tolist() == [1]
        assert cusps(sign * corner, min_turn=120.1).tolist() == []


def test_a_parabola_has_one_vertex_and_a_logarithmic_spiral_none():
    x = np.linspace(-2, 2, 81)
    assert vertices(np.stack([x, x**2], axis=1)).tolist() == [40]
    t = np.linspace(0, 12, 300)
    spiral = np.exp(0.1 * t)[:, None] * circle(t)
    assert vertices(spiral).size == cusps(spiral).size == 0
    assert vertices(circle(np.cumsum(np.random.default_rng(4).uniform(0.1, 0.4, 99)))).size == 0


def test_inflections_and_straight_parts_are_no_vertices():
    x = np.linspace(-1.4, 1.4, 57)
    assert vertices(np.stack([x, x**3], axis=1)).size == 2  # one on each side of the inflection
    t = np.linspace(0, np.pi / 2, 20)
    ramp = np.stack([np.linspace(0, 2, 30)[1:-1], np.zeros(28)], axis=1)
    straight = np.concatenate(
        [circle(t - np.pi, 1, (0, 1)), ramp, circle(t - np.pi / 2, 1, (2, 1))]
    )
    assert vertices(straight).size == 0


@pytest.mark.parametrize("shape", [(5, 3), (2, 2), (8,)])
def test_curves_are_checked(shape):
    for function in (osculating_circles, vertices, cusps):
        with pytest.raises(ValueError, match="give at least 3 points in the plane"):
            function(np.zeros(shape))


def lissajous(u):
    return np.stack(
        [-2.2 * np.cos(np.pi * u), 1.1 * np.sin(2 * np.pi * u), 0.8 * np.cos(3 * np.pi * u)], axis=1
    )


def test_uneven_checkpoints_with_noise_have_the_vertices_of_the_curve():
    """Where a filter over rows makes many more, even without noise."""
    uneven = np.array(checkpoint_steps(500_000, 50, 50))
    u = np.log1p(uneven) / np.log1p(uneven[-1])
    noise = 0.01 * np.random.default_rng(3).standard_normal((u.size, 2))
    steps, path = smooth_path(uneven, lissajous(u)[:, :2] + noise)
    assert (steps[0], steps[-1]) == (uneven[0], pytest.approx(uneven[-1]))
    smooth = lissajous(np.log1p(steps) / np.log1p(uneven[-1]))[:, :2]
    assert np.sqrt(np.mean((path - smooth) ** 2)) < 0.01  # nearer than the checkpoints
    fine = np.linspace(0, 1, 4001)
    expected = fine[vertices(lissajous(fine)[:, :2])]
    found = np.log1p(steps[vertices(path)]) / np.log1p(uneven[-1])
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert vertices(gaussian_smooth(lissajous(u)[:, :2], 2.0)).size > 3 * expected.size


def drawn(num=30, num_references=2, num_components=3):
    steps = np.unique(np.rint(np.expm1(np.linspace(0, np.log1p(5000), num)))).astype(int)
    scores = lissajous(np.linspace(0, 1, steps.size))[:, :num_components]
    ideal = np.arange(3.0 * num_references).reshape(num_references, 3)[:, :num_components]
    explained = np.array([0.7, 0.2, 0.05])[:num_components]
    return steps, PCA(np.concatenate([scores, ideal]), explained, steps.size)


STAGES = [
    Stage(0, 60, "rise", 12.0, 0.5, 5.0, 1.0, (50, 70)),
    Stage(60, 5000, "fall", -3.0, 0.4, -2.0, float("nan"), (5000, 5000)),
]


def test_figure_holds_the_curve_the_references_and_the_stages():
    steps, pca = drawn()
    figure = trajectory_figure(steps, pca, stages=STAGES, references=["zero", "$ridge"])
    planes, bar, times = figure.axes[:3], figure.axes[3], figure.axes[4:]
    names = ["PC1 (70.0% of variance)", "PC2 (20.0% of variance)", "PC3 (5.0% of variance)"]
    pairs = [(0, 1), (0, 2), (1, 2)]
    _, path = smooth_path(steps, pca.scores[: steps.size])
    for ax, (i, j) in zip(planes, pairs, strict=True):
        assert (ax.get_xlabel(), ax.get_ylabel()) == (names[i], names[j])
        assert ax.get_aspect() == 1.0
        lines = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        np.testing.assert_array_equal(
            lines["checkpoint"].get_xydata(), pca.scores[: steps.size, [i, j]]
        )
        np.testing.assert_array_equal(lines["zero"].get_xydata(), [pca.scores[-2, [i, j]]])
        np.testing.assert_array_equal(lines[r"\$ridge"].get_xydata(), [pca.scores[-1, [i, j]]])
        (curve,) = (
            c for c in ax.collections if isinstance(c, matplotlib.collections.LineCollection)
        )
        np.testing.assert_array_equal([s[0] for s in curve.get_segments()], path[:-1, [i, j]])
        (low, high), everything = ax.get_xlim(), pca.scores[:, i]
        assert low < everything.min() < everything.max() < high
        assert high - low < 1.2 * np.ptp(pca.scores[:, [i, j]], axis=0).max()
        assert [text.get_text() for text in ax.texts] == ["1|2"]
    assert bar.get_xlabel() == "training step"
    for i, ax in enumerate(times):
        assert ax.get_ylabel() == names[i]
        assert ax.get_xlabel().startswith("training step")
        np.testing.assert_array_equal(ax.lines[0].get_ydata(), pca.scores[: steps.size, i])
        assert [p.get_x() for p in ax.patches] == [0, 60]
        assert [text.get_text() for text in ax.texts] == ["1", "2", "stage"]


def test_labels_stand_beside_the_path_at_their_step():
    steps, pca = drawn()
    figure = trajectory_figure(steps, pca, labels={700: "form"}, stages=STAGES)
    grid, path = smooth_path(steps, pca.scores[: steps.size])
    (note,) = figure.axes[0].texts
    assert note.get_text() == "form"
    np.testing.assert_array_equal(note.xy, path[np.abs(grid - 700).argmin(), :2])


def test_marks_are_those_of_the_curve_in_sight():
    ax = base.InlineFigure().subplots()
    t = closed(400)
    curve = np.stack([3 * np.cos(t), 2 * np.sin(t)], axis=1)
    ax.set(xlim=(-3.5, 3.5), ylim=(-2.2, 3.5))  # the lowest centre of the four is at -2.5
    geometry_in_plane(ax, curve)
    lines = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    expected = [[3, 0], [-3, 0], [0, -2]]
    np.testing.assert_allclose(lines["vertex"].get_xydata(), expected, atol=1e-12)
    assert lines["cusp"].get_xydata().size == 0
    evolute = lines["evolute"].get_xydata()
    assert np.nanmin(evolute[:, 1]) > -2.2
    assert np.nanmax(evolute[:, 1]) == pytest.approx(2.5, rel=1e-3)


@pytest.mark.parametrize(
    ("num", "num_references", "num_components"), [(4, 0, 3), (12, 1, 2), (20, 6, 3)]
)
def test_every_size_of_trajectory_can_be_drawn(num, num_references, num_components):
    steps, pca = drawn(num, num_references, num_components)
    names = [f"predictor {i}" for i in range(num_references)]
    figure = trajectory_figure(steps, pca, references=names)
    shown = figure.axes[0].get_legend_handles_labels()[1]
    assert [name for name in shown if name.startswith("predictor")] == names
    assert base.png(figure, dpi=30).startswith(b"\x89PNG")
    beside = trajectory_figure(steps, pca, others=[pca.scores[:3] + 1.0, 5.0 * pca.scores[:4]])
    lines = {line.get_label(): line for line in beside.axes[0].lines}
    np.testing.assert_array_equal(lines["run 3"].get_xydata(), 5.0 * pca.scores[:4, :2])
    (left, right), reach = beside.axes[0].get_xlim(), 5.0 * pca.scores[:4, 0]
    assert left < reach.min()
    assert reach.max() < right
    alone = trajectory_figure(steps, pca)
    assert "predictor 0" not in alone.axes[0].get_legend_handles_labels()[1]


def test_few_checkpoints_are_joined_and_nothing_is_made_of_it():
    steps, pca = drawn(13)
    ax = trajectory_figure(steps, pca).axes[0]
    assert ax.get_legend_handles_labels()[1] == ["checkpoint"]
    (line,) = (c for c in ax.collections if isinstance(c, matplotlib.collections.LineCollection))
    np.testing.assert_array_equal([s[0] for s in line.get_segments()], pca.scores[:12, :2])


def test_a_dense_run_is_smoothed_by_the_published_filter():
    steps = np.arange(1200) * 100
    turn = np.linspace(0, 2 * np.pi, steps.size)
    pca = functional_pca([np.stack([np.cos(turn), 0.5 * np.sin(turn), 0.1 * turn], axis=1)], 2)
    ax = trajectory_figure(steps, pca).axes[0]
    (line,) = (c for c in ax.collections if isinstance(c, matplotlib.collections.LineCollection))
    smooth = gaussian_smooth(pca.scores, published_widths(steps.size))
    np.testing.assert_array_equal([s[0] for s in line.get_segments()], smooth[:-1])


def test_components_that_vanish_can_be_drawn():
    steps, _ = drawn()
    pca = functional_pca([np.outer(np.log1p(steps), [1.0, 2.0, 3.0])])
    assert base.png(trajectory_figure(steps, pca), dpi=30).startswith(b"\x89PNG")


def test_figures_explain_what_does_not_fit():
    steps, pca = drawn()
    with pytest.raises(ValueError, match=r"28 fitted rows, 2 others .* and 1 references"):
        trajectory_figure(steps, pca, references=["zero"])
    with pytest.raises(ValueError, match=r"steps of shape \(5,\)"):
        trajectory_figure(steps[:5], pca)
    with pytest.raises(ValueError, match="at least 2 components"):
        trajectory_figure(*drawn(num_components=1))
