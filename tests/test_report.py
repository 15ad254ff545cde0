"""The page is whole, well-formed, self-contained and says everything it was given.

Stages, which it shows, are found again when anything that they follow from has changed.
"""

import csv
import html
import html.parser
import io
import os
import pathlib
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from test_figures import STAGES, make_sweep

from experiments import find_stages
from llc_jax.report import page as report
from llc_jax.storage import files, results

VOID = {"meta", "img", "br"}
HOSTILE = """</td><script>alert("1")</script> & 'x' $\\frac{ \u202e {nbeta}"""


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and text, and fails on a tag that is not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.texts, self.rows = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def render(sweep, stages=STAGES, **options):
    given = {
        "title": "A run",
        "sweep": sweep,
        "stages": stages,
        "figures": {"overview": Figure((1, 1)), "traces": Figure((1, 1))},
        "configs": {"train": {"num_steps": 1000, "peak": 3e-3}},
        "versions": {"jax": "0.10.2"},
        "hashes": {"data": "ab" * 32},
        "command": "python -m experiments.quickstart --seed=0",
    } | options
    return report.render(**given)


def test_page_is_well_formed_and_self_contained():
    sweep, losses = make_sweep(dead=[1], lost=[4]), np.linspace(4, 2, 1001)
    figures = report.render_figures(
        sweep, train_steps=np.arange(1001), train_losses=losses, stages=STAGES
    )
    assert list(figures) == ["overview", "traces"]
    page = Page(render(sweep, figures=figures))
    assert page.tags.count("html") == page.tags.count("body") == page.tags.count("title") == 1
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert len(page.links) == 2
    assert all(link.startswith("data:image/png;base64,") for link in page.links)


def test_page_holds_numbers_settings_and_command():
    text = Page(render(make_sweep())).text
    for expected in (
        "+12.00 ± 0.50", "−3.00 ± 0.40", "97.0 %, within 20 to 41", "> 99.9 %", "end of training",
        "nbeta 50.0", "localization 10.0", "peak 0.003", "jax 0.10.2", "ab" * 32,
        "python -m experiments.quickstart --seed=0",
    ):  # fmt: skip
        assert expected in text


def test_stages_come_with_the_change_of_the_loss_between_checkpoints():
    sweep = make_sweep()
    # Linear in log(step + 1) but for the last checkpoint, and unknown at one between.
    losses = 4.0 - 0.5 * np.log1p(sweep.checkpoint.values)
    losses[2], losses[-1] = np.nan, 5.0
    sweep["init_loss"] = ("checkpoint", losses)
    ends = [(0, 19), (19, 300), (300, 1000), (1000, 1001)]
    stages = [STAGES[0]._replace(start=start, end=end) for start, end in ends]
    changes = [-0.5 * np.log(20), -0.5 * np.log(301 / 20), 1.0 + 0.5 * np.log(301)]
    expected = [f"{change:+.4f}".replace("-", "−") for change in changes]
    table = render(sweep, stages).split("<h2>Stages</h2>")[1].split("</table>")[0]
    header, *rows = (re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in table.split("</tr>")[:-1])
    assert [row[header.index("Δloss")] for row in rows] == [*expected, "–"]


def test_answer_counts_stages_and_warnings():
    said = report.answer(make_sweep(dead=[1, 2], lost=[4]), STAGES)
    assert "7 checkpoints (steps 0 to 1,000)" in said
    assert "3 stages: from step 0 to 30 it stays level" in said
    assert "from step 30 to 300 it rises (+12.00" in said
    assert "from step 300 to 1,000 it falls (−3.00" in said
    assert "At 1 checkpoint every chain diverged. 3 of 7 checkpoints have warnings" in said


@pytest.mark.parametrize(("stages", "said"), [([], "not cut"), (STAGES[:1], "has 1 stage: ")])
def test_one_checkpoint_and_few_stages(stages, said):
    text = Page(render(make_sweep([500]), stages)).text
    assert "1 checkpoint (step 500)" in text
    assert said in text
    assert "No checkpoint has a warning." in text
    assert "every checkpoint passed all checks" in text


def test_every_warning_is_on_the_page_grouped_by_kind():
    sweep = make_sweep(np.arange(190) * 2600)
    few = "few effective draws"
    verdicts = [f"{1 + i % 3} of 4 chains diverged; {few}" for i in range(190)]
    warnings = [f"Dead at {i} <b>.\nESS {i} low." for i in range(190)]
    sweep = sweep.assign(verdict=("checkpoint", verdicts), warnings=("checkpoint", warnings))
    page = Page(render(sweep))
    assert page.tags.count("details") == 2
    assert "Chains diverged: steps 0, 2,600, 5,200" in page.text
    assert "Few effective draws: steps 0, " in page.text
    assert " and 178 more" in page.text
    for i in range(190):
        assert f"Step {2600 * i:,}: Dead at {i} <b>." in page.text
        assert f"Step {2600 * i:,}: ESS {i} low." in page.text


