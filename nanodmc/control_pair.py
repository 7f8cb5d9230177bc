"""Which rotary pair the control channels belong to, chosen such that a model misses them least.

Two changes leave every score of a plain Llama as it was: two rotary pairs may change places,
together with their frequencies (Config.control_pair), and the two channels of a pair may be turned
by the same angle in queries and keys. So the control channels can be made of what the scores need
least before Eq. 12 takes them away. This is ours; the paper takes channel 0 as it finds it.

Eq. 12 costs more than channel 0. With a pair (a, b), frequency f, a query at position m and a key
at n, scores lose the difference between

    (a_q a_k + b_q b_k) cos (m - n) f + (a_q b_k - b_q a_k) sin (m - n) f         of a plain Llama
    b_q b_k cos m f cos n f                                                       of a freed one

since channel 0 is zero before the rotation, and again after it, where b leaks into it.
"""

import math
from dataclasses import dataclass

import torch

import dmc


@dataclass(frozen=True)
class Choice:
    """The pair that the control channels are to be of, and how far each key-value head turns it."""
    pair: int
    degrees: list               # (L, G), whole numbers


# ------------------------------------------------------------------------------- the weights

def turned(rows, pair, cos, sin):
    """Rows (..., D, dim) of a q or k projection, with `pair` in the place of pair 0, and turned.

    cos, sin: of the angle, numbers or tensors (...). Channels (a, b) become
    (a cos + b sin, b cos - a sin). Pair 0 goes to where `pair` was.
    """
    pairs = rows.unflatten(-2, (2, rows.size(-2) // 2))        # (..., 2, D / 2, dim)
    a, b = dmc.wide(pairs[..., pair, :]).unbind(-2)
    cos, sin = (torch.as_tensor(x, dtype=torch.float64)[..., None].to(a) for x in (cos, sin))
    first = torch.stack([a * cos + b * sin, b * cos - a * sin], dim=-2).to(rows.dtype)
    pairs = pairs.clone()
    pairs[..., pair, :] = pairs[..., 0, :]
    pairs[..., 0, :] = first
    return pairs.flatten(-3, -2)


@torch.no_grad()
def apply(choice, model):
    """Change a model's weights to those of a choice; its Config must name the pair already.

    Scores stay what they were, but for the rounding of the rows that are turned.
    """
    D, G = model.config.head_dim, model.config.n_kv_head
    angles = torch.tensor(choice.degrees, dtype=torch.float64).deg2rad()          # (L, G)
    for layer, angle in zip(model.layers, angles, strict=True):
        for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            rows = proj.weight.unflatten(0, (G, -1, D))      # heads behind their key-value head
            rows = turned(rows, choice.pair, angle.cos()[:, None], angle.sin()[:, None])
            proj.weight = torch.nn.Parameter(rows.flatten(0, 2))


# -------------------------------------------------------------------------------- the choice

@torch.no_grad()
def choose(model, sequences):
    """The Choice for a plain Llama that reads the sequences, tensors (1, T) of tokens.

    Of every pair and angle, the mean of (what scores lose)^2 is known from second moments, and the
    angle is the best of each head. The pair is the one of the smallest sum over all heads.
    """
    moments = [x.cpu() for x in measure(model, sequences)]
    c = lost(model.config, sequences[0].size(-1))
    loss = torch.stack([expected_loss(*moments, c, degrees) for degrees in range(180)])
    of_best_angle, degrees = loss.min(dim=0)                                      # (P, L, G)
    pair = of_best_angle.sum((1, 2)).argmin().item()
    return Choice(pair, degrees[pair].tolist())


def measure(model, sequences):
    """Second moments of a model's queries, and of its keys around their mean: (P, L, G, 2, 2) each.

    Around their mean, as what all keys have in common changes all scores of a query alike.
    """
    D, G = model.config.head_dim, model.config.n_kv_head
    seen = [[], []]

    def watch(sums):
        def hook(module, inputs, x):
            pairs = dmc.wide(x).view(-1, G, x.size(-1) // (G * D), 2, D // 2)   # tokens, G, heads
            pairs = pairs.permute(4, 1, 0, 2, 3).flatten(2, 3).double()         # P, G, samples, 2
            sums.append((pairs.mT @ pairs / pairs.size(2), pairs.mean(2)))
        return hook

    hooks = [proj.register_forward_hook(watch(sums)) for layer in model.layers
             for proj, sums in zip((layer.self_attn.q_proj, layer.self_attn.k_proj), seen,
                                   strict=True)]
    for x in sequences:
        model.hidden(x)
    for hook in hooks:
        hook.remove()
    mean = lambda x: torch.stack(x).unflatten(0, (len(sequences), -1)).mean(0).transpose(0, 1)
    (q, _), (k, k_mean) = ([mean(x) for x in zip(*sums, strict=True)] for sums in seen)
    return q, k - k_mean[..., None] * k_mean[..., None, :]


def lost(config, T, most=512):
    """How much of each product the scores of T tokens lose: (P, 4, 4), the mean of c c^T.

    c . (a_q a_k, a_q b_k, b_q a_k, b_q b_k) is what a score loses at one m and n <= m. More than
    `most` positions are thinned out evenly.
    """
    at = torch.linspace(0, T - 1, min(T, most), dtype=torch.float64)
    m, n = at[torch.tril_indices(len(at), len(at))]
    means = []
    for f in dmc.rotary_frequencies(config).tolist():
        cos, sin = torch.cos((m - n) * f), torch.sin((m - n) * f)
        c = torch.stack([cos, sin, -sin, torch.sin(m * f) * torch.sin(n * f)])
        means.append(c @ c.T / len(m))
    return torch.stack(means)


def expected_loss(q, k, c, degrees):
    """The mean of (what scores lose)^2 for pairs turned by an angle, (P, L, G).

    q, k, c: as measured, and lost. Queries and keys count as independent, so that the moments of
    their products are the products of their moments.
    """
    angle = math.radians(degrees)
    turn = q.new_tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    q, k = (turn @ x @ turn.T for x in (q, k))
    products = torch.einsum("...ij,...kl->...ikjl", q, k).flatten(-2).flatten(-3, -2)  # (..., 4, 4)
    return (products * c[:, None, None]).sum((-1, -2))
