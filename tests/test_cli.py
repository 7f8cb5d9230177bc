"""Properties of cli.py and terminal.py: parser, messages, commands to type, a figure's origin."""

import errno
import importlib.machinery
import io
import os
import re
import shlex
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import fields
from functools import lru_cache, partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import generate
import train
from conftest import HERE
from nanodmc import cli, terminal
from nanodmc.files import InputError
from nanodmc.settings import Settings, flag
from nanodmc.terminal import OutputLost

# --------------------------------------------------------------------------------------- the parser

@lru_cache
def help_of(script, columns=80):
    command = [sys.executable, HERE / script, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True,
                          env={**os.environ, "COLUMNS": str(columns)}).stdout


@pytest.mark.parametrize("script", ["train.py", "generate.py"])
def test_help_names_every_flag(script):
    shown = help_of(script)
    flags = ["--ckpt", "--show-merges"]
    if script == "train.py":
        flags = [flag(f.name) for f in fields(Settings)]
    assert all(re.search(rf"(?<![\w-]){name}(?![\w-])", shown) for name in flags)


@pytest.mark.parametrize("script", ["train.py", "generate.py"])
def test_help_fits_the_terminal_and_is_grouped(script):
    shown = help_of(script)
    assert max(map(len, shown.splitlines())) <= 80
    flags = shown.partition("options:")[2]
    assert len(re.findall(r"^[a-z][a-z ]*:$", flags, re.MULTILINE)) >= 4
    for name, metavar in re.findall(r"^  --([a-z0-9-]+) ([A-Z]\S*)", flags, re.MULTILINE):
        assert len(metavar) <= 5, name                           # as in FILE, not CHANNEL_LR_FACTOR
    assert max(map(len, help_of(script, columns=60).splitlines())) <= 60


def test_a_number_is_within_its_limits():
    whole, share = cli.number(1, kind=int), cli.number(0, 1)
    assert whole("3") == 3 and isinstance(whole("3"), int) and share("0.25") == 0.25
    for parse, text in ((whole, "0"), (whole, "1.5"), (whole, "many"), (share, "1.01"),
                        (share, "-0.1"), (share, "nan")):
        parser = cli.Parser("A test.")
        parser.add_argument("--n", type=parse)
        with pytest.raises(InputError, match="--n.*; see --help") as refused:
            parser.parse_args([f"--n={text}"])
        assert text in str(refused.value) and "\n" not in str(refused.value)


def test_flags_that_were_given_are_told_from_defaults():
    parser = cli.Parser("A test.")
    parser.add_argument("--number", type=cli.number(0), default=3.0)
    parser.add_argument("--some-words", nargs="+", default=["a"])
    parser.add_argument("--yes", action="store_true")
    args, names = parser.parse_given(["--number", "3", "--some-words", "a"])
    assert (args.number, args.some_words, args.yes) == (3.0, ["a"], False)
    assert names == {"number", "some_words"}


# ------------------------------------------------------------------------------------- the terminal

