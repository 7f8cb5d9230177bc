"""What the attack is made of: commands in processes of their own, comparisons, damage to files."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress

import torch
from safetensors.torch import load_file

from conftest import curve, summary

SEED = int(os.environ.get("DMC_SEED", 0))
ONLY = os.environ.get("DMC_ATTEMPTS")        # numbers, as in 3,17: these attempts alone
PATIENCE = 120                               # seconds until a command counts as hanging


class Failed(Exception):
    """What a command did is none of what it may do."""


# ------------------------------------------------------------------------- commands, as processes

class Command:
    """A command that runs in a forked process, so that nothing is imported again.

    main: of train or generate, or any function of a list. before: what that process calls first.
    """

    def __init__(self, main, arguments, folder, cache, before=lambda: None):
        self.arguments, self.code, self.signal = arguments, None, None
        self.name = " ".join([main.__module__, *map(str, arguments[-4:])])
        self.text, self.errors = b"", os.pipe()     # no file, which a full disk would cut short
        os.set_blocking(self.errors[0], False)
        self.pid = os.fork()
        if not self.pid:
            self._carry_out(main, folder, cache, before)
        os.close(self.errors[1])

    def _carry_out(self, main, folder, cache, before):
        code = 70
        try:
            os.setsid()                            # a group with all that it starts
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(self.errors[1], 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
            os.chdir(folder)
            os.environ["XDG_CACHE_HOME"] = str(cache)
            torch.set_num_threads(1)
            before()
            code = main([str(x) for x in self.arguments])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def ended(self):
        """Whether the process has ended."""
        if self.code is None and self.signal is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid and os.WIFSIGNALED(status):
                self.signal = os.WTERMSIG(status)
            elif pid:
                self.code = os.WEXITSTATUS(status)
        return self.code is not None or self.signal is not None

    def wait(self, seconds=PATIENCE):
        """Until it ends. After so many seconds it is killed; then raises Failed."""
        if not self.ended_within(seconds):
            self.kill()
            raise Failed(f"{self.name} hangs")
        return self

    def ended_within(self, seconds):
        end = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < end:
            time.sleep(0.001)
        return self.ended()

    def kill(self):
        """SIGKILL, for this process alone."""
        if not self.ended():
            os.kill(self.pid, signal.SIGKILL)
            while not self.ended():
                time.sleep(0.001)

    def alone(self, seconds=20):
        """Whether everything that it started ends within so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.02)
        os.killpg(self.pid, signal.SIGKILL)
        return False

    @property
    def said(self):
        """What it printed to stderr."""
        with suppress(BlockingIOError):
            while data := os.read(self.errors[0], 2 ** 16):
                self.text += data
        return self.text.decode(errors="replace")

    def check(self, *codes, lines=False):
        """Wait, and raise Failed unless it ended with one of these exit codes, and no traceback.

        To 2 belongs a sentence, and nothing else but warnings, or with `lines` one for each line.
        """
        self.wait()
        said = [line for line in self.said.splitlines() if "warning" not in line.lower()]
        told = all(re.match(r"(train|generate)\.py: \S", line) for line in said)
        if self.code not in codes or "Traceback" in self.said or (
                self.code == 2 and not (told and (said if lines else len(said) == 1))):
            raise Failed(f"{self.name}: exit code {self.code}, signal {self.signal}: "
                         f"{self.said[-1500:]}")
        return self.code


# ------------------------------------------------------------------------- attempts, many of them

def chosen(attempts):
    """Those to be made: (number, attempt) of each."""
    return [(i, a) for i, a in enumerate(attempts) if not ONLY or str(i) in ONLY.split(",")]


def failures(judge, attempts, folder):
    """Call judge(random, folder, attempt) for each of the chosen, in a process and folder each.

    An attempt fails where that raises anything. Returns what was raised, as {number: text}. As
    many attempts run at a time as there are cores.
    """
    waiting, running, found = list(attempts), {}, {}
    while waiting or running:
        if waiting and len(running) < os.cpu_count():
            number, attempt = waiting.pop(0)
            place = folder / str(number)
            place.mkdir(parents=True)
            if not (pid := os.fork()):
                _judge(judge, number, place, attempt)
            running[pid] = number, place
            continue
        pid, status = os.wait()
        number, place = running.pop(pid)
        if status:
            file = folder / f"{number}.failed"
            found[number] = file.read_text() if file.exists() else f"status {status}"
        shutil.rmtree(place, ignore_errors=True)
    return found


def _judge(judge, number, place, attempt):
    code = 1
    try:
        judge(random.Random(f"{SEED} {number}"), place, attempt)
        code = 0
    except BaseException as error:
        told = str(error) if isinstance(error, Failed) else traceback.format_exc()
        place.with_suffix(".failed").write_text(f"{attempt}: {told}")
    finally:
        os._exit(code)


# --------------------------------------------------------------------------- what is left behind

def files_of(folder):
    """The content of every file below a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def content(path):
    """What two runs with the same settings have in common in a file: all but clock and machine."""
    if path.name == "metrics.jsonl":
        return curve(path.parent)
    if path.name == "summary.json":
        return {key: x for key, x in summary(path.parent).items() if key != "date"}
    if path.name == "state.json":
        state = json.loads(path.read_text())
        return {key: state[key] for key in ("phase", "step", "tensors")}
    if path.suffix == ".safetensors":
        return {name: hashlib.sha256(w.view(torch.uint8).numpy().tobytes()).hexdigest()
                for name, w in load_file(path).items()}
    return path.read_bytes()


def check_same(found, expected, but=()):
    """Raise Failed unless two folders hold the same files, apart from those named in `but`."""
    names = files_of(found).keys(), files_of(expected).keys()
    if odd := sorted(names[0] ^ names[1]):
        raise Failed(f"{found} lacks or has too many: {odd}")
    for name in sorted(names[0] - set(but)):
        if content(found / name) != content(expected / name):
            raise Failed(f"{found / name} is another")


# ------------------------------------------------------------------------------- damage to files

def flipped(data, rng):
    """The data with one bit turned over."""
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]


def truncated(data, rng):
    """The beginning of the data, which may be nothing."""
    return data[:rng.randrange(len(data))]


def zeroed(data, rng):
    """The data with zeros in the place of its end, as after a power cut."""
    at = rng.randrange(len(data))
    return data[:at] + bytes(len(data) - at)


DAMAGE = {"flipped": flipped, "truncated": truncated, "zeroed": zeroed}


def damaged(path, kind, rng):
    """Damage a file. Returns what is in it now."""
    before = path.read_bytes()
    after = before
    while after == before:               # as where zeros are written over zeros
        after = DAMAGE[kind](before, rng)
    path.write_bytes(after)
    return after
