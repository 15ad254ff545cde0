"""Figures of a language model hold the data they are given; so does the heat-map of its texts."""

import html.parser
import re

import numpy as np
import pytest
import xarray
from matplotlib.colors import to_rgb

from llc_jax.figures import base, llc
from llc_jax.problems.language import datasets as language_datasets
from llc_jax.problems.language import figures as draw
from llc_jax.report import heatmap
from llc_jax.stages.boundaries import Stage

STEPS = np.unique(np.rint(np.geomspace(1, 50_001, 30)).astype(int)) - 1
STAGES = [
    Stage(0, 900, "rise", 60.0, 2.0, 5.0, 1.0, (700, 1100)),
    Stage(900, 8500, "fall", -1.0, 0.4, -2.0, 0.8, (7000, 9500)),
    Stage(8500, 50_000, "rise", 10.0, 1.0, 3.0, float("nan"), (50_000, 50_000)),
]
BASELINE = 0.0625


def measured(step, layers, heads, length, lengths, rng):
    """Made-up but plausible measurements of one checkpoint."""

    def late(at, width=0.5):
        return 1 / (1 + np.exp(-(np.log1p(step) - np.log(at)) / width))

    token = np.arange(1, length)
    loss = 7.9 - 3.3 * late(60) - (0.6 + 0.2 * np.log(token)) * late(3000)
    ablated = 7.9 - 3.3 * late(60) + 0.4 * late(10_000) + 0 * loss
    bigram = 7.9 - 3.4 * late(50) + 1.2 * late(5000)
    score = np.array([1 + 0.8 * n * late(2500 * n) for n in lengths])
    place = np.arange(length) / length
    # The first layer looks back by one token, the others at repetitions.
    strength = rng.uniform(0.2, 1, (layers, heads)) ** 3
    first = np.arange(layers)[:, None] == 0
    found = {
        "loss": loss,
        "mean_loss": loss.mean(),
        "ablated_loss": ablated,
        "ablated_mean_loss": ablated.mean(),
        "icl": -0.08 - 0.15 * late(12_000),
        "bigram_score": bigram,
        "bigram_floor": 4.29,
        "bigram_kl": bigram - 4.29,
        "previous_token": 0.03 + 0.3 * late(10_000) * np.where(first, 1, 0.4) * strength,
        "prefix_matching": 0.011 + 0.1 * late(15_000) * np.where(first, 0.02, 1) * strength,
        "induction": 0.013 + 0.2 * late(15_000) * np.where(first, 0.02, 1) * strength,
    }
    if lengths:
        found |= {"ngram_loss": 3 / score, "ngram_score": score, "ngram_score_published": score}
    found |= {f"{name}_stderr": 0.01 * np.abs(value) for name, value in found.items()}
    found |= {
        "text_log_probs": -np.ones((2, length - 1)),
        "weight_norm": 95 + 200 * late(20_000),
        "weight_norms": np.array([30.0, 90.0]),
        "position_explained": np.array([0.1, 0.05, 0.02]) * (1 + 4 * late(2000)),
        "position_coordinates": 0.02 * rng.standard_normal((length, 3))
        + late(2000) * np.stack([place, (place - 0.5) ** 2, place**3], axis=1),
        "position_norm": 1 + late(2000) * place,
    }
    if layers > 1:
        for kind, size in zip("kqv", (0.1, 0.03, 0.01), strict=True):
            pairs = rng.uniform(-0.3, 1, (heads, heads)) ** 3
            found[f"{kind}_composition"] = BASELINE + size * pairs * late(12_000)
    return found


def make_found(steps=STEPS, layers=2, heads=4, length=128, lengths=(2, 3, 4)):
    rows = [measured(step, layers, heads, length, lengths, np.random.default_rng(0))
            for step in steps]  # fmt: skip
    one = [language_datasets.dataset(row, lengths, ["W_E", "W_pos"]) for row in rows]
    return xarray.concat(one, xarray.Variable("checkpoint", np.asarray(steps)))


@pytest.fixture(scope="module")
def found():
    return make_found()


def labelled(ax):
    handles, labels = ax.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def assert_shows(line, values):
    np.testing.assert_array_equal(line.get_xdata(), STEPS)
    np.testing.assert_array_equal(line.get_ydata(), values)


