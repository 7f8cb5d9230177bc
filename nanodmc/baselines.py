"""What DMC is compared with."""

from dataclasses import replace

import torch

from dmc_fast import PagedCache
from nanodmc.variants import blocks


class PoolingCache:
    """A cache that averages every `every` tokens with equal weights, whatever the model decides.

    It holds a cache of any kind and differs from it only in the decisions.
    """

    def __init__(self, cache, every):
        self.cache, self.every = cache, every

    def __getattr__(self, name):
        return getattr(self.cache, name)

    def attend(self, layer, q, k, v, alpha=None, omega=None):
        """As dmc.Cache.attend, where alpha and omega mean nothing."""
        alpha = blocks(k, self.every, self.cache.seen[layer])
        return self.cache.attend(layer, q, k, v, alpha, torch.ones_like(alpha))


def pooling_cache(make, every):
    """A function that makes a PoolingCache (appendix E). make: a Cache, or what makes one.

    It averages whole blocks, without the model's window.
    """
    return lambda config, *args, **kwargs: PoolingCache(
        make(replace(config, window=None), *args, **kwargs), every)


class PoolingPages(PagedCache):
    """A PagedCache for a model of the variant fmp, whose sequences come and go.

    Each is averaged by its own age, where the model knows one position for all.
    """

    def step(self, layer, q, k, v, alpha, omega):
        """As PagedCache.step, where alpha means nothing."""
        if alpha is not None:
            alpha = (self.ages[layer] % self.config.every > 0).to(alpha.dtype)[..., None]
        return super().step(layer, q, k, v, alpha, omega)


def paged_cache(config):
    """The class of PagedCache for a model with this Config."""
    return PoolingPages if getattr(config, "every", None) else PagedCache
