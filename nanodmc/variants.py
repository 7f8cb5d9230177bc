"""The variants that the paper compares DMC with: each is one function in the place of another.

    dmc           the method itself
    dmc-c         an extra loss pulls the compression of a layer's heads together
    dmc-hardc     a layer's heads share one decision and one weight
    local-prior   every layer is held to the target CR by itself
    immediate     the target CR holds from the first step on
    uniform       every token has the weight 1
    nvidia        weights as in the models that the authors released
    fmp           Fixed Memory Pooling: n tokens become a slot, and nothing is decided
    gqa           no DMC: key-value heads are averaged, so that fewer are left

A model of a variant has a VariantConfig, which stands in its checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

import dmc
from nanodmc.files import InputError


@dataclass(frozen=True, kw_only=True)
class VariantConfig(dmc.Config):
    """The Config of a model that a variant trained."""
    variant: str                 # a name in VARIANTS
    every: int | None = None     # of fmp: tokens in a slot


# ----------------------------------------------------------------- in the place of dmc.decide

def decide_together(q, k, config, noise=False, position=0):
    """As dmc.decide, with one decision and one weight for all heads of a layer.

    Ours: they are those of key-value head 0 and of its query heads; the paper does not say whose.
    """
    group = config.n_head // config.n_kv_head
    alpha, keep, omega = dmc.decide(q[:, :group], k[:, :1], replace(config, n_kv_head=1), noise,
                                    position)
    return tuple(x.expand(k.shape[:3]).contiguous() for x in (alpha, keep, omega))


def weigh_equally(q, k, config, noise=False, position=0):
    """As dmc.decide, with the weight 1 for every token."""
    alpha, keep, omega = dmc.decide(q, k, config, noise, position)
    return alpha, keep, torch.ones_like(omega)


def weigh_with_offset(q, k, config, noise=False, position=0):
    """As dmc.decide, with weights sigmoid(q[0] + c) + 2^-7, as in the authors' code."""
    alpha, keep = dmc.relaxed_decision(k[..., 0], config, noise, start=position == 0)
    omega = dmc.importance(dmc.wide(q[..., 0]) + config.c, config.n_kv_head)
    return alpha, keep, omega + 2 ** -7


def blocks(k, every, position):
    """alpha (B, G, T) of T tokens with keys k: a new slot where `every` divides the position."""
    at = torch.arange(position, position + k.size(2), device=k.device)
    return (at % every > 0).to(dmc.wide(k[:0]).dtype).expand(k.shape[:3]).contiguous()


def pool_blocks(q, k, config, noise=False, position=0):
    """As dmc.decide: every block of `config.every` tokens is a slot (appendix E)."""
    alpha = blocks(k, config.every, position)
    return alpha, torch.log1p(-alpha), torch.ones_like(alpha)


# -------------------------------------------------- in the place of Eq. 10, and beside it

def prior(alpha, cr, exact=False):
    """Eq. 10. alpha (L, B, G, T). exact, in solidify and beyond the paper: from both sides.

    A short retrofit overshoots by several percent, and the LM loss alone is slow to bring the CR
    back. There the sequences of each pass together are held to the target.
    """
    return ((1 - alpha).mean() - 1 / cr).abs() if exact else dmc.compression_loss(alpha, cr)


def local_prior(alpha, cr, exact=False):
    """Eq. 10 of each layer by itself, and their mean: no layer makes up for another."""
    if exact:
        return ((1 - alpha).mean((1, 2, 3)) - 1 / cr).abs().mean()
    return ((1 - alpha).mean((2, 3)) - 1 / cr).clamp(min=0).mean()


def no_prior(alpha, cr, exact=False):
    """Nothing holds the compression ratio where none is learned."""
    return alpha.new_zeros(())


def unevenness(alpha):
    """DMC-C: how far a layer's heads are from their mean, in merges per token. alpha (L, B, G, T).

    Ours: the mean over layers, sequences and heads h of |a_h - mean a|, where a_h is the mean of
    alpha over the tokens; the paper does not give its formula.
    """
    merges = alpha.mean(-1)                                                       # (L, B, G)
    return (merges - merges.mean(-1, keepdim=True)).abs().mean()


# ------------------------------------------------------------------------------ the variants

@dataclass(frozen=True)
class Variant:
    """What is different from DMC."""
    title: str
    decide: Callable = dmc.decide
    prior: Callable = prior                  # weighted, beside the LM loss
    extra: Callable | None = None            # of alpha, with the weight 1
    annealed: bool = True                    # the target CR rises: a run can keep several models


VARIANTS = {
    "dmc": Variant("DMC"),
    "dmc-c": Variant("DMC-C", extra=unevenness),
    "dmc-hardc": Variant("DMC-HardC", decide=decide_together),
    "local-prior": Variant("local prior", prior=local_prior),
    "immediate": Variant("immediate", annealed=False),
    "uniform": Variant("uniform weights", decide=weigh_equally),
    "nvidia": Variant("DMC as released", decide=weigh_with_offset),
    "fmp": Variant("fixed pooling", decide=pool_blocks, prior=no_prior, annealed=False),
    "gqa": Variant("GQA", annealed=False)}


def of_model(config):
    """The Variant of the model with this Config."""
    return VARIANTS[getattr(config, "variant", "dmc")]


def ops_of(config, ops):
    """What a Transformer with this Config takes as ops, made of dmc or dmc_fast."""
    decide = of_model(config).decide
    if decide is dmc.decide:
        return ops
    return SimpleNamespace(decide=decide, accumulate=ops.accumulate, attend=ops.attend,
                           Cache=ops.Cache)


def compression_term(variant, alpha, cr, weight, exact):
    """What a variant adds to the LM loss: Eq. 10 with its weight, or what stands in its place.

    alpha (L, B, G, T); weight: of Eq. 10; exact: as in `prior`.
    """
    loss = weight * variant.prior(alpha, cr, exact)
    return loss + variant.extra(alpha) if variant.extra else loss


# ----------------------------------------------------------------------------------------- GQA

def check_groups(config, size):
    """Raises InputError where key-value heads cannot be averaged in groups of `size`."""
    if config.n_kv_head % size:
        raise InputError(f"{config.n_kv_head} key-value heads cannot be averaged {size} by {size}; "
                         "choose a --cr that divides them.")


@torch.no_grad()
def group_heads(model, size, ops=dmc):
    """The same Llama with fewer key-value heads: `size` adjacent ones are averaged into one.

    Raises InputError as check_groups.
    """
    config = model.config
    check_groups(config, size)
    grouped = dmc.Transformer(replace(config, n_kv_head=config.n_kv_head // size), ops)
    weights = dict(model.state_dict())
    for name, w in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = dmc.wide(w).view(-1, size, config.head_dim, config.dim)
            weights[name] = heads.mean(1).flatten(0, 1).to(w.dtype)
    grouped.to(model.lm_head.weight).load_state_dict(weights)
    return grouped
