"""The cache of a CPU, its slots padded to the longest head, and what PagedCache shares with it:
positions, open segments, a prompt taken in at once. Names and shapes are those of dmc.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

import dmc
from dmc import wide
from nanodmc.flash_attention import attend
from nanodmc.large_scores import attend_in_blocks
from nanodmc.launch import check_current, uses_kernels


class CacheBytes(NamedTuple):
    used: int       # by the slots in use, all layers, sequences and heads
    allocated: int  # by all of the cache's tensors


class OpenSegments:
    """The segment of each head's last slot, un-rotated: what the next merge needs, for L layers.

    keys, values (L, B, G, W, D); omegas (L, B, G, W). With a window these are a ring of the last w
    tokens, token t in entry t % w, and omega is 0 for tokens of earlier segments. The average is
    made anew at each step, so nothing drifts. Without a window there is one entry: z, k~ and v~.
    """

    def __init__(self, config, batch, device, dtype):
        self.window, sums = config.window, torch.promote_types(dtype, torch.float32)
        sizes = config.n_layer, batch, config.n_kv_head, config.window or 1
        stored = dtype if config.window else sums
        self.keys = torch.zeros(*sizes, config.head_dim, device=device, dtype=stored)
        self.values = torch.zeros_like(self.keys)
        self.omegas = torch.zeros(sizes, device=device, dtype=sums)

    def rows(self, rows):
        """The same of a slice of the sequences, sharing memory with these."""
        part = object.__new__(OpenSegments)
        part.window = self.window
        part.keys, part.values, part.omegas = (x[:, rows] for x in self.tensors())
        return part

    def tensors(self):
        return self.keys, self.values, self.omegas

    def average(self, layer, age, k, v, merge, omega):
        """k~, v~ (B, G, 1, D) of the open segments with one token more in them.

        age (B, G): the tokens before it; k, v (B, G, 1, D); merge (B, G), bool; omega (B, G, 1).
        """
        keys, values, omegas = (x[layer] for x in self.tensors())
        omegas *= merge[..., None]                               # a new segment forgets the old one
        if self.window is None:
            z = omegas + omega                                   # z_t = z_{t-1} + omega_t
            for mean, new in ((keys, k), (values, v)):           # (z_{t-1} k~ + omega_t k_t) / z_t
                mean.copy_((omegas[..., None] * mean + omega[..., None] * new) / z[..., None])
            omegas.copy_(z)
            return keys.to(k.dtype), values.to(v.dtype)
        at = (age % self.window)[..., None]
        omegas.scatter_(-1, at, omega)
        for ring, new in ((keys, k), (values, v)):
            ring.scatter_(2, at[..., None].expand_as(new), new)
        share = omegas / omegas.sum(-1, keepdim=True)
        return tuple((share[..., None, :] @ wide(x)).to(k.dtype) for x in (keys, values))

    def fill(self, layer, k, v, k_mean, v_mean, merge, omega):
        """After a prefill: keys, values and their averages (B, G, T, D); merge, omega (B, G, T)."""
        T, W = k.size(2), self.window
        in_open = merge[..., 1:].flip(-1).cumprod(-1).flip(-1)   # no later token appended
        in_open = F.pad(in_open, (0, 1), value=1) > 0
        omega = omega.masked_fill(~in_open, 0)
        if W is None:
            self.keys[layer], self.values[layer] = k_mean[:, :, -1:], v_mean[:, :, -1:]
            self.omegas[layer] = omega.sum(-1, keepdim=True)
            return
        recent = torch.arange(max(0, T - W), T, device=k.device)
        closed = ~in_open[:, :, recent, None]
        self.keys[layer][:, :, recent % W] = k[:, :, recent].masked_fill(closed, 0)
        self.values[layer][:, :, recent % W] = v[:, :, recent].masked_fill(closed, 0)
        self.omegas[layer][:, :, recent % W] = omega[:, :, recent]


class FastCache:
    """What the two caches share. Each adds where slots are kept: `store`, `append` and `step`.

    lengths (L, B, G): slots in use. seen: of each layer, tokens of the longest sequence so far.
    accumulate: the function that makes a prompt's averages.
    """

    def __init__(self, config, batch, device, dtype, accumulate):
        self.config, self.dtype, self.seen = config, dtype, [0] * config.n_layer
        self.gain = 0.0 if config.dmc else 1.0                   # of the control channels
        self.decides = None                                      # the first call says
        self.lengths = torch.zeros(config.n_layer, batch, config.n_kv_head, dtype=torch.long,
                                   device=device)
        self.accumulate, self.open = accumulate, OpenSegments(config, batch, device, dtype)
        self.know_positions(0, device)

    def know_positions(self, count, device):
        """cos and sin of the first `count` positions: (count, D / 2)."""
        table = dmc.rotary_table(self.config, count, device)
        self.cos, self.sin = (x.to(self.open.omegas.dtype).contiguous() for x in table)

    def expect(self, layer, tokens, decides, device):
        """So many tokens are coming. Raises ValueError where they cannot.

        That is where positions run out, decisions come in some calls and not in others, or kernels
        would run on another GPU.
        """
        end, positions = self.seen[layer] + tokens, self.config.max_seq_len
        if uses_kernels(device):
            check_current(device)
        if self.decides not in (None, decides):
            raise ValueError("a cache takes decisions in every call or in none")
        if end > positions:
            raise ValueError(f"{end} tokens do not fit the model's {positions} positions")
        self.decides = decides
        if end > len(self.cos):
            self.know_positions(min(2 * end, positions), device)

    @torch.no_grad()
    def attend(self, layer, q, k, v, alpha=None, omega=None):
        """dmc.Cache.attend; `expect` says what is refused. alpha None: nothing is decided."""
        self.expect(layer, q.size(2), alpha is not None, q.device)
        if alpha is None:
            return self.append(layer, q, k, v)
        omega = omega.to(self.open.omegas.dtype)
        if self.seen[layer] == 0 and q.size(2) > 1:
            return self.prefill(layer, q, k, v, alpha, omega)
        tokens = zip(*(x.split(1, dim=2) for x in (q, k, v, alpha, omega)), strict=True)
        return torch.cat([self.step(layer, *token) for token in tokens], dim=2)

    def rotated(self, x, start, end):
        return dmc.rotate_heads(x, self.cos[start:end], self.sin[start:end], self.gain)

    def prefill(self, layer, q, k, v, alpha, omega):
        """T tokens into an empty cache: the training form at alpha in {0, 1}; survivors are stored.

        Item j survives if token j + 1 appended.
        """
        T, merge = q.size(2), alpha > 0.5                        # nobody asks what token 0 says
        sources = (k, v) if self.config.window else (wide(k), wide(v))    # these averages live on
        k_mean, v_mean = self.accumulate(*sources, merge, omega, self.config.window)
        self.open.fill(layer, k, v, k_mean, v_mean, merge, omega)
        k, v = self.rotated(k_mean.to(k.dtype), 0, T), v_mean.to(v.dtype)
        keep = torch.zeros_like(omega).masked_fill(merge, -torch.inf)
        # `attend` carries the mask in the control channel, which a plain model's scores use
        y = (attend_in_blocks if self.gain else attend)(self.rotated(q, 0, T), k, v, keep)
        self.store(layer, k, v, F.pad(~merge[..., 1:], (0, 1), value=True))
        return y


def attend_used(q, keys, values, lengths):
    """Attention of q (B, H, 1, D) over the first lengths (B, G) of keys, values (B, G, S, D)."""
    used = None
    if lengths.min() < keys.size(2):
        used = torch.arange(keys.size(2), device=q.device) < lengths[..., None]
        used = used.repeat_interleave(q.size(1) // keys.size(1), dim=1)[:, :, None]  # (B, H, 1, S)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=used,
                                          enable_gqa=q.size(1) != keys.size(1))


def attend_pages(q, pool_k, pool_v, table, lengths, room):
    """attend_used, where slots are in the pages of a pool (pages, page, D): table (B, G, n).

    Heads are padded to the longest of their quarter, where lengths differ much. Pages are gathered
    into memory that the dict `room` keeps, as fresh memory costs more than the copy.
    """
    page, rows = pool_k.size(1), lengths.numel()
    queries, table = q.reshape(rows, -1, 1, q.size(-1)), table.flatten(0, 1)
    lengths = lengths.flatten()
    pages, y = -(-lengths // page), torch.empty_like(queries)
    uneven = rows * pages.max() > 1.5 * pages.sum()
    for part in pages.argsort().chunk(4 if uneven else 1):
        numbers = table[part, :int(pages[part].max())]
        keys, values = (gathered(pool, numbers, room, name)
                        for pool, name in ((pool_k, "keys"), (pool_v, "values")))
        y[part] = attend_used(queries[part], keys, values, lengths[part, None])
    return y.view_as(q)


def gathered(pool, pages, room, name):
    """The slots of pages (rows, n) of a pool: (rows, 1, slots, D), until the next call."""
    n = pages.numel()
    if name not in room or len(room[name]) < n:
        room[name] = pool.new_empty(n * 5 // 4, *pool.shape[1:])
    slots = torch.index_select(pool, 0, pages.flatten(), out=room[name][:n])
    return slots.view(len(pages), 1, -1, pool.size(-1))


class PaddedCache(FastCache):
    """Slots of all heads padded to the longest one's: keys, values of each layer (B, G, S, D).

    For a CPU and few sequences, where gathering the pages of every head at each step would take
    longer than padding does.
    """

    def __init__(self, config, batch, device=None, dtype=torch.float32, accumulate=dmc.accumulate):
        super().__init__(config, batch, device, dtype, accumulate)
        empty = torch.zeros(batch, config.n_kv_head, 0, config.head_dim, device=device, dtype=dtype)
        self.keys, self.values = [empty] * config.n_layer, [empty] * config.n_layer

    @property
    def bytes(self):
        slot = 2 * self.config.head_dim * self.dtype.itemsize
        tensors = [*self.keys, *self.values, *self.open.tensors()]
        return CacheBytes(self.lengths.sum().item() * slot, sum(x.nbytes for x in tensors))

    @property
    def compression_ratio(self):
        """Tokens seen / slots used; 1.0 while empty."""
        tokens = sum(self.seen) * self.lengths[0].numel()
        return tokens / self.lengths.sum().item() if tokens else 1.0

    def store(self, layer, k, v, survives):
        """Items (B, G, T, D) of a prefill, those that survive (B, G, T), oldest first."""
        self.seen[layer] = survives.size(-1)
        self.lengths[layer] = survives.sum(-1)
        order = torch.argsort(survives.int(), dim=-1, descending=True, stable=True)
        order = order[..., :int(self.lengths[layer].max()), None].expand(-1, -1, -1, k.size(-1))
        self.keys[layer], self.values[layer] = k.gather(2, order), v.gather(2, order)

    def append(self, layer, q, k, v):
        """T tokens, each into a slot of its own in every head: a plain Transformer's cache."""
        start, end = self.seen[layer], self.seen[layer] + q.size(2)
        q, k = self.rotated(q, start, end), self.rotated(k, start, end)
        self.make_room(layer, end, 0 if start == 0 else 256)
        self.seen[layer] = end
        self.lengths[layer] = end
        self.keys[layer][:, :, start:end], self.values[layer][:, :, start:end] = k, v
        if start == 0:
            return attend(q, k, v)
        seen = None
        if end - start > 1:
            seen = torch.ones(end - start, end, dtype=torch.bool, device=k.device).tril(start)
        keys, values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen,
                                              enable_gqa=q.size(1) != k.size(1))

    def make_room(self, layer, slots, spare):
        """Room for so many slots in every head, and if that needs more memory, for spare ones."""
        if (missing := slots - self.keys[layer].size(2)) > 0:
            for padded in (self.keys, self.values):
                padded[layer] = F.pad(padded[layer], (0, 0, 0, max(missing, spare)))

    def step(self, layer, q, k, v, alpha, omega):
        """Algorithm 1 for one token of every sequence."""
        merge = (alpha[..., 0] > 0.5) & (self.lengths[layer] > 0)        # the first token appends
        self.lengths[layer] += ~merge
        now = self.seen[layer]
        age = torch.full_like(self.lengths[layer], now)
        k, v = self.open.average(layer, age, k, v, merge, omega)
        q, k = self.rotated(q, now, now + 1), self.rotated(k, now, now + 1)
        self.seen[layer] = now + 1
        self.make_room(layer, int(self.lengths[layer].max()), 32)
        last = (self.lengths[layer] - 1)[..., None, None].expand_as(k)   # (B, G, 1, D)
        self.keys[layer].scatter_(2, last, k)
        self.values[layer].scatter_(2, last, v)
        return attend_used(q, self.keys[layer], self.values[layer], self.lengths[layer])
