"""The attack: kills, pairs, damage and hostile input by the hundred, each attempt by a seed.

    python -m pytest tests -m attack
    DMC_RESULTS=results/attack.json python -m pytest tests -m attack

DMC_SEED is another seed than 0; DMC_ATTEMPTS=3,17 makes these attempts only. Any outcome is allowed
in which nothing is lost and nothing silently wrong: that of an undisturbed run, or exit code 2 with
a sentence, after which the same command with the damage undone has that of an undisturbed run.
"""

import json
import os
import resource
import shutil
import time
from pathlib import Path

import pytest

import attack_counts
import attack_tools as tools
import train
from attack_lines import hostile_line, pickle_that_runs, save_poisoned
from attack_scene import (
    TEXTS,
    answer,
    bears,
    check_answers,
    each,
    killed,
    killed_at,
    new_scene,
    trained,
    whole_run,
    words,
)
from attack_tools import Command, Failed, check_same, files_of
from conftest import TINY, lines_of

WIDE = ["--dim", "128", "--ffn-dim", "256", "--save-every", "1"]      # saving takes longer


@pytest.fixture(scope="session")
def scene(tmp_path_factory):
    return new_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture
def attack(measured, tmp_path):
    """attack(name, judge, attempts): counts, and asserts that no attempt fails."""
    def run(name, judge, attempts):
        attempts = tools.chosen(attempts)
        found = tools.failures(judge, attempts, tmp_path)
        counts = measured.setdefault("attacks", {})
        measured["seed"] = tools.SEED
        counts[name] = {"tried": len(attempts), "failed": len(found)}
        told = "\n".join(f"attempt {i}, {text}" for i, text in sorted(found.items()))
        if found:
            pytest.fail(f"{len(found)} of {len(attempts)}, seed {tools.SEED}:\n{told}", False)
    return run


# ------------------------------------------------------------------------------- kills, full disks

@pytest.mark.attack
def test_kills_in_training(scene, attack):
    def judge(rng, folder, _):
        out = folder / "run"
        for _ in range(rng.randint(1, 4)):
            killed(trained(scene, scene.whole, out), rng.uniform(0, scene.whole.seconds))
        trained(scene, scene.whole, out).check(0)
        check_same(out, scene.whole.out)
    attack("training killed at random moments", judge, range(40))


@pytest.mark.attack
def test_kills_at_operations_on_files(scene, attack):
    """Every third opening, renaming and removing in a run, the first tokenizing included."""
    with (scene.folder / "count").open("wb+") as count:
        whole_run(scene, "counted", cache=scene.folder / "counted cache",
                  before=killed_at(None, count.fileno()))
        total = int(os.pread(count.fileno(), 9, 0))

    def judge(rng, folder, number):
        out, cache = folder / "run", folder / "cache"
        killed(trained(scene, scene.whole, out, cache, before=killed_at(number)), tools.PATIENCE)
        trained(scene, scene.whole, out, cache).check(0)
        check_same(out, scene.whole.out)
        check_same(cache, scene.cache)
    attack("training killed before an operation on files", judge, range(0, total + 1, 3))


@pytest.mark.attack
def test_kills_in_saving(scene, attack):
    """A moment after something unfinished appears in the folder of a run that saves every step."""
    wide = whole_run(scene, "wide", *WIDE)

    def judge(rng, folder, _):
        out, left = folder / "run", rng.randrange(60)
        command, seen = trained(scene, wide, out), set()
        while left and not command.ended():
            new = {name for _, folders, _ in os.walk(out) for name in folders
                   if name.endswith(".partial") or name.startswith("state-")} - seen
            seen |= new
            left = max(0, left - len(new))
        killed(command, rng.uniform(0, 0.01))
        trained(scene, wide, out).check(0)
        check_same(out, wide.out)
    attack("training killed while it saves", judge, range(30))


@pytest.mark.attack
def test_kills_in_generation(scene, attack):
    def judge(rng, folder, _):
        out = folder / "out.jsonl"
        for _ in range(rng.randint(1, 4)):
            killed(answer(scene, scene.prompts, out), rng.uniform(0, scene.answering))
        answer(scene, scene.prompts, out).check(0)
        check_answers(out, scene.results)
        if [path.name for path in folder.iterdir()] != ["out.jsonl"]:
            raise Failed(f"left behind: {list(folder.iterdir())}")
    attack("prompts killed at random moments", judge, range(60))


