"""Dynamic Memory Compression (DMC), the method in one file.

A Transformer that generates text keeps the key and the value of every past token: the cache. DMC (Nawrot et al., 2024,
arXiv 2403.09636) teaches a trained model to keep fewer. At every token each key-value head decides by itself whether to
APPEND its key and value as a new slot, or to MERGE them into its last slot by a weighted average. No parameter is added:
the decision is read from the first channel of the key, the weight from the first channel of the query.

Read from top to bottom: the equations, one function each; `Cache`, which is Algorithm 1; a Llama that uses both; files;
and a worked example that `python dmc.py` prints.

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
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn


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
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    dmc: bool = True             # False: a plain Llama, channel 0 is a channel like any other
    window: int | None = 12      # w; None: the whole segment
    tau: float = 0.1
    c: float = 5.0               # large enough that an untrained model (logit 0) appends

    def __post_init__(self):
        for name in ("vocab_size", "n_layer", "n_head", "n_kv_head", "dim", "ffn_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give at least 1.")
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

def rotary_table(config, length, device=None):
    """cos and sin of the angles of positions 0 .. length - 1, (length, D / 2) each, in fp64: angles grow large."""
    channel = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device)
    position = torch.arange(length, dtype=torch.float64, device=device)
    angle = position[:, None] * config.rope_theta ** (-channel / config.head_dim)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotary embedding. x (..., T, D); cos, sin (T, D / 2). Channel i turns together with channel i + D / 2."""
    a, b = wide(x).chunk(2, dim=-1)
    cos, sin = cos.to(a.dtype), sin.to(a.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


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

    def __init__(self, config, batch, device=None, dtype=torch.float32):
        L, B, G, D, W = config.n_layer, batch, config.n_kv_head, config.head_dim, config.window or 1
        self.config = config
        self.gain = 0.0 if config.dmc else 1.0
        self.cos, self.sin = rotary_table(config, config.max_seq_len, device)
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

        q (B, H, T, D); k, v (B, G, T, D), none rotated; alpha in {0, 1}, omega (B, G, T). alpha None: append them all.
        Raises InputError when the positions run out.
        """
        T = q.size(2)
        if self.seen[layer] + T > self.config.max_seq_len:
            raise InputError(f"{self.seen[layer] + T} tokens do not fit the model's {self.config.max_seq_len} "
                             "positions; give a shorter prompt or generate fewer tokens.")
        if alpha is None:
            alpha, omega = torch.zeros_like(k[..., 0]), torch.ones_like(k[..., 0])
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

    def _average(self, layer, k, v, merge, omega):
        """The open segment's key and value, un-rotated, with this token in them: (B, G, 1, D) each."""
        open_k, open_v, open_omega = self.open_k[layer], self.open_v[layer], self.open_omega[layer]
        open_omega *= merge[..., None]                               # a new segment forgets the tokens before it
        if self.config.window:
            at = self.seen[layer] % self.config.window               # the oldest of the last w tokens makes room
            open_k[:, :, at], open_v[:, :, at], open_omega[:, :, at] = k[:, :, 0], v[:, :, 0], omega[..., 0]
            weight = open_omega / open_omega.sum(-1, keepdim=True)
            return tuple((weight[..., None, :] @ wide(x)).to(k.dtype) for x in (open_k, open_v))
        z = open_omega + omega                                       # z_t = z_{t-1} + omega_t
        for average, new in ((open_k, k), (open_v, v)):              # (z_{t-1} k~ + omega_t k_t) / z_t
            average.copy_((open_omega[..., None] * average + omega[..., None] * new) / z[..., None])
        open_omega.copy_(z)
        return open_k.to(k.dtype), open_v.to(v.dtype)

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
        k_mean, v_mean = accumulate(wide(k), wide(v), merge, omega, W)
        k_rot, q_rot = (rotate_heads(x, self.cos[:T], self.sin[:T], self.gain) for x in (k_mean.to(k.dtype), q))
        keep = torch.zeros_like(omega).masked_fill(merge, -torch.inf)
        y = attend(q_rot, k_rot, v_mean.to(v.dtype), keep)

        survives = F.pad(~merge[..., 1:], (0, 1), value=True)        # item j stays if token j + 1 appended
        self.lengths[layer] = survives.sum(-1)
        order = torch.argsort(survives.int(), dim=-1, descending=True, stable=True)      # survivors first, oldest first
        order = order[..., :int(self.lengths[layer].max()), None].expand(-1, -1, -1, k.size(-1))
        self.keys[layer] = k_rot.gather(2, order)
        self.values[layer] = v_mean.to(v.dtype).gather(2, order)

        in_open = F.pad(merge[..., 1:].flip(-1).cumprod(-1).flip(-1), (0, 1), value=1)  # no later token appended
        if W:
            recent = torch.arange(max(0, T - W), T, device=k.device)
            self.open_k[layer][:, :, recent % W] = k[:, :, recent]
            self.open_v[layer][:, :, recent % W] = v[:, :, recent]
            self.open_omega[layer][:, :, recent % W] = (omega * in_open)[:, :, recent]
        else:
            self.open_k[layer], self.open_v[layer] = k_mean[:, :, -1:], v_mean[:, :, -1:]
            self.open_omega[layer] = (omega * in_open).sum(-1, keepdim=True)
        self.seen[layer] = T
        return y


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

    def forward(self, x, *context):
        y, alpha = self.self_attn(self.input_layernorm(x), *context)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), alpha


