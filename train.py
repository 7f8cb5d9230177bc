"""Retrofit a Llama with DMC. From nothing to a table, on a laptop: `python train.py`. Llama 2 7B, on one 80 GB card:
`python train.py --init llama2-7b --data FILE...`. On many cards: `torchrun --nproc_per_node N train.py ...`.

Five phases, each of which starts from the weights that an earlier one left behind:

    pretrain   a small plain Llama learns the text; with --init, the model given is measured instead
    free       Eq. 12 fades the control channels out of the scores; then the rows that feed them are set to zero
    retrofit   decisions are on, and the target CR rises linearly from 1; at each whole CR a copy of the weights is kept
    solidify   each kept copy trains on at its fixed CR while the learning rate decays
    control    the pretrained model trained for as many further steps without compression, to compare with; with --init
               only if --control asks for it

Everything is written to --out: `run.json` (the settings), `metrics.jsonl` (a line per step), `state.json` and a folder of
tensors (what --resume needs), a folder of weights per model, and `summary.json` (the final table).
"""

import argparse
import glob
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import resource
import shlex
import shutil
import signal
import sys
import sysconfig
import time
import warnings
from array import array
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import dmc
from dmc import Config, InputError, Tokenizer, Transformer, one_line, read_json, write_atomically, write_json
from generate import OPS, Parser, locate, over_ranks, provenance, random_model, read_lines, runs_by_number

# ------------------------------------------------------------------------------------------------ settings

def setting(laptop, help, paper=None, **argument):
    """A field of Settings that is also a flag. paper: the value for Llama 2 7B, where it differs from the laptop's."""
    if laptop not in (None, False):
        help += f" [{laptop}]" if paper is None else f" [{laptop}; paper: {paper}]"
    return field(default=laptop, metadata={"paper": laptop if paper is None else paper,
                                            "argument": {"help": help, **argument}})


@dataclass(frozen=True)
class Settings:
    """What decides a run. The defaults suit the small model; `--preset paper` takes the paper's (section 4)."""
    data: list = setting(None, "text in UTF-8: files, folders, patterns with *; .txt (a form feed in a line of its own stands "
                         "between documents), .jsonl, any other file as one document; packed as .gz, .xz, .zst or not [the "
                         "sources of Python's standard library]", nargs="+", metavar="FILE",
                         type=lambda path: str(Path(path).resolve()))
    field: str = setting("text", "where a line of .jsonl has its text")
    init: str = setting(None, "model to retrofit: the folder of a checkpoint, llama2-7b, -13b, -70b or org/name on Hugging "
                        "Face [none: pretrain a small one]", metavar="NAME_OR_PATH",
                        type=lambda name: str(Path(name).resolve()) if Path(name).is_dir() else name)
    random_weights: bool = setting(False, "take only the shape of --init llama2-7b and the like; weights are random and text "
                                   "is bytes", action="store_true")
    control: bool = setting(False, "with --init too: also train the model given for as many steps without compression",
                            action="store_true")
    ops: str = setting("fast", "kernels and stock flash attention, or the plain functions of dmc.py", choices=list(OPS))
    seed: int = setting(0, "seed of the weights, the order of the data and the decisions' noise")
    layers: int = setting(3, "L, layers of the small model")
    heads: int = setting(4, "H, its query heads")
    kv_heads: int = setting(4, "G, its key-value heads; divides H")
    dim: int = setting(128, "width of its residual stream; H divides it")
    ffn_dim: int = setting(384, "width of its MLP")
    context: int = setting(128, "tokens per training sequence, and positions of the small model", 4096)
    batch: int = setting(8, "sequences per step", 1024)
    micro_batch: int = setting(0, "sequences per forward and backward pass, on each card; gradients add up over the passes of "
                               "a step; 0: the whole batch", 1)
    precision: str = setting("fp32", "bf16: weights and AdamW's moments in bf16, rounded stochastically, one kept activation "
                             "per layer, no full logits: 6 bytes per parameter, and 4 for the gradients' sums", "bf16",
                             choices=["fp32", "bf16"])
    pretrain_steps: int = setting(1100, "steps of pretraining")
    free_steps: int = setting(100, "n of Eq. 12: steps over which the control channels fade", 250)
    retrofit_steps: int = setting(240, "steps over which the target CR rises from 1 to --cr", 18000)
    solidify_steps: int = setting(260, "steps at the fixed CR while the learning rate decays; beside a control, models kept "
                                  "earlier take so many more that all end after as many steps", 2000)
    cr: float = setting(4.0, "the compression ratio to reach")
    keep: list = setting(None, "CRs at which a model is kept, as in 2,3,4 [2, 3, ... --cr]", nargs="+", metavar="CR")
    solidify: list = setting(None, "which of them to solidify, in this order; more can be added with --resume where there is "
                             "no control [all]", nargs="+", metavar="CR")
    pretrain_lr: float = setting(2e-3, "peak learning rate of pretraining, a cosine to 10%%")
    lr: float = setting(1e-3, "learning rate of the other phases: constant, then in solidify a cosine to 10%%", 3e-5)
    channel_lr_factor: float = setting(10.0, "how much larger the steps of the control channels' projection rows are", 1.0)
    cr_weight: float = setting(2.0, "weight of the compression loss; Eq. 11 has 1", 1.0)
    window: int = setting(12, "w: tokens that an average covers at most; 0: the whole segment")
    tau: float = setting(0.2, "temperature of Eq. 8", 0.1)
    c: float = setting(3.0, "offset of Eq. 8", 5.0)
    warmup: int = setting(10, "steps over which each phase's learning rate rises from 0; 0: none")
    weight_decay: float = setting(0.1, "AdamW's weight decay, on matrices")
    beta2: float = setting(0.95, "AdamW's second beta; the first is 0.9")
    eps: float = setting(1e-8, "AdamW's epsilon", 1e-5)
    clip: float = setting(1.0, "largest norm of the gradient")
    eval_sequences: int = setting(256, "validation sequences behind each figure of the final table")
    save_every: int = setting(100, "steps from one saved state to the next")
    log_every: int = setting(40, "steps from one line on the screen to the next")

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise InputError(f"{flag(f.name)} is {value}; give a number that is not negative.")
        may_be_zero = {"seed", "micro_batch", "pretrain_steps", "channel_lr_factor", "cr_weight", "window", "c", "warmup",
                       "weight_decay", "random_weights", "control"}
        for f in fields(self):
            if getattr(self, f.name) == 0 and f.name not in may_be_zero:
                raise InputError(f"{flag(f.name)} is 0; give a number above 0.")
        if self.beta2 >= 1:
            raise InputError(f"--beta2 is {self.beta2}; give a number below 1.")
        if self.cr < 1:
            raise InputError(f"--cr is {self.cr:g}; a compression ratio is at least 1.")
        if not all(1 <= cr <= self.cr for cr in self.kept()):
            raise InputError(f"--keep {' '.join(f'{cr:g}' for cr in self.keep)} leaves the range from 1 to --cr {self.cr:g}.")
        if not set(self.solidified()) <= set(self.kept()):
            raise InputError(f"--solidify {' '.join(f'{cr:g}' for cr in self.solidify)} names a CR at which no model is kept; "
                             "add it to --keep.")
        if self.random_weights and not self.init:
            raise InputError("--random-weights needs the name of a shape; add --init llama2-7b.")
        if self.micro_batch and self.batch % self.micro_batch:
            raise InputError(f"--batch {self.batch} is no multiple of --micro-batch {self.micro_batch}; choose one that is.")
        self.small_config()       # raises where the sizes contradict each other

    def kept(self):
        """The CRs that the run yields a model of, in rising order."""
        return sorted(set(self.keep)) if self.keep else [float(cr) for cr in range(2, math.ceil(self.cr))] + [self.cr]

    def solidified(self):
        """Those of them that are trained on at their CR, in order."""
        return list(dict.fromkeys(self.solidify or self.kept()))

    def small_config(self):
        """The Config of the plain Llama that is pretrained where none is given."""
        return Config(vocab_size=257, n_layer=self.layers, n_head=self.heads, n_kv_head=self.kv_heads, dim=self.dim,
                      ffn_dim=self.ffn_dim, max_seq_len=self.context, **self.method(dmc=False))

    @property
    def lean(self):
        """Whether memory is saved: by precision, recomputation and chunks."""
        return self.precision == "bf16"

    @property
    def dtype(self):
        return torch.bfloat16 if self.lean else torch.float32

    def method(self, dmc):
        """The entries of Config that a checkpoint's own give way to. dmc False: a plain Llama."""
        return {"dmc": dmc, "window": self.window or None, "tau": self.tau, "c": self.c}


