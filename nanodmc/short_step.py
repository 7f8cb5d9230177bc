"""One token of every sequence through a model in few launches: what the engine decodes with.

At T = 1 the matrix products of a layer wait for memory, and whatever small stands between them
costs a launch and a pause. So queries, keys and values come from one product, as do the two halves
of the MLP; the residual sum and the norm behind it are one kernel, as are silu and its product; and
decisions are made where the cache is updated.
"""

from __future__ import annotations  # kernels can be read, not run, where Triton is missing

import torch
import torch.nn.functional as F

import dmc
from nanodmc.launch import in_kernels, jit, power_of_2, tl, triton
from nanodmc.variants import of_model

# ---------------------------------------------------------------------------------- two kernels

@jit
def add_norm_kernel(x, y, weight, normed, eps, N: tl.constexpr, N_PAD: tl.constexpr):
    """One row: x becomes x + y, and normed its RMSNorm. Floor: 8 N bytes in bf16, beside weights.

    The sum is rounded to the type of x before it is normed, as PyTorch's operations do.
    """
    i = tl.arange(0, N_PAD)
    at, inside = tl.program_id(0).to(tl.int64) * N + i, i < N
    gain = tl.load(weight + i, mask=inside, other=0).to(tl.float32)
    left, right = tl.load(x + at, mask=inside, other=0), tl.load(y + at, mask=inside, other=0)
    total = (left.to(tl.float32) + right.to(tl.float32)).to(left.dtype)
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / N + eps)
    tl.store(x + at, total, mask=inside)
    tl.store(normed + at, wide * scale * gain, mask=inside)


@jit
def silu_product_kernel(x, y, N, TILE: tl.constexpr):
    """y = silu(gate) * up, where a row of x (2 N) is gate, then up. Floor: 6 N bytes in bf16."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = i < N
    gate = tl.load(x + row * 2 * N + i, mask=inside, other=0)
    up = tl.load(x + row * 2 * N + N + i, mask=inside, other=0).to(tl.float32)
    wide = gate.to(tl.float32)
    gate = (wide * tl.sigmoid(wide)).to(gate.dtype).to(tl.float32)
    tl.store(y + row * N + i, gate * up, mask=inside)


def add_norm(x, y, norm):
    """x + y, and its RMSNorm by the module `norm`; x, y (..., dim). x may be overwritten."""
    if not in_kernels(x):
        x = x + y
        return x, norm(x)
    x, y, n = x.contiguous(), y.contiguous(), x.size(-1)
    normed = torch.empty_like(x)
    add_norm_kernel[(x.numel() // n,)](x, y, norm.weight, normed, norm.eps, N=n,
                                       N_PAD=power_of_2(n), num_warps=8 if n > 2048 else 4)
    return x, normed


def silu_product(x):
    """silu(gate) * up, where x (..., 2 N) is gate, then up: (..., N)."""
    if not in_kernels(x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    x, n, tile = x.contiguous(), x.size(-1) // 2, 1024
    y = x.new_empty(*x.shape[:-1], n)
    silu_product_kernel[(y.numel() // n, triton.cdiv(n, tile))](x, y, n, TILE=tile)
    return y


# ------------------------------------------------------------------------------------ one step

def one_weight(*linears):
    """The weights of linear layers as one tensor, whose parts they become: there is no copy left.

    Where they are such parts already, the tensor that they are parts of.
    """
    weights = [linear.weight.detach() for linear in linears]
    first, sizes = weights[0], [len(w) for w in weights]
    rows = sum(sizes)
    behind = first.untyped_storage().nbytes() // first.itemsize - first.storage_offset()
    if first.is_contiguous() and behind >= rows * first.size(1):
        whole = first.as_strided((rows, first.size(1)), first.stride())
        if all(part.is_set_to(w) for part, w in zip(whole.split(sizes), weights, strict=True)):
            return whole
    whole = torch.cat(weights)
    for linear, part in zip(linears, whole.split(sizes), strict=True):
        linear.weight = torch.nn.Parameter(part, requires_grad=linear.weight.requires_grad)
    return whole


class ShortStep:
    """A model's forward pass for one token of every sequence, with a PagedCache.

    Results are those of `Transformer.hidden`, but for rounding. The model's weights for queries,
    keys and values, and for both halves of the MLP, become parts of one tensor each.
    """

    def __init__(self, model):
        self.model, self.decide = model, of_model(model.config).decide
        self.qkv = [one_weight(a.q_proj, a.k_proj, a.v_proj)
                    for a in (layer.self_attn for layer in model.layers)]
        self.gate_up = [one_weight(layer.mlp.gate_proj, layer.mlp.up_proj)
                        for layer in model.layers]

    @torch.no_grad()
    def logits(self, tokens, cache, gain=None):
        """The scores (B, vocab) of what follows tokens (B, 1). gain: as in Transformer.hidden."""
        model, layers = self.model, self.model.layers
        decides = gain is None and model.config.dmc
        x = model.embed_tokens(tokens)
        h = layers[0].input_layernorm(x)
        for i, layer in enumerate(layers):
            y = self.attend(i, F.linear(h, self.qkv[i]), cache, decides)
            x, h = add_norm(x, layer.self_attn.o_proj(y), layer.post_attention_layernorm)
            y = layer.mlp.down_proj(silu_product(F.linear(h, self.gate_up[i])))
            last = i + 1 == len(layers)
            x, h = add_norm(x, y, model.norm if last else layers[i + 1].input_layernorm)
        return model.lm_head(h[:, -1])

    def attend(self, layer, qkv, cache, decides):
        """Attention of a layer, from queries, keys and values (B, 1, ...) to y (B, 1, H D)."""
        config = self.model.config
        H, G = config.n_head, config.n_kv_head
        heads = qkv.unflatten(-1, (H + 2 * G, config.head_dim)).transpose(1, 2)
        q, k, v = heads.split((H, G, G), dim=1)
        if decides and self.decide is dmc.decide:
            y = cache.attend_deciding(layer, q, k, v)
        elif decides:
            alpha, _, omega = self.decide(q, k, config, position=cache.seen[layer])
            y = cache.attend(layer, q, k, v, alpha, omega)
        else:
            y = cache.attend(layer, q, k, v)
        return y.transpose(1, 2).flatten(2)
