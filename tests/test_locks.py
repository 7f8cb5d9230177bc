"""Properties of nanodmc/locks.py, with processes that fight over a lock."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import HERE
from nanodmc.files import InputError
from nanodmc.locks import Lock

HOLD = """
import sys, time
from nanodmc.locks import Lock
with Lock(sys.argv[1], "the run"):
    print("held", flush=True)
    time.sleep(60)
"""
COUNT = """
import sys
from pathlib import Path
from nanodmc.locks import Lock
folder = Path(sys.argv[1])
for i in range(100):
    with Lock(folder / "lock", "the number", wait=True):
        number = int((folder / "number").read_text())
        (folder / "number").write_text(str(number + 1))
"""


def process(code, path):
    return subprocess.Popen([sys.executable, "-c", code, path], cwd=HERE, stdout=subprocess.PIPE)


def test_the_loser_hears_who_holds_it_and_a_kill_frees_it(tmp_path):
    holder = process(HOLD, tmp_path / "lock")
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match=f"the run is being written by process {holder.pid} on "):
        Lock(tmp_path / "lock", "the run")
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / "lock").exists()
    with Lock(tmp_path / "lock", "the run"):
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()
    assert not list(tmp_path.iterdir())


def test_a_lock_of_this_process_holds_against_itself(tmp_path):
    lock = Lock(tmp_path / "lock", "the run")
    with pytest.raises(InputError):
        Lock(tmp_path / "lock", "the run")
    lock.release()
    lock.release()
    Lock(tmp_path / "lock", "the run").release()


def test_no_two_hold_it_at_once(tmp_path):
    """Though it is removed by each and made anew by the next: four count to 400 together."""
    (tmp_path / "number").write_text("0")
    counting = [process(COUNT, tmp_path) for _ in range(4)]
    for one in counting:
        one.communicate()
        assert one.returncode == 0
    assert (tmp_path / "number").read_text() == "400"


def test_waiting_ends_with_the_holder(tmp_path):
    holder = process(HOLD, tmp_path / "lock")
    holder.stdout.readline()
    waiting = process(COUNT.replace("100", "1"), tmp_path)
    (tmp_path / "number").write_text("0")
    time.sleep(0.3)
    assert waiting.poll() is None
    holder.kill()
    holder.communicate()
    waiting.communicate()
    assert (tmp_path / "number").read_text() == "1"


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def without(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    with pytest.warns(UserWarning, match="the run cannot be locked .No locks available"):
        Lock(tmp_path / "lock", "the run").release()


def test_a_lock_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").symlink_to("precious")
    for path in (tmp_path / "link", tmp_path / "no folder/lock"):
        with pytest.raises(InputError, match="the run cannot be written"):
            Lock(path, "the run")
    assert (tmp_path / "precious").read_text() == "mine"
