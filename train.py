"""Retrofit a Llama with DMC. From nothing to a table, on a laptop: `python train.py`. A real one: `--init FOLDER`.

Five phases, each of which starts from the weights that an earlier one left behind:

    pretrain   a small plain Llama learns the text; with --init, the model given is measured instead
    free       Eq. 12 fades the control channels out of the scores; then the rows that feed them are set to zero
    retrofit   decisions are on, and the target CR rises linearly from 1; at each whole CR a copy of the weights is kept
    solidify   each kept copy trains on at its fixed CR while the learning rate decays
    control    the pretrained model trained for as many further steps without compression, to compare with; with --init
               only if --control asks for it

Everything is written to --out: `run.json` (the settings), `metrics.jsonl` (a line per step), `state.pt` (what --resume
needs), a folder of weights per model, and `summary.json` (the final table).
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
import shlex
import shutil
import signal
import sys
import sysconfig
import time
import warnings
import zlib
from array import array
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import dmc
import dmc_fast
from dmc import Config, InputError, Tokenizer, Transformer, read_json, write_atomically, write_json
from generate import Parser, locate, provenance, random_model, read_lines, runs_by_number

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
    keep: list = setting(None, "CRs at which a model is kept and solidified, as in 2,3,4 [2, 3, ... and --cr]", nargs="+",
                         metavar="CR")
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
        if self.random_weights and not self.init:
            raise InputError("--random-weights needs the name of a shape; add --init llama2-7b.")
        if self.micro_batch and self.batch % self.micro_batch:
            raise InputError(f"--batch {self.batch} is no multiple of --micro-batch {self.micro_batch}; choose one that is.")
        self.small_config()       # raises where the sizes contradict each other

    def kept(self):
        """The CRs that the run yields a model of, in rising order."""
        return sorted(set(self.keep)) if self.keep else [float(cr) for cr in range(2, math.ceil(self.cr))] + [self.cr]

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
    except (EOFError, lzma.LZMAError, zlib.error) as error:
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
    def digest(path):
        try:
            with path.open("rb") as f:
                whole = hashlib.blake2b()
                while block := f.read(2 ** 20):
                    whole.update(block)
                return whole.digest()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); check --data.") from None

    with ThreadPoolExecutor() as pool:
        parts = [whole + "".join(path.suffixes[-2:]).encode() for path, whole in zip(files, pool.map(digest, files), strict=True)]
    tokenizer = tokenizer_of(folder)
    parts += [tokenizer.files["tokenizer.json"], json.dumps([tokenizer.special_ids, field]).encode()]
    return hashlib.blake2b(b"".join(hashlib.blake2b(part).digest() for part in parts), digest_size=12).hexdigest()


def prepare(files, folder, field, cache):
    """Tokenize into cache/KEY, unless that is done: tokens.npy and, since documents differ in length, ends.npy. Returns KEY."""
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
        np.save(partial_folder / "ends.npy", np.array(ends))
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
    ends = np.load(cache / key / "ends.npy")
    empty = not (cache / key / "tokens").stat().st_size        # which cannot be mapped
    tokens = np.zeros(0) if empty else np.memmap(cache / key / "tokens", np.uint16 if small else np.uint32, mode="r")
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
    if s.data:
        n = (len(tokens) - 1) // T
        places = (divmod(position * s.batch + row, n) for row in range(s.batch))
        starts = np.array([shuffled(s.seed, epoch, n)[i] * T for epoch, i in places])
    else:
        starts = np.random.default_rng([s.seed, position]).integers(0, len(tokens) - T, s.batch)
    return sequences(tokens, starts if rows is None else starts[rows.start:rows.stop], T, device)


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
    for cr, step in reach.items():           # with a control, all end after as many steps as it, which makes them comparable
        steps = s.solidify_steps + (s.retrofit_steps - step if control else 0)
        phases.append(Phase("solidify", f"retrofit-{cr:g}", f"cr{cr:g}", steps, retrofit_at + step, steps, s.lr, cr=(cr, cr)))
    if control:
        phases.append(Phase("control", start, "control", s.free_steps + s.retrofit_steps + s.solidify_steps, free_at,
                            s.solidify_steps, s.lr, dmc=False))
    return phases


# ------------------------------------------------------------------------------------------------ optimizer

def new_optimizer(model, s, passes=1):
    """AdamW; decay on matrices only. The learning rate is set at each step. passes: how many add up to a gradient."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if s.lean:
        return RoundingAdamW(groups, betas=(0.9, s.beta2), eps=s.eps, sums=passes > 1)
    return torch.optim.AdamW(groups, betas=(0.9, s.beta2), eps=s.eps, fused=True)


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
            self.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            if sums:
                self.sums[p] = torch.zeros_like(p, dtype=torch.float32)
                p.register_post_accumulate_grad_hook(partial(add_gradient, self.sums[p]))
        self.update = torch.compile(adamw) if p.is_cuda else adamw

    def parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    def gradient(self, p):
        return self.sums[p] if self.sums else p.grad

    def zero_grad(self):
        super().zero_grad()
        for total in self.sums.values():
            total.zero_()

    def clip(self, largest):
        """The norm of the whole gradient; the next step scales it down to `largest`."""
        norms = [torch.linalg.vector_norm(self.gradient(p), dtype=torch.float32) for p in self.parameters()]
        norm = torch.linalg.vector_norm(torch.stack(norms))
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
                numbers = torch.tensor([1 - lr * group["weight_decay"], lr / (1 - beta1 ** n), beta1, beta2, 1 / (1 - beta2 ** n),
                                        group["eps"]]).to(p.device, non_blocking=True)
                numbers = torch.cat([self.factor.view(1), numbers])
                flat = (x.view(-1).split(self.CHUNK) for x in (p, self.gradient(p), state["exp_avg"], state["exp_avg_sq"]))
                for w, grad, m, v in zip(*flat, strict=True):
                    bits = torch.empty_like(w, dtype=torch.int32).random_(-2 ** 31, 2 ** 31)
                    self.update(w, grad, m, v, bits, numbers)


