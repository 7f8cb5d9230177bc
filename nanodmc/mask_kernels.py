"""The kernels around flash attention: the mask put in, the diagonal given back, the gradient.

Each has beside it the function that launches it; the same in PyTorch's operations is in
flash_attention.py. Names and shapes are those of dmc.py.
"""

from __future__ import annotations  # kernels can be read, not run, where Triton is missing

import torch

from nanodmc.launch import jit, power_of_2, tl, triton


@jit
def turn(low, high, cos, sin, gain):
    """Rotary embedding of a vector's two halves, the control channel scaled before and after.

    With -sin it turns back: that is its inverse, and the transpose that gradients take.
    """
    low *= gain
    return (low * cos - high * sin) * gain, high * cos + low * sin


@jit
def halves(x, head, at, inside, HALF: tl.constexpr):
    """The two halves of vectors in fp32; `at` is where the first one of each begins."""
    return (tl.load(x + head + at, mask=inside, other=0).to(tl.float32),
            tl.load(x + head + at + HALF, mask=inside, other=0).to(tl.float32))


@jit
def mask_kernel(q, k, keep, cos, sin, q_masked, k_masked, diagonal, T, G, scale,
                q_b, q_h, q_t, k_b, k_h, k_t, R: tl.constexpr, HALF: tl.constexpr,
                HALF_PAD: tl.constexpr, TILE: tl.constexpr, TURN: tl.constexpr):
    """Copies of q and k whose control channels carry the mask, and the scores of the diagonal.

    TURN: q and k are rotated on the way. For TILE tokens of one group, whose query heads are taken
    one after the other beside a key that is read once. Floor: q and k read and written once,
    4 D (R + 1) bytes per token and key-value head in bf16.
    """
    row = tl.program_id(0).to(tl.int64)
    t, d = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.arange(0, HALF_PAD)
    at, inside, first = t[:, None], (t < T)[:, None] & (d < HALF)[None, :], (d == 0)[None, :]
    b, g, gain = row // G, row % G, tl.where(first, 0.0, 1.0)
    dtype = q.dtype.element_ty
    bias = tl.load(keep + row * T + t, mask=t < T, other=0)
    if TURN:
        c = tl.load(cos + at * HALF + d[None, :], mask=inside, other=0)
        s = tl.load(sin + at * HALF + d[None, :], mask=inside, other=0)
    k_at = b * k_b + g * k_h + at * k_t + d[None, :]
    k_low, k_high = halves(k, 0, k_at, inside, HALF)
    if TURN:
        k_low, k_high = turn(k_low, k_high, c, s, gain)
    k_low, k_high = k_low.to(dtype), k_high.to(dtype)
    for r in range(R):
        q_at = b * q_b + (g * R + r) * q_h + at * q_t + d[None, :]
        low, high = halves(q, 0, q_at, inside, HALF)
        if TURN:
            low, high = turn(low, high, c, s, gain)
        low, high = low.to(dtype), high.to(dtype)
        score = tl.sum(low.to(tl.float32) * k_low.to(tl.float32)
                       + high.to(tl.float32) * k_high.to(tl.float32), 1) * scale
        tl.store(diagonal + (row * R + r) * T + t, score, mask=t < T)
        tl.store(q_masked + q_at, tl.where(first, 8.0, low), mask=inside)
        tl.store(q_masked + q_at + HALF, high, mask=inside)
    carried = tl.where(first, (bias / (8 * scale))[:, None], k_low)
    tl.store(k_masked + k_at, carried, mask=inside)
    tl.store(k_masked + k_at + HALF, k_high, mask=inside)


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
def mask_gradient_kernel(grad, q, k, v, y, lse, keep, diagonal, cos, sin, dq, dk, dv, dkeep,
                         T, G, scale,
                         grad_b, grad_h, grad_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
                         y_b, y_h, y_t, dq_b, dq_h, dq_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
                         R: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
                         TILE: tl.constexpr, TURN: tl.constexpr):
    """Add to dq, dk, dv, in place, the share of the diagonal; and make keep's gradient.

    q and k are those that carry the mask. TURN: dq and dk are turned back. For TILE tokens of one
    group, whose query heads' contributions to key and value are summed in registers. Floor: grad,
    q, y, k, v read, dq, dk, dv read and written once, 2 D (5 R + 6) bytes per token and key-value
    head in bf16.
    """
    row = tl.program_id(0).to(tl.int64)
    t, d = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.arange(0, HALF_PAD)
    at, inside, first = t[:, None], (t < T)[:, None] & (d < HALF)[None, :], (d == 0)[None, :]
    b, g, gain = row // G, row % G, tl.where((d == 0)[None, :], 0.0, 1.0)
    left = tl.exp(tl.load(keep + row * T + t, mask=t < T, other=0))
    key_low, key_high = halves(k, b * k_b + g * k_h, at * k_t + d[None, :], inside, HALF)
    value_low, value_high = halves(v, b * v_b + g * v_h, at * v_t + d[None, :], inside, HALF)
    dk_at, dv_at = b * dk_b + g * dk_h, b * dv_b + g * dv_h
    k_sum_low, k_sum_high = halves(dk, dk_at, at * dk_t + d[None, :], inside, HALF)
    v_sum_low, v_sum_high = halves(dv, dv_at, at * dv_t + d[None, :], inside, HALF)
    to_keep = tl.sum(tl.where(first, k_sum_low, 0.0), 1) / (8 * scale)
    if TURN:
        c = tl.load(cos + at * HALF + d[None, :], mask=inside, other=0)
        s = tl.load(sin + at * HALF + d[None, :], mask=inside, other=0)
    for r in range(R):
        h, entry = g * R + r, (row * R + r) * T + t
        past = tl.load(lse + entry, mask=t < T, other=0)
        share = tl.exp(tl.load(diagonal + entry, mask=t < T, other=0) - past)
        slope_low, slope_high = halves(grad, b * grad_b + h * grad_h, at * grad_t + d[None, :],
                                       inside, HALF)
        out_low, out_high = halves(y, b * y_b + h * y_h, at * y_t + d[None, :], inside, HALF)
        low, high = halves(q, b * q_b + h * q_h, at * q_t + d[None, :], inside, HALF)
        to_score = tl.sum(slope_low * (value_low - out_low)
                          + slope_high * (value_high - out_high), 1) * share
        to_keep -= to_score * left
        weight, to_score = share * (1 - left), to_score * (1 - left) * scale
        k_sum_low += to_score[:, None] * low
        k_sum_high += to_score[:, None] * high
        v_sum_low += weight[:, None] * slope_low
        v_sum_high += weight[:, None] * slope_high
        dq_at = b * dq_b + h * dq_h
        low, high = halves(dq, dq_at, at * dq_t + d[None, :], inside, HALF)
        low += to_score[:, None] * key_low
        high += to_score[:, None] * key_high
        if TURN:
            low, high = turn(low, high, c, -s, gain)
        tl.store(dq + dq_at + at * dq_t + d[None, :], low * gain, mask=inside)
        tl.store(dq + dq_at + at * dq_t + d[None, :] + HALF, high, mask=inside)
    if TURN:
        k_sum_low, k_sum_high = turn(k_sum_low, k_sum_high, c, -s, gain)
    tl.store(dk + dk_at + at * dk_t + d[None, :], k_sum_low * gain, mask=inside)
    tl.store(dk + dk_at + at * dk_t + d[None, :] + HALF, k_sum_high, mask=inside)
    tl.store(dv + dv_at + at * dv_t + d[None, :], v_sum_low, mask=inside)
    tl.store(dv + dv_at + at * dv_t + d[None, :] + HALF, v_sum_high, mask=inside)
    tl.store(dkeep + row * T + t, to_keep, mask=t < T)


