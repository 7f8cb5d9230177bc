"""Properties of nanodmc/cli.py: parser, messages, commands to type, and where a figure is from."""

import os
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import pytest

from conftest import HERE
from nanodmc import cli
from nanodmc.files import InputError
from nanodmc.settings import Settings, flag

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


# ------------------------------------------------------------------------------------- the terminal

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
    given = {"train.py": ["--data", "naïve🙂"], "generate.py": ["--ckpt", "naïve🙂"]}
    run = subprocess.run([sys.executable, HERE / script, *given[script]], cwd=tmp_path,
                         capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert run.returncode == 2 and b"Traceback" not in run.stderr
    assert run.stderr.startswith(f"{script}: ".encode())


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
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.typed("train.py") == f"{python} train.py"
    monkeypatch.chdir(tmp_path)
    assert cli.typed("train.py") == f"env/bin/python {HERE / 'train.py'}"
    assert cli.installing("matplotlib") == "env/bin/python -m pip install matplotlib"


# ------------------------------------------------------------------------ where a figure comes from

def test_provenance_names_what_stands_behind_a_figure(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/folder/train.py", "--out", "a run"])
    facts = cli.provenance()
    assert facts["command"] == "python train.py --out 'a run'"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", facts["date"]) and facts["device"]
    assert set(facts["versions"]) == {"python", "torch", "numpy", "triton"}


def test_provenance_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert cli.provenance()["commit"] is None
