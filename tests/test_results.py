"""Properties of nanodmc/results.py: what is refused, kept and cut in a file of results."""

import errno
import io
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

import generate
from conftest import lines_of, refusal
from nanodmc import cli, prompts, results
from nanodmc.files import InputError
from nanodmc.locks import Lock

RESULT = {"line": 1, "sample": 0, "prompt": "3", "settings": {"seed": 1}, "text": "a b\u00e9",
          "tokens": 3, "finish": "length", "cr": 1.5}


def two_lines():
    return results.as_line(RESULT) + results.as_line(RESULT | {"line": 2})


@given(st.integers(0, len(two_lines()) - 1), st.integers(0, 7))
def test_no_flipped_bit_changes_a_result(tmp_path_factory, place, bit):
    """The file is refused, and as it was; or the results that are taken from it are the same."""
    path = tmp_path_factory.getbasetemp() / "flipped.jsonl"
    path.write_bytes(two_lines())
    whole, data = results.read_results(path), bytearray(two_lines())
    data[place] ^= 1 << bit
    path.write_bytes(data)
    try:
        found = results.read_results(path)
    except InputError:
        assert path.read_bytes() == data
        return
    assert found.items() <= whole.items()
    kept = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [x["text"] for x in kept] == ["a b\u00e9"] * len(kept)


def test_results_without_a_checksum_are_read(tmp_path):
    path = tmp_path / "old.jsonl"
    path.write_text(json.dumps(RESULT) + "\n")
    assert results.read_results(path).keys() == {(1, 0)}


@pytest.mark.parametrize("change", [{"line": "1"}, {"line": -1}, {"line": True}, {"sample": "a"},
                                    {"sample": None}, {"sample": 0.5}])
def test_odd_numbers_are_damage(tmp_path, change):
    path = tmp_path / "old.jsonl"
    path.write_text(json.dumps(RESULT) + "\n" + json.dumps(RESULT | {"line": 2} | change) + "\n")
    with pytest.raises(InputError, match="damaged line, number 2"):
        results.read_results(path)


