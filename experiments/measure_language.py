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

from experiments import cli, measure_behavior
from experiments.cli import option
from experiments.presets import Presets


@dataclasses.dataclass(frozen=True)
class Config(cli.Run):
    """Settings of the measurement."""

    seed: int = option(2000, "Seed of sequences, positions and probes.")
    num_sequences: int = option(512, "Held-out sequences; fewer if the text has fewer.")
    num_probes: int = option(512, "Random sequences for the scores of heads, of each kind.")
    num_ngrams: int = option(200, "n-grams of each length 2, 3 and 4.")
    num_texts: int = option(3, "Held-out sequences that are looked at token by token.")
    checkpoint_batch: int = option(1, "Checkpoints at once, over the devices; bounds memory.")


PRESETS = Presets("measure_language", Config)


def run(config: Config, phase: str = "behavior") -> None:
    """Measures what is missing; see `experiments.run`."""
    measure_behavior.measure(config, phase, measure_behavior.folder_of(config), PRESETS, [])


if __name__ == "__main__":
    cli.main(PRESETS, run, default="synthetic")
