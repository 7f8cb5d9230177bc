"""Properties of nanodmc/engine.py: many sequences at once get what each gets alone."""

import json
import re
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dmc
import dmc_fast
import generate
from conftest import HERE, largest_error, lines_of, two_processes
from dmc import Cache, Transformer
from nanodmc import (
    checkpoint,
    decisions,
    flash_attention,
    mask_kernels,
    sampling,
    short_step,
)
from nanodmc.engine import Engine, Sequence
from nanodmc.files import InputError
from nanodmc.requests import Request
from nanodmc.tokenizer import Tokenizer
from nanodmc.variants import VariantConfig, ops_of
from test_dmc import config_of, kernels, model_of, on_cpu, seeds
from test_flash_attention import fake_gpu  # noqa: F401


def alone(model, request, stops=(), gain=None):
    """The ids and the CR that one request gets by itself, from dmc.py."""
    dtype = next(model.parameters()).dtype
    reference = Transformer(model.config, ops_of(model.config, dmc)).to(dtype)
    reference.load_state_dict(model.state_dict())
    cache = Cache(model.config, 1, dtype=dtype)
    choose = sampling.chooser(**{name: getattr(request, name) for name in sampling.SETTINGS})
    ids = list(sampling.generate(reference, cache, request.prompt, request.count, choose, stops,
                                 gain))
    return ids, cache.compression_ratio


def requests_of(seed, n, prompts=(1, 2, 15, 16, 17, 30), counts=(1, 2, 20, 33, 34)):
    rng = np.random.default_rng(seed)
    return [Request(rng.integers(0, 29, rng.choice(prompts)).tolist(), int(rng.choice(counts)),
                    float(rng.choice([0, 0.5, 1.0])), int(rng.choice([0, 5])),
                    float(rng.choice([0.8, 1.0])), int(rng.integers(100)), key=i)
            for i in range(n)]


def assert_nothing_is_lost(engine):
    """All pages are free and all rows idle."""
    pages = len(engine.cache.free)
    assert engine.cache.left.item() == pages
    assert sorted(engine.cache.free.tolist()) == list(range(1, pages + 1))
    assert sorted(engine.idle) == list(range(len(engine.tokens)))
    assert not engine.cache.failed.item()


def test_an_engine_begins_with_nothing_to_release(monkeypatch):
    """A table of all pages that rows may ever need is not sorted for that."""
    monkeypatch.setattr(dmc_fast.PagedCache, "release", None)
    engine = Engine(model_of(0, (4, 2)), 3)
    assert_nothing_is_lost(engine)
    assert (engine.cache.ages == -1).all() and not engine.cache.lengths.any()


def assert_as_alone(model, result, **kwargs):
    ids, cr = alone(model, result.request, **kwargs)
    assert (result.ids, result.cr) == (ids, pytest.approx(cr))


@on_cpu
@given(seeds, st.sampled_from([-0.5, 0.5, 1e9]), st.sampled_from([dmc, dmc_fast]),
       st.integers(1, 4), st.sampled_from([2, 4, 5, 6, 7]), st.sampled_from([None, 3]),
       st.booleans())
@settings(max_examples=10)
def test_every_request_gets_what_it_gets_alone(one_thread, seed, c, ops, rows, pages, window,
                                               greedy):
    """With few rows and pages, requests wait, are admitted, are preempted, or are too large. Each
    text is the one that dmc.py makes of its request alone."""
    model = model_of(seed % 20, (4, 1), window, ops, c=c)
    requests, stops = requests_of(seed, 6), [seed % 29]
    for request in requests:
        request.temperature *= not greedy
    engine = Engine(model, rows, 2 * pages, stops)
    results = list(engine.run(requests))
    assert sorted(r.request.key for r in results) == list(range(6))
    for result in results:
        ids, cr = alone(model, result.request, stops)
        if result.error:        # only what might need a page more per head than there is
            assert f"{2 * pages} pages" in result.error
            assert len(result.request.prompt) + len(ids) >= 16 * pages - 1
        else:
            assert result.ids == ids and result.cr == pytest.approx(cr)
            assert result.finish == ("length" if len(ids) == result.request.count else "stop")
    assert_nothing_is_lost(engine)