def add_gradient(total, p):
    total += p.grad
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
                         "free; lower --micro-batch or --context, take --precision bf16, or share it among cards with torchrun.")


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
    """One update, from the gradients of `passes`: pairs of inputs and targets, equally many sequences each. Returns the LM loss
    in nats per token, the gradient's norm before clipping, and the CR that the noisy decisions reached, in all and for each
    layer and head, or None for both."""
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
    rows = model.control_rows() if alpha is not None else []
    before = [row.clone() for row in rows]
    optimizer.step()
    for row, old in zip(rows, before, strict=True):
        row.copy_(torch.lerp(old, row, s.channel_lr_factor))
    lm_loss, kept, heads = (None if x[0] is None else torch.stack(x).mean(0) for x in zip(*figures, strict=True))
    return lm_loss.item(), norm.item(), None if kept is None else 1 / kept.item(), None if kept is None else (1 / heads).tolist()


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

BEGINNING = {"phase": 0, "step": 0, "seconds": 0.0}      # the state of a phase, or a run, that has not begun


class Run:
    """A run in its folder: trains the phases in order, can stop after any step and go on from the last saved state."""

    def __init__(self, settings, out, memory=None):
        self.started, self.seconds_before = time.perf_counter(), 0.0       # of this sitting, and those before it
        self.settings, self.out = settings, Path(out)
        self.given = locate(settings.init).resolve() if settings.init and not settings.random_weights else None
        self.phases = plan(settings, self.given)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        check_memory(memory_plan(self.check_given(), settings), memory or free_memory())
        self.tokenizer = Tokenizer.from_folder(self.given) if self.given else Tokenizer.bytes()
        self.train_tokens, self.val_tokens, self.key = load_data(settings, self.given, self.known_key())
        self.stop = False
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

    def begin(self):
        """Claim the folder; a run that is already there is never touched."""
        if (self.out / "run.json").exists():
            raise InputError(f"{self.out} already holds a run; add --resume to continue it, or choose another --out.")
        write_json(self.out / "run.json", self.facts())
        self.execute(BEGINNING)

    def known_key(self):
        """The key of the text that the run in the folder began with, if there is one."""
        return read_json(self.out / "run.json")["text"] if (self.out / "run.json").exists() else None

    def facts(self):
        return {"settings": asdict(self.settings), "train_tokens": len(self.train_tokens),
                "text": self.key}

    def resume(self):
        """Go on from the last saved state, or from the start where nothing was saved yet."""
        if self.known_key() != self.key:
            raise InputError(f"the text is not the one that {self.out} was trained on; restore it, or start a new run.")
        path = self.out / "state.pt"
        state = BEGINNING
        if path.exists():
            try:
                state = torch.load(path, map_location=self.device, weights_only=True)
            except Exception as error:      # torch raises many kinds for a damaged file
                raise InputError(f"{path} is damaged ({type(error).__name__}); start a new run.") from None
        self.seconds_before = state["seconds"]
        self.execute(state)

    def save_state(self, phase, step, model=None, optimizer=None):
        state = {"phase": phase, "step": step, "seconds": self.seconds()}
        if model is not None:
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        os.fsync(self.metrics.fileno())           # the curve is on disk before the state that continues it
        write_atomically(self.out / "state.pt", lambda f: torch.save(state, f))

    def save_model(self, model, folder, **facts):
        dmc.save(model, self.out / folder, self.tokenizer, **facts)

    # --- training

    def execute(self, state):
        """All phases from where `state` was saved; then the table."""
        self.trim_metrics(state["phase"], state["step"])
        with (self.out / "metrics.jsonl").open("a", buffering=1) as self.metrics:
            for index in range(state["phase"], len(self.phases)):
                self.train(index, state)
                state = BEGINNING
        self.report()

    def train(self, index, state):
        """One phase: from its start's weights, or in mid-phase from the saved state."""
        phase, s, step = self.phases[index], self.settings, state["step"]
        model = self.build(phase)
        optimizer = new_optimizer(model, s, passes=s.batch // (s.micro_batch or s.batch))
        if "model" in state:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        while step < phase.steps:
            began = time.perf_counter()
            loss, norm, cr, heads = train_step(model, optimizer, phase, step, self.passes(index, step), s)
            if not math.isfinite(loss + norm):
                raise InputError(f"the loss is {loss} at step {step} of {phase.name}; lower the learning rate.")
            self.clock(phase.dmc, time.perf_counter() - began)
            self.record(index, step, loss, cr)
            step += 1
            if step in phase.keep:
                self.save_model(model, phase.keep[step], phase=phase.name, target_cr=phase.target(step - 1), cr=cr)
            if step < phase.steps and (self.stop or step % s.save_every == 0):
                self.save_state(index, step, model, optimizer)
            self.stop_if_asked()
        if phase.fade:
            model.clear_control_rows()
        if phase.out:
            loss, cr, heads = evaluate(model, self.val_tokens, s)
            if phase.weights == phase.out:
                facts = {"phase": phase.name, "target_cr": phase.cr and phase.cr[1], "cr": cr} if phase.dmc else {}
                self.save_model(model, phase.out, **facts)
            write_json(self.out / phase.out / "figures.json", {"loss": loss, "cr": cr, "heads": heads})
            print(f"{'':<12}validation {loss:.4f} nats per {self.unit} at CR {cr:.2f} -> {self.out / phase.out}", flush=True)
        self.save_state(index + 1, 0)
        self.stop_if_asked()

    def build(self, phase):
        """The model that a phase starts with."""
        s = self.settings
        ops = dmc_fast if s.lean else dmc
        if phase.start is not None:
            return dmc.load(self.out / phase.start, ops, self.device, s.dtype, **s.method(phase.dmc))
        torch.manual_seed(s.seed)
        model = random_model(s.init, ops, dtype=s.dtype) if s.init else Transformer(s.small_config(), ops).to(s.dtype)
        return model.to(self.device)

    def passes(self, index, step):
        """What `train_step` makes its gradient of: the number of passes, and the inputs and targets of each."""
        s, position = self.settings, self.phases[index].position + step
        size = s.micro_batch or s.batch
        for row in range(0, s.batch, size):
            x, y = batch(self.train_tokens, s, position, self.device, range(row, row + size))
            seed = [s.seed, index, step] + ([row] if row else [])
            torch.manual_seed(int(np.random.default_rng(seed).integers(2 ** 63)))      # the decisions' noise
            yield s.batch // size, x, y

    def stop_if_asked(self):
        """Raises KeyboardInterrupt once a signal came. Called where everything that counts is saved."""
        if self.stop:
            raise KeyboardInterrupt

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

    def record(self, index, step, loss, cr):
        """A line of metrics.jsonl for every step, and now and then one on the screen with the mean loss since the last."""
        phase, s = self.phases[index], self.settings
        entry = {"index": index, "phase": phase.name, "step": step, "loss": loss, "target_cr": phase.target(step), "cr": cr,
                 "lr": phase.learning_rate(step, s.warmup)}
        self.metrics.write(json.dumps(entry) + "\n")
        self.recent.append(loss)
        if (step + 1) % s.log_every == 0 or step + 1 == phase.steps:
            tokens_per_second = s.batch * s.context / (self.pace[phase.dmc][1] / self.pace[phase.dmc][0])
            left = self.seconds_left(index, step)
            if self.shown % 25 == 0:
                print(f"{'phase':<12}{'step':>11}{'loss':>8}{'target':>8}{'CR':>7}{'lr':>10}{'tokens/s':>10}{'left':>7}")
            name = phase.name + (f" {phase.cr[1]:g}" if phase.name == "solidify" else "")
            ratios = f"{entry['target_cr']:8.2f}{cr:7.2f}" if cr else f"{'-':>8}{'-':>7}"
            print(f"{name:<12}{step + 1:>6}/{phase.steps:<4}{np.mean(self.recent):8.4f}{ratios}{entry['lr']:10.1e}"
                  f"{tokens_per_second:10,.0f}{left // 60:4.0f}:{left % 60:02.0f}", flush=True)
            self.shown, self.recent = self.shown + 1, []

    def trim_metrics(self, index, step):
        """Drop the lines of steps that are trained again, so that the curve has each step once."""
        path = self.out / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        kept = [line for line in lines if (line["index"], line["step"]) < (index, step)]
        last_shown = step - step % self.settings.log_every
        self.recent = [line["loss"] for line in kept if line["index"] == index and line["step"] >= last_shown]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(path, lambda f: f.write_text(text))

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
        for target in self.settings.kept():
            self.stop_if_asked()
            entry = self.figures(f"cr{target:g}")
            pooling = pooling_cache(plain.Cache, every=max(1, round(entry["cr"])))
            pooled = evaluate(plain, self.val_tokens, self.settings, pooling)[0]
            summary["dmc"].append({"target": target, **entry, "pooling": pooled})
        summary |= {"seconds": self.seconds(), "settings": asdict(self.settings), **provenance()}
        write_json(self.out / "summary.json", summary)
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


# ------------------------------------------------------------------------------------------------ command line

def parse(argv):
    """Returns the flags that were given, as a dict, and the namespace of those that are no setting."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", type=Path, help="folder of the run [runs/1, or the next number that is free]")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, or the newest one")
    parser.add_argument("--preset", choices=PRESETS, help="which defaults: the small model's, the paper's for a size of Llama "
                        "2, or a short schedule [the paper's with --init llama2-7b, -13b or -70b; else laptop]")
    parser.add_argument("--memory", type=float, metavar="GB", help="what each card may hold [what is free]")
    for f in fields(Settings):
        kind = {"type": f.type} if f.type in (int, float) else {}
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, **kind, **f.metadata["argument"])
    options = vars(parser.parse_args(argv))
    if "keep" in options:
        try:
            options["keep"] = [float(cr) for part in options["keep"] for cr in part.split(",") if cr]
        except ValueError:
            raise InputError(f"--keep {' '.join(options['keep'])} is no list of ratios; give one such as 2,3,4.") from None
    run = argparse.Namespace(**{name: options.pop(name) for name in ("out", "resume", "preset", "memory")})
    return options, run


def open_run(argv):
    """The Run that the command line asks for, and the function that carries it out."""
    given, options = parse(argv)
    memory = options.memory and options.memory * 1e9
    if not options.resume:
        defaults = PRESETS[options.preset or (given["init"] if given.get("init") in PRESETS else "laptop")]
        if given.get("init") and (sized := {"layers", "heads", "kv_heads", "dim", "ffn_dim", "pretrain_steps"} & given.keys()):
            raise InputError(f"{flag(min(sized))} is for the small model; leave it out with --init, which brings its own.")
        numbers = [int(p.name) for p in runs_by_number()]
        run = Run(Settings(**{**defaults, **given}), options.out or Path("runs") / str(max(numbers, default=0) + 1), memory)
        return run, run.begin
    out = options.out or next(reversed(runs_by_number()), None)
    if out is None:
        raise InputError("there is no run to resume in runs; give its folder with --out.")
    saved = read_json(out / "run.json")["settings"]
    for name, value in given.items():
        if saved[name] != value:
            raise InputError(f"{flag(name)} was {saved[name]} when {out} began; resume without it, or start a new run.")
    run = Run(Settings(**saved), out, memory)
    return run, run.resume


def main(argv=None):
    torch.set_flush_denormal(True)      # products of many small alphas are denormal, which CPUs are slow at
    sys.stdout.reconfigure(errors="replace")      # a terminal that cannot show a character shows ? instead
    warnings.formatwarning = lambda message, *_: f"train.py: warning: {message}\n"
    run = None
    try:
        run, carry_out = open_run(argv)
        for interruption in (signal.SIGINT, signal.SIGTERM):
            signal.signal(interruption, lambda *_: setattr(run, "stop", True))
        carry_out()
        return 0
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nStopped, and saved. To go on: python train.py --resume --out {shlex.quote(str(run.out))}" if run else "")
        return 130


if __name__ == "__main__":
    sys.exit(main())
