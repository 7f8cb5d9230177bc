"""What both commands share: parser, messages, exit codes, and where a figure comes from."""

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import numpy as np
import torch

import dmc
import dmc_fast
from nanodmc.files import InputError, read_lines, reason
from nanodmc.launch import triton
from nanodmc.terminal import OutputLost, screens, to_show

OPS = {"fast": dmc_fast, "reference": dmc}
ROOT = Path(__file__).parent.parent          # the folder of the two commands


# ------------------------------------------------------------------------------------ the parser

class HelpFormatter(argparse.HelpFormatter):
    """Help as wide as the terminal, with short names for values.

    The value of a flag is N (a whole number), X (a number) or TEXT, unless the flag names another
    metavar. Of the description, paragraphs are filled; indented lines stay lines of their own.
    """

    def _fill_text(self, text, width, indent):
        paragraphs = re.split(r"\n{2,}", textwrap.dedent(text).strip())
        return "\n\n".join(self._filled(paragraph, width) for paragraph in paragraphs)

    def _filled(self, paragraph, width):
        if not re.search(r"^ ", paragraph, re.MULTILINE):
            return textwrap.fill(paragraph, width)
        lines = []
        for line in paragraph.splitlines():          # a second column, behind two blanks, stays one
            column = re.match(r" *(\S.*? {2,})?", line).end()
            hang = " " * (column if 8 < column < width - 16 else 8)
            lines.append(textwrap.fill(line, width, subsequent_indent=hang))
        return "\n".join(lines)

    def _get_default_metavar_for_optional(self, action):
        kind = getattr(action.type, "kind", action.type)
        return {int: "N", float: "X"}.get(kind, "TEXT")

    def _format_args(self, action, default_metavar):
        if action.nargs == argparse.ONE_OR_MORE:
            return f"{self._metavar_formatter(action, default_metavar)(1)[0]} ..."
        return super()._format_args(action, default_metavar)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are InputErrors."""

    def __init__(self, description):
        super().__init__(description=description, usage="%(prog)s [flags]", allow_abbrev=False,
                         formatter_class=HelpFormatter)

    def error(self, message):
        raise InputError(f"{message}; see --help.")

    def parse_given(self, argv):
        """The arguments as parse_args returns them, and the names of those that were given."""
        args = self.parse_args(argv)
        absent = object()
        blank = argparse.Namespace(**dict.fromkeys(vars(args), absent))
        given = vars(self.parse_args(argv, blank)).items()
        return args, {name for name, value in given if value is not absent}


def number(low, high=None, kind=float):
    """The type of a flag: a number of the kind given, from low to high.

    high None: the largest finite number, or of whole ones 2^62.
    """
    if high is None:
        high = 2 ** 62 if kind is int else sys.float_info.max

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range, {low} to {high}")
        return value
    parse.kind, parse.__name__ = kind, kind.__name__      # for the help and for argparse's errors
    return parse


# ---------------------------------------------------------------------------------- the terminal

def setup_terminal(name):
    """A terminal that cannot show a character shows ?; warnings read "NAME: warning: ..."."""
    if hasattr(sys.stdout, "reconfigure"):               # not where stdout is closed
        sys.stdout.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_: to_show(
        f"{name}: warning: {message}\n", sys.stderr)


def run_command(name, carry_out):
    """Run a command, carry_out(), and return its exit code. All of a command's main but its work.

    0: done. 2: InputError, or a path that the system refuses, told on stderr as "NAME: sentence".
    130: KeyboardInterrupt; what there is to say about it, carry_out has said. 141: stdout is a pipe
    that nobody reads any more, as by | head, and carry_out was left with OutputLost at its next
    print. Any other loss of stdout is told like an InputError. Other exceptions are faults of the
    program and pass.

    If carry_out catches OutputLost to save its work, what it prints then goes nowhere, and the exit
    code is that of the loss.
    """
    with screens() as (out, _):
        setup_terminal(name)
        code = outcome(name, carry_out)
        with suppress(OutputLost):
            out.flush()
        if code or not out.lost:
            return code
        if out.lost.unread:
            return 141
        print(f"{name}: {out.lost}", file=sys.stderr)
        return 2


def outcome(name, carry_out):
    """The exit code of carry_out(), as in run_command; 0 also where only its output was lost."""
    try:
        carry_out()
    except OutputLost:
        pass
    except InputError as error:
        return refused(name, error)
    except OSError as error:
        if error.filename is None:
            raise
        return refused(name, f"{error.filename} cannot be used ({reason(error)}); check the path "
                             "and its permissions.")
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:                            # after --help
        return end.code or 0
    return 0


def refused(name, why):
    """Tell why a command ends, on stderr, and return its exit code."""
    print(to_show(f"{name}: {why}", sys.stderr), file=sys.stderr)
    return 2


def wrapped(text):
    """A text to print, in lines of at most 80 columns, harmless on a terminal.

    It is cut at blanks only: paths and commands stay whole.
    """
    return textwrap.fill(to_show(text), 80, break_long_words=False, break_on_hyphens=False)


@contextmanager
def silence():
    """Nothing that is printed meanwhile is shown."""
    with (Path(os.devnull).open("w", errors="replace") as nowhere,
          redirect_stdout(nowhere), redirect_stderr(nowhere)):
        yield


# -------------------------------------------------------------------- commands that can be typed

def interpreter():
    """The running Python as it can be typed here: its short name, or a path."""
    path = Path(sys.executable)
    for name in ("python", path.name):
        found = shutil.which(name)
        # in the same folder: a virtual environment's link and its target are not the same Python
        if found and Path(found).absolute().parent == path.parent and path.samefile(found):
            return name
    shown = from_here(path)
    return shown if os.sep in shown else f"./{shown}"     # a bare name is looked for on PATH


def from_here(path):
    """A path as it can be typed here: relative where it lies below the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def typed(script, *arguments, ranks=1):
    """The command line that runs a script of this project from the current folder, shell-quoted.

    ranks above 1: on so many, by torchrun, which may not be on the PATH where its module is found.
    """
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    script = from_here((ROOT / script).absolute())
    return shlex.join([interpreter(), *launcher, script, *map(str, arguments)])


def installing(package):
    """The command line that installs a package for the running Python."""
    return shlex.join([interpreter(), "-m", "pip", "install", package])


# -------------------------------------------------------------------- where a figure comes from

def provenance():
    """What stands behind a figure: date, command, commit, device and versions.

    commit is None outside a clone, and without git.
    """
    commit = None
    if shutil.which("git"):
        git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"],
                             capture_output=True, text=True)
        commit = git.stdout.strip() or None
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        cpus = (line.split(":")[1].strip() for line in read_lines("/proc/cpuinfo")
                if line.startswith("model name"))
        device = f"{next(cpus, platform.processor())}, {torch.get_num_threads()} threads"
    module, ranks = sys.modules["__main__"].__spec__, os.environ.get("LOCAL_WORLD_SIZE", "1")
    launcher = ["python"] if ranks == "1" else ["torchrun", "--nproc_per_node", ranks]
    program = ["-m", module.name] if module else [Path(sys.argv[0]).name]
    return {"date": time.strftime("%Y-%m-%d"),
            "command": shlex.join([*launcher, *program, *sys.argv[1:]]),
            "commit": commit, "device": device,
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__, "triton": getattr(triton, "__version__", None)}}
