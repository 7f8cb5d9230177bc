"""Dynamic Memory Compression (DMC), the method in one file.

A Transformer that generates text keeps the key and the value of every past token: the cache. DMC (Nawrot et al., 2024,
arXiv 2403.09636) teaches a trained model to keep fewer. At every token each key-value head decides by itself whether to
APPEND its key and value as a new slot, or to MERGE them into its last slot by a weighted average. No parameter is added:
the decision is read from the first channel of the key, the weight from the first channel of the query.

Read from top to bottom: the equations, one function each; `Cache`, which is Algorithm 1; a Llama that uses both. There the
method ends. What follows are files: checkpoints in Hugging Face's layout and their tokenizers. The last function is a
worked example, which `python dmc.py` prints.

Glossary. Sizes: B sequences, T tokens, L layers, H query heads, G key-value heads (G divides H), D channels per head.

    code          paper          where            shape          meaning
    q, k, v       q_t, k_t, v_t  Eq. 1-3          (B, H|G, T, D) query, key, value of each token
    alpha         alpha_t        Eq. 8            (B, G, T)      decision: 1 merge into the last slot, 0 append a new one
    keep          log(1-alpha)   appendix F       (B, G, T)      log-weight that token t leaves to the slot before it
    omega         omega_t        Algorithm 1      (B, G, T)      importance: the token's weight in its segment's average
    z             z_t            Eq. 9            (B, G, T)      importance summed over the segment so far
    accumulate    k~_t, v~_t     Eq. 9            (B, G, T, D)   averages over the segment so far
    window        w              section 3.3      int or None    an average covers at most the segment's last w tokens
    c, tau        c, tau         Eq. 8            float          offset and temperature of the decision
    gain          1 - s/n        Eq. 12           float          what is left of the control channels in the scores
    cr            CR             Eq. 10           float >= 1     compression ratio: tokens seen / slots kept

A *segment* is a run of tokens that share one slot. The *control channels* are channel 0 of the keys and of the queries.
"""

import json
import math
import os
import re
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint


class InputError(ValueError):
    """Something that the user gave cannot be used. The message is one sentence: what is wrong and what to do."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of a Llama, and the settings of DMC. Raises InputError where they contradict each other."""
    vocab_size: int
    n_layer: int
    n_head: int                  # H, query heads
    n_kv_head: int               # G, key-value heads; H / G query heads share one
    dim: int                     # width of the residual stream
    ffn_dim: int
    max_seq_len: int             # positions
    head_dim: int | None = None  # D; None: dim / H
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None   # {"rope_type": "linear", "factor": ...} or {"rope_type": "llama3", ...}
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    dmc: bool = True             # False: a plain Llama, channel 0 is a channel like any other
    window: int | None = 12      # w; None: the whole segment
    tau: float = 0.1
    c: float = 5.0               # large enough that an untrained model (logit 0) appends

    def __post_init__(self):
        for name in ("vocab_size", "n_layer", "n_head", "n_kv_head", "dim", "ffn_dim", "max_seq_len"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)!r}; give a whole number of at least 1.")
        if self.n_head % self.n_kv_head:
            raise InputError(f"{self.n_head} query heads cannot share {self.n_kv_head} key-value heads evenly; "
                             f"choose a number of key-value heads that divides {self.n_head}.")
        if self.head_dim is None:
            if self.dim % self.n_head:
                raise InputError(f"dim {self.dim} is no multiple of {self.n_head} heads; choose one, or give head_dim.")
            object.__setattr__(self, "head_dim", self.dim // self.n_head)
        if self.head_dim < 4 or self.head_dim % 2:
            raise InputError(f"head_dim is {self.head_dim}; rotary embedding needs an even number, of at least 4 here.")
        if self.window is not None and self.window < 1:
            raise InputError(f"window is {self.window}; give at least 1, or None for the whole segment.")
        if not self.tau > 0:
            raise InputError(f"tau is {self.tau}; a temperature is above 0.")
        self._check_rope()

    def _check_rope(self):
        scaling = self.rope_scaling or {"rope_type": "default"}
        needed = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                                                   "original_max_position_embeddings")}
        if scaling.get("rope_type") not in needed:
            raise InputError(f"the rotary embedding is of type {scaling.get('rope_type')}; only {', '.join(needed)} work here.")
        numbers = {"rope_theta": self.rope_theta, **{name: scaling.get(name) for name in needed[scaling["rope_type"]]}}
        for name, value in numbers.items():
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise InputError(f"{name} of the rotary embedding is {value}; give a number above 0.")


# ------------------------------------------------------------------------------------------------ the equations

