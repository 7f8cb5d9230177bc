"""The mask of appendix F through stock flash attention, so that no T x T tensor exists.

`attend` is dmc.attend, fast: PyTorch's own flash attention between three Triton kernels on a GPU,
or between PyTorch's operations on a CPU. Names and shapes are those of dmc.py.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend

import dmc
from dmc import wide
from nanodmc.large_scores import attend_in_blocks, too_large
from nanodmc.launch import in_kernels
from nanodmc.mask_kernels import (
    dense,
    mask_gradient_in_kernel,
    masked_in_kernel,
    restored_in_kernel,
)

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


# --------------------------------------------------------------------- the same in operations

def masked(q, k, keep, angles, scale):
    """mask_kernel in PyTorch's operations; q and k are rotated already."""
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


def mask_gradient(grad, q, k, v, y, lse, keep, diagonal, angles, dq, dk, dv, scale):
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
    """The mask of appendix F through stock causal attention.

    Channel 0 of q and k is 0 on entry; or q and k are not yet rotated, and the kernels do that and
    clear it, with angles (cos, sin), (T, D / 2) in fp32.

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
    def forward(ctx, q, k, v, keep, scale, kind, angles=None):
        keep_next = F.pad(keep[..., 1:], (0, 1)).clamp_(min=LOWEST)   # what token t + 1 leaves to t
        ctx.kernels = in_kernels(q)
        mask = masked_in_kernel if ctx.kernels else masked
        q, k, diagonal = mask(q, k, keep_next, angles, scale)
        v = dense(v)
        y, lse, tensors, sizes = flash(kind, q, k, v, scale)
        restore = restored_in_kernel if ctx.kernels else restored
        lse = restore(y, lse.contiguous(), v, keep_next, diagonal)
        ctx.save_for_backward(q, k, v, y, lse, keep_next, diagonal, *tensors)
        ctx.angles = angles
        ctx.kind, ctx.sizes, ctx.scale, ctx.keep_dtype = kind, sizes, scale, keep.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, y, lse, keep_next, diagonal, *tensors = ctx.saved_tensors
        grad, scale = dense(grad), ctx.scale
        dq, dk, dv = flash_backward(ctx.kind, grad, q, k, v, y, lse, tensors, ctx.sizes, scale)
        finish = mask_gradient_in_kernel if ctx.kernels else mask_gradient
        dkeep = finish(grad, q, k, v, y, lse, keep_next, diagonal, ctx.angles, dq, dk, dv, scale)
        return dq, dk, dv, F.pad(dkeep[..., :-1], (1, 0)).to(ctx.keep_dtype), None, None, None


def attend(q, k, v, keep=None, angles=None):
    """dmc.attend: causal attention under the mask of appendix F.

    With angles, the kernels rotate q and k on the way. The control channel carries the mask, so
    without angles it must be free: q[..., 0] = k[..., 0] = 0, as in the model. And the scores
    q . k / sqrt(D) must lie within 4,000, as those of a model that has not overflowed do, or what
    was overwritten is seen again. On a CPU both are checked: a free channel is added, and sequences
    that may exceed the limit go through large_scores.py. On a GPU both are taken for granted,
    because a check would wait for the GPU.
    """
    if q.size(2) == 0 or (keep is None and (not q.is_cuda or needs_gradient(q, k, v))):
        return dmc.attend(q, k, v, keep, angles)
    kind, scale = stock(q, k, v), 1 / math.sqrt(q.size(-1))
    if kind is None:                                     # on a GPU: fp32, or an odd head size
        return dmc.attend(q, k, v, keep, angles)
    if angles is not None:
        if in_kernels(q):
            angles = tuple(x.to(torch.float32) for x in angles)
            return MaskedFlash.apply(q, k, v, keep, scale, kind, angles)
        q, k = (dmc.rotate_heads(x, *angles, gain=0.0) for x in (q, k))
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
