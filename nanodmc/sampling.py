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


def sample(logits, temperature, top_k, top_p, seed, position):
    """Tokens (B,) from logits (B, vocab), each row by its own settings (B,); -1 if any is NaN.

    temperature 0 takes the likeliest token. top_k keeps the k likeliest, 0 all of them. top_p keeps
    the smallest set of likeliest tokens whose probabilities reach p. The draw depends only on seed
    and position, that of the new token in its sequence. Never waits for a GPU.

    Probabilities are summed in fp64, because the order of a sum may depend on the batch: in fp64
    the difference is too small to move a choice.
    """
    ordered, ids = logits.sort(descending=True, stable=True)
    ordered = ordered.double()
    ordered = (ordered - ordered[:, :1]) / temperature[:, None].clamp(min=1e-30)
    rank, top_k = torch.arange(ordered.size(1), device=logits.device), top_k[:, None]
    p = ordered.masked_fill_((rank >= top_k) & (top_k > 0), -torch.inf).softmax(-1)
    reached = p.cumsum(-1)
    allowed = (reached - p < top_p[:, None]).sum(-1, keepdim=True).clamp(min=1)   # 1 for top_p 0
    goal = uniform(seed, position)[:, None] * reached.gather(-1, allowed - 1)
    drawn = ids.gather(-1, (reached <= goal).sum(-1, keepdim=True).minimum(allowed - 1))[:, 0]
    first = likeliest(logits)
    return torch.where((temperature == 0) | (first < 0), first, drawn)


def chooser(**settings):
    """The function choose(logits (vocab,), position) -> token that samples with these SETTINGS."""
    settings = [torch.tensor([settings[name]], dtype=dtype) for name, dtype in SETTINGS.items()]

    def choose(logits, position):
        token = sample(logits[None], *settings, torch.tensor([position])).item()
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