def wide(x):
    """fp32, or fp64 where the model is fp64: decisions, weights and sums are never kept in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def relaxed_decision(logit, config, noise, start=True):
    """Eq. 8: alpha_t = sigmoid((k_t[0] - c + g1 - g2) / tau), with g1, g2 ~ Gumbel(0, 1).

    logit (B, G, T): channel 0 of the keys. Returns alpha and keep = log(1 - alpha), both (B, G, T).
    noise True (training): alpha is in (0, 1), nearly binary because tau is small, and its gradient reaches the logit.
    noise False (use): alpha is exactly 1 where k_t[0] > c and 0 elsewhere; keep is -inf or 0.
    start: the first token opens the sequence, so there is no slot to merge into and alpha[..., 0] = 0.
    """
    x = wide(logit) - config.c
    if noise:
        u = torch.rand_like(x).clamp_(1e-6, 1 - 1e-6)
        x = (x + torch.logit(u)) / config.tau     # the difference of two Gumbel samples is one logistic sample
    else:
        x = torch.where(x > 0, torch.inf, -torch.inf).to(x.dtype)
    if start:
        x = torch.cat([torch.full_like(x[..., :1], -torch.inf), x[..., 1:]], dim=-1)
    return torch.sigmoid(x), F.logsigmoid(-x)     # log(1 - sigmoid(x)) = logsigmoid(-x), exact where alpha is near 1


def importance(logit, n_kv_head):
    """Algorithm 1: omega_t = sigmoid(q_t[0]), the weight of token t in its segment's average.

    logit (B, H, T): channel 0 of the queries. Returns (B, G, T): with grouped queries the logit is the group's mean.
    Beyond the paper: logits below -30 count as -30, so that no segment's weights can all underflow to 0.
    """
    B, H, T = logit.shape
    logit = wide(logit).view(B, n_kv_head, H // n_kv_head, T).mean(dim=2)
    return torch.sigmoid(logit.clamp(min=-30.0))


def accumulate(k, v, alpha, omega, window=None):
    """Eq. 9: every token's key and value become the weighted averages over its segment up to that token.

        z_t  = alpha_t z_{t-1} + omega_t
        k~_t = (alpha_t z_{t-1} k~_{t-1} + omega_t k_t) / z_t            v~_t likewise

    k, v (B, G, T, D), not yet rotated; alpha in [0, 1], omega > 0 (B, G, T). Returns k~, v~ in the dtypes of k, v.

    Written out, z_t k~_t = sum_i (alpha_{i+1} ... alpha_t) omega_i k_i; the window (section 3.3) keeps the terms
    i > t - w. No token waits for its predecessor: the sum over the last m + n tokens is the sum over the last m, plus the
    sum over the n before those, faded by the alphas between. Doubling spans this way reaches any window in about
    log2(w) steps: O(T log w) work, no loop over T, no division by alpha.
    """
    def before(x, n):                    # x_{t-n} in the place of x_t along T, 0 before the sequence's start
        return F.pad(x, (0, 0, n, -n))

    def join(recent, m, older):          # spans of m tokens ending at t, extended by the spans that end at t - m
        fade, sums = recent
        return fade * before(older[0], m), torch.addcmul(sums, fade, before(older[1], m))

    T, sizes = k.size(2), (k.size(-1), v.size(-1), 1)
    omega = wide(omega)[..., None]
    sums = torch.cat([omega * k, omega * v, omega], dim=-1)      # z rides along as a last channel
    span, length = (wide(alpha)[..., None], sums), 1             # a span of one token; its fade is alpha_t
    total, covered = None, 0
    remaining = T if window is None else min(window, T)
    while remaining:                                             # the binary digits of the window, lowest first
        if remaining % 2:
            total = join(total, covered, span) if total else span
            covered += length
        remaining //= 2
        if remaining:
            span, length = join(span, length, span), 2 * length
    k_sum, v_sum, z = total[1].split(sizes, dim=-1)
    return (k_sum / z).to(k.dtype), (v_sum / z).to(v.dtype)


def dmc_mask(keep):
    """Appendix F: what is added to the score of query i on item j.

        j > i: -inf (the future)      j = i: 0      j < i: keep_{j+1} = log(1 - alpha_{j+1})

    Item j is the state of its slot after token j. If token j + 1 merged, that state was overwritten and later queries
    must not see it; if token j + 1 appended, it stays. keep (B, G, T) -> (B, G, T, T).
    """
    T = keep.size(-1)
    i, j = torch.arange(T, device=keep.device)[:, None], torch.arange(T, device=keep.device)
    causal = torch.zeros(T, T, dtype=keep.dtype, device=keep.device).masked_fill(j > i, -torch.inf)
    overwritten = F.pad(keep[..., 1:], (0, 1)).unsqueeze(-2)
    return torch.where(j < i, overwritten, causal)


def attend(q, k, v, keep=None):
    """Causal attention under the mask of appendix F. q (B, H, T, D); k, v (B, G, T, D), rotated; keep (B, G, T).

    Returns y (B, H, T, D). Query heads h * H / G ... of one group share key-value head h. keep None: plain attention.
    """
    (B, H, T, D), G = q.shape, k.size(1)
    if keep is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)
    q = q.reshape(B, G, H // G, T, D) / math.sqrt(D)
    scores = wide(q @ k[:, :, None].mT) + dmc_mask(keep)[:, :, None]
    return (scores.softmax(dim=-1).to(v.dtype) @ v[:, :, None]).view(B, H, T, D)


def compression_loss(alpha, cr):
    """Eq. 10: max(0, sum(1 - alpha) - L G T / CR) / (L G T), a one-sided pull of the slots kept towards 1 / CR.

    alpha (L, B, G, T), or a list of L tensors (B, G, T); sums run over layers, heads and tokens. Eq. 10 speaks of one
    sequence: each is held to the target by itself, and the result, a scalar, is their mean. Added to the LM loss (Eq. 11).
    """
    alpha = torch.stack(list(alpha))
    kept = (1 - alpha).mean(dim=(0, 2, 3))
    return (kept - 1 / cr).clamp(min=0).mean()


def channel_gain(step, steps):
    """Eq. 12: the factor 1 - s/n on the control channels at step s of n, from 1 down to 0, where it stays."""
    return max(0.0, 1 - step / steps)


def scale_control(x, gain):
    """x (..., D) with channel 0 multiplied by gain: 1 a plain Llama, 0 a channel that the scores cannot see."""
    if gain == 1:
        return x
    scale = torch.ones(x.size(-1), dtype=x.dtype, device=x.device)
    scale[0] = gain
    return x * scale


# ------------------------------------------------------------------------------------------- rotary embedding

def rotary_frequencies(config, device=None):
    """Radians per position, (D / 2,), in fp64, after what was done to them to reach further than the first training did.

    linear: all slower by a factor. llama3: waves longer than the original context / low_freq_factor slower by a factor, those
    shorter than the context / high_freq_factor as they were, and between the two a mixture.
    """
    channel = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device)
    frequency = config.rope_theta ** (-channel / config.head_dim)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        return frequency / scaling["factor"]
    if scaling.get("rope_type") == "llama3":
        waves = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)      # that fit into the context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        return torch.lerp(frequency / scaling["factor"], frequency, ((waves - low) / (high - low)).clamp(0, 1))
    return frequency


def rotary_table(config, length, device=None):
    """cos and sin of the angles of positions 0 .. length - 1, (length, D / 2) each, in fp64: angles grow large."""
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * rotary_frequencies(config, device)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotary embedding. x (..., T, D); cos, sin (T, D / 2). Channel i turns together with channel i + D / 2."""
    a, b = wide(x).chunk(2, dim=-1)
    cos, sin = cos.to(a.dtype), sin.to(a.dtype)
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], dim=-1).to(x.dtype)


def rotate_heads(x, cos, sin, gain):
    """Rotate queries or keys with the control channel scaled before and, since its partner leaks into it, after."""
    return scale_control(rotate(scale_control(x, gain), cos, sin), gain)


# ------------------------------------------------------------------------------------------------ Algorithm 1

class CacheBytes(NamedTuple):
    used: int       # the surviving slots, all layers, sequences and heads
    allocated: int  # what the tensors occupy: slots padded to the longest head, and the open segments' state


