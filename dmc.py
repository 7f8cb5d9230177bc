"""Dynamic Memory Compression (DMC), the method in one file.

A Transformer that generates text keeps the key and the value of every past token: the cache. DMC
(Nawrot et al., 2024, arXiv 2403.09636) teaches a trained model to keep fewer. At every token each
key-value head decides by itself whether to APPEND its key and value as a new slot, or to MERGE
them into its last slot by a weighted average. No parameter is added: the decision is read from
the first channel of the key, the weight from the first channel of the query.

Read from top to bottom: the equations, one function each; `Cache`, which is Algorithm 1; a Llama
that uses both; a worked example, which `python dmc.py` prints. This file is slow and literal.
dmc_fast.py has the same functions in fast.

Glossary. Sizes: B sequences, T tokens, L layers, H query heads, G key-value heads (G divides H),
D channels per head.

    code        paper         where        shape           meaning
    q, k, v     q_t, k_t, v_t Eq. 1-3      (B, H|G, T, D)  query, key, value of each token
    alpha       alpha_t       Eq. 8        (B, G, T)       decision: 1 merge, 0 append
    keep        log(1-alpha)  appendix F   (B, G, T)       what token t leaves of the slot before it
    omega       omega_t       Algorithm 1  (B, G, T)       importance: weight in the average
    z           z_t           Eq. 9        (B, G, T)       importance summed over the segment so far
    accumulate  k~_t, v~_t    Eq. 9        (B, G, T, D)    averages over the segment so far
    window      w             section 3.3  int or None     tokens that an average covers at most
    c, tau      c, tau        Eq. 8        float           offset and temperature of the decision
    gain        1 - s/n       Eq. 12       float           what is left of the control channels
    cr          CR            Eq. 10       float >= 1      tokens seen / slots kept

A *segment* is a run of tokens that share one slot. The *control channels* are channel 0 of the
keys and of the queries.
"""

import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of a Llama, and the settings of DMC."""
    vocab_size: int
    n_layer: int                 # L
    n_head: int                  # H, query heads
    n_kv_head: int               # G, key-value heads; H / G query heads share one
    dim: int                     # width of the residual stream
    ffn_dim: int                 # width of the MLP
    max_seq_len: int             # positions
    head_dim: int | None = None  # D, an even number; None: dim / H
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None   # {"rope_type": "linear" or "llama3", "factor": ..., ...}
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    dmc: bool = True             # False: a plain Llama, channel 0 is a channel like any other
    window: int | None = 12      # w; None: the whole segment
    tau: float = 0.1
    c: float = 5.0               # large enough that an untrained model (logit 0) appends
    control_pair: int = 0        # the rotary pair that has changed places with pair 0

    def __post_init__(self):
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.dim // self.n_head)


# ------------------------------------------------------------------------------- the equations

def wide(x):
    """x in fp32, or in fp64 if it was: decisions, weights and sums are never in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def relaxed_decision(logit, config, noise, start=True):
    """Eq. 8: alpha_t = sigmoid((k_t[0] - c + g1 - g2) / tau), with g1, g2 ~ Gumbel(0, 1).

    logit (B, G, T): channel 0 of the keys. Returns alpha and keep = log(1 - alpha), (B, G, T).
    noise 1, in training: alpha is in (0, 1), nearly binary because tau is small, and has a
    gradient. 0, in use: alpha is 1 where k_t[0] > c and 0 elsewhere; keep is -inf or 0. Between
    them noise and temperature shrink alike, as if the logits had grown, until alpha is the latter.
    start: token 0 opens the sequence, so there is no slot to merge into and alpha[..., 0] = 0.
    """
    x = wide(logit) - config.c
    if noise:
        u = torch.rand_like(x).clamp_(1e-6, 1 - 1e-6)
        x = (x + noise * torch.logit(u)) / (noise * config.tau)    # g1 - g2 is one logistic sample
    else:
        x = torch.where(x > 0, torch.inf, -torch.inf).to(x.dtype)
    if start:
        x = torch.cat([torch.full_like(x[..., :1], -torch.inf), x[..., 1:]], dim=-1)
    return torch.sigmoid(x), F.logsigmoid(-x)     # log(1 - sigmoid(x)), exact where alpha is near 1


def importance(logit, n_kv_head):
    """Algorithm 1: omega_t = sigmoid(q_t[0]), the weight of token t in its segment's average.

    logit (B, H, T): channel 0 of the queries. Returns (B, G, T): with grouped queries the logit is
    the mean over the group. Beyond the paper, logits below -30 count as -30, so that the weights of
    a segment cannot all underflow to 0.
    """
    grouped = wide(logit).unflatten(1, (n_kv_head, -1))               # (B, G, H / G, T)
    return torch.sigmoid(grouped.mean(dim=2).clamp(min=-30.0))


