"""On a GPU: kernels and caches at full size, graphs, speeds. `-k gpu` selects them.

Where there is none, the speed tests run at toy size in Triton's interpreter, so that they are ready
when there is one. Figures go where DMC_RESULTS says; nothing here judges them.
"""

import ast
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dmc
import dmc_fast
import train
from dmc import Transformer
from nanodmc import checkpoint, flash_attention, sampling
from nanodmc.config import shape
from nanodmc.launch import INTERPRETED, triton
from nanodmc.optim import new_optimizer
from nanodmc.phases import plan
from nanodmc.pool import full_pages
from nanodmc.settings import Settings
from nanodmc.work_list import work_list
from test_banded_average import accumulate_inputs, check_accumulate
from test_decisions import check_decisions
from test_dmc import check_cache, config_of, model_of, on_cpu
from test_engine import no_kernels_run  # noqa: F401
from test_flash_attention import attend_inputs, check_attend
from test_paged_cache import check_decode, paged
from test_short_step import Moves, check_short_step, tokens_of

GPU = torch.cuda.is_available()
DEVICE, HALF = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
full_size = lambda real, toy: real if GPU else toy


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")(test))


def on_gpu_or_interpreted(test):
    neither = pytest.mark.skipif(not (GPU or INTERPRETED),
                                 reason="needs an NVIDIA GPU, or Triton's interpreter")
    return pytest.mark.gpu(neither(test))


# ------------------------------------------------------------------------------- right at full size

@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("G,D,window,hard", [
    (32, 128, 12, False), (32, 128, 12, True), (8, 128, 12, False), (32, 64, 5, False),
    (32, 128, None, True)])
def test_accumulate_at_full_size_gpu(G, D, window, hard, dtype):
    check_accumulate(4096, window, hard, dtype, D, G, DEVICE)


@on_gpu
@pytest.mark.parametrize("heads,T,D,hard", [
    ((32, 32), 2048, 128, False), ((32, 32), 2048, 128, True), ((16, 2), 2048, 128, False),
    ((8, 1), 4096, 128, False), ((12, 4), 1000, 64, False), ((4, 4), 1, 128, True)])
def test_attend_at_full_size_gpu(heads, T, D, hard):
    check_attend(heads, T, hard, torch.bfloat16, D, DEVICE)


@on_gpu
@pytest.mark.parametrize("R,D,page,extra", [
    (1, 128, 16, 1), (1, 128, 16, 4000), (8, 128, 16, 528), (3, 64, 32, 100), (4, 64, 64, 1)])
def test_ragged_decode_at_full_size_gpu(R, D, page, extra):
    lengths = torch.randint(0, 4096, (250,), generator=torch.Generator().manual_seed(0))
    lengths[:6] = torch.tensor([0, 1, page - 1, page, page + 1, 4096])
    check_decode(lengths.to(DEVICE), R, D, page, extra, torch.bfloat16)


@on_gpu
@pytest.mark.parametrize("heads,window,batch,portions,merge", [
    ((32, 32), 12, 1, [300] + [1] * 40, 0.75), ((32, 32), None, 2, [300] + [1] * 20, 0.5),
    ((64, 8), 12, 3, [200] + [1] * 20, 0.9), ((32, 32), 12, 250, [40] + [1] * 20, 0.75),
    ((32, 32), 12, 4, [1] * 40, 0.3)])
def test_cache_at_full_size_gpu(heads, window, batch, portions, merge):
    check_cache(heads, window, sum(portions), portions, 128, 16, True, batch, merge,
                torch.bfloat16, DEVICE)


@on_gpu
@pytest.mark.parametrize("noise", [1.0, 0.1])
@pytest.mark.parametrize("heads,T", [((32, 32), 4096), ((32, 8), 1000)])
def test_decisions_and_gradients_gpu(heads, T, noise):
    check_decisions(torch.bfloat16, heads, T, noise, DEVICE)


@on_gpu
@pytest.mark.parametrize("heads,window", [((8, 8), 12), ((8, 2), None)])
def test_a_short_step_gpu(heads, window):
    model = model_of(0, heads, window, dmc_fast, head_dim=16).to(DEVICE, torch.float32)
    check_short_step(model, tokens_of(0, 4, 40).to(DEVICE))


