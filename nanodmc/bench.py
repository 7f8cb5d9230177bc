"""The paper's figure 5: throughput with and without compression, and what it is made of.

nanodmc/cases.py says what is compared.
"""

import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch

from nanodmc.cases import Case, bench_cases
from nanodmc.checkpoint import find_checkpoint
from nanodmc.cli import OPS, installing, provenance, wrapped
from nanodmc.engine import Engine
from nanodmc.files import InputError, write_json
from nanodmc.parallel import load_part, over_ranks, random_part, rank_count, this_rank
from nanodmc.peers import PEERS, attention_share, copy_bandwidth, peer_row, settle, synchronize
from nanodmc.plots import plot_bench
from nanodmc.pool import PAGE, page_bytes, pages_that_fit
from nanodmc.prompts import read_prompt
from nanodmc.requests import Request
from nanodmc.results import refuse_files_of
from nanodmc.tokenizer import Tokenizer

# ------------------------------------------------------------------------------------- measuring

def held(engine):
    """Tokens, slots and pages in an engine's cache, over all heads."""
    lengths, ages = engine.cache.lengths, engine.cache.ages
    pages = -(-lengths // engine.cache.page_size)
    return int(ages.clamp(min=0).sum()), int(lengths.sum()), int(pages.sum())


class Bench:
    """Throughput of a model's Cases at one length: `prompt` tokens in, `count` generated.

    Figures are over the last half of those generated, but for the last two steps, which are
    profiled. texts(i, n): n token ids for sequence i.
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
        self.bandwidth, self.on_gpu = copy_bandwidth(self.device), self.device.type == "cuda"

    def pages(self, case, batch, capped=True):
        return pages_that_fit(case.model, batch, self.gigabytes, case.gain, capped,
                              case.cache_class)

    def skipped(self, case, whole, count=None):
        """How many tokens come with the prompt where the first half is not generated.

        Not all of it: sequences are admitted step by step, the more steps the more they merge. All
        ranks skip as many as the one that does least, though their heads merge as they like.
        """
        if whole:
            return 0
        steps = torch.tensor(8 * (1 + math.ceil(1 / case.kept.mean().item())), device=self.device)
        return max(0, (count or self.count) // 2 - int(over_ranks(steps, "MAX")))

    def largest_batch(self, case, whole=True):
        """How many sequences of prompt + count tokens fit, with 1% of the pool to spare.

        Each head has half an unused page. Their prompts have to fit too, and the engine takes in
        the last one only if it fits uncompressed.
        """
        kept, length = case.kept, self.prompt + self.count
        heads, batch = kept.numel(), 1
        prompt = self.prompt + self.skipped(case, whole)
        begun, pages = (int((n * kept / PAGE + 0.5).sum()) for n in (prompt, length))
        for _ in range(3):                # what a row takes besides pages depends on their number
            fit = self.pages(case, batch, capped=False)
            prompts = (fit - heads * (prompt // PAGE + 1)) / (begun + 1.5 * heads)
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
        skipped = self.skipped(case, whole, total)
        prompt, count, half = self.prompt + skipped, total - skipped, total // 2 - skipped
        settle(self.device)
        pages = self.pages(case, batch)
        engine = Engine(case.model, batch, pages, gain=case.gain, cache_class=case.cache_class)
        self.warm(engine)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        prefill = self.fill(engine, batch, prompt, count, half)
        while engine.steps < half:
            engine.step()
        synchronize(self.device)
        before, start, waited = held(engine), time.perf_counter(), engine.waited
        while engine.steps < count - 4:
            engine.step()
        synchronize(self.device)
        seconds, after = time.perf_counter() - start, held(engine)
        waited = engine.waited - waited
        # after what is timed, as a profiler slows down what follows; the last step frees pages
        share = attention_share(lambda: [engine.step() for _ in range(2)])
        step = seconds / (count - 4 - half)
        tokens, slots, used = ((a + b) / 2 for a, b in zip(before, after, strict=True))
        logical = slots * 2 * self.config.head_dim * self.dtype.itemsize
        limit = (self.weights + logical) / self.bandwidth
        return {"batch": batch, "cr": tokens / slots, "tokens_per_second": batch / step,
                "ms_per_step": 1e3 * step, "prefill_ms": 1e3 * prefill if whole else None,
                "kv_bytes_logical": logical, "kv_bytes_allocated": used * self.page,
                "page_waste": 1 - logical / (used * self.page), "pool_bytes": pages * self.page,
                "peak_bytes": torch.cuda.max_memory_allocated() if self.on_gpu else None,
                "attention_share": share, "share_of_memory_bound_limit": limit / step,
                "host_share": 1 - waited / seconds,
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


class Measurement(NamedTuple):
    """One row to come. case None: a peer."""
    name: str
    kind: str
    case: Case | None
    batch: int
    whole: bool = False         # as in Bench.run
    count: int | None = None


def planned(bench, args):
    """The Measurements of one length. Only the first largest batch generates its first half too.

    On a GPU peers come last: what they break is broken after ours. On a CPU, where they compile
    nothing and speed drifts within minutes, next to the one that they are compared with.
    """
    cases = list(bench_cases(bench.model, args.cr, bench.texts(0, bench.prompt)))
    plan, first = [], None
    for case in cases:
        whole = case is cases[0]
        largest = bench.largest_batch(case, whole)
        first = first or largest
        batches = {first: "batch of CR 1", largest: "largest batch"}
        if args.batch:
            batches = {n: f"batch {n}" for n in args.batch}
        plan += [Measurement(f"{case.name}, {kind}", kind, case, batch, whole or bool(args.batch))
                 for batch, kind in batches.items()]
    plan.append(Measurement("CR 1, alone", "alone", cases[0], 1, True, count=16))
    if rank_count() == 1:
        batch, at = args.batch[0] if args.batch else first, len(plan) if bench.on_gpu else 1
        plan[at:at] = [Measurement(name, "peer", None, batch) for name in PEERS]
    return plan


FLOPS_PER_BYTE = 130        # done in a prefill while a byte is copied, on an H100
COMPILING = 75, 3           # seconds on a GPU, for a peer and for ours


def expected(bench, todo):
    """About how many seconds a Measurement takes on a GPU; elsewhere in some unit."""
    count, prompt, kept = bench.count // 4, bench.prompt + bench.count * 5 // 8, None
    if todo.case:
        skipped = bench.skipped(todo.case, todo.whole, todo.count)
        count, prompt = (todo.count or bench.count) - skipped, bench.prompt + skipped
        kept = todo.case.kept.sum().item()
    kept = bench.config.n_layer * bench.config.n_kv_head if kept is None else kept
    slot = 2 * bench.config.head_dim * bench.dtype.itemsize
    step = bench.weights + todo.batch * (prompt + count / 2) * kept * slot
    flops = 2 * bench.weights / bench.dtype.itemsize * todo.batch * prompt
    seconds = (1.25 * count * step + flops / FLOPS_PER_BYTE) / bench.bandwidth
    return seconds + (COMPILING[todo.case is not None] if bench.on_gpu else 0)


def bench_rows(bench, args):
    """Yield a row of figures, a dict, for each Measurement of one length, and the seconds left."""
    plan = planned(bench, args)
    costs, start = [expected(bench, todo) for todo in plan], time.perf_counter()
    for i, todo in enumerate(plan, 1):
        if todo.case:
            row = bench.run(todo.case, todo.batch, todo.count, todo.whole)
        else:
            row = peer_row(todo.name, bench, todo.batch)
        spent = time.perf_counter() - start
        yield {"name": todo.name, "kind": todo.kind, **row}, spent * sum(costs[i:]) / sum(costs[:i])


# --------------------------------------------------------------------------------------- --bench

COLUMNS = (("batch", "batch", 6, "d"), ("tokens_per_second", "tokens/s", 9, ",.0f"),
           ("ratio", "ratio", 6, ".2f"), ("cr", "CR", 6, ".2f"),
           ("ms_per_step", "ms/step", 8, ".1f"), ("kv_bytes_logical", "KV GB", 8, ".3f"),
           ("share_of_memory_bound_limit", "of limit", 9, ".0%"))     # key, title, width, format


def bench_head():
    return f"{'':<28}" + "".join(f"{title:>{width}}" for _, title, width, _ in COLUMNS)


def bench_line(row):
    if "error" in row:
        return wrapped(f"{row['name']}: {row['error']}")
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
    refuse_files_of(folder, out=args.out)
    files = [args.prompt_file] if args.prompt_file else sorted(root.glob("*.py"))
    text = "".join(read_prompt(file) for file in files)
    ids = Tokenizer.from_folder(folder).encode(text, special=False)

    def texts(i, n):
        start = int(torch.randint(len(ids), (1,), generator=rng(i)))
        return [ids[(start + t) % len(ids)] for t in range(n)]
    return load_part(folder, OPS["fast"], device, dtype), str(folder), texts


def usual_lengths(positions, device, toy):
    """Tokens of a prompt, and to generate, where none are asked for, within a model's positions.

    The toy's are such that attention over the cache is what takes time.
    """
    prompt, count = (2048, 2048) if device == "cuda" else (4096 if toy else 1024, 256)
    count = min(count, positions // 2)
    return min(prompt, positions - count), count


def small_pool(config, length):
    """The gigabytes of a pool where none are asked for on a CPU: enough to measure, soon done.

    20 sequences in which nothing merges, within 0.4 GB; of a larger model, or longer ones, 4.
    """
    pages = config.n_layer * config.n_kv_head * (length // PAGE + 2)
    sequence = pages * page_bytes(config, torch.float32) / 1e9
    return max(4 * sequence, min(20 * sequence, 0.4))


def benchmark(args, device):
    """--bench: every Case at every length asked for.

    Prints as it goes, and writes args.out after each row; at the end a plot beside it. Raises
    InputError.
    """
    path, ranks = args.out or Path("bench.json"), rank_count()
    if args.tokens and args.tokens < 16:
        raise InputError(f"--tokens {args.tokens} is too few to measure; give at least 16.")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written; check --out.")
    model, name, texts = bench_model(args, device)
    positions, toy = model.config.max_seq_len, not args.ckpt and args.model in (None, "toy")
    prompt, count = usual_lengths(positions, device, toy)
    prompts, count = args.prompt_tokens or [prompt], args.tokens or count
    if max(prompts) + count > positions:
        raise InputError(
            f"{max(prompts)} tokens and {count} more do not fit the model's "
            f"{positions} positions; lower --prompt-tokens or --tokens.")
    gigabytes = args.cache_gb
    if gigabytes is None and device != "cuda":
        gigabytes = small_pool(model.config, max(prompts) + count)
    how = ("The model decides." if model.config.dmc else
           "Decisions are forced: heads merge at random, each at a rate of its own, about as "
           "different as in the paper's figure 6.")
    if ranks > 1:
        how += f" {ranks} ranks share the model; CR, bytes and shares are those of rank 0."
    print(wrapped(f"{name}. {how}"))
    rows, facts = [], provenance()
    for prompt in prompts:
        bench = Bench(model, prompt, count, gigabytes, texts)
        for row in measure(bench, args):
            rows.append(row)
            if not this_rank():
                write_json(path, {"model": name, "decisions": how,
                                  "copy_bandwidth": bench.bandwidth, "weight_bytes": bench.weights,
                                  "rows": rows, **facts})
    if this_rank():
        return
    plot = path.with_suffix(".png")
    first = [row for row in rows if row["prompt"] == prompts[0] and row["kind"] != "alone"
             and "error" not in row]
    drawn = plot_bench(first, plot)
    print("\nThe paper's own ratios, on an H100 with Megatron-LM: 3.4 to 3.7 at CR 4, up to 7\n"
          "at CR 8 (published, not measured here).")
    print(wrapped(f"Figures are in {path}, drawn in {plot}.") if drawn else
          f"{wrapped(f'Figures are in {path}. For a plot too:')}\n{installing('matplotlib')}")


def measure(bench, args):
    """Print and yield the rows of one length."""
    prompt, count, base = bench.prompt, bench.count, None
    print(f"\n{prompt:,} tokens in, {count:,} generated, mean over the last {count // 2:,}\n"
          f"copy bandwidth {bench.bandwidth / 1e12:.3f} TB/s, "
          f"weights {bench.weights / 1e9:.2f} GB\n\n{bench_head()}", flush=True)
    for row, left in bench_rows(bench, args):
        row = {"prompt": prompt, "tokens": count, **row}
        if row["kind"] == "alone":
            alone = row = {**row, "tokens": 16}
        else:
            if speed := row.get("tokens_per_second"):
                base = base or speed
                row["ratio"] = speed / base
            print(bench_line(row), flush=True)
        yield row
        if left > 60:
            print(f"{'':<28}about {left / 60:.0f} min left", flush=True)
    times = prompt * alone["ms_per_step"] / alone["prefill_ms"]
    print(f"prefill of {prompt:,} tokens: {alone['prefill_ms']:.1f} ms; "
          f"token by token {times:.0f} times as long")
