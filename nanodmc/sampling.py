"""From scores to a token, in the same way in every batch; and a text from one prompt.

The randomness of a token is a hash of its request's seed and of its position, and of nothing else.
So a sequence gets the same text alone, in a batch, and after an interruption.
"""

import torch

from nanodmc.files import InputError
from nanodmc.parallel import over_ranks

NOT_NUMBERS = ("the model's scores are not numbers, as with damaged weights; "
               "fetch or train it anew.")
SETTINGS = {"temperature": torch.float64, "top_k": torch.long, "top_p": torch.float64,
            "seed": torch.long}      # what a row is sampled with, in the order that `sample` takes


def next_logits(model, tokens, cache, gain=None):
    """The scores (B, vocab) of what follows tokens (B, T), which continue the sequences in a cache.

    The vocabulary is scored for the last token only, which is all that generating needs.
    """
    return model.lm_head(model.hidden(tokens, cache, gain=gain)[0][:, -1])


def hashed(x):
    """MurmurHash3's 64-bit finalizer of int64: a bijection that spreads each bit over all."""
    for factor in (0xff51afd7ed558ccd, 0xc4ceb9fe1a85ec53):
        x = (x ^ (x >> 33 & 0x7fffffff)) * (factor - 2 ** 64)
    return x ^ (x >> 33 & 0x7fffffff)


def uniform(seed, position):
    """A number in [0, 1), fp64, for each pair of int64: the randomness of one token."""
    return (hashed(hashed(seed) + position) >> 11 & 2 ** 53 - 1).double() * 2.0 ** -53


def derived_seed(seed, number):
    """The seed of one of many texts, by its number, from 1: they share no draws."""
    x = hashed(hashed(torch.tensor(seed)) + number)
    return int(hashed(x) >> 2 & 2 ** 62 - 1)


def likeliest(logits):
    """The likeliest token (B,) of logits (B, vocab), the first among equals; -1 if any is NaN."""
    return logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1)


def rising(logits):
    """Whole numbers, int32, in the order of the logits, and how many bits they have."""
    bits = (logits.float() + 0.0).view(torch.int32)       # + 0.0, as -0.0 equals it
    key = bits ^ (bits >> 31 & 0x7fffffff)
    return (key >> 16, 16) if logits.dtype == torch.bfloat16 else (key, 32)


def threshold(key, bits, weight, goal):
    """The largest number such that the tokens whose key is not below it reach `goal`: (B, 1).

    Found bit by bit, without a sort. key, weight (B, vocab); goal (B, 1).
    """
    least = torch.full_like(key[:, :1], -2 ** (bits - 1))
    for bit in reversed(range(bits)):
        higher = least + (2 ** bit if bit < 31 else -2 ** 31)            # which is 0 then
        enough = (weight * (key >= higher)).sum(-1, keepdim=True) >= goal
        least = torch.where(enough, higher, least)
    return least


def reaching(key, least, weight, goal):
    """Of the tokens whose key is not below the threshold of `goal`, those that it takes: bool.

    Equal ones count from the first on.
    """
    above, equal = weight * (key > least), weight * (key == least)
    missing = goal - above.sum(-1, keepdim=True)
    return (key > least) | (key == least) & (equal.cumsum(-1) - equal < missing)


def sample(logits, temperature, top_k, top_p, seed, position, limits=None):
    """Tokens (B,) from logits (B, vocab), each row by its own settings (B,); -1 if any is NaN.

    temperature 0 takes the likeliest token. top_k keeps the k likeliest, 0 all of them. top_p keeps
    the smallest set of likeliest tokens whose probabilities reach p, 1 all of them. limits, which
    save time: no top_k is above the first, and any top_p is below 1 only if the second is true. The
    draw depends only on seed and position, that of the new token in its sequence. Never waits for a
    GPU.

    Probabilities are summed in fp64, because the order of a sum may depend on the batch: in fp64
    the difference is too small to move a choice.
    """
    vocab = logits.size(-1)
    most, nucleus = (vocab, True) if limits is None else limits
    key, bits = rising(logits) if most or nucleus else (None, None)
    scores = logits.double()
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature[:, None].clamp(min=1e-30)
    if most:
        goal = top_k[:, None].clamp(1, min(most, vocab))
        least = key.topk(min(most, vocab)).values.gather(-1, goal - 1)
        kept = reaching(key, least, torch.ones_like(scores), goal) | (top_k == 0)[:, None]
        scores = scores.masked_fill(~kept, -torch.inf)
    p = scores.softmax(-1)
    if nucleus:
        goal = top_p[:, None].clamp(min=1e-300)                          # the likeliest at least
        kept = reaching(key, threshold(key, bits, p, goal), p, goal) | (top_p >= 1)[:, None]
        p = p.masked_fill(~kept, 0)
    reached = p.cumsum(-1)
    total = reached[:, -1:]
    below = total.nextafter(torch.zeros_like(total))
    goal = (uniform(seed, position)[:, None] * total).minimum(below)
    drawn, first = (reached <= goal).sum(-1).clamp(max=vocab - 1), likeliest(logits)
    certain = (temperature == 0) | (first < 0) | total[:, 0].isnan()     # the last: a score is inf
    return torch.where(certain, first, drawn)


def chooser(**settings):
    """The function choose(logits (vocab,), position) -> token that samples with these SETTINGS."""
    limits = settings["top_k"], settings["top_p"] < 1
    settings = [torch.tensor([settings[name]], dtype=dtype) for name, dtype in SETTINGS.items()]

    def choose(logits, position):
        token = sample(logits[None], *settings, torch.tensor([position]), limits).item()
        if token < 0:
            raise InputError(NOT_NUMBERS)
        return token
    return choose


@torch.no_grad()
def generate(model, cache, prompt, count, choose, stops=(), gain=None):
    """Yield up to `count` tokens that continue `prompt` (ids), each as soon as it is chosen.

    The prompt, which goes on from what the cache has seen, is taken in at once, then one token a
    step. choose(logits (vocab,), position of the new token) -> token. The text ends before the
    first of `stops`.
    """
    device = next(model.parameters()).device
    tokens = prompt
    for _ in range(count):
        logits = next_logits(model, torch.tensor([tokens], device=device), cache, gain)
        token = torch.tensor(choose(logits[0].cpu(), cache.seen[0]), device=device)
        token = int(over_ranks(token, "MAX"))      # ranks could differ, by the rounding of a sum
        if token in stops:
            return
        yield token
        tokens = [token]