class Cache:
    """Algorithm 1 for L layers, B sequences and G heads, each with its own number of slots.

    Per layer, `keys` and `values` (B, G, S, D) hold the slots, S >= the longest head's length; `lengths` (L, B, G)
    counts those in use. A slot's key is rotated at the position of the latest token in it, but keys are averaged before
    rotation, so the open (last) segment is also remembered un-rotated: without a window as z and the running averages;
    with a window as its last w tokens, from which the average is recomputed at each step, so that nothing drifts. The
    paper speaks of the window in training only; keeping it here makes inference equal to training.
    """

    _accumulate, _attend = staticmethod(accumulate), staticmethod(attend)       # of the prefill

    def __init__(self, config, batch, device=None, dtype=torch.float32):
        L, B, G, D, W = config.n_layer, batch, config.n_kv_head, config.head_dim, config.window or 1
        self.config = config
        self.gain = 0.0 if config.dmc else 1.0
        self.decides = None                                          # whether tokens come with decisions; the first call says
        self.cos = self.sin = torch.zeros(0, config.head_dim // 2, device=device)     # of as many positions as were needed
        self.lengths = torch.zeros(L, B, G, dtype=torch.long, device=device)
        self.seen = [0] * L                                          # tokens, per layer
        empty = torch.zeros(B, G, 0, D, device=device, dtype=dtype)
        self.keys, self.values = [empty] * L, [empty] * L
        sums = dtype if config.window else torch.promote_types(dtype, torch.float32)
        self.open_k, self.open_v = (torch.zeros(L, B, G, W, D, device=device, dtype=sums) for _ in range(2))
        self.open_omega = torch.zeros(L, B, G, W, device=device, dtype=torch.promote_types(dtype, torch.float32))

    @property
    def compression_ratio(self):
        """Tokens seen / slots used, over all layers, sequences and heads; 1.0 while empty."""
        tokens = sum(self.seen) * self.lengths[0].numel()
        return tokens / self.lengths.sum().item() if tokens else 1.0

    @property
    def bytes(self):
        slot = 2 * self.config.head_dim * self.keys[0].element_size()
        tensors = [*self.keys, *self.values, self.open_k, self.open_v, self.open_omega]
        return CacheBytes(self.lengths.sum().item() * slot, sum(t.nbytes for t in tensors))

    @torch.no_grad()
    def attend(self, layer, q, k, v, alpha=None, omega=None):
        """Take T >= 1 further tokens into one layer's cache and attend from each of them. Returns y (B, H, T, D).

        q (B, H, T, D); k, v (B, G, T, D), none rotated; alpha in {0, 1}, omega (B, G, T). alpha None, in every call or in none:
        nothing is decided, and all are appended. Raises InputError when the positions run out.
        """
        T = q.size(2)
        if self.decides not in (None, alpha is not None):
            raise ValueError("a cache takes decisions in every call or in none")
        self.decides = alpha is not None
        if self.seen[layer] + T > self.config.max_seq_len:
            raise InputError(f"{self.seen[layer] + T} tokens do not fit the model's {self.config.max_seq_len} "
                             "positions; give a shorter prompt or generate fewer tokens.")
        if self.seen[layer] + T > len(self.cos):
            table = rotary_table(self.config, min(2 * (self.seen[layer] + T), self.config.max_seq_len), k.device)
            self.cos, self.sin = (x.to(self.open_omega.dtype) for x in table)
        if alpha is None:
            return self._append(layer, q, k, v)
        omega = omega.to(self.open_omega.dtype)
        if self.seen[layer] == 0 and T > 1:
            return self._prefill(layer, q, k, v, alpha, omega)
        tokens = zip(*(x.split(1, dim=2) for x in (q, k, v, alpha, omega)), strict=True)
        return torch.cat([self._step(layer, *token) for token in tokens], dim=2)

    def _step(self, layer, q, k, v, alpha, omega):
        """Algorithm 1, literally: merge or append one token, then ordinary attention over each head's slots."""
        merge = (alpha[..., 0] > 0.5) & (self.lengths[layer] > 0)               # (B, G); the first token appends
        self.lengths[layer] += ~merge
        k, v = self._average(layer, k, v, merge, omega)
        position = self.seen[layer]
        cos, sin = self.cos[position:position + 1], self.sin[position:position + 1]
        self.seen[layer] += 1
        self._write_last(layer, rotate_heads(k, cos, sin, self.gain), v)
        S = self.keys[layer].size(2)
        used = torch.arange(S, device=k.device) < self.lengths[layer][..., None]          # (B, G, S)
        used = used.repeat_interleave(q.size(1) // k.size(1), dim=1)[:, :, None]          # (B, H, 1, S)
        return F.scaled_dot_product_attention(rotate_heads(q, cos, sin, self.gain), self.keys[layer],
                                              self.values[layer], attn_mask=used, enable_gqa=True)

    def _append(self, layer, q, k, v):
        """T tokens, each into a slot of its own in every head: the cache of a Transformer without DMC."""
        start, end = self.seen[layer], self.seen[layer] + q.size(2)
        q, k = (rotate_heads(x, self.cos[start:end], self.sin[start:end], self.gain) for x in (q, k))
        self.seen[layer], missing = end, end - self.keys[layer].size(2)
        self.lengths[layer] = end
        for slots, new in ((self.keys, k), (self.values, v)):
            if missing > 0:
                slots[layer] = F.pad(slots[layer], (0, 0, 0, missing if start == 0 else max(missing, 256)))
            slots[layer][:, :, start:end] = new
        if start == 0:
            return self._attend(q, k, v)
        seen = None if start + 1 == end else torch.ones(end - start, end, dtype=torch.bool, device=k.device).tril(start)
        return F.scaled_dot_product_attention(q, self.keys[layer][:, :, :end], self.values[layer][:, :, :end], attn_mask=seen,
                                              enable_gqa=q.size(1) != k.size(1))

    def _average(self, layer, k, v, merge, omega):
        """The open segment's key and value, un-rotated, with this token in them: (B, G, 1, D) each."""
        open_k, open_v, open_omega = self.open_k[layer], self.open_v[layer], self.open_omega[layer]
        open_omega *= merge[..., None]                               # a new segment forgets the tokens before it
        if self.config.window:
            self._remember(layer, k, v, omega)
            weight = open_omega / open_omega.sum(-1, keepdim=True)
            return tuple((weight[..., None, :] @ wide(x)).to(k.dtype) for x in (open_k, open_v))
        z = open_omega + omega                                       # z_t = z_{t-1} + omega_t
        for average, new in ((open_k, k), (open_v, v)):              # (z_{t-1} k~ + omega_t k_t) / z_t
            average.copy_((open_omega[..., None] * average + omega[..., None] * new) / z[..., None])
        open_omega.copy_(z)
        return open_k.to(k.dtype), open_v.to(v.dtype)

    def _remember(self, layer, k, v, omega):
        """The last w tokens: the oldest makes room."""
        at = self.seen[layer] % self.config.window
        for ring, new in ((self.open_k, k), (self.open_v, v), (self.open_omega, omega)):
            ring[layer][:, :, at] = new[:, :, 0]

    def _write_last(self, layer, k, v):
        last = (self.lengths[layer] - 1)[..., None, None].expand_as(k)          # (B, G, 1, D)
        missing = int(self.lengths[layer].max()) - self.keys[layer].size(2)
        for slots, new in ((self.keys, k), (self.values, v)):
            if missing > 0:
                slots[layer] = F.pad(slots[layer], (0, 0, 0, 32))    # room for 32 more slots in every head
            slots[layer].scatter_(2, last, new)

    def _prefill(self, layer, q, k, v, alpha, omega):
        """T tokens into an empty cache at once: the training form with alpha in {0, 1}, then only the survivors stay."""
        T, W = q.size(2), self.config.window
        merge = alpha > 0.5                                          # what token 0 says is never asked
        k_mean, v_mean = self._accumulate(*((k, v) if W else (wide(k), wide(v))), merge, omega, W)      # wide: they live on
        k_rot, q_rot = (rotate_heads(x, self.cos[:T], self.sin[:T], self.gain) for x in (k_mean.to(k.dtype), q))
        keep = torch.zeros_like(omega).masked_fill(merge, -torch.inf)
        y = self._attend(q_rot, k_rot, v_mean.to(v.dtype), keep)
        self._scatter(layer, k_rot, v_mean.to(v.dtype), F.pad(~merge[..., 1:], (0, 1), value=True))

        in_open = F.pad(merge[..., 1:].flip(-1).cumprod(-1).flip(-1), (0, 1), value=1)  # no later token appended
        if W:
            recent = torch.arange(max(0, T - W), T, device=k.device)
            self.open_k[layer][:, :, recent % W] = k[:, :, recent]
            self.open_v[layer][:, :, recent % W] = v[:, :, recent]
            self.open_omega[layer][:, :, recent % W] = (omega * in_open)[:, :, recent]
        else:
            self.open_k[layer], self.open_v[layer] = k_mean[:, :, -1:], v_mean[:, :, -1:]
            self.open_omega[layer] = (omega * in_open).sum(-1, keepdim=True)
        return y

    def _scatter(self, layer, k, v, survives):
        """The items that survive, (B, G, T), into an empty cache's slots: item j does if token j + 1 appended."""
        self.seen[layer] = survives.size(-1)
        self.lengths[layer] = survives.sum(-1)
        order = torch.argsort(survives.int(), dim=-1, descending=True, stable=True)      # survivors first, oldest first
        order = order[..., :int(self.lengths[layer].max()), None].expand(-1, -1, -1, k.size(-1))
        self.keys[layer], self.values[layer] = k.gather(2, order), v.gather(2, order)


# ----------------------------------------------------------------------------------------------------- a Llama

class Attention(nn.Module):
    """Grouped-query attention in which each key-value head runs its own memory.

    Where the paper leaves it open, as the authors' code has it: keys are averaged before rotation, and an average is
    rotated at the position of its latest token.
    """

    def __init__(self, config, ops):
        super().__init__()
        self.config, self.accumulate, self.attend = config, ops.accumulate, ops.attend
        D = config.head_dim
        self.q_proj = nn.Linear(config.dim, config.n_head * D, bias=False)
        self.k_proj = nn.Linear(config.dim, config.n_kv_head * D, bias=False)
        self.v_proj = nn.Linear(config.dim, config.n_kv_head * D, bias=False)
        self.o_proj = nn.Linear(config.n_head * D, config.dim, bias=False)

    def forward(self, x, layer, cos, sin, cache, noise, gain):
        """x (B, T, dim) -> y (B, T, dim), alpha (B, G, T) or None. gain None: decide; a number: Eq. 12, decide nothing."""
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.config.head_dim).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        alpha = keep = omega = None
        if gain is None:
            alpha, keep = relaxed_decision(k[..., 0], self.config, noise, start=cache is None or cache.seen[layer] == 0)
            omega = importance(q[..., 0], self.config.n_kv_head)
            gain = 0.0
        if cache is not None:
            y = cache.attend(layer, q, k, v, alpha, omega)
        else:
            if alpha is not None:
                k, v = self.accumulate(k, v, alpha, omega, self.config.window)
            y = self.attend(rotate_heads(q, cos, sin, gain), rotate_heads(k, cos, sin, gain), v, keep)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1)), alpha


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, ops):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = Attention(config, ops)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, last, *context):
        y, alpha = self.self_attn(self.input_layernorm(x), *context)
        x = (x + y)[:, -1:] if last else x + y
        return x + self.mlp(self.post_attention_layernorm(x)), alpha