@on_cpu
@given(seeds, st.integers(2, 5), st.integers(1, 4), st.sampled_from([2, 5, 7]))
@settings(max_examples=6)
def test_fixed_pooling_goes_by_each_sequences_own_age(one_thread, seed, every, rows, pages):
    config = VariantConfig(**vars(config_of((4, 1))), variant="fmp", every=every)
    model = Transformer(config, ops_of(config, dmc_fast)).double()
    model.load_state_dict(model_of(seed % 20, (4, 1)).state_dict())
    engine = Engine(model, rows, 2 * pages)
    for result in engine.run(requests_of(seed, 5)):
        if not result.error:
            assert_as_alone(model, result)
    assert_nothing_is_lost(engine)


@on_cpu
@pytest.mark.parametrize("c,pages", [(1e9, 8), (0.5, 6)])
def test_a_full_pool_preempts_the_youngest(one_thread, c, pages):
    """Two that fit one by one but not together: none is refused, and the older is never stopped."""
    model = model_of(3, (4, 2), c=c)
    requests = [Request([i], 60 if c > 1 else 50, 1.0, seed=i, key=i) for i in range(2)]
    engine = Engine(model, 2, 2 * pages)
    results = list(engine.run(requests))
    assert engine.preempted > 0 and [r.request.key for r in results] == [0, 1]
    for result in results:
        assert_as_alone(model, result)
    assert_nothing_is_lost(engine)


@on_cpu
def test_a_preempted_sequence_may_be_larger_than_the_pool_uncompressed(one_thread):
    """What merges fits, though its tokens would not: its start is prefilled, and the rest is fed
    token by token."""
    model = model_of(0, (4, 1), c=-1e9)                          # merges everything
    request = Request(list(range(29)) + list(range(20)), 10, 1.0, seed=1)
    engine = Engine(model, 1, 2)
    result, = engine.run([request])
    assert result.ids == alone(model, request)[0] and result.cr == 58 and engine.steps > 30
    assert_nothing_is_lost(engine)


@on_cpu
def test_without_decisions_the_engine_is_a_plain_one(one_thread):
    model = model_of(4, (4, 2))
    requests = requests_of(0, 4)
    engine = Engine(model, 3, 40, gain=0.0)
    for result in engine.run(requests):
        assert (result.ids, result.cr) == (alone(model, result.request, gain=0.0)[0], 1.0)
    plain = Engine(model, 1, 4, gain=0.0)
    with pytest.raises(InputError, match="needs 8 pages of cache, and there are 4"):
        plain.submit(Request([1] * 17, 5))


@on_cpu
def test_cancelled_requests_leave_nothing_behind(one_thread):
    model = model_of(1, (4, 2))
    engine = Engine(model, 2, 32)
    requests = requests_of(5, 5, counts=(20,))
    for request in requests:
        engine.submit(request)
    results = engine.step() + engine.step() + engine.step()
    assert not results
    assert engine.cancel(4)                                      # it waits
    assert engine.cancel(0) and not engine.cancel(0)             # it runs, until it is cancelled
    results = list(engine.run([]))
    assert sorted(r.request.key for r in results) == [1, 2, 3]
    assert all(r.ids == alone(model, r.request)[0] for r in results)
    for request in requests:
        engine.submit(request)
    leaving = lambda: [seq.request.key for report in engine.pending for seq in report.asked.values()
                       if seq not in engine.running.values()]
    while not leaving():                                         # the last token of one is coming
        engine.step()
    key = leaving()[0]
    assert engine.cancel(key) and key not in {r.request.key for r in engine.run([])}
    assert_nothing_is_lost(engine)


