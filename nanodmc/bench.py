"""The paper's figure 5: throughput with and without compression, and what it is made of.

nanodmc/cases.py says what is compared, nanodmc/throughput.py measures one of them.
"""

import os
import time
from pathlib import Path
from typing import NamedTuple

import torch

from nanodmc.cases import Case, bench_cases
from nanodmc.checkpoint import find_checkpoint
from nanodmc.cli import OPS, installing, provenance, wrapped
from nanodmc.files import InputError, write_json
from nanodmc.parallel import load_part, random_part, rank_count, this_rank
from nanodmc.peers import PEERS, peer_row
from nanodmc.plots import plot_bench
from nanodmc.pool import PAGE, page_bytes
from nanodmc.prompts import read_prompt
from nanodmc.results import refuse_files_of
from nanodmc.throughput import Bench
from nanodmc.tokenizer import Tokenizer

# -------------------------------------------------------------------------------------- planning

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


def random_shape(args, device):
    """The name of the shape of the random weights to measure; None where there are real ones."""
    if args.ckpt:
        return None
    return args.model or ("llama2-7b" if device == "cuda" else "toy")


def bench_model(args, device):
    """The model to measure, its name, and texts(i, n): n token ids for sequence i."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rng = lambda i: torch.Generator().manual_seed(i)
    if name := random_shape(args, device):
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


FEWEST = 16                 # tokens to generate, over a part of which something can be measured


def usual_lengths(positions, device, toy):
    """Tokens of a prompt, and to generate, where none are asked for, within a model's positions.

    At least 1 and FEWEST. The toy's are such that attention over the cache is what takes time.
    """
    prompt, count = (2048, 2048) if device == "cuda" else (4096 if toy else 1024, 256)
    count = max(FEWEST, min(count, positions // 2))
    return max(1, min(prompt, positions - count)), count


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
    if args.tokens and args.tokens < FEWEST:
        raise InputError(f"--tokens {args.tokens} is too few to measure; give at least {FEWEST}.")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written; check --out.")
    model, name, texts = bench_model(args, device)
    positions, toy = model.config.max_seq_len, random_shape(args, device) == "toy"
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