def test_who_does_not_write_makes_no_file(tmp_path):
    assert results.read_results(tmp_path / "none", writes=False) == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tail", [b"\0" * 5000, b'{"line": 2, "sam', b'{"line": 2\0\0', b"{"])
def test_a_torn_tail_is_cut_behind_a_result_only(tmp_path, tail):
    path = tmp_path / "out.jsonl"
    path.write_bytes(two_lines() + tail)
    assert len(results.read_results(path, writes=False)) == 2
    assert path.read_bytes() == two_lines() + tail               # the writer may be at work on it
    assert len(results.read_results(path)) == 2 and path.read_bytes() == two_lines()
    path.write_bytes(tail)
    with pytest.raises(InputError, match="no file of results"):
        results.read_results(path)
    assert path.read_bytes() == tail


@pytest.fixture
def command(finished, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "3", "tokens": 2}\n')
    return ["--ckpt", str(finished / "cr2"), "--prompts", str(tmp_path / "in.jsonl"),
            "--cache-gb", "1e-4", "--out"]


def test_one_process_at_a_time_writes_results(command, tmp_path, capsys):
    """Also through a link; a lock and a partial write that a kill left are no hindrance."""
    out, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(out)
    with Lock(tmp_path / ".out.jsonl.lock", "x"):
        for path in (out, link):
            said = refusal(generate.main, [*command, str(path)], capsys, tmp_path)
            assert f"is being written by process {os.getpid()} on " in said
        assert not out.exists()
    (tmp_path / ".out.jsonl.lock").write_text("a process that was killed")
    (tmp_path / ".out.jsonl.0123abcd.partial").mkdir()
    assert generate.main([*command, str(link)]) == 0 and len(lines_of(out)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "link.jsonl"}


@pytest.mark.parametrize("kind", ["same", "link", "hard link"])
def test_a_file_that_is_read_is_not_written(command, tmp_path, capsys, finished, kind):
    given = tmp_path / "in.jsonl"
    out, before = tmp_path / "out.jsonl", given.read_bytes()
    if kind == "same":
        out = given
    elif kind == "link":
        out.symlink_to(given)
    else:
        out.hardlink_to(given)
    said = refusal(generate.main, [*command, str(out)], capsys, tmp_path)
    assert "--prompts and --out are one file" in said
    more = [str(tmp_path / "new.jsonl"), "--profile", str(out)]
    said = refusal(generate.main, [*command, *more], capsys, tmp_path)
    assert "--prompts and --profile are one file" in said and given.read_bytes() == before


def test_no_page_replaces_the_prompt_and_no_figures_do(tmp_path, capsys):
    page = tmp_path / "page.html"
    page.write_text("3")
    for flags in (["--show-merges", str(page)], ["--bench", "--ckpt", "x", "--out", str(page)]):
        said = refusal(generate.main, ["--prompt-file", str(page), *flags], capsys, tmp_path)
        assert f"are one file, {page}" in said
        assert page.read_text() == "3"


def test_files_of_the_model_are_not_written(finished):
    with pytest.raises(InputError, match="belongs to the model; give --profile another"):
        results.refuse_files_of(finished / "cr2", profile=finished / "cr2/config.json")


@pytest.mark.parametrize("name", ["top_k", "tokens", "seed", "temperature", "top_p"])
def test_one_line_does_not_end_a_batch(command, tmp_path, capsys, name):
    """Every number has two ends."""
    values = ["1e400", "NaN", "-1", "1e300", str(2 ** 63), "9" * 400]
    with (tmp_path / "in.jsonl").open("a") as f:
        f.writelines(f'{{"prompt": "3", "{name}": {value}}}\n' for value in values)
    out = tmp_path / "out.jsonl"
    assert generate.main([*command, str(out)]) == 2
    assert [f"{name} cannot be" in x.get("error", "") for x in sorted(
        lines_of(out), key=lambda x: x["line"])] == [False] + [True] * len(values)
    assert "Traceback" not in capsys.readouterr().err


def test_the_size_of_the_cache_has_two_ends(command, tmp_path, capsys):
    for value in ("inf", "nan", "1e300", "-1"):
        arguments = [*command, str(tmp_path / "new.jsonl"), f"--cache-gb={value}"]
        assert value in refusal(generate.main, arguments, capsys, tmp_path)
    for kind in (int, float):
        with pytest.raises((ValueError, cli.argparse.ArgumentTypeError)):
            cli.number(0, kind=kind)("inf" if kind is float else str(2 ** 63))


def test_what_may_never_end_is_not_read(command, tmp_path, capsys, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        flags = [*command[:2], "--prompt-file", str(path)]
        assert "is a pipe or a device" in refusal(generate.main, flags, capsys, tmp_path)
        flags = [*command, str(tmp_path / "new.jsonl"), "--prompts", str(path)]
        assert "is no file; check --prompts" in refusal(generate.main, flags, capsys, tmp_path)
    monkeypatch.setattr(prompts, "LONGEST", 100)
    with (tmp_path / "in.jsonl").open("a") as f:
        f.write("x" * 1000 + '\n{"prompt": "3", "tokens": 2}')
    assert generate.main([*command, str(tmp_path / "out.jsonl")]) == 2
    found = {x["line"]: x.get("error", "") for x in lines_of(tmp_path / "out.jsonl")}
    assert found.pop(2).startswith("the line has more than 100 bytes") and found == {1: "", 3: ""}


def test_weights_are_verified_when_asked(finished, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(generate, "verify", asked.append)
    flags = ["--ckpt", str(finished / "cr2"), "--prompt", "3", "--tokens", "1"]
    assert generate.main(flags) == 0 and asked == []
    assert generate.main([*flags, "--verify"]) == 0 and asked == [finished / "cr2"]
    repeated = [*flags, "--samples", "2", "--temperature", "0"]
    assert "repeats one text" in refusal(generate.main, repeated, capsys, tmp_path)


def test_a_full_disk_leaves_whole_results_only(tmp_path):
    """Also where the first one did not fit, so that the same command goes on from nothing."""
    class Full(io.FileIO):
        """A file that takes so many bytes more."""
        room = 0

        def write(self, data):
            taken = super().write(data[:self.room])
            self.room -= taken
            if taken < len(data):
                raise OSError(errno.ENOSPC, "No space left on device")
            return taken

    path, result = tmp_path / "out", {"line": 1, "sample": 0, "prompt": "a", "text": "b"}
    for whole in (0, 1):
        with Full(path, "ab") as out:
            for _ in range(whole):
                out.room = 1000
                prompts.write_line(out, result)
            out.room = 20
            with pytest.raises(InputError, match="No space left on device"):
                prompts.write_line(out, {**result, "line": 2})
        assert len(results.read_results(path)) == whole == len(path.read_bytes().splitlines())
