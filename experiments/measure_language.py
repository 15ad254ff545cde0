"""Measures what a language model does and how it is built, at every checkpoint of a workdir.

    python -m experiments.measure_language --preset=synthetic

Loss by position, with positions ablated, bigram and n-gram scores, learning in context; attention
to the previous token and to what followed an earlier occurrence, of every head; composition of
heads, position embedding, norms. The same command starts, continues or does nothing: one file per
checkpoint in `behavior/`, and `behavior.csv` and `heads.csv` at the end; `texts.json` has the
tokens of the texts that `make_figures` colours by what changed over each stage.
Expected: the divergence from the bigrams falls and rises again; n-gram scores rise above 1; then
heads of the first layer find the previous token, and those of the second earlier occurrences.
"""

import dataclasses
import pathlib

from experiments import cli, train_language, workdir
from experiments.cli import option


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the measurement."""

    workdir: str = option("runs/language", "Folder of the training run.")
    preset: str = option("small", "Name of the preset.")
    seed: int = option(2000, "Seed of sequences, positions and probes.")
    num_sequences: int = option(512, "Held-out sequences; fewer if the text has fewer.")
    num_probes: int = option(512, "Random sequences for the scores of heads, of each kind.")
    num_ngrams: int = option(200, "n-grams of each length 2, 3 and 4.")
    num_texts: int = option(3, "Held-out sequences that are looked at token by token.")
    checkpoint_batch: int = option(1, "Checkpoints at once, over the devices; bounds memory.")


PRESETS = {
    name: Config(workdir=training.workdir, preset=name)
    for name, training in train_language.PRESETS.items()
}
PRESETS["smoke"] = dataclasses.replace(
    PRESETS["smoke"], num_sequences=32, num_probes=32, num_ngrams=10
)
LENGTHS = (2, 3, 4)


@dataclasses.dataclass(frozen=True)
class Measure:
    """Behaviour and structure of one checkpoint, for `llc_jax.mapping.map_checkpoints`."""

    behavior: object
    structure: object

    def __call__(self, step, params, questions, probes):
        """Returns both dictionaries in one."""
        return self.behavior(step, params, questions) | self.structure(step, params, probes)


def folder_of(config) -> pathlib.Path:
    """Returns the folder of the results."""
    return pathlib.Path(config.workdir) / "behavior"


def material(config: Config, training: train_language.Config):
    """Held-out sequences, the bigram table, n-grams of each length and the start token."""
    import jax
    import numpy as np

    from llc_jax.data import corpora, ngrams, synthetic_language

    if training.data == "synthetic":
        law = train_language.language(training)
        keys = jax.random.split(jax.random.key(config.seed))
        rows, others = (
            np.asarray(synthetic_language.sample(key, law, config.num_sequences)["tokens"])
            for key in keys
        )
        grams = [frequent(others, n, config.num_ngrams) for n in LENGTHS]
        table = synthetic_language.bigram_table(law)
        # Nothing follows the last word of a table but words: the start token's column is empty.
        return rows, table, grams, law.start_token
    tokens = train_language.tokens(training)
    size = tokens.tokenizer.vocab_size
    texts = list(corpora.documents(training.data, field=training.field))
    grams = [ngrams.ngrams(tokens.tokenizer, texts, n, config.num_ngrams) for n in LENGTHS]
    table = ngrams.bigram_table(tokens.train, size)
    return tokens.heldout[: config.num_sequences], table, grams, tokens.tokenizer.eos_id


def words(training: train_language.Config, rows) -> list[list[str]]:
    """The tokens of sequences [B, L] as text; those of the synthetic language are numbered."""
    if training.data == "synthetic":
        return [[f"{token} " for token in row] for row in rows.tolist()]
    tokenizer = train_language.tokens(training).tokenizer
    return [[tokenizer.decode([token]) for token in row] for row in rows.tolist()]


def frequent(rows, n: int, how_many: int):
    """The most frequent n-grams of sequences [B, L], their first token left out: [how_many, n]."""
    import numpy as np

    windows = np.lib.stride_tricks.sliding_window_view(rows[:, 1:], n, axis=1).reshape(-1, n)
    found, counts = np.unique(windows, axis=0, return_counts=True)
    if len(found) < how_many:
        raise ValueError(
            f"num_ngrams={how_many}: the sequences have {len(found)} different {n}-grams; ask for"
            " fewer or raise num_sequences."
        )
    return found[np.argsort(-counts, kind="stable")[:how_many]]


def run(config: Config, phase: str = "behavior") -> None:
    """Measures what is missing."""
    from llc_jax import checks, results
    from llc_jax.checkpoints import CheckpointDir
    from llc_jax.files import write_atomic, write_json
    from llc_jax.mapping import map_checkpoints
    from llc_jax.metrics import language, language_datasets, language_structure, probes

    for name in ("num_sequences", "num_probes", "num_ngrams", "num_texts"):
        checks.at_least(name, getattr(config, name), 1)
    folder = folder_of(config)
    training = train_language.load_config(config.workdir)
    kept = CheckpointDir(pathlib.Path(config.workdir) / "checkpoints")
    tables = {
        "behavior.csv": language_datasets.behavior_table,
        "heads.csv": language_datasets.heads_table,
    }
    with workdir.lock(folder, "behavior"):
        identity = cli.identity(config, ["checkpoint_batch"])
        line = cli.command("measure_language", config.preset, config, PRESETS[config.preset])
        done = set(results.finished_steps(folder))
        steps = workdir.good_steps(kept, done)
        work = [step for step in steps if step not in done]
        if not work:
            workdir.settle(folder / "config.json", identity, {"command": line})
            cli.say(f"{phase}: all checkpoints are done")
        else:
            model = train_language.model(training)
            rows, table, grams, start = material(config, training)
            questions = language.questions(
                config.seed, model, rows, table, grams, rows[: config.num_texts]
            )
            asked = probes.probes(config.seed, config.num_probes, model, start)
            measured = map_checkpoints(
                Measure(language.Behavior(model), language_structure.Structure(model)),
                ((step, kept.restore_params(step)) for step in work),
                questions, asked, checkpoint_batch=config.checkpoint_batch,
            )  # fmt: skip
            workdir.settle(folder / "config.json", identity, {"command": line})
            write_json(folder / "texts.json", words(training, rows[: config.num_texts]))
            for name in tables:  # stale from the first result on
                (folder / name).unlink(missing_ok=True)

            def finish():
                for count, (step, found) in enumerate(measured, 1):
                    params = kept.restore_params(step)
                    found |= language_structure.position_components(params)
                    names = language_structure.weight_names(params)
                    results.save(folder, step, language_datasets.dataset(found, LENGTHS, names))
                    yield count, f" step {step}: loss {found['mean_loss']:.4f}", None

            for _ in cli.progress(finish(), phase, len(work), "checkpoints"):
                pass
        if work or not all((folder / name).exists() for name in tables):
            whole = results.load(folder, "measure_language")
            for name, make in tables.items():
                text = make(whole).to_csv(
                    index=name == "behavior.csv", float_format="%.7g", lineterminator="\n"
                )
                write_atomic(folder / name, text)


if __name__ == "__main__":
    cli.main(PRESETS, run, default="synthetic")
