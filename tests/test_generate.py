"""Properties of the command generate.py."""

import contextlib
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings

import generate
from conftest import HERE, refusal
from nanodmc.config import SHAPES
from test_cli import Terminal
from test_dmc import both, model_of, seeds


def test_generate_command(finished, capsys):
    outputs = []
    for extra in ([], [], ["--seed", "1"], ["--cache", "full"]):
        arguments = ["--ckpt", str(finished), "--prompt", "3 tim", "--samples", "2",
                     "--temperature", "1.5", *extra]
        assert generate.main(arguments) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].startswith(str(finished / "cr3")) and outputs[0].count("CR per layer") == 2
    assert "never trained to attend without" in outputs[3] and "nothing merged" in outputs[3]
    plain = ["--ckpt", str(finished / "control"), "--prompt", "3", "--tokens", "2"]
    assert generate.main([*plain, "--cache", "full"]) == 0
    assert "plain model" in capsys.readouterr().out
    merges = ["--ckpt", str(finished / "cr2"), "--prompt", "3 times 4", "--show-merges", "0.0"]
    assert generate.main(merges) == 0
    shown = capsys.readouterr().out
    assert "layer 0, head 0: 9 tokens" in shown
    assert shown.splitlines()[-1].replace("|", "") == "3 times 4"


def test_both_ops_generate_the_same(finished, capsys):
    outputs = []
    for ops in ("fast", "reference"):
        assert generate.main(["--ckpt", str(finished), "--prompt", "3 times", "--ops", ops]) == 0
        outputs.append(capsys.readouterr().out)
    texts, reports = zip(*(shown.split("The slots in use take") for shown in outputs), strict=True)
    assert texts[0] == texts[1]
    numbers = [re.findall(r"[\d,]+\d", report) for report in reports]
    assert numbers[0][0] == numbers[1][0] and numbers[0][2] == numbers[1][1]
    assert "is not counted" in reports[1]                        # what dmc.py allocates


