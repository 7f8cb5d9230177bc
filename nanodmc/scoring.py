"""Log-likelihoods of continuations, and how many slots the cache holds for them."""

from itertools import groupby
from typing import NamedTuple

import torch

from dmc import wide
from nanodmc.files import InputError

SIZE = 4096        # tokens that are worked on at once, padding included
CPU_SIZE = 512     # the same on a CPU without a cache: there larger batches are slower, by a third
CHUNK = 256        # positions whose vocabulary is scored at once


class Score(NamedTuple):
    """A continuation's log-likelihood, in nats, and whether each of its tokens is the likeliest.

    tokens, slots: what its text puts into the cache, over all layers and heads, and what the cache
    holds of it in the end: tokens / slots is the CR, of many scores the ratio of their sums.
    """
    logprob: float
    greedy: bool
    tokens: int
    slots: int


@torch.no_grad()
def score(model, pairs, gain=None, cache_for=None, each_batch=lambda tokens: None):
    """The Score of every pair (context, continuation) of lists of ids; no context is empty.

    Raises InputError for a continuation that is empty or longer than the model's positions. A pair
    that is longer than these loses the beginning of its context. gain: as in Transformer.hidden.
    cache_for: a function of a text's length in tokens that returns what makes its cache, with the
    arguments of dmc.Cache. None: no cache, but the parallel form, which at alpha in {0, 1} gives
    what the model's own cache gives. each_batch: called with the tokens of each batch as it is
    finished.

    Pairs with the same input, such as those of two answers of one token each, are worked on once.
    """
    texts, longest = {}, model.config.max_seq_len
    for i, (context, continuation) in enumerate(pairs):
        if not 0 < len(continuation) <= longest:
            raise InputError(f"a text to be scored has {len(continuation):,} tokens, and this "
                             f"model scores from 1 to {longest:,} of them; leave its task out.")
        text = (context + continuation)[-(longest + 1):]
        texts.setdefault(tuple(text[:-1]), []).append((i, text[-len(continuation):]))
    scores = [None] * len(pairs)
    on_cpu = not next(model.parameters()).is_cuda
    size = CPU_SIZE if on_cpu and not cache_for else SIZE
    for batch in batches(sorted(texts, key=lambda text: (-len(text), text)), size, cache_for):
        x, tokens, slots = run(model, batch, gain, cache_for)
        wanted = [(row, i, target) for row, text in enumerate(batch) for i, target in texts[text]]
        ends = [len(batch[row]) for row, _, _ in wanted]
        judged = judge(model, x, wanted, ends)
        for (row, i, _), (logprob, greedy) in zip(wanted, judged, strict=True):
            scores[i] = Score(logprob, greedy, tokens[row], slots[row])
        each_batch(sum(map(len, batch)))
    return scores


def work(model, pairs):
    """How many tokens `score` will work on, the sum of what each_batch is told."""
    longest = model.config.max_seq_len
    return sum(map(len, {tuple((a + b)[-(longest + 1):][:-1]) for a, b in pairs}))


def batches(texts, size, cache_for):
    """Texts, sorted by their length, the longest first, in lists of at most `size` padded tokens.

    With cache_for all texts of a list are equally long, since the budget goes by the length.
    """
    for _, group in groupby(texts, key=len if cache_for else lambda text: None):
        group = list(group)
        while group:
            rows = max(1, size // len(group[0]))
            yield group[:rows]
            group = group[rows:]


def run(model, batch, gain, cache_for):
    """Hidden states (B, T, dim) of texts, padded on the right; of each its tokens and slots."""
    weight, config, lengths = next(model.parameters()), model.config, list(map(len, batch))
    tokens = torch.zeros(len(batch), max(lengths), dtype=torch.long)
    for row, text in enumerate(batch):
        tokens[row, :len(text)] = torch.tensor(text)
    tokens, cache = tokens.to(weight.device), None
    if cache_for:
        cache = cache_for(max(lengths))(config, len(batch), weight.device, weight.dtype)
    x, alpha = model.hidden(tokens, cache, gain=gain)
    seen = [config.n_layer * config.n_kv_head * length for length in lengths]
    if cache is not None:
        return x, seen, cache.lengths.sum((0, 2)).tolist()
    if alpha is None:
        return x, seen, seen
    return x, seen, [n - round(alpha[:, row, :, :length].sum(dtype=torch.float64).item())
                     for row, (n, length) in enumerate(zip(seen, lengths, strict=True))]


def judge(model, x, wanted, ends):
    """(log-likelihood, greedy) of each (row, ..., target): its ids come last in x[row, :end]."""
    sizes = [len(target) for _, _, target in wanted]
    rows = torch.tensor([row for row, _, target in wanted for _ in target])
    places = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, sizes, strict=True)])
    targets = torch.tensor([i for _, _, target in wanted for i in target])
    parts = []
    for part in torch.arange(len(rows)).split(CHUNK):
        logits = model.lm_head(x[rows[part].to(x.device), places[part].to(x.device)])
        logprobs, ids = wide(logits).log_softmax(-1), targets[part].to(x.device)
        right = logprobs.argmax(-1) == ids
        parts.append((logprobs.gather(-1, ids[:, None])[:, 0].cpu(), right.cpu()))
    found, right = (torch.cat(some).split(sizes) for some in zip(*parts, strict=True))
    return [(a.sum(dtype=torch.float64).item(), bool(b.all()))
            for a, b in zip(found, right, strict=True)]
