"""dmc.decide in training, by one kernel and one for its gradient.

PyTorch's operations take some 30 launches for it. And the gradient of a channel is for autograd one
of all channels, zero elsewhere, to be added to what comes from attention: as many bytes as the
gradient of attention moves. Here it is added to that gradient in place.
"""

from __future__ import annotations  # kernels can be read, not run, where Triton is missing

import torch

import dmc
from nanodmc.launch import in_kernels, jit, tl, triton

TILE = 256          # tokens of a program


@jit
def channel_mean(q, b, h, t, T, R: tl.constexpr, q_b, q_h, q_t):
    """The mean of channel 0 over the R query heads from h on, at tokens t."""
    total = tl.zeros(t.shape, tl.float32)
    for r in range(R):
        total += tl.load(q + b * q_b + (h + r) * q_h + t * q_t, mask=t < T, other=0).to(tl.float32)
    return total / R


@jit
def decision_kernel(q, k, uniform, alpha, keep, omega, T, G, c, noise, tau, q_b, q_h, q_t,
                    k_b, k_h, k_t, R: tl.constexpr, TILE: tl.constexpr):
    """alpha, keep and omega of TILE tokens of one key-value head, with noise from `uniform`.

    Floor: channel 0 of R queries and a key, each in a sector of 32 bytes of its own, and 16 bytes.
    """
    row, t = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    b, g, at = row // G, row % G, row * T + t
    logit = tl.load(k + b * k_b + g * k_h + t * k_t, mask=t < T, other=0).to(tl.float32)
    mean = channel_mean(q, b, g * R, t, T, R, q_b, q_h, q_t)
    u = tl.load(uniform + at, mask=t < T, other=0.5)
    u = tl.minimum(tl.maximum(u, 1e-6), 1 - 1e-6)
    x = (logit - c + noise * tl.log(u / (1 - u))) / (noise * tau)
    small = tl.exp(-tl.abs(x))
    plus = 1 + small                                    # log(1 + small), also where that rounds
    log = tl.where(plus == 1, small, tl.log(plus) * (small / tl.where(plus == 1, 1.0, plus - 1)))
    starts = t == 0                                     # a slot: nothing is there to merge into
    tl.store(alpha + at, tl.where(starts, 0.0, tl.sigmoid(x)), mask=t < T)
    tl.store(keep + at, tl.where(starts, 0.0, -tl.maximum(x, 0.0) - log), mask=t < T)
    tl.store(omega + at, tl.sigmoid(tl.maximum(mean, -30.0)), mask=t < T)


@jit
def decision_backward_kernel(alpha, keep, omega, dalpha, dkeep, domega, dlogit, dmean, N, scale,
                             TILE: tl.constexpr):
    """The gradients of channel 0 of keys, and of its mean over queries, for TILE numbers of N."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    a, o = tl.load(alpha + i, mask=i < N, other=0), tl.load(omega + i, mask=i < N, other=0)
    left = tl.exp(tl.load(keep + i, mask=i < N, other=0))           # 1 - alpha, also near 0
    to_alpha, to_keep = (tl.load(dalpha + i, mask=i < N, other=0),
                         tl.load(dkeep + i, mask=i < N, other=0))
    to_omega = tl.load(domega + i, mask=i < N, other=0)
    tl.store(dlogit + i, (to_alpha * a * left - to_keep * a) / scale, mask=i < N)
    tl.store(dmean + i, tl.where(o > 1e-13, to_omega * o * (1 - o), 0.0), mask=i < N)


class Decisions(torch.autograd.Function):
    """alpha, keep and omega of q and k, whose gradients are left in the dict `found`."""

    @staticmethod
    def forward(ctx, q, k, config, noise, found):
        (B, G, T, _), R = k.shape, q.size(1) // k.size(1)
        uniform = torch.rand_like(k[..., 0], dtype=torch.float32).contiguous()    # as dmc.py draws
        alpha, keep, omega = (torch.empty_like(uniform) for _ in range(3))
        decision_kernel[(B * G, triton.cdiv(T, TILE))](
            q, k, uniform, alpha, keep, omega, T, G, float(config.c), float(noise),
            float(config.tau), *q.stride()[:3], *k.stride()[:3], R=R, TILE=TILE)
        ctx.save_for_backward(alpha, keep, omega)
        ctx.scale, ctx.found, ctx.queries = noise * config.tau, found, R
        return alpha, keep, omega

    @staticmethod
    def backward(ctx, *grads):
        alpha, keep, omega = ctx.saved_tensors
        grads, n = [grad.contiguous() for grad in grads], alpha.numel()
        dlogit, dmean = torch.empty_like(alpha), torch.empty_like(alpha)
        decision_backward_kernel[(triton.cdiv(n, TILE),)](
            alpha, keep, omega, *grads, dlogit, dmean, n, ctx.scale, TILE=TILE)
        ctx.found["k"], ctx.found["q"] = dlogit, dmean / ctx.queries
        return None, None, None, None, None


def decide(q, k, config, noise=False, position=0):
    """dmc.decide. Where kernels train, q and k must have gradients from attention as well."""
    trains = noise and position == 0 and torch.is_grad_enabled() and q.requires_grad
    if not (trains and in_kernels(k)):
        return dmc.decide(q, k, config, noise, position)
    found, G = {}, k.size(1)
    alpha, keep, omega = Decisions.apply(q, k, config, noise, found)

    def add(grad, name):
        """To channel 0 of the heads of a group; autograd waits for `backward` before it asks.

        It must not know k, which would know it by its hook: autograd never frees such a circle.
        """
        if name in found:
            shared = found.pop(name)[:, :, None]                             # (B, G, 1, T)
            grad[..., 0].unflatten(1, (G, -1)).add_(shared.to(grad.dtype))
        return grad
    q.register_hook(lambda grad: add(grad, "q"))
    k.register_hook(lambda grad: add(grad, "k"))
    return alpha, keep, omega
