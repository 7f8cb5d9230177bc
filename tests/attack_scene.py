"""What the attack attacks: runs and results that nobody disturbed, and commands that make them."""

import json
import os
import signal
import sys
import time
import types

import generate
import train
from attack_tools import Command, Failed, damaged, files_of
from conftest import TINY, before_step, lines_of

OPERATIONS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
TEXTS = ["text", "tokens", "finish", "error"]


def killed_before(step):
    """For Command: SIGKILL before this step of training, counted over all phases."""
    held = []

    def before():
        held.append(before_step(step, lambda model: os.kill(os.getpid(), signal.SIGKILL)))
        held[0].__enter__()
    return before


def killed_at(number, count=None):
    """For Command: SIGKILL before that operation on files: opening to write, or another name.

    count: a file that tells how many there were so far.
    """
    def before():
        numbers = iter(range(10 ** 9))

        def hook(event, arguments):
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not (writes or event in OPERATIONS):
                return
            now = next(numbers)
            if now == number:
                os.kill(os.getpid(), signal.SIGKILL)
            if count is not None:
                os.pwrite(count, f"{now:09}".encode(), 0)
        sys.addaudithook(hook)
    return before


def words(n):
    return "\n".join(f"{i} times {i + 1} is {i * (i + 1)}, as everyone knows." for i in range(n))


def whole_run(scene, name, *arguments, cache=None, before=lambda: None):
    """A run that nobody disturbs: its folder, its command line, and how long it takes."""
    out, began = scene.folder / name, time.monotonic()
    arguments = ["--data", scene.text, *TINY, *arguments]
    Command(train.main, [*arguments, "--out", out], scene.folder, cache or scene.cache, before
            ).check(0)
    return types.SimpleNamespace(out=out, arguments=arguments, seconds=time.monotonic() - began)


def new_scene(folder):
    """A text, its tokens, a run that nobody disturbed, and two that were killed."""
    scene = types.SimpleNamespace(folder=folder)
    scene.text, scene.cache = scene.folder / "text.txt", scene.folder / "cache"
    scene.text.write_text(words(300))
    scene.whole = whole_run(scene, "whole")
    scene.half = []                     # in the middle of a phase, and at the beginning of one
    for step in (13, 15):
        scene.half.append(scene.folder / f"half-{step}")
        command = trained(scene, scene.whole, scene.half[-1], before=killed_before(step)).wait()
        assert command.signal == signal.SIGKILL
    scene.prompts = scene.folder / "prompts.jsonl"
    scene.prompts.write_text("".join(json.dumps(
        {"prompt": f"{i} times", "tokens": 1 + i % 7, "seed": i}) + "\n" for i in range(60)))
    scene.results = scene.folder / "results.jsonl"
    began = time.monotonic()
    answer(scene, scene.prompts, scene.results).check(0)
    scene.answering = time.monotonic() - began
    return scene


def trained(scene, run, out, cache=None, before=lambda: None):
    """A run that is begun in this folder, or continued where there is one."""
    arguments = ["--resume"] if (out / "run.json").exists() else run.arguments
    return Command(train.main, [*arguments, "--out", out], scene.folder, cache or scene.cache,
                   before)


def answer(scene, prompts, out, *more, model=None, before=lambda: None):
    """Prompts that are answered, or the rest of them."""
    arguments = ["--ckpt", model or scene.whole.out, "--prompts", prompts, "--out", out,
                 "--batch", "3", "--cache-gb", "1e-4", *more]
    return Command(generate.main, arguments, scene.folder, scene.cache, before)


def check_answers(found, expected):
    """Raise Failed unless every line of `expected` has the same answer, once."""
    lines = [lines_of(path) for path in (found, expected)]
    texts = [[[line.get(x) for x in ("line", "sample", *TEXTS)] for line in part] for part in lines]
    if texts[0] != texts[1]:
        raise Failed(f"{found} has {len(texts[0])} lines of {len(texts[1])}, and of these "
                     f"{sum(x in texts[0] for x in texts[1])} as expected")


def killed(command, seconds):
    """Kill a command after so long, if it did not end, refuse or kill itself before.

    Raises Failed where it ended badly, or a process outlives it.
    """
    if command.ended_within(seconds) and command.signal != signal.SIGKILL:
        command.check(0, 2)
    command.kill()
    if not command.alone():
        raise Failed("a process outlives the one that was killed")


def bears(command, path, kind, rng, check):
    """Damage a file, then carry a command out: it refuses, or `check(names)` finds all as it was.

    Once it refused, the file is put back as it was, and the command must carry on.
    """
    before, after = path.read_bytes(), damaged(path, kind, rng)
    is_damaged = lambda: path.exists() and path.read_bytes() == after
    if command().check(0, 2) == 2:
        if is_damaged():
            path.write_bytes(before)
        elif not path.exists():
            raise Failed(f"{path} is gone, after {kind}")
        command().check(0)
    check([path] if is_damaged() else [])


def each(folder, flips, others):
    """(name, kind of damage) for the files in a folder: so many flips, and of each other kind.

    A file in a folder within it, other than a saved state, has one of each.
    """
    for name, data in files_of(folder).items():
        few = "/" in name and not name.startswith(("state-", "dmc/"))
        counts = (1, 1, 1) if few else (flips, others, others)
        for kind, n in zip(("flipped", "truncated", "zeroed"), counts, strict=True):
            yield from [(name, kind)] * (n if data else 0)
