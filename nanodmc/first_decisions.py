"""Decisions to start a retrofit with: what merging would cost, predicted from the layer's input.

In the paper, the rows that feed the control channels are zero after Eq. 12: every token appends,
and training finds out by noise which tokens may merge. This module, which is ours, asks a few
sequences of text and fits the rows to the answer.

A light token that merges into the slot of a heavy one is nearly forgotten. What forgetting token t
would cost follows from one backward pass. Query i gives the tokens probabilities p_ij and has the
output o_i = sum_j p_ij v_j. Without t the output changes by p_it / (1 - p_it) (o_i - v_t), and with
the gradient g_i of the text's loss,

    cost_t = 1/2 sum_i (p_it / (1 - p_it) g_i . (o_i - v_t))^2

is the divergence from the model as it was, by the empirical Fisher information, each query and head
by itself. The weight of a token in its segment's average is to follow sum_i p_it^2.
"""

import math
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F

import dmc
from nanodmc.losses import language_loss
from nanodmc.parallel import control_rows

TOKENS = 2 ** 16     # that costs are measured on; fewer fit the noise
SHARPNESS = 2.0      # the logit of a decision is so many times log(price / cost)
CHEAP = 0.5          # share of all tokens and heads that cost less than the price
LEAST = 0.05         # of 1 - p_it in a cost, which a single score would rule otherwise
STEPS, SAMPLES, RATE, DECAY = 300, 1024, 0.02, 0.01                  # of Adam, in the fits


class Seen(NamedTuple):
    """What one layer did with one sequence of T tokens."""
    x: torch.Tensor            # input of the projections (T, dim), in the host's memory
    cost: torch.Tensor         # of forgetting a token (T, G)
    weight: torch.Tensor       # sum_i p_it^2 (T, G)


def fit(model, sequences):
    """For each layer, the rows of the control channels: of queries (H, dim), of keys (G, dim).

    model: one that Eq. 12 has freed. sequences: tensors (1, T) of tokens, T > 1.
    """
    layers = list(zip(*(measure(model, x) for x in sequences), strict=True))
    costs = [torch.cat([seen.cost[1:] for seen in layer]) for layer in layers]    # 0 always appends
    every = torch.cat([cost.flatten() for cost in costs])
    price = every.kthvalue(math.ceil(CHEAP * len(every))).values
    group, offset = model.config.n_head // model.config.n_kv_head, model.config.c / SHARPNESS
    rows = []
    for layer, cost in zip(layers, costs, strict=True):
        x, later = (torch.cat([seen.x[n:] for seen in layer]) for n in (0, 1))
        weight = torch.cat([seen.weight for seen in layer])
        queries, keys = predictor(x, weight, 0.0), predictor(later, cost / price, offset)
        rows.append((queries.repeat_interleave(group, dim=0), -SHARPNESS * keys))
    return rows


@torch.no_grad()
def apply(rows, model):
    """Write the rows of `fit` into a model."""
    for row, fitted in zip(control_rows(model), chain.from_iterable(rows), strict=True):
        row.copy_(fitted)


# ---------------------------------------------------------------------------- what is measured

def measure(model, tokens):
    """A list of Seen, one for each layer, of the tokens (1, T)."""
    with watched(model) as layers:
        hidden, _ = model.hidden(tokens, gain=0.0)
    loss = language_loss(model.lm_head, tokens[:, 1:], hidden[:, :-1]) * (tokens.size(1) - 1)
    gradients = torch.autograd.grad(loss, [layer["y"] for layer in layers])
    with torch.no_grad():
        return [costs(model.config, gradient=g, **layer)
                for g, layer in zip(gradients, layers, strict=True)]


@contextmanager
def watched(model):
    """A list of what passes each layer: x, q, k and v, and y, what o_proj is given."""
    layers, hooks = [{} for _ in model.layers], []

    def keep(seen, name):
        def hook(module, inputs, output):
            seen["x"], seen[name] = inputs[0].detach(), output.detach()
        return hook

    for layer, seen in zip(model.layers, layers, strict=True):
        attention = layer.self_attn
        for name in "qkv":
            proj = getattr(attention, f"{name}_proj")
            hooks.append(proj.register_forward_hook(keep(seen, name)))
        hooks.append(attention.o_proj.register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.update(y=inputs[0])))
    yield layers
    for hook in hooks:
        hook.remove()


def costs(config, x, q, k, v, y, gradient):
    """The Seen of one layer, of what `watched` kept of it and the gradient by y, (1, T, .) each."""
    grouped = lambda z: dmc.wide(z[0]).unflatten(-1, (config.n_kv_head, -1, config.head_dim)
                                                 ).permute(1, 2, 0, 3)            # (G, heads, T, D)
    q, k, v, o, g = map(grouped, (q, k, v, y, gradient))
    angles = dmc.rotary_table(config, x.size(1), x.device)
    q, k = (dmc.rotate_heads(z, *angles, gain=0.0) for z in (q, k))
    scores = q @ k.mT / math.sqrt(config.head_dim)
    future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
    p = scores.masked_fill(future, -torch.inf).softmax(-1)
    change = p / (1 - p).clamp(min=LEAST) * ((g * o).sum(-1, keepdim=True) - g @ v.mT)
    return Seen(x[0].cpu(), (change ** 2).sum((1, 2)).T / 2, (p ** 2).sum((1, 2)).T)


# -------------------------------------------------------------------------------- what is fitted

def predictor(x, target, offset):
    """w (n, dim) such that exp(x w + offset) is near the mean of the target, given x.

    x (N, dim), target (N, n), not negative; offset a number. With z = x w + offset, it minimizes
    target * softplus(-z) + softplus(z), whose minimum is where exp(z) = target, and weight decay.
    """
    scale = (dmc.wide(x).square().mean(0).sqrt() + 1e-6).to(target.device)
    w = torch.zeros(x.size(1), target.size(1), device=target.device, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=RATE)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        some = order.roll(-step * SAMPLES)[:SAMPLES]
        z = dmc.wide(x[some].to(target.device)) / scale @ w + offset
        loss = (target[some.to(target.device)] * F.softplus(-z) + F.softplus(z)).mean(0).sum()
        w.grad, = torch.autograd.grad(loss + DECAY * w.square().sum(), w)
        optimizer.step()
    return (w.detach() / scale[:, None]).T