@pytest.mark.attack
@pytest.mark.parametrize("workers", [False, True])
def test_kills_in_tokenizing(scene, attack, workers):
    """Also where several processes do it: all must end."""
    text, name = scene.folder / f"long-{workers}.txt", f"tokenizing-{workers}"
    text.write_text(words(450_000 if workers else 90_000))
    arguments = [*TINY, "--data", text]
    cache = scene.folder / f"{name} cache"
    run = whole_run(scene, name, *arguments, cache=cache)

    def judge(rng, folder, _):
        out, ours = folder / "run", folder / "cache"
        killed(trained(scene, run, out, ours), rng.uniform(0, run.seconds))
        trained(scene, run, out, ours).check(0)
        check_same(out, run.out)
        check_same(ours, cache)
    attack("tokenizing killed, in several processes" if workers else "tokenizing killed", judge,
           range(10 if workers else 30))


@pytest.mark.attack
def test_full_disks(scene, attack):
    """No file may grow beyond a random size, as where a disk is full; then it has room again."""
    def judge(rng, folder, kind):
        out, size = folder / "out", int(10 ** rng.uniform(0, 4.5))
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        command = ((lambda **more: trained(scene, scene.whole, out, folder / "cache", **more))
                   if kind == "training" else
                   (lambda **more: answer(scene, scene.prompts, out, **more)))
        command(before=limit).check(0, 2)
        command().check(0)
        if kind == "training":
            check_same(out, scene.whole.out)
        else:
            check_answers(out, scene.results)
    attack("full disks", judge, ["training", "prompts"] * 20)


# --------------------------------------------------------------------------- two processes at once

PAIRS = ["a new run", "a run that goes on", "a second one killed", "runs by number", "results",
         "an empty cache"]


@pytest.mark.attack
@pytest.mark.parametrize("kind", PAIRS)
def test_pairs(scene, attack, kind):
    def judge(rng, folder, _):
        out, cache = folder / "out", scene.cache
        outs, places = [out, out], [folder, folder]
        if kind in ("a run that goes on", "a second one killed"):
            shutil.copytree(scene.half[0], out)
        elif kind == "runs by number":
            outs = [folder / "runs/1", folder / "runs/2"]
        elif kind == "an empty cache":
            cache, outs = folder / "cache", [folder / "one", folder / "two"]
        pair = []
        for i in range(2):
            time.sleep(rng.choice([0, 0, rng.uniform(0, 0.1), rng.uniform(0, 1)]) if i else 0)
            if kind == "results":
                pair.append(answer(scene, scene.prompts, out))
            elif kind == "runs by number":
                pair.append(Command(train.main, scene.whole.arguments, places[i], cache))
            else:
                pair.append(trained(scene, scene.whole, outs[i], cache))
        if kind == "a second one killed":
            killed(pair.pop(), rng.uniform(0, 0.5))
        codes = [command.check(0, 2) for command in pair]
        if kind == "a second one killed" and codes == [2]:     # the second one had the lock
            codes = [trained(scene, scene.whole, out, cache).check(0)]
        if 0 not in codes or (outs[0] != outs[1] and 2 in codes):
            raise Failed(f"exit codes {codes}: {[command.said for command in pair]}")
        if kind == "results":
            check_answers(out, scene.results)
            return
        for path in outs:
            check_same(path, scene.whole.out)
        if kind == "an empty cache":
            check_same(cache, scene.cache)
    attack(f"two at once: {kind}", judge, range(25))


# -------------------------------------------------------------------------------- damaged files

@pytest.mark.attack
@pytest.mark.parametrize("which", [0, 1, 2])
def test_damage_to_a_run(scene, attack, which):
    start = [*scene.half, scene.whole.out][which]

    def judge(rng, folder, attempt):
        name, kind = attempt
        out = shutil.copytree(start, folder / "run")
        bears(lambda: trained(scene, scene.whole, out), out / name, kind, rng,
              lambda damaged: check_same(out, scene.whole.out,
                                         [str(path.relative_to(out)) for path in damaged]))
    names = ["killed within a phase", "killed between two phases", "finished"]
    attack(f"damaged files of a run, {names[which]}", judge, each(start, 6, 2))


@pytest.mark.attack
def test_damage_to_a_checkpoint(scene, attack):
    model = scene.whole.out / "cr3"

    def judge(rng, folder, attempt):
        name, kind = attempt
        ours, out = shutil.copytree(model, folder / "model"), folder / "out.jsonl"
        bears(lambda: answer(scene, scene.prompts, out, "--verify", model=ours), ours / name, kind,
              rng, lambda _: check_answers(out, scene.results))
    attack("damaged files of a checkpoint", judge, each(model, 15, 5))


@pytest.mark.attack
def test_damage_to_results(scene, attack):
    def judge(rng, folder, kind):
        out, lines = folder / "out.jsonl", scene.results.read_bytes().splitlines(True)
        out.write_bytes(b"".join(lines[:rng.randint(1, len(lines))]))
        bears(lambda: answer(scene, scene.prompts, out), out, kind, rng,
              lambda _: check_answers(out, scene.results))
    attack("damaged results", judge, ["flipped", "truncated", "zeroed"] * 30)


