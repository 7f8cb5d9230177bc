"""Properties of nanodmc/token_cache.py: tokens are whole, whatever happened to them."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from conftest import HERE
from nanodmc import token_cache
from nanodmc.files import InputError
from nanodmc.settings import Settings
from nanodmc.text import load_data
from nanodmc.token_cache import RECORD, fault, make

KEY = "0123456789abcdef01234567"
ARRAYS = [np.arange(i, dtype=np.uint16) for i in (5, 0, 70, 9)]


def portions():
    yield ARRAYS[:1], 0.5
    yield ARRAYS[1:], 1.0


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def made(tmp_path):
    make(tmp_path / KEY, 257, portions)
    return tmp_path / KEY


def test_tokens_are_in_a_row_with_a_record(made):
    assert np.array_equal(np.fromfile(made / "tokens", np.uint16), np.concatenate(ARRAYS))
    assert np.fromfile(made / "ends", np.int64).tolist() == [5, 5, 75, 84]
    assert fault(made, 257) is None and list(made.parent.iterdir()) == [made]


@pytest.mark.parametrize("name", ["tokens", "ends", RECORD])
def test_damage_is_seen_and_mended(made, name, capfd):
    """Every flipped bit, every length: what is in the way of an equal folder is made anew."""
    whole, rng = content(made), random.Random(0)
    size = len(whole[name])
    attempts = [whole[name][:cut] for cut in (0, size - 1, size - 2, size // 2, size // 2 - 8)]
    attempts += [whole[name] + bytes(2), bytes(size), None]
    for _ in range(40):
        flipped = bytearray(whole[name])
        flipped[rng.randrange(size)] ^= 1 << rng.randrange(8)
        attempts.append(bytes(flipped))
    for damaged in attempts:
        (made / name).unlink(missing_ok=True)
        if damaged is not None:
            (made / name).write_bytes(damaged)
        if name == RECORD and damaged is None:
            assert fault(made, 257) is None                   # as an earlier version left it
            continue
        same = name == RECORD and _value(damaged) == _value(whole[name])
        assert (fault(made, 257) is None) == same
        make(made, 257, portions)
        assert ("tokenizing anew" in capfd.readouterr().out) != same
        assert fault(made, 257) is None and list(made.parent.iterdir()) == [made]
        assert same or content(made) == whole
        shutil.rmtree(made)
        make(made, 257, portions)


def _value(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


def test_an_emptied_or_odd_folder_is_made_anew(made, capfd):
    whole = content(made)
    for spoil in (lambda: [path.unlink() for path in made.iterdir()],
                  lambda: ((made / "tokens").unlink(), os.mkfifo(made / "tokens")),
                  lambda: ((made / RECORD).unlink(), os.mkfifo(made / RECORD)),
                  lambda: ((made / RECORD).unlink(), (made / RECORD).symlink_to("/dev/zero"))):
        spoil()
        make(made, 257, portions)
        assert "are damaged" in capfd.readouterr().out and content(made) == whole


def test_tokens_without_a_record_are_checked_by_what_they_are(made):
    (made / RECORD).unlink()
    whole = content(made)
    assert fault(made, 257) is None
    for name, damaged, says in [
            ("tokens", whole["tokens"][:-2], "do not fit"), ("ends", whole["ends"][:-3], "fit"),
            ("ends", whole["ends"][:-8], "do not fit"), ("ends", b"", "do not fit"),
            ("ends", np.array([5, 90, 75, 84]).tobytes(), "ends before it begins"),
            ("ends", np.array([-5, 5, 75, 84]).tobytes(), "ends before it begins"),
            ("tokens", b"\1\1" + whole["tokens"][2:], "tokenizer lacks")]:
        (made / name).write_bytes(damaged)
        assert says in fault(made, 257)
        (made / name).write_bytes(whole[name])


def test_tokens_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    done, replace, sync = [], token_cache.Path.replace, token_cache.sync

    def named(old, new):
        done.append(f"named {new.name}")
        return replace(old, new)

    monkeypatch.setattr(token_cache, "sync", lambda path: done.append(path.name) or sync(path))
    monkeypatch.setattr("nanodmc.files.sync", lambda path: done.append(path.name) or sync(path))
    monkeypatch.setattr(token_cache.Path, "replace", named)
    make(tmp_path / KEY, 257, portions)
    assert done[:4] == ["tokens", "ends", RECORD, f"named {RECORD}"]
    assert done[4].startswith(f".{KEY}.") and done[5:] == [f"named {KEY}", tmp_path.name]


def test_what_kills_left_goes_and_nothing_else(tmp_path, monkeypatch):
    """Of this text and others, in this version and earlier ones, unless somebody is at it."""
    other, busy = "a" * 24, "b" * 24
    gone = [f"{KEY}.1.partial", f".{KEY}.0a.partial", f"{other}.7.partial", f".{other}.0b.partial"]
    kept = [f".{busy}.0c.partial", "mine.partial", other]
    for name in gone + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens").touch()
    (tmp_path / f"{other}.lock").touch()
    with token_cache.lock_of(tmp_path / busy):
        make(tmp_path / KEY, 257, portions)
    assert {path.name for path in tmp_path.iterdir()} == {KEY, *kept}


def test_two_containers_do_not_share_a_name(tmp_path, monkeypatch):
    """What another process makes meanwhile, under the same process id, is left alone."""
    monkeypatch.setattr(os, "getpid", lambda: 7)

    def slow():
        begun = list(tmp_path.glob(f".{KEY}.*.partial"))
        yield ARRAYS[:1], 0.5
        make(tmp_path / ("c" * 24), 257, portions)
        assert list(tmp_path.glob(f".{KEY}.*.partial")) == begun and len(begun) == 1
        yield ARRAYS[1:], 1.0

    make(tmp_path / KEY, 257, slow)
    assert fault(tmp_path / KEY, 257) is None and fault(tmp_path / ("c" * 24), 257) is None


def test_a_disk_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
        make(tmp_path / "file" / KEY, 257, portions)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="read-only.*XDG_CACHE_HOME"):
        make(tmp_path / KEY, 257, portions)


# ---------------------------------------------------------------------------- processes and kills

TOKENIZE = """
import sys
from nanodmc import text
from nanodmc.settings import Settings
if __name__ == "__main__":
    if sys.argv[2:]:
        whole = text.encode_all
        text.encode_all = lambda *a: whole(*a, alone=0)
    print(text.load_data(Settings(data=[sys.argv[1]], context=4), None)[2])
