"""Attention for scores that are too large for a mask that is added to them.

It is what `attend` of flash_attention.py falls back to. Names and shapes are those of dmc.py.
"""

import math

import torch
import torch.nn.functional as F

from dmc import wide

LIMIT = 4e3         # of scores; -1e4 is added to hide one, and it must stay hundreds below others


def too_large(q, k):
    """Of each sequence, whether scores may exceed LIMIT, or are not numbers: (B,)."""
    a, b = (torch.linalg.vector_norm(x, dim=-1, dtype=wide(x[:0]).dtype).amax((1, 2))
            for x in (q, k))
    return ~(a * b / math.sqrt(q.size(-1)) < LIMIT)


def attend_in_blocks(q, k, v, keep, rows=256):
    """dmc.attend, for so many queries at a time: without gradients no T x T tensor exists."""
    grouped = q.unflatten(1, (k.size(1), -1)) / math.sqrt(q.size(-1))     # (B, G, H / G, T, D)
    overwritten, y = F.pad(keep[..., 1:], (0, 1)).unsqueeze(-2), []
    for start in range(0, q.size(2), rows):
        end = min(start + rows, q.size(2))
        j = torch.arange(end, device=q.device)
        i = j[start:, None]
        causal = keep.new_zeros(end - start, end).masked_fill(j > i, -torch.inf)
        mask = torch.where(j < i, overwritten[..., :end], causal)
        scores = wide(grouped[..., start:end, :] @ k[:, :, None, :end].mT) + mask[:, :, None]
        y.append(scores.softmax(dim=-1).to(v.dtype) @ v[:, :, None, :end])
    return torch.cat(y, dim=-2).flatten(1, 2)
