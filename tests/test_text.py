"""Properties of nanodmc/text.py: documents become tokens and batches."""

import gzip
import hashlib
import json
import lzma
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
from conftest import edit_json, refusal
from nanodmc import text as texts_module
from nanodmc.files import InputError
from nanodmc.settings import Settings
from nanodmc.text import Text, batch, content_key, encode_all, load_data
from nanodmc.tokenizer import Tokenizer
from test_dmc import seeds


def data_settings(*paths, **changes):
    return Settings(**{"data": [str(p) for p in paths], "context": 4, "batch": 2, **changes})


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


@given(seeds, st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), st.data())
def test_a_text_is_its_documents_in_order(seed, sizes, data):
    """Empty ones and empty slices too."""
    rng = np.random.default_rng(seed)
    tokens, ends = rng.integers(0, 1000, sum(sizes)), np.cumsum(sizes)
    order = rng.permutation(len(sizes))
    whole = np.concatenate([tokens[ends[i] - sizes[i]:ends[i]] for i in order])
    text = Text(tokens, (ends - sizes)[order], ends[order])
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start, len(whole) + 3))
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


def first_key(files, tokenizer):
    """What the first version called the tokens of these files."""
    whole = hashlib.blake2b(json.dumps(["text", tokenizer.special_ids]).encode(), digest_size=12)
    whole.update(tokenizer.files["tokenizer.json"])
    for path in files:
        whole.update(json.dumps([path.suffixes[-2:], path.stat().st_size]).encode())
        whole.update(path.read_bytes())
    return whole.hexdigest()


def test_tokens_from_before_are_of_use_where_they_would_be_the_same(tmp_path, plain):
    """Where files or ends of text are read in another way now, they are made anew."""
    lines, tokenizer = b'{"text": "a"}\n', Tokenizer.bytes()
    for name, content, same in [
            ("a.py", b"x", True), ("a.txt", b"x", True), ("a.jsonl", lines, True),
            ("a.jsonl.gz", gzip.compress(lines), True), ("a.TXT", b"x", False),
            ("a.txt", b"\xef\xbb\xbfx", False), ("a.json.gz", gzip.compress(lines), False)]:
        path = tmp_path / name
        path.write_bytes(content)
        assert (content_key([path], None, "text") == first_key([path], tokenizer)) == same, name
    files = [tmp_path / "a.py"]
    for i, (end, same) in enumerate([(256, True), ([7, 256], True), (0, False), (None, False)]):
        folder = shutil.copytree(plain, tmp_path / str(i))
        edit_json(folder / "config.json", lambda c, end=end: c.update(eos_token_id=end))
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
        first = first_key(files, Tokenizer.from_folder(folder))
        assert (content_key(files, folder, "text") == first) == same, end