def decide(q, k, config, noise=False, position=0):
    """What becomes of T tokens, the first of which is at `position` of its sequence.

    q (B, H, T, D), k (B, G, T, D), not yet rotated. Returns alpha, keep and omega, (B, G, T) each.
    """
    alpha, keep = relaxed_decision(k[..., 0], config, noise, start=position == 0)
    return alpha, keep, importance(q[..., 0], config.n_kv_head)


def before(x, n):
    """x_{t-n} in the place of x_t along dimension 2, and 0 before the start of the sequence."""
    return torch.cat([torch.zeros_like(x[:, :, :n]), x[:, :, :x.size(2) - n]], dim=2)


def accumulate(k, v, alpha, omega, window=None):
    """Eq. 9: keys and values become the weighted averages over their segment up to each token.

        z_t  = alpha_t z_{t-1} + omega_t
        k~_t = (alpha_t z_{t-1} k~_{t-1} + omega_t k_t) / z_t            v~_t likewise

    k, v (B, G, T, D), not yet rotated; alpha in [0, 1], omega > 0 (B, G, T). Returns k~ and v~.
    This is the closed form z_t k~_t = sum_n (alpha_{t-n+1} ... alpha_t) omega_{t-n} k_{t-n}, where
    no token waits for the one before it. The window (section 3.3) keeps the terms n < w.
    """
    alpha, omega, T = wide(alpha), wide(omega), k.size(2)
    fade, z, k_sum, v_sum = torch.ones_like(alpha), 0, 0, 0
    for n in range(T if window is None else min(window, T)):
        weight = fade * before(omega, n)
        z = z + weight
        k_sum = k_sum + weight[..., None] * before(k, n)
        v_sum = v_sum + weight[..., None] * before(v, n)
        fade = fade * before(alpha, n)                                # alpha_{t-n} ... alpha_t
    return (k_sum / z[..., None]).to(k.dtype), (v_sum / z[..., None]).to(v.dtype)


def dmc_mask(keep):
    """Appendix F: what is added to the score of query i on item j. (B, G, T) -> (B, G, T, T).

        j > i: -inf (the future)      j = i: 0      j < i: keep_{j+1} = log(1 - alpha_{j+1})

    Item j is the state of its slot after token j. If token j + 1 merged, that state was overwritten
    and later queries must not see it. If token j + 1 appended, it stays.
    """
    T = keep.size(-1)
    i, j = torch.arange(T, device=keep.device)[:, None], torch.arange(T, device=keep.device)
    causal = keep.new_zeros(T, T).masked_fill(j > i, -torch.inf)
    overwritten = F.pad(keep[..., 1:], (0, 1)).unsqueeze(-2)
    return torch.where(j < i, overwritten, causal)


def attend(q, k, v, keep=None, angles=None):
    """Causal attention under the mask of appendix F; keep None: plain causal attention.

    q (B, H, T, D); k, v (B, G, T, D); keep (B, G, T). q and k are rotated, or are to be, by angles
    (cos, sin), with control channels that no score sees. Returns y (B, H, T, D).
    """
    if angles is not None:
        q, k = (rotate_heads(x, *angles, gain=0.0) for x in (q, k))
    if keep is None:
        groups = q.size(1) != k.size(1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups)
    grouped = q.unflatten(1, (k.size(1), -1)) / math.sqrt(q.size(-1))     # (B, G, H / G, T, D)
    scores = wide(grouped @ k[:, :, None].mT) + dmc_mask(keep)[:, :, None]
    return (scores.softmax(dim=-1).to(v.dtype) @ v[:, :, None]).flatten(1, 2)


def compression_loss(alpha, cr):
    """Eq. 10: max(0, sum(1 - alpha) - L G T / CR) / (L G T), a pull of the slots towards 1 / CR.

    alpha (L, B, G, T), or a list of L tensors (B, G, T). Eq. 10 speaks of one sequence: each is
    held to the target by itself, and their mean, a scalar, is added to the LM loss (Eq. 11). It is
    one-sided: compressing more than the target costs nothing.
    """
    kept = (1 - torch.stack(list(alpha))).mean(dim=(0, 2, 3))             # (B,)
    return (kept - 1 / cr).clamp(min=0).mean()


def channel_gain(step, steps):
    """Eq. 12: the factor 1 - s/n on the control channels at step s of n, down to 0 and no further.

    Afterwards the rows of the q and k projections that feed these channels are set to zero, so that
    every decision starts at the logit 0 - c: append.
    """
    return max(0.0, 1 - step / steps)


