"""Throughput of a model at one length: one run of the engine, and the figures of it."""

import math
import time

import torch

from nanodmc.engine import Engine
from nanodmc.files import InputError
from nanodmc.parallel import over_ranks
from nanodmc.peers import attention_share, copy_bandwidth, settle, synchronize
from nanodmc.pool import PAGE, page_bytes, pages_that_fit
from nanodmc.requests import Request


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
