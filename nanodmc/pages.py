"""Slots in pages: which page of the pool is whose, and how pages are taken and given back."""

import torch
import torch.nn.functional as F

from nanodmc.launch import capturing, power_of_2, uses_kernels
from nanodmc.padded_cache import CacheBytes, FastCache
from nanodmc.strips import Strips

WIDEST_RING = 64    # tokens of an open segment that step_kernel has in the registers of one warp


class Pages(FastCache):
    """One pool of pages for all layers, sequences and heads: no head pays for another's length.

    The memory of dmc_fast.PagedCache, which adds `append` and `step`.

    pool_k, pool_v (pages + 1, page, D). table (L, B, G, pages per head): the pages of each head, or
    0. Page 0 is the spare one, where a head writes when the pool is exhausted. free: the numbers of
    the free pages, the first `left` of them. ages (L, B, G): tokens of each sequence, which may
    differ; -1 for a released one.

    pages None: a pool that grows with the tokens seen, so that it is never exhausted. It is grown
    to its full size and stays fixed once sequences are admitted. Within a CUDA graph it is fixed as
    it is; a graph to be replayed needs pool.full_pages.

    Without kernels, keys and values that no slot uses are zero: what is masked is multiplied by 0,
    and 0 times NaN is NaN. So what is wrong with one sequence stays there.

    strips: on a CPU without kernels, slots are in Strips, from where no step gathers them. The pool
    is then nothing but numbers, which count what may be used. Needs `pages`.
    """

    def __init__(self, config, batch, device, dtype, accumulate, page_size, pages, strips):
        super().__init__(config, batch, device, dtype, accumulate)
        if page_size not in (16, 32, 64):
            raise ValueError(f"page_size is {page_size}; choose 16, 32 or 64")
        L, B, G, D = config.n_layer, batch, config.n_kv_head, config.head_dim
        on_gpu = torch.device(device or "cpu").type == "cuda"
        fits_kernels = (dtype != torch.float64 and D >= (16 if on_gpu else 2)
                        and D == power_of_2(D) and (config.window or 1) <= WIDEST_RING)
        self.kernels = uses_kernels(device) and fits_kernels
        self.grows, ints = pages is None, dict(dtype=torch.int32, device=device)
        self.lengths, self.ages = torch.zeros(L, B, G, **ints), torch.zeros(L, B, G, **ints)
        self.table = torch.zeros(L, B, G, -(-config.max_seq_len // page_size), **ints)
        self.free, self.left = torch.arange(0, **ints), torch.zeros(1, **ints)
        self.failed = torch.zeros(1, **ints)
        self.pool_k, self.pool_v = (torch.zeros(1, page_size, D, device=device, dtype=dtype)
                                    for _ in range(2))
        strips = strips and not (self.kernels or on_gpu)
        self.strips = Strips(L, B, G, config.max_seq_len, D, dtype=dtype) if strips else None
        self.add_pages(self.lengths.numel() if self.grows else pages)
        self.know_positions(config.max_seq_len, device)

    @property
    def page_size(self):
        return self.pool_k.size(1)

    @property
    def bytes(self):
        slot = 2 * self.config.head_dim * self.dtype.itemsize
        pool = slot * self.page_size * (1 + len(self.free))
        tensors = self.table, self.free, *self.open.tensors()
        return CacheBytes(self.lengths.sum().item() * slot, pool + sum(x.nbytes for x in tensors))

    @property
    def compression_ratio(self):
        """Tokens seen / slots used, of the sequences that are there; 1.0 without any."""
        slots = self.lengths.sum().item()
        return self.ages.clamp(min=0).sum().item() / slots if slots else 1.0

    # --- the pool's size

    def add_pages(self, more):
        """A pool with so many more free pages. Does not wait for a GPU."""
        pages = len(self.free)
        make = torch.empty if self.kernels else torch.zeros      # operations read what they mask
        for name in () if self.strips else ("pool_k", "pool_v"):
            old = getattr(self, name)
            new = make(1 + pages + more, *old.shape[1:], device=old.device, dtype=old.dtype)
            new[:len(old)] = old
            setattr(self, name, new)
        device = self.free.device
        added = torch.arange(pages + 1, pages + more + 1, dtype=torch.int32, device=device)
        free, at = F.pad(self.free, (0, more)), self.left + torch.arange(more, device=device)
        self.free, self.left = free.scatter(0, at, added), self.left + more

    def make_room(self, tokens):
        """Pages for so many tokens of every sequence, should nothing merge; half as many more."""
        heads, pages = self.lengths.numel(), -(-tokens // self.page_size)
        have = len(self.free) // heads
        if pages > have:
            self.add_pages(heads * (min(max(pages, have * 3 // 2), self.table.size(-1)) - have))

    def expect(self, layer, tokens, decides, device):
        """Make room for `tokens` more; FastCache.expect says what is refused."""
        super().expect(layer, tokens, decides, device)
        if self.grows and capturing(device):
            self.grows = False                                   # a graph knows where the pool is
        if self.grows:
            self.make_room(self.seen[layer] + tokens)

    # --- sequences come and go

    def check(self):
        """Raise ValueError if the pool was exhausted since the last check. Waits for the GPU."""
        if self.failed.item():
            self.failed.zero_()
            for pool in (self.pool_k, self.pool_v):
                pool[0] = 0                                      # heads without a page wrote there
            raise ValueError(f"the cache's {len(self.free)} pages are used up; give it more, "
                             "or a smaller batch, or shorter texts")

    def release(self, rows):
        """The sequences `rows` (numbers or a slice) are finished: their pages are free again.

        In all layers. With kernels, does not wait for a GPU if `rows` is a slice.
        """
        owned = -(-self.lengths[:, rows] // self.page_size)[..., None]
        owned = (torch.arange(self.table.size(-1), device=owned.device) < owned).flatten()
        pages, total, left = self.table[:, rows].flatten(), len(self.free), self.left.clamp(min=0)
        owned &= pages > 0                                       # all but the spare one
        first = owned.to(torch.uint8).argsort(descending=True, stable=True)[:total]
        pages, freed = pages[first], owned.sum()                 # the owned ones come first
        i = torch.arange(len(pages), device=left.device)
        at = (left + i) % total
        self.free[at] = torch.where(i < freed, pages, self.free[at])
        self.left.copy_(left + freed)
        if self.strips:
            self.strips.forget(rows, self.lengths)
        elif not self.kernels:                                   # NaN would survive the next mask
            for pool in (self.pool_k, self.pool_v):
                pool[pages[:freed]] = 0
        self.lengths[:, rows], self.ages[:, rows], self.table[:, rows] = 0, -1, 0

    def admit(self, rows):
        """A cache for new sequences in place of those of the slice `rows`, which were released.

        It shares all memory with this one. Prefill through it; then this one decodes old and new
        sequences together.
        """
        if self.grows:                                           # or the two would have two pools
            self.make_room(self.config.max_seq_len)
            self.grows = False
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__, seen=[0] * len(self.seen), open=self.open.rows(rows))
        for name in ("lengths", "ages", "table"):
            setattr(part, name, getattr(self, name)[:, rows])
        part.strips = self.strips and self.strips.rows(rows)
        part.ages.zero_()
        for x in part.open.tensors():                            # of the sequence before
            x.zero_()
        return part

    # --- tokens come

    def take(self, layer, slot, fresh):
        """A page for the slots numbered `slot` (B, G, n) that are the first of theirs, True in
        fresh (B, G, n): a free page, or the spare one if none is."""
        if not (fresh.is_cuda or fresh.any()):                   # a GPU is not waited for
            return
        at = (slot // self.page_size).long().clamp(0, self.table.size(-1) - 1)
        taken = self.left - fresh.flatten().cumsum(0).view_as(fresh)
        last = len(self.free) - 1                                # beyond it, nothing is taken
        pages = torch.where(taken >= 0, self.free[taken.clamp(0, last)], 0)
        pages = torch.where(fresh, pages, self.table[layer].gather(-1, at))
        self.table[layer].scatter_(-1, at, pages)
        self.left -= fresh.sum().int()
        self.failed |= (fresh & (taken < 0)).any().int()

    def write(self, layer, slot, written, k, v):
        """k, v (B, G, T, D) into the slots numbered `slot` (B, G, T), where they are `written`.

        The others go to the spare page, as zeros.
        """
        if self.strips:
            self.strips.write(layer, slot, written, k, v)
            return
        page = self.table[layer].gather(-1, (slot // self.page_size).clamp(min=0)).long()
        at = page * self.page_size + slot % self.page_size
        at = torch.where(written, at, 0).flatten()
        for pool, x in ((self.pool_k, k), (self.pool_v, v)):
            if not self.kernels:
                x = x.masked_fill(~written[..., None], 0)
            pool.view(-1, x.size(-1))[at] = x.reshape(-1, x.size(-1))

    def store(self, layer, k, v, survives):
        """Items (B, G, T, D) of a prefill, those that survive (B, G, T), oldest first."""
        self.seen[layer] = self.ages[layer] = survives.size(-1)
        self.lengths[layer] = survives.sum(-1)
        first = self.page_size * torch.arange(self.table.size(-1), device=k.device)
        first = first.expand_as(self.table[layer])               # slots of pages
        self.take(layer, first, first < self.lengths[layer][..., None])
        self.write(layer, survives.cumsum(-1) - 1, survives, k, v)