PAPER = {f.name: f.metadata["paper"] for f in fields(Settings)}
PRESETS = {"laptop": {}, "llama2-7b": PAPER, "llama2-13b": PAPER, "llama2-70b": {**PAPER, "lr": 1.5e-5},
           "short": {**PAPER, "batch": 64, "free_steps": 50, "retrofit_steps": 400, "solidify_steps": 150, "cr": 3.0,
                     "tau": 0.2, "c": 3.0, "cr_weight": 2.0, "channel_lr_factor": 10.0, "eval_sequences": 64}}


def flag(name):
    return "--" + name.replace("_", "-")


# ------------------------------------------------------------------------------------------------ data

def standard_library():
    """The Python sources of the interpreter that runs this, without its test suites: about 12 MB everywhere."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    return sorted(f for f in root.rglob("*.py") if not skip & set(f.relative_to(root).parts))


def text_files(patterns):
    """The files that --data names: themselves, all in a folder and below it, or what a pattern with * matches."""
    found = []
    for pattern in patterns:
        names = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - absolute
        if not names:
            raise InputError(f"{pattern} cannot be read (no such file); check --data.")
        for path in map(Path, names):
            found += sorted(f for f in (path.rglob("*") if path.is_dir() else [path])
                            if f.is_file() and not f.name.startswith("."))
    if not found:
        raise InputError("there is no file to train on; give text files with --data.")
    return list(dict.fromkeys(found))


def unpacked(file, suffix):
    """A text stream of an open file, by its name's suffix."""
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise InputError("reading .zst needs a library that is not installed; pip install zstandard.") from None
        return zstandard.open(file, "rt", encoding="utf-8")
    kind = {".gz": gzip.open, ".xz": lzma.open}.get(suffix)
    return kind(file, "rt", encoding="utf-8") if kind else io.TextIOWrapper(file, encoding="utf-8")


def documents(path, field):
    """Yield the texts in a file, each with the bytes of the file read so far. In .jsonl each line has one under `field`; in
    .txt a line of nothing but a form feed stands between two; any other file is one. All may be packed: .gz, .xz, .zst."""
    packed = path.suffix if path.suffix in (".gz", ".xz", ".zst") else ""
    kind = path.with_suffix("").suffix if packed else path.suffix
    try:
        with path.open("rb") as file, unpacked(file, packed) as stream:
            if kind == ".jsonl":
                for number, line in enumerate(stream, 1):
                    entry = json.loads(line) if line.strip() else {field: None}
                    if not isinstance(entry, dict) or not isinstance(entry.get(field, 0), str | None):
                        raise InputError(f"{path} has no text under {field} in line {number}; name where it is with --field.")
                    if entry[field] is not None:
                        yield entry[field], file.tell()
            elif kind == ".txt":
                lines = []
                for line in stream:
                    if line == "\f\n":
                        yield "".join(lines), file.tell()
                        lines = []
                    else:
                        lines.append(line)
                yield "".join(lines), file.tell()
            else:
                yield stream.read(), file.tell()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; convert it, or leave it out of --data.") from None
    except json.JSONDecodeError:
        raise InputError(f"{path} is no JSON in line {number}; mend it, or leave it out of --data.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); check --data.") from None
    except InputError:
        raise
    except Exception as error:      # each library has its own kind for a damaged file
        raise InputError(f"{path} is damaged ({error}); fetch it anew, or leave it out of --data.") from None


@lru_cache(maxsize=1)
def tokenizer_of(folder):
    """The tokenizer of a checkpoint, or of bytes where `folder` is None; read once in each process."""
    return Tokenizer.from_folder(folder) if folder else Tokenizer.bytes()


def encode(folder, texts):
    """Each text's tokens, an array each: what the tokenizer puts before a text, the text, the end of text."""
    tokenizer = tokenizer_of(folder)
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    dtype = np.uint16 if tokenizer.vocab_size <= 2 ** 16 else np.uint32
    return [np.array(tokenizer.encode(text, special=False, prefix=True) + end, dtype=dtype) for text in texts]


def encode_all(files, folder, field, alone=2 ** 24):
    """Yield the documents of all files as arrays of tokens, in order, with the share that is done. More bytes than `alone` are
    cut into portions for as many processes as there are cores; only a few portions are in memory at any time."""
    sizes = np.cumsum([0, *(f.stat().st_size for f in files)])

    def portions():
        texts, size = [], 0
        for i, path in enumerate(files):
            for text, read in documents(path, field):
                texts.append(text)
                size += len(text)
                if size > 2 ** 20:
                    yield texts, (sizes[i] + read) / sizes[-1]
                    texts, size = [], 0
        yield texts, 1.0

    if sizes[-1] <= alone:
        yield from ((encode(folder, texts), done) for texts, done in portions())
        return
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        waiting = deque()
        for texts, done in portions():
            waiting.append((pool.submit(encode, folder, texts), done))
            if len(waiting) > 2 * workers:
                future, done = waiting.popleft()
                yield future.result(), done
        yield from ((future.result(), done) for future, done in waiting)


def content_key(files, folder, field):
    """A name for the tokens of these files: the same for the same contents, in the same order, and the same tokenizer."""
    tokenizer, whole = tokenizer_of(folder), hashlib.blake2b(digest_size=12)
    try:
        whole.update(json.dumps([field, tokenizer.special_ids]).encode() + tokenizer.files["tokenizer.json"])
        for path in files:
            whole.update(json.dumps([path.suffixes[-2:], path.stat().st_size]).encode())
            with path.open("rb") as f:
                while block := f.read(2 ** 20):
                    whole.update(block)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check --data.") from None
    return whole.hexdigest()


def prepare(files, folder, field, cache):
    """Tokenize into the folder cache/KEY, unless that is done: `tokens`, all in a row, and `ends`, where each document ends
    (int64). Returns KEY."""
    key = content_key(files, folder, field)
    if (cache / key).is_dir():
        return key
    partial_folder, began = cache / f"{key}.{os.getpid()}.partial", time.perf_counter()
    shown, ends, total = began, array("q"), 0
    try:
        partial_folder.mkdir(parents=True)
        with (partial_folder / "tokens").open("wb") as out:
            for arrays, done in encode_all(files, folder, field):
                for tokens in arrays:
                    tokens.tofile(out)
                    total += len(tokens)
                    ends.append(total)
                if time.perf_counter() - shown > (1 if sys.stdout.isatty() else 30):
                    shown = time.perf_counter()
                    print(f"tokenizing {done:4.0%}, {total:,} tokens, {total / (shown - began):,.0f} per second",
                          end="\r" if sys.stdout.isatty() else "\n", flush=True)
            os.fsync(out.fileno())
        with (partial_folder / "ends").open("wb") as out:
            ends.tofile(out)
            os.fsync(out.fileno())
        partial_folder.replace(cache / key)
    except OSError as error:
        if not (cache / key).is_dir():       # else another run was faster
            raise InputError(f"{cache} cannot be written ({error.strerror}); set XDG_CACHE_HOME to another folder or free some "
                             "space.") from None
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return key


