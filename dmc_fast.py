"""Dynamic Memory Compression, fast: `accumulate`, `attend` and `Cache` of dmc.py.

`Transformer(config, ops=dmc_fast)` is all that changes: signatures and results are the same. On a
GPU the work is done by Triton kernels around stock flash attention, elsewhere by the PyTorch
operations that fit best. Names and shapes are those of the glossary in dmc.py.

Here are the kernels of the window accumulation (Eq. 9), and those of a decode step over the cache
in pages. Beside it, in nanodmc/: the pages (pages.py), `attend` (flash_attention.py), `decide`
(decisions.py), averages over whole segments (segment_average.py), and for a CPU the accumulation
(banded_average.py) and the cache (padded_cache.py).
"""

from __future__ import annotations  # kernels can be read, not run, where Triton is missing

import math

import torch
from torch.autograd.function import once_differentiable

import dmc
from nanodmc.banded_average import BandedAverage, doubling_average
from nanodmc.decisions import decide  # noqa: F401 - a Transformer asks for it
from nanodmc.flash_attention import attend
from nanodmc.launch import in_kernels, jit, power_of_2, tl, triton, uses_kernels
from nanodmc.mask_kernels import dense, laid_out, turn
from nanodmc.padded_cache import PaddedCache, attend_pages
from nanodmc.pages import Pages
from nanodmc.segment_average import segment_average
from nanodmc.work_list import BLOCK, work_list

# ---------------------------------------------------------------------------------- accumulate

@jit
def both_products(a, b, c, d):
    """a @ b + c @ d on tensor cores: a and c in fp32, each as two terms of half precision."""
    if b.dtype == tl.float32:
        return tl.dot(c, d, tl.dot(a, b, input_precision="ieee"), input_precision="ieee")
    high_a, high_c = a.to(b.dtype), c.to(b.dtype)
    low_a, low_c = (a - high_a.to(tl.float32)).to(b.dtype), (c - high_c.to(tl.float32)).to(b.dtype)
    return tl.dot(low_c, d, tl.dot(high_c, d, tl.dot(low_a, b, tl.dot(high_a, b))))


@jit
def tile_of(x, at, t, T, D: tl.constexpr, D_PAD: tl.constexpr, stride):
    """The tokens t of a head that begins at `at`, all channels; 0 outside of the sequence."""
    d = tl.arange(0, D_PAD)
    inside = ((t >= 0) & (t < T))[:, None]
    if D < D_PAD:
        inside = inside & (d < D)[None, :]
    return tl.load(x + at + t[:, None] * stride + d[None, :], mask=inside, other=0)


@jit
def numbers_of(x, row, t, T):
    """The numbers of tokens t in a row of T; 0 outside of it."""
    return tl.load(x + row * T + t, mask=(t >= 0) & (t < T), other=0)


