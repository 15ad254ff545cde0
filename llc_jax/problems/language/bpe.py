"""Byte-level BPE tokenizers: GPT-2's first 5,000 tokens, and ones trained on a corpus.

Every text is a sequence of the 256 bytes, so nothing is unknown and decoding gives it back. The
ids are those of the bytes in GPT-2's order, then one for each merge, then the end of text. Built
on the library `tokenizers` (extra `lm`), whose JSON format the files have.
"""

import dataclasses
import importlib.resources
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llc_jax.inputs import checks
from llc_jax.storage.files import write_atomic

EOS = "<|endoftext|>"
_LARGEST = 2**16


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back.

    The end of text is a token that no text contains: the letters "<|endoftext|>" in a document
    are letters.

    Attributes:
      backend: the `tokenizers.Tokenizer`, with ids 0 to V - 1, one of which is the end of text.
    """

    backend: Any

    def __post_init__(self) -> None:
        ids = self.backend.get_vocab()
        if EOS not in ids or set(ids.values()) != set(range(len(ids))):
            raise ValueError(
                f"the {len(ids)} tokens of the tokenizer must have the ids 0, 1, ... once each and"
                f" {EOS} among them: choose another tokenizer."
            )
        _check_size(len(ids))
        self.backend.encode_special_tokens = True

    @property
    def vocab_size(self) -> int:
        """V, the end of text included."""
        return self.backend.get_vocab_size()

    @property
    def eos_id(self) -> int:
        """Id of the end of text, which also begins every sequence."""
        return self.backend.token_to_id(EOS)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, uint16 [length]; many texts in one call are faster."""
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint16) for encoding in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids; a character cut in the middle becomes U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the tokenizer as JSON, whole or not at all."""
        write_atomic(path, self.backend.to_str() + "\n")


def load(path: str | os.PathLike) -> Tokenizer:
    """Reads a tokenizer that `save`, or the library `tokenizers`, wrote.

    Raises:
      ValueError: if the file is not one, has no "<|endoftext|>" or more than 65,536 tokens.
    """
    try:
        backend = _library().Tokenizer.from_str(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception as error:  # the library has no class of its own
        raise ValueError(
            f"{path} is not the JSON of a tokenizer ({error}): give a file written by save."
        ) from error
    return Tokenizer(backend)


def gpt2_5k() -> Tokenizer:
    """The first 4,999 tokens of GPT-2 with their ids, and the end of text at 4999.

    The ids of GPT-2 follow the order of its merges, so the first 4,743 merges are a BPE of their
    own; 220 is the lone space. The paper's tokenizer has both of these ids (arXiv 2402.02364;
    whether all of its tokens are these is not known). Vocabulary: OpenAI's, under the licence in
    gpt2_5k.LICENSE.txt.
    """
    with importlib.resources.as_file(importlib.resources.files(__package__)) as folder:
        return load(folder / "gpt2_5k.json")


def from_merges(merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """Returns the tokenizer of a list of merges, earliest first.

    Args:
      merges: pairs of tokens, bytes spelled as GPT-2 spells them ("Ġ" is a space).
    """
    library = _library()
    ids = {symbol: i for i, symbol in enumerate(_byte_symbols())}
    for left, right in merges:
        ids.setdefault(left + right, len(ids))
    ids[EOS] = len(ids)
    backend = library.Tokenizer(library.models.BPE(vocab=ids, merges=list(merges)))
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = library.decoders.ByteLevel()
    backend.add_special_tokens([EOS])
    return Tokenizer(backend)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns the merges that a corpus needs most; the same texts give the same tokenizer.

    Args:
      texts: documents, read once.
      vocab_size: V, the 256 bytes and the end of text included.

    Raises:
      ValueError: if V is outside 257 to 65,536 or the texts have too few pairs to merge.
    """
    checks.at_least("vocab_size", vocab_size, 257, "256 bytes and the end of text")
    _check_size(vocab_size)
    library = _library()
    backend = library.Tokenizer(library.models.BPE())
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=_byte_symbols(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    merges = json.loads(backend.to_str())["model"]["merges"]
    tokenizer = from_merges([tuple(merge) for merge in merges])
    if tokenizer.vocab_size < vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}: the texts have pairs for {tokenizer.vocab_size} tokens only;"
            " give more text or a smaller vocabulary."
        )
    return tokenizer


def _check_size(vocab_size: int) -> None:
    if vocab_size > _LARGEST:
        raise ValueError(
            f"vocab_size={vocab_size}: ids are stored as uint16, so take a vocabulary of at most"
            f" {_LARGEST}."
        )


def _byte_symbols() -> list[str]:
    """The 256 characters that stand for bytes, in the order of their ids."""
    return sorted(_library().pre_tokenizers.ByteLevel.alphabet())


def _library() -> Any:
    # Its threads and a later fork do not mix; who wants them sets the variable.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tokenizers is not installed: pip install 'llc_jax[lm]'."
        ) from error
    return tokenizers
