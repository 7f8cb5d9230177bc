"""Properties of nanodmc/text.py: files of text become documents, tokens and batches."""

import gzip
import json
import lzma
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
from conftest import oracle, refusal
from nanodmc import text as texts_module
from nanodmc.files import InputError
from nanodmc.settings import Settings
from nanodmc.text import Text, batch, documents, encode_all, load_data
from test_dmc import seeds

WORDS = ["def ", "merge", "\n", "é", "🙂", " ", "append\n\n", "\x0c", "a\x0cb\n", '"', "\\"]
TEXTS_OF_FILES = st.lists(st.lists(st.sampled_from(WORDS), max_size=30).map("".join),
                          min_size=1, max_size=12)


def data_settings(*paths, **changes):
    return Settings(**{"data": [str(p) for p in paths], "context": 4, "batch": 2, **changes})


def write_packed(path, text):
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8", newline="") as f:
        f.write(text)
    return path


def test_training_text_is_split_by_file(tmp_path):
    files = []
    for i in range(40):
        files.append(tmp_path / f"{i}.txt")
        files[-1].write_text(chr(65 + i) * 100)
    settings = Settings(data=[str(f) for f in files], context=16)
    train_tokens, val_tokens, _ = load_data(settings, None)
    train_tokens, val_tokens = (text[0:len(text)] for text in (train_tokens, val_tokens))
    assert len(train_tokens) == 38 * 101 and len(val_tokens) == 2 * 101
    assert not (set(train_tokens) & set(val_tokens)) - {256}


@given(TEXTS_OF_FILES, st.sampled_from(["", ".gz", ".xz"]),
       st.sampled_from([".txt", ".jsonl", ".py"]))
def test_every_form_of_text_gives_the_same_documents(tmp_path_factory, texts, packed, kind):
    folder = tmp_path_factory.mktemp("forms")
    texts = [text for text in texts if "\n\x0c\n" not in f"\n{text}\n"]
    if kind == ".txt":
        ended = [text if text.endswith("\n") or not text else text + "\n" for text in texts]
        path = write_packed(folder / f"f.txt{packed}", "\x0c\n".join(ended))
        texts = ended or [""]
    elif kind == ".jsonl":
        lines = "".join(json.dumps({"id": 1, "body": text}) + "\n\n" for text in texts)
        path = write_packed(folder / f"f.jsonl{packed}", lines)
    else:
        texts = ["\x0c\n".join(texts)]
        path = write_packed(folder / f"f.py{packed}", texts[0])
    assert [text for text, _ in documents(path, "body")] == texts


def test_zst_is_read_where_its_library_is(tmp_path, monkeypatch):
    zstandard = oracle("zstandard")
    path, packed = tmp_path / "f.txt.zst", zstandard.compress(b"one\n\x0c\ntwo\n" * 1000)
    path.write_bytes(packed)
    expected = ["one\n", *["two\none\n"] * 999, "two\n"]
    assert [text for text, _ in documents(path, "text")] == expected
    path.write_bytes(packed[:4] + bytes(9) + packed[13:])
    with pytest.raises(InputError, match="damaged"):
        list(documents(path, "text"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match="pip install zstandard"):
        next(documents(path, "text"))


@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_a_text_is_its_documents_in_order(seed, sizes, data):
    rng = np.random.default_rng(seed)
    tokens, ends = rng.integers(0, 1000, sum(sizes)), np.cumsum(sizes)
    order = rng.permutation(len(sizes))
    whole = np.concatenate([tokens[ends[i] - sizes[i]:ends[i]] for i in order])
    text = Text(tokens, (ends - sizes)[order], ends[order])
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole) + 3))
    assert len(text) == len(whole) and np.array_equal(text[start:stop], whole[start:stop])