class Text:
    """Documents of a memory-mapped file of tokens, put one after the other in a given order: has a length, and slices."""

    def __init__(self, tokens, starts, ends):
        self.tokens, self.starts, self.ends = tokens, starts, np.cumsum(ends - starts)
        self.shift = starts - self.ends + (ends - starts)         # from a place in this text to the place in the file

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, span):
        parts, at, stop = [], span.start, min(span.stop, len(self))
        for i in range(np.searchsorted(self.ends, at, side="right"), len(self.ends)):
            if at >= stop:
                break
            end = min(stop, int(self.ends[i]))
            parts.append(self.tokens[at + self.shift[i]:end + self.shift[i]])
            at = end
        return np.concatenate(parts)


def load_data(settings, folder, key=None):
    """The text as tokens: for training and for validation, and the key of both. folder: whose tokenizer; None: bytes.

    Documents are put in an order that depends on nothing but their number, and the first of them, 1 in 20 but no more than
    10,000, are set aside for validation; of a single document, its last twentieth. key: of an earlier call, whose tokens are
    taken as they are if they are still there.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dmc"
    if key is None or not (cache / key).is_dir():
        files = text_files(settings.data) if settings.data else standard_library()
        if not files:
            raise InputError("this Python has no sources of its standard library; give text files with --data.")
        key = prepare(files, folder, settings.field, cache)
    small = tokenizer_of(folder).vocab_size <= 2 ** 16
    ends = np.fromfile(cache / key / "ends", np.int64)
    tokens = np.memmap(cache / key / "tokens", np.uint16 if small else np.uint32, mode="r") if ends[-1:].any() else np.zeros(0)
    starts = np.concatenate([[0], ends[:-1]])
    if len(ends) == 1:
        cut = len(tokens) * 19 // 20
        starts, ends, order = np.array([0, cut]), np.array([cut, len(tokens)]), np.array([1, 0])
    else:
        order = np.random.default_rng(0).permutation(len(ends))
    held_out = max(1, min(len(ends) // 20, 10_000))
    val, train = (Text(tokens, starts[part], ends[part]) for part in (order[:held_out], order[held_out:]))
    for name, text in (("training", train), ("validation", val)):
        if len(text) <= settings.context:
            raise InputError(f"the {name} text has {len(text)} tokens, and one sequence takes {settings.context + 1}; "
                             "give more text with --data or a smaller --context.")
    return train, val, key


def sequences(tokens, starts, length, device):
    """Inputs and targets, (len(starts), length) each: the tokens from each start on, and those one further."""
    x = torch.from_numpy(np.stack([tokens[i:i + length + 1] for i in starts]).astype(np.int64)).to(device)
    return x[:, :-1], x[:, 1:]


@lru_cache(maxsize=2)
def shuffled(seed, epoch, n):
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch(tokens, settings, position, device, rows=None):
    """The batch at a position of the data, the same one for every model that gets there. rows: a range of them; None: all.

    The text given is cut into sequences, all of which are read once in a shuffled order, then in another one; of the small
    model's, sequences begin at random places.
    """
    s, T = settings, settings.context
    rows = range(s.batch) if rows is None else rows
    if s.data:
        n = (len(tokens) - 1) // T
        places = (divmod(position * s.batch + row, n) for row in rows)
        starts = [shuffled(s.seed, epoch, n)[i] * T for epoch, i in places]
    else:
        starts = np.random.default_rng([s.seed, position]).integers(0, len(tokens) - T, s.batch)[rows.start:rows.stop]
    return sequences(tokens, starts, T, device)


# ------------------------------------------------------------------------------------------------ phases

@dataclass(frozen=True)
class Phase:
    """steps of training that turn the weights in folder `start` into those in folder `out`."""
    name: str
    start: str | None                # None: random weights
    out: str | None                  # None: only what it keeps on the way
    steps: int
    position: int                    # where in the data it starts: as many steps as the start's weights have seen
    decay: int                       # the last steps, over which the learning rate falls to 10%
    lr: float
    dmc: bool = True
    fade: bool = False               # Eq. 12
    cr: tuple | None = None          # target CR before the first step and after the last
    keep: dict = field(default_factory=dict)    # step -> folder

    @property
    def weights(self):
        """The folder of the weights it ends with: a model that was given and not trained stays where it is."""
        return self.out if self.steps or self.start is None else self.start

    def learning_rate(self, step, warmup):
        left = min(1.0, (self.steps - step) / self.decay) if self.decay else 1.0
        return self.lr * min(1.0, (step + 1) / max(1, warmup)) * (0.1 + 0.9 * (1 - math.cos(math.pi * left)) / 2)

    def target(self, step):
        """The target CR at a step, or None where nothing is decided."""
        return self.cr and self.cr[0] + (self.cr[1] - self.cr[0]) * (step + 1) / self.steps


def plan(s, given=None):
    """The phases of a run, in order. given: the folder of a checkpoint to start from; None: from random weights."""
    pretrain_steps = 0 if s.init else s.pretrain_steps
    start = str(given) if given else "pretrained"
    free_at, retrofit_at = pretrain_steps, pretrain_steps + s.free_steps
    reach = {cr: max(1, round(s.retrofit_steps * (cr - 1) / max(s.cr - 1, 1e-9))) for cr in s.kept()}
    if len(set(reach.values())) < len(reach):
        raise InputError(f"two of the CRs to keep, {', '.join(f'{cr:g}' for cr in reach)}, fall on the same step; keep fewer "
                         "with --keep, or raise --retrofit-steps.")
    phases = [
        Phase("pretrain", given and start, "pretrained", pretrain_steps, 0, pretrain_steps, s.pretrain_lr, dmc=False),
        Phase("free", start, "freed", s.free_steps, free_at, 0, s.lr, fade=True),
        Phase("retrofit", "freed", None, s.retrofit_steps, retrofit_at, 0, s.lr, cr=(1.0, s.cr),
              keep={step: f"retrofit-{cr:g}" for cr, step in reach.items()}),
    ]
    control = s.control or not s.init
    for cr in s.solidified():          # with a control, all end after as many steps as it, which makes them comparable
        step = reach[cr]
        steps = s.solidify_steps + (s.retrofit_steps - step if control else 0)
        phases.append(Phase("solidify", f"retrofit-{cr:g}", f"cr{cr:g}", steps, retrofit_at + step, steps, s.lr, cr=(cr, cr)))
    if control:
        phases.append(Phase("control", start, "control", s.free_steps + s.retrofit_steps + s.solidify_steps, free_at,
                            s.solidify_steps, s.lr, dmc=False))
    return phases


# ------------------------------------------------------------------------------------------------ many cards

def cards():
    """The number of this process, and how many there are: one for each card, as torchrun starts them."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def local(x):
    """This card's share of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def over_cards(x, mean=False):
    """The sum, or the mean, of all cards' x; in place."""
    return over_ranks(x) / cards()[1] if mean else over_ranks(x)


def share_out(model, dtype, device):
    """Shard a model with FSDP2: each card holds its rows of every weight, and gathers one layer at a time. Only a layer at a
    time is converted and moved, so the model given may stay mapped to its file."""
    mesh = init_device_mesh(torch.device(device).type, (cards()[1],))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)       # no angle in bf16
    for part in (*model.layers, model):
        fully_shard(part.to(dtype), mesh=mesh, mp_policy=policy)
    return model


