"""Properties of nanodmc/files.py: nothing is lost, and what is wrong is said in a sentence."""

import json

import pytest

from nanodmc import files
from nanodmc.files import InputError


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")

    def full(temporary):
        temporary.write_text("new")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        files.write_atomically(path, full)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_whole_before_it_has_its_name(tmp_path):
    path = tmp_path / "new folder/f"

    def write(temporary):
        temporary.write_text("first half, ")
        assert not path.exists() and temporary.parent == path.parent
        with temporary.open("a") as f:
            f.write("second half")

    files.write_atomically(path, write)
    assert path.read_text() == "first half, second half" and list(path.parent.iterdir()) == [path]


def test_json_comes_back_as_it_was_written(tmp_path):
    value = {"a": [1, 2.5, None, True], "é": "🙂\n"}
    files.write_json(tmp_path / "f.json", value)
    assert files.read_json(tmp_path / "f.json") == value
    assert json.loads((tmp_path / "f.json").read_text()) == value


UNREADABLE_JSON = {
    "missing": (None, "is missing"),
    "a folder": ("folder", "is damaged"),
    "cut off": (b'{"a": [1, 2', "is damaged"),
    "no UTF-8": (b'{"a": "\xff"}', "is damaged"),
    "nested too deeply": (b"[" * 100_000, "is damaged"),
    "a pointer": (files.LFS_POINTER.encode() + b"v1\noid sha256:0\nsize 9\n", "git lfs pull"),
}


@pytest.mark.parametrize("case", UNREADABLE_JSON)
def test_unreadable_json_is_refused_in_a_sentence(tmp_path, case):
    content, says = UNREADABLE_JSON[case]
    path = tmp_path / "facts.json"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=says) as refused:
        files.read_json(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_unreadable_text_is_refused_by_the_flag_that_named_it(tmp_path):
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    (tmp_path / "text").write_text("é\n")
    assert files.read_text(tmp_path / "text", "--prompt-file") == "é\n"
    for name, says in (("missing", "cannot be read"), (".", "cannot be read"), ("latin", "UTF-8")):
        with pytest.raises(InputError, match=says) as refused:
            files.read_text(tmp_path / name, "--prompt-file")
        assert "--prompt-file" in str(refused.value)


def test_what_is_not_there_has_no_lines(tmp_path):
    (tmp_path / "f").write_text("a\nb\n")
    assert files.read_lines(tmp_path / "f") == ["a", "b"]
    assert files.read_lines(tmp_path / "missing") == []


def test_long_messages_and_lists_are_cut_to_a_line():
    assert files.one_line(ValueError("first line\nsecond line")) == "first line"
    assert files.one_line(ValueError("")) == "" and len(files.one_line("x" * 1000)) == 200
    assert files.listed(list("abcd")) == "a, b, c, d"
    assert files.listed(list("abcdef")) == "a, b, c, d and 2 more"
