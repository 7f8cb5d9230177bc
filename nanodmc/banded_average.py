"""The average of Eq. 9 with PyTorch's operations: banded matrix products, or spans that double.

For a window the average is a product with a banded matrix, which suits a CPU. For whole segments
and wide windows, spans of tokens are joined in pairs. Names and shapes are those of dmc.py.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from dmc import before, wide


def windows(x, W):
    """(B, G, T) -> (W, B, G, T): at [m, ..., t] token t - W + 1 + m, 0 before the start."""
    return F.pad(x, (W - 1, 0)).unfold(-1, x.size(-1), 1).movedim(-2, 0)


def coefficients(alpha, omega, W):
    """The band of Eq. 9: fade and share (W, B, G, T), and 1 / z_t (B, G, T).

    With i = t - W + 1 + m, fade[m, t] = alpha_{i+1} ... alpha_t, and share[m, t] = fade omega_i /
    z_t is the part of token i in the average at t. Nothing is divided by alpha.
    """
    alphas = windows(alpha, W)
    fade = alpha.new_ones(alphas.shape)
    for m in reversed(range(W - 1)):
        torch.mul(fade[m + 1], alphas[m + 1], out=fade[m])
    share = fade * windows(omega, W)
    inverse_z = share.sum(0).reciprocal()
    return fade, share.mul_(inverse_z), inverse_z


def skewed(band, W):
    """The diagonals of the band in (..., n, n + W - 1): a view (..., n, W), row t from column t."""
    *sizes, n, columns = band.shape
    return band.as_strided((*sizes, n, W), (*band.stride()[:-2], columns + 1, 1))


def banded(share, n):
    """share (W, B, G, T) as a banded matrix for each tile of n tokens: (tiles, n, n + W - 1)."""
    W, T = share.size(0), share.size(-1)
    share = F.pad(share.movedim(0, -1), (0, 0, 0, -T % n)).reshape(-1, n, W)
    band = share.new_zeros(len(share), n, n + W - 1)
    skewed(band, W).copy_(share)
    return band


def tiled(k, v, W, n, dtype):
    """k and v (B, G, T, D) side by side, in tiles of n tokens with the W - 1 before them.

    Returns (tiles, n + W - 1, 2 D): one copy and no more, as tiles overlap in memory. What lies
    before a head's first token belongs to another head and has coefficient 0. So do the zeros that
    fill up a head's last tile.
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


def guarded(means, x, share):
    """The averages of x (B, G, T, D) by their shares; what is not finite is made anew.

    A banded product multiplies tokens of earlier segments, and of the head before, by 0, and 0
    times NaN is NaN. Here what has no share is not counted.
    """
    total = torch.zeros_like(means)
    for n, part in enumerate(share.flip(0)):
        part = part[..., None]
        total += (part * before(x, n)).masked_fill(part == 0, 0)
    return torch.where(means.isfinite(), means, total)


class BandedAverage(torch.autograd.Function):
    """The windowed average: for each tile of n tokens, a banded n x (n + W - 1) matrix product."""

    TILE = 32

    @staticmethod
    def forward(ctx, k, v, alpha, omega, W):
        n = max(BandedAverage.TILE, W)
        dtype = torch.promote_types(wide(k).dtype, wide(omega).dtype)
        fade, share, inverse_z = coefficients(alpha.to(dtype), omega.to(dtype), W)
        band, tokens = banded(share, n), tiled(k, v, W, n, dtype)
        ctx.save_for_backward(alpha, omega, fade, share, inverse_z, band, tokens)
        ctx.sizes, ctx.dtypes = k.shape, (k.dtype, v.dtype)
        product = band @ tokens
        means = split_heads(product, k.shape)
        if not product.sum().isfinite():
            means = [guarded(x, y.to(dtype), share) for x, y in zip(means, (k, v), strict=True)]
        return tuple(x.to(d) for x, d in zip(means, ctx.dtypes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        alpha, omega, fade, share, inverse_z, band, tokens = ctx.saved_tensors
        (W, _, _, T), n = share.shape, band.size(1)
        older = W - 1
        grad = tiled(*grads, 1, n, band.dtype)
        dx = band[:, :, older:].mT @ grad                    # of each tile's own tokens
        if older:                                            # and of those in the tile before
            dx[:-1, n - older:] += (band[1:, :older, :older].mT @ grad[1:, :older])
        dkv = zip(split_heads(dx, ctx.sizes), ctx.dtypes, strict=True)
        dshare = skewed(grad @ tokens.mT, W).reshape(*alpha.shape[:2], -1, W)[:, :, :T]
        dshare = dshare.movedim(-1, 0)                       # (W, B, G, T)
        dsum = (dshare - (dshare * share).sum(0)).mul_(inverse_z)     # of share before it was / z_t
        dalpha, domega = coefficient_gradients(dsum, fade, alpha, omega)
        return *(x.to(d) for x, d in dkv), dalpha, domega, None


def gathered(x):
    """The transpose of `windows`: (W, B, G, T) -> (B, G, T), a sum over windows."""
    W = x.size(0)
    x = F.pad(x, (0, W - 1))                                 # zeros between a row and the next one
    return x.as_strided(x.shape, (x.stride(0) - 1, *x.stride()[1:])).sum(0)[..., W - 1:]


def coefficient_gradients(dsum, fade, alpha, omega):
    """From dsum (W, B, G, T), the gradient of fade * omega: those of alpha and omega, (B, G, T)."""
    W = len(fade)
    alphas = windows(alpha.to(fade.dtype), W)
    past = dsum * windows(omega.to(fade.dtype), W)
    dfade = torch.zeros_like(fade)                           # [m]: of all that is older than m
    for m in range(W - 1):
        torch.addcmul(past[m], dfade[m], alphas[m], out=dfade[m + 1])
    return gathered(dfade * fade).to(alpha.dtype), gathered(dsum * fade).to(omega.dtype)


def join_spans(fade, sums, n, older_fade, older_sums):
    """Spans of n tokens ending at each token, extended by the spans that end n tokens earlier."""
    return fade * before(older_fade, n), torch.addcmul(sums, fade, before(older_sums, n))


def doubling_average(k, v, alpha, omega, window=None):
    """Eq. 9 for any window in about log2(w) steps: dmc.accumulate, in O(T log w) work.

    The sum over the last m + n tokens is the sum over the last m, plus the sum over the n before
    those, faded by the alphas in between.
    """
    T, sizes = k.size(2), (k.size(-1), v.size(-1), 1)
    omega = wide(omega)[..., None]
    sums = torch.cat([omega * k, omega * v, omega], dim=-1)  # z is the last channel
    span, length = (wide(alpha)[..., None], sums), 1         # a single token's fade is its alpha
    total, covered = None, 0
    remaining = T if window is None else min(window, T)
    while remaining:                                         # binary digits, lowest first
        if remaining % 2:
            total = join_spans(*total, covered, *span) if total else span
            covered += length
        remaining //= 2
        if remaining:
            span, length = join_spans(*span, length, *span), 2 * length
    k_sum, v_sum, z = total[1].split(sizes, dim=-1)
    return (k_sum / z).to(k.dtype), (v_sum / z).to(v.dtype)