def test_a_million_blanks_stop_no_corpus(tmp_path, capfd):
    path, texts = tmp_path / "f.jsonl", ["before", "x" + " " * 10 ** 6 + "y", "\ud800", "after"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (arrays, done), = encode_all([path], None, "text")
    assert [len(tokens) for tokens in arrays] == [7, 10 ** 6 + 3, 4, 6] and done == 1
    assert capfd.readouterr().err == ""


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


def test_a_run_that_resumes_has_the_same_tokens_or_a_sentence(tmp_path, cache_of_tokens, capfd):
    path = tmp_path / "f.txt"
    path.write_text("whole text " * 30)
    train_text, _, key = load_data(data_settings(path), None)
    before, saved = train_text[0:len(train_text)].tolist(), cache_of_tokens / key

    def spoil():
        (saved / "tokens").write_bytes((saved / "tokens").read_bytes()[:-2])

    for damage, said in ((spoil, True), (lambda: shutil.rmtree(saved), False),
                         (lambda: [child.unlink() for child in saved.iterdir()], True)):
        damage()
        train_text, _, again = load_data(data_settings(path), None, key)
        assert again == key and train_text[0:len(train_text)].tolist() == before
        assert ("tokenizing anew" in capfd.readouterr().out) == said
    (saved / "record.json").unlink()                     # as an earlier version left it
    assert load_data(data_settings(path), None, key)[2] == key
    path.unlink()
    assert load_data(data_settings(path), None, key)[2] == key
    spoil()
    with pytest.raises(InputError, match="from before are of no use .*f.txt cannot be read"):
        load_data(data_settings(path), None, key)
    assert saved.is_dir()                                # whoever has it mapped reads on


def test_a_key_from_a_file_leads_nowhere_else(tmp_path, cache_of_tokens):
    path = tmp_path / "f.txt"
    path.write_text("whole text " * 30)
    key = load_data(data_settings(path), None)[2]
    elsewhere = shutil.copytree(cache_of_tokens / key, tmp_path / key)
    (elsewhere / "tokens").write_bytes(bytes(len((elsewhere / "tokens").read_bytes())))
    (elsewhere / "record.json").unlink()
    for other in (str(elsewhere), f"../{key}", "None", "", key.upper(), 3, [key]):
        train_text, _, again = load_data(data_settings(path), None, other)
        assert again == key and train_text[0:5].all()


def test_a_text_that_changes_meanwhile_has_no_name(tmp_path, cache_of_tokens, monkeypatch):
    path, encode = tmp_path / "f.txt", texts_module.encode
    path.write_text("text of its own " * 30)

    def meanwhile(*args):
        path.write_text("text of another " * 30)
        return encode(*args)

    monkeypatch.setattr(texts_module, "encode", meanwhile)
    before = set(cache_of_tokens.glob("*"))
    with pytest.raises(InputError, match="was changed while it was tokenized; start again"):
        load_data(data_settings(path), None)
    assert set(cache_of_tokens.glob("*")) == before


def test_a_file_of_another_size_than_it_says_is_refused(tmp_path):
    """As those of the system's, which say 0 and may never end."""
    with pytest.raises(InputError, match="/proc/self/status has another size"):
        content_key([Path("/proc/self/status")], None, "text")


def test_a_killed_worker_is_said(tmp_path, monkeypatch):
    path = tmp_path / "f.txt"
    path.write_text("text")
    monkeypatch.setattr(texts_module, "end_with_parent", os.abort)
    with pytest.raises(InputError, match="a process that tokenizes was killed"):
        list(encode_all([path], None, "text", alone=0))


BAD_DATA = {
    "no such pattern": (None, "", "no such file"),
    "damaged gzip": ("f.txt.gz", gzip.compress(b"text", mtime=0)[:-8] + bytes(8), "damaged"),
    "cut gzip": ("f.txt.gz", gzip.compress(os.urandom(9999).hex().encode())[:5000], "cut short"),
    "no gzip": ("f.txt.gz", b"plain text", "cannot be read"),
    "damaged xz": ("f.txt.xz", lzma.compress(b"text")[:-30] + bytes(30), "damaged"),
    "cut xz": ("f.txt.xz", lzma.compress(os.urandom(9999).hex().encode())[:5000], "cut short"),
    "no xz": ("f.txt.xz", b"plain text", "cannot be read"),
    "no UTF-8": ("f.jsonl", b'{"text": "\xff"}', "not UTF-8"),
    "no JSON": ("f.jsonl", b'{"text": "a"}\n{"text": ', "in line 2"),
    "no such field": ("f.jsonl", b'{"text": "a"}\n{"body": "a"}', "no text under text in line 2"),
    "no object": ("f.jsonl", b"3", "no text under text in line 1"),
    "no text": ("f.jsonl", b'{"text": 3}', "no text under text in line 1"),
    "empty": ("f.txt", b"", "give more text"),
    "no text at all": ("f.jsonl", b'{"text": null}', "no text in them"),
    "no line of JSON": ("f.json.gz", gzip.compress(b""), "no text in them"),
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