def assert_on_steps_with_stages(axes):
    """One logarithmic axis of steps for all, labelled at the foot, and every stage on each."""
    assert axes[-1].get_xlabel() == "training step (log(step + 1) scale)"
    for ax in axes:
        assert ax.get_xscale() == "function"
        assert ax.get_xlim() == axes[-1].get_xlim()
        shaded = [(p.get_x(), p.get_x() + p.get_width()) for p in ax.patches]
        assert shaded == [(0, 900), (900, 8500), (8500, 50_000)]
    assert "stage" in [text.get_text() for text in axes[0].texts]


def test_behavior_holds_losses_bigrams_ngrams_and_icl(found):
    axes = draw.behavior_figure(found, stages=STAGES).axes
    assert_on_steps_with_stages(axes)
    losses, bigrams, ngrams, icl = (labelled(ax) for ax in axes)
    assert_shows(losses["test loss ± 1 s.e."], found.mean_loss)
    assert_shows(losses["without positions"], found.ablated_mean_loss)
    assert_shows(bigrams["model"], found.bigram_score)
    assert_shows(bigrams["least possible"], found.bigram_floor)
    assert bigrams["least possible"].get_linestyle() == ":"
    for n in (2, 3, 4):
        assert_shows(ngrams[f"n = {n}"], found.ngram_score.sel(n=n))
    assert set(ngrams["like any token"].get_ydata()) == {1.0}
    assert_shows(icl["difference ± 1 s.e."], found.icl)
    assert [0.0, 0.0] in [list(line.get_ydata()) for line in axes[3].lines]
    (band,) = axes[3].collections
    corners = band.get_paths()[0].vertices
    sides = {(x, y) for x, y in corners.astype(np.float32)}
    error = found.icl_stderr.values
    for sign in (1, -1):
        assert set(zip(STEPS, found.icl.values + sign * error, strict=True)) <= sides
    for ax in (axes[0], axes[1], axes[3]):
        assert "nats" in ax.get_ylabel()


def test_without_ngrams_their_panel_is_left_out():
    axes = draw.behavior_figure(make_found(STEPS[:3], lengths=())).axes
    assert len(axes) == 3
    assert not any("n-gram" in ax.get_ylabel() for ax in axes)


def test_positions_are_spread_over_the_sequence_in_both_panels(found):
    axes = draw.positions_figure(found, stages=STAGES).axes
    assert_on_steps_with_stages(axes)
    assert axes[0].get_ylim() == axes[1].get_ylim()
    tokens = [1, 2, 4, 8, 16, 32, 64, 127]
    for ax, name in zip(axes, ("loss", "ablated_loss"), strict=True):
        shown = labelled(ax)
        shown.pop("boundary, 68 % interval", None)
        assert list(shown) == [f"token {token}" for token in tokens]
        for token, line in zip(tokens, shown.values(), strict=True):
            # Column k of the array is the loss of token k + 1.
            assert_shows(line, found[name].values[:, token - 1])


def names_of(ax):
    return {text.get_text(): text for text in ax.texts if ":" in text.get_text()}


def test_every_head_is_drawn_in_the_colours_of_its_layer_and_the_best_are_named(found):
    chance = {"prefix_matching": 0.011, "induction": 0.013}
    uniform = {f"{k}_uniform": ("checkpoint", np.full(len(STEPS), v)) for k, v in chance.items()}
    figure = draw.heads_figure(found.assign(uniform), stages=STAGES)
    assert_on_steps_with_stages(figure.axes)
    for ax, score in zip(figure.axes, draw.HEADS, strict=True):
        lines = ax.lines[:8]
        red, _, blue = np.array([to_rgb(line.get_color()) for line in lines]).T
        assert (blue[:4] > red[:4]).all()
        assert (blue[4:] < red[4:]).all()
        values = found[score].values
        for (layer, head), line in zip(np.ndindex(2, 4), lines, strict=True):
            assert_shows(line, values[:, layer, head])
        best = np.argsort(-values[-1].ravel())[:3]
        named = names_of(ax)
        assert set(named) == {f"{i // 4 + 1}:{i % 4 + 1}" for i in best}
        for i in best:
            text = named[f"{i // 4 + 1}:{i % 4 + 1}"]
            assert to_rgb(text.get_color()) == to_rgb(lines[i].get_color())
        assert {i for i, line in enumerate(lines) if line.get_lw() == 2} == set(best)
        uniform = labelled(ax).get("uniform attention")
        assert (set(uniform.get_ydata()) if uniform else None) == (
            {chance[score]} if score in chance else None
        )
    (legend,) = figure.legends
    assert {"heads of layer 1", "heads of layer 2", "uniform attention"} <= {
        text.get_text() for text in legend.get_texts()
    }


