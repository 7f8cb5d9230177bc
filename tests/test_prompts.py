"""Properties of nanodmc/prompts.py and results.py: a file of prompts, and one of results."""

import json
import shlex
import shutil
import subprocess
import sys
import time
import types

import pytest

import generate
from conftest import HERE, lines_of, refusal
from nanodmc import prompts as prompts_module
from nanodmc import results as results_module
from nanodmc.engine import Sequence
from nanodmc.requests import Result

PROMPTS = [
    {"prompt": "1 times"}, {"prompt": "2 ti", "id": "two", "temperature": 0, "tokens": 6},
    "{", "[]", '{"prompt": 3}', {"prompt": ""}, {"prompt": "x" * 17}, {"prompt": "3", "seed": -1},
    "", {"prompt": "4", "tokens": 1.5}, b"\xff\xfe{", {"prompt": "5", "id": [1]},
    {"prompt": "6", "top_p": "0.5"},
    {"prompt": "7 is", "seed": 3, "top_k": 2, "top_p": 0.5, "tokens": None, "id": 1},
    {"prompt": "8", "tokens": 12.0, "id": None}]
BAD_LINES = {3: "no JSON", 4: "an object", 5: "an object", 6: "empty", 7: "17 tokens", 8: "seed",
             10: "tokens", 11: "no JSON", 12: "an id", 13: "top_p"}


def as_bytes(line):
    if isinstance(line, bytes):
        return line
    return (line if isinstance(line, str) else json.dumps(line)).encode()


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n".join(map(as_bytes, PROMPTS)))
    return path


def prompts_command(finished, prompts, out, *more):
    return ["--ckpt", str(finished), "--prompts", str(prompts), "--out", str(out), "--batch", "3",
            "--cache-gb", "1e-4", *more]


def test_a_file_of_prompts(finished, prompts, tmp_path, capsys):
    out, profile = tmp_path / "out.jsonl", tmp_path / "profile"
    command = prompts_command(finished, prompts, out, "--temperature", "1.5",
                              "--profile", str(profile))
    assert generate.main(command) == 2                           # because of the faulty lines
    captured = capsys.readouterr()
    results = {line["line"]: line for line in lines_of(out)}
    assert list(results) == [n for n, x in enumerate(PROMPTS, 1) if x]
    assert {n for n, line in results.items() if "error" in line} == set(BAD_LINES)
    for n, words in BAD_LINES.items():
        assert words in results[n]["error"]
        assert f"prompts.jsonl, line {n}: {results[n]['error']}" in captured.err
    assert "10 of the prompts could not be continued" in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err
    assert "14 requests" in captured.out and "self" in profile.read_text().lower()
    assert results[2]["id"] == "two" and results[2]["tokens"] == 6 and results[14]["id"] == 1
    for n in set(results) - set(BAD_LINES):                      # as with one prompt alone
        given = PROMPTS[n - 1]
        flags = [x for name, value in {**given, **results[n]["settings"]}.items()
                 if name in prompts_module.LIMITS and value is not None
                 for x in (f"--{name.replace('_', '-')}", str(value))]
        assert generate.main(["--ckpt", str(finished), "--temperature", "1.5",
                              "--prompt", given["prompt"], *flags]) == 0
        shown = capsys.readouterr().out.split("\n\n", 1)[1]
        assert shown.startswith(given["prompt"] + results[n]["text"] + "\n\n")
        assert f"CR {results[n]['cr']:.2f}\n" in shown or results[n]["cr"] == 1
    before = out.read_bytes()
    assert generate.main(command) == 2                           # what is in error is tried again
    assert lines_of(out) == list(results.values()) and "10 requests" in capsys.readouterr().out
    assert out.read_bytes().startswith(b"".join(
        line for line in before.splitlines(True) if b'"error"' not in line))
    before = out.read_bytes()
    prompts.write_bytes(prompts.read_bytes().replace(b"2 ti", b"2 tu"))
    assert "of other prompts, as of line 2" in refusal(generate.main, command, capsys, tmp_path)
    assert out.read_bytes() == before