@pytest.mark.parametrize("flags", ["--ckpt {}", "--compare {}", "--ckpt {}/model"])
@pytest.mark.parametrize("path", ["loop", "x" * 300])
def test_a_path_that_the_system_refuses_is_told(path, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    assert generate.main(flags.format(path).split()) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("flag", ["--data", "--out", "--init"])
@pytest.mark.parametrize("path", ["loop", "nowhere", "x" * 300])
def test_training_tells_it_too(path, flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("nowhere").symlink_to("missing")
    assert train.main([flag, path]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_folder_that_may_not_be_entered_is_told(capsys):
    def refused():
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "theirs/model")
    assert cli.run_command("name", refused) == 2
    assert "name: theirs/model cannot be used (Permission denied)" in capsys.readouterr().err


def test_what_is_silenced_is_not_shown(capsys):
    with cli.silence():
        print("🙂")
        print("error", file=sys.stderr)
    print("shown")
    assert capsys.readouterr() == ("shown\n", "")


def test_a_warning_is_a_line_of_the_command(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)       # put back later
    cli.setup_terminal("train.py")
    line = warnings.formatwarning("something is odd", UserWarning, "file.py", 3)
    assert line == "train.py: warning: something is odd\n"


@pytest.mark.parametrize("script", ["train.py", "generate.py"])
def test_a_terminal_without_the_characters_shows_others(script, tmp_path):
    """In a terminal that knows ASCII only, what it cannot show becomes ?, and nothing fails."""
    flags = {"train.py": ["--data", "naïve🙂"], "generate.py": ["--ckpt", "naïve🙂"]}
    run = subprocess.run([sys.executable, HERE / script, *flags[script]], cwd=tmp_path,
                         capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert run.returncode == 2 and b"Traceback" not in run.stderr
    assert run.stderr.startswith(f"{script}: ".encode())


def told(text, times=1):
    for _ in range(times):
        print(text, flush=True)


def unwritable(kind):
    """A stream like those of a command, to a pipe that nobody reads, or to a full disk."""
    if kind == "full":
        return open("/dev/full", "w")  # noqa: SIM115, PTH123 - the test closes it
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


@pytest.mark.parametrize("kind, code, said", [
    ("pipe", 141, ""), ("full", 2, "x: its output cannot be written (No space left on device); "
                                   "give it another place.\n")])
@pytest.mark.parametrize("work, outcome", [
    (partial(told, "text"), None), (partial(told, "text", 3), None), (partial(print, "text"), None),
    (lambda: 1 / 0, ZeroDivisionError)])
def test_a_command_whose_output_is_lost(kind, code, said, work, outcome, capsys, monkeypatch):
    """It ends at the next print, or when what it printed is to be written in the end; a fault of
    the program is still one."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    stream = unwritable(kind)
    with redirect_stdout(stream):
        if outcome:
            with pytest.raises(outcome):
                cli.run_command("x", work)
        else:
            assert cli.run_command("x", work) == code and sys.stdout is stream
            assert capsys.readouterr().err == said
    with suppress(OSError):
        stream.close()


def test_a_command_can_save_when_its_output_is_lost(capsys, monkeypatch):
    """It catches OutputLost; what it prints from then on goes nowhere, and the exit code stays."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    saved, stream = [], unwritable("pipe")

    def carry_out():
        try:
            told("text")
        except OutputLost:
            told("saving")
            saved.append(True)

    with redirect_stdout(stream):
        assert cli.run_command("x", carry_out) == 141 and saved == [True]
    with suppress(OSError):
        stream.close()
    assert capsys.readouterr().err == ""


def test_errors_that_nobody_can_read_do_no_harm(monkeypatch):
    """Where stderr is lost or closed, work goes on, and the exit code says what there is to say."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def carry_out():
        print("progress", file=sys.stderr, flush=True)
        done.append(sys.stderr.isatty())
        raise InputError("this is wrong.")

    done, stream = [], unwritable("full")
    for stderr in (stream, None):
        monkeypatch.setattr(sys, "stderr", stderr)
        assert cli.run_command("x", carry_out) == 2
    assert done == [False, False]
    with suppress(OSError):
        stream.close()


def test_the_shell_sees_no_traceback():
    """With | head, a full disk and a closed stdout; Python has nothing to add as it ends."""
    ends = {"| true": 141, "> /dev/full": 2, ">&-": 2}
    runs = [subprocess.Popen(
        ["bash", "-c", f'"$0" "$1" --help {end}; exit ${{PIPESTATUS[0]}}', sys.executable,
         HERE / "generate.py"], stderr=subprocess.PIPE, text=True) for end in ends]
    for run, (end, code) in zip(runs, ends.items(), strict=True):
        said = run.communicate(timeout=120)[1]
        assert run.returncode == code, (end, said)
        assert said.count("\n") == (code == 2) and "Traceback" not in said
        assert code == 141 or said.startswith("generate.py: its output cannot be written (")


# ------------------------------------------------------------------------- what a terminal is shown

class Terminal(io.StringIO):
    def isatty(self):
        return True


@given(st.text(alphabet=st.characters(max_codepoint=0x2070)))
def test_harmless_text_has_no_commands(text):
    shown = terminal.harmless(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    assert terminal.harmless(shown) == shown
    if text.isascii() and text.isprintable():
        assert shown == text


def test_a_command_shows_only_its_own_sequences():
    """Whatever it prints to a terminal, and to stderr; a file gets what there is."""
    shade, text = terminal.COLOURS[0], "a\x1b[31mb\x1b]52;c;eA==\x07\tc\x9b2J\n"
    safe = "a\u241b[31mb\u241b]52;c;eA==\u2407\tc<U+009B>2J\n"
    for stream, shown in ((Terminal(), safe), (io.StringIO(), text)):
        with redirect_stdout(stream), redirect_stderr(stream), terminal.screens():
            print(text + shade + terminal.RESET, end="\r")
            print(text, end="", file=sys.stderr)
        assert stream.getvalue() == shown + shade + terminal.RESET + "\r" + shown


@pytest.mark.parametrize("variables, colours", [
    ({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)])
def test_colours_are_for_those_who_want_them(monkeypatch, variables, colours):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm", **variables}.items():
        monkeypatch.setenv(name, value)
    assert terminal.has_colours(Terminal()) == colours
    assert not terminal.has_colours(io.StringIO())


def test_messages_do_not_command_a_terminal(monkeypatch):
    """Those of errors and warnings, whose names of files may be anything."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    screen = Terminal()

    def carry_out():
        sys.stderr.write(warnings.formatwarning("a\033[A", UserWarning, "", 1))
        raise InputError("b\033[A\r is missing.")

    with redirect_stderr(screen):
        assert cli.run_command("x", carry_out) == 2
    assert screen.getvalue() == "x: warning: a\u241b[A\nx: b\u241b[A\u240d is missing.\n"


# --------------------------------------------------------------------------------- commands to type

def environments(folder):
    """Pythons in new environments, one of which has a blank in its name."""
    for name in ("env", "an env"):
        python = folder / name / "bin/python"
        python.parent.mkdir(parents=True)
        python.symlink_to(sys.executable)
        yield python


@pytest.mark.parametrize("on_path", [False, True])
def test_commands_in_messages_work_as_typed(tmp_path, monkeypatch, on_path):
    """Typed into a shell, they run this project's script, or pip, with the interpreter that runs
    now, wherever the user stands, and arguments arrive as they were."""
    arguments = ["--out", tmp_path / "a run's folder", "--prompt", 'x "$HOME" \\ *', "--seed", 3]
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow/python").write_text("#!/bin/sh\nexit 1\n")           # not ours
    (tmp_path / "shadow/python").chmod(0o755)
    probe = tmp_path / "probe.py"
    probe.write_text("import sys\nprint(sys.executable, *map(repr, sys.argv[1:]), sep='\\n')\n")
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    for python in environments(tmp_path):
        monkeypatch.setattr(sys, "executable", str(python))
        first = python.parent if on_path else tmp_path / "shadow"
        monkeypatch.setenv("PATH", f"{first}:{tmp_path / 'shadow'}:/usr/bin:/bin")
        for folder in (tmp_path, tmp_path.parent, python.parent):
            monkeypatch.chdir(folder)
            typed, installing = cli.typed("probe.py", *arguments), cli.installing("numpy")
            shown = subprocess.run(typed, shell=True, check=True, capture_output=True, text=True)
            interpreter, *received = shown.stdout.splitlines()
            assert Path(interpreter) == python
            assert received == [repr(str(x)) for x in arguments]
            words = shlex.split(installing)
            assert words[1:] == ["-m", "pip", "install", "numpy"]
            which = subprocess.run([*words[:1], "-c", "import sys; print(sys.executable)"],
                                   check=True, capture_output=True, text=True)
            assert Path(which.stdout.strip()) == python
            assert typed.startswith(installing.removesuffix("-m pip install numpy"))


def test_a_command_is_as_short_as_it_can_be(monkeypatch, tmp_path):
    python = next(environments(tmp_path))
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", str(python.parent))
    monkeypatch.chdir(HERE)
    assert cli.typed("train.py", "--resume") == "python train.py --resume"
    assert cli.typed("train.py", "--resume", ranks=2) == (
        "python -m torch.distributed.run --nproc_per_node 2 train.py --resume")
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.typed("train.py") == f"{python} train.py"
    monkeypatch.chdir(tmp_path)
    assert cli.typed("train.py") == f"env/bin/python {HERE / 'train.py'}"
    assert cli.installing("matplotlib") == "env/bin/python -m pip install matplotlib"


# ------------------------------------------------------------------------ where a figure comes from

@pytest.mark.parametrize("module, ranks, command", [
    (None, 1, "python train.py --out 'a run'"),
    (None, 2, "torchrun --nproc_per_node 2 train.py --out 'a run'"),
    ("nanodmc.tool", 1, "python -m nanodmc.tool --out 'a run'")])
def test_provenance_names_what_stands_behind_a_figure(module, ranks, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/folder/train.py", "--out", "a run"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))                       # torchrun's own
    spec = module and importlib.machinery.ModuleSpec(module, loader=None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    facts = cli.provenance()
    assert facts["command"] == command
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", facts["date"]) and facts["device"]
    assert set(facts["versions"]) == {"python", "torch", "numpy", "triton"}


def test_provenance_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert cli.provenance()["commit"] is None
