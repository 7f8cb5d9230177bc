"""The same decoding by others, on the same weights: transformers, and a loop as in gpt-fast.

And how time is measured, theirs and ours.

A peer decodes a quarter of the tokens that ours generates, at about ours' mean length over the
second half of them. What stands in its cache before them only has to be of that length.
"""

import gc
import inspect
import math
import time

import torch
import torch.nn.functional as F

import dmc
from nanodmc.sampling import next_logits


def synchronize(device):
    """Wait for all work on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def settle(device):
    """Before a measurement: what earlier ones hold is freed, and they have no work left.

    Frames that an import or the profiler keeps alive, and cycles, may hold a whole cache.
    """
    gc.collect()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed(step, count, device):
    """Seconds per call of step(), over the last three quarters of `count` calls.

    The first calls may compile.
    """
    for i in range(count):
        if i == count // 4:
            synchronize(device)
            start = time.perf_counter()
        step()
    synchronize(device)
    return (time.perf_counter() - start) / (count - count // 4)


def lengths(bench):
    """How many tokens a peer decodes, and how many are in its cache before."""
    return bench.count // 4, bench.prompt + bench.count * 5 // 8


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


# ---------------------------------------------------------------------------------- transformers

def as_transformers(bench):
    """The same weights, not copied, as a model of `transformers`."""
    from transformers import LlamaConfig, LlamaForCausalLM
    c = bench.config
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim,
            num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
            max_position_embeddings=c.max_seq_len, tie_word_embeddings=False))
    weights = {name if name.startswith("lm_head") else f"model.{name}": p
               for name, p in bench.model.state_dict().items()}
    theirs.load_state_dict(weights, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config).to(bench.device)
    return theirs.eval()


@torch.no_grad()
def by_transformers(bench, batch):
    """Seconds per step of `transformers` with its static cache, compiled on a GPU.

    None where it is not installed.
    """
    try:
        from transformers import StaticCache
    except ImportError:
        return None
    theirs, device, (count, start) = as_transformers(bench), bench.device, lengths(bench)
    cache, forward = StaticCache(config=theirs.config, max_cache_len=start + count), theirs.forward
    older = "past_key_values" in inspect.signature(forward).parameters      # what it was called
    cached = {"past_key_values" if older else "cache": cache}
    if device.type == "cuda":
        forward = torch.compile(forward, mode="reduce-overhead")
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)
    at = torch.zeros(1, dtype=torch.long, device=device)
    for i in range(0, start, bench.prompt):                     # in portions, whose activations fit
        prompts = [torch.tensor(bench.texts(row, bench.prompt)) for row in range(batch)]
        tokens = torch.stack(prompts).to(device)[:, :min(bench.prompt, start - i)]
        positions = torch.arange(i, i + tokens.size(1), device=device)
        theirs(tokens, **cached, cache_position=positions, logits_to_keep=1)
    at.fill_(start)

    def step():
        logits = forward(token, **cached, cache_position=at.clone()).logits
        token.copy_(logits[:, -1:].argmax(-1))
        at.add_(1)
    return timed(step, count, device)


# -------------------------------------------------------------------------------------- gpt-fast

class StaticCache:
    """What gpt-fast does: one tensor for all positions, all of which each step reads and masks.

    One for each layer: the compiler copies a tensor whose view is written to. Random keys and
    values stand for the first `start` tokens. It has what Transformer asks of a cache.
    """

    def __init__(self, config, batch, device, dtype, start, length):
        L, sizes = config.n_layer, (batch, config.n_kv_head, length, config.head_dim)
        self.gain, self.seen = 1.0, [start] * L
        self.keys, self.values = ([torch.randn(sizes, device=device, dtype=dtype)
                                   for _ in range(L)] for _ in range(2))
        self.at = torch.full((1,), start, device=device)
        self.slots = torch.arange(length, device=device)
        for x in (*self.keys, *self.values, self.at):    # or a CUDA graph copies them at each step
            torch._dynamo.mark_static_address(x)
        angles = dmc.rotary_table(config, length, device)
        self.cos, self.sin = (x.float() for x in angles)

    def attend(self, layer, q, k, v, alpha=None, omega=None):
        q, k = (dmc.rotate(x, self.cos[self.at], self.sin[self.at]) for x in (q, k))
        keys, values = (x[layer].index_copy_(2, self.at, new)
                        for x, new in ((self.keys, k), (self.values, v)))
        mask = (self.slots <= self.at)[None, None, None]
        groups = q.size(1) != k.size(1)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=groups)


@torch.no_grad()
def by_compilation(bench, batch):
    """Seconds per step of our plain model over a StaticCache, compiled on a GPU as gpt-fast is."""
    count, start = lengths(bench)
    cache = StaticCache(bench.config, batch, bench.device, bench.dtype, start, start + count)
    token = torch.zeros(batch, 1, dtype=torch.long, device=bench.device)
    forward = lambda: next_logits(bench.model, token, cache, gain=1.0)
    if bench.device.type == "cuda":
        forward = torch.compile(forward, mode="reduce-overhead", fullgraph=True)

    def step():
        token.copy_(forward().argmax(-1, keepdim=True))
        cache.at.add_(1)
    return timed(step, count, bench.device)


PEERS = {"transformers, static cache": by_transformers,
         "one tensor, as in gpt-fast": by_compilation}


# ------------------------------------------------------------------------- what may happen to them

TRIES = 4       # batches that a peer may try where memory runs out
SIGNS = ("out of memory", "alloc_failed", "cublas_status_not_initialized", "cannot allocate memory",
         "not enough memory")


def out_of_memory(error):
    """Whether memory ran out, which libraries and compilers tell by many kinds of RuntimeError."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
                isinstance(error, RuntimeError) and any(sign in text for sign in SIGNS)):
            return True
        error = error.__cause__ or error.__context__
    return False


def peer_row(name, bench, batch):
    """The figures of a peer at a batch, or at a smaller one where memory runs out, as a dict.

    Whatever else fails costs this row only: it has an "error" then, a sentence.
    """
    row = {"name": name, "kind": "peer"}
    for _ in range(TRIES):
        torch.compiler.reset()
        settle(bench.device)
        try:
            seconds = PEERS[name](bench, batch)
        except Exception as error:          # theirs, of any kind; its frames hold their memory
            if not out_of_memory(error):
                said = " ".join(str(error).split())[:300] or "no reason given"
                return {**row, "batch": batch, "error": f"failed, {type(error).__name__}: {said}"}
        else:
            if seconds is None:
                return {**row, "error": "not installed."}
            return {**row, "batch": batch, "cr": 1.0, "tokens_per_second": batch / seconds,
                    "ms_per_step": 1e3 * seconds}
        if batch == 1:
            break
        batch = int(0.85 * batch)
    return {**row, "batch": batch, "error": "out of memory, at smaller batches too."}
