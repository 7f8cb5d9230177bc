"""Many sequences at once over one pool of pages, each admitted as soon as there is room for it."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from nanodmc.baselines import paged_cache
from nanodmc.files import InputError
from nanodmc.parallel import over_ranks, rank_count
from nanodmc.pool import full_pages
from nanodmc.requests import Request, Result, checked_count, limits_of
from nanodmc.sampling import NOT_NUMBERS, SETTINGS, likeliest, next_logits, sample
from nanodmc.short_step import ShortStep


@dataclass(eq=False)
class Sequence:
    """A request on its way."""
    request: Request
    count: int
    ids: list = field(default_factory=list)      # generated, as far as the host has read them
    tokens: list = None                          # the prompt and the ids, when it was admitted
    fed: int = 0                                 # tokens in its cache after all steps launched


@dataclass
class Report:
    """What the device says after a prefill or a step, on its way to the host."""
    numbers: torch.Tensor                        # a copy of Engine.report
    event: object                                # tells when the copy is complete; None on a CPU
    live: dict                                   # row -> Sequence, of all that ran
    asked: dict                                  # of those that get a new token by it


class Held(NamedTuple):
    """What one row holds, and the pages that it may need in the two steps after."""
    fed: int
    slots: int
    pages: int
    need: int


class Engine:
    """Batched generation: `rows` sequences at once, and the next one as soon as one has finished.

    A decode step works on all rows, has fixed shapes, samples on the device and never waits for the
    host, so that on a GPU it is one CUDA graph, where the cache has kernels. The host launches step
    n + 1 before it reads what step n sampled. A sequence that turns out to have ended therefore
    takes part in one more step, whose result is dropped. Idle rows (age -1) do nothing.

    Pages. A step takes at most one page per head, so the host knows two steps ahead whether the
    pool suffices. If it does not, the youngest sequence gives its pages back and waits at the head
    of the queue. Later it is prefilled with all tokens it has, and as randomness goes by position,
    its text goes on as it would have. Only a sequence that does not fit the pool by itself ends in
    an error. A prompt is admitted if it fits uncompressed and leaves a page for every running head.
    If nothing else runs, as much of it as fits is prefilled, and the rest is fed token by token,
    merging on the way.

    Several ranks have a pool each, for their own heads. A sequence counts with the pages of the
    rank where it holds the most, so that all hosts schedule alike and what fits, fits everywhere.

    pages None: enough for every row at full length. stops: tokens that end a text. gain: as in
    Transformer.hidden. cache_class: PagedCache, or a subclass of it; None: what suits the model.
    """

    def __init__(self, model, rows, pages=None, stops=(), gain=None, cache_class=None):
        weight, config = next(model.parameters()), model.config
        self.model, self.short = model, ShortStep(model)
        self.stops, self.gain = set(stops), gain
        self.heads = config.n_layer * config.n_kv_head
        if pages is not None and pages < self.heads:
            raise InputError(f"the pool has {pages} pages for {self.heads} heads; "
                             "raise --cache-gb.")
        device, pages = weight.device, full_pages(config, rows) if pages is None else pages
        cache_class = cache_class or paged_cache(config)
        self.cache = cache_class(config, rows, device, weight.dtype, pages=pages, strips=True)
        self.cache.ages.fill_(-1)                          # no row has a sequence
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)   # for the next step
        self.settings = [torch.zeros(rows, dtype=x, device=device) for x in SETTINGS.values()]
        self.report = torch.zeros(5, rows, dtype=torch.long, device=device)   # token, then Held
        self.waiting, self.running = deque(), {}           # Sequences; row -> Sequence
        self.idle, self.pending = list(range(rows)), deque()                  # rows; Reports
        self.all_heads = self.heads * rank_count()
        self.known = {}                                    # row -> Held, by the newest report
        self.graphs, self.steps, self.waited, self.preempted = {}, 0, 0.0, 0
        self.stream = None                                 # on which graphs are captured
        self.admitted = False                              # since the last step

    # --- requests

    def submit(self, request):
        """Put a request at the end of the queue. Raises InputError where it cannot fit."""
        count = checked_count(self.model.config, request.prompt, request.count)
        length, free = len(request.prompt), len(self.cache.free)
        pages = self.heads * -(-length // self.cache.page_size)
        if pages > free and (self.gain is not None or not self.model.config.dmc):
            raise InputError(f"a prompt of {length} tokens needs {pages} pages of cache, and there "
                             f"are {free}; raise --cache-gb or shorten the prompt.")
        self.waiting.append(Sequence(request, count))

    def cancel(self, key):
        """Forget the request with this key, wherever it is. Returns whether there was one."""
        asked = (seq for report in self.pending for seq in report.asked.values())
        found = {seq for seq in (*self.waiting, *self.running.values(), *asked)
                 if seq.request.key == key}
        self.waiting = deque(seq for seq in self.waiting if seq not in found)
        for seq in found:
            self._drop(seq)
        return bool(found)

    def run(self, requests, each_step=lambda: None):
        """Yield a Result for every Request, as they finish.

        Requests are taken from the iterable when rows fall idle. A Result among them, such as that
        of a line that is no request, is passed on.
        """
        requests = iter(requests)
        while True:
            while (len(self.waiting) < max(1, len(self.idle))
                   and (request := next(requests, None)) is not None):
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
        """Launch a step, read the reports of what came before it, then preempt and admit.

        Returns the Results of what has finished.
        """
        launched = self._launch()
        return self._collect(keep=launched) + self._schedule()

    # --- the device's side: nothing here waits

    def _step(self, limits):
        tokens = self.tokens.clamp(min=0)
        logits = self.short.logits(tokens, self.cache, self.gain)
        self._choose(slice(None), logits, limits)

    def _choose(self, rows, logits, limits):
        """The next token of each row, from logits (rows, vocab), and the report. limits: of all."""
        cache = self.cache
        position = cache.ages[0, rows, 0].long()
        ids = likeliest(logits) if limits is None else sample(
            logits, *(x[rows] for x in self.settings), position, limits)
        self.tokens[rows].copy_(ids[:, None])
        pages = -(-cache.lengths // cache.page_size)
        may_need = (cache.lengths + 1) % cache.page_size <= 1
        sums = (x.sum((0, 2)) for x in (cache.lengths, pages, may_need))
        facts = self.tokens[:, 0], cache.ages[0, :, 0], *sums
        for line, fact in zip(self.report, facts, strict=True):
            line.copy_(fact)
        over_ranks(self.report[2])                               # the slots of all heads
        # the largest of the rest, and one token for all, should ranks round differently
        self.tokens.copy_(over_ranks(self.report, "MAX")[0, :, None])

    def _capture(self, limits):
        """The step as a CUDA graph. It runs once before, with all rows idle, to compile kernels."""
        kept = [(x, x.clone()) for x in (self.cache.ages, self.tokens)]
        self.cache.ages.fill_(-1)
        self.cache.seen = [1] * len(self.cache.seen)      # at which work is not shared anew
        # on PyTorch's own, which all share, the end of another Engine's graph frees memory of these
        self.stream, graph = self.stream or torch.cuda.Stream(), torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._step(limits)
        torch.cuda.current_stream().wait_stream(self.stream)
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool, stream=self.stream):
            self._step(limits)
        for x, before in kept:
            x.copy_(before)
        return graph

    def _launch(self):
        """Start a step for all that run. Returns whether there are any."""
        for row, seq in self.running.items():
            if seq.fed < len(seq.tokens):                 # the rest of a prompt
                self.tokens[row].fill_(seq.tokens[seq.fed])
            seq.fed += 1
        if not self.running:
            return False
        if self.steps % 64 == 0 or self.admitted:
            self.cache.share_work()
            self.admitted = False
        limits = limits_of([seq.request for seq in self.running.values()])
        if self.tokens.is_cuda and self.cache.kernels:
            if limits not in self.graphs:
                self.graphs[limits] = self._capture(limits)
            self.graphs[limits].replay()
        else:
            longest = max(seq.fed for seq in self.running.values())
            self.cache.seen = [longest - 1] * len(self.cache.seen)
            self._step(limits)
        self.steps += 1
        self._post(self.running)
        return True

    def _admit(self, seq, n):
        """Prefill the first n tokens of a sequence in an idle row."""
        row = self.idle.pop()
        self.running[row], rows, seq.fed = seq, slice(row, row + 1), n
        self.admitted = True
        for x, name in zip(self.settings, SETTINGS, strict=True):
            x[row].fill_(getattr(seq.request, name))
        tokens = torch.tensor([seq.tokens[:n]])
        if self.tokens.is_cuda:
            tokens = tokens.pin_memory().to(self.tokens.device, non_blocking=True)
        logits = next_logits(self.model, tokens, self.cache.admit(rows), self.gain)
        self._choose(rows, logits, limits_of([seq.request]))
        self._post([row])

    def _post(self, rows):
        """Send the report on its way. A row is free once its sequence's last token is asked for."""
        numbers, event = self.report.to("cpu", non_blocking=True, copy=True), None
        if self.report.is_cuda:
            event = torch.cuda.Event()
            event.record()
        asked = {row: self.running[row] for row in rows
                 if self.running[row].fed >= len(self.running[row].tokens)}
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
        """Read all reports but the newest `keep`. Returns the Results of what has finished."""
        results = []
        while len(self.pending) > keep:
            report = self.pending.popleft()
            if report.event:
                start = time.perf_counter()
                report.event.synchronize()
                self.waited += time.perf_counter() - start
            tokens, *held = report.numbers.tolist()
            held = [Held(*row) for row in zip(*held, strict=True)]
            self.known = {row: held[row] for row, seq in report.live.items()
                          if self.running.get(row) is seq}
            for row, seq in report.asked.items():
                results += self._accept(seq, tokens[row], held[row])
        return results

    def _accept(self, seq, token, held):
        """Add a token to a sequence. Returns its Result in a list, empty while it goes on."""
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
        """The pages that are sure to be free after the step launched and the one after it."""
        used = sum(held.pages + held.need for held in self.known.values())
        return len(self.cache.free) - used

    def _schedule(self):
        """Make room for the next step, then fill idle rows, the oldest request first.

        Returns the Results of what fails.
        """
        results, page, total = [], self.cache.page_size, len(self.cache.free)
        while self._room() < 0:
            youngest = list(self.running.values())[-1]
            self._drop(youngest)
            if self.running:
                self.waiting.appendleft(youngest)
                self.preempted += 1
            else:
                results.append(Result(youngest.request, error=(
                    f"the cache's {total} pages are used up at {youngest.fed} tokens; raise "
                    "--cache-gb, shorten the prompt or generate fewer tokens.")))
        room = self._room()
        while self.waiting and self.idle:
            seq = self.waiting[0]
            seq.tokens = seq.request.prompt + seq.ids
            n = len(seq.tokens)
            if room == total:                             # it has the pool for itself
                n = min(n, room // self.heads * page - 1)
            pages = self.heads * -(-(n + 1) // page)      # after the next step, if nothing merges
            if pages + self.heads * len(self.running) > room:
                break
            self._admit(self.waiting.popleft(), n)
            room -= pages
        return results
