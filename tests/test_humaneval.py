"""Properties of nanodmc/humaneval.py: what generated code may do, and when it has passed."""

import json
import time

import pytest

from conftest import oracle
from nanodmc import benchmarks, humaneval

PROBLEM = {"task_id": "HumanEval/0", "prompt": "def double(x):\n", "entry_point": "double",
           "canonical_solution": "    return 2 * x\n",
           "test": "def check(f):\n    assert f(2) == 4\n    assert f('a') == 'aa'\n"}


@pytest.mark.parametrize("program, passed", [
    ("import math, re, random, typing, hashlib, collections\nassert math.gcd(4, 6) == 2", True),
    ("print('x' * 10 ** 6)", True), ("assert 1 == 2", False), ("raise SystemExit(0)", False),
    ("import os; os._exit(0)", False), ("def f(): f()\nf()", False), ("def", False),
    ("x = '\ud800'; 1 / 0", False)])
def test_a_program_passes_if_it_comes_to_its_end(program, passed):
    assert humaneval.passes(program) is passed


def test_a_program_has_limited_memory():
    program = "x = bytearray({})"
    assert humaneval.passes(program.format(10 ** 7), memory=2 ** 28)
    assert not humaneval.passes(program.format(2 ** 28), memory=2 ** 28)


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_a_program_has_limited_time(program):
    began = time.monotonic()
    assert not humaneval.passes(program, seconds=1)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("program", [
    "import socket; socket.socket()", "import os; os.system('true')",
    "import subprocess; subprocess.run(['true'])", "import os; os.remove({path!r})",
    "open({path!r}, 'w')", "import os; os.open({path!r}, os.O_RDWR)", "import os; os.fork()",
    "import os; os.rename({path!r}, 'x')", "import shutil; shutil.rmtree({folder!r})"])
def test_a_program_is_refused_what_is_not_its_business(program, tmp_path):
    """And code that catches the refusal has still done nothing."""
    path = tmp_path / "file"
    path.write_text("kept")
    program = program.format(path=str(path), folder=str(tmp_path))
    assert not humaneval.passes(program)
    assert humaneval.passes(f"try:\n    {program}\nexcept PermissionError:\n    pass")
    assert path.read_text() == "kept" and list(tmp_path.iterdir()) == [path]


def test_the_kernel_lets_nothing_into_files(tmp_path, monkeypatch):
    """Also without the hook: a file may be opened, and stays empty."""
    path = tmp_path / "file"
    monkeypatch.setattr(humaneval, "BEFORE", humaneval.BEFORE.replace("sys.addaudithook", "id"))
    program = f"with open({str(path)!r}, 'w') as f:\n    f.write('text')"
    assert not humaneval.passes(program)
    assert path.read_text() == "" and humaneval.passes(f"open({str(path)!r}, 'w').close()")


def test_there_is_no_network_where_a_namespace_is_permitted():
    """Not only the interpreter says so: there is no device but an idle loopback."""
    if not humaneval.isolation():
        pytest.skip("unshare is not permitted here")
    program = "lines = open('/proc/net/dev').readlines()[2:]\nassert {}\n"
    names = "{line.split(':')[0].strip() for line in lines}"
    assert humaneval.passes(program.format(f"{names} <= {{'lo', 'tunl0', 'sit0', 'ip6tnl0'}}"))


def test_the_limits_say_what_holds(monkeypatch):
    monkeypatch.setattr(humaneval, "isolation", lambda: [])
    assert "unshare is not permitted" in humaneval.limits()
    assert humaneval.judge(PROBLEM, [PROBLEM["canonical_solution"]]) == {"pass@1": 1.0}
    assert not humaneval.passes("import socket; socket.socket()")
    monkeypatch.setattr(humaneval, "isolation", lambda: ["unshare"])
    assert "a namespace of its own" in humaneval.limits()


def test_problems_are_judged_by_their_own_tests_with_the_papers_sampling(tmp_path):
    """Through lm_eval, from a local file: one right answer, one wrong."""
    oracle("lm_eval")
    from lm_eval.api.model import LM
    asked, problems = [], [PROBLEM, {**PROBLEM, "canonical_solution": "    return 4\n"}]

    class Canonical(LM):
        loglikelihood = loglikelihood_rolling = None

        def generate_until(self, requests):
            asked.extend(request.args for request in requests)
            return [request.doc["canonical_solution"] for request in requests]

    lines = "".join(json.dumps(problem) + "\n" for problem in problems)
    (tmp_path / "HumanEval.jsonl").write_text(lines)
    tasks = benchmarks.load_tasks("humaneval", tmp_path)
    results = benchmarks.evaluate(Canonical(), tasks)
    row = benchmarks.row_of("humaneval", results, {})
    assert row == {"task": "humaneval", "metric": "pass@1", "value": 0.5, "items": 2, "shots": 0,
                   "stderr": pytest.approx(0.5), "cr": None}
    for context, settings in asked:
        assert context == PROBLEM["prompt"]
        assert settings["do_sample"] is True
        assert (settings["temperature"], settings["top_p"]) == (0.1, 0.95)
        assert settings["until"] == ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
