"""Dynamic Memory Compression, fast: `accumulate`, `attend` and `Cache` of dmc.py with the same signatures and results.

`Transformer(config, ops=dmc_fast)` is all that changes. On a GPU the work is done by Triton kernels and stock flash attention;
without one, by the PyTorch operations that fit it best. Names and shapes are those of the glossary in dmc.py. With
TRITON_INTERPRET=1 in the environment before the first import, the kernels run on the CPU, slowly, for tests.
"""

from __future__ import annotations  # so that kernels can be read, not run, where Triton is missing

import math
import os

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend

import dmc
from dmc import wide

try:
    import triton
    import triton.language as tl
except ImportError:                          # no Triton for this machine: everything below but the kernels works
    triton = None

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def uses_kernels(device):
    return triton is not None and (torch.device(device or "cpu").type == "cuda" or INTERPRETED)


def jit(f):
    return triton.jit(f) if triton else f


# ------------------------------------------------------------------------------------------------ attend

LOWEST = -1e4       # stands for log 0: exp of it is 0, and unlike inf it survives a multiplication by 0
aten = torch.ops.aten


def stock(q, k, v):
    """The flash attention that PyTorch would choose for these by itself: "cpu", "flash" or "cudnn"; None: it has none."""
    if not q.is_cuda:
        return "cpu"
    choice = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    return {SDPBackend.FLASH_ATTENTION.value: "flash", SDPBackend.CUDNN_ATTENTION.value: "cudnn"}.get(choice)


def flash(kind, q, k, v, scale):
    """Stock causal attention: y, log-sum-exp (B, H, T), and the tensors and the sizes that its backward pass asks for."""
    if kind == "cpu":
        return *aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale), (), ()
    if kind == "flash":
        results = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)
    else:
        results = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, scale=scale)
    y, lse, starts_q, starts_k, longest_q, longest_k, seed, offset, _ = results
    return y, lse.view(q.shape[:3]), (starts_q, starts_k, seed, offset), (longest_q, longest_k)


def flash_backward(kind, grad, q, k, v, y, lse, tensors, sizes, scale):
    """The gradients of q, k, v."""
    if kind == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, y, lse, 0.0, True, scale=scale)
    starts_q, starts_k, *random = tensors
    if kind == "flash":
        return aten._scaled_dot_product_flash_attention_backward(grad, q, k, v, y, lse, starts_q, starts_k, *sizes, 0.0, True,
                                                                 *random, scale=scale)
    return aten._scaled_dot_product_cudnn_attention_backward(grad, q, k, v, y, lse.unsqueeze(-1), *random, None, starts_q,
                                                             starts_k, *sizes, 0.0, True, scale=scale)


def grouped(x, G):
    """(B, H, ...) -> (B, G, H / G, ...), to stand beside a key-value head of its group."""
    return x.unflatten(1, (G, -1))


def power_of_2(n):
    return 1 << max(0, n - 1).bit_length()


def dense(x):
    """x, or a copy of it in which no element lies apart and the last dimension is contiguous."""
    return x if x.is_contiguous() or x.transpose(1, 2).is_contiguous() else x.contiguous()


@jit
def mask_kernel(q, k, keep, q_masked, k_masked, diagonal, T, G, scale, q_b, q_h, q_t, k_b, k_h, k_t,
                R: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr):
    """Copies of q and k whose control channels carry the mask, and the scores of the diagonal, for TILE tokens of one group.

    Floor: q and k read and written once, 4 D (R + 1) bytes per token and key-value head in bf16. The query heads of a group
    are taken one after the other, beside a key that is read once.
    """
    row = tl.program_id(0).to(tl.int64)
    t, d = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.arange(0, D_PAD)
    at, inside = t[:, None], (t < T)[:, None] & (d < D)[None, :]
    b, g = row // G, row % G
    bias = tl.load(keep + row * T + t, mask=t < T, other=0)
    k_at = b * k_b + g * k_h + at * k_t + d[None, :]
    key = tl.load(k + k_at, mask=inside, other=0)
    for r in range(R):
        q_at = b * q_b + (g * R + r) * q_h + at * q_t + d[None, :]
        query = tl.load(q + q_at, mask=inside, other=0)
        score = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * scale
        tl.store(diagonal + (row * R + r) * T + t, score, mask=t < T)
        tl.store(q_masked + q_at, tl.where(d[None, :] == 0, 8.0, query), mask=inside)
    tl.store(k_masked + k_at, tl.where(d[None, :] == 0, (bias / (8 * scale))[:, None], key), mask=inside)


@jit
def restore_kernel(y, lse, v, keep, diagonal, T, G, y_b, y_h, y_t, v_b, v_h, v_t,
                   R: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr):
    """Into y and lse, in place, what the mask took from the diagonal, for TILE tokens of one group.

    Floor: v read, y read and written once, 2 D (2 R + 1) bytes per token and key-value head in bf16. Rows from which nothing
    was taken, because the next token appended, are not touched.
    """
    row = tl.program_id(0).to(tl.int64)
    t, d = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.arange(0, D_PAD)
    at, inside = t[:, None], (t < T)[:, None] & (d < D)[None, :]
    b, g = row // G, row % G
    taken = 1 - tl.exp(tl.load(keep + row * T + t, mask=t < T, other=0))
    value = tl.load(v + b * v_b + g * v_h + at * v_t + d[None, :], mask=inside & (taken > 0)[:, None], other=0).to(tl.float32)
    for r in range(R):
        entry = (row * R + r) * T + t
        past = tl.load(lse + entry, mask=t < T, other=0)
        score = tl.load(diagonal + entry, mask=t < T, other=0)
        highest = tl.maximum(past, tl.where(taken > 0, score, past))
        total = tl.exp(past - highest) + taken * tl.exp(tl.minimum(score - highest, 0.0))
        merged_lse = highest + tl.log(total)
        weight = taken * tl.exp(tl.minimum(score - merged_lse, 0.0))
        y_at = b * y_b + (g * R + r) * y_h + at * y_t + d[None, :]
        changed = inside & (weight > 0)[:, None]
        old = tl.load(y + y_at, mask=changed, other=0).to(tl.float32)
        tl.store(y + y_at, old + weight[:, None] * (value - old), mask=changed)
        tl.store(lse + entry, merged_lse, mask=t < T)


