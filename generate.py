"""Use a DMC model: generate text, and look at what its heads merged.

    python generate.py                                 the newest run's most compressed model continues a prompt
    python generate.py --ckpt runs/1/cr2 --prompt "import os"
    python generate.py --show-merges 0.0               the prompt, cut into the segments that layer 0, head 0 merged
    python generate.py --show-merges merges.html       a web page with the segments of every layer and head, and their CR
    python generate.py --cache full                    the same weights, every token kept
    python generate.py --prompts in.jsonl --out out.jsonl      continue many prompts, as many at once as fit
    python generate.py --bench                         what compression does for throughput (figure 5 of the paper)
    torchrun --nproc_per_node 2 generate.py ...        the same with the model split between 2 GPUs, or processes
"""

import argparse
import base64
import codecs
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections import deque
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import dmc
import dmc_fast
from dmc import (
    Config,
    InputError,
    Tokenizer,
    Transformer,
    one_line,
    read_json,
    weight_files,
    write_atomically,
    write_json,
)

OPS = {"fast": dmc_fast, "reference": dmc}
PROMPT = "import os\nimport sys\n\ndef "
SEGMENT_COLOURS = ("\033[48;5;24m\033[97m", "\033[48;5;94m\033[97m", "\033[48;5;29m\033[97m")
RESET = "\033[0m"


# ------------------------------------------------------------------------------------------------ finding models

LLAMA2 = dict(vocab_size=32000, max_seq_len=4096, norm_eps=1e-5)
SHAPES = {"llama2-7b": dict(n_layer=32, n_head=32, n_kv_head=32, dim=4096, ffn_dim=11008, **LLAMA2),
          "llama2-13b": dict(n_layer=40, n_head=40, n_kv_head=40, dim=5120, ffn_dim=13824, **LLAMA2),
          "llama2-70b": dict(n_layer=80, n_head=64, n_kv_head=8, dim=8192, ffn_dim=28672, **LLAMA2)}
TOY = dict(vocab_size=512, n_layer=2, n_head=4, n_kv_head=4, dim=128, ffn_dim=384, max_seq_len=512)


def random_model(name, ops=None, device=None, dtype=torch.bfloat16, ranks=1, **changes):
    """A Transformer of a known shape ("llama2-7b", ..., "toy") with random weights: to measure speed and memory.

    ranks: how many share it. Each makes a part of its own, as `load_part` has one, from PyTorch's seed, the same for all.
    """
    shapes = {**SHAPES, "toy": TOY}
    if name not in shapes:
        raise InputError(f"there is no shape {name}; random weights come as {', '.join(shapes)}.")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)          # the weights are made in their dtype, never in a larger one
    try:
        with torch.device(device or "cpu"):
            model = Transformer(part_of(Config(**{**shapes[name], "dmc": False, **changes}), ranks), ops)
    finally:
        torch.set_default_dtype(before)
    return joined(model) if ranks > 1 else model


def locate(name):
    """The folder of a checkpoint: `name` itself, or for llama2-7b, ... and any org/name its place in Hugging Face's cache.

    A model that is not there is fetched if huggingface_hub is installed. Raises InputError where that is impossible.
    """
    if Path(name).is_dir():
        return Path(name)
    repo = f"meta-llama/{name.replace('llama2', 'Llama-2')}-hf" if name in SHAPES else name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or Path(name).exists():
        raise InputError(f"{name} is no folder, and no model's name; give the folder of a checkpoint, {', '.join(SHAPES)}, "
                         "or org/name.")
    env = os.environ
    home = Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")).expanduser()
    cached = Path(env.get("HF_HUB_CACHE") or home / "hub").expanduser() / ("models--" + repo.replace("/", "--"))
    with suppress(OSError, InputError):
        folder = cached / "snapshots" / (cached / "refs/main").read_text().strip()
        weight_files(folder)
        return folder
    wanted = ["*.json", "*.safetensors"]
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(f"{name} is no folder, and {repo} is not in {cached.parent}; fetch it with: pip install "
                         f"huggingface_hub && hf download {repo} --include {' '.join(map(repr, wanted))}") from None
    try:
        return Path(snapshot_download(repo, allow_patterns=wanted))
    except Exception as error:      # its many kinds: no network, no such model, a licence that was not accepted
        raise InputError(f"{repo} could not be fetched ({type(error).__name__}: {one_line(error)}); "
                         "check the name, the network, and for models under a licence hf auth login.") from None


# ------------------------------------------------------------------------------------------------ several ranks

def this_rank():
    return int(os.environ.get("RANK", 0))           # which torchrun sets


def rank_count():
    return int(os.environ.get("WORLD_SIZE", 1))


def over_ranks(x, op="SUM"):
    """x, a tensor, replaced by its sum, MAX or MIN over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(x, getattr(dist.ReduceOp, op))
    return x


def part_of(config, ranks):
    """The Config of one rank's part of a model: its heads, and its columns of the MLPs. Raises InputError if uneven."""
    for n, what in (config.n_kv_head, "key-value heads"), (config.ffn_dim, "columns of the MLPs (ffn_dim)"):
        if n % ranks:
            raise InputError(f"{ranks} ranks cannot share {n} {what} evenly; choose a --nproc_per_node that divides {n}.")
    return replace(config, n_head=config.n_head // ranks, n_kv_head=config.n_kv_head // ranks, ffn_dim=config.ffn_dim // ranks)


def joined(model):
    """The part of a model that this rank holds, made to add up with those of the other ranks after attention and MLP."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if next(model.parameters()).is_cuda else "gloo")
    for block in model.layers:
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.register_forward_hook(lambda module, inputs, y: over_ranks(y))
    return model


def load_part(path, ops=None, device=None, dtype=None):
    """dmc.load; with several ranks, this one's part: some key-value heads with their query heads, and columns of the MLPs.

    Embeddings, norms and lm_head are whole on every rank. Nothing but the part is moved to the device.
    """
    rank, ranks = this_rank(), rank_count()
    if ranks == 1:
        return dmc.load(path, ops, device, dtype)
    model = dmc.load(path, ops)
    model.config = part_of(model.config, ranks)
    for block in model.layers:
        attention, mlp = block.self_attn, block.mlp
        attention.config = model.config
        rows = attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj
        for linear, dim in (*((linear, 0) for linear in rows), (attention.o_proj, 1), (mlp.down_proj, 1)):
            linear.weight = torch.nn.Parameter(linear.weight.detach().chunk(ranks, dim)[rank])
    return joined(model.to(device, dtype))


# ------------------------------------------------------------------------------------------------ shared with train.py

def read_lines(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def runs_by_number():
    return sorted((p for p in Path("runs").glob("*") if p.name.isdigit()), key=lambda p: int(p.name))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help.")


def read_text(path, source="--data"):
    """The text in a file that the flag `source` named."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check {source}.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; convert it, or leave it out of {source}.") from None