@on_cpu
def test_what_an_engine_refuses(one_thread):
    model = model_of(0, (4, 2))
    engine = Engine(model, 1, 4)
    with pytest.raises(InputError, match="3 pages for 4 heads"):
        Engine(model, 1, 3)
    for request, words in ((Request([], 1), "empty"),
                           (Request([1] * 64), "64 tokens does not fit"),
                           (Request([1] * 60, 5), "60 tokens and 5 more")):
        result, good = engine.run([request, Request([1], 1)])
        assert words in result.error and len(good.ids) == 1
    with torch.no_grad():
        model.embed_tokens.weight[7] = torch.nan
    results = Engine(model, 2, 8).run([Request([7], 3), Request([1, 2], 3, key=1)])
    bad, good = sorted(results, key=lambda r: r.error is None)
    assert "not numbers" in bad.error
    assert good.error or good.ids == alone(model, good.request)[0]
    assert_nothing_is_lost(engine)


def poisoned_model(model, bad):
    """Tokens 25 to 28 become something that no model survives, and are never generated."""
    with torch.no_grad():
        model.embed_tokens.weight[25:] = bad
        model.embed_tokens.weight[25:, 0] = 0
        model.lm_head.weight[25:] = 0                            # never the likeliest of 29
    return model


@on_cpu
@given(seeds, st.sampled_from([-0.5, 0.5, 1e9]), st.integers(2, 4), st.sampled_from([4, 6, 30]),
       st.sampled_from([torch.nan, torch.inf, -1e38, 6e4]), st.sampled_from([None, 3]),
       st.sampled_from([torch.float32, torch.float16]))
@settings(max_examples=10)
def test_poisoned_sequences_harm_nobody_else(one_thread, seed, c, rows, pages, bad, window, dtype):
    """Beside them and after them, each healthy request gets the text that it gets by itself."""
    model = model_of(seed % 20, (4, 1), window, dmc_fast, c=c).to(dtype)
    model = poisoned_model(model, -6e4 if (bad, dtype) == (-1e38, torch.float16) else bad)
    requests = requests_of(seed, 8)
    for i, request in enumerate(requests):
        request.prompt, request.temperature = [x % 25 for x in request.prompt], 0.0
        if i % 2:
            request.prompt[(seed + i) % len(request.prompt)] = 25 + i % 4
    results = {r.request.key: r for r in Engine(model, rows, 2 * pages).run(requests)}
    for request in requests[::2]:
        result, = Engine(model, 1, 2 * pages).run([request])
        assert results[request.key].ids == result.ids
        assert results[request.key].error == result.error
    if not abs(bad) < torch.inf:
        assert all(results[i].error for i in (1, 3, 5, 7))


@kernels
@pytest.mark.parametrize("window", [None, 3])
def test_poisoned_sequences_harm_nobody_else_in_kernels(one_thread, window):
    torch.manual_seed(0)
    model = Transformer(config_of((2, 1), window, c=0.0, n_layer=1), dmc_fast)
    model = poisoned_model(model.requires_grad_(False), torch.nan)
    requests = [Request(prompt, 3, key=i) for i, prompt in enumerate(
        [[5, 28], [25, 6], [7, 8, 9], [26], [3, 4]])]
    engine = Engine(model, 2, 8)
    for result in engine.run(requests):
        if max(result.request.prompt) < 25:
            assert_as_alone(model, result)
        else:
            assert "not numbers" in result.error and not result.ids
    assert_nothing_is_lost(engine)


@kernels
def test_the_engine_on_kernels(one_thread):
    """Admission, idle rows and a row that is used again, in the interpreter."""
    torch.manual_seed(0)
    model = Transformer(config_of((2, 1), c=0.0, n_layer=1), dmc_fast).requires_grad_(False)
    requests = [Request([5, 6, 7][:1 + i], 3 + i % 2, 0.5 * i, seed=i, key=i) for i in range(3)]
    engine = Engine(model, 2, 8)
    assert engine.cache.kernels
    for result in engine.run(requests):
        assert_as_alone(model, result)
    assert_nothing_is_lost(engine)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("greedy", [True, False])