@jit
def mask_gradient_kernel(grad, q, k, v, y, lse, keep, diagonal, dq, dk, dv, dkeep, T, G, scale,
                         grad_b, grad_h, grad_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, y_b, y_h, y_t,
                         dq_b, dq_h, dq_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
                         R: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr):
    """The share in dq, dk, dv, in place, of what the diagonal got back, and keep's gradient, for TILE tokens of one group.

    Floor: grad, q, y, k, v read, dq, dk, dv read and written once: 2 D (5 R + 6) bytes per token and key-value head in bf16.
    What a group's query heads give to their key and value is summed in registers.
    """
    row = tl.program_id(0).to(tl.int64)
    t, d = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.arange(0, D_PAD)
    at, inside = t[:, None], (t < T)[:, None] & (d < D)[None, :]
    b, g = row // G, row % G
    left = tl.exp(tl.load(keep + row * T + t, mask=t < T, other=0))
    key = tl.load(k + b * k_b + g * k_h + at * k_t + d[None, :], mask=inside, other=0).to(tl.float32)
    value = tl.load(v + b * v_b + g * v_h + at * v_t + d[None, :], mask=inside, other=0).to(tl.float32)
    dk_at, dv_at = dk + b * dk_b + g * dk_h + at * dk_t + d[None, :], dv + b * dv_b + g * dv_h + at * dv_t + d[None, :]
    key_sum = tl.load(dk_at, mask=inside, other=0).to(tl.float32)
    value_sum = tl.load(dv_at, mask=inside, other=0).to(tl.float32)
    to_keep = tl.sum(tl.where(d[None, :] == 0, key_sum, 0.0), 1) / (8 * scale)
    for r in range(R):
        h, entry = g * R + r, (row * R + r) * T + t
        share = tl.exp(tl.load(diagonal + entry, mask=t < T, other=0) - tl.load(lse + entry, mask=t < T, other=0))
        slope = tl.load(grad + b * grad_b + h * grad_h + at * grad_t + d[None, :], mask=inside, other=0).to(tl.float32)
        out = tl.load(y + b * y_b + h * y_h + at * y_t + d[None, :], mask=inside, other=0).to(tl.float32)
        query = tl.load(q + b * q_b + h * q_h + at * q_t + d[None, :], mask=inside, other=0).to(tl.float32)
        to_score = tl.sum(slope * (value - out), 1) * share
        to_keep -= to_score * left
        weight, to_score = share * (1 - left), to_score * (1 - left) * scale
        dq_at = dq + b * dq_b + h * dq_h + at * dq_t + d[None, :]
        to_query = tl.load(dq_at, mask=inside, other=0).to(tl.float32) + to_score[:, None] * key
        tl.store(dq_at, tl.where(d[None, :] == 0, 0.0, to_query), mask=inside)
        key_sum += to_score[:, None] * query
        value_sum += weight[:, None] * slope
    tl.store(dk_at, tl.where(d[None, :] == 0, 0.0, key_sum), mask=inside)
    tl.store(dv_at, value_sum, mask=inside)
    tl.store(dkeep + row * T + t, to_keep, mask=t < T)


