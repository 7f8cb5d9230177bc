"""The settings of a training run, and their presets."""

import argparse
import math
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from nanodmc.checkpoint import locate
from nanodmc.cli import OPS
from nanodmc.config import SHAPES, checked_config, read_config, shape
from nanodmc.files import InputError, is_number
from nanodmc.machine import slow_in_bf16
from nanodmc.parallel import device_of_this_process
from nanodmc.phases import FIRST_CR, first_cr
from nanodmc.variants import VARIANTS


def setting(group, laptop, help, paper=None, **argument):
    """A field of Settings that is also a flag.

    group: its heading in --help. laptop: the default. paper: the value for Llama 2 7B, where it
    differs. argument: what else argparse must know.
    """
    if laptop is not None and laptop is not False:
        help += f" [{laptop}]" if paper is None else f" [{laptop}; paper: {paper}]"
    return field(default=laptop, metadata={"paper": laptop if paper is None else paper,
                                           "group": group, "argument": {"help": help, **argument}})


def flag(name):
    """The flag that gives the setting of this name."""
    return "--" + name.replace("_", "-")


def full_path(name):
    """The absolute path of a file or pattern, so that --resume finds it from any folder."""
    return os.path.realpath(name)                    # which takes a loop of links as it is


def full_path_of_folder(name):
    """The absolute path of a folder; any other name as it is."""
    return full_path(name) if Path(name).is_dir() else name


LARGEST, LARGEST_SEED = 10 ** 9, 2 ** 63 - 1