@jit
def average_kernel(k, v, alpha, omega, k_mean, v_mean, inverse_z, T, G,
                   stride_b, stride_g, stride_t, D: tl.constexpr, D_PAD: tl.constexpr,
                   W: tl.constexpr, TILE: tl.constexpr, HALO: tl.constexpr):
    """The windowed average of Eq. 9 for TILE tokens of one head, all channels.

    It is a product with a band of coefficients, share[t, i] = omega_i alpha_{i+1} ... alpha_t / z_t
    for t - W < i <= t, on tensor cores: of the tile's own tokens, and of the HALO >= W before it.
    The products of alphas are scans, so nothing is divided by alpha. Floor: k and v read once, both
    averages written once, 8 D bytes per token and head in bf16; the halo is read twice, once from a
    cache. All loads come first, so that they are in flight together.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * TILE
    t, h, d = first + tl.arange(0, TILE), first - HALO + tl.arange(0, HALO), tl.arange(0, D_PAD)
    at = (row // G) * stride_b + (row % G) * stride_g
    k_halo = tile_of(k, at, h, T, D, D_PAD, stride_t)
    v_halo = tile_of(v, at, h, T, D, D_PAD, stride_t)
    k_tile = tile_of(k, at, t, T, D, D_PAD, stride_t)
    v_tile = tile_of(v, at, t, T, D, D_PAD, stride_t)
    fade, fade_after = numbers_of(alpha, row, t, T), numbers_of(alpha, row, t + 1, T)
    halo_after = tl.where(h + 1 < first, numbers_of(alpha, row, h + 1, T), 1.0)
    weight, halo_weight = numbers_of(omega, row, t, T), numbers_of(omega, row, h, T)

    later = t[:, None] > t[None, :]                     # token i of column before t of the row
    fades = tl.cumprod(tl.where(later, fade_after[None, :], 1.0), 1, reverse=True)
    near = (t[:, None] >= t[None, :]) & (t[:, None] - t[None, :] < W)
    share = tl.where(near, fades * weight[None, :], 0.0)
    halo_weight *= tl.cumprod(halo_after, 0, reverse=True)
    halo_share = tl.where(t[:, None] - h[None, :] < W,
                          tl.cumprod(fade, 0)[:, None] * halo_weight[None, :], 0.0)
    z = 1 / tl.where(t < T, tl.sum(share, 1) + tl.sum(halo_share, 1), 1.0)
    share, halo_share = share * z[:, None], halo_share * z[:, None]

    out = at + t[:, None] * stride_t + d[None, :]
    written = (t < T)[:, None] & (d < D)[None, :]
    k_sum = both_products(share, k_tile, halo_share, k_halo)
    v_sum = both_products(share, v_tile, halo_share, v_halo)
    tl.store(k_mean + out, k_sum, mask=written)
    tl.store(v_mean + out, v_sum, mask=written)
    tl.store(inverse_z + row * T + t, z, mask=t < T)


@jit
def average_gradient_kernel(k, v, alpha, omega, inverse_z, dk_mean, dv_mean, dk, dv, dshare,
                            mean_dshare, T, G, stride_b, stride_g, stride_t,
                            D: tl.constexpr, D_PAD: tl.constexpr, W: tl.constexpr,
                            TILE: tl.constexpr, HALO: tl.constexpr, TILES: tl.constexpr):
    """Gradients of tokens i of one head, from the averages they are in: those at t >= i.

    dk_i = sum_t share[t, i] dk~_t, likewise dv: the band of the forward kernel, transposed, so the
    halo lies behind the tile. And the gradient of each coefficient, dk~_t . k_i + dv~_t . v_i, as
    dshare (rows, W, T), at [t - i, t]; mean_dshare (rows, T) is their mean at t, weighted by the
    shares. It begins with 0, and at most two additions meet in it, in whatever order. Floor: dk~,
    dv~, k, v read once and dk, dv written once, 12 D bytes per token and head in bf16, and 4 W.
    TILES tiles follow each other, so that one is loaded while another one is computed.
    """
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * TILE * TILES
    for first in tl.range(begin, tl.minimum(begin + TILE * TILES, T), TILE, num_stages=2):
        t, h, d = first + tl.arange(0, TILE), first + TILE + tl.arange(0, HALO), tl.arange(0, D_PAD)
        at = (row // G) * stride_b + (row % G) * stride_g
        dk_tile = tile_of(dk_mean, at, t, T, D, D_PAD, stride_t)
        dv_tile = tile_of(dv_mean, at, t, T, D, D_PAD, stride_t)
        dk_halo = tile_of(dk_mean, at, h, T, D, D_PAD, stride_t)
        dv_halo = tile_of(dv_mean, at, h, T, D, D_PAD, stride_t)
        k_tile = tile_of(k, at, t, T, D, D_PAD, stride_t)
        v_tile = tile_of(v, at, t, T, D, D_PAD, stride_t)
        fade, fade_after = numbers_of(alpha, row, t, T), numbers_of(alpha, row, t + 1, T)
        weight, halo_fade = numbers_of(omega, row, t, T), numbers_of(alpha, row, h, T)
        z, halo_z = numbers_of(inverse_z, row, t, T), numbers_of(inverse_z, row, h, T)

        slope = tl.dot(k_tile, tl.trans(dk_tile), input_precision="ieee")
        slope = tl.dot(v_tile, tl.trans(dv_tile), slope, input_precision="ieee")
        halo_slope = tl.dot(k_tile, tl.trans(dk_halo), input_precision="ieee")
        halo_slope = tl.dot(v_tile, tl.trans(dv_halo), halo_slope, input_precision="ieee")

        later = t[None, :] > t[:, None]                 # token t of the column after i of the row
        fades = tl.cumprod(tl.where(later, fade[None, :], 1.0), 1)
        n, halo_n = t[None, :] - t[:, None], h[None, :] - t[:, None]
        near, halo_near = (n >= 0) & (n < W), halo_n < W
        share = tl.where(near, fades * weight[:, None] * z[None, :], 0.0)
        fade_after = tl.where(t + 1 < first + TILE, fade_after, 1.0)
        to_end = weight * tl.cumprod(fade_after, 0, reverse=True)
        halo_z *= tl.cumprod(halo_fade, 0)
        halo_share = tl.where(halo_near, to_end[:, None] * halo_z[None, :], 0.0)

        out = at + t[:, None] * stride_t + d[None, :]
        written = (t < T)[:, None] & (d < D)[None, :]
        dk_sum = both_products(share, dk_tile, halo_share, dk_halo)
        dv_sum = both_products(share, dv_tile, halo_share, dv_halo)
        tl.store(dk + out, dk_sum, mask=written)
        tl.store(dv + out, dv_sum, mask=written)
        there = near & (t < T)[None, :]
        tl.store(dshare + row * W * T + n * T + t[None, :], slope, mask=there)
        there = halo_near & (h < T)[None, :]
        tl.store(dshare + row * W * T + halo_n * T + h[None, :], halo_slope, mask=there)
        tl.atomic_add(mean_dshare + row * T + t, tl.sum(share * slope, 0), mask=t < T)
        tl.atomic_add(mean_dshare + row * T + h, tl.sum(halo_share * halo_slope, 0), mask=h < T)


@jit
def decision_gradient_kernel(alpha, omega, inverse_z, dshare, mean_dshare, dalpha, domega, T,
                             W: tl.constexpr, TILE: tl.constexpr):
    """The gradients of alpha and omega for TILE tokens of one head, from the coefficients'.

    alpha_j stands in the coefficients of all pairs i < j <= t within the window. The inner loop
    sums over i with the product of the alphas between i and j, the outer one over t with those
    between j and t, so alpha_j itself is never divided out. Floor: 4 W + 16 bytes read, 8 written
    per token and head. W^2 / 2 steps, unrolled, but on single numbers where the other kernels have
    D channels; whatever is read twice comes from the caches.
    """
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    to_alpha, to_omega = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    late = tl.full((TILE,), 1.0, tl.float32)                     # alpha_{j+1} ... alpha_t
    for n in tl.static_range(W):
        t = j + n
        mean = numbers_of(mean_dshare, row, t, T)
        outer = late * numbers_of(inverse_z, row, t, T)
        to_omega += outer * (numbers_of(dshare, row * W + n, t, T) - mean)
        early, inner = tl.full((TILE,), 1.0, tl.float32), tl.zeros((TILE,), tl.float32)
        for m in tl.static_range(1, W - n):                      # i = j - m, its product from i on
            slope = tl.load(dshare + (row * W + n + m) * T + t, mask=(j >= m) & (t < T), other=0)
            inner += early * numbers_of(omega, row, j - m, T) * (slope - mean)
            early *= numbers_of(alpha, row, j - m, T)
        to_alpha += outer * inner
        late *= numbers_of(alpha, row, t + 1, T)
    tl.store(dalpha + row * T + j, to_alpha, mask=j < T)
    tl.store(domega + row * T + j, to_omega, mask=j < T)


class WindowedAverage(torch.autograd.Function):
    """The windowed average and its gradients by the kernels above, in fp32 inside.

    Everything is laid out as the keys given, so nothing is copied on its way from a projection.
    """

    @staticmethod
    def layout(k, W, TILE, TILES=1):
        """A kernel's grid and sizes: TILES tiles of TILE tokens of a head in each program."""
        B, G, T, D = k.shape
        tiles = {"TILES": TILES} if TILES > 1 else {}
        return (B * G, triton.cdiv(T, TILE * TILES)), dict(
            D=D, D_PAD=max(16, power_of_2(D)), W=W, TILE=TILE, HALO=WIDEST_WINDOW, **tiles)

    @staticmethod
    def forward(ctx, k, v, alpha, omega, W):
        k = dense(k)
        v = laid_out(v, k)
        ctx.W, ctx.dtypes = W, (alpha.dtype, omega.dtype)
        alpha, omega = (x.to(torch.float32).contiguous() for x in (alpha, omega))
        means = torch.empty_like(k), torch.empty_like(k)
        inverse_z = torch.empty_like(alpha)
        grid, sizes = WindowedAverage.layout(k, W, TILE=32)
        average_kernel[grid](k, v, alpha, omega, *means, inverse_z, k.size(2), k.size(1),
                             *k.stride()[:3], **sizes)
        ctx.save_for_backward(k, v, alpha, omega, inverse_z)
        return tuple(means)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        k, v, alpha, omega, inverse_z = ctx.saved_tensors
        grads = [laid_out(grad, k) for grad in grads]
        (B, G, T, _), W = k.shape, ctx.W
        grid, sizes = WindowedAverage.layout(k, W, TILE=16, TILES=8)
        dk, dv = torch.empty_like(k), torch.empty_like(k)
        dshare, mean_dshare = alpha.new_empty(B * G, W, T), torch.zeros_like(alpha)
        dalpha, domega = (torch.empty_like(alpha) for _ in range(2))
        average_gradient_kernel[grid](k, v, alpha, omega, inverse_z, *grads, dk, dv, dshare,
                                      mean_dshare, T, G, *k.stride()[:3], **sizes)
        decision_gradient_kernel[(B * G, triton.cdiv(T, 128))](
            alpha, omega, inverse_z, dshare, mean_dshare, dalpha, domega, T, W=W, TILE=128)
        return dk, dv, dalpha.to(ctx.dtypes[0]), domega.to(ctx.dtypes[1]), None