@pytest.mark.attack
def test_damage_to_tokens(scene, attack):
    def judge(rng, folder, attempt):
        name, kind = attempt
        cache, out = shutil.copytree(scene.cache, folder / "cache"), folder / "run"
        if rng.random() < 0.5:
            shutil.copytree(scene.half[0], out)
        bears(lambda: trained(scene, scene.whole, out, cache), cache / name, kind, rng,
              lambda _: (check_same(out, scene.whole.out), check_same(cache, scene.cache)))
    attack("damaged tokens of a text", judge, each(scene.cache, 12, 6))


# --------------------------------------------------------------------------------- hostile input

@pytest.mark.attack
def test_hostile_lines(scene, attack):
    """Among healthy ones, which are answered as ever; each of the others has its one sentence, or a
    text where there was nothing wrong with it."""
    healthy = scene.prompts.read_bytes().splitlines()[:12]

    def judge(rng, folder, _):
        prompts, out = folder / "prompts.jsonl", folder / "out.jsonl"
        lines = healthy + [hostile_line(rng) for _ in range(10)]
        prompts.write_bytes(b"\n".join(lines))
        answer(scene, prompts, out).check(0, 2, lines=True)
        found = lines_of(out)
        numbers = [n for n, line in enumerate(prompts.read_bytes().split(b"\n"), 1)
                   if line.strip()]
        if [line["line"] for line in found] != numbers:
            raise Failed(f"{[line['line'] for line in found]} are answered")
        expected = [{x: line.get(x) for x in TEXTS} for line in lines_of(scene.results)[:12]]
        if [{x: line.get(x) for x in TEXTS} for line in found[:12]] != expected:
            raise Failed("a healthy line has another text")
        for line in found[12:]:
            if ("error" in line) == ("text" in line) or "\n" in line.get("error", ""):
                raise Failed(f"no answer: {line}")
    attack("hostile prompts, ten beside twelve healthy ones", judge, range(100))


@pytest.mark.attack
def test_poisoned_batches(scene, attack):
    """Sequences that become NaN or infinite, in a model whose weights for some bytes are huge."""
    def judge(rng, folder, dtype):
        model, prompts = folder / "model", folder / "prompts.jsonl"
        Command(lambda _: save_poisoned(model, rng, dtype), [], folder, scene.cache).check(0)
        text = lambda letters: "".join(rng.choices(letters, k=rng.randint(1, 30)))
        healthy = [{"prompt": text("abcdef"), "seed": i, "tokens": rng.randint(1, 30)}
                   for i in range(rng.randint(2, 10))]
        sick = [{"prompt": text("abcxyz") + rng.choice("xyz") + text("ab"),
                 "tokens": rng.randint(1, 30)} for _ in range(rng.randint(1, 10))]
        found, pool = {}, rng.choice(["1e-4", "3e-5", "1e-3"])
        for name, lines in (("alone", healthy), ("beside", healthy + sick)):
            order = rng.sample(range(len(lines)), len(lines))
            prompts.write_text("".join(json.dumps(lines[i] | {"id": i}) + "\n" for i in order))
            out = folder / f"{name}.jsonl"
            more = ["--batch", "1" if name == "alone" else str(rng.randint(2, 8)),
                    "--cache-gb", pool]
            answer(scene, prompts, out, *more, model=model).check(0, 2, lines=True)
            found[name] = {line["id"]: [line.get(x) for x in TEXTS] for line in lines_of(out)}
        if wrong := [i for i in found["alone"] if found["alone"][i] != found["beside"].get(i)]:
            raise Failed(f"{len(wrong)} of {len(healthy)} healthy texts differ beside "
                         f"{len(sick)}: {found['alone'][wrong[0]]}, {found['beside'][wrong[0]]}")
    attack("poisoned batches", judge, ["float32", "float16", "bfloat16"] * 20)


@pytest.mark.attack
def test_hostile_runs(scene, attack):
    """Files that would run a program if Python unpickled them: none of them does."""
    def judge(rng, folder, name):
        out, marker = folder / "run", folder / "marker"
        shutil.copytree(scene.half[0], out)
        (out / name).write_bytes(pickle_that_runs(rng, marker))
        command = trained(scene, scene.whole, out)
        command.wait()
        if marker.exists():
            raise Failed(f"{name} ran a program")
        command.check(0, 2)
    states = [name for name in files_of(scene.half[0]) if name.startswith("state-")]
    pickles = [f"{Path(states[0]).parent}/.metadata", "freed/pytorch_model.bin", *states]
    attack("files that would run a program", judge, 5 * list(dict.fromkeys(pickles)))


# ------------------------------------------------------------------------------------ the counts

def test_the_table_of_counts_is_what_was_measured():
    """`python tests/attack_counts.py` writes it."""
    assert attack_counts.table() in attack_counts.PAGE.read_text()
