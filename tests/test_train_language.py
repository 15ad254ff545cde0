"""Training on text and on the synthetic language: loss, resume, and everything downstream."""

import dataclasses
import math
import pathlib
import shutil

import jax
import numpy as np
import pandas
import pytest

from experiments import (
    estimate_llc,
    find_stages,
    make_figures,
    make_report,
    measure_curvature,
    measure_language,
    measuring,
    settings,
    train_language,
    train_regression,
)
from experiments import workdir as workdirs
from experiments.training import schedule
from llc_jax import results
from llc_jax.checkpoints import CheckpointDir

SMOKE = dataclasses.replace(
    train_language.PRESETS["smoke"], num_steps=40, block=10, num_log=4, num_linear=2
)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    config = dataclasses.replace(SMOKE, workdir=str(tmp_path_factory.mktemp("run") / "synthetic"))
    train_language.run(config)
    return config


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A run on a file of text, in which one word follows another with certainty."""
    root = tmp_path_factory.mktemp("text")
    # Words of 2, 3 and 4 tokens: a letter that begins many words, and letters that do not pair up.
    documents = ["one two three four five six seven eight nine ten. " * 12 + "tz tzq tzqv."] * 80
    (root / "corpus.txt").write_text("<|endoftext|>".join(documents))
    config = dataclasses.replace(
        SMOKE, workdir=str(root / "run"), data=str(root / "corpus.txt"), tokenizer="280",
        context=16, batch_size=16, learning_rate=1e-2,
    )  # fmt: skip
    train_language.run(config)
    return config


def test_synthetic_run_learns_word_frequencies(synthetic):
    lines = workdirs.read_jsonl(pathlib.Path(synthetic.workdir) / "metrics.jsonl")
    assert lines[-1]["step"] == 40
    assert lines[-1]["tokens_per_second"] > 0
    setting = settings.load(synthetic.workdir)
    data = setting.draw(64, 0)
    known = setting.baselines(data)
    assert known["uniform"] == pytest.approx(math.log(17))
    assert known["exact"] < known["bigram"] < known["unigram"] < known["uniform"]
    assert lines[-1]["loss"] < known["uniform"]
    np.testing.assert_array_equal(setting.draw(64, 0)["tokens"], data["tokens"])


def test_text_run_learns_a_certain_text(text):
    lines = workdirs.read_jsonl(pathlib.Path(text.workdir) / "metrics.jsonl")
    known = settings.load(text.workdir).baselines(settings.load(text.workdir).draw(64, 0))
    assert lines[-1]["loss"] < known["word frequencies"] < known["uniform"]
    kept = CheckpointDir(pathlib.Path(text.workdir) / "checkpoints")
    assert kept.steps() == schedule(text)


def test_data_set_of_a_text_has_distinct_training_rows(text):
    rows = train_language.tokens(text).train
    data, digest = settings.data_set(text.workdir, 32, 7)
    assert data["tokens"].shape == (32, 16)
    # Every row of a sample without replacement is there as often as the text has it, at most.
    known, have = np.unique(rows, axis=0, return_counts=True)
    found, count = np.unique(data["tokens"], axis=0, return_counts=True)
    for row, number in zip(found, count, strict=True):
        assert number <= have[(known == row).all(1)].sum()
    assert settings.data_set(text.workdir, 32, 8)[1] != digest
    with pytest.raises(ValueError, match=r"num_data=1000000: the training text has \d+ sequences"):
        settings.load(text.workdir).draw(1_000_000, 0)


@pytest.mark.slow
def test_the_same_command_repeats_what_is_missing_bitwise(text, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(text.workdir, folder)
    copy = dataclasses.replace(text, workdir=str(folder))
    kept = CheckpointDir(folder / "checkpoints")
    last = kept.steps()[-1]
    before = kept.restore_params(last)
    shutil.rmtree(folder / "checkpoints" / str(last))
    train_language.run(copy)
    after = CheckpointDir(folder / "checkpoints").restore_params(last)
    for x, y in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(ValueError, match=r"learning_rate: 0.01 before, 0.02 now"):
        train_language.run(dataclasses.replace(copy, learning_rate=0.02))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["synthetic", "text"])
def test_estimates_curvature_stages_and_report(which, request):
    training = request.getfixturevalue(which)
    common = {"workdir": training.workdir}
    sampling = dataclasses.replace(
        estimate_llc.PRESETS["smoke"], **common, num_data=32, batch_size=8, num_draws=10,
        num_burnin=5, num_chains=2,
    )  # fmt: skip
    estimate_llc.run(sampling)
    sweep = results.load_sweep(estimate_llc.results_folder(sampling))
    assert sweep.sizes["checkpoint"] == len(schedule(training))
    # Octaves of L - 1 predictions, weighted by their number, add up to λ̂ of the whole loss.
    ends = np.array([0, *train_language.octave_ends(training)])
    weights = np.diff(ends) / ends[-1]
    np.testing.assert_allclose(sweep.parts.values @ weights, sweep.llc, rtol=1e-3, atol=1e-2)
    measure_curvature.run(
        dataclasses.replace(measure_curvature.PRESETS["smoke"], **common, num_data=16)
    )
    asked = dataclasses.replace(measure_language.PRESETS["smoke"], **common, num_sequences=16)
    if which == "text":
        with pytest.raises(ValueError, match=r"how_many=10: the texts have \d words of 2 tokens"):
            measure_language.run(asked)
        asked = dataclasses.replace(asked, num_ngrams=1)
    measure_language.run(asked)
    behavior = pandas.read_csv(measuring.folder_of(asked) / "behavior.csv")
    assert behavior.step.tolist() == schedule(training)
    assert (behavior.bigram_score >= behavior.bigram_floor).all()
    heads = pandas.read_csv(measuring.folder_of(asked) / "heads.csv")
    assert len(heads) == len(behavior) * training.num_layers * training.num_heads
    find_stages.run(dataclasses.replace(find_stages.PRESETS["smoke"], **common))
    make_report.run(dataclasses.replace(make_report.PRESETS["smoke"], **common))
    page = (pathlib.Path(training.workdir) / "report.html").read_text()
    for heading in ("attention-only language model", "Heads", "λ̂ of early and late tokens"):
        assert heading in page
    make_figures.run(dataclasses.replace(make_figures.PRESETS["smoke"], **common))
    drawn = pathlib.Path(training.workdir) / "figures"
    assert (drawn / "composition.png").exists()
    stages = find_stages.load_stages(pathlib.Path(training.workdir) / sampling.name / "stages.json")
    pages = [(drawn / f"texts_stage_{i + 1}.html").read_text() for i in range(len(stages))]
    assert all("what steps" in page for page in pages)
    assert pages


def test_a_run_of_one_kind_is_not_taken_for_the_other(synthetic):
    with pytest.raises(ValueError, match="was trained by train_language"):
        train_regression.load_config(synthetic.workdir)


def test_most_frequent_ngrams_of_rows():
    rows = np.array([[9, 1, 2, 1, 2, 3], [9, 1, 2, 3, 1, 2]])
    np.testing.assert_array_equal(measure_language.frequent(rows, 2, 2), [[1, 2], [2, 3]])
    np.testing.assert_array_equal(measure_language.frequent(rows, 3, 1), [[1, 2, 3]])
    with pytest.raises(ValueError, match="num_ngrams=9"):
        measure_language.frequent(rows, 2, 9)
