"""The paper's benchmarks by lm_eval: which tasks, what they measure, a table and a file."""

import argparse
import logging
import math
import random
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from nanodmc import humaneval
from nanodmc.cli import number, provenance, silence, wrapped
from nanodmc.config import dtype_name
from nanodmc.files import InputError, one_line, write_json
from nanodmc.harness import adapter, lm_eval
from nanodmc.policies import budget, policy_cache, policy_named
from nanodmc.terminal import CountLine, to_show

CSQA = {"piqa": "acc_norm", "boolq": "acc", "arc_easy": "acc_norm", "arc_challenge": "acc_norm",
        "hellaswag": "acc_norm", "winogrande": "acc"}         # 0-shot, all of the paper's
METRICS = {**CSQA, "mmlu": "acc", "humaneval": "pass@1"}
SHARES = {"acc_norm", "acc", "pass@1", "exact_match", "f1"}   # shown as percentages
SHOTS = {"mmlu": 5}
FEWSHOT_SEED = 1234           # lm_eval's own
PARALLEL = ("the parallel form at alpha in {0, 1}, which equals the cache; of generated text, its "
            "cache")


def add_flags(parser):
    """The flags of --tasks, besides those that other modes have too."""
    flags = parser.add_argument_group("benchmarks")
    flags.add_argument("--tasks", type=names, metavar="NAMES", help=(
        f"measure tasks of lm_eval, with commas between: {', '.join(METRICS)}, or any other; "
        "humaneval runs code that the model wrote; --policy with one --cr, --seed and --out "
        "FILE.json count here too"))
    flags.add_argument("--include", type=Path, metavar="DIR", help=(
        "a folder of local task files, in which NAME_local stands for NAME, and of "
        "HumanEval.jsonl"))
    flags.add_argument("--limit", type=number(1, kind=int), metavar="N", help=(
        "only the first N questions of each task [all]"))


def names(text):
    """The type of --tasks: names with commas between."""
    if not all(map(str.strip, text.split(","))):
        raise argparse.ArgumentTypeError("a name is empty")
    return text


# ---------------------------------------------------------------------- what happens, in order

def measure(args, find):
    """Carry out --tasks: print a table, and write it to args.out if that is given.

    find(): (model, tokenizer, name, gain), called after the tasks are known to be there. gain: as
    in Transformer.hidden. args.policy: a name, with the one ratio in args.cr; None: the model's own
    cache. Raises InputError.
    """
    if args.out and Path(args.out).is_dir():
        raise InputError(f"{args.out} is a folder; give --out the name of a file.")
    cache_for = chosen_cache(args)
    tasks = load_tasks(args.tasks, args.include)
    model, tokenizer, name, gain = find()
    if cache_for:
        cache_for(1)(model.config, 1)           # refuses now what it would refuse later
    print(to_show(str(name)))
    if "humaneval" in tasks:
        print(wrapped(humaneval.limits()))
    line = CountLine()
    lm = adapter(model, tokenizer, gain, cache_for, args.seed, line.tell)
    results = evaluate(lm, tasks, args.limit)
    line.clear()
    rows = [row_of(task, results, lm.held) for task in tasks]
    facts = {"model": str(name), "policy": args.policy, "limit": args.limit, "rows": rows,
             "cs_qa": csqa_mean(rows), "cr": ratio(lm.held.values()),
             "cr_measured": "each text's own cache" if cache_for else PARALLEL,
             "dtype": dtype_name(model.lm_head.weight)}
    if args.policy:
        facts["cr_asked"] = args.cr[0]
    print("\n" + table(facts))
    if args.out:
        write_json(args.out, facts | sandbox(tasks) | {"lm_eval": version("lm_eval")}
                   | provenance())


def chosen_cache(args):
    """--policy and --cr as `scoring.score` takes them: length -> what makes the cache. Or None."""
    if not args.policy:
        return None
    policy_named(args.policy)
    if len(args.cr or ()) != 1:
        raise InputError("--tasks with --policy takes one compression ratio; give --cr one, "
                         "such as 2.")
    return lambda length: policy_cache(args.policy, budget(length, args.cr[0]))


def sandbox(tasks):
    return {"humaneval_limits": humaneval.limits()} if "humaneval" in tasks else {}


@contextmanager
def quiet():
    """Meanwhile libraries say nothing: no bars, no log."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with silence():
            yield
    finally:
        logging.disable(before)


def evaluate(lm, tasks, limit=None, samples=False):
    """What lm_eval's `evaluate` returns for the tasks that `load_tasks` gave.

    samples: with every answer. simple_evaluate gives the same, but spends seconds on listing what
    is installed.
    """
    with quiet(), torch.no_grad():
        from lm_eval.tasks import TaskManager
        loaded = TaskManager(include_defaults=False).load(list(tasks.values()))
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(FEWSHOT_SEED)
        return lm_eval().evaluate(lm, loaded, limit=limit, log_samples=samples,
                                  bootstrap_iters=1000)


# ------------------------------------------------------------------------------------- the tasks

def load_tasks(names, include=None):
    """name -> task or group of lm_eval, for names divided by commas, with all their data.

    include: a folder of task files. Where it defines NAME_local, that stands for NAME. Raises
    InputError for a missing folder, an unknown name, or data that cannot be had.
    """
    if include and not Path(include).is_dir():
        raise InputError(f"{include} is no folder; give --include one with task files.")
    lm_eval()
    with quiet():
        from lm_eval.tasks import TaskManager
        managers = Managers(TaskManager, include)
        random.seed(0)                  # as lm_eval does, for tasks that draw their questions
        np.random.seed(FEWSHOT_SEED)
        found = {}
        for name in dict.fromkeys(part.strip() for part in names.split(",")):
            manager, known = (None, name) if name == "humaneval" else managers.find(name)
            found.setdefault(known, manager)
        return {name: load_task(manager or TaskManager(include_defaults=False), name, include)
                for name, manager in found.items()}


class Managers:
    """Where task files are: in the folder given, and only if need be among lm_eval's own 15,000."""

    def __init__(self, make, include):
        self.make, self.include, self.all = make, include, None
        self.local = make(include_path=str(include), include_defaults=False) if include else None

    def find(self, name):
        """The TaskManager that knows a name, and the name by which it does."""
        for known in (f"{name}_local", name) if self.local else ():
            if known in self.local.all_tasks:
                return self.local, known
        self.all = self.all or self.make(include_path=self.include and str(self.include))
        if name not in self.all.all_tasks:
            places = f"lm_eval or {self.include}" if self.include else "lm_eval"
            raise InputError(f"--tasks: there is no task {name!r} in {places}; take some of "
                             f"{', '.join(METRICS)}, or give --include a folder of task files.")
        return self.all, name