"""


def tokenizing(path, *more):
    """A process that tokenizes a file; with more arguments, in processes of its own."""
    script = path.parent / "process.py"
    script.write_text(TOKENIZE)
    return subprocess.Popen([sys.executable, script, path, *more], stdout=subprocess.PIPE,
                            text=True, start_new_session=True, env={**os.environ,
                                                                    "PYTHONPATH": str(HERE)})


def children(pid):
    """The processes below this one."""
    listed = subprocess.run(["ps", "-eo", "pid=,sid=,stat="], capture_output=True, text=True)
    rows = (line.split() for line in listed.stdout.splitlines())
    return [int(p) for p, session, state in rows
            if int(session) == pid != int(p) and state[0] != "Z"]


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_workers_end_with_a_killed_parent(tmp_path, cache_of_tokens):
    """And the next run tokenizes as if nothing had been."""
    path = tmp_path / "f.jsonl"
    path.write_text((json.dumps({"text": "many words " * 99}) + "\n") * 2_000)
    killed = tokenizing(path, "in many processes")
    until(lambda: list(cache_of_tokens.glob("*.partial/tokens")) and len(children(killed.pid)) > 2)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    try:
        until(lambda: not children(killed.pid), 20)
    finally:
        for pid in children(killed.pid):
            os.kill(pid, signal.SIGKILL)
        killed.stdout.close()
    assert list(cache_of_tokens.glob("*.partial"))
    _, _, key = load_data(Settings(data=[str(path)], context=4), None)
    assert not list(cache_of_tokens.glob("*.partial")) + list(cache_of_tokens.glob("*.lock"))
    assert fault(cache_of_tokens / key, 257) is None


def test_a_second_run_waits_for_the_first(tmp_path, cache_of_tokens):
    path = tmp_path / "f.txt"
    path.write_text("text " * 50)
    _, _, key = load_data(Settings(data=[str(path)], context=4), None)
    shutil.rmtree(cache_of_tokens / key)
    with token_cache.lock_of(cache_of_tokens / key):
        second = tokenizing(path)
        assert "another process is tokenizing the same text" in second.stdout.readline()
        token_cache.write_tokens(cache_of_tokens / key, portions())
        before = content(cache_of_tokens / key)
    assert re.fullmatch(f"{key}\n", second.communicate()[0])
    assert second.returncode == 0 and content(cache_of_tokens / key) == before
