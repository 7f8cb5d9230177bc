"""Properties of nanodmc/prompts.py: a file of prompts, answered into a file of results."""

import json
import subprocess
import sys
import time

import pytest

import generate
from conftest import HERE, lines_of, refusal

PROMPTS = [
    {"prompt": "1 times"}, {"prompt": "2 ti", "id": "two", "temperature": 0, "tokens": 6},
    "{", "[]", '{"prompt": 3}', {"prompt": ""}, {"prompt": "x" * 17}, {"prompt": "3", "seed": -1},
    "", {"prompt": "4", "tokens": 1.5}, b"\xff\xfe{", {"prompt": "5", "id": [1]},
    {"prompt": "6", "top_p": "0.5"},
    {"prompt": "7 is", "seed": 3, "top_k": 2, "top_p": 0.5, "tokens": None, "id": 1},
    {"prompt": "8", "tokens": 12}]
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
    assert sorted(results) == [n for n, x in enumerate(PROMPTS, 1) if x]
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
        flags = [x for name in ("temperature", "seed", "top_k", "top_p", "tokens")
                 if given.get(name) is not None
                 for x in (f"--{name.replace('_', '-')}", str(given[name]))]
        assert generate.main(["--ckpt", str(finished), "--temperature", "1.5",
                              "--prompt", given["prompt"], *flags]) == 0
        shown = capsys.readouterr().out.split("\n\n", 1)[1]
        assert shown.startswith(given["prompt"] + results[n]["text"] + "\n\n")
        assert f"CR {results[n]['cr']:.2f}\n" in shown or results[n]["cr"] == 1
    before = out.read_bytes()
    assert generate.main(command) == 0 and out.read_bytes() == before
    assert "0 requests" in capsys.readouterr().out
    prompts.write_bytes(prompts.read_bytes().replace(b"2 ti", b"2 tu"))
    assert "other prompts than" in refusal(generate.main, command, capsys, tmp_path)
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
