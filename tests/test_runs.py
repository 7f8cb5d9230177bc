"""Properties of nanodmc/runs.py: a run survives any interruption, and shows what it does."""

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException

import train
from conftest import (
    HERE,
    LEAN,
    SHORT,
    TINY,
    PowerCut,
    before_step,
    curve,
    dies,
    interrupted,
    refusal,
    same_weights,
    single_threaded,
    summary,
)
from nanodmc import runs, state
from nanodmc.checkpoint import load
from nanodmc.files import InputError
from nanodmc.stopping import Stopped, heeded

pytestmark = pytest.mark.usefixtures("one_thread")       # faster for tiny models


def break_model(model):
    model.norm.weight.data.fill_(math.nan)


# ------------------------------------------------------------------------------------ interruptions

@given(died_at=st.integers(0, 30), again_at=st.integers(0, 30))
@settings(max_examples=4)
def test_resume_is_bit_identical(tmp_path_factory, finished, text, died_at, again_at):
    """Die before any step, twice; the curve, the weights and the table come out as if nothing had
    happened."""
    out = tmp_path_factory.mktemp("killed") / "run"
    arguments = ["--out", str(out)]
    for at in (died_at, again_at):
        more = ["--resume"] if out.exists() else ["--data", text, *TINY]
        with before_step(at, dies), contextlib.suppress(PowerCut):
            train.main([*arguments, *more])
    assert train.main([*arguments, "--resume"]) == 0
    assert curve(out) == curve(finished)
    ours, theirs = summary(out), summary(finished)
    for key in ("pretrained", "control", "dmc"):
        assert ours[key] == theirs[key]
    assert same_weights(out, finished)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_killed_process_resumes(tmp_path, finished, text, signal_number):
    out, delay = tmp_path / "run", np.random.default_rng().uniform(0, 1.5)
    command = [sys.executable, HERE / "train.py", "--out", out, "--data", text, *TINY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal_number)
    printed = process.communicate(timeout=60)[0]
    finished_before = (out / "summary.json").exists()
    if signal_number != signal.SIGKILL and not finished_before:
        assert process.returncode == 130 and f"train.py --resume --out {out}" in printed
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert curve(out) == curve(finished), f"{delay} s after the start"


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_an_output_that_is_gone_stops_and_saves(tmp_path, finished, text, kind):
    """A pipe whose reader ends, as head does; a terminal that hangs up, which sends SIGHUP too."""
    out = tmp_path / "run"
    command = [sys.executable, HERE / "train.py", "--out", out, "--data", text, *TINY,
               "--log-every", "1"]
    read, write = os.pipe() if kind == "pipe" else pty.openpty()
    own = (lambda: fcntl.ioctl(1, termios.TIOCSCTTY, 0)) if kind == "terminal" else None
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=write, stderr=errors, start_new_session=True,
                                   preexec_fn=own)
        os.close(write)
        shown = b""
        while b"pretrain" not in shown.partition(b"left")[2]:         # the first step is done
            shown += (part := os.read(read, 100))
            assert part, "it ended by itself"
        os.close(read)
        code = process.wait(timeout=60)
        errors.seek(0)
        said = errors.read()
    assert code == 130, said
    assert "Traceback" not in said and "Exception" not in said
    assert f"train.py --resume --out {out}" in said and "Stopped, and saved" in said
    saved = json.loads((out / "state.json").read_text())
    assert 0 < saved["step"] + 10 * saved["phase"] < 50 and not (out / "summary.json").exists()
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert [{**e, "heads": 0} for e in curve(out)] == [{**e, "heads": 0} for e in curve(finished)]


class Full(io.StringIO):
    """A file on a disk that is full once it has a line of figures."""

    def write(self, text):
        if " 6/6 " in self.getvalue():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(text)


def test_a_full_disk_under_the_output_stops_and_saves(tmp_path, text, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Full())
    run = ["--out", str(tmp_path / "run")]
    assert train.main([*run, "--data", text, *TINY]) == 130
    said = capsys.readouterr().err
    assert "its output cannot be written (No space left on device)" in said
    assert f"--resume --out {tmp_path / 'run'}" in said
    assert 0 < json.loads((tmp_path / "run/state.json").read_text())["phase"]


