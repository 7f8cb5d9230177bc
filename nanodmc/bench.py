"""The paper's figure 5: throughput with and without compression, and what it is made of.

A DMC model decides by itself. For any other model decisions are forced: heads merge at random.
"""

import copy
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from dmc_fast import PagedCache
from nanodmc.checkpoint import find_checkpoint
from nanodmc.cli import OPS, installing, provenance, wrapped
from nanodmc.engine import Engine, Request
from nanodmc.evaluate import decisions
from nanodmc.files import InputError, read_text, write_json
from nanodmc.parallel import load_part, over_ranks, random_part, rank_count, this_rank
from nanodmc.peers import PEERS, synchronize
from nanodmc.plots import plot_bench
from nanodmc.pool import PAGE, page_bytes, pages_that_fit
from nanodmc.tokenizer import Tokenizer

# ------------------------------------------------------------------------------ what is compared

class Case(NamedTuple):
    """One of the things compared."""
    name: str
    model: torch.nn.Module
    cache_class: type
    kept: torch.Tensor          # (L, G): the part of its tokens that each head keeps
    gain: float | None          # as in Transformer.hidden


def kept_parts(config, cr, seed=0):
    """The part of its tokens that each head keeps, (L, G), with the mean 1 / cr and none above 1.

    Log-normal, and less in the deeper half of the layers: about the spread of figure 6.
    """
    L, G = config.n_layer, config.n_kv_head
    part = (0.7 * torch.randn(L, G, generator=torch.Generator().manual_seed(seed))).exp()
    part *= torch.where(torch.arange(L) < L // 2, 1.4, 0.6)[:, None]
    low, high = 0.0, 1e3
    for _ in range(60):                                # the factor at which the mean is right
        factor = (low + high) / 2
        less = (part * factor).clamp(max=1).mean() < 1 / cr
        low, high = (factor, high) if less else (low, factor)
    return (part * high).clamp(max=1)


def forced(kept, device):
    """A PagedCache that merges at random, each head as often as `kept` (L, G) says."""
    kept = kept.to(device)[..., None]

    class ForcedCache(PagedCache):
        def attend(self, layer, q, k, v, alpha=None, omega=None):
            alpha = (torch.rand(k.shape[:3], device=k.device) >= kept[layer]).float()
            return super().attend(layer, q, k, v, alpha, omega)
    return ForcedCache


def uncompressed(model):
    """The Case of a cache that keeps every token."""
    config = model.config
    kept = torch.ones(config.n_layer, config.n_kv_head)
    return Case("CR 1", model, PagedCache, kept, 0.0 if config.dmc else 1.0)


def bench_cases(model, crs, ids):
    """The Cases to compare, the uncompressed one first. ids: a text to see what the model keeps."""
    yield uncompressed(model)
    if model.config.dmc:
        kept = 1 - decisions(model, ids).float().mean(-1).cpu()
        yield Case("own decisions", model, PagedCache, kept, None)
        return
    deciding = copy.copy(model)                        # the same weights, in a model that decides
    deciding.config = replace(model.config, dmc=True)
    for cr in crs:
        kept = kept_parts(model.config, cr)
        cache_class = forced(kept, next(model.parameters()).device)
        yield Case(f"CR {cr:g}", deciding, cache_class, kept, None)


# ------------------------------------------------------------------------------------- measuring

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


def attention_share(work):
    """The part of work()'s time that attention over the cache takes.

    Of the time of kernels on a GPU, of operators on a CPU.
    """
    with torch.profiler.profile() as profile:
        work()
    events = profile.key_averages()
    on_gpu = any(e.self_device_time_total for e in events)
    took = lambda e: e.self_device_time_total if on_gpu else e.self_cpu_time_total
    ours = ("decode_kernel", "combine_kernel", "attention", "aten::bmm", "softmax")
    attention = sum(took(e) for e in events if any(name in e.key for name in ours))
    return attention / max(1, sum(map(took, events)))


def held(engine):
    """Tokens, slots and pages in an engine's cache, over all heads."""
    lengths, ages = engine.cache.lengths, engine.cache.ages
    pages = -(-lengths // engine.cache.page_size)
    return int(ages.clamp(min=0).sum()), int(lengths.sum()), int(pages.sum())


class Bench:
    """Throughput of a model's Cases at one length: `prompt` tokens in, `count` generated.

    Figures are over the last half of those generated. texts(i, n): n token ids for sequence i.
    """

    def __init__(self, model, prompt, count, gigabytes, texts):
        self.model, self.prompt, self.count = model, prompt, count
        self.gigabytes, self.texts, self.config = gigabytes, texts, model.config
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.weights = sum(p.nbytes for p in model.parameters())
        if not self.config.tie_embeddings:                       # of which a step reads a few rows
            self.weights -= model.embed_tokens.weight.nbytes
        self.page = page_bytes(self.config, self.dtype)
        self.bandwidth = copy_bandwidth(self.device)

    def pages(self, case, batch, capped=True):
        return pages_that_fit(case.model, batch, self.gigabytes, case.gain, capped,
                              case.cache_class)

    def largest_batch(self, case):
        """How many sequences of prompt + count tokens fit, with 1% of the pool to spare.

        Each head has half an unused page. Their prompts have to fit too, and the engine takes in
        the last one only if it fits uncompressed.
        """
        kept, length = case.kept, self.prompt + self.count
        heads, batch = kept.numel(), 1
        begun, pages = (int((n * kept / PAGE + 0.5).sum()) for n in (self.prompt, length))
        for _ in range(3):                # what a row takes besides pages depends on their number
            fit = self.pages(case, batch, capped=False)
            prompts = (fit - heads * (self.prompt // PAGE + 1)) / (begun + 1.5 * heads)
            batch = int(0.99 * min(fit / pages, prompts))
            batch = int(over_ranks(torch.tensor(batch, device=self.device), "MIN"))
            if batch < 1:
                raise InputError(
                    f"a sequence of {length} tokens takes {pages:,} pages of cache, and there are "
                    f"{fit:,}; lower --prompt-tokens or --tokens, or raise --cache-gb.")
        return batch

    def run(self, case, batch, count=None, whole=True):
        """The figures of `batch` sequences that run together from first to last, as a dict.

        count: tokens to generate in the place of the Bench's. whole False: most of the first half,
        over which nothing is measured, comes with the prompt instead of being generated. The cache
        ends up in the same state.
        """
        begun, total = time.perf_counter(), count or self.count
        skipped = 0 if whole else max(0, total // 2 - 8)
        prompt, count, half = self.prompt + skipped, total - skipped, total // 2 - skipped
        pages = self.pages(case, batch)
        engine = Engine(case.model, batch, pages, gain=case.gain, cache_class=case.cache_class)
        self.warm(engine)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        prefill = self.fill(engine, batch, prompt, count, half)
        share = attention_share(lambda: [engine.step() for _ in range(2)])
        while engine.steps < half:
            engine.step()
        synchronize(self.device)
        before, start, waited = held(engine), time.perf_counter(), engine.waited
        while engine.steps < count - 2:                          # the last step gives pages back
            engine.step()
        synchronize(self.device)
        seconds, after = time.perf_counter() - start, held(engine)
        step = seconds / (engine.steps - half)
        tokens, slots, used = ((a + b) / 2 for a, b in zip(before, after, strict=True))
        logical = slots * 2 * self.config.head_dim * self.dtype.itemsize
        limit = (self.weights + logical) / self.bandwidth
        on_gpu = self.device.type == "cuda"
        return {"batch": batch, "cr": tokens / slots, "tokens_per_second": batch / step,
                "ms_per_step": 1e3 * step, "prefill_ms": 1e3 * prefill if whole else None,
                "kv_bytes_logical": logical, "kv_bytes_allocated": used * self.page,
                "page_waste": 1 - logical / (used * self.page), "pool_bytes": pages * self.page,
                "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
                "attention_share": share, "share_of_memory_bound_limit": limit / step,
                "host_share": 1 - (engine.waited - waited) / seconds,
                "preempted": engine.preempted, "seconds": time.perf_counter() - begun}

    def warm(self, engine):
        """Compile and capture whatever there is, with one short sequence."""
        for _ in engine.run([Request(self.texts(0, self.prompt), 4)]):
            pass
        engine.steps = 0

    def fill(self, engine, batch, prompt, count, half):
        """Take in all sequences, and step until shortly before `half`.

        Returns the seconds that one prompt took. Raises InputError where not all sequences fit.
        """
        start = time.perf_counter()
        for i in range(batch):
            engine.submit(Request(self.texts(i, prompt), count, key=i))
        engine.step()
        synchronize(self.device)
        prefill = (time.perf_counter() - start) / len(engine.running)
        # it takes in more as it learns how much the first ones have merged
        while engine.waiting and engine.steps < half - 4:
            engine.step()
        if engine.waiting:
            raise InputError(f"only {len(engine.running)} of {batch} sequences fit the pool; "
                             "lower --batch.")
        while engine.steps < half - 4:
            engine.step()
        return prefill


def bench_rows(bench, args):
    """Yield a row of figures, a dict, for each Case and batch and for each peer, at one length."""
    first = None
    for case in bench_cases(bench.model, args.cr, bench.texts(0, bench.prompt)):
        largest = bench.largest_batch(case)
        first = first or largest
        batches = {first: "batch of CR 1", largest: "largest batch"}
        if args.batch:
            batches = {n: f"batch {n}" for n in args.batch}
        for batch, kind in batches.items():
            figures = bench.run(case, batch, whole=kind != "batch of CR 1")
            yield {"name": f"{case.name}, {kind}", "kind": kind, **figures}
    for name, peer in PEERS.items() if rank_count() == 1 else ():
        batch = args.batch[0] if args.batch else first
        while batch:
            try:
                if seconds := peer(bench, batch):
                    yield {"name": name, "kind": "peer", "batch": batch, "cr": 1.0,
                           "tokens_per_second": batch / seconds, "ms_per_step": 1e3 * seconds}
                break
            except torch.OutOfMemoryError:
                batch = int(0.85 * batch)


# --------------------------------------------------------------------------------------- --bench

COLUMNS = (("batch", "batch", 6, "d"), ("tokens_per_second", "tokens/s", 9, ",.0f"),
           ("ratio", "ratio", 6, ".2f"), ("cr", "CR", 6, ".2f"),
           ("ms_per_step", "ms/step", 8, ".1f"), ("kv_bytes_logical", "KV GB", 8, ".3f"),
           ("share_of_memory_bound_limit", "of limit", 9, ".0%"))     # key, title, width, format


def bench_head():
    return f"{'':<28}" + "".join(f"{title:>{width}}" for _, title, width, _ in COLUMNS)


def bench_line(row):
    cells = [f"{row['name']:<28}"]
    for key, _, width, form in COLUMNS:
        value = row.get(key)
        value = value / 1e9 if value is not None and "bytes" in key else value
        cells.append(f"{'-' if value is None else format(value, form):>{width}}")
    return "".join(cells)


def bench_model(args, device):
    """The model to measure, its name, and texts(i, n): n token ids for sequence i."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rng = lambda i: torch.Generator().manual_seed(i)
    if not args.ckpt:
        name = args.model or ("llama2-7b" if device == "cuda" else "toy")
        model = random_part(name, OPS["fast"], device, dtype)
        random = lambda i, n: torch.randint(model.config.vocab_size, (n,), generator=rng(i))
        return model, f"{name}, random weights", lambda i, n: random(i, n).tolist()
    folder, root = find_checkpoint(args.ckpt), Path(__file__).parents[1]
    files = [args.prompt_file] if args.prompt_file else sorted(root.glob("*.py"))
    text = "".join(read_text(file, "--prompt-file") for file in files)
    ids = Tokenizer.from_folder(folder).encode(text, special=False)

    def texts(i, n):
        start = int(torch.randint(len(ids), (1,), generator=rng(i)))
        return [ids[(start + t) % len(ids)] for t in range(n)]
    return load_part(folder, OPS["fast"], device, dtype), str(folder), texts


def benchmark(args, device):
    """--bench: every Case at every length asked for.

    Prints as it goes, then writes args.out, and a plot beside it. Raises InputError.
    """
    path, on_gpu, ranks = args.out or Path("bench.json"), device == "cuda", rank_count()
    prompts = args.prompt_tokens or [2048 if on_gpu else 128]
    count = args.tokens or (2048 if on_gpu else 128)
    gigabytes = args.cache_gb if args.cache_gb is not None or on_gpu else 0.005
    if count < 16:
        raise InputError(f"--tokens {count} is too few to measure; give at least 16.")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written; check --out.")
    model, name, texts = bench_model(args, device)
    if max(prompts) + count > model.config.max_seq_len:
        raise InputError(
            f"{max(prompts)} tokens and {count} more do not fit the model's "
            f"{model.config.max_seq_len} positions; lower --prompt-tokens or --tokens.")
    how = ("The model decides." if model.config.dmc else
           "Decisions are forced: heads merge at random, each at a rate of its own, about as "
           "different as in the paper's figure 6.")
    if ranks > 1:
        how += f" {ranks} ranks share the model; CR, bytes and shares are those of rank 0."
    print(wrapped(f"{name}. {how}"))
    rows = []
    for prompt in prompts:
        bench = Bench(model, prompt, count, gigabytes, texts)
        rows += measure(bench, args)
    if this_rank():
        return
    write_json(path, {"model": name, "decisions": how, "copy_bandwidth": bench.bandwidth,
                      "weight_bytes": bench.weights, "rows": rows, **provenance()})
    plot = path.with_suffix(".png")
    first = [row for row in rows if row["prompt"] == prompts[0] and row["kind"] != "alone"]
    drawn = plot_bench(first, plot)
    print("\nThe paper's own ratios, on an H100 with Megatron-LM: 3.4 to 3.7 at CR 4, up to 7\n"
          "at CR 8 (published, not measured here).")
    print(wrapped(f"Figures are in {path}, drawn in {plot}.") if drawn else
          f"{wrapped(f'Figures are in {path}. For a plot too:')}\n{installing('matplotlib')}")


def measure(bench, args):
    """Print and return the rows of one length; the last is that of one sequence alone."""
    prompt, count, base = bench.prompt, bench.count, None
    print(f"\n{prompt:,} tokens in, {count:,} generated, mean over the last {count // 2:,}\n"
          f"copy bandwidth {bench.bandwidth / 1e12:.3f} TB/s, "
          f"weights {bench.weights / 1e9:.2f} GB\n\n{bench_head()}")
    rows = []
    for row in bench_rows(bench, args):
        base = base or row["tokens_per_second"]
        ratio = row["tokens_per_second"] / base
        rows.append({"prompt": prompt, "tokens": count, "ratio": ratio, **row})
        print(bench_line(rows[-1]), flush=True)
    alone = bench.run(uncompressed(bench.model), 1, count=16)
    times = prompt * alone["ms_per_step"] / alone["prefill_ms"]
    print(f"prefill of {prompt:,} tokens: {alone['prefill_ms']:.1f} ms; "
          f"token by token {times:.0f} times as long")
    return [*rows, {"prompt": prompt, "tokens": 16, "name": "CR 1, alone", "kind": "alone",
                    **alone}]
