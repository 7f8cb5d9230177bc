"""Properties of nanodmc/benchmarks.py: tasks from a folder, the table, the file, refusals."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

import generate
from conftest import oracle, refusal
from dmc import Cache, Transformer
from nanodmc import benchmarks, harness
from nanodmc.files import InputError
from nanodmc.terminal import CountLine
from nanodmc.tokenizer import Tokenizer
from test_dmc import config_of

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = [{"question": f"What is {i} + 1?", "choices": [str(i + 1), f" {i}{i}", "none of them"],
              "answer": i % 3} for i in range(7)]


def definition(name, data, **changes):
    """A task of multiple choice over a file of questions."""
    measured = [{"metric": metric, "aggregation": "mean", "higher_is_better": True}
                for metric in ("acc", "acc_norm")]
    return {"task": name, "dataset_path": "json", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
            "fewshot_split": "test", "doc_to_text": "Q: {{question}}\nA:",
            "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
            "metric_list": measured, **changes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files: those of CS-QA, MMLU of two subjects, one without data, one that runs code."""
    oracle("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    tasks = [definition(f"{name}_local", data) for name in (*benchmarks.CSQA, "mmlu_a", "mmlu_b")]
    tasks += [{"group": "mmlu_local", "task": ["mmlu_a_local", "mmlu_b_local"],
               "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]},
              definition("no_data", folder / "missing.jsonl"),
              definition("runs_code", data, unsafe_code=True),
              definition("no_label", data, doc_to_target="label"),
              *(definition(name, data, tag="tagged") for name in ("tagged_a", "tagged_b"))]
    for i, task in enumerate(tasks):
        (folder / f"{i}.yaml").write_text(json.dumps(task))
    return folder


def model_and_tokenizer(dmc=True):
    torch.manual_seed(0)
    config = config_of((4, 2), vocab_size=257, max_seq_len=256, dmc=dmc, c=0.0)
    return Transformer(config), Tokenizer.bytes(), "a small model", None


def measured(folder, out, names, **changes):
    """What is printed, and what is written."""
    find = changes.pop("find", model_and_tokenizer)
    args = SimpleNamespace(**{"tasks": names, "include": folder, "limit": None, "seed": 0,
                              "out": out, "policy": None, "cr": [2.0], **changes})
    benchmarks.measure(args, find)
    return json.loads(out.read_text())


def test_the_table_has_each_tasks_metric_and_the_mean_of_six(folder, tmp_path, capsys):
    names = "piqa,boolq,arc_easy,arc_challenge,hellaswag,winogrande,mmlu"
    facts = measured(folder, tmp_path / "out.json", names)
    printed = capsys.readouterr().out
    rows = {row["task"].removesuffix("_local"): row for row in facts["rows"]}
    assert {name: row["metric"] for name, row in rows.items()} == {
        "piqa": "acc_norm", "boolq": "acc", "arc_easy": "acc_norm", "arc_challenge": "acc_norm",
        "hellaswag": "acc_norm", "winogrande": "acc", "mmlu": "acc"}
    assert [row["shots"] for row in facts["rows"]] == [0] * 6 + [5]
    assert [row["items"] for row in facts["rows"]] == [7] * 6 + [14]
    six = [row["value"] for row in facts["rows"][:6]]
    assert facts["cs_qa"]["value"] == pytest.approx(sum(six) / 6)
    assert facts["cs_qa"]["stderr"] == pytest.approx(
        math.sqrt(sum(row["stderr"] ** 2 for row in facts["rows"][:6])) / 6)
    assert max(map(len, printed.splitlines())) <= 80 and "Only the first" not in printed
    for row in facts["rows"]:
        assert any(line.split()[:3] == [row["task"], row["metric"], f"{100 * row['value']:.2f}"]
                   for line in printed.splitlines())
    assert facts["cr"] > 1.05 and "parallel form" in facts["cr_measured"]
    assert {"commit", "versions", "lm_eval", "command"} <= facts.keys()


def test_figures_and_the_cr_are_those_of_the_questions_texts(folder, tmp_path):
    """acc, acc_norm and CR from log-likelihoods through the cache, one text after the other."""
    rows = measured(folder, tmp_path / "out.json", "piqa,boolq")["rows"]
    model, tokenizer, *_ = model_and_tokenizer()
    right, right_norm, tokens, slots = 0, 0, 0, 0
    for doc in QUESTIONS:
        context, found = f"Q: {doc['question']}\nA:", []
        for choice in doc["choices"]:
            ids = tokenizer.encode(f"{context} {choice}")
            cache = Cache(model.config, 1)
            with torch.no_grad():
                scores = model(torch.tensor([ids[:-1]]), cache)[0][0].log_softmax(-1)
            begin = len(tokenizer.encode(context))
            found.append(sum(scores[t - 1, ids[t]].item() for t in range(begin, len(ids))))
            tokens, slots = tokens + 4 * (len(ids) - 1), slots + cache.lengths.sum().item()
        normed = [x / len(choice) for x, choice in zip(found, doc["choices"], strict=True)]
        right += found.index(max(found)) == doc["answer"]
        right_norm += normed.index(max(normed)) == doc["answer"]
    assert [row["value"] for row in rows] == pytest.approx([right_norm / 7, right / 7])
    assert [row["cr"] for row in rows] == pytest.approx([tokens / slots] * 2)


def test_a_policy_is_measured_through_its_cache(folder, tmp_path, capsys):
    """The slots are those of budgets, text by text; and only the first questions are asked."""
    find = lambda: model_and_tokenizer(dmc=False)
    facts = measured(folder, tmp_path / "out.json", "boolq", limit=2, find=find, policy="tova")
    texts = [f"Q: {doc['question']}\nA: {choice}" for doc in QUESTIONS[:2]
             for choice in doc["choices"]]
    lengths = [len(text) - 1 for text in texts]
    assert facts["cr"] == pytest.approx(sum(lengths) / sum(n // 2 for n in lengths))
    assert facts["rows"][0]["items"] == 2 and facts["policy"] == "tova" and facts["cr_asked"] == 2
    assert "own cache" in facts["cr_measured"]
    assert "Only the first 2 questions" in capsys.readouterr().out


@pytest.mark.parametrize("changes, says", [
    ({"policy": "lru"}, "no policy lru"), ({"policy": "h2o", "cr": [2.0, 4.0]}, "one compression"),
    ({"policy": "h2o"}, "DMC model")])
def test_policies_that_cannot_be_measured_are_refused(folder, tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        measured(folder, tmp_path / "out.json", "boolq", **changes)


@pytest.mark.parametrize("names, says", [
    ("piqa,nonsense", "nonsense"), ("no_data", "no_data"),
    ("runs_code", "without limits"), ("no_label", "'label', which is none of its choices"),
    ("tagged", "tag of 2 tasks")])
def test_tasks_that_cannot_be_measured_are_refused(folder, monkeypatch, names, says):
    """In one sentence, before a model is loaded."""
    find = benchmarks.Managers.find

    def find_in_folder(self, name):              # lm_eval's own 15,000 files take 10 s to list
        self.all = self.local
        return find(self, name)
    monkeypatch.setattr(benchmarks.Managers, "find", find_in_folder)
    with pytest.raises(InputError, match=says) as refused:
        benchmarks.load_tasks(names, folder)
    assert "\n" not in str(refused.value) and str(refused.value).endswith(".")


def test_a_missing_folder_and_a_missing_package_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="is no folder"):
        benchmarks.load_tasks("piqa", tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    for ask in (lambda: benchmarks.load_tasks("piqa"),
                lambda: harness.adapter(*model_and_tokenizer()[:2])):
        with pytest.raises(InputError, match="pip install lm_eval"):
            ask()


def test_a_line_says_how_far_it_is_and_how_long_it_takes(monkeypatch, capsys):
    times = iter([0, 5, 20, 25, 40])
    line = CountLine(lambda: next(times))
    for done in (0, 25, 50, 60, 80):
        line.tell("tokens scored", done, 100)
    said = capsys.readouterr().err.splitlines()
    assert said == ["50/100 tokens scored  0:20 left", "80/100 tokens scored  0:10 left"]


@pytest.mark.parametrize("arguments, says", [
    (["--tasks", "piqa,,boolq"], "a name is empty"), (["--tasks", "piqa", "--cr", "2"], "--cr has"),
    (["--tasks", "piqa", "--include", "nowhere"], "nowhere is no folder"),
    (["--limit", "3"], "without --tasks"), (["--tasks", "piqa", "--out", "."], "is a folder"),
    (["--tasks", "piqa", "--policy", "lru", "--cr", "2"], "no policy lru")])
def test_the_command_refuses_in_one_sentence(plain, tmp_path, capsys, arguments, says):
    said = refusal(generate.main, ["--ckpt", str(plain), *arguments], capsys, tmp_path)
    assert says in said


def test_the_command_measures_what_it_is_asked(folder, plain, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["--ckpt", str(plain), "--tasks", "boolq", "--include", str(folder), "--limit", "2"]
    assert generate.main([*arguments, "--policy", "sinks", "--cr", "4", "--out", str(out)]) == 0
    assert "boolq_local" in capsys.readouterr().out
    facts = json.loads(out.read_text())
    assert facts["policy"] == "sinks" and facts["cr"] >= 4 and len(facts["rows"]) == 1