class Transformer(nn.Module):
    """A Llama with DMC. ops: the module that supplies accumulate, attend and Cache; None: this file."""

    def __init__(self, config, ops=None):
        super().__init__()
        ops = ops or sys.modules[__name__]
        self.config, self.Cache = config, ops.Cache
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim), freeze=False)
        self.layers = nn.ModuleList(Block(config, ops) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1 and not p.is_meta:    # what adds to the residual stream starts smaller
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens, cache=None, noise=False, gain=None, last=False, head=None, recompute=False):
        """tokens (B, T) -> logits (B, T, vocab), alpha (L, B, G, T) or None where nothing is decided.

        cache: tokens continue the sequences in it. noise: relaxed, noisy decisions (Eq. 8), for training only.
        gain: Eq. 12's factor on the control channels, 1 (plain Llama) to 0, nothing decided; None: what config.dmc says.
        With a cache, gain must agree with the cache's own: 0 for a DMC model, 1 for a plain one.
        last: logits of the last token only, (B, 1, vocab), which is all that generating needs. The last layer's MLP then
        works for no other token.
        head: what to return in the place of the logits, as a function of the last hidden states (B, T, dim).
        recompute: of each layer only its input is kept; the backward pass computes the rest again, with the same noise.
        """
        if gain is None and not self.config.dmc:
            gain = 1.0
        if cache is not None and (noise or (gain is not None and gain != cache.gain)):
            raise ValueError("a cache works with hard decisions (noise=False) and fixed control channels "
                             f"(gain None or {cache.gain:g})")
        T = tokens.size(1)
        if cache is None and T > self.config.max_seq_len:
            raise InputError(f"{T} tokens do not fit the model's {self.config.max_seq_len} positions; give fewer.")
        cos, sin = rotary_table(self.config, T, tokens.device) if cache is None else (None, None)
        x = self.embed_tokens(tokens)
        alphas = []
        for i, layer in enumerate(self.layers):
            inputs = x, last and i == self.config.n_layer - 1, i, cos, sin, cache, noise, gain
            x, alpha = checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
            alphas.append(alpha)
        return (head or self.lm_head)(self.norm(x)), torch.stack(alphas) if gain is None else None

    def control_rows(self):
        """Views, without gradient, of the projections' rows that feed the control channels: (heads, dim) each."""
        return [proj.weight.detach()[::self.config.head_dim] for layer in self.layers
                for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj)]

    def clear_control_rows(self):
        """Zero those rows, after which every decision logit starts at 0 - c."""
        for rows in self.control_rows():
            rows.zero_()


# ------------------------------------------------------------------------------------------------ files

def write_atomically(path, write):
    """write(temporary path), then move it into place: whoever reads `path` sees the old file or the new one, whole.

    Raises InputError where the folder cannot be written or the disk is full; the old file is untouched then.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise InputError(f"{path} cannot be written ({getattr(error, 'strerror', None) or error}); "
                         "choose another folder or free some space.") from None


def write_json(path, value):
    write_atomically(path, lambda f: f.write_text(json.dumps(value, indent=2) + "\n"))


def read_json(path):
    """Raises InputError where the file is missing, damaged, or only stands for one that git-lfs did not fetch."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(LFS_POINTER):
            raise InputError(f"{path} is a git-lfs pointer, not the file itself; run git lfs pull in {path.parent}.")
        return json.loads(text)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; give the folder of a run or of a checkpoint.") from None
    except (OSError, RecursionError, json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{path} is damaged; restore it, or give another folder.") from None


LFS_POINTER = "version https://git-lfs.github.com/spec/"


# ------------------------------------------------------------------------------------------------ checkpoints

MODEL_TYPE = "dmc_llama"        # instead of "llama", so that software without DMC refuses the weights
IN_CONFIG_JSON = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
                  "n_kv_head": "num_key_value_heads", "dim": "hidden_size", "ffn_dim": "intermediate_size",
                  "max_seq_len": "max_position_embeddings", "head_dim": "head_dim", "norm_eps": "rms_norm_eps",
                  "rope_theta": "rope_theta", "rope_scaling": "rope_scaling", "tie_embeddings": "tie_word_embeddings"}
