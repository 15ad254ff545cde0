"""Token sets for language models: prepared once in a folder, then memory-mapped.

Letters: N sequences ("rows"), T context length, V vocabulary.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import itertools
import os
import pathlib
import shutil
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np

from llc_jax.inputs import checks
from llc_jax.problems.language import bpe, corpora
from llc_jax.problems.language.packing import DTYPE, RowFile
from llc_jax.storage.files import digest, read_json, write_json
from llc_jax.storage.manifests import sync

_FACTS, _TOKENIZER = "tokens.json", "tokenizer.json"
_SPLITS = ("train", "heldout")
_DOCUMENTS_AT_ONCE = 500
_TEMPORARY, _STALE = ".tokens-", 24 * 3600.0  # seconds


class TokenSet(NamedTuple):
    """What `prepare` wrote.

    Attributes:
      train: rows for training, uint16 [N, T], memory-mapped.
      heldout: rows of documents of which none is in `train`, likewise.
      tokenizer: the tokenizer of V tokens.
      facts: the settings, V, versions, and for each part the numbers of documents, tokens and
        rows and the SHA-256 of its tokens.
    """

    train: np.ndarray
    heldout: np.ndarray
    tokenizer: bpe.Tokenizer
    facts: dict[str, Any]


def prepare(
    folder: str | os.PathLike,
    source: str | os.PathLike = "sotu+wiki",
    *,
    context: int,
    tokenizer: str | os.PathLike | int = "gpt2-5k",
    field: str = "text",
    every: int = 20,
) -> TokenSet:
    """Tokenises a corpus into a folder, once; the same command again only loads it.

    The text streams through, so memory does not grow with it. train.npy, heldout.npy,
    tokenizer.json and, last, tokens.json are complete before they appear; a run that was killed
    starts over. Processes may prepare one folder at the same time.

    Args:
      folder: where the files go.
      source: a corpus, see `corpora.documents`.
      context: T, the end of text that begins each row included.
      tokenizer: "gpt2-5k"; an integer V to train a vocabulary on the training documents; or the
        path of a JSON file of the library `tokenizers`.
      field: key of the text in .jsonl files.
      every: of so many documents the last is held out.

    Returns:
      The tokens. If the folder has them from the same settings, nothing is read or written: for
      text that has changed use another folder.

    Raises:
      ValueError: if the folder holds tokens of other settings; if a part has less text than one
        row; for the reasons that `corpora.documents` and `bpe` give.
      OSError: if the disk is full.
    """
    checks.at_least("context", context, 2, "a first token and one to predict")
    corpora.is_heldout(0, every)
    number = isinstance(tokenizer, int | np.integer)
    settings = {
        "source": os.fspath(source),
        "context": int(context),
        "tokenizer": int(tokenizer) if number else os.fspath(tokenizer),
        "field": field,
        "every": int(every),
    }
    folder = pathlib.Path(folder)
    if _finished(folder, settings):
        return load(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_TEMPORARY}*"):  # by a process that was killed
        with contextlib.suppress(FileNotFoundError):  # another process has just finished
            if time.time() - left.stat().st_mtime > _STALE:
                shutil.rmtree(left, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=folder) as name:
            temporary = pathlib.Path(name)
            _write(temporary, settings)
            if not _finished(folder, settings):  # another process may have been faster
                for file in (_TOKENIZER, *(f"{split}.npy" for split in _SPLITS), _FACTS):
                    os.replace(temporary / file, folder / file)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC, f"no space left to write tokens to {folder}: free some and run again"
        ) from error
    return load(folder)


def load(folder: str | os.PathLike, *, verify: bool = False) -> TokenSet:
    """Memory-maps what `prepare` wrote; runs no code, whoever wrote the files.

    Args:
      folder: as given to `prepare`.
      verify: read all tokens and compare their SHA-256 with what was written.

    Raises:
      ValueError: if the folder is not complete or its files do not belong together.
    """
    folder = pathlib.Path(folder)
    if not (folder / _FACTS).exists():
        raise ValueError(f"{folder} has no {_FACTS}: prepare it with token_sets.prepare")
    facts = read_json(folder / _FACTS)
    try:
        if digest([folder / _TOKENIZER]) != facts["tokenizer_sha256"]:
            raise ValueError(f"{_TOKENIZER} is not the vocabulary of these tokens")
        model = bpe.load(folder / _TOKENIZER)
        arrays = [_array(folder, split, facts, verify) for split in _SPLITS]
    except (ValueError, KeyError, TypeError, EOFError, FileNotFoundError) as error:
        raise ValueError(
            f"{folder}: {error}; restore its files, or delete {_FACTS} and prepare it again."
        ) from error
    return TokenSet(*arrays, model, facts)


def _array(folder: pathlib.Path, split: str, facts: dict[str, Any], verify: bool) -> np.ndarray:
    array = np.load(folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)
    shape = (facts[split]["rows"], facts["settings"]["context"])
    if array.shape != shape or array.dtype != DTYPE:
        raise ValueError(f"{split}.npy has {array.dtype} {array.shape} instead of uint16 {shape}")
    if verify and hashlib.sha256(array).hexdigest() != facts[split]["sha256"]:
        raise ValueError(f"{split}.npy has another SHA-256 than when it was written")
    return array


def _finished(folder: pathlib.Path, settings: dict[str, Any]) -> bool:
    """Whether the folder is complete; a `ValueError` if it has other settings."""
    if not (folder / _FACTS).exists():
        return False
    facts = read_json(folder / _FACTS)
    found = facts.get("settings") if isinstance(facts, dict) else None
    found = found if isinstance(found, dict) else {}
    differences = [
        f"{name} {found.get(name)!r} instead of {value!r}"
        for name, value in settings.items()
        if found.get(name) != value
    ]
    if differences:
        raise ValueError(
            f"{folder} has tokens made with {', '.join(differences)}: use another folder, or delete"
            " this one."
        )
    return True


def _write(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    every, context = settings["every"], settings["context"]
    model = _tokenizer(settings)
    model.save(folder / _TOKENIZER)
    documents = enumerate(corpora.documents(settings["source"], field=settings["field"]))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"{split}.npy", "wb")) for split in _SPLITS]
        parts = [RowFile(file, context, model.eos_id) for file in files]
        while batch := list(itertools.islice(documents, _DOCUMENTS_AT_ONCE)):
            for (index, _), ids in zip(batch, model.encode([t for _, t in batch]), strict=True):
                parts[corpora.is_heldout(index, every)].add(ids)
        facts = {}
        for split, part in zip(_SPLITS, parts, strict=True):
            try:
                facts[split] = part.finish()
            except ValueError as error:
                raise ValueError(f"{split} part of {settings['source']!r}: {error}") from error
    for split in _SPLITS:
        sync(folder / f"{split}.npy")
    facts |= {
        "settings": settings,
        "vocab_size": model.vocab_size,
        "tokenizer_sha256": digest([folder / _TOKENIZER]),
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "tokenizers")},
    }
    write_json(folder / _FACTS, facts)


def _tokenizer(settings: dict[str, Any]) -> bpe.Tokenizer:
    choice = settings["tokenizer"]
    if choice == "gpt2-5k":
        return bpe.gpt2_5k()
    if isinstance(choice, str):
        if not os.path.exists(choice):
            raise ValueError(f"tokenizer={choice!r}: give gpt2-5k, a number of tokens or a file.")
        return bpe.load(choice)
    texts = corpora.documents(settings["source"], field=settings["field"])
    train = (t for i, t in enumerate(texts) if not corpora.is_heldout(i, settings["every"]))
    return bpe.train_bpe(train, choice)
