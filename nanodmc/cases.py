"""What the throughput of figure 5 is compared between: models, their caches, forced decisions.

A DMC model decides by itself. For any other model decisions are forced: heads merge at random.
"""

import copy
from dataclasses import replace
from typing import NamedTuple

import torch

from dmc_fast import PagedCache
from nanodmc.evaluate import decisions
from nanodmc.files import InputError


class Case(NamedTuple):
    """One of the things compared."""
    name: str
    model: torch.nn.Module
    cache_class: type
    kept: torch.Tensor          # (L, G): the part of its tokens that each head keeps
    gain: float | None          # as in Transformer.hidden


def kept_parts(config, cr, seed=0):
    """The part of its tokens that each head keeps, (L, G), with the mean 1 / cr and none above 1.

    Log-normal, and less in the deeper half of the layers: about the spread of figure 6.
    """
    L, G = config.n_layer, config.n_kv_head
    part = (0.7 * torch.randn(L, G, generator=torch.Generator().manual_seed(seed))).exp()
    part *= torch.where(torch.arange(L) < L // 2, 1.4, 0.6)[:, None]
    low, high = 0.0, 1e3
    for _ in range(60):                                # the factor at which the mean is right
        factor = (low + high) / 2
        less = (part * factor).clamp(max=1).mean() < 1 / cr
        low, high = (factor, high) if less else (low, factor)
    return (part * high).clamp(max=1)


def forced(kept, device):
    """A PagedCache that merges at random, each head as often as `kept` (L, G) says."""
    kept = kept.to(device)[..., None]

    class ForcedCache(PagedCache):
        def attend(self, layer, q, k, v, alpha=None, omega=None):
            alpha = (torch.rand(k.shape[:3], device=k.device) >= kept[layer]).float()
            return super().attend(layer, q, k, v, alpha, torch.ones_like(alpha))

        attend_deciding = attend
    return ForcedCache


def uncompressed(model):
    """The Case of a cache that keeps every token."""
    config = model.config
    kept = torch.ones(config.n_layer, config.n_kv_head)
    return Case("CR 1", model, PagedCache, kept, 0.0 if config.dmc else 1.0)


def bench_cases(model, crs, ids):
    """The Cases to compare, the uncompressed one first. ids: a text to see what the model keeps.

    crs: of forced decisions; None: 2, 4 and 8. Raises InputError where the model decides.
    """
    if crs and model.config.dmc:
        raise InputError("--cr has no effect on a DMC model, which decides by itself; "
                         "leave it out.")
    yield uncompressed(model)
    if model.config.dmc:
        kept = 1 - decisions(model, ids).float().mean(-1).cpu()
        yield Case("own decisions", model, PagedCache, kept, None)
        return
    deciding = copy.copy(model)                        # the same weights, in a model that decides
    deciding.config = replace(model.config, dmc=True)
    for cr in crs or (2.0, 4.0, 8.0):
        kept = kept_parts(model.config, cr)
        cache_class = forced(kept, next(model.parameters()).device)
        yield Case(f"CR {cr:g}", deciding, cache_class, kept, None)