def scale_control(x, gain):
    """x (..., D) with channel 0 times gain. 1: a plain Llama; 0: no score sees the channel."""
    if gain == 1:
        return x
    scale = torch.ones(x.size(-1), dtype=x.dtype, device=x.device)
    scale[0] = gain
    return x * scale


# --------------------------------------------------------------------------- rotary embedding

def rotary_frequencies(config, device=None):
    """Radians per position of channels i and i + D/2, pair i: (D / 2,), in fp64.

    Models that were stretched to a longer context have slower ones. linear: all are divided by a
    factor. llama3: waves longer than original context / low_freq_factor are, those shorter than
    original context / high_freq_factor are not, and in between the two are mixed.
    """
    channel = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device)
    frequency = config.rope_theta ** (-channel / config.head_dim)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        frequency = frequency / scaling["factor"]
    elif scaling.get("rope_type") == "llama3":
        context = scaling["original_max_position_embeddings"]
        waves = context * frequency / (2 * math.pi)                       # that fit into it
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        unchanged = ((waves - low) / (high - low)).clamp(0, 1)
        frequency = torch.lerp(frequency / scaling["factor"], frequency, unchanged)
    pair = config.control_pair
    frequency[0], frequency[pair] = frequency[pair].clone(), frequency[0].clone()
    return frequency