UNSUPPORTED = {"attention_bias": "attention bias", "mlp_bias": "bias in its MLP", "sliding_window": "sliding-window attention",
               "quantization_config": "quantized weights", "num_local_experts": "a mixture of experts"}


def config_to_json(config, **facts):
    """The Config as Hugging Face's config.json. A DMC model's has a section "dmc" with its settings and `facts`."""
    values = {theirs: getattr(config, ours) for ours, theirs in IN_CONFIG_JSON.items()}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if config.dmc:
        kind = {"architectures": ["DMCLlamaForCausalLM"], "model_type": MODEL_TYPE}
        facts = {"dmc": {"method": "dmc", "window": config.window, "tau": config.tau, "c": config.c, **facts}}
    return {**kind, "hidden_act": "silu", **values, **facts}


def config_from_json(facts, source="config.json"):
    """The Config that a config.json holds. Raises InputError, by name, for what this Llama does not have."""
    try:
        if (kind := facts.get("model_type")) not in ("llama", "mistral", MODEL_TYPE):
            raise InputError(f"{source} describes a model of type {kind}; only Llama-family ones (llama, mistral) work here.")
        asked = {feature for key, feature in UNSUPPORTED.items() if facts.get(key)}
        if (facts.get("partial_rotary_factor") or 1) != 1:
            asked.add("partial rotary embedding")
        if asked:
            raise InputError(f"{source} describes a model with {min(asked)}, which is not supported here; choose another one.")
        if (act := facts.get("hidden_act", "silu")) != "silu":
            raise InputError(f"{source} names the activation {act}; only silu is supported here.")
        values = {ours: facts[theirs] for ours, theirs in IN_CONFIG_JSON.items() if facts.get(theirs) is not None}
        values.setdefault("n_kv_head", values.get("n_head"))
        values.setdefault("norm_eps", 1e-6)                     # what Hugging Face's Llama takes where nothing is said
        rope = dict(facts.get("rope_parameters") or facts.get("rope_scaling") or {})      # the newer layout, the older
        values["rope_theta"] = rope.pop("rope_theta", values.get("rope_theta", 10000.0))
        kind = rope.pop("type", rope.pop("rope_type", None if rope else "default"))       # "type" is an older name
        values["rope_scaling"] = {"rope_type": kind, **rope} if kind != "default" else None
        section = facts.get("dmc") or {}
        if section and section.get("method") != "dmc":
            raise InputError(f"{source} names the method {section.get('method')}; only dmc is known here.")
        return Config(dmc=bool(section), **values, **{name: section[name] for name in ("window", "tau", "c") if section})
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InputError(f"{source} is no usable configuration ({type(error).__name__}: {error}); restore it.") from None


def read_config(path):
    """The Config of the checkpoint in a folder, from its config.json."""
    return config_from_json(read_json(Path(path) / "config.json"), Path(path) / "config.json")


def save(model, path, tokenizer=None, shard_bytes=5 * 10 ** 9, **facts):
    """Write a checkpoint in Hugging Face's layout: safetensors, config.json, and the files of the Tokenizer given.

    facts: anything JSON, such as the CR reached; into the section "dmc", or beside the rest for a plain model, which
    `transformers` can load. More than shard_bytes of weights are cut into shards with an index.
    The weights' file repeats config.json, and shards get names that are free: so a kill at any moment leaves the old
    checkpoint or the new one. Raises InputError where the folder cannot be written; the old one is untouched then.
    """
    path, config = Path(path), config_to_json(model.config, **facts)
    if tokenizer is not None:
        config |= tokenizer.special_ids
    shards, size = [{}], 0
    for name, p in model.named_parameters():                    # tied weights once
        size += p.nbytes
        if shards[-1] and size > shard_bytes:
            shards, size = [*shards, {}], p.nbytes
        shards[-1]["lm_head.weight" if name == "lm_head.weight" else "model." + name] = p.detach().contiguous()
    config["torch_dtype"] = str(p.dtype).removeprefix("torch.")
    metadata = {"format": "pt", "config": json.dumps(config)}
    names, index = ["model.safetensors"], path / "model.safetensors.index.json"
    if len(shards) > 1:
        stems = ("model" if i == 0 else f"model-{i}" for i in count())
        free = next(stem for stem in stems if not any(path.glob(f"{stem}-?????-of-?????.safetensors")))
        names = [f"{free}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, weights in zip(names, shards, strict=True):
        write_atomically(path / name, lambda f, weights=weights: save_file(weights, f, metadata=metadata))
    if len(shards) > 1:         # which count from now on, unless there is one old file: that one counts until it is gone
        write_json(index, {"metadata": {"total_size": sum(p.nbytes for p in model.parameters())},
                           "weight_map": {key: name for name, weights in zip(names, shards, strict=True) for key in weights}})
    else:
        index.unlink(missing_ok=True)
    for file in path.glob("model*.safetensors"):
        if file.name not in names:
            file.unlink()
    write_json(path / "config.json", config)
    for name, content in (tokenizer.files if tokenizer is not None else {}).items():
        write_atomically(path / name, lambda f, content=content: f.write_bytes(content))


def weight_files(path):
    """The files that hold a checkpoint's weights: one, or the shards that an index names; safetensors before pickles."""
    for single in (path / "model.safetensors", path / "pytorch_model.bin"):
        index = single.with_name(single.name + ".index.json")
        if single.is_file():
            return [single]
        if index.is_file():
            try:
                names = sorted(set(read_json(index)["weight_map"].values()))
                files = [path / Path(name).name for name in names]
            except (KeyError, TypeError, AttributeError, ValueError):
                raise InputError(f"{index} is no index of shards; restore it.") from None
            if missing := [file.name for file in files if not file.is_file()]:
                raise InputError(f"{path} lacks {listed(missing)}, which {index.name} names; fetch the rest of the checkpoint.")
            return files
    raise InputError(f"{path} holds no model.safetensors and no pytorch_model.bin; give the folder of a checkpoint.")


def listed(names, limit=4):
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def read_weights(file):
    """The tensors in one file, by name, mapped to it until they are used; and the config.json that `save` put in, or None."""
    try:
        with file.open("rb") as f:
            if f.read(len(LFS_POINTER)) == LFS_POINTER.encode():
                raise InputError(f"{file} is a git-lfs pointer, not the weights; run git lfs pull in {file.parent}.")
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as f:
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - f is no dict
                return tensors, json.loads((f.metadata() or {}).get("config", "null"))
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)      # unpickles nothing but tensors
        if not all(isinstance(w, torch.Tensor) for w in tensors.values()):
            raise TypeError("not all of it is tensors")
        return tensors, None
    except InputError:
        raise
    except Exception as error:      # torch and safetensors raise many kinds for a damaged file
        raise InputError(f"{file} is truncated, damaged, or holds more than weights "
                         f"({type(error).__name__}: {one_line(error)}); fetch or write it anew.") from None