@on_gpu
@torch.no_grad()
def test_a_step_is_one_graph_gpu():
    """No step waits for the GPU, and replays of a captured one give the bits of the step itself."""
    torch.manual_seed(0)
    config = config_of((8, 2), 12, head_dim=64, dim=256, max_seq_len=256, c=0.0)
    model = Transformer(config, dmc_fast).to(DEVICE, torch.bfloat16)
    tokens = torch.randint(0, 29, (4, 60), device=DEVICE)
    eager, captured = (dmc_fast.PagedCache(config, 4, DEVICE, torch.bfloat16,
                                           pages=full_pages(config, 4))
                       for _ in range(2))
    for cache in (eager, captured):
        model(tokens[:, :20], cache)
    token, results = tokens[:, 20:21].clone(), []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(20, 60):
            token.copy_(tokens[:, t:t + 1])
            results.append(model(token, eager)[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits, _ = model(token, captured)
    for t in range(20, 60):
        token.copy_(tokens[:, t:t + 1])
        graph.replay()
        assert torch.equal(logits, results[t - 20])
    assert torch.equal(eager.lengths, captured.lengths)
    assert eager.lengths.sum() < 60 * eager.lengths.numel()
    captured.check()


# ------------------------------------------------------------------------------------------- speeds

def seconds(f):
    """Of one call. On a GPU the median, its L2 cache flushed before each; else of one call."""
    if GPU:
        return triton.testing.do_bench(f, warmup=50, rep=300, return_mode="median") / 1e3
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


@pytest.fixture(scope="session")
def note(measured):
    """Takes down a figure, and the bar it is held against; a person explains what falls short."""
    def noted(name, value, bar=None):
        measured[name] = value if bar is None else {"measured": value, "bar": bar}
        print(f"\n{name:90} {value:10.4g}" + ("" if bar is None else f"   bar {bar}"), end="")
    return noted


@pytest.fixture(scope="session")
def copying(note):
    """Bytes per second, read and written, of copying a tensor that no cache holds."""
    x, y = (torch.randn(full_size(2 ** 30, 2 ** 16), device=DEVICE) for _ in range(2))
    speed = 2 * x.nbytes / seconds(lambda: y.copy_(x))
    note("copy bandwidth, TB/s", speed / 1e12)
    return speed


def poolsum():
    """The authors' pooling, from their file that DMC_MEGATRON names; None without."""
    if "DMC_MEGATRON" not in os.environ:
        return None
    source, names = Path(os.environ["DMC_MEGATRON"]).read_text(), {"torch": torch, "F": F}
    functions = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef))
    code = next(n for n in functions if n.name == "_poolsum")
    exec("@torch.compile\n" + ast.get_source_segment(source, code), names)
    return names["_poolsum"]


@on_gpu_or_interpreted
def test_speed_of_accumulate_kernels_gpu(copying, note):
    B, G, T, D = full_size((8, 32, 4096, 128), (1, 2, 40, 16))
    torch.manual_seed(0)
    k, v = (torch.randn(B, T, G, D, device=DEVICE, dtype=HALF).transpose(1, 2).requires_grad_()
            for _ in range(2))
    alpha = torch.sigmoid(torch.randn(B, G, T, device=DEVICE) * 20).requires_grad_()
    omega = torch.rand(B, G, T, device=DEVICE).requires_grad_()
    inputs, slopes, size = (k, v, alpha, omega), [torch.randn_like(k) for _ in range(2)], k.nbytes
    forward = lambda: dmc_fast.accumulate(*inputs, 12)
    both_ways = lambda: torch.autograd.grad(forward(), inputs, slopes)
    times = seconds(forward), seconds(both_ways)
    # forward reads k, v and writes k~, v~; backward reads four tensors of that size, writes two
    for name, t, passes in zip(("forward", "forward and backward"), times, (4, 10), strict=True):
        note(f"accumulate {name}: share of copy bandwidth", passes * size / t / copying, 0.75)
    with torch.no_grad():
        taken = seconds(lambda: dmc_fast.accumulate(*inputs))
    note("accumulate without a window: share of copy bandwidth", 4 * size / taken / copying)
    if pool := poolsum():
        wide = (x.detach().float().flatten(0, 1) for x in (k, v, alpha[..., 1:], omega))
        k32, v32, b, w = (x.contiguous().requires_grad_() for x in wide)
        s32 = [x.float().flatten(0, 1) for x in slopes]
        theirs = lambda: (pool(k32, b, w), pool(v32, b, w))
        note("accumulate forward: the authors' time / ours", seconds(theirs) / times[0], 5)
        taken = seconds(lambda: torch.autograd.grad(theirs(), (k32, v32, b, w), s32))
        note("accumulate forward and backward: the authors' time / ours", taken / times[1], 5)