def test_names_stand_beside_their_lines_unless_they_would_overlap():
    ax = base.InlineFigure().subplots()
    ax.set_ylim(0, 10)
    draw._name_ends(ax, {"1:1": (2.0, "k"), "1:2": (2.1, "k"), "2:1": (9.9, "k"), "2:2": (6, "k")})
    places = {name: text.get_position()[1] for name, text in names_of(ax).items()}
    assert places == pytest.approx({"1:1": 0.2, "1:2": 0.3, "2:1": 0.99, "2:2": 0.6})
    crowded = base.InlineFigure().subplots()
    draw._name_ends(crowded, {f"1:{i}": (0.97, "k") for i in range(4)})
    places = sorted(text.get_position()[1] for text in crowded.texts)
    assert places == pytest.approx([0.7, 0.8, 0.9, 1.0])


def test_a_head_is_ranked_by_its_last_finite_score_and_never_named_without_one():
    values = np.array([[0.1, 0.9, np.nan, 0.2], [0.3, np.nan, np.nan, 0.4]])
    assert draw._highest_last(values, 4) == [1, 3, 0]
    assert draw._highest_last(values, 2) == [1, 3]


def test_composition_names_the_strongest_pairs_beside_the_baseline(found):
    axes = draw.composition_figure(found, BASELINE, stages=STAGES).axes
    assert_on_steps_with_stages(axes)
    for ax, kind in zip(axes, "kqv", strict=True):
        assert ax.get_ylabel().startswith(f"{kind.upper()}-composition")
        values = found[f"{kind}_composition"].values
        for (early, late), line in zip(np.ndindex(4, 4), ax.lines[:16], strict=True):
            assert_shows(line, values[:, early, late])
        strongest = np.argsort(-values[-1].ravel())[:4]
        expected = {f"1:{i // 4 + 1} → 2:{i % 4 + 1}" for i in strongest}
        assert set(names_of(ax)) == expected
        baseline = labelled(ax)["unrelated heads"]
        assert set(baseline.get_ydata()) == {BASELINE}
        assert baseline.get_linestyle() == "--"
        colored = {i for i, line in enumerate(ax.lines[:16]) if line.get_color() != "0.7"}
        assert colored == set(strongest)


def test_all_kinds_of_composition_fit_the_scale_they_share(found):
    steep = found.assign(v_composition=5 * found.v_composition)
    axes = draw.composition_figure(steep, BASELINE).axes
    assert axes[0].get_ylim() == axes[2].get_ylim()
    assert axes[0].get_ylim()[0] == 0
    assert axes[0].get_ylim()[1] > steep.v_composition.max()


def test_one_layer_has_no_composition():
    with pytest.raises(ValueError, match=r"found has no k_composition.* leave this figure out"):
        draw.composition_figure(make_found(STEPS[:2], layers=1), BASELINE)


def test_embedding_holds_shares_norms_and_coordinates(found):
    figure = draw.embedding_figure(found, stages=STAGES)
    shares, position_norms, norm, *planes, bar = figure.axes
    assert_on_steps_with_stages([shares, position_norms, norm])
    for i in range(3):
        line = labelled(shares)[f"component {i + 1}"]
        assert_shows(line, found.position_explained.values[:, i])
    for position in (0, 1, 3, 7, 15, 31, 63, 127):
        line = labelled(position_norms)[f"position {position}"]
        assert_shows(line, found.position_norm.values[:, position])
    assert position_norms.get_ylim()[0] == 0
    assert_shows(labelled(norm)["all weights"], found.weight_norm)
    rows = draw.spread(STEPS, 6)
    for ax, row in zip(planes, rows, strict=True):
        (points,) = ax.collections
        expected = found.position_coordinates.values[row, :, :2]
        np.testing.assert_array_equal(points.get_offsets(), expected)
        np.testing.assert_array_equal(points.get_array(), np.arange(128))
        assert ax.get_title() == f"positions at step {STEPS[row]:,}"
        share = found.position_explained.values[row, 0]
        assert ax.get_xlabel() == f"component 1 ({share:.0%})"
        assert ax.get_aspect() == 1.0
    assert bar.get_ylabel() == "position"


def test_checkpoints_are_spread_over_the_logarithm_of_the_step():
    assert draw.spread(np.arange(1024), 6) == [0, 3, 15, 63, 255, 1023]
    assert draw.spread(np.array([0, 1000, 1023]), 6) == [0, 1, 2]
    assert draw.spread(np.array([7]), 6) == [0]


