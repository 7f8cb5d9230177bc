"""Where a CPU keeps the slots of many sequences: one strip of memory for each head.

A pool of pages would have to be gathered for every token, which takes as long as all else. So each
head has addresses for all positions, in a row, and the operating system lends memory for those that
are written. Pages are counted all the same, so that a cache stays within what it was given.
"""

import math
import mmap
import sys

import torch

from nanodmc.padded_cache import attend_used

RETURNS = sys.platform == "linux"        # memory given back reads as zeros, without taking any


class Strips:
    """Slots of L layers, B sequences and G heads: keys, values (L, B, G, positions, D), zero."""

    def __init__(self, *shape, dtype):
        self.maps = [addresses(math.prod(shape) * dtype.itemsize) for _ in range(2)]
        self.keys, self.values = (torch.frombuffer(x, dtype=dtype).view(shape) for x in self.maps)
        self.starts = [x.data_ptr() for x in (self.keys, self.values)]

    def rows(self, rows):
        """The strips of the sequences in a slice: the same memory."""
        part = object.__new__(Strips)
        part.__dict__.update(self.__dict__, keys=self.keys[:, rows], values=self.values[:, rows])
        return part

    def write(self, layer, slot, written, k, v):
        """k, v (B, G, T, D) into the slots numbered `slot` (B, G, T), where they are `written`."""
        B, G, S, D = self.keys[layer].shape
        at = slot + S * torch.arange(B * G).view(B, G, 1)
        if not written.all():
            at, k, v = at[written], k[written], v[written]
        for strips, x in ((self.keys, k), (self.values, v)):
            strips[layer].view(-1, D)[at] = x

    def attend(self, layer, q, lengths):
        """Attention of q (B, H, 1, D) over the first lengths (B, G) slots of each head.

        Sequences are padded to the longest, and heads too where that is little.
        """
        longest, group, y = lengths.amax(0).tolist(), q.size(1) // lengths.size(1), []
        even = len(longest) * max(longest) <= 1.25 * sum(longest)
        for first in range(0, len(longest), step := len(longest) if even else 1):
            heads = slice(first, first + step)
            used = slice(max(1, *longest[heads], 1))
            y.append(attend_used(q[:, group * first:group * (first + step)],
                                 self.keys[layer][:, heads, used],
                                 self.values[layer][:, heads, used], lengths[:, heads]))
        return torch.cat(y, dim=1)

    def forget(self, rows, lengths):
        """The sequences `rows` are finished. lengths (L, B, G): the slots that are used."""
        numbers, used = torch.arange(lengths.size(1))[rows].reshape(-1).tolist(), lengths.amax(-1)
        for strips, memory, start in zip((self.keys, self.values), self.maps, self.starts,
                                         strict=True):
            for layer, slots in zip(strips, used.tolist(), strict=True):
                for row in numbers:
                    if slots[row]:
                        give_back(layer[row], slots[row], memory, start)


def addresses(count):
    """A map of `count` bytes, zeros, that takes memory by the small page, as it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, count, flags=flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def give_back(strip, slots, memory, start):
    """Zero a sequence's slots (G, positions, D), of which `slots` were used, and return the memory.

    memory: the map it is a part of, whose first address is `start`.
    """
    first = strip.data_ptr() - start
    last = first + strip.nbytes
    inner = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
    if not RETURNS or inner[0] >= inner[1]:
        strip[:, :slots] = 0
        return
    item, flat = strip.element_size(), strip.view(-1)
    flat[:(inner[0] - first) // item] = 0
    flat[(inner[1] - first) // item:] = 0
    memory.madvise(mmap.MADV_DONTNEED, inner[0], inner[1] - inner[0])
