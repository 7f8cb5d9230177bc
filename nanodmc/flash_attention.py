"""The mask of appendix F through stock flash attention, so that no T x T tensor exists.

`attend` is dmc.attend, fast: PyTorch's own flash attention between three Triton kernels on a GPU,
or between PyTorch's operations on a CPU. Names and shapes are those of dmc.py.
"""

from __future__ import annotations  # kernels can be read, not run, where Triton is missing

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend

import dmc
from dmc import wide
from nanodmc.large_scores import attend_in_blocks, too_large
from nanodmc.launch import jit, power_of_2, tl, triton, uses_kernels

LOWEST = -1e4       # stands for log 0: exp of it is 0, and unlike inf it may be multiplied by 0
aten = torch.ops.aten


# ----------------------------------------------------------------------- stock flash attention

def stock(q, k, v):
    """Which flash attention of PyTorch to take: "cpu", "flash", "cudnn"; None: there is none.

    It is PyTorch's own choice, with two exceptions. The operators underneath take only head sizes
    that are multiples of 8, where PyTorch would pad. And cuDNN plans anew for each length: that
    pays in training, where lengths stay, and not for prompts, where flash is preferred.
    """
    if not q.is_cuda:
        return "cpu"
    if q.size(-1) % 8:
        return None
    groups = q.size(1) != k.size(1)
    choice = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=groups)
    kind = {SDPBackend.FLASH_ATTENTION.value: "flash",
            SDPBackend.CUDNN_ATTENTION.value: "cudnn"}.get(choice)
    if kind == "cudnn" and not needs_gradient(q, k, v):
        params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, groups)
        return "flash" if torch.backends.cuda.can_use_flash_attention(params) else kind
    return kind


def needs_gradient(*tensors):
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def flash(kind, q, k, v, scale):
    """Causal attention. Returns y, log-sum-exp (B, H, T), and the tensors and the sizes that the
    backward pass asks for."""
    if kind == "cpu":
        y, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        return y, lse, (), ()
    if kind == "flash":
        results = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)
    else:
        results = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True,
                                                           scale=scale)
    y, lse, starts_q, starts_k, longest_q, longest_k, seed, offset, _ = results
    tensors, sizes = (starts_q, starts_k, seed, offset), (longest_q, longest_k)
    return y, lse.view(q.shape[:3]), tensors, sizes


def flash_backward(kind, grad, q, k, v, y, lse, tensors, sizes, scale):
    """The gradients of q, k, v.

    cuDNN keeps its plan for the next call, and does not ask whether that gradient's strides are the
    same. So they are always those of y.
    """
    if kind == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, y, lse, 0.0, True, scale=scale)
    starts_q, starts_k, *random = tensors
    if kind == "flash":
        return aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, y, lse, starts_q, starts_k, *sizes, 0.0, True, *random, scale=scale)
    if grad.stride() != y.stride():
        grad = torch.empty_like(y).copy_(grad)
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, y, lse.unsqueeze(-1), *random, None, starts_q, starts_k, *sizes, 0.0, True,
        scale=scale)


def grouped(x, G):
    """(B, H, ...) -> (B, G, H / G, ...), to stand beside a key-value head of its group."""
    return x.unflatten(1, (G, -1))


def dense(x):
    """x, or a copy of it in which no element lies apart and the last dimension is contiguous."""
    return x if x.is_contiguous() or x.transpose(1, 2).is_contiguous() else x.contiguous()


# ----------------------------------------------------------------------------------- kernels

