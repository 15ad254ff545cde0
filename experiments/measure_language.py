"""Measures what a language model does and how it is built, at every checkpoint of a workdir.

    python -m experiments.measure_language --preset=synthetic

Loss by position, with positions ablated, bigram and n-gram scores, learning in context; attention
to the previous token and to what followed an earlier occurrence, of every head; composition of
heads, position embedding, norms. The same command starts, continues or does nothing: one file per
checkpoint in `behavior/`, and `behavior.csv`, `heads.csv` and, of two layers or more,
`composition.csv` at the end; `texts.json` has the tokens of the texts that `make_figures` colours
by what changed over each stage.
Expected: the divergence from the bigrams falls and rises again; n-gram scores rise above 1; then
heads of the first layer find the previous token, and those of the second earlier occurrences.
"""

import dataclasses

from experiments import cli, measuring, train_language
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
    """Behaviour and structure of one checkpoint, for `llc_jax.checkpoint_map.map_checkpoints`."""

    behavior: object
    structure: object

    def __call__(self, step, params, questions, probes):
        """Returns both dictionaries in one."""
        return self.behavior(step, params, questions) | self.structure(step, params, probes)


def held_out(training: train_language.Config, num_sequences: int, seed: int):
    """Sequences that were not trained on, integers [B, L].

    Fresh ones of the synthetic language, else the first of the held-out text, or all there are.
    """
    import jax
    import numpy as np

    from llc_jax.problems.language.synthetic import sample

    if training.data == "synthetic":
        law, (key, _) = train_language.language(training), jax.random.split(jax.random.key(seed))
        return np.asarray(sample(key, law, num_sequences)["tokens"])
    return train_language.tokens(training).heldout[:num_sequences]


def material(config: Config, training: train_language.Config):
    """Held-out sequences, the bigram table, n-grams of each length and the start token."""
    import jax
    import numpy as np

    from llc_jax.problems.language import corpora, ngrams
    from llc_jax.problems.language import synthetic as synthetic_language

    rows = held_out(training, config.num_sequences, config.seed)
    if training.data == "synthetic":
        law = train_language.language(training)
        _, key = jax.random.split(jax.random.key(config.seed))
        others = np.asarray(synthetic_language.sample(key, law, config.num_sequences)["tokens"])
        grams = [frequent(others, n, config.num_ngrams) for n in LENGTHS]
        table = synthetic_language.bigram_table(law)
        # Nothing follows the last word of a table but words: the start token's column is empty.
        return rows, table, grams, law.start_token
    tokens = train_language.tokens(training)
    size = tokens.tokenizer.vocab_size
    texts = list(corpora.documents(training.data, field=training.field))
    grams = [ngrams.ngrams(tokens.tokenizer, texts, n, config.num_ngrams) for n in LENGTHS]
    table = ngrams.bigram_table(tokens.train, size)
    return rows, table, grams, tokens.tokenizer.eos_id


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
    """Measures what is missing; see `experiments.measuring`."""
    from llc_jax.checkpoint_map import map_checkpoints
    from llc_jax.inputs import checks
    from llc_jax.problems.language import behavior as language
    from llc_jax.problems.language import datasets as language_datasets
    from llc_jax.problems.language import probes
    from llc_jax.problems.language import structure as language_structure
    from llc_jax.storage.files import write_json

    for name in ("num_sequences", "num_probes", "num_ngrams", "num_texts"):
        checks.at_least(name, getattr(config, name), 1)
    training = train_language.load_config(config.workdir)

    def measure(kept, steps):
        model = train_language.model(training)
        rows, table, grams, start = material(config, training)
        texts = rows[: config.num_texts]
        measured = map_checkpoints(
            Measure(language.Behavior(model), language_structure.Structure(model)),
            ((step, kept.restore_params(step)) for step in steps),
            language.questions(config.seed, model, rows, table, grams, texts),
            probes.probes(config.seed, config.num_probes, model, start),
            checkpoint_batch=config.checkpoint_batch,
        )  # fmt: skip

        def named(step, found):
            params = kept.restore_params(step)
            found |= language_structure.position_components(params)
            names = language_structure.weight_names(params)
            return step, language_datasets.dataset(found, LENGTHS, names), found["mean_loss"]

        def results():  # from here on the settings are known to be those of the folder
            write_json(measuring.folder_of(config) / "texts.json", words(training, texts))
            yield from (named(*one) for one in measured)

        return results()

    tables = {
        "behavior.csv": language_datasets.behavior_table,
        "heads.csv": language_datasets.heads_table,
    }
    if training.num_layers > 1:
        tables["composition.csv"] = language_datasets.composition_table
    measuring.run(config, phase, "measure_language", PRESETS, measure, tables)


if __name__ == "__main__":
    cli.main(PRESETS, run, default="synthetic")
