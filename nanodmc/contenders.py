"""What is compared with DMC: models and runs, and the caches that each is measured with."""

from pathlib import Path
from typing import NamedTuple

from dmc import Config
from nanodmc.baselines import pooling_cache
from nanodmc.checkpoint import COMPRESSED, locate
from nanodmc.config import read_config
from nanodmc.files import InputError, read_json
from nanodmc.heldout import run_documents
from nanodmc.policies import POLICIES, budget, policy_cache, policy_named
from nanodmc.settings import Settings
from nanodmc.tokenizer import Tokenizer


class Case(NamedTuple):
    """A model and a cache. Each gives a row."""

    name: str
    argument: str               # of --compare, that it belongs to
    method: str                 # a line in the plot: plain, DMC, averaging, or a policy
    folder: Path                # of the model
    config: Config
    cr: float | None = None     # that was asked for: how much a policy keeps

    def make_cache(self, model, length):
        """What makes the cache, with dmc.Cache's arguments. length: tokens of each sequence."""
        if self.method in POLICIES:
            return policy_cache(self.method, budget(length, self.cr))
        if self.method == "averaging":
            return pooling_cache(model.Cache, int(self.cr))
        return model.Cache


class Subject:
    """An argument of --compare: a run with its models, or one model. Raises InputError.

    models: (name, folder, config) each. plain: that of them on which policies are tried, or None.
    context: tokens of a sequence.
    """

    def __init__(self, argument):
        self.argument, folder = argument, Path(argument)
        self.settings = self.given = self.key = None
        if (folder / "run.json").is_file():
            folders = self.read_run(folder)
        else:
            folder = locate(argument)
            folders = {folder.name or str(folder): folder}
        self.models = [(name, path, read_config(path)) for name, path in folders.items()]
        plain = [model for model in self.models if not model[2].dmc]
        self.plain = plain[-1] if plain else None           # of a run, the control if it has one
        self.tokenizer = Tokenizer.from_folder(self.models[0][1])
        self.context = min(config.max_seq_len for *_, config in self.models)
        if self.settings:
            self.context = min(self.context, self.settings.context)

    def read_run(self, run):
        """The folders of a run's models, by what they are called."""
        facts = read_json(run / "run.json")
        try:
            self.settings, self.key = Settings(**facts["settings"]), facts["text"]
        except (KeyError, TypeError):
            raise InputError(f"{run / 'run.json'} is no run's of this version; name its models one "
                             "by one.") from None
        if self.settings.init and not self.settings.random_weights:
            self.given = locate(self.settings.init).resolve()
        has = lambda folder: (folder / "config.json").is_file()
        found = {name: run / name for name in ("pretrained", "control") if has(run / name)}
        if self.given and "pretrained" not in found:
            found = {"pretrained": self.given, **found}
        ratios = [p for p in run.glob("cr*") if COMPRESSED.fullmatch(p.name) and has(p)]
        for path in sorted(ratios, key=lambda p: float(p.name[2:])):
            found[f"DMC {float(path.name[2:]):g}x"] = path
        if not found:
            raise InputError(f"{run} has no model yet; let the run get to its first one.")
        return found

    def texts(self):
        """The texts on which the run validates."""
        return run_documents(self.argument, self.settings, self.given, self.key, self.tokenizer)

    def cases(self, policies, ratios, alone):
        """Its Cases. alone: nothing else is compared, so that names need not tell it apart."""
        before = "" if alone else f"{self.argument} "
        for name, folder, config in self.models:
            yield Case(before + name if self.settings else self.argument, self.argument,
                       "DMC" if config.dmc else "plain", folder, config)
        if self.plain:
            _, folder, config = self.plain
            for cr in ratios:
                if cr > 1 and cr == int(cr):
                    yield Case(f"{before}every {cr:g} averaged", self.argument, "averaging", folder,
                               config, cr)
            for policy in policies:
                for cr in ratios:
                    yield Case(f"{before}{policy} {cr:g}x", self.argument, policy, folder, config,
                               cr)


def all_cases(subjects, policies, ratios):
    """The Cases of all subjects. policies None: all, where there is a plain model."""
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
    chosen_policies = list(POLICIES) if policies is None else policies
    return [case for subject in subjects
            for case in subject.cases(chosen_policies, ratios, len(subjects) == 1)]
