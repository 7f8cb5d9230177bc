"""What DMC is compared with."""

import torch


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
        first = self.cache.seen[layer]
        position = torch.arange(first, first + q.size(2), device=q.device)
        alpha = (position % self.every > 0).float().expand(k.shape[:3]).clone()
        return self.cache.attend(layer, q, k, v, alpha, torch.ones_like(alpha))


def pooling_cache(make, every):
    """A function that makes a PoolingCache (appendix E). make: a Cache, or what makes one."""
    return lambda *args, **kwargs: PoolingCache(make(*args, **kwargs), every)