@jit
def mask_kernel(q, k, keep, q_masked, k_masked, diagonal, T, G, scale,
                q_b, q_h, q_t, k_b, k_h, k_t,
                R: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr):
    """Copies of q and k whose control channels carry the mask, and the scores of the diagonal.

    For TILE tokens of one group, whose query heads are taken one after the other beside a key that
    is read once. Floor: q and k read and written once, 4 D (R + 1) bytes per token and key-value
    head in bf16.
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
    carried = tl.where(d[None, :] == 0, (bias / (8 * scale))[:, None], key)
    tl.store(k_masked + k_at, carried, mask=inside)


@jit
def restore_kernel(y, lse, v, keep, diagonal, T, G, y_b, y_h, y_t, v_b, v_h, v_t,
                   R: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr):
    """Give back to y and lse, in place, what the mask took from the diagonal.

    For TILE tokens of one group. Rows from which nothing was taken, because the next token
    appended, are not touched. Floor: v read, y read and written once, 2 D (2 R + 1) bytes per token
    and key-value head in bf16.
    """
    row = tl.program_id(0).to(tl.int64)
    t, d = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.arange(0, D_PAD)
    at, inside = t[:, None], (t < T)[:, None] & (d < D)[None, :]
    b, g = row // G, row % G
    taken = 1 - tl.exp(tl.load(keep + row * T + t, mask=t < T, other=0))
    v_at = b * v_b + g * v_h + at * v_t + d[None, :]
    value = tl.load(v + v_at, mask=inside & (taken > 0)[:, None], other=0).to(tl.float32)
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
                         grad_b, grad_h, grad_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
                         y_b, y_h, y_t, dq_b, dq_h, dq_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
                         R: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
                         TILE: tl.constexpr):
    """Add to dq, dk, dv, in place, the share of the diagonal; and make keep's gradient.

    For TILE tokens of one group, whose query heads' contributions to key and value are summed in
    registers. Floor: grad, q, y, k, v read, dq, dk, dv read and written once, 2 D (5 R + 6) bytes
    per token and key-value head in bf16.
    """
    row = tl.program_id(0).to(tl.int64)
    t, d = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.arange(0, D_PAD)
    at, inside = t[:, None], (t < T)[:, None] & (d < D)[None, :]
    b, g = row // G, row % G
    left = tl.exp(tl.load(keep + row * T + t, mask=t < T, other=0))
    key_at, value_at = k + b * k_b + g * k_h + at * k_t, v + b * v_b + g * v_h + at * v_t
    key = tl.load(key_at + d[None, :], mask=inside, other=0).to(tl.float32)
    value = tl.load(value_at + d[None, :], mask=inside, other=0).to(tl.float32)
    dk_at = dk + b * dk_b + g * dk_h + at * dk_t + d[None, :]
    dv_at = dv + b * dv_b + g * dv_h + at * dv_t + d[None, :]
    key_sum = tl.load(dk_at, mask=inside, other=0).to(tl.float32)
    value_sum = tl.load(dv_at, mask=inside, other=0).to(tl.float32)
    to_keep = tl.sum(tl.where(d[None, :] == 0, key_sum, 0.0), 1) / (8 * scale)
    for r in range(R):
        h, entry = g * R + r, (row * R + r) * T + t
        past = tl.load(lse + entry, mask=t < T, other=0)
        share = tl.exp(tl.load(diagonal + entry, mask=t < T, other=0) - past)
        slope_at = grad + b * grad_b + h * grad_h + at * grad_t + d[None, :]
        slope = tl.load(slope_at, mask=inside, other=0).to(tl.float32)
        out_at = y + b * y_b + h * y_h + at * y_t + d[None, :]
        out = tl.load(out_at, mask=inside, other=0).to(tl.float32)
        query_at = q + b * q_b + h * q_h + at * q_t + d[None, :]
        query = tl.load(query_at, mask=inside, other=0).to(tl.float32)
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
    """Grid and sizes of the three kernels: a program for each key-value head and tile of tokens."""
    (B, H, T, D), G = q.shape, k.size(1)
    return (B * G, triton.cdiv(T, 16)), dict(R=H // G, D=D, D_PAD=power_of_2(D), TILE=16)


def masked_in_kernel(q, k, keep, scale):
    q, k = dense(q), dense(k)
    q_masked, k_masked = torch.empty_like(q), torch.empty_like(k)
    diagonal = q.new_empty(q.shape[:3], dtype=torch.float32)
    grid, sizes = by_group(q, k)
    mask_kernel[grid](q, k, keep, q_masked, k_masked, diagonal, q.size(2), k.size(1), scale,
                      *q.stride()[:3], *k.stride()[:3], **sizes)
    return q_masked, k_masked, diagonal


def restored_in_kernel(y, lse, v, keep, diagonal):
    """Returns lse; it and y change in place."""
    grid, sizes = by_group(y, v)
    restore_kernel[grid](y, lse, v, keep, diagonal, y.size(2), v.size(1),
                         *y.stride()[:3], *v.stride()[:3], **sizes)
    return lse


def mask_gradient_in_kernel(grad, q, k, v, y, lse, keep, diagonal, dq, dk, dv, scale):
    """Returns keep's gradient; dq, dk and dv change in place."""
    grid, sizes = by_group(q, k)
    strides = [stride for x in (grad, q, k, v, y, dq, dk, dv) for stride in x.stride()[:3]]
    dkeep = torch.empty_like(keep)
    mask_gradient_kernel[grid](grad, q, k, v, y, lse, keep, diagonal, dq, dk, dv, dkeep,
                               q.size(2), k.size(1), scale, *strides, **sizes)
    return dkeep


# --------------------------------------------------------------------- the same in operations

def masked(q, k, keep, scale):
    """mask_kernel in PyTorch's operations."""
    G = k.size(1)
    diagonal = (wide(grouped(q, G)) * wide(k)[:, :, None]).sum(-1).flatten(1, 2) * scale
    q, k = q.clone(), k.clone()
    q[..., 0], k[..., 0] = 8, keep / (8 * scale)
    return q, k, diagonal


def restored(y, lse, v, keep, diagonal):
    """restore_kernel in PyTorch's operations. Returns the new lse; y changes in place."""
    G, taken = v.size(1), -torch.expm1(keep)[:, :, None]
    lse = torch.logaddexp(lse, (grouped(diagonal, G) + taken.log()).flatten(1, 2))
    weight = taken * grouped(diagonal - lse, G).exp_()
    grouped(y, G).lerp_(v[:, :, None], weight[..., None].to(y.dtype))
    return lse