def test_a_prompt_from_a_file(finished, capsys, tmp_path):
    (tmp_path / "prompt").write_text("3 times\n")
    outputs = []
    for flags in (["--prompt", "3 times\n"], ["--prompt-file", str(tmp_path / "prompt")]):
        assert generate.main(["--ckpt", str(finished), *flags]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


@both
@given(seeds)
@settings(max_examples=2)
def test_the_report_counts_slots_and_fits_a_terminal(ops, seed):
    """Of 30 layers too: every line within 80 columns, and the CR of every layer in it."""
    model = model_of(seed, (4, 2), n_layer=30, ops=ops)
    cache = model.Cache(model.config, 3, dtype=torch.float64)
    model(torch.randint(0, 29, (3, 20)), cache)
    slots, tokens = cache.lengths.sum((1, 2)).tolist(), 20 * 3 * 2
    assert sum(slots) < 30 * tokens
    report = generate.cache_report(cache)
    assert max(map(len, report.splitlines())) <= 80
    assert f"20 tokens; {sum(slots):,} slots" in report and f"{30 * tokens:,}: CR " in report
    assert f"CR {30 * tokens / sum(slots):.2f}\n" in report
    found = re.findall(r"\b(\d+): (\d+\.\d\d)", report.partition("CR per layer")[2])
    assert found == [(str(i), f"{tokens / n:.2f}") for i, n in enumerate(slots)]
    used, full = (2 * 8 * 8 * n for n in (sum(slots), 30 * tokens))
    report = " ".join(report.split())
    if hasattr(cache, "bytes"):
        assert cache.bytes.used == used <= cache.bytes.allocated
        assert (f"take {used:,} bytes of the {cache.bytes.allocated:,} allocated, where a plain "
                f"cache takes {full:,}.") in report
    else:
        assert f"take {used:,} bytes, where a plain cache takes {full:,};" in report


def test_the_report_says_so_where_nothing_merged():
    model = model_of(0, (4, 2), dmc=False)
    cache = model.Cache(model.config, 1, dtype=torch.float64)
    model(torch.randint(0, 29, (1, 40)), cache)
    report = generate.cache_report(cache)
    slots = 2 * 2 * 40
    assert report.startswith(f"40 tokens; {slots} slots, nothing merged\n")
    assert f"take {slots * 2 * 8 * 8:,} bytes" in report


# ----------------------------------------------------------------------------------------- refusals

BAD_GENERATE = {
    "no such checkpoint": ["--ckpt", "missing"],
    "an empty folder": ["--ckpt", "."],
    "truncated": ["--ckpt", "truncated"],
    "no head": ["--show-merges", "9.9"],
    "no head number": ["--show-merges", "a"],
    "prompt too long": ["--prompt", "x" * 17],
    "too many tokens": ["--prompt", "x", "--tokens", "16"],
    "empty prompt": ["--prompt", ""],
    "negative temperature": ["--temperature", "-1"],
    "top-p above 1": ["--top-p", "2"],
    "no prompt file": ["--prompt-file", "missing"],
    "not a number": ["--tokens", "few"],
    "unknown cache": ["--cache", "tiny"],
    "prompts without out": ["--prompts", "short"],
    "no prompts": ["--prompts", "missing", "--out", "results"],
    "results to a folder": ["--prompts", "short", "--out", "truncated"],
    "results below a file": ["--prompts", "short", "--out", "short/results"],
    "results over the prompts": ["--prompts", "short", "--out", "short"],
    "results over something else": ["--prompts", "short", "--out", "binary"],
    "no profile": ["--prompts", "short", "--out", "results", "--profile", "short/profile"],
    "no GPU": ["--device", "cuda"],
    "two batches": ["--prompts", "short", "--out", "results", "--batch", "2", "3"],
    "a benchmark too short": ["--bench", "--tokens", "4"],
    "a benchmark too long": ["--bench", "--prompt-tokens", "9000"],
    "a benchmark to a folder": ["--bench", "--out", "truncated"],
    "a benchmark that does not fit": ["--bench", "--prompt-tokens", "8", "--tokens", "16",
                                      "--cache-gb", "1e-6"],
    "an unknown shape": ["--bench", "--model", "gpt5"],
    "a pool too small for one page": ["--prompts", "short", "--out", "results",
                                      "--cache-gb", "1e-9"],
}


@pytest.mark.parametrize("case", BAD_GENERATE)
def test_generate_refuses(case, messy_folder, capsys, finished):
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    flags = BAD_GENERATE[case]
    given_checkpoint = [] if "--ckpt" in flags else ["--ckpt", str(finished)]
    said = refusal(generate.main, [*given_checkpoint, *flags], capsys, messy_folder)
    assert said.startswith("generate.py: ")


@pytest.mark.parametrize("flags, said", [
    ("--prompt x --out f", "--out has no effect without --prompts or --bench or --compare"),
    ("--prompt x --batch 2", "--batch has no effect without --prompts"),
    ("--prompt x --prompt-file short", "--prompt and --prompt-file are two prompts"),
    ("--cr 2", "--cr has no effect without --bench"),
    ("--show-merges 0.0 --seed 1", "--seed has no effect with --show-merges"),
    ("--show-merges 0.0 --cache full", "--cache has no effect with --show-merges"),
    ("--prompts short --out results --prompt x", "--prompt has no effect with --prompts"),
    ("--prompts short --out results --prompt-file short", "--prompt-file has no effect with"),
    ("--prompts short --out results --ops reference", "--ops has no effect with --prompts"),
    ("--prompts short --out results --show-merges 0.0", "--show-merges has no effect with"),
    ("--bench --prompts short", "--prompts has no effect with --bench"),
    ("--bench --samples 1", "--samples has no effect with --bench"),
    ("--bench --prompt-file short", "--prompt-file has no effect with --bench;"),
    ("--bench --ckpt x --model toy", "--model has no effect with --bench --ckpt")])
def test_flags_without_effect_are_refused(flags, said, messy_folder, capsys):
    """Before anything is looked for, also where they repeat a default."""
    assert said in refusal(generate.main, flags.split(), capsys, messy_folder)


def test_every_flag_has_an_effect_in_some_mode():
    names = {name for takes in generate.TAKES.values() for name in takes.split()}
    known = {action.dest for action in generate.flags_of_all_modes()._actions}
    assert names | {"ckpt", "device", "help"} == known


@pytest.mark.parametrize("variable, value", [(None, None), ("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_is_not_commanded(finished, monkeypatch, variable, value):
    """What sets a clipboard, a title or a position is shown as visible characters, also by
    --show-merges, whose own colours are all that is left where colours are wanted."""
    hostile = "\x1b]52;a\a\r\x9b2J"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable:
        monkeypatch.setenv(variable, value)
    for flags in (["--tokens", "1", "--temperature", "0"], ["--show-merges", "0.0"]):
        screen = Terminal()
        with contextlib.redirect_stdout(screen):
            assert generate.main(["--ckpt", str(finished), "--prompt", hostile, *flags]) == 0
        shown = screen.getvalue()
        plain = re.sub(r"\033\[[0-9;]*m", "", shown)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", plain)
        assert ("\033[" in shown) == ("--show-merges" in flags and not variable)
        assert "\u241b]52;a\u2407\u240d<U+009B>2J" in plain.replace("|", "")


def test_an_interruption_of_the_imports_is_quiet(tmp_path):
    """Ctrl-C while torch is imported ends the command as a signal does, without a traceback."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\ntime.sleep(9)\n")
    run = subprocess.run([sys.executable, HERE / "generate.py"], capture_output=True, timeout=60,
                         env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert run.returncode == -signal.SIGINT and run.stderr == b""


@pytest.mark.parametrize("ranks, flags, words", [
    ("4", [], "4 ranks cannot share 2 key-value heads"),
    ("2", ["--show-merges", "0.0"], "--show-merges looks at all heads"),
    ("2", ["--ckpt", "uneven", "--random-weights"],
     "2 ranks cannot share 25 columns of the MLPs (ffn_dim)")])
def test_what_ranks_refuse(ranks, flags, words, tmp_path, plain, monkeypatch, tiny_shape, capsys):
    uneven = {**SHAPES["tiny"], "ffn_dim": 25}
    monkeypatch.setitem(SHAPES, "uneven", uneven)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setenv("RANK", "0")
    arguments = ["--ckpt", str(plain), "--device", "cpu", *flags]
    assert words in refusal(generate.main, arguments, capsys, tmp_path)


@pytest.mark.parametrize("mode", ["--show-merges 0.0", "--analyse out", "--compare RUN",
                                  "--tasks piqa"])
def test_what_looks_at_a_whole_model_runs_in_one_process(mode, finished, tmp_path, monkeypatch,
                                                         capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = [] if "RUN" in mode else ["--ckpt", str(finished)]
    arguments = [*model, *mode.replace("RUN", str(finished)).split(), "--device", "cpu"]
    said = refusal(generate.main, arguments, capsys, tmp_path)
    assert f"{mode.split()[0]} looks at all heads, and 2 ranks have a part each" in said
