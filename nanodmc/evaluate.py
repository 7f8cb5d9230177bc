"""Figures of a model, measured through its cache."""

import numpy as np
import torch
import torch.nn.functional as F

from nanodmc.text import sequences


@torch.no_grad()
def evaluate(model, tokens, s, make_cache=None):
    """Validation loss, CR, and the CR of every layer and head, (L, G), through a real cache.

    The loss is the mean over s.eval_sequences sequences of s.context tokens, in nats per token.
    make_cache: has the arguments of dmc.Cache; None: the model's own cache.
    """
    T, weight = s.context, next(model.parameters())
    device = weight.device
    starts = np.random.default_rng(1).permutation((len(tokens) - 1) // T)[:s.eval_sequences] * T
    losses, slots = [], []
    rows = max(1, 4096 // T)
    for part in np.split(starts, range(rows, len(starts), rows)):
        x, y = sequences(tokens, part, T, device)
        cache = (make_cache or model.Cache)(model.config, len(part), device, weight.dtype)
        logits, _ = model(x, cache)
        loss = F.cross_entropy(logits.float().transpose(1, 2), y, reduction="none")
        losses.append(loss.mean(1))
        slots.append(cache.lengths.transpose(0, 1))
    slots = torch.cat(slots).double()
    return (torch.cat(losses).double().mean().item(), (T / slots.mean()).item(),
            (T / slots.mean(0)).tolist())


@torch.no_grad()
def decisions(model, ids):
    """alpha (L, G, T) of the token ids: 1 where a head merges, 0 where it appends.

    A text longer than the model's positions is cut into pieces of that length, each of which starts
    anew.
    """
    device, size = next(model.parameters()).device, model.config.max_seq_len
    pieces = [model.hidden(torch.tensor([ids[i:i + size]], device=device))[1]
              for i in range(0, len(ids), size)]
    return torch.cat(pieces, dim=-1)[:, 0].cpu()
