"""Properties of nanodmc/documents.py: files of every kind become documents, or are refused."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import oracle
from nanodmc import documents as module
from nanodmc.documents import documents, form_of, standard_library, text_files
from nanodmc.files import InputError

WORDS = ["def ", "merge", "\n", "é", "🙂", " ", "append\n\n", "\x0c", "a\x0cb\n", '"', "\\"]
TEXTS_OF_FILES = st.lists(st.lists(st.sampled_from(WORDS), max_size=30).map("".join),
                          min_size=1, max_size=12)
PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress,
           ".zst": lambda content: oracle("zstandard").compress(content)}
MARK = "\ufeff"                  # a byte order mark
PACKED = [packing for packing in PACKERS if packing]


def texts_of(path, field="text"):
    return [text for text, _ in documents(path, field)]


def written(path, text):
    """The path of a file with this text, packed as its name says."""
    path.write_bytes(PACKERS.get(path.suffix.lower(), bytes)(text.encode()))
    return path


@given(TEXTS_OF_FILES, st.sampled_from(["", ".gz", ".xz"]),
       st.sampled_from([".txt", ".jsonl", ".py"]))
def test_every_form_of_text_gives_the_same_documents(tmp_path_factory, texts, packed, kind):
    folder = tmp_path_factory.mktemp("forms")
    texts = [text for text in texts if "\n\x0c\n" not in f"\n{text}\n"]
    if kind == ".txt":
        ended = [text if text.endswith("\n") or not text else text + "\n" for text in texts]
        path = written(folder / f"f.txt{packed}", "\x0c\n".join(ended))
        texts = ended or [""]
    elif kind == ".jsonl":
        lines = "".join(json.dumps({"id": 1, "body": text}) + "\n\n" for text in texts)
        path = written(folder / f"f.jsonl{packed}", lines)
    else:
        texts = ["\x0c\n".join(texts)]
        path = written(folder / f"f.py{packed}", texts[0])
    assert texts_of(path, "body") == texts


# ---------------------------------------------------------------------------- kinds by content

TEXTS = ["one\n", "two é", "", '{"three": 3}']
OBJECTS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(entry) + "\n" for entry in OBJECTS)
ARRAY, INDENTED = json.dumps(OBJECTS), json.dumps(OBJECTS, indent=2)
PAGES = "one\n\x0c\ntwo\n"
KINDS = {
    **{name: (LINES, TEXTS) for name in (
        "f.json", "f.jsonl", "f.ndjson", "f.JSONL", "f.Json", "f.NDJSON", "f.jsonlines", "f",
        "f.txt", "part-0001", "f.data", "shard.0")},
    **{f"array in {name}": (ARRAY, TEXTS) for name in ("f.json", "f.jsonl", "f.txt", "f.JSON")},
    "indented array in f.json": (INDENTED, TEXTS),
    "indented array in f.jsonl": (INDENTED, TEXTS),
    "array of texts in f.json": (json.dumps(TEXTS), TEXTS),
    "array of texts in f": (json.dumps(TEXTS, indent=1), TEXTS),
    "texts in lines in f.jsonl": ('"a"\n"b"\n', ["a", "b"]),
    "one object in f.json": (json.dumps(OBJECTS[1], indent=2), TEXTS[1:2]),
    "one object in a line in f.json": (json.dumps(OBJECTS[1]), TEXTS[1:2]),
    "blanks before f.json": ("\n\n " + INDENTED, TEXTS),
    "long line in f.json": (json.dumps({"text": "x" * 99_999}) + "\n" + LINES,
                            ["x" * 99_999, *TEXTS]),
    "marks in f.jsonl": (LINES + MARK + LINES, TEXTS + TEXTS),
    "nothing in f.json": (" \n", []),
    "f.TXT": (PAGES, ["one\n", "two\n"]),
    "f.Txt": (PAGES, ["one\n", "two\n"]),
    "f.md": ("[link](x), {braces}\n", ["[link](x), {braces}\n"]),
    "g.md": ("{not: json}\n", ["{not: json}\n"]),
    "quotes in f.txt": ('"Hello", said he.\n', ['"Hello", said he.\n']),
    "Gutenberg's f.txt": ("[Illustration]\n", ["[Illustration]\n"]),
    "F.PY": (PAGES, [PAGES]),
}


@pytest.mark.parametrize("packing", ["", ".gz", ".GZ", ".Xz", ".zst", ".ZST"])
@pytest.mark.parametrize("mark", ["", MARK])
def test_a_file_is_read_by_what_is_in_it(tmp_path, packing, mark):
    """Case never matters, a byte order mark is no text, and JSON is JSON under any name."""
    for case, (content, expected) in KINDS.items():
        path = written(tmp_path / (case.split(" in ")[-1].split()[-1] + packing), mark + content)
        assert texts_of(path) == expected, case


@pytest.mark.parametrize("packing", PACKED)
def test_a_packed_file_needs_no_such_name(tmp_path, packing):
    path = tmp_path / "f.txt"
    path.write_bytes(PACKERS[packing](PAGES.encode()))
    assert texts_of(path) == ["one\n", "two\n"]


def archive():
    out, content = io.BytesIO(), b"text of a file"
    with tarfile.open(fileobj=out, mode="w") as tar:
        entry = tarfile.TarInfo("folder/a.txt")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


REFUSED = {
    "settings": ("f.json", b'{"compilerOptions": {}}', "no text under text in line 1"),
    "indented": ("f.json", b'{\n "compilerOptions": {}\n}', "no text under text in entry 1"),
    "JSON under another name": ("f.txt", b'{"a": 1}\n{"a": 2}\n', "no text under text in line 1"),
    "a notebook": ("f.ipynb", b'{\n "cells": [],\n "nbformat": 4}', "no text under text"),
    "numbers": ("f.json", b"[1, 2]", "no text under text in entry 1"),
    "no JSON": ("f.json", b"plain", "no JSON in line 1"),
    "a cut array": ("f.json", ARRAY[:50].encode(), "no JSON in line 1, where it ends"),
    "a cut line": ("f.jsonl", LINES[:-9].encode(), "no JSON in line 4, where it ends"),
    "deep JSON": ("f.jsonl", b"[" * 100_000, "no JSON in line 1"),
    "a huge number": ("f.jsonl", b"9" * 9999, "no JSON in line 1"),
    "a fault in a line": ("f.jsonl", b'{"text": "a"}\n{"text": }\n{"text": "b"}',
                        "line 2; mend it"),
    "an archive": ("f.tar", archive(), "archive of files"),
    "a packed archive": ("f.tgz", gzip.compress(archive()), "archive of files"),
    "another packing": ("f.txt.bz2", bz2.compress(os.urandom(999)), "not UTF-8"),
    "another encoding": ("f.txt", "text".encode("utf-16"), "not UTF-8"),
    "half a character": ("f.txt", "text é".encode()[:-1], "cut short"),
    "gzip in name only": ("f.GZ", b"plain", "no .gz file"),
    "one packing for another": ("f.txt.gz", lzma.compress(b"text"), "no .gz file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, case):
    name, content, says = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as refused:
        texts_of(tmp_path / name)
    said = str(refused.value)
    assert str(tmp_path / name) in said and said.endswith(".") and "\n" not in said


def test_the_standard_library_is_read_as_ever():
    """Byte for byte, and so are its tokens: their name in the cache stays valid."""
    for path in standard_library()[::10]:
        assert form_of(path) == ("", "whole", True)
        assert texts_of(path) == [path.read_text(encoding="utf-8")]


def test_another_way_of_reading_is_told_apart(tmp_path):
    ever = {"a.txt": PAGES, "a.jsonl": LINES, "a.py": PAGES, "a.txt.gz": PAGES, "a.jsonl.xz": LINES}
    anew = {"b.json": LINES, "b.ndjson": LINES, "b.TXT": PAGES, "b.txt.GZ": PAGES,
            "b.txt.zst": PAGES, "b.txt": MARK + PAGES, "c.txt": LINES, "c.jsonl": ARRAY,
            "b.py": MARK + "x = 1"}
    for name, text in (ever | anew).items():
        assert form_of(written(tmp_path / name, text)).as_ever == (name in ever), name


def test_what_is_hidden_is_left_out(tmp_path):
    for name in ("a.txt", ".hidden", ".git/config", "b/.ipynb_checkpoints/c.txt", "b/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [tmp_path / "a.txt", tmp_path / "b/c.txt"]
    assert text_files([str(tmp_path)]) == names
    assert text_files([str(tmp_path / "**/*.*"), str(tmp_path / "*")]) == names
    assert text_files([str(tmp_path / ".hidden")]) == [tmp_path / ".hidden"]     # named, so meant
    assert text_files([str(tmp_path / ".git")]) == [tmp_path / ".git/config"]


def test_a_pipe_is_no_file_of_text(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", os.devnull):
        with pytest.raises(InputError, match="a device or a pipe"):
            text_files([str(name)])
    with pytest.raises(InputError, match="no file to train on"):
        text_files([str(tmp_path / "p*"), str(tmp_path)])


def test_what_can_never_be_read_is_skipped_or_refused_at_once(tmp_path):
    """Pipes and devices below a folder, names that no system takes, more bytes than memory."""
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zeros.txt").symlink_to("/dev/zero")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "f.txt").write_text("x")
    for pattern in (tmp_path, tmp_path / "*", tmp_path / "**/*.txt"):
        assert text_files([str(pattern)]) == [tmp_path / "f.txt"]
    for name, says in [("a" * 999, "File name too long"), ("a\0b", "no such file"),
                       (tmp_path / "round", "device or a pipe|no such file|symbolic links")]:
        with pytest.raises(InputError, match=says):
            text_files([str(name)])
    for name in ("f.md", "f.json"):
        with (tmp_path / name).open("wb") as file:
            file.write(b"[\n")
            file.truncate(2 * module.memory())
        with pytest.raises(InputError, match="more memory to read than there is"):
            form_of(tmp_path / name)


# ------------------------------------------------------------------------------- streams that end

LONG = "".join(json.dumps({"text": os.urandom(40).hex()}) + "\n" for _ in range(2000))


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("name", ["f.txt", "f.jsonl", "f.json", "f"])
def test_a_packed_file_that_is_cut_short_is_refused(tmp_path, packing, name):
    whole = PACKERS[packing](LONG.encode())
    path = tmp_path / (name + packing)
    for size in (0, 3, 10, len(whole) // 2, len(whole) * 9 // 10, len(whole) - 5, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"is cut short|no \.\w+ file"):
            texts_of(path)
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match="is cut short: what is packed in it has no end; fetch"):
        texts_of(path)
    for parts in (whole * 2, whole + PACKERS[packing](b"") + whole):    # in a row, as by cat
        path.write_bytes(parts)
        assert len(texts_of(path)) == 4000
        path.write_bytes(parts[:-1])
        with pytest.raises(InputError, match="is cut short"):
            texts_of(path)


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("name", ["f.txt", "f.jsonl", "f.json", "f"])
def test_a_packed_file_that_is_damaged_is_refused(tmp_path, packing, name):
    whole = bytearray(PACKERS[packing](LONG.encode()))
    path, half = tmp_path / (name + packing), len(whole) // 2
    whole[half:half + 99] = bytes(b ^ 255 for b in whole[half:half + 99])
    path.write_bytes(whole)
    with pytest.raises(InputError, match="is damaged"):
        texts_of(path)


def test_zst_is_read_in_all_its_forms(tmp_path):
    """A frame without its size, one to skip, and one of which 2 GB may be looked back upon."""
    zstandard = oracle("zstandard")
    path, skipped = tmp_path / "f.txt.zst", b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    stream = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    path.write_bytes(skipped + stream.compress(PAGES.encode()) + stream.flush() + skipped)
    assert texts_of(path) == ["one\n", "two\n"]
    for log in (28, 31):
        long = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=True, hash_log=10,
                                                   chain_log=10, ldm_hash_log=10)
        stream = zstandard.ZstdCompressor(compression_params=long).compressobj()
        path.write_bytes(stream.compress(PAGES.encode()) + stream.flush())
        assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 2 ** log
        assert texts_of(path) == ["one\n", "two\n"]


def test_a_sound_zst_is_not_called_damaged(tmp_path, monkeypatch):
    zstandard = oracle("zstandard")
    path = tmp_path / "f.txt.zst"
    samples = [f"sample {i} of {i * i} texts, as usual".encode() for i in range(2000)]
    words = zstandard.train_dictionary(2000, samples)
    path.write_bytes(zstandard.ZstdCompressor(dict_data=words).compress(samples[0]))
    with pytest.raises(InputError, match="packed with a dictionary; unpack it"):
        texts_of(path)

    def unpack(reader):
        raise MemoryError

    monkeypatch.setattr(module.ZstdReader, "_unpack", unpack)
    with pytest.raises(InputError, match="more memory"):
        texts_of(path)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match="pip install zstandard"):
        next(documents(path, "text"))
