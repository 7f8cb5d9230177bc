"""What is compared with DMC: models and runs, and the caches that each is measured with."""

from pathlib import Path
from typing import NamedTuple

from dmc import Config
from nanodmc.baselines import pooling_cache
from nanodmc.checkpoint import COMPRESSED, locate
from nanodmc.config import read_config
from nanodmc.files import InputError, listed, read_json
from nanodmc.heldout import given_documents, run_documents
from nanodmc.policies import POLICIES, budget, policy_cache, policy_named
from nanodmc.resumed import read_run
from nanodmc.tokenizer import Tokenizer
from nanodmc.variants import VARIANTS, of_model

ONE_BY_ONE = "restore it from a copy, or name its models one by one"


class Case(NamedTuple):
    """A model and a cache. Each gives a row."""

    name: str
    argument: str               # of --compare, that it belongs to
    method: str                 # a line in the plot: plain, DMC, averaging, or a policy
    folder: Path                # of the model
    config: Config
    cr: float | None = None     # that was asked for: how much a policy keeps
    heads: int | None = None    # key-value heads of the uncompressed model; None: its own

    def make_cache(self, model, length):
        """What makes the cache, with dmc.Cache's arguments. length: tokens of each sequence."""
        if self.method in POLICIES:
            return policy_cache(self.method, budget(length, self.cr))
        if self.method == "averaging":
            return pooling_cache(model.Cache, int(self.cr))
        return model.Cache


class Subject:
    """An argument of --compare: a run with its models, or one model. Raises InputError.

    models: (name, folder, config, kind) each. plain: that of them on which policies are tried, or
    None. context: tokens of a sequence.
    """

    def __init__(self, argument):
        self.argument, folder = argument, Path(argument)
        self.settings = self.given = self.key = None
        if (folder / "run.json").is_file():
            folders = self.read_run(folder)
        else:
            folder = locate(argument)
            folders = {folder.name or str(folder): folder}
        self.models = [(name, path, config := read_config(path),
                        # of a run, what it started from, whatever became of that before
                        "plain" if self.settings and name == "pretrained"
                        else kind_of(path, config)) for name, path in folders.items()]
        plain = [model for model in self.models if model[3] == "plain"]
        self.plain = plain[-1] if plain else None           # of a run, the control if it has one
        self.tokenizer = Tokenizer.from_folder(self.models[0][1])
        self.context = min(config.max_seq_len for _, _, config, _ in self.models)
        if self.settings:
            self.context = min(self.context, self.settings.context)

    def read_run(self, run):
        """The folders of a run's models, by what they are called."""
        facts = read_run(run, ONE_BY_ONE)
        self.settings, self.key = facts["settings"], facts["text"]
        if self.settings.init and not self.settings.random_weights:
            self.given = locate(self.settings.init).resolve()
        has = lambda folder: (folder / "config.json").is_file()
        found = {name: run / name for name in ("pretrained", "control") if has(run / name)}
        if self.given and "pretrained" not in found:
            found = {"pretrained": self.given, **found}
        ratios = [p for p in run.glob("cr*") if COMPRESSED.fullmatch(p.name) and has(p)]
        for path in sorted(ratios, key=lambda p: float(p.name[2:])):
            title = VARIANTS[self.settings.variant].title
            found[f"{title} {float(path.name[2:]):g}x"] = path
        if not found:
            raise InputError(f"{run} has no model yet; let the run get to its first one.")
        return found

    def texts(self):
        """The texts on which the run validates."""
        return run_documents(self.argument, self.settings, self.given, self.key, self.tokenizer)

    def cases(self, policies, ratios, alone):
        """Its Cases. policies None: none, and no averaging either.

        alone: nothing else is compared, so that names need not tell it apart.
        """
        before = "" if alone else f"{self.argument} "
        for name, folder, config, kind in self.models:
            heads = config.n_kv_head if kind == "plain" else heads_before(folder, config)
            yield Case(before + name if self.settings else self.argument, self.argument, kind,
                       folder, config, heads=heads)
        if self.plain is None or policies is None:
            return
        _, folder, config, _ = self.plain
        case = lambda name, method, cr: Case(before + name, self.argument, method, folder, config,
                                             cr)
        for cr in ratios:
            if cr > 1 and cr == int(cr):
                yield case(f"every {cr:g} averaged", "averaging", cr)
        for policy in policies:
            for cr in ratios:
                yield case(f"{policy} {cr:g}x", policy, cr)


def held_out(subjects, data, what):
    """The texts in the files `data`, or else those of the Subjects' runs, and what they are called.

    what: needs data where there is no run. Raises InputError.
    """
    if data:
        return given_documents(data), listed([Path(file).name for file in data])
    runs = [subject for subject in subjects if subject.settings]
    if not runs:
        raise InputError(f"{what} needs a held-out text; add --data FILE.")
    if len({subject.key for subject in runs}) > 1:
        raise InputError("the runs were trained on different texts; give one that is held out from "
                         "all with --data.")
    return runs[0].texts(), f"the validation text of {runs[0].argument}"


def heads_before(folder, config):
    """The key-value heads that a model had before GQA averaged them."""
    before = read_json(folder / "config.json").get("kv_heads_before_gqa")
    return before if isinstance(before, int) and before > config.n_kv_head else config.n_kv_head


def kind_of(folder, config):
    """What a model is: "plain", "GQA", or the title of its variant of DMC."""
    if config.dmc:
        return of_model(config).title
    return "plain" if heads_before(folder, config) == config.n_kv_head else VARIANTS["gqa"].title


def all_cases(subjects, policies, ratios):
    """The Cases of all subjects. policies None: all, where there is a plain model.

    Policies are tried on the controls, or where there is none on every plain model. A model that
    several runs started from is measured once.
    """
    plain = [subject for subject in subjects if subject.plain]
    for policy in policies or ():
        policy_named(policy)
    if policies and not plain:
        raise InputError("eviction policies are for plain models, and "
                         f"{subjects[0].argument} holds the weights of a DMC model; add the model "
                         "that it was made of, or leave out --policy.")
    context = min(subject.context for subject in subjects)
    if plain and (lost := [cr for cr in ratios if cr > context]):
        raise InputError(f"--cr {lost[0]:g} leaves a budget below 1 slot of sequences of {context} "
                         "tokens; lower it.")
    chosen = list(POLICIES) if policies is None else policies
    tried = [s for s in plain if s.plain[0] == "control"] or plain
    cases, seen = [], set()
    for subject in subjects:
        again = subject in tried and subject.plain[1].resolve() not in seen
        for case in subject.cases(chosen if again else None, ratios, len(subjects) == 1):
            if case.cr is not None or case.folder.resolve() not in seen:
                cases.append(case)
        seen |= {path.resolve() for _, path, _, _ in subject.models}
    return cases
