"""Eviction at inference: a plain model whose cache keeps some tokens and drops the others.

Nothing is trained and nothing averaged. A policy is one class: it says what each slot is worth,
and the one worth least goes. docs/policies.md shows how to add one.
"""

import math
from fractions import Fraction

import torch

import dmc
from dmc import wide
from nanodmc.files import InputError
from nanodmc.padded_cache import CacheBytes

BLOCK = 256          # tokens that are taken in at once while all of them fit


def budget(length, cr):
    """The slots of each head for a sequence that ends at `length` tokens: length / cr.

    Rounded down, so that no more memory is used than asked for, but 1 at least. Raises InputError
    where cr is below 1 or no number.
    """
    if not 1 <= cr < math.inf:
        raise InputError(f"a compression ratio of {cr} is out of range; give one from 1 on.")
    return max(1, math.floor(length / Fraction(str(cr))))


class EvictingCache:
    """A cache of at most `slots` tokens a head, with the interface of dmc.Cache; a policy's base.

    Each token is stored with the rotation of its original position. A query sees the slots that are
    kept and its own token; then, over budget, one slot is dropped, the oldest among those worth
    least. So nothing that comes later changes an output, in whatever portions a text is taken in.

    keys, values (L, B, G, slots + 1, D): of each head all slots but one, the `hole`, which is where
    its next token goes. positions (L, B, G, slots + 1): the tokens' places in the text. votes, of
    the same shape: what a policy likes to remember of each slot, 0 for a new token. lengths
    (L, B, G): slots in use. seen: of each layer, the tokens so far.
    """

    def __init__(self, config, batch, device=None, dtype=torch.float32, *, slots):
        """Raises InputError for a budget below 1 slot, and for the weights of a DMC model."""
        if slots < 1:
            raise InputError(f"a budget of {slots} slots is below 1; give a larger one, or a "
                             "smaller compression ratio.")
        if config.dmc:
            raise InputError("eviction policies are for plain models, and these are the weights of "
                             "a DMC model; give the model that it was made of, or its control.")
        self.slots = min(slots, config.max_seq_len)
        sizes = config.n_layer, batch, config.n_kv_head, self.slots + 1
        self.config, self.dtype, self.gain = config, dtype, 1.0
        self.seen = [0] * config.n_layer
        self.lengths = torch.zeros(sizes[:3], dtype=torch.long, device=device)
        self.keys = torch.zeros(*sizes, config.head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.positions = torch.zeros(sizes, dtype=torch.long, device=device)
        self.votes = torch.zeros(sizes, dtype=torch.promote_types(dtype, torch.float32),
                                 device=device)
        self.hole = torch.full((*sizes[:3], 1), self.slots, device=device)
        self.angles = dmc.rotary_table(config, config.max_seq_len, device)

    # ------------------------------------------------------------------------ what a policy says

    def observe(self, layer, weights):
        """Called with all attention weights, (B, G, H / G, n, slots so far), of n queries."""

    def worth(self, layer, weights):
        """What each slot is worth, (B, G, slots + 1); the least goes.

        weights (B, G, H / G, slots + 1): the current query's. No token is in the future: the
        current one is at position seen[layer] - 1, and in the slot hole[layer].
        """
        raise NotImplementedError

    # ------------------------------------------------------------------------------- dmc.Cache

    @property
    def compression_ratio(self):
        """Tokens seen / slots used; 1.0 while empty."""
        tokens = sum(self.seen) * self.lengths[0].numel()
        return tokens / self.lengths.sum().item() if tokens else 1.0

    @property
    def bytes(self):
        slot = 2 * self.config.head_dim * self.dtype.itemsize
        tensors = self.keys, self.values, self.positions, self.votes, self.hole
        return CacheBytes(self.lengths.sum().item() * slot, sum(x.nbytes for x in tensors))

    @torch.no_grad()
    def attend(self, layer, q, k, v, alpha=None, omega=None):
        """dmc.Cache.attend for a plain model. Raises ValueError for decisions, and where positions
        run out."""
        if alpha is not None:
            raise ValueError("an evicting cache takes no decisions")
        start, end = self.seen[layer], self.seen[layer] + q.size(2)
        if end > self.config.max_seq_len:
            raise ValueError(f"more tokens than the model's {self.config.max_seq_len} positions")
        cos, sin = (x[start:end] for x in self.angles)
        q = dmc.rotate(q, cos, sin).unflatten(1, (k.size(1), -1)) / math.sqrt(k.size(-1))
        k, parts = dmc.rotate(k, cos, sin), []
        fits = min(max(self.slots - start, 0), q.size(3))
        for at in range(0, fits, BLOCK):
            block = slice(at, min(at + BLOCK, fits))
            parts.append(self.fill(layer, q[:, :, :, block], k[:, :, block], v[:, :, block]))
        tokens = zip(q[:, :, :, fits:].split(1, dim=3), k[:, :, fits:].split(1, dim=2),
                     v[:, :, fits:].split(1, dim=2), strict=True)
        if fits < q.size(3):
            parts += [self.step(layer, *token) for token in tokens]
        self.lengths[layer] = min(end, self.slots)
        return torch.cat(parts, dim=3).flatten(1, 2)

    def fill(self, layer, q, k, v):
        """n tokens that all fit. q (B, G, H / G, n, D), k, v (B, G, n, D), rotated."""
        start, end = self.seen[layer], self.seen[layer] + k.size(2)
        self.seen[layer] = end
        self.keys[layer, :, :, start:end], self.values[layer, :, :, start:end] = k, v
        place = torch.arange(end, device=k.device)
        self.positions[layer, :, :, start:end] = place[start:]
        scores = wide(q @ self.keys[layer, :, :, None, :end].mT)
        weights = scores.masked_fill(place > place[start:, None], -torch.inf).softmax(-1)
        self.observe(layer, weights)
        return weights.to(self.dtype) @ self.values[layer, :, :, None, :end]

    def step(self, layer, q, k, v):
        """One token, of a cache whose slots are all in use: it goes into the hole, and out of the
        slots + 1 tokens comes the next one. Nothing here waits for a GPU."""
        keys, values, hole = self.keys[layer], self.values[layer], self.hole[layer]
        place = hole[..., None].expand_as(k)
        keys.scatter_(2, place, k)
        values.scatter_(2, place, v)
        self.positions[layer].scatter_(2, hole, self.seen[layer])
        self.votes[layer].scatter_(2, hole, 0)
        self.seen[layer] += 1
        weights = wide(q.squeeze(3) @ keys.mT).softmax(-1)                # (B, G, H / G, slots + 1)
        self.observe(layer, weights[..., None, :])
        y = weights.to(self.dtype) @ values
        worth = self.worth(layer, weights)
        kept = worth > worth.amin(-1, keepdim=True)
        latest = torch.iinfo(torch.long).max
        oldest = self.positions[layer].masked_fill(kept, latest).argmin(-1, keepdim=True)
        self.hole[layer] = oldest
        return y[:, :, :, None]


# ----------------------------------------------------------------------------------- the policies

class H2O(EvictingCache):
    """Heavy hitters: the newest half of the budget stays, and of the rest what got most attention.

    A slot gathers the weights that all queries from its own token on gave it, averaged over the
    query heads of the group. Ours: of an odd budget, the newest have the larger half.
    """

    def observe(self, layer, weights):
        self.votes[layer, :, :, :weights.size(-1)] += weights.mean(2).sum(2)

    def worth(self, layer, weights):
        newest = self.positions[layer] >= self.seen[layer] - (self.slots + 1) // 2
        return self.votes[layer].masked_fill(newest, torch.inf)


class TOVA(EvictingCache):
    """What the current query attends to least goes, by the mean over all query heads of the layer.

    So all heads of a layer keep the same tokens. None is protected, the current one neither.
    """

    def worth(self, layer, weights):
        return weights.mean((1, 2), keepdim=True)[:, 0].expand(-1, weights.size(1), -1)


class Window(EvictingCache):
    """The newest tokens stay.

    Ours: keys keep their original rotation, which inside the trained positions makes no difference
    worth the trouble.
    """

    def worth(self, layer, weights):
        return self.positions[layer]


class Sinks(Window):
    """StreamingLLM: the first four tokens stay, and otherwise the newest.

    Ours: of a budget of four slots or fewer, one belongs to the newest.
    """
    SINKS = 4

    def worth(self, layer, weights):
        first = self.positions[layer] < min(self.SINKS, self.slots - 1)
        return super().worth(layer, weights).masked_fill(first, torch.iinfo(torch.long).max)


POLICIES = {"h2o": H2O, "tova": TOVA, "window": Window, "sinks": Sinks}


def policy_named(name):
    """A policy's class. Raises InputError."""
    if name not in POLICIES:
        raise InputError(f"there is no policy {name}; choose from {', '.join(POLICIES)}.")
    return POLICIES[name]


def policy_cache(name, slots):
    """A function with dmc.Cache's arguments that makes a policy's cache of so many slots a head.

    slots: for a ratio, budget(final length, cr). Raises InputError for an unknown policy, and what
    it returns raises as EvictingCache does.
    """
    policy = policy_named(name)
    if slots < 1:
        raise InputError(f"a budget of {slots} slots is below 1; give a larger one.")
    return lambda *args, **kwargs: policy(*args, slots=slots, **kwargs)
