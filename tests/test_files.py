"""Properties of nanodmc/files.py: nothing is lost, and what is wrong is said in a sentence."""

import errno
import json
import os
import signal
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

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


FAULTS = {
    "of the system": (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    "without a number": (OSError("the pipe is closed"), "the pipe is closed"),
    "without a word": (OSError(), "OSError"),
    "of safetensors": (SafetensorError("I/O error: so and so (os error 28) at path \"/a\""),
                       "No space left on device"),
    "without the system": (SafetensorError("InvalidHeaderLength"), "InvalidHeaderLength"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_cannot_be_written_says_why(tmp_path, case):
    fault, says = FAULTS[case]

    def fails(temporary):
        raise fault

    with pytest.raises(InputError) as refused:
        files.write_atomically(tmp_path / "f", fails)
    assert f"cannot be written ({says});" in str(refused.value)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_permissions_that_the_umask_allows(tmp_path, umask):
    """Also those that a library makes its own way."""
    before = os.umask(umask)
    try:
        files.write_json(tmp_path / "json", 1)
        files.write_atomically(tmp_path / "weights",
                               lambda f: save_file({"a": torch.ones(2)}, f))
    finally:
        os.umask(before)
    for name in ("json", "weights"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_only_files_are_replaced(tmp_path):
    """A device stays a device, though root could put a file in its place. Here: a pipe."""
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for path in (pipe, folder, ".", "/"):
        with pytest.raises(InputError, match="no file"):
            files.write_json(path, 1)
    assert pipe.is_fifo() and folder.is_dir() and len(list(tmp_path.iterdir())) == 2


def test_a_file_is_whole_before_it_has_its_name(tmp_path):
    path = tmp_path / "new folder/f"

    def write(temporary):
        temporary.write_text("first half, ")
        assert not path.exists() and temporary.parent.parent == path.parent
        with temporary.open("a") as f:
            f.write("second half")

    files.write_atomically(path, write)
    assert path.read_text() == "first half, second half" and list(path.parent.iterdir()) == [path]


def test_what_a_killed_write_left_goes(tmp_path):
    """With all that a library put beside it, and nothing else."""
    def killed(temporary):
        temporary.write_text("half")
        (temporary.parent / ".tmpAbC123").write_text("as large as a model")
        os.kill(os.getpid(), signal.SIGKILL)

    (tmp_path / "mine.partial").touch()
    if (child := os.fork()) == 0:
        files.write_atomically(tmp_path / "weights", killed)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 2
    files.remove_partial_writes(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.partial"]


def test_a_planted_link_is_not_followed(tmp_path):
    """Neither at a name that is easy to guess, nor at the file's own: the link is replaced."""
    (tmp_path / "precious").write_text("mine")
    for name in ("f", "f.partial", ".f.partial"):
        (tmp_path / name).symlink_to("precious")
    files.write_json(tmp_path / "f", 1)
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "f").is_symlink() and files.read_json(tmp_path / "f") == 1


def test_a_write_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """First the content, then the name, then the folder that has the name."""
    done, replace = [], Path.replace

    def named(old, new):
        done.append("named")
        replace(old, new)

    monkeypatch.setattr(files, "sync", lambda path: done.append((path.name, path.stat().st_size)))
    monkeypatch.setattr(Path, "replace", named)
    files.write_atomically(tmp_path / "f", lambda f: f.write_text("12345"))
    assert done[:2] == [("f", 5), "named"] and done[2][0] == tmp_path.name and len(done) == 3


def test_only_a_file_of_a_bounded_size_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "f").write_bytes(bytes(11))
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(InputError, match="a pipe or a device"):
            files.read_json(path)
    with pytest.raises(InputError, match="has 11 bytes, and 10 are the limit"):
        files.read_bytes(tmp_path / "f", limit=10)
    assert files.read_bytes(tmp_path / "f", limit=11) == bytes(11)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_is_read_in_every_encoding_that_it_may_have(tmp_path, encoding):
    (tmp_path / "f.json").write_text('{"é": 1}', encoding=encoding)
    assert files.read_json(tmp_path / "f.json") == {"é": 1}


def test_json_comes_back_as_it_was_written(tmp_path):
    value = {"a": [1, 2.5, None, True], "é": "🙂\n"}
    files.write_json(tmp_path / "f.json", value)
    assert files.read_json(tmp_path / "f.json") == value
    assert json.loads((tmp_path / "f.json").read_text()) == value


UNREADABLE_JSON = {
    "missing": (None, "is missing"),
    "a folder": ("folder", "cannot be read .Is a directory"),
    "below a file": ("below a file", "cannot be read .Not a directory"),
    "empty": (b"", "is damaged .Expecting value"),
    "a number of many digits": (b"1" * 5000, "is damaged"),
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
    elif content == "below a file":
        path.touch()
        path = path / "config.json"
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=says) as refused:
        files.read_json(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_unreadable_text_is_refused_by_the_flag_that_named_it(tmp_path):
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    for encoding in ("utf-8", "utf-8-sig"):             # a byte order mark is no text
        (tmp_path / "text").write_text("é\n", encoding=encoding)
        assert files.read_text(tmp_path / "text", "--prompt-file") == "é\n"
    for name, says in (("missing", "cannot be read"), (".", "cannot be read"), ("latin", "UTF-8")):
        with pytest.raises(InputError, match=says) as refused:
            files.read_text(tmp_path / name, "--prompt-file")
        assert "--prompt-file" in str(refused.value)


def test_a_folder_that_may_not_be_read_is_said_in_a_sentence(tmp_path, monkeypatch):
    """Not with rights of this process, which may be root's, who may read anything."""
    def refuses(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    for name in ("stat", "read_bytes", "read_text"):
        monkeypatch.setattr(Path, name, refuses)
    for read in (files.read_json, files.read_text, lambda path: files.write_json(path, 1)):
        with pytest.raises(InputError, match="cannot be (read|written) .Permission denied"):
            read(tmp_path / "f")


def test_what_is_not_there_has_no_lines(tmp_path):
    (tmp_path / "f").write_text("a\nb\n")
    assert files.read_lines(tmp_path / "f") == ["a", "b"]
    assert files.read_lines(tmp_path / "missing") == []
    (tmp_path / "f").write_bytes(b"a\xff\nb")
    assert files.read_lines(tmp_path / "f") == ["a\ufffd", "b"]


def test_long_messages_and_lists_are_cut_to_a_line():
    assert files.one_line(ValueError("first line\nsecond line")) == "first line"
    assert files.one_line(ValueError("")) == "" and len(files.one_line("x" * 1000)) == 200
    assert files.listed(list("abcd")) == "a, b, c, d"
    assert files.listed(list("abcdef")) == "a, b, c, d and 2 more"