def mask_gradient(grad, q, k, v, y, lse, keep, diagonal, dq, dk, dv, scale):
    """mask_gradient_kernel in PyTorch's operations."""
    G, grad = k.size(1), grouped(grad, k.size(1))
    left, share = keep.exp()[:, :, None], grouped(diagonal - lse, G).exp_()     # (B, G, 1 | R, T)
    to_score = share * (v[:, :, None] - grouped(y, G)).mul_(grad).sum(-1)
    dkeep = dk[..., 0] / (8 * scale) - (to_score * left).sum(2)
    to_score, weight = ((x * (1 - left))[..., None].to(q.dtype)
                        for x in (to_score * scale, share))
    grouped(dq, G).addcmul_(to_score, k[:, :, None])
    for r in range(grad.size(2)):
        dk.addcmul_(to_score[:, :, r], grouped(q, G)[:, :, r])
        dv.addcmul_(weight[:, :, r], grad[:, :, r])
    dq[..., 0] = dk[..., 0] = 0                          # what arrived there was the mask's
    return dkeep


# ------------------------------------------------------------------------------------- attend

class MaskedFlash(torch.autograd.Function):
    """The mask of appendix F through stock causal attention. Channel 0 of q and k is 0 on entry.

    What the mask adds to the score of query i on key j < i depends on j alone: keep_{j+1}. The
    control channel, which no score needs any more, carries it: 8 in the query (exact in bf16) times
    keep / 8 in the key. That masks the diagonal as well, where the mask should be 0. What it took
    from there, the part alpha_{i+1} = 1 - exp(keep_{i+1}) of that weight, is given back by means of
    the log-sum-exp; all terms are positive.

    The stock backward pass, given the *final* output and log-sum-exp, yields its share of every
    gradient. keep's arrives in channel 0 of the keys, with the precision of k. It contains the
    diagonal's, which is taken off again.
    """

    @staticmethod
    def forward(ctx, q, k, v, keep, scale, kind):
        keep_next = F.pad(keep[..., 1:], (0, 1)).clamp_(min=LOWEST)   # what token t + 1 leaves to t
        ctx.kernels = uses_kernels(q.device) and q.dtype != torch.float64
        mask = masked_in_kernel if ctx.kernels else masked
        q, k, diagonal = mask(q, k, keep_next, scale)
        v = dense(v)
        y, lse, tensors, sizes = flash(kind, q, k, v, scale)
        restore = restored_in_kernel if ctx.kernels else restored
        lse = restore(y, lse.contiguous(), v, keep_next, diagonal)
        ctx.save_for_backward(q, k, v, y, lse, keep_next, diagonal, *tensors)
        ctx.kind, ctx.sizes, ctx.scale, ctx.keep_dtype = kind, sizes, scale, keep.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, y, lse, keep_next, diagonal, *tensors = ctx.saved_tensors
        grad, scale = dense(grad), ctx.scale
        dq, dk, dv = flash_backward(ctx.kind, grad, q, k, v, y, lse, tensors, ctx.sizes, scale)
        finish = mask_gradient_in_kernel if ctx.kernels else mask_gradient
        dkeep = finish(grad, q, k, v, y, lse, keep_next, diagonal, dq, dk, dv, scale)
        return dq, dk, dv, F.pad(dkeep[..., :-1], (1, 0)).to(ctx.keep_dtype), None, None


def attend(q, k, v, keep=None):
    """dmc.attend: causal attention under the mask of appendix F.

    The control channel carries the mask, so it must be free: q[..., 0] = k[..., 0] = 0, as in the
    model. And the scores q . k / sqrt(D) must lie within 4,000, as those of a model that has not
    overflowed do, or what was overwritten is seen again. On a CPU both are checked: a free channel
    is added, and sequences that may exceed the limit go through large_scores.py. On a GPU both are
    taken for granted, because a check would wait for the GPU.
    """
    if q.size(2) == 0 or (keep is None and (not q.is_cuda or needs_gradient(q, k, v))):
        return dmc.attend(q, k, v, keep)
    kind, scale = stock(q, k, v), 1 / math.sqrt(q.size(-1))
    if kind is None:                                     # on a GPU: fp32, or an odd head size
        return dmc.attend(q, k, v, keep)
    if keep is None:                                     # a prompt
        return flash(kind, q, k, v, scale)[0]
    if kind == "cpu" and (large := too_large(q, k)).any():
        rows = large.nonzero()[:, 0], (~large).nonzero()[:, 0]
        ways = attend_in_blocks, attend if len(rows[1]) else attend_in_blocks
        y = [f(*(x[i] for x in (q, k, v, keep))) for f, i in zip(ways, rows, strict=True)]
        return torch.cat(y)[torch.cat(rows).argsort()]
    if kind == "cpu" and (q[..., 0].any() or k[..., 0].any()):
        q, k, v = (F.pad(x, (1, 0)) for x in (q, k, v))
        return MaskedFlash.apply(q, k, v, keep, scale, kind)[..., 1:]
    return MaskedFlash.apply(q, k, v, keep, scale, kind)