# -------------------------------------------------------------------------------- their launches

def dense(x):
    """x, or a copy of it in which no element lies apart and the last dimension is contiguous."""
    return x if x.is_contiguous() or x.transpose(1, 2).is_contiguous() else x.contiguous()


def laid_out(x, like):
    """x, or a copy of it, with the strides of another tensor of its shape."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def by_group(q, k):
    """Grid and sizes of the kernels: a program for each key-value head and tile of tokens."""
    (B, H, T, _), G = q.shape, k.size(1)
    return (B * G, triton.cdiv(T, 16)), dict(R=H // G, TILE=16)


def turning(angles, D, instead):
    """Two kernels' cosines and sines, or `instead`, which is not read then, and their sizes."""
    return angles or (instead, instead), dict(
        HALF=D // 2, HALF_PAD=power_of_2(D // 2), TURN=angles is not None)


def masked_in_kernel(q, k, keep, angles, scale):
    q, k = dense(q), dense(k)
    q_masked, k_masked = torch.empty_like(q), torch.empty_like(k)
    diagonal = q.new_empty(q.shape[:3], dtype=torch.float32)
    grid, sizes = by_group(q, k)
    tables, turn_sizes = turning(angles, q.size(-1), keep)
    mask_kernel[grid](q, k, keep, *tables, q_masked, k_masked, diagonal, q.size(2), k.size(1),
                      scale, *q.stride()[:3], *k.stride()[:3], **sizes, **turn_sizes)
    return q_masked, k_masked, diagonal


def restored_in_kernel(y, lse, v, keep, diagonal):
    """Returns lse; it and y change in place."""
    grid, sizes = by_group(y, v)
    D = y.size(-1)
    restore_kernel[grid](y, lse, v, keep, diagonal, y.size(2), v.size(1),
                         *y.stride()[:3], *v.stride()[:3], **sizes, D=D, D_PAD=power_of_2(D))
    return lse


def mask_gradient_in_kernel(grad, q, k, v, y, lse, keep, diagonal, angles, dq, dk, dv, scale):
    """Returns keep's gradient; dq, dk and dv change in place."""
    grid, sizes = by_group(q, k)
    tables, turn_sizes = turning(angles, q.size(-1), keep)
    strides = [stride for x in (grad, q, k, v, y, dq, dk, dv) for stride in x.stride()[:3]]
    dkeep = torch.empty_like(keep)
    mask_gradient_kernel[grid](grad, q, k, v, y, lse, keep, diagonal, *tables, dq, dk, dv, dkeep,
                               q.size(2), k.size(1), scale, *strides, **sizes, **turn_sizes)
    return dkeep