WIDEST_WINDOW = 16  # of the kernels, whose loops over it are unrolled
WIDEST_BAND = 32    # on a CPU; for wider windows doubling spans are faster


def accumulate(k, v, alpha, omega, window=None):
    """dmc.accumulate: the averages of Eq. 9."""
    inputs, T = (k, v, alpha, omega), k.size(2)
    W = T if window is None else min(window, T)
    kernels = in_kernels(k) and k.dtype == v.dtype and k.shape == v.shape and W > 0
    if kernels and window is not None and W <= WIDEST_WINDOW:
        return WindowedAverage.apply(*inputs, W)
    if kernels and W == T and not (
            torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
        alpha, omega = (x.to(torch.float32).contiguous() for x in (alpha, omega))
        return segment_average(k, alpha, omega), segment_average(v, alpha, omega)
    if 0 < W <= WIDEST_BAND and not k.is_cuda:
        return BandedAverage.apply(*inputs, W)
    return doubling_average(*inputs, window)


# -------------------------------------------------------------------- kernels of a decode step

@jit
def merged(average, at, live, share, new, new_share):
    """The shares of the open segment's tokens (rows of `at`) plus the new one's, half a vector."""
    old = tl.load(average + at, mask=live, other=0).to(tl.float32)
    return tl.sum(share[:, None] * old, 0) + new_share * new


@jit
def step_kernel(q, k, v, alpha, omega, c, cos, sin, q_turned, pool_k, pool_v, table, lengths, ages,
                open_k, open_v, open_omega, free, left, failed, G, pages_per_row,
                q_stride_b, q_stride_h, k_stride_b, k_stride_h, v_stride_b, v_stride_h,
                R: tl.constexpr, HALF: tl.constexpr, W: tl.constexpr, W_PAD: tl.constexpr,
                PAGE: tl.constexpr, WINDOWED: tl.constexpr, DECIDES: tl.constexpr,
                TOLD: tl.constexpr, CONTROL_GAIN: tl.constexpr):
    """Algorithm 1 for one token of one (sequence, key-value head): merge or append, rotate, write.

    One program per head, so that the whole state of a head has one owner. Only the free list is
    shared: a head that enters a new page takes one by one atomic. Floor, in bf16: 8 D (R + 2) bytes
    of vectors, and 4 D per token of the open segment, where attention then reads 4 D per slot. The
    ring's new entry is taken from the arguments, never read back, and every thread has read the
    state before one writes it. TOLD: alpha and omega are given, not made here as by dmc.decide.
    """
    row = tl.program_id(0).to(tl.int64)
    b, g, h, D = row // G, row % G, tl.arange(0, HALF), 2 * HALF
    length, age = tl.load(lengths + row), tl.load(ages + row)
    if age >= 0:                                                 # a released row does nothing
        x, y = tl.load(cos + age * HALF + h), tl.load(sin + age * HALF + h)   # of the angles
        gain, logits = tl.where(h == 0, CONTROL_GAIN, 1.0), 0.0
        for r in range(R):
            query = q + b * q_stride_b + (g * R + r) * q_stride_h + h
            low, high = tl.load(query).to(tl.float32), tl.load(query + HALF).to(tl.float32)
            logits += tl.sum(tl.where(h == 0, low, 0.0), 0)
            low, high = turn(low, high, x, y, gain)
            tl.store(q_turned + (row * R + r) * D + h, low)
            tl.store(q_turned + (row * R + r) * D + HALF + h, high)
        key = k + b * k_stride_b + g * k_stride_h + h
        value = v + b * v_stride_b + g * v_stride_h + h
        k_low, k_high = tl.load(key).to(tl.float32), tl.load(key + HALF).to(tl.float32)
        v_low, v_high = tl.load(value).to(tl.float32), tl.load(value + HALF).to(tl.float32)
        slot = length
        if DECIDES:
            if TOLD:
                merge, weight = tl.load(alpha + row) > 0.5, tl.load(omega + row)
            else:
                merge = tl.sum(tl.where(h == 0, k_low, 0.0), 0) > c
                weight = tl.sigmoid(tl.maximum(logits / R, -30.0))
            merge = merge & (length > 0)
            slot = tl.where(merge, length - 1, length)
            n, now = tl.arange(0, W_PAD), age % W
            kept = n < tl.where(merge, W, 0)                     # a new segment forgets the old one
            if WINDOWED:
                kept = kept & (n != now)                         # the oldest token makes room
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
            else:                                                # z and the averages themselves
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
            if last < 0:                                         # none: no slot is overwritten
                page = 0
                tl.store(failed, 1)
            tl.store(entry, page)
        dtype = pool_k.dtype.element_ty
        low, high = k_low.to(dtype).to(tl.float32), k_high.to(dtype).to(tl.float32)
        low, high = turn(low, high, x, y, gain)
        out = (page.to(tl.int64) * PAGE + slot % PAGE) * D + h
        tl.store(pool_k + out, low)
        tl.store(pool_k + out + HALF, high)
        tl.store(pool_v + out, v_low)
        tl.store(pool_v + out + HALF, v_high)


@jit
def decode_kernel(q, pool_k, pool_v, table, lengths, items, out, part, part_lse, scale,
                  pages_per_row, R: tl.constexpr, R_PAD: tl.constexpr, D: tl.constexpr,
                  PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Attention of one token over its head's slots: a (sequence, key-value head), or a split of it.

    Rows have lengths of their own; `items` says which program takes which split of which row. The
    R query heads of a group are the rows of one matrix and share what is loaded. A row in one piece
    is written to `out`. A split without a slot leaves 0 and a log-sum-exp of -inf. Floor: every
    slot in use read once, 4 D bytes in bf16.
    """
    item, listed = tl.program_id(0), tl.num_programs(0)
    row = tl.load(items + item).to(tl.int64)
    split, splits = tl.load(items + listed + item), tl.load(items + 2 * listed + item)
    if splits == 0:                                              # a surplus program
        return
    length = tl.load(lengths + row)
    each = tl.cdiv(tl.cdiv(length, BLOCK), splits) * BLOCK
    first = split * each
    end = tl.minimum(first + each, length)
    r, d = tl.arange(0, R_PAD), tl.arange(0, D)
    queries = tl.load(q + (row * R + r)[:, None] * D + d[None, :], mask=(r < R)[:, None], other=0)
    highest = tl.full((R_PAD,), float("-inf"), tl.float32)
    total, y = tl.zeros((R_PAD,), tl.float32), tl.zeros((R_PAD, D), tl.float32)
    scale *= 1.4426950408889634                                  # exponentials are powers of 2
    for start in range(first, end, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        used = slot < end
        page = tl.load(table + row * pages_per_row + slot // PAGE, mask=used, other=0).to(tl.int64)
        at = (page * PAGE + slot % PAGE)[:, None] * D + d[None, :]
        keys = tl.load(pool_k + at, mask=used[:, None], other=0)
        values = tl.load(pool_v + at, mask=used[:, None], other=0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(used[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))     # finite: a block has a slot in use
        fade, weights = tl.exp2(highest - new_highest), tl.exp2(scores - new_highest[:, None])
        y = y * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * fade + tl.sum(weights, 1)
        highest = new_highest
    y = y / tl.where(total > 0, total, 1.0)[:, None]
    if splits == 1:
        tl.store(out + (row * R + r)[:, None] * D + d[None, :], y, mask=(r < R)[:, None])
    else:
        entry = item * R + r
        tl.store(part + entry[:, None] * D + d[None, :], y, mask=(r < R)[:, None])
        tl.store(part_lse + entry, highest + tl.log2(tl.where(total > 0, total, 1.0)), mask=r < R)


@jit
def combine_kernel(part, part_lse, places, out, rows, R: tl.constexpr, D: tl.constexpr):
    """Join the splits of one row and query head, in a fixed order: two runs give the same bits.

    Floor: 4 D bytes per split read and 2 D written in bf16; nothing for a row in one piece.
    """
    row, r, d = tl.program_id(0) // R, tl.program_id(0) % R, tl.arange(0, D)
    first, splits = tl.load(places + row).to(tl.int64), tl.load(places + rows + row)
    if splits > 1:
        highest, total = float("-inf"), 0.0
        y = tl.zeros((D,), tl.float32)
        for split in range(splits):
            entry = (first + split) * R + r
            lse = tl.load(part_lse + entry)
            new_highest = tl.maximum(highest, lse)
            shift = tl.where(new_highest > float("-inf"), new_highest, 0.0)  # -inf - -inf is NaN
            fade, weight = tl.exp2(highest - shift), tl.exp2(lse - shift)
            y = y * fade + weight * tl.load(part + entry * D + d)
            total = total * fade + weight
            highest = new_highest
        tl.store(out + (row * R + r).to(tl.int64) * D + d, y / tl.where(total > 0, total, 1.0))


def decode(q, pool_k, pool_v, table, lengths, items, places):
    """Row i attends over its lengths[i] slots; no slot, no output: 0.

    q (rows, R, D), rotated; pools (pages, page, D); table (rows, pages per row); lengths (rows,);
    items (3, programs) and places (2, rows) of one layer's work_list, of these lengths or of
    earlier ones. Returns y (rows, R, D).
    """
    (rows, R, D), PAGE, programs = q.shape, pool_k.size(1), items.size(1)
    out, part = torch.empty_like(q), q.new_empty(programs, R, D, dtype=torch.float32)
    lse = q.new_empty(programs, R, dtype=torch.float32)
    decode_kernel[(programs,)](
        q, pool_k, pool_v, table, lengths, items, out, part, lse, 1 / math.sqrt(D), table.size(1),
        R=R, R_PAD=max(16, power_of_2(R)), D=D, PAGE=PAGE, BLOCK=BLOCK)
    combine_kernel[(rows * R,)](part, lse, places, out, rows, R=R, D=D)
    return out


# ------------------------------------------------------------------------ the cache in pages

class PagedCache(Pages):
    """Algorithm 1 over Pages; see there for `pages`, `strips`, and how sequences come and go.

    A step at T = 1 never waits for a GPU, so it cannot raise errors there; `check` does. `seen`
    counts calls, and the positions are checked by it. It must be set to the longest sequence's
    tokens where sequences come and go, or a captured step is replayed.
    """

    def __init__(self, config, batch, device=None, dtype=torch.float32, page_size=16, pages=None,
                 strips=False):
        super().__init__(config, batch, device, dtype, accumulate, page_size, pages, strips)
        self.room = {}                                           # of a step without kernels
        processors = 1
        if self.lengths.is_cuda:
            properties = torch.cuda.get_device_properties(self.lengths.device)
            processors = properties.multi_processor_count
        self.extra = 4 * processors      # programs of a decode step, beside one for each head
        self.work = work_list(self.lengths.flatten(1), self.extra)

    def admit(self, rows):
        """Pages.admit. A prompt of one token makes its work list."""
        part = super().admit(rows)
        part.work = None
        return part

    def share_work(self):
        """Cut the heads anew for the programs of a decode step, by their lengths now."""
        for old, new in zip(self.work, work_list(self.lengths.flatten(1), self.extra), strict=True):
            old.copy_(new)               # in place: a graph reads it

    def append(self, layer, q, k, v):
        """T tokens, each into a slot of its own in every head."""
        T = q.size(2)
        if self.seen[layer] == 0 and T > 1:
            q, k = self.rotated(q, 0, T), self.rotated(k, 0, T)
            self.store(layer, k, v, torch.ones(k.shape[:3], dtype=torch.bool, device=k.device))
            return attend(q, k, v)
        tokens = zip(*(x.split(1, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([self.step(layer, *token, None, None) for token in tokens], dim=2)

    def attend_deciding(self, layer, q, k, v):
        """`attend` for one token, T = 1, with dmc.decide's decisions, which the kernel makes."""
        if not self.kernels:
            alpha, _, omega = dmc.decide(q, k, self.config, position=self.seen[layer])
            return self.attend(layer, q, k, v, alpha, omega)
        self.expect(layer, 1, True, q.device)
        return self.step(layer, q, k, v, None, None, decides=True)

    def step(self, layer, q, k, v, alpha, omega, decides=False):
        """Algorithm 1 for one token of every sequence that runs.

        alpha None: all append, unless decides says that the kernel makes alpha and omega.
        """
        self.seen[layer] += 1
        if not self.kernels:
            return self.step_in_operations(layer, q, k, v, alpha, omega)
        if self.work is None:
            self.work = work_list(self.lengths.flatten(1), self.extra)
        if self.seen[layer] % 64 == 0 and layer == 0:
            self.share_work()
        q = self.update_in_kernel(layer, q, k, v, alpha, omega, decides)
        y = decode(q, self.pool_k, self.pool_v, self.table[layer].flatten(0, 1),
                   self.lengths[layer].flatten(), *(x[layer] for x in self.work))
        return y.view(len(k), -1, 1, k.size(-1))

    def update_in_kernel(self, layer, q, k, v, alpha, omega, decides=False):
        """One token of every sequence into its slot. Returns rotated queries (B G, H / G, D)."""
        (B, H, _, D), G, W = q.shape, k.size(1), self.open.omegas.size(-1)
        q, k, v = (x[:, :, 0] if x.stride(-1) == 1 else x[:, :, 0].contiguous() for x in (q, k, v))
        open_k, open_v, open_omega = (x[layer] for x in self.open.tensors())
        told = alpha is not None                                 # else they are not read
        alpha, omega = (x.float().contiguous() if told else open_omega for x in (alpha, omega))
        turned = torch.empty(B * G, H // G, D, device=q.device, dtype=q.dtype)
        step_kernel[(B * G,)](
            q, k, v, alpha, omega, float(self.config.c), self.cos, self.sin, turned,
            self.pool_k, self.pool_v, self.table[layer], self.lengths[layer], self.ages[layer],
            open_k, open_v, open_omega, self.free, self.left, self.failed, G, self.table.size(-1),
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            R=H // G, HALF=D // 2, W=W, W_PAD=power_of_2(W), PAGE=self.page_size,
            WINDOWED=self.config.window is not None, DECIDES=told or decides, TOLD=told,
            CONTROL_GAIN=self.gain, num_warps=1)
        return turned

    def step_in_operations(self, layer, q, k, v, alpha, omega):
        """step_kernel and decode_kernel in PyTorch's operations, padded to the longest head."""
        lengths, ages = self.lengths[layer], self.ages[layer]                    # (B, G)
        appends = running = ages >= 0
        slot = lengths[..., None]
        if alpha is not None:
            merge = (alpha > 0.5) & (slot > 0)                   # the first token appends
            k, v = self.open.average(layer, ages.long(), k, v, merge[..., 0], omega)
            appends, slot = running & ~merge[..., 0], slot - merge.int()
        self.take(layer, slot, appends[..., None] & (slot % self.page_size == 0))
        age = ages[:, :1].clamp(min=0)                           # all heads of a sequence agree
        cos, sin = self.cos[age][:, :, None], self.sin[age][:, :, None]      # (B, 1, 1, D / 2)
        q, k = (dmc.rotate_heads(x, cos, sin, self.gain) for x in (q, k))
        self.write(layer, slot, running[..., None], k, v)
        lengths.add_(appends)                                    # only now: slot may be its view
        ages.add_(running)
        y = (self.strips.attend(layer, q, lengths) if self.strips else
             attend_pages(q, self.pool_k, self.pool_v, self.table[layer], lengths, self.room))
        return y.masked_fill(~running[:, :1, None, None], 0)


def Cache(config, batch, device=None, dtype=torch.float32, page_size=16, pages=None):
    """dmc.Cache: a PagedCache where kernels run or `pages` are given, else a PaddedCache."""
    if uses_kernels(device) or pages is not None:
        return PagedCache(config, batch, device, dtype, page_size, pages)
    return PaddedCache(config, batch, device, dtype, accumulate)
