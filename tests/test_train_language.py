"""Training on text and on the synthetic language: loss, resume, and everything downstream."""

import dataclasses
import math
import pathlib
import re
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
    measure_behavior,
    measure_curvature,
    measure_language,
    measure_trajectory,
    problems,
    train_language,
    train_regression,
)
from experiments import workdir as workdirs
from experiments.training import schedule
from llc_jax.problems.language.datasets import octave_ranges
from llc_jax.problems.language.heldout import frequent
from llc_jax.problems.language.losses import LanguageTokenLosses, octaves
from llc_jax.problems.language.problem import source, transformer, vocabulary
from llc_jax.problems.language.synthetic import predictive, sample
from llc_jax.storage import results
from llc_jax.storage.checkpoints import CheckpointDir

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
    # Documents begin at different words: those held out have rows of their own.
    count = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten."]
    documents = [
        " ".join([*count[i % 10 :], *count * 11, *count[: i % 10], "tz tzq tzqv."])
        for i in range(80)
    ]
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
    setting = problems.of_run(synthetic.workdir)
    data = setting.sample(64, 0)
    known = setting.baselines(data)
    assert known["uniform"] == pytest.approx(math.log(17))
    assert known["exact"] < known["bigram"] < known["unigram"] < known["uniform"]
    assert lines[-1]["loss"] < known["uniform"]
    np.testing.assert_array_equal(setting.sample(64, 0)["tokens"], data["tokens"])


def test_text_run_learns_a_certain_text(text):
    lines = workdirs.read_jsonl(pathlib.Path(text.workdir) / "metrics.jsonl")
    run = problems.of_run(text.workdir)
    known = run.baselines(run.sample(64, 0))
    assert lines[-1]["loss"] < known["word frequencies"] < known["uniform"]
    kept = CheckpointDir(pathlib.Path(text.workdir) / "checkpoints")
    assert kept.steps() == schedule(text)


def test_data_set_of_a_text_has_distinct_training_rows(text):
    rows = source(text).train
    run = problems.of_run(text.workdir)
    data, digest = problems.data_set(run, 32, 7)
    assert data["tokens"].shape == (32, 16)
    # Every row of a sample without replacement is there as often as the text has it, at most.
    known, have = np.unique(rows, axis=0, return_counts=True)
    found, count = np.unique(data["tokens"], axis=0, return_counts=True)
    for row, number in zip(found, count, strict=True):
        assert number <= have[(known == row).all(1)].sum()
    assert problems.data_set(run, 32, 8)[1] != digest
    with pytest.raises(ValueError, match=r"num_data=1000000: the training text has \d+ sequences"):
        run.sample(1_000_000, 0)


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


class Losses:
    """Losses [B, L - 1] of the checkpoint at a step, by the library."""

    def __init__(self, training):
        self.kept = CheckpointDir(pathlib.Path(training.workdir) / "checkpoints")
        self.of = LanguageTokenLosses(transformer(training))

    def __call__(self, step, rows):
        return np.asarray(self.of(self.kept.restore_params(step), {"tokens": rows}))


def held_out(training, seed, count):
    if training.data == "synthetic":
        key = jax.random.split(jax.random.key(seed))[0]
        return np.asarray(sample(key, source(training), count)["tokens"])
    return source(training).heldout[:count]