def test_graphs_replay_what_the_step_does_on_a_gpu(greedy):
    """The engine's graphs give the same tokens as its step run eagerly, and never wait for the
    device."""
    torch.manual_seed(0)
    model = Transformer(config_of((4, 2), head_dim=16), dmc_fast).cuda().bfloat16()
    results = []
    for eager in (False, True):
        engine = Engine(model, 3, 60)

        def step(kind, engine=engine):
            engine.cache.seen = [1] * len(engine.cache.seen)
            engine._step(kind)

        if eager:
            engine._capture = lambda kind, step=step: types.SimpleNamespace(
                replay=lambda: step(kind))
        requests = requests_of(1, 8)
        for request in requests:
            request.temperature *= not greedy
        list(engine.run(requests))                               # compiles kernels, and captures
        results.append({})
        for request in requests:
            engine.submit(request)
        torch.cuda.set_sync_debug_mode("error")
        try:
            while engine.waiting or engine.running or engine.pending:
                results[-1] |= {r.request.key: r.ids for r in engine.step()}
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_nothing_is_lost(engine)
    assert results[0] == results[1] and len(results[0]) == 8


# ------------------------------------------------------- what a GPU would do, as far as a CPU knows

WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique",
         "unique_dim", "unique_consecutive", "_unique2", "bincount", "histc", "repeat_interleave"}


class NeverWaits(TorchDispatchMode):
    """Fails on an operator whose result the host waits for, or that cannot be in a CUDA graph.

    That is: numbers that are read, shapes that depend on them, and copies between host and device.
    With `copies`, as in a prefill, those that do not wait are allowed.
    """

    def __init__(self, copies=False):
        super().__init__()
        self.copies, self.operators = copies, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.operators += 1
        assert name not in WAITS, f"{name} waits for the GPU"
        if name.startswith("index"):
            masks = [x for x in tensors if x.dtype == torch.bool and x is not tensors[0]]
            assert not masks or name in ("index_select", "index_copy_"), (
                f"{name} by a mask waits for the GPU")
        if self.copies and name in ("_pin_memory", "is_pinned"):  # which PyTorch cannot fake
            return args[0] if name == "_pin_memory" else False
        across = {x.device.type for x in tensors} | (
            {torch.device(kwargs["device"]).type} if tensors and kwargs.get("device") else set())
        assert len(across) < 2 or self.copies and kwargs.get("non_blocking"), (
            f"{name} between {' and '.join(sorted(across))}")
        if len(across) == 2:
            kwargs = {**kwargs, "non_blocking": False}           # which it cannot either
        return func(*args, **kwargs)


class Launch:
    """Stands for a kernel: its launches are counted and do nothing."""

    def __init__(self, name, launched):
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launched.append(self.name)


