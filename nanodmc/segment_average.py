"""The averages of Eq. 9 without a window, over whole segments: a kernel for prefill on a GPU."""

from __future__ import annotations  # kernels can be read, not run, where Triton is missing

import torch

from nanodmc.launch import jit, power_of_2, tl, triton


@jit
def join_spans(fade, sums, later_fade, later_sums):
    return fade * later_fade, later_fade * sums + later_sums


@jit
def segment_average_kernel(x, alpha, omega, mean, T, G, stride_b, stride_g, stride_t,
                           D: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr):
    """The average of Eq. 9 over whole segments, for SLICE channels of one head's keys or values.

    The recurrence is a scan: in registers within a tile, by a carried sum from tile to tile. Heads
    and slices of channels run in parallel. Floor: x read once, its average written once, 4 D bytes
    per token and head in bf16.
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
        at = start + t[:, None] * stride_t + d[None, :]
        new = weight[:, None] * tl.load(x + at, mask=read, other=0).to(tl.float32)
        fade, z = tl.associative_scan((a, weight), 0, join_spans)
        fades = tl.broadcast_to(a[:, None], (TILE, SLICE))
        every_fade, sums = tl.associative_scan((fades, new), 0, join_spans)
        sums += every_fade * carried[None, :]
        z += fade * carried_z
        out = (row * T + t)[:, None] * D + d[None, :]
        tl.store(mean + out, sums / z[:, None], mask=read)
        last = tl.arange(0, TILE) == TILE - 1
        carried = tl.sum(tl.where(last[:, None], sums, 0.0), 0)
        carried_z = tl.sum(tl.where(last, z, 0.0), 0)


def segment_average(x, alpha, omega):
    """x (B, G, T, D) -> the averages over whole segments; no gradient."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    (B, G, T, D), mean = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    SLICE = min(32, power_of_2(D))
    segment_average_kernel[(B * G, triton.cdiv(D, SLICE))](
        x, alpha, omega, mean, T, G, *x.stride()[:3], D=D, SLICE=SLICE, TILE=64)
    return mean