def rotary_table(config, length, device=None):
    """cos and sin of the angles of positions 0 ... length - 1, (length, D / 2) each.

    In fp64, because angles grow large.
    """
    position = torch.arange(length, dtype=torch.float64, device=device)
    angle = position[:, None] * rotary_frequencies(config, device)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotary embedding of x (..., T, D), cos and sin (T, D / 2): channels i and i + D / 2 turn."""
    a, b = wide(x).chunk(2, dim=-1)
    cos, sin = cos.to(a.dtype), sin.to(a.dtype)
    turned = [torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)]
    return torch.cat(turned, dim=-1).to(x.dtype)


def rotate_heads(x, cos, sin, gain):
    """Rotate, with the control channel scaled before and, as its partner leaks into it, after."""
    return scale_control(rotate(scale_control(x, gain), cos, sin), gain)


# ------------------------------------------------------------------------------- Algorithm 1

class Cache:
    """Algorithm 1 for L layers, B sequences and G heads, each with its own number of slots.

    keys, values: of each layer, its slots (B, G, S, D), where S is the longest head's number.
    lengths (L, B, G): the slots in use. seen: of each layer, the tokens so far.

    Keys are averaged before rotary embedding, and a slot's key is rotated at the position of the
    latest token in it. So the segment of the last slot stays open: `segment` remembers it
    un-rotated. Without a window it holds z, k~ and v~. With one it holds the last w tokens, since
    the window of section 3.3 is kept at inference, where the paper speaks of training only; thus
    inference equals training.
    """

    def __init__(self, config, batch, device=None, dtype=torch.float32):
        L, B, G, D = config.n_layer, batch, config.n_kv_head, config.head_dim
        nothing = torch.zeros(B, G, 0, D, device=device, dtype=dtype)
        self.config, self.dtype = config, dtype
        self.gain = 0.0 if config.dmc else 1.0                    # of the control channels (Eq. 12)
        self.seen = [0] * L
        self.lengths = torch.zeros(L, B, G, dtype=torch.long, device=device)
        self.keys, self.values = [nothing] * L, [nothing] * L
        self.segment = [(wide(nothing[..., 0]), nothing, nothing)] * L        # omegas, keys, values

    @property
    def compression_ratio(self):
        """Tokens seen / slots used, over all layers, sequences and heads; 1.0 while empty."""
        tokens = sum(self.seen) * self.lengths[0].numel()
        return tokens / self.lengths.sum().item() if tokens else 1.0

    @torch.no_grad()
    def attend(self, layer, q, k, v, alpha=None, omega=None):
        """Take T >= 1 further tokens into one layer, attend from each. Returns y (B, H, T, D).

        q (B, H, T, D); k, v (B, G, T, D), none rotated; alpha in {0, 1}, omega (B, G, T).
        alpha None: nothing is decided and every token appends.
        """
        if alpha is None:
            alpha, omega = torch.zeros_like(wide(k[..., 0])), torch.ones_like(wide(k[..., 0]))
        tokens = zip(*(x.unbind(2) for x in (q, k, v, alpha, omega)), strict=True)
        return torch.stack([self.step(layer, *token) for token in tokens], dim=2)

    def step(self, layer, q, k, v, alpha, omega):
        """One token. q (B, H, D); k, v (B, G, D); alpha, omega (B, G). Returns y (B, H, D).

            MERGE (alpha = 1)                                  APPEND (alpha = 0)
            z_t     = z_{t-1} + omega_t                        z_t = omega_t
            K[last] = (z_{t-1} K[last] + omega_t k_t) / z_t    K.append(k_t)
            V[last] = (z_{t-1} V[last] + omega_t v_t) / z_t    V.append(v_t)
        """
        alpha = alpha * (self.lengths[layer] > 0)                 # the first token appends

        # the average over the open segment; after an append this token is alone in it
        omegas, ks, vs = self.segment[layer]
        omegas = torch.cat([alpha[..., None] * omegas, omega[..., None]], dim=-1)       # (B, G, n)
        ks, vs = torch.cat([ks, k[:, :, None]], dim=2), torch.cat([vs, v[:, :, None]], dim=2)
        if w := self.config.window:
            omegas, ks, vs = omegas[..., -w:], ks[:, :, -w:], vs[:, :, -w:]
        z = omegas.sum(-1, keepdim=True)
        k_mean, v_mean = ((omegas / z).unsqueeze(2) @ wide(x) for x in (ks, vs))     # (B, G, 1, D)
        self.segment[layer] = (omegas, ks, vs) if w else (z, k_mean, v_mean)

        # into the last slot or a new one, rotated at this token's position
        last = self.lengths[layer] - alpha.long()                                    # (B, G)
        self.lengths[layer] = last + 1
        cos, sin = (x[-1:] for x in rotary_table(self.config, self.seen[layer] + 1, k.device))
        self.seen[layer] += 1
        rotated = rotate_heads(k_mean.to(self.dtype), cos, sin, self.gain)
        keys = self.keys[layer] = write(self.keys[layer], last, rotated)
        values = self.values[layer] = write(self.values[layer], last, v_mean.to(self.dtype))

        # ordinary attention over each head's own slots
        q = rotate_heads(q[:, :, None], cos, sin, self.gain).view(*k.shape[:2], -1, k.size(-1))
        scores = wide(q @ keys.mT) / math.sqrt(k.size(-1))                       # (B, G, H / G, S)
        unused = torch.arange(keys.size(2), device=k.device) >= self.lengths[layer][..., None]
        weights = scores.masked_fill(unused[:, :, None], -torch.inf).softmax(dim=-1)
        return (weights.to(self.dtype) @ values).flatten(1, 2)


def write(slots, last, x):
    """slots (B, G, S, D) with x (B, G, 1, D) in slot `last` (B, G), one longer where it must be."""
    if last.max() == slots.size(2):
        slots = F.pad(slots, (0, 0, 0, 1))
    return slots.scatter(2, last[..., None, None].expand_as(x), x)


# ---------------------------------------------------------------------------------- a Llama

class Attention(nn.Module):
    """Grouped-query attention in which each key-value head runs its own memory."""

    def __init__(self, config, layer, ops):
        super().__init__()
        self.config, self.layer = config, layer
        self.accumulate, self.attend = ops.accumulate, ops.attend
        self.decide = getattr(ops, "decide", decide)
        D = config.head_dim
        self.q_proj = nn.Linear(config.dim, config.n_head * D, bias=False)
        self.k_proj = nn.Linear(config.dim, config.n_kv_head * D, bias=False)
        self.v_proj = nn.Linear(config.dim, config.n_kv_head * D, bias=False)
        self.o_proj = nn.Linear(config.n_head * D, config.dim, bias=False)

    def forward(self, x, cos, sin, cache, noise, gain):
        """x (B, T, dim) -> y (B, T, dim), alpha (B, G, T). gain None: decide; a number: Eq. 12."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        alpha = keep = omega = None
        if gain is None:
            position = 0 if cache is None else cache.seen[self.layer]
            alpha, keep, omega = self.decide(q, k, self.config, noise, position)
            gain = 0.0
        if cache is not None:
            y = cache.attend(self.layer, q, k, v, alpha, omega)
        elif alpha is not None:
            k, v = self.accumulate(k, v, alpha, omega, self.config.window)
            y = self.attend(q, k, v, keep, (cos, sin))
        else:
            y = self.attend(*(rotate_heads(x, cos, sin, gain) for x in (q, k)), v)
        return self.o_proj(y.transpose(1, 2).flatten(2)), alpha


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
    """A layer: attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config, layer, ops):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = Attention(config, layer, ops)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache, noise, gain):
        y, alpha = self.self_attn(self.input_layernorm(x), cos, sin, cache, noise, gain)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), alpha


class Transformer(nn.Module):
    """A Llama with DMC. ops: the module that supplies accumulate, attend and Cache: this one."""

    def __init__(self, config, ops=sys.modules[__name__]):
        super().__init__()
        self.config, self.Cache = config, ops.Cache
        # nn.Embedding itself would draw weights, which are drawn below, and not on the meta device
        empty = torch.empty(config.vocab_size, config.dim)
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(Block(config, i, ops) for i in range(config.n_layer))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1 and not p.is_meta:    # what adds to the residual stream starts smaller
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def new_cache(self, batch):
        """An empty cache for `batch` sequences, on the weights' device and in their dtype."""
        weight = self.lm_head.weight
        return self.Cache(self.config, batch, weight.device, weight.dtype)

    def hidden(self, tokens, cache=None, noise=False, gain=None):
        """tokens (B, T) -> the last hidden states (B, T, dim), normed, and alpha (L, B, G, T).

        cache: tokens continue the sequences in it. noise: see relaxed_decision; above 0 in training
        only. gain: Eq. 12's factor on the control channels, from 1 (a plain Llama) to 0; nothing is
        decided then, and alpha is None. None: decide, if config.dmc says so. Raises ValueError
        where positions run out, or a cache is asked for what only training has.
        """
        if gain is None and not self.config.dmc:
            gain = 1.0
        if cache is not None and (noise or gain not in (None, cache.gain)):
            raise ValueError("a cache takes no noise, and no gain but its own")
        T = tokens.size(1)
        if (0 if cache is None else cache.seen[0]) + T > self.config.max_seq_len:
            raise ValueError(f"more tokens than the model's {self.config.max_seq_len} positions")
        x, alphas, cos, sin = self.embed_tokens(tokens), [], None, None
        if cache is None:                                         # which knows its positions
            table = rotary_table(self.config, T, tokens.device)
            cos, sin = (angle.to(wide(x[:0])) for angle in table)
        for layer in self.layers:
            x, alpha = layer(x, cos, sin, cache, noise, gain)
            alphas.append(alpha)
        return self.norm(x), torch.stack(alphas) if gain is None else None

    def forward(self, tokens, cache=None, noise=False, gain=None):
        """`hidden`, with logits (B, T, vocab) in the place of the hidden states."""
        x, alpha = self.hidden(tokens, cache, noise, gain)
        return self.lm_head(x), alpha


