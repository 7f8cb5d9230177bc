"""Which program of a decode step attends over which slots, so that all of them end together.

Heads differ in length, by a factor of 10 and more in one batch. A program for each head would leave
most of a GPU idle while the longest ones go on. So long heads are cut into splits, as even as can
be, and the list of splits has a fixed length: its surplus entries do nothing. A CUDA graph can read
it, and making it waits for no GPU.
"""

import torch

BLOCK = 64          # slots that a program takes at once


def work_list(lengths, extra):
    """How the rows (heads of sequences) with so many slots, lengths (L, rows), are cut.

    Returns items (L, 3, rows + extra): the row of each program, the number of its split, and how
    many that row has, 0 where the program has nothing to do; the longest splits first. And places
    (L, 2, rows): the first item of each row, and how many it has, at least 1. int32.
    """
    L, rows = lengths.shape
    blocks = -(-lengths.long() // BLOCK)
    most = (-(-blocks.sum(1, keepdim=True) // extra)).clamp(min=1)      # blocks of one program
    splits = (-(-blocks // most)).clamp(min=1)                          # rows + extra at most
    order = (blocks / splits).argsort(descending=True, stable=True)
    count = splits.gather(1, order)
    ends = count.cumsum(1)
    item = torch.arange(rows + extra, device=lengths.device).repeat(L, 1)
    nth = torch.searchsorted(ends, item, right=True)
    there, nth = nth < rows, nth.clamp(max=rows - 1)
    split = item - (ends - count).gather(1, nth)
    items = torch.stack([order.gather(1, nth), split, count.gather(1, nth) * there], dim=1)
    first = torch.zeros_like(order).scatter(1, order, ends - count)
    return items.int(), torch.stack([first, splits], dim=1).int()