def assert_path_is_that_of_log_probs(training, config, losses):
    """Components of the log-probabilities of one token of each held-out sequence."""
    steps, pca, names, _ = measure_trajectory.load(measure_trajectory.folder_of(config))
    assert steps.tolist() == schedule(training)
    rows = held_out(training, config.seed, config.num_sequences)
    at = (
        np.arange(len(rows)),
        np.random.default_rng(config.seed).integers(
            rows.shape[1] - 1, size=len(rows), dtype=np.int32
        ),
    )
    points = [-losses(step, rows)[at] for step in steps]
    points.append(np.full(len(rows), -math.log(vocabulary(training))))
    expected = ["uniform"]
    if training.data == "synthetic":
        expected += ["unigram", "bigram", "trigram", "repeated bigram", "exact"]
        law = predictive(source(training), rows)
        points.append(np.asarray(law)[(*at, rows[at[0], at[1] + 1])])
    assert names == expected
    points = np.array(points, float)
    centred = points - points[: steps.size].mean(axis=0)
    _, values, vectors = np.linalg.svd(centred[: steps.size], full_matrices=False)
    np.testing.assert_allclose(pca.explained, values[:3] ** 2 / np.sum(values**2), rtol=1e-3)
    scores = np.abs(centred @ vectors[:3].T)
    size = np.abs(scores).max()
    found = np.abs(pca.scores)
    np.testing.assert_allclose(found[: steps.size + 1], scores[: steps.size + 1], atol=1e-3 * size)
    np.testing.assert_allclose(found[-1], scores[-1], atol=1e-3 * size)


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
    ends = np.array([0, *octaves(training.context)])
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
    behavior = pandas.read_csv(measure_behavior.folder_of(asked) / "behavior.csv")
    assert behavior.step.tolist() == schedule(training)
    assert (behavior.bigram_score >= behavior.bigram_floor).all()
    heads = pandas.read_csv(measure_behavior.folder_of(asked) / "heads.csv")
    assert len(heads) == len(behavior) * training.num_layers * training.num_heads
    pairs = pandas.read_csv(measure_behavior.folder_of(asked) / "composition.csv")
    assert len(pairs) == len(behavior) * training.num_heads**2
    losses = Losses(training)
    rows = held_out(training, asked.seed, 16)
    for line, step in [(0, 0), (-1, training.num_steps)]:
        of_rows = losses(step, rows).mean(axis=0)
        assert behavior.mean_loss.iloc[line] == pytest.approx(of_rows.mean(), rel=1e-5)
        for (first, last), name in zip(
            octave_ranges(training.context - 1), behavior.filter(regex="^loss_"), strict=True
        ):
            mean = of_rows[first - 1 : last].mean()
            assert behavior[name].iloc[line] == pytest.approx(mean, rel=1e-5)
    # They are not those of the sequences it was trained on.
    if which == "text":
        trained_on = losses(step, source(training).train[:16])
        assert abs(trained_on.mean() / behavior.mean_loss.iloc[-1] - 1) > 1e-3
    tracing = dataclasses.replace(
        measure_trajectory.PRESETS["smoke"], **common, num_sequences=12, log_probs=True, block=5
    )
    measure_trajectory.run(tracing)
    assert_path_is_that_of_log_probs(training, tracing, losses)
    with pytest.raises(ValueError, match="all_outputs=True: not for a run of train_language"):
        measure_trajectory.run(dataclasses.replace(tracing, all_outputs=True))
    find_stages.run(dataclasses.replace(find_stages.PRESETS["smoke"], **common))
    make_report.run(dataclasses.replace(make_report.PRESETS["smoke"], **common))
    page = (pathlib.Path(training.workdir) / "report.html").read_text()
    for heading in ("attention-only language model", "Heads", "λ̂ of early and late tokens"):
        assert heading in page
    assert 'href="figures/texts_stage_1.html"' in page
    assert (pathlib.Path(training.workdir) / "figures" / "texts_stage_1.html").exists()
    make_figures.run(
        dataclasses.replace(make_figures.PRESETS["smoke"], **common, published_init=True)
    )
    drawn = pathlib.Path(training.workdir) / "figures"
    for name in ("composition", "embedding", "trajectory", "published_init"):
        assert (drawn / f"{name}.png").exists()
    stages = find_stages.load_stages(pathlib.Path(training.workdir) / sampling.name / "stages.json")
    assert stages
    for number, stage in enumerate(stages, 1):
        text = (drawn / f"texts_stage_{number}.html").read_text()
        # Boundaries lie between checkpoints; of these the nearest counts.
        first, last = (
            min(schedule(training), key=lambda step, at=at: abs(step - at))
            for at in (stage.start, stage.end)
        )
        assert f"what steps {first:,} to {last:,} changed" in text
        better = losses(first, rows[:3]) - losses(last, rows[:3])
        shown = re.findall(r'title="(?:first token|([^"]+) nats)"', text.partition("<h1")[2])
        shown = [float(x.replace("−", "-")) for x in shown if x]
        np.testing.assert_allclose(shown[-better.size :], better.ravel(), rtol=6e-3, atol=1e-4)


def test_a_run_of_one_kind_is_not_taken_for_the_other(synthetic):
    with pytest.raises(ValueError, match="was trained by train_language"):
        train_regression.load_config(synthetic.workdir)


def test_most_frequent_ngrams_of_rows():
    rows = np.array([[9, 1, 2, 1, 2, 3], [9, 1, 2, 3, 1, 2]])
    np.testing.assert_array_equal(frequent(rows, 2, 2), [[1, 2], [2, 3]])
    np.testing.assert_array_equal(frequent(rows, 3, 1), [[1, 2, 3]])
    with pytest.raises(ValueError, match="num_ngrams=9"):
        frequent(rows, 2, 9)