def provenance():
    """What stands behind a figure: command, commit (None outside a clone, or without git), versions, device."""
    commit = None
    if shutil.which("git"):
        git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
        commit = git.stdout.strip() or None
    cpu = next((line.split(":")[1].strip() for line in read_lines("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {torch.get_num_threads()} threads"
    return {"date": time.strftime("%Y-%m-%d"), "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
            "commit": commit, "device": device,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                         "triton": getattr(dmc_fast.triton, "__version__", None)}}


# ------------------------------------------------------------------------------------------------ sampling

NOT_NUMBERS = "the model's scores are not numbers, as with damaged weights; fetch or train it anew."
SETTINGS = {"temperature": torch.float64, "top_k": torch.long, "top_p": torch.float64, "seed": torch.long}


def hashed(x):
    """MurmurHash3's 64-bit finalizer of int64, a bijection in which a change of any bit changes half of all bits."""
    for factor in (0xff51afd7ed558ccd, 0xc4ceb9fe1a85ec53):
        x = (x ^ (x >> 33 & 0x7fffffff)) * (factor - 2 ** 64)
    return x ^ (x >> 33 & 0x7fffffff)


def uniform(seed, position):
    """A number in [0, 1), fp64, for each pair of int64: the randomness of one token, wherever and whenever it is sampled."""
    return (hashed(hashed(seed) + position) >> 11 & 2 ** 53 - 1).double() * 2.0 ** -53


def likeliest(logits):
    """The likeliest token ids (B,) of logits (B, vocab), the first of equals; -1 where logits are NaN."""
    return logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1)


def sample(logits, temperature, top_k, top_p, seed, position):
    """Token ids (B,) from logits (B, vocab), every row by its own settings (B,); -1 where logits are NaN.

    temperature 0: the likeliest. top_k: only the k likeliest, 0: all. top_p: only the smallest set of likeliest tokens whose
    probabilities reach p. seed and position (of the new token in its sequence) decide alone which token falls. Never waits for
    a GPU. Probabilities are summed in fp64, whose rounding, other in another batch, is too small to move a choice.
    """
    ordered, ids = logits.sort(descending=True, stable=True)
    ordered = ordered.double()
    ordered = (ordered - ordered[:, :1]) / temperature[:, None].clamp(min=1e-30)
    rank, top_k = torch.arange(ordered.size(1), device=logits.device), top_k[:, None]
    p = ordered.masked_fill_((rank >= top_k) & (top_k > 0), -torch.inf).softmax(-1)
    reached = p.cumsum(-1)
    allowed = (reached - p < top_p[:, None]).sum(-1, keepdim=True).clamp(min=1)        # top_p 0 leaves the likeliest
    goal = uniform(seed, position)[:, None] * reached.gather(-1, allowed - 1)
    drawn = ids.gather(-1, (reached <= goal).sum(-1, keepdim=True).minimum(allowed - 1))[:, 0]
    first = likeliest(logits)
    return torch.where((temperature == 0) | (first < 0), first, drawn)


def chooser(**settings):
    """choose(logits (vocab,), position) -> id, for `generate`, by `sample` with these settings."""
    settings = [torch.tensor([settings[name]], dtype=dtype) for name, dtype in SETTINGS.items()]

    def choose(logits, position):
        token = sample(logits[None], *settings, torch.tensor([position])).item()
        if token < 0:
            raise InputError(NOT_NUMBERS)
        return token
    return choose


@torch.no_grad()
def generate(model, cache, prompt, count, choose, stops=(), gain=None):
    """Yield up to `count` token ids that continue `prompt` (ids), each as soon as it is chosen; end before one of `stops`.

    The prompt is taken in at once, then a token at a step. choose(logits (vocab,), position of the new token) -> id.
    """
    device = next(model.parameters()).device
    tokens = prompt
    for position in range(len(prompt), len(prompt) + count):
        logits, _ = model(torch.tensor([tokens], device=device), cache, gain=gain, last=True)
        token = choose(logits[0, -1].cpu(), position)
        token = int(over_ranks(torch.tensor(token, device=device), "MAX"))      # equal already, unless ranks round differently
        if token in stops:
            return
        yield token
        tokens = [token]


# ------------------------------------------------------------------------------------------------ engine

@dataclass
class Request:
    """A text to continue: prompt (ids), at most `count` tokens (None: 256, or fewer where positions end), and how to sample.

    key: whatever tells its result from those of others.
    """
    prompt: list
    count: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    key: object = None


@dataclass
class Result:
    """What became of a request: the ids generated, why they end ("stop" or "length"), and the CR of its cache; or an error,
    a sentence."""
    request: Request
    ids: list = field(default_factory=list)
    finish: str | None = None
    cr: float | None = None
    error: str | None = None


@dataclass(eq=False)
class Sequence:
    request: Request
    count: int
    ids: list = field(default_factory=list)      # generated, and read by the host
    tokens: list = None                          # the prompt and the ids known when it was admitted
    fed: int = 0                                 # tokens in its cache after all that was launched


@dataclass
class Report:
    """What the device says after a prefill or a step, on its way to the host: the rows of Engine.report."""
    numbers: torch.Tensor
    event: object
    live: dict                                   # row -> Sequence, of all that ran then
    asked: dict                                  # of those for which a new token was sampled


class Held(NamedTuple):
    """Of one row: tokens, slots, pages, and the pages that it may need in the two steps after."""
    fed: int
    slots: int
    pages: int
    need: int


EMPTY = "the prompt is empty; give at least one character."


def checked_count(config, prompt, count):
    """How many tokens are to follow the prompt. Raises InputError where they do not fit the positions."""
    if not prompt:
        raise InputError(EMPTY)
    wanted, count = count, count or min(256, config.max_seq_len - len(prompt))
    if len(prompt) + count > config.max_seq_len or count < 1:
        raise InputError(f"a prompt of {len(prompt)} tokens{f' and {wanted} more' if wanted else ''} does not fit the model's "
                         f"{config.max_seq_len} positions; shorten the prompt or generate fewer tokens.")
    return count


def paged(model):
    return model.Cache if issubclass(model.Cache, dmc_fast.PagedCache) else dmc_fast.PagedCache


class Engine:
    """Batched generation with continuous admission: `rows` sequences at once over one pool of pages.

    A decode step works for all rows, has fixed shapes, samples on the device, and never waits for the host: on a GPU it is one
    CUDA graph. The host launches step n + 1 before it reads what step n sampled, so a sequence that turns out to
    have ended takes part in one more step, which nobody reads. Idle rows (age -1) do nothing.

    Pages: a step takes at most one per head, so the host knows from lengths, two steps ahead, whether the pool lasts.
    If not, the youngest sequence gives its pages back and waits at the head of the queue to be prefilled with all it has; its
    randomness goes by position, so its text goes on as it would have. Only what does not fit the pool all by itself ends in
    an error. A prompt is prefilled if it fits uncompressed, beside one page more for every head that runs. If nothing runs,
    as much of it as fits is prefilled, and the rest is fed token by token, merging as it goes.

    Several ranks have a pool each for their own heads. A sequence counts with its pages on the rank where it has the most, so
    that all hosts schedule alike and what fits, fits everywhere.
    """

    def __init__(self, model, rows, pages=None, stops=(), gain=None):
        weight, config = next(model.parameters()), model.config
        self.model, self.stops, self.gain, self.heads = model, set(stops), gain, config.n_layer * config.n_kv_head
        if pages is not None and pages < self.heads:
            raise InputError(f"the pool has {pages} pages for {self.heads} heads; raise --cache-gb.")
        self.cache = paged(model)(config, rows, weight.device, weight.dtype, pages=pages)
        self.cache.release(slice(None))
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=weight.device)      # what the next step is fed
        self.settings = [torch.zeros(rows, dtype=dtype, device=weight.device) for dtype in SETTINGS.values()]
        self.report = torch.zeros(5, rows, dtype=torch.long, device=weight.device)
        self.waiting, self.running, self.idle, self.pending = deque(), {}, list(range(rows)), deque()
        self.all_heads = self.heads * rank_count()
        self.known = {}                                          # row -> Held, by the newest report
        self.graphs, self.steps, self.waited, self.preempted = {}, 0, 0.0, 0

    # --- requests

    def submit(self, request):
        """Put a request at the end of the queue. Raises InputError where it cannot fit."""
        count = checked_count(self.model.config, request.prompt, request.count)
        pages = self.heads * -(-len(request.prompt) // self.cache.page_size)
        if pages > len(self.cache.free) and (self.gain is not None or not self.model.config.dmc):
            raise InputError(f"a prompt of {len(request.prompt)} tokens needs {pages} pages of cache, and there are "
                             f"{len(self.cache.free)}; raise --cache-gb or shorten the prompt.")
        self.waiting.append(Sequence(request, count))

    def cancel(self, key):
        """Forget the request with this key, wherever it is; there will be no result. Returns whether there was one."""
        found = {seq for seq in (*self.waiting, *self.running.values(), *(s for r in self.pending for s in r.asked.values()))
                 if seq.request.key == key}
        self.waiting = deque(seq for seq in self.waiting if seq not in found)
        for seq in found:
            self._drop(seq)
        return bool(found)

    def run(self, requests, each_step=lambda: None):
        """Yield a Result for every Request, as they finish. Takes Requests as rows fall idle; Results among them pass."""
        requests = iter(requests)
        while True:
            while len(self.waiting) < max(1, len(self.idle)) and (request := next(requests, None)) is not None:
                if isinstance(request, Result):
                    yield request
                    continue
                try:
                    self.submit(request)
                except InputError as error:
                    yield Result(request, error=str(error))
            if not (self.waiting or self.running or self.pending):
                return self.cache.check()
            yield from self.step()
            each_step()

    @torch.no_grad()
    def step(self):
        """Launch a step, read what came before it, preempt and admit. Returns the results of what has finished."""
        launched = self._launch()
        return self._collect(keep=launched) + self._schedule()

    # --- the device's side: nothing here waits

    def _step(self, greedy):
        self._choose(slice(None), self.model(self.tokens.clamp(min=0), self.cache, gain=self.gain, last=True)[0], greedy)

    def _choose(self, rows, logits, greedy):
        """The next token of each row from logits (rows, 1, vocab), and the report."""
        cache, logits = self.cache, logits[:, -1]
        position = cache.ages[0, rows, 0].long()
        ids = likeliest(logits) if greedy else sample(logits, *(x[rows] for x in self.settings), position)
        self.tokens[rows].copy_(ids[:, None])
        pages, may_need = -(-cache.lengths // cache.page_size), (cache.lengths + 1) % cache.page_size <= 1
        facts = self.tokens[:, 0], cache.ages[0, :, 0], *(x.sum((0, 2)) for x in (cache.lengths, pages, may_need))
        for line, fact in zip(self.report, facts, strict=True):
            line.copy_(fact)
        over_ranks(self.report[2])                               # slots of all heads
        self.tokens.copy_(over_ranks(self.report, "MAX")[0, :, None])      # and one token, should ranks round differently

    def _capture(self, greedy):
        """The step as a CUDA graph. It is run before, to compile kernels, with every row idle for the time being."""
        kept = [(x, x.clone()) for x in (self.cache.ages, self.tokens)]
        self.cache.ages.fill_(-1)
        self.cache.seen = [1] * len(self.cache.seen)             # any number at which rows are not sorted
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(greedy)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, pool=next(iter(self.graphs.values())).pool() if self.graphs else None):
            self._step(greedy)
        for x, before in kept:
            x.copy_(before)
        return graph

    def _launch(self):
        """Start a step for all that run; whether there are any."""
        for row, seq in self.running.items():
            if seq.fed < len(seq.tokens):                        # known already: the rest of a prompt
                self.tokens[row].fill_(seq.tokens[seq.fed])
            seq.fed += 1
        if not self.running:
            return False
        greedy = all(seq.request.temperature == 0 for seq in self.running.values())
        if self.tokens.is_cuda:
            if greedy not in self.graphs:
                self.graphs[greedy] = self._capture(greedy)
            self.graphs[greedy].replay()
        else:
            self.cache.seen = [max(seq.fed for seq in self.running.values()) - 1] * len(self.cache.seen)
            self._step(greedy)
        self.steps += 1
        if self.steps % 64 == 0:
            self.cache.sort_rows()
        self._post(self.running)
        return True

    def _admit(self, seq, n):
        """Prefill a sequence's first n tokens in an idle row."""
        row = self.idle.pop()
        self.running[row], rows, seq.fed = seq, slice(row, row + 1), n
        for x, name in zip(self.settings, SETTINGS, strict=True):
            x[row].fill_(getattr(seq.request, name))
        tokens = torch.tensor([seq.tokens[:n]])
        if self.tokens.is_cuda:
            tokens = tokens.pin_memory().to(self.tokens.device, non_blocking=True)
        logits, _ = self.model(tokens, self.cache.admit(rows), gain=self.gain, last=True)
        self._choose(rows, logits, seq.request.temperature == 0)
        self._post([row])

    def _post(self, rows):
        """Send the report on its way. Whoever has been asked for all its tokens gives its row back at once."""
        numbers, event = self.report.to("cpu", non_blocking=True, copy=True), None
        if self.report.is_cuda:
            event = torch.cuda.Event()
            event.record()
        asked = {row: self.running[row] for row in rows if self.running[row].fed >= len(self.running[row].tokens)}
        self.pending.append(Report(numbers, event, dict(self.running), asked))
        for row, seq in asked.items():
            if seq.fed == len(seq.request.prompt) + seq.count - 1:
                self._release(row)

    # --- the host's side

    def _release(self, row):
        del self.running[row]
        self.cache.release(slice(row, row + 1))
        self.idle.append(row)
        self.known.pop(row, None)

    def _drop(self, seq):
        """Take a sequence out of its row, and forget what was sampled for it and not yet read."""
        for row in [row for row, other in self.running.items() if other is seq]:
            self._release(row)
        for report in self.pending:
            report.asked = {row: other for row, other in report.asked.items() if other is not seq}

    def _collect(self, keep):
        """Read all reports but the newest `keep`. Returns the results of what has finished."""
        results = []
        while len(self.pending) > keep:
            report = self.pending.popleft()
            if report.event:
                start = time.perf_counter()
                report.event.synchronize()
                self.waited += time.perf_counter() - start
            tokens, *held = report.numbers.tolist()
            held = [Held(*row) for row in zip(*held, strict=True)]
            self.known = {row: held[row] for row, seq in report.live.items() if self.running.get(row) is seq}
            for row, seq in report.asked.items():
                results += self._accept(seq, tokens[row], held[row])
        return results

    def _accept(self, seq, token, held):
        result = Result(seq.request, seq.ids, cr=held.fed * self.all_heads / held.slots)
        if token < 0:
            result = Result(seq.request, error=NOT_NUMBERS)
        elif token in self.stops:
            result.finish = "stop"
        else:
            seq.ids.append(token)
            if len(seq.ids) < seq.count:
                return []
            result.finish = "length"
        self._drop(seq)
        return [result]

    def _room(self):
        """The pages that are free for sure after the step that was launched and the one that comes next."""
        return len(self.cache.free) - sum(held.pages + held.need for held in self.known.values())

    def _schedule(self):
        """Make room for the next step, then fill idle rows, oldest request first. Returns the results of what fails."""
        results, page = [], self.cache.page_size
        while self._room() < 0:
            youngest = list(self.running.values())[-1]
            self._drop(youngest)
            if self.running:
                self.waiting.appendleft(youngest)
                self.preempted += 1
            else:
                results.append(Result(youngest.request, error=f"the cache's {len(self.cache.free)} pages are used up at "
                               f"{youngest.fed} tokens; raise --cache-gb, shorten the prompt or generate fewer tokens."))
        room = self._room()
        while self.waiting and self.idle:
            seq, alone = self.waiting[0], room == len(self.cache.free)
            seq.tokens = seq.request.prompt + seq.ids
            n = min(len(seq.tokens), room // self.heads * page - 1) if alone else len(seq.tokens)
            pages = self.heads * -(-(n + 1) // page)             # after the next step, if nothing merges
            if pages + self.heads * len(self.running) > room:
                break
            self._admit(self.waiting.popleft(), n)
            room -= pages
        return results


# ------------------------------------------------------------------------------------------------ reports

def cache_report(cache):
    """Tokens, slots, CR per layer, and bytes used against an uncompressed cache's, as lines of text."""
    slots, heads = over_ranks(cache.lengths.sum((1, 2))).tolist(), cache.lengths[0].numel() * rank_count()
    tokens, size = sum(cache.seen) * heads, 2 * cache.config.head_dim * cache.keys[0].element_size()
    if sum(slots) == tokens:
        return f"{cache.seen[0]} tokens; {tokens:,} slots, {tokens * size:,} bytes of cache, nothing merged"
    layers = "  ".join(f"{i}: {cache.seen[i] * heads / n:.2f}" for i, n in enumerate(slots))
    return (f"{cache.seen[0]} tokens; {sum(slots):,} slots where an uncompressed cache has {tokens:,}: "
            f"CR {tokens / sum(slots):.2f}\n"
            f"CR per layer   {layers}\n"
            f"bytes of cache {sum(slots) * size:,} used, {tokens * size:,} uncompressed")


def full_cache_note(model, facts):
    """Whether running these weights without compression is a fair comparison, in a sentence."""
    if not model.config.dmc:
        return "This is a plain model: its cache is always full."
    if facts.get("target_cr") in (None, 1.0):
        return "This model was not trained to merge yet: the full cache is what it knows."
    return (f"This model was retrofitted at CR {facts['target_cr']:g} and never trained to attend without its merges: "
            "compare the bytes, not the text.")


@torch.no_grad()
def decisions(model, ids):
    """alpha (L, G, T) of the token ids: 1 where a head merged, 0 where it appended. Texts longer than the model's positions
    are taken in pieces of that length, each of which starts anew."""
    device, size = next(model.parameters()).device, model.config.max_seq_len
    pieces = [model(torch.tensor([ids[i:i + size]], device=device), last=True)[1] for i in range(0, len(ids), size)]
    return torch.cat(pieces, dim=-1)[:, 0].cpu()


def merged_segments(model, ids, layer, head):
    """The token ids cut where one head appended: a list of lists."""
    segments = []
    for token, merge in zip(ids, decisions(model, ids)[layer, head].tolist(), strict=True):
        if merge:
            segments[-1].append(token)
        else:
            segments.append([token])
    return segments


def spell(segments, tokenizer):
    """The text of each segment. A character whose bytes fall into several is in the one that completes it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(tokenizer.token_bytes(segment)) for segment in segments]
    texts[-1] += decoder.decode(b"", final=True)
    return texts


def show_segments(segments, tokenizer, colour):
    """The segments as text: in changing colours, or with | between them."""
    texts = spell(segments, tokenizer)
    if not colour:
        return "|".join(texts)
    shades = [SEGMENT_COLOURS[i % len(SEGMENT_COLOURS)] for i in range(len(texts))]
    return "".join(shade + text.replace("\n", f"{RESET}\n{shade}") + RESET for shade, text in zip(shades, texts, strict=True))


def merges_page(model, ids, tokenizer, name):
    """An HTML page, as text: the segments of every layer and head, and a map of their CR. It needs nothing besides itself."""
    merges = decisions(model, ids).bool().numpy()
    data = {"model": str(name), "layers": merges.shape[0], "heads": merges.shape[1], "positions": model.config.max_seq_len,
            "tokens": spell([[i] for i in ids], tokenizer),
            "merges": base64.b64encode(np.packbits(merges, axis=-1)).decode()}       # each head's bits fill whole bytes
    return PAGE.replace("DATA", json.dumps(data).replace("<", "\\u003c"))            # no text can end its script element


# ------------------------------------------------------------------------------------------------ the page of --show-merges

PAGE = r"""<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Which tokens each head merged</title><style>
:root { color-scheme: light dark; --quiet: light-dark(#636a72, #949ca5); --mark: light-dark(#d4480b, #ff9a4d);
  --odd: light-dark(#d5e4f5, #1d3d60); --even: light-dark(#f6e6c3, #4b3b16);             /* neighbouring segments */
  --low: light-dark(#e6edf5, #262c33); --high: light-dark(#0b3870, #a6d0ff) }            /* the ends of the scale of CR */
body { margin: 2rem auto; padding: 0 2rem; max-width: 95rem; font: 14px/1.5 system-ui, sans-serif; print-color-adjust: exact }
h1 { margin: 0; font-size: 1.4rem } p { margin: .3rem 0; max-width: 52rem } select { font: inherit }
#about, output, th, #legend { color: var(--quiet); font-weight: normal } #map, #legend { font-size: 11px }
main { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 2.5rem; align-items: start; margin-top: 1rem }
aside { position: sticky; top: 0; max-height: 100vh; overflow: auto; padding-right: .25rem; font-variant-numeric: tabular-nums }
nav { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: 0 1.5rem; background: Canvas }
nav, thead { line-height: 2.2; border-bottom: 1px solid color-mix(in srgb, var(--quiet) 40%, Canvas) }
output { display: block; flex: 1 19rem; contain: inline-size; overflow: hidden; white-space: nowrap }    /* moves nothing */
#facts { border-collapse: collapse; margin-bottom: 1rem; width: 100%; min-width: min(24rem, 80vw) }
#facts * { padding: 0; text-align: left } #facts :is(th, td) + * { padding-left: 1.5rem; text-align: right }
#map td, b { background: color-mix(in oklab, var(--high) calc(var(--share) * 100%), var(--low)) }
#legend { display: flex; gap: 1px; text-align: center } b { display: block; width: 2.2rem; height: .7rem; margin-bottom: .3rem }
#map { border-spacing: 1px; --width: clamp(8px, 33vw / var(--heads), 28px) }
#map td { padding: 0; min-width: var(--width); height: clamp(8px, 44vh / var(--layers), var(--width)); cursor: pointer }
#map th { padding: 0 .2rem 0 0; line-height: 0; text-align: right } #map th + th { padding: .6rem 0; text-align: center }
[aria-selected=true], #text span:focus { outline: 2px solid var(--mark) } #map :focus-visible { outline-width: 4px }
#text { padding: .7rem 0; font: 13px/1.75 ui-monospace, monospace; white-space: break-spaces; overflow-wrap: anywhere }
#text span { padding: .2em 0; border-radius: 2px; background: var(--odd) } #text > :nth-child(even) { background: var(--even) }
#text span:hover { outline: 1px solid } #text .piece { border-left: 3px solid var(--mark) }
#text span:empty::before { content: "·" } i::before { content: "↵"; font-style: normal; opacity: .4 }
@media (max-width: 40rem) { main { grid-template-columns: minmax(0, 1fr) } aside { position: static } }
</style><h1>Which tokens each head merged</h1>
<p>Each coloured stretch of the text is one slot in the cache of the chosen head: its tokens were merged into one key and one
value, and the compression ratio, CR, is the number of tokens per slot.
<p id="about"><noscript>This page needs JavaScript.</noscript>
<main><aside><table id="facts"><thead><tr><th><th>slots<th>without DMC<th>CR<tbody></table>
CR of each layer (row) and head (column) <div id="legend"></div>
<output id="cell">Click a cell, or use the arrow keys on it.</output>
<table id="map" role="grid" aria-label="CR of each layer and head"></table></aside>
<section><nav><span>Layer <select id="layer"></select> head <select id="head"></select></span>
<output id="slot">Point at a stretch for its slot.</output></nav> <div id="text"></div></section></main>
<script type="application/json" id="data">DATA</script><script>
const $ = id => document.getElementById(id), map = $("map"), text = $("text"), data = JSON.parse($("data").textContent);
const {model, layers, heads, positions, tokens} = data, T = tokens.length, bits = atob(data.merges);
const upTo = n => [...Array(n).keys()], sum = list => list.reduce((a, b) => a + b, 0);
const merged = (l, h, t) => bits.charCodeAt((l * heads + h) * Math.ceil(T / 8) + (t >> 3)) >> (7 - t % 8) & 1;
const starts = (l, h) => upTo(T).filter(t => !merged(l, h, t));            // the token with which each slot begins
const slots = upTo(layers).map(l => upTo(heads).map(h => starts(l, h).length));
const add = (parent, tag, properties) => parent.appendChild(Object.assign(document.createElement(tag), properties));
const count = (n, what) => n.toLocaleString("en") + (what ? ` ${what}${n == 1 ? "" : "s"}` : "");
const shade = (cell, cr) => cell.style.setProperty("--share", Math.min(1, Math.log2(cr) / 5));       // CR 1 to 32
const within = (i, n) => Math.max(0, Math.min(n - 1, i || 0)); let layer = 0, head = 0;
function select(l, h) {
  const mark = on => Object.assign(map.rows[layer + 1].cells[head + 1], {ariaSelected: on, tabIndex: on - 1});
  mark(false); text.replaceChildren();
  $("layer").value = layer = within(l, layers), $("head").value = head = within(h, heads);
  const fact = (name, used, full) => `<tr><td>${name}<td>${count(used)}<td>${count(full)}<td>${(full / used).toFixed(2)}`;
  $("facts").tBodies[0].innerHTML = fact("whole model", sum(slots.flat()), layers * heads * T) +
    fact(`layer ${layer}`, sum(slots[layer]), heads * T) + fact(`layer ${layer}, head ${head}`, slots[layer][head], T);
  starts(layer, head).forEach((t, number, all) => {
    const end = all[number + 1] ?? T, spelled = tokens.slice(t, end).join(""), note = spelled ? "" : ", no whole character";
    const info = `Slot ${number}: ${count(end - t, "token")}, position${end - t > 1 ? `s ${t} to ${end - 1}` : ` ${t}`}${note}`;
    const span = add(text, "span", {number, info, tabIndex: t ? -1 : 0, className: t && t % positions == 0 ? "piece" : ""});
    spelled.split("\n").forEach((line, i) => { if (i) add(span, "i", {textContent: "\n"}); span.append(line) });
  });
  return mark(true);
}
$("about").textContent = `Model ${model}, ${count(layers, "layer")} of ${count(heads, "head")}; ${count(T, "token")}. ` +
  "Layers, heads, slots and positions count from 0." + (T <= positions ? "" :
  ` An orange bar marks where the model's ${positions} positions end, and it starts anew with an empty cache.`);
document.title += `: ${model}`; map.style = `--layers: ${layers}; --heads: ${heads}`;
const label = (row, i, n) => add(row, "th", {textContent: i % (n > 16 ? 4 : 1) ? "" : i}), first = map.insertRow();
for (const h of ["", ...upTo(heads)]) label(first, h, heads);
for (const l of upTo(layers)) {
  const row = map.insertRow();
  label(row, l, layers);
  slots[l].forEach((n, h) => {
    const info = `Layer ${l}, head ${h}: ${count(n, "slot")}, CR ${(T / n).toFixed(2)}`;
    shade(add(row, "td", {info, ariaLabel: info, tabIndex: -1, onclick: () => select(l, h)}), T / n);
  });
}
for (const cr of ["1", "2", "4", "8", "16", "32+"]) shade(add(add($("legend"), "span", {textContent: cr}), "b"), parseInt(cr));
for (const [id, n] of [["layer", layers], ["head", heads]]) for (const i of upTo(n)) add($(id), "option", {textContent: i});
$("layer").onchange = $("head").onchange = () => select(+$("layer").value, +$("head").value);
for (const [box, out, hint = out.textContent] of [[map, $("cell")], [text, $("slot")]])
  for (const type of ["mouseover", "focusin", "mouseleave", "focusout"]) box.addEventListener(type, e => out.textContent =
    (/over|in/.test(type) ? e.target : box.querySelector(":focus") ?? box).closest("[tabindex]")?.info ?? hint);
onkeydown = e => {
  const down = (e.key == "ArrowDown") - (e.key == "ArrowUp"), right = (e.key == "ArrowRight") - (e.key == "ArrowLeft");
  if (e.altKey || e.ctrlKey || e.metaKey || !down && !right) return;
  if (map.contains(e.target)) { e.preventDefault(); select(layer + down, head + right).focus() }
  if (right && text.contains(e.target)) text.children[e.target.number + right]?.focus();
};
(onhashchange = () => select(...(location.hash.match(/\d+/g) ?? []).map(Number)))();          // page.html#LAYER.HEAD
</script>
"""


# ------------------------------------------------------------------------------------------------ command line

def find_checkpoint(name):
    """The folder of a model: the one named, or the most compressed model of the run named, or of the newest run."""
    for run in [Path(name)] if name else reversed(runs_by_number()):
        if kept := [p.parent for p in run.glob("cr*/config.json")]:
            return max(kept, key=lambda folder: float(folder.name[2:]))
    if not name:
        raise InputError("there is no finished run in runs; train one with python train.py, or name a model with --ckpt.")
    return locate(name)


def number(low, high=float("inf"), kind=float):
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range, {low} to {high}")
        return value
    return parse


LIMITS = {"tokens": number(1, kind=int), "temperature": number(0), "top_k": number(0, kind=int), "top_p": number(0, 1),
          "seed": number(0, 2 ** 62, int)}


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--ckpt", metavar="NAME_OR_PATH", help="folder of a model or of a run, llama2-7b, -13b, -70b, or "
                        "org/name on Hugging Face [the newest run in runs]")
    parser.add_argument("--random-weights", action="store_true",
                        help="take only the shape of --ckpt llama2-7b and the like; text is bytes")
    parser.add_argument("--prompt", default=PROMPT, help="text to continue [the start of a Python file]")
    parser.add_argument("--prompt-file", type=Path, help="read the prompt from a file")
    parser.add_argument("--tokens", type=LIMITS["tokens"], help="how many to generate [256, or fewer where positions end]")
    parser.add_argument("--samples", type=number(1, kind=int), default=1, help="how many continuations of it [1]")
    parser.add_argument("--temperature", type=LIMITS["temperature"], default=0.7, help="0: always the likeliest token [0.7]")
    parser.add_argument("--top-k", type=LIMITS["top_k"], default=0, help="sample from the k likeliest; 0: from all [0]")
    parser.add_argument("--top-p", type=LIMITS["top_p"], default=0.95, help="sample from the likeliest that make up p [0.95]")
    parser.add_argument("--seed", type=LIMITS["seed"], default=0, help="of the sampling [0]")
    parser.add_argument("--cache", choices=["dmc", "full"], default="dmc", help="full: keep every token, merge nothing [dmc]")
    parser.add_argument("--ops", choices=OPS, default="fast", help="kernels and pages, or the plain functions of dmc.py [fast]")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="where the model runs [cuda where there is one]")
    parser.add_argument("--prompts", type=Path, metavar="FILE.jsonl",
                        help='continue many prompts, a line each: {"prompt": "..."}, and if wanted id, tokens, temperature, '
                        "top_k, top_p, seed, in the place of the flags")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="where the results of --prompts go, a line each as it "
                        "finishes; a file begun earlier is continued")
    parser.add_argument("--batch", type=number(1, 4096, int), nargs="+", metavar="N",
                        help="sequences at once [32 on a CPU, 128 on a GPU; with --bench the largest batch, and that of CR 1]")
    parser.add_argument("--cache-gb", type=number(0), help="size of the pool of pages [1 on a CPU, what is left on a GPU]")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write what 20 steps of --prompts spend their time on")
    parser.add_argument("--bench", action="store_true", help="measure throughput and what it is made of, and write it to --out "
                        "[bench.json]; --ckpt, or else random weights of --model")
    parser.add_argument("--model", choices=[*SHAPES, "toy"], help="shape for --bench [llama2-7b on a GPU, toy on a CPU]")
    parser.add_argument("--cr", type=number(1), nargs="+", default=[2.0, 4.0, 8.0], metavar="CR",
                        help="compression ratios for --bench, besides 1 [2 4 8]")
    parser.add_argument("--prompt-tokens", type=number(1, kind=int), nargs="+", metavar="N",
                        help="lengths of the prompts for --bench [2048 on a GPU, 128 on a CPU]")
    parser.add_argument("--show-merges", metavar="LAYER.HEAD|PAGE.html",
                        help="print the prompt cut into one head's segments, or write a web page with all heads', and stop")
    return parser.parse_args(argv)


def show_merges(args, model, tokenizer, prompt, name):
    if not model.config.dmc:
        raise InputError("this is a plain model, whose heads merge nothing; choose a checkpoint such as runs/1/cr4.")
    if args.show_merges.endswith(".html"):
        page = merges_page(model, prompt, tokenizer, name)
        write_atomically(args.show_merges, lambda f: f.write_text(page, encoding="utf-8"))
        print(f"The segments of {len(prompt)} tokens in every layer and head are in {args.show_merges}; open it in a browser.")
        return
    layers, heads = model.config.n_layer, model.config.n_kv_head
    layer, _, head = args.show_merges.partition(".")
    if not (layer.isdecimal() and head.isdecimal() and int(layer) < layers and int(head) < heads):
        raise InputError(f"--show-merges {args.show_merges} names no head; give LAYER.HEAD, "
                         f"from 0.0 to {layers - 1}.{heads - 1}, or PAGE.html.")
    segments = merged_segments(model, prompt, int(layer), int(head))
    print(f"layer {layer}, head {head}: {len(prompt)} tokens in {len(segments)} slots, CR {len(prompt) / len(segments):.2f}\n")
    print(show_segments(segments, tokenizer, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))


def chosen_gain(args, model, facts):
    """The gain that --cache asks for."""
    if args.cache == "dmc":
        return None
    print(full_cache_note(model, facts) + "\n")
    return 0.0 if model.config.dmc else 1.0              # decides nothing


def stream_samples(args, model, tokenizer, prompt, facts):
    count = checked_count(model.config, prompt, args.tokens)
    weight, gain = next(model.parameters()), chosen_gain(args, model, facts)
    for i in range(args.samples):
        choose = chooser(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed + i)
        cache = model.Cache(model.config, 1, weight.device, weight.dtype)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        print(tokenizer.decode(prompt), end="", flush=True)
        for token in generate(model, cache, prompt, count, choose, tokenizer.stops, gain):
            print(decoder.decode(tokenizer.token_bytes([token])), end="", flush=True)
        print(decoder.decode(b"", final=True) + f"\n\n{cache_report(cache)}\n")


# ------------------------------------------------------------------------------------------------ files of prompts

def fingerprint(line):
    return hash((line.get("id"), line["prompt"]))


def read_results(path):
    """Which lines have been answered in a file of results: {line: hash of id and prompt, or None for an error}.

    What a kill left of a last line is cut off. Raises InputError for a file of anything else, and leaves it as it is.
    """
    done, end = {}, 0
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no file; name another --out.")
    try:
        with path.open("ab+") as f:                              # also says whether it can be written
            f.seek(0)
            for text in f:
                if not text.endswith(b"\n"):
                    if text[:9] != b'{"line": '[:len(text)]:
                        raise ValueError
                    break
                result = json.loads(text)
                done[result["line"]] = None if "error" in result else fingerprint(result)
                end += len(text)
            f.truncate(end)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); check --out.") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is no file of results; name another --out.") from None
    return done


def read_request(text, key, args, tokenizer):
    """A Request from a line of JSON. Raises InputError. key: where its id and its prompt are put, beside the line's number."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"this is no JSON ({one_line(error)}); write each prompt as a line of it.") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise InputError('a line is an object with a text as its prompt; write {"prompt": "..."}.')
    if not isinstance(fields.get("id", ""), str | int):
        raise InputError("an id is a text or a whole number; change it.")
    key |= {name: fields[name] for name in ("id", "prompt") if name in fields}
    settings = {}
    for name, limit in LIMITS.items():
        value = getattr(args, name) if fields.get(name) is None else fields[name]
        try:
            settings[name] = None if value is None else limit(json.dumps(value))
        except (ValueError, argparse.ArgumentTypeError):
            raise InputError(f"{name} cannot be {json.dumps(value)[:40]}; see --{name.replace('_', '-')} in --help.") from None
    return Request(tokenizer.encode(fields["prompt"], prefix=True), settings.pop("tokens"), **settings, key=key)


def read_requests(lines, done, args, tokenizer):
    """A Request for every line that is not done, a Result where the line is at fault."""
    for number, text in enumerate(lines, 1):
        key = {"line": number}
        if not text.strip() or number in done and done[number] is None:
            continue
        try:
            request = read_request(text, key, args, tokenizer)
        except InputError as error:
            request = Result(Request([], key=key), error=str(error))
        if number not in done:
            yield request
        elif "prompt" not in key or done[number] != fingerprint(key):
            raise InputError(f"{args.out} has results of other prompts than {args.prompts}, as of line {number}; "
                             "name another --out.")


def peak(work):
    """The bytes of GPU memory that work() takes for a time, beyond what it leaves."""
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()


@torch.no_grad()
def pages_that_fit(model, rows, gigabytes, gain, capped=True):
    """How many pages the pool gets: of so many gigabytes, or None for 1 on a CPU, and on a GPU for what the longest prefill,
    the sampling of all rows, and the cache's other tensors leave, less 3%. capped: no more than the rows can fill. Of several
    ranks, as many as fit on each."""
    config, weight = model.config, next(model.parameters())
    make, positions = partial(paged(model), config, device=weight.device, dtype=weight.dtype), config.max_seq_len
    memory = 1e9 * (1 if gigabytes is None else gigabytes)
    if weight.is_cuda and gigabytes is None:
        cache, prompt = make(1), torch.zeros(1, positions, dtype=torch.long, device=weight.device)
        working = peak(lambda: model(prompt, cache, gain=gain, last=True))
        cache, logits, ones = None, weight.new_zeros(rows, config.vocab_size), torch.ones(rows, device=weight.device)
        working += peak(lambda: sample(logits, *(ones.to(dtype) for dtype in SETTINGS.values()), ones.long()))
        working += make(rows, pages=0).bytes.allocated
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        memory = free - working - 0.03 * total
    fit = max(0, int(memory // (2 * 16 * config.head_dim * weight.element_size())))
    fit = int(over_ranks(torch.tensor(fit, device=weight.device), "MIN"))
    return min(fit, rows * config.n_layer * config.n_kv_head * -(-positions // 16)) if capped else fit


class Progress:
    """A line about an engine's run every second, or every ten where nobody looks at a terminal."""

    def __init__(self, engine, total, done):
        self.engine, self.total, self.done, self.tokens, self.failed = engine, total, done, 0, 0
        self.first, self.start, self.shown = done, time.perf_counter(), time.perf_counter()

    def seconds(self):
        return time.perf_counter() - self.start

    def __call__(self):
        terminal = sys.stderr.isatty()
        if time.perf_counter() - self.shown > (1 if terminal else 10):
            self.shown = time.perf_counter()
            print(f"{self}   ", end="\r" if terminal else "\n", file=sys.stderr, flush=True)

    def __str__(self):
        engine, answered = self.engine, self.done - self.first
        held, pages = engine.known.values(), len(engine.cache.free)
        slots = sum(h.slots for h in held)
        cr = f"CR {sum(h.fed for h in held) * engine.all_heads / slots:.2f}  " if slots else ""
        left = self.seconds() * (self.total - self.done) / answered if answered else 0
        return (f"{self.done:,}/{self.total:,} requests  {self.tokens / max(self.seconds(), 1e-9):,.0f} tokens/s  "
                f"pages {sum(h.pages for h in held):,}/{pages:,}  {cr}{f'{left:,.0f} s left' if left else ''}")

    def summary(self):
        engine, seconds = self.engine, max(self.seconds(), 1e-9)
        host = f", the host busy for {1 - engine.waited / seconds:.0%} of it" if engine.tokens.is_cuda else ""
        return (f"{self.done - self.first:,} requests, {self.tokens:,} tokens in {seconds:.1f} s, {self.tokens / seconds:,.0f} "
                f"tokens/s; {engine.steps:,} steps, {1000 * seconds / max(engine.steps, 1):.1f} ms per step{host}; "
                f"{engine.preempted:,} preempted; {self.first:,} were done before, {self.failed:,} have errors.")


def profiler(path):
    """A torch.profiler over steps 10 to 30, or an object that does nothing where path is None."""
    if not path:
        return nullcontext()
    try:
        path.write_text("")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); check --profile.") from None
    write = lambda prof: path.write_text(prof.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
    return torch.profiler.profile(schedule=torch.profiler.schedule(wait=8, warmup=2, active=20, repeat=1), on_trace_ready=write)


def answer_prompts(args, model, tokenizer, facts, done):
    """Run --prompts to --out, a line per result; `done`: what read_results found there."""
    gain, writes = chosen_gain(args, model, facts), this_rank() == 0
    with args.prompts.open("rb") as lines:
        total = sum(1 for line in lines if line.strip())
        lines.seek(0)
        rows = args.batch[0] if args.batch else (128 if next(model.parameters()).is_cuda else 32)
        rows = max(1, min(rows, total - len(done)))
        engine = Engine(model, rows, pages_that_fit(model, rows, args.cache_gb, gain), tokenizer.stops, gain)
        progress = Progress(engine, total, len(done))
        with (args.out if writes else Path(os.devnull)).open("ab", buffering=0) as out, \
                profiler(args.profile if writes else None) as profile:
            def each_step():
                progress()
                if profile:
                    profile.step()
            for result in engine.run(read_requests(lines, done, args, tokenizer), each_step):
                line = dict(result.request.key)
                if result.error:
                    print(f"generate.py: {args.prompts}, line {line['line']}: {result.error}", file=sys.stderr)
                    line["error"] = result.error
                else:
                    line |= {"text": tokenizer.token_bytes(result.ids).decode("utf-8", "replace"), "tokens": len(result.ids),
                             "finish": result.finish, "cr": round(result.cr, 4)}
                data = json.dumps(line).encode() + b"\n"
                try:
                    while data:
                        data = data[out.write(data):]
                except OSError as error:
                    raise InputError(f"{args.out} cannot be written ({error.strerror}); free some space, and the same command "
                                     "goes on from here.") from None
                progress.done += 1
                progress.tokens += len(result.ids)
                progress.failed += result.error is not None
    print(progress.summary())
    if progress.failed:
        raise InputError(f"{progress.failed} of the prompts could not be continued; {args.out} has a sentence for each.")


# ------------------------------------------------------------------------------------------------ benchmark

def kept_parts(config, cr, seed=0):
    """The part of its tokens that each head keeps, (L, G), their mean 1 / cr. Log-normal, and the deeper half of the layers
    keeps less: about the spread of figure 6."""
    L, G = config.n_layer, config.n_kv_head
    part = (0.7 * torch.randn(L, G, generator=torch.Generator().manual_seed(seed))).exp()
    part *= torch.where(torch.arange(L) < L // 2, 1.4, 0.6)[:, None]
    low, high = 0.0, 1e3
    for _ in range(60):                                          # the factor after which the mean, none above 1, is right
        factor = (low + high) / 2
        low, high = (factor, high) if (part * factor).clamp(max=1).mean() < 1 / cr else (low, factor)
    return (part * high).clamp(max=1)


def forced(kept, device):
    """A Cache that merges at random, each head as often as `kept` (L, G) says, whatever the model decides."""
    kept = kept.to(device)[..., None]

    class ForcedCache(dmc_fast.PagedCache):
        def attend(self, layer, q, k, v, alpha=None, omega=None):
            alpha = (torch.rand(k.shape[:3], device=k.device) >= kept[layer]).float()
            return super().attend(layer, q, k, v, alpha, omega)
    return ForcedCache


def copy_bandwidth(device):
    """Bytes per second, read and written, of copying a large tensor."""
    x = torch.empty(2 ** (30 if device.type == "cuda" else 25), device=device).normal_()
    y, best = torch.empty_like(x), math.inf
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        y.copy_(x)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * x.nbytes / best


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def attention_share(work):
    """The part of work()'s time that attention over the cache takes: of the kernels on a GPU, of the operators on a CPU."""
    with torch.profiler.profile() as profile:
        work()
    events = profile.key_averages()
    on_gpu = any(e.self_device_time_total for e in events)
    took = lambda e: e.self_device_time_total if on_gpu else e.self_cpu_time_total
    ours = ("decode_kernel", "combine_kernel", "attention", "aten::bmm", "softmax")
    return sum(took(e) for e in events if any(name in e.key for name in ours)) / max(1, sum(map(took, events)))


class Bench:
    """Throughput of one model at one length: `prompt` tokens in, `count` out, figures over the last half of those."""

    def __init__(self, model, prompt, count, gigabytes, texts):
        self.model, self.prompt, self.count, self.gigabytes, self.texts = model, prompt, count, gigabytes, texts
        weight = next(model.parameters())
        self.device, self.dtype, self.config = weight.device, weight.dtype, model.config
        self.weights = sum(p.nbytes for p in model.parameters())
        if not self.config.tie_embeddings:                       # of which a step reads a few rows
            self.weights -= model.embed_tokens.weight.nbytes
        self.page = 2 * 16 * self.config.head_dim * weight.element_size()
        self.bandwidth = copy_bandwidth(self.device)

    def largest_batch(self, kept, gain):
        """How many sequences of prompt + count tokens fit, half a page of every head unused, and a hundredth to spare; and of
        their prompts, of which the engine takes in the last one only if it fits uncompressed."""
        heads, batch = kept.numel(), 1
        begun, pages = (int((tokens * kept / 16 + 0.5).sum()) for tokens in (self.prompt, self.prompt + self.count))
        for _ in range(3):                                       # what a row takes besides pages depends on how many there are
            fit = pages_that_fit(self.model, batch, self.gigabytes, gain, capped=False)
            batch = int(0.99 * min(fit / pages, (fit - heads * (self.prompt // 16 + 1)) / (begun + 1.5 * heads)))
            batch = int(over_ranks(torch.tensor(batch, device=self.device), "MIN"))
            if batch < 1:
                raise InputError(f"a sequence of {self.prompt + self.count} tokens takes {pages:,} pages of cache, and there "
                                 f"are {fit:,}; lower --prompt-tokens or --tokens, or raise --cache-gb.")
        return batch

    def run(self, batch, gain=None, whole=True):
        """The figures of `batch` sequences that run together from first to last. whole False: most of the first half, over
        which nothing is measured, is taken in with the prompt instead of generated: the cache ends up in the same state."""
        pages = pages_that_fit(self.model, batch, self.gigabytes, gain)
        engine = Engine(self.model, batch, pages, gain=gain)
        skipped = 0 if whole else max(0, self.count // 2 - 8)
        prompt, count, half, begun = self.prompt + skipped, self.count - skipped, self.count // 2 - skipped, time.perf_counter()
        self._warm(engine)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first = time.perf_counter()
        for i in range(batch):
            engine.submit(Request(self.texts(i, prompt), count, key=i))
        engine.step()
        synchronize(self.device)
        prefill = (time.perf_counter() - first) / len(engine.running)
        while engine.waiting and engine.steps < half - 4:        # it takes in more as it learns how much the first have merged
            engine.step()
        if engine.waiting:
            raise InputError(f"only {len(engine.running)} of {batch} sequences fit the pool; lower --batch.")
        while engine.steps < half - 4:
            engine.step()
        share = attention_share(lambda: [engine.step() for _ in range(2)])
        while engine.steps < half:
            engine.step()
        synchronize(self.device)
        before, start, waited = self._held(engine), time.perf_counter(), engine.waited
        while engine.steps < count - 2:                          # the last step gives the pages back
            engine.step()
        synchronize(self.device)
        step, after = (time.perf_counter() - start) / (engine.steps - half), self._held(engine)
        tokens, slots, used = ((a + b) / 2 for a, b in zip(before, after, strict=True))
        logical = slots * 2 * self.config.head_dim * self.dtype.itemsize
        limit = (self.weights + logical) / self.bandwidth
        return {"batch": batch, "cr": tokens / slots, "tokens_per_second": batch / step, "ms_per_step": 1e3 * step,
                "prefill_ms": 1e3 * prefill if whole else None, "kv_bytes_logical": logical,
                "kv_bytes_allocated": used * self.page, "page_waste": 1 - logical / (used * self.page),
                "pool_bytes": pages * self.page,
                "peak_bytes": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None,
                "attention_share": share, "share_of_memory_bound_limit": limit / step,
                "host_share": 1 - (engine.waited - waited) / (step * (engine.steps - half)),
                "preempted": engine.preempted, "seconds": time.perf_counter() - begun}

    def _warm(self, engine):
        """Compile and capture whatever there is, with one short sequence."""
        for _ in engine.run([Request(self.texts(0, self.prompt), 4, key=None)]):
            pass
        engine.steps = 0

    def _held(self, engine):
        """Tokens, slots and pages, of all heads."""
        lengths, ages = engine.cache.lengths, engine.cache.ages
        return int(ages.clamp(min=0).sum()), int(lengths.sum()), int((-(-lengths // engine.cache.page_size)).sum())


# --- peers: they decode a quarter of the tokens, at about the length that ours have on average, after a prompt that stands for
# all before it

def timed(step, count, device):
    """Seconds per call of step(), of the last three quarters of `count` calls: the first may compile."""
    for i in range(count):
        if i == count // 4:
            synchronize(device)
            start = time.perf_counter()
        step()
    synchronize(device)
    return (time.perf_counter() - start) / (count - count // 4)


def as_transformers(bench):
    """The same weights, not copied, as a model of `transformers`."""
    from transformers import LlamaConfig, LlamaForCausalLM
    c = bench.config
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
            max_position_embeddings=c.max_seq_len, tie_word_embeddings=False))
    weights = {name if name.startswith("lm_head") else f"model.{name}": p for name, p in bench.model.state_dict().items()}
    theirs.load_state_dict(weights, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config).to(bench.device)
    return theirs.eval()


@torch.no_grad()
def by_transformers(bench, batch):
    """Seconds per step of `transformers` with its static cache, compiled on a GPU, on the same weights; None without it."""
    try:
        from transformers import StaticCache
    except ImportError:
        return None
    theirs, count, start = as_transformers(bench), bench.count // 4, bench.prompt + bench.count * 5 // 8
    cache = StaticCache(config=theirs.config, max_cache_len=start + count)
    forward = torch.compile(theirs.forward, mode="reduce-overhead") if bench.device.type == "cuda" else theirs.forward
    token, at = (torch.zeros(*size, dtype=torch.long, device=bench.device) for size in ((batch, 1), (1,)))
    for i in range(0, start, bench.prompt):                      # in portions, whose activations fit
        tokens = torch.stack([torch.tensor(bench.texts(row, bench.prompt)) for row in range(batch)]).to(bench.device)
        tokens = tokens[:, :min(bench.prompt, start - i)]
        theirs(tokens, past_key_values=cache, cache_position=torch.arange(i, i + tokens.size(1), device=bench.device),
               logits_to_keep=1)
    at.fill_(start)

    def step():
        logits = forward(token, past_key_values=cache, cache_position=at.clone()).logits
        token.copy_(logits[:, -1:].argmax(-1))
        at.add_(1)
    return timed(step, count, bench.device)


class StaticCache:
    """What gpt-fast does: keys and values of all positions in one tensor, of which a step reads all and masks the rest."""

    def __init__(self, config, batch, device, dtype, start, length):
        L, G, D = config.n_layer, config.n_kv_head, config.head_dim
        self.gain, self.seen = 1.0, [start] * L
        self.keys, self.values = (torch.randn(L, batch, G, length, D, device=device, dtype=dtype) for _ in range(2))
        self.at, self.slots = torch.full((1,), start, device=device), torch.arange(length, device=device)
        for x in (self.keys, self.values, self.at):              # or its CUDA graphs would copy the cache at every step
            torch._dynamo.mark_static_address(x)
        for x in (self.keys, self.values, self.at):              # or its CUDA graphs would copy the cache at every step
            torch._dynamo.mark_static_address(x)
        self.cos, self.sin = (x.float() for x in dmc.rotary_table(config, length, device))

    def attend(self, layer, q, k, v, alpha=None, omega=None):
        q, k = (dmc.rotate(x, self.cos[self.at], self.sin[self.at]) for x in (q, k))
        keys, values = (x[layer].index_copy_(2, self.at, new) for x, new in ((self.keys, k), (self.values, v)))
        mask = (self.slots <= self.at)[None, None, None]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))


@torch.no_grad()
def by_compilation(bench, batch):
    """Seconds per step of our plain model over a StaticCache, compiled on a GPU, as gpt-fast is."""
    count, start = bench.count // 4, bench.prompt + bench.count * 5 // 8
    cache = StaticCache(bench.config, batch, bench.device, bench.dtype, start, start + count)
    token = torch.zeros(batch, 1, dtype=torch.long, device=bench.device)
    forward = lambda: bench.model(token, cache, gain=1.0, last=True)[0]
    if bench.device.type == "cuda":
        forward = torch.compile(forward, mode="reduce-overhead", fullgraph=True)

    def step():
        token.copy_(forward().argmax(-1))
        cache.at.add_(1)
    return timed(step, count, bench.device)


PEERS = {"transformers, static cache": by_transformers, "one static tensor, as in gpt-fast": by_compilation}


# --- the table

COLUMNS = (("batch", "batch", "d"), ("tokens_per_second", "tokens/s", ",.0f"), ("ratio", "ratio", ".2f"), ("cr", "CR", ".2f"),
           ("ms_per_step", "ms/step", ".1f"), ("prefill_ms", "prefill ms", ".0f"), ("kv_bytes_logical", "KV GB", ".3g"),
           ("kv_bytes_allocated", "paged GB", ".3g"), ("peak_bytes", "peak GB", ".3g"), ("page_waste", "waste", ".1%"),
           ("attention_share", "attention", ".0%"), ("share_of_memory_bound_limit", "of limit", ".0%"))


def bench_head():
    return f"{'':<44}" + "".join(f"{title:>{max(len(title), 8) + 2}}" for _, title, _ in COLUMNS)


def bench_line(row):
    cells = [f"{row['name']:<44}"]
    for key, title, form in COLUMNS:
        value = row.get(key)
        value = value / 1e9 if value is not None and "bytes" in key else value
        cells.append(f"{'-' if value is None else format(value, form):>{max(len(title), 8) + 2}}")
    return "".join(cells)


def plot_bench(rows, path):
    """Figure 5: tokens/s by CR, at the largest batch and at that of CR 1. Returns whether matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for kind in dict.fromkeys(row["kind"] for row in rows if row["kind"] != "peer"):
        points = [(row["cr"], row["tokens_per_second"]) for row in rows if row["kind"] == kind]
        axes.plot(*zip(*points, strict=True), marker="o", label=kind)
    for row in rows:
        if row["kind"] == "peer":
            axes.axhline(row["tokens_per_second"], color="grey", linestyle=":", linewidth=1)
            axes.annotate(f"{row['name']}, batch {row['batch']}", (1, row["tokens_per_second"]), fontsize=7, color="grey",
                          xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set(xlabel="compression ratio", ylabel="tokens per second", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return True


def bench_model(args, device):
    """The model to measure, its name, and texts(i, n): n token ids for sequence i."""
    dtype, rng = torch.bfloat16 if device == "cuda" else torch.float32, lambda i: torch.Generator().manual_seed(i)
    if not args.ckpt:
        name = args.model or ("llama2-7b" if device == "cuda" else "toy")
        model = random_model(name, OPS["fast"], device, dtype, rank_count())
        vocabulary = model.config.vocab_size
        return model, f"{name}, random weights", lambda i, n: torch.randint(vocabulary, (n,), generator=rng(i)).tolist()
    folder = find_checkpoint(args.ckpt)
    files = [args.prompt_file] if args.prompt_file else sorted(Path(__file__).parent.glob("*.py"))
    ids = Tokenizer.from_folder(folder).encode("".join(read_text(f, "--prompt-file") for f in files), special=False)

    def texts(i, n):
        start = int(torch.randint(len(ids), (1,), generator=rng(i)))
        return [ids[(start + t) % len(ids)] for t in range(n)]
    return load_part(folder, OPS["fast"], device, dtype), str(folder), texts


def bench_cases(model, crs, ids):
    """(name, config, Cache, the part of its tokens that each head keeps, gain) of what is compared, uncompressed first. A DMC
    model decides by itself; for any other, decisions are forced to the CRs. ids: a text to see how much the model keeps."""
    config, device = model.config, next(model.parameters()).device
    yield "CR 1", config, dmc_fast.PagedCache, torch.ones(config.n_layer, config.n_kv_head), 0.0 if config.dmc else 1.0
    if config.dmc:
        yield "its own decisions", config, dmc_fast.PagedCache, 1 - decisions(model, ids).float().mean(-1).cpu(), None
        return
    for cr in crs:
        kept = kept_parts(config, cr)
        yield f"CR {cr:g}", replace(config, dmc=True), forced(kept, device), kept, None


def bench_length(bench, args):
    """Yield a row of figures for each case, batch and peer, at one length."""
    model, config, first = bench.model, bench.config, None
    for name, case, cache, kept, gain in bench_cases(model, args.cr, bench.texts(0, bench.prompt)):
        model.config, model.Cache = case, cache
        largest = bench.largest_batch(kept, gain)
        first = first or largest
        batches = {n: f"batch {n}" for n in args.batch} if args.batch else {first: "batch of CR 1", largest: "largest batch"}
        for batch, kind in batches.items():
            yield {"name": f"{name}, {kind}", "kind": kind, **bench.run(batch, gain, whole=kind != "batch of CR 1")}
    model.config, model.Cache = replace(config, dmc=False), dmc_fast.PagedCache
    for name, peer in PEERS.items() if rank_count() == 1 else ():
        batch = args.batch[0] if args.batch else first
        while batch:
            try:
                if seconds := peer(bench, batch):
                    yield {"name": name, "kind": "peer", "batch": batch, "cr": 1.0, "tokens_per_second": batch / seconds,
                           "ms_per_step": 1e3 * seconds}
                break
            except torch.OutOfMemoryError:
                batch = int(0.85 * batch)
    model.config = config


def benchmark(args, device):
    """--bench: figure 5 and more, for every length asked for. Prints as it goes, then writes --out, and a plot beside it."""
    path, on_gpu, ranks = args.out or Path("bench.json"), device == "cuda", rank_count()
    prompts, count = args.prompt_tokens or [2048 if on_gpu else 128], args.tokens or (2048 if on_gpu else 128)
    gigabytes = args.cache_gb if args.cache_gb is not None or on_gpu else 0.005
    if count < 16:
        raise InputError(f"--tokens {count} is too few to measure; give at least 16.")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written; check --out.")
    model, name, texts = bench_model(args, device)
    if max(prompts) + count > model.config.max_seq_len:
        raise InputError(f"{max(prompts)} tokens and {count} more do not fit the model's {model.config.max_seq_len} positions; "
                         "lower --prompt-tokens or --tokens.")
    how = "The model decides." if model.config.dmc else (
        "Decisions are forced: heads merge at random, each at a rate of its own, about as different as in the paper's figure 6."
    )
    how += f" {ranks} ranks share the model; CR, bytes and shares are those of rank 0." if ranks > 1 else ""
    print(f"{name}. {how}")
    rows = []
    for prompt in prompts:
        bench = Bench(model, prompt, count, gigabytes, texts)
        print(f"\n{prompt:,} tokens in, {count:,} generated, mean over the last {count // 2:,}; copy bandwidth "
              f"{bench.bandwidth / 1e12:.3f} TB/s; weights {bench.weights / 1e9:.2f} GB\n{bench_head()}")
        base = None
        for row in bench_length(bench, args):
            base = base or row["tokens_per_second"]
            rows.append({"prompt": prompt, "tokens": count, "ratio": row["tokens_per_second"] / base, **row})
            print(bench_line(rows[-1]), flush=True)
        alone = Bench(model, prompt, 16, gigabytes, texts).run(1, 0.0 if model.config.dmc else 1.0)
        times = prompt * alone["ms_per_step"] / alone["prefill_ms"]
        print(f"prefill of {prompt:,} tokens: {alone['prefill_ms']:.1f} ms; token by token, {alone['ms_per_step']:.1f} ms "
              f"each, it takes {times:.0f} times as long")
        rows.append({"prompt": prompt, "tokens": 16, "name": "CR 1, alone", "kind": "alone", **alone})
    if this_rank():
        return
    write_json(path, {"model": name, "decisions": how, "copy_bandwidth": bench.bandwidth, "weight_bytes": bench.weights,
                      "rows": rows, **provenance()})
    plot = path.with_suffix(".png")
    drawn = plot_bench([row for row in rows if row["prompt"] == prompts[0] and row["kind"] != "alone"], plot)
    print("\nThe paper's own ratios, on an H100 with Megatron-LM: 3.4 to 3.7 at CR 4, up to 7 at CR 8 (published, not measured "
          f"here).\nFigures are in {path}" + (f", drawn in {plot}." if drawn else "; with matplotlib there is a plot too."))


def run(args):
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda asks for a GPU that PyTorch does not see; leave it out, or check nvidia-smi.")
    device, ranks = args.device or ("cuda" if torch.cuda.is_available() else "cpu"), rank_count()
    if ranks > 1 and args.show_merges:
        raise InputError(f"--show-merges looks at all heads, and {ranks} ranks have a part each; run it without torchrun.")
    if ranks > 1 and device == "cuda":
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise InputError(f"every rank needs a GPU of its own, and there are {torch.cuda.device_count()}; lower "
                             "--nproc_per_node.")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if args.prompts and not args.out:
        raise InputError("--prompts needs --out, a file for the results.")
    if args.prompts and not args.prompts.is_file():
        raise InputError(f"{args.prompts} is no file; check --prompts.")
    if args.bench:
        benchmark(args, device)
        return
    done = read_results(args.out) if args.prompts else None
    if args.random_weights:
        name, facts, tokenizer = f"{args.ckpt}, random weights", {}, Tokenizer.bytes()
        model = random_model(args.ckpt, OPS[args.ops], device, ranks=ranks)
    else:
        name = find_checkpoint(args.ckpt)
        model, tokenizer = load_part(name, OPS[args.ops], device), Tokenizer.from_folder(name)
        facts = read_json(name / "config.json").get("dmc", {})
    text = read_text(args.prompt_file, "--prompt-file") if args.prompt_file else args.prompt
    prompt = tokenizer.encode(text, prefix=True)
    if not prompt:
        raise InputError(EMPTY)
    print(f"{name}\n")
    if args.show_merges:
        show_merges(args, model, tokenizer, prompt, name)
    elif args.prompts:
        answer_prompts(args, model, tokenizer, facts, done)
    else:
        stream_samples(args, model, tokenizer, prompt, facts)


@contextmanager
def silence():
    with Path(os.devnull).open("w", errors="replace") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def main(argv=None):
    sys.stdout.reconfigure(errors="replace")      # a terminal that cannot show a character shows ? instead
    warnings.formatwarning = lambda message, *_: f"generate.py: warning: {message}\n"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")             # torch's profiler is not to talk in between
    try:
        with silence() if this_rank() else nullcontext():
            run(parse(argv))
        return 0
    except InputError as error:
        if this_rank():             # rank 0 says it sooner, and torchrun ends the others, unless only this one knows
            time.sleep(5)
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("generate.py: the GPU's memory ran out; lower --cache-gb or --batch.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