class Transformer(nn.Module):
    """A Llama with DMC. ops: the module that supplies accumulate, attend and Cache; None: this file."""

    def __init__(self, config, ops=None):
        super().__init__()
        ops = ops or sys.modules[__name__]
        self.config, self.Cache = config, ops.Cache
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, ops) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:     # what writes into the residual stream starts smaller, so that its sum does not grow
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens, cache=None, noise=False, gain=None):
        """tokens (B, T) -> logits (B, T, vocab), alpha (L, B, G, T) or None where nothing is decided.

        cache: tokens continue the sequences in it. noise: relaxed, noisy decisions (Eq. 8), for training only.
        gain: Eq. 12's factor on the control channels, 1 (plain Llama) to 0, nothing decided; None: what config.dmc says.
        With a cache, gain must agree with the cache's own: 0 for a DMC model, 1 for a plain one.
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
            x, alpha = layer(x, i, cos, sin, cache, noise, gain)
            alphas.append(alpha)
        return self.lm_head(self.norm(x)), torch.stack(alphas) if gain is None else None

    def control_rows(self):
        """Views, without gradient, of the projections' rows that feed the control channels: (heads, dim) each."""
        return [proj.weight.detach()[::self.config.head_dim] for layer in self.layers
                for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj)]

    def clear_control_rows(self):
        """Zero those rows, after which every decision logit starts at 0 - c."""
        for rows in self.control_rows():
            rows.zero_()


# ------------------------------------------------------------------------------------------------ checkpoints

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
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another folder or free some space.") from None


def write_json(path, value):
    write_atomically(path, lambda f: f.write_text(json.dumps(value, indent=2) + "\n"))


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        raise InputError(f"{path} is missing or damaged; give the folder of a run or of a checkpoint.") from None


def save(model, path, **facts):
    """Write a folder: model.safetensors and config.json, which holds the Config and `facts`, anything JSON.

    The weights' file repeats the Config, so a kill between the two files leaves the old checkpoint or the new one.
    """
    path, config = Path(path), json.dumps(asdict(model.config))
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}       # tied weights once
    write_atomically(path / "model.safetensors", lambda f: save_file(weights, f, metadata={"config": config}))
    write_json(path / "config.json", {**asdict(model.config), **facts})


def load(path, ops=None, device=None, **changes):
    """The Transformer in a folder that `save` wrote, with `changes` to its Config, such as dmc=True before a retrofit.

    Raises InputError where there is none, or a damaged one.
    """
    file = Path(path) / "model.safetensors"
    if not file.is_file():
        raise InputError(f"{path} holds no model.safetensors; give the folder of a checkpoint.")
    try:
        with safe_open(file, framework="pt", device=str(device or "cpu")) as f:
            config = Config(**{**json.loads(f.metadata()["config"]), **changes})
            weights = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - f is no dict
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise InputError(f"{file} is truncated or not a checkpoint of this project ({error}); write it anew.") from None
    model = Transformer(config, ops).to(device)
    expected = {name: p.shape for name, p in model.named_parameters()}
    found = {name: w.shape for name, w in weights.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise InputError(f"{file} has other tensors than its configuration says, {wrong[0]} first; write it anew.")
    model.load_state_dict(weights, strict=False)     # tied weights are in the file once
    return model


# -------------------------------------------------------------------------------------------------- tokenizer

class Tokenizer:
    """Text to token ids and back, through a tiktoken Encoding. eos: the id that ends a document."""

    def __init__(self, encoding, eos):
        self.encoding, self.eos, self.vocab_size = encoding, eos, encoding.n_vocab

    @classmethod
    def bytes(cls):
        """The 256 bytes and an end-of-text token: the vocabulary of the small model."""
        return cls(tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)},
                                     special_tokens={"<|endoftext|>": 256}), eos=256)

    @classmethod
    def from_folder(cls, path):
        """The tokenizer of a checkpoint, by what its config.json says. Raises InputError where it names none."""
        if read_json(Path(path) / "config.json").get("tokenizer") != "bytes":
            raise InputError(f"{path} names no tokenizer that is known here; write it with train.py.")
        return cls.bytes()

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def token_bytes(self, ids):
        return self.encoding.decode_bytes(ids)

    def decode(self, ids):
        """Bytes that are no UTF-8, as in half a character, become U+FFFD."""
        return self.encoding.decode(ids)


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