def by_group(q, k):
    """The grid and the sizes of the three kernels above: one program per key-value head and tile of tokens."""
    (B, H, T, D), G = q.shape, k.size(1)
    return (B * G, triton.cdiv(T, 16)), dict(R=H // G, D=D, D_PAD=power_of_2(D), TILE=16)


def masked_in_kernel(q, k, keep, scale):
    q, k = dense(q), dense(k)
    q_masked, k_masked, diagonal = torch.empty_like(q), torch.empty_like(k), q.new_empty(q.shape[:3], dtype=torch.float32)
    grid, sizes = by_group(q, k)
    mask_kernel[grid](q, k, keep, q_masked, k_masked, diagonal, q.size(2), k.size(1), scale, *q.stride()[:3], *k.stride()[:3],
                      **sizes)
    return q_masked, k_masked, diagonal


def restore_in_kernel(y, lse, v, keep, diagonal):
    grid, sizes = by_group(y, v)
    restore_kernel[grid](y, lse, v, keep, diagonal, y.size(2), v.size(1), *y.stride()[:3], *v.stride()[:3], **sizes)


def mask_gradient_in_kernel(grad, q, k, v, y, lse, keep, diagonal, dq, dk, dv, scale):
    """Returns keep's gradient; dq, dk and dv change in place."""
    grid, sizes = by_group(q, k)
    strides = [stride for x in (grad, q, k, v, y, dq, dk, dv) for stride in x.stride()[:3]]
    dkeep = torch.empty_like(keep)
    mask_gradient_kernel[grid](grad, q, k, v, y, lse, keep, diagonal, dq, dk, dv, dkeep, q.size(2), k.size(1), scale, *strides,
                               **sizes)
    return dkeep


class MaskedFlash(torch.autograd.Function):
    """The mask of appendix F through stock flash attention, without a T x T tensor. Channel 0 of q and k is 0 on entry.

    The mask adds to the score of query i on key j < i what depends on j alone: keep_{j+1}. The control channel, which nobody
    needs any more, carries it: 8 in the query (exact in bf16) times keep / 8 in the key. So stock causal attention
    does all but one thing: it masks the diagonal as well, where the mask is 0. What it took from there, the part
    alpha_{i+1} = 1 - exp(keep_{i+1}) of that weight, is given back by means of the log-sum-exp, all of it positive.

    The stock backward pass, given the *final* output and log-sum-exp, yields its share of every gradient. keep's arrives in
    channel 0 of the keys, with the precision of k, the diagonal's included, which is taken off again.
    """

    @staticmethod
    def forward(ctx, q, k, v, keep, scale, kind):
        keep_next = F.pad(keep[..., 1:], (0, 1)).clamp_(min=LOWEST)         # what token t + 1 leaves to t
        ctx.kernels = uses_kernels(q.device) and q.dtype != torch.float64
        if ctx.kernels:
            q, k, diagonal = masked_in_kernel(q, k, keep_next, scale)
        else:
            diagonal = wide((grouped(q, k.size(1)) * k[:, :, None]).sum(-1)).flatten(1, 2) * scale        # (B, H, T)
            q, k = q.clone(), k.clone()
            q[..., 0], k[..., 0] = 8, keep_next / (8 * scale)
        v = dense(v)
        y, lse, tensors, sizes = flash(kind, q, k, v, scale)
        lse = lse.contiguous()
        if ctx.kernels:
            restore_in_kernel(y, lse, v, keep_next, diagonal)
        else:
            taken = -torch.expm1(keep_next)[:, :, None]
            lse = torch.logaddexp(lse, (grouped(diagonal, k.size(1)) + taken.log()).flatten(1, 2))
            weight = taken * grouped(diagonal - lse, k.size(1)).exp_()
            grouped(y, k.size(1)).lerp_(v[:, :, None], weight[..., None].to(y.dtype))
        ctx.save_for_backward(q, k, v, y, lse, keep_next, diagonal, *tensors)
        ctx.kind, ctx.sizes, ctx.scale, ctx.keep_dtype = kind, sizes, scale, keep.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (q, k, v, y, lse, keep_next, diagonal, *tensors), scale = ctx.saved_tensors, ctx.scale
        grad = dense(grad)
        dq, dk, dv = flash_backward(ctx.kind, grad, q, k, v, y, lse, tensors, ctx.sizes, scale)
        if ctx.kernels:
            dkeep = mask_gradient_in_kernel(grad, q, k, v, y, lse, keep_next, diagonal, dq, dk, dv, scale)
        else:
            G, grad = k.size(1), grouped(grad, k.size(1))
            left, share = keep_next.exp()[:, :, None], grouped(diagonal - lse, G).exp_()            # (B, G, 1 | R, T)
            to_score = share * (v[:, :, None] - grouped(y, G)).mul_(grad).sum(-1)
            dkeep = dk[..., 0] / (8 * scale) - (to_score * left).sum(2)
            to_score, weight = ((x * (1 - left))[..., None].to(q.dtype) for x in (to_score * scale, share))
            grouped(dq, G).addcmul_(to_score, k[:, :, None])
            for r in range(grad.size(2)):
                dk.addcmul_(to_score[:, :, r], grouped(q, G)[:, :, r])
                dv.addcmul_(weight[:, :, r], grad[:, :, r])
            dq[..., 0] = dk[..., 0] = 0                          # what arrived there was the mask's
        return dq, dk, dv, F.pad(dkeep[..., :-1], (1, 0)).to(ctx.keep_dtype), None, None


def attend(q, k, v, keep=None):
    """Causal attention under the mask of appendix F: dmc.attend.

    The control channel carries the mask, so it must be free: q[..., 0] = k[..., 0] = 0, as the model has it. The CPU looks,
    and puts a free channel in front where it is not; a GPU takes it for granted, because a look would wait for it.
    """
    if keep is None or q.size(2) == 0:
        return dmc.attend(q, k, v, keep)
    kind, scale = stock(q, k, v), 1 / math.sqrt(q.size(-1))
    if kind is None:                                             # on a GPU: fp32, or an odd head size
        return dmc.attend(q, k, v, keep)
    if kind == "cpu" and (q[..., 0].any() or k[..., 0].any()):
        q, k, v = (F.pad(x, (1, 0)) for x in (q, k, v))          # a channel that is free
        return MaskedFlash.apply(q, k, v, keep, scale, kind)[..., 1:]
    return MaskedFlash.apply(q, k, v, keep, scale, kind)


# ------------------------------------------------------------------------------------------------ accumulate

def windows(x, W):
    """(B, G, T) -> (W, B, G, T): at [m, ..., t] what token t - W + 1 + m has, 0 before the sequence's start."""
    return F.pad(x, (W - 1, 0)).unfold(-1, x.size(-1), 1).movedim(-2, 0)


def coefficients(alpha, omega, W):
    """The band of Eq. 9: fade, share (W, B, G, T). share[m, t] is the part of token t - W + 1 + m in the average at t.

    fade[m, t] = alpha_{i+1} ... alpha_t with i = t - W + 1 + m; share = fade * omega_i / z_t. Also 1 / z_t, (B, G, T).
    """
    alphas = windows(alpha, W)
    fade = alpha.new_ones(alphas.shape)
    for m in reversed(range(W - 1)):
        torch.mul(fade[m + 1], alphas[m + 1], out=fade[m])
    share = fade * windows(omega, W)
    inverse_z = share.sum(0).reciprocal()
    return fade, share.mul_(inverse_z), inverse_z


def skewed(band, W):
    """The diagonals of the band in (..., n, n + W - 1): a view (..., n, W) whose row t starts at column t."""
    *sizes, n, columns = band.shape
    return band.as_strided((*sizes, n, W), (*band.stride()[:-2], columns + 1, 1))


def banded(share, n):
    """The coefficients share (W, B, G, T) as one banded matrix per tile of n tokens, (tiles, n, n + W - 1)."""
    W, T = share.size(0), share.size(-1)
    share = F.pad(share.movedim(0, -1), (0, 0, 0, -T % n)).reshape(-1, n, W)
    band = share.new_zeros(len(share), n, n + W - 1)
    skewed(band, W).copy_(share)
    return band


def tiled(k, v, W, n, dtype):
    """k and v (B, G, T, D) side by side, in tiles of n tokens with the W - 1 rows before them: (tiles, n + W - 1, 2 D).

    One copy and no more: tiles overlap in memory. What lies before a head's first token is another head's, and has
    coefficient 0; so do the zeros that fill up its last tile.
    """
    B, G, T, D = k.shape
    tokens = T + -T % n
    rows = torch.zeros(W - 1 + B * G * tokens, 2 * D, dtype=dtype, device=k.device)
    heads = rows[W - 1:].view(B, G, tokens, 2 * D)
    heads[:, :, :T, :D], heads[:, :, :T, D:] = k, v
    return rows.as_strided((B * G * tokens // n, n + W - 1, 2 * D), (n * 2 * D, 2 * D, 1))


def split_heads(x, sizes):
    """(tiles, n, 2 D) -> two tensors of the sizes (B, G, T, D)."""
    B, G, T, D = sizes
    return x.view(B, G, -1, 2 * D)[:, :, :T].split(D, dim=-1)


class BandedAverage(torch.autograd.Function):
    """The windowed average as matrix products: each tile of n tokens is a banded n x (n + W - 1) matrix times its tokens.

    The coefficients are products of alphas, W of them per token and so few beside D channels; nothing is divided by alpha.
    """

    TILE = 32

    @staticmethod
    def forward(ctx, k, v, alpha, omega, W):
        n, dtype = max(BandedAverage.TILE, W), torch.promote_types(wide(k).dtype, wide(omega).dtype)
        fade, share, inverse_z = coefficients(alpha.to(dtype), omega.to(dtype), W)
        band, tokens = banded(share, n), tiled(k, v, W, n, dtype)
        ctx.save_for_backward(alpha, omega, fade, share, inverse_z, band, tokens)
        ctx.sizes, ctx.dtypes = k.shape, (k.dtype, v.dtype)
        return tuple(x.to(d) for x, d in zip(split_heads(band @ tokens, k.shape), ctx.dtypes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        alpha, omega, fade, share, inverse_z, band, tokens = ctx.saved_tensors
        W, before, n = share.size(0), share.size(0) - 1, band.size(1)
        grad = tiled(*grads, 1, n, band.dtype)
        dx = band[:, :, before:].mT @ grad                                  # of each tile's own tokens
        if before:                                                          # and of those in the tile before
            dx[:-1, n - before:] += (band[1:, :before, :before].mT @ grad[1:, :before])
        dkv = (x.to(d) for x, d in zip(split_heads(dx, ctx.sizes), ctx.dtypes, strict=True))
        dshare = skewed(grad @ tokens.mT, W).reshape(*alpha.shape[:2], -1, W)[:, :, :alpha.size(-1)].movedim(-1, 0)
        dsum = (dshare - (dshare * share).sum(0)).mul_(inverse_z)           # of fade * omega, before it was divided by z
        return *dkv, *coefficient_gradients(dsum, fade, alpha, omega), None


def gathered(x):
    """The transpose of `windows`: (W, B, G, T) -> (B, G, T), at every token the sum of what its windows hold for it."""
    W = x.size(0)
    x = F.pad(x, (0, W - 1))                                                # zeros between a row's end and the next one's start
    return x.as_strided(x.shape, (x.stride(0) - 1, *x.stride()[1:])).sum(0)[..., W - 1:]


def coefficient_gradients(dsum, fade, alpha, omega):
    """dsum (W, B, G, T): the gradient of fade * omega. Returns those of alpha and omega, (B, G, T)."""
    W = len(fade)
    past, alphas = dsum * windows(omega.to(fade.dtype), W), windows(alpha.to(fade.dtype), W)
    dfade = torch.zeros_like(fade)                                          # [m]: of everything older than token m
    for m in range(W - 1):
        torch.addcmul(past[m], dfade[m], alphas[m], out=dfade[m + 1])
    return gathered(dfade * fade).to(alpha.dtype), gathered(dsum * fade).to(omega.dtype)


@jit
def average_kernel(k, v, alpha, omega, k_mean, v_mean, inverse_z, T, G, stride_b, stride_g, stride_t,
                   D: tl.constexpr, D_PAD: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr):
    """The windowed average of Eq. 9 for TILE tokens of one head, all channels.

    Floor: k and v read once, both averages written once: 8 D bytes per token and head in bf16. A tile reads its tokens W
    times, but from HBM only once: the shifted copies, and the W - 1 tokens before the tile, come from the caches. The
    coefficient is a running product of alphas in a register, so nothing is divided by alpha, and tokens that an append has
    cut off (coefficient 0) are not read at all.
    """
    row = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * TILE + tl.arange(0, TILE)
    d = tl.arange(0, D_PAD)
    start = (row // G) * stride_b + (row % G) * stride_g
    fade, z = tl.full((TILE,), 1.0, tl.float32), tl.zeros((TILE,), tl.float32)
    k_sum, v_sum = tl.zeros((TILE, D_PAD), tl.float32), tl.zeros((TILE, D_PAD), tl.float32)
    for n in range(W):
        i = t - n                                                # never before the start of the sequence
        inside = (i >= 0) & (i < T)
        weight = fade * tl.load(omega + row * T + i, mask=inside, other=0)
        fade *= tl.load(alpha + row * T + i, mask=inside, other=0)
        z += weight
        live = (weight != 0)[:, None] & (d < D)[None, :]
        at = start + i[:, None] * stride_t + d[None, :]
        k_sum += weight[:, None] * tl.load(k + at, mask=live, other=0).to(tl.float32)
        v_sum += weight[:, None] * tl.load(v + at, mask=live, other=0).to(tl.float32)
    z = 1 / tl.where(t < T, z, 1.0)
    out = (row * T + t)[:, None] * D + d[None, :]
    written = (t < T)[:, None] & (d < D)[None, :]
    tl.store(k_mean + out, k_sum * z[:, None], mask=written)
    tl.store(v_mean + out, v_sum * z[:, None], mask=written)
    tl.store(inverse_z + row * T + t, z, mask=t < T)


@jit
def share_gradient_kernel(k, v, alpha, omega, inverse_z, dk_mean, dv_mean, dshare, mean_dshare, T, G,
                          stride_b, stride_g, stride_t,
                          D: tl.constexpr, D_PAD: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr):
    """The gradient of each coefficient, dshare[n, t] = dk~_t . k_{t-n} + dv~_t . v_{t-n}, and its mean at t by the shares.

    Floor: dk~, dv~, k, v read once: 8 D bytes per token and head in bf16, and 4 W written. Laid out as the forward kernel;
    dshare is (rows, W, T), so that neighbouring tokens are neighbours in memory.
    """
    row = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * TILE + tl.arange(0, TILE)
    d = tl.arange(0, D_PAD)
    start = (row // G) * stride_b + (row % G) * stride_g
    mine = (row * T + t)[:, None] * D + d[None, :]
    written = (t < T)[:, None] & (d < D)[None, :]
    dk = tl.load(dk_mean + mine, mask=written, other=0).to(tl.float32)
    dv = tl.load(dv_mean + mine, mask=written, other=0).to(tl.float32)
    fade, mean = tl.load(inverse_z + row * T + t, mask=t < T, other=0), tl.zeros((TILE,), tl.float32)
    for n in range(W):
        i = t - n
        inside = (i >= 0) & (i < T)
        at = start + i[:, None] * stride_t + d[None, :]
        read = inside[:, None] & (d < D)[None, :]
        product = tl.sum(dk * tl.load(k + at, mask=read, other=0).to(tl.float32)
                         + dv * tl.load(v + at, mask=read, other=0).to(tl.float32), 1)
        tl.store(dshare + (row * W + n) * T + t, product, mask=t < T)
        mean += fade * tl.load(omega + row * T + i, mask=inside, other=0) * product
        fade *= tl.load(alpha + row * T + i, mask=inside, other=0)
    tl.store(mean_dshare + row * T + t, mean, mask=t < T)


@jit
def spread_kernel(alpha, omega, inverse_z, dk_mean, dv_mean, dk, dv, T,
                  D: tl.constexpr, D_PAD: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr):
    """The transposed band: dk_i = omega_i sum_n alpha_{i+1} ... alpha_{i+n} dk~_{i+n} / z_{i+n}, likewise dv.

    Floor: dk~, dv~ read once, dk, dv written once: 8 D bytes per token and head in bf16. The forward kernel mirrored: the
    halo lies after the tile, and the sum ends where the sequence does.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    d = tl.arange(0, D_PAD)
    fade = tl.load(omega + row * T + i, mask=i < T, other=0)
    k_sum, v_sum = tl.zeros((TILE, D_PAD), tl.float32), tl.zeros((TILE, D_PAD), tl.float32)
    for n in range(W):
        t = i + n
        weight = fade * tl.load(inverse_z + row * T + t, mask=t < T, other=0)
        fade *= tl.load(alpha + row * T + t + 1, mask=t + 1 < T, other=0)
        live = (weight != 0)[:, None] & (d < D)[None, :]
        at = (row * T + t)[:, None] * D + d[None, :]
        k_sum += weight[:, None] * tl.load(dk_mean + at, mask=live, other=0).to(tl.float32)
        v_sum += weight[:, None] * tl.load(dv_mean + at, mask=live, other=0).to(tl.float32)
    out = (row * T + i)[:, None] * D + d[None, :]
    written = (i < T)[:, None] & (d < D)[None, :]
    tl.store(dk + out, k_sum, mask=written)
    tl.store(dv + out, v_sum, mask=written)


@jit
def decision_gradient_kernel(alpha, omega, inverse_z, dshare, mean_dshare, dalpha, domega, T,
                             W: tl.constexpr, TILE: tl.constexpr):
    """The gradients of alpha and omega for TILE tokens of one head, from those of the coefficients.

    alpha_j stands in the coefficients of all pairs i < j <= t within the window: the inner loop sums over i with the product
    of the alphas between i and j, the outer one over t with those between j and t, so alpha_j itself is never divided out.
    Floor: 4 W + 16 bytes read, 8 written per token and head. W^2 / 2 steps, but on single numbers where the other kernels
    have D channels; everything read twice comes from the caches.
    """
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    to_alpha, to_omega = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    late = tl.full((TILE,), 1.0, tl.float32)                     # alpha_{j+1} ... alpha_t
    for n in range(W):
        t = j + n
        inside = t < T
        mean = tl.load(mean_dshare + row * T + t, mask=inside, other=0)
        outer = late * tl.load(inverse_z + row * T + t, mask=inside, other=0)
        to_omega += outer * (tl.load(dshare + (row * W + n) * T + t, mask=inside, other=0) - mean)
        early = tl.full((TILE,), 1.0, tl.float32)                # alpha_{i+1} ... alpha_{j-1}
        for m in range(n + 1, W):
            i = t - m
            pair = inside & (i >= 0)
            slope = tl.load(dshare + (row * W + m) * T + t, mask=pair, other=0) - mean
            to_alpha += outer * early * tl.load(omega + row * T + i, mask=pair, other=0) * slope
            early *= tl.load(alpha + row * T + i, mask=pair, other=0)
        late *= tl.load(alpha + row * T + t + 1, mask=t + 1 < T, other=0)
    tl.store(dalpha + row * T + j, to_alpha, mask=j < T)
    tl.store(domega + row * T + j, to_omega, mask=j < T)


@jit
def join_spans(fade, sums, later_fade, later_sums):
    return fade * later_fade, later_fade * sums + later_sums


@jit
def segment_average_kernel(x, alpha, omega, mean, T, G, stride_b, stride_g, stride_t,
                           D: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr):
    """The average of Eq. 9 over the whole segment, any length, for SLICE channels of one head's keys or values.

    Floor: x read once, its average written once: 4 D bytes per token and head in bf16. The recurrence is a scan: within a tile
    in registers, from tile to tile by a carried sum; heads and slices of channels are what runs in parallel.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    start = (row // G) * stride_b + (row % G) * stride_g
    carried, carried_z = tl.zeros((SLICE,), tl.float32), 0.0
    for first in range(0, T, TILE):
        t = first + tl.arange(0, TILE)
        read = (t < T)[:, None] & (d < D)[None, :]
        a = tl.load(alpha + row * T + t, mask=t < T, other=1)
        weight = tl.load(omega + row * T + t, mask=t < T, other=0)
        new = tl.load(x + start + t[:, None] * stride_t + d[None, :], mask=read, other=0).to(tl.float32)
        fade, z = tl.associative_scan((a, weight), 0, join_spans)
        every_fade, sums = tl.associative_scan((tl.broadcast_to(a[:, None], (TILE, SLICE)), weight[:, None] * new), 0,
                                               join_spans)
        sums += every_fade * carried[None, :]
        z += fade * carried_z
        tl.store(mean + (row * T + t)[:, None] * D + d[None, :], sums / z[:, None], mask=read)
        last = tl.arange(0, TILE) == TILE - 1
        carried = tl.sum(tl.where(last[:, None], sums, 0.0), 0)
        carried_z = tl.sum(tl.where(last, z, 0.0), 0)


class WindowedAverage(torch.autograd.Function):
    """The windowed average and its gradients by the kernels above; fp32 inside, whatever k and v are."""

    @staticmethod
    def layout(k, W):
        (B, G, T, D), TILE = k.shape, 32
        return (B * G, triton.cdiv(T, TILE)), dict(D=D, D_PAD=power_of_2(D), W=W, TILE=TILE)

    @staticmethod
    def forward(ctx, k, v, alpha, omega, W):
        if k.stride() != v.stride() or k.stride(-1) != 1:
            k, v = k.contiguous(), v.contiguous()
        ctx.dtypes = alpha.dtype, omega.dtype
        alpha, omega = (x.to(torch.float32).contiguous() for x in (alpha, omega))
        means = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v)]
        inverse_z = torch.empty_like(alpha)
        grid, sizes = WindowedAverage.layout(k, W)
        average_kernel[grid](k, v, alpha, omega, *means, inverse_z, k.size(2), k.size(1), *k.stride()[:3], **sizes)
        ctx.save_for_backward(k, v, alpha, omega, inverse_z)
        ctx.W = W
        return tuple(means)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        k, v, alpha, omega, inverse_z = ctx.saved_tensors
        grads = [grad.contiguous() for grad in grads]
        (B, G, T, _), W = k.shape, ctx.W
        grid, sizes = WindowedAverage.layout(k, W)
        dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        dshare = alpha.new_empty(B * G, W, T)
        dalpha, domega, mean_dshare = (torch.empty_like(alpha) for _ in range(3))
        share_gradient_kernel[grid](k, v, alpha, omega, inverse_z, *grads, dshare, mean_dshare, T, G, *k.stride()[:3], **sizes)
        spread_kernel[grid](alpha, omega, inverse_z, *grads, dk, dv, T, **sizes)
        decision_gradient_kernel[(B * G, triton.cdiv(T, 256))](alpha, omega, inverse_z, dshare, mean_dshare, dalpha, domega, T,
                                                               W=W, TILE=256)
        return dk, dv, dalpha.to(ctx.dtypes[0]), domega.to(ctx.dtypes[1]), None


def segment_average(x, alpha, omega):
    """x (B, G, T, D) -> the averages over whole segments; no gradient."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    (B, G, T, D), mean = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    SLICE = min(32, power_of_2(D))
    segment_average_kernel[(B * G, triton.cdiv(D, SLICE))](x, alpha, omega, mean, T, G, *x.stride()[:3],
                                                           D=D, SLICE=SLICE, TILE=64)
    return mean


WIDEST_BAND = 32    # on the CPU; beyond it, and without a window, the doubling spans of dmc.accumulate are faster


def accumulate(k, v, alpha, omega, window=None):
    """Eq. 9: dmc.accumulate."""
    W = k.size(2) if window is None else min(window, k.size(2))
    kernels = uses_kernels(k.device) and k.dtype == v.dtype != torch.float64 and k.shape == v.shape and W > 0
    if kernels and window is not None:
        return WindowedAverage.apply(k, v, alpha, omega, W)
    if kernels and not (torch.is_grad_enabled() and any(x.requires_grad for x in (k, v, alpha, omega))):
        alpha, omega = (x.to(torch.float32).contiguous() for x in (alpha, omega))
        return segment_average(k, alpha, omega), segment_average(v, alpha, omega)
    if 0 < W <= WIDEST_BAND and not k.is_cuda:
        return BandedAverage.apply(k, v, alpha, omega, W)
    return dmc.accumulate(k, v, alpha, omega, window)


# ------------------------------------------------------------------------------------------------ the paged cache

@jit
def turn(low, high, cos, sin, gain):
    """Rotary embedding of a vector's two halves, with the control channel scaled before and after."""
    low *= gain
    return (low * cos - high * sin) * gain, high * cos + low * sin


@jit
def merged(average, at, live, share, new, new_share):
    """Shares of the tokens in the open segment (the rows of `at`) plus the new token's, for half of the channels."""
    return tl.sum(share[:, None] * tl.load(average + at, mask=live, other=0).to(tl.float32), 0) + new_share * new


@jit
def step_kernel(q, k, v, alpha, omega, cos, sin, q_turned, pool_k, pool_v, table, lengths, ages, open_k, open_v, open_omega,
                free, left, failed, spare, G, pages_per_row, q_stride_b, q_stride_h, k_stride_b, k_stride_h, v_stride_b,
                v_stride_h, R: tl.constexpr, HALF: tl.constexpr, W: tl.constexpr, W_PAD: tl.constexpr, PAGE: tl.constexpr,
                WINDOWED: tl.constexpr, DECIDES: tl.constexpr, CONTROL_GAIN: tl.constexpr):
    """Algorithm 1 for one token of one (sequence, key-value head): append or merge, rotate, write the slot.

    One program per head, so the whole state of a head has one owner and only the free list is shared: a head that enters a
    new page takes one by one atomic. Floor, in bf16: 8 D (R + 2) bytes of vectors, and while a segment is open 4 D per
    token in the ring, where attention then reads 4 D per slot; so the step is short, and what matters is that it is one
    launch. The ring's new entry is taken from the arguments, never read back, and every thread has read the state before
    one of them writes it.
    """
    row = tl.program_id(0).to(tl.int64)
    b, g, h, D = row // G, row % G, tl.arange(0, HALF), 2 * HALF
    length, age = tl.load(lengths + row), tl.load(ages + row)
    if age >= 0:                                                 # a released row does nothing
        c, s = tl.load(cos + age * HALF + h), tl.load(sin + age * HALF + h)
        gain = tl.where(h == 0, CONTROL_GAIN, 1.0)
        for r in range(R):
            query = q + b * q_stride_b + (g * R + r) * q_stride_h + h
            low, high = turn(tl.load(query).to(tl.float32), tl.load(query + HALF).to(tl.float32), c, s, gain)
            tl.store(q_turned + (row * R + r) * D + h, low)
            tl.store(q_turned + (row * R + r) * D + HALF + h, high)
        key, value = k + b * k_stride_b + g * k_stride_h + h, v + b * v_stride_b + g * v_stride_h + h
        k_low, k_high = tl.load(key).to(tl.float32), tl.load(key + HALF).to(tl.float32)
        v_low, v_high = tl.load(value).to(tl.float32), tl.load(value + HALF).to(tl.float32)
        slot = length
        if DECIDES:
            merge = (tl.load(alpha + row) > 0.5) & (length > 0)
            slot = tl.where(merge, length - 1, length)
            weight, n, now = tl.load(omega + row), tl.arange(0, W_PAD), age % W
            kept = n < tl.where(merge, W, 0)                            # a new segment forgets the tokens before it
            if WINDOWED:
                kept = kept & (n != now)                         # the oldest of the last w tokens makes room
            old = tl.load(open_omega + row * W + n, mask=kept, other=0)
            z = tl.sum(old, 0) + weight
            at, live = (row * W + n)[:, None] * D + h[None, :], (old != 0)[:, None]
            mean_k_low = merged(open_k, at, live, old / z, k_low, weight / z)
            mean_k_high = merged(open_k + HALF, at, live, old / z, k_high, weight / z)
            mean_v_low = merged(open_v, at, live, old / z, v_low, weight / z)
            mean_v_high = merged(open_v + HALF, at, live, old / z, v_high, weight / z)
            tl.debug_barrier()
            if WINDOWED:
                tl.store(open_omega + row * W + n, tl.where(n == now, weight, old), mask=n < W)
            else:                                                # running sums: z and the averages themselves
                tl.store(open_omega + row, z)
                k_low, k_high, v_low, v_high = mean_k_low, mean_k_high, mean_v_low, mean_v_high
            entry = (row * W + now) * D + h
            tl.store(open_k + entry, k_low)
            tl.store(open_k + entry + HALF, k_high)
            tl.store(open_v + entry, v_low)
            tl.store(open_v + entry + HALF, v_high)
            k_low, k_high, v_low, v_high = mean_k_low, mean_k_high, mean_v_low, mean_v_high
        tl.debug_barrier()
        tl.store(lengths + row, slot + 1)
        tl.store(ages + row, age + 1)
        entry = table + row * pages_per_row + slot // PAGE
        fresh = (slot == length) & (slot % PAGE == 0)
        page = tl.load(entry, mask=fresh == 0, other=0)
        if fresh:
            last = tl.atomic_add(left, -1) - 1
            page = tl.load(free + tl.maximum(last, 0))
            if last < 0:                                         # the pool is exhausted: nobody's slot is overwritten
                page = spare
                tl.store(failed, 1)
            tl.store(entry, page)
        dtype = pool_k.dtype.element_ty
        low, high = turn(k_low.to(dtype).to(tl.float32), k_high.to(dtype).to(tl.float32), c, s, gain)
        out = (page.to(tl.int64) * PAGE + slot % PAGE) * D + h
        tl.store(pool_k + out, low)
        tl.store(pool_k + out + HALF, high)
        tl.store(pool_v + out, v_low)
        tl.store(pool_v + out + HALF, v_high)


@jit
def decode_kernel(q, pool_k, pool_v, table, lengths, order, out, out_lse, scale, pages_per_row, splits,
                  R: tl.constexpr, R_PAD: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Attention of one token over the slots of its head: one row of (sequence, key-value head), or a split of it.

    Floor: every slot in use read once, 4 D bytes each in bf16; nothing else counts. Rows have lengths of their own, so the
    longest start first and the short ones fill the gaps. The R query heads of a group are the rows of one matrix, so that
    they share what is loaded. A split with no slot writes 0 and a log-sum-exp of -inf.
    """
    row, split = tl.load(order + tl.program_id(0)).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + row)
    each = tl.cdiv(tl.cdiv(length, BLOCK), splits) * BLOCK
    first = split * each
    end = tl.minimum(first + each, length)
    r, d = tl.arange(0, R_PAD), tl.arange(0, D)
    queries = tl.load(q + (row * R + r)[:, None] * D + d[None, :], mask=(r < R)[:, None], other=0)
    highest, total = tl.full((R_PAD,), float("-inf"), tl.float32), tl.zeros((R_PAD,), tl.float32)
    y = tl.zeros((R_PAD, D), tl.float32)
    for start in range(first, end, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        used = slot < end
        page = tl.load(table + row * pages_per_row + slot // PAGE, mask=used, other=0).to(tl.int64)
        at = (page * PAGE + slot % PAGE)[:, None] * D + d[None, :]
        keys = tl.load(pool_k + at, mask=used[:, None], other=0)
        values = tl.load(pool_v + at, mask=used[:, None], other=0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (scale * 1.4426950408889634)     # in powers of 2
        scores = tl.where(used[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))     # finite: a block has at least one slot in use
        fade, weights = tl.exp2(highest - new_highest), tl.exp2(scores - new_highest[:, None])
        y = y * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * fade + tl.sum(weights, 1)
        highest = new_highest
    y = y / tl.where(total > 0, total, 1.0)[:, None]
    entry = (row * splits + split) * R + r
    tl.store(out + entry[:, None] * D + d[None, :], y, mask=(r < R)[:, None])
    tl.store(out_lse + entry, highest + tl.log2(tl.where(total > 0, total, 1.0)), mask=r < R)


@jit
def combine_kernel(part, part_lse, out, splits, R: tl.constexpr, D: tl.constexpr):
    """Join the splits of one row and query head, always in the same order, so that two runs give the same bits.

    Floor: 4 D bytes per split read and 2 D written in bf16; small, because only a small batch is split.
    """
    row, r, d = tl.program_id(0) // R, tl.program_id(0) % R, tl.arange(0, D)
    highest, total = float("-inf"), 0.0
    y = tl.zeros((D,), tl.float32)
    for split in range(splits):
        entry = (row * splits + split).to(tl.int64) * R + r
        lse = tl.load(part_lse + entry)
        new_highest = tl.maximum(highest, lse)
        shift = tl.where(new_highest > float("-inf"), new_highest, 0.0)     # -inf minus -inf is NaN
        fade, weight = tl.exp2(highest - shift), tl.exp2(lse - shift)
        y = y * fade + weight * tl.load(part + entry * D + d)
        total = total * fade + weight
        highest = new_highest
    tl.store(out + (row * R + r).to(tl.int64) * D + d, y / tl.where(total > 0, total, 1.0))


def decode(q, pool_k, pool_v, table, lengths, order, splits):
    """q (rows, R, D), rotated; pools (pages, page, D); table (rows, pages per row); lengths, order (rows,) -> y (rows, R, D).

    Row i attends over its lengths[i] slots; no slot, no output: 0. Rows are taken in the given order.
    """
    (rows, R, D), PAGE = q.shape, pool_k.size(1)
    part = q.new_empty(rows, splits, R, D, dtype=q.dtype if splits == 1 else torch.float32)
    lse = q.new_empty(rows, splits, R, dtype=torch.float32)
    decode_kernel[rows, splits](q, pool_k, pool_v, table, lengths, order, part, lse, 1 / math.sqrt(D), table.size(1), splits,
                                R=R, R_PAD=max(16, power_of_2(R)), D=D, PAGE=PAGE, BLOCK=64)
    if splits == 1:
        return part[:, 0]
    out = torch.empty_like(q)
    combine_kernel[(rows * R,)](part, lse, out, splits, R=R, D=D)
    return out


class Cache(dmc.Cache):
    """dmc.Cache, with the fast prefill. Where there are kernels for it, or `pages` are asked for, it is a PagedCache.

    Without kernels, the pages of every head have to be gathered at every step, which takes longer than padding does.
    """

    _accumulate, _attend = staticmethod(accumulate), staticmethod(attend)

    def __new__(cls, config, batch, device=None, dtype=torch.float32, page_size=16, pages=None):
        paged = cls is Cache and (uses_kernels(device) or pages is not None)
        return super().__new__(PagedCache if paged else cls)

    def __init__(self, config, batch, device=None, dtype=torch.float32, page_size=16, pages=None):
        super().__init__(config, batch, device, dtype)


class PagedCache(Cache):
    """dmc.Cache in pages: one pool for all layers, sequences and heads, so that no head pays for the length of another.

    pool_k, pool_v (pages + 1, page, D); table (L, B, G, pages per head) names the pages of each head; the last page of the
    pool is the spare one, where a head writes when the pool is exhausted. free holds the numbers of the free pages, the
    first `left` of them. ages (L, B, G) counts tokens, -1 a released sequence, so sequences may differ in length. lengths,
    open_k, open_v, open_omega as in dmc.Cache. On a GPU a step at T = 1 never waits for it, so errors are raised by `check`,
    which does.

    pages None: enough for every head at max_seq_len. `seen` counts calls, as in dmc.Cache, which checks the positions by it:
    who replays a captured step, or lets sequences come and go, sets it to the longest one's tokens.
    """

    def __init__(self, config, batch, device=None, dtype=torch.float32, page_size=16, pages=None):
        super().__init__(config, batch, device, dtype)
        if page_size not in (16, 32, 64):
            raise dmc.InputError(f"page_size is {page_size}; choose 16, 32 or 64.")
        L, B, G, D = config.n_layer, batch, config.n_kv_head, config.head_dim
        on_gpu = torch.device(device or "cpu").type == "cuda"
        self.kernels = uses_kernels(device) and dtype != torch.float64 and D >= (16 if on_gpu else 2) and D == power_of_2(D)
        per_head = -(-config.max_seq_len // page_size)
        pages = L * B * G * per_head if pages is None else pages
        ints = dict(dtype=torch.int32, device=device)
        self.lengths, self.ages = torch.zeros(L, B, G, **ints), torch.zeros(L, B, G, **ints)
        self.table = torch.full((L, B, G, per_head), pages, **ints)
        self.free, self.left = torch.arange(pages, **ints), torch.full((1,), pages, **ints)
        self.failed = torch.zeros(1, **ints)
        self.order = torch.arange(B * G, **ints).repeat(L, 1)
        make = torch.empty if self.kernels else torch.zeros      # without them, what nobody wrote is read, and then masked
        self.pool_k, self.pool_v = (make(pages + 1, page_size, D, device=device, dtype=dtype) for _ in range(2))
        table = dmc.rotary_table(config, config.max_seq_len, device)
        self.cos, self.sin = (x.to(self.open_omega.dtype).contiguous() for x in table)
        processors = torch.cuda.get_device_properties(self.free.device).multi_processor_count if on_gpu else 1
        self.splits = max(1, min(16, 4 * processors // (B * G)))

    @property
    def page_size(self):
        return self.pool_k.size(1)

    @property
    def bytes(self):
        slot = 2 * self.config.head_dim * self.pool_k.element_size()
        tensors = (self.pool_k, self.pool_v, self.table, self.free, self.open_k, self.open_v, self.open_omega)
        return dmc.CacheBytes(self.lengths.sum().item() * slot, sum(x.nbytes for x in tensors))

    @property
    def compression_ratio(self):
        slots = self.lengths.sum().item()
        return self.ages.clamp(min=0).sum().item() / slots if slots else 1.0

    # --- sequences come and go

    def check(self):
        """Raise InputError if the pool was exhausted since the last check. Waits for the GPU."""
        if self.failed.item():
            self.failed.zero_()
            raise dmc.InputError(f"the cache's {len(self.free)} pages are used up; give it more, or a smaller batch, "
                                 "or shorter texts.")

    def release(self, rows):
        """The sequences `rows` (a list of numbers, or a slice) are finished: their pages are free again, in all layers.

        Does not wait for a GPU if `rows` is a slice.
        """
        owned = -(-self.lengths[:, rows] // self.page_size)[..., None]
        owned = (torch.arange(self.table.size(-1), device=owned.device) < owned).flatten()
        pages, total, left = self.table[:, rows].flatten(), len(self.free), self.left.clamp(min=0)
        owned &= pages < total                                   # all but the spare one
        pages = pages[owned.to(torch.uint8).argsort(descending=True, stable=True)[:total]]     # those it owns come first
        i = torch.arange(len(pages), device=left.device)
        at, freed = (left + i) % total, owned.sum()
        self.free[at] = torch.where(i < freed, pages, self.free[at])
        self.left.copy_(left + freed)
        if not self.kernels:                                     # the next owner masks what it reads, but NaN shines through
            for pool in (self.pool_k, self.pool_v):
                pool[pages[:freed]] = 0
        self.lengths[:, rows], self.ages[:, rows] = 0, -1

    def admit(self, rows):
        """A cache for new sequences in the place of those of the slice `rows`, released before. It shares all memory with this.

        Prefill through it; then this cache decodes old and new together.
        """
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__, seen=[0] * len(self.seen))
        for name in ("lengths", "ages", "table", "open_k", "open_v", "open_omega"):
            setattr(part, name, getattr(self, name)[:, rows])
        B, G = part.lengths.shape[1:]
        part.order = torch.arange(B * G, dtype=torch.int32, device=self.order.device).repeat(len(self.seen), 1)
        part.ages.zero_()
        part.open_omega.zero_()                                  # what the sequence before it left in the ring
        return part

    def sort_rows(self):
        """Longest heads first, in every layer. Any order is correct; this one leaves no long row for the end."""
        self.order.copy_(self.lengths.flatten(1).argsort(descending=True))

    def _take(self, layer, fresh):
        """A page from the end of `free` for each True in fresh (B, G, pages per head), or the spare one when none is left."""
        taken = self.left - fresh.flatten().cumsum(0).view_as(fresh)
        pages = torch.where(taken >= 0, self.free[taken.clamp(min=0)], len(self.free))
        self.table[layer] = torch.where(fresh, pages, self.table[layer])
        self.left -= fresh.sum().int()
        self.failed |= (fresh & (taken < 0)).any().int()

    def _write(self, layer, slot, written, k, v):
        """k, v (B, G, T, D) into the slots numbered `slot` (B, G, T), those with written False into the spare page."""
        at = self.table[layer].gather(-1, (slot // self.page_size).clamp(min=0)).long() * self.page_size + slot % self.page_size
        at = torch.where(written, at, len(self.free) * self.page_size).flatten()
        for pool, x in ((self.pool_k, k), (self.pool_v, v)):
            pool.view(-1, x.size(-1))[at] = x.reshape(-1, x.size(-1))

    # --- what dmc.Cache leaves to its kind

    def _scatter(self, layer, k, v, survives):
        """Item j, in slot sum(survives[:j]), for all that survive: into an empty cache's slots. survives (B, G, T)."""
        self.seen[layer] = self.ages[layer] = survives.size(-1)
        self.lengths[layer] = survives.sum(-1)
        page = torch.arange(self.table.size(-1), device=k.device)
        self._take(layer, page * self.page_size < self.lengths[layer][..., None])
        self._write(layer, survives.cumsum(-1) - 1, survives, k, v)

    def _append(self, layer, q, k, v):
        T = q.size(2)
        if self.seen[layer] == 0 and T > 1:
            q, k = (dmc.rotate_heads(x, self.cos[:T], self.sin[:T], self.gain) for x in (q, k))
            self._scatter(layer, k, v, torch.ones(k.shape[:3], dtype=torch.bool, device=k.device))
            return attend(q, k, v)
        return torch.cat([self._step(layer, *(x[:, :, t:t + 1] for x in (q, k, v)), None, None) for t in range(T)], dim=2)

    def _remember(self, layer, k, v, omega):
        at = (self.ages[layer].long() % self.config.window)[..., None]
        self.open_omega[layer].scatter_(-1, at, omega)
        for ring, new in ((self.open_k, k), (self.open_v, v)):
            ring[layer].scatter_(2, at[..., None].expand_as(new), new)

    def _step(self, layer, q, k, v, alpha, omega):
        self.seen[layer] += 1
        if not self.kernels:
            return self._step_in_operations(layer, q, k, v, alpha, omega)
        if self.seen[layer] % 64 == 0 and layer == 0:
            self.sort_rows()
        q = self._update_in_kernel(layer, q, k, v, alpha, omega)
        y = decode(q, self.pool_k, self.pool_v, self.table[layer].flatten(0, 1), self.lengths[layer].flatten(),
                   self.order[layer], self.splits)
        return y.view(len(k), -1, 1, k.size(-1))

    def _update_in_kernel(self, layer, q, k, v, alpha, omega):
        """One token of every sequence into its slot. Returns the queries, rotated: (B G, H / G, D)."""
        (B, H, _, D), G, W = q.shape, k.size(1), self.open_omega.size(-1)
        q, k, v = (x[:, :, 0] if x.stride(-1) == 1 else x[:, :, 0].contiguous() for x in (q, k, v))
        decides = alpha is not None
        alpha, omega = (x.float().contiguous() for x in (alpha, omega)) if decides else (self.open_omega, self.open_omega)
        turned = torch.empty(B * G, H // G, D, device=q.device, dtype=q.dtype)
        step_kernel[(B * G,)](q, k, v, alpha, omega, self.cos, self.sin, turned, self.pool_k, self.pool_v, self.table[layer],
                              self.lengths[layer], self.ages[layer], self.open_k[layer], self.open_v[layer],
                              self.open_omega[layer], self.free, self.left, self.failed, len(self.free), G,
                              self.table.size(-1), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
                              R=H // G, HALF=D // 2, W=W, W_PAD=power_of_2(W), PAGE=self.page_size,
                              WINDOWED=self.config.window is not None, DECIDES=decides, CONTROL_GAIN=self.gain, num_warps=1)
        return turned

    def _step_in_operations(self, layer, q, k, v, alpha, omega):
        """step_kernel and decode_kernel in PyTorch's operations, every head padded to the longest one's pages."""
        running, slot = self.ages[layer] >= 0, self.lengths[layer].clone()               # (B, G)
        merge = torch.zeros_like(running)
        if alpha is not None:
            merge = (alpha[..., 0] > 0.5) & (slot > 0)                                   # the first token appends
            k, v = self._average(layer, k, v, merge, omega)
            slot -= merge.int()
        page = torch.arange(self.table.size(-1), device=k.device)
        self._take(layer, (running & ~merge)[..., None] & (page * self.page_size == slot[..., None]))
        age = self.ages[layer, :, :1].clamp(min=0)                                       # all heads of a sequence are as old
        cos, sin = self.cos[age][:, :, None], self.sin[age][:, :, None]                  # (B, 1, 1, D / 2)
        q, k = (dmc.rotate_heads(x, cos, sin, self.gain) for x in (q, k))
        self._write(layer, slot[..., None], running[..., None], k, v)
        self.lengths[layer] += (running & ~merge).int()
        self.ages[layer] += running.int()
        pages = self.table[layer, :, :, :-(-int(self.lengths[layer].max()) // self.page_size)]
        keys, values = (pool.index_select(0, pages.flatten()).view(*pages.shape[:2], -1, pool.size(-1))
                        for pool in (self.pool_k, self.pool_v))
        used = torch.arange(keys.size(2), device=k.device) < self.lengths[layer][..., None]
        used = used.repeat_interleave(q.size(1) // k.size(1), dim=1)[:, :, None]         # (B, H, 1, slots)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=used, enable_gqa=q.size(1) != k.size(1))
        return y.masked_fill(~running[:, :1, None, None], 0)