def load_task(manager, name, include):
    """A task or a group, with its number of examples set to what the paper has."""
    try:
        loaded = manager.load([humaneval.task(include) if name == "humaneval" else name])
    except Exception as error:       # its many kinds: no network, no such file, a faulty definition
        raise InputError(
            f"the task {name} could not be loaded ({type(error).__name__}: {one_line(error)}); "
            "check the network, or give a folder of local task files with --include.") from None
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(f"the task {name} runs code that the model wrote, without limits; "
                             "humaneval is the only such task supported here.")
        if name.removesuffix("_local") in SHOTS:
            task.set_config("num_fewshot", SHOTS[name.removesuffix("_local")])
        if (answer := foreign_answer(task)) is not None:      # lm_eval would count it as wrong
            raise InputError(f"the first question of {task.config.task} has the answer "
                             f"{one_line(answer)!r}, which is none of its choices; correct "
                             "doc_to_target in the task file, or the data.")
    groups = loaded.get("groups") or {}
    if name not in groups and len(loaded["tasks"]) > 1:
        raise InputError(f"{name} is a tag of {len(loaded['tasks'])} tasks, which have no figure "
                         "in common; name those that you want.")
    return groups[name] if name in groups else next(iter(loaded["tasks"].values()))


def foreign_answer(task):
    """The right answer of a task's first question, if that is none of its choices; else None."""
    if task.OUTPUT_TYPE != "multiple_choice" or not hasattr(task, "multiple_input"):
        return None
    doc = next(iter(task.eval_docs))
    answer = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    right = answer if isinstance(answer, list) else [answer]
    possible = range(len(choices)) if isinstance(right[0], int) else choices
    return None if all(x in possible for x in right) else answer


# ----------------------------------------------------------------------------------- the results

def leaves(name, results):
    """The names of the tasks that a task or group is made of."""
    parts = results.get("group_subtasks", {}).get(name) or []
    return [leaf for part in parts for leaf in leaves(part, results)] or [name]


def ratio(held):
    """The CR of pairs (tokens, slots): of their sums. None where nothing was held."""
    tokens, slots = (sum(column) for column in zip(*held, strict=True)) if held else (0, 0)
    return tokens / slots if slots else None


def row_of(name, results, held):
    """A line of the table: what a task or group measured, and the CR over its texts."""
    facts = {}
    for key, value in results["results"][name].items():       # of a metric's filters, the first
        if "," in key:
            facts.setdefault(key.partition(",")[0], value)
    names = [key for key in facts if not key.endswith("_stderr")]
    wanted = METRICS.get(name.removesuffix("_local"))
    metric = next(key for key in (wanted, "acc_norm", "acc", *names) if key in facts)
    error, parts = facts.get(f"{metric}_stderr"), leaves(name, results)
    return {"task": name, "metric": metric, "value": facts[metric],
            "stderr": error if isinstance(error, float) and math.isfinite(error) else None,
            "items": sum(results["n-samples"][part]["effective"] for part in parts),
            "shots": results["n-shot"][parts[0]],
            "cr": ratio([held[part] for part in parts if part in held])}


def csqa_mean(rows):
    """value and stderr of the plain mean of the six tasks of CS-QA; None unless all are there."""
    found = {row["task"].removesuffix("_local"): row for row in rows}
    if not CSQA.keys() <= found.keys():
        return None
    errors = [found[name]["stderr"] for name in CSQA]
    return {"value": sum(found[name]["value"] for name in CSQA) / len(CSQA),
            "stderr": None if None in errors else math.hypot(*errors) / len(CSQA)}


def table(facts):
    """The rows as text, within 80 columns; shares in per cent."""
    lines = [f"{'task':<28} {'metric':<12} {'value':>8} {'stderr':>7} {'items':>6} {'shots':>5} "
             f"{'CR':>6}"]
    for row in facts["rows"]:
        scale = 100 if row["metric"] in SHARES else 1
        lines.append(f"{row['task'][:28]:<28} {row['metric'][:12]:<12} "
                     f"{figure(row['value'], scale):>8} {figure(row['stderr'], scale):>7} "
                     f"{row['items']:>6} {row['shots']:>5} {figure(row['cr']):>6}")
    if mean := facts["cs_qa"]:
        lines.append(f"{'CS-QA':<28} {'mean of six':<12} {figure(mean['value'], 100):>8} "
                     f"{figure(mean['stderr'], 100):>7}")
    if facts["limit"]:
        lines += ["", wrapped(f"Only the first {facts['limit']} questions of each task were asked: "
                              "these figures do not compare with published ones.")]
    return "\n".join(lines)


def figure(value, scale=1):
    return "-" if value is None else f"{scale * value:.2f}"