def gathered(model):
    """The whole model in the memory of the first process; elsewhere nothing of use."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with torch.device("meta"):
        whole = Transformer(model.config)
    whole.load_state_dict(weights, assign=True, strict=False)
    if model.config.tie_embeddings:
        whole.lm_head.weight = whole.embed_tokens.weight
    return whole


def control_rows(model):
    """Transformer.control_rows, of this card's share of a model."""
    rank, count = cards()
    weights = [proj.weight for layer in model.layers for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj)]
    first = [rank * -(-len(weight) // count) for weight in weights]
    return [local(weight.detach())[-start % model.config.head_dim::model.config.head_dim]
            for weight, start in zip(weights, first, strict=True)]


# ------------------------------------------------------------------------------------------------ optimizer

def new_optimizer(model, s, passes=1):
    """AdamW; decay on matrices only. The learning rate is set at each step. passes: how many add up to a gradient."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if s.lean:
        return RoundingAdamW(groups, betas=(0.9, s.beta2), eps=s.eps, sums=passes > 1)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, s.beta2), eps=s.eps, fused=True)
    optimizer.state.update((p, new_moments(p, p.device)) for p in matrices + vectors)
    return optimizer


def new_moments(p, device=None):
    """AdamW's state before the first step; there from the start, so that a saved one can be read into it."""
    return {"step": torch.zeros((), device=device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def states(model, optimizer):
    """Everything that a step changes, by name: views of the weights and the moments."""
    named = dict(model.named_parameters())
    return {"weights": {name: p.detach() for name, p in named.items()},
            **{key: {name: optimizer.state[p][key].detach() for name, p in named.items()} for key in ("exp_avg", "exp_avg_sq")}}


def round_stochastically(x, bits):
    """fp32 to bf16, up or down with the probabilities that make the mean x. bits: int32, 16 random low bits each."""
    return (x.view(torch.int32) + (bits & 0xFFFF) & -0x10000).view(torch.float32).bfloat16()


def adamw(w, grad, m, v, bits, numbers):
    """AdamW on flat bf16 tensors, in place, computed in fp32. bits: int32 noise. The moments are rounded like the weights,
    since 1 - beta2 of a change may be less than bf16 can show; so nothing is lost but on average."""
    clip, decay, rate, beta1, beta2, correction, eps = numbers.unbind()
    grad = grad.float() * clip
    mean = torch.lerp(grad, m.float(), beta1)
    square = torch.lerp(grad * grad, v.float(), beta2)
    w.copy_(round_stochastically(w.float() * decay - rate * mean / ((square * correction).sqrt() + eps), bits))
    m.copy_(round_stochastically(mean, bits >> 16))
    v.copy_(round_stochastically(square, bits >> 16))


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW on bf16 weights with bf16 moments. At a learning rate of 3e-5 nearly every update is less than half of what a bf16
    weight can show, so it is rounded stochastically, with noise from PyTorch's generator.

    sums: gradients of several backward passes add up in fp32, each as soon as it exists, and is freed; a bf16 sum would lose
    the later ones. An update within the backward pass would need no gradients at all, but clipping needs their norm first.
    """
    CHUNK = 2 ** 24          # parameters at a time, which bounds the fp32 temporaries

    def __init__(self, groups, betas, eps, sums):
        super().__init__(groups, dict(lr=0.0, betas=betas, eps=eps))
        self.sums, self.factor = {}, None
        for p in self.parameters():
            self.state[p] = new_moments(p)
            if sums:
                self.sums[p] = torch.zeros_like(local(p), dtype=torch.float32)
                p.register_post_accumulate_grad_hook(partial(add_gradient, self.sums[p]))
        self.update = torch.compile(adamw) if p.is_cuda else adamw

    def parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    def gradient(self, p):
        return self.sums[p] if self.sums else local(p.grad)

    def zero_grad(self):
        super().zero_grad()
        for total in self.sums.values():
            total.zero_()

    def clip(self, largest):
        """The norm of the whole gradient; the next step scales it down to `largest`."""
        norms = [torch.linalg.vector_norm(self.gradient(p), dtype=torch.float32) for p in self.parameters()]
        norm = over_cards(torch.stack(norms).square().sum()).sqrt()
        self.factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                state = self.state[p]
                state["step"] += 1
                n = state["step"].item()
                numbers = [1 - lr * group["weight_decay"], lr / (1 - beta1 ** n), beta1, beta2, 1 / (1 - beta2 ** n)]
                numbers = torch.tensor([*numbers, group["eps"]]).to(p.device, non_blocking=True)
                numbers = torch.cat([self.factor.view(1), numbers])
                flat = (local(x).view(-1).split(self.CHUNK)
                        for x in (p, self.gradient(p), state["exp_avg"], state["exp_avg_sq"]))
                for w, grad, m, v in zip(*flat, strict=True):
                    bits = torch.empty_like(w, dtype=torch.int32).random_(-2 ** 31, 2 ** 31)
                    self.update(w, grad, m, v, bits, numbers)


def add_gradient(total, p):
    total += local(p.grad)
    p.grad = None


# ------------------------------------------------------------------------------------------------ memory

def memory_plan(config, s, cards=1):
    """What a run needs on each card: bytes by name. Counted where a tensor stays, estimated where it comes and goes."""
    with torch.device("meta"):
        model = Transformer(config)
    size = lambda module: sum(p.numel() for p in module.parameters())
    n, layer, width = size(model), size(model.layers[0]), s.dtype.itemsize
    ends = n - config.n_layer * layer                                    # embedding, output matrix, last norm
    sequences = s.micro_batch or s.batch // cards
    tokens = sequences * s.context
    summed = s.lean and sequences * cards < s.batch
    work = tokens * width * (24 * config.head_dim * config.n_head + 6 * config.ffn_dim)        # of one layer, both passes
    logits = (min(tokens, 2048) if s.lean else tokens) * config.vocab_size * 14
    if not s.lean:                                                       # every layer's, and the T x T mask and scores
        work = config.n_layer * (work + 4 * sequences * config.n_head * s.context ** 2 * width)
    return {"weights": n * width // cards, "gradients": n * (4 if summed else width) // cards,
            "moments": 2 * n * width // cards,
            "kept activations": config.n_layer * tokens * config.dim * width if s.lean else 0,
            "work": max(work + layer * width * summed, logits) + (2 * (2 * layer + ends) * width if cards > 1 else 0),
            "reserve": 2 * 10 ** 9 * torch.cuda.is_available()}          # CUDA itself, and what falls between the blocks


def free_memory():
    """Bytes on the card, or of the machine where there is none; None: nobody knows."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return next((int(line.split()[1]) * 1024 for line in read_lines("/proc/meminfo") if line.startswith("MemAvailable")), None)


def check_memory(plan, free):
    """Print the plan. Raises InputError where it exceeds what is free."""
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in plan.items() if size)
    print(f"memory plan in GB: {parts}; together {sum(plan.values()) / 1e9:.1f}" + (f" of {free / 1e9:.1f}" if free else ""))
    if free and sum(plan.values()) > free:
        raise InputError(f"the run needs {sum(plan.values()) / 1e9:.1f} GB on each card ({parts}) and {free / 1e9:.1f} are "
                         "free; lower --micro-batch or --context, take --precision bf16, or use more cards with torchrun.")


# ------------------------------------------------------------------------------------------------ one step

def compression_term(alpha, phase, step):
    """Eq. 10 against the target CR. In solidify, beyond the paper's one-sided loss, the batch is held to the target from
    both sides: a short retrofit overshoots by several percent, and the LM loss alone is slow to bring it back."""
    cr = phase.target(step)
    return ((1 - alpha).mean() - 1 / cr).abs() if phase.name == "solidify" else dmc.compression_loss(alpha, cr)


def language_loss(head, targets, hidden, chunk=2048):
    """Mean cross-entropy of the next tokens, from the last hidden states (B, T, dim). The logits of `chunk` tokens at a time
    are made, and made again for the gradient, so that all of them never exist at once."""
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    part = lambda h, y: F.cross_entropy(head(h).float(), y, reduction="sum")
    sums = [checkpoint(part, h, y, use_reentrant=False, preserve_rng_state=False)
            for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True)]
    return torch.stack(sums).sum() / len(targets)


def train_step(model, optimizer, phase, step, passes, s):
    """One update, from the gradients of `passes`: how many they are, inputs, targets; equally many sequences each.

    Returns the LM loss in nats per token, and the CR that the noisy decisions reached: in all, and for each layer and head; or
    None. Raises FloatingPointError, before anything is changed, where loss or gradient are not finite.
    """
    lr = phase.learning_rate(step, s.warmup)
    for group in optimizer.param_groups:
        group["lr"] = lr
    gain = dmc.channel_gain(step, phase.steps) if phase.fade else None
    optimizer.zero_grad()
    figures = []
    for count, inputs, targets in passes:
        head = partial(language_loss, model.lm_head, targets) if s.lean else None
        out, alpha = model(inputs, noise=True, gain=gain, head=head, recompute=s.lean)
        lm_loss = out if s.lean else F.cross_entropy(out.flatten(0, 1), targets.flatten())
        loss = lm_loss if alpha is None else lm_loss + s.cr_weight * compression_term(alpha, phase, step)
        (loss / count).backward()
        kept = None if alpha is None else (1 - alpha.detach())
        figures.append((lm_loss.detach(), kept if kept is None else kept.mean(), kept if kept is None else kept.mean((1, 3))))
    norm = optimizer.clip(s.clip) if s.lean else torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    lm_loss, kept, heads = (None if x[0] is None else over_cards(torch.stack(x).mean(0), mean=True)
                            for x in zip(*figures, strict=True))
    if not math.isfinite(lm_loss.item() + norm.item()):
        raise FloatingPointError(f"the loss is {lm_loss.item():.4g} and its gradient's norm {norm.item():.4g}")
    rows = control_rows(model) if alpha is not None else []
    before = [row.clone() for row in rows]
    optimizer.step()
    for row, old in zip(rows, before, strict=True):
        row.copy_(torch.lerp(old, row, s.channel_lr_factor))
    return lm_loss.item(), None if kept is None else 1 / kept.item(), None if kept is None else (1 / heads).tolist()


# ------------------------------------------------------------------------------------------------ evaluation

def pooling_cache(base, every):
    """A Cache that averages every `every` tokens with equal weights, whatever the model decides (appendix E)."""
    class PoolingCache(base):
        def attend(self, layer, q, k, v, alpha=None, omega=None):
            at = torch.arange(self.seen[layer], self.seen[layer] + q.size(2), device=q.device)
            alpha = (at % every > 0).float().expand(k.shape[:3]).clone()
            return super().attend(layer, q, k, v, alpha, torch.ones_like(alpha))
    return PoolingCache


@torch.no_grad()
def evaluate(model, tokens, s, cache_class=None):
    """Loss in nats per token over validation sequences, through the real cache (parallel prefill), the CR there, and the
    CR of every layer and head, (L, G)."""
    T, weight = s.context, next(model.parameters())
    device = weight.device
    starts = np.random.default_rng(1).permutation((len(tokens) - 1) // T)[:s.eval_sequences] * T
    losses, slots = [], []
    rows = max(1, 4096 // T)
    for part in np.split(starts, range(rows, len(starts), rows)):
        x, y = sequences(tokens, part, T, device)
        cache = (cache_class or model.Cache)(model.config, len(part), device, weight.dtype)
        logits, _ = model(x, cache)
        losses.append(F.cross_entropy(logits.float().transpose(1, 2), y, reduction="none").mean(1))
        slots.append(cache.lengths.transpose(0, 1))
    slots = torch.cat(slots).double()
    return torch.cat(losses).double().mean().item(), (T / slots.mean()).item(), (T / slots.mean(0)).tolist()


# ------------------------------------------------------------------------------------------------ a run

BEGINNING = {"phase": 0, "step": 0, "seconds": 0.0, "tensors": None}      # the state of a phase, or a run, that has not begun
CHANGEABLE = {"lr", "clip", "save_every", "log_every", "solidify"}         # settings that --resume may give anew


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end."""


@contextmanager
def writing(folder):
    """Raises InputError where something in the folder cannot be written."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:      # the last from all cards, with the reasons in it
        reason = [line for line in str(error).splitlines() if "Error" in line] or [one_line(error)]
        raise InputError(f"{folder} cannot be written ({reason[-1].strip()[:200]}); free some space, then --resume: the state "
                         "saved before is whole.") from None


def device_of_this_process():
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def ready(model):
    """The model, with what lies between its matrix products compiled where that pays: on a GPU."""
    if next(model.parameters()).is_cuda:
        for layer in model.layers:
            for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
                part.compile()
    return model


def flops_per_token(config, context):
    """Of a step, forward and backward: 6 per parameter, and causal attention's."""
    with torch.device("meta"):
        n = sum(p.numel() for p in Transformer(config).parameters())
    return 6 * n + 6 * config.n_layer * config.n_head * config.head_dim * context


PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}        # bf16, dense, of the SXM cards


def flops_share(per_second):
    """MFU: the share of the card's peak, or None for a card without a known one."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((round(per_second / peak, 3) for card, peak in PEAK_FLOPS.items() if card in name), None)


def peak_memory():
    """Bytes: what PyTorch's tensors took on the card at most, or the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Run:
    """A run in its folder: trains the phases in order, can stop after any step and go on from the last saved state."""

    def __init__(self, settings, out, memory=None):
        self.rank, self.cards = cards()
        self.started, self.seconds_before = time.perf_counter(), 0.0       # of this sitting, and those before it
        self.settings, self.out = settings, Path(out)
        self.given = locate(settings.init).resolve() if settings.init and not settings.random_weights else None
        self.phases = plan(settings, self.given)
        self.device = device_of_this_process()
        config = self.check_given()
        if settings.batch % (self.cards * (settings.micro_batch or 1)):
            raise InputError(f"--batch {settings.batch} cannot be shared by {self.cards} cards with --micro-batch "
                             f"{settings.micro_batch}; choose a multiple.")
        check_memory(memory_plan(config, settings, self.cards), memory or free_memory())
        self.flops = flops_per_token(config, settings.context)
        self.tokenizer = Tokenizer.from_folder(self.given) if self.given else Tokenizer.bytes()
        for turn in range(min(self.cards, 2)):          # the first process tokenizes, the others find it done
            if turn == min(self.rank, 1):
                self.train_tokens, self.val_tokens, self.key = load_data(settings, self.given, self.known_key())
            self.wait()
        self.stop, self.metrics = False, None
        self.pace = {}               # with decisions or not -> (steps, seconds), of this sitting
        self.recent, self.shown = [], 0        # losses since the last line on the screen; lines so far

    # --- files

    def check_given(self):
        """The Config to start from. Raises InputError where the model given cannot be retrofitted."""
        s = self.settings
        if not s.init:
            return s.small_config()
        config = dmc.read_config(self.given) if self.given else random_model(s.init, device="meta").config
        if config.dmc:
            raise InputError(f"{self.given} is a DMC model already; give the plain model that it was made of.")
        if s.context > config.max_seq_len:
            raise InputError(f"--context {s.context} is more than the model's {config.max_seq_len} positions; lower it.")
        return config

    def wait(self):
        """Until all cards are here."""
        if self.cards > 1:
            dist.barrier()

    def write_json(self, path, value):
        if self.rank == 0:
            write_json(path, value)

    def begin(self):
        """Claim the folder; a run that is already there is never touched."""
        if (self.out / "run.json").exists():
            raise InputError(f"{self.out} already holds a run; add --resume to continue it, or choose another --out.")
        self.wait()
        self.write_json(self.out / "run.json", self.facts())
        self.execute(BEGINNING)

    def known_key(self):
        """The key of the text that the run in the folder began with, if there is one."""
        return str(read_json(self.out / "run.json").get("text")) if (self.out / "run.json").exists() else None

    def facts(self):
        return {"settings": asdict(self.settings), "train_tokens": len(self.train_tokens), "text": self.key}

    def resume(self):
        """Go on from the last saved state, or from the start where nothing was saved yet."""
        if self.known_key() != self.key:
            raise InputError(f"the text is not the one that {self.out} was trained on; restore it, or start a new run.")
        state = read_json(self.out / "state.json") if (self.out / "state.json").exists() else BEGINNING
        self.wait()
        self.write_json(self.out / "run.json", self.facts())       # a few settings may have changed
        self.seconds_before = state["seconds"]
        self.execute(state)

    def load_state(self, state, model, optimizer):
        """Read the tensors of a state into a model and its optimizer, from however many cards it was saved."""
        path = self.out / state["tensors"]
        try:
            dcp.load(states(model, optimizer), checkpoint_id=path, no_dist=self.cards == 1)
        except (Exception, CheckpointException) as error:      # many kinds for a damaged file
            raise InputError(f"{path} is damaged ({type(error).__name__}); start a new run.") from None
        for moments in optimizer.state.values():
            moments["step"].fill_(state["step"])

    def save_state(self, index, step, model=None, optimizer=None):
        """state.json names the folder with the tensors, and is replaced when that is whole: so a kill at any moment, or a
        disk that is full, leaves the old state or the new one."""
        name = f"state-{index}-{step}" if model is not None else None
        with writing(self.out):
            if name and name != self.saved["tensors"]:
                self.remove_states()
                try:
                    dcp.save(states(model, optimizer), checkpoint_id=self.out / name, no_dist=self.cards == 1)
                except (Exception, CheckpointException):
                    shutil.rmtree(self.out / name, ignore_errors=True)
                    raise
            if self.rank == 0:
                os.fsync(self.metrics.fileno())           # the curve is on disk before the state that continues it
        self.saved = {"phase": index, "step": step, "seconds": self.seconds(), "tensors": name}
        self.write_json(self.out / "state.json", self.saved)
        self.remove_states()
        self.wait()

    def remove_states(self):
        for folder in self.out.glob("state-*") if self.rank == 0 else ():
            if folder.name != self.saved["tensors"]:
                shutil.rmtree(folder)
        self.wait()

    def save_model(self, model, folder, **facts):
        model = gathered(model) if self.cards > 1 else model
        if self.rank == 0:
            dmc.save(model, self.out / folder, self.tokenizer, **facts)
        self.wait()

    # --- training

    def execute(self, state):
        """All phases from where `state` was saved; then the table."""
        self.saved = state
        for index in range(state["phase"], len(self.phases)):
            self.train(index, state)
            state = BEGINNING
        self.report()

    def train(self, index, state):
        """One phase: from its start's weights, or in mid-phase from the saved state."""
        phase, s, step = self.phases[index], self.settings, state["step"]
        model = self.build(phase)
        optimizer = new_optimizer(model, s, self.passes_per_step)
        if state["tensors"]:
            self.load_state(state, model, optimizer)
        if self.metrics is None:                     # only now is it sure that the run can go on from here
            self.metrics = self.open_metrics(index, step)
        while step < phase.steps:
            began = time.perf_counter()
            try:
                loss, cr, heads = train_step(model, optimizer, phase, step, self.passes(index, step), s)
            except Stopped:
                self.save_state(index, step, model, optimizer)
                raise
            except FloatingPointError as error:
                good = f"before step {self.saved['step']} of {self.phases[self.saved['phase']].name}"
                raise InputError(f"{error} at step {step} of {phase.name}, batch {phase.position + step} of the data; the last "
                                 f"good state, {good}, is kept: --resume with a lower --lr or --clip.") from None
            self.clock(phase.dmc, time.perf_counter() - began)
            self.record(index, step, loss, cr, heads)
            step += 1
            if step in phase.keep:
                self.save_model(model, phase.keep[step], phase=phase.name, target_cr=phase.target(step - 1), cr=cr)
            if step < phase.steps and step % s.save_every == 0:
                self.save_state(index, step, model, optimizer)
        del optimizer                    # whose memory the evaluation may need
        if phase.fade:
            for rows in control_rows(model):
                rows.zero_()
        if phase.out:
            loss, cr, heads = evaluate(model, self.val_tokens, s)
            if phase.weights == phase.out:
                facts = {"phase": phase.name, "target_cr": phase.cr and phase.cr[1], "cr": cr} if phase.dmc else {}
                self.save_model(model, phase.out, **facts)
            self.write_json(self.out / phase.out / "figures.json", {"loss": loss, "cr": cr, "heads": heads})
            print(f"{'':<12}validation {loss:.4f} nats per {self.unit} at CR {cr:.2f} -> {self.out / phase.out}", flush=True)
        self.save_state(index + 1, 0)
        self.stop_if_asked()

    def build(self, phase):
        """The model that a phase starts with."""
        s, ops, alone = self.settings, OPS[self.settings.ops], self.cards == 1
        if phase.start is not None:
            own = (self.device, s.dtype) if alone else (None, None)
            model = dmc.load(self.out / phase.start, ops, *own, **s.method(phase.dmc))
        else:
            torch.manual_seed(s.seed)
            model = random_model(s.init, ops, dtype=s.dtype) if s.init else Transformer(s.small_config(), ops).to(s.dtype)
        return ready(model.to(self.device) if alone else share_out(model, s.dtype, self.device))

    @property
    def passes_per_step(self):
        s = self.settings
        return s.batch // self.cards // (s.micro_batch or s.batch // self.cards)

    def passes(self, index, step):
        """What `train_step` makes its gradient of: the number of passes, and the inputs and targets of each."""
        s, position, count = self.settings, self.phases[index].position + step, self.passes_per_step
        size = s.batch // self.cards // count
        for row in range(self.rank * count * size, (self.rank + 1) * count * size, size):
            self.stop_if_asked()
            x, y = batch(self.train_tokens, s, position, self.device, range(row, row + size))
            seed = [s.seed, index, step] + ([row] if row else [])
            torch.manual_seed(int(np.random.default_rng(seed).integers(2 ** 63)))      # the decisions' noise
            yield count, x, y

    def stop_if_asked(self):
        """Raises Stopped once a signal came to any card. Called where nothing is half done."""
        if over_cards(torch.tensor(float(self.stop))).item():
            raise Stopped

    def seconds(self):
        return self.seconds_before + time.perf_counter() - self.started

    def clock(self, decided, seconds):
        steps, total = self.pace.get(decided, (0, 0.0))
        self.pace[decided] = steps + 1, total + seconds

    def seconds_left(self, index, step):
        """What the pace so far promises; a step with decisions counts as 1.7 plain ones until one was timed."""
        def per_step(decided):
            factor = 1.0 if decided in self.pace else 1.7 if decided else 1 / 1.7
            steps, seconds = self.pace.get(decided) or self.pace[not decided]
            return seconds / steps * factor
        return sum((phase.steps - (step + 1 if i == index else 0)) * per_step(phase.dmc)
                   for i, phase in enumerate(self.phases) if i >= index)

    # --- what is written and shown

    def record(self, index, step, loss, cr, heads):
        """A line of metrics.jsonl for every step, and now and then one on the screen with the mean loss since the last."""
        phase, s = self.phases[index], self.settings
        entry = {"index": index, "phase": phase.name, "step": step, "loss": loss, "target_cr": phase.target(step), "cr": cr,
                 "lr": phase.learning_rate(step, s.warmup)}
        tokens_per_second = s.batch * s.context / (self.pace[phase.dmc][1] / self.pace[phase.dmc][0])
        mfu = flops_share(tokens_per_second * self.flops / self.cards)
        entry |= {"tokens_per_second": round(tokens_per_second), "mfu": mfu, "peak_gb": round(peak_memory() / 1e9, 2)}
        if heads and (step + 1 in phase.keep or step % s.log_every == 0 or step + 1 == phase.steps):
            entry["heads"] = [[round(cr, 3) for cr in layer] for layer in heads]
        with writing(self.out):
            self.metrics.write(json.dumps(entry) + "\n")
        self.recent.append(loss)
        if (step + 1) % s.log_every == 0 or step + 1 == phase.steps:
            left = self.seconds_left(index, step)
            if self.shown % 25 == 0:
                print(f"{'phase':<12}{'step':>11}{'loss':>8}{'target':>8}{'CR':>7}{'lr':>10}{'tokens/s':>10}{'MFU':>6}{'GB':>7}"
                      f"{'left':>7}")
            name = phase.name + (f" {phase.cr[1]:g}" if phase.name == "solidify" else "")
            ratios = f"{entry['target_cr']:8.2f}{cr:7.2f}" if cr else f"{'-':>8}{'-':>7}"
            print(f"{name:<12}{step + 1:>6}/{phase.steps:<4}{np.mean(self.recent):8.4f}{ratios}{entry['lr']:10.1e}"
                  f"{tokens_per_second:10,.0f}{'-' if mfu is None else f'{mfu:.0%}':>6}{entry['peak_gb']:7.1f}"
                  f"{left // 60:4.0f}:{left % 60:02.0f}", flush=True)
            self.shown, self.recent = self.shown + 1, []

    def open_metrics(self, index, step):
        """metrics.jsonl to append to, without the lines of steps that are trained again: the curve has each step once."""
        if self.rank:
            return Path(os.devnull).open("a")  # noqa: SIM115 - closed with the run
        path = self.out / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        kept = [line for line in lines if (line["index"], line["step"]) < (index, step)]
        last_shown = step - step % self.settings.log_every
        self.recent = [line["loss"] for line in kept if line["index"] == index and line["step"] >= last_shown]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(path, lambda f: f.write_text(text))
        return path.open("a", buffering=1)  # noqa: SIM115

    @property
    def unit(self):
        return "token" if self.given else "byte"

    def figures(self, folder):
        """What was measured when a phase ended: a dict with loss, cr and heads."""
        return read_json(self.out / folder / "figures.json")

    def report(self):
        """Print the table and the heat map, write summary.json. Averaging without learning is measured here: the control (or
        where there is none the model given) with every n tokens averaged, n the nearest whole number to each model's CR."""
        baseline = self.phases[-1] if self.phases[-1].name == "control" else self.phases[0]
        plain = self.build(replace(baseline, start=baseline.weights))
        plain.config = replace(plain.config, **self.settings.method(dmc=False))      # the window to average over
        summary = {"unit": self.unit, "pretrained": self.figures("pretrained")["loss"], "dmc": []}
        if baseline.name == "control":
            summary["control"] = self.figures("control")["loss"]
        for target in self.settings.solidified():
            self.stop_if_asked()
            entry = self.figures(f"cr{target:g}")
            pooling = pooling_cache(plain.Cache, every=max(1, round(entry["cr"])))
            pooled = evaluate(plain, self.val_tokens, self.settings, pooling)[0]
            summary["dmc"].append({"target": target, **entry, "pooling": pooled})
        summary |= {"seconds": self.seconds(), "settings": asdict(self.settings), **provenance()}
        self.write_json(self.out / "summary.json", summary)
        print(table(summary))
        print(heat_map(summary["dmc"][-1]["heads"]))
        print(f"\n{summary['seconds']:.0f} s. Everything is in {self.out}. Next: "
              f"python generate.py --ckpt {shlex.quote(str(self.out))}")


def table(summary):
    """The final table as text: validation loss in nats per byte or token, and its distance to the control, or where there
    was none to the pretrained model."""
    rows, baseline = [("pretrained", 1.0, summary["pretrained"])], "pretrained"
    if "control" in summary:
        rows.append(("control, trained on without compression", 1.0, summary["control"]))
        baseline = "control"
    for entry in summary["dmc"]:
        rows.append((f"DMC {entry['target']:g}x", entry["cr"], entry["loss"]))
        rows.append((f"{baseline}, every {round(entry['cr'])} tokens averaged", float(round(entry["cr"])), entry["pooling"]))
    lines = [f"\n{'validation, through the cache':<42}{'CR':>6}{'nats/' + summary['unit']:>11}{'to ' + baseline:>14}"]
    return "\n".join(lines + [f"{name:<42}{cr:6.2f}{loss:11.4f}{loss - summary[baseline]:+14.4f}" for name, cr, loss in rows])


def heat_map(heads):
    """The CR of every layer (row) and head (column); the darker, the more a head merges."""
    shade = lambda cr: " ░▒▓█"[min(4, int(math.log2(max(cr, 1.0)) + 0.5))]
    lines = ["\nCR of each layer and head (shades: 1, 2, 4, 8, 16 and more)"]
    lines.append("layer " + "".join(f"{'head ' + str(h):>9}" for h in range(len(heads[0]))))
    return "\n".join(lines + [f"{i:5} " + "".join(f" {shade(cr) * 2}{cr:6.1f}" for cr in row) for i, row in enumerate(heads)])


# ------------------------------------------------------------------------------------------------ speed

def measure_speed(s, steps, out):
    """`steps` steps of a known shape with random weights and random tokens, plain and with DMC: speed and memory of a card, as
    OUT/bench.json. The first three steps, which compile, are left out of the times."""
    device, (rank, count), figures = device_of_this_process(), cards(), {}
    share = s.batch // count
    size = s.micro_batch or share
    if steps < 4 or not s.init or s.batch % (count * size):
        raise InputError("--bench needs 4 or more steps, --init llama2-7b or the like, and a --batch that divides evenly.")
    for name in ("plain", "dmc"):
        config = random_model(s.init, device="meta").config
        check_memory(memory_plan(config, s, count), free_memory())
        phase = Phase(name, None, None, steps, 0, 0, s.lr, dmc=name == "dmc", cr=(1.0, s.cr) if name == "dmc" else None)
        torch.manual_seed(s.seed)
        ops, place = OPS[s.ops], device if count == 1 else None
        whole = random_model(s.init, ops, place, s.dtype, **s.method(phase.dmc))
        model = ready(whole if count == 1 else share_out(whole, s.dtype, device))
        optimizer, seconds = new_optimizer(model, s, share // size), []
        torch.manual_seed(s.seed + rank)
        for step in range(steps):
            began = time.perf_counter()
            x = torch.randint(config.vocab_size, (share, s.context + 1), device=device)
            passes = [(share // size, part[:, :-1], part[:, 1:]) for part in x.split(size)]
            loss, *_ = train_step(model, optimizer, phase, step, passes, s)
            seconds.append(time.perf_counter() - began)
            print(f"{name:<6}{step + 1:>4}/{steps}  loss {loss:.4f}  {seconds[-1]:.3f} s", flush=True)
        per_step = float(np.median(seconds[3:]))
        speed = s.batch * s.context / per_step
        figures[name] = {"seconds_per_step": per_step, "tokens_per_second": speed, "peak_gb": peak_memory() / 1e9,
                         "loss": loss, "mfu": flops_share(speed * flops_per_token(config, s.context) / count)}
        del whole, model, optimizer
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    ratio = figures["dmc"]["seconds_per_step"] / figures["plain"]["seconds_per_step"]
    print("\n".join(f"{name:<6}{f['tokens_per_second']:10,.0f} tokens/s, MFU {f['mfu']}, peak {f['peak_gb']:.1f} GB"
                    for name, f in figures.items()) + f"\na DMC step takes {ratio:.3f} times a plain one")
    if rank == 0:
        facts = {"dmc_to_plain": ratio, "cards": count, "settings": asdict(s), **provenance()}
        write_json(out / "bench.json", {**figures, **facts})


# ------------------------------------------------------------------------------------------------ plots

def plot(folders):
    """Losses, target and reached CR, and the CR of each layer and head as it developed (figures 6 and 7 of the paper), of one
    or more runs side by side: plot.png in the first one's folder."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib, which is not installed; pip install matplotlib.") from None
    figure = Figure(figsize=(6.4 * len(folders), 15), layout="constrained")
    grid = figure.subplots(4, len(folders), squeeze=False, sharey="row" if len(folders) > 1 else False)
    for folder, axes in zip(folders, grid.T, strict=True):
        entries = [json.loads(line) for line in read_lines(folder / "metrics.jsonl") if line.endswith("}")]
        if not any("heads" in e for e in entries):
            raise InputError(f"{folder / 'metrics.jsonl'} has no step with decisions yet; let the run get to its retrofit.")
        starts = {i: phase.position for i, phase in enumerate(plan(Settings(**read_json(folder / "run.json")["settings"])))}
        plot_curves(axes[0], axes[1], entries, starts)
        axes[0].set_title(str(folder))
        retrofit = [e for e in entries if e["phase"] == "retrofit" and "heads" in e] or [e for e in entries if "heads" in e]
        plot_layers(figure, axes[2], retrofit)
        plot_heads(figure, axes[3], next(e for e in reversed(entries) if "heads" in e))
    figure.savefig(folders[0] / "plot.png", dpi=110)
    print(f"{folders[0] / 'plot.png'} shows {len(folders)} run{'s' if len(folders) > 1 else ''}.")


def plot_curves(losses, ratios, entries, starts):
    """The running mean loss of every phase, and of those with decisions the target CR and the reached one, over the step of
    the data: phases that start from the same weights start at the same place."""
    for index in sorted({e["index"] for e in entries}):
        part = [e for e in entries if e["index"] == index]
        steps = starts[index] + np.array([e["step"] for e in part])
        width = max(1, len(part) // 25)
        mean = np.convolve([e["loss"] for e in part], np.ones(width) / width, mode="valid")
        fixed = part[0]["phase"] == "solidify"
        name, colour = part[0]["phase"] + (f" {part[0]['target_cr']:g}" if fixed else ""), f"C{index}"
        losses.plot(steps[width - 1:], mean, colour, label=name)
        if part[0]["target_cr"]:
            ratios.plot(steps, [e["cr"] for e in part], colour, lw=0.8, label=name)
            ratios.plot(steps, [e["target_cr"] for e in part], colour, ls="--", lw=1.5)
    losses.set(ylabel="LM loss, running mean")
    ratios.set(xlabel="step", ylabel="CR; dashed: target")
    for axis in (losses, ratios):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)


def draw_ratios(figure, axis, values, label):
    """A matrix of CRs as colours, on a logarithmic scale that is the same in every plot."""
    image = axis.imshow(np.array(values), aspect="auto", origin="lower", norm="log", cmap="magma_r", interpolation="nearest")
    image.set_clim(1, 64)
    bar = figure.colorbar(image, ax=axis, label=label, ticks=[1, 2, 4, 8, 16, 32, 64])
    bar.ax.set_yticklabels(["1", "2", "4", "8", "16", "32", "64"])
    bar.ax.minorticks_off()


def plot_layers(figure, axis, entries):
    """Figure 7: the CR of each layer, a row, at growing CRs of the whole model, the columns."""
    draw_ratios(figure, axis, np.array([1 / (1 / np.array(e["heads"])).mean(1) for e in entries]).T, "CR of a layer")
    shown = np.unique(np.linspace(0, len(entries) - 1, min(8, len(entries))).round().astype(int))
    axis.set_xticks(shown, [f"{entries[i]['cr']:.2f}" for i in shown])
    axis.set(xlabel="CR of the whole model as the retrofit goes on", ylabel="layer")
    axis.yaxis.get_major_locator().set_params(integer=True)


def plot_heads(figure, axis, entry):
    """Figure 6: the CR of each layer, a row, and head, a column, sorted within a layer as the order of heads means nothing."""
    draw_ratios(figure, axis, np.sort(entry["heads"], axis=1)[:, ::-1], "CR of a head")
    axis.set(xlabel=f"heads of a layer, from the most compressed; {entry['phase']} at CR {entry['cr']:.2f}", ylabel="layer")
    for locator in (axis.xaxis.get_major_locator(), axis.yaxis.get_major_locator()):
        locator.set_params(integer=True)


# ------------------------------------------------------------------------------------------------ command line

def parse(argv):
    """Returns the flags that were given, as a dict, and the namespace of those that are no setting."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", type=Path, help="folder of the run [runs/1, or the next number that is free]")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, or the newest one")
    parser.add_argument("--preset", choices=PRESETS, help="which defaults: the small model's, the paper's for a size of Llama "
                        "2, or a short schedule [the paper's with --init llama2-7b, -13b or -70b; else laptop]")
    parser.add_argument("--memory", type=float, metavar="GB", help="what each card may hold [what is free]")
    parser.add_argument("--plot", type=Path, nargs="+", metavar="RUN", help="draw what runs did so far, as RUN/plot.png; stop")
    parser.add_argument("--bench", type=int, metavar="STEPS", help="measure so many steps of --init llama2-7b or the like with "
                        "random weights, plain and with DMC, write bench.json into --out, and stop")
    for f in fields(Settings):
        kind = {"type": f.type} if f.type in (int, float) else {}
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, **kind, **f.metadata["argument"])
    options = vars(parser.parse_args(argv))
    for name in {"keep", "solidify"} & options.keys():
        try:
            options[name] = [float(cr) for part in options[name] for cr in part.split(",") if cr]
        except ValueError:
            raise InputError(f"--{name} {' '.join(options[name])} is no list of ratios; give one such as 2,3,4.") from None
    run = argparse.Namespace(**{name: options.pop(name) for name in ("out", "resume", "preset", "memory", "plot", "bench")})
    return options, run


def open_run(argv):
    """The Run that the command line asks for, if any, and the function that carries it out."""
    given, options = parse(argv)
    if options.plot:
        return None, partial(plot, options.plot)
    memory = options.memory and options.memory * 1e9
    if not options.resume:
        defaults = PRESETS[options.preset or (given["init"] if given.get("init") in PRESETS else "laptop")]
        if given.get("init") and (sized := {"layers", "heads", "kv_heads", "dim", "ffn_dim", "pretrain_steps"} & given.keys()):
            raise InputError(f"{flag(min(sized))} is for the small model; leave it out with --init, which brings its own.")
        if options.bench is not None:
            return None, partial(measure_speed, Settings(**{**defaults, **given}), options.bench, options.out or Path("runs"))
        numbers = [int(p.name) for p in runs_by_number()]
        run = Run(Settings(**{**defaults, **given}), options.out or Path("runs") / str(max(numbers, default=0) + 1), memory)
        return run, run.begin
    out = options.out or next(reversed(runs_by_number()), None)
    if out is None:
        raise InputError("there is no run to resume in runs; give its folder with --out.")
    saved = read_json(out / "run.json")["settings"]
    for name, value in given.items():
        if saved[name] != value and name not in CHANGEABLE:
            raise InputError(f"{flag(name)} was {saved[name]} when {out} began; resume without it, or start a new run.")
    before, settings = Settings(**saved), Settings(**{**saved, **given})
    if plan(replace(settings, lr=before.lr))[:len(plan(before))] != plan(before):
        raise InputError("--solidify can name more CRs only behind those that it named before, and without a control; start a "
                         "new run.")
    run = Run(settings, out, memory)
    return run, run.resume


def main(argv=None):
    torch.set_flush_denormal(True)      # products of many small alphas are denormal, which CPUs are slow at
    sys.stdout.reconfigure(errors="replace")      # a terminal that cannot show a character shows ? instead
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")       # it is, where there is one process
    warnings.formatwarning = lambda message, *_: f"train.py: warning: {message}\n"
    run = None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(device_of_this_process())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - as long as the process lives
    try:
        run, carry_out = open_run(argv)
        for interruption in (signal.SIGINT, signal.SIGTERM) if run else ():
            signal.signal(interruption, lambda *_: setattr(run, "stop", True))
        carry_out()
        return 0
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nStopped, and saved. To go on: python train.py --resume --out {shlex.quote(str(run.out))}" if run else "")
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