def test_nohup_is_heeded(finished):
    """A run whose parent ignores SIGHUP ignores it too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        options = train.parse(["--resume", "--out", str(finished)])
        with runs.open_run(*options) as run, heeded(run):
            os.kill(os.getpid(), signal.SIGHUP)
            run.stop_if_asked()
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Stopped):
                run.stop_if_asked()
    finally:
        signal.signal(signal.SIGHUP, before)


SAVING_STOPS = {"before the tensors": (dcp, "save", False),
                "behind the tensors": (dcp, "save", True),
                "before the old one goes": (shutil, "rmtree", False),
                "behind it": (shutil, "rmtree", True)}


@pytest.mark.parametrize("moment", SAVING_STOPS)
def test_a_kill_while_saving_leaves_a_whole_state(tmp_path, finished, text, moment):
    """The second state of a phase, so that there is an old one."""
    module, name, behind = SAVING_STOPS[moment]
    out, calls, real = tmp_path / "run", iter(range(100)), getattr(module, name)

    def cut(*args, **kwargs):
        last = next(calls) == (2 if name == "save" else 0)
        result = real(*args, **kwargs) if behind or not last else None
        return dies() if last else result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(module, name, cut)
        train.main(["--out", str(out), "--data", text, *TINY, "--save-every", "2"])
    assert train.main(["--out", str(out), "--resume", "--save-every", "4"]) == 0
    assert curve(out) == curve(finished) and not list(out.glob("state-*"))


def test_no_number_for_a_loss_stops_the_run_and_keeps_the_state(tmp_path, finished, text, capsys):
    assert interrupted(tmp_path / "first", text, break_model, at=0) == 2
    assert "before step 0 of pretrain" in capsys.readouterr().err
    out = tmp_path / "run"
    assert interrupted(out, text, break_model) == 2
    said = capsys.readouterr().err
    assert "the loss is nan" in said and "step 5 of pretrain, batch 5" in said
    assert "before step 4 of pretrain" in said
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert curve(out) == curve(finished)


def test_resume_may_lower_the_learning_rate_of_what_follows(tmp_path, text):
    out = tmp_path / "run"
    assert interrupted(out, text, break_model) == 2
    assert train.main(["--out", str(out), "--resume", "--lr", "1e-4"]) == 0
    assert json.loads((out / "run.json").read_text())["settings"]["lr"] == 1e-4
    assert {e["lr"] for e in curve(out) if e["phase"] == "retrofit"} == {5e-5, 1e-4}


@pytest.mark.parametrize("at,phase,flag", [(5, "pretrain", "--pretrain-lr"),
                                           (13, "retrofit", "--lr")])
def test_resume_may_lower_the_learning_rate_as_advised(tmp_path, text, capsys, at, phase, flag):
    """The flag that the message names is that of the phase at fault, saved before its step 4."""
    out, name = tmp_path / "run", flag[2:].replace("-", "_")
    assert interrupted(out, text, break_model, at=at) == 2
    assert f"--resume with a lower {flag} or --clip" in capsys.readouterr().err
    before = {e["step"]: e["lr"] for e in curve(out) if e["phase"] == phase}
    assert train.main(["--out", str(out), "--resume", flag, "1e-5"]) == 0
    assert json.loads((out / "run.json").read_text())["settings"][name] == 1e-5
    after = {e["step"]: e["lr"] for e in curve(out) if e["phase"] == phase}
    assert after.items() >= {step: lr for step, lr in before.items() if step < 4}.items()
    assert all(lr <= 1e-5 for step, lr in after.items() if step >= 4)


def test_resume_says_where_it_goes_on(tmp_path, finished, text, capsys):
    """The first words of it, so that nobody waits in doubt."""
    out = tmp_path / "run"
    with pytest.raises(PowerCut):
        interrupted(out, text, dies, at=13)          # pretrain 6, free 3, and 4 of retrofit
    capsys.readouterr()
    assert train.main(["--out", str(out), "--resume"]) == 0
    shown = capsys.readouterr().out
    assert f"{out} goes on in retrofit at step 5 of 5" in " ".join(shown.split())
    assert shown.index("goes on") < shown.index("loss")
    with pytest.raises(PowerCut):
        interrupted(tmp_path / "new", text, dies, at=1)           # before there was a state
    capsys.readouterr()
    assert train.main(["--out", str(tmp_path / "new"), "--resume"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path / 'new'} goes on in pretrain at step 1 of 6" in shown


@pytest.mark.parametrize("room", [2_000, 20_000])
def test_a_full_disk_while_saving_keeps_the_state(tmp_path, finished, text, capsys, room):
    """No file may grow beyond less than a state: the kernel refuses, as on a full disk, within a
    tensor or between two."""
    out, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = lambda model: resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        code = interrupted(out, text, fill, ["--save-every", "2"], at=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert code == 2 and f"{out} cannot be written (File too large); free some space" in said
    assert "Traceback" not in said
    assert json.loads((out / "state.json").read_text())["step"] == 2
    folders = [folder.name for folder in out.glob("state-*")]
    assert folders == ["state-0-2"]                  # what did not fit makes room
    assert train.main(["--out", str(out), "--resume", "--save-every", "4"]) == 0
    assert curve(out) == curve(finished)


@pytest.mark.parametrize("error,says", [
    (OSError(errno.ENOSPC, "x"), "No space left on device"),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
     "a file was cut short, as on a full disk"),
    (OSError("5 requested and 3 written"), "5 requested and 3 written"),
    (OSError(), "OSError"),
    (RuntimeError("Parent directory x does not exist."), "Parent directory x does not exist."),
])
def test_the_reason_that_nothing_can_be_written_is_said_in_words(error, says):
    """Alone, on another rank, and where it led to another error."""
    def led_to_another():
        try:
            raise error
        except type(error):
            raise RuntimeError("[enforce fail at inline_container.cc:672]") from None

    for raised in (error, CheckpointException("write", {0: (error, [])})):
        with pytest.raises(InputError) as told, state.writing("run"):
            raise raised
        assert f"run cannot be written ({says}); free" in str(told.value)
    if isinstance(error, OSError) and error.errno:
        with pytest.raises(InputError) as told, state.writing("run"):
            led_to_another()
        assert says in str(told.value)


def test_a_scheduler_stops_a_run_between_two_passes(tmp_path, text, capsys):
    """In bf16, where the noise of the rounding comes out the same too."""
    whole, out, calls, batch = tmp_path / "whole", tmp_path / "run", iter(range(100)), train.batch
    arguments = ["--data", text, *TINY, *SHORT, *LEAN]
    with single_threaded():
        assert train.main(["--out", str(whole), *arguments]) == 0

    def asked(*args):
        if next(calls) == 12:                     # the first half of the retrofit's step 1
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(*args)

    with pytest.MonkeyPatch.context() as patch, single_threaded():
        patch.setattr(train, "batch", asked)
        assert train.main(["--out", str(out), *arguments]) == 130
    assert f"--resume --out {out}" in capsys.readouterr().out
    saved = json.loads((out / "state.json").read_text())
    assert (saved["phase"], saved["step"]) == (2, 1)
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert curve(out) == curve(whole) and same_weights(out, whole)


def test_train_refuses_to_touch_another_run(finished, text, capsys):
    told = lambda *arguments: refusal(train.main, ["--out", str(finished), *arguments], capsys,
                                      finished)
    assert "already holds a run" in told("--data", text, *TINY)
    assert "--cr was 3" in told("--resume", "--cr", "2")
    assert "without a control" in told("--resume", "--solidify", "3")


def test_resume_refuses_other_text_and_damaged_state(tmp_path, text, capsys):
    out = tmp_path / "run"
    with pytest.raises(PowerCut):
        interrupted(out, text, dies)
    capsys.readouterr()
    told = lambda: refusal(train.main, ["--out", str(out), "--resume"], capsys, out)
    for tensors in out.glob("state-*/*.distcp"):
        tensors.write_bytes(tensors.read_bytes()[:50])
    assert "damaged" in told()
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "text": "another"}))
    assert "text" in told()
    (out / "run.json").write_text("{")
    assert "damaged" in told()


# ------------------------------------------------------------------------------- what a run records

def test_metrics_have_what_a_plot_needs(finished):
    entries = list(map(json.loads, (finished / "metrics.jsonl").read_text().splitlines()))
    assert all(e["tokens_per_second"] > 0 and e["peak_gb"] > 0.01 and e["mfu"] is None
               for e in entries)
    heads = [e for e in entries if "heads" in e]
    assert {e["phase"] for e in heads} == {"retrofit", "solidify"} and len(heads) >= 5
    for e in heads:
        assert 1 / np.mean(1 / np.array(e["heads"])) == pytest.approx(e["cr"], abs=0.01)
        assert np.shape(e["heads"]) == (1, 1)


# --------------------------------------------------------------------------------- what a run shows

def test_a_run_opens_with_what_it_is_about(finished_run, text):
    """Folder; model and its size; text; phases and steps: before the first line of figures."""
    opening = finished_run.printed[:finished_run.printed.index("\nphase  ")]
    words = " ".join(opening.split())
    size = sum(p.numel() for p in load(finished_run.out / "pretrained").parameters())
    for part in ("run finished", "1 layer,", "2 heads", f"{size:,} parameters",
                 Path(text).name, "pretrain 6", "free 3", "retrofit 5", "solidify 2 6",
                 "solidify 3 3", "control 11", "34 steps", "GB: weights"):
        assert part in words, part


def test_the_first_figures_come_after_the_first_step(finished_run):
    """Of each sitting, not after --log-every steps; and the last step of a phase has a line too."""
    shown = [line.split() for line in finished_run.printed.splitlines()]
    steps = [line[1] for line in shown if line and line[0] == "pretrain" and "/" in line[1]]
    assert steps == ["1/6", "3/6", "6/6"]


def test_no_line_is_wider_than_a_terminal(finished_run):
    *lines, command = finished_run.printed.splitlines()
    assert "generate.py --ckpt" in command          # whose paths may be of any length
    assert len(lines) > 20 and max(map(len, lines)) <= 80
    figures = [line for line in lines if "/" in line[:24] and "e-0" in line]
    assert len(figures) > 10 and max(map(len, figures)) <= 79
