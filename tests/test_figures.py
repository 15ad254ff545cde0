"""Figures hold exactly the data they are given, whatever is missing from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray
from matplotlib.figure import Figure

import llc_jax
from llc_jax import Curvature
from llc_jax.figures import base, chains, llc
from llc_jax.figures.curvature import curvature_figure
from llc_jax.stages.boundaries import Stage
from llc_jax.stages.smoothing import smooth_curve

NBETA = 50.0
STAGES = [
    Stage(0, 30, "flat", 0.1, 0.4, 0.03, 0.97, (20, 41)),
    Stage(30, 300, "rise", 12.0, 0.5, 5.0, 1.0, (250, 310)),
    Stage(300, 1000, "fall", -3.0, 0.4, -2.0, float("nan"), (1000, 1000)),
]
STEPS = [0, 3, 10, 30, 100, 300, 1000]


def make_sweep(steps=STEPS, *, dead=(), lost=(), num_chains=4, num_draws=40, num_burnin=12):
    """A gathered sweep; chain 1 diverged at checkpoints `dead`, all chains at `lost`."""
    rng = np.random.default_rng(0)
    shape = (len(steps), num_chains, num_burnin + num_draws)
    anchors = 2.0 + 0.1 * rng.standard_normal(shape).astype(np.float32)
    losses = anchors + 0.1 + 0.02 * rng.standard_normal(shape).astype(np.float32)
    diverged_at = np.full(shape[:2], -1)
    for row in dead:
        losses[row, 1, 20:], diverged_at[row, 1] = np.nan, 20
    for row in lost:
        losses[row, :, 5:], diverged_at[row] = np.inf, 5
    after, finite = slice(num_burnin, None), diverged_at < 0
    with np.errstate(invalid="ignore"):
        gaps = np.where(finite, NBETA * (losses - anchors)[..., after].mean(-1), np.nan)
    count = finite.sum(1)
    mean = np.where(count, np.nansum(gaps, 1) / np.maximum(count, 1), np.nan)
    verdict = np.where(count == num_chains, "ok", "some chains diverged")
    number = np.where(count, 0.5, np.nan)
    chains = np.broadcast_to(np.arange(num_chains, 0, -1.0), shape[:2])
    return xarray.Dataset(
        {
            "llc": ("checkpoint", mean),
            "verdict": ("checkpoint", verdict),
            "warnings": ("checkpoint", np.where(verdict == "ok", "", "Some sentence.")),
            "num_finite": ("checkpoint", count),
            **{
                name: ("checkpoint", number)
                for name in ("stderr", "init_loss", "rhat", "ess", "below_anchor", "drift")
            },
            "per_chain": (("checkpoint", "chain"), gaps),
            "acceptance": (("checkpoint", "chain"), np.where(finite, 0.9, np.nan)),
            "stability": (("checkpoint", "chain"), np.where(finite, chains / 10, np.nan)),
            "distance": (
                ("checkpoint", "chain", "draw"),
                np.where(finite, chains, 1e9)[..., None] + np.arange(num_draws) / num_draws,
            ),
            "diverged_at": (("checkpoint", "chain"), diverged_at),
            "losses": (("checkpoint", "chain", "draw"), losses[..., after]),
            "anchor_losses": (("checkpoint", "chain", "draw"), anchors[..., after]),
            "burnin_losses": (("checkpoint", "chain", "burnin"), losses[..., :num_burnin]),
        },
        coords={"checkpoint": np.asarray(steps)},
        attrs={"sampler": "SGLD", "nbeta": NBETA, "localization": 10.0},
    )


def overview(sweep, **options):
    given = {"train_steps": np.arange(1001), "train_losses": np.linspace(4, 2, 1001)} | options
    return llc.overview_figure(sweep, **given)


@pytest.fixture
def ax():
    return Figure().subplots()


def labelled(ax):
    handles, labels = ax.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def bands(ax):
    """(start, end) of every band across the axes."""
    return [(p.get_x(), p.get_x() + p.get_width()) for p in ax.patches]


def test_loss_and_baselines_are_those_given(ax):
    steps, losses = np.arange(0, 50, 5), np.linspace(4, 1, 10)
    assert llc.loss_over_steps(ax, steps, losses, {"zero": 4.125, r"$\frac{$": 1.5}) is ax
    shown = labelled(ax)
    np.testing.assert_array_equal(shown["training loss"].get_xydata(), np.c_[steps, losses])
    assert set(shown["4.125  zero"].get_ydata()) == {4.125}
    ax.legend()
    base.png(ax.figure)  # the dollars are no mathematics
    assert len(ax.lines) == 3


def test_llc_points_bars_and_curve_are_those_given(ax):
    values, stderr = np.array([-2.0, 1.0, 3.0, 6.0, 9.0]), np.array([0.5, 0.1, np.nan, 0.2, 0.3])
    steps = np.array([0, 1, 10, 100, 1000])
    curve = smooth_curve(steps, values, stderr)
    llc.llc_over_steps(ax, steps, values, stderr, curve)
    points, _, (bars,) = labelled(ax)[base.LLC + " ± 1 s.e."]
    np.testing.assert_array_equal(points.get_xydata(), np.c_[steps, values])
    (low, high) = bars.get_segments()[0][:, 1]
    assert (low, high) == (-2.5, -1.5)
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), np.c_[curve.steps, curve.mean])


def test_diverged_checkpoints_are_marked_not_hidden(ax):
    values = np.array([1.0, np.nan, 3.0, np.nan])
    llc.llc_over_steps(
        ax, [1, 2, 3, 4], values, [0.1, np.nan, 0.1, np.nan], diverged=[False, True, True, True]
    )
    shown = labelled(ax)
    assert shown["some chains diverged"].get_xydata().tolist() == [[3, 3.0]]
    assert shown["no finite chain"].get_xdata().tolist() == [2, 4]
    assert shown[base.LLC + " ± 1 s.e."][0].get_xdata().tolist() == [1, 3]


def test_stage_bands_span_exactly_start_to_end(ax):
    base.log_step_axis(ax, 0, 1000)
    base.stage_bands(ax, STAGES)
    assert bands(ax) == [(0, 30), (30, 300), (300, 1000)]
    assert [text.get_text() for text in ax.texts] == ["1 flat", "2 rise", "3 fall", "stage"]
    lines = [line for line in ax.lines if len(set(line.get_xdata())) == 1]
    assert [line.get_xdata()[0] for line in lines] == [30, 300]
    assert lines[0].get_alpha() < lines[1].get_alpha()  # the surer, the stronger
    intervals = [tuple(line.get_xdata()) for line in ax.lines if line not in lines]
    assert intervals == [(20, 41), (250, 310)]


def test_narrow_stages_are_only_numbered(ax):
    base.log_step_axis(ax, 0, 100_000)
    base.stage_bands(ax, [s._replace(start=999, end=1001) for s in STAGES[:1]])
    assert ax.texts[0].get_text() == "1"


@pytest.mark.parametrize(
    ("first", "last", "ticks"),
    [
        (0, 3000, ["0", "1", "10", "100", "1k"]),
        (0, 500_000, ["0", "1", "10", "100", "1k", "10k", "100k"]),
        (5000, 50_000, None),
        (2000, 2000, None),
        (0, 0, None),
    ],
)
def test_log_step_axis_has_ticks_in_range(ax, first, last, ticks):
    base.log_step_axis(ax, first, last)
    left, right = ax.get_xlim()
    assert -1 < left <= first <= last <= right
    ax.figure.canvas.draw()
    inside = [
        label.get_text()
        for tick, label in zip(ax.get_xticks(), ax.get_xticklabels(), strict=True)
        if left <= tick <= right
    ]
    assert inside == ticks if ticks else inside


def test_traces_hold_every_draw(ax):
    one = make_sweep(dead=[2]).isel(checkpoint=2)
    losses, burnin = one.losses.values, one.burnin_losses.values
    chains.traces(ax, losses, burnin, 2.0, one.diverged_at.values)
    whole = np.concatenate([burnin, losses], axis=1)
    thin = [line for line in ax.lines if line.get_lw() == 0.5]
    for line, values in zip(thin, whole, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.c_[np.arange(52), values])
    shown = labelled(ax)
    assert set(shown["anchor loss"].get_ydata()) == {2.0}
    assert shown["chain diverged"].get_xdata().tolist() == [20]
    assert bands(ax) == [(0, 12)]
    # A chain's thick line is its moving average: its mean is that of its windows' means.
    thick, window = shown["chain 0"].get_xydata(), 52 // 20
    np.testing.assert_allclose(thick[0], [(window - 1) / 2, whole[0, :window].mean()], rtol=1e-6)


def test_a_diverging_chain_does_not_set_the_limits(ax):
    losses = np.ones((2, 30))
    losses[1, 10:20], losses[1, 20:] = 1e25, np.nan
    chains.traces(ax, losses, np.ones((2, 0)), 1.0, [-1, 20])
    assert ax.get_ylim()[1] < 2


def test_running_llc_ends_at_the_estimate_of_each_chain(ax):
    sweep = make_sweep(dead=[1]).isel(checkpoint=1)
    chains.running_llc(
        ax, sweep.losses, sweep.anchor_losses, NBETA, num_burnin=12, diverged_at=sweep.diverged_at
    )
    ends = {line.get_label(): line.get_xydata()[-1].tolist() for line in ax.lines}
    expected = {f"chain {c}": [51, pytest.approx(sweep.per_chain.values[c])] for c in (0, 2, 3)}
    assert ends == expected


def test_overview_shares_one_axis_of_steps():
    sweep = make_sweep(dead=[3], lost=[4])
    top, bottom = overview(sweep, stages=STAGES, baselines={"zero": 4.1}).axes
    assert top.get_xlim() == bottom.get_xlim()
    assert bands(top) == bands(bottom) == [(0, 30), (30, 300), (300, 1000)]
    assert labelled(bottom)["some chains diverged"].get_xdata().tolist() == [30]
    assert labelled(bottom)["no finite chain"].get_xdata().tolist() == [100]


@pytest.mark.parametrize(
    "sweep",
    [
        make_sweep([500]),
        make_sweep([0]),
        make_sweep([0], lost=[0]),
        make_sweep(np.arange(190) * 2600),
        make_sweep(num_burnin=0),
        make_sweep(num_chains=1, num_draws=1, num_burnin=0),
        make_sweep([1, 2], num_chains=9),
        make_sweep(lost=range(7)),
    ],
    ids=["one", "zero", "one-lost", "190", "no-burnin", "one-draw", "9-chains", "all-lost"],
)
@pytest.mark.parametrize("stages", [[], STAGES[:1]], ids=["no-stage", "one-stage"])
def test_every_size_of_sweep_can_be_drawn(sweep, stages):
    for figure in (overview(sweep, stages=stages), chains.chain_traces_figure(sweep)):
        assert base.png(figure, dpi=30).startswith(b"\x89PNG")
    columns = chains.chain_traces_figure(sweep).axes
    assert len(columns) == 2 * min(sweep.sizes["checkpoint"], 3)


def test_chain_traces_of_chosen_checkpoints():
    axes = chains.chain_traces_figure(make_sweep(), [3, 1000]).axes
    assert [ax.get_title().split(":")[0] for ax in axes] == ["step 3", "step 1,000", "", ""]


def test_png_is_deterministic_and_dateless():
    one, two = (base.png(overview(make_sweep(), stages=STAGES), dpi=40) for _ in range(2))
    assert one == two
    assert b"tEXt" not in one
    assert b"tIME" not in one


def squared(params, batch):
    return jnp.sum(params["w"] ** 2) + 0.0 * batch["x"]


def test_an_estimate_without_burnin_plots_itself_too():
    estimate = llc_jax.estimate_llc(
        jax.random.key(0), squared, {"w": jnp.zeros(3)}, {"x": jnp.zeros(8)},
        sampler=llc_jax.SGLD(1e-3), localization=1.0, num_draws=20, num_burnin=0,
    )  # fmt: skip
    _, running = estimate.plot().axes
    ends = [line.get_ydata()[-1] for line in running.lines]
    np.testing.assert_allclose(ends, estimate.per_chain)


def test_estimate_plots_itself_and_shows_in_notebooks():
    formatters = pytest.importorskip("IPython.core.formatters")
    estimate = llc_jax.estimate_llc(
        jax.random.key(0),
        squared,
        {"w": jnp.zeros(3)},
        {"x": jnp.zeros(8)},
        sampler=llc_jax.SGLD(1e-3),
        localization=1.0,
        num_draws=20,
        num_burnin=5,
    )
    figure = estimate.plot()
    traces, running = figure.axes
    assert bands(traces) == [(0, 5)]
    ends = [line.get_ydata()[-1] for line in running.lines]
    np.testing.assert_allclose(ends, estimate.per_chain)
    shown, _ = formatters.DisplayFormatter().format(figure)
    assert shown["image/png"].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("value", "stderr", "expected"),
    [
        (-12.3304, 0.466, ("−12.33", "0.47")),
        (45.75, 1.567, ("45.8", "1.6")),
        (12345.6, 123.4, ("12,346", "123")),
        (3.14159, np.nan, ("3.142", "nan")),
        (np.nan, np.nan, ("nan", "nan")),
        (1.0, 0.0, ("1", "0")),
    ],
)
def test_rounded_to_the_second_digit_of_the_error(value, stderr, expected):
    assert base.rounded(value, stderr) == expected


def measured_at(steps, llc_of=float):
    """Made-up curvature whose numbers tell which field and step they are."""
    return {
        step: Curvature(
            trace=100.0 + i, trace_stderr=1.0, largest=np.array([50.0, 20.0]) + i,
            largest_residuals=np.array([0.0, 2.0]), smallest=np.array([-5.0, -1.0]) - i,
            smallest_residuals=np.zeros(2), gaussian_llc=llc_of(i), gaussian_llc_stderr=0.5,
            positive_llc=9.0 + i, positive_llc_stderr=0.25, num_products=10,
        )
        for i, step in enumerate(steps)
    }  # fmt: skip


def drawn_lines(ax):
    joined = [line for line in ax.lines if line.get_marker() in ("o", "s")]
    return [(line.get_xdata(), line.get_ydata()) for line in joined]


def test_curvature_stands_under_the_llc_with_the_stages_across_all():
    measured = measured_at(STEPS, lambda i: np.nan if i == 2 else 3.0 + i)
    figure = curvature_figure(make_sweep(), measured, stages=STAGES)
    _, gaussian, trace, eigenvalues = figure.axes
    for ax in figure.axes:
        assert bands(ax)[:3] == [(s.start, s.end) for s in STAGES]
    count = np.arange(len(STEPS))
    lines = drawn_lines(gaussian)
    np.testing.assert_array_equal(lines[0][0], STEPS)
    np.testing.assert_array_equal(lines[0][1], 9.0 + count)
    np.testing.assert_array_equal(lines[1][1], np.where(count == 2, np.nan, 3.0 + count))
    np.testing.assert_array_equal(drawn_lines(trace)[0][1], 100.0 + count)
    ends = [y for _, y in drawn_lines(eigenvalues)]
    expected = [50.0 + count, 20.0 + count, -5.0 - count, -1.0 - count]
    np.testing.assert_array_equal(ends, expected)
    base.png(figure)


def test_eigenvalues_far_apart_get_a_logarithmic_scale_that_passes_through_zero():
    measured = measured_at([0, 1])
    wide = {s: m._replace(largest=np.array([1e5, 1.0])) for s, m in measured.items()}
    for found, scale in ((measured, "linear"), (wide, "symlog")):
        axes = curvature_figure(make_sweep([0, 1]), found).axes[3]
        assert axes.get_yscale() == scale