def check_type(field, value):
    """Raises InputError where the value of a setting, which may be from a file, is no such value.

    Those whose default is None may be None; a list is of numbers, or of names.
    """
    if value is None and field.default is None:
        return
    words = field.name == "data"
    good = {int: is_number(value, kind=int) or isinstance(value, int) and field.default is value,
            float: isinstance(value, int | float) and not isinstance(value, bool),
            bool: isinstance(value, bool),
            str: isinstance(value, str),
            list: isinstance(value, list) and bool(value) and all(
                isinstance(x, str) if words else is_number(x) for x in value)}
    if not good[field.type]:
        raise InputError(f"{flag(field.name)} is {str(value)[:100]!r}; give a "
                         f"{'list' if field.type is list else field.type.__name__}.")
    choices = field.metadata["argument"].get("choices")
    if choices and value not in choices:
        raise InputError(f"{flag(field.name)} is {value[:100]!r}; choose {', '.join(choices)}.")


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's result. The defaults suit the small model; PRESETS has more.

    Raises InputError where a value is out of range or two contradict each other.
    """
    init: str = setting(
        "model", None, "model to retrofit: the folder of a checkpoint, llama2-7b, -13b, -70b, or "
        "org/name on Hugging Face [none: pretrain a small one]", metavar="MODEL",
        type=full_path_of_folder)
    random_weights: bool = setting(
        "model", False, "take only the shape of --init llama2-7b and the like: weights are random "
        "and text is bytes", action="store_true")
    layers: int = setting("model", 3, "L, layers of the small model")
    heads: int = setting("model", 4, "H, its query heads")
    kv_heads: int = setting("model", 4, "G, its key-value heads; divides H")
    dim: int = setting("model", 128, "width of its residual stream; H divides it")
    ffn_dim: int = setting("model", 384, "width of its MLP")
    ops: str = setting("model", "fast", "fast: kernels and stock flash attention; reference: the "
                       "plain functions of dmc.py", choices=list(OPS), metavar="NAME")

    data: list = setting(
        "data", None, "UTF-8 text: files, folders, patterns with *. In .txt, a line with only a "
        "form feed stands between documents; .jsonl has one a line; any other file is one. May be "
        "packed as .gz, .xz or .zst [without --init: the sources of Python's standard library]",
        nargs="+", metavar="FILE", type=full_path)
    field: str = setting("data", "text", "the key in .jsonl that holds the text", metavar="KEY")
    context: int = setting("data", 128, "tokens per training sequence, and positions of the small "
                           "model", 4096)
    batch: int = setting("data", 8, "sequences per step", 1024)
    micro_batch: int = setting(
        "data", 0, "sequences per forward and backward pass, on each card; the gradients of a "
        "step's passes add up; 0: the whole batch", 2)
    seed: int = setting("data", 0, "seed of the weights, the order of the data and the noise of "
                        "the decisions")

    pretrain_steps: int = setting("schedule", 1100, "steps of pretraining")
    free_steps: int = setting("schedule", 100, "n of Eq. 12: steps over which the control channels "
                              "fade", 250)
    retrofit_steps: int = setting("schedule", 240, "steps over which the target CR rises from 1 to "
                                  "--cr", 18000)
    solidify_steps: int = setting(
        "schedule", 260, "steps at the fixed CR while the learning rate decays; with a control, "
        "models kept earlier take more of them, so that all end after as many steps", 2000)
    cr: float = setting("schedule", 4.0, "the compression ratio to reach", metavar="CR")
    keep: list = setting("schedule", None, "CRs at which a model is kept, as in 2,3,4 "
                         "[2, 3, ... --cr]", nargs="+", metavar="CR")
    solidify: list = setting(
        "schedule", None, "which of them to solidify, in this order; --resume can add more where "
        "there is no control [all]", nargs="+", metavar="CR")
    control: bool = setting(
        "schedule", False, "with --init too: also train the model given for as many steps without "
        "compression", action="store_true")

    variant: str = setting(
        "method", "dmc", f"dmc, or what it is compared with: {', '.join(list(VARIANTS)[1:])}; "
        "docs/variants.md says what each is", choices=list(VARIANTS), metavar="NAME")
    distill: float = setting(
        "method", 0.0, "share of the objective, beside the compression loss, that is the KL "
        "divergence to the logits of the model before the retrofit; the LM loss has the rest",
        metavar="X")
    choose_pair: bool = setting(
        "method", False, "before channel 0 fades, make it the one of all rotary pairs, turned, "
        "that scores miss least; the paper takes it as it is", action="store_true")
    fit_decisions: bool = setting(
        "method", False, f"start the retrofit at CR {FIRST_CR:g}, with decisions fitted to what "
        "merging costs on 65,536 tokens; in the paper every token appends at first",
        action="store_true")
    window: int = setting("method", 12, "w: tokens that an average covers at most; 0: the whole "
                          "segment")
    tau: float = setting("method", 0.2, "temperature of Eq. 8", 0.1)
    c: float = setting("method", 3.0, "offset of Eq. 8", 5.0)
    final_noise: float = setting(
        "method", 1.0, "share of Eq. 8's noise and temperature left at the end of solidify; near "
        "0, decisions are as in use", metavar="X")
    cr_weight: float = setting("method", 2.0, "weight of the compression loss; Eq. 11 has 1", 1.0)
    channel_lr_factor: float = setting(
        "method", 10.0, "how much larger the steps are of the projection rows that feed the "
        "control channels", 1.0)

    pretrain_lr: float = setting("optimizer", 2e-3, "peak learning rate of pretraining, a cosine "
                                 "to 10%%")
    lr: float = setting("optimizer", 1e-3, "learning rate of the other phases: constant, then in "
                        "solidify a cosine to 10%%", 3e-5)
    warmup: int = setting("optimizer", 10, "steps over which each phase's learning rate rises from "
                          "0; 0: none")
    weight_decay: float = setting("optimizer", 0.1, "AdamW's weight decay, on matrices")
    beta2: float = setting("optimizer", 0.95, "AdamW's second beta; the first is 0.9")
    eps: float = setting("optimizer", 1e-8, "AdamW's epsilon", 1e-5)
    clip: float = setting("optimizer", 1.0, "largest norm of the gradient")
    precision: str = setting(
        "optimizer", "fp32", "fp32, or bf16 to save memory: weights and AdamW's moments in bf16, "
        "rounded stochastically; little kept of each layer if need be; no full logits. 6 bytes per "
        "parameter, and 4 for the sums of gradients. On a CPU that is slow in bf16, every preset "
        "has fp32", "bf16", choices=["fp32", "bf16"],
        metavar="NAME")

    eval_sequences: int = setting("output", 256, "validation sequences behind each figure of the "
                                  "final table")
    save_every: int = setting("output", 100, "steps from one saved state to the next", 20)
    log_every: int = setting("output", 40, "steps from one line on the screen to the next", 10)

    def __post_init__(self):
        for f in fields(self):
            check_type(f, getattr(self, f.name))
        may_be_zero = {"seed", "micro_batch", "pretrain_steps", "channel_lr_factor", "cr_weight",
                       "window", "c", "warmup", "weight_decay", "distill"}
        numbers = {f.name: getattr(self, f.name) for f in fields(self)
                   if isinstance(getattr(self, f.name), int | float) and f.type is not bool}
        for name, value in numbers.items():
            if not 0 <= value < math.inf:
                raise InputError(f"{flag(name)} is {value}; give a number that is not negative.")
            if value > (LARGEST_SEED if name == "seed" else LARGEST):
                raise InputError(f"{flag(name)} is above {LARGEST:,}; lower it.")
        for name, value in numbers.items():
            if value == 0 and name not in may_be_zero:
                raise InputError(f"{flag(name)} is 0; give a number above 0.")
        if self.beta2 >= 1:
            raise InputError(f"--beta2 is {self.beta2}; give a number below 1.")
        for name in ("distill", "final_noise"):
            if numbers[name] > 1:
                raise InputError(f"{flag(name)} is {numbers[name]}; a share is at most 1.")
        self.check_ratios()
        if self.random_weights and not self.init:
            raise InputError("--random-weights needs the name of a shape; add --init llama2-7b.")
        if self.micro_batch and self.batch % self.micro_batch:
            raise InputError(f"--batch {self.batch} is no multiple of --micro-batch "
                             f"{self.micro_batch}; choose one that is.")
        self.small_config()

    def check_ratios(self):
        """Raises InputError where --cr, --keep and --solidify contradict each other."""
        spelled = lambda ratios: " ".join(f"{cr:g}" for cr in ratios)
        if self.cr < 1:
            raise InputError(f"--cr is {self.cr:g}; a compression ratio is at least 1.")
        if self.cr > self.context:
            raise InputError(f"--cr is {self.cr:g}, which no sequence of --context {self.context} "
                             "tokens can reach; lower it.")
        if self.variant in ("fmp", "gqa") and (self.cr < 2 or self.cr % 1):
            raise InputError(f"--variant {self.variant} averages a whole number, and --cr is "
                             f"{self.cr:g}; give 2 or more.")
        if not VARIANTS[self.variant].annealed and self.kept() != [self.cr]:
            raise InputError(f"--variant {self.variant} has its CR from the first step on, so it "
                             "keeps one model; leave out --keep.")
        lowest = first_cr(self)
        if self.fit_decisions and (self.variant != "dmc" or self.cr <= lowest):
            raise InputError(f"--fit-decisions starts DMC at CR {lowest:g}; give a --cr above it "
                             "and no --variant, or leave it out.")
        if not all(lowest <= cr <= self.cr for cr in self.kept()):
            raise InputError(f"--keep {spelled(self.keep)} leaves the range from {lowest:g} to "
                             f"--cr {self.cr:g}.")
        if not set(self.solidified()) <= set(self.kept()):
            raise InputError(f"--solidify {spelled(self.solidify)} names a CR at which no model is "
                             "kept; add it to --keep.")

    def kept(self):
        """The CRs at which the retrofit keeps a model, in rising order."""
        if self.keep:
            return sorted(set(self.keep))
        if not VARIANTS[self.variant].annealed:
            return [self.cr]
        return [float(cr) for cr in range(2, math.ceil(self.cr))] + [self.cr]

    def solidified(self):
        """The CRs of the models that are solidified, in the order in which that happens."""
        return list(dict.fromkeys(self.solidify or self.kept()))

    def small_config(self):
        """The Config of the plain Llama that is pretrained where --init gives none."""
        return checked_config(vocab_size=257, n_layer=self.layers, n_head=self.heads,
                              n_kv_head=self.kv_heads, dim=self.dim, ffn_dim=self.ffn_dim,
                              max_seq_len=self.context, **self.method(dmc=False))

    def method(self, dmc):
        """The entries of a Config that the settings decide. dmc False: a plain Llama."""
        entries = {"dmc": dmc, "window": self.window or None, "tau": self.tau, "c": self.c}
        if dmc and self.variant != "dmc":
            entries["variant"] = self.variant
            entries["every"] = int(self.cr) if self.variant == "fmp" else None
        return entries

    @property
    def lean(self):
        """Whether training saves memory, by precision, recomputation and chunks."""
        return self.precision == "bf16"

    @property
    def dtype(self):
        return torch.bfloat16 if self.lean else torch.float32


PAPER = {f.name: f.metadata["paper"] for f in fields(Settings)}
BRIEF = {"batch": 64, "free_steps": 50, "retrofit_steps": 400, "solidify_steps": 150, "cr": 3.0,
         "eval_sequences": 64}                     # a schedule of 600 steps
PRESETS = {
    "laptop": {},
    "given": {**PAPER, **BRIEF},
    "llama2-7b": PAPER,
    "llama2-13b": PAPER,
    "llama2-70b": {**PAPER, "lr": 1.5e-5},
    "few-tokens": {**PAPER, "context": 512, "batch": 4, "micro_batch": 4, "free_steps": 20,
                   "retrofit_steps": 210, "solidify_steps": 50, "distill": 1.0, "choose_pair": True,
                   "tau": 0.5, "c": 3.0, "final_noise": 0.1, "cr_weight": 3.0, "lr": 2e-4,
                   "channel_lr_factor": 25.0, "eval_sequences": 64}}


# ------------------------------------------------------------------------------------- the flags

def add_flags(parser):
    """A flag for each setting, in groups. One that is not given leaves nothing in the result."""
    groups = {}
    for f in fields(Settings):
        title = f.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind = {"type": f.type} if f.type in (int, float) else {}
        groups[title].add_argument(flag(f.name), default=argparse.SUPPRESS, **kind,
                                   **f.metadata["argument"])


def ratios(name, words):
    """The numbers in what --keep or --solidify was given: "2 3", "2,3". Raises InputError."""
    try:
        return [float(cr) for word in words for cr in word.split(",") if cr]
    except ValueError:
        raise InputError(f"{flag(name)} {' '.join(words)} is no list of ratios; give one such as "
                         "2,3,4.") from None


def new_settings(given, preset=None):
    """The Settings of a new run. given: those that flags gave. preset: a name in PRESETS.

    Without one, a model that --init names brings its own, or "given". Its sequences are no longer
    than its positions. Raises InputError where the flags contradict each other.
    """
    small = {"layers", "heads", "kv_heads", "dim", "ffn_dim", "pretrain_steps"} & given.keys()
    init = given.get("init")
    if init and small:
        raise InputError(f"{flag(min(small))} is for the small model; leave it out with --init, "
                         "which brings its own.")
    named = "laptop" if init is None else init if init in PRESETS else "given"
    settings = Settings(**{**PRESETS[preset or named], **given})
    if "precision" not in given and slow_in_bf16(device_of_this_process()):
        settings = replace(settings, precision="fp32")
    if init and "context" not in given:
        settings = replace(settings, context=min(settings.context, positions(settings)))
    return settings


def positions(settings):
    """How many positions the model has that --init names. Raises InputError where there is none."""
    shapes = {*SHAPES, "toy"}
    if settings.random_weights or settings.init in shapes:
        return shape(settings.init).max_seq_len
    return read_config(locate(settings.init)).max_seq_len