def one_line(error):
    return (str(error).strip().splitlines() or [""])[0][:200]


def load(path, ops=None, device=None, dtype=None, **changes):
    """The Transformer in a folder in Hugging Face's layout.

    dtype None: as stored. changes: of its Config, such as dmc=True before a retrofit. Weights that need no conversion stay
    mapped to their file until used, so loading takes no memory beyond the model's own. Raises InputError where files
    are missing or damaged, where a tensor is missing, unexpected or misshapen, and for models that are not supported.
    Weights that are not finite are warned of.
    """
    path, weights, saved = Path(path), {}, None
    for file in weight_files(path):
        tensors, own = read_weights(file)
        weights, saved = weights | tensors, own or saved
    config_file = path / "config.json"
    facts = read_json(config_file) if config_file.exists() or not saved else saved
    if saved and saved != facts:        # a kill between two files; or somebody edited one
        warnings.warn(f"{config_file} differs from what was saved with the weights, which is used.", stacklevel=2)
        facts = saved
    config = replace(config_from_json(facts, config_file), **changes)

    weights = {name.removeprefix("model."): w for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.n_layer > len(weights):       # said before that many layers are built
        raise InputError(f"{path} holds {len(weights)} tensors, too few for {config.n_layer} layers; fetch the rest of it.")
    try:
        with torch.device("meta"):
            model = Transformer(config, ops)
    except RuntimeError:
        raise InputError(f"{config_file} has sizes beyond those of any tensor; restore it.") from None
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tied = weights.pop("lm_head.weight", None) if config.tie_embeddings else None
    check_weights(path, expected, weights, tied)
    dtype = dtype or weights["embed_tokens.weight"].dtype
    weights = {name: w.to(device=device, dtype=dtype) for name, w in weights.items()}
    if bad := [name for name, w in weights.items() if not all(x.isfinite() for x in torch.aminmax(w))]:
        warnings.warn(f"{path} has weights that are NaN or infinite, in {listed(bad)}; what the model says will be useless.",
                      stacklevel=2)
    model.load_state_dict(weights, assign=True, strict=False)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def check_weights(path, expected, weights, tied):
    """Every tensor is accounted for. expected: shapes by name; tied: an output matrix where the embedding should serve."""
    not_float = [f"{name} ({w.dtype})" for name, w in weights.items() if w.dtype not in
                 (torch.float16, torch.bfloat16, torch.float32, torch.float64)]
    if not_float:
        raise InputError(f"{path} has quantized or other unsupported weights: {listed(not_float)}; fetch them in bf16 or fp32.")
    problems = {"missing": [name for name in expected if name not in weights],
                "unexpected": [name for name in weights if name not in expected],
                "of another shape": [f"{name} {tuple(w.shape)}, not {expected[name]}" for name, w in weights.items()
                                     if name in expected and tuple(w.shape) != expected[name]]}
    if any(problems.values()):
        raise InputError(f"{path} has other tensors than its config.json says; " + "; ".join(
            f"{kind}: {listed(names)}" for kind, names in problems.items() if names) + "; restore the files.")
    if tied is not None and not torch.equal(tied, weights["embed_tokens.weight"]):
        raise InputError(f"{path} ties the output matrix to the embedding, yet holds another lm_head.weight; correct "
                         "tie_word_embeddings in its config.json.")


# -------------------------------------------------------------------------------------------------- tokenizer

def byte_alphabet():
    """byte -> the character that byte-level BPE writes for it: itself where it is visible, else one from U+0100 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(others)}


BYTE_CHAR = byte_alphabet()
ALPHABET = frozenset(BYTE_CHAR.values())
CHAR_BYTE = {ord(char): b for b, char in BYTE_CHAR.items()}


def spell_bytes(piece):
    """The bytes that a piece of byte-level BPE, written in that alphabet, stands for."""
    return piece.translate(CHAR_BYTE).encode("latin-1")


BLANK = "\u2581"                 # what SentencePiece writes for a blank
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
                   "generation_config.json", "chat_template.jinja")
NUMERAL = "\\p{N}\U00011de0-\U00011de9\U00016ff4-\U00016ff6"     # with Unicode 17's, which tiktoken does not know yet
SPLITS = {          # how the known pre-tokenizers cut a text into pieces, each of which is encoded by itself
    "GPT-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "single digits, then GPT-2": rf"[{NUMERAL}]|'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+| ?[^\s\p{{L}}{NUMERAL}]+"
                                 rf"|\s+(?![^\s{NUMERAL}])|\s+",
    "Llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "words with all blanks before them": "\u2581*[^\u2581]+|\u2581+",
    "words with one blank before them": "\u2581?[^\u2581]+|\u2581",
    "nothing": r"[\s\S]+",
}


def as_id(i):
    if not isinstance(i, int) or not 0 <= i < 2 ** 31:
        raise ValueError(f"{i!r} is no id")
    return i


def steps_of(part, plural):
    """A part of tokenizer.json as a list of steps: it may be none, one, or a sequence of them."""
    return (part or {}).get(plural, [part] if part else [])


def split_name(pre_tokenizer):
    """The name in SPLITS of what a tokenizer.json's pre_tokenizer does, or a description of one that is not known."""
    names = []
    for step in steps_of(pre_tokenizer, "pretokenizers"):
        kind, pattern = step["type"], (step.get("pattern") or {}).get("Regex")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            names += ["GPT-2"] if step.get("use_regex", True) else []
        elif kind == "Digits" and step.get("individual_digits"):
            names.append("single digits")
        elif kind == "Split" and pattern == SPLITS["Llama 3"] and step["behavior"] == "Isolated" and not step.get("invert"):
            names.append("Llama 3")
        elif kind == "Metaspace" and step.get("replacement") == BLANK:
            names += ["words with one blank before them"] if step.get("split", True) else []
        else:
            names.append(f"{kind} {json.dumps({key: value for key, value in step.items() if key != 'type'})}")
    return ", then ".join(names) or "nothing"


def cut(text, names):
    """Cut text at the longest of `names` (name -> id) that stand in it. Yields (position, text or id)."""
    end = 0
    if names:
        for match in re.finditer("|".join(map(re.escape, sorted(names, key=len, reverse=True))), text):
            if match.start() > end:
                yield end, text[end:match.start()]
            yield match.start(), names[match[0]]
            end = match.end()
    if end < len(text):
        yield end, text[end:]


class Tokenizer:
    """Text to token ids and back: what a tokenizer.json of Hugging Face describes, carried out by one tiktoken Encoding.

    Two kinds of BPE: over bytes (GPT-2, Llama 3, SmolLM2), and over characters, with U+2581 for blanks and single bytes for
    characters that the vocabulary lacks (SentencePiece: Llama 2, Mistral). tiktoken knows bytes only, and merges by the
    rank of the result. SentencePiece fits in thus: ranks 0-255 are the bytes; then come the beginnings of every
    character's UTF-8, so that characters are assembled before anything else merges; then the characters; then the merged
    pieces in merge order. A beginning that is left over stands for an unknown character and becomes its bytes' ids.

        vocab_size: 1 + the largest id          stops: the ids that end a text; eos: the first of them, or None
        prefix: the ids that the file's template puts before a text, such as Llama's beginning-of-text
        files: name -> content, which `save` writes beside a model; special_ids: config.json's entries for the same
    """

    def __init__(self, files, special_ids=None, source="tokenizer.json"):
        """Raises InputError for a damaged tokenizer.json and for whatever could not be done exactly."""
        self.files, self.special_ids, self.source = files, special_ids or {}, source
        try:
            facts = json.loads(files["tokenizer.json"])
            self._read_blanks(facts.get("normalizer"), facts.get("pre_tokenizer"))
            self._read_model(facts["model"], facts.get("pre_tokenizer"))
            self._read_added_tokens(facts.get("added_tokens") or [])
            self._read_template(facts.get("post_processor"))
            self._read_decoder(facts.get("decoder"))
            generation = json.loads(files.get("generation_config.json", "{}"))
        except InputError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError, OverflowError) as error:
            raise self._refusal(f"is damaged ({type(error).__name__}: {error})", "restore it") from None
        self.vocab_size = 1 + max(self.pieces)
        ends = (np.ravel(source.get("eos_token_id") or []).tolist() for source in (self.special_ids, generation))
        self.stops = list(dict.fromkeys(i for ids in ends for i in ids))
        self.eos = self.stops[0] if self.stops else None

    @classmethod
    def bytes(cls):
        """The 256 bytes and an end-of-text token: the vocabulary of the small model."""
        end = {"id": 256, "content": "<|endoftext|>", "special": True, "normalized": False, "single_word": False,
               "lstrip": False, "rstrip": False}
        bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        facts = {"version": "1.0", "added_tokens": [end], "normalizer": None, "pre_tokenizer": bytewise, "decoder": bytewise,
                 "model": {"type": "BPE", "vocab": {char: b for b, char in sorted(BYTE_CHAR.items())}, "merges": []}}
        return cls({"tokenizer.json": json.dumps(facts, indent=1).encode()}, {"bos_token_id": None, "eos_token_id": 256})

    @classmethod
    def from_folder(cls, path):
        """The tokenizer of a checkpoint. Raises InputError where there is none, or one that is not the model's."""
        path = Path(path)
        files = {name: (path / name).read_bytes() for name in TOKENIZER_FILES if (path / name).is_file()}
        if "tokenizer.json" not in files:
            raise InputError(f"{path} holds no tokenizer.json; copy it there from the model's source.")
        read_json(path / "tokenizer.json")           # says so if it is a pointer or damaged
        config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
        special_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
        tokenizer = cls(files, special_ids, path / "tokenizer.json")
        rows = config.get("vocab_size", tokenizer.vocab_size)
        if not tokenizer.vocab_size <= rows <= tokenizer.vocab_size + 1024:      # embeddings are often padded a little
            raise InputError(f"{path / 'tokenizer.json'} has {tokenizer.vocab_size} ids and the model {rows}; "
                             "it belongs to another model: copy the right one there.")
        return tokenizer

    def _refusal(self, what, remedy="choose a model with another tokenizer"):
        return InputError(f"{self.source} {what}; {remedy}.")

    def _read_blanks(self, normalizer, pre_tokenizer):
        """self.blanks: where U+2581 is put before text: "never", before "each" section, or as Metaspace's schemes say."""
        steps = steps_of(normalizer, "normalizers")
        self.normalizes, self.blanks = bool(steps), "never"
        for step in steps:
            if step == {"type": "Prepend", "prepend": BLANK}:
                self.blanks = "each"
            elif step != {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}:
                raise self._refusal(f"normalizes text by {step['type']}, which is not supported here")
        if (pre_tokenizer or {}).get("type") == "Metaspace":
            self.blanks = pre_tokenizer.get("prepend_scheme") or (
                "always" if pre_tokenizer.get("add_prefix_space", True) else "never")

    def _read_model(self, model, pre_tokenizer):
        if (kind := model.get("type") or "BPE") != "BPE":
            raise self._refusal(f"is of type {kind}; only BPE is supported here")
        if option := next((o for o in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(o)), None):
            raise self._refusal(f"uses {option}, which is not supported here")
        split = split_name(pre_tokenizer)
        if split not in SPLITS:
            raise self._refusal(f"cuts text by an unknown pre-tokenizer, {split[:300]}")
        self.over_bytes = "ByteLevel" in json.dumps(pre_tokenizer)
        if not self.over_bytes and not model.get("byte_fallback"):
            raise self._refusal("is BPE neither over bytes nor with byte fallback, and nothing else is supported here")
        vocab = {piece: as_id(i) for piece, i in model["vocab"].items()}
        if split == "nothing" and not self.over_bytes and not any(BLANK in piece.lstrip(BLANK) for piece in vocab):
            split = "words with all blanks before them"      # faster, and the same ids: no piece reaches into another word
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        merged = dict.fromkeys(piece for piece in (left + right for left, right in merges) if piece in vocab)
        if model.get("ignore_merges"):       # whole words are looked up before anything merges, as tiktoken does
            merged |= dict.fromkeys(piece for piece in vocab if len(piece) > 1 and piece not in merged)
        ids = self._byte_level_ids(vocab, merged) if self.over_bytes else self._sentencepiece_ids(vocab, merged)
        self.split, self.ids = SPLITS[split], list(ids.values())
        self.unknown = {rank for rank, ids_of in enumerate(self.ids) if not ids_of}
        self.encoding = tiktoken.Encoding(str(self.source), pat_str=self.split, special_tokens={},
                                          mergeable_ranks={piece: rank for rank, piece in enumerate(ids)})
        self.pieces = {i: self._spelled(piece) for piece, i in vocab.items()}

    @staticmethod
    def _byte_level_ids(vocab, merged):
        """In the order of tiktoken's ranks, bytes -> ids: none for a byte that the vocabulary lacks."""
        ids = {bytes([b]): (vocab[char],) if char in vocab else () for b, char in sorted(BYTE_CHAR.items())}
        return ids | {spell_bytes(piece): (vocab[piece],) for piece in merged if ALPHABET.issuperset(piece)}

    @staticmethod
    def _sentencepiece_ids(vocab, merged):
        """The same: bytes, beginnings of characters (the ids of their bytes), characters, merged pieces."""
        by_byte = [vocab[f"<0x{b:02X}>"] for b in range(256)]
        chars = [char for char in vocab if len(char) == 1]
        ids = {bytes([b]): (by_byte[b],) for b in range(256)}
        ids |= {char.encode()[:n]: tuple(by_byte[b] for b in char.encode()[:n])
                for char in chars for n in range(2, len(char.encode()))}
        return ids | {piece.encode(): (vocab[piece],) for piece in [*chars, *merged]}

    def _spelled(self, piece):
        """The bytes of text that a piece stands for."""
        if self.over_bytes:
            return spell_bytes(piece) if ALPHABET.issuperset(piece) else piece.encode()
        return bytes([int(piece[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", piece) else piece.replace(BLANK, " ").encode()

    def _read_added_tokens(self, tokens):
        """Names that stand for one token wherever they occur; those marked normalized are looked for after normalizing."""
        self.raw, self.normalized = ({True: {}, False: {}} for _ in range(2))       # with special ones or not -> name -> id
        self.special = set()
        for token in tokens:
            name, i = token["content"], as_id(token["id"])
            if flag := next((flag for flag in ("single_word", "lstrip", "rstrip") if token.get(flag)), None):
                raise self._refusal(f"marks {name} as {flag}, which is not supported here")
            names = self.raw
            if token.get("normalized") and self.normalizes:
                name, names = self._normalize(name), self.normalized
            for with_special in (True, False) if not token.get("special") else (True,):
                names[with_special][name] = i
            self.special |= {i} if token.get("special") else set()
            self.pieces[i] = (name.replace(BLANK, " ") if names is self.normalized else name).encode()

    def _read_template(self, post_processor):
        self.prefix = []
        for step in steps_of(post_processor, "processors"):
            if step["type"] == "TemplateProcessing":
                kinds = [next(iter(part)) for part in step["single"]]
                if kinds.count("Sequence") != 1 or kinds[-1] != "Sequence":
                    raise self._refusal("puts tokens behind every text, which would end it before it began")
                self.prefix += [i for part in step["single"][:-1]
                                for i in step["special_tokens"][part["SpecialToken"]["id"]]["ids"]]
            elif step["type"] != "ByteLevel":        # that one moves offsets only
                raise self._refusal(f"has the post-processor {step['type']}, which is not supported here")

    def _read_decoder(self, decoder):
        self.strips = not self.over_bytes and any(
            step["type"] == "Strip" and step.get("start") or step["type"] == "Metaspace" and
            step.get("prepend_scheme", "always") != "never" for step in steps_of(decoder, "decoders"))

    def _normalize(self, text):
        return (BLANK if self.blanks == "each" else "") + text.replace(" ", BLANK)

    def encode(self, text, special=True, prefix=False):
        """The ids of text. special: names of special tokens in it become those tokens; False: they are text like any other.
        prefix: with what the template puts before a text. The same ids as Hugging Face's tokenizers, add_special_tokens=prefix.
        """
        ids = list(self.prefix) if prefix else []
        for at, section in cut(text, self.raw[special]):
            if isinstance(section, str):
                section = self._normalize(section) if self.normalizes else section
                for inner_at, part in cut(section, self.normalized[special]):
                    ids += self._encode(part, first=at + inner_at == 0) if isinstance(part, str) else [part]
            else:
                ids.append(section)
        return ids

    def _encode(self, text, first):
        """The ids of text without names of tokens in it. first: it opens the whole text."""
        if not self.over_bytes and not self.normalizes:
            text = text.replace(" ", BLANK)
            if (self.blanks == "always" or self.blanks == "first" and first) and not text.startswith(BLANK):
                text = BLANK + text
        try:
            ranks = self.encoding.encode_ordinary(text)
            if not self.unknown.isdisjoint(ranks):
                ranks = self._encode_without_unknown(text)
        except BaseException as error:       # a Rust panic is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise InputError("the text has too many blanks in a row, hundreds of thousands; shorten them.") from None
        return [i for rank in ranks for i in self.ids[rank]]

    def _encode_without_unknown(self, text):
        """Bytes that the vocabulary lacks vanish, but only from the pieces: what stood around one in its piece may merge."""
        import regex  # comes with tiktoken, which has no call that only splits

        known = [bytes(b for b in piece.encode() if b not in self.unknown) for piece in regex.findall(self.split, text)]
        return [rank for piece in known if piece for rank in self.encoding._encode_single_piece(piece)]

    def token_bytes(self, ids, special=False):
        """The bytes of ids as they stand inside a text. special: with the names of special tokens."""
        return b"".join(self.pieces.get(i, b"") for i in ids if special or i not in self.special)

    def decode(self, ids, special=False):
        """The text of ids, without the blank that encoding put first. Bytes that are no UTF-8, as in half a character, become
        U+FFFD."""
        text = self.token_bytes(ids, special).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips else text


# ------------------------------------------------------------------------------------------------ worked example

def worked_example():
    """One head and a dozen tokens: what Algorithm 1 decides and keeps, and that the parallel form agrees."""
    torch.manual_seed(48)
    text = ["the", "cache", "keeps", "a", "summary", "of", "what", "it", "has", "seen", "so", "far"]
    T = len(text)
    config = Config(vocab_size=1, n_layer=1, n_head=1, n_kv_head=1, dim=8, ffn_dim=1, max_seq_len=T)
    q, k, v = torch.randn(3, 1, 1, T, config.head_dim)
    k[..., 0] = 6 * k[..., 0] + 7               # an untrained logit would be near 0, and every token appended
    alpha, keep = relaxed_decision(k[..., 0], config, noise=False)
    omega = importance(2 * q[..., 0], n_kv_head=1)

    print("Algorithm 1 on one head. The decision: merge where k[0] > c = 5. A slot is named by the tokens in it.\n")
    print(" t  token      k[0]   alpha        omega  cache after the step")
    cache, slots, stepwise = Cache(config, batch=1), [], []
    for t in range(T):
        at = slice(t, t + 1)
        stepwise.append(cache.attend(0, q[:, :, at], k[:, :, at], v[:, :, at], alpha[..., at], omega[..., at]))
        merge = alpha[0, 0, t] == 1
        slots = [*slots[:-1], slots[-1] + "+" + text[t]] if merge else [*slots, text[t]]
        print(f"{t:2}  {text[t]:<8}{k[0, 0, t, 0]:7.2f}   {'1 (merge) ' if merge else '0 (append)'}{omega[0, 0, t]:8.2f}  "
              f"{' '.join(f'[{slot}]' for slot in slots)}")

    angles = rotary_table(config, T)
    k, v = accumulate(k, v, alpha, omega, config.window)
    parallel = attend(rotate_heads(q, *angles, 0.0), rotate_heads(k, *angles, 0.0), v, keep)
    print(f"\n{T} tokens in {cache.lengths.item()} slots: compression ratio {cache.compression_ratio:.2f}.")
    print("The parallel form, Eq. 9 and the mask of appendix F, gives the same outputs: largest difference "
          f"{(parallel - torch.cat(stepwise, dim=2)).abs().max():.1e}.")


if __name__ == "__main__":
    worked_example()