def test_published_init_beside_the_paired_estimate():
    """nβ = 10 and losses 0.5, 2: of 2 chains the first gets nβ ℓ / 2 on top, the second nothing."""
    sweep = xarray.Dataset(
        {
            "per_chain": (("checkpoint", "chain"), [[1.0, 2.0], [3.0, 5.0]]),
            "init_loss": ("checkpoint", [0.5, 2.0]),
            "llc": ("checkpoint", [1.5, 4.0]),
            "stderr": ("checkpoint", [0.5, 1.0]),
        },
        coords={"checkpoint": [0, 900]},
        attrs={"nbeta": 10.0},
    )
    (ax,) = llc.published_init_figure(sweep, stages=STAGES).axes
    assert "lambda" in ax.get_ylabel()
    shown = labelled(ax)
    for label, values, errors in (
        # Chains 3.5 and 2, then 13 and 5: their mean and their spread.
        ("published init loss ± spread over chains", [2.75, 9.0], np.array([1.5, 8.0]) / 2**0.5),
        ("init loss of each chain ± 1 s.e.", [1.5, 4.0], [0.5, 1.0]),
    ):
        line, _, (bars,) = shown[label].lines
        np.testing.assert_array_equal(line.get_xdata(), [0, 900])
        np.testing.assert_allclose(line.get_ydata().astype(float), values, rtol=1e-12)
        ends = np.array([segment[:, 1] for segment in bars.get_segments()], float)
        np.testing.assert_allclose(np.diff(ends)[:, 0] / 2, errors, rtol=1e-12)


def test_tables_hold_octaves_components_and_every_pair_of_heads(found):
    table = language_datasets.behavior_table(found)
    assert table.index.tolist() == STEPS.tolist()
    for name in ("loss", "ablated_loss"):
        values = found[name].values
        np.testing.assert_array_equal(table[f"{name}_1"], values[:, 0])
        np.testing.assert_allclose(table[f"{name}_4_to_7"], values[:, 3:7].mean(1), rtol=1e-6)
        np.testing.assert_allclose(table[f"{name}_64_to_127"], values[:, 63:].mean(1), rtol=1e-6)
    np.testing.assert_array_equal(table.position_explained_2, found.position_explained[:, 1])
    np.testing.assert_array_equal(table.ngram_score_3_stderr, found.ngram_score_stderr[:, 1])
    pairs = language_datasets.composition_table(found)
    assert len(pairs) == len(STEPS) * 16
    assert list(pairs) == ["step", "early_head", "late_head"] + [f"{k}_composition" for k in "kqv"]
    row = pairs.query(f"step == {STEPS[4]} and early_head == 2 and late_head == 3").squeeze()
    for name in draw.COMPOSITIONS:
        assert row[name] == pytest.approx(float(found[name][4, 1, 2]), rel=1e-6)


def with_gaps(found):
    """Nothing known at the second checkpoint, and no composition ever."""
    gone = {name: np.nan * found[name] for name in draw.COMPOSITIONS if name in found}
    return found.where(found.checkpoint != found.checkpoint[1]).assign(gone)


@pytest.mark.parametrize(
    ("drawn", "stages"),
    [
        (make_found([0], layers=1, heads=1, length=4, lengths=()), ()),
        (with_gaps(make_found(STEPS[::9], layers=5, heads=8, length=16)), STAGES),
    ],
    ids=["one-checkpoint", "five-layers-with-gaps"],
)
def test_every_size_can_be_drawn(drawn, stages):
    functions = [draw.behavior_figure, draw.positions_figure, draw.heads_figure,
                 draw.embedding_figure]  # fmt: skip
    made = [function(drawn, stages=stages) for function in functions]
    if "k_composition" in drawn:
        made.append(draw.composition_figure(drawn, BASELINE, stages=stages))
    for figure in made:
        assert base.png(figure, dpi=20).startswith(b"\x89PNG")
    # A line through one checkpoint has no length.
    for ax in (made[0].axes[0], made[2].axes[0]):
        marker = "o" if drawn.sizes["checkpoint"] == 1 else ""
        assert ax.lines[0].get_marker() == marker


# --- heat-map ---------------------------------------------------------------------------------

TEXTS = [["<|end|>", " a", "b\n", "<script>alert(1)</script>"], ['"', "\u202e&amp;", "\t", ""]]
CHANGES = np.array([[0.5, -1.0, 2.0], [0.0, np.nan, -0.25]])