def test_a_killed_run_of_prompts_goes_on(finished, tmp_path):
    """SIGKILL at any moment, also in the middle of a line: in the end there is every result once,
    the same as without a kill."""
    prompts = tmp_path / "prompts.jsonl"
    outs = [tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"]
    prompts.write_text("".join(
        json.dumps({"prompt": f"{i} times", "seed": i, "tokens": 1 + i % 7}) + "\n"
        for i in range(90)))
    whole, killed = (prompts_command(finished, prompts, out) for out in outs)
    assert generate.main(whole) == 0
    run = subprocess.Popen([sys.executable, HERE / "generate.py", *killed],
                           stdout=subprocess.DEVNULL)
    while run.poll() is None and not (
            outs[1].exists() and outs[1].read_bytes().count(b"\n") >= 20):
        time.sleep(0.001)
    run.kill()
    run.wait()
    done = lines_of(outs[1])
    assert 20 <= len(done) < 90
    with outs[1].open("ab") as f:
        f.write(outs[0].read_bytes()[:30])                       # half a line
    assert generate.main(killed) == 0
    assert lines_of(outs[1]) == lines_of(outs[0]) and len(lines_of(outs[0])) == 90


def test_equal_prompts_get_texts_of_their_own(finished, tmp_path, capsys):
    """Each line and each sample has a seed of its own, which its result names; the texts are the
    same in every batch, and those of --prompt with that seed."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "3"}\n' * 3 + '{"prompt": "3", "seed": 5}\n')
    found = []
    for batch, samples in (("1", "3"), ("4", "1"), ("5", "3")):
        out = tmp_path / f"{batch}.jsonl"
        command = prompts_command(finished, prompts, out, "--temperature", "2", "--tokens", "12",
                                  "--top-p", "1", "--batch", batch, "--samples", samples)
        assert generate.main(command) == 0
        found.append({(x["line"], x["sample"]): x for x in lines_of(out)})
    assert found[0] == found[2] and found[1].items() < found[0].items()
    assert len(found[0]) == 12 and len(found[1]) == 4
    assert len({x["text"] for x in found[0].values()}) == 12
    assert len({x["settings"]["seed"] for x in found[0].values()}) == 12
    assert found[0][4, 0]["settings"]["seed"] == 5
    capsys.readouterr()
    assert generate.main([*prompts_command(finished, prompts, tmp_path / "4.jsonl"),
                          "--temperature", "2", "--tokens", "12", "--top-p", "1", "--batch", "4",
                          "--samples", "3"]) == 0                # more samples of the same
    assert "8 requests" in capsys.readouterr().out
    assert {(x["line"], x["sample"]): x for x in lines_of(tmp_path / "4.jsonl")} == found[0]


def test_results_of_anything_else_are_refused(finished, tmp_path, capsys):
    """Whatever decides a text is compared before anything is run, and named."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "3"}\n{"prompt": "4", "seed": 1, "tokens": 2}\n')
    command = prompts_command(finished / "cr2", prompts, out, "--tokens", "3")
    assert generate.main(command) == 0
    for change, words in (
            (["--ckpt", str(finished / "cr3")], "of another model, as of line 1"),
            (["--cache", "full"], 'another cache ("dmc", now "full"), as of line 1'),
            (["--temperature", "1"], "another temperature (0.7, now 1.0), as of line 1"),
            (["--top-k", "1"], "another top_k (0, now 1)"),
            (["--top-p", "0.5"], "another top_p (0.95, now 0.5)"),
            (["--tokens", "4"], "another tokens (3, now 4)"),
            (["--seed", "4"], "another seed, as of line 1")):
        assert words in refusal(generate.main, [*command, *change], capsys, tmp_path)
    prompts.write_text('{"prompt": "3"}\n')
    assert "other prompts, as of line 2" in refusal(generate.main, command, capsys, tmp_path)
    lines = [json.dumps({**line, "settings": None, "check": None}) for line in lines_of(out)]
    out.write_text("".join(line + "\n" for line in lines[:1]))
    assert "does not say how" in refusal(generate.main, command, capsys, tmp_path)


def test_a_model_is_known_by_its_content(finished, tmp_path, monkeypatch):
    marks = {results_module.model_mark(finished / name) for name in ("cr2", "cr3", "control")}
    copy = shutil.copytree(finished / "cr2", tmp_path / "copy")
    assert len(marks) == 3 and results_module.model_mark(copy) in marks
    assert results_module.model_mark("tiny, random weights") not in marks
    monkeypatch.setattr(results_module, "WHOLE", 9)              # large files are read in parts
    weights = copy / "model.safetensors"
    before = results_module.model_mark(copy)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")        # beyond the first 4 KB
    assert weights.stat().st_size < 4096 or results_module.model_mark(copy) == before
    weights.write_bytes(weights.read_bytes()[:3000] + b"x" + weights.read_bytes()[3001:])
    assert results_module.model_mark(copy) != before


def test_what_failed_is_tried_again(finished, tmp_path, capsys):
    """Once its cause is gone, an error becomes a result, in the place of the error."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "3"}\n{"prompt": "4 times 5 is"}\n'
                       '{"prompt": "5", "tokens": 0}\n')
    command = prompts_command(finished, prompts, out, "--tokens", "2")
    assert generate.main([*command, "--cache", "full", "--tokens", "30"]) == 2
    assert sum("error" in line for line in lines_of(out)) == 3
    capsys.readouterr()
    assert generate.main(command) == 2                           # one line is still at fault
    assert ["error" in line for line in lines_of(out)] == [False, False, True]
    assert "1 of the prompts" in capsys.readouterr().err
    prompts.write_text(prompts.read_text().replace(": 0", ": 1"))
    assert generate.main(command) == 0 and len(lines_of(out)) == 3
    assert "1 requests" in capsys.readouterr().out
    before = out.read_bytes()
    assert generate.main(command) == 0 and out.read_bytes() == before


# ------------------------------------------------------------------------- what is seen meanwhile

def steady_run(requests, rows, count):
    """Yields (seconds, Progress) of an engine that does a step a second, `rows` texts at once."""
    now = [0.0]
    engine = types.SimpleNamespace(running={}, waiting=[], pending=[], known={}, all_heads=1,
                                   cache=types.SimpleNamespace(free=[0] * 9))
    progress = prompts_module.Progress(engine, requests, 0, clock=lambda: now[0])
    for _ in range(requests // rows):
        engine.running = {row: Sequence(None, count) for row in range(rows)}
        for _ in range(count):
            now[0] += 1
            for seq in engine.running.values():
                seq.ids.append(0)
            if len(seq.ids) == count:
                finished, engine.running = engine.running, {}
                for seq in finished.values():
                    progress.add(Result(None, seq.ids))
            yield now[0], progress


def test_progress_counts_tokens_and_what_is_left_does_not_climb():
    """From the first second on: eight texts are under way, and none has finished."""
    before = float("inf")
    for seconds, progress in steady_run(requests=40, rows=8, count=100):
        rate, left = progress.rates()
        assert rate == pytest.approx(8) and left == pytest.approx(500 - seconds, abs=1e-6)
        assert left < before
        before = left
    assert before == pytest.approx(0, abs=1e-6) and len(progress.past) <= 61
    progress.clock = lambda: 1000.0                              # nothing happens any more
    progress.rates()
    progress.clock = lambda: 1070.0
    assert progress.rates() == (0, None)


def test_the_line_of_progress(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    run = steady_run(40, 8, 100)
    _, (_, progress) = next(run), next(run)
    assert str(progress) == "0/40 requests  8 tokens/s  0% of pages  8:18 left"


def test_an_interruption_says_how_to_go_on(finished, tmp_path, monkeypatch, capsys):
    """The command that it prints is the one that was typed, and finishes the work."""
    prompts, out = tmp_path / "the prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "3"}\n' * 9)
    command = prompts_command(finished, prompts, out, "--tokens", "3", "--batch", "1")
    write, left = prompts_module.write_line, iter(range(4))

    def interrupted(file, line):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(file, line)
    monkeypatch.setattr(prompts_module, "write_line", interrupted)
    assert generate.main(command) == 130
    captured = capsys.readouterr()
    said = captured.out.split("Stopped. ")[1]
    assert said.startswith(f"4 of 9 results are in {out}. To go on:\n    ")
    assert "Traceback" not in captured.err
    typed = shlex.split(said.split("To go on:")[1])
    assert typed[-len(command):] == command
    monkeypatch.undo()
    assert generate.main(typed[-len(command):]) == 0 and len(lines_of(out)) == 9