def test_hostile_texts_are_shown_and_change_nothing():
    sweep = make_sweep()
    sweep["verdict"] = ("checkpoint", [HOSTILE] * 7)
    sweep["warnings"] = ("checkpoint", [f"{HOSTILE}\nsecond"] * 7)
    sweep.attrs[HOSTILE] = HOSTILE
    tame = Page(render(make_sweep(), extra_sections=[("a", "b")]))
    text = render(
        sweep,
        title=HOSTILE,
        configs={HOSTILE: {HOSTILE: HOSTILE}},
        versions={HOSTILE: HOSTILE},
        hashes={HOSTILE: HOSTILE},
        command=HOSTILE,
        extra_sections=[(HOSTILE, HOSTILE)],
    )
    page = Page(text)
    assert "<script" not in text
    assert set(page.tags) - {"details", "summary"} == set(tame.tags)
    assert page.texts.count(HOSTILE) >= 12


def test_extra_sections_hold_figures_and_texts():
    page = Page(render(make_sweep(), extra_sections=[("Curvature", Figure(), "One.", "Two.")]))
    assert page.text.index("Curvature") < page.text.index("One.") < page.text.index("Two.")
    assert len(page.links) == 3


def test_a_path_becomes_a_link():
    hostile = pathlib.PurePosixPath('a"b', "<c d>.html")
    text = render(make_sweep(), extra_sections=[("Texts", hostile)])
    assert '<a href="a%22b/%3Cc%20d%3E.html">a&quot;b/&lt;c d&gt;.html</a>' in text


def test_csv_round_trips():
    sweep = make_sweep(dead=[1], lost=[4])
    sweep["warnings"] = ("checkpoint", ['First, "quoted".\nSecond.', *[""] * 6])
    text = report.results_csv(sweep)
    assert len(text.splitlines()) == 8
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0])[-2:] == ["verdict", "warnings"]
    assert [int(row["step"]) for row in rows] == sweep.checkpoint.values.tolist()
    for name in ("llc", "stderr", "rhat", "num_finite"):
        values = [float(row[name] or "nan") for row in rows]
        np.testing.assert_array_equal(values, sweep[name].values)
    assert rows[0]["warnings"] == 'First, "quoted". Second.'
    assert [row["verdict"] for row in rows] == sweep.verdict.values.tolist()
    for name in ("acceptance", "stability", "distance"):
        assert rows[4][name] == ""


def read_csv(sweep):
    return list(csv.DictReader(io.StringIO(report.results_csv(sweep))))


def test_csv_holds_means_and_extremes_over_finite_chains():
    sweep = make_sweep(dead=[1], num_draws=40)
    sweep["acceptance"] = sweep.acceptance.copy(data=[[0.9, 0.1, 0.7, 0.8]] * 7)
    sweep["stability"] = sweep.stability.copy(data=[[0.3, 3.0, 0.2, 0.1]] * 7)
    rows = read_csv(sweep)
    # Chain c of 4 is 4 - c + draw / 40 away, and chain 1 died at checkpoint 1.
    for row, distance, stability, acceptance in ((0, 2.5, 3.0, 2.5 / 4), (1, 7 / 3, 0.3, 0.8)):
        assert float(rows[row]["distance"]) == pytest.approx(distance + 19.5 / 40)
        assert float(rows[row]["stability"]) == stability
        assert float(rows[row]["acceptance"]) == pytest.approx(acceptance)


def test_csv_holds_the_parts_by_number_or_by_name():
    sweep = make_sweep()
    assert not any("part" in name for name in read_csv(sweep)[0])
    values = np.arange(14.0).reshape(7, 2)
    sweep = sweep.assign(
        parts=(("checkpoint", "part"), values), parts_stderr=(("checkpoint", "part"), 100 + values)
    )
    for named, names in ((sweep, ("0", "1")), (sweep.assign_coords(part=["x", "y"]), ("x", "y"))):
        rows = read_csv(named)
        for k, name in enumerate(names):
            for i, row in enumerate(rows):
                assert float(row[f"llc_part_{name}"]) == values[i, k]
                assert float(row[f"llc_part_{name}_stderr"]) == 100 + values[i, k]


def test_names_of_a_foreign_file_system_can_be_written():
    text = render(make_sweep(), command=os.fsdecode(b"/runs/\xff"))
    assert b"/runs/\\udcff" in text.encode()


@pytest.mark.parametrize("changed", ["boundaries.py", "smoothing.py", "a result"])
def test_stages_are_found_again_after_a_change(tmp_path, monkeypatch, changed):
    sweep = make_sweep()
    for i, step in enumerate(sweep.checkpoint.values):
        results.save(tmp_path / "llc", step, sweep.isel(checkpoint=i, drop=True))
    config, path = find_stages.Config(str(tmp_path)), tmp_path / "llc" / "stages.json"
    find_stages.run(config)
    found = files.read_json(path)
    files.write_json(path, found | {"stages": []})
    find_stages.run(config)
    assert files.read_json(path)["stages"] == []  # up to date: nothing is done
    if changed == "a result":
        results.save(tmp_path / "llc", 10, sweep.isel(checkpoint=3, drop=True))
    else:
        [source] = [path for path in find_stages.SOURCES if path.name == changed]
        other = tmp_path / changed
        other.write_bytes(source.read_bytes() + b"# changed\n")
        sources = [other if path == source else path for path in find_stages.SOURCES]
        monkeypatch.setattr(find_stages, "SOURCES", sources)
    find_stages.run(config)
    assert files.read_json(path)["stages"] != []