class Spans(html.parser.HTMLParser):
    """Collects [style or class, title, text] of every span, and fails on a tag left open."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.spans = [], set(), []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)
        if tag == "span":
            found = dict(attrs)
            self.spans.append([found.get("style", found.get("class")), found["title"], ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "span" in self.open:
            self.spans[-1][2] += data


def spans(*arguments, **options):
    """Of the legend, and of the texts."""
    found = Spans(heatmap.heatmap_html(*arguments, **options)).spans
    return found[:5], found[5:]


def test_heatmap_shows_every_token_with_its_change_and_nothing_as_markup():
    page = heatmap.heatmap_html(TEXTS, CHANGES, limit=1.0, title="<script>\udc80")
    assert "<script" not in page
    assert not Spans(page).tags & {"script", "img", "link", "a", "iframe"}
    assert "&lt;script&gt;\\udc80</h1>" in page
    page.encode()
    _, found = spans(TEXTS, CHANGES, limit=1.0)
    assert [text for _, _, text in found] == [
        "<|end|>", "·a", "b↵", "<script>alert(1)</script>", '"', "\\u202e&amp;", "\\t", "∅",
    ]  # fmt: skip
    assert [title for _, title, _ in found] == [
        "first token", "+0.5 nats", "−1 nats", "+2 nats",
        "first token", "0 nats", "not known", "−0.25 nats",
    ]  # fmt: skip
    looks = [look for look, _, _ in found]
    assert looks[0] == looks[4] == looks[6] == "none"
    assert looks[5] == "background:#ffffff"
    # Beyond the limit as at the limit.
    assert looks[3] == f"background:{heatmap.color_of(1.0, 1.0)}"


def test_colours_are_monotone_white_at_zero_blue_if_better_red_if_worse():
    assert heatmap.color_of(0.0, 3.0) == heatmap.color_of(-0.0, 3.0) == "#ffffff"
    changes = np.linspace(-4, 4, 81)
    rgb = np.array([to_rgb(heatmap.color_of(change, 3.0)) for change in changes])
    worse, better = rgb[changes <= 0], rgb[changes >= 0]
    assert (np.diff(worse, axis=0) >= 0).all()
    assert (np.diff(better, axis=0) <= 0).all()
    inside = np.abs(changes) < 3
    assert (np.abs(np.diff(rgb[inside], axis=0)).sum(axis=1) > 0).all()
    np.testing.assert_array_equal(rgb[changes <= -3], rgb[[0] * 11])
    red, _, blue = rgb.T
    assert (red > blue)[changes < -0.05].all()
    assert (red < blue)[changes > 0.05].all()


def test_dark_text_can_be_read_on_every_colour():
    def luminance(color):  # W3C, Web Content Accessibility Guidelines 2.1
        x = np.array(to_rgb(color))
        linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    [ink] = re.findall(r"body {[^}]*color: (#\w+);", heatmap.STYLE)
    for change in (-1, 1):
        contrast = (luminance(heatmap.color_of(change, 1)) + 0.05) / (luminance(ink) + 0.05)
        assert contrast > 7  # level AAA


def test_the_legend_has_the_numbers_of_its_colours():
    legend, _ = spans(TEXTS, CHANGES, limit=1.5)
    numbers = [-1.5, -0.75, 0.0, 0.75, 1.5]
    assert [look for look, _, _ in legend] == [
        f"background:{heatmap.color_of(number, 1.5)}" for number in numbers
    ]
    assert [text.strip() for _, _, text in legend] == [
        "−1.5 or less", "−0.75", "0", "+0.75", "+1.5 or more",
    ]  # fmt: skip


def test_by_default_a_single_token_does_not_set_the_scale():
    changes = np.full((1, 200), 0.5)
    changes[0, :2] = 90.0, np.nan
    legend, found = spans([["a"] * 201], changes)
    assert legend[-1][1] == "+0.5 nats"
    assert found[1][0] == found[3][0]
    # No change at all, or none known, is no reason to fail.
    for nothing in (0.0, np.nan):
        assert spans([["a", "b"]], [[nothing]])[0][-1][1] == "+1 nats"


def test_heatmap_explains_what_does_not_fit():
    with pytest.raises(ValueError, match=r"shape \(2, 2\) for texts of \[4, 4\] tokens: give one"):
        heatmap.heatmap_html(TEXTS, CHANGES[:, 1:])
    with pytest.raises(ValueError, match=r"shape \(1, 3\) for texts of \[4, 4\]"):
        heatmap.heatmap_html(TEXTS, CHANGES[:1])
    for limit in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="give a finite change in nats above 0"):
            heatmap.heatmap_html(TEXTS, CHANGES, limit=limit)