def test_each_sequence_is_read_once_per_round_and_validation_never(tmp_path):
    """Documents of one repeated byte each: what a batch holds shows where it is from."""
    path = tmp_path / "f.txt"
    path.write_bytes(b"\x0c\n".join(bytes([32 + i]) * (20 + i) + b"\n" for i in range(60)))
    s = data_settings(path)
    train_text, val_text, _ = load_data(s, None)
    held_out = set(val_text[0:len(val_text)].tolist()) - {10, 256}
    assert len(held_out) == 3
    n = (len(train_text) - 1) // 4
    read = [batch(train_text, s, position, "cpu")[0].tolist() for position in range(n)]
    rows = [tuple(row) for rows in read for row in rows]                  # two rounds
    in_order = sorted(tuple(train_text[i * 4:i * 4 + 4].tolist()) for i in range(n))
    assert sorted(rows[:n]) == sorted(rows[n:]) == in_order
    assert rows[:n] != rows[n:] != in_order
    assert not held_out & {token for row in rows for token in row}
    other = data_settings(path, seed=1)
    assert batch(train_text, other, 0, "cpu")[0].tolist() != read[0]
    assert np.array_equal(load_data(other, None)[1][0:50], val_text[0:50])     # for every seed
    part = batch(train_text, s, 3, "cpu", range(1, 2))[0].tolist()
    assert part == read[3][1:]


def test_text_is_tokenized_once_for_its_content(tmp_path, monkeypatch, cache_of_tokens):
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    for i, name in enumerate(["b.txt", "a.txt", "below/c.jsonl"]):
        line = f"text {i}" * 20
        (folder / name).write_text(json.dumps({"text": line}) if "json" in name else line)
    first = load_data(data_settings(folder), None)
    encoded, encode = [], texts_module.encode
    monkeypatch.setattr(texts_module, "encode",
                        lambda *args: encoded.append(args) or encode(*args))
    for pattern in (folder, folder / "**/*.*"):
        again = load_data(data_settings(pattern), None)
        assert again[2] == first[2] and np.array_equal(again[0][0:99], first[0][0:99])
    assert not encoded
    (folder / "a.txt").write_text("text 3" * 20)
    assert load_data(data_settings(folder), None)[2] != first[2] and encoded
    shutil.rmtree(folder)
    again = load_data(data_settings(folder), None, first[2])
    assert np.array_equal(again[0][0:99], first[0][0:99])
    assert not list(cache_of_tokens.glob("*.partial"))


def test_many_processes_tokenize_like_one(tmp_path):
    paths = [tmp_path / f"{name}.jsonl.gz" for name in "ab"]
    texts = [[f"{name}{i} " * 50_000 for i in range(20)] for name in "ab"]
    for path, part in zip(paths, texts, strict=True):
        with gzip.open(path, "wt", compresslevel=1) as f:
            f.writelines(json.dumps({"text": text}) + "\n" for text in part)
    portions = list(encode_all(paths, None, "text", alone=0))
    arrays = [tokens for arrays, _ in portions for tokens in arrays]
    shares = [done for _, done in portions]
    assert len(portions) > 4 and shares == sorted(shares) and shares[-1] == 1
    for tokens, text in zip(arrays, texts[0] + texts[1], strict=True):
        assert bytes(tokens[:-1].astype(np.uint8)).decode() == text and tokens[-1] == 256


BAD_DATA = {
    "no such pattern": (None, "", "no such file"),
    "damaged gzip": ("f.txt.gz", b"\x1f\x8b\x08\x00aaaaaaaaaa", "damaged"),
    "cut gzip": ("f.txt.gz", gzip.compress(os.urandom(9999).hex().encode())[:5000], "damaged"),
    "no gzip": ("f.txt.gz", b"plain text", "cannot be read"),
    "damaged xz": ("f.txt.xz", lzma.compress(os.urandom(9999).hex().encode())[:5000], "damaged"),
    "no xz": ("f.txt.xz", b"plain text", "damaged"),
    "no UTF-8": ("f.jsonl", b'{"text": "\xff"}', "not UTF-8"),
    "no JSON": ("f.jsonl", b'{"text": "a"}\n{"text": ', "in line 2"),
    "no such field": ("f.jsonl", b'{"text": "a"}\n{"body": "a"}', "no text under text in line 2"),
    "no object": ("f.jsonl", b"3", "no text under text in line 1"),
    "no text": ("f.jsonl", b'{"text": 3}', "no text under text in line 1"),
    "empty": ("f.txt", b"", "give more text"),
    "an empty folder": ("sub/.hidden", b"x" * 1000, "no file to train on"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_train_refuses_bad_data(tmp_path, monkeypatch, capsys, case, cache_of_tokens):
    name, content, says = BAD_DATA[case]
    monkeypatch.chdir(tmp_path)
    if name:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    given_data = "missing/*" if name is None else "sub" if "/" in name else name
    arguments = ["--data", given_data, "--context", "16"]
    assert says in refusal(train.main, arguments, capsys, tmp_path)
    assert not list(cache_of_tokens.glob("*.partial"))