# --------------------------------------------------------------------------- worked example

def worked_example():
    """One head and a dozen tokens: what Algorithm 1 decides, and that the parallel form agrees."""
    torch.manual_seed(48)
    text = ["the", "cache", "keeps", "a", "summary", "of", "what", "it", "has", "seen", "so", "far"]
    T = len(text)
    config = Config(vocab_size=1, n_layer=1, n_head=1, n_kv_head=1, dim=8, ffn_dim=1, max_seq_len=T)
    q, k, v = torch.randn(3, 1, 1, T, config.head_dim)
    k[..., 0] = 6 * k[..., 0] + 7       # an untrained logit would be near 0, every token appended
    q[..., 0] *= 2
    alpha, keep, omega = decide(q, k, config)

    print("Algorithm 1 on one head. The decision: merge where k[0] > c = 5. A slot is named")
    print("by the tokens in it; the last three after each step are shown.\n")
    print(" t  token     k[0]   alpha       omega  cache after the step")
    cache, slots, stepwise = Cache(config, batch=1), [], []
    for t in range(T):
        token = (x[:, :, t:t + 1] for x in (q, k, v, alpha, omega))
        stepwise.append(cache.attend(0, *token))
        merge = alpha[0, 0, t] == 1
        slots = [*slots[:-1], slots[-1] + "+" + text[t]] if merge else [*slots, text[t]]
        shown = " ".join(f"[{slot}]" for slot in slots[-3:])
        print(f"{t:2}  {text[t]:<8}{k[0, 0, t, 0]:6.2f}   {'1 (merge) ' if merge else '0 (append)'}"
              f"{omega[0, 0, t]:7.2f}  {shown}")

    k, v = accumulate(k, v, alpha, omega, config.window)
    parallel = attend(q, k, v, keep, rotary_table(config, T))
    difference = (parallel - torch.cat(stepwise, dim=2)).abs().max()
    print(f"\n{T} tokens in {cache.lengths.item()} slots: "
          f"compression ratio {cache.compression_ratio:.2f}.")
    print("The parallel form, Eq. 9 and the mask of appendix F, gives the same outputs:")
    print(f"largest difference {difference:.1e}.")


if __name__ == "__main__":
    worked_example()