@pytest.fixture
def no_kernels_run(monkeypatch):
    """Caches and functions choose their kernels, whose launches do nothing. A list of them."""
    launched = []
    for module in ("nanodmc.launch", "nanodmc.pages", "dmc_fast"):
        monkeypatch.setattr(f"{module}.uses_kernels", lambda device: True)
    for module in (dmc_fast, mask_kernels, short_step, decisions):
        monkeypatch.setattr(module, "triton", types.SimpleNamespace(cdiv=lambda a, b: -(-a // b)))
        for name in vars(module).copy():
            if name.endswith("_kernel") and not name.endswith("_in_kernel"):
                monkeypatch.setattr(module, name, Launch(name, launched))
    return launched


@on_cpu
@pytest.mark.parametrize("limits", [None, (0, False), (8, True)])
@pytest.mark.parametrize("gain,window", [(None, 12), (None, None), (0.0, 12)])
def test_a_step_has_no_operator_that_waits(one_thread, no_kernels_run, limits, gain, window):
    """All that PyTorch does in a step beside the kernels; also where the host's side of it acts."""
    engine = Engine(model_of(0, (4, 2), window, dmc_fast).float(), 3, 60, gain=gain)
    assert engine.cache.kernels
    engine.cache.ages[:, :2], engine.cache.lengths[:, :2] = 5, 3
    with torch.no_grad(), NeverWaits() as mode:
        engine._step(limits)
        engine.cache.share_work()
        engine.cache.release(slice(0, 1))
    assert mode.operators > 50


@on_cpu
@pytest.mark.parametrize("wrong", [
    lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: int(x.max()), lambda x: x.nonzero(),
    lambda x: x.to("meta"), lambda x: 1 if x.any() else 0, lambda x: torch.equal(x, x),
    lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long)), torch.unique,
    lambda x: x.__setitem__(x > 0, torch.ones(3))])
def test_what_waits_is_found(wrong):
    x = torch.ones(3)
    with pytest.raises(AssertionError), NeverWaits():
        wrong(x)


class OnFakeGpu(Engine):
    """An Engine on tensors without memory, whose reports say that nothing merges."""

    captured = 0

    def _capture(self, limits):
        self.captured += 1

        def replay():
            self.cache.seen = [1] * len(self.cache.seen)
            with NeverWaits():
                self._step(limits)
        return types.SimpleNamespace(replay=replay)

    def _post(self, rows):
        super()._post(rows)
        rows, report = range(len(self.tokens)), self.pending[-1]
        fed = [report.live[row].fed if row in report.live else 0 for row in rows]
        report.numbers = np.array([[7] * len(fed), fed, *([n * self.heads for n in x] for x in (
            fed, [-(-n // 16) for n in fed], [1] * len(fed)))])


@pytest.fixture
def on_fake_gpu(monkeypatch, no_kernels_run, fake_gpu):  # noqa: F811
    """Makes an OnFakeGpu: three rows, 40 pages, a model with heads of D channels."""
    event = types.SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    processor = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: processor)
    monkeypatch.setattr(flash_attention, "stock", lambda *_: "flash")

    def make(dtype, D, **kwargs):
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("cuda"):
                model = Transformer(config_of((4, 2), head_dim=D), dmc_fast)
        finally:
            torch.set_default_dtype(usual)
        return OnFakeGpu(model, 3, 40, **kwargs)
    return make


@on_cpu
@pytest.mark.parametrize("D,gain", [(16, None), (128, None), (16, 0.0)])
def test_the_engine_runs_on_a_gpu_as_far_as_pytorch_can_tell(on_fake_gpu, D, gain):
    """Shapes, types and devices fit, and admission, steps, reports and release never wait."""
    engine = on_fake_gpu(torch.bfloat16, D, gain=gain)
    for i in range(5):
        engine.submit(Request([1] * (1 + 5 * i), 3 + i, float(i % 2), key=i))
    results = []
    with NeverWaits(copies=True):
        while engine.waiting or engine.running or engine.pending:
            results += engine.step()
    assert sorted(r.request.key for r in results) == list(range(5))
    assert all(r.ids == [7] * r.request.count and r.cr == 1 for r in results)
    assert engine.captured == 2                                  # greedy, and not


@on_cpu
@pytest.mark.parametrize("dtype,D,captured", [
    (torch.bfloat16, 64, True), (torch.bfloat16, 100, False), (torch.bfloat16, 8, False),
    (torch.float64, 64, False)])
def test_only_a_step_of_kernels_is_captured(monkeypatch, on_fake_gpu, dtype, D, captured):
    """What stands in for them elsewhere reads numbers, which a graph cannot."""
    monkeypatch.setattr(dmc_fast.PagedCache, "release", lambda *_: None)
    engine, steps = on_fake_gpu(dtype, D), []
    engine._step, engine._post = steps.append, lambda rows: None
    engine.running[0] = Sequence(Request([1], 5), 5, tokens=[1], fed=1)
    engine._launch()
    assert engine.cache.kernels == captured == bool(engine.captured) and steps == [None]
    assert captured or engine.cache.seen == [1, 1]               # as long as the longest sequence


# ------------------------------------------------------------------------------------ several ranks

RANK_SCRIPT = """
import json, sys, torch
here, folder, out, commands = sys.argv[1:]
sys.path.insert(0, here)
import dmc_fast, generate
from nanodmc import parallel
model, rank = parallel.load_part(folder, dmc_fast, dtype=torch.float32), parallel.this_rank()
tokens, cache = torch.load(f"{out}/tokens.pt"), dmc_fast.PagedCache(model.config, 2)
with torch.no_grad():
    logits, alpha = model(tokens)
    parts = (tokens[:, :30], *tokens[:, 30:].split(1, dim=1))
    cached = torch.cat([model(part, cache)[0] for part in parts], dim=1)
size = sum(p.numel() for p in model.parameters())
torch.save((logits, cached, alpha, size), f"{out}/rank{rank}.pt")
for command in json.loads(commands):
    assert generate.main(command) == 0
"""


@on_cpu
def test_two_ranks_are_one_model(tmp_path, one_thread, capsys):
    """A model split between two processes gives the logits, decisions, texts and CR of the whole
    one, also when pages run out."""
    whole, prompts = model_of(3, (4, 2), vocab_size=257), tmp_path / "prompts.jsonl"
    with torch.no_grad():
        for layer in whole.layers:       # so the second rank's heads merge nothing
            layer.self_attn.k_proj.weight[whole.config.head_dim] *= 0
    checkpoint.save(whole, tmp_path / "model", Tokenizer.bytes())
    prompts.write_text("".join(json.dumps({"prompt": f"{i} times", "seed": i, "temperature": i % 2,
                                           "tokens": 16 + i}) + "\n" for i in range(5)))
    flags = ["--ckpt", str(tmp_path / "model"), "--prompt", "2 times", "--tokens", "20"]
    many = [*flags[:2], "--prompts", str(prompts), "--batch", "3", "--cache-gb"]
    commands = [[*flags, "--temperature", "0"], [*flags, "--temperature", "1", "--samples", "2"]]
    tokens = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, tmp_path / "tokens.pt")
    (tmp_path / "rank.py").write_text(RANK_SCRIPT)
    seven_pages = [*many, "1.6e-5", "--out", str(tmp_path / "two.jsonl")]     # for 2 heads
    run = two_processes(tmp_path / "rank.py", HERE, tmp_path / "model", tmp_path,
                        json.dumps([*commands, seven_pages]))
    assert run.returncode == 0, run.stderr
    for command in (*commands, [*many, "1", "--out", str(tmp_path / "one.jsonl")]):
        assert generate.main(command) == 0
    shown, ours = (re.sub("[0-9,]+ allocated", "", out).splitlines()     # each rank pads its heads
                   for out in (run.stdout, capsys.readouterr().out))
    assert shown[:-3] == ours[:-3] and "CR per layer" in run.stdout
    assert not re.search(" 0 preempted", shown[-2])
    one, two = (lines_of(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    assert two == one and len(one) == 5
    whole.float()
    with torch.no_grad():
        expected, decided = whole(tokens)
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    shared = sum(p.numel() for p in whole.layers.parameters() if p.dim() > 1)
    for logits, cached, _, count in parts:
        assert largest_error(logits, expected) < 1e-5 and largest_error(cached, expected) < 1e-5
        assert 2 * (sum(p.numel() for p in whole.parameters()) - count) == shared
    assert torch.equal(parts[0][0], parts[1][0]) and torch.equal(parts[0][1], parts[1][1])
    assert torch.equal(torch.cat([parts[0][2], parts[1][2]], dim=2), decided)
    assert 0 < decided.mean() < 1