@on_gpu_or_interpreted
@pytest.mark.parametrize("H,G", [(32, 32), (64, 8)])
def test_speed_of_attend_kernels_gpu(note, H, G):
    B, T, D = full_size((2, 4096, 128), (1, 33, 16))
    H, G = full_size((H, G), (H // 16, max(1, G // 16)))
    q, k, v = (torch.randn(B, T, n, D, device=DEVICE, dtype=HALF).transpose(1, 2)
               for n in (H, G, G))
    q[..., 0] = k[..., 0] = 0
    keep = F.logsigmoid(torch.randn(B, G, T, device=DEVICE) * 20)
    inputs, slope = [x.requires_grad_() for x in (q, k, v, keep)], torch.randn_like(q)
    plain = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)
    ours = lambda: dmc_fast.attend(q, k, v, keep)
    times = [(seconds(f), seconds(lambda f=f, n=n: torch.autograd.grad(f(), inputs[:n], slope)))
             for f, n in ((plain, 3), (ours, 4))]
    name = f"attend, {H} heads over {G}, T {T}, by {flash_attention.stock(q, k, v)}"
    note(f"{name}: forward, in plain attention's time", times[1][0] / times[0][0])
    note(f"{name}: forward and backward, in plain attention's time",
         times[1][1] / times[0][1], 1.15)


def flashinfer_decode(q, pools, lengths, table):
    """FlashInfer's paged decode over the same pages, a function of nothing; None without it."""
    try:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper
    except ImportError:
        return None
    R, D, page, pages = *q.shape[1:], pools[0].size(1), -(-lengths // pools[0].size(1))
    starts = F.pad(pages.cumsum(0), (1, 0)).int()
    names = table[torch.arange(table.size(1), device=q.device) < pages[:, None]]
    workspace = torch.empty(2 ** 27, dtype=torch.uint8, device=q.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(starts, names, ((lengths - 1) % page + 1).int(), R, 1, D, page,
                 q_data_type=q.dtype, kv_data_type=q.dtype)
    return lambda: wrapper.run(q, tuple(pool[:, :, None] for pool in pools))


@on_gpu_or_interpreted
@pytest.mark.parametrize("cr,batch", [(1, 31), (4, 125), (8, 251)])
def test_speed_of_a_decode_step_kernels_gpu(copying, note, cr, batch):
    """One layer of Llama 2 7B at the largest batch: 3,584 tokens per sequence, each head with a CR
    of its own."""
    batch, G, tokens, D = full_size((batch, 32, 3584, 128), (2, 2, 40, 16))
    rng = torch.Generator().manual_seed(0)
    part = (torch.randn(G, generator=rng) * 0.7 * (cr > 1)).exp()
    lengths = (tokens * (part / part.mean() / cr).clamp(max=1)).int().repeat(batch).clamp(min=1)
    lengths = lengths.to(DEVICE)
    *pools, table = paged(lengths, 16, D, HALF)
    q = torch.randn(len(lengths), 1, D, device=DEVICE, dtype=HALF)
    items, places = (x[0] for x in work_list(lengths[None], 4 * 132))
    decode = partial(dmc_fast.decode, q, *pools, table, lengths, items, places)
    attention = seconds(decode)
    name, size = f"decode at CR {cr}, batch {batch}", 2 * int(lengths.sum()) * D * q.element_size()
    note(f"{name}: share of copy bandwidth", size / attention / copying, 0.88)
    if peer := flashinfer_decode(q, pools, lengths, table):
        assert (peer().float() - decode().float()).abs().max() < 0.02
        note(f"{name}: FlashInfer's time / ours", seconds(peer) / attention, 1)
    config = config_of((G, G), 12, head_dim=D, n_layer=1, max_seq_len=full_size(65536, 64))
    cache = dmc_fast.PagedCache(config, batch, DEVICE, HALF, pages=2 * batch * G)
    token = torch.randn(batch, G, 1, D, device=DEVICE, dtype=HALF)
    merge, weight = (torch.ones(batch, G, 1, device=DEVICE) for _ in range(2))
    timer = triton.testing.do_bench_cudagraph if GPU else lambda f: 1e3 * seconds(f)
    update = timer(lambda: cache.update_in_kernel(0, token, token, token, merge, weight)) / 1e3
    note(f"{name}: cache update, in the attention's time", update / attention, 0.05)


@on_gpu
@torch.no_grad()
def test_speed_of_prefill_gpu(note):
    """2,048 tokens of 8 sequences into the caches of 4 layers of Llama 2 7B, with decisions and
    without."""
    tokens, times = torch.randint(0, 32000, (8, 2048), device=DEVICE), []
    for decides in (True, False):
        config = shape("llama2-7b", n_layer=4, dmc=decides, c=0.0)
        model = checkpoint.random_model(config, dmc_fast, DEVICE)
        make = partial(model.Cache, config, 8, DEVICE, HALF)
        times.append(seconds(lambda m=model, make=make: sampling.next_logits(m, tokens, make())))
    note("prefill of 2,048 tokens, in the uncompressed model's time", times[0] / times[1], 1.1)


@on_cpu
@pytest.mark.skipif(GPU, reason="is about machines without a GPU")
def test_speed_without_a_gpu(note):
    """dmc_fast.py on a CPU. One round unless DMC_RESULTS asks for figures: medians of many."""
    rounds = 40 if "DMC_RESULTS" in os.environ else 1

    def compare(candidates):
        taken = {name: [] for name in candidates}
        for _ in range(rounds):                          # in turns: the machine's speed drifts
            for name, f in candidates.items():
                taken[name].append(seconds(f))
        return {name: np.median(times) for name, times in taken.items()}

    T, D = 1024, 64
    for H, G in ((8, 8), (8, 2)):
        inputs = attend_inputs(0, (H, G), T, hard=False, silent=True, D=D)
        inputs = [x[:1].float().requires_grad_() for x in inputs]
        slope = torch.ones(1, H, T, D)
        ways = {"plain": (dmc.attend, 3), "mask": (dmc.attend, 4), "fast": (dmc_fast.attend, 4)}
        taken = compare({
            name: lambda f=f, x=inputs[:n], slope=slope: torch.autograd.grad(f(*x), x, slope)
            for name, (f, n) in ways.items()})
        name = f"attend on the CPU, {H} heads over {G}, T {T}, forward and backward"
        note(f"{name}, in plain attention's time", taken["fast"] / taken["plain"], 1.2)
        note(f"{name}, in plain attention's time, with an explicit mask",
             taken["mask"] / taken["plain"])
    inputs = [x[:1].float().requires_grad_() for x in accumulate_inputs(0, T, False, 8, D)]
    taken = compare({
        ops.__name__: lambda f=ops.accumulate: torch.autograd.grad(f(*inputs, 12), inputs,
                                                                   [slope, slope])
        for ops in (dmc, dmc_fast)})
    note("accumulate on the CPU, 8 heads, T 1024, forward and backward: "
         "dmc.py's time / dmc_fast.py's", taken["dmc"] / taken["dmc_fast"])
    s = Settings()
    pretrain, retrofit = plan(s)[0], next(phase for phase in plan(s) if phase.name == "retrofit")
    x, steps = torch.randint(0, 256, (s.batch, s.context)), {}
    for name, ops, phase in (("plain", dmc_fast, pretrain), ("reference", dmc, retrofit),
                             ("fast", dmc_fast, retrofit)):
        model = Transformer(replace(s.small_config(), **s.method(phase.dmc)), ops)
        optimizer = new_optimizer(model, s)
        steps[name] = partial(train.train_step, model, optimizer, phase, 20, [(1, x, x)], s)
    taken = compare(steps)
    name = "a DMC step of the laptop run"
    note(f"{name}, in a plain step's time, with dmc.py", taken["reference"] / taken["plain"])
    note(f"{name}, in a plain step's time, with dmc_fast.py", taken["fast"] / taken["plain"])
    note(f"{name}: dmc.py's time / dmc_fast.py's", taken["reference"] / taken["fast"])


# ------------------------------------------------------- what a layer's attention moves in training

@on_cpu
@pytest.mark.parametrize("backend", ["flash", "cudnn"])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
def test_nothing_is_copied_around_the_kernels(monkeypatch, no_kernels_run, measured,  # noqa: F811
                                              backend, heads):
    """Forward and backward of a layer's attention in training, on tensors without memory."""
    monkeypatch.setattr(flash_attention, "stock", lambda *_: backend)
    config = config_of(heads, head_dim=64, dim=512, max_seq_len=256)
    with torch.device("meta"):
        attention = dmc.Attention(config, 0, dmc_fast).bfloat16()
        x = torch.zeros(2, 256, 512, dtype=torch.bfloat16, requires_grad=True)
    cos, sin = (angle.float() for angle in dmc.rotary_table(config, 256, "meta"))
    with Moves() as moves:
        y, alpha = attention(x, cos, sin, None, 1.0, None)
        torch.autograd.backward([y, alpha], [torch.empty_like(y), torch.empty_like(alpha)])
    keys = 2 * 2 * heads[1] * 256 * 64                           # bytes of k in bf16
    large = [name for name, size in moves.moved if size >= keys]
    products, stock = large.count("mm"), [name for name in large if "attention" in name]
    small = sum(size for _, size in moves.moved if size < keys)
    measured[f"{heads[0]} heads over {heads[1]}, {backend}"] = {
        "PyTorch's operators, forward and backward": len(moves.moved),
        "kernels": no_kernels_run.copy(),
        "bytes of small operators, in those of k": small / keys}
    assert products == 4 + 8 and len(stock) == 2
    rest = [name for name in large if name != "mm" and name not in stock]
    assert rest == ["add", "add"]                 # of what the three projections say to their input
    assert small < keys
